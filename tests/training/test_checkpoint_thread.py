"""Checkpoints are written while training goes on: the same bytes, one at a time, no error lost, and nobody ends before the writer does."""

import copy
import hashlib
import io
import os
import signal
import threading
from itertools import repeat

import pytest
import torch
from torch import nn

from minidiff.errors import UserError
from minidiff.train import EMA, TrainConfig, train
from minidiff.training import resume
from minidiff.training.resume import _copied, _storages, checkpoints


class Tied(nn.Module):
    """Two layers of one weight, and a buffer that is a view of half of another."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.register_buffer("table", torch.arange(8.0))
        self.register_buffer("upper", self.table[4:])

    def forward(self, x):
        return self.second(self.first(x))


def training(folder, module=None, steps=6, every=2, **how):
    module = module or Tied()
    return train(
        lambda x: {"loss": module(x).pow(2).mean(1)},
        module,
        lambda _: repeat(torch.ones(2, 4)),
        TrainConfig(steps, 1e-3, save_every=every, **how),
        EMA(module, 0.9),
        folder,
    )


def pickled(state):
    file = io.BytesIO()
    torch.save(state, file)
    return hashlib.sha256(file.getvalue()).hexdigest()


def test_a_copy_pickles_to_the_same_bytes():
    """What is shared stays shared, keys and numbers among them: an uninterrupted and a resumed run write one file."""
    module = Tied()
    optimizer = torch.optim.AdamW(module.parameters())
    module(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    betas = optimizer.param_groups[0]["betas"]
    state = {
        "module": module.state_dict(),
        "optimizer": optimizer.state_dict(),
        "run": {"b": betas},
    }
    copied = _copied(state, _storages(state))
    assert pickled(copied) == pickled(state) != pickled({**state, "more": 1})
    before = copy.deepcopy(copied)
    with torch.no_grad():
        module.first.weight.zero_()
        optimizer.state[module.first.weight]["exp_avg"].zero_()
    assert pickled(copied) == pickled(before) != pickled(state)


@pytest.mark.parametrize("free", [0, 2**40])
def test_files_are_those_of_a_run_that_waits(tmp_path, monkeypatch, free):
    """With memory for the copy, without, and where it is not wanted."""
    torch.manual_seed(0)
    module = Tied()
    list(training(tmp_path / "waits", copy.deepcopy(module), background=False))
    monkeypatch.setattr(resume, "free_bytes", lambda _: free)
    list(training(tmp_path / "here", module))
    files = [sorted(f for f in (tmp_path / n).iterdir()) for n in ("waits", "here")]
    assert [f.name for f in files[0]] == [f.name for f in files[1]] and len(files[0]) == 5
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(*files, strict=True))


class Slow:
    """torch.save that waits for a word, and notes who is in it."""

    def __init__(self):
        self.go, self.inside, self.save = threading.Event(), [], torch.save

    def __call__(self, state, file):
        self.inside.append((state["step"], threading.current_thread() is threading.main_thread()))
        assert self.go.wait(20)
        self.save(state, file)


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path, monkeypatch):
    slow = Slow()
    monkeypatch.setattr(torch, "save", slow)
    steps = training(tmp_path)
    assert [next(steps).step for _ in range(3)] == [1, 2, 3]
    assert not checkpoints(tmp_path)
    slow.go.set()
    assert [step.step for step in steps] == [4, 5, 6]
    assert slow.inside == [(2, False), (4, False), (6, False)]
    assert [file.stem[-1] for file in checkpoints(tmp_path)] == ["6", "4"]


def test_a_closed_run_waits_for_its_writer(tmp_path, monkeypatch):
    slow = Slow()
    monkeypatch.setattr(torch, "save", slow)
    steps = training(tmp_path)
    assert [next(steps).step for _ in range(2)] == [1, 2]
    threading.Timer(0.2, slow.go.set).start()
    steps.close()
    assert [file.stem[-1] for file in checkpoints(tmp_path)] == ["2"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_during_the_last_wait_still_waits(tmp_path, monkeypatch, number):
    """The first one: the checkpoint is whole, and the run ends as it was told."""
    slow = Slow()
    monkeypatch.setattr(torch, "save", slow)
    steps = training(tmp_path, steps=2)
    assert [next(steps).step for _ in range(2)] == [1, 2]
    threading.Timer(0.2, os.kill, (os.getpid(), number)).start()
    threading.Timer(0.6, slow.go.set).start()
    with pytest.raises(KeyboardInterrupt, match="step 2 is saved"):
        next(steps)
    assert [file.stem[-1] for file in checkpoints(tmp_path)] == ["2"]


def test_an_error_of_the_writer_reaches_the_next_step(tmp_path, monkeypatch):
    tried = threading.Event()

    def full(state, file):
        tried.set()
        raise OSError(28, "No space left on device")

    steps = training(tmp_path, every=2)
    next(steps)
    monkeypatch.setattr(torch, "save", full)
    assert next(steps).step == 2 and tried.wait(20)
    with pytest.raises(UserError, match=r"step 2 could not be saved .*whole. Make room"):
        list(steps)
    assert not checkpoints(tmp_path)
    count = len((tmp_path / "log.jsonl").read_text().splitlines())
    assert count <= 4, "it went on past the next checkpoint"
