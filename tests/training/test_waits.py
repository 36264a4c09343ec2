"""How often a step waits for a GPU, for which the device meta stands in."""

import sys
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from minidiff import samplers
from minidiff.finetuning import groups, loop
from minidiff.options.finetuning import FineTuneConfig
from minidiff.options.sampling import SampleConfig
from minidiff.text import CLIPText, TextConfig
from minidiff.train import EMA, TrainConfig, train
from minidiff.training import device
from minidiff.training.ahead import Ahead
from minidiff.training.waits import Waits

from ..finetuning.test_loop import NAMES, examples, tiny, two_groups

sys.path.insert(0, str(Path(__file__).parents[2] / "experiments"))
import cifar_ddpm
import cifar_recipes

STEPS = 3


def reader():
    return CLIPText(TextConfig(width=8, layers=1, heads=2, context_length=10))


@pytest.fixture(autouse=True)
def no_autocast(monkeypatch):
    """meta has none."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())


def test_every_way_of_waiting_is_counted():
    x, y = torch.ones(3, 3, device="meta"), torch.ones(3, 3)
    ways = [
        x.cpu,
        x.tolist,
        x.sum().item,
        x.sum().__bool__,
        x[0, 0].__float__,
        x.argmax().__index__,
        partial(x.to, "cpu", torch.float64),
        partial(x.to, y),
        partial(y.copy_, x),
        partial(y.to, "meta"),
        partial(x.copy_, y),
        partial(torch.tensor, [1, 2], device="meta"),
        partial(torch.as_tensor, y, device="meta"),
        partial(x.new_tensor, [1.0]),
    ]
    with Waits() as waits:
        for way in ways:
            before = waits.places.total()
            way()
            assert waits.places.total() > before, way
        before = waits.places.total()
        # none waits: neither work on one of the two, nor a copy that need not be awaited
        y.sum().item(), y.to(torch.float64), x.to(torch.float64), x.clone(), x.copy_(x), y.tolist()
        y.to("meta", non_blocking=True), x.copy_(y, non_blocking=True), torch.tensor([1.0])
        torch.arange(3, device="meta"), x.new_zeros(3)
        assert waits.places.total() == before
        with pytest.raises(NotImplementedError):
            x.nonzero()
    assert {place.partition(":")[0] for place in waits.places} == {"training/test_waits.py"}


def draws(start):
    """Batches that take from PyTorch's own random numbers, and an error after the fourth."""
    for k in range(start, 4):
        yield k, torch.rand(2)
    raise ValueError("no fifth")


def test_batches_made_ahead_are_the_same():
    """So are the random numbers after them, whatever else was drawn; an error comes in its turn."""
    config = TrainConfig(steps=3, lr=1.0, accumulate=2)
    numbers = {}
    for place in ("cpu", "meta"):
        data, numbers[place] = Ahead(draws(0), config, torch.device(place)), []
        for step in range(2):
            numbers[place] += [*data.take(step), torch.rand(1)]
            data.prepare(step + 1)
            torch.rand(step + 1)
        with pytest.raises(ValueError, match="no fifth"):
            data.take(2)
    assert str(numbers["cpu"]) == str(numbers["meta"])
    last = iter([1, 2, 3])
    data = Ahead(last, TrainConfig(steps=1, lr=1.0), torch.device("meta"))
    assert data.take(0) == [1]
    data.prepare(1)  # there is no such step
    assert next(last) == 2


def test_what_is_read_at_once_is_what_was_there():
    tensors = [torch.tensor([1.1, 2.0]).bfloat16(), torch.tensor([[3]]), torch.rand(2).double()]
    with Waits() as waits:
        there = [tensor.to("meta", non_blocking=True) for tensor in tensors]
        read = device.to_cpu([*there, tensors[0]])
    assert waits.places.total() == 1 and read[3] is tensors[0]
    assert [(one.dtype, one.shape) for one in read[:3]] == [(t.dtype, t.shape) for t in tensors]
    assert device.to_cpu(tensors) is tensors


CASES = {
    "full": dict(method="full", ema=0.9),
    "LoRA": dict(method="lora"),
    "text": dict(method="full", text=True, accumulate=2),
    "word": dict(method="lora", word="sks", like="dog"),
    "learned weighting": dict(method="full"),
}


@pytest.mark.parametrize("parts", ([groups.Group("data", examples(6))], two_groups()))
@pytest.mark.parametrize("case", CASES)
def test_a_step_of_a_fine_tune(case, parts):
    config = FineTuneConfig(steps=STEPS, lr=1e-3, batch=2, dropout=0.1, **CASES[case])
    weighting = "learned" if case == "learned weighting" else None
    model = tiny(weighting=weighting, text=reader())
    contexts = None
    if not (config.text or config.word):
        contexts = dict.fromkeys(["", *NAMES], torch.ones(10, 8))
    model.to("meta")
    word = loop.trained_word(model, config)
    trained = loop.to_train(model, model.denoiser, config, word)
    if word:
        word.attach(model.text)
    average = config.ema and EMA(trained, config.ema)
    data = partial(groups.batches, parts, model.schedule, 2, config.dropout, 0)
    loss = groups.GroupLoss(model, contexts)
    training = loop.train_config(config, 1)
    with Waits() as waits:
        for _ in train(loss, trained, data, training, average or None):
            pass
    assert waits.places.total() <= STEPS, waits.places


@pytest.mark.parametrize("preset", ("small", "paper"))
def test_a_step_on_cifar(preset):
    recipe = cifar_recipes.PRESETS[preset]
    recipe = replace(recipe, unet=cifar_recipes.unet_tiny, patch=1)
    model = cifar_recipes.new_model(recipe, NAMES if recipe.conditional else [], "meta")
    images = torch.zeros(8, 3, 32, 32, dtype=torch.uint8)
    data = partial(cifar_ddpm.batches, images, [*NAMES, *NAMES] * 2, 4, 0)
    loss = partial(cifar_ddpm.loss, model, recipe.chain)
    with Waits() as waits:
        for _ in train(loss, model, data, TrainConfig(STEPS, 1e-3), EMA(model, 0.9)):
            pass
    assert waits.places.total() <= STEPS, waits.places


@pytest.mark.parametrize("sampler", samplers.SAMPLERS)
def test_a_step_of_sampling(sampler):
    model = tiny(target="v", text=reader()).to("meta")
    step = samplers.by_name(sampler)
    denoise = model.guided(["a", "b"], SampleConfig(rescale=0.5), 3.0)
    x_T = torch.zeros(2, 4, 8, 8, device="meta")
    noise = samplers.Normal.seeded(0, range(2))
    with Waits() as waits:
        for _ in samplers.sample(denoise, model.schedule, x_T, 5, step, noise=noise):
            pass
    assert not waits.places  # all is known before
