"""minidiff: text-to-image diffusion from scratch.

Names are imported when they are first used, so that `import minidiff` is instant.
"""

import importlib

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


def load(path="box", device="cpu", dtype="fp32", **how):
    """The model at a path, a LatentDiffusion ready to sample: a folder of ours, a diffusers folder,
    a single file of Stable Diffusion, or a name on the Hugging Face Hub. "box" is the small model
    that ships with minidiff (docs/box.md). dtype: fp32, bf16, fp16, or None for what is stored.
    More in checkpoints/load.py."""
    from minidiff.checkpoints.load import load

    return load(path, device, dtype, **how)


def __getattr__(name: str):
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    if name in _MODULES or name in _DOORS:
        return importlib.import_module(_DOORS.get(name, f"minidiff.{name}"))
    raise AttributeError(f"module 'minidiff' has no attribute '{name}'")


def __dir__() -> list[str]:
    return __all__
