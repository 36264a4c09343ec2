"""Guidance: how the text, or a worse model, steers a denoiser.

[1] Ho, Salimans. Classifier-Free Diffusion Guidance. 2022. arXiv:2207.12598
[2] Lin et al. Common Diffusion Noise Schedules and Sample Steps are Flawed. arXiv:2305.08891
[3] Kynkäänniemi et al. Applying Guidance in a Limited Interval Improves Sample and Distribution
    Quality in Diffusion Models. 2024. arXiv:2404.07724
[4] Karras et al. Guiding a Diffusion Model with a Bad Version of Itself. 2024. arXiv:2406.02507
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from minidiff.condition import Context, join
from minidiff.denoiser import Denoise, Denoiser, Prediction
from minidiff.errors import UserError
from minidiff.schedules import per_example

X = Float[Tensor, "B *dims"]
Time = Shaped[Tensor, "B"]


def guide(
    denoiser: Denoiser,
    context: Context | None,
    null: Context | None,
    scale: float,
    rescale: float = 0.0,
    interval: tuple[float, float] | None = None,
    weak: Denoiser | None = None,
) -> Denoise:
    """Classifier-free guidance, [1] eq. 6 with Stable Diffusion's scale = 1 + w:
    null + scale (context - null).

    scale 1 is off, 0 is unconditional, above 1 exaggerates what the condition changes. Guiding x0,
    eps or F gives the same result, because Denoiser.solve is affine in F at a fixed x_t.

    null: the empty prompt, or any other to steer away from: a negative prompt.
    rescale: from 0 to 1, how far the standard deviation of F is taken back to that of the
    conditional output ([2]).
    interval: guide only where schedule.progress(t) is in it, from 0 (data) to 1 (noise) ([3]).
    weak: a worse denoiser, given the context, to steer away from in place of null ([4]).
    """
    if not 0 <= rescale <= 1:
        raise UserError(f"rescale is {rescale}; it must be from 0 (off) to 1.")
    if interval is not None and not 0 <= interval[0] <= interval[1] <= 1:
        ends = "two numbers from 0 (data) to 1 (noise), the smaller one first"
        raise UserError(f"the guidance interval is {interval}; it must be {ends}.")
    if scale != 1 and context is not None and null is None and weak is None:
        raise UserError(f"guidance at scale {scale:g} needs null or weak, to steer away from.")
    return Guided(denoiser, context, null, scale, rescale, interval, weak)


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
        unconditional = self.weak is None and self.context is None
        if self.scale == 1 or unconditional or not inside.any():
            return self.denoiser(x, t, self.context)
        if self.scale == 0 and self.weak is None and inside.all():
            return self.denoiser(x, t, self.null)
        away, towards = self._pair(x, t)
        g = self.scale
        if self.interval is not None:
            g = per_example(1 + (self.scale - 1) * inside.double(), x)
        pairs = zip(away, towards, strict=True)
        guided = Prediction(*(a + g * (b - a) for a, b in pairs))  # eq: cfg-6
        return self._rescaled(x, t, guided, towards) if self.rescale > 0 else guided

    def _inside(self, t: Time) -> Shaped[Tensor, "B"]:
        """Whether t is in the interval."""
        progress = self.denoiser.schedule.progress(t)
        low, high = self.interval or (-torch.inf, torch.inf)
        return (low <= progress) & (progress <= high)

    def _pair(self, x: X, t: Time) -> tuple[Prediction, Prediction]:
        """What to steer away from, and towards; null and context are evaluated as one batch."""
        if self.weak is not None:
            return self.weak(x, t, self.context), self.denoiser(x, t, self.context)
        both = self.denoiser(torch.cat([x, x]), torch.cat([t, t]), join(self.null, self.context))
        away, towards = zip(*(half.chunk(2) for half in both), strict=True)
        return Prediction(*away), Prediction(*towards)

    def _rescaled(self, x: X, t: Time, guided: Prediction, towards: Prediction) -> Prediction:
        """The guided prediction with the std of F taken back, [2] eq. 15-16."""
        F = self.denoiser.unsolve(guided, t)
        ratio = self.denoiser.unsolve(towards, t).flatten(1).std(1) / F.flatten(1).std(1)
        factor = per_example(1 - self.rescale + self.rescale * ratio, x)
        return self.denoiser.solve(x, t, factor * F)
