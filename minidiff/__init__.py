"""minidiff: text-to-image diffusion from scratch.

Names are imported when they are first used, so that `import minidiff` is instant.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from minidiff.latent_diffusion import LatentDiffusion

_HOMES = {
    "UNet": "minidiff.unet",
    "VAE": "minidiff.vae",
    "CLIPText": "minidiff.text",
    "LatentDiffusion": "minidiff.latent_diffusion",
    "Denoiser": "minidiff.denoiser",
    "DDPM": "minidiff.ddpm",
    "World": "minidiff.data.world",
}
_MODULES = (
    "ddpm",
    "schedules",
    "denoiser",
    "steps",
    "samplers",
    "layers",
    "unet",
    "vae",
    "text",
    "latent_diffusion",
    "train",
    "methods",
    "training",
    "checkpoints",
    "data",
    "figures",
    "evaluation",
    "finetuning",
    "recipes",
)
_DOORS = {"plots": "minidiff.figures.plots", "lora": "minidiff.methods.lora"}

__all__ = [*_HOMES, *_MODULES, *_DOORS, "load"]


def load(
    path: "str | Path" = "box",
    device: "str | torch.device" = "cpu",
    dtype: "str | torch.dtype | None" = "fp32",
    target: str | None = None,
    vae: "str | Path | None" = None,
    text: "str | Path | None" = None,
    unet: "str | Path | None" = None,
) -> "LatentDiffusion":
    """The model at a path, ready to sample: a folder of ours, a diffusers folder, a single file of
    Stable Diffusion, or a name on the Hugging Face Hub. "box" is the small model that ships with
    minidiff (docs/box.md).

    dtype: torch's, or fp32, bf16, fp16; None keeps what is stored. target: what the U-Net predicts
    ("eps", "v"), where the file does not say. vae, text, unet: take this part from another
    checkpoint.
    """
    from minidiff.checkpoints.load import load

    return load(path, device, dtype, target, vae, text, unet)


def __getattr__(name: str):
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    if name in _MODULES or name in _DOORS:
        return importlib.import_module(_DOORS.get(name, f"minidiff.{name}"))
    raise AttributeError(f"module 'minidiff' has no attribute '{name}'")


def __dir__() -> list[str]:
    return __all__
