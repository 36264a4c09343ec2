"""From noise to data, and back: the sampling loop, its inversion, and the names of the steps it can take.

A step moves x from time t to the cleaner time s:  (denoise, schedule, x, t, s) -> (x_s, x0_hat); all of them are in steps.py. The loop is a
generator, so the caller plots, logs or stops:

    *chain, last = sample(denoise, schedule, x_T, steps=25, step=ddim())

[1] Song, Meng, Ermon. Denoising Diffusion Implicit Models. 2021. arXiv:2010.02502
[2] Mokady et al. Null-text Inversion for Editing Real Images using Guided Diffusion Models. 2022. arXiv:2211.09794
"""

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from minidiff.denoiser import Denoise
from minidiff.errors import UserError
from minidiff.schedules import NoiseSchedule
from minidiff.steps import (
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


class Frame(NamedTuple):
    """One stop on the way: the time, the state there, and the guess of the clean data made from it."""

    t: float
    x: Float[Tensor, "B *dims"]
    x0: Float[Tensor, "B *dims"]


@torch.no_grad()  # on the generator itself: a `with` around a yield would leak into the caller
def sample(
    denoise: Denoise,
    schedule: NoiseSchedule,
    x_T: Float[Tensor, "B *dims"],
    steps: int,
    step: Step,
    spacing: str = "trailing",
    times: Shaped[Tensor, "steps1"] | None = None,
) -> Iterator[Frame]:
    """Walk from x_T to data; yields steps + 1 frames, the last one clean. times, where given, replaces schedule.timesteps(steps, spacing):
    steps + 1 of them, decreasing to 0."""
    times = (
        schedule.timesteps(steps, spacing) if times is None else _checked(times, schedule, steps)
    )
    x = x_T
    for t, s in pairwise(times):
        x_s, x0 = step(denoise, schedule, x, t, s)
        yield Frame(t.item(), x, x0)
        x = x_s
    yield Frame(times[-1].item(), x, x)


def _checked(
    times: Shaped[Tensor, "steps1"], schedule: NoiseSchedule, steps: int
) -> Shaped[Tensor, "steps1"]:
    if len(times) != steps + 1:
        raise UserError(f"{len(times)} times for {steps} steps; there must be one more than steps.")
    most = schedule.timesteps(1)[0].item()
    if not (times[0] <= most and times[-1] == 0):
        raise UserError(
            f"times run from {times[0]:g} to {times[-1]:g}; they must begin at {most:g} or below, and end at 0."
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
    steps: int,
    spacing: str = "trailing",
    times: Shaped[Tensor, "steps1"] | None = None,
    rounds: int = 1,
) -> Iterator[Frame]:
    """From data to the noise that ddim() makes it from: yields steps + 1 frames, from clean to x_T; arguments as of `sample`.

    DDIM's step from s down to t is x_t = x_s + (alpha_t - alpha_s) x0 + (sigma_t - sigma_s) eps, both guessed from x_s. To walk it up, x_s must
    be known already: it begins as x_t, the usual approximation ([2]), and is improved `rounds` times. One round is a method of first order;
    the more, the nearer sample(..., ddim()) comes to x0 again, as long as steps are small.
    """
    if rounds < 1:
        raise UserError(f"rounds is {rounds}; it must be at least 1.")
    times = (
        schedule.timesteps(steps, spacing) if times is None else _checked(times, schedule, steps)
    )
    x, guess = x0, x0
    for t, s in pairwise(times.flip(0)):
        yield Frame(t.item(), x, guess)
        (alpha_t, sigma_t), (alpha_s, sigma_s) = (
            schedule.alpha_sigma(t.clamp(min=schedule.final)),
            schedule.alpha_sigma(s),
        )
        x_s = x
        for _ in range(rounds):
            guess, eps = denoise(x_s, s.expand(len(x)))
            x_s = x + (alpha_s - alpha_t).item() * guess + (sigma_s - sigma_t).item() * eps
        x = x_s
    yield Frame(times[0].item(), x, guess)


SAMPLERS: dict[str, Callable[[torch.Generator | None], Step]] = {
    "ddim": lambda generator: ddim(0.0, generator),
    "ddpm": ddpm,
    "euler": lambda _: euler(),
    "euler_ancestral": euler_ancestral,
    "heun": lambda generator: heun(generator=generator),
    "dpmpp_2m": lambda _: dpmpp_2m(),
    "dpmpp_2m_sde": dpmpp_2m_sde,
    "unipc": lambda _: unipc(),
    "lcm": lcm,
}


def by_name(name: str, generator: torch.Generator | None = None) -> Step:
    """The step a command line names."""
    if name not in SAMPLERS:
        raise UserError(f'no sampler "{name}"; there is {", ".join(SAMPLERS)}.')
    return SAMPLERS[name](generator)
