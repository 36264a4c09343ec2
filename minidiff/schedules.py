"""Noise schedules: how much signal and how much noise x_t holds at time t.

One equation holds for all:  x_t = alpha_t x0 + sigma_t eps,  eps ~ N(0, I).  Noise grows with t,
and t = 0 is clean data.

A schedule is a few numbers and has no state. Times may be on any device; scales are float64 on the
CPU, because some devices have no float64. `per_example` moves them to the tensor they multiply.

[1] Ho, Jain, Abbeel. Denoising Diffusion Probabilistic Models. 2020. arXiv:2006.11239
[2] Nichol, Dhariwal. Improved Denoising Diffusion Probabilistic Models. 2021. arXiv:2102.09672
[3] Jabri, Fleet, Chen. Scalable Adaptive Computation for Iterative Generation. arXiv:2212.11972
[4] Lin et al. Common Diffusion Noise Schedules and Sample Steps are Flawed. 2023. arXiv:2305.08891
[5] Karras et al. Elucidating the Design Space of Diffusion-Based Generative Models.
    2022. arXiv:2206.00364
[6] Esser et al. Scaling Rectified Flow Transformers for High-Resolution Image Synthesis. 2024.
    arXiv:2403.03206
[7] Rombach et al. High-Resolution Image Synthesis with Latent Diffusion Models. arXiv:2112.10752
[8] Lu et al. DPM-Solver: A Fast ODE Solver for Diffusion Probabilistic Model Sampling in Around 10
    Steps. 2022. arXiv:2206.00927
[9] Sabour, Fidler, Kreis. Align Your Steps: Optimizing Sampling Schedules in Diffusion Models.
    2024. arXiv:2404.14507
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from minidiff.errors import UserError
from minidiff.training.device import to_device

# Discrete has times 0..T and is trained at whole ones; the other schedules have real times.
Times = Shaped[Tensor, "*B"]
Scales = Float[Tensor, "*B"]  # float64, on the CPU
X = Float[Tensor, "B *dims"]  # images, latents, points
SIGMA_MAX = 80.0  # sigma / alpha at which noise hides the data ([5] table 1)
# [9], for Stable Diffusion 1.5 in 10 steps; [9] counts from 0, so 1 is added here
AYS = (1000, 851, 737, 646, 546, 456, 344, 234, 125, 25, 1)


def per_example(scale: Float[Tensor, "B"], x: X) -> Float[Tensor, "B *ones"]:
    """One scale for each example, shaped to multiply x."""
    # The cast comes before the move: some devices have no float64.
    return to_device(scale.to(x.dtype), x.device).view(-1, *[1] * (x.ndim - 1))


class NoiseSchedule:
    """The interface. Subclasses are frozen dataclasses: their fields are all that must be saved."""

    final = 0  # the last time of the published DDIM; 0 is clean data

    def for_tokens(self, count: int) -> "NoiseSchedule":
        """The schedule of an image of so many patches; the same for all sizes but in FLUX.1-dev."""
        return self

    def alpha_sigma(self, t: Times) -> tuple[Scales, Scales]:
        """Scales of signal and noise at t."""
        raise NotImplementedError

    def mix(self, x0: X, eps: X, t: Times) -> X:
        """x_t = alpha_t x0 + sigma_t eps, at one t for all examples or one for each."""
        alpha, sigma = self.alpha_sigma(t)
        if t.ndim == 0:
            return alpha.item() * x0 + sigma.item() * eps
        return per_example(alpha, x0) * x0 + per_example(sigma, x0) * eps

    def unit(self, t: Times) -> Scales:
        """Heun's method integrates x_t / unit(t); the choice changes Heun's result, not Euler's."""
        return torch.ones_like(t, dtype=torch.float64)

    def at_log_snr(self, log_snr: Scales) -> Times:
        """The time at which log SNR has this value: the inverse of snr(t).log()."""
        raise NotImplementedError

    def sample_t(self, batch: int, generator: torch.Generator | None = None) -> Shaped[Tensor, "B"]:
        """Random times to train on, one for each example."""
        raise NotImplementedError

    def timesteps(self, steps: int, spacing: str = "trailing") -> Shaped[Tensor, "steps1"]:
        """The steps + 1 times that a sampler visits, decreasing to 0 (clean data)."""
        raise NotImplementedError

    def c_noise(self, t: Times) -> Shaped[Tensor, "*B"]:
        """What the network takes as its time input at t ([5] table 1)."""
        raise NotImplementedError

    def progress(self, t: Times) -> Scales:
        """Where t lies between data (0) and noise (1): the axis of plots and of the loss by t."""
        return t.cpu().double()

    def snr(self, t: Times) -> Scales:
        """Signal-to-noise ratio alpha_t^2 / sigma_t^2; infinite at t = 0."""
        alpha, sigma = self.alpha_sigma(t)
        return (alpha / sigma) ** 2


def _check(steps: int, spacing: str, allowed: tuple[str, ...], most: int | None = None) -> None:
    if steps < 1 or (most is not None and steps > most):
        limit = f" and at most {most}" if most else ""
        raise UserError(f"steps is {steps}; it must be at least 1{limit}.")
    if spacing not in allowed:
        raise UserError(f'no spacing "{spacing}" for this schedule; there is {", ".join(allowed)}.')


def _ramp(first: float, last: float, steps: int, spacing: str, rho: float = 7.0) -> Scales:
    """Equal strides in the rho-th root (karras, [5] eq. 5), or in the logarithm (log-snr)."""
    if spacing == "karras":
        return _line(first ** (1 / rho), last ** (1 / rho), steps) ** rho  # eq: edm-5
    return _line(math.log(first), math.log(last), steps).exp()


def _normal(batch: int, generator: torch.Generator | None) -> Float[Tensor, "B"]:
    """Standard normal numbers on the CPU, from a generator on any device."""
    device = generator.device if generator else None
    return torch.randn(batch, generator=generator, dtype=torch.float64, device=device).cpu()


def _between(table: Float[Tensor, "N"], place: Scales) -> Scales:
    """A table read at real places, interpolated linearly between its entries."""
    low = place.long().clamp(max=len(table) - 2)
    return torch.lerp(table[low], table[low + 1], place - low)


def _line(first: float, last: float, count: int) -> Float[Tensor, "N"]:
    return torch.linspace(first, last, count, dtype=torch.float64)


def _betas_from(alpha_bar: Tensor) -> Tensor:
    """The betas of a given alpha_bar, none of them above 0.999 ([2] section 3.2)."""
    return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999)


def _betas_sigmoid(T: int) -> Float[Tensor, "T"]:
    """[3] appendix B with start -3, end 3, tau 1: sigmoid, scaled to run from 1 to 0."""
    u = _line(-3, 3, T + 1).sigmoid()
    return _betas_from((u[-1] - u) / (u[-1] - u[0]))


BETAS = {  # functions of T, beta_1, beta_T
    "linear": lambda T, first, last: _line(first, last, T),  # [1] section 4
    "scaled_linear": lambda T, first, last: _line(first**0.5, last**0.5, T) ** 2,  # [7]
    "cosine": lambda T, *_: _betas_from(  # [2] eq. 17 with s = 0.008
        torch.cos((_line(0, 1, T + 1) + 0.008) / 1.008 * math.pi / 2) ** 2  # eq: iddpm-17
    ),
    "sigmoid": lambda T, *_: _betas_sigmoid(T),
}


@dataclass(frozen=True)
class Discrete(NoiseSchedule):
    """Variance preserving, alpha_t^2 + sigma_t^2 = 1: noise levels t = 1..T; t = 0 is clean.

    betas: a name in BETAS, or the T numbers themselves."""

    betas: str | tuple[float, ...]
    T: int = 1000
    beta_1: float = 1e-4
    beta_T: float = 0.02
    zero_terminal_snr: bool = False
    # the last time of the published DDIM: SD's is 1 (diffusers: set_alpha_to_one = False)
    final: int = 0
    # of logit(t / T) in training, as in Flow; mean None: uniform times
    mean: float | None = None
    std: float = 1.0

    def __post_init__(self) -> None:
        if isinstance(self.betas, tuple):
            if len(self.betas) != self.T or not all(0 < beta <= 1 for beta in self.betas):
                raise UserError(f"betas must be T = {self.T} numbers above 0 and at most 1.")
        elif self.betas not in BETAS:
            raise UserError(f'no betas "{self.betas}"; there is {", ".join(BETAS)}.')
        if not 1 <= self.T <= 100_000:
            raise UserError(f"T is {self.T}; it must be from 1 to 100,000.")

    @cached_property
    def alpha_bar(self) -> Float[Tensor, "T1"]:
        """alpha_bar[t] for t = 0..T: the product of 1 - beta up to t, [1] eq. 4."""
        if isinstance(self.betas, tuple):
            beta = torch.tensor(self.betas, dtype=torch.float64)
        else:
            beta = BETAS[self.betas](self.T, self.beta_1, self.beta_T)
        alpha_bar = torch.cat([torch.ones(1, dtype=torch.float64), torch.cumprod(1 - beta, dim=0)])
        if self.zero_terminal_snr:  # [4] algorithm 1: shift and stretch sqrt(alpha_bar) to end at 0
            root = alpha_bar[1:].sqrt()  # eq: lin-rescale
            alpha_bar[1:] = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
        return alpha_bar

    @cached_property
    def _log_snr(self) -> Float[Tensor, "T1"]:
        """log SNR for t = 0..T, made finite at both ends, so that it can be interpolated."""
        return self.alpha_bar.logit(eps=1e-12)

    def alpha_sigma(self, t: Times) -> tuple[Scales, Scales]:
        """Between two levels, log SNR is interpolated linearly, as in k-diffusion."""
        place = t.cpu().double()
        between = _between(self._log_snr, place).sigmoid()
        alpha_bar = torch.where(place == place.floor(), self.alpha_bar[place.long()], between)
        return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()

    def unit(self, t: Times) -> Scales:
        """alpha, as in [5] table 1; where almost no data is left, sigma / SIGMA_MAX."""
        alpha, sigma = self.alpha_sigma(t)
        return torch.maximum(alpha, sigma / SIGMA_MAX)

    def at_log_snr(self, log_snr: Scales) -> Times:
        high = torch.searchsorted(-self._log_snr, -log_snr).clamp(1, self.T)
        before, after = self._log_snr[high - 1], self._log_snr[high]
        return (high - 1 + (log_snr - before) / (after - before)).clamp(0, self.T)

    def sample_t(self, batch: int, generator: torch.Generator | None = None) -> Shaped[Tensor, "B"]:
        """Uniform over 1..T, [1] algorithm 1; or logit-normal."""
        if self.mean is None:
            device = generator.device if generator else None
            return torch.randint(1, self.T + 1, (batch,), generator=generator, device=device).cpu()
        real = self.T * Flow(self.mean, self.std).sample_t(batch, generator)
        return real.ceil().long().clamp(1, self.T)

    def timesteps(self, steps: int, spacing: str = "trailing") -> Shaped[Tensor, "steps1"]:
        """At whole times: trailing, T down to 0 in equal strides ([4] table 2); leading, Stable
        Diffusion's, which starts about a stride below T; linspace, from T to 1 ([2] section 4).

        At real times: karras, equal strides in (sigma / alpha)^(1/7) ([5] eq. 5); log-snr, in log
        SNR ([8] section 3.4); ays, the 10 steps of [9] for Stable Diffusion, interpolated;
        shifted, those of Flow(shift=2)."""
        whole, real = ("trailing", "leading", "linspace"), ("karras", "log-snr", "ays", "shifted")
        _check(steps, spacing, (*whole, *real), most=self.T if spacing in whole else None)
        if spacing == "trailing":
            return _line(self.T, 0, steps + 1).round().long()
        # SD counts its levels from 0 and adds 1; here 0 is clean data, so 2 is added
        if spacing == "leading":
            stride = self.T // steps
            visited = torch.arange(steps).flip(0) * stride + (2 if steps < self.T else 1)
        elif spacing == "linspace":  # rounded as published, where levels count from 0
            visited = _line(self.T - 1, 0, steps).round().long() + 1
        elif spacing == "shifted":
            visited = self.T * Flow(shift=2.0).timesteps(steps)[:-1]
        elif spacing == "ays":
            place = torch.linspace(0, len(AYS) - 1, steps + 1, dtype=torch.float64)[:-1]
            visited = self.at_log_snr(_between(scaled_linear()._log_snr[list(AYS)], place))
        else:  # in sigma / alpha
            ends = (-self._log_snr[[self.T, 1]] / 2).exp().clamp(max=SIGMA_MAX).tolist()
            visited = self.at_log_snr(-2 * _ramp(*ends, steps, spacing).log())
        return torch.cat([visited, torch.zeros(1, dtype=visited.dtype)])

    def c_noise(self, t: Times) -> Shaped[Tensor, "*B"]:
        return t - 1  # published networks count their noise levels from 0

    def progress(self, t: Times) -> Scales:
        return t.cpu().double() / self.T


@dataclass(frozen=True)
class Flow(NoiseSchedule):
    """Straight lines from data to noise (rectified flow, [6] section 2): alpha = 1 - t, sigma = t,
    t in [0, 1].

    Training times are logit-normal, sigmoid(mean + std n) with n ~ N(0, 1) ([6] section 3.1).
    Sampling times are shifted towards noise, t -> shift t / (1 + (shift - 1) t) ([6] eq. 23).
    mu: log of the shift at 256 tokens and at 4,096, in place of one shift (FLUX.1-dev: 0.5, 1.15).
    """

    mean: float = 0.0
    std: float = 1.0
    shift: float = 1.0
    mu: Sequence[float] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "mu", self.mu and tuple(self.mu))  # JSON has lists

    def for_tokens(self, count: int) -> "Flow":
        if self.mu is None:
            return self
        first, last = self.mu
        mu = first + (last - first) * (count - 256) / (4096 - 256)
        return replace(self, shift=math.exp(mu), mu=None)

    def alpha_sigma(self, t: Times) -> tuple[Scales, Scales]:
        t = t.cpu().double()
        return 1 - t, t

    def sample_t(self, batch: int, generator: torch.Generator | None = None) -> Shaped[Tensor, "B"]:
        return torch.sigmoid(self.mean + self.std * _normal(batch, generator))

    def at_log_snr(self, log_snr: Scales) -> Times:
        return torch.sigmoid(-log_snr / 2)

    def timesteps(self, steps: int, spacing: str = "trailing") -> Shaped[Tensor, "steps1"]:
        """trailing: equal strides, shifted. shifted: SD3's, whose last time is shifted twice: equal
        strides from 1 to the shifted 1/1000, shifted. Down to t = 1/1000: karras, equal strides in
        t^(1/7), and log-snr, in log SNR."""
        _check(steps, spacing, ("trailing", "shifted", "karras", "log-snr"))
        if spacing == "trailing":
            return self._shifted(_line(1, 0, steps + 1))
        if spacing == "shifted":
            last = self._shifted(torch.tensor(1e-3, dtype=torch.float64)).item()
            visited = self._shifted(_line(1, last, steps))
        elif spacing == "karras":
            visited = _ramp(1, 1e-3, steps, spacing)
        else:  # t = 1 has log SNR -inf: start at 1 - 1/1000, as far from 1 as the end is from 0
            visited = self.at_log_snr(-2 * _ramp(999, 1 / 999, steps, spacing).log())
        return torch.cat([visited, torch.zeros(1, dtype=torch.float64)])

    def _shifted(self, t: Scales) -> Scales:
        return self.shift * t / (1 + (self.shift - 1) * t)  # eq: sd3-23

    def c_noise(self, t: Times) -> Shaped[Tensor, "*B"]:
        return 1000 * t  # the sinusoidal embedding expects times up to about 1000


@dataclass(frozen=True)
class Karras(NoiseSchedule):
    """Variance exploding: alpha = 1, and t is the noise level sigma itself ([5] table 1, column
    "Ours")."""

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0
    P_mean: float = -1.2
    P_std: float = 1.2

    def alpha_sigma(self, t: Times) -> tuple[Scales, Scales]:
        t = t.cpu().double()
        return torch.ones_like(t), t

    def sample_t(self, batch: int, generator: torch.Generator | None = None) -> Shaped[Tensor, "B"]:
        """ln(sigma) ~ N(P_mean, P_std^2), [5] table 1."""
        return torch.exp(self.P_mean + self.P_std * _normal(batch, generator))

    def at_log_snr(self, log_snr: Scales) -> Times:
        return (-log_snr / 2).exp()

    def timesteps(self, steps: int, spacing: str = "trailing") -> Shaped[Tensor, "steps1"]:
        """trailing, also called karras: [5] eq. 5, equal strides in sigma^(1/rho). log-snr: in
        log(sigma)."""
        _check(steps, spacing, ("trailing", "karras", "log-snr"))
        spacing = "karras" if spacing == "trailing" else spacing
        visited = _ramp(self.sigma_max, self.sigma_min, steps, spacing, self.rho)
        return torch.cat([visited, torch.zeros(1, dtype=torch.float64)])

    def c_noise(self, t: Times) -> Shaped[Tensor, "*B"]:
        return t.log() / 4

    def progress(self, t: Times) -> Scales:
        low, high = math.log(self.sigma_min), math.log(self.sigma_max)
        log_sigma = t.cpu().double().clamp(min=self.sigma_min).log()
        return ((log_sigma - low) / (high - low)).clamp(0, 1)


def linear() -> Discrete:
    """DDPM's, [1] section 4."""
    return Discrete("linear", T=1000, beta_1=1e-4, beta_T=0.02)


def scaled_linear() -> Discrete:
    """Stable Diffusion's, [7]."""
    return Discrete("scaled_linear", T=1000, beta_1=0.00085, beta_T=0.012)


def cosine() -> Discrete:
    """Improved DDPM's, [2] eq. 17."""
    return Discrete("cosine", T=1000)


def sigmoid() -> Discrete:
    """[3] appendix B."""
    return Discrete("sigmoid", T=1000)
