"""Training a ControlNet: pairs of yours, what is random, and that it alone learns."""

import copy

import pytest
import torch
from PIL import Image

import minidiff
from minidiff.data.folder import CaptionedFolder, to_uint8
from minidiff.data.world import World
from minidiff.errors import UserError
from minidiff.finetuning.controlnet import batches, pairs_of, train_controlnet
from minidiff.methods.controlnet import copy_of, outlines
from minidiff.train import TrainConfig


@pytest.fixture
def folders(tmp_path):
    """Captioned images, and their outlines in another folder."""
    images, captions, _ = World(32).batch(4, seed=0)
    for k, (image, caption) in enumerate(zip(images, captions, strict=True)):
        for name, each in (("data", image), ("hints", 2 * outlines(image[None])[0] - 1)):
            (tmp_path / name).mkdir(exist_ok=True)
            file = tmp_path / name / f"{k}.png"
            Image.fromarray(to_uint8(each).permute(1, 2, 0).numpy()).save(file)
        (tmp_path / "data" / f"{k}.txt").write_text(caption)
    return tmp_path / "data", tmp_path / "hints"


@pytest.fixture
def pairs(folders):
    data, hints = folders
    return pairs_of(minidiff.load(), CaptionedFolder(data, 32), hints, 32)


def test_pairs_of_a_folder(folders, pairs):
    assert pairs.latents.shape == (4, 4, 16, 16) and len(pairs.captions) == 4
    images, _, _ = World(32).batch(4, seed=0)
    assert torch.equal(pairs.hints.float() / 255, outlines(images))
    data, hints = folders
    (hints / "2.png").unlink()
    with pytest.raises(UserError, match=r"1 of 4 images have no hint; the first is .*2\.png"):
        pairs_of(minidiff.load(), CaptionedFolder(data, 32), hints, 32)


def test_batches_follow_from_seed_and_number(pairs):
    model = minidiff.load()
    stream = batches(pairs, model, 3, 0.5, 7, 0)
    third = [next(stream) for _ in range(3)][2]
    again = next(batches(pairs, model, 3, 0.5, 7, 2))
    for a, b in zip(third, again, strict=True):
        assert a == b if isinstance(a, list) else torch.equal(a, b)
    assert 0 <= third.hints.min() and third.hints.max() == 1
    shares = [
        caption == "" for b, _ in zip(stream, range(100), strict=False) for caption in b.captions
    ]
    assert 0.4 < sum(shares) / len(shares) < 0.6


def test_the_controlnet_alone_learns(pairs, tmp_path):
    model = minidiff.load()
    before, network = copy.deepcopy(model.state_dict()), copy_of(model.unet, 2)
    start = copy.deepcopy(network.state_dict())
    config = TrainConfig(steps=3, lr=1e-3, warmup=0)
    steps = list(train_controlnet(model, network, pairs, config, 2, folder=tmp_path / "run"))
    assert len(steps) == 3 and all(step.loss > 0 for step in steps)
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    moved = [
        name for name, value in network.state_dict().items() if not torch.equal(value, start[name])
    ]
    assert {"zero.0.weight", "zero_middle.weight", "hint.0.weight", "conv_in.weight"} <= set(moved)
    same = copy_of(model.unet, 2)
    same.load_state_dict(start)
    resumed = train_controlnet(model, same, pairs, config, 2, folder=tmp_path / "run", resume=True)
    assert [step.step for step in resumed] == [3]
    assert all(torch.equal(v, same.state_dict()[n]) for n, v in network.state_dict().items())
