"""How a module is trained: the options of a run, checked, and its learning-rate schedule.

[1] Loshchilov, Hutter. SGDR: Stochastic Gradient Descent with Warm Restarts. 2017. arXiv:1608.03983
"""

import math
from dataclasses import asdict, dataclass

import torch

from minidiff.errors import UserError
from minidiff.training.optimizers import OPTIMIZERS

LR_SCHEDULES = ("cosine", "constant")
# what suits the machine, not the run
MACHINE = ("pieces", "threads", "autocast", "save_every", "background", "shard")


@dataclass(frozen=True)
class TrainConfig:
    """The options of a run, which is resumed with the same ones but for those in MACHINE."""

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
    # compute in this dtype; the weights stay float32. float16: gradients are scaled, and a step in
    # which they overflow is skipped
    autocast: torch.dtype | None = None
    seed: int = 0
    save_every: int = 500  # steps between two checkpoints
    background: bool = True  # write them while training goes on; takes a copy of the state
    shard: bool = False  # of several processes, each keeps a shard of the weights and their moments

    def __post_init__(self) -> None:
        for name in ("steps", "warmup", "accumulate", "pieces", "threads", "save_every"):
            value, least = getattr(self, name), 0 if name == "warmup" else 1
            if value < least:
                raise UserError(f"{name} is {value}; it must be at least {least}.")
        if not 0 < self.lr < math.inf:
            raise UserError(f"lr is {self.lr:g}; it must be above 0, as in 1e-4.")
        if not all(0 <= beta < 1 for beta in self.betas):
            remedy = "both must be from 0 to below 1, as in (0.9, 0.99)"
            raise UserError(f"betas are {self.betas}; {remedy}.")
        if not 0 <= self.weight_decay < math.inf:
            remedy = "it must be 0 or above, as in 0.01"
            raise UserError(f"weight_decay is {self.weight_decay:g}; {remedy}.")
        if not self.clip > 0:
            raise UserError(f"clip is {self.clip:g}; it must be above 0, as in 1.")
        for name, names in (("lr_schedule", LR_SCHEDULES), ("optimizer", OPTIMIZERS)):
            if (value := getattr(self, name)) not in names:
                raise UserError(f'no {name} "{value}"; there is {", ".join(names)}.')
        if self.autocast not in (None, torch.bfloat16, torch.float16):
            remedy = "it must be torch.bfloat16, torch.float16 or None"
            raise UserError(f"autocast is {self.autocast}; {remedy}.")

    def learning_rate(self, step: int) -> float:
        """Linear warm-up, then constant, or half a cosine to 0 ([1] eq. 5); step 0 is first."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        if self.lr_schedule == "constant":
            return self.lr
        angle = math.pi * (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.lr * 0.5 * (1 + math.cos(angle))

    def identity(self) -> dict[str, object]:
        """What a run must have in common with the run that it resumes."""
        return {name: value for name, value in asdict(self).items() if name not in MACHINE}
