"""The quickstart at its smallest: it writes what it promises, refuses to overwrite, resumes. And
the figures it reports."""

import json

import pytest
import torch

from minidiff import load
from minidiff.data.critic import accuracy
from minidiff.data.world import RELATIONS, World
from minidiff.errors import UserError
from minidiff.evaluation import bench as evaluate
from minidiff.recipes import quickstart

WORLD = World(quickstart.SIZE, quickstart.SHAPES, quickstart.COLOURS)


@pytest.fixture
def tiny(monkeypatch):
    """Two steps of everything, and four captions."""
    steps = {"VAE_STEPS": 2, "TEXT_STEPS": 2, "STEPS": 2}
    sizes = {
        "VAE_BATCH": 4,
        "TEXT_BATCH": 4,
        "BATCH": 4,
        "POOL": 64,
        "CAPTIONS": 4,
        "PROMPTS": quickstart.PROMPTS[:1],
    }
    for name, value in {**steps, **sizes}.items():
        monkeypatch.setattr(quickstart, name, value)


def test_it_writes_what_it_promises_and_never_overwrites(tiny, tmp_path, capsys):
    out = tmp_path / "qs"
    results = quickstart.quickstart(out, seed=3)
    for name in (
        "forward.png",
        "reverse.png",
        "reverse.gif",
        "index.html",
        "samples.png",
        "loss.png",
        "model/model.json",
    ):
        assert (out / name).stat().st_size > 0, name
    printed = capsys.readouterr().out
    assert all(
        str(out / name) in printed
        for name in ("model", "samples.png", "reverse.gif", "results.json")
    )
    assert json.loads((out / "results.json").read_text()) == {
        "about": "made with minidiff",
        **results,
    }
    for key in (
        "minutes",
        "minutes_told",
        "tflop",
        "steps",
        "seed",
        "accuracy_one_object",
        "accuracy_two_objects",
        "accuracy_one_object_shuffled_captions",
        "prompts",
    ):
        assert key in results
    assert results["seed"] == 3

    with pytest.raises(UserError, match="`resume` it"):
        quickstart.quickstart(out, seed=3)

    before = load(out / "model")
    assert quickstart.quickstart(out, seed=3, resume=True)[
        "resumed"
    ]  # all is done: the same model comes out
    for a, b in zip(before.parameters(), load(out / "model").parameters(), strict=True):
        assert torch.equal(a, b)


def test_crops_keep_the_liveliest_windows():
    pictures = torch.zeros(2, 3, 32, 32)
    pictures[0, :, 4:8, 4:8] = (
        1.0  # only the window at the top left of the first picture holds all of it
    )
    windows = quickstart.crops(pictures, 1)
    assert windows.shape == (1, 3, 16, 16) and windows.sum() == pictures.sum()


def test_noise_levels_are_spread_over_every_batch():
    """All are valid; most fall where pictures are decided, some anywhere; and the strata keep
    batches alike."""
    t = [quickstart.noise_levels(16, torch.Generator().manual_seed(k)) for k in range(400)]
    assert 1 <= min(x.min() for x in t) < 50 and 950 < max(x.max() for x in t) <= 1000
    centre = 1000 * torch.sigmoid(torch.tensor(quickstart.T_CENTRE)).item()
    assert abs(torch.cat(t).float().median().item() - centre) < 40
    independent = torch.cat(t).float().std() / 4
    assert torch.stack([x.float().mean() for x in t]).std() < 0.5 * independent


def test_parts_follow_from_seed_and_number_alone():
    """What resuming and threads rely on. Captions are hidden as often as asked, and no two pools
    are mixed up."""
    vae = quickstart.vae_quickstart()
    one, two = (quickstart.Pool(WORLD, vae, 64, "test", objects, "cpu") for objects in (1, 2))
    assert all(len(scene.things) == n for n, pool in ((1, one), (2, two)) for scene in pool.scenes)
    with torch.no_grad():
        encoded = vae.encode(WORLD.batch(64, ("test", 2, 0), objects=2)[0])
    assert torch.allclose(two.latents, encoded, atol=1e-5)

    def take(start, n, dropout=0.0):
        stream = quickstart.latent_batches(WORLD, one, two, 5, dropout, start)
        return [next(stream) for _ in range(n)]

    for a, b in zip(take(0, 6)[2:], take(2, 4), strict=True):
        assert a.captions == b.captions and all(
            torch.equal(x, y)
            for x, y in zip((a.latents, a.t, a.eps), (b.latents, b.t, b.eps), strict=True)
        )
    captions = [caption for part in take(0, 6) for caption in part.captions]
    pairs = sum(any(relation in caption for relation in RELATIONS) for caption in captions)
    assert abs(pairs / len(captions) - quickstart.TWO_OBJECTS) < 0.1
    backgrounds = sum(" on " in caption for caption in captions) / len(captions)
    assert abs(backgrounds - (1 + quickstart.FULL) / 2) < 0.05  # half of the others say it too
    hidden = [caption == "" for part in take(0, 6, dropout=0.5) for caption in part.captions]
    assert 0.4 < sum(hidden) / len(hidden) < 0.6


def test_held_out_captions_are_held_out_and_full():
    captions = evaluate.held_out(WORLD, 20, 2, seed=0)
    assert (
        captions
        == evaluate.held_out(WORLD, 20, 2, seed=0)
        != evaluate.held_out(WORLD, 20, 2, seed=1)
    )
    trained = {
        caption for k in range(20) for caption in WORLD.batch(50, ("train", k), full=True)[1]
    }
    assert not trained & set(captions)


def test_true_pictures_are_right_and_shuffled_ones_are_not():
    pictures, captions, _ = WORLD.batch(60, "truth", objects=1, split="held-out", full=True)
    assert accuracy(pictures, captions) == 1
    assert accuracy(pictures, evaluate.shuffled(captions)) < 0.1
    assert set(evaluate.mistakes(pictures, captions).values()) == {0.0}
