"""The quickstart at its smallest: it writes what it promises, refuses to overwrite, resumes. And the figures it reports."""
import json

import pytest
import torch

from minidiff import evaluate, load, quickstart
from minidiff.data.critic import accuracy
from minidiff.data.world import World
from minidiff.errors import UserError

WORLD = World(quickstart.SIZE, quickstart.SHAPES, quickstart.COLOURS)


@pytest.fixture
def tiny(monkeypatch):
    """Two steps of everything, and four captions."""
    for name, value in {"VAE_STEPS": 2, "STEPS": 2, "BATCH": 4, "VAE_BATCH": 4, "CAPTIONS": 4, "PROMPTS": quickstart.PROMPTS[:1]}.items():
        monkeypatch.setattr(quickstart, name, value)


def test_it_writes_what_it_promises_and_never_overwrites(tiny, tmp_path, capsys):
    out = tmp_path / "qs"
    results = quickstart.quickstart(out, seed=3)
    for name in ("forward.png", "reverse.png", "reverse.gif", "samples.png", "loss.png", "model/model.json"):
        assert (out / name).stat().st_size > 0, name
    printed = capsys.readouterr().out
    assert all(str(out / name) in printed for name in ("model", "samples.png", "reverse.gif", "results.json"))
    assert json.loads((out / "results.json").read_text()) == results
    for key in ("minutes", "seed", "accuracy_one_object", "accuracy_two_objects", "accuracy_one_object_shuffled_captions", "prompts"):
        assert key in results
    assert results["seed"] == 3

    with pytest.raises(UserError, match="--resume"):
        quickstart.quickstart(out, seed=3)

    before = load(out / "model")
    assert quickstart.quickstart(out, seed=3, resume=True)["resumed"]  # all is done: the same model comes out
    for a, b in zip(before.parameters(), load(out / "model").parameters(), strict=True):
        assert torch.equal(a, b)


def test_crops_keep_the_liveliest_windows():
    pictures = torch.zeros(2, 3, 32, 32)
    pictures[0, :, 4:8, 4:8] = 1.0  # only the window at the top left of the first picture holds all of it
    windows = quickstart.crops(pictures, 1)
    assert windows.shape == (1, 3, 16, 16) and windows.sum() == pictures.sum()


def test_held_out_captions_are_held_out_and_full():
    captions = evaluate.held_out(WORLD, 20, 2, seed=0)
    assert captions == evaluate.held_out(WORLD, 20, 2, seed=0) != evaluate.held_out(WORLD, 20, 2, seed=1)
    trained = {caption for k in range(20) for caption in WORLD.batch(50, ("train", k), full=True)[1]}
    assert not trained & set(captions)


def test_true_pictures_are_right_and_shuffled_ones_are_not():
    pictures, captions, _ = WORLD.batch(60, "truth", objects=1, split="held-out", full=True)
    assert accuracy(pictures, captions) == 1
    assert accuracy(pictures, evaluate.shuffled(captions)) < 0.1
    assert set(evaluate.mistakes(pictures, captions).values()) == {0.0}
