"""From a network to a denoiser: what the network predicts is one row of a table.

A schedule says x_t = alpha_t x0 + sigma_t eps. Every published prediction target is one row (a, b):
the network's output F estimates a x0 + b eps. Together with x_t these are two equations in two
unknowns, so one 2x2 solve turns any network's output into a Prediction of (x0, eps). Samplers need
not know which row was chosen.

[1] Ho, Jain, Abbeel. Denoising Diffusion Probabilistic Models. 2020. arXiv:2006.11239
[2] Salimans, Ho. Progressive Distillation for Fast Sampling of Diffusion Models. arXiv:2202.00512
[3] Lipman et al. Flow Matching for Generative Modeling. 2023. arXiv:2210.02747
[4] Karras et al. Elucidating the Design Space of Diffusion-Based Generative Models. 2022.
    arXiv:2206.00364
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from minidiff import losses
from minidiff.condition import Context
from minidiff.errors import UserError, choice
from minidiff.losses import SIGMA_DATA, WEIGHTINGS
from minidiff.schedules import NoiseSchedule, per_example
from minidiff.training.device import to_device


def _edm(alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """[4] eq. 8 as a row, for x / alpha as noisy data at the level sigma / alpha.

    c_skip = (s_d alpha / r)^2 and c_out = s_d sigma / r follow from the 2x2 solve. The target
    is about x0 / s_d where there is much noise, and about -eps where there is little.
    """
    r = (sigma**2 + (SIGMA_DATA * alpha) ** 2).sqrt()  # eq: edm-7, edm-8
    return sigma / (SIGMA_DATA * r), -SIGMA_DATA * alpha / r


TARGETS: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {  # F is a x0 + b eps
    "eps": lambda alpha, sigma: (torch.zeros_like(alpha), torch.ones_like(alpha)),  # [1] eq. 14
    "x0": lambda alpha, sigma: (torch.ones_like(alpha), torch.zeros_like(alpha)),  # [1] sec. 3.2
    "v": lambda alpha, sigma: (-sigma, alpha),  # [2] appendix D  # eq: vpred-v
    "flow": lambda alpha, sigma: (-torch.ones_like(alpha), torch.ones_like(alpha)),  # [3] eq. 23
    "edm": _edm,  # [4] table 1
}


X, Time = Float[Tensor, "B *dims"], Shaped[Tensor, "B"]


class Prediction(NamedTuple):
    """What a denoiser predicts from x_t = alpha_t x0 + sigma_t eps: clean data and noise."""

    x0: Float[Tensor, "B *dims"]
    eps: Float[Tensor, "B *dims"]


Denoise = Callable[[Tensor, Tensor], Prediction]  # (x, t) -> Prediction: all that a sampler needs


class Denoiser(nn.Module):
    """network + schedule + a row of TARGETS. The network is called as network(x, c_noise,
    context)."""

    def __init__(
        self,
        network: nn.Module,
        schedule: NoiseSchedule,
        target: str = "eps",
        weighting: str | None = None,
    ):
        """weighting: a key of WEIGHTINGS. Default: the target's own, the squared error of F."""
        super().__init__()
        choice("target", target, TARGETS)
        choice("weighting", weighting or target, WEIGHTINGS)
        if target == "eps" and getattr(schedule, "zero_terminal_snr", False):
            raise UserError(
                'the target "eps" does not determine x0 where alpha = 0; '
                'use "v" or "x0" with zero_terminal_snr.'
            )
        self.network, self.schedule, self.target = network, schedule, target
        self.weighting = weighting or target
        self.log_error = losses.log_error() if weighting == "learned" else None

    def _row(self, t: Time) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        alpha, sigma = self.schedule.alpha_sigma(t)
        return alpha, sigma, *TARGETS[self.target](alpha, sigma)

    def output(self, x: X, t: Time, context: Context | None = None) -> X:
        """F, the network's raw output; for the target "edm" x is scaled to unit variance first."""
        if self.target == "edm":  # c_in, [4] table 1
            alpha, sigma = self.schedule.alpha_sigma(t)
            x = x * per_example((sigma**2 + (SIGMA_DATA * alpha) ** 2).rsqrt(), x)
        precise = torch.promote_types(x.dtype, torch.float32)  # bfloat16 rounds 999 to 1000
        return self.network(x, to_device(self.schedule.c_noise(t).to(precise), x.device), context)

    def forward(self, x: X, t: Time, context: Context | None = None) -> Prediction:
        return self.solve(x, t, self.output(x, t, context).to(x.dtype))

    def solve(self, x: X, t: Time, F: X) -> Prediction:
        """Solve  x = alpha x0 + sigma eps,  F = a x0 + b eps  for (x0, eps)."""
        alpha, sigma, a, b = self._row(t)
        det = alpha * b - sigma * a  # eq: frame-solve
        x0 = per_example(b / det, x) * x - per_example(sigma / det, x) * F
        eps = per_example(alpha / det, x) * F - per_example(a / det, x) * x
        return Prediction(x0, eps)

    def unsolve(self, prediction: Prediction, t: Time) -> X:
        """The inverse of solve: the output F = a x0 + b eps that gives this prediction."""
        (_, _, a, b), (x0, eps) = self._row(t), prediction
        return per_example(a, x0) * x0 + per_example(b, eps) * eps

    def loss(
        self,
        x0: X,
        context: Context | None = None,
        t: Time | None = None,
        eps: X | None = None,
    ) -> Float[Tensor, "B"]:
        """w(SNR_t) || x0 - x0_hat(x_t) ||^2 of each example (mean over dims).

        Default: t from schedule.sample_t, eps from N(0, I). Computed from the network's output F,
        x0 - x0_hat = -(sigma / det) (target - F), to stay finite as alpha goes to 0.
        """
        t = self.schedule.sample_t(len(x0)) if t is None else t
        eps = torch.randn_like(x0) if eps is None else eps
        alpha, sigma, a, b = self._row(t)
        target = per_example(a, x0) * x0 + per_example(b, x0) * eps
        error = target - self.output(self.schedule.mix(x0, eps, t), t, context)  # eq: flow-23
        snr_weight = WEIGHTINGS[self.weighting](self.schedule.snr(t))  # eq: frame-weight
        weight = snr_weight * (sigma / (alpha * b - sigma * a)) ** 2
        loss = to_device(weight.to(x0.dtype), x0.device) * error.pow(2).flatten(1).mean(1)
        if self.log_error is None:
            return loss
        return losses.balanced(loss, self.schedule.progress(t), self.log_error)
