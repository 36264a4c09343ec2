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
_MODULES = ("ddpm", "schedules", "denoiser", "samplers", "unet", "vae", "clip", "latent_diffusion", "train", "plots", "evaluate", "data")

__all__ = [*_HOMES, *_MODULES, "load"]


def load(path, device="cpu"):
    """The model in a folder: a LatentDiffusion, ready to sample."""
    from minidiff.latent_diffusion import LatentDiffusion

    return LatentDiffusion.load(path, device)


def __getattr__(name: str):
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    if name in _MODULES:
        return importlib.import_module(f"minidiff.{name}")
    raise AttributeError(f"module 'minidiff' has no attribute '{name}'")
