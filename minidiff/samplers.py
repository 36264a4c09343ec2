"""From noise to data, and back: the sampling loop, its inversion, and the names of its steps.

A step moves x from time t to the cleaner time s; all of them are in steps.py. The loop owns the noise
and the memory of multistep methods. It is a generator, so the caller plots, logs or stops:

    *chain, last = sample(denoise, schedule, x_T, steps=25, step=ddim())

[1] Mokady et al. Null-text Inversion for Editing Real Images using Guided Diffusion Models. 2022.
    arXiv:2211.09794
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
    unipc,
)
from minidiff.training.seeds import generator_of

Times = Shaped[Tensor, "steps1"]

SAMPLERS: dict[str, Step] = {
    "ddim": ddim(),
    "ddpm": ddpm(),
    "euler": euler(),
    "euler_ancestral": euler_ancestral(),
    "heun": heun(),
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
        """From seeds that one generator draws in order: two batches of 4 are one batch of 8."""
        device = generator.device if generator else None
        seeds = torch.randint(2**63 - 1, (batch,), generator=generator, device=device)
        return cls([torch.Generator().manual_seed(seed) for seed in seeds.tolist()])

    def __call__(self, x: Float[Tensor, "B *dims"]) -> Float[Tensor, "B *dims"]:
        """Numbers of x's shape, dtype and device; drawn on the CPU, in float32 at least."""
        dtype, shape = torch.promote_types(x.dtype, torch.float32), x.shape[1:]
        if len(x) != len(self.generators):
            raise UserError(f"noise for {len(self.generators)} examples, asked for {len(x)}.")
        rows = [torch.randn(shape, generator=g, dtype=dtype) for g in self.generators]
        return torch.stack(rows).to(x)


def unseeded(x: Float[Tensor, "B *dims"]) -> Float[Tensor, "B *dims"]:
    """Standard normal numbers from torch's own generator on the CPU."""
    return torch.randn(x.shape, dtype=x.dtype).to(x.device)


class Frame(NamedTuple):
    """One stop of the chain: the time, the state there, and the estimate of x0 made from it."""

    t: float
    x: Float[Tensor, "B *dims"]
    x0: Float[Tensor, "B *dims"]


@torch.no_grad()  # on the generator itself: a `with` around a yield would leak into the caller
def sample(
    denoise: Denoise,
    schedule: NoiseSchedule,
    x_T: Float[Tensor, "B *dims"],
    steps: int | Times,
    step: Step,
    spacing: str = "trailing",
    noise: Noise | None = None,
) -> Iterator[Frame]:
    """Walk from x_T to data; yields steps + 1 frames, the last one clean.

    steps: how many, spaced as schedule.timesteps does; or the steps + 1 times themselves, decreasing to 0.
    noise: where steps that add noise get it. Default: new numbers from torch's own generator.
    """
    times, noise = times_of(schedule, steps, spacing), noise or unseeded
    x, memory = x_T, None
    for t, s in pairwise(times):
        x_s, x0, memory = step(denoise, schedule, x, t, s, noise, memory)
        yield Frame(t.item(), x, x0)
        x = x_s
    yield Frame(times[-1].item(), x, x)


def times_of(schedule: NoiseSchedule, steps: int | Times, spacing: str = "trailing") -> Times:
    """The times of so many steps, or the given ones, checked, on the CPU."""
    if isinstance(steps, int):
        return schedule.timesteps(steps, spacing)
    times, start = steps.cpu(), schedule.timesteps(1)[0].item()
    if len(times) < 2 or not (times[0] <= start and times[-1] == 0):
        ends = f"{times[0]:g} to {times[-1]:g}" if len(times) else "nowhere"
        raise UserError(
            f"times run from {ends}; they must begin at {start:g} or below, and end at 0."
        )
    for t, s in pairwise(times.tolist()):
        if not t > s:
            raise UserError(f"{s:g} follows {t:g} in the times; they must decrease.")
    return times


@torch.no_grad()
def invert(
    denoise: Denoise,
    schedule: NoiseSchedule,
    x0: Float[Tensor, "B *dims"],
    steps: int | Times,
    spacing: str = "trailing",
    rounds: int = 1,
) -> Iterator[Frame]:
    """From data to the noise that ddim() makes it from; yields steps + 1 frames, from clean to x_T.

    DDIM's step from t to s, walked up: x_t = x_s + (alpha_t - alpha_s) x0 + (sigma_t - sigma_s) eps, with
    x0 and eps estimated at (x_t, t). That x_t is not known yet: it starts as x_s, the approximation of
    [1], and is improved `rounds` times. More rounds come nearer to the inverse of ddim(), where steps are
    small.
    """
    if rounds < 1:
        raise UserError(f"rounds is {rounds}; it must be at least 1.")
    x, estimate = x0, x0
    times = times_of(schedule, steps, spacing)
    for s, t in pairwise(times.flip(0)):
        yield Frame(s.item(), x, estimate)
        alpha_s, sigma_s = schedule.alpha_sigma(s.clamp(min=schedule.final))
        alpha_t, sigma_t = schedule.alpha_sigma(t)
        x_t = x
        for _ in range(rounds):
            estimate, eps = denoise(x_t, t.expand(len(x)))
            x_t = x + (alpha_t - alpha_s).item() * estimate + (sigma_t - sigma_s).item() * eps
        x = x_t
    yield Frame(times[0].item(), x, estimate)
