"""The two trainings behind a training from scratch, of the VAE and of the denoiser: their batches,
their losses, how long a step takes, and the loop.

[1] Ho, Salimans. Classifier-Free Diffusion Guidance. 2022. arXiv:2207.12598
"""

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from itertools import count, islice, pairwise
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from minidiff.checkpoints.folder import DTYPES
from minidiff.condition import apply
from minidiff.data import buckets
from minidiff.data.folder import to_model
from minidiff.latent_diffusion import LatentDiffusion
from minidiff.options.training import TrainingConfig
from minidiff.recipes.images import Images
from minidiff.recipes.presets import PRESETS
from minidiff.schedules import NoiseSchedule
from minidiff.train import EMA, Loss, LossFn, TrainConfig, TrainStep, train
from minidiff.training.progress import follow
from minidiff.training.seeds import generator_of, seed_of
from minidiff.vae import VAE

VAE_LR = 0.024  # divided by the VAE's width


class Batch(NamedTuple):
    """Examples, with all that is random about them."""

    x0: Float[Tensor, "B Z h w"]
    captions: list[str]  # "" where the caption is dropped
    t: Int[Tensor, "B"]
    eps: Float[Tensor, "B Z h w"]


class Examples(NamedTuple):
    """What is denoised: images as bytes, or latents; and the captions of each."""

    x0: Tensor
    captions: list[list[str]]
    flip: bool  # mirror half of them (latents are mirrored before: see encode_images)

    def chosen(self, rows: list[int], generator: torch.Generator) -> tuple[Tensor, list[str]]:
        """These examples in the range of the model, each with one of its captions."""
        x0 = self.x0[rows]
        x0 = to_model(x0) if x0.dtype == torch.uint8 else x0
        if self.flip:
            mirrored = torch.rand(len(rows), generator=generator) < 0.5
            x0[mirrored] = x0[mirrored].flip(-1)
        own = (self.captions[row] for row in rows)
        every = [c[torch.randint(len(c), (), generator=generator)] for c in own]
        return x0, every


def rows(n: int, batch: int, seed: int, start: int) -> Iterator[list[int]]:
    """Which of n images make batch start, start + 1, ...: all of them once an epoch."""
    return buckets.batches([(1, 1)] * n, batch, seed, start)


def batches(
    schedule: NoiseSchedule, examples: Examples, config: TrainingConfig, pieces: int, start: int
) -> Iterator[Batch]:
    """Batches start, start + 1, ..., each in so many pieces; batch k follows from (seed, k). A
    caption is dropped with probability config.dropout, [1] algorithm 1."""
    orders = rows(len(examples.x0), config.batch, seed_of(config.seed, 0), start)
    for k, order in zip(count(start), orders, strict=False):
        generator = generator_of(config.seed, k)
        x0, captions = examples.chosen(order, generator)
        t = schedule.sample_t(len(x0), generator)
        eps = torch.randn(x0.shape, generator=generator)
        dropped = (torch.rand(len(x0), generator=generator) < config.dropout).tolist()
        captions = ["" if drop else c for c, drop in zip(captions, dropped, strict=True)]
        for p in range(pieces):
            part_of = slice(p * len(x0) // pieces, (p + 1) * len(x0) // pieces)
            yield Batch(x0[part_of], captions[part_of], t[part_of], eps[part_of])


class ModelLoss:
    """The denoiser's loss of each example of a Batch, and where its t lies."""

    def __init__(self, model: LatentDiffusion, contexts: dict[str, Tensor] | None):
        """contexts: of every caption, from a text encoder that is not trained."""
        self.model, self.contexts = model, contexts

    def __call__(self, batch: Batch) -> Loss:
        x0, eps = (x.to(self.model.device) for x in (batch.x0, batch.eps))
        if self.contexts is None:
            context = self.model.text.encode(batch.captions)
        else:
            rows = [self.contexts[caption] for caption in batch.captions]
            context = apply(lambda *each: torch.stack(each).to(x0), *rows)
        x0 = x0.contiguous(memory_format=torch.channels_last)
        each = self.model.denoiser.loss(x0, context, batch.t, eps)
        return {"loss": each, "progress": self.model.schedule.progress(batch.t)}


def vae_loss(vae: VAE, images: Images, chosen: list[int]) -> Loss:
    pixels = to_model(images.pixels[[images.training[i] for i in chosen]])
    device = next(vae.parameters()).device
    return {"loss": vae.loss(pixels.to(device, memory_format=torch.channels_last))}


class Stage(NamedTuple):
    """One training: of the VAE, or of the denoiser with the text encoder."""

    name: str
    loss: LossFn
    module: nn.Module
    batches: Callable[[int], Iterator[Any]]
    batch: int
    config: TrainConfig

    def seconds(self) -> float:
        """What a step takes here, from a few whose result is thrown away."""
        weights, times = copy.deepcopy(self.module.state_dict()), []
        with closing(train(self.loss, self.module, self.batches, self.config)) as steps:
            for _ in islice(steps, 4):
                times.append(time.perf_counter())
                if len(times) > 1 and times[-1] - times[0] > 5:
                    break
        self.module.load_state_dict(weights)
        return median(b - a for a, b in pairwise(times)) if len(times) > 1 else 0.0

    def run(
        self,
        out: Path,
        resume: bool,
        ema: EMA | None = None,
        draw: Callable[[int], None] | None = None,
    ) -> dict[str, float | None]:
        """Train behind a bar, and call draw(step) after every step; returns the speed."""
        folder = out / "training" / self.name
        steps = train(self.loss, self.module, self.batches, self.config, ema, folder, resume)
        return follow(observed(steps, draw), self.name, self.config.steps, self.batch)


def observed(steps: Iterator[TrainStep], draw: Callable[[int], None] | None) -> Iterator[TrainStep]:
    with closing(steps):
        for step in steps:
            if draw is not None:
                draw(step.step)
            yield step


def train_config(config: TrainingConfig, steps: int, lr: float, pieces: int = 1) -> TrainConfig:
    return TrainConfig(
        steps=steps,
        lr=lr,
        warmup=min(100, steps // 10),
        pieces=pieces,
        threads=min(pieces, torch.get_num_threads()),
        autocast=None if config.dtype == "fp32" else DTYPES[config.dtype],
        seed=config.seed,
        save_every=min(500, config.every or 500),
    )


def vae_stage(model: LatentDiffusion, images: Images, config: TrainingConfig) -> Stage:
    row = PRESETS[config.space, config.preset]
    loss, batch = partial(vae_loss, model.vae, images), row.vae_batch
    data = partial(rows, len(images.training), batch, seed_of(config.seed, 1))
    training = train_config(config, config.vae_steps or 1000, VAE_LR / row.vae_width)
    return Stage("vae", loss, model.vae, data, batch, training)


def model_stage(
    model: LatentDiffusion,
    examples: Examples,
    config: TrainingConfig,
    contexts: dict[str, Tensor] | None = None,
) -> Stage:
    parts = {"denoiser": model.denoiser}
    if config.text is None and model.text.dim is not None:
        parts["text"] = model.text
    # two halves of a batch, on two cores; the number of cores must not matter
    pieces = 2 if model.device.type == "cpu" and config.batch % 2 == 0 else 1
    data = partial(batches, model.schedule, examples, config, pieces)
    training = train_config(config, config.steps or 1000, config.lr, pieces)
    loss, module = ModelLoss(model, contexts), nn.ModuleDict(parts)
    return Stage("model", loss, module, data, config.batch, training)
