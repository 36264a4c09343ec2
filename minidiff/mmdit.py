"""The multimodal diffusion transformer: Stable Diffusion 3, 3.5 and FLUX.1, by their configs alone.

    latents -> patches -> tokens of the image ┐ joint blocks,  single blocks  -> latents
    context -> linear  -> tokens of the text  ┘ all of SD3's   (FLUX.1 alone)
    time, pooled vector, guidance -> MLPs, summed: emb, the shifts, scales and gates of blocks

[1] Esser et al. Scaling Rectified Flow Transformers for High-Resolution Image Synthesis. 2024.
    arXiv:2403.03206
[2] Peebles, Xie. Scalable Diffusion Models with Transformers. 2023. arXiv:2212.09748
[3] Dehghani et al. Scaling Vision Transformers to 22 Billion Parameters. 2023. arXiv:2302.05442
[4] Su et al. RoFormer: Enhanced Transformer with Rotary Position Embedding. arXiv:2104.09864
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from minidiff.condition import SINES, Condition, Context
from minidiff.errors import UserError
from minidiff.layers import mlp, run, timestep_embedding

Map, Tokens, Heads = Float[Tensor, "B _ H W"], Float[Tensor, "B N D"], Float[Tensor, "B h N d"]
Embedding, Rotary = Float[Tensor, "B E"], Float[Tensor, "2 N d2"]  # cosines and sines


@dataclass(frozen=True)
class MMDiTConfig:
    """All that defines the transformer. The positions of patches are a table, or rotary axes."""

    width: int
    joint: int  # blocks with weights of their own for text and image
    heads: int
    context_dim: int
    pooled_dim: int | None = None  # of the vector of the whole prompt; None: without it
    in_channels: int = 16
    out_channels: int = 16
    patch: int = 2  # side of a patch
    single: int = 0  # blocks with the same weights for text and image
    dual: int = 0  # joint blocks, from the first, with a second attention, of the image alone
    qk_norm: bool = False  # normalize queries and keys, [3] section 2
    table: int | None = None  # side of the table, in patches
    axes: Sequence[int] | None = None  # numbers of a head turned by 0, by the row, by the column
    guidance: bool = False  # the network is given a guidance scale

    def __post_init__(self) -> None:
        object.__setattr__(self, "axes", self.axes and tuple(self.axes))  # JSON has lists
        if self.width % (4 * self.heads):
            raise UserError(f"width {self.width} is no multiple of 4 x {self.heads} heads.")
        if bool(self.table) == bool(self.axes) or (self.dual and self.axes):
            raise UserError("positions are a table or rotary axes; with dual a table.")
        if self.axes and sum(self.axes) * self.heads != self.width:
            raise UserError(f"axes {self.axes} do not add up to {self.width // self.heads}.")


def modulation(layer: nn.Linear, emb: Embedding) -> tuple[Tensor, ...]:
    """Shifts, scales and gates, [2] section 3.2."""
    return layer(emb)[:, None].chunk(layer.out_features // layer.in_features, dim=-1)


def normed(x: Tokens, shift: Tensor, scale: Tensor) -> Tokens:
    """adaLN, [2] figure 3: a LayerNorm whose shift and scale depend on emb."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift  # eq: dit-adaln


def rotate(x: Heads, rotary: Rotary) -> Heads:
    """Turn each pair of numbers by angles in proportion to the position, [4] eq. 34: products of
    queries and keys depend on the differences of positions alone."""
    (cos, sin), (a, b) = rotary, x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)  # eq: rope-34


def attend(q: Heads, k: Heads, v: Heads, rotary: Rotary | None = None) -> Tokens:
    if rotary is not None:
        q, k = rotate(q, rotary), rotate(k, rotary)
    h = F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v)
    return rearrange(h, "b h n d -> b n (h d)")


class Attention(nn.Module):
    """Queries, keys and values, and the layer after attention; out: whether there is one."""

    def __init__(self, config: MMDiTConfig, out: bool = True):
        super().__init__()
        width, self.heads = config.width, config.heads
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        norms = (nn.RMSNorm(width // self.heads, eps=1e-6) for _ in range(2))
        self.norm_q, self.norm_k = norms if config.qk_norm else (nn.Identity(), nn.Identity())
        self.out = nn.Linear(width, width) if out else None

    def qkv(self, x: Tokens) -> tuple[Heads, Heads, Heads]:
        split = partial(rearrange, pattern="b n (h d) -> b h n d", h=self.heads)
        return self.norm_q(split(self.q(x))), self.norm_k(split(self.k(x))), split(self.v(x))


class Stream(nn.Module):
    """The layers of text, or of the image, in a joint block. last: nothing reads its output."""

    def __init__(self, config: MMDiTConfig, dual: bool = False, last: bool = False):
        super().__init__()
        width, self.last = config.width, last
        self.modulation = nn.Linear(width, (2 if last else 9 if dual else 6) * width)
        self.attention = Attention(config, out=not last)
        self.dual = Attention(config) if dual else None
        if not last:
            self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def after(self, x: Tokens, h: Tokens, parts: tuple[Tensor, ...]) -> Tokens:
        """From the joint attention's result h on; all that is added to x passes a gate."""
        if self.last:
            return x
        gate, shift, scale, gate_mlp, *second = parts[2:]
        y = x + gate * self.attention.out(h)
        if self.dual is not None:
            shift2, scale2, gate2 = second
            y = y + gate2 * self.dual.out(attend(*self.dual.qkv(normed(x, shift2, scale2))))
        hidden = F.gelu(self.up(normed(y, shift, scale)), approximate="tanh")
        return y + gate_mlp * self.down(hidden)


class JointBlock(nn.Module):
    """Text and image are two streams that meet in one attention, [1] figure 2b."""

    def __init__(self, config: MMDiTConfig, dual: bool, last: bool):
        super().__init__()
        self.text, self.image = Stream(config, last=last), Stream(config, dual)

    def forward(self, x: Tokens, emb: Embedding, length: int, rotary: Rotary | None) -> Tokens:
        """length: of the text, which comes first."""
        text, image = x[:, :length], x[:, length:]
        of_text, of_image = (modulation(s.modulation, emb) for s in (self.text, self.image))
        qkv_text = self.text.attention.qkv(normed(text, *of_text[:2]))
        qkv_image = self.image.attention.qkv(normed(image, *of_image[:2]))
        qkv = (torch.cat(pair, dim=2) for pair in zip(qkv_text, qkv_image, strict=True))
        h = attend(*qkv, rotary)
        text = self.text.after(text, h[:, :length], of_text)
        return torch.cat([text, self.image.after(image, h[:, length:], of_image)], dim=1)


class SingleBlock(nn.Module):
    """Text and image are one stream; attention and MLP stand side by side, [3] section 2."""

    def __init__(self, config: MMDiTConfig):
        super().__init__()
        width = config.width
        self.modulation, self.attention = nn.Linear(width, 3 * width), Attention(config, out=False)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(5 * width, width)

    def forward(self, x: Tokens, emb: Embedding, length: int, rotary: Rotary | None) -> Tokens:
        shift, scale, gate = modulation(self.modulation, emb)
        y = normed(x, shift, scale)
        h, hidden = attend(*self.attention.qkv(y), rotary), F.gelu(self.up(y), approximate="tanh")
        return x + gate * self.down(torch.cat([h, hidden], dim=-1))


class MMDiT(nn.Module):
    """[1]; with single blocks and rotary positions FLUX.1's."""

    Config = MMDiTConfig

    def __init__(self, config: MMDiTConfig):
        super().__init__()
        self.config, self.context_dim, self.multiple = config, config.context_dim, config.patch
        self.checkpointing = False  # True: compute blocks again in the backward pass, keep less
        width, patch, joint = config.width, config.patch, config.joint
        self.time = mlp(SINES, width)
        self.pooled = mlp(config.pooled_dim, width) if config.pooled_dim else None
        self.guidance = mlp(SINES, width) if config.guidance else None
        self.patch_in = nn.Conv2d(config.in_channels, width, patch, stride=patch)
        self.text_in = nn.Linear(config.context_dim, width)
        last = joint - 1 if not config.single else None  # whose text nothing reads
        self.joint = nn.ModuleList(
            JointBlock(config, k < config.dual, k == last) for k in range(joint)
        )
        self.single = nn.ModuleList(SingleBlock(config) for _ in range(config.single))
        self.modulation_out = nn.Linear(width, 2 * width)
        self.patch_out = nn.Linear(width, config.out_channels * patch**2)
        if config.table:  # halves of the column and of the row, sines before cosines
            line = timestep_embedding(torch.arange(config.table), width // 2).roll(width // 4, 1)
            grid = torch.broadcast_tensors(line[None], line[:, None])
            self.register_buffer("table", torch.cat(grid, dim=-1).flatten(0, 1)[None])
        self._init_weights()

    def _init_weights(self) -> None:
        """[2] section 3.2, adaLN-zero: every block starts as the identity, the output as zero."""
        for name, layer in self.named_modules():
            if isinstance(layer, nn.Linear | nn.Conv2d):
                zero = name.endswith(("modulation", "_out"))
                (nn.init.zeros_ if zero else nn.init.xavier_uniform_)(layer.weight)
                nn.init.zeros_(layer.bias)

    def cropped(self, height: int, width: int) -> Float[Tensor, "1 N D"]:
        """The middle of the table: images of all sizes share their centre."""
        side = self.config.table
        if max(height, width) > side:
            raise UserError(f"{height}x{width} patches; the table of positions is {side}x{side}.")
        top, left = (side - height) // 2, (side - width) // 2
        table = self.table.unflatten(1, (side, side))
        return table[:, top : top + height, left : left + width].flatten(1, 2)

    def rotary(self, length: int, height: int, width: int) -> Rotary:
        """Cosines and sines for text, at (0, 0, 0), and for patches, at (0, row, column)."""
        weight = self.patch_in.weight
        count = partial(torch.arange, dtype=torch.promote_types(weight.dtype, torch.float32))
        places = torch.cartesian_prod(count(1), count(height), count(width)).to(weight.device)
        places = F.pad(places, (0, 0, length, 0))
        axes = zip(places.T, self.config.axes, strict=True)
        halves = [timestep_embedding(place, axis).chunk(2, dim=1) for place, axis in axes]
        return torch.stack([torch.cat(half, dim=1) for half in zip(*halves, strict=True)])

    def forward(self, x: Map, t: Shaped[Tensor, "B"], context: Context | None = None) -> Map:
        """t: the schedule's c_noise(t). Of a context without a pooled vector the sum is taken.
        Computed in the weights' precision, returned in x's."""
        patch, dtype = self.config.patch, self.patch_in.weight.dtype
        if context is None or any(side % patch for side in x.shape[2:]):
            raise UserError(f"needed: a context, and latents with sides divisible by {patch}.")
        if not isinstance(context, Condition):
            context = Condition(context, context.sum(dim=1), context[:, 0, :0])
        emb = self.time(timestep_embedding(t, SINES).to(dtype))
        if self.guidance is not None:
            scale = 1000 * context.numbers[:, 0]
            emb = emb + self.guidance(timestep_embedding(scale, SINES).to(dtype))
        if self.pooled is not None:
            emb = emb + self.pooled(context.pooled.to(dtype))
        emb = F.silu(emb)

        image, text = self.patch_in(x.to(dtype)), self.text_in(context.context.to(dtype))
        (height, width), length = image.shape[2:], text.shape[1]
        image = rearrange(image, "b c h w -> b (h w) c")
        if self.config.table:
            image = image + self.cropped(height, width).to(dtype)
        rotary = self.rotary(length, height, width) if self.config.axes else None

        h = torch.cat([text, image], dim=1)
        for block in (*self.joint, *self.single):
            h = run(block, h, emb, length, rotary, recompute=self.checkpointing)
        h = self.patch_out(normed(h[:, length:], *modulation(self.modulation_out, emb)))
        order = "b (h w) (c p q) -> b c (h p) (w q)"
        return rearrange(h, order, h=height, p=patch, q=patch).to(x.dtype)


# The published ones: width, joint blocks, heads, context_dim, pooled_dim.
_SD3 = MMDiTConfig(1536, 24, 24, 4096, 2048, table=192)
_FLUX = MMDiTConfig(3072, 19, 24, 4096, 768, single=38, qk_norm=True, axes=(16, 56, 56))
sd3_medium = partial(MMDiT, _SD3)
sd35_medium = partial(MMDiT, replace(_SD3, dual=13, qk_norm=True, table=384))
sd35_large = partial(MMDiT, replace(_SD3, width=2432, joint=38, heads=38, qk_norm=True))
flux_schnell, flux_dev = partial(MMDiT, _FLUX), partial(MMDiT, replace(_FLUX, guidance=True))
