"""Every step a sampler can take from time t to the next, cleaner time s.

    step(denoise, schedule, x, t, s, noise, memory) -> (x_s, x0_hat, memory)

All compute x_s = alpha_s x0 + sigma_s eps, and differ in how they estimate the x0 and eps of the
way from t to s. Every schedule has alpha = 1, sigma = 0 at t = 0, so DDIM's last step is no special
case. A step has no state: what a multistep method remembers is the `memory` that it returns and
that the next step is given.

[1] Song, Meng, Ermon. Denoising Diffusion Implicit Models. 2021. arXiv:2010.02502
[2] Ho, Jain, Abbeel. Denoising Diffusion Probabilistic Models. 2020. arXiv:2006.11239
[3] Karras et al. Elucidating the Design Space of Diffusion-Based Generative Models.
    2022. arXiv:2206.00364
[4] Lu et al. DPM-Solver++: Fast Solver for Guided Sampling of Diffusion Probabilistic Models. 2022.
    arXiv:2211.01095
[5] Zhao et al. UniPC: A Unified Predictor-Corrector Framework for Fast Sampling of Diffusion
    Models. 2023. arXiv:2302.04867
[6] Luo et al. Latent Consistency Models. 2023. arXiv:2310.04378
[7] Liu et al. Pseudo Numerical Methods for Diffusion Models on Manifolds. 2022. arXiv:2202.09778
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
from minidiff.schedules import SIGMA_MAX, NoiseSchedule, per_example

State = Float[Tensor, "B *dims"]
Time = Shaped[Tensor, ""]
Noise = Callable[[Tensor], Tensor]  # x -> standard normal numbers of its shape


class Step:
    """The interface of every step. Subclasses are frozen dataclasses of their options."""

    # The published grid of times, that of diffusers' class; samplers.times_of computes it.
    spacing = "linspace"  # where the model says none
    grid = "whole"  # linspace and leading: at whole times, at "real" ones, or "short" of the last

    def follows(self, spacing: str) -> bool:
        """Whether the published sampler takes this spacing from a model's settings."""
        return True

    def __call__(
        self,
        denoise: Denoise,
        schedule: NoiseSchedule,
        x: State,
        t: Time,
        s: Time,
        noise: Noise,
        memory: Any = None,
    ) -> tuple[State, State, Any]:
        """x_s, the estimate of x0, and the memory for the next step. memory: None at the first."""
        raise NotImplementedError


@dataclass(frozen=True)
class DDIM(Step):
    """[1] eq. 12 and 16 for any schedule. eta: scale of the new noise; 1 is DDPM's.

    eta = 0 is deterministic: Euler's method for flow matching and in sigma. eta = 1 is DDPM's
    ancestral step. final: end at schedule.final, as published; False: at clean data.
    """

    eta: float = 0.0
    final: bool = True

    @property
    def spacing(self) -> str:
        return "leading" if self.final else "linspace"

    @property
    def grid(self) -> str:
        return "whole" if self.final else "real"

    def follows(self, spacing: str) -> bool:
        return spacing != "karras" or self == euler()

    def __call__(self, denoise, schedule, x, t, s, noise, memory=None):
        x0, eps = denoise(x, t.expand(len(x)))
        s = s.clamp(min=schedule.final) if self.final else s
        (alpha_t, sigma_t), (alpha_s, sigma_s) = schedule.alpha_sigma(t), schedule.alpha_sigma(s)
        removed = (sigma_t**2 - (alpha_t / alpha_s) ** 2 * sigma_s**2).clamp(min=0)
        up = self.eta * (sigma_s / sigma_t) * removed.sqrt()  # new noise  # eq: ddim-16
        down = (sigma_s**2 - up**2).clamp(min=0).sqrt()  # predicted noise that stays
        x_s = alpha_s.item() * x0 + down.item() * eps  # eq: ddim-12, ddim-13
        if self.eta > 0:
            x_s = x_s + up.item() * noise(x)
        return x_s, x0, None


def ddpm() -> DDIM:
    """Ancestral sampling, [2] algorithm 2, over any times."""
    return DDIM(eta=1.0)


def euler() -> DDIM:  # eq: flow-euler
    """Euler's method for the ODE of [3] eq. 1, or along a flow's straight lines: DDIM to clean
    data."""
    return DDIM(eta=0.0, final=False)


def euler_ancestral() -> DDIM:
    """k-diffusion's Euler ancestral: DDPM's ancestral step to clean data."""
    return DDIM(eta=1.0, final=False)


@dataclass(frozen=True)
class Heun(Step):  # eq: edm-heun
    """Heun's second-order method, two evaluations a step, [3] algorithm 2.

    The ODE is dx = x0 d(alpha) + eps d(sigma). Euler's step uses the slope at t for the whole
    way; Heun's uses the mean of the slopes at t and at the end of Euler's step, which moves x_s by
    `weight` times the change of x0.
    """

    churn: float = 0.0  # first add noise: sigma / alpha grows by this fraction (gamma)
    noise_scale: float = 1.0  # standard deviation of that noise (S_noise)
    between: tuple[float, float] = (0.0, math.inf)  # range of sigma / alpha for it (S_tmin, S_tmax)
    grid = "real"

    def __call__(self, denoise, schedule, x, t, s, noise, memory=None):
        x, t = self._churned(schedule, x, t, noise) if self.churn > 0 else (x, t)
        x0, eps = denoise(x, t.expand(len(x)))
        (alpha_t, sigma_t), (alpha_s, sigma_s) = schedule.alpha_sigma(t), schedule.alpha_sigma(s)
        x_s = alpha_s.item() * x0 + sigma_s.item() * eps
        if sigma_s == 0:  # the denoiser is not defined at clean data
            return x_s, x0, None
        weight = schedule.unit(s) / schedule.unit(t) * (sigma_t * alpha_s / sigma_s - alpha_t) / 2
        return x_s + weight.item() * (denoise(x_s, s.expand(len(x))).x0 - x0), x0, None

    def _churned(self, schedule: NoiseSchedule, x: State, t: Time, noise: Noise) -> tuple:
        """x with more noise, and its time."""
        alpha_t, sigma_t = schedule.alpha_sigma(t)
        if not self.between[0] <= sigma_t / alpha_t <= self.between[1]:
            return x, t
        noisier = schedule.at_log_snr(2 * (alpha_t / sigma_t / (1 + self.churn)).log())
        alpha, sigma = schedule.alpha_sigma(noisier)
        ratio = (alpha / alpha_t).nan_to_num(1.0)  # 0 / 0: pure noise stays what it is
        added = (sigma**2 - (ratio * sigma_t) ** 2).clamp(min=0).sqrt()
        return ratio.item() * x + self.noise_scale * added.item() * noise(x), noisier


# The weights of [7] eq. 9 for the last eps, and for as many as there are at first.
ADAMS_BASHFORTH = {
    1: (1.0,),
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}


@dataclass(frozen=True)
class PNDM(Step):
    """[7] as in Stable Diffusion 1.5 ("PLMS"): DDIM's step along a sum of the last four eps.

    The first step evaluates eps at its end, too, and takes the mean."""

    spacing = "leading"

    def follows(self, spacing: str) -> bool:
        return spacing != "karras"

    def __call__(self, denoise, schedule, x, t, s, noise, memory=None):
        x0, eps = denoise(x, t.expand(len(x)))
        alpha_t, sigma_t = schedule.alpha_sigma(t)
        alpha_s, sigma_s = schedule.alpha_sigma(s.clamp(min=schedule.final))
        x_s = alpha_s.item() * x0 + sigma_s.item() * eps
        last = (eps, *(memory or ()))[:4]
        if sigma_t > SIGMA_MAX * alpha_t:  # almost no data: eps tells nothing of x0
            return x_s, x0, last
        slope = (sigma_s - alpha_s * sigma_t / alpha_t).item()
        weights = ADAMS_BASHFORTH[len(last)]
        mean = sum(weight * each for weight, each in zip(weights, last, strict=True))
        if memory is None and s > 0:
            mean = (eps + denoise(x_s, s.expand(len(x))).eps) / 2
        return x_s + slope * (mean - eps), x0, last


class Stride(NamedTuple):
    """The way from t to s in lambda = log(alpha / sigma), the time of [4] and [5]. h is infinite
    where t is pure noise or s is clean."""

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
    """What dpmpp_2m remembers: the previous step, and the estimate of x0 at its start."""

    stride: Stride
    x0: State


def second_order(x0: State, stride: Stride, last: Last | None, weight: Tensor) -> State | float:
    """weight / (2 h_last) (x0 - x0_last): the slope of x0, from its last two values.

    First step: no previous x0, so no second-order term. Last step (sigma 0): first order.
    """
    if last is None or not (last.stride.finite and stride.finite):
        return 0.0
    return (weight / (2 * last.stride.h)).item() * (x0 - last.x0)


@dataclass(frozen=True)
class DPMpp2M(Step):
    """DPM-Solver++(2M), [4] algorithm 2: second order, with the x0 of the step before.

    eta = 1 is SDE-DPM-Solver++(2M) of [4]; values between are k-diffusion's eta.
    """

    eta: float = 0.0
    grid = "short"

    def __call__(self, denoise, schedule, x, t, s, noise, memory=None):
        x0 = denoise(x, t.expand(len(x))).x0
        stride = Stride.between(schedule, t, s)
        r, eta = stride.r, self.eta
        ahead = x0 + second_order(x0, stride, memory, stride.h)  # eq: dpm-solver-2m
        x_s = (stride.shrink * r**eta).item() * x
        x_s = x_s + (stride.alpha * (1 - r ** (1 + eta))).item() * ahead
        if eta > 0:
            x_s = x_s + (stride.sigma * (1 - r ** (2 * eta)).sqrt()).item() * noise(x)
        return x_s, x0, Last(stride, x0)


def dpmpp_2m_sde() -> DPMpp2M:
    """SDE-DPM-Solver++(2M), [4]: dpmpp_2m with as much new noise as ancestral sampling."""
    return DPMpp2M(eta=1.0)


class Uncorrected(NamedTuple):
    """What unipc remembers: the last step, which the next evaluation corrects (its start x and x0),
    and the step before."""

    x: State
    stride: Stride
    x0: State
    last: Last | None


@dataclass(frozen=True)
class UniPC(Step):
    """UniPC-2, [5] section 3: DPM-Solver++(2M), then a correction.

    The evaluation at x_s is reused to correct x_s: no extra evaluation. variant: B(h) of [5], the
    weight of a second-order term: h (bh1) or 1 - e^-h (bh2).
    """

    variant: str = "bh2"
    grid = "short"

    def __post_init__(self) -> None:
        choice("variant of UniPC", self.variant, ("bh1", "bh2"))

    def __call__(self, denoise, schedule, x, t, s, noise, memory=None):
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
        """The last step taken again, with one more estimate of x0, at its end.

        x_s = shrink x + alpha_s (integral of e^(u - h) x0(u) over u = 0..h), where x0(u) is the
        parabola through the three estimates; the integral of e^(u - h) u^k is h^k m_k.
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

    c_skip = 0.5^2 / (tau^2 + 0.5^2) and c_out = tau / sqrt(tau^2 + 0.5^2), where tau is 10 (t - 1)
    for T = 1000. A few levels above the first it is x0_hat almost exactly.
    """
    tau = 10 * (1000 * schedule.progress(t) - 1).clamp(min=0)
    c_skip = per_example(0.25 / (tau**2 + 0.25), x)  # eq: lcm-9
    c_out = per_example(tau / (tau**2 + 0.25).sqrt(), x)
    x0 = denoise(x, t).x0  # NaN at t = 0 if the target is "x0"
    return torch.where(c_out > 0, c_skip * x + c_out * x0, x)


@dataclass(frozen=True)
class LCM(Step):
    """Multistep consistency sampling, [6] algorithm 3: all the noise is new at every step. It
    starts at pure noise, whatever a model's spacing."""

    spacing = "trailing"

    def follows(self, spacing: str) -> bool:
        return False

    def __call__(self, denoise, schedule, x, t, s, noise, memory=None):
        x0 = consistent(denoise, schedule, x, t.expand(len(x)))
        return schedule.mix(x0, noise(x), s), x0, None


# The published names of the steps; samplers.SAMPLERS lists them all.
ddim, heun, pndm, dpmpp_2m, unipc, lcm = DDIM, Heun, PNDM, DPMpp2M, UniPC, LCM
