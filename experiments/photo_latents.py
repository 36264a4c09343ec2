"""What pretrain_photos.py learns from and is measured by: latents with captions, a loss on held-out
ones, the judge's verdicts, and the curve of both against operations.

[1] Esser et al. Scaling Rectified Flow Transformers for High-Resolution Image Synthesis. 2024.
    arXiv:2403.03206
"""

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float, Shaped
from photo_parts import Photos
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from minidiff import pipeline
from minidiff.data import buckets
from minidiff.data.folder import to_model
from minidiff.data.latents import fingerprint
from minidiff.evaluation import features
from minidiff.latent_diffusion import LatentDiffusion
from minidiff.options.sampling import SampleConfig
from minidiff.train import Loss
from minidiff.training import atomic
from minidiff.training.seeds import generator_of

Latents = Float[Tensor, "B Z h w"]
DRAWN_STEPS = 25
T_CENTRE = 0.4  # of logit(t): what a picture shows is decided where there is much noise
COLUMNS = ("stretch", "step", "images", "tflop", "held_out_loss", "accuracy", "n")


class LatentBatch(NamedTuple):
    """A batch with all that is random about it."""

    latents: Latents
    captions: list[str]  # "" where the caption is dropped
    t: Shaped[Tensor, "B"]
    eps: Latents


@dataclass(frozen=True)
class Stored:
    """Latents of photographs and of their mirror images, in float16, and the captions of each."""

    latents: Float[Tensor, "two N Z h w"]
    captions: list[list[str]]
    labels: list[str] | None

    def batches(self, batch: int, dropout: float, seed: int, start: int) -> Iterator[LatentBatch]:
        """Batches start, start + 1, ...; t is logit-normal ([1] section 3.1) and stratified."""
        orders = buckets.batches([(1, 1)] * len(self.captions), batch, seed, start)
        for k, rows in zip(count(start), orders, strict=False):
            generator = generator_of(seed, k)
            mirrored = torch.randint(2, (len(rows),), generator=generator)
            x0 = self.latents[mirrored, rows].float()
            chosen = torch.rand(len(rows), generator=generator).tolist()
            captions = [
                self.captions[row][int(u * len(self.captions[row]))]
                for row, u in zip(rows, chosen, strict=True)
            ]
            dropped = (torch.rand(len(rows), generator=generator) < dropout).tolist()
            captions = ["" if d else text for d, text in zip(dropped, captions, strict=True)]
            u = torch.arange(len(rows)) + torch.rand(len(rows), generator=generator)
            u = (u / len(rows)).double().clamp(1e-6, 1 - 1e-6)
            t = torch.sigmoid(T_CENTRE + torch.special.ndtri(u)).float()
            yield LatentBatch(x0, captions, t, torch.randn(x0.shape, generator=generator))


@torch.no_grad()
def stored(model: LatentDiffusion, of: Photos, file: Path, dtype: torch.dtype | None) -> Stored:
    """Photographs encoded once; from the file, where it has those of this VAE."""
    key = f"{fingerprint(model.vae)} {len(of.pixels)} {of.pixels.sum(dtype=torch.long).item()}"
    if file.exists():
        content = load_file(file)
        if key in content:
            return Stored(content[key], of.captions, of.labels)
    both = []
    for mirrored in (False, True):
        parts = []
        for some in tqdm(of.pixels.split(64), f"encoding {file.stem}"):
            images = to_model(some.flip(-1) if mirrored else some)
            images = images.to(model.device, memory_format=torch.channels_last)
            with torch.autocast(model.device.type, dtype, enabled=dtype is not None):
                parts.append(model.vae.encode(images).to(torch.float16).cpu().contiguous())
        both.append(torch.cat(parts))
    latents = torch.stack(both)
    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic.write(file) as new:
        save_file({key: latents}, new)
    return Stored(latents, of.captions, of.labels)


class ModelLoss:
    """The denoiser's loss of each example; the text encoder is frozen, so a caption is encoded
    once."""

    def __init__(self, model: LatentDiffusion):
        self.model, self.contexts = model, {}

    def context(self, captions: list[str]) -> Float[Tensor, "B L D"]:
        new = sorted(set(captions) - self.contexts.keys())
        if new:
            with torch.no_grad():
                self.contexts |= dict(zip(new, self.model.text.encode(new).float(), strict=True))
        return torch.stack([self.contexts[caption] for caption in captions])

    def __call__(self, batch: LatentBatch) -> Loss:
        device = self.model.device
        x0, eps, context = (
            each.to(device) for each in (batch.latents, batch.eps, self.context(batch.captions))
        )
        each = self.model.denoiser.loss(x0, context, batch.t, eps)
        return {"loss": each, "progress": self.model.schedule.progress(batch.t)}


@torch.no_grad()
def held_out_loss(model: LatentDiffusion, of: Stored) -> float:
    """The mean loss of latents never trained on, at the same times and noise whenever it is
    measured: t spread evenly over (0, 1)."""
    loss, n, parts = ModelLoss(model), len(of.captions), []
    t = (torch.randperm(n, generator=generator_of(0, 1)) + 0.5) / n
    eps = torch.randn(of.latents[0].shape, generator=generator_of(0, 2))
    for rows in torch.arange(n).split(64):
        captions = [of.captions[row][0] for row in rows.tolist()]
        batch = LatentBatch(of.latents[0, rows].float(), captions, t[rows], eps[rows])
        parts.append(loss(batch)["loss"])
    return round(torch.cat(parts).mean().item(), 6)


class Samples(NamedTuple):
    images: Float[Tensor, "n 3 S S"]
    captions: list[str]
    verdicts: list[bool]


def judged(model: LatentDiffusion, of: Stored, each: int, seed: int) -> Samples | None:
    """`each` samples of every thing, and whether the judge takes them for it; None without
    labels."""
    if of.labels is None or not each:
        return None
    by_label = dict(zip(of.labels, (own[0] for own in of.captions), strict=True))
    labels = sorted(by_label) * each
    prompts = [by_label[label] for label in labels]
    images = pipeline.generate(model, prompts, SampleConfig(DRAWN_STEPS, seed=seed)).float().cpu()
    guesses = features.photo_things(images)
    return Samples(images, prompts, [a == b for (a,), b in zip(guesses, labels, strict=True)])


def read_curve(file: Path | None) -> list[dict[str, str]]:
    if file is None or not file.exists():
        return []
    with file.open(encoding="utf-8", newline="") as text:
        return list(csv.DictReader(text))


def write_curve(rows: list[dict], file: Path) -> Path:
    with atomic.write(file) as new, new.open("w", encoding="utf-8", newline="") as text:
        writer = csv.DictWriter(text, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    return file


class Curve:
    """Quality against operations: the rows of earlier stretches, and a new one whenever it is
    asked."""

    def __init__(self, before: list[dict[str, str]], file: Path, tflop: float):
        """tflop: of what this stretch did before its U-Net."""
        own = read_curve(file)[len(before) :]  # of a run that is resumed
        self.before, self.rows, self.file = before, own, file
        self.stretch = 1 + int(before[-1]["stretch"]) if before else 1
        self.tflop = tflop + (float(before[-1]["tflop"]) if before else 0.0)
        self.images = int(before[-1]["images"]) if before else 0

    def add(
        self, step: int, batch: int, flops: int, loss: float, verdicts: list[bool]
    ) -> dict[str, object]:
        """A row for the U-Net's step; batch, flops: pictures and operations of one."""
        accuracy = round(sum(verdicts) / len(verdicts), 4) if verdicts else ""
        row = {
            "stretch": self.stretch,
            "step": step,
            "images": self.images + step * batch,
            "tflop": round(self.tflop + step * flops / 1e12, 2),
            "held_out_loss": loss,
            "accuracy": accuracy,
            "n": len(verdicts),
        }
        self.rows = [each for each in self.rows if int(each["step"]) < step] + [row]
        write_curve([*self.before, *self.rows], self.file)
        return row
