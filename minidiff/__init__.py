"""minidiff: text-to-image diffusion from scratch. Names are imported when they are first used, so that `import minidiff` is instant."""

import importlib

_HOMES = {
    "UNet": "minidiff.unet",
    "VAE": "minidiff.vae",
    "CLIPText": "minidiff.clip",
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
    "exact",
    "unet",
    "vae",
    "clip",
    "latent_diffusion",
    "train",
    "lora",
    "plots",
    "evaluate",
    "data",
)

__all__ = [*_HOMES, *_MODULES, "load"]


def load(path="box", device="cpu", dtype="fp32", **how):
    """The model at a path, a LatentDiffusion ready to sample: a folder of ours, a diffusers folder, a single file of Stable Diffusion,
    or a name on the Hugging Face Hub. "box" is the small model that ships with minidiff (docs/box.md).
    dtype: fp32, bf16, fp16, or None for what is stored. More in weights/load.py."""
    from minidiff.weights.load import load

    return load(path, device, dtype, **how)


def __getattr__(name: str):
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    if name in _MODULES:
        return importlib.import_module(f"minidiff.{name}")
    raise AttributeError(f"module 'minidiff' has no attribute '{name}'")
