"""The layers the networks share: time embedding, residual block, attention, transformer. Nothing here knows of diffusion.

[1] Vaswani et al. Attention Is All You Need. 2017. arXiv:1706.03762
[2] He et al. Deep Residual Learning for Image Recognition. 2016. arXiv:1512.03385
[3] Rombach et al. High-Resolution Image Synthesis with Latent Diffusion Models. 2022. arXiv:2112.10752
[4] Shazeer. GLU Variants Improve Transformer. 2020. arXiv:2002.05202
[5] Dhariwal, Nichol. Diffusion Models Beat GANs on Image Synthesis. 2021. arXiv:2105.05233
[6] Chen et al. Training Deep Nets with Sublinear Memory Cost. 2016. arXiv:1604.06174
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def timestep_embedding(
    t: Shaped[Tensor, "B"], dim: int, max_period: float = 10_000
) -> Float[Tensor, "B {dim}"]:
    """[cos, sin] of t at dim/2 frequencies from 1 down to 1/max_period, geometrically spaced ([1] section 3.5)."""
    half, precise = (
        dim // 2,
        torch.promote_types(t.dtype, torch.float32),
    )  # sines of t up to 1000 need more digits than bfloat16 has
    frequencies = torch.exp(-math.log(max_period) / half * torch.arange(half, dtype=precise))
    angles = t[:, None].to(precise) * frequencies.to(t.device)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def run(block: Callable[..., Tensor], *inputs: Tensor | int | None, recompute: bool) -> Tensor:
    """block(*inputs). recompute: keep nothing but the inputs until the backward pass, which runs the block again ([6]): much less memory,
    one more forward pass, and the same gradients to the bit."""
    return checkpoint(block, *inputs, use_reentrant=False) if recompute else block(*inputs)


def group_norm(groups: int, channels: int, eps: float) -> nn.Module:
    """GroupNorm, or with groups = 0 nothing: a shallow network learns flat pictures faster when absolute levels survive."""
    return nn.GroupNorm(groups, channels, eps) if groups else nn.Identity()


class ResBlock(nn.Module):
    """Two 3x3 convolutions, each behind a normalization, around a skip ([2]); time comes in between them.

    Time is added ([3]), or with scale_shift it scales and shifts what the second normalization gave, the AdaGN of [5] section 3.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        time_dim: int | None = None,
        dropout: float = 0.0,
        groups: int = 32,
        eps: float = 1e-5,
        scale_shift: bool = False,
    ):
        if scale_shift and not time_dim:
            raise ValueError("scale_shift needs a time_dim: it is time that scales and shifts")
        super().__init__()
        self.scale_shift = scale_shift
        self.norm1 = group_norm(groups, in_channels, eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time = nn.Linear(time_dim, (1 + scale_shift) * out_channels) if time_dim else None
        self.norm2 = group_norm(groups, out_channels, eps)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.skip = (
            nn.Conv2d(in_channels, out_channels, 1)
            if in_channels != out_channels
            else nn.Identity()
        )

    def forward(
        self, x: Float[Tensor, "B C H W"], emb: Float[Tensor, "B E"] | None = None
    ) -> Float[Tensor, "B C2 H W"]:
        h = self.conv1(F.silu(self.norm1(x)))
        time = self.time(F.silu(emb))[:, :, None, None] if self.time is not None else None
        if self.scale_shift:
            scale, shift = time.chunk(2, dim=1)
            h = self.norm2(h) * (1 + scale) + shift
        else:
            h = self.norm2(h if time is None else h + time)
        h = self.conv2(self.dropout(F.silu(h)))
        return self.skip(x) + h


class Attention(nn.Module):
    """Multi-head scaled dot-product attention, [1] section 3.2. Queries from x; keys and values from context, or from x itself."""

    def __init__(self, dim: int, heads: int, context_dim: int | None = None, bias: bool = False):
        super().__init__()
        if dim % heads:
            raise ValueError(f"{heads} heads do not divide a width of {dim}")
        self.heads = heads
        self.q = nn.Linear(dim, dim, bias)
        self.k = nn.Linear(context_dim or dim, dim, bias)
        self.v = nn.Linear(context_dim or dim, dim, bias)
        self.out = nn.Linear(dim, dim)

    def forward(
        self,
        x: Float[Tensor, "B N D"],
        context: Float[Tensor, "B L D2"] | None = None,
        causal: bool = False,
    ) -> Float[Tensor, "B N D"]:
        context = x if context is None else context
        q, k, v = (
            rearrange(p, "b n (h d) -> b h n d", h=self.heads)
            for p in (self.q(x), self.k(context), self.v(context))
        )
        h = F.scaled_dot_product_attention(
            q, k, v, is_causal=causal
        )  # never holds the N x L score matrix where a fused kernel exists
        return self.out(rearrange(h, "b h n d -> b n (h d)"))


class GEGLU(nn.Module):
    """Feed-forward layer whose hidden half is gated by the gelu of the other ([4]); the value comes first, then the gate."""

    def __init__(self, dim: int, mult: int = 4):
        super().__init__()
        self.up = nn.Linear(dim, 2 * mult * dim)
        self.down = nn.Linear(mult * dim, dim)

    def forward(self, x: Float[Tensor, "B N D"]) -> Float[Tensor, "B N D"]:
        value, gate = self.up(x).chunk(2, dim=-1)
        return self.down(value * F.gelu(gate))


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention to the context, feed-forward: each behind a LayerNorm, each around a skip ([3] appendix E).

    Without a context_dim there is no cross-attention; with ff_mult = 0 there is no feed-forward.
    """

    def __init__(self, dim: int, heads: int, context_dim: int | None, ff_mult: int = 4):
        super().__init__()
        self.norm1, self.self_attention = nn.LayerNorm(dim), Attention(dim, heads)
        if context_dim:
            self.norm2, self.cross_attention = nn.LayerNorm(dim), Attention(dim, heads, context_dim)
        if ff_mult:
            self.norm3, self.ff = nn.LayerNorm(dim), GEGLU(dim, ff_mult)
        self.has_context, self.has_ff = bool(context_dim), bool(ff_mult)

    def forward(
        self, x: Float[Tensor, "B N D"], context: Float[Tensor, "B L D2"] | None = None
    ) -> Float[Tensor, "B N D"]:
        x = x + self.self_attention(self.norm1(x))
        if self.has_context:
            x = x + self.cross_attention(self.norm2(x), context)
        if self.has_ff:
            x = x + self.ff(self.norm3(x))
        return x


class SpatialTransformer(nn.Module):
    """A feature map read as a sequence of its pixels, through `depth` transformer blocks, around a skip ([3] appendix E)."""

    def __init__(
        self,
        channels: int,
        heads: int,
        context_dim: int | None,
        depth: int = 1,
        ff_mult: int = 4,
        linear: bool = False,
        groups: int = 32,
    ):
        """linear: project in and out by a linear layer (SD 2.x) rather than a 1x1 convolution (SD 1.x); the same map, other weight shapes."""
        super().__init__()
        self.linear = linear
        self.norm = group_norm(groups, channels, 1e-6)
        self.proj_in = nn.Linear(channels, channels) if linear else nn.Conv2d(channels, channels, 1)
        self.blocks = nn.ModuleList(
            TransformerBlock(channels, heads, context_dim, ff_mult) for _ in range(depth)
        )
        self.proj_out = (
            nn.Linear(channels, channels) if linear else nn.Conv2d(channels, channels, 1)
        )

    def forward(
        self, x: Float[Tensor, "B C H W"], context: Float[Tensor, "B L D"] | None = None
    ) -> Float[Tensor, "B C H W"]:
        height = x.shape[2]
        h = self.norm(x)
        if not self.linear:
            h = self.proj_in(h)
        h = rearrange(h, "b c h w -> b (h w) c")
        if self.linear:
            h = self.proj_in(h)
        for block in self.blocks:
            h = block(h, context)
        if self.linear:
            h = self.proj_out(h)
        h = rearrange(h, "b (h w) c -> b c h w", h=height)
        if not self.linear:
            h = self.proj_out(h)
        return x + h
