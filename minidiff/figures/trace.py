"""What runs inside a network, call by call, recorded while it runs.

    with minidiff.trace(model.unet) as rows:
        model.unet(x, t, context)
    print(rows)                      # a table; rows.table(depth=2) shows less of it
    rows.draw("unet.svg")            # the U-Net with its skips

On the meta device nothing is computed: shapes, parameters and multiply-adds are there, the rest is
None.
"""

import contextlib
import json
import math
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import takewhile
from pathlib import Path
from time import perf_counter

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop

from minidiff.errors import UserError

# torch's counter leaves out the fused attention of the CPU
FUSED = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: sdpa_flop}
SCALES = ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k"))
HEADINGS = "module kind shape dtype mean std parameters multiply-adds ms memory".split()


@dataclass(frozen=True)
class Row:
    """One call of one module. The output's fields are None where the call raised an exception or
    returned no tensor; of several tensors the first counts."""

    name: str  # in the model that is traced, as in "encoder.0.residual.1"; "" is that model itself
    kind: str  # the module's class
    parent: int | None  # the index of the call that made this one
    parameters: int  # of the module and all modules in it
    shape: tuple[int, ...] | None = None  # of the output
    dtype: str | None = None  # of the output, as in "float32"
    mean: float | None = None  # of the output
    std: float | None = None  # standard deviation of the output
    multiply_adds: int | None = None  # of the call and all calls in it; matrix products alone count
    seconds: float | None = None  # in torch's operations alone, of the same calls
    bytes: int | None = None  # the most that new tensors took at one moment of the call

    @property
    def depth(self) -> int:
        """How many modules this one is inside of."""
        return len(self.name.split(".")) if self.name else 0


@dataclass(frozen=True)
class Join:
    """A concatenation (torch.cat) whose result went into a module, by indices of rows."""

    sources: tuple[int | None, ...]  # the calls that returned its inputs; None: no call of a module
    target: int  # the call that took the result


class Trace(Sequence[Row]):
    """The calls in the order in which they began, and the concatenations between them."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.rows: list[Row] = []
        self.joins: list[Join] = []

    def __getitem__(self, index):
        return self.rows[index]

    def __len__(self) -> int:
        return len(self.rows)

    def __str__(self) -> str:
        return self.table()

    def outline(self, depth: int | None = None) -> list[Row]:
        """The rows down to a depth. A module that is never called itself, as a list of layers,
        stands before the calls inside it, as their sum."""
        called, lines, before = {row.name for row in self.rows}, [], ""
        for k, row in enumerate(self.rows):
            parts = row.name.split(".")
            for prefix in (".".join(parts[:n]) for n in range(1, len(parts))):
                if prefix not in called and not before.startswith(f"{prefix}."):
                    lines.append(self._sum(k, prefix))
            lines.append(row)
            before = row.name
        return [row for row in lines if depth is None or row.depth <= depth]

    def _sum(self, first: int, name: str) -> Row:
        """The calls inside of a module, from the first on, as one."""
        inside = f"{name}."
        calls = list(takewhile(lambda row: row.name.startswith(inside), self.rows[first:]))
        outer = [c for c in calls if c.parent is None or c.parent < first]
        module, last = self.model.get_submodule(name), outer[-1]
        return replace(
            last,
            name=name,
            kind=type(module).__name__,
            parameters=_parameters(module),
            multiply_adds=sum(row.multiply_adds or 0 for row in outer),
            seconds=None if last.seconds is None else sum(row.seconds or 0 for row in outer),
            bytes=max(row.bytes or 0 for row in outer),
        )

    def table(self, depth: int | None = None) -> str:
        """The outline as lines of text; columns without a value are left out. Calls that began
        outside of others are summed in the last line."""
        lines = [_cells(row) for row in self.outline(depth)]
        outer = [row for row in self.rows if row.parent is None]
        if len(outer) > 1:
            total = Row("sum", "", None, _parameters(self.model))
            total = replace(total, multiply_adds=sum(row.multiply_adds or 0 for row in outer))
            if any(row.seconds is not None for row in outer):
                total = replace(total, seconds=sum(row.seconds or 0 for row in outer))
            lines.append(["sum", *_cells(total)[1:]])
        columns = [
            [heading, *column]
            for heading, *column in zip(HEADINGS, *lines, strict=True)
            if heading == "module" or any(column)
        ]
        widths = [max(map(len, column)) for column in columns]
        return "\n".join(
            "  ".join(
                cell.ljust(width) if k < 2 else cell.rjust(width)
                for k, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in zip(*columns, strict=True)
        )

    def json(self) -> str:
        """{"rows": [...], "joins": [...]} with the fields of Row and Join; NaN and infinity are
        null."""
        rows = [{key: _finite(value) for key, value in asdict(row).items()} for row in self.rows]
        return json.dumps({"rows": rows, "joins": list(map(asdict, self.joins))}, allow_nan=False)

    def draw(self, path: str | Path) -> Path:
        """Draw the U-Net that ran, as .svg, .png or .pdf; see unet_map.plot_unet."""
        from minidiff.figures.unet_map import plot_unet

        return plot_unet(self, path)


@contextlib.contextmanager
def trace(model: object) -> Iterator[Trace]:
    """Record every call of every module of the model. What the model computes stays the same, to
    the bit; the hooks are gone at the end, also after an exception."""
    if not isinstance(model, nn.Module):
        kind = type(model).__name__
        raise UserError(f"trace takes a torch module, not {kind}; minidiff.load opens a model.")
    recorder, handles = _Recorder(Trace(model)), []
    with recorder, recorder.counter:
        try:
            for name, module in model.named_modules():
                begin, end = partial(recorder.begin, name), recorder.end
                handles.append(module.register_forward_pre_hook(begin, with_kwargs=True))
                handles.append(module.register_forward_hook(end, always_call=True))
            yield recorder.trace
        finally:
            for handle in handles:
                handle.remove()


@dataclass
class _Call:
    """A call that has begun."""

    row: int
    seconds: float  # in operations, until then
    flops: int
    live: int  # bytes of tensors, when it began
    most: int  # the most of them since


class _Recorder(TorchDispatchMode):
    """Sees every operation: it adds up their time and the bytes of the tensors that are alive, and
    remembers which call returned which tensor."""

    def __init__(self, recorded: Trace):
        super().__init__()
        self.trace, self.counter = recorded, FlopCounterMode(display=False)
        self.counter.flop_registry |= FUSED
        self.open: list[_Call] = []
        self.live, self.seconds, self.paused = 0, 0.0, False
        # by id of the tensor; the weak reference tells whether it is still that one
        self.outputs: dict[int, tuple[weakref.ref, int]] = {}
        self.joined: dict[int, tuple[weakref.ref, tuple[int | None, ...]]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if self.paused:
            return func(*args, **(kwargs or {}))
        began = perf_counter()
        output = func(*args, **(kwargs or {}))
        _wait(output)
        self.seconds += perf_counter() - began
        old = {t.untyped_storage()._cdata for t in _tensors((args, kwargs))}
        for tensor in _tensors(output):
            storage = tensor.untyped_storage()
            if storage._cdata not in old:
                self._count(storage.nbytes())
                weakref.finalize(storage, self._count, -storage.nbytes()).atexit = False
        if func is torch.ops.aten.cat.default:
            sources = tuple(_look_up(self.outputs, tensor) for tensor in args[0])
            self.joined[id(output)] = weakref.ref(output), sources
        return output

    def _count(self, size: int) -> None:
        self.live += size
        for call in self.open:
            call.most = max(call.most, self.live)

    def begin(self, name: str, module: nn.Module, args: tuple, kwargs: dict) -> None:
        index, parent = len(self.trace.rows), self.open[-1].row if self.open else None
        self.trace.rows.append(Row(name, type(module).__name__, parent, _parameters(module)))
        for tensor in _tensors((args, kwargs)):
            sources = _look_up(self.joined, tensor)
            if sources is not None and any(source is not None for source in sources):
                self.trace.joins.append(Join(sources, index))
                del self.joined[id(tensor)]  # the calls inside of this one take it, too
        flops = self.counter.get_total_flops()
        self.open.append(_Call(index, self.seconds, flops, self.live, self.live))

    def end(self, module: nn.Module, args: tuple, output: object) -> None:
        call, rows = self.open.pop(), self.trace.rows
        tensor = next(_tensors(output), None)
        if tensor is None:
            return
        row = replace(
            rows[call.row],
            shape=tuple(tensor.shape),
            dtype=str(tensor.dtype).removeprefix("torch."),
            multiply_adds=(self.counter.get_total_flops() - call.flops) // 2,
        )
        if tensor.device.type != "meta":
            seconds, size = self.seconds - call.seconds, call.most - call.live
            self.paused = True
            values = tensor.detach().float()
            mean, std = values.mean().item(), values.std(correction=0).item()
            self.paused = False
            row = replace(row, mean=mean, std=std, seconds=seconds, bytes=size)
        rows[call.row] = row
        maker = _look_up(self.outputs, tensor)
        if maker is None or maker > call.row:  # a call inside of this one; else it is an input
            self.outputs[id(tensor)] = weakref.ref(tensor), call.row


def _wait(output: object) -> None:
    """Until a GPU has done the operation."""
    if any(tensor.device.type not in ("cpu", "meta") for tensor in _tensors(output)):
        torch.accelerator.synchronize()


def _tensors(tree: object) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


def _look_up(table: dict, tensor: Tensor) -> object:
    reference, value = table.get(id(tensor), (None, None))
    return value if reference is not None and reference() is tensor else None


def _parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _finite(value: object) -> object:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _cells(row: Row) -> list[str]:
    """A line of the table."""
    own = row.name.rpartition(".")[2] or "the model"
    return [
        "  " * row.depth + own,
        row.kind,
        " x ".join(map(str, row.shape or ())),
        row.dtype or "",
        *("" if value is None else f"{value:.3g}" for value in (row.mean, row.std)),
        *("" if not value else _short(value) for value in (row.parameters, row.multiply_adds)),
        "" if row.seconds is None else f"{1000 * row.seconds:.2f}",
        "" if not row.bytes else f"{_short(row.bytes)}B",
    ]


def _short(number: float) -> str:
    for scale, unit in SCALES:
        if number >= scale:
            return f"{number / scale:.2f}{unit}"
    return f"{number:g}  "
