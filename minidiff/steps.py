"""Every step a sampler can take from time t to the cleaner time s:  (denoise, schedule, x, t, s) -> (x_s, x0_hat).

All are made of x_s = alpha_s x0 + sigma_s eps, and differ in how they guess the x0 and eps that hold all the way from t to s. Every schedule
says alpha = 1, sigma = 0 at the clean end, so no step is special, neither the first nor the last. Random numbers are drawn on the CPU:
one seed, one picture, on any device.

[1] Song, Meng, Ermon. Denoising Diffusion Implicit Models. 2021. arXiv:2010.02502
[2] Ho, Jain, Abbeel. Denoising Diffusion Probabilistic Models. 2020. arXiv:2006.11239
[3] Karras, Aittala, Aila, Laine. Elucidating the Design Space of Diffusion-Based Generative Models. 2022. arXiv:2206.00364
[4] Lu et al. DPM-Solver++: Fast Solver for Guided Sampling of Diffusion Probabilistic Models. 2022. arXiv:2211.01095
[5] Zhao et al. UniPC: A Unified Predictor-Corrector Framework for Fast Sampling of Diffusion Models. 2023. arXiv:2302.04867
[6] Luo et al. Latent Consistency Models. 2023. arXiv:2310.04378
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from minidiff.denoiser import Denoise, _like
from minidiff.errors import UserError
from minidiff.schedules import NoiseSchedule

State = Float[Tensor, "B *dims"]
Time = Shaped[Tensor, ""]
Step = Callable[[Denoise, NoiseSchedule, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def _normal(x: State, generator: torch.Generator | None) -> State:
    return torch.randn(x.shape, generator=generator, dtype=x.dtype).to(x.device)


def ddim(eta: float = 0.0, generator: torch.Generator | None = None, final: bool = True) -> Step:
    """[1] eq. 12 and 16 for any schedule. eta = 0 is deterministic: Euler's method for flow matching and in sigma. eta = 1 is
    DDPM's ancestral step. final: stop at schedule.final, as published; without it, at clean data."""

    def step(
        denoise: Denoise, schedule: NoiseSchedule, x: State, t: Time, s: Time
    ) -> tuple[State, State]:
        x0, eps = denoise(x, t.expand(len(x)))
        s = s.clamp(min=schedule.final) if final else s
        (alpha_t, sigma_t), (alpha_s, sigma_s) = schedule.alpha_sigma(t), schedule.alpha_sigma(s)
        up = (
            eta
            * (sigma_s / sigma_t)
            * (sigma_t**2 - (alpha_t / alpha_s) ** 2 * sigma_s**2).clamp(min=0).sqrt()
        )  # noise put back
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

    def step(
        denoise: Denoise, schedule: NoiseSchedule, x: State, t: Time, s: Time
    ) -> tuple[State, State]:
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
    """The way from t to s in lambda = log(alpha / sigma), which [4] and [5] count in. It may be infinite at either end."""

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
    """What a multistep method knows of the steps before. One that begins where the last step ended goes on with it; any other has no past. So one
    object serves many chains one after the other, not two in turn."""

    def __init__(self) -> None:
        self.end, self.kept = None, ()

    def recall(self, x: State, t: Time) -> tuple:
        """What was kept, if this chain goes on; else nothing."""
        return self.kept if self.end == (t.item(), x.shape, x.device) else ()

    def keep(self, x: State, s: Time, *what) -> None:
        self.end, self.kept = (s.item(), x.shape, x.device), what


def dpmpp_2m(eta: float = 0.0, generator: torch.Generator | None = None) -> Step:
    """DPM-Solver++(2M), [4] algorithm 2: second order at one evaluation a step, by leaning on the x0 of the step before.
    eta = 1 is SDE-DPM-Solver++(2M) of [4]; values between are k-diffusion's eta."""
    past = _Past()

    def step(
        denoise: Denoise, schedule: NoiseSchedule, x: State, t: Time, s: Time
    ) -> tuple[State, State]:
        x0 = denoise(x, t.expand(len(x))).x0
        stride = _Stride.between(schedule, t, s)
        h_last, x0_last = past.recall(x, t) or (math.inf, x0)
        past.keep(x, s, stride.h, x0)
        # A chain without a past has it infinitely far away; and no slope can be followed infinitely far, where s is clean.
        lean = (stride.h / (2 * h_last)).nan_to_num(0.0, posinf=0.0)
        ahead = x0 + lean.item() * (x0 - x0_last)
        x_s = (stride.shrink * stride.r**eta).item() * x + (
            stride.alpha * (1 - stride.r ** (1 + eta))
        ).item() * ahead
        if eta > 0:
            x_s = x_s + (stride.sigma * (1 - stride.r ** (2 * eta)).sqrt()).item() * _normal(
                x, generator
            )
        return x_s, x0

    return step


def dpmpp_2m_sde(generator: torch.Generator | None = None) -> Step:
    """SDE-DPM-Solver++(2M), [4]: dpmpp_2m with as much new noise as ancestral sampling has."""
    return dpmpp_2m(eta=1.0, generator=generator)


def unipc(variant: str = "bh2") -> Step:
    """UniPC-2, [5] section 3: DPM-Solver++(2M) predicts x_s; the x0 that is found there, and only there, then corrects x_s before the next
    step leaves from it. No evaluation more. variant: B(h) of [5], which weighs what has not three points to go by."""
    if variant not in ("bh1", "bh2"):
        raise UserError(f'no variant "{variant}" of UniPC; there is bh1 and bh2.')
    past = _Past()

    def B(stride: _Stride) -> Tensor:
        return stride.h if variant == "bh1" else 1 - stride.r

    def step(
        denoise: Denoise, schedule: NoiseSchedule, x: State, t: Time, s: Time
    ) -> tuple[State, State]:
        x0 = denoise(x, t.expand(len(x))).x0
        h_last, x0_last = math.inf, x0
        if kept := past.recall(x, t):
            x, h_last, x0_last = _corrected(*kept, x0)
        stride = _Stride.between(schedule, t, s)
        past.keep(x, s, x, stride, x0, h_last, x0_last)
        lean = (B(stride) * stride.h / (2 * h_last)).nan_to_num(0.0, posinf=0.0)  # as in dpmpp_2m
        ahead = (1 - stride.r).item() * x0 + lean.item() * (x0 - x0_last)
        return stride.shrink.item() * x + stride.alpha.item() * ahead, x0

    def _corrected(
        x: State, stride: _Stride, x0: State, h_last: Tensor | float, x0_last: State, x0_s: State
    ) -> tuple[State, Tensor, State]:
        """The stride taken again, now from three guesses of x0: before it, at its start x, and at its end. x_s is the integral of
        alpha_s e^(u - h) x0(u) over u = 0..h, taken along the parabola through the three; of u^k it is h^k m_k."""
        h, m0 = stride.h, 1 - stride.r
        m1 = 1 - m0 / h
        m2 = 1 - 2 * m1 / h
        past_reach = h_last / h
        bend = (m2 - m1) / (1 + past_reach)
        new, old = m1 + bend, bend / past_reach
        if math.isinf(
            h_last
        ):  # two points are a line, which B(h) / 2 weighs as well to this order, even where h is infinite
            new, old = (B(stride) / 2).nan_to_num(posinf=0.0), torch.zeros(())
        ahead = m0.item() * x0 + new.item() * (x0_s - x0) - old.item() * (x0 - x0_last)
        return stride.shrink.item() * x + stride.alpha.item() * ahead, h, x0

    return step


def consistent(
    denoise: Denoise, schedule: NoiseSchedule, x: State, t: Shaped[Tensor, "B"]
) -> State:
    """The consistency function of [6] eq. 9, the guess of x0 that is x itself at clean data and at the first level: c_skip x + c_out x0_hat, with
    tau ten times the thousandths of the way since then, c_skip = 0.5^2 / (tau^2 + 0.5^2) and c_out = tau / sqrt(tau^2 + 0.5^2). A few levels
    further on, that is x0_hat."""
    tau = 10 * (1000 * schedule.progress(t) - 1).clamp(min=0)
    c_skip, c_out = _like(0.25 / (tau**2 + 0.25), x), _like(tau / (tau**2 + 0.25).sqrt(), x)
    return torch.where(
        c_out > 0, c_skip * x + c_out * denoise(x, t).x0, x
    )  # of clean data, a network that predicts x0 says nan


def lcm(generator: torch.Generator | None = None) -> Step:
    """Multistep consistency sampling, [6] algorithm 3, for a network distilled to guess x0 in one go: all the noise is new at every step."""

    def step(
        denoise: Denoise, schedule: NoiseSchedule, x: State, t: Time, s: Time
    ) -> tuple[State, State]:
        x0 = consistent(denoise, schedule, x, t.expand(len(x)))
        alpha_s, sigma_s = schedule.alpha_sigma(s)
        return alpha_s.item() * x0 + sigma_s.item() * _normal(x, generator), x0

    return step
