"""How a run goes on where it stopped: its checkpoints, its log, and signals that wait for the end of a step.

A checkpoint is a file such as checkpoint-000400.pt with its sha256 beside it; the last two are there. The log has a line for each step.
"""
import functools
import hashlib
import json
import os
import re
import signal
import sys
import threading
import warnings
import weakref
from atexit import register
from collections.abc import Callable, Generator
from pathlib import Path
from pickle import UnpicklingError

import torch
from torch import nn

from minidiff import atomic
from minidiff.errors import Terminated, UserError

KEPT = 2  # checkpoints: one, and one to fall back on
BEFORE = "checkpoint.pt"  # the name in earlier versions
UNREADABLE = (OSError, RuntimeError, UnpicklingError, EOFError, LookupError, ValueError, TypeError, AttributeError)
_running: weakref.WeakSet[Generator] = weakref.WeakSet()


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a run's folder, the newest first."""
    numbered = {int(match[1]): file for file in folder.glob("checkpoint-*.pt") if (match := re.fullmatch(r"checkpoint-(\d+)\.pt", file.name))}
    before = [folder / BEFORE] if (folder / BEFORE).exists() else []
    return [numbered[step] for step in sorted(numbered, reverse=True)] + before


class Progress:
    """What a run leaves in its folder, and finds there when it is resumed. Without a folder it does nothing."""

    def __init__(self, folder: Path | None, run: dict[str, object], module: nn.Module, optimizer: torch.optim.Optimizer, ema: nn.Module | None):
        """run: what must be the same where a run goes on; ema: the averages."""
        self.folder, self.run, self.module, self.optimizer, self.ema = folder, run, module, optimizer, ema
        self.whole: list[Path] = []  # the checkpoints to keep, the newest last

    def start(self, resume: bool) -> dict | None:
        """Put everything back as it was; returns the numbers of the last step, None where a run begins. Without `resume` an earlier run's
        checkpoints are removed, so that no later resume finds them."""
        if self.folder is None:
            return None
        for rest in self.folder.glob(".*.minidiff-????????"):  # of a save that was killed
            atomic.recover(self.folder / rest.name[1:].rpartition(".minidiff-")[0])
        last = self._restore() if resume else None
        if last is None:
            for file in checkpoints(self.folder):
                _remove(file)
        cut_log(self.folder / "log.jsonl", last["step"] if last else 0)
        return last

    def log(self, step: dict) -> None:
        """Add a line."""
        if self.folder is not None:
            with open(self.folder / "log.jsonl", "a", encoding="utf-8") as log:
                log.write(json.dumps(step) + "\n")

    def save(self, step: dict) -> None:
        """All that resuming needs, written whole or not at all; then the oldest checkpoint goes. The numbers of the step are in it."""
        if self.folder is None:
            return
        state = {"step": step["step"], "run": self.run, "last": step, "module": self.module.state_dict()}
        state["optimizer"] = _interned(self.optimizer.state_dict())
        state["ema"] = None if self.ema is None else self.ema.state_dict()
        file = self.folder / f"checkpoint-{step['step']:06d}.pt"
        try:
            with open(self.folder / "log.jsonl", "rb") as log:
                os.fsync(log.fileno())  # a checkpoint is never ahead of its log
            with atomic.write(file) as new:
                torch.save(state, new)
                with atomic.write(_sum_of(file)) as beside:
                    beside.write_text(f"{_sha256(new)}  {file.name}\n", encoding="ascii")
        except (OSError, RuntimeError) as error:  # torch's writer says RuntimeError where the disk is full
            reason = f"step {step['step']} could not be saved ({str(error).splitlines()[0]})"
            raise UserError(f"{file}: {reason}; the checkpoint before it is whole. Make room, and resume the run.") from error
        self.whole = [*(other for other in self.whole if other != file), file][-KEPT:]
        for other in set(checkpoints(self.folder)) - set(self.whole):
            _remove(other)

    def _restore(self) -> dict | None:
        """Load the newest checkpoint that is whole."""
        damaged = []
        for file in (files := checkpoints(self.folder)):
            if (state := read_checkpoint(file)) is not None:
                break
            damaged.append(file)
        names = " and ".join(map(str, damaged))
        if len(damaged) == len(files):
            if damaged:
                raise UserError(f"{names}: damaged, or no checkpoint of minidiff, and there is no other; start afresh in another folder.")
            return None
        self._put_back(file, state)
        if damaged:
            warnings.warn(f"{names} is damaged; going on from {file.name}, at step {state['step']}.", stacklevel=2)
        self.whole = [other for other in reversed(files) if other not in damaged]
        return state.get("last", {}) | {"step": state["step"]}

    def _put_back(self, file: Path, state: dict) -> None:
        old = file.name == BEFORE  # it counted a batch's pieces as batches
        for name, value in self.run.items():
            before = state["run"].get(name, value if old else None)
            if repr(before) != repr(value) and not (old and name == "accumulate"):
                raise UserError(f"{file} is of a run with {name} {before}, not {value}; resume with that, or start in another folder.")
        try:
            for saved, here in zip(state["optimizer"]["param_groups"], self.optimizer.param_groups, strict=True):
                saved |= {name: here[name] for name in ("fused", "foreach") if name in here}  # what suits this device
            self.module.load_state_dict(state["module"])
            self.optimizer.load_state_dict(state["optimizer"])
            if self.ema is not None:
                self.ema.load_state_dict(state["ema"])
        except UNREADABLE as error:
            line = str(error).splitlines()[:2][-1].strip()  # torch's first line is a heading where there are more
            advice = "resume with the settings it was made with, or start in another folder"
            raise UserError(f"{file} does not fit this run ({line}); {advice}.") from error


def read_checkpoint(file: Path) -> dict | None:
    """The content of a checkpoint; None where the file is damaged or something else. It is numbers, and cannot run code."""
    try:
        if _sum_of(file).exists() and _sum_of(file).read_bytes().split()[:1] != [_sha256(file).encode()]:
            return None
        state = torch.load(file, map_location="cpu", weights_only=True)
    except UNREADABLE:
        return None
    fits = isinstance(state, dict) and state.keys() >= {"step", "run", "module", "optimizer", "ema"}
    return state if fits and isinstance(state["step"], int) and isinstance(state["run"], dict) and isinstance(state.get("last", {}), dict) else None


def cut_log(file: Path, count: int) -> None:
    """Keep the lines of the first `count` steps: the steps after them are about to happen again."""
    text = file.read_text(encoding="utf-8") if file.exists() else ""
    kept = "".join(text.splitlines(keepends=True)[:count])
    if kept != text or not file.exists():
        with atomic.write(file) as new:
            new.write_text(kept, encoding="utf-8")


def read_log(folder: Path) -> list[dict]:
    """The lines that training wrote: one for each step, those before a resume included."""
    return [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]


class Signals:
    """Ctrl-C and SIGTERM let the step finish, so that it can be saved; a second one interrupts at once. While the caller has a step that is
    saved, there is nothing to wait for. Only the main thread can listen."""

    def __init__(self) -> None:
        self.received: int | None = None
        self.saved: int | None = None  # the step in the caller's hands, if it is saved
        self.before: dict[int, object] = {}

    def __enter__(self) -> "Signals":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(number) not in (signal.SIG_IGN, None):  # who ignores it has a reason
                    self.before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _frame: object) -> None:
        first, self.received = self.received is None, number
        if self.saved is not None or not first:
            self.stop()

    def stop(self) -> None:
        """Raise what the signal means, if one was received."""
        if self.received is not None:
            kind = Terminated if self.received == signal.SIGTERM else KeyboardInterrupt
            raise kind(*([] if self.saved is None else [f"step {self.saved} is saved"]))


def closed_at_exit(generator: Callable[..., Generator]) -> Callable[..., Generator]:
    """Have what a generator function gives closed before Python takes its modules apart, if nobody has closed it."""

    @functools.wraps(generator)
    def start(*args: object, **options: object) -> Generator:
        _running.add(running := generator(*args, **options))
        return running

    return start


@register
def _close() -> None:
    for running in list(_running):
        if not running.gi_running:
            running.close()


def _interned(state: object) -> object:
    """The same with one object for each equal key: pickle writes an object once, and a resumed run's file is to have the same bytes."""
    if isinstance(state, dict):
        return {sys.intern(key) if isinstance(key, str) else key: _interned(value) for key, value in state.items()}
    return [_interned(value) for value in state] if isinstance(state, list) else state


def _sum_of(file: Path) -> Path:
    return file.with_name(file.name + ".sha256")


def _sha256(file: Path) -> str:
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _remove(file: Path) -> None:
    file.unlink(missing_ok=True)
    _sum_of(file).unlink(missing_ok=True)
