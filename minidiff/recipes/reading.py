"""A text encoder learns to read before it sees an image.

Stable Diffusion's text encoder was trained by CLIP [1] and is frozen while the U-Net learns [2].
Here the scene behind a caption is known, and trains the text encoder. Every (place, attribute),
such as (above, red) or (alone, circle), has its own direction, at right angles to all others. The
sum of a caption's vectors is trained to equal the sum of the directions of what the scene shows:
one sum for "a small red circle above a large blue square" and "a large blue square below a small
red circle", another for "a small blue circle above a large red square". What a caption leaves open
becomes the mean over what it may be. This takes a minute; from images and captions alone a text
encoder this small learns slowly which colour belongs to which object (docs/box.md).

[1] Radford et al. Learning Transferable Visual Models From Natural Language Supervision. 2021.
    arXiv:2103.00020
[2] Rombach et al. High-Resolution Image Synthesis with Latent Diffusion Models. 2022.
    arXiv:2112.10752
"""

import random
from collections.abc import Iterator
from itertools import count
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from minidiff.data.world import INVERSE, RELATIONS, SIZES, Scene, World
from minidiff.errors import UserError
from minidiff.text import CLIPText

Codes = dict[tuple[str, str], Float[Tensor, "D"]]


class Lesson(NamedTuple):
    """Captions, and what the vectors of each should add up to."""

    captions: list[str]
    sums: Float[Tensor, "B D"]


def pairs(scene: Scene) -> list[tuple[str, str]]:
    """What a scene shows as (place, attribute); "A above B" and "B below A" give equal sets."""
    places = (scene.relation, INVERSE[scene.relation]) if scene.relation else ("alone",)
    things = [
        (place, attribute)
        for place, thing in zip(places, scene.things, strict=True)
        for attribute in (thing.shape, thing.colour, thing.size)
    ]
    return [("behind", scene.background), *things]


def all_pairs(world: World) -> list[tuple[str, str]]:
    """Everything that `pairs` can hold in this world."""
    attributes = (*world.shapes, *world.colours, *SIZES)
    return [
        *(("behind", name) for name in world.backgrounds),
        *((place, name) for place in ("alone", *RELATIONS) for name in attributes),
    ]


def codes(world: World, dim: int) -> Codes:
    """A random direction for each of at most dim pairs, orthogonal, of length sqrt(dim)."""
    names = all_pairs(world)
    if len(names) > dim:
        raise UserError(
            f"{len(names)} directions do not fit at right angles in {dim} dimensions; "
            "take a smaller world or wider words."
        )
    directions = nn.init.orthogonal_(torch.empty(len(names), dim)) * dim**0.5
    return dict(zip(names, directions, strict=True))


def lessons(
    world: World, codes: Codes, batch: int, two_objects: float, seed: int, start: int
) -> Iterator[Lesson]:
    """Lessons start, start + 1, ... of the endless world. two_objects: the share of captions that
    name two objects."""
    for k in count(start):
        rng = random.Random(f"text {seed} {k}")
        scenes = [world.scene(rng, two_objects=two_objects) for _ in range(batch)]
        sums = [torch.stack([codes[pair] for pair in pairs(scene)]).sum(0) for scene in scenes]
        yield Lesson([world.caption(scene, rng) for scene in scenes], torch.stack(sums))


def loss(text: CLIPText, lesson: Lesson) -> dict[str, Float[Tensor, "B"]]:
    """How far the sums of the captions' vectors are from what they should be."""
    sums = text.encode(lesson.captions).sum(1)
    return {"loss": (sums - lesson.sums.to(sums)).pow(2).mean(1)}
