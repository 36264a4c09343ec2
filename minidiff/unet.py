"""The U-Net: one class, and builders that are nothing but numbers. The toy, the CIFAR network and Stable Diffusion's are all here.

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
[3] Rombach et al. High-Resolution Image Synthesis with Latent Diffusion Models. 2022. arXiv:2112.10752
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from minidiff.layers import ResBlock, SpatialTransformer, group_norm, run, timestep_embedding


class Downsample(nn.Module):
    """Halve the size: 3x3 convolution of stride 2, padded by 1 on all sides."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H2 W2"]:
        return self.conv(x)


class Upsample(nn.Module):
    """Double the size: nearest neighbour, then a 3x3 convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H2 W2"]:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """One resolution: residual blocks, each followed by a transformer where the level has them, then a change of size or none."""

    def __init__(
        self,
        residual: list[ResBlock],
        attention: list[SpatialTransformer],
        resample: nn.Module | None,
    ):
        super().__init__()
        self.residual, self.attention, self.resample = (
            nn.ModuleList(residual),
            nn.ModuleList(attention),
            resample,
        )

    def block(
        self,
        i: int,
        x: Float[Tensor, "B C H W"],
        emb: Tensor,
        context: Tensor | None,
        skip: Tensor | None = None,
    ) -> Float[Tensor, "B C2 H W"]:
        x = self.residual[i](x if skip is None else torch.cat([x, skip], dim=1), emb)
        return self.attention[i](x, context) if self.attention else x


class UNet(nn.Module):
    """The only condition besides time is a sequence of vectors: words, or a class as a sequence of one."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        channels: Sequence[int],  # width of each level, finest first
        blocks: int,  # residual blocks a level in the encoder; the decoder has one more
        depth: Sequence[int],  # transformer blocks at each level; 0 is none
        heads: Sequence[int],  # attention heads at each level
        context_dim: int | None = None,  # None: no cross-attention
        ff_mult: int = 4,  # width of the transformers' feed-forward layers; 0 is none
        linear_projection: bool = False,  # SD 2.x
        dropout: float = 0.0,
        groups: int = 32,
        pooled: bool = False,  # add the context's sum to the time embedding: every residual block hears the text from the first step on
        scale_shift: bool = False,  # time, and what is pooled, scale and shift in the residual blocks rather than only shift
        middle: bool = True,  # False: pruned networks, whose decoder follows the encoder at once
    ):
        if not len(channels) == len(depth) == len(heads):
            raise ValueError(
                f"channels, depth and heads name {len(channels)}, {len(depth)} and {len(heads)} levels; they must agree"
            )
        if pooled and context_dim is None:
            raise ValueError("pooled needs a context_dim")
        super().__init__()
        self.numbers = {
            k: v for k, v in locals().items() if k not in ("self", "__class__")
        }  # all there is to rebuild it
        self.context_dim, self.multiple = context_dim, 2 ** (len(channels) - 1)
        self.checkpointing = False  # True: compute each block again in the backward pass rather than keep what it computed
        time_dim = 4 * channels[0]

        def residual(c_in: int, c_out: int) -> ResBlock:
            return ResBlock(c_in, c_out, time_dim, dropout, groups, scale_shift=scale_shift)

        def attention(level: int, count: int, at_least: int = 0) -> list[SpatialTransformer]:
            d = max(depth[level], at_least)
            args = (
                channels[level],
                heads[level],
                context_dim,
                d,
                ff_mult,
                linear_projection,
                groups,
            )
            return [SpatialTransformer(*args) for _ in range(count if d else 0)]

        self.time = nn.Sequential(
            nn.Linear(channels[0], time_dim), nn.SiLU(), nn.Linear(time_dim, time_dim)
        )
        self.pool = nn.Linear(context_dim, time_dim) if pooled else None
        self.conv_in = nn.Conv2d(in_channels, channels[0], 3, padding=1)

        skips, width, last = [channels[0]], channels[0], len(channels) - 1
        self.encoder = nn.ModuleList()
        for level, c in enumerate(channels):
            res = [residual(width if i == 0 else c, c) for i in range(blocks)]
            self.encoder.append(
                Level(res, attention(level, blocks), Downsample(c) if level < last else None)
            )
            skips += [c] * (blocks + (level < last))
            width = c

        self.middle = (
            Level(
                [residual(width, width), residual(width, width)],
                attention(last, 1, at_least=1),
                None,
            )
            if middle
            else None
        )

        self.decoder = nn.ModuleList()
        for level, c in reversed(list(enumerate(channels))):
            res = []
            for _ in range(blocks + 1):
                res.append(residual(width + skips.pop(), c))
                width = c
            self.decoder.append(
                Level(res, attention(level, blocks + 1), Upsample(c) if level > 0 else None)
            )

        self.norm_out = group_norm(groups, channels[0], 1e-5)
        self.conv_out = nn.Conv2d(channels[0], out_channels, 3, padding=1)
        self._init_weights()

    def _init_weights(self) -> None:
        """PyTorch's defaults, but every residual branch starts at zero, so that the network starts as its skips ([2] appendix B)."""
        zero = [self.conv_out]
        for module in self.modules():
            if isinstance(module, ResBlock):
                zero.append(module.conv2)
            elif isinstance(module, SpatialTransformer):
                zero.append(module.proj_out)
        for module in zero:
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)

    def forward(
        self,
        x: Float[Tensor, "B C H W"],
        t: Shaped[Tensor, "B"],
        context: Float[Tensor, "B L D"] | None = None,
    ) -> Float[Tensor, "B C2 H W"]:
        """t is the number a schedule's c_noise gives. Computed in the weights' precision, returned in x's."""
        if x.shape[2] % self.multiple or x.shape[3] % self.multiple:
            raise ValueError(
                f"a side of {x.shape[2]}x{x.shape[3]} is not divisible by {self.multiple}, as halving it at every level needs"
            )
        if (context is None) != (self.context_dim is None):
            raise ValueError(
                "this U-Net needs a context"
                if context is None
                else "this U-Net takes no context; it has no context_dim"
            )

        dtype = self.conv_in.weight.dtype
        context = None if context is None else context.to(dtype)
        emb = self.time(timestep_embedding(t, self.conv_in.out_channels).to(dtype))
        if self.pool is not None:
            emb = emb + self.pool(
                context.sum(dim=1)
            )  # a sum: a word weighs as much in a long prompt as in a short one

        h = self.conv_in(x.to(dtype))
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

        for level in self.decoder:
            for i in range(len(level.residual)):
                h = run(level.block, i, h, emb, context, skips.pop(), recompute=self.checkpointing)
            if level.resample is not None:
                h = level.resample(h)

        return self.conv_out(F.silu(self.norm_out(h))).to(x.dtype)


def unet_cifar10(context_dim: int | None = None) -> UNet:
    """The size of [2] appendix B: 4 levels from 32x32 to 4x4, attention at 16x16 and in the middle, dropout 0.1."""
    return UNet(
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


def unet_sd1(in_channels: int = 4) -> UNet:
    """Stable Diffusion 1.x: 859.52 M parameters; 9 input channels for inpainting."""
    return UNet(
        in_channels,
        4,
        channels=(320, 640, 1280, 1280),
        blocks=2,
        depth=(1, 1, 1, 0),
        heads=(8, 8, 8, 8),
        context_dim=768,
    )


def unet_sd2(in_channels: int = 4) -> UNet:
    """Stable Diffusion 2.x: heads of size 64 at every level, linear projections."""
    return UNet(
        in_channels,
        4,
        channels=(320, 640, 1280, 1280),
        blocks=2,
        depth=(1, 1, 1, 0),
        heads=(5, 10, 20, 20),
        context_dim=1024,
        linear_projection=True,
    )
