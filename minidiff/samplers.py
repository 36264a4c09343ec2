"""From noise to data: the sampling loop, and the steps it can take.

A step moves x from time t to the cleaner time s:  (denoise, schedule, x, t, s) -> (x_s, x0_hat). The loop is a generator, so the
caller plots, logs or stops:

    *chain, last = sample(denoise, schedule, x_T, steps=25, step=ddim())

Because every schedule says alpha = 1, sigma = 0 at the clean end, no step is special, neither the first nor the last.

[1] Song, Meng, Ermon. Denoising Diffusion Implicit Models. 2021. arXiv:2010.02502
[2] Ho, Jain, Abbeel. Denoising Diffusion Probabilistic Models. 2020. arXiv:2006.11239
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

Step = Callable[[Denoise, NoiseSchedule, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


class Frame(NamedTuple):
    """One stop on the way: the time, the state there, and the guess of the clean data made from it."""

    t: float
    x: Float[Tensor, "B *dims"]
    x0: Float[Tensor, "B *dims"]


@torch.no_grad()  # on the generator itself: a `with` around a yield would leak into the caller
def sample(
    denoise: Denoise, schedule: NoiseSchedule, x_T: Float[Tensor, "B *dims"], steps: int, step: Step, spacing: str = "trailing"
) -> Iterator[Frame]:
    """Walk from x_T to data; yields steps + 1 frames, the last one clean."""
    x, times = x_T, schedule.timesteps(steps, spacing)
    for t, s in pairwise(times):
        x_s, x0 = step(denoise, schedule, x, t, s)
        yield Frame(t.item(), x, x0)
        x = x_s
    yield Frame(times[-1].item(), x, x)


def ddim(eta: float = 0.0, generator: torch.Generator | None = None) -> Step:
    """[1] eq. 12 and 16 for any schedule. eta = 0 is deterministic: Euler's method for flow matching and in sigma. eta = 1 is
    DDPM's ancestral step."""

    def step(
        denoise: Denoise, schedule: NoiseSchedule, x: Float[Tensor, "B *dims"], t: Shaped[Tensor, ""], s: Shaped[Tensor, ""]
    ) -> tuple[Float[Tensor, "B *dims"], Float[Tensor, "B *dims"]]:
        x0, eps = denoise(x, t.expand(len(x)))
        (alpha_t, sigma_t), (alpha_s, sigma_s) = schedule.alpha_sigma(t), schedule.alpha_sigma(s)
        up = eta * (sigma_s / sigma_t) * (sigma_t**2 - (alpha_t / alpha_s) ** 2 * sigma_s**2).sqrt()  # noise put back
        down = (sigma_s**2 - up**2).clamp(min=0).sqrt()  # noise kept
        x_s = alpha_s.item() * x0 + down.item() * eps
        if eta > 0:
            x_s = x_s + up.item() * torch.randn(x.shape, generator=generator, dtype=x.dtype).to(x.device)  # drawn on the CPU: one seed, one picture
        return x_s, x0

    return step


def ddpm(generator: torch.Generator | None = None) -> Step:
    """Ancestral sampling, [2] algorithm 2, over any times."""
    return ddim(eta=1.0, generator=generator)


SAMPLERS: dict[str, Callable[[torch.Generator | None], Step]] = {
    "ddim": lambda generator: ddim(0.0, generator),
    "ddpm": ddpm,
}


def by_name(name: str, generator: torch.Generator | None = None) -> Step:
    """The step a command line names."""
    if name not in SAMPLERS:
        raise UserError(f'no sampler "{name}"; there is {", ".join(SAMPLERS)}.')
    return SAMPLERS[name](generator)
