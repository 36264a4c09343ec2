"""A ledger of memory and operations: every storage that is made and freed, every FLOP."""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry


def formulas() -> dict[Any, Any]:
    """PyTorch's counts of FLOPs by operation, and what they leave out: attention on a CPU."""
    attention = "_scaled_dot_product_flash_attention"  # on a CPU it has another name
    same = {f"{attention}_for_cpu{end}": f"{attention}{end}" for end in ("", "_backward")}
    aten = torch.ops.aten
    return flop_registry | {
        getattr(aten, cpu): flop_registry[getattr(aten, gpu)] for cpu, gpu in same.items()
    }


class Ledger(TorchDispatchMode):
    """Counts inside a with block: bytes now and at most, every storage once; and FLOPs."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = self.flops = 0
        self.storages: set[int] = set()
        self.formulas = formulas()

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = operation(*args, **kwargs)
        if count := self.formulas.get(operation.overloadpacket):
            self.flops += count(*args, **kwargs, out_val=result)
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                self.note(value.untyped_storage())
        return result

    def note(self, storage: torch.UntypedStorage) -> None:
        place, size = storage._cdata, storage.nbytes()
        if place not in self.storages:
            self.storages.add(place)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.forget, place, size)

    def forget(self, place: int, size: int) -> None:
        self.storages.discard(place)
        self.now -= size

    @contextmanager
    def most(self) -> Iterator[list[int]]:
        """Inside a with block; afterwards the list has the bytes that were added at most."""
        added: list[int] = []
        before, self.peak = self.now, self.now
        yield added
        added.append(self.peak - before)
