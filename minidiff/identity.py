"""That a resumed run is the run it goes on from: what a fine-tune was made of stands in OUT/run.json, and is compared before anything is trained.

A checkpoint alone would take other pictures, other weights or another batch size without a word, and end somewhere that neither run would.
"""
import hashlib
import json
from pathlib import Path

import torch

from minidiff import atomic, cache
from minidiff.cache import Example
from minidiff.errors import UserError
from minidiff.groups import Group
from minidiff.latent_diffusion import LatentDiffusion
from minidiff.weights import files

RESULTS = ("training", "model", "lora.safetensors", "embedding.safetensors", "best_step_[0-9]*")  # what a run leaves in its folder
PARTS = {"settings", "weights", "data"}  # of run.json


def identity(model: LatentDiffusion, groups: list[Group], settings: dict[str, object]) -> dict[str, dict]:
    """What a run is made of, as run.json has it: settings by name, a word for all weights of each part, the
    fingerprints of each group."""
    parts = {"VAE": model.vae, "text tower": model.text, "U-Net": model.unet}
    weights = {name: cache.fingerprint(part) for name, part in parts.items()}
    weights["denoiser"] = f"{model.denoiser.target}, {model.denoiser.weighting}, {model.schedule}"
    return {"settings": settings, "weights": weights, "data": fingerprints(groups)}


def fingerprints(groups: list[Group]) -> dict[str, list[str]]:
    """Of every group its weight, then of every example sixteen letters that change with its latents, and its caption."""

    def of(example: Example) -> str:
        return f"{hashlib.sha256(example.latents.contiguous().view(torch.uint8).numpy()).hexdigest()[:16]} {example.caption}"

    return {group.name: [f"weight {group.weight:g}", *map(of, group.examples)] for group in groups}


def check_free(out: Path, resume: bool) -> None:
    """That no run is written over, nor anything else that has the name of one of a run's files."""
    found = next((place for name in RESULTS for place in out.glob(name)), None)
    if resume and found is not None and not (out / "training").exists():
        raise UserError(f"{found} is there, but no training to go on with; pass another --out.")
    if not resume and found is not None:
        raise UserError(f"{out} holds a training already; pass --resume to go on with it, or another --out.")
    for name, stranger in {"run.json": foreign, "report.html": atomic.unsigned}.items():
        atomic.check(out / name, stranger)
    for grid in out.glob("grids/step_*.png"):
        atomic.check(grid, atomic.unsigned)


def foreign(path: Path) -> Path | None:
    """path, where it is not a run.json of ours; see atomic.Stranger."""
    try:
        run = files.read_json(path)
    except (UserError, OSError):
        return path
    return None if isinstance(run, dict) and run.keys() == PARTS else path


def same_run(out: Path, run: dict[str, dict], resume: bool) -> None:
    """Write OUT/run.json, or compare with it where training has begun: a run is resumed with what it was started with, or not at all."""
    check_free(out, resume)
    file = out / "run.json"
    if not (out / "training").exists():
        with atomic.write(file, foreign) as new:
            new.write_text(json.dumps(run, indent=1) + "\n", encoding="utf-8")
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
