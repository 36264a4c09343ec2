"""Every step a sampler can take from time t to the next, cleaner time s.

    step(denoise, schedule, x, t, s, noise, memory) -> (x_s, x0_hat, memory)

All are made of x_s = alpha_s x0 + sigma_s eps, and differ in how they estimate the x0 and eps that hold
all the way from t to s. Every schedule has alpha = 1, sigma = 0 at the clean end, so the first and the
last step need no code of their own. A step has no state: `noise(x)` gives standard normal numbers of x's
shape, and what a multistep method remembers of the steps before is the `memory` that it returns and is
given back; it is None at the first step.

[1] Song, Meng, Ermon. Denoising Diffusion Implicit Models. 2021. arXiv:2010.02502
[2] Ho, Jain, Abbeel. Denoising Diffusion Probabilistic Models. 2020. arXiv:2006.11239
[3] Karras, Aittala, Aila, Laine. Elucidating the Design Space of Diffusion-Based Generative Models.
    2022. arXiv:2206.00364
[4] Lu et al. DPM-Solver++: Fast Solver for Guided Sampling of Diffusion Probabilistic Models. 2022.
    arXiv:2211.01095
[5] Zhao et al. UniPC: A Unified Predictor-Corrector Framework for Fast Sampling of Diffusion Models.
    2023. arXiv:2302.04867
[6] Luo et al. Latent Consistency Models. 2023. arXiv:2310.04378
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from minidiff.denoiser import Denoise
from minidiff.errors import choice
from minidiff.schedules import NoiseSchedule, per_example

State = Float[Tensor, "B *dims"]
Time = Shaped[Tensor, ""]
Noise = Callable[[Tensor], Tensor]  # x -> standard normal numbers of its shape
Step = Callable[..., tuple[Tensor, Tensor, Any]]  # as in the first lines of this file


@dataclass(frozen=True)
class DDIM:
    """[1] eq. 12 and 16 for any schedule, by the noise that is put back in each step.

    eta = 0 is deterministic: Euler's method for flow matching and in sigma. eta = 1 is DDPM's ancestral
    step. final: stop at schedule.final, as published; False: at clean data.
    """

    eta: float = 0.0
    final: bool = True

    def __call__(
        self,
        denoise: Denoise,
        schedule: NoiseSchedule,
        x: State,
        t: Time,
        s: Time,
        noise: Noise,
        memory: None = None,
    ) -> tuple[State, State, None]:
        x0, eps = denoise(x, t.expand(len(x)))
        s = s.clamp(min=schedule.final) if self.final else s
        (alpha_t, sigma_t), (alpha_s, sigma_s) = schedule.alpha_sigma(t), schedule.alpha_sigma(s)
        removed = (sigma_t**2 - (alpha_t / alpha_s) ** 2 * sigma_s**2).clamp(min=0)
        up = self.eta * (sigma_s / sigma_t) * removed.sqrt()  # noise put back
        down = (sigma_s**2 - up**2).clamp(min=0).sqrt()  # noise left in place
        x_s = alpha_s.item() * x0 + down.item() * eps
        if self.eta > 0:
            x_s = x_s + up.item() * noise(x)
        return x_s, x0, None


def ddpm() -> DDIM:
    """Ancestral sampling, [2] algorithm 2, over any times."""
    return DDIM(eta=1.0)


def euler() -> DDIM:
    """Euler's method for the ODE of [3] eq. 1, or along a flow's straight lines: DDIM to clean data."""
    return DDIM(eta=0.0, final=False)


def euler_ancestral() -> DDIM:
    """k-diffusion's Euler ancestral: DDPM's ancestral step to clean data."""
    return DDIM(eta=1.0, final=False)


@dataclass(frozen=True)
class Heun:
    """Heun's second-order method, two evaluations a step, [3] algorithm 2.

    The ODE is dx = x0 d(alpha) + eps d(sigma). Euler's step takes x0 and eps at t for the whole way;
    Heun's takes the mean of those at t and at the end of Euler's step. With x_s = alpha_s x0 + sigma_s eps
    at both ends, that moves x_s by `lean` times the change of x0.
    """

    churn: float = 0.0  # first add noise until sigma / alpha has grown by this share (gamma)
    noise_scale: float = 1.0  # of that noise (S_noise)
    between: tuple[float, float] = (0.0, math.inf)  # add it in these sigma / alpha (S_tmin, S_tmax)

    def __call__(
        self,
        denoise: Denoise,
        schedule: NoiseSchedule,
        x: State,
        t: Time,
        s: Time,
        noise: Noise,
        memory: None = None,
    ) -> tuple[State, State, None]:
        x, t = self._churned(schedule, x, t, noise) if self.churn > 0 else (x, t)
        x0, eps = denoise(x, t.expand(len(x)))
        (alpha_t, sigma_t), (alpha_s, sigma_s) = schedule.alpha_sigma(t), schedule.alpha_sigma(s)
        x_s = alpha_s.item() * x0 + sigma_s.item() * eps
        if sigma_s == 0:  # nothing is left to evaluate at clean data
            return x_s, x0, None
        lean = schedule.unit(s) / schedule.unit(t) * (sigma_t * alpha_s / sigma_s - alpha_t) / 2
        return x_s + lean.item() * (denoise(x_s, s.expand(len(x))).x0 - x0), x0, None

    def _churned(
        self, schedule: NoiseSchedule, x: State, t: Time, noise: Noise
    ) -> tuple[State, Time]:
        """x with more noise, and its time."""
        alpha_t, sigma_t = schedule.alpha_sigma(t)
        if not self.between[0] <= sigma_t / alpha_t <= self.between[1]:
            return x, t
        noisier = schedule.at_log_snr(2 * (alpha_t / sigma_t / (1 + self.churn)).log())
        alpha, sigma = schedule.alpha_sigma(noisier)
        ratio = (alpha / alpha_t).nan_to_num(1.0)  # 0 / 0: pure noise stays what it is
        added = (sigma**2 - (ratio * sigma_t) ** 2).clamp(min=0).sqrt()
        return ratio.item() * x + self.noise_scale * added.item() * noise(x), noisier


class Stride(NamedTuple):
    """The way from t to s in lambda = log(alpha / sigma), the time of [4] and [5].

    It is infinite where t is pure noise, or s clean data.
    """

    h: Tensor  # lambda_s - lambda_t
    r: Tensor  # e^-h
    shrink: Tensor  # sigma_s / sigma_t
    alpha: Tensor  # alpha_s
    sigma: Tensor  # sigma_s

    @classmethod
    def between(cls, schedule: NoiseSchedule, t: Time, s: Time) -> "Stride":
        (alpha_t, sigma_t), (alpha_s, sigma_s) = schedule.alpha_sigma(t), schedule.alpha_sigma(s)
        r = (sigma_s / alpha_s) * (alpha_t / sigma_t)
        return cls(-r.log(), r, sigma_s / sigma_t, alpha_s, sigma_s)

    @property
    def finite(self) -> bool:
        return bool(self.h.isfinite())


class Last(NamedTuple):
    """What dpmpp_2m remembers: the step before, and the x0 it started from."""

    stride: Stride
    x0: State


def second_order(x0: State, stride: Stride, last: Last | None, weight: Tensor) -> State | float:
    """weight / (2 h_last) (x0 - x0_last): what the slope of x0, from its last two values, adds.

    First step: no previous x0, so no second-order term. Last step (sigma 0): fall back to first order.
    """
    if last is None or not (last.stride.finite and stride.finite):
        return 0.0
    return (weight / (2 * last.stride.h)).item() * (x0 - last.x0)


@dataclass(frozen=True)
class DPMpp2M:
    """DPM-Solver++(2M), [4] algorithm 2: second order from the x0 of the step before, one evaluation a step.

    eta = 1 is SDE-DPM-Solver++(2M) of [4]; values between are k-diffusion's eta.
    """

    eta: float = 0.0

    def __call__(
        self,
        denoise: Denoise,
        schedule: NoiseSchedule,
        x: State,
        t: Time,
        s: Time,
        noise: Noise,
        memory: Last | None = None,
    ) -> tuple[State, State, Last]:
        x0 = denoise(x, t.expand(len(x))).x0
        stride = Stride.between(schedule, t, s)
        r, eta = stride.r, self.eta
        ahead = x0 + second_order(x0, stride, memory, stride.h)
        x_s = (stride.shrink * r**eta).item() * x
        x_s = x_s + (stride.alpha * (1 - r ** (1 + eta))).item() * ahead
        if eta > 0:
            x_s = x_s + (stride.sigma * (1 - r ** (2 * eta)).sqrt()).item() * noise(x)
        return x_s, x0, Last(stride, x0)


def dpmpp_2m_sde() -> DPMpp2M:
    """SDE-DPM-Solver++(2M), [4]: dpmpp_2m with as much new noise as ancestral sampling."""
    return DPMpp2M(eta=1.0)


class Uncorrected(NamedTuple):
    """What unipc remembers: the last step, which the next evaluation corrects, and the one before."""

    x: State
    stride: Stride
    x0: State
    last: Last | None


@dataclass(frozen=True)
class UniPC:
    """UniPC-2, [5] section 3: DPM-Solver++(2M) predicts x_s; the evaluation at x_s is reused to correct x_s.

    So it costs no extra evaluation. variant: B(h) of [5], the weight where there are only two points.
    """

    variant: str = "bh2"

    def __post_init__(self) -> None:
        choice("variant of UniPC", self.variant, ("bh1", "bh2"))

    def __call__(
        self,
        denoise: Denoise,
        schedule: NoiseSchedule,
        x: State,
        t: Time,
        s: Time,
        noise: Noise,
        memory: Uncorrected | None = None,
    ) -> tuple[State, State, Uncorrected]:
        x0, last = denoise(x, t.expand(len(x))).x0, None
        if memory is not None:
            x, last = self._corrected(memory, x0), Last(memory.stride, memory.x0)
        stride = Stride.between(schedule, t, s)
        ahead = (1 - stride.r).item() * x0
        ahead = ahead + second_order(x0, stride, last, self._B(stride) * stride.h)
        x_s = stride.shrink.item() * x + stride.alpha.item() * ahead
        return x_s, x0, Uncorrected(x, stride, x0, last)

    def _B(self, stride: Stride) -> Tensor:
        return stride.h if self.variant == "bh1" else 1 - stride.r

    def _corrected(self, memory: Uncorrected, x0_s: State) -> State:
        """The last step taken again with a third estimate of x0, at its end.

        x_s is the integral of alpha_s e^(u - h) x0(u) over u = 0..h, along the parabola through the three
        estimates; the integral of u^k is h^k m_k.
        """
        x, stride, x0, last = memory
        h, m0 = stride.h, 1 - stride.r
        if last is None or not last.stride.finite:  # a line through two points
            B = self._B(stride)
            new = B.item() / 2 if B.isfinite() else 0.0
            ahead = m0.item() * x0 + new * (x0_s - x0)
        else:
            m1 = 1 - m0 / h
            m2 = 1 - 2 * m1 / h
            reach = last.stride.h / h
            bend = (m2 - m1) / (1 + reach)
            ahead = m0.item() * x0 + (m1 + bend).item() * (x0_s - x0)
            ahead = ahead - (bend / reach).item() * (x0 - last.x0)
        return stride.shrink.item() * x + stride.alpha.item() * ahead


def consistent(
    denoise: Denoise, schedule: NoiseSchedule, x: State, t: Shaped[Tensor, "B"]
) -> State:
    """The consistency function of [6] eq. 9, c_skip x + c_out x0_hat: x itself at the first level.

    c_skip = 0.5^2 / (tau^2 + 0.5^2), c_out = tau / sqrt(tau^2 + 0.5^2), and tau is ten times the
    thousandths of the way since the first level. A few levels further on it is x0_hat.
    """
    tau = 10 * (1000 * schedule.progress(t) - 1).clamp(min=0)
    c_skip = per_example(0.25 / (tau**2 + 0.25), x)
    c_out = per_example(tau / (tau**2 + 0.25).sqrt(), x)
    x0 = denoise(x, t).x0  # NaN for clean data, of a network that predicts x0
    return torch.where(c_out > 0, c_skip * x + c_out * x0, x)


@dataclass(frozen=True)
class LCM:
    """Multistep consistency sampling, [6] algorithm 3, for a network distilled to estimate x0 in one go.

    All the noise is new at every step.
    """

    def __call__(
        self,
        denoise: Denoise,
        schedule: NoiseSchedule,
        x: State,
        t: Time,
        s: Time,
        noise: Noise,
        memory: None = None,
    ) -> tuple[State, State, None]:
        x0 = consistent(denoise, schedule, x, t.expand(len(x)))
        return schedule.mix(x0, noise(x), s), x0, None


# The published names of the steps; samplers.SAMPLERS lists them all.
ddim, heun, dpmpp_2m, unipc, lcm = DDIM, Heun, DPMpp2M, UniPC, LCM
