"""How well a text-to-image model does what its captions say, by the critic of the built-in world."""
import random
from collections import Counter

import torch
from jaxtyping import Float
from torch import Tensor

from minidiff.data import critic
from minidiff.data.world import World
from minidiff.latent_diffusion import LatentDiffusion


def held_out(world: World, n: int, objects: int, seed: int) -> list[str]:
    """n captions of scenes whose combination of attributes training never saw, every attribute stated."""
    rng = random.Random(f"{seed} {objects}")
    return [world.caption(world.scene(rng, objects, "held-out"), rng, full=True) for _ in range(n)]


def caption_accuracy(
    model: LatentDiffusion, captions: list[str], steps: int = 25, guidance: float | None = None, seed: int = 0
) -> tuple[float, Float[Tensor, "B 3 H W"], list[bool]]:
    """The share of captions whose picture the critic accepts in every attribute; the pictures; the verdict on each."""
    pictures = model.generate(captions, steps=steps, guidance=guidance, generator=torch.Generator().manual_seed(seed), progress=True).cpu()
    verdicts = [critic.holds(picture, caption) for picture, caption in zip(pictures, captions, strict=True)]
    return sum(verdicts) / len(verdicts), pictures, verdicts


def mistakes(pictures: Float[Tensor, "B 3 H W"], captions: list[str]) -> dict[str, float]:
    """How often each attribute is wrong, among the captions that state it."""
    wrong, stated = Counter(), Counter()
    for picture, caption in zip(pictures, captions, strict=True):
        for attribute, right in critic.judge(picture, caption).items():
            stated[attribute] += 1
            wrong[attribute] += not right
    return {attribute: round(wrong[attribute] / stated[attribute], 4) for attribute in stated}


def shuffled(captions: list[str]) -> list[str]:
    """Every caption given to its neighbour's picture: what a model that ignores its text would score."""
    return captions[1:] + captions[:1]
