"""Guidance: how the text, or a worse model, steers a denoiser.

[1] Ho, Salimans. Classifier-Free Diffusion Guidance. 2022. arXiv:2207.12598
[2] Lin, Liu, Li, Yang. Common Diffusion Noise Schedules and Sample Steps are Flawed. 2023. arXiv:2305.08891
[3] Kynkäänniemi et al. Applying Guidance in a Limited Interval Improves Sample and Distribution Quality
    in Diffusion Models. 2024. arXiv:2404.07724
[4] Saharia et al. Photorealistic Text-to-Image Diffusion Models with Deep Language Understanding. 2022.
    arXiv:2205.11487
[5] Karras et al. Guiding a Diffusion Model with a Bad Version of Itself. 2024. arXiv:2406.02507
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from minidiff.denoiser import Denoise, Denoiser, Prediction
from minidiff.errors import UserError
from minidiff.schedules import NoiseSchedule, per_example

X = Float[Tensor, "B *dims"]
Time = Shaped[Tensor, "B"]
Context = Float[Tensor, "B L D"]


def guide(
    denoiser: Denoiser,
    context: Context | None,
    null: Context | None,
    scale: float,
    rescale: float = 0.0,
    interval: tuple[float, float] | None = None,
    threshold: float | None = None,
    weak: Denoiser | None = None,
) -> Denoise:
    """Classifier-free guidance, [1] eq. 6 as Stable Diffusion counts it: null + scale (context - null).

    scale 1 is off, 0 is unconditional, above 1 exaggerates what the condition changes. At a fixed x_t
    the solve of Denoiser is affine in F, so guiding x0, eps or F is the same thing.

    null: the empty prompt, or any other to steer away from: a negative prompt.
    rescale: from 0 to 1, how far the standard deviation of F is taken back to the unguided one ([2] 3.4).
    interval: guide only where schedule.progress(t) lies in it, 0 data to 1 noise ([3]).
    threshold: the share, as 0.995, of values of x0 that must fit into [-1, 1] before x0 is divided to
    make them fit ([4] section 2.3). For pixels; latents have no range.
    weak: a worse denoiser, with the context, to steer away from in place of null ([5]).
    """
    if not 0 <= rescale <= 1:
        raise UserError(f"rescale is {rescale}; it must be from 0 (off) to 1.")
    if interval is not None and not 0 <= interval[0] <= interval[1] <= 1:
        ends = "two numbers from 0 (data) to 1 (noise), the smaller one first"
        raise UserError(f"the guidance interval is {interval}; it must be {ends}.")
    if scale != 1 and context is not None and null is None and weak is None:
        raise UserError(f"guidance at scale {scale:g} needs null or weak, to steer away from.")
    if threshold is not None and not 0 < threshold <= 1:
        raise UserError(f"threshold is {threshold}; it must be above 0 and up to 1, as in 0.995.")
    guided = Guided(denoiser, context, null, scale, rescale, interval, weak)
    return guided if threshold is None else Thresholded(guided, denoiser.schedule, threshold)


@dataclass(frozen=True)
class Guided:
    """away + scale (towards - away). The fields are guide's arguments."""

    denoiser: Denoiser
    context: Context | None
    null: Context | None
    scale: float
    rescale: float
    interval: tuple[float, float] | None
    weak: Denoiser | None

    def __call__(self, x: X, t: Time) -> Prediction:
        inside = self._inside(t)
        nothing = self.weak is None and self.context is None
        if self.scale == 1 or nothing or not inside.any():
            return self.denoiser(x, t, self.context)
        if self.scale == 0 and self.weak is None and inside.all():
            return self.denoiser(x, t, self.null)
        away, towards = self._pair(x, t)
        g = self.scale
        if self.interval is not None:
            g = per_example(1 + (self.scale - 1) * inside.double(), x)
        guided = Prediction(*(a + g * (b - a) for a, b in zip(away, towards, strict=True)))
        return self._rescaled(x, t, guided, towards) if self.rescale > 0 else guided

    def _inside(self, t: Time) -> Shaped[Tensor, "B"]:
        """Whether t is in the interval."""
        progress = self.denoiser.schedule.progress(t)
        low, high = self.interval or (-torch.inf, torch.inf)
        return (low <= progress) & (progress <= high)

    def _pair(self, x: X, t: Time) -> tuple[Prediction, Prediction]:
        """What to steer away from, and towards; the null and the context run as one batch."""
        if self.weak is not None:
            return self.weak(x, t, self.context), self.denoiser(x, t, self.context)
        contexts = torch.cat([self.null, self.context])
        both = self.denoiser(torch.cat([x, x]), torch.cat([t, t]), contexts)
        away, towards = zip(*(half.chunk(2) for half in both), strict=True)
        return Prediction(*away), Prediction(*towards)

    def _rescaled(self, x: X, t: Time, guided: Prediction, towards: Prediction) -> Prediction:
        """[2] eq. 15-16."""
        F = self.denoiser.unsolve(guided, t)
        ratio = self.denoiser.unsolve(towards, t).flatten(1).std(1) / F.flatten(1).std(1)
        factor = per_example(1 - self.rescale + self.rescale * ratio, x)
        return self.denoiser.solve(x, t, factor * F)


@dataclass(frozen=True)
class Thresholded:
    """Dynamic thresholding, [4] section 2.3: clamp x0 to [-s, s], s the quantile of |x0|, and divide by s."""

    denoise: Denoise
    schedule: NoiseSchedule
    threshold: float

    def __call__(self, x: X, t: Time) -> Prediction:
        x0 = self.denoise(x, t).x0
        sizes = x0.flatten(1).abs().to(torch.promote_types(x.dtype, torch.float32))
        s = per_example(sizes.quantile(self.threshold, dim=1).clamp(min=1), x)
        x0 = x0.clamp(-s, s) / s
        alpha, sigma = self.schedule.alpha_sigma(t)
        return Prediction(x0, (x - per_example(alpha, x) * x0) / per_example(sigma, x))
