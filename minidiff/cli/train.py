"""The verb that trains a model from scratch on one's own images."""

import shlex
from pathlib import Path
from typing import Annotated

import tyro

from minidiff.cli import options
from minidiff.cli.flags import Flat
from minidiff.cli.options import Device
from minidiff.errors import UserError
from minidiff.options.training import TrainingConfig

Folders = tyro.conf.Positional[Annotated[tuple[Path, ...], tyro.conf.arg(metavar="DATA")]]


@options.alone
def train(
    config: Flat[TrainingConfig],
    folder: Folders = (),
    data: Path | None = None,
    resume: bool = False,
    device: Device = "auto",
    out: Path = Path("out/train"),
) -> None:
    """Train a model from scratch on your images: with captions, by class, or without either.

    Example: minidiff train pets --size 32 --minutes 30 --out out/pets

    Args:
        config: what is trained, and how.
        folder: a folder of images: with captions (metadata.jsonl, .csv, .parquet, or text files),
            a folder for each class, or images alone.
        data: the same folder, as other verbs take it.
        resume: go on where an interrupted run stopped, bit for bit.
        device: where to compute; auto takes a GPU if there is one.
        out: folder for the model, the samples, results.json, and the training's checkpoints.
    """
    places = [*folder, *([data] if data else [])]
    if len(places) != 1:
        raise UserError(f"{len(places)} folders are given; name one, as in minidiff train pets.")
    device = options.pick_device(device)
    from minidiff.recipes.train import train_from_scratch

    results = train_from_scratch(places[0], out, config, device, resume)
    names = ("loss.png", "vae.png", "results.json", "model")
    samples = sorted(out.glob("samples-*.png"))[-1:]
    print(*samples, *(out / name for name in names if (out / name).exists()), sep="\n")
    print(f"{results['minutes']:g} minutes; loss {results['loss']:.3g}")
    prompt = shlex.quote(results["prompts"][0])
    print(f"draw with it: minidiff generate {prompt} --model {out / 'model'} --n 4")
