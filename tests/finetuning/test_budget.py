"""The flight recorder costs a tenth of the training that it watches, by count of the U-Net's passes; its memory is bounded, its work is shown."""

import gc
import weakref
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from minidiff.finetuning.groups import Group
from minidiff.finetuning.loop import finetune
from minidiff.finetuning.recorder.budget import LEVELS, SHARE, Counts, planned
from minidiff.finetuning.recorder.recorder import CHUNK, Recorder
from minidiff.options.finetuning import FineTuneConfig, RecorderConfig
from tests.finetuning.test_loop import examples, tiny

PROMPTS = {"training caption": "a cat", "held-out caption": "a dog", "unrelated": "a dog"}


def pictures(n):
    return torch.rand(n, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


def evaluations(model, call):
    """How many images pass through the U-Net while gradients are computed, and while not."""
    counts = {True: 0, False: 0}

    def count(module, inputs):
        counts[torch.is_grad_enabled()] += len(inputs[0])

    hook = model.unet.register_forward_pre_hook(count)
    call()
    hook.remove()
    return counts[True], counts[False]


@pytest.mark.parametrize("steps, batch, every", [(70, 8, 10), (40, 16, 10)])
def test_the_recorder_takes_a_tenth_of_the_trainings_evaluations(tmp_path, steps, batch, every):
    """Counted in a whole fine-tune; a training image counts three times, for forward and backward."""
    model, data, held_out = tiny(), examples(6), examples(4, 1)
    config = FineTuneConfig(steps=steps, batch=batch, every=every, lr=1e-3)
    plan = planned(model, config, Counts(1, len(PROMPTS), len(held_out), 6))
    recorder = Recorder(model, tmp_path, PROMPTS, pictures(6), held_out, data, plan.config)
    groups = [Group("data", data)]
    trained, measured = evaluations(
        model, lambda: finetune(model, groups, tmp_path, config, recorder)
    )
    assert trained == steps * batch and 0 < measured <= SHARE * 3 * trained
    assert len(recorder.records) == plan.measurements >= 2
    assert measured <= plan.evaluations <= measured + 6


@pytest.mark.parametrize("guidance, sampler", [(4.0, "ddim"), (1.0, "ddim"), (4.0, "heun")])
@pytest.mark.parametrize("images", [5, 118_000])
def test_plans(guidance, sampler, images):
    """From short to long: never more than a tenth, but where the least is more; then it is said."""
    model, counts = tiny(), Counts(1, 3, 8, images)
    model.guidance, model.sampler = guidance, sampler
    for steps in (1, 10, 113, 400, 1000, 10_000, 10**6):
        for every in (1, 100, 333):
            config = FineTuneConfig(steps=steps, every=every)
            plan = planned(model, config, counts)
            taken = plan.config
            level = next(each for each in LEVELS if each[:2] == (taken.n, taken.steps))
            assert taken.every % every == 0 and 2 <= plan.measurements <= 1 + -(-steps // every)
            assert plan.share <= SHARE or level == LEVELS[-1]
            assert (plan.share > SHARE) == ("because the training is short" in str(plan))
    assert level == LEVELS[0] and plan.measurements > 100 and taken.compared == 2048


def test_a_run_goes_on_at_the_level_it_was_begun_at(tmp_path):
    """Runs of before there was a budget were drawn at the most thorough level."""
    model, config = tiny(), FineTuneConfig(steps=10)
    before = RecorderConfig()
    Recorder(model, tmp_path, PROMPTS, pictures(3), config=before).measure(0, {})
    counts = Counts(1, len(PROMPTS), 0, 3)
    assert planned(model, config, counts, tmp_path / "new").config.n == 2
    plan = planned(model, config, counts, tmp_path)
    assert plan.config == replace(before, every=100, compared=plan.config.compared)
    Recorder(model, tmp_path, PROMPTS, pictures(3), config=plan.config).measure(10, {})


class Lazily(Sequence):
    """Training images that are made when asked for; how many of them lived at once."""

    def __init__(self, n):
        self.n, self.read, self.alive, self.most = n, 0, weakref.WeakSet(), 0

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        image = torch.full((3, 16, 16), i / self.n)
        self.read += 1
        self.alive.add(image)
        self.most = max(self.most, len(self.alive))
        return image


def test_memory_does_not_grow_with_the_training_images(tmp_path):
    """Of 50,000 images 300 are read, evenly from the first on, and at most one chunk is there at once."""
    training = Lazily(50_000)
    config = RecorderConfig(n=2, steps=1, compared=300)
    recorder = Recorder(tiny(), tmp_path, PROMPTS, training, config=config)
    assert training.read == 0
    record = recorder.measure(0, {})
    gc.collect()
    assert recorder.rows.shape == (300, 192) and training.most <= CHUNK + 1
    assert not training.alive and recorder.compared[:3] == [0, 166, 333]
    assert training.read <= 300 + len(record.nearest) * 2
    assert {which for near in record.nearest.values() for _, which in near} <= {*recorder.compared}


def test_measuring_is_shown(tmp_path, capsys):
    Recorder(tiny(), tmp_path, PROMPTS, pictures(3), config=RecorderConfig(n=2, steps=3)).measure(
        7, {}
    )
    assert "measuring step 7:   0%" in capsys.readouterr().err
