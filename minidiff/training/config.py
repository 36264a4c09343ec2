"""How a module is trained: the numbers of a run, checked, and its learning-rate schedule.

[1] Loshchilov, Hutter. SGDR: Stochastic Gradient Descent with Warm Restarts. 2017. arXiv:1608.03983
"""
import math
from dataclasses import asdict, dataclass

import torch

from minidiff.errors import UserError
from minidiff.training.optimizers import OPTIMIZERS

LR_SCHEDULES = ("cosine", "constant")
MACHINE = ("pieces", "threads", "autocast", "save_every")  # what suits the machine, and is no part of what a run is


@dataclass(frozen=True)
class TrainConfig:
    """The numbers of a run. A run is resumed with the same ones, except for those of the machine."""

    steps: int  # optimizer steps
    lr: float  # the peak learning rate
    warmup: int = 100  # steps in which the learning rate rises to its peak
    lr_schedule: str = "cosine"  # what it does afterwards: fall to 0 as half a cosine, or stay
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.0
    clip: float = 1.0  # the largest norm of the gradient
    optimizer: str = "adamw"
    accumulate: int = 1  # batches in a step
    pieces: int = 1  # pieces that each batch comes in, one after another, all of one size
    threads: int = 1  # batches, or pieces, that are computed at a time
    autocast: torch.dtype | None = None  # compute in this dtype; the weights stay float32
    seed: int = 0
    save_every: int = 500  # steps between two checkpoints

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("warmup", 0), ("accumulate", 1), ("pieces", 1), ("threads", 1), ("save_every", 1)):
            if (value := getattr(self, name)) < least:
                raise UserError(f"{name} is {value}; it must be at least {least}.")
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise UserError(f"lr is {self.lr:g}; it must be above 0, as in 1e-4.")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(f"betas are {self.betas}; both must be from 0 to below 1, as in (0.9, 0.99).")
        if not (math.isfinite(self.weight_decay) and self.weight_decay >= 0):
            raise UserError(f"weight_decay is {self.weight_decay:g}; it must be 0 or above, as in 0.01.")
        if not self.clip > 0:
            raise UserError(f"clip is {self.clip:g}; it must be above 0, as in 1.")
        if self.lr_schedule not in LR_SCHEDULES:
            raise UserError(f'no lr_schedule "{self.lr_schedule}"; there is {", ".join(LR_SCHEDULES)}.')
        if self.optimizer not in OPTIMIZERS:
            raise UserError(f'no optimizer "{self.optimizer}"; there is {", ".join(OPTIMIZERS)}.')
        if self.autocast not in (None, torch.bfloat16, torch.float16):
            raise UserError(f"autocast is {self.autocast}; it must be torch.bfloat16, torch.float16 or None.")

    def learning_rate(self, step: int) -> float:
        """Linear warm-up, then constant, or half a cosine down to zero ([1] eq. 5). step is counted from 0."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        if self.lr_schedule == "constant":
            return self.lr
        return self.lr * 0.5 * (1 + math.cos(math.pi * (step - self.warmup) / max(1, self.steps - self.warmup)))

    def identity(self) -> dict[str, object]:
        """What a run must have in common with the run that it resumes."""
        return {name: value for name, value in asdict(self).items() if name not in MACHINE}
