"""From noise to data: the sampling loop, and the names of its steps.

A step moves x from time t to the cleaner time s; all of them are in steps.py. The loop owns the
noise and the memory of multistep steps. It is a generator, so the caller plots, logs or stops:

    *chain, last = sample(denoise, schedule, x_T, steps=25, step=ddim())
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from minidiff.denoiser import Denoise
from minidiff.errors import UserError, choice
from minidiff.schedules import NoiseSchedule
from minidiff.steps import (
    Noise,
    Step,
    ddim,
    ddpm,
    dpmpp_2m,
    dpmpp_2m_sde,
    euler,
    euler_ancestral,
    heun,
    lcm,
    pndm,
    unipc,
)
from minidiff.training.device import to_device
from minidiff.training.seeds import generator_of

Times, X = Shaped[Tensor, "steps1"], Float[Tensor, "B *dims"]

SAMPLERS: dict[str, Step] = {
    "ddim": ddim(),
    "ddpm": ddpm(),
    "euler": euler(),
    "euler_ancestral": euler_ancestral(),
    "heun": heun(),
    "pndm": pndm(),
    "dpmpp_2m": dpmpp_2m(),
    "dpmpp_2m_sde": dpmpp_2m_sde(),
    "unipc": unipc(),
    "lcm": lcm(),
}


def by_name(name: str) -> Step:
    """The step with this name; an unknown one is a UserError."""
    choice("sampler", name, SAMPLERS)
    return SAMPLERS[name]


class Normal:
    """Standard normal numbers for a batch, each example's from a generator of its own.

    So example k gets the same numbers alone and in any batch, on any device and in any precision.
    """

    def __init__(self, generators: Sequence[torch.Generator]):
        self.generators = list(generators)

    @classmethod
    def seeded(cls, seed: int, indices: Sequence[int]) -> "Normal":
        """From the generators of (seed, index), one for each index."""
        return cls([generator_of(seed, index) for index in indices])

    @classmethod
    def split(cls, generator: torch.Generator | None, batch: int) -> "Normal":
        """From seeds that one generator draws in order: two batches of 4 equal one of 8."""
        device = generator.device if generator else None
        seeds = torch.randint(2**63 - 1, (batch,), generator=generator, device=device)
        return cls([torch.Generator().manual_seed(seed) for seed in seeds.tolist()])

    def __call__(self, x: X) -> X:
        """Numbers of x's shape, dtype and device; drawn on the CPU, in float32 at least."""
        dtype, shape = torch.promote_types(x.dtype, torch.float32), x.shape[1:]
        if len(x) != len(self.generators):
            raise UserError(f"noise for {len(self.generators)} examples, asked for {len(x)}.")
        rows = [torch.randn(shape, generator=g, dtype=dtype) for g in self.generators]
        return to_device(torch.stack(rows).to(x.dtype), x.device)


def unseeded(x: X) -> X:
    """Standard normal numbers from torch's global generator on the CPU."""
    return to_device(torch.randn(x.shape, dtype=x.dtype), x.device)


class Frame(NamedTuple):
    """One state of the chain: its time, x_t itself, and the estimate of x0 from it."""

    t: float
    x: X
    x0: X


@torch.no_grad()  # on the generator itself: a `with` around a yield would leak into the caller
def sample(
    denoise: Denoise,
    schedule: NoiseSchedule,
    x_T: X,
    steps: int | Times,
    step: Step,
    spacing: str | None = "trailing",
    noise: Noise | None = None,
) -> Iterator[Frame]:
    """Walk from x_T to data; yields steps + 1 frames, the last one clean.

    steps: their number; or the steps + 1 times, decreasing to 0, which need no spacing.
    spacing: see times_of.
    noise: where steps get new noise from. Default: torch's global CPU generator.
    """
    times, noise = times_of(schedule, steps, spacing, step), noise or unseeded
    x, memory = x_T, None
    for t, s in pairwise(times):
        x_s, x0, memory = step(denoise, schedule, x, t, s, noise, memory)
        yield Frame(t.item(), x, x0)
        x = x_s
    yield Frame(times[-1].item(), x, x)


def times_of(
    schedule: NoiseSchedule,
    steps: int | Times,
    spacing: str | None = "trailing",
    step: Step = SAMPLERS["ddim"],
) -> Times:
    """The times that this sampler visits in so many steps, or the given times, checked; on the CPU.

    spacing: of schedule.timesteps; None: the sampler's own. Where it is linspace or leading, each
    published sampler lays its times out in its own way: Euler and Heun do not round linspace's;
    the multistep solvers lay out one more and leave out the last.
    """
    if isinstance(steps, int):
        spacing = spacing or step.spacing
        times = schedule.timesteps(steps, spacing)
        if step.grid == "real" and spacing == "linspace":
            visited = torch.linspace(times[0], times[-2], steps, dtype=torch.float64)
            return torch.cat([visited, times[-1:]])
        if step.grid == "short" and spacing in ("linspace", "leading") and steps < schedule.T:
            times = schedule.timesteps(steps + 1, spacing)
            return torch.cat([times[:-2], times[-1:]])
        return times
    times, start = steps.cpu(), schedule.timesteps(1)[0].item()
    if len(times) < 2 or not (times[0] <= start and times[-1] == 0):
        ends = f"{times[0]:g} to {times[-1]:g}" if len(times) else "nowhere"
        limits = f"they must begin at {start:g} or below, and end at 0"
        raise UserError(f"times run from {ends}; {limits}.")
    for t, s in pairwise(times.tolist()):
        if not t > s:
            raise UserError(f"{s:g} follows {t:g} in the times; they must decrease.")
    return times
