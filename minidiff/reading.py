"""A text tower learns to read before it sees a picture: the lessons, all in this file.

Stable Diffusion's tower was taught by CLIP [1], from four hundred million pictures with captions, and is frozen while the U-Net learns [2]. Here
the scene behind a caption is known, and the tower is taught by that. Every (place, attribute), such as (above, red) or (alone, circle), has a
direction of its own among vectors of words, all at right angles; the sum of a caption's vectors is to be the sum of the directions of what there
is to see. "A small red circle above a large blue square" and "a large blue square below a small red circle" are then one sum, and "a small blue
circle above a large red square" is another. What a caption leaves unsaid is answered by the mean of what it may be. So which colour is whose is
settled in a minute; from pictures and captions alone a tower this small learns it slowly (docs/box.md).

[1] Radford et al. Learning Transferable Visual Models From Natural Language Supervision. 2021. arXiv:2103.00020
[2] Rombach et al. High-Resolution Image Synthesis with Latent Diffusion Models. 2022. arXiv:2112.10752
"""
import random
from collections.abc import Iterator
from itertools import count
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from minidiff.clip import CLIPText
from minidiff.data.world import INVERSE, RELATIONS, SIZES, Scene, World
from minidiff.errors import UserError

Codes = dict[tuple[str, str], Float[Tensor, "D"]]


class Lesson(NamedTuple):
    """Captions, and what the vectors of each should add up to."""

    captions: list[str]
    meant: Float[Tensor, "B D"]


def pairs(scene: Scene) -> list[tuple[str, str]]:
    """All there is to see, as (place, attribute): "A above B" and "B below A" are the same list in another order."""
    places = (scene.relation, INVERSE[scene.relation]) if scene.relation else ("alone",)
    things = [(place, said) for place, thing in zip(places, scene.things, strict=True) for said in (thing.shape, thing.colour, thing.size)]
    return [("behind", scene.background), *things]


def all_pairs(world: World) -> list[tuple[str, str]]:
    """Everything that `pairs` can hold in this world."""
    attributes = (*world.shapes, *world.colours, *SIZES)
    return [*(("behind", name) for name in world.backgrounds), *((place, name) for place in ("alone", *RELATIONS) for name in attributes)]


def codes(world: World, dim: int) -> Codes:
    """A random direction for every pair, at right angles to all others, as long as a vector of unit variance; dim of them at most."""
    names = all_pairs(world)
    if len(names) > dim:
        raise UserError(f"{len(names)} directions do not fit at right angles in {dim} dimensions; take a smaller world or wider words.")
    return dict(zip(names, nn.init.orthogonal_(torch.empty(len(names), dim)) * dim**0.5, strict=True))


def lessons(world: World, codes: Codes, batch: int, two_objects: float, seed: int, start: int) -> Iterator[Lesson]:
    """Lessons start, start + 1, ... of the endless world. two_objects: the share of captions that name two things."""
    for k in count(start):
        rng = random.Random(f"text {seed} {k}")
        scenes = [world.scene(rng, two_objects=two_objects) for _ in range(batch)]
        meant = torch.stack([torch.stack([codes[pair] for pair in pairs(scene)]).sum(0) for scene in scenes])
        yield Lesson([world.caption(scene, rng) for scene in scenes], meant)


def loss(text: CLIPText, lesson: Lesson) -> dict[str, Float[Tensor, "B"]]:
    """How far the sums of the words' vectors are from what is meant."""
    said = text.encode(lesson.captions).sum(1)
    return {"loss": (said - lesson.meant.to(said)).pow(2).mean(1)}
