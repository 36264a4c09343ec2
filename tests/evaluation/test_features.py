"""Feature networks: always the same, of any size, and one clear line where weights are missing."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from minidiff.data import critic
from minidiff.data.folder import to_model
from minidiff.data.shards import Shards
from minidiff.data.world import World
from minidiff.errors import UserError
from minidiff.evaluation import features

PICTURES = World(32).batch(6, "features", objects=2)[0]


@pytest.mark.parametrize("name", [*features.DEFAULTS, features.CIFAR10, features.PHOTOS])
def test_batches_do_not_matter(name):
    torch.testing.assert_close(
        features.features(name, PICTURES, batch=4), features.features(name, PICTURES)
    )


@pytest.mark.parametrize("name", ["pixels-8x8", "random-conv-0", features.CIFAR10, features.PHOTOS])
def test_size_hardly_matters(name):
    """A picture and the same one with every pixel doubled: block means are exact, these networks
    begin with them.
    """
    doubled = PICTURES.repeat_interleave(2, 2).repeat_interleave(2, 3)
    torch.testing.assert_close(
        features.features(name, doubled), features.features(name, PICTURES), rtol=1e-4, atol=1e-5
    )


def test_pixels_are_means_of_patches():
    found = features.pixels(PICTURES).unflatten(1, (3, 8, 8))
    torch.testing.assert_close(found[2, 1, 3, 5], PICTURES[2, 1, 12:16, 20:24].mean())


def test_the_random_network_is_always_the_same():
    """Its name promises so: published figures depend on it. Measured once; convolutions differ in
    the last digits between machines.
    """
    found = features.random_conv(torch.linspace(-1, 1, 3 * 32 * 32).view(1, 3, 32, 32))
    torch.testing.assert_close(found[0, :3], torch.tensor(GOLDEN), rtol=1e-4, atol=1e-4)
    assert found.shape == (1, 128)


GOLDEN = [0.31859, 0.04163, 0.00103]


def test_the_network_of_cifar10_ships_and_is_small():
    file = Path(features.__file__).parents[1] / "networks" / "cifar10_resnet.safetensors"
    assert file.stat().st_size < 1e6 and all(
        weight.dtype == torch.float16 for weight in load_file(file).values()
    )
    assert features.features(features.CIFAR10, PICTURES).shape == (6, 128)
    assert features.CIFAR10 not in features.DEFAULTS  # what nobody asked for is not measured in it


def test_attributes_say_what_the_critic_sees():
    seen = critic.ReadThing("square", "blue", "large", 0.25, 0.75, 0.2)
    found = features.attributes(critic.Reading("gray", (seen,))).tolist()
    shapes, colours = len(set(critic.WORDS.values())), len(critic.COLOURS)
    first = 1 + len(critic.BACKGROUNDS)
    assert found[:first] == [1, 0, 1, 0, 0]
    assert (
        found[first : first + shapes].index(1) == 1
        and found[first + shapes : first + shapes + colours].index(1) == 5
    )
    assert found[first + shapes + colours :][:3] == pytest.approx([0.25, 0.75, 0.8])
    assert not any(found[first + shapes + colours + 3 :])
    nothing = features.attributes(critic.Reading(None, ()))
    assert len(nothing) == len(found) and not nothing.any()


def test_inception_that_cannot_be_had_is_one_line(monkeypatch):
    utils = pytest.importorskip("torch_fidelity.utils")

    def offline(*_, **__):
        raise OSError("urlopen error:\nno route")

    monkeypatch.setattr(utils, "create_feature_extractor", offline)
    with pytest.raises(
        UserError, match=r"Inception's weights cannot be had \(urlopen error: no route\)"
    ):
        features.by_name("inception-v3-compat")


def test_clip_that_cannot_be_had_is_one_line(monkeypatch):
    import open_clip

    def offline(*_, **__):
        raise OSError("offline")

    features._clip.cache_clear()
    monkeypatch.setattr(open_clip, "create_model_and_transforms", offline)
    with pytest.raises(
        UserError, match=r"CLIP's weights ViT-B-32/openai cannot be had \(offline\)"
    ):
        features.clip_similarity(PICTURES, ["a circle"] * 6)


def test_clip_similarity_is_a_cosine_whatever_the_batch(monkeypatch):
    """With random weights: what is compared is the plumbing, against the same two towers called by
    hand.
    """
    import open_clip

    torch.manual_seed(0)
    tower = open_clip.create_model("ViT-B-32", pretrained=None)
    monkeypatch.setattr(
        open_clip, "create_model_and_transforms", lambda *_, **__: (tower.eval(), None, None)
    )
    features._clip.cache_clear()
    with torch.no_grad():
        found = features.clip_similarity(PICTURES[:2], ["a circle", "a square"])
        text = tower.encode_text(open_clip.get_tokenizer("ViT-B-32")(["a square"]), normalize=True)
    assert found.shape == (2,) and found.abs().max() <= 1
    alone = features.clip_similarity(PICTURES[1:2], ["a square"])
    torch.testing.assert_close(alone, found[1:], rtol=1e-4, atol=1e-5)
    assert text.norm().item() == pytest.approx(1, rel=1e-5)
    features._clip.cache_clear()


def test_an_unknown_name_is_told_the_known_ones():
    with pytest.raises(UserError, match='no features "vgg"; there is pixels-8x8, random-conv-0'):
        features.by_name("vgg")


def test_the_judge_of_photographs_ships_and_knows_its_things():
    file = features.FOLDER / "photos_resnet.safetensors"
    assert file.stat().st_size < 4.1e6 and all(
        weight.dtype == torch.float16 for weight in load_file(file).values()
    )
    _, things = features._photos()
    assert len(things) == 67 == len(set(things)) and "Yorkshire terrier" in things
    assert features.features(features.PHOTOS, PICTURES).shape == (6, 256)
    assert features.PHOTOS not in features.DEFAULTS


def test_the_judge_is_right_about_real_pictures(real_data):
    """Of 100 held-out ones; of all 1,340 it is right about 0.607 (networks/README.md)."""
    stored = Shards(real_data / "photos" / "held_out-000000.tar", 64, caption_column="label")
    images, labels = zip(*(stored[k] for k in range(100)), strict=True)
    guesses = features.photo_things(to_model(torch.stack(images)), best=5)
    assert sum(a[0] == b for a, b in zip(guesses, labels, strict=True)) >= 46  # three deviations
    assert sum(b in a for a, b in zip(guesses, labels, strict=True)) >= 75
