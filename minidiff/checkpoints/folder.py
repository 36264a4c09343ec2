"""Our own format, the model folder: model.json (kinds and configs), and one safetensors file for each
part. All in this file."""

import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from minidiff import schedules
from minidiff.checkpoints import files
from minidiff.checkpoints.fill import dtype_named, empty, fill, precision_of
from minidiff.denoiser import Denoiser
from minidiff.errors import UserError
from minidiff.latent_diffusion import LatentDiffusion
from minidiff.methods.lora import merged_state
from minidiff.text import ClassLabels, CLIPText, Unconditional
from minidiff.unet import UNet
from minidiff.vae import VAE, Pixels

FORMAT = "minidiff 1"
KINDS = {cls.__name__: cls for cls in (VAE, Pixels, CLIPText, ClassLabels, Unconditional, UNet)}
PARTS = ("vae", "text", "unet")
SETTINGS = ("size", "dropout", "guidance", "sampler", "spacing")


def save(model: LatentDiffusion, path: str | Path) -> Path:
    """Write the model folder beside its place, then rename: an interrupted save leaves the old folder
    as it was. What LoRAs change is written into the weights."""
    path = Path(path)
    fresh, old = path.with_name(path.name + ".new"), path.with_name(path.name + ".old")
    _finish_save(path)
    for folder in (fresh, old):
        shutil.rmtree(folder, ignore_errors=True)
    fresh.mkdir(parents=True)
    parts = {name: getattr(model, name) for name in PARTS}
    whole = {
        "format": FORMAT,
        **{name: getattr(model, name) for name in SETTINGS},
        "denoiser": {
            "target": model.denoiser.target,
            "weighting": model.denoiser.weighting,
            "schedule": schedules.to_json(model.schedule),
        },
        **{n: {"kind": type(part).__name__, **asdict(part.config)} for n, part in parts.items()},
    }
    for name, part in parts.items():
        state = {key: value.contiguous() for key, value in merged_state(part).items()}
        save_file(state, fresh / f"{name}.safetensors")
    (fresh / "model.json").write_text(json.dumps(whole, indent=2) + "\n", encoding="utf-8")
    if path.exists():
        os.replace(path, old)
    os.replace(fresh, path)
    shutil.rmtree(old, ignore_errors=True)
    return path


def load(
    path: str | Path,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype | None = torch.float32,
) -> LatentDiffusion:
    """Read a model folder, in this precision or as stored (None). Every problem is a UserError that
    names the file."""
    path, dtype = Path(path), dtype_named(dtype)
    _finish_save(path)
    if not path.is_dir():
        raise UserError(
            f'no model folder "{path}"; `minidiff quickstart` makes one, or name another model.'
        )
    if not (path / "model.json").is_file():
        raise UserError(
            f'"{path}" is no model folder: it has no model.json (`minidiff quickstart` writes one).'
        )
    whole = files.read_json(path / "model.json")
    try:
        model = _model(whole)
    except (
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        RuntimeError,
        ZeroDivisionError,
    ) as error:
        raise UserError(
            f"{path / 'model.json'} is damaged ({type(error).__name__}: {error}); "
            "save the model again."
        ) from error
    for name in PARTS:
        file = path / f"{name}.safetensors"
        if not file.is_file():
            raise UserError(
                f"{path} has no weights: {file.name} is missing; copy the whole folder, "
                "or save the model again."
            )
        state = files.tensors(files.inside(path, file))
        where = f"{file} does not fit model.json"
        fill(getattr(model, name), state, where, precision_of(name, dtype))
    return model.to(device).eval()


def network(described: dict) -> nn.Module:
    """A part as model.json describes it: its kind, and its config. Its tensors have no memory yet."""
    config = {key: value for key, value in described.items() if key != "kind"}
    return empty(KINDS[described["kind"]], config)


def _model(whole: dict) -> LatentDiffusion:
    """The model that model.json describes, without weights."""
    if whole["format"] != FORMAT:
        raise ValueError(f'format "{whole["format"]}", but this version reads "{FORMAT}"')
    vae, text, unet = (network(whole[name]) for name in PARTS)
    described = whole["denoiser"]
    schedule = schedules.from_json(described["schedule"])
    schedule.timesteps(1)  # values of the wrong kind fail here, not in the middle of an image
    return LatentDiffusion(
        vae,
        text,
        Denoiser(unet, schedule, described["target"], described["weighting"]),
        int(whole["size"]),
        float(whole["dropout"]),
        float(whole["guidance"]),
        str(whole.get("sampler", "ddim")),
        str(whole.get("spacing", "trailing")),
    )


def _finish_save(path: Path) -> None:
    """A save that was killed between its two renames left the model under its old name: put it back."""
    old = path.with_name(path.name + ".old")
    if old.is_dir() and not path.exists():
        os.replace(old, path)
