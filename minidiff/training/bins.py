"""What the loop reports of its losses: means by noise level, and of the named parts."""

import torch
from torch import Tensor

from minidiff.training.device import to_cpu

Loss = dict[str, Tensor]  # what a loss function returns: see train.py
BINS = 10


def on_cpu(losses: list[Loss], norm: Tensor) -> tuple[list[Loss], Tensor]:
    """The same numbers on the CPU; a GPU is waited for once."""
    values = (value for each in losses for value in each.values())
    *values, norm = to_cpu([*values, norm])
    rows = iter(values)
    return [dict(zip(each, rows, strict=False)) for each in losses], norm


def by_bin(loss: Tensor, losses: list[Loss]) -> list[float | None]:
    """Mean loss in each tenth of [0, 1], by the entry "progress"; None where no example lies."""
    if any(each.get("progress") is None for each in losses):
        return [None] * BINS
    progress = torch.cat([each["progress"] for each in losses])
    index = (progress * BINS).long().clamp(0, BINS - 1)
    return [loss[index == b].mean().item() if (index == b).any() else None for b in range(BINS)]


def means(losses: list[Loss]) -> dict[str, float]:
    names = [name for name in losses[0] if name not in ("loss", "progress")]
    entries = {name: torch.cat([each[name] for each in losses]) for name in names}
    return {name: values.float().mean().item() for name, values in entries.items()}
