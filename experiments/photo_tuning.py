"""What the fine-tunes of photographs have in common (finetune_coco100.py, dreambooth_photos.py):
pictures squeezed into a square, so that nothing of them is cut off; the precision in which a
processor is fast; the time, told beforehand; which picture a sample is nearest to; and a sheet of
pictures with a caption over each column."""

import contextlib
import copy
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from matplotlib.figure import Figure
from torch import Tensor

from minidiff import pipeline
from minidiff.data.folder import load_image, to_model
from minidiff.evaluation import features
from minidiff.figures import curves
from minidiff.finetuning.groups import Group, GroupLoss, batches
from minidiff.finetuning.loop import DTYPES, to_train, trained_word
from minidiff.latent_diffusion import LatentDiffusion
from minidiff.options.finetuning import FineTuneConfig, Precision
from minidiff.options.sampling import SampleConfig
from minidiff.training.device import plain_attention
from minidiff.training.progress import duration

Images = Float[Tensor, "_ 3 _ _"]
Chosen = Literal["auto", "fp32", "bf16"]
COLUMN = 0.95  # inches


def squeezed(path: Path, size: int) -> Float[Tensor, "3 S S"]:
    """A picture of any shape as a square, whole: squeezed, not cut."""
    image = to_model(load_image(path))[None]
    return F.interpolate(image, (size, size), mode="bicubic", antialias=True)[0].clamp(-1, 1)


def precision(chosen: Chosen) -> Precision:
    """auto: bf16 where the processor computes in it, else fp32."""
    native = getattr(torch.cpu, "_is_avx512_bf16_supported", bool)
    return chosen if chosen != "auto" else "bf16" if native() else "fp32"


@contextlib.contextmanager
def computing(device: str, dtype: Precision) -> Iterator[None]:
    """The attention that is fast in this precision (pretrain_photos.py)."""
    with plain_attention(device, DTYPES[dtype]):
        yield


def drawn(
    model: LatentDiffusion, prompts: list[str], dtype: Precision, steps: int, seed: int
) -> Images:
    """A sample of each prompt, from the same noise whatever the model."""
    kind, config = model.device.type, SampleConfig(steps, seed=seed)
    with torch.autocast(kind, DTYPES[dtype], enabled=dtype != "fp32"):
        return pipeline.generate(model, prompts, config, progress=True).float().cpu()


def tell(title: str, model: LatentDiffusion, groups: list[Group], config: FineTuneConfig) -> None:
    """How long a fine-tune takes, by one step of a copy of the model."""
    model = copy.deepcopy(model)
    word = trained_word(model, config)
    trained = to_train(model, model.denoiser, config, word)
    if word is not None:
        word.attach(model.text)
    loss, seconds = GroupLoss(model), []
    batch = next(batches(groups, model.schedule, config.batch, 0.0, config.seed, 0))
    for _ in range(2):  # the first is slower
        start = time.perf_counter()
        with torch.autocast(model.device.type, DTYPES[config.dtype], config.dtype != "fp32"):
            result = loss(batch)["loss"].mean()
        result.backward()
        seconds.append(time.perf_counter() - start)
    count = sum(p.numel() for p in trained.parameters() if p.requires_grad)
    told = duration(1.15 * config.steps * seconds[-1])  # and the optimizer, and the recorder
    print(f"{title}: about {told} for {config.steps} steps of {count:,} weights", flush=True)


def nearest(images: Images, among: Images, network: str = "pixels-8x8") -> list[int]:
    """Which of these pictures each image is nearest to, in the features of a network."""
    return (
        torch.cdist(features.features(network, images), features.features(network, among))
        .argmin(1)
        .tolist()
    )


def share_own(images: Images, own: list[int], among: Images, network: str) -> float:
    """The share of images that are nearer to their own picture than to all others."""
    right = [a == b for a, b in zip(nearest(images, among, network), own, strict=True)]
    return round(sum(right) / len(right), 3)


def sheet(
    rows: dict[str, Images],
    captions: list[str],
    path: Path,
    marks: dict[str, list[bool]] | None = None,
) -> Path:
    """Rows of pictures with a caption over each column. marks: of some rows, which pictures get a
    green frame."""
    with curves.style():
        lines = [textwrap.fill(caption, 17) for caption in captions]
        above = 0.13 * max(text.count("\n") + 2.5 for text in lines)
        size = (COLUMN * (len(captions) + 1), COLUMN * len(rows) + above)
        figure = Figure(size, layout="constrained")
        figure.get_layout_engine().set(w_pad=0.015, h_pad=0.015, wspace=0, hspace=0)
        grid = figure.subplots(len(rows), len(captions), squeeze=False)
        for axes, (name, images) in zip(grid, rows.items(), strict=True):
            right = (marks or {}).get(name, [False] * len(captions))
            for axis, image, good in zip(axes, images, right, strict=True):
                axis.imshow((image.permute(1, 2, 0).clamp(-1, 1) + 1) / 2, interpolation="nearest")
                axis.set(xticks=[], yticks=[])
                for spine in axis.spines.values():
                    spine.set(visible=good, color=curves.COLOURS[2], linewidth=2)
            label = textwrap.fill(name, 16)
            axes[0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=7)
        for axis, text in zip(grid[0], lines, strict=True):
            axis.set_title(text, fontsize=6)
        return curves.save(figure, path)
