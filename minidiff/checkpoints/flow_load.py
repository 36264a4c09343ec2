"""From a checkpoint of Stable Diffusion 3, 3.5 or FLUX.1 to a LatentDiffusion ready to sample."""

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import nn

from minidiff.checkpoints import files, flow_models, layouts
from minidiff.checkpoints.flow_models import SD3, Checkpoint, Family
from minidiff.checkpoints.folder import empty, fill, precision_of
from minidiff.conditioners import FluxText, SD3Text
from minidiff.denoiser import Denoiser
from minidiff.errors import UserError
from minidiff.latent_diffusion import LatentDiffusion
from minidiff.mmdit import MMDiT
from minidiff.schedules import Flow
from minidiff.vae import VAE

KINDS = {"unet": "transformer", "vae": "VAE", "text": "text encoders"}
Open = Callable[[str | Path, str, torch.dtype | None], nn.Module]  # load.part


def outline(name: str, part: layouts.Part, family: Family) -> nn.Module:
    """The network of a part, whose tensors have shapes and no memory."""
    networks = {"unet": MMDiT, "vae": VAE, "text": SD3Text if family is SD3 else FluxText}
    try:
        return empty(networks[name], part.config)
    except (ValueError, TypeError, ZeroDivisionError, KeyError, RuntimeError) as error:
        raise UserError(f"{part.where}: no {KINDS[name]} of such sizes ({error}).") from error


def built(checkpoint: Checkpoint, name: str, dtype: torch.dtype | None) -> nn.Module:
    part = checkpoint.parts[name]
    module, state = outline(name, part, checkpoint.family), part.state
    if name == "vae":
        state = state | dict(latent_scale=torch.tensor(part.latent_scale))
    if name == "text" and module.t5 is not None:
        module.t5.vocabulary = checkpoint.vocabulary
    return fill(module, state, part.where, precision_of(name, dtype, module))


def part(path: Path, name: str, dtype: torch.dtype | None) -> nn.Module:
    """One network of a checkpoint."""
    checkpoint = flow_models.read(path, files.tensors)
    if name not in checkpoint.parts:
        raise UserError(f"{path} has no {KINDS[name]}{_reasons(checkpoint)}.")
    return built(checkpoint, name, dtype)


def load(
    path: Path, others: Mapping[str, str | Path], dtype: torch.dtype | None, other_part: Open
) -> LatentDiffusion:
    """others: the place of a part in another checkpoint; other_part opens it."""
    checkpoint = flow_models.read(path, files.tensors)
    for note in checkpoint.notes:
        warnings.warn(f"{path.name}: {note}", stacklevel=3)
    if unknown := checkpoint.unknown:
        left_out = f'{len(unknown)} tensors are left out; the first is "{unknown[0]}"'
        warnings.warn(f"{path.name}: {left_out}", stacklevel=3)
    absent = [name for name in KINDS if name not in checkpoint.parts and name not in others]
    if absent:
        missing = " and no ".join(KINDS[name] for name in absent)
        fix = " ".join(f"{name}=FOLDER" for name in absent)
        why = f"{path} has no {missing}{_reasons(checkpoint)}"
        raise UserError(f"{why}; name a diffusers folder of {checkpoint.family.name}, as in {fix}.")
    networks = {}
    for name in KINDS:
        place = others.get(name)
        if place is None:
            networks[name] = built(checkpoint, name, dtype)
        elif name == "vae" and Path(place).is_file():  # it tells neither scale nor shift
            vae = flow_models.vae(files.tensors(Path(place)), str(place), checkpoint.family)
            alone = Checkpoint(checkpoint.family, "", {"vae": vae})
            networks[name] = built(alone, name, dtype)
        else:
            networks[name] = other_part(place, name, dtype)
    network = networks["unet"]
    if network.config.in_channels != network.config.out_channels:
        channels = network.config.in_channels - network.config.out_channels
        what = f"takes {channels} channels beside the latents, of an image or a mask"
        raise UserError(f"{path}: its transformer {what}; such a one cannot be drawn with here.")
    is_sd3 = checkpoint.family is SD3
    return LatentDiffusion(
        networks["vae"],
        networks["text"],
        Denoiser(network, schedule(checkpoint, network.config.guidance), "flow"),
        checkpoint.size,
        dropout=0.1 if is_sd3 else 0.0,  # FLUX.1 was distilled: it has no unconditional prediction
        guidance=7.0 if is_sd3 else 3.5 if network.config.guidance else 1.0,
        sampler="euler",
        spacing="shifted" if is_sd3 else "trailing",
    )


def schedule(checkpoint: Checkpoint, guided: bool) -> Flow:
    """As scheduler_config.json says, or as published."""
    settings = checkpoint.scheduler
    is_dynamic = settings.get("use_dynamic_shifting", checkpoint.family is not SD3 and guided)
    if not is_dynamic:
        usual = 3.0 if checkpoint.family is SD3 else 1.0
        return Flow(shift=float(settings.get("shift", usual)))
    ends = ("base_image_seq_len", 256), ("max_image_seq_len", 4096)
    if any(settings.get(key, usual) != usual for key, usual in ends):
        raise UserError("scheduler_config.json: its shift is not at 256 and at 4,096 tokens.")
    return Flow(mu=(settings.get("base_shift", 0.5), settings.get("max_shift", 1.15)))


def _reasons(checkpoint: Checkpoint) -> str:
    return f" ({'; '.join(checkpoint.notes)})" if checkpoint.notes else ""
