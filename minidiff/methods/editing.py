"""Pictures from a picture: starting late (image to image) and keeping what is outside a mask (inpainting). Nothing is trained here.

z0 are the latents of the given picture; a mask is 1 where new things may be drawn and 0 where the picture stays.

[1] Meng et al. SDEdit: Guided Image Synthesis and Editing with Stochastic Differential Equations. 2021. arXiv:2108.01073
[2] Lugmayr et al. RePaint: Inpainting using Denoising Diffusion Probabilistic Models. 2022. arXiv:2201.09865
[3] Rombach et al. High-Resolution Image Synthesis with Latent Diffusion Models. 2022. arXiv:2112.10752
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from minidiff.denoiser import Denoise
from minidiff.errors import UserError
from minidiff.schedules import NoiseSchedule
from minidiff.steps import Step

Latents = Float[Tensor, "B Z h w"]
Mask = Float[Tensor, "1 1 h w"]


def noised(schedule: NoiseSchedule, z0: Latents, noise: Latents, t: Shaped[Tensor, ""]) -> Latents:
    """x_t = alpha_t z0 + sigma_t noise."""
    alpha, sigma = schedule.alpha_sigma(t)
    return alpha.item() * z0 + sigma.item() * noise


def late(times: Shaped[Tensor, "steps1"], strength: float) -> Shaped[Tensor, "late1"]:
    """The last strength x steps of the steps, [1] section 3: the earlier ones decide what the given picture has decided already."""
    if not 0 < strength <= 1:
        raise UserError(
            f"strength is {strength:g}; it must be above 0 (the picture stays) and at most 1 (little of it does)."
        )
    steps = len(times) - 1
    return times[steps - max(1, int(steps * strength)) :]


def keeping(step: Step, z0: Latents, noise: Latents, mask: Mask) -> Step:
    """The step, after which all outside the mask is as noisy as it should be and otherwise as given ([2] eq. 8, with the same noise throughout)."""

    def masked(
        denoise: Denoise,
        schedule: NoiseSchedule,
        x: Latents,
        t: Shaped[Tensor, ""],
        s: Shaped[Tensor, ""],
    ) -> tuple[Latents, Latents]:
        x_s, x0 = step(denoise, schedule, x, t, s)
        return mask * x_s + (1 - mask) * noised(schedule, z0, noise, s), x0

    return masked


class Inpainting(nn.Module):
    """A network trained for inpainting ([3] section 4.5): beside x it is shown the mask and the latents of the picture without what is masked."""

    def __init__(self, network: nn.Module, mask: Mask, kept: Float[Tensor, "1 Z h w"]):
        super().__init__()
        self.network, self.beside = network, torch.cat([mask, kept], dim=1)

    def forward(
        self, x: Latents, t: Shaped[Tensor, "B"], context: Float[Tensor, "B L D"] | None = None
    ) -> Latents:
        return self.network(
            torch.cat([x, self.beside.to(x).expand(len(x), -1, -1, -1)], dim=1), t, context
        )


def shrunk(mask: Float[Tensor, "1 1 H W"], factor: int) -> Mask:
    """The mask at the size of latents: each position's first pixel decides."""
    return F.interpolate(
        (mask > 0.5).float(),
        size=(mask.shape[2] // factor, mask.shape[3] // factor),
        mode="nearest",
    )
