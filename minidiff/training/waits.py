"""Where a loop waits for a GPU: synchronisations counted by place, idle time by profiler.

PyTorch warns at every copy and read-back that waits (torch.cuda.set_sync_debug_mode); a warning has
the place of the Python line. The profiler's trace has every kernel, and so the gaps between them.
Without a GPU, Waits counts on the device meta.
"""

import json
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from minidiff.training.device import wait

WORK = {"kernel", "gpu_memcpy", "gpu_memset"}  # of a trace: what a GPU does
MESSAGE = "synchronizing CUDA operation"  # of PyTorch's warning
FROM_LISTS = {torch.tensor, torch.as_tensor, torch.asarray, Tensor.new_tensor}
BETWEEN = {Path(__file__).name, "torch", "jaxtyping", "<string>"}  # us and the line that waits
ATEN = torch.ops.aten
FROM_LISTS = {torch.tensor, torch.as_tensor, torch.asarray, Tensor.new_tensor}
NUMBERS = torch.ops.aten._local_scalar_dense.default  # of item(), tolist(), bool(), float()
COPIES = {torch.ops.aten._to_copy.default: 0, torch.ops.aten.copy_.default: 1}  # place of source


class Enough(Exception):
    """The watched run may end."""


class Busy(NamedTuple):
    """What a trace says of a device."""

    events: int
    share: float  # of the time from the first to the last event, in which it worked
    longest: float  # seconds of the longest gap
    gaps_above_a_millisecond: int
    synchronising: dict[str, int]  # calls of the runtime that wait


@contextmanager
def synchronisations(device: str) -> Iterator[Counter[str]]:
    """Counts, inside a with block, the synchronisations of a GPU by file and line."""
    places: Counter[str] = Counter()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if device.startswith("cuda"):
            torch.cuda.set_sync_debug_mode("warn")
        try:
            yield places
        finally:
            if device.startswith("cuda"):
                torch.cuda.set_sync_debug_mode("default")
    for one in caught:
        if MESSAGE in str(one.message):
            places[f"{'/'.join(Path(one.filename).parts[-2:])}:{one.lineno}"] += 1
        else:  # not ours to keep
            warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)


class Waits(TorchDispatchMode):
    """Counts, inside a with block, what waits for the device meta, by file and line.

    meta stands in for a GPU: it computes nothing, and every number that is read from it is 1.
    Counted are reads, as by item(), tolist() and cpu(), and copies to it that are not non_blocking,
    torch.tensor(..., device="meta") included. What must wait for a shape, as nonzero(), raises.
    """

    def __init__(self) -> None:
        super().__init__()
        self.places: Counter[str] = Counter()
        self.lists = _FromLists(self.places)

    def __enter__(self) -> "Waits":
        self.lists.__enter__()
        return super().__enter__()

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        self.lists.__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is ATEN._local_scalar_dense.default and args[0].is_meta:
            self.places[_place()] += 1
            return torch.ones((), dtype=args[0].dtype).item()
        if func is ATEN._to_copy.default:
            source, to_meta = args[0], (kwargs.get("device") or args[0].device).type == "meta"
            blocking = not kwargs.get("non_blocking")
        elif func is ATEN.copy_.default:
            source, to_meta, blocking = args[1], args[0].is_meta, not any(args[2:])
        else:
            return func(*args, **kwargs)
        is_read = source.is_meta and not to_meta
        if is_read or (to_meta and not source.is_meta and blocking):
            self.places[_place()] += 1
        if is_read and func is ATEN._to_copy.default:
            return torch.ones(source.shape, dtype=kwargs.get("dtype") or source.dtype)
        return args[0].fill_(1) if is_read else func(*args, **kwargs)


class _FromLists(TorchFunctionMode):
    """Counts the tensors that are made on meta from numbers: dispatch does not see their copy."""

    def __init__(self, places: Counter[str]) -> None:
        super().__init__()
        self.places = places

    def __torch_function__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        if func in FROM_LISTS and made.is_meta:
            self.places[_place()] += 1
        return made


def _place() -> str:
    """The line that called PyTorch."""
    frame = sys._getframe(2)
    while not BETWEEN.isdisjoint(Path(frame.f_code.co_filename).parts):
        frame = frame.f_back
    return f"{'/'.join(Path(frame.f_code.co_filename).parts[-2:])}:{frame.f_lineno}"


def busy_in(trace: Path, work: Iterable[str] = WORK) -> Busy:
    """Of a Chrome trace. work: categories of the events that count as work."""
    events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    work = set(work)
    spans = sorted((e["ts"], e["ts"] + e["dur"]) for e in events if e.get("cat") in work)
    runtime = (e["name"] for e in events if e.get("cat") in ("cuda_runtime", "cuda_driver"))
    waits = Counter(name for name in runtime if "Synchronize" in name)
    if not spans:
        return Busy(0, 0.0, 0.0, 0, dict(waits))
    (first, end), idle = spans[0], []
    for start, stop in spans:
        if start > end:
            idle.append(start - end)
        end = max(end, stop)
    share = 1 - sum(idle) / max(end - first, 1e-9)
    long = sum(gap > 1000 for gap in idle)  # in microseconds
    return Busy(len(spans), share, max(idle, default=0.0) / 1e6, long, dict(waits))


class Watch:
    """In the flight recorder's place: times a fine-tune, counts its waits, profiles it, ends it."""

    def __init__(self, device: str, every: int, until: float):
        """every: steps between two calls of measure. until: when to stop timing, in time.time()."""
        self.device, self.every, self.until = device, every, until
        self.seconds: list[float] = []  # of a step, a mean of each `every` steps
        self.waits: Counter[str] = Counter()  # of the last but one `every` steps
        self.busy = Busy(0, 0.0, 0.0, 0, {})  # of the last `every` steps
        self.phases = self._phases()

    def measure(self, step: int, losses: dict[str, float], lr: float | None = None) -> None:
        wait(self.device)
        next(self.phases)

    def due(self, step: int) -> bool:
        return step % self.every == 0

    def last(self) -> None:
        return None

    def best(self) -> None:
        return None

    def _phases(self) -> Iterator[None]:
        yield  # before the first step
        yield  # the first steps are slower
        while len(self.seconds) < 1 or time.time() < self.until:
            begun = time.perf_counter()
            yield
            self.seconds.append((time.perf_counter() - begun) / self.every)
        with synchronisations(self.device) as self.waits:
            yield
        on_gpu = self.device.startswith("cuda")
        activity = ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU
        with profile(activities=[activity]) as profiler:
            yield
        with tempfile.TemporaryDirectory() as folder:
            trace = Path(folder) / "trace.json"
            profiler.export_chrome_trace(str(trace))
            self.busy = busy_in(trace, WORK if on_gpu else {"cpu_op"})
        raise Enough
