"""The critic agrees with the truth, also on spoilt pictures, and a caption that is wrong in one
attribute does not get past it.
"""

import random
from dataclasses import replace
from functools import cache

import pytest
import torch
from torchvision.transforms.v2.functional import gaussian_blur

from minidiff.data.critic import BACKGROUNDS as CRITIC_BACKGROUNDS
from minidiff.data.critic import COLOURS as CRITIC_COLOURS
from minidiff.data.critic import accuracy, compare, holds, judge, parse, polygons, read
from minidiff.data.world import BACKGROUNDS, COLOURS, RELATIONS, SHAPES, SIZES, Scene, Thing, World
from minidiff.errors import UserError

N = 400  # scenes for each size of picture and each split, half with two things
KINDS = ("shape", "colour", "size", "relation", "background", "count")
everywhere = pytest.mark.parametrize(
    ("size", "split"), [(size, split) for size in (32, 64) for split in ("train", "held-out")]
)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """The critic's tensors are tiny: threads only wait for each other, long where the machine is
    busy.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def spoil(images, size):
    """What a sampler might do to a picture: soften it by 0.6 pixels at 32 x 32 (1.0 at 64 x 64) and
    add noise of 0.05 in units of 0..1.
    """
    soft = gaussian_blur(images, 9, 0.6 if size == 32 else 1.0)
    return (
        soft + 2 * 0.05 * torch.randn(images.shape, generator=torch.Generator().manual_seed(size))
    ).clamp(-1, 1)


@cache
def readings(size, split, spoilt):
    images, _, scenes = World(size).batch(N, f"critic {size}", split=split)
    return [read(image) for image in (spoil(images, size) if spoilt else images)], scenes


def agreement(size, split, spoilt):
    """Each picture against a caption that states every attribute of its scene."""
    rng = random.Random(0)
    pairs = zip(*readings(size, split, spoilt), strict=True)
    return (
        sum(
            all(compare(reading, parse(World(size).caption(scene, rng, full=True))).values())
            for reading, scene in pairs
        )
        / N
    )


@everywhere
def test_clean_pictures_are_read_rightly(size, split):
    assert agreement(size, split, spoilt=False) >= 0.99


@everywhere
def test_soft_and_noisy_pictures_are_read_rightly(size, split):
    assert agreement(size, split, spoilt=True) >= 0.95


def altered(scene: Scene, kind: str, rng: random.Random) -> Scene | None:
    """The scene with one attribute changed, or None if it has no such attribute."""
    k = rng.randrange(len(scene.things))
    if kind in ("shape", "colour", "size"):
        names = {"shape": SHAPES, "colour": COLOURS, "size": SIZES}[kind]
        other = rng.choice([name for name in names if name != getattr(scene.things[k], kind)])
        return replace(
            scene,
            things=tuple(
                replace(thing, **{kind: other}) if i == k else thing
                for i, thing in enumerate(scene.things)
            ),
        )
    if kind == "background":
        return replace(
            scene, background=rng.choice([name for name in BACKGROUNDS if name != scene.background])
        )
    if kind == "count":
        if len(scene.things) == 2:
            return Scene((scene.things[k],), scene.background)
        extra = Thing(rng.choice(list(SHAPES)), rng.choice(list(COLOURS)), rng.choice(SIZES))
        return Scene((*scene.things, extra), scene.background, rng.choice(RELATIONS))
    return (
        replace(scene, relation=rng.choice([name for name in RELATIONS if name != scene.relation]))
        if scene.relation
        else None
    )


def deceived(size, split, spoilt, kind):
    """How many captions with one wrong attribute are accepted, and of how many."""
    rng = random.Random(kind)
    pairs = [
        (reading, altered(scene, kind, rng))
        for reading, scene in zip(*readings(size, split, spoilt), strict=True)
    ]
    pairs = [
        (reading, parse(World(size).caption(scene, rng, full=True)))
        for reading, scene in pairs
        if scene
    ]
    return sum(all(compare(reading, claim).values()) for reading, claim in pairs), len(pairs)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("spoilt", [False, True])
@everywhere
def test_one_wrong_attribute_is_noticed(size, split, spoilt, kind):
    accepted, total = deceived(size, split, spoilt, kind)
    assert total >= 150 and accepted / total <= 0.01


def test_judge_names_what_is_wrong():
    scene = Scene(
        (Thing("circle", "blue", "small"), Thing("square", "red", "large")), "white", "above"
    )
    image = World(64).draw([scene], random.Random(0))[0]
    keys = [
        "count",
        "background",
        "shape 1",
        "colour 1",
        "size 1",
        "shape 2",
        "colour 2",
        "size 2",
        "relation",
    ]
    right = judge(image, "a small blue circle above a large red square on a white background")
    assert list(right) == keys and all(right.values())
    assert holds(image, "a large red square below a tiny circle in blue") and holds(
        image, "a red square and a blue circle"
    )
    for caption, wrong in {
        "a small blue circle above a large red square on a pink background": {"background"},
        "a small blue circle above a small red square": {"size 2"},
        "a small green circle above a large red square": {"colour 1"},
        "a small blue circle above a large red heart": {"shape 2"},
        "a small blue circle below a large red square": {"relation"},
        "a small blue circle": {"count"},
        "a star": {"count", "shape 1"},
    }.items():
        assert {key for key, value in judge(image, caption).items() if not value} == wrong, caption
    assert (
        accuracy(torch.stack([image, image]), ["a blue circle above a red square", "a blue circle"])
        == 0.5
    )


def test_things_that_touch_are_parted_by_colour():
    image = torch.ones(3, 64, 64)
    image[:, 20:40, 12:32] = torch.tensor(COLOURS["red"]).view(3, 1, 1) * 2 - 1
    image[:, 20:40, 32:52] = torch.tensor(COLOURS["blue"]).view(3, 1, 1) * 2 - 1
    assert holds(image, "a small red square to the left of a small blue square on white")


@pytest.mark.parametrize("form", ["half a disc", "the letter L", "a bar", "two drops run together"])
def test_what_is_no_shape_gets_no_name(form):
    y, x = torch.meshgrid(*[(torch.arange(64) + 0.5) / 32 - 1] * 2, indexing="ij")
    inside = {
        "half a disc": (x**2 + y**2 < 0.2) & (y < 0),
        "the letter L": (x.abs() < 0.4) & (y.abs() < 0.4) & ((x < -0.1) | (y > 0.1)),
        "a bar": (x.abs() < 0.5) & (y.abs() < 0.2),
        "two drops run together": torch.minimum((x - 0.25) ** 2 + y**2, (x + 0.25) ** 2 + y**2)
        < 0.08,
    }[form]
    (thing,) = read(torch.where(inside, -1.0, 1.0).expand(3, -1, -1)).things
    assert thing.shape is None


def test_pictures_of_nothing_hold_no_caption():
    noise = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    for image in (torch.zeros(3, 32, 32), noise, torch.full((3, 32, 32), float("nan"))):
        assert not holds(image, "a circle")


@pytest.mark.parametrize("caption", ["two dogs on a beach", "", "a circle next to a square"])
def test_captions_it_cannot_read_are_explained(caption):
    with pytest.raises(UserError, match="shape"):
        parse(caption)


def test_the_critic_knows_the_worlds_words():
    """The tables are written down twice on purpose; this keeps them saying the same."""
    assert (
        set(polygons()) == set(SHAPES)
        and CRITIC_COLOURS == COLOURS
        and CRITIC_BACKGROUNDS == BACKGROUNDS
    )


if __name__ == "__main__":  # the figures of docs/world.md
    N = 2000
    torch.set_num_threads(1)
    for size, split in ((32, "train"), (32, "held-out"), (64, "train"), (64, "held-out")):
        clean, spoilt = agreement(size, split, False), agreement(size, split, True)
        counts = [deceived(size, split, bad, kind) for bad in (False, True) for kind in KINDS]
        accepted, total = (sum(column) for column in zip(*counts, strict=True))
        print(
            f"{size}x{size} {split:9} clean {clean:.2%}  spoilt {spoilt:.2%}  wrong "
            f"captions accepted {accepted} of {total}"
        )
