"""What a caption should add up to, and that a tower learns it: the same scene said two ways is one sum, swapped colours are another."""
import random
from functools import partial
from itertools import islice

import pytest
import torch

from minidiff import reading
from minidiff.data.world import INVERSE, RELATIONS, Scene, World
from minidiff.errors import UserError
from minidiff.quickstart import COLOURS, SHAPES, SIZE, text_quickstart
from minidiff.train import TrainConfig, train

WORLD = World(SIZE, SHAPES, COLOURS)


def test_a_scene_is_one_list_however_it_is_said():
    rng = random.Random(0)
    for _ in range(50):
        scene = WORLD.scene(rng, objects=2)
        turned = Scene(scene.things[::-1], scene.background, INVERSE[scene.relation])
        assert sorted(reading.pairs(scene)) == sorted(reading.pairs(turned)) and len(set(reading.pairs(scene))) == 7
        assert set(reading.pairs(scene)) <= set(reading.all_pairs(WORLD))
    swapped = Scene(scene.things[::-1], scene.background, scene.relation)
    assert sorted(reading.pairs(scene)) != sorted(reading.pairs(swapped))


def test_directions_are_at_right_angles():
    codes = torch.stack(list(reading.codes(WORLD, 64).values()))
    assert torch.allclose(codes @ codes.T, 64 * torch.eye(len(codes)), atol=1e-4)
    with pytest.raises(UserError, match="94 directions do not fit at right angles in 64 dimensions"):
        reading.codes(World(SIZE), 64)


def names_two(caption):
    return any(relation in caption for relation in RELATIONS)


def test_lessons_follow_from_seed_and_number_alone():
    codes = reading.codes(WORLD, 64)
    for a, b in zip(islice(reading.lessons(WORLD, codes, 4, 0.5, 1, 0), 2, 4), reading.lessons(WORLD, codes, 4, 0.5, 1, 2), strict=False):
        assert a.captions == b.captions and torch.equal(a.meant, b.meant)
    lesson = next(reading.lessons(WORLD, codes, 4, 0.5, 1, 0))
    assert lesson.captions != next(reading.lessons(WORLD, codes, 4, 0.5, 2, 0)).captions
    assert torch.allclose(lesson.meant.pow(2).sum(1) / 64, torch.tensor([7.0 if names_two(caption) else 4.0 for caption in lesson.captions]))


def test_a_tower_learns_whose_colour_is_whose():
    """A few seconds of lessons: one scene told from either thing is nearly one sum, and far from that with the colours exchanged."""
    torch.manual_seed(0)
    text, world = text_quickstart(), World(SIZE, ("circle", "square"), ("red", "blue"), ("black", "white"))
    data = partial(reading.lessons, world, reading.codes(world, text.dim), 48, 1.0, 0)
    one = "a small red circle above a large blue square"
    told = [one, "a large blue square below a small red circle", "a small blue circle above a large red square"]

    @torch.no_grad()
    def apart():
        one, turned, swapped = text.encode(told).sum(1)
        return (one - turned).norm(), (one - swapped).norm()

    turned, swapped = apart()
    assert turned > swapped  # at first, other words are farther than another order of them
    for _ in train(partial(reading.loss, text), text, data, TrainConfig(120, 4e-3, warmup=10)):
        pass
    turned, swapped = apart()
    assert turned < 0.5 * swapped
