"""The folder of a fine-tune: run.json, which says what the run is made of, and the results.

A run is resumed with what it was started with, or not at all.
"""

import hashlib
import json
import logging
import shutil
import warnings
from pathlib import Path

import torch
from safetensors import SafetensorError

from minidiff.checkpoints import embedding, files, folder
from minidiff.checkpoints import lora as lora_files
from minidiff.data import latents
from minidiff.data.latents import Example
from minidiff.errors import UserError
from minidiff.finetuning.groups import Group
from minidiff.latent_diffusion import LatentDiffusion
from minidiff.methods import lora
from minidiff.methods.inversion import Word, put_in
from minidiff.options.finetuning import FineTuneConfig, Precision, TuningConfig
from minidiff.training import atomic
from minidiff.training.json_types import fits
from minidiff.training.progress import human
from minidiff.training.resume import KEPT

MODEL, LORA, EMBEDDING = "model", "lora.safetensors", "embedding.safetensors"
RESULTS = ("training", MODEL, LORA, EMBEDDING, "best_step_[0-9]*")
LARGE = 10**9  # bytes of a checkpoint worth telling
PARTS = {"settings", "weights", "data"}  # of run.json


class Changed(UserError):
    """A run is resumed with other settings than it was started with."""


def identity(
    model: LatentDiffusion, groups: list[Group], config: FineTuneConfig
) -> dict[str, dict]:
    """The content of run.json: the settings, and fingerprints of the weights and of each group."""
    parts = {"VAE": model.vae, "text encoder": model.text, "U-Net": model.unet}
    weights = {name: latents.fingerprint(part) for name, part in parts.items()}
    weights["denoiser"] = f"{model.denoiser.target}, {model.denoiser.weighting}, {model.schedule}"
    data = {g.name: [f"weight {g.weight:g}", *map(fingerprint, g.examples)] for g in groups}
    names = {dtype: name for name, dtype in folder.DTYPES.items() if name != "fp32"}
    name = names.get(next(model.unet.parameters()).dtype)
    settings = config.identity() | ({"frozen": name} if name else {})
    return {"settings": settings, "weights": weights, "data": data}


def frozen(config: TuningConfig, out: Path) -> Precision:
    """What to load a model in: what a run that is there was begun with; those of earlier versions
    had fp32."""
    if not (out / "training").exists() or not (out / "run.json").exists():
        return config.frozen
    settings = files.read_json(out / "run.json").get("settings")
    name = settings.get("frozen") if isinstance(settings, dict) else None
    return name if name in folder.DTYPES else "fp32"


def fingerprint(example: Example) -> str:
    """Sixteen letters that change with the latents and numbers, then the caption, or captions."""
    content = hashlib.sha256(example.latents.contiguous().view(torch.uint8).numpy())
    content.update(bytes(str(example.numbers or ""), "ascii"))
    captions = " | ".join((example.caption, *example.others))
    return f"{content.hexdigest()[:16]} {captions}"


def upgraded(run: dict[str, dict]) -> dict[str, dict]:
    """A run.json of an earlier version under today's names."""
    settings, weights = dict(run["settings"]), dict(run["weights"])
    if fits(settings.get("levels"), tuple[float, float]):
        settings["t_mean"], settings["t_std"] = settings.pop("levels")
    if "text tower" in weights:
        weights["text encoder"] = weights.pop("text tower")
    return {"settings": settings, "weights": weights, "data": run["data"]}


def check_free(out: Path, resume: bool) -> None:
    """Raise if another run, or a stranger's file with one of our names, would be written over."""
    result = next((path for name in RESULTS for path in out.glob(name)), None)
    if resume and result is not None and not (out / "training").exists():
        raise UserError(f"{result} is there, but no training to go on with; choose another `out`.")
    if not resume and result is not None:
        raise UserError(
            f"{out} holds a training already; pass `resume` to go on with it, or another `out`."
        )
    for name, stranger in {"run.json": foreign_run, "report.html": atomic.unsigned}.items():
        atomic.check(out / name, stranger)
    for grid in out.glob("grids/step_*.png"):
        atomic.check(grid, atomic.unsigned)


def foreign_run(path: Path) -> Path | None:
    """path, unless it is a run.json of ours; see atomic.Stranger."""
    try:
        run = files.read_json(path)
    except (UserError, OSError):
        return path
    return None if isinstance(run, dict) and run.keys() == PARTS else path


def start(out: Path, run: dict[str, dict], resume: bool) -> None:
    """Write OUT/run.json; where training has begun already, compare with it instead."""
    for place in (out, out / "grids", *out.glob("best_step_*")):
        atomic.clean(place)
    check_free(out, resume)
    file = out / "run.json"
    if not (out / "training").exists():
        with atomic.write(file, foreign_run) as new:
            new.write_text(json.dumps(run, indent=1) + "\n", encoding="utf-8")
        return
    before = files.read_json(file)
    is_run = before.keys() == PARTS and all(isinstance(part, dict) for part in before.values())
    if not is_run or not fits(before["data"], dict[str, list[str]]):
        raise UserError(f"{file} is not of a fine-tune; choose another `out`.")
    before = upgraded(before)
    for part in run:
        for name in {**run[part], **before[part]}:
            old, new = before[part].get(name), run[part].get(name)
            # fit suits the machine; of frozen the weights tell
            if old != new and name not in ("fit", "frozen"):
                change = _change(part, name, old, new)
                kind = Changed if part == "settings" else UserError
                raise kind(f"{file}: this run was started {change}, or choose another `out`.")


def check_disk(out: Path, checkpoint: int, result: int, recorded: bool) -> None:
    """Tell, if it is much, what a run writes at most, and raise where the disk has no room for it.
    Before an old checkpoint goes, and an old best result, the new one is there."""
    need = (KEPT + 1) * checkpoint + (2 if recorded else 1) * result
    places = [path for name in RESULTS for path in out.glob(name)]
    there = [f for place in places for f in (place.rglob("*") if place.is_dir() else [place])]
    need -= sum(file.stat().st_size for file in there if file.is_file())
    free = shutil.disk_usage(out).free
    line = f"a checkpoint is {human(checkpoint)}, {KEPT + 1} of them at once; the result is "
    line += f"{human(result)}; {human(max(0, need))} to write in {out}, {human(free)} free"
    if need > free:
        raise UserError(f"{line}: make room, or choose another `out` or `method=lora`.")
    if checkpoint > LARGE:
        logging.getLogger("minidiff").info(f"disk: {line}.")


def _change(part: str, name: str, old: object, new: object) -> str:
    """What a setting, the weights or the data were before, and how to go on."""
    if part == "settings":
        same = "as before" if old is None else f"with `{name}={old}`"
        if isinstance(old, bool):
            same = f"with `{name}`" if old else f"without `{name}`"
        return f"with {name} {old}, not {new}; resume it {same}"
    if part == "weights":
        return f"from a model with another {name}; resume it with the same `model`"
    return f"on other data: {_difference(name, old or [], new or [])}; put it back"


def _difference(group: str, old: list[str], new: list[str]) -> str:
    """The first example of a group that has changed."""
    changed = [line for line in [*old, *new] if (line in old) != (line in new)]
    if not changed:
        return f'the images of "{group}" are in another order, or one is there twice'
    first = changed[0]
    if not first.startswith("weight "):
        first = f'"{first.partition(" ")[2]}"'
    counts = f"there were {max(0, len(old) - 1)} images, now {max(0, len(new) - 1)}"
    return f'of "{group}" {counts}; the first difference is {first}'


def best_folder(out: Path, step: int) -> Path:
    return out / f"best_step_{step}"


def write_best(
    model: LatentDiffusion, config: FineTuneConfig, out: Path, word: Word | None, step: int
) -> None:
    """Write the best weights so far to their own folder, unless they are the last, which are in
    OUT; remove the folder before."""
    folder = best_folder(out, step)
    if step < config.steps:
        folder.mkdir(parents=True, exist_ok=True)
        write(model, config.method, folder, word)
    for older in set(out.glob("best_step_*")) - {folder}:
        if foreign_best(older) is None:
            atomic.remove(older)


def foreign_best(path: Path) -> Path | None:
    """What in a folder write_best() did not write; see atomic.Stranger."""
    numbered = path.name.removeprefix("best_step_").isdecimal()
    if path.is_symlink() or not path.is_dir() or not numbered:
        return path
    owners = {MODEL: folder.foreign, LORA: atomic.unsigned, EMBEDDING: atomic.unsigned}
    entries = sorted(path.iterdir())
    strangers = (owners[each.name](each) if each.name in owners else each for each in entries)
    return next(filter(None, strangers), None)


def check_weights(model: LatentDiffusion, method: str, word: Word | None) -> None:
    """Raise where what was trained is not finite; warn of a LoRA that changes nothing."""
    layers = lora.adapted(model).values() if method == "lora" else ()
    weights = [weight for layer in layers for weight in layer.lora.parameters()]
    weights += model.unet.parameters() if method == "full" else []
    weights += [word.vector] if word else []
    if not all(weight.isfinite().all() for weight in weights):
        raise UserError(
            "the trained weights are not finite, and are not written; train anew with a lower `lr` "
            "in another `out`."
        )
    if layers and not any(layer.lora.B.any() for layer in layers):
        warnings.warn("the LoRA is zero and changes nothing: train more steps", stacklevel=3)


def write(model: LatentDiffusion, method: str, out: Path, word: Word | None) -> None:
    """Write OUT/model; or OUT/lora.safetensors, OUT/embedding.safetensors or both. A disk that is
    full loses nothing: the last checkpoint has it all."""
    check_weights(model, method, word)
    if word is not None:
        put_in(model.text, word.word, word.vector.detach())
    path = out / {"full": MODEL, "lora": LORA, "inversion": EMBEDDING}[method]
    try:
        if method == "full":
            model.save(path)
            return
        if method == "lora":
            with atomic.write(path, atomic.unsigned) as new:
                lora_files.save(model, new)
        if word is not None:
            path = embedding.save(word.word, word.vector, out / EMBEDDING, word.widths)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{path} could not be written ({str(error).splitlines()[0]}). The training is kept: "
            "make room, and write it with `resume`."
        ) from error
