"""T5's encoder, which Stable Diffusion 3 and FLUX.1 read beside CLIP's (conditioners.py).

[1] Raffel et al. Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer.
    2019. arXiv:1910.10683. v1.1: Shazeer. GLU Variants Improve Transformer. arXiv:2002.05202
[2] Esser et al. Scaling Rectified Flow Transformers for High-Resolution Image Synthesis. 2024.
    arXiv:2403.03206
"""

import math
import warnings
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from minidiff.errors import UserError
from minidiff.layers import run
from minidiff.training.device import to_device

Tokens, Vectors = Int[Tensor, "B L"], Float[Tensor, "B L D"]


@lru_cache(maxsize=2)
def tokenizer(vocabulary: str):
    """Text to pieces of words, from the text of a tokenizer.json."""
    from tokenizers import Tokenizer

    return Tokenizer.from_str(vocabulary)


def bucket(distance: Int[Tensor, "Q K"], buckets: int, farthest: int) -> Int[Tensor, "Q K"]:
    """The bucket of key - query, [1] section 2.1: near distances have one each, farther ones share
    one in logarithmic strides. The second half is for keys behind the query."""
    side, size = buckets // 2, distance.abs()
    near = side // 2
    stride = (size.float() / near).clamp(min=1).log() / math.log(farthest / near) * (side - near)
    far = (near + stride.long()).clamp(max=side - 1)
    return side * (distance > 0) + torch.where(size < near, size, far)


@dataclass(frozen=True)
class T5Config:
    """All that defines T5's encoder. Default: v1.1 XXL, 4,762.31 M parameters."""

    width: int = 4096
    layers: int = 24
    heads: int = 64
    head_dim: int = 64
    hidden: int = 10240
    vocabulary: int = 32128
    buckets: int = 32
    farthest: int = 128


class Block(nn.Module):
    """Self-attention and a gated MLP, each with an RMS norm before and a skip around; no bias."""

    def __init__(self, config: T5Config):
        super().__init__()
        width, inner, hidden = config.width, config.heads * config.head_dim, config.hidden
        self.heads = config.heads
        self.norm1, self.norm2 = (nn.RMSNorm(width, eps=1e-6) for _ in range(2))
        self.q, self.k, self.v = (nn.Linear(width, inner, bias=False) for _ in range(3))
        self.gate, self.up = (nn.Linear(width, hidden, bias=False) for _ in range(2))
        self.out, self.down = (nn.Linear(n, width, bias=False) for n in (inner, hidden))

    def forward(self, x: Vectors, bias: Float[Tensor, "1 heads L L"]) -> Vectors:
        h = self.norm1(x)
        q, k, v = (p(h).unflatten(2, (self.heads, -1)) for p in (self.q, self.k, self.v))
        q, k, v = (each.transpose(1, 2) for each in (q, k, v))
        h = F.scaled_dot_product_attention(q, k, v, bias, scale=1.0)  # not divided by sqrt(d)
        x = x + self.out(rearrange(h, "b h n d -> b n (h d)"))
        h = self.norm2(x)
        return x + self.down(F.gelu(self.gate(h), approximate="tanh") * self.up(h))


class T5(nn.Module):
    """The encoder. It learns of positions by a bias on attention alone, the same in all blocks. No
    padding mask: SD 3 and FLUX.1 attend to the padding, too."""

    def __init__(self, config: T5Config):
        super().__init__()
        self.config, self.checkpointing = config, False
        self.vocabulary = ""  # the text of tokenizer.json, which comes with the weights
        self.token_embedding = nn.Embedding(config.vocabulary, config.width)
        self.distance_bias = nn.Embedding(config.buckets, config.heads)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm_out = nn.RMSNorm(config.width, eps=1e-6)

    def tokens(self, prompts: list[str], length: int) -> Tokens:
        """words, end (1), padding (0). Words that do not fit are cut, and a warning names them."""
        if not self.vocabulary:
            raise UserError("T5 has no vocabulary; put its tokenizer.json beside the weights.")
        rows, words = [], tokenizer(self.vocabulary)
        for prompt in prompts:
            ids = words.encode(prompt, add_special_tokens=False).ids
            if rest := ids[length - 1 :]:
                what = f'T5 does not see: "{words.decode(rest)}"'
                warnings.warn(f"prompt cut after {length - 1} tokens; {what}", stacklevel=2)
            row = [*ids[: length - 1], 1]
            rows.append(row + [0] * (length - len(row)))
        return to_device(torch.tensor(rows), self.token_embedding.weight.device)

    def forward(self, tokens: Tokens) -> Vectors:
        place = torch.arange(tokens.shape[1], device=tokens.device)
        buckets = bucket(place - place[:, None], self.config.buckets, self.config.farthest)
        bias = rearrange(self.distance_bias(buckets), "q k heads -> 1 heads q k")
        h = self.token_embedding(tokens)
        for block in self.blocks:
            h = run(block, h, bias, recompute=self.checkpointing)
        return self.norm_out(h)
