"""The recipes of cifar_ddpm.py: networks, schedule, target, and how they are trained.

[1] Ho, Jain, Abbeel. Denoising Diffusion Probabilistic Models. 2020. arXiv:2006.11239
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from minidiff import schedules
from minidiff.conditioners import ClassLabels, LabelsConfig, Unconditional
from minidiff.ddpm import DDPM
from minidiff.denoiser import Denoiser
from minidiff.latent_diffusion import LatentDiffusion
from minidiff.unet import UNet, UNetConfig, unet_cifar10
from minidiff.vae import Pixels, PixelsConfig

CLASS_DIM = 128  # width of a class as a vector


def unet_small(context_dim: int | None) -> UNet:
    """For patches of 2x2 pixels: 16x16 to 4x4. A third of the operations of the same widths on
    pixels; every residual block is told the class."""
    config = UNetConfig(
        12,
        12,
        channels=(64, 128, 192),
        blocks=1,
        depth=(0, 1, 1),
        heads=(1, 2, 3),
        ff_mult=0,
        groups=16,
        context_dim=context_dim,
        pooled=context_dim is not None,
        scale_shift=True,
    )
    return UNet(config)


def unet_tiny(context_dim: int | None) -> UNet:
    """For tests."""
    config = UNetConfig(
        3,
        3,
        channels=(8, 16),
        blocks=1,
        depth=(0, 1),
        heads=(1, 2),
        context_dim=context_dim,
        ff_mult=0,
        groups=4,
    )
    return UNet(config)


@dataclass(frozen=True)
class Preset:
    """A recipe. chain: the paper's own chain trains and samples ([1], minidiff/ddpm.py); without
    one, the library's denoiser and samplers do."""

    unet: Callable[[int | None], UNet]
    schedule: schedules.NoiseSchedule
    target: str
    conditional: bool
    steps: int
    batch: int
    lr: float
    warmup: int
    betas: tuple[float, float]
    ema: float
    sampler: str
    sampling_steps: int
    guidance: float
    chain: DDPM | None = None
    optimizer: str = "adamw"
    patch: int = 1  # side of the squares of pixels that the network sees as one place


PRESETS = {
    # [1] section 4 and appendix B. One departure: the learning rate falls along half a cosine, the
    # paper holds it.
    "paper": Preset(
        unet=unet_cifar10,
        schedule=schedules.linear(),
        target="eps",
        conditional=False,
        steps=800_000,
        batch=128,
        lr=2e-4,
        warmup=5000,
        betas=(0.9, 0.999),
        ema=0.9999,
        sampler="ddpm",
        sampling_steps=1000,
        guidance=1.0,
        chain=DDPM(T=1000, beta_1=1e-4, beta_T=0.02),
    ),
    "small": Preset(
        unet=unet_small,
        schedule=schedules.cosine(),
        target="v",
        conditional=True,
        steps=7_000,
        batch=64,
        lr=2e-3,
        warmup=200,
        betas=(0.95, 0.99),
        ema=0.999,
        sampler="ddim",
        sampling_steps=50,
        guidance=1.5,
        optimizer="muon",
        patch=2,
    ),
    "tiny": Preset(
        unet=unet_tiny,
        schedule=schedules.cosine(),
        target="v",
        conditional=True,
        steps=4,
        batch=4,
        lr=1e-3,
        warmup=1,
        betas=(0.9, 0.99),
        ema=0.9,
        sampler="ddim",
        sampling_steps=2,
        guidance=2.0,
    ),
}


def new_model(recipe: Preset, classes: list[str], device: str) -> LatentDiffusion:
    """A model of this recipe that has learnt nothing. classes: none for one without classes."""
    text = ClassLabels(LabelsConfig(classes, CLASS_DIM)) if classes else Unconditional()
    denoiser = Denoiser(recipe.unet(text.dim), recipe.schedule, recipe.target)
    pixels = Pixels(PixelsConfig(patch=recipe.patch))
    model = LatentDiffusion(pixels, text, denoiser, size=32, guidance=recipe.guidance)
    return model.to(device, memory_format=torch.channels_last)
