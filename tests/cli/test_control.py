"""generate --control: what it draws, what the picture says of it, and errors."""

import pytest
import torch
from PIL import Image

import minidiff
from minidiff import pipeline
from minidiff.checkpoints import controlnet as files
from minidiff.data.folder import to_uint8
from minidiff.methods.controlnet import Control, controlled, copy_of
from minidiff.options.sampling import SampleConfig


@pytest.fixture
def given(tmp_path):
    """A ControlNet of the box, as if trained, and an image for it."""
    torch.manual_seed(0)
    network = copy_of(minidiff.load().unet, 2)
    for layer in (network.hint[-1], network.zero_middle):
        torch.nn.init.normal_(layer.weight, 0, 0.3)
    hint = torch.zeros(32, 32, 3, dtype=torch.uint8)
    hint[8:20, 8:20] = 255
    Image.fromarray(hint.numpy()).save(tmp_path / "hint.png")
    return files.save(network, tmp_path / "c.safetensors"), tmp_path / "hint.png"


def test_it_draws_what_the_library_draws_and_says_so(ran, given, tmp_path):
    network, image = given
    args = ["generate", "a red circle", "--steps", 2, "--seed", 5, "--device", "cpu"]
    control = ["--control", image, "--controlnet", network, "--control-scale", 0.7]
    ran(*args, *control, "--out", tmp_path / "out")
    with Image.open(tmp_path / "out" / "000-a-red-circle.png") as picture:
        text, pixels = picture.text, torch.tensor(list(picture.convert("RGB").getdata()))
    assert (text["control"], text["controlnet"]) == ("hint.png", "c.safetensors")
    assert text["control_scale"] == "0.7"
    hint = torch.zeros(1, 3, 32, 32)
    hint[:, :, 8:20, 8:20] = 1
    model = minidiff.load()
    config = SampleConfig(steps=2, seed=5)
    drawn = [
        pipeline.generate(m, ["a red circle"], config)[0]
        for m in (controlled(model, Control(files.load(network), hint, 0.7)), model)
    ]
    ours, plain = (to_uint8(each).permute(1, 2, 0).reshape(-1, 3) for each in drawn)
    assert torch.equal(pixels, ours.long()) and not torch.equal(ours, plain)


def test_what_does_not_fit_is_one_line(refused, given, tmp_path):
    network, image = given
    for args, words in (
        (["--control", image], "--control needs the --controlnet that reads it"),
        (["--controlnet", network], "--controlnet needs a --control image"),
        (["--control", tmp_path / "no.png", "--controlnet", network], "no file"),
        (["--control", image, "--controlnet", tmp_path / "no"], "no file"),
        (["--control", image, "--controlnet", network, "--control-scale", "nan"], "must be finite"),
        (["--control", network, "--controlnet", network], "c.safetensors"),
    ):
        out = ["--out", tmp_path / "out", "--device", "cpu"]
        assert words in refused("generate", "a red circle", *args, *out)
