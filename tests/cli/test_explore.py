"""The verb explore: what it writes and says, and what it refuses before it computes anything."""

import json
import re

import pytest
import torch

from minidiff.data.folder import load_image
from minidiff.figures import explored
from tests.figures.test_explorer import pixels

PROMPT = "a red circle"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory, sd):
    model = sd()
    torch.nn.init.normal_(model.unet.conv_out.weight, std=0.1)
    return model.save(tmp_path_factory.mktemp("models") / "tiny")


def data(path):
    return json.loads(re.search(r'id="data">(.*?)</script>', path.read_text(), re.DOTALL)[1])


def test_the_picture_is_generates(ran, tiny, tmp_path):
    settings = ["--model", tiny, "--steps", 4, "--sampler", "unipc", "--seed", 5]
    printed = ran("explore", PROMPT, *settings, "--scales", "1", "--out", tmp_path / "a.html").out
    ran("generate", PROMPT, *settings, "--out", tmp_path)
    image = load_image(tmp_path / "000-a-red-circle.png").movedim(0, -1).numpy()
    page = data(tmp_path / "a.html")
    assert (pixels(page["image"]) == image).all()
    assert page["settings"]["sampler"] == "unipc" and page["settings"]["seed"] == "5"
    first, last = printed.splitlines()
    assert re.fullmatch(r"2 runs of 4 steps: about \d+ s", first)
    assert last.startswith(f"{tmp_path / 'a.html'} (") and last.endswith(
        "MB); open it in a browser"
    )


@pytest.mark.parametrize("flag, value, first, second", [
    ("--against", "a blue square", PROMPT, "a blue square"),
    ("--against-seed", 6, "seed 0", "seed 6"),
    ("--against-sampler", "pndm", "sampler ddim", "sampler pndm"),
    ("--against-guidance", 3, "guidance 7.5", "guidance 3.0"),
])  # fmt: skip
def test_a_second_run_differs_in_one_thing(ran, tiny, tmp_path, flag, value, first, second):
    settings = ["--model", tiny, "--steps", 3, "--scales", "1", "--out", tmp_path]
    ran("explore", PROMPT, *settings, flag, value)
    pair = data(tmp_path / "explore.html")["pair"]
    assert (pair["first"]["label"], pair["second"]["label"]) == (first, second)
    changed = {"--against": [value], "--against-seed": [PROMPT, "--seed", 6]}.get(flag)
    changed = changed or [PROMPT, flag.replace("against-", ""), value]
    ran("generate", *changed, "--model", tiny, "--steps", 3, "--out", tmp_path)
    image = load_image(next(tmp_path.glob("000-*.png"))).movedim(0, -1).numpy()
    assert (pixels(pair["second"]["image"]) == image).all()


def test_what_is_refused(refused, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(explored, "collect", lambda *_: pytest.fail("it computes"))
    settings = ["--model", tiny, "--out", tmp_path / "a.html"]
    two = refused("explore", PROMPT, *settings, "--against-seed", 3, "--against", "b")
    assert two == "--against and --against-seed: two runs differ in one thing; take one of them."
    assert "no-such.safetensors" in refused(
        "explore", PROMPT, *settings, "--against-lora", tmp_path / "no-such.safetensors"
    )
    assert "--against-seed is 0, as in the first run; take another." in refused(
        "explore", PROMPT, *settings, "--against-seed", 0
    )
    assert "--scales is" in refused("explore", PROMPT, *settings, "--scales", "one")
    assert 'no against sampler "x"' in refused(
        "explore", PROMPT, *settings, "--against-sampler", "x"
    )
    assert "--against-guidance" in refused("explore", PROMPT, *settings, "--against-guidance", "x")
    (tmp_path / "a.html").write_text("mine")
    assert "a.html was not written by minidiff" in refused("explore", PROMPT, *settings)
    assert (tmp_path / "a.html").read_text() == "mine"
