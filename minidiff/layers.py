"""The layers that the networks share: time embedding, residual block, attention, transformer.

[1] Vaswani et al. Attention Is All You Need. 2017. arXiv:1706.03762
[2] He et al. Deep Residual Learning for Image Recognition. 2016. arXiv:1512.03385
[3] Rombach et al. High-Resolution Image Synthesis with Latent Diffusion Models. arXiv:2112.10752
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

Map, Tokens = Float[Tensor, "B _ H W"], Float[Tensor, "B N D"]
Context = Float[Tensor, "B L _"]


def timestep_embedding(  # eq: timestep-embedding
    t: Shaped[Tensor, "B"], dim: int, max_period: float = 10_000
) -> Float[Tensor, "B {dim}"]:
    """[cos, sin] of t at dim/2 frequencies max_period^(-i / (dim/2)), [1] section 3.5."""
    # t up to 1000 needs more digits than bfloat16 has
    half, precise = dim // 2, torch.promote_types(t.dtype, torch.float32)
    i = torch.arange(half, dtype=precise, device=t.device)
    angles = t[:, None].to(precise) * torch.exp(-math.log(max_period) / half * i)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def mlp(dim: int, out: int) -> nn.Sequential:
    """What the sines of a time or of a number, or a pooled vector, pass on their way to emb."""
    return nn.Sequential(nn.Linear(dim, out), nn.SiLU(), nn.Linear(out, out))


def run(block: Callable[..., Tensor], *inputs: Tensor | int | None, recompute: bool) -> Tensor:
    """block(*inputs). recompute: keep only the inputs, and run the block again in the backward pass
    ([6]): much less memory, one more forward pass, the same gradients to the bit."""
    return checkpoint(block, *inputs, use_reentrant=False) if recompute else block(*inputs)


def group_norm(groups: int, channels: int, eps: float) -> nn.Module:  # eq: groupnorm-layer
    """GroupNorm, or with groups = 0 no normalization, so that a shallow network sees brightness."""
    return nn.GroupNorm(groups, channels, eps) if groups else nn.Identity()


class ResBlock(nn.Module):
    """Two 3x3 convolutions, each after a normalization, and a skip connection around both ([2]).

    Time is added between them ([3]), or with scale_shift it scales and shifts the second
    normalization's output, the AdaGN of [5] section 3.
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
        same = in_channels == out_channels
        self.skip = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Map, emb: Float[Tensor, "B E"] | None = None) -> Map:
        h = self.conv1(F.silu(self.norm1(x)))
        time = self.time(F.silu(emb))[:, :, None, None] if self.time is not None else None
        if self.scale_shift:
            scale, shift = time.chunk(2, dim=1)
            h = self.norm2(h) * (1 + scale) + shift  # eq: adagn-block
        else:
            h = self.norm2(h if time is None else h + time)
        h = self.conv2(self.dropout(F.silu(h)))
        return self.skip(x) + h  # eq: resnet-block


class Attention(nn.Module):
    """Multi-head attention, [1] section 3.2: queries from x, keys and values from context or x."""

    def __init__(self, dim: int, heads: int, context_dim: int | None = None, bias: bool = False):
        super().__init__()
        if dim % heads:
            raise ValueError(f"{heads} heads do not divide a width of {dim}")
        self.heads = heads
        self.q = nn.Linear(dim, dim, bias)
        self.k = nn.Linear(context_dim or dim, dim, bias)  # eq: ldm-attention
        self.v = nn.Linear(context_dim or dim, dim, bias)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tokens, context: Context | None = None, causal: bool = False) -> Tokens:
        context = x if context is None else context
        q, k, v = (
            rearrange(p, "b n (h d) -> b h n d", h=self.heads)
            for p in (self.q(x), self.k(context), self.v(context))
        )
        h = F.scaled_dot_product_attention(q, k, v, is_causal=causal)  # eq: attention-1
        return self.out(rearrange(h, "b h n d -> b n (h d)"))


class GEGLU(nn.Module):
    """Feed-forward layer, value * gelu(gate) ([4]); up gives the value first, then the gate."""

    def __init__(self, dim: int, mult: int = 4):
        super().__init__()
        self.up = nn.Linear(dim, 2 * mult * dim)
        self.down = nn.Linear(mult * dim, dim)

    def forward(self, x: Tokens) -> Tokens:
        value, gate = self.up(x).chunk(2, dim=-1)
        return self.down(value * F.gelu(gate))


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention, feed-forward: each after a LayerNorm, with a skip around.

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

    def forward(self, x: Tokens, context: Context | None = None) -> Tokens:
        x = x + self.self_attention(self.norm1(x))
        if self.has_context:
            x = x + self.cross_attention(self.norm2(x), context)
        if self.has_ff:
            x = x + self.ff(self.norm3(x))
        return x


class SpatialTransformer(nn.Module):
    """`depth` transformer blocks on a feature map as a sequence of positions, [3] appendix E."""

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
        """linear: project by a linear layer (SD 2.x), not a 1x1 convolution (SD 1.x)."""
        super().__init__()
        self.linear = linear
        self.norm = group_norm(groups, channels, 1e-6)
        self.proj_in = self._projection(channels)
        self.blocks = nn.ModuleList(
            TransformerBlock(channels, heads, context_dim, ff_mult) for _ in range(depth)
        )
        self.proj_out = self._projection(channels)

    def _projection(self, channels: int) -> nn.Module:
        return nn.Linear(channels, channels) if self.linear else nn.Conv2d(channels, channels, 1)

    def forward(self, x: Map, context: Context | None = None) -> Map:
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
