"""Random numbers that follow from a seed and an index: batch k of a run, image k of a request.

So a run that is resumed at step k goes on as if never interrupted, with no random state to save.
"""

from collections.abc import Callable, Iterator
from itertools import count
from typing import TypeVar

import torch

T = TypeVar("T")


def seed_of(seed: int, index: int) -> int:
    """One number for (seed, index), spread out so that neighbouring seeds share none."""
    return (seed * 1_000_003 + index) * 2_654_435_761 % 2**63


def generator_of(seed: int, index: int) -> torch.Generator:
    """A generator on the CPU whose numbers follow from (seed, index) alone."""
    return torch.Generator().manual_seed(seed_of(seed, index))


def stream(draw: Callable[[int, torch.Generator], T], seed: int, start: int = 0) -> Iterator[T]:
    """draw(k, generator) for k = start, start + 1, ..., each with the generator of (seed, k)."""
    return (draw(k, generator_of(seed, k)) for k in count(start))
