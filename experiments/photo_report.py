"""What a model of photographs is worth, by the judge that had no part in it.

    python experiments/photo_report.py --data photos --model minidiff/photos --each 20

Class accuracy, Fréchet distance, kernel distance, precision, recall and copies, all in the judge's
features. Each has a floor: what as many training pictures have in the samples' place. Writes
samples.png, nearest.png (samples above the training pictures nearest to them) and results.json.

[1] Heusel et al. GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash
    Equilibrium. 2017. arXiv:1706.08500
[2] Binkowski et al. Demystifying MMD GANs. 2018. arXiv:1801.01401
[3] Kynkäänniemi et al. Improved Precision and Recall Metric for Assessing Generative Models. 2019.
    arXiv:1904.06991
"""

import contextlib
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float, UInt8
from photo_judge import pictures as pictures_of
from photo_parts import phrasings
from torch import Tensor

from minidiff import pipeline
from minidiff.cli.script import run
from minidiff.data.folder import to_model
from minidiff.evaluation import features, metrics
from minidiff.evaluation.metrics import Moments, Score
from minidiff.figures import plots
from minidiff.latent_diffusion import LatentDiffusion
from minidiff.options.finetuning import Precision
from minidiff.options.sampling import SampleConfig
from minidiff.training.device import plain_attention
from minidiff.training.progress import write_results
from minidiff.training.seeds import generator_of

COPY = 0.01  # the share of held-out pictures that count as copies: the nearest to a training one


class Measured(NamedTuple):
    """Of pictures in the samples' place."""

    accuracy: Score
    frechet: float
    kernel: Score
    precision: Score
    recall: Score
    copies: Score


def of_pixels(pixels: UInt8[Tensor, "N 3 S S"]) -> Float[Tensor, "N D"]:
    """Features by the judge, a few at a time."""
    return torch.cat([features.photos(to_model(some)) for some in pixels.split(200)])


class Real(NamedTuple):
    """Features of real pictures."""

    train: Float[Tensor, "N D"]
    held_out: Float[Tensor, "M D"]

    def measure(self, fake: Float[Tensor, "n D"], right: list[bool], apart: int) -> Measured:
        """right: whether the judge takes each picture for its thing. apart: leave out this many of
        the nearest training pictures: 1 where the pictures are training ones themselves."""
        usual = metrics.nearest(self.held_out, self.train)[0][:, 0].quantile(COPY)
        distance = metrics.nearest(fake, self.train, 1 + apart)[0][:, apart]
        seeded = [generator_of(0, k) for k in range(5)]
        return Measured(
            metrics.bootstrap(torch.tensor(right).double(), seeded[0]),
            metrics.frechet(Moments().add(fake), Moments().add(self.held_out)),
            metrics.kid(fake, self.held_out, seeded[1]),
            metrics.bootstrap(metrics.precision(self.held_out, fake), seeded[2]),
            metrics.bootstrap(metrics.recall(self.held_out, fake), seeded[3]),
            metrics.bootstrap((distance <= usual).double(), seeded[4]),
        )


def rows_of(measured: Measured) -> dict[str, list[float] | float]:
    """Numbers, each with its 95 % interval where one is known."""
    return {
        name: [round(x, 4) for x in value] if isinstance(value, Score) else round(value, 4)
        for name, value in measured._asdict().items()
    }


def right_of(images: Float[Tensor, "n 3 S S"], labels: list[str]) -> list[bool]:
    return [a == b for (a,), b in zip(features.photo_things(images), labels, strict=True)]


OUTPUTS = ("samples.png", "nearest.png")  # beside results.json


def main(
    data: Path,
    model: Path,
    out: Path = Path("out/photo_report"),
    each: int = 20,
    steps: int = 25,
    guidance: float | None = None,
    dtype: Precision = "fp32",
    seed: int = 0,
) -> None:
    """Draw, and measure.

    Args:
        data: a folder with train-*.tar and held_out-*.tar.
        model: the model folder.
        out: folder for everything written.
        each: samples of each thing.
        steps: of sampling.
        guidance: how strongly the caption steers. Default: the model's own.
        dtype: precision to sample in.
        seed: everything random follows from it.
    """
    torch.set_num_threads(1)
    train, held_out = (pictures_of(data, part) for part in ("train", "held_out"))
    drawer = LatentDiffusion.load(model)
    labels = sorted(set(train.labels)) * each
    prompts = [phrasings(label)[0] for label in labels]
    config = SampleConfig(steps, guidance, seed=seed)
    with contextlib.ExitStack() as stack:
        if dtype == "bf16":
            stack.enter_context(torch.autocast("cpu", torch.bfloat16))
            stack.enter_context(plain_attention("cpu", torch.bfloat16))
        images = pipeline.generate(drawer, prompts, config, progress=True).float().cpu()

    right = right_of(images, labels)
    fake = torch.cat([features.photos(some) for some in images.split(200)])
    real = Real(of_pixels(train.pixels), of_pixels(held_out.pixels))
    order = torch.randperm(len(train.labels), generator=generator_of(seed, 1))[: len(labels)]
    chosen = [train.labels[row] for row in order.tolist()]
    floor = real.measure(real.train[order], right_of(to_model(train.pixels[order]), chosen), 1)
    true = right_of(to_model(held_out.pixels), held_out.labels)

    shown = list(range(min(24, len(labels))))
    captions, marks = [prompts[k] for k in shown], [right[k] for k in shown]
    print(plots.grid(images[shown], captions, out / "samples.png", 8, marks=marks))
    like = metrics.nearest(fake[shown[:8]], real.train)[1][:, 0]
    pairs = torch.cat([images[shown[:8]], to_model(train.pixels[like])])
    words = [*captions[:8], *(f"nearest: {train.labels[row]}" for row in like.tolist())]
    print(plots.grid(pairs, words, out / "nearest.png", len(like)))
    results = {
        "n": len(labels),
        "accuracy_real_held_out": round(sum(true) / len(true), 4),
        "model": rows_of(real.measure(fake, right, 0)),
        "training_pictures": rows_of(floor),
    }
    settings = {"steps": steps, "guidance": guidance or drawer.guidance, "seed": seed}
    print(write_results(out, **settings, **results))
    print(*(f"{name}: {value}" for name, value in results["model"].items()), sep="\n")


if __name__ == "__main__":
    run(main, OUTPUTS)
