"""How fast a run is: examples a second, arithmetic against what this machine can do, memory.

Arithmetic is counted once, in the first step, as what PyTorch's operators did, backward pass and
recomputing included. A compiled network is not counted, as PyTorch would then run it uncompiled: a
resumed run would differ in the last bits. The machine's rate is that of one matrix product,
measured before the run in a twentieth of a second. Both go to the lock file of the run, where a
watcher reads them.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.amp import GradScaler
from torch.utils._python_dispatch import TorchDispatchMode

from minidiff.training import lock, ranks
from minidiff.training.backward import Forward, backward_all
from minidiff.training.bins import Loss
from minidiff.training.config import TrainConfig
from minidiff.training.device import peak_bytes
from minidiff.training.progress import peak_memory_gb

SECONDS = 0.05  # to measure the machine's rate
LARGEST = 4096  # side of the matrices
EVERY = 1.0  # seconds between two messages to a watcher
STEPS = 50  # of which the speed is the mean


class Operations(TorchDispatchMode):
    """Counts, inside a with block, the floating-point operations of convolutions, matrix products
    and attention; a multiplication and an addition are two. A thread counts its own."""

    def __init__(self) -> None:
        super().__init__()
        from minidiff.training.ledger import formulas  # a tenth of a second to import

        self.registry, self.count = formulas(), 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **(kwargs or {}))
        if (formula := self.registry.get(operator.overloadpacket)) is not None:
            self.count += formula(*args, **(kwargs or {}), out_val=result)
        return result


class CountingPool(Executor):
    """A pool of threads that counts the operations of what it computes."""

    def __init__(self, pool: Executor):
        self.pool, self.count = pool, 0

    def map(self, function: Callable, values: Iterable) -> Iterator:
        for result, count in self.pool.map(partial(_counted, function), values):
            self.count += count
            yield result


def _counted(function: Callable, value: Any) -> tuple[Any, int]:
    with Operations() as operations:
        return function(value), operations.count


class Meter:
    """Times the steps of a run, and tells those who watch its folder; without one it does
    nothing."""

    def __init__(self, folder: Path | None, config: TrainConfig, module: nn.Module):
        self.folder, self.config = folder, config
        self.device = next(p.device for p in module.parameters() if p.requires_grad)
        self.compiled = any(map(_is_compiled, module.modules()))
        self.starts: deque[float] = deque(maxlen=STEPS + 1)  # of the last steps
        self.examples, self.operations = 0, 0  # of one step
        self.last_message = 0.0
        self.peak = None if folder is None else peak(self.device, config.autocast or torch.float32)

    def backward_all(
        self,
        forward: Forward,
        parameters: list[nn.Parameter],
        batches: list[Any],
        pool: Executor | None,
        scaler: GradScaler,
    ) -> list[Loss]:
        """As backward.backward_all."""
        compute = partial(backward_all, forward, parameters, batches)
        if self.folder is None:
            return compute(pool, scaler)
        self.starts.append(time.perf_counter())
        if self.examples:
            self._tell()
            return compute(pool, scaler)
        losses = compute(pool, scaler) if self.compiled else self._counting(compute, pool, scaler)
        self.examples = sum(len(each["loss"]) for each in losses) * ranks.size()
        return losses

    def _counting(self, compute: Callable, pool: Executor | None, scaler: GradScaler) -> list[Loss]:
        counting = None if pool is None else CountingPool(pool)
        with Operations() as operations:
            losses = compute(counting, scaler)
        self.operations = operations.count + (counting.count if counting else 0)
        return losses

    def _tell(self) -> None:
        if self.starts[-1] - self.last_message < EVERY:
            return
        self.last_message = self.starts[-1]
        bytes_held = peak_bytes(str(self.device))
        status = {
            "steps": self.config.steps,
            "seconds_per_step": (self.starts[-1] - self.starts[0]) / (len(self.starts) - 1),
            "examples_per_step": self.examples,
            "operations_per_step": self.operations,
            "peak_per_second": self.peak,
            "memory_gb": peak_memory_gb() if bytes_held is None else bytes_held / 2**30,
        }
        lock.tell(self.folder, status)


def _is_compiled(module: nn.Module) -> bool:
    """Whether by module.compile() or by torch.compile(module)."""
    return module._compiled_call_impl is not None or hasattr(module, "_orig_mod")


@cache
def peak(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second of a matrix product on this machine, with the threads that
    PyTorch now has: the best of several, of a size that suits the device."""
    side, best, end = 256, float("inf"), time.perf_counter() + SECONDS
    matrix = torch.ones(side, side, device=device, dtype=dtype)
    _product(matrix)  # the first one sets things up
    while time.perf_counter() < end:
        seconds = _product(matrix)
        best = min(best, seconds / side**3)
        if seconds < SECONDS / 20 and side < LARGEST:
            side *= 2
            matrix = torch.ones(side, side, device=device, dtype=dtype)
    return 2 / best


def _product(matrix: torch.Tensor) -> float:
    """Seconds of a product; reading a value waits for a GPU."""
    start = time.perf_counter()
    (matrix @ matrix)[0, 0].item()
    return time.perf_counter() - start
