"""The model in the box: it is small, it is found from anywhere, and it draws what captions say."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import minidiff
from minidiff.cli.main import main
from minidiff.data.world import World
from minidiff.errors import UserError
from minidiff.evaluation import bench as evaluate
from minidiff.recipes import quickstart

BOX = Path(minidiff.__file__).parent / "box"


@pytest.fixture(scope="module")
def box():
    return minidiff.load()


def test_it_is_small():
    files = list(BOX.glob("*.safetensors"))
    assert {file.stem for file in files} == {"vae", "text", "unet"} and sum(
        file.stat().st_size for file in files
    ) <= 12e6
    assert all(
        tensor.dtype == torch.float16 for file in files for tensor in load_file(file).values()
    )


def test_half_precision_files_fill_networks_of_full_precision(box):
    stored = load_file(BOX / "unet.safetensors")
    for name, weight in box.unet.state_dict().items():
        assert weight.dtype == torch.float32 and torch.equal(weight, stored[name].float())


def test_it_is_called_box(box, tmp_path, monkeypatch):
    (tmp_path / "box").mkdir()
    monkeypatch.chdir(tmp_path)  # where a folder has the same name: it is meant by its whole path
    named = minidiff.load("box")
    assert all(torch.equal(a, b) for a, b in zip(named.parameters(), box.parameters(), strict=True))
    with pytest.raises(UserError, match="is no model folder"):
        minidiff.load(tmp_path / "box")


def test_verbs_draw_with_it_unless_told_otherwise(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    main(["generate", "a small blue circle", "--steps", "2"])
    main(["plot", "reverse", "--steps", "2"])
    assert (
        len(capsys.readouterr().out.splitlines()) == 4
        and Path("out/generate/000-a-small-blue-circle.png").is_file()
    )


@pytest.mark.parametrize(("objects", "right"), [(1, 23), (2, 20)])
def test_it_draws_what_captions_say(box, objects, right):
    """24 captions of combinations it never saw. Of 500 it has more right (docs/box.md); a damaged file, or a change of the sampler, the
    schedule or the networks, has none or few."""
    world = World(quickstart.SIZE, quickstart.SHAPES, quickstart.COLOURS)
    accuracy, _, _ = evaluate.caption_accuracy(box, evaluate.held_out(world, 24, objects, seed=1))
    assert accuracy >= right / 24


def test_an_image_of_the_box_imports_no_more_than_it_needs(tmp_path):
    """Each of these costs a second of the start, and none is needed."""
    code = (
        "import sys; from minidiff.cli.main import main\n"
        f"main(['generate', 'a red circle', '--steps', '2', '--out', {str(tmp_path)!r}])\n"
        "slow = {'open_clip', 'torch._dynamo', 'torchvision', 'transformers', 'timm'}\n"
        "print(sorted(slow & set(sys.modules)))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.splitlines()[-1] == "[]"
