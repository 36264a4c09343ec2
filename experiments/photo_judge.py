"""A judge of photographs that had no part in making them: a classifier of the things in shards.

    python experiments/photo_judge.py --data photos     # photos/train-*.tar, photos/held_out-*.tar

Each picture's key "label" names its thing. The classifier learns from the training shards alone,
and is then asked about the held-out ones. Its features measure distances between sets of pictures,
its verdicts count how many samples of a model show what was asked for. It is trained before any
model that it judges, and no model is trained by it. Writes photos_resnet.safetensors (float16; a
copy ships in minidiff/networks), loss.png and results.json. Ctrl-C saves; --resume goes on.

[1] DeVries, Taylor. Improved Regularization of Convolutional Neural Networks with Cutout. 2017.
    arXiv:1708.04552
"""

import json
from collections.abc import Iterator
from functools import partial
from itertools import count
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from minidiff.checkpoints.folder import DTYPES
from minidiff.cli.script import run
from minidiff.data import buckets
from minidiff.data.folder import ahead, to_model
from minidiff.data.shards import Shards
from minidiff.errors import UserError
from minidiff.evaluation.features import PHOTOS_SIDE as SIDE
from minidiff.evaluation.features import PHOTOS_WIDTHS, Classifier
from minidiff.evaluation.metrics import Moments, frechet
from minidiff.figures import plots
from minidiff.options.finetuning import Precision
from minidiff.recipes.plan import Act, cost
from minidiff.train import EMA, Loss, TrainConfig, train
from minidiff.training import atomic
from minidiff.training.progress import duration, follow, last_loss, write_results
from minidiff.training.resume import read_log
from minidiff.training.seeds import generator_of

PADDING, HOLE = 8, 20  # pixels: how far a picture is moved, and the side of the square cut out
SMALL = 48  # the side of the windows in the first part of the training


class Pictures(NamedTuple):
    """Pictures of known things, in the order of their shards."""

    pixels: UInt8[Tensor, "N 3 S S"]
    labels: list[str]


class Batch(NamedTuple):
    images: Float[Tensor, "B 3 S S"]
    labels: list[str]


def pictures(data: Path, part: str, limit: int | None = None) -> Pictures:
    """The pictures of data/PART-*.tar with their labels, or the first `limit` of them."""
    shards = sorted(data.glob(f"{part}-*.tar"))
    if not shards:
        raise UserError(f"{data}: no {part}-*.tar there; pass the folder of the shards.")
    stored = Shards(shards, SIDE, caption_column="label")
    rows = range(len(stored) if limit is None else min(limit, len(stored)))
    pixels = torch.empty(len(rows), 3, SIDE, SIDE, dtype=torch.uint8)
    labels = []
    for k, (image, label) in enumerate(tqdm(ahead(stored.__getitem__, rows), part, len(rows))):
        pixels[k] = image
        labels.append(label)
    return Pictures(pixels, labels)


def moved(
    pixels: UInt8[Tensor, "B 3 S S"], side: int, generator: torch.Generator
) -> Float[Tensor, "B 3 s s"]:
    """A window of each picture, black beyond its border; half of them mirrored, and a square of
    each gray ([1])."""
    padded = F.pad(pixels, [PADDING] * 4)
    room = padded.shape[-1] - side + 1
    places = torch.randint(room, (len(pixels), 2), generator=generator).tolist()
    windows = torch.stack(
        [x[:, i : i + side, j : j + side] for x, (i, j) in zip(padded, places, strict=True)]
    )
    images = to_model(windows)
    mirrored = torch.rand(len(images), generator=generator) < 0.5
    images[mirrored] = images[mirrored].flip(-1)
    holes = torch.randint(side, (len(images), 2), generator=generator).tolist()
    for image, (i, j) in zip(images, holes, strict=True):
        top, left = max(0, i - HOLE // 2), max(0, j - HOLE // 2)
        image[:, top : i + HOLE // 2, left : j + HOLE // 2] = 0
    return images


def batches(
    train_set: Pictures, batch: int, small_steps: int, seed: int, start: int
) -> Iterator[Batch]:
    """Batches start, start + 1, ...: every picture once an epoch; the first `small_steps` of them
    are smaller windows, which cost less."""
    orders = buckets.batches([(1, 1)] * len(train_set.labels), batch, seed, start)
    for k, rows in zip(count(start), orders, strict=False):
        side = SMALL if k < small_steps else SIDE
        images = moved(train_set.pixels[rows], side, generator_of(seed, k))
        yield Batch(images, [train_set.labels[row] for row in rows])


def loss(network: Classifier, index: dict[str, int], batch: Batch) -> Loss:
    """Cross-entropy with smoothed labels."""
    logits = network(batch.images)
    right = torch.tensor([index[label] for label in batch.labels])
    return {
        "loss": F.cross_entropy(logits.float(), right, reduction="none", label_smoothing=0.1),
        "right": (logits.argmax(1) == right).float(),
    }


@torch.no_grad()
def judged(
    network: Classifier, held_out: Pictures, index: dict[str, int]
) -> dict[str, float | int]:
    """The share of pictures whose thing is the network's first guess, and among its first five;
    half a 95 % interval of the first."""
    right = torch.tensor([index[label] for label in held_out.labels])
    logits = torch.cat([network(to_model(some)) for some in held_out.pixels.split(100)])
    best = logits.topk(min(5, logits.shape[1])).indices == right[:, None]
    n, top_1 = len(right), best[:, 0].double().mean().item()
    return {
        "n": n,
        "top_1": round(top_1, 4),
        "top_1_half_interval": round(1.96 * (top_1 * (1 - top_1) / n) ** 0.5, 4),
        "top_5": round(best.any(1).double().mean().item(), 4),
    }


@torch.no_grad()
def moments(network: Classifier, pixels: UInt8[Tensor, "N 3 S S"]) -> Moments:
    of_features = Moments()
    for some in pixels.split(100):
        of_features.add(network.features(to_model(some)))
    return of_features


def floor(network: Classifier, train_set: Pictures, held_out: Pictures, seed: int) -> float:
    """The Fréchet distance of the held-out pictures to as many training pictures: what other real
    pictures reach."""
    order = torch.randperm(len(train_set.labels), generator=generator_of(seed, 0))
    some = train_set.pixels[order[: len(held_out.labels)]]
    return round(frechet(moments(network, held_out.pixels), moments(network, some)), 4)


OUTPUTS = ("photos_resnet.safetensors", "loss.png")  # beside results.json


def main(
    data: Path,
    out: Path = Path("out/photo_judge"),
    steps: int = 4200,
    small: float = 0.6,
    batch: int = 64,
    lr: float = 3e-3,
    weight_decay: float = 0.1,
    pictures_used: int | None = None,
    dtype: Precision = "fp32",
    seed: int = 0,
    resume: bool = False,
) -> None:
    """Train the judge, and count how often it is right about held-out pictures.

    Args:
        data: a folder with train-*.tar and held_out-*.tar.
        out: folder for everything written.
        steps: training steps.
        small: the share of the steps in which windows of 48x48 are seen.
        batch: pictures a step.
        lr: peak learning rate of Muon.
        weight_decay: of Muon.
        pictures_used: use only so many, of training and of held-out ones.
        dtype: precision to compute in; bf16 is faster where the processor has it.
        seed: everything random follows from it.
        resume: go on where an interrupted run stopped.
    """
    torch.set_num_threads(1)
    train_set, held_out = (pictures(data, part, pictures_used) for part in ("train", "held_out"))
    classes = sorted(set(train_set.labels))
    index = {name: k for k, name in enumerate(classes)}
    unknown = sorted(set(held_out.labels) - set(classes))
    if unknown:
        raise UserError(f"{data}: {unknown[0]} is held out, and not in the training shards.")

    config = TrainConfig(
        steps,
        lr,
        warmup=min(200, steps // 10),
        optimizer="muon",
        betas=(0.95, 0.99),
        weight_decay=weight_decay,
        autocast=None if dtype == "fp32" else DTYPES[dtype],
        seed=seed,
    )
    stream = partial(batches, train_set, batch, round(small * steps), seed)
    trial = Classifier(len(classes), PHOTOS_WIDTHS)
    step = cost(Act("judge", trial, partial(loss, trial, index), stream, config))
    cheaper = 1 - small * (1 - (SMALL / SIDE) ** 2)  # what is timed is a step of small windows
    seconds = step.seconds * steps * cheaper * ((SIDE / SMALL) ** 2 if small > 0 else 1)
    print(f"about {duration(seconds)} on this machine, for {steps} steps", flush=True)

    torch.manual_seed(seed)
    network = Classifier(len(classes), PHOTOS_WIDTHS)
    average = EMA(network, decay=0.998)
    training = train(
        partial(loss, network, index), network, stream, config, average, out / "training", resume
    )
    speed = follow(training, "judge", steps, batch)

    network = average.average.half().float()  # what is measured is what ships: half precision
    weights = {name: tensor.half() for name, tensor in network.state_dict().items()}
    about = {"software": atomic.SIGNATURE, "classes": json.dumps(classes)}
    with atomic.write(out / "photos_resnet.safetensors", atomic.unsigned) as new:
        save_file(weights, new, about)
    log = read_log(out / "training")
    results = {
        "steps": steps,
        "small": small,
        "batch": batch,
        "lr": lr,
        "weight_decay": weight_decay,
        "pictures": len(train_set.labels),
        "classes": len(classes),
        "dtype": dtype,
        "seed": seed,
        **judged(network, held_out, index),
        "frechet_floor": floor(network, train_set, held_out, seed),
        "loss": last_loss(log),
        **speed,
    }
    print(out / "photos_resnet.safetensors", plots.loss(log, out / "loss.png"), sep="\n")
    print(write_results(out, **results))
    print(
        f"right about {results['top_1']:.3f} +- {results['top_1_half_interval']:.3f} of "
        f"{results['n']} held-out pictures; among its first five {results['top_5']:.3f}"
    )


if __name__ == "__main__":
    run(main, OUTPUTS)
