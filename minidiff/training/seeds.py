"""Random numbers that follow from a seed and an index, so that no random state is saved."""

import torch


def seed_of(seed: int, index: int) -> int:
    """One number for (seed, index); neighbouring seeds share none at indices below 1,000,003."""
    return (seed * 1_000_003 + index) * 2_654_435_761 % 2**63


def generator_of(seed: int, index: int) -> torch.Generator:
    """A generator on the CPU whose numbers follow from (seed, index) alone."""
    return torch.Generator().manual_seed(seed_of(seed, index))
