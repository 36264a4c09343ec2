"""From a path, or a name on the Hugging Face Hub, to a LatentDiffusion ready to sample."""

import warnings
from pathlib import Path

import torch

from minidiff import schedules
from minidiff.checkpoints import files, hub, layouts, towers
from minidiff.checkpoints.fill import dtype_named, empty, fill, precision_of
from minidiff.denoiser import TARGETS, Denoiser
from minidiff.errors import UserError
from minidiff.latent_diffusion import LatentDiffusion
from minidiff.text import CLIPText
from minidiff.unet import UNet
from minidiff.vae import VAE

NETWORKS = {"unet": UNet, "vae": VAE, "text": CLIPText}


def load(
    path: str | Path,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype | None = "fp32",
    target: str | None = None,
    **others: str | Path | None,
) -> LatentDiffusion:
    """The model at a path: a folder of ours, a diffusers folder, a single file of Stable Diffusion, or a Hub id such as owner/name.

    dtype: fp32, bf16, fp16, or None for what is stored. target: what the U-Net predicts ("eps", "v"), where the file does not say.
    others: vae=PATH, text=PATH or unet=PATH take this part from another checkpoint.
    """
    dtype, path = dtype_named(dtype), hub.resolve(path)
    if unknown := others.keys() - NETWORKS.keys():
        raise UserError(f'no part "{min(unknown)}"; there is {", ".join(NETWORKS)}.')
    others = {name: place for name, place in others.items() if place is not None}
    if not path.is_file() and not (path / "model_index.json").is_file():
        model = LatentDiffusion.load(path, dtype=dtype)
        if target not in (None, model.denoiser.target):
            raise UserError(
                f"{path} says itself what it predicts, {model.denoiser.target}; leave target out (--target)."
            )
        for name, place in others.items():
            setattr(
                model.denoiser if name == "unet" else model,
                "network" if name == "unet" else name,
                part(place, name, dtype),
            )
        model.check_widths()
    else:
        model = _composed(path, target, others, dtype)
    return model.to(device).eval()


def part(path: str | Path, name: str, dtype: torch.dtype | None = None) -> torch.nn.Module:
    """One network of a checkpoint: name is unet, vae or text. The file may hold this one alone; text may be MODEL:TAG of open_clip."""
    path = hub.resolve(path)
    if (path / "model.json").is_file():
        model = LatentDiffusion.load(path, dtype=dtype)
        return {"unet": model.unet, "vae": model.vae, "text": model.text}[name]
    if name == "text":
        return _built(name, towers.text_part(path), dtype)
    parts = layouts.read(path, files.tensors).parts
    if name not in parts:
        raise UserError(f"{path} has no {layouts.KINDS[name]}.")
    return _built(name, parts[name], dtype)


def _built(name: str, found: layouts.Part, dtype: torch.dtype | None) -> torch.nn.Module:
    """A VAE's latent scale is a tensor with us, and a number or nothing in other layouts."""
    try:
        module = empty(
            NETWORKS[name], {k: v for k, v in found.numbers.items() if k != "latent_scale"}
        )
    except (
        ValueError,
        TypeError,
        ZeroDivisionError,
        KeyError,
        RuntimeError,
    ) as error:  # numbers that no network can have
        raise UserError(
            f"{found.where}: no {layouts.KINDS[name]} has such sizes ({error})."
        ) from error
    scale = {"latent_scale": torch.tensor(found.numbers["latent_scale"])} if name == "vae" else {}
    return fill(module, found.state | scale, found.where, precision_of(name, dtype))


def _composed(
    path: Path, target: str | None, others: dict[str, str | Path], dtype: torch.dtype | None
) -> LatentDiffusion:
    """Stable Diffusion, of the parts of one checkpoint, or of several."""
    found = layouts.read(path, files.tensors)
    for note in found.notes:
        warnings.warn(f"{path.name}: {note}", stacklevel=3)
    if found.unknown:
        left = f'{len(found.unknown)} tensors belong to no part and are left out; the first is "{found.unknown[0]}"'
        warnings.warn(f"{path.name}: {left}", stacklevel=3)
    absent = [name for name in NETWORKS if name not in found.parts and name not in others]
    if absent:
        missing, option = " and no ".join(layouts.KINDS[name] for name in absent), absent[0]
        raise UserError(
            f"{path} has no {missing}; name a checkpoint that has one, as in {option}=PATH (--{option} PATH)."
        )
    modules = {}
    for name in NETWORKS:
        modules[name] = (
            part(others[name], name, dtype)
            if name in others
            else _built(name, found.parts[name], dtype)
        )
    if target is not None and target not in TARGETS:
        raise UserError(f'no target "{target}"; there is {", ".join(TARGETS)}.')
    target = target or found.target
    if target is None:
        target = "v"
        warnings.warn(
            f"{path.name}: nothing in it says whether it predicts v (768 pixels) or eps (base, 512); v is assumed",
            stacklevel=3,
        )
    schedule = schedules.Discrete(**(found.schedule or layouts.STABLE_DIFFUSION))
    size = found.size or (768 if target == "v" else 512)
    denoiser = Denoiser(modules["unet"], schedule, target)
    return LatentDiffusion(
        modules["vae"], modules["text"], denoiser, size, guidance=7.5, spacing=found.spacing
    )
