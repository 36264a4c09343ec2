"""The batches of each training step; those of the next are made while a GPU computes."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from minidiff.training.config import TrainConfig
from minidiff.training.device import overlaps
from minidiff.training.seeds import seed_of


class Ahead:
    """Gives the batches of one step after another, and seeds PyTorch for each step.

    Made ahead or not, the batches are the same, and so are the random numbers after them. An error
    in making them is raised where they are taken.
    """

    def __init__(self, data: Iterator[Any], config: TrainConfig, device: torch.device):
        self.data, self.config, self.device = data, config, device
        self.batches: list[Any] | Exception | None = None
        self.random_states: list[Tensor] = []  # after these batches, of the CPU and of the GPU

    def take(self, step: int) -> list[Any]:
        """The batches of this step."""
        if self.batches is None:
            self._make(step)
        else:  # random numbers were drawn since
            torch.set_rng_state(self.random_states[0])
            if self.device.type == "cuda":
                torch.cuda.set_rng_state(self.random_states[1], self.device)
        batches, self.batches = self.batches, None
        if isinstance(batches, Exception):
            raise batches
        return batches

    def prepare(self, step: int) -> None:
        """Make the batches of this step, if there is one, while a GPU computes the one before."""
        if not overlaps(self.device) or step >= self.config.steps:
            return
        self._make(step)
        self.random_states = [torch.get_rng_state()]
        if self.device.type == "cuda":
            self.random_states.append(torch.cuda.get_rng_state(self.device))

    def _make(self, step: int) -> None:
        torch.manual_seed(seed_of(self.config.seed, step))
        count = self.config.accumulate * self.config.pieces
        try:
            self.batches = [next(self.data) for _ in range(count)]
        except Exception as error:
            self.batches = error
