"""The built-in world: the same seed gives the same data, the splits never meet, and captions,
scenes and pictures agree.
"""

import random
import time

import pytest
import torch

from minidiff.data.critic import parse
from minidiff.data.world import (
    BACKGROUNDS,
    COLOURS,
    INVERSE,
    RELATIONS,
    SHAPES,
    SIZES,
    Scene,
    Thing,
    World,
    split_of,
)
from minidiff.errors import UserError


@pytest.mark.parametrize("seed", [0, "validation", ("epoch", 3)])
def test_batch_is_a_pure_function_of_its_arguments(seed):
    images, captions, scenes = World(32).batch(16, seed)
    torch.rand(1), random.random()  # other people's random numbers do not matter
    again = World(32).batch(16, seed)
    assert torch.equal(images, again[0]) and captions == again[1] and scenes == again[2]
    assert captions != World(32).batch(16, "another")[1]


def test_seed_zero_is_pinned():
    """Published figures name a seed, so what a seed means must not drift between versions or
    machines.
    """
    images, captions, _ = World(32).batch(4, 0)
    assert captions == [
        "a picture of a blue cross to the right of a small orange square",
        "a large cyan diamond above a big purple circle on a gray background",
        "a blue heart below a small red ring on gray",
        "an image of a small orange diamond on gray",
    ]
    assert images.mean().item() == pytest.approx(0.124419, abs=1e-5)


def test_splits_are_disjoint_and_a_fifth_is_held_out():
    world, rng = World(32), random.Random(0)
    seen = {
        split: {world.scene(rng, split=split) for _ in range(3000)}
        for split in ("train", "held-out")
    }
    assert not seen["train"] & seen["held-out"]
    for objects in (1, 2):
        held_out = (
            sum(split_of(world.scene(rng, objects, split=None)) == "held-out" for _ in range(5000))
            / 5000
        )
        assert 0.17 < held_out < 0.24  # 0.2 by design; only 512 different pictures have one thing


def test_a_scene_told_the_other_way_round_is_in_the_same_split():
    rng = random.Random(0)
    for _ in range(500):
        scene = World(32).scene(rng, objects=2, split=None)
        assert split_of(scene) == split_of(
            Scene(scene.things[::-1], scene.background, INVERSE[scene.relation])
        )


def test_every_attribute_occurs_about_equally_often():
    scenes = [World(32).scene(random.Random(k)) for k in range(4000)]
    assert 0.46 < sum(len(scene.things) == 2 for scene in scenes) / 4000 < 0.54
    things = [thing for scene in scenes for thing in scene.things]
    for key, names in (("shape", SHAPES), ("colour", COLOURS), ("size", SIZES)):
        for name in names:
            assert sum(getattr(thing, key) == name for thing in things) / len(
                things
            ) == pytest.approx(1 / len(names), rel=0.25)


@pytest.mark.parametrize("full", [False, True])
def test_captions_say_what_the_scene_is(full):
    rng, said = random.Random(1), {"size": 0, "background": 0, "sizes": 0}
    for _ in range(1000):
        scene = World(32).scene(rng, split=None)
        caption = World(32).caption(scene, rng, full)
        assert len(caption.split()) <= 24 and " a orange" not in f" {caption}"
        claim, things, relation = parse(caption), scene.things, scene.relation
        if claim.relation != relation:  # told from the other thing's side
            things, relation = things[::-1], INVERSE[relation]
        assert claim.relation == relation and [thing.shape for thing in claim.things] == [
            thing.shape for thing in things
        ]
        assert [thing.colour for thing in claim.things] == [thing.colour for thing in things]
        assert all(a.size in (None, b.size) for a, b in zip(claim.things, things, strict=True))
        assert claim.background in (None, scene.background)
        said["size"] += sum(thing.size is not None for thing in claim.things)
        said["sizes"] += len(things)
        said["background"] += claim.background is not None
    assert said["size"] / said["sizes"] == pytest.approx(
        1.0 if full else 0.8, abs=0 if full else 0.05
    )
    assert said["background"] / 1000 == pytest.approx(1.0 if full else 0.5, abs=0 if full else 0.06)


def test_the_plain_prompt_is_in_the_language():
    scene = Scene(
        (Thing("circle", "blue", "small"), Thing("square", "red", "large")), "white", "above"
    )
    captions = {World(32).caption(scene, random.Random(k)) for k in range(200)}
    assert {
        "a small blue circle above a large red square",
        "a large red square below a small blue circle",
    } <= captions


@pytest.mark.parametrize("size", [32, 64, 100, 128])
def test_pictures_are_in_range_flat_and_anti_aliased(size):
    images, _, scenes = World(size).batch(24, "picture")
    assert images.shape == (24, 3, size, size) and images.dtype == torch.float32
    assert images.min() >= -1 and images.max() <= 1
    for image, scene in zip(images, scenes, strict=True):
        colours = {tuple(pixel) for pixel in image.flatten(1).T.tolist()}
        assert len(colours) > 3 + 2 * len(scene.things)  # flat colours and, between them, edges
        border = torch.cat([image[:, 0], image[:, -1], image[:, :, 0], image[:, :, -1]], 1)
        background = border.median(1).values
        assert (border == background[:, None]).all(
            0
        ).float().mean() > 0.7  # at most the softness of an outline reaches the edge
        assert (
            (background + 1) / 2 - torch.tensor(BACKGROUNDS[scene.background])
        ).abs().max() < 0.04


def test_an_outline_covers_pixels_in_proportion():
    """The area of an anti-aliased disc is right to a fraction of a pixel, wherever it stands."""
    scene = Scene((Thing("circle", "red", "large"),), "white")
    world, areas = World(32), []
    for k in range(20):
        image = world.draw([scene], random.Random(k))[
            0, 1
        ]  # green: 1 in the background, 0 in the thing, nearly
        areas.append(((image[0, 0] - image) / (image[0, 0] - image.min())).sum().item())
    low, high = 3.1416 * (0.205 * 32) ** 2, 3.1416 * (0.22 * 32) ** 2
    assert low - 1 < min(areas) and max(areas) < high + 1


@pytest.mark.parametrize("relation", RELATIONS)
def test_relations_are_drawn_unambiguously(relation):
    """The two things are told apart by colour: their centres are farther apart along the relation
    than across it, and a gap parts them.
    """
    rng = random.Random(relation)
    for _ in range(20):
        sizes = rng.choices(SIZES, k=2)
        scene = Scene(
            (Thing("circle", "red", sizes[0]), Thing("circle", "blue", sizes[1])), "black", relation
        )
        image = (World(64).draw([scene], rng)[0] + 1) / 2
        first, second = ((image[a] > 0.5).nonzero().float() for a in (0, 2))
        dy, dx = (second.mean(0) - first.mean(0)).tolist()
        along = {"above": dy, "below": -dy, "left of": dx, "right of": -dx}[relation]
        assert along > 1.5 * min(abs(dx), abs(dy)) and along == max(abs(dx), abs(dy))
        assert torch.cdist(first, second).min() > 3


def test_a_world_can_know_only_part():
    _, _, scenes = World(
        32, shapes=("circle", "star"), colours=("red", "blue"), backgrounds=("white",)
    ).batch(50, 0)
    assert {thing.shape for scene in scenes for thing in scene.things} == {"circle", "star"}
    assert {scene.background for scene in scenes} == {"white"}


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: World(32, shapes=("blob",)),
        lambda: World(16),
        lambda: World(32).batch(1, 0, split="test"),
        lambda: World(32).batch(1, 0, objects=3),
        lambda: World(32, shapes=("star",), colours=("red",)).batch(1, 0, objects=2),
    ],
)
def test_bad_requests_are_explained(wrong):
    with pytest.raises(UserError):
        wrong()


def test_drawing_is_fast_enough_to_train_on():
    world, started = World(64), time.process_time()
    world.batch(256, 0)
    assert (
        time.process_time() - started < 2
    )  # thousands a second on an idle core; this only catches a loop over pixels


def test_the_vocabulary_is_every_word_of_captions():
    world, rng = World(32, ("circle", "ring")), random.Random("many")
    captions = (world.caption(world.scene(rng), rng) for _ in range(20_000))
    words = {word for caption in captions for word in caption.split()}
    assert words == world.vocabulary() and {"ring", "tiny", "pink", "an"} <= words
