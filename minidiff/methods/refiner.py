"""SDXL's refiner: a second network draws the last steps.

The refiner was trained at the low noise levels alone ([1] section 2.5). It goes on from the first
model's x_t, so that the two are one chain; diffusers' denoising_end and denoising_start, and [2].

[1] Podell et al. SDXL: Improving Latent Diffusion Models for High-Resolution Image Synthesis. 2023.
    arXiv:2307.01952
[2] Balaji et al. eDiff-I: Text-to-Image Diffusion Models with an Ensemble of Expert Denoisers.
    2022. arXiv:2211.01324
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from minidiff.denoiser import Denoise, Denoiser, Prediction
from minidiff.errors import UserError
from minidiff.latent_diffusion import LatentDiffusion
from minidiff.options.sampling import SampleConfig
from minidiff.schedules import NoiseSchedule

START = 0.8  # as published
ROUNDING = 1e-9  # 1 - 0.8 is less than 200 / 1000


@dataclass(frozen=True)
class Handover:
    """A denoiser of high noise levels, and one of the lowest: progress(t) <= until."""

    high: Denoise
    low: Denoise
    schedule: NoiseSchedule
    until: float

    def __call__(self, x: Float[Tensor, "B *dims"], t: Shaped[Tensor, "B"]) -> Prediction:
        is_low = self.schedule.progress(t) <= self.until + ROUNDING
        return self.low(x, t) if is_low.all() else self.high(x, t)


class Refined(LatentDiffusion):
    """A model whose last steps a refiner draws; both have the same latents and schedule."""

    def __init__(self, base: LatentDiffusion, refiner: LatentDiffusion, start: float = START):
        """start: how far from noise (0) to data (1) the refiner takes over."""
        super().__init__(
            base.vae,
            base.text,
            base.denoiser,
            base.size,
            base.dropout,
            base.guidance,
            base.sampler,
            base.spacing,
        )
        if not 0 <= start <= 1:
            raise UserError(f"the refiner starts at {start:g}; it must be from 0 to 1, as in 0.8.")
        t = base.schedule.timesteps(10)[:-1]
        scales = zip(base.schedule.alpha_sigma(t), refiner.schedule.alpha_sigma(t), strict=True)
        if not all(torch.allclose(ours, theirs) for ours, theirs in scales):
            raise UserError("the refiner has another noise schedule than the model it refines.")
        if refiner.unet.config.in_channels != base.vae.latent_channels:
            raise UserError("the refiner's U-Net does not take the latents of the model's VAE.")
        self.refiner, self.refined_from = refiner, start

    def guided(
        self,
        prompts: list[str],
        config: SampleConfig,
        guidance: float | None = None,
        denoiser: Denoiser | None = None,
    ) -> Denoise:
        """The model's own denoiser, then the refiner's, of the same guidance and prompts. Each
        encodes an empty prompt in its own way."""
        guidance = config.guidance if guidance is None else guidance
        guidance = self.guidance if guidance is None else guidance
        high = super().guided(prompts, config, guidance, denoiser)
        low = self.refiner.guided(prompts, replace(config, empty=None), guidance)
        return Handover(high, low, self.schedule, 1 - self.refined_from)
