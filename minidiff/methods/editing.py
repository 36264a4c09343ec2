"""Images from an image: starting late (image to image), and keeping what is outside a mask (inpainting).

Nothing is trained here. z0 are the latents of the given image; a mask is 1 where the image is to be
drawn anew and 0 where it stays.

[1] Meng et al. SDEdit: Guided Image Synthesis and Editing with Stochastic Differential Equations. 2021.
    arXiv:2108.01073
[2] Lugmayr et al. RePaint: Inpainting using Denoising Diffusion Probabilistic Models. 2022.
    arXiv:2201.09865
[3] Rombach et al. High-Resolution Image Synthesis with Latent Diffusion Models. 2022. arXiv:2112.10752
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from minidiff.denoiser import Denoise, Denoiser
from minidiff.errors import UserError
from minidiff.latent_diffusion import LatentDiffusion
from minidiff.options.sampling import SampleConfig, Size
from minidiff.samplers import Frame, Noise, by_name, sample, times_of
from minidiff.schedules import NoiseSchedule
from minidiff.steps import Step

Images = Float[Tensor, "B C H W"]
Latents = Float[Tensor, "B Z h w"]
Mask = Float[Tensor, "1 1 h w"]


@dataclass(frozen=True)
class Edit:
    """What to start from, and what of it to keep.

    image: in [-1, 1]. strength: the share of the steps that is walked; at 1 little of the image stays.
    mask: 1 where the image is drawn anew, 0 where it stays. Default: it is drawn anew everywhere.
    """

    image: Float[Tensor, "1 C H W"]
    strength: float = 1.0
    mask: Float[Tensor, "1 1 H W"] | None = None

    def __post_init__(self) -> None:
        if not 0 < self.strength <= 1:
            raise UserError(
                f"strength is {self.strength:g}; it must be above 0 (the image stays) and at most 1 "
                "(little of it does)."
            )

    def paste(self, images: Images) -> Images:
        """The images inside the mask, and the given one, to the bit, outside."""
        if self.mask is None:
            return images
        mask, image = self.mask.to(images), self.image.to(images)
        return torch.where(mask > 0.5, images, image)


@torch.no_grad()
def edited(
    model: LatentDiffusion, prompts: list[str], edit: Edit, config: SampleConfig, noise: Noise
) -> Iterator[Frame]:
    """As LatentDiffusion.sample, but from an image. What is outside a mask stays in the latents; pixels
    that must stay are pasted back with edit.paste.
    """
    config = replace(config, size=Size(*edit.image.shape[2:]))
    blank = model.blank(len(prompts), config)
    times = late(
        times_of(model.schedule, config.steps, config.spacing or model.spacing), edit.strength
    )
    eps, z0 = noise(blank), model.vae.encode(edit.image.to(blank)).expand_as(blank)

    alpha, sigma = model.schedule.alpha_sigma(times[0])
    x = (alpha**2 + sigma**2).sqrt().item() * eps
    if edit.mask is None or edit.strength < 1:
        x = model.schedule.mix(z0, eps, times[0])

    step, denoiser = by_name(config.sampler or model.sampler), model.denoiser
    if model.unet.config.in_channels != model.vae.latent_channels:
        denoiser = inpainting_denoiser(model, edit)
    elif edit.mask is not None:
        step = Keeping(step, z0, eps, shrunk(edit.mask, model.vae.factor).to(blank))
    denoise = model.guided(prompts, config, denoiser=denoiser)
    yield from sample(denoise, model.schedule, x, times, step, noise=noise)


def late(times: Shaped[Tensor, "steps1"], strength: float) -> Shaped[Tensor, "late1"]:
    """The last strength x steps of the steps, [1] section 3: the image has decided what the earlier would."""
    steps = len(times) - 1
    return times[steps - max(1, int(steps * strength)) :]


@dataclass(frozen=True)
class Keeping:
    """A step after which all outside the mask is z0 with the noise of time s ([2] eq. 8, one eps)."""

    step: Step
    z0: Latents
    eps: Latents
    mask: Mask

    def __call__(
        self,
        denoise: Denoise,
        schedule: NoiseSchedule,
        x: Latents,
        t: Shaped[Tensor, ""],
        s: Shaped[Tensor, ""],
        noise: Noise,
        memory: Any = None,
    ) -> tuple[Latents, Latents, Any]:
        x_s, x0, memory = self.step(denoise, schedule, x, t, s, noise, memory)
        outside = schedule.mix(self.z0, self.eps, s)
        return self.mask * x_s + (1 - self.mask) * outside, x0, memory


class Inpainting(nn.Module):
    """A network trained for inpainting ([3] section 4.5): its input is x, the mask, and masked latents."""

    def __init__(self, network: nn.Module, mask: Mask, masked: Float[Tensor, "1 Z h w"]):
        super().__init__()
        self.network, self.condition = network, torch.cat([mask, masked], dim=1)

    def forward(
        self, x: Latents, t: Shaped[Tensor, "B"], context: Float[Tensor, "B L D"] | None = None
    ) -> Latents:
        condition = self.condition.to(x).expand(len(x), -1, -1, -1)
        return self.network(torch.cat([x, condition], dim=1), t, context)


def inpainting_denoiser(model: LatentDiffusion, edit: Edit | None) -> Denoiser:
    """The model's denoiser, where its U-Net has channels for the mask and the masked image."""
    channels, z = model.unet.config.in_channels, model.vae.latent_channels
    if channels != 2 * z + 1:
        raise UserError(
            f"this U-Net takes {channels} channels; known are {z}, and {2 * z + 1} for inpainting."
        )
    if edit is None or edit.mask is None:
        raise UserError("this model is for inpainting; it needs an image and a mask.")
    masked = model.vae.encode((edit.image * (edit.mask < 0.5)).to(model.device))
    mask = shrunk(edit.mask, model.vae.factor).to(model.device)
    network = Inpainting(model.unet, mask, masked)
    return Denoiser(network, model.schedule, model.denoiser.target)


def shrunk(mask: Float[Tensor, "1 1 H W"], factor: int) -> Mask:
    """The mask at the size of latents: each position's first pixel decides."""
    size = mask.shape[2] // factor, mask.shape[3] // factor
    return F.interpolate((mask > 0.5).float(), size=size, mode="nearest")
