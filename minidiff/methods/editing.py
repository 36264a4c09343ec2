"""Image to image, which starts late, and inpainting, which keeps what is outside a mask.

z0 are the latents of the given image; a mask is 1 where the image is drawn anew, 0 where it stays.

[1] Meng et al. SDEdit: Guided Image Synthesis and Editing with Stochastic Differential Equations.
    2021. arXiv:2108.01073
[2] Lugmayr et al. RePaint: Inpainting using Denoising Diffusion Probabilistic Models. 2022.
    arXiv:2201.09865
[3] Rombach et al. High-Resolution Image Synthesis with Latent Diffusion Models. arXiv:2112.10752
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from minidiff.condition import Context
from minidiff.denoiser import Denoise, Denoiser
from minidiff.errors import UserError
from minidiff.latent_diffusion import LatentDiffusion
from minidiff.options.sampling import SampleConfig, Size
from minidiff.samplers import Frame, Noise, by_name, sample
from minidiff.schedules import NoiseSchedule
from minidiff.steps import Step

Images = Float[Tensor, "B C H W"]
Latents = Float[Tensor, "B Z h w"]
Mask = Float[Tensor, "1 1 h w"]


@dataclass(frozen=True)
class Edit:
    """An image in [-1, 1] to start from; the share of the steps that is taken (at 1 little of the
    image stays); and a mask. Default: the image is drawn anew everywhere."""

    image: Float[Tensor, "1 C H W"]
    strength: float = 1.0
    mask: Float[Tensor, "1 1 H W"] | None = None

    def __post_init__(self) -> None:
        if not 0 < self.strength <= 1:
            limits = "above 0 (the image stays) and at most 1 (little of it does)"
            raise UserError(f"strength is {self.strength:g}; it must be {limits}.")
        if self.mask is not None and self.mask.shape[2:] != self.image.shape[2:]:
            raise UserError("the mask is of another size than the image.")

    def paste(self, images: Images) -> Images:
        """The images inside the mask, and the given image, to the bit, outside."""
        if self.mask is None:
            return images
        return torch.where(self.mask.to(images) > 0.5, images, self.image.to(images))


@torch.no_grad()
def edited(
    model: LatentDiffusion, prompts: list[str], edit: Edit, config: SampleConfig, noise: Noise
) -> Iterator[Frame]:
    """As LatentDiffusion.sample, but from an image. What is outside a mask stays in the latents;
    edit.paste keeps its pixels."""
    config = replace(config, size=Size(*edit.image.shape[2:]))
    blank = model.blank(len(prompts), config)
    step, denoiser = by_name(config.sampler or model.sampler), model.denoiser
    times = model.times(step, config)
    times = late(times, edit.strength)
    eps, z0 = noise(blank), model.vae.encode(edit.image.to(blank)).expand_as(blank)

    alpha, sigma = model.schedule.alpha_sigma(times[0])
    x = (alpha**2 + sigma**2).sqrt().item() * eps
    if edit.mask is None or edit.strength < 1:
        x = model.schedule.mix(z0, eps, times[0])

    if model.unet.config.in_channels != model.vae.latent_channels:
        denoiser = inpainting_denoiser(model, edit)
    elif edit.mask is not None:
        step = Keeping(step, z0, eps, shrunk(edit.mask, model.vae.factor).to(blank))
    denoise = model.guided(prompts, config, denoiser=denoiser)
    yield from sample(denoise, model.schedule, x, times, step, noise=noise)


def late(times: Shaped[Tensor, "steps1"], strength: float) -> Shaped[Tensor, "late1"]:
    """The times of the last strength * steps steps, [1] section 3."""
    steps = len(times) - 1
    return times[steps - max(1, int(steps * strength)) :]


@dataclass(frozen=True)
class Keeping(Step):
    """A step, then z0 with the noise of time s outside the mask ([2] eq. 8, one eps)."""

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
        return self.mask * x_s + (1 - self.mask) * schedule.mix(self.z0, self.eps, s), x0, memory


class Inpainting(nn.Module):
    """A network trained for inpainting ([3] section 4.5): it reads x, the mask, masked latents."""

    def __init__(self, network: nn.Module, mask: Mask, masked: Float[Tensor, "1 Z h w"]):
        super().__init__()
        self.network, self.condition = network, torch.cat([mask, masked], dim=1)

    def forward(
        self, x: Latents, t: Shaped[Tensor, "B"], context: Context | None = None
    ) -> Latents:
        condition = self.condition.to(x).expand(len(x), -1, -1, -1)
        return self.network(torch.cat([x, condition], dim=1), t, context)


def inpainting_denoiser(model: LatentDiffusion, edit: Edit | None) -> Denoiser:
    """The denoiser of a model whose U-Net has channels for the mask and the masked image."""
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
