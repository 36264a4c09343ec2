"""CIFAR-10 in numbers: which target learns best for equal operations, and what fewer steps cost.

    python experiments/cifar_board.py --data cifar10/train --study targets
    python experiments/cifar_board.py --data cifar10/train --study steps --model out/cifar_ddpm/model

targets: eps, x0, v and flow, each from nothing for as many steps of cifar_ddpm.py's small recipe;
with eps, x0 is clipped while drawing.
steps: DDPM and DDIM of one model by number of steps, the form of [2] table 1. Every distance is
Fréchet's in the features of minidiff's classifier of CIFAR-10, of n samples, with the floor of n
real pictures. Writes STUDY.csv row by row, and goes on where it stopped; and STUDY.png.

[1] Salimans, Ho. Progressive Distillation for Fast Sampling of Diffusion Models. arXiv:2202.00512
    (table 1: targets)
[2] Song, Meng, Ermon. Denoising Diffusion Implicit Models. 2020. arXiv:2010.02502
"""

import csv
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from cifar_ddpm import batches, objective_of, spread
from cifar_distance import Distance
from cifar_recipes import PRESETS, Preset, new_model
from jaxtyping import Float, Shaped, UInt8
from matplotlib.ticker import LogLocator, NullLocator
from torch import Tensor

from minidiff import pipeline, schedules
from minidiff.checkpoints.folder import DTYPES
from minidiff.cli.script import run
from minidiff.data.cifar10 import cifar10
from minidiff.data.folder import ClassFolder, load_all
from minidiff.denoiser import Denoise, Prediction
from minidiff.errors import UserError
from minidiff.figures import curves
from minidiff.latent_diffusion import LatentDiffusion
from minidiff.options.finetuning import Precision
from minidiff.options.sampling import SampleConfig
from minidiff.schedules import per_example
from minidiff.train import EMA, TrainConfig, train
from minidiff.training import atomic
from minidiff.training.device import pick_device, plain_attention
from minidiff.training.progress import follow, last_loss, write_results
from minidiff.training.resume import read_log

Pixels = UInt8[Tensor, "N 3 32 32"]
Row = dict[str, str | int | float]
TARGETS = {  # the target, and the schedule it is used with
    "eps": schedules.cosine(),
    "x0": schedules.cosine(),
    "v": schedules.cosine(),
    "flow": schedules.Flow(),
}


@dataclass(frozen=True)
class Options:
    """What both studies are told."""

    out: Path
    n: int
    steps: int
    batch: int
    autocast: torch.dtype | None
    device: str
    seed: int


class Table:
    """A CSV file that grows by a row at a time; what it has is not computed again."""

    def __init__(self, file: Path, keys: tuple[str, ...]):
        self.file, self.keys, self.rows = file, keys, []
        if file.exists():
            with file.open(encoding="utf-8", newline="") as text:
                reader = csv.DictReader(text)
                self.rows, columns = list(reader), reader.fieldnames or []
            if not set(keys) <= set(columns):
                raise UserError(f"{file} is another table; name another folder with --out.")

    def row(self, key: Row, measure: Callable[[], Row]) -> Row:
        """The row with these entries, measured where it is not there."""
        wanted = {name: str(value) for name, value in key.items()}
        for row in self.rows:
            if wanted.items() <= row.items():
                return row
        row = {name: str(value) for name, value in (key | measure()).items()}
        self.rows.append(row)
        with atomic.write(self.file) as new, new.open("w", encoding="utf-8", newline="") as text:
            writer = csv.DictWriter(text, list(row))
            writer.writeheader()
            writer.writerows(self.rows)
        print(", ".join(f"{name} {value}" for name, value in row.items()), flush=True)
        return row


def samples(model: LatentDiffusion, config: SampleConfig, options: Options) -> Tensor:
    """n samples, of all classes alike."""
    prompts, dtype = spread(model, options.n), options.autocast
    kind = model.device.type
    with torch.autocast(kind, dtype, enabled=dtype is not None), plain_attention(kind, dtype):
        return pipeline.generate(model, prompts, config, batch=250, progress=True).float().cpu()


def clip(model: LatentDiffusion) -> None:
    """Clip every estimate of x0 to [-1, 1] when the model draws, as the DDPM paper's code does. A
    model of eps needs it: x0 is (x - sigma eps) / alpha, and the cosine schedule's alpha_T is 5e-5,
    so that a small error of eps at T becomes a huge one of x0. It is not saved with the model."""
    guided = model.guided

    def clipped(*args: Any, **options: Any) -> Denoise:
        denoise = guided(*args, **options)

        def call(x: Float[Tensor, "B C H W"], t: Shaped[Tensor, "B"]) -> Prediction:
            x0 = denoise(x, t).x0.clamp(-1, 1)
            alpha, sigma = (per_example(v, x) for v in model.schedule.alpha_sigma(t))
            return Prediction(x0, (x - alpha * x0) / sigma)

        return call

    model.guided = clipped


def learn(
    target: str,
    recipe: Preset,
    data: tuple[Pixels, list[str]],
    distance: Distance,
    options: Options,
) -> Row:
    """A model of this target from nothing, and its distance."""
    recipe = replace(recipe, target=target, schedule=TARGETS[target])
    torch.manual_seed(options.seed)
    model = new_model(recipe, sorted(set(data[1])), options.device)
    ema, folder = EMA(model, recipe.ema), options.out / "training" / target
    config = TrainConfig(
        options.steps,
        recipe.lr,
        min(recipe.warmup, options.steps // 10),
        betas=recipe.betas,
        optimizer=recipe.optimizer,
        autocast=options.autocast,
        seed=options.seed,
    )
    stream = partial(batches, *data, options.batch, options.seed)
    begun = time.perf_counter()
    resume = (folder / "log.jsonl").exists()
    training = train(objective_of(model, recipe), model, stream, config, ema, folder, resume)
    with plain_attention(options.device, options.autocast):
        follow(training, target, options.steps, options.batch)
    seconds = time.perf_counter() - begun
    if target == "eps":
        clip(ema.average)
    drawn = samples(ema.average, SampleConfig(recipe.sampling_steps, seed=options.seed), options)
    ema.average.save(options.out / target)
    return {
        "loss": last_loss(read_log(folder)),
        "distance": round(distance.of(drawn), 3),
        "floor": round(distance.floor, 3),
        "seconds": round(seconds),
    }


def draw(
    model: LatentDiffusion, sampler: str, steps: int, distance: Distance, options: Options
) -> Row:
    """The distance of this sampler in so many steps."""
    begun = time.perf_counter()
    config = SampleConfig(steps, sampler=sampler, spacing="leading", seed=options.seed)
    away = distance.of(samples(model, config, options))
    seconds = round(time.perf_counter() - begun)
    return {"distance": round(away, 3), "floor": round(distance.floor, 3), "seconds": seconds}


def plot(table: Table, x: str, line: str, path: Path) -> Path:
    """Distance by the number of steps, a line for each sampler; a bar for each target."""
    with curves.style():
        figure, (axes,) = curves.new_figure(1, 4.5, 3.0)
        for name in dict.fromkeys(row[line] for row in table.rows):
            rows = [row for row in table.rows if row[line] == name]
            ys = [float(row["distance"]) for row in rows]
            if x == line:
                axes.bar(name, ys)
            else:
                axes.plot([int(row[x]) for row in rows], ys, marker="o", label=name)
        axes.axhline(float(table.rows[0]["floor"]), color="grey", linestyle=":", label="floor")
        axes.set(ylabel="Fréchet distance", yscale="log", xlabel=x)
        if x != line:
            steps = sorted({int(row[x]) for row in table.rows})
            axes.set(xscale="log")
            axes.set_xticks(steps, [str(n) for n in steps])
            axes.set_xticks([], minor=True)
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")  # the style reads no formulas
        axes.yaxis.set_minor_locator(NullLocator())
        axes.legend()
        return curves.save(figure, path)


OUTPUTS = ("targets.png", "steps.png")  # beside results.json


def main(
    data: Path | None = None,
    study: Literal["targets", "steps"] = "targets",
    model: Path | None = None,
    out: Path = Path("out/cifar_board"),
    preset: Literal["small", "tiny"] = "small",
    n: int = 1000,
    steps: int = 1000,
    batch: int = 64,
    counts: tuple[int, ...] = (10, 20, 50, 100, 1000),
    dtype: Precision = "fp32",
    device: str = "cpu",
    seed: int = 0,
) -> None:
    """Measure the rows that are not there yet.

    Args:
        data: a folder of class folders; left out, CIFAR-10 is downloaded into ./data.
        study: targets or steps.
        model: the model folder that study `steps` draws with.
        out: folder for everything written.
        preset: the recipe of cifar_ddpm.py that study `targets` trains.
        n: samples for each distance.
        steps: training steps of each target.
        batch: pictures in a training step.
        counts: numbers of sampling steps.
        dtype: precision to compute in; bf16 is faster where the processor has it.
        device: auto, cpu or cuda.
        seed: everything random follows from it.
    """
    autocast = None if dtype == "fp32" else DTYPES[dtype]
    options = Options(out, n, steps, batch, autocast, pick_device(device), seed)
    if study == "steps" and model is None:
        raise UserError("study `steps` draws with a model; name its folder with --model.")
    pixels, labels = load_all(ClassFolder(data), 32) if data else cifar10("data")
    distance = Distance(pixels, n)
    if study == "targets":
        table, both = Table(out / "targets.csv", ("target", "loss")), (pixels, labels)
        for target in TARGETS:
            key = {"target": target, "steps": steps, "batch": batch, "n": n, "seed": seed}
            table.row(key, partial(learn, target, PRESETS[preset], both, distance, options))
        print(plot(table, "target", "target", out / "targets.png"))
    else:
        table, drawer = Table(out / "steps.csv", ("sampler",)), LatentDiffusion.load(model, device)
        for count in counts:
            for sampler in ("ddpm", "ddim"):
                key = {"sampler": sampler, "steps": count, "n": n, "seed": seed}
                table.row(key, partial(draw, drawer, sampler, count, distance, options))
        print(plot(table, "steps", "sampler", out / "steps.png"))
    print(write_results(out, study=study, n=n, seed=seed, rows=table.rows))


if __name__ == "__main__":
    run(main, OUTPUTS)
