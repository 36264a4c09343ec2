"""Dynamic thresholding: strong guidance does not saturate pixels. Latents have no range to keep.

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
    """[1] section 2.3: x0 clamped to [-s, s], s a quantile of |x0| and at least 1, divided by s.

    share: of the values of x0 that lie within [-s, s], as 0.995.
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
