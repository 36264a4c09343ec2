"""How far samples are from CIFAR-10: Fréchet's distance in the features of minidiff's classifier.

[1] Heusel et al. GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash
    Equilibrium. 2017. arXiv:1706.08500
"""

from functools import cached_property

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from minidiff.data.folder import to_model
from minidiff.errors import UserError
from minidiff.evaluation import features
from minidiff.evaluation.metrics import Moments, frechet


def moments(images: Float[Tensor, "N 3 32 32"]) -> Moments:
    total = Moments()
    for some in images.split(500):
        total.add(features.cifar10(some))
    return total


class Distance:
    """From real pictures, all but n of them; those n are the floor that a perfect model has."""

    def __init__(self, pixels: UInt8[Tensor, "N 3 32 32"], n: int):
        if not 2 <= n <= len(pixels) - 2:
            limit = f"from 2 to {len(pixels) - 2}, two less than there are real pictures"
            raise UserError(f"n is {n}; it must be {limit}.")
        order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))
        self.n, self.real, self.aside = n, pixels[order[n:]], pixels[order[:n]]

    @cached_property
    def reference(self) -> Moments:
        total = Moments()
        for some in self.real.split(500):
            total.add(features.cifar10(to_model(some)))
        return total

    @cached_property
    def floor(self) -> float:
        return frechet(moments(to_model(self.aside)), self.reference)

    def of(self, images: Float[Tensor, "N 3 32 32"]) -> float:
        """Of n samples in [-1, 1], rounded to bytes as a file is."""
        if len(images) != self.n:
            raise UserError(f"{len(images)} samples; the distance of {self.n} was asked for.")
        bytes_ = ((images.clamp(-1, 1) + 1) * 127.5).round()
        return frechet(moments(bytes_ / 127.5 - 1), self.reference)
