"""From noise to data: the sampling loop, and every step it can take.

A step moves x from time t to the cleaner time s:  (denoise, schedule, x, t, s) -> (x_s, x0_hat). The loop is a generator, so the
caller plots, logs or stops:

    *chain, last = sample(denoise, schedule, x_T, steps=25, step=ddim())

Because every schedule says alpha = 1, sigma = 0 at the clean end, no step is special, neither the first nor the last. All steps are made
of x_s = alpha_s x0 + sigma_s eps; they differ in how they guess the x0 and eps that hold all the way from t to s. Random numbers are drawn
on the CPU: one seed, one picture, on any device.

[1] Song, Meng, Ermon. Denoising Diffusion Implicit Models. 2021. arXiv:2010.02502
[2] Ho, Jain, Abbeel. Denoising Diffusion Probabilistic Models. 2020. arXiv:2006.11239
[3] Karras, Aittala, Aila, Laine. Elucidating the Design Space of Diffusion-Based Generative Models. 2022. arXiv:2206.00364
[4] Lu et al. DPM-Solver++: Fast Solver for Guided Sampling of Diffusion Probabilistic Models. 2022. arXiv:2211.01095
"""
import math
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from minidiff.denoiser import Denoise
from minidiff.errors import UserError
from minidiff.schedules import NoiseSchedule

State = Float[Tensor, "B *dims"]
Time = Shaped[Tensor, ""]
Step = Callable[[Denoise, NoiseSchedule, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


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
    times = schedule.timesteps(steps, spacing) if times is None else _checked(times, schedule, steps)
    x = x_T
    for t, s in pairwise(times):
        x_s, x0 = step(denoise, schedule, x, t, s)
        yield Frame(t.item(), x, x0)
        x = x_s
    yield Frame(times[-1].item(), x, x)


def _checked(times: Shaped[Tensor, "steps1"], schedule: NoiseSchedule, steps: int) -> Shaped[Tensor, "steps1"]:
    if len(times) != steps + 1:
        raise UserError(f"{len(times)} times for {steps} steps; there must be one more than steps.")
    most = schedule.timesteps(1)[0].item()
    if not (times[0] <= most and times[-1] == 0):
        raise UserError(f"times run from {times[0]:g} to {times[-1]:g}; they must begin at {most:g} or below, and end at 0.")
    for t, s in pairwise(times.tolist()):
        if not t > s:
            raise UserError(f"{s:g} follows {t:g} in the times; they must decrease.")
    return times


def _normal(x: State, generator: torch.Generator | None) -> State:
    return torch.randn(x.shape, generator=generator, dtype=x.dtype).to(x.device)


def ddim(eta: float = 0.0, generator: torch.Generator | None = None, final: bool = True) -> Step:
    """[1] eq. 12 and 16 for any schedule. eta = 0 is deterministic: Euler's method for flow matching and in sigma. eta = 1 is
    DDPM's ancestral step. final: stop at schedule.final, as published; without it, at clean data."""

    def step(denoise: Denoise, schedule: NoiseSchedule, x: State, t: Time, s: Time) -> tuple[State, State]:
        x0, eps = denoise(x, t.expand(len(x)))
        s = s.clamp(min=schedule.final) if final else s
        (alpha_t, sigma_t), (alpha_s, sigma_s) = schedule.alpha_sigma(t), schedule.alpha_sigma(s)
        up = eta * (sigma_s / sigma_t) * (sigma_t**2 - (alpha_t / alpha_s) ** 2 * sigma_s**2).sqrt()  # noise put back
        down = (sigma_s**2 - up**2).clamp(min=0).sqrt()  # noise kept
        x_s = alpha_s.item() * x0 + down.item() * eps
        if eta > 0:
            x_s = x_s + up.item() * _normal(x, generator)
        return x_s, x0

    return step


def ddpm(generator: torch.Generator | None = None) -> Step:
    """Ancestral sampling, [2] algorithm 2, over any times."""
    return ddim(eta=1.0, generator=generator)


def euler() -> Step:
    """Euler's method for the ODE of [3] eq. 1, in sigma / alpha or along the straight lines of a flow: DDIM, down to clean data."""
    return ddim(eta=0.0, final=False)


def euler_ancestral(generator: torch.Generator | None = None) -> Step:
    """Euler's method to less noise than wanted, and new noise on top (k-diffusion): DDPM's ancestral step, down to clean data."""
    return ddim(eta=1.0, generator=generator, final=False)


def heun(
    churn: float = 0.0,
    noise: float = 1.0,
    between: tuple[float, float] = (0.0, math.inf),
    generator: torch.Generator | None = None,
) -> Step:
    """Heun's second-order method, two evaluations a step, [3] algorithm 2.

    churn: noise is first added until sigma / alpha has grown by this share (the paper's gamma = S_churn / steps, at most sqrt(2) - 1).
    noise: the scale of that noise (S_noise). between: where it is added, in sigma / alpha (S_tmin, S_tmax).

    The ODE is dx = x0 d(alpha) + eps d(sigma). Euler's step takes x0 and eps at t for the whole way; here they are the mean of those at t
    and at the end of Euler's step. With x_s = alpha_s x0 + sigma_s eps at both, that moves x_s by `lean` times the change of x0.
    """

    def step(denoise: Denoise, schedule: NoiseSchedule, x: State, t: Time, s: Time) -> tuple[State, State]:
        x, t = _churned(schedule, x, t) if churn > 0 else (x, t)
        x0, eps = denoise(x, t.expand(len(x)))
        (alpha_t, sigma_t), (alpha_s, sigma_s) = schedule.alpha_sigma(t), schedule.alpha_sigma(s)
        x_s = alpha_s.item() * x0 + sigma_s.item() * eps
        lean = schedule.unit(s) / schedule.unit(t) * (sigma_t * alpha_s / sigma_s - alpha_t) / 2
        if lean.isinf():  # s is clean: nothing is left to evaluate there
            return x_s, x0
        return x_s + lean.item() * (denoise(x_s, s.expand(len(x))).x0 - x0), x0

    def _churned(schedule: NoiseSchedule, x: State, t: Time) -> tuple[State, Time]:
        alpha_t, sigma_t = schedule.alpha_sigma(t)
        if not between[0] <= sigma_t / alpha_t <= between[1]:
            return x, t
        noisier = schedule.at_log_snr(2 * (alpha_t / sigma_t / (1 + churn)).log())
        alpha, sigma = schedule.alpha_sigma(noisier)
        kept = (alpha / alpha_t).nan_to_num(1.0)  # 0 / 0: pure noise stays what it is
        added = (sigma**2 - (kept * sigma_t) ** 2).clamp(min=0).sqrt()
        return kept.item() * x + noise * added.item() * _normal(x, generator), noisier

    return step


class _Stride(NamedTuple):
    """The way from t to s in lambda = log(alpha / sigma), which [4] counts in. It may be infinite at either end."""

    h: Tensor  # lambda_s - lambda_t
    r: Tensor  # e^-h
    shrink: Tensor  # sigma_s / sigma_t
    alpha: Tensor  # alpha_s
    sigma: Tensor  # sigma_s

    @classmethod
    def between(cls, schedule: NoiseSchedule, t: Time, s: Time) -> "_Stride":
        (alpha_t, sigma_t), (alpha_s, sigma_s) = schedule.alpha_sigma(t), schedule.alpha_sigma(s)
        r = (sigma_s / alpha_s) * (alpha_t / sigma_t)
        return cls(-r.log(), r, sigma_s / sigma_t, alpha_s, sigma_s)


class _Past:
    """What a multistep method knows of the steps before. A chain goes on where the last step ended; any other is new, and has no past."""

    def __init__(self) -> None:
        self.end, self.kept = None, ()

    def recall(self, x: State, t: Time) -> tuple:
        """What was kept, if this chain goes on; else nothing."""
        return self.kept if self.end == (t.item(), x.shape, x.device) else ()

    def keep(self, x: State, s: Time, *what) -> None:
        self.end, self.kept = (s.item(), x.shape, x.device), what


def dpmpp_2m(eta: float = 0.0, generator: torch.Generator | None = None) -> Step:
    """DPM-Solver++(2M), [4] algorithm 2: second order at one evaluation a step, by leaning on the x0 of the step before.
    eta = 1 is its SDE form, SDE-DPM-Solver++(2M) [4] eq. 18; between is k-diffusion's eta."""
    past = _Past()

    def step(denoise: Denoise, schedule: NoiseSchedule, x: State, t: Time, s: Time) -> tuple[State, State]:
        x0 = denoise(x, t.expand(len(x))).x0
        stride = _Stride.between(schedule, t, s)
        h_last, x0_last = past.recall(x, t) or (math.inf, x0)
        past.keep(x, s, stride.h, x0)
        # A chain without a past has it infinitely far away; and no slope can be followed infinitely far, where s is clean.
        lean = (stride.h / (2 * h_last)).nan_to_num(0.0, posinf=0.0)
        ahead = x0 + lean.item() * (x0 - x0_last)
        x_s = (stride.shrink * stride.r**eta).item() * x + (stride.alpha * (1 - stride.r ** (1 + eta))).item() * ahead
        if eta > 0:
            x_s = x_s + (stride.sigma * (1 - stride.r ** (2 * eta)).sqrt()).item() * _normal(x, generator)
        return x_s, x0

    return step


def dpmpp_2m_sde(generator: torch.Generator | None = None) -> Step:
    """SDE-DPM-Solver++(2M), [4] eq. 18."""
    return dpmpp_2m(eta=1.0, generator=generator)


SAMPLERS: dict[str, Callable[[torch.Generator | None], Step]] = {
    "ddim": lambda generator: ddim(0.0, generator),
    "ddpm": ddpm,
    "euler": lambda _: euler(),
    "euler_ancestral": euler_ancestral,
    "heun": lambda generator: heun(generator=generator),
    "dpmpp_2m": lambda _: dpmpp_2m(),
    "dpmpp_2m_sde": dpmpp_2m_sde,
}


def by_name(name: str, generator: torch.Generator | None = None) -> Step:
    """The step a command line names."""
    if name not in SAMPLERS:
        raise UserError(f'no sampler "{name}"; there is {", ".join(SAMPLERS)}.')
    return SAMPLERS[name](generator)
