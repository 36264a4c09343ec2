"""Dynamic thresholding: keeps strong guidance from saturating pixels; latents have no fixed range.

[1] Saharia et al. Photorealistic Text-to-Image Diffusion Models with Deep Language Understanding.
    arXiv:2205.11487
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from minidiff.denoiser import Denoise, Prediction
from minidiff.errors import UserError
from minidiff.schedules import NoiseSchedule, per_example


@dataclass(frozen=True)
class Thresholded:
    """[1] section 2.3: x0 is clamped to [-s, s] and divided by s, a quantile of |x0|, at least 1.

    share: which quantile: the share of the values of x0 within [-s, s], as 0.995.
    """

    denoise: Denoise
    schedule: NoiseSchedule
    share: float

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise UserError(f"share is {self.share}; it must be above 0 and up to 1, as in 0.995.")

    def __call__(self, x: Float[Tensor, "B *dims"], t: Shaped[Tensor, "B"]) -> Prediction:
        x0 = self.denoise(x, t).x0
        sizes = x0.flatten(1).abs().to(torch.promote_types(x.dtype, torch.float32))
        s = per_example(sizes.quantile(self.share, dim=1).clamp(min=1), x)
        x0 = x0.clamp(-s, s) / s
        alpha, sigma = self.schedule.alpha_sigma(t)
        return Prediction(x0, (x - per_example(alpha, x) * x0) / per_example(sigma, x))
