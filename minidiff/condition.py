"""What conditions a network beside x_t and t.

Most networks take a context, a sequence of vectors (B, L, D). SDXL, SD3 and FLUX.1 take a
Condition: a context, one vector of the whole prompt, and a few numbers.

[1] Podell et al. SDXL: Improving Latent Diffusion Models for High-Resolution Image Synthesis. 2023.
    arXiv:2307.01952
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

SINES = 256  # that a network makes of each number


@dataclass(frozen=True)
class Condition:
    """context and pooled: of the text encoders. numbers: SDXL's sizes and crop in pixels ([1]
    section 2.2), the guidance of FLUX.1-dev; of SD3 none (K = 0)."""

    context: Float[Tensor, "*B L D"]
    pooled: Float[Tensor, "*B P"]
    numbers: Float[Tensor, "*B K"]


Context = Float[Tensor, "B L D"] | Condition


def apply(function: Callable[..., Tensor], *contexts: Tensor | Condition) -> Tensor | Condition:
    """function(*contexts), of Conditions part by part."""
    if not isinstance(contexts[0], Condition):
        return function(*contexts)
    parts = zip(*((c.context, c.pooled, c.numbers) for c in contexts), strict=True)
    return Condition(*(function(*each) for each in parts))


def join(*contexts: Tensor | Condition) -> Tensor | Condition:
    """The contexts of several batches as those of one."""
    return apply(lambda *each: torch.cat(each), *contexts)


def repeat(context: Tensor | Condition, batch: int) -> Tensor | Condition:
    """The context of one prompt, for each of a batch."""
    return apply(lambda each: each.expand(batch, *each.shape[1:]), context)
