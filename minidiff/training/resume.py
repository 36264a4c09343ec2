"""How a run goes on where it stopped: checkpoints, a log, and signals that wait for a step's end.

A checkpoint is a file such as checkpoint-000400.pt with its sha256 beside it; the last two stay. A
thread writes it, from a copy in the host's memory, while training goes on. The log has a line for
each step.
"""

import copy
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
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from minidiff.errors import Terminated, UserError
from minidiff.training import atomic, distributed, ranks
from minidiff.training.device import free_bytes
from minidiff.training.json_types import fits

KEPT = 2  # checkpoints: one, and one to fall back on
BEFORE = "checkpoint.pt"  # the name in earlier versions
FIRST = b'{"step": '  # a log begins so
KINDS = {"step": int, "run": dict}
UNREADABLE = (OSError, RuntimeError, UnpicklingError, EOFError, LookupError)
UNREADABLE += (ValueError, TypeError, AttributeError)
_running: weakref.WeakSet[Generator] = weakref.WeakSet()


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a run's folder, the newest first."""
    files = [f for f in folder.glob("checkpoint-*.pt") if re.fullmatch(r"checkpoint-\d+", f.stem)]
    files.sort(key=lambda file: int(file.stem.partition("-")[2]), reverse=True)
    return files + ([folder / BEFORE] if (folder / BEFORE).exists() else [])


def _step_of(file: Path) -> int:
    return int(file.stem.partition("-")[2] or 0)


@dataclass
class Progress:
    """What a run leaves in its folder, and finds when it is resumed; nothing without a folder."""

    folder: Path | None
    run: dict[str, object]  # what must be the same where a run goes on
    module: nn.Module
    optimizer: torch.optim.Optimizer
    ema: nn.Module | None  # the averages
    save_every: int
    steps: int  # of the whole run
    scaler: torch.amp.GradScaler  # of the gradients, in float16
    background: bool = True  # write checkpoints while training goes on, if memory has room
    whole: list[Path] = field(default_factory=list)  # the checkpoints to keep, the newest last
    writing: Future | None = None  # of the checkpoint that the thread is at

    def __enter__(self) -> "Progress":
        self.thread = ThreadPoolExecutor(1)
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.wait()
        except KeyboardInterrupt:  # the first one waits as well
            self.wait()
            raise
        finally:
            self.thread.shutdown(wait=False)

    def wait(self) -> None:
        """Until the thread has written the checkpoint; raises the error if it could not."""
        if self.writing is not None:
            wait_for([self.writing])
            writing, self.writing = self.writing, None
            writing.result()

    def start(self, resume: bool) -> dict | None:
        """Put everything back; return the numbers of the last step, None where a run begins.

        Without `resume`, remove an earlier run's checkpoints, so that no later resume finds them.
        """
        file = state = None
        with distributed.main_first():
            if self.folder is not None and ranks.is_main():
                atomic.clean(self.folder)
                if resume or ranks.begun(self.folder):
                    file, state = self._newest()
        file, state = distributed.from_main((file, state))
        if state is not None:
            self._put_back(file, state)
        last = state and state.get("last", {}) | {"step": state["step"]}
        with distributed.main_first():
            if self.folder is not None:
                for other in () if last else checkpoints(self.folder):
                    _remove(other)
                cut_log(self.folder / "log.jsonl", last["step"] if last else 0)
                ranks.begin(self.folder)
        return last

    def due(self, step: int) -> bool:
        """Whether a checkpoint is written after this step, interrupted or not."""
        return step % self.save_every == 0 or step == self.steps

    def log(self, step: dict) -> None:
        """Add a line. Raise the error of a checkpoint that could not be written meanwhile."""
        if self.writing is not None and self.writing.done():
            self.wait()
        if self.folder is not None:
            path = self.folder / "log.jsonl"
            with atomic.naming(path), open(path, "a", encoding="utf-8") as log:
                log.write(json.dumps(step) + "\n")

    def save(self, step: dict) -> None:
        """Save all that resuming needs, once the checkpoint before it is written."""
        self.wait()
        state = {"step": step["step"], "run": self.run, "last": step}
        state["module"] = self.module.state_dict()
        state["optimizer"] = _interned(self.optimizer.state_dict())
        state["ema"] = None if self.ema is None else self.ema.state_dict()
        if self.scaler.is_enabled():
            state["scaler"] = self.scaler.state_dict()
        state = distributed.whole(state)
        if self.folder is None or not ranks.is_main():
            return
        storages = _storages(state)
        size = sum(storage.nbytes() for storage in storages.values())
        if self.background and size < free_bytes("cpu"):
            self.writing = self.thread.submit(self._write, _copied(state, storages))
        else:
            self._write(state)

    def _write(self, state: dict) -> None:
        """Write a checkpoint, whole or not at all; then the oldest goes, and one of an
        interruption, so that in the end the files are those of an uninterrupted run."""
        step = state["step"]
        file = self.folder / f"checkpoint-{step:06d}.pt"
        try:
            with open(self.folder / "log.jsonl", "rb") as log:
                os.fsync(log.fileno())  # a checkpoint is never ahead of its log
            with atomic.write(file) as new:
                torch.save(state, new)
                with atomic.write(_sum_of(file)) as beside:
                    beside.write_text(f"{_sha256(new)}  {file.name}\n", encoding="ascii")
        except (OSError, RuntimeError) as error:  # RuntimeError: torch's writer, on a full disk
            reason = f"step {step} could not be saved ({str(error).splitlines()[0]})"
            remedy = "the checkpoint before it is whole. Make room, and resume the run"
            raise UserError(f"{file}: {reason}; {remedy}.") from error
        earlier = [other for other in self.whole if other != file]
        scheduled = [other for other in earlier if self.due(_step_of(other))]
        if scheduled or self.due(step):
            earlier = scheduled
        self.whole = [*earlier[1 - KEPT :], file]
        for other in set(checkpoints(self.folder)) - set(self.whole):
            _remove(other)

    def _newest(self) -> tuple[Path | None, dict | None]:
        """The newest checkpoint that is whole, and its content."""
        state, files = None, checkpoints(self.folder)
        if not files:
            return None, None
        for file in files:
            if (state := read_checkpoint(file)) is not None:
                break
        if state is None:
            reason = "damaged, or no checkpoint of minidiff, and there is no other"
            names = " and ".join(map(str, files))
            raise UserError(f"{names}: {reason}; start afresh in another folder.")
        k = files.index(file)
        if damaged := " and ".join(map(str, files[:k])):
            place = f"going on from {file.name}, at step {state['step']}"
            warnings.warn(f"{damaged} is damaged; {place}.", stacklevel=2)
        self.whole = files[k:][::-1]
        return file, state

    def _put_back(self, file: Path, state: dict) -> None:
        old = file.name == BEFORE  # it counted a batch's pieces as batches
        for name, value in self.run.items():
            before = state["run"].get(name, value if old else None)
            if repr(before) != repr(value) and not (old and name == "accumulate"):
                remedy = "resume with that, or start in another folder"
                raise UserError(f"{file} is of a run with {name} {before}, not {value}; {remedy}.")
        try:
            groups = state["optimizer"]["param_groups"], self.optimizer.param_groups
            for saved, here in zip(*groups, strict=True):
                saved |= {name: here[name] for name in here if name != "params"}  # the config's
            distributed.put_in(self.module, state["module"])
            self.optimizer.load_state_dict(_moments_like(state["optimizer"], self.optimizer))
            for parameter, moments in self.optimizer.state.items():
                if not all(_fits(*moment, parameter) for moment in moments.items()):
                    raise ValueError("the optimizer's moments have other shapes")
            if self.ema is not None:
                distributed.put_in(self.ema, state["ema"])
            if self.scaler.is_enabled() and "scaler" in state:
                self.scaler.load_state_dict(state["scaler"])
        except UNREADABLE as error:
            line = str(error).splitlines()[:2][-1].strip()  # the first of several is a heading
            advice = "resume with the settings it was made with, or start in another folder"
            raise UserError(f"{file} does not fit this run ({line}); {advice}.") from error


def read_checkpoint(file: Path) -> dict | None:
    """The content of a checkpoint, which cannot run code; None if it is damaged or none of ours."""
    try:
        checksum = _sum_of(file)
        if checksum.exists() and checksum.read_bytes().split()[:1] != [_sha256(file).encode()]:
            return None
        state = torch.load(file, map_location="cpu", weights_only=True)
    except UNREADABLE:
        return None
    if not (isinstance(state, dict) and state.keys() >= {*KINDS, "module", "optimizer", "ema"}):
        return None
    fits = all(isinstance(state[name], kind) for name, kind in KINDS.items())
    return state if fits and isinstance(state.get("last", {}), dict) else None


def cut_log(file: Path, count: int) -> None:
    """Keep the lines of the first `count` steps: the later steps are about to happen again."""
    content = file.read_bytes() if file.exists() else b""
    if not FIRST.startswith(content[: len(FIRST)]):
        remedy = "move it away, or choose another folder"
        raise UserError(f"{file} was not written by minidiff, and would be lost; {remedy}.")
    kept = b"".join(content.splitlines(keepends=True)[:count])
    if kept != content or not file.exists():
        with atomic.write(file) as new:
            new.write_bytes(kept)


def read_log(folder: Path) -> list[dict]:
    """The lines that training wrote: one for each step, those before a resume included."""
    file = folder / "log.jsonl"
    try:
        steps = list(map(json.loads, file.read_bytes().splitlines()))
    except (ValueError, RecursionError) as error:
        steps = [error]
    if not fits(steps, list[dict]):
        raise UserError(f"{file} is damaged; start afresh in another folder.")
    return steps


class Signals:
    """Ctrl-C and SIGTERM let the step finish, so that it can be saved.

    A second one interrupts at once; so does the first while the caller has a step that is saved.
    Only the main thread can listen. Of several processes, all act after the same step: one passes
    on what it hears, and torchrun sends it to all, some of it twice.
    """

    def __init__(self) -> None:
        self.heard = 0  # of several processes: the signal that is passed on with the next step
        self.received: int | None = None
        self.saved: int | None = None  # the step in the caller's hands, if it is saved
        self.before: dict[int, object] = {}

    def __enter__(self) -> "Signals":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(number) not in (signal.SIG_IGN, None):  # ignored on purpose
                    self.before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
        if self.heard and not self.received:  # after the last step
            os.kill(os.getpid(), self.heard)

    def agree(self) -> None:
        """Receive what one process has heard."""
        if ranks.size() > 1:
            self.received = distributed.largest(self.heard) or None

    def _receive(self, number: int, _frame: object) -> None:
        if ranks.size() > 1:
            self.heard = number
            return
        first, self.received = self.received is None, number
        if self.saved is not None or not first:
            self.stop()

    def stop(self) -> None:
        """Raise what the signal means, if one was received."""
        if self.received is not None:
            kind = Terminated if self.received == signal.SIGTERM else KeyboardInterrupt
            raise kind(*([] if self.saved is None else [f"step {self.saved} is saved"]))


def closed_at_exit(generator: Callable[..., Generator]) -> Callable[..., Generator]:
    """Close what a generator function gives before Python takes its modules apart."""

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
    """The same with one object for each equal key, so that a resumed run pickles equal bytes."""
    if isinstance(state, dict):
        keys = (sys.intern(key) if isinstance(key, str) else key for key in state)
        return dict(zip(keys, map(_interned, state.values()), strict=True))
    return [_interned(value) for value in state] if isinstance(state, list) else state


def _storages(state: dict) -> dict[int, torch.UntypedStorage]:
    """The memory of all tensors, each once, by its address."""
    tensors = (value for value in tree_leaves(state) if isinstance(value, Tensor))
    return {storage._cdata: storage for storage in (t.untyped_storage() for t in tensors)}


def _copied(state: dict, storages: dict[int, torch.UntypedStorage]) -> dict:
    """The state with its tensors on the CPU. Tensors that share memory still do, and all else is
    shared as before, so that the copy pickles to the same bytes."""
    copies = {
        place: storage.clone() if storage.device.type == "cpu" else storage.cpu()
        for place, storage in storages.items()
    }
    tensors: dict[int, Tensor] = {}
    for t in tree_leaves(state):
        if isinstance(t, Tensor):
            layout = t.storage_offset(), t.size(), t.stride()
            same = copies[t.untyped_storage()._cdata]
            tensors[id(t)] = torch.empty(0, dtype=t.dtype).set_(same, *layout)
    return copy.deepcopy(state, tensors)


def _moments_like(state: dict, optimizer: torch.optim.Optimizer) -> dict:
    """The state with the moments of parameters that are in shards in shards as well."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    moments = {
        k: {name: distributed.like(value, parameters[k]) for name, value in of_one.items()}
        for k, of_one in state["state"].items()
    }
    return state | {"state": moments}


def _fits(name: str, moment: Tensor, parameter: Tensor) -> bool:
    dense = moment.layout == torch.strided and not moment.is_nested
    shapes = {"step": torch.Size(), "exp_avg": parameter.shape, "exp_avg_sq": parameter.shape}
    return dense and moment.shape == shapes.get(name, moment.shape)


def _sum_of(file: Path) -> Path:
    return file.with_name(file.name + ".sha256")


def _sha256(file: Path) -> str:
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _remove(file: Path) -> None:
    file.unlink(missing_ok=True)
    _sum_of(file).unlink(missing_ok=True)
