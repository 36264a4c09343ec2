"""minidiff: text-to-image diffusion from scratch.

Names are imported when they are first used, so that `import minidiff` is instant.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # for editors and type checkers; __getattr__ below imports the same when used
    from minidiff import checkpoints, data, ddpm, denoiser, evaluation, figures  # noqa: I001
    from minidiff import finetuning, guidance, latent_diffusion, layers, losses, methods, options
    from minidiff import pipeline, recipes, samplers, schedules, steps, text, train, training
    from minidiff import errors, unet, vae
    from minidiff.data.world import World
    from minidiff.ddpm import DDPM
    from minidiff.denoiser import Denoiser
    from minidiff.figures import plots
    from minidiff.figures.trace import trace
    from minidiff.latent_diffusion import LatentDiffusion
    from minidiff.methods import lora
    from minidiff.text import CLIPText
    from minidiff.unet import UNet
    from minidiff.vae import VAE

__all__ = [
    "DDPM", "VAE", "CLIPText", "Denoiser", "LatentDiffusion", "UNet", "World", "checkpoints",
    "data", "ddpm", "denoiser", "errors", "evaluation", "figures", "finetuning", "guidance",
    "latent_diffusion", "layers", "load", "lora", "losses", "methods", "options", "pipeline",
    "plots", "recipes", "samplers", "schedules", "steps", "text", "trace", "train", "training",
    "unet", "vae",
]  # fmt: skip
_NAMES = {"UNet": "unet", "VAE": "vae", "CLIPText": "text", "World": "data.world"}
_NAMES |= {"LatentDiffusion": "latent_diffusion", "Denoiser": "denoiser", "DDPM": "ddpm"}
_NAMES["trace"] = "figures.trace"
_SHORT = {"plots": "figures.plots", "lora": "methods.lora"}


def load(
    path: "str | Path" = "box",
    device: "str | torch.device" = "cpu",
    dtype: "str | torch.dtype | None" = "fp32",
    target: str | None = None,
    vae: "str | Path | None" = None,
    text: "str | Path | None" = None,
    unet: "str | Path | None" = None,
    zero_terminal_snr: bool = False,
) -> "LatentDiffusion":
    """The model at a path, ready to sample: a folder of ours or of diffusers, a single file of
    Stable Diffusion, a name on the Hugging Face Hub, or "box", the small model that ships with us.

    dtype: torch's, or fp32, bf16, fp16; None keeps what is stored. target: what the U-Net predicts
    ("eps", "v"), where the file does not say. vae, text, unet: other checkpoints' parts.
    zero_terminal_snr: it was trained so, and the file does not say.
    """
    from minidiff.checkpoints.load import load

    return load(path, device, dtype, target, vae, text, unet, zero_terminal_snr)


def __getattr__(name: str):
    if name == "__version__":
        return importlib.import_module("importlib.metadata").version("minidiff")
    if name not in __all__:
        raise AttributeError(f"module 'minidiff' has no attribute '{name}'")
    home = _NAMES.get(name) or _SHORT.get(name, name)
    module = importlib.import_module(f"minidiff.{home}")
    return getattr(module, name) if name in _NAMES else module


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})
