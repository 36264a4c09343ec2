"""DDIM inversion: from data to the noise that DDIM makes it from, the start of editing in [2].

[1] Song, Meng, Ermon. Denoising Diffusion Implicit Models. 2021. arXiv:2010.02502
[2] Mokady et al. Null-text Inversion for Editing Real Images using Guided Diffusion Models.
    arXiv:2211.09794
"""

from collections.abc import Iterator
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

from minidiff.denoiser import Denoise
from minidiff.errors import UserError
from minidiff.samplers import Frame, Times, times_of
from minidiff.schedules import NoiseSchedule


@torch.no_grad()
def invert(
    denoise: Denoise,
    schedule: NoiseSchedule,
    x0: Float[Tensor, "B *dims"],
    steps: int | Times,
    spacing: str | None = "trailing",
    rounds: int = 1,
) -> Iterator[Frame]:
    """From data to the noise that ddim() makes it from; yields steps + 1 frames, from clean to x_T.

    DDIM's step from t to s ([1] eq. 12) is reversed. It would need eps at (x_t, t), and x_t is not
    known yet. The published round ([2] section 3.1) takes eps at (x_s, t) in its place. Every
    further round evaluates (x0, eps) at (x_t, t), with the x_t of the round before, in x_t = x_s +
    (alpha_t - alpha_s) x0 + (sigma_t - sigma_s) eps: where steps are small, that comes nearer to
    the inverse of ddim().
    """
    if rounds < 1:
        raise UserError(f"rounds is {rounds}; it must be at least 1.")
    x, estimate = x0, x0
    times = times_of(schedule, steps, spacing)
    for s, t in pairwise(times.flip(0)):
        yield Frame(s.item(), x, estimate)
        alpha_s, sigma_s = schedule.alpha_sigma(s.clamp(min=schedule.final))
        alpha_t, sigma_t = schedule.alpha_sigma(t)
        estimate, eps = denoise(x, t.expand(len(x)))
        ratio = alpha_t / alpha_s
        x_t = ratio.item() * x + (sigma_t - ratio * sigma_s).item() * eps
        for _ in range(rounds - 1):
            estimate, eps = denoise(x_t, t.expand(len(x)))
            x_t = x + (alpha_t - alpha_s).item() * estimate + (sigma_t - sigma_s).item() * eps
        x = x_t
    yield Frame(times[0].item(), x, estimate)
