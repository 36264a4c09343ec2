"""What fine-tuning learns from: groups of examples, the endless batches of them, and the loss over groups, are all in this file.

All that is random about batch k follows from (seed, k).

[1] Ho, Salimans. Classifier-Free Diffusion Guidance. 2022. arXiv:2207.12598
[2] Ruiz et al. DreamBooth: Fine Tuning Text-to-Image Diffusion Models for Subject-Driven Generation. 2022. arXiv:2208.12242
"""

import random
from collections.abc import Iterator
from itertools import count
from typing import NamedTuple

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from minidiff.data import buckets
from minidiff.data.latents import Example
from minidiff.denoiser import Denoiser
from minidiff.latent_diffusion import LatentDiffusion
from minidiff.schedules import NoiseSchedule
from minidiff.train import LossFn, seed_of


class Group(NamedTuple):
    """Examples that weigh together. Fine-tuning has one group; DreamBooth has its subject, and its class with a weight of its own ([2] eq. 2)."""

    name: str
    examples: list[Example]
    weight: float = 1.0


class Part(NamedTuple):
    """What a batch has of one group, with all that is random about it."""

    group: str
    weight: float
    latents: Float[Tensor, "B Z h w"]
    captions: list[str]  # "" where the caption is hidden
    t: Shaped[Tensor, "B"]
    eps: Float[Tensor, "B Z h w"]


class Batch(NamedTuple):
    number: int  # counted from 0, over all steps
    parts: list[Part]


def split(n: int, share: float, seed: int) -> tuple[list[int], list[int]]:
    """The numbers below n as (to train on, held out): a seeded choice of this share, rounded down."""
    held = sorted(random.Random(f"held out {seed}").sample(range(n), int(share * n)))
    return [i for i in range(n) if i not in set(held)], held


def batches(
    groups: list[Group], schedule: NoiseSchedule, batch: int, dropout: float, seed: int, start: int
) -> Iterator[Batch]:
    """Batches start, start + 1, ...: `batch` examples of every group, those of a group of one shape (buckets.py). A caption is hidden with
    probability `dropout` ([1] algorithm 1)."""
    orders = [
        buckets.batches(
            [tuple(e.latents.shape[1:]) for e in group.examples], batch, seed_of(seed, place), start
        )
        for place, group in enumerate(groups)
    ]
    for k, *chosen in zip(count(start), *orders, strict=False):
        generator, parts = torch.Generator().manual_seed(seed_of(seed, k)), []
        for group, indices in zip(groups, chosen, strict=True):
            latents = torch.stack([group.examples[i].latents for i in indices])
            hidden = (torch.rand(batch, generator=generator) < dropout).tolist()
            captions = [
                "" if h else group.examples[i].caption for i, h in zip(indices, hidden, strict=True)
            ]
            t = schedule.sample_t(batch, generator)
            parts.append(
                Part(
                    group.name,
                    group.weight,
                    latents,
                    captions,
                    t,
                    torch.randn(latents.shape, generator=generator),
                )
            )
        yield Batch(k, parts)


def loss(
    model: LatentDiffusion,
    contexts: dict[str, Float[Tensor, "L D"]] | None = None,
    denoiser: Denoiser | None = None,
    seen: dict[int, dict[str, Tensor]] | None = None,
) -> LossFn:
    """The loss of a Batch: the sum over its groups of weight times the group's mean, [2] eq. 2. A batch of one group gives a loss for each
    example, of several that sum alone, as one number.

    contexts: what the text tower says of every caption; None asks it anew, so that it can learn too. denoiser: the model's own, unless another
    weighting is wanted. seen: where the group's means go, by the batch's number, for whoever shows them.
    """
    denoiser, device = denoiser or model.denoiser, model.device

    def together(parts: list[Part]) -> list[Float[Tensor, "B"]]:
        captions = [caption for part in parts for caption in part.captions]
        context = (
            model.text.encode(captions)
            if contexts is None
            else torch.stack([contexts[caption] for caption in captions]).to(device)
        )
        latents, t, eps = (
            torch.cat([getattr(part, name) for part in parts]) for name in ("latents", "t", "eps")
        )
        each = denoiser.loss(latents.to(device), context, t, eps.to(device))
        return list(each.split([len(part.t) for part in parts]))

    def of_batch(batch: Batch) -> tuple[Tensor, Tensor | None]:
        alike = (
            len({part.latents.shape[1:] for part in batch.parts}) == 1
        )  # then one pass of the network does for all groups
        losses = (
            together(batch.parts)
            if alike
            else [each for part in batch.parts for each in together([part])]
        )
        if seen is not None:
            seen[batch.number] = {
                part.group: each.detach().mean()
                for part, each in zip(batch.parts, losses, strict=True)
            }
        if len(batch.parts) == 1:
            return batch.parts[0].weight * losses[0], model.schedule.progress(batch.parts[0].t)
        return sum(
            part.weight * each.mean() for part, each in zip(batch.parts, losses, strict=True)
        )[None], None

    return of_batch
