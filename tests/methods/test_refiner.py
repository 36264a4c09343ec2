"""The refiner: where it takes over, what it is told, and models that do not fit."""

import pytest
import torch
from PIL import Image

from minidiff.denoiser import Prediction
from minidiff.errors import UserError
from minidiff.methods.refiner import Handover, Refined
from minidiff.options.sampling import SampleConfig
from minidiff.schedules import linear, scaled_linear
from tests.test_sdxl import recorded, sdxl


def test_it_takes_over_where_it_is_asked_to():
    """At t = 200 of 1000 exactly, as diffusers' cut of its times, which count from 0, at 200."""
    calls = {"high": [], "low": []}

    def named(name):
        return lambda x, t: calls[name].append(t.item()) or Prediction(x, x)

    both = Handover(named("high"), named("low"), scaled_linear(), 1 - 0.8)
    for t in (1000, 201, 200, 1):
        both(torch.zeros(1, 1), torch.tensor([t]))
    assert calls == {"high": [1000, 201], "low": [200, 1]}


def test_both_are_told_what_they_read_and_guided_alike():
    base, refiner = sdxl(), sdxl(is_refiner=True, empty="encoded")
    first, second = recorded(base), recorded(refiner)
    model = Refined(base, refiner, 0.5)
    config = SampleConfig(4, empty="zeros", negative="blurry", spacing="trailing")
    list(model.sample(["a cat"], config=config))
    assert (len(first), len(second)) == (2, 2)
    assert first[0].numbers.tolist() == [[16, 16, 0, 0, 16, 16]] * 2  # away and towards: guided
    assert second[0].numbers.tolist() == [[16, 16, 0, 0, 2.5], [16, 16, 0, 0, 6]]


def test_what_does_not_fit_is_refused():
    base, refiner = sdxl(), sdxl(is_refiner=True)
    with pytest.raises(UserError, match=r"starts at 1\.2; it must be from 0 to 1"):
        Refined(base, refiner, 1.2)
    refiner.denoiser.schedule = linear()
    with pytest.raises(UserError, match="another noise schedule"):
        Refined(base, refiner)


def test_generate(ran, tmp_path):
    base, refiner = tmp_path / "base", tmp_path / "refiner"
    sdxl().save(base), sdxl(is_refiner=True).save(refiner)
    drawn = {}
    for name, more in (("without", ()), ("with", ("--refiner", refiner)), ("never", ("--refiner", refiner, "--refiner-from", 1))):  # fmt: skip
        ran("generate", "a cat", "--model", base, "--steps", 10, "--out", tmp_path / name, *more)
        drawn[name] = Image.open(next((tmp_path / name).glob("000-*.png")))
    assert drawn["without"].tobytes() == drawn["never"].tobytes() != drawn["with"].tobytes()
    assert drawn["with"].text["refiner"] == "refiner from 0.8"
