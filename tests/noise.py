"""Noise for steps that are compared with what draws its numbers from one generator."""

import torch

from minidiff.steps import Noise


def from_one(generator: torch.Generator) -> Noise:
    """x -> standard normal numbers of x's shape, all from one generator, in x's precision."""
    return lambda x: torch.randn(x.shape, generator=generator, dtype=x.dtype)


def seeded(seed: int) -> Noise:
    """The same, from a new generator with this seed."""
    return from_one(torch.Generator().manual_seed(seed))
