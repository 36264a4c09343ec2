"""What fine-tuning learns from: groups of examples, endless batches of them, and their loss.

Everything random about batch k follows from (seed, k).

[1] Ho, Salimans. Classifier-Free Diffusion Guidance. 2022. arXiv:2207.12598
[2] Ruiz et al. DreamBooth: Fine Tuning Text-to-Image Diffusion Models for Subject-Driven
    Generation. 2022. arXiv:2208.12242
"""

import random
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float, Shaped
from torch import Generator, Tensor

from minidiff.condition import Condition, Context, apply
from minidiff.data import buckets
from minidiff.data.folder import CaptionedImages, upright_size
from minidiff.data.latents import Example, encode_images
from minidiff.denoiser import Denoiser
from minidiff.latent_diffusion import LatentDiffusion
from minidiff.options.sampling import Corner, SampleConfig, Size
from minidiff.schedules import NoiseSchedule
from minidiff.train import Loss
from minidiff.training.device import to_device
from minidiff.training.seeds import generator_of, seed_of

NO_NUMBERS = torch.empty(0, 0)


class Group(NamedTuple):
    """Examples with one weight: all of them, or DreamBooth's subject or class ([2] eq. 2)."""

    name: str
    examples: list[Example]
    weight: float = 1.0


class Part(NamedTuple):
    """The share of one group in a batch, with everything random about it."""

    group: str
    weight: float
    latents: Float[Tensor, "B Z h w"]
    captions: list[str]  # "" where the caption is hidden
    t: Shaped[Tensor, "B"]
    eps: Float[Tensor, "B Z h w"]
    numbers: Float[Tensor, "B K"] = NO_NUMBERS  # of the Condition, where the network reads them


Batch = list[Part]  # one for each group


def encoded(
    model: LatentDiffusion,
    data: CaptionedImages,
    size: int,
    folder: Path | None,
    flip: bool = False,
    shapes: bool = False,
) -> list[Example]:
    """Captioned images as examples: squares of this side, or with shapes each in the bucket nearest
    to its shape. With flip mirrored copies follow. folder: where the latents are cached."""
    sizes, numbers, copies = [(size, size)] * len(data), [()] * len(data), 2 if flip else 1
    reads_sizes = bool(getattr(model.text, "numbers", ()))
    if shapes or reads_sizes:
        own = [upright_size(path) for path in data.paths]
    if shapes:
        multiple = model.vae.factor * model.unet.multiple
        sizes = [buckets.bucket(w, h, size**2, multiple) for h, w in own]
    if reads_sizes:
        numbers = [numbers_of(model, *each, cut) for each, cut in zip(own, sizes, strict=True)]
    latents = encode_images(model.vae, data.paths, sizes, folder, flip)
    rows = zip(latents, data.alternatives * copies, numbers * copies, strict=True)
    return [Example(z, first, tuple(others), row) for z, (first, *others), row in rows]


def numbers_of(
    model: LatentDiffusion, height: int, width: int, size: tuple[int, int]
) -> tuple[float, ...]:
    """What the network is told of an image with these sides that is scaled to cover a size and
    cut; () where it is told nothing."""
    crop = Corner(*buckets.corner(width, height, size))
    config = SampleConfig(original_size=Size(height, width), crop=crop)
    return tuple(config.numbers(getattr(model.text, "numbers", ()), Size(*size)))


def split(images: Sequence[Hashable], share: float, seed: int) -> tuple[list[int], list[int]]:
    """The indices of the examples (to train on, held out), where images[i] is the image of example
    i. This share of the images is held out, each with all its captions."""
    distinct = list(dict.fromkeys(images))
    apart = set(random.Random(f"held out {seed}").sample(distinct, int(share * len(distinct))))
    training = [i for i, image in enumerate(images) if image not in apart]
    return training, [i for i, image in enumerate(images) if image in apart]


def batches(
    groups: list[Group], schedule: NoiseSchedule, batch: int, dropout: float, seed: int, start: int
) -> Iterator[Batch]:
    """Batches start, start + 1, ...: `batch` examples of every group, those of a group of one shape
    (buckets.py). A caption is hidden with probability `dropout` ([1] algorithm 1)."""
    shapes = [[tuple(e.latents.shape[1:]) for e in group.examples] for group in groups]
    orders = [
        buckets.batches(each, batch, seed_of(seed, place), start)
        for place, each in enumerate(shapes)
    ]
    for k, *indices in zip(count(start), *orders, strict=False):
        generator = generator_of(seed, k)
        chosen = zip(groups, indices, strict=True)
        yield [_part(group, rows, schedule, dropout, generator) for group, rows in chosen]


def _part(
    group: Group, rows: list[int], schedule: NoiseSchedule, dropout: float, generator: Generator
) -> Part:
    """These examples of a group, with hidden captions, t and noise."""
    examples = [group.examples[i] for i in rows]
    latents = torch.stack([example.latents for example in examples])
    hidden = (torch.rand(len(examples), generator=generator) < dropout).tolist()
    t = schedule.sample_t(len(examples), generator)
    eps = torch.randn(latents.shape, generator=generator)
    captions = ["" if h else _caption(e, generator) for e, h in zip(examples, hidden, strict=True)]
    numbers = torch.tensor([example.numbers for example in examples], dtype=torch.float32)
    return Part(group.name, group.weight, latents, captions, t, eps, numbers)


def _caption(example: Example, generator: Generator) -> str:
    """The caption, or one of several."""
    if not example.others:
        return example.caption
    every = (example.caption, *example.others)
    return every[torch.randint(len(every), (), generator=generator)]


def pieces(batch: Batch, count: int) -> list[Batch]:
    """A batch cut into `count` of one size. The mean of their losses is the loss of the whole."""
    size = len(batch[0].t) // count
    return [[_cut(part, slice(i * size, (i + 1) * size)) for part in batch] for i in range(count)]


def _cut(part: Part, rows: slice) -> Part:
    names = ("latents", "captions", "t", "eps", "numbers")
    return part._replace(**{name: getattr(part, name)[rows] for name in names})


def with_numbers(context: Context, numbers: Float[Tensor, "_ K"]) -> Context:
    """A Condition with these numbers in place of its own; any other context as it is."""
    if not isinstance(context, Condition):
        return context
    return replace(context, numbers=to_device(numbers, context.pooled.device))


class GroupLoss:
    """The loss of a Batch: the sum over its groups of weight times mean, [2] eq. 2; for one group
    the loss of each example. Each group's losses stand beside it by name, without the weight."""

    def __init__(
        self,
        model: LatentDiffusion,
        contexts: dict[str, Float[Tensor, "L D"]] | None = None,
        denoiser: Denoiser | None = None,
    ):
        """contexts: of every caption. Default: encoded at every step, so that the text encoder can
        learn. denoiser: one with another weighting. Default: the model's own."""
        self.model, self.contexts, self.denoiser = model, contexts, denoiser or model.denoiser

    def __call__(self, batch: Batch) -> Loss:
        if len({part.latents.shape[1:] for part in batch}) == 1:
            losses = self._together(batch)
        else:
            losses = [self._together([part])[0] for part in batch]
        by_group = {part.group: loss for part, loss in zip(batch, losses, strict=True)}
        if len(batch) == 1:
            progress = self.model.schedule.progress(batch[0].t)
            return {"loss": batch[0].weight * losses[0], "progress": progress, **by_group}
        total = sum(part.weight * loss.mean() for part, loss in zip(batch, losses, strict=True))
        return {"loss": total[None], **by_group}  # eq: dreambooth-2

    def _together(self, parts: list[Part]) -> list[Float[Tensor, "B"]]:
        """The losses of parts of one shape, in one pass of the network."""
        device = self.model.device
        captions = [caption for part in parts for caption in part.captions]
        if self.contexts is None:
            context = self.model.text.encode(captions)
        else:
            rows = [self.contexts[caption] for caption in captions]
            context = apply(lambda *each: to_device(torch.stack(each), device), *rows)
        context = with_numbers(context, torch.cat([part.numbers for part in parts]))
        latents = to_device(torch.cat([part.latents for part in parts]), device)
        t = torch.cat([part.t for part in parts])
        eps = to_device(torch.cat([part.eps for part in parts]), device)
        losses = self.denoiser.loss(latents, context, t, eps)
        return list(losses.split([len(part.t) for part in parts]))
