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


def load(path="box", device="cpu"):
    """The model at a path, a LatentDiffusion ready to sample: a folder of ours, a diffusers folder, or a single file of Stable Diffusion.

    "box" is no path but the small model that ships with minidiff (docs/box.md); a folder of that name is meant by its whole path.
    """
    from pathlib import Path

    path = Path(__file__).parent / "box" if Path(path) == Path("box") else Path(path)
    if (path / "model_index.json").is_file() or path.is_file():
        from minidiff.weights import layouts

        return (layouts.from_single_file(path) if path.is_file() else layouts.from_diffusers(path)).to(device)
    from minidiff.latent_diffusion import LatentDiffusion

    return LatentDiffusion.load(path, device)


def __getattr__(name: str):
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    if name in _MODULES:
        return importlib.import_module(f"minidiff.{name}")
    raise AttributeError(f"module 'minidiff' has no attribute '{name}'")
