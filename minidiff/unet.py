"""The U-Net: one class; CIFAR's and Stable Diffusion's differ by their configs alone.

    x (B, C, H, W)
      conv_in
      encoder   level 0  [residual block, transformer] x blocks, then halve     ──── skips ────┐
                ...                                                                            │
                level 3  [residual block, transformer] x blocks                                │
      middle    residual block, transformer, residual block                                    │
      decoder   level 3  [concatenate a skip, residual block, transformer] x (blocks + 1) ◄────┤
                ...                                                                            │
                level 0  ..., each but the last followed by doubling  ◄────────────────────────┘
      norm, silu, conv_out

[1] Ronneberger, Fischer, Brox. U-Net. 2015. arXiv:1505.04597
[2] Ho, Jain, Abbeel. Denoising Diffusion Probabilistic Models. 2020. arXiv:2006.11239
[3] Rombach et al. High-Resolution Image Synthesis with Latent Diffusion Models. arXiv:2112.10752
[4] Podell et al. SDXL: Improving Latent Diffusion Models for High-Resolution Image Synthesis. 2023.
    arXiv:2307.01952
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from minidiff.condition import SINES, Condition
from minidiff.errors import UserError
from minidiff.layers import ResBlock, SpatialTransformer, group_norm, mlp, run, timestep_embedding

Map, Context = Float[Tensor, "B _ H W"], Float[Tensor, "B L D"]
Embedding, Time = Float[Tensor, "B E"], Shaped[Tensor, "B"]  # an embedding is one of time
Conditions, Maps = Context | Condition | None, Sequence[Float[Tensor, "B _ _ _"]]


class Downsample(nn.Module):
    """Halve the size: 3x3 convolution of stride 2, padded by 1 on all sides."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H2 W2"]:
        return self.conv(x)


class Upsample(nn.Module):
    """Double the size: nearest neighbour, then a 3x3 convolution. An odd side was rounded up when
    it was halved, so twice the half is one too many: size says which it was."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(
        self, x: Float[Tensor, "B C H W"], size: Sequence[int] | None = None
    ) -> Float[Tensor, "B C H2 W2"]:
        doubled = F.interpolate(x, scale_factor=2.0, mode="nearest")
        return self.conv(doubled if size is None else doubled[:, :, : size[0], : size[1]])


@dataclass(frozen=True)
class UNetConfig:
    """All that defines a U-Net; channels, depth and heads have one entry a level, finest first."""

    in_channels: int
    out_channels: int
    channels: Sequence[int]  # width of each level
    blocks: int  # residual blocks a level in the encoder; the decoder has one more
    depth: Sequence[int]  # transformer blocks at each level; 0 is none
    heads: Sequence[int]  # attention heads at each level
    context_dim: int | None = None  # None: no cross-attention
    ff_mult: int = 4  # width of the transformers' feed-forward layers / channels; 0 is none
    linear_projection: bool = False  # SD 2.x
    dropout: float = 0.0
    groups: int = 32  # of the group normalizations; 0: no normalization
    pooled: bool = False  # add a linear map of the context's sum to the time embedding
    scale_shift: bool = False  # time also scales, rather than only shifts, in the residual blocks
    middle: bool = True  # False: no middle, as in pruned networks
    middle_depth: int | None = None  # transformer blocks in the middle; None: as the last level's
    # SDXL: add pooled and the sines of the numbers, together so wide, to the time embedding
    added: int | None = None

    def __post_init__(self) -> None:
        for name in ("channels", "depth", "heads"):  # JSON has lists
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if not len(self.channels) == len(self.depth) == len(self.heads):
            levels = f"{len(self.channels)}, {len(self.depth)} and {len(self.heads)} levels"
            raise UserError(f"channels, depth and heads name {levels}; they must agree.")
        if self.pooled and self.context_dim is None:
            raise UserError("pooled needs a context_dim: it is the context that is summed.")


class Level(nn.Module):
    """One resolution: residual blocks, each followed by a transformer, then a change of size."""

    def __init__(
        self,
        config: UNetConfig,
        level: int,
        in_channels: list[int],
        depth: int,
        attentions: int,
        resample: type[nn.Module] | None = None,
    ):
        """in_channels: of each residual block. depth: of the transformers; 0 is none."""
        super().__init__()
        c, groups, time_dim = config.channels[level], config.groups, 4 * config.channels[0]
        self.residual = nn.ModuleList(
            ResBlock(width, c, time_dim, config.dropout, groups, scale_shift=config.scale_shift)
            for width in in_channels
        )
        self.attention = nn.ModuleList(
            SpatialTransformer(
                c,
                config.heads[level],
                config.context_dim,
                depth,
                config.ff_mult,
                config.linear_projection,
                groups,
            )
            for _ in range(attentions if depth else 0)
        )
        self.resample = resample(c) if resample else None

    def block(
        self, i: int, x: Map, emb: Embedding, context: Context | None, skip: Map | None = None
    ) -> Map:
        """The i-th residual block, and its transformer."""
        x = self.residual[i](x if skip is None else torch.cat([x, skip], dim=1), emb)
        return self.attention[i](x, context) if self.attention else x


class UNet(nn.Module):
    """[1] with attention, as in [2] and [3]; conditioned on time and a sequence of vectors."""

    Config = UNetConfig

    def __init__(self, config: UNetConfig):
        super().__init__()
        self.config = config
        self.context_dim, self.multiple = config.context_dim, 2 ** (len(config.channels) - 1)
        self.checkpointing = False  # True: compute blocks again in the backward pass, keep less
        channels, blocks, depth = config.channels, config.blocks, config.depth
        time_dim = 4 * channels[0]

        self.time = mlp(channels[0], time_dim)
        self.pool = nn.Linear(config.context_dim, time_dim) if config.pooled else None
        self.add = mlp(config.added, time_dim) if config.added else None
        self.conv_in = nn.Conv2d(config.in_channels, channels[0], 3, padding=1)

        skips, width, last = [channels[0]], channels[0], len(channels) - 1
        self.encoder = nn.ModuleList()
        for level, c in enumerate(channels):
            widths = [width] + [c] * (blocks - 1)
            down = Downsample if level < last else None
            self.encoder.append(Level(config, level, widths, depth[level], blocks, down))
            skips += [c] * (blocks + (level < last))
            width = c

        self.middle = None
        if config.middle:
            deep = config.middle_depth or max(depth[last], 1)
            self.middle = Level(config, last, [width, width], deep, attentions=1)

        self.decoder = nn.ModuleList()
        for level, c in reversed(list(enumerate(channels))):
            widths = [before + skips.pop() for before in [width] + [c] * blocks]
            up = Upsample if level > 0 else None
            self.decoder.append(Level(config, level, widths, depth[level], blocks + 1, up))
            width = c

        self.norm_out = group_norm(config.groups, channels[0], 1e-5)
        self.conv_out = nn.Conv2d(channels[0], config.out_channels, 3, padding=1)
        self._init_weights()

    def _init_weights(self) -> None:
        """PyTorch's defaults, but every residual branch starts at zero, as in the code of [2]."""
        ends = [m.conv2 for m in self.modules() if isinstance(m, ResBlock)]
        ends += [m.proj_out for m in self.modules() if isinstance(m, SpatialTransformer)]
        for layer in [self.conv_out, *ends]:
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def encode(
        self, x: Map, t: Time, context: Conditions, hint: Map | None = None
    ) -> tuple[Maps, Embedding, Context | None]:
        """The skips and the middle's output, and what the decoder takes beside them. hint: added
        after conv_in, in a ControlNet."""
        if context is None and self.context_dim is not None:
            raise UserError("this U-Net needs a context.")
        if context is not None and self.context_dim is None:
            raise UserError("this U-Net takes no context; it has no context_dim.")
        if isinstance(context, Condition) != (self.add is not None):
            raise UserError(
                "a U-Net with `added`, and no other, takes a Condition, as of CLIPPair."
            )

        dtype = self.conv_in.weight.dtype
        emb = self.time(timestep_embedding(t, self.conv_in.out_channels).to(dtype))
        if self.add is not None:  # [4] section 2.2
            sines = timestep_embedding(context.numbers.flatten(), SINES).view(len(x), -1)
            emb = emb + self.add(torch.cat([context.pooled.to(dtype), sines.to(dtype)], dim=1))
            context = context.context
        context = None if context is None else context.to(dtype)
        if self.pool is not None:  # a sum: a word weighs the same in long and in short prompts
            emb = emb + self.pool(context.sum(dim=1))

        h = self.conv_in(x.to(dtype)) if hint is None else self.conv_in(x.to(dtype)) + hint
        skips = [h]
        for level in self.encoder:
            for i in range(len(level.residual)):
                h = run(level.block, i, h, emb, context, recompute=self.checkpointing)
                skips.append(h)
            if level.resample is not None:
                h = level.resample(h)
                skips.append(h)

        if self.middle is not None:
            h = run(self.middle.block, 0, h, emb, context, recompute=self.checkpointing)
            h = run(self.middle.residual[1], h, emb, recompute=self.checkpointing)
        return [*skips, h], emb, context

    def forward(self, x: Map, t: Time, context: Conditions = None, residuals: Maps = ()) -> Map:
        """t: the schedule's c_noise(t). residuals: of a ControlNet, added to the skips and to the
        middle's output. Computed in the weights' precision, returned in x's."""
        maps, emb, context = self.encode(x, t, context)
        *skips, h = map(torch.add, maps, residuals) if residuals else maps
        for level in self.decoder:
            for i in range(len(level.residual)):
                h = run(level.block, i, h, emb, context, skips.pop(), recompute=self.checkpointing)
            if level.resample is not None:
                h = level.resample(h, skips[-1].shape[2:])

        return self.conv_out(F.silu(self.norm_out(h))).to(x.dtype)


def unet_cifar10(context_dim: int | None = None) -> UNet:
    """The size of [2] appendix B: four levels, attention at 16x16 and in the middle."""
    return UNet(
        UNetConfig(
            3,
            3,
            channels=(128, 256, 256, 256),
            blocks=2,
            depth=(0, 1, 0, 0),
            heads=(1, 1, 1, 1),
            context_dim=context_dim,
            ff_mult=0,
            dropout=0.1,
        )
    )


SD1 = UNetConfig(
    4, 4, (320, 640, 1280, 1280), blocks=2, depth=(1, 1, 1, 0), heads=(8,) * 4, context_dim=768
)
SD2 = replace(SD1, heads=(5, 10, 20, 20), context_dim=1024, linear_projection=True)
LARGE = replace(SD2, channels=(320, 640, 1280), depth=(0, 2, 10), heads=(5, 10, 20))
SDXL = replace(LARGE, context_dim=2048, added=1280 + 6 * SINES)
REFINER = replace(SD2, channels=(384, 768, 1536, 1536), depth=(0, 4, 4, 0), heads=(6, 12, 24, 24))
SDXL_REFINER = replace(REFINER, context_dim=1280, middle_depth=4, added=1280 + 5 * SINES)


def unet_sd1(in_channels: int = 4) -> UNet:
    """Stable Diffusion 1.x: 859.52 M parameters; 9 input channels for inpainting."""
    return UNet(replace(SD1, in_channels=in_channels))


def unet_sd2(in_channels: int = 4) -> UNet:
    """Stable Diffusion 2.x: heads of size 64 at every level, linear projections."""
    return UNet(replace(SD2, in_channels=in_channels))


def unet_sdxl(in_channels: int = 4) -> UNet:
    """Stable Diffusion XL ([4]): 2,567.46 M parameters, most of them in deep transformers."""
    return UNet(replace(SDXL, in_channels=in_channels))


def unet_sdxl_refiner() -> UNet:
    """SDXL's refiner, for the last steps ([4] section 2.5): 2,259.53 M parameters."""
    return UNet(SDXL_REFINER)
