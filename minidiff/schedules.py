"""Noise schedules: how much signal and how much noise there is at time t. All are in this file.

One frame holds them all:  x_t = alpha_t x0 + sigma_t eps,  eps ~ N(0, I).  t grows with noise, and
t = 0 is clean data.

A schedule is a few numbers and no state. Times may be on any device; scales come back in float64 on
the CPU, because some devices have no float64. `per_example` takes them to the image they multiply.

[1] Ho, Jain, Abbeel. Denoising Diffusion Probabilistic Models. 2020. arXiv:2006.11239
[2] Nichol, Dhariwal. Improved Denoising Diffusion Probabilistic Models. 2021. arXiv:2102.09672
[3] Jabri, Fleet, Chen. Scalable Adaptive Computation for Iterative Generation. 2022.
    arXiv:2212.11972
[4] Lin, Liu, Li, Yang. Common Diffusion Noise Schedules and Sample Steps are Flawed. 2023.
    arXiv:2305.08891
[5] Karras, Aittala, Aila, Laine. Elucidating the Design Space of Diffusion-Based Generative Models.
    2022. arXiv:2206.00364
[6] Esser et al. Scaling Rectified Flow Transformers for High-Resolution Image Synthesis. 2024.
    arXiv:2403.03206
[7] Rombach et al. High-Resolution Image Synthesis with Latent Diffusion Models. 2022.
    arXiv:2112.10752
[8] Lu et al. DPM-Solver: A Fast ODE Solver for Diffusion Probabilistic Model Sampling in Around 10
    Steps. 2022. arXiv:2206.00927
[9] Sabour, Fidler, Kreis. Align Your Steps: Optimizing Sampling Schedules in Diffusion Models.
    2024. arXiv:2404.14507
"""

import math
from dataclasses import asdict, dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from minidiff.errors import UserError

# Times are 0..T for Discrete, which is trained at whole numbers, and real for the others.
Times = Shaped[Tensor, "*B"]
Scales = Float[Tensor, "*B"]  # float64, on the CPU
SIGMA_MAX = 80.0  # sigma / alpha above which nothing is seen of data ([5] table 1)
# [9], Stable Diffusion 1.5 in 10 steps; there counted from 0
AYS = (1000, 851, 737, 646, 546, 456, 344, 234, 125, 25, 1)


def per_example(scale: Float[Tensor, "B"], x: Float[Tensor, "B *dims"]) -> Float[Tensor, "B *ones"]:
    """One scale for each example, ready to be multiplied with x."""
    # The cast comes before the move: some devices have no float64.
    return scale.to(x.dtype).to(x.device).view(-1, *[1] * (x.ndim - 1))


class NoiseSchedule:
    """The interface of every schedule. Subclasses are frozen dataclasses: their fields are all
    there is to save."""

    final = 0  # the time at which the published DDIM stops

    def alpha_sigma(self, t: Times) -> tuple[Scales, Scales]:
        """Scales of signal and noise at t."""
        raise NotImplementedError

    def mix(
        self, x0: Float[Tensor, "B *dims"], eps: Float[Tensor, "B *dims"], t: Times
    ) -> Float[Tensor, "B *dims"]:
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
        """The times trained on: one for each example."""
        raise NotImplementedError

    def timesteps(self, steps: int, spacing: str = "trailing") -> Shaped[Tensor, "steps1"]:
        """The steps + 1 times a sampler visits, decreasing; the last one is clean."""
        raise NotImplementedError

    def c_noise(self, t: Times) -> Shaped[Tensor, "*B"]:
        """The number the network is shown for t ([5] table 1)."""
        raise NotImplementedError

    def progress(self, t: Times) -> Scales:
        """Where t lies between data (0) and noise (1): the axis of plots and of loss-by-t bins."""
        return t.cpu().double()

    def snr(self, t: Times) -> Scales:
        """Signal-to-noise ratio alpha_t^2 / sigma_t^2; infinite at t = 0."""
        alpha, sigma = self.alpha_sigma(t)
        return (alpha / sigma) ** 2


def _check(steps: int, spacing: str, allowed: tuple[str, ...], most: int | None = None) -> None:
    if steps < 1 or (most is not None and steps > most):
        raise UserError(
            f"steps is {steps}; it must be at least 1"
            + (f" and at most {most}" if most else "")
            + "."
        )
    if spacing not in allowed:
        raise UserError(f'no spacing "{spacing}" for this schedule; there is {", ".join(allowed)}.')


def _ramp(first: float, last: float, steps: int, spacing: str, rho: float = 7.0) -> Scales:
    """From first to last in equal strides of the rho-th root ("karras", [5] eq. 5) or the logarithm
    ("log-snr")."""
    if spacing == "karras":
        ends = first ** (1 / rho), last ** (1 / rho)
        return torch.linspace(*ends, steps, dtype=torch.float64) ** rho
    return torch.linspace(math.log(first), math.log(last), steps, dtype=torch.float64).exp()


def _normal(batch: int, generator: torch.Generator | None) -> Float[Tensor, "B"]:
    """Standard normal numbers on the CPU, from a generator on any device."""
    device = generator.device if generator else None
    return torch.randn(batch, generator=generator, dtype=torch.float64, device=device).cpu()


def _between(table: Float[Tensor, "N"], place: Scales) -> Scales:
    """A table read at real places, interpolated linearly between its entries."""
    low = place.long().clamp(max=len(table) - 2)
    return torch.lerp(table[low], table[low + 1], place - low)


def _betas_linear(T: int, beta_1: float, beta_T: float) -> Tensor:
    """[1] section 4."""
    return torch.linspace(beta_1, beta_T, T, dtype=torch.float64)


def _betas_scaled_linear(T: int, beta_1: float, beta_T: float) -> Tensor:
    """Linear in sqrt(beta): Stable Diffusion's, [7] and its released configuration."""
    return torch.linspace(beta_1**0.5, beta_T**0.5, T, dtype=torch.float64) ** 2


def _betas_from(alpha_bar_of: Tensor) -> Tensor:
    """The betas whose cumulated product is the given curve, none of them above 0.999 ([2] section
    3.2)."""
    return (1 - alpha_bar_of[1:] / alpha_bar_of[:-1]).clamp(max=0.999)


def _betas_cosine(T: int, _1: float, _T: float) -> Tensor:
    """[2] eq. 17 with s = 0.008."""
    u = torch.linspace(0, 1, T + 1, dtype=torch.float64)
    return _betas_from(torch.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2)


def _betas_sigmoid(T: int, _1: float, _T: float) -> Tensor:
    """[3] appendix B, start -3, end 3, tau 1: (sigmoid(3) - sigmoid(6u - 3)) / (sigmoid(3) -
    sigmoid(-3))."""
    u = torch.linspace(-3, 3, T + 1, dtype=torch.float64).sigmoid()
    return _betas_from((u[-1] - u) / (u[-1] - u[0]))


BETAS = {
    "linear": _betas_linear,
    "scaled_linear": _betas_scaled_linear,
    "cosine": _betas_cosine,
    "sigmoid": _betas_sigmoid,
}


@dataclass(frozen=True)
class Discrete(NoiseSchedule):
    """Variance preserving, alpha_t^2 + sigma_t^2 = 1: T noise levels, t = 1..T, and clean data at t
    = 0."""

    betas: str
    T: int = 1000
    beta_1: float = 1e-4
    beta_T: float = 0.02
    zero_terminal_snr: bool = False
    # where the published DDIM stops: SD's is 1 (diffusers: set_alpha_to_one = False)
    final: int = 0
    # None: train on uniform times; a number: on logit-normal ones, as Flow
    mean: float | None = None
    std: float = 1.0

    def __post_init__(self) -> None:
        if self.betas not in BETAS:
            raise UserError(f'no betas "{self.betas}"; there is {", ".join(BETAS)}.')

    @cached_property
    def alpha_bar(self) -> Float[Tensor, "T1"]:
        """alpha_bar[t] for t = 0..T: the product of 1 - beta up to t, [1] eq. 4."""
        beta = BETAS[self.betas](self.T, self.beta_1, self.beta_T)
        alpha_bar = torch.cat([torch.ones(1, dtype=torch.float64), torch.cumprod(1 - beta, dim=0)])
        if self.zero_terminal_snr:  # [4] algorithm 1: shift and stretch sqrt(alpha_bar) to end at 0
            root = alpha_bar[1:].sqrt()
            alpha_bar[1:] = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
        return alpha_bar

    @cached_property
    def _log_snr(self) -> Float[Tensor, "T1"]:
        """For t = 0..T; finite at both ends, so that one can interpolate there."""
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
        """On whole levels: trailing, T down to 0 in equal strides ([4] table 2); leading, Stable
        Diffusion's, which starts a stride below T; linspace, with both T and 1 ([2] section 4).

        Between levels: karras, equal strides in (sigma / alpha)^(1/7) ([5] eq. 5); log-snr, in log
        SNR ([8] section 3.4); ays, Stable Diffusion's for 10 steps, interpolated ([9]); shifted, a
        flow's with shift 2."""
        whole, real = ("trailing", "leading", "linspace"), ("karras", "log-snr", "ays", "shifted")
        _check(steps, spacing, (*whole, *real), most=self.T if spacing in whole else None)
        if spacing == "trailing":
            return torch.linspace(self.T, 0, steps + 1, dtype=torch.float64).round().long()
        # SD counts from 0 and adds 1; here 0 is clean data, which makes it 2
        if spacing == "leading":
            stride = self.T // steps
            visited = torch.arange(steps).flip(0) * stride + (2 if stride > 1 else 1)
        elif spacing == "linspace":  # rounded in the published count, which starts at 0
            visited = torch.linspace(self.T - 1, 0, steps, dtype=torch.float64).round().long() + 1
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
    Sampling times are moved towards noise, t -> shift t / (1 + (shift - 1) t) ([6] eq. 23)."""

    mean: float = 0.0
    std: float = 1.0
    shift: float = 1.0

    def alpha_sigma(self, t: Times) -> tuple[Scales, Scales]:
        t = t.cpu().double()
        return 1 - t, t

    def sample_t(self, batch: int, generator: torch.Generator | None = None) -> Shaped[Tensor, "B"]:
        return torch.sigmoid(self.mean + self.std * _normal(batch, generator))

    def at_log_snr(self, log_snr: Scales) -> Times:
        return torch.sigmoid(-log_snr / 2)

    def timesteps(self, steps: int, spacing: str = "trailing") -> Shaped[Tensor, "steps1"]:
        """Equal strides, shifted (trailing); in t^(1/7) (karras) or log SNR (log-snr), down to t =
        1/1000."""
        _check(steps, spacing, ("trailing", "karras", "log-snr"))
        if spacing == "trailing":
            t = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
            return self.shift * t / (1 + (self.shift - 1) * t)
        if spacing == "karras":
            visited = _ramp(1, 1e-3, steps, spacing)
        else:  # t = 1 has log SNR -inf: begin as near to it as the last level is to data
            visited = self.at_log_snr(-2 * _ramp(999, 1 / 999, steps, spacing).log())
        return torch.cat([visited, torch.zeros(1, dtype=torch.float64)])

    def c_noise(self, t: Times) -> Shaped[Tensor, "*B"]:
        return 1000 * t  # the sinusoidal embedding expects numbers in the hundreds


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
        visited = _ramp(
            self.sigma_max,
            self.sigma_min,
            steps,
            "karras" if spacing == "trailing" else spacing,
            self.rho,
        )
        return torch.cat([visited, torch.zeros(1, dtype=torch.float64)])

    def c_noise(self, t: Times) -> Shaped[Tensor, "*B"]:
        return t.log() / 4

    def progress(self, t: Times) -> Scales:
        span = math.log(self.sigma_max) - math.log(self.sigma_min)
        return (
            (t.double().clamp(min=self.sigma_min).log() - math.log(self.sigma_min)) / span
        ).clamp(0, 1)


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


KINDS = {"discrete": Discrete, "flow": Flow, "karras": Karras}


def to_json(schedule: NoiseSchedule) -> dict:
    """The schedule's kind and numbers, for a model folder."""
    return {
        "kind": next(name for name, cls in KINDS.items() if type(schedule) is cls),
        **asdict(schedule),
    }


def from_json(numbers: dict) -> NoiseSchedule:
    """The inverse of to_json."""
    return KINDS[numbers["kind"]](**{k: v for k, v in numbers.items() if k != "kind"})
