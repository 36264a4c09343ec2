"""TensorBoard beside the log: what is written, and that a resumed run has no step twice."""

import sys
import types
from functools import partial
from itertools import repeat

import pytest
import torch
from torch import nn

from minidiff.errors import UserError
from minidiff.options import finetuning as options
from minidiff.options.finetuning import DreamBoothConfig, FineTuneConfig
from minidiff.train import TrainConfig, TrainStep, train
from minidiff.training import tensorboard

MISSING = r"TensorBoard is not installed; it comes with pip install 'minidiff\[tensorboard\]'"


def steps(folder, resume=False, stop=9):
    """A short run whose steps are logged; it is left after `stop` of them."""
    torch.manual_seed(0)
    net, batch = nn.Linear(3, 1), torch.ones(2, 3)
    config = TrainConfig(steps=6, lr=1e-2, save_every=2)
    training = train(partial(loss, net), net, partial(batches, batch), config, None, folder, resume)
    logged = tensorboard.logged(training, folder)
    done = []
    for step in logged:
        done.append(step)
        if step.step == stop:
            logged.close()
    return done


def loss(net, images):
    each = net(images).square().mean(1)
    return {"loss": each, "progress": torch.tensor([0.0, 0.95]), "a part": each}


def batches(batch, _start):
    return repeat(batch)


class Writer:
    """In SummaryWriter's place: keeps what it is given."""

    all: list = []  # noqa: RUF012

    def __init__(self, folder, purge_step):
        self.folder, self.purge_step, self.values, self.closed = folder, purge_step, [], False
        Writer.all.append(self)

    def add_scalar(self, name, value, step):
        self.values.append((name, step))

    def close(self):
        self.closed = True


@pytest.fixture
def writers(monkeypatch):
    module = types.SimpleNamespace(SummaryWriter=Writer)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    monkeypatch.setattr(options, "find_spec", lambda name: name)
    monkeypatch.setattr(Writer, "all", [])
    return Writer.all


def test_every_step_is_written_and_a_resumed_run_purges_what_comes_again(tmp_path, writers):
    steps(tmp_path, stop=5)
    assert [step.step for step in steps(tmp_path, resume=True)] == [4, 5, 6]
    first, second = writers
    assert first.purge_step == 1 and second.purge_step == 4 and first.closed and second.closed
    assert [step for name, step in first.values if name == "loss"] == [1, 2, 3, 4, 5]
    assert [step for name, step in second.values if name == "loss"] == [4, 5, 6]
    assert first.folder == tmp_path


def test_the_names():
    step = TrainStep(3, 0.5, [0.1, None, 0.3], 1e-3, 2.0, {"subject": 0.7})
    assert tensorboard.scalars(step) == {
        "loss": 0.5,
        "learning rate": 1e-3,
        "gradient norm": 2.0,
        "loss of/subject": 0.7,
        "loss by noise level/0.0": 0.1,
        "loss by noise level/0.2": 0.3,
    }
    told = {"seconds_per_step": 0.5, "examples_per_step": 16, "operations_per_step": 25e9}
    told |= {"peak_per_second": 100e9, "memory_gb": 1.5}
    assert tensorboard.speed(told) == {
        "speed/examples per second": 32,
        "speed/share of the peak": 0.5,
        "speed/GB held at most": 1.5,
    }
    assert tensorboard.speed({}) == {}


def test_without_it_nothing_is_needed_and_with_it_one_line_says_what(tmp_path, monkeypatch):
    monkeypatch.setattr(options, "find_spec", lambda name: None)
    training = (step for step in ())
    assert tensorboard.logged(training, tmp_path, wanted=False) is training
    with pytest.raises(UserError, match=MISSING):
        tensorboard.logged(training, tmp_path)
    with pytest.raises(UserError, match=MISSING):
        FineTuneConfig(tensorboard=True)
    FineTuneConfig()
    monkeypatch.undo()
    monkeypatch.setattr(options, "find_spec", lambda name: name)
    assert "tensorboard" not in FineTuneConfig(tensorboard=True).identity()
    assert DreamBoothConfig(prompt="a sks dog", prior=0, tensorboard=True).tensorboard


def test_tensorboard_reads_each_step_once(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    steps(tmp_path, stop=5)
    done = steps(tmp_path, resume=True)
    read = EventAccumulator(str(tmp_path)).Reload()
    assert [event.step for event in read.Scalars("loss")] == [1, 2, 3, 4, 5, 6]
    assert read.Scalars("loss")[-1].value == pytest.approx(done[-1].loss)
    assert len(read.Scalars("loss by noise level/0.9")) == 6
