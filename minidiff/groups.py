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

from minidiff import buckets
from minidiff.cache import Example
from minidiff.denoiser import Denoiser
from minidiff.latent_diffusion import LatentDiffusion
from minidiff.schedules import NoiseSchedule
from minidiff.train import Loss, seed_of


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


Batch = list[Part]  # one for each group


def split(n: int, share: float, seed: int) -> tuple[list[int], list[int]]:
    """The numbers below n as (to train on, held out): a seeded choice of this share, rounded down."""
    held = sorted(random.Random(f"held out {seed}").sample(range(n), int(share * n)))
    return [i for i in range(n) if i not in set(held)], held


def batches(groups: list[Group], schedule: NoiseSchedule, batch: int, dropout: float, seed: int, start: int) -> Iterator[Batch]:
    """Batches start, start + 1, ...: `batch` examples of every group, those of a group of one shape (buckets.py). A caption is hidden with
    probability `dropout` ([1] algorithm 1)."""
    orders = [
        buckets.batches([tuple(e.latents.shape[1:]) for e in group.examples], batch, seed_of(seed, place), start)
        for place, group in enumerate(groups)
    ]
    for k, *chosen in zip(count(start), *orders, strict=False):
        generator, parts = torch.Generator().manual_seed(seed_of(seed, k)), []
        for group, indices in zip(groups, chosen, strict=True):
            latents = torch.stack([group.examples[i].latents for i in indices])
            hidden = (torch.rand(batch, generator=generator) < dropout).tolist()
            captions = ["" if h else group.examples[i].caption for i, h in zip(indices, hidden, strict=True)]
            t = schedule.sample_t(batch, generator)
            parts.append(Part(group.name, group.weight, latents, captions, t, torch.randn(latents.shape, generator=generator)))
        yield parts


def pieces(batch: Batch, count: int) -> list[Batch]:
    """A batch cut into `count` of one size. The mean of their losses is the loss of the whole."""
    size = len(batch[0].t) // count
    return [[_cut(part, slice(i * size, (i + 1) * size)) for part in batch] for i in range(count)]


def _cut(part: Part, rows: slice) -> Part:
    return part._replace(latents=part.latents[rows], captions=part.captions[rows], t=part.t[rows], eps=part.eps[rows])


class GroupLoss:
    """The loss of a Batch: the sum over its groups of weight times the group's mean, [2] eq. 2. A batch of one group gives a loss for each
    example, of several that sum alone, as one number. Beside it stand the losses of each group, by its name and without its weight."""

    def __init__(self, model: LatentDiffusion, contexts: dict[str, Float[Tensor, "L D"]] | None = None, denoiser: Denoiser | None = None):
        """contexts: what the text encoder says of every caption; None asks it anew, so that it can learn too. denoiser: the model's own, unless
        another weighting is wanted."""
        self.model, self.contexts, self.denoiser = model, contexts, denoiser or model.denoiser

    def __call__(self, batch: Batch) -> Loss:
        alike = len({part.latents.shape[1:] for part in batch}) == 1  # then one pass of the network does for all groups
        each = self._together(batch) if alike else [loss for part in batch for loss in self._together([part])]
        groups = {part.group: loss for part, loss in zip(batch, each, strict=True)}
        if len(batch) == 1:
            return {"loss": batch[0].weight * each[0], "progress": self.model.schedule.progress(batch[0].t), **groups}
        return {"loss": sum(part.weight * loss.mean() for part, loss in zip(batch, each, strict=True))[None], **groups}

    def _together(self, parts: list[Part]) -> list[Float[Tensor, "B"]]:
        """The losses of parts of one shape."""
        captions, device = [caption for part in parts for caption in part.captions], self.model.device
        contexts = self.contexts
        context = self.model.text.encode(captions) if contexts is None else torch.stack([contexts[caption] for caption in captions]).to(device)
        latents, t, eps = (torch.cat([getattr(part, name) for part in parts]) for name in ("latents", "t", "eps"))
        return list(self.denoiser.loss(latents.to(device), context, t, eps.to(device)).split([len(part.t) for part in parts]))
