"""That a resumed run is the run it goes on from: what a fine-tune was made of stands in OUT/run.json, and is compared before anything is trained.

A checkpoint alone would take other pictures, other weights or another batch size without a word, and end somewhere that neither run would.
"""

import hashlib
import json
import os
from pathlib import Path

import torch

from minidiff.checkpoints import files
from minidiff.data.latents import Example, fingerprint
from minidiff.errors import UserError
from minidiff.finetuning.groups import Group
from minidiff.latent_diffusion import LatentDiffusion

RESULTS = ("training", "model", "lora.safetensors")  # what a run leaves in its folder


def identity(
    model: LatentDiffusion, groups: list[Group], settings: dict[str, object]
) -> dict[str, dict]:
    """What a run is made of, as run.json has it: settings by name, a word for all weights of each part, the
    fingerprints of each group."""
    parts = {"VAE": model.vae, "text tower": model.text, "U-Net": model.unet}
    weights = {name: fingerprint(part) for name, part in parts.items()}
    weights["denoiser"] = f"{model.denoiser.target}, {model.denoiser.weighting}, {model.schedule}"
    return {"settings": settings, "weights": weights, "data": fingerprints(groups)}


def fingerprints(groups: list[Group]) -> dict[str, list[str]]:
    """Of every group its weight, then of every example sixteen letters that change with its latents, and its caption."""

    def of(example: Example) -> str:
        return f"{hashlib.sha256(example.latents.contiguous().view(torch.uint8).numpy()).hexdigest()[:16]} {example.caption}"

    return {group.name: [f"weight {group.weight:g}", *map(of, group.examples)] for group in groups}


def check_free(out: Path, resume: bool) -> None:
    """That no run is written over."""
    if not resume and any((out / name).exists() for name in RESULTS):
        raise UserError(
            f"{out} holds a training already; pass --resume to go on with it, or another --out."
        )


def same_run(out: Path, run: dict[str, dict], resume: bool) -> None:
    """Write OUT/run.json, or compare with it where training has begun: a run is resumed with what it was started with, or not at all."""
    check_free(out, resume)
    file = out / "run.json"
    if not (out / "training").exists():
        out.mkdir(parents=True, exist_ok=True)
        fresh = out / "run.json.new"
        fresh.write_text(json.dumps(run, indent=1) + "\n", encoding="utf-8")
        os.replace(fresh, file)
        return
    before = files.read_json(file)
    if before.keys() != run.keys() or not all(isinstance(part, dict) for part in before.values()):
        raise UserError(f"{file} is not of a fine-tune; pass another --out.")
    for kind, name in [(part, name) for part in run for name in {**run[part], **before[part]}]:
        then, now = before[kind].get(name), run[kind].get(name)
        if then == now:
            continue
        if kind == "settings":
            said = f"with {name} {then}, not {now}; resume it with that"
        elif kind == "weights":
            said = f"from a model with another {name}; resume it with --model as it was"
        else:
            said = f"on other data: {difference(name, then or [], now or [])}; put it back"
        raise UserError(f"{file}: this run was started {said}, or pass another --out.")


def difference(group: str, then: list[str], now: list[str]) -> str:
    """What changed in a group since its fingerprints were taken."""
    found = [line for line in [*then, *now] if (line in then) != (line in now)]
    if not found:
        return f'the pictures of "{group}" stand in another order, or one stands there twice'
    first = found[0] if found[0].startswith("weight ") else f'"{found[0].partition(" ")[2]}"'
    return f'of "{group}" there were {max(0, len(then) - 1)} pictures, now {max(0, len(now) - 1)}; what differs first is {first}'
