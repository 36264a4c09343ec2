"""From a network to a denoiser: what the network predicts, how its error is weighted, and how text steers it.

A schedule says x_t = alpha_t x0 + sigma_t eps. Every published prediction target is one row (a, b) of a table: the network's
output F estimates a x0 + b eps. Together with x_t these are two equations in two unknowns, so one 2x2 solve turns any network
into the same thing: a Prediction of (x0, eps). Nothing outside this file knows which row was chosen.

[1] Ho, Jain, Abbeel. Denoising Diffusion Probabilistic Models. 2020. arXiv:2006.11239
[2] Salimans, Ho. Progressive Distillation for Fast Sampling of Diffusion Models. 2022. arXiv:2202.00512
[3] Lipman et al. Flow Matching for Generative Modeling. 2023. arXiv:2210.02747
[4] Karras et al. Elucidating the Design Space of Diffusion-Based Generative Models. 2022. arXiv:2206.00364
[5] Hang et al. Efficient Diffusion Training via Min-SNR Weighting Strategy. 2023. arXiv:2303.09556
[6] Choi et al. Perception Prioritized Training of Diffusion Models. 2022. arXiv:2204.00227
[7] Ho, Salimans. Classifier-Free Diffusion Guidance. 2022. arXiv:2207.12598
[8] Karras et al. Analyzing and Improving the Training Dynamics of Diffusion Models. 2023. arXiv:2312.02696
[9] Kendall, Gal, Cipolla. Multi-Task Learning Using Uncertainty to Weigh Losses. 2017. arXiv:1705.07115
[10] Lin, Liu, Li, Yang. Common Diffusion Noise Schedules and Sample Steps are Flawed. 2023. arXiv:2305.08891
[11] Kynkäänniemi et al. Applying Guidance in a Limited Interval Improves Sample and Distribution Quality in Diffusion Models. 2024. arXiv:2404.07724
[12] Saharia et al. Photorealistic Text-to-Image Diffusion Models with Deep Language Understanding. 2022. arXiv:2205.11487
[13] Karras et al. Guiding a Diffusion Model with a Bad Version of Itself. 2024. arXiv:2406.02507
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from minidiff.errors import UserError
from minidiff.schedules import NoiseSchedule

SIGMA_DATA = 0.5  # s_d, the standard deviation EDM assumes of its data, [4] table 1
LEVELS, HASTE = (
    20,
    20.0,
)  # of the learned weighting: stretches of t, and how many times faster than a weight it learns


def _edm(alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """[4] eq. 8 written as a row, for x / alpha as noisy data at the level sigma / alpha: c_skip = (s_d alpha / r)^2 and
    c_out = s_d sigma / r follow from the 2x2 solve. Between x0 where there is much noise and the noise where there is little."""
    r = (sigma**2 + (SIGMA_DATA * alpha) ** 2).sqrt()
    return sigma / (SIGMA_DATA * r), -SIGMA_DATA * alpha / r


TARGETS: dict[str, Callable] = {  # F estimates a x0 + b eps
    "eps": lambda alpha, sigma: (torch.zeros_like(alpha), torch.ones_like(alpha)),  # [1] eq. 14
    "x0": lambda alpha, sigma: (torch.ones_like(alpha), torch.zeros_like(alpha)),  # [1] section 3.2
    "v": lambda alpha, sigma: (-sigma, alpha),  # [2] appendix D
    "flow": lambda alpha, sigma: (
        -torch.ones_like(alpha),
        torch.ones_like(alpha),
    ),  # [3] eq. 23, rectified flow
    "edm": _edm,  # [4] table 1
}

WEIGHTINGS: dict[
    str, Callable
] = {  # w(SNR), the weight of || x0 - x0_hat ||^2, whatever the network predicts
    "eps": lambda snr: snr,  # the paper's "simple" loss, [1] eq. 14
    "x0": lambda snr: torch.ones_like(snr),
    "v": lambda snr: snr + 1,  # [2] section 4
    "flow": lambda snr: (1 + snr.sqrt()) ** 2,  # 1 / sigma^2 where alpha + sigma = 1
    "edm": lambda snr: snr + SIGMA_DATA**-2,  # [4] table 1, lambda(sigma)
    "min-snr": lambda snr: snr.clamp(max=5),  # [5] section 3.4, gamma = 5
    "p2": lambda snr: snr / (1 + snr),  # [6] eq. 8, gamma = k = 1
    "learned": lambda snr: torch.ones_like(
        snr
    ),  # then divided by its own mean at each level: Denoiser.loss
}


class Prediction(NamedTuple):
    """What a denoiser says about x_t: the clean data and the noise it is made of, x_t = alpha_t x0 + sigma_t eps."""

    x0: Float[Tensor, "B *dims"]
    eps: Float[Tensor, "B *dims"]


Denoise = Callable[
    [Tensor, Tensor], Prediction
]  # (x, t) -> Prediction: all a sampler needs to know of a model


def _like(scale: Float[Tensor, "B"], x: Tensor) -> Tensor:
    """A scale per example, ready to be multiplied with x. The cast comes before the move: some devices have no float64."""
    return scale.to(x.dtype).to(x.device).view(-1, *[1] * (x.ndim - 1))


class Denoiser(nn.Module):
    """network + schedule + one row of TARGETS. The network is called as network(x, c_noise, context)."""

    def __init__(
        self,
        network: nn.Module,
        schedule: NoiseSchedule,
        target: str = "eps",
        weighting: str | None = None,
    ):
        """weighting: a key of WEIGHTINGS; None means the plain squared error of the network's own output."""
        super().__init__()
        if target not in TARGETS:
            raise ValueError(f'no target "{target}"; there is {", ".join(TARGETS)}')
        if (weighting or target) not in WEIGHTINGS:
            raise ValueError(f'no weighting "{weighting}"; there is {", ".join(WEIGHTINGS)}')
        if target == "eps" and getattr(schedule, "zero_terminal_snr", False):
            raise ValueError(
                'target "eps" says nothing about x0 where alpha = 0; use "v" or "x0" with zero_terminal_snr'
            )
        self.network, self.schedule, self.target, self.weighting = (
            network,
            schedule,
            target,
            weighting or target,
        )
        self.log_error = (
            nn.Parameter(torch.zeros(LEVELS)) if weighting == "learned" else None
        )  # u / HASTE; of use in training only

    def _row(self, t: Shaped[Tensor, "B"]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        alpha, sigma = self.schedule.alpha_sigma(t)
        return alpha, sigma, *TARGETS[self.target](alpha, sigma)

    def output(
        self,
        x: Float[Tensor, "B *dims"],
        t: Shaped[Tensor, "B"],
        context: Float[Tensor, "B L D"] | None = None,
    ) -> Tensor:
        """F, the bare output of the network, on an input scaled to unit variance where the target asks for it."""
        if self.target == "edm":  # c_in, [4] table 1
            alpha, sigma = self.schedule.alpha_sigma(t)
            x = x * _like((sigma**2 + (SIGMA_DATA * alpha) ** 2).rsqrt(), x)
        precise = torch.promote_types(
            x.dtype, torch.float32
        )  # bfloat16 cannot tell t = 999 from 1000
        return self.network(x, self.schedule.c_noise(t).to(precise).to(x.device), context)

    def forward(
        self,
        x: Float[Tensor, "B *dims"],
        t: Shaped[Tensor, "B"],
        context: Float[Tensor, "B L D"] | None = None,
    ) -> Prediction:
        """What the network says of x0 and eps. t is a CPU tensor."""
        return self.solve(x, t, self.output(x, t, context).to(x.dtype))

    def solve(
        self, x: Float[Tensor, "B *dims"], t: Shaped[Tensor, "B"], F: Float[Tensor, "B *dims"]
    ) -> Prediction:
        """Solve  x = alpha x0 + sigma eps,  F = a x0 + b eps  for (x0, eps)."""
        alpha, sigma, a, b = self._row(t)
        det = alpha * b - sigma * a
        x0 = _like(b / det, x) * x - _like(sigma / det, x) * F
        eps = _like(alpha / det, x) * F - _like(a / det, x) * x
        return Prediction(x0, eps)

    def unsolve(self, said: Prediction, t: Shaped[Tensor, "B"]) -> Float[Tensor, "B *dims"]:
        """The output that says this:  F = a x0 + b eps."""
        _, _, a, b = self._row(t)
        return _like(a, said.x0) * said.x0 + _like(b, said.eps) * said.eps

    def loss(
        self,
        x0: Float[Tensor, "B *dims"],
        context: Float[Tensor, "B L D"] | None = None,
        t: Shaped[Tensor, "B"] | None = None,
        eps: Float[Tensor, "B *dims"] | None = None,
    ) -> Float[Tensor, "B"]:
        """w(SNR_t) || x0 - x0_hat(x_t) ||^2 per example (mean over dims); t and eps can be given, so that tests are exact.

        The "learned" weighting ([8], after [9]) is 1 / e^u and the loss (error / e^u) + u, least where u = log E[error | t]: every noise
        level pulls equally hard, however large its error, and what the network should say does not change. It can be negative.

        Computed on the network's output, where x0 - x0_hat = -(sigma / det) (target - F), to stay finite as alpha goes to 0.
        """
        t = self.schedule.sample_t(len(x0)) if t is None else t
        eps = torch.randn_like(x0) if eps is None else eps
        alpha, sigma, a, b = self._row(t)
        x = _like(alpha, x0) * x0 + _like(sigma, x0) * eps
        error = _like(a, x0) * x0 + _like(b, x0) * eps - self.output(x, t, context)
        weight = (
            WEIGHTINGS[self.weighting](self.schedule.snr(t))
            * (sigma / (alpha * b - sigma * a)) ** 2
        )
        each = weight.to(x0.dtype).to(x0.device) * error.pow(2).flatten(1).mean(1)
        if self.log_error is None:
            return each
        u = (
            HASTE
            * self.log_error[
                (LEVELS * self.schedule.progress(t)).long().clamp(max=LEVELS - 1).to(x0.device)
            ]
        )
        return each / u.exp() + u


def guide(
    denoiser: Denoiser,
    context: Float[Tensor, "B L D"] | None,
    null: Float[Tensor, "B L D"] | None,
    scale: float,
    rescale: float = 0.0,
    interval: tuple[float, float] | None = None,
    threshold: float | None = None,
    weak: Denoiser | None = None,
) -> Denoise:
    """Classifier-free guidance, [7] eq. 6 as Stable Diffusion counts it: null + scale (context - null).

    scale 1 is off, 0 is unconditional, above 1 exaggerates what the condition changes. Both halves run as one batch. At a fixed
    x_t the solve of Denoiser is affine in F, so guiding x0, eps or F is the same thing.

    null: the empty prompt, or any other to steer away from: a negative prompt.
    rescale: how far, 0 to 1, the standard deviation of the guided F is taken back to that of the conditional F ([10] section 3.4).
    interval: guide only in this stretch of schedule.progress(t), 0 data to 1 noise, ends included; elsewhere scale is 1 ([11]).
    threshold: the share, as 0.995, of values of x0 that the range [-s, s] must hold; where s > 1, values beyond it are cut off and all are
    divided by s ([12] section 2.3). For pixels, whose range is [-1, 1]; latents have no range.
    weak: a worse denoiser, shown the context, to steer away from in place of null ([13]).
    """
    if not 0 <= rescale <= 1:
        raise UserError(f"rescale is {rescale}; it must be from 0 (off) to 1.")
    if interval is not None and not 0 <= interval[0] <= interval[1] <= 1:
        raise UserError(
            f"the guidance interval is {interval}; it must be two numbers from 0 (data) to 1 (noise), the smaller one first."
        )
    if scale != 1 and context is not None and null is None and weak is None:
        raise UserError(
            f"guidance at scale {scale:g} needs something to steer away from: null or weak."
        )
    if threshold is not None and not 0 < threshold <= 1:
        raise UserError(
            f"threshold is {threshold}; it must be a share above 0 and up to 1, as in 0.995."
        )

    def steered(x: Tensor, t: Tensor) -> Prediction:
        progress = denoiser.schedule.progress(t)
        inside = (
            torch.ones_like(progress)
            if interval is None
            else ((interval[0] <= progress) & (progress <= interval[1])).double()
        )
        if scale == 1 or not inside.any() or (weak is None and context is None):
            return denoiser(x, t, context)
        if weak is not None:
            towards, away = denoiser(x, t, context), weak(x, t, context)
        elif scale == 0 and inside.all():
            return denoiser(x, t, null)
        else:
            halves = [
                half.chunk(2)
                for half in denoiser(
                    torch.cat([x, x]), torch.cat([t, t]), torch.cat([null, context])
                )
            ]
            away, towards = (Prediction(*half) for half in zip(*halves, strict=True))
        g = scale if interval is None else _like(1 + (scale - 1) * inside, x)
        guided = Prediction(*(a + g * (b - a) for a, b in zip(away, towards, strict=True)))
        return _rescaled(x, t, guided, towards) if rescale > 0 else guided

    def _rescaled(x: Tensor, t: Tensor, guided: Prediction, towards: Prediction) -> Prediction:
        F, wanted = denoiser.unsolve(guided, t), denoiser.unsolve(towards, t)
        ratio = wanted.flatten(1).std(1) / F.flatten(1).std(1)
        return denoiser.solve(x, t, _like(1 - rescale + rescale * ratio, x) * F)

    def denoise(x: Tensor, t: Tensor) -> Prediction:
        guided = steered(x, t)
        if threshold is None:
            return guided
        sizes = guided.x0.flatten(1).abs().to(torch.promote_types(x.dtype, torch.float32))
        s = _like(sizes.quantile(threshold, dim=1).clamp(min=1), x)
        x0 = guided.x0.clamp(-s, s) / s
        alpha, sigma = denoiser.schedule.alpha_sigma(t)
        return Prediction(x0, (x - _like(alpha, x) * x0) / _like(sigma, x))

    return denoise
