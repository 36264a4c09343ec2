"""What runs inside a network, part by part: shapes, parameters and multiply-adds.

Networks are traced on the meta device, so that nothing is computed.
"""

from functools import partial
from typing import NamedTuple

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


class Row(NamedTuple):
    """One part of a network, for one example."""

    part: str
    shape: tuple[int, ...]  # of the part's output
    parameters: int
    multiply_adds: int


def trace(network: nn.Module, parts: list[str], *inputs: torch.Tensor) -> list[Row]:
    """Return a row for each named part, in the order in which they run.

    inputs: one example, on the meta device as the network is.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    handles = [
        module.register_forward_hook(partial(_record_shape, shapes, part))
        for name, module in network.named_modules()
        for part in parts
        if f"{name}.".startswith(f"{part}.")
    ]
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(*inputs)
    for handle in handles:
        handle.remove()
    flops = {f"{name}.": sum(n.values()) for name, n in counter.get_flop_counts().items()}
    rows = []
    for part, shape in shapes.items():
        inside = [name for name in flops if name.startswith(f"{type(network).__name__}.{part}.")]
        # A module's count includes its children's: sum the outermost modules alone.
        outer = [n for n in inside if not any(n != m and n.startswith(m) for m in inside)]
        weights = [p for name, p in network.named_parameters() if name.startswith(f"{part}.")]
        parameters = sum(p.numel() for p in weights)
        rows.append(Row(part, shape, parameters, sum(flops[name] for name in outer) // 2))
    return rows


def _record_shape(shapes: dict, part: str, module: nn.Module, inputs, output: torch.Tensor) -> None:
    """Store the shape of a part's last output; the dict orders parts by their first one."""
    shapes[part] = tuple(output.shape[1:])


def trace_unet(unet: nn.Module, side: int, words: int = 77) -> list[Row]:
    """Trace a U-Net level by level; `side` is that of its input."""
    n = unet.config
    levels = range(len(n.channels))
    parts = ["time", "conv_in", *(f"encoder.{i}" for i in levels), "middle"]
    parts += [*(f"decoder.{i}" for i in levels), "norm_out", "conv_out"]
    shapes = (1, n.in_channels, side, side), (1,), (1, words, n.context_dim)
    with torch.device("meta"):
        return trace(unet, parts, *map(torch.empty, shapes))


def trace_half(half: nn.Module, channels: int, side: int) -> list[Row]:
    """Trace a VAE's encoder or decoder level by level."""
    levels = [f"levels.{i}" for i in range(len(half.levels))]
    parts = ["conv_in", *levels, "middle", "norm_out", "conv_out"]
    return trace(half, parts, torch.empty(1, channels, side, side, device="meta"))


def table(rows: list[Row]) -> str:
    """Return the rows as lines of text, with their sum."""
    lines = [f"{'part':12} {'shape':>18} {'parameters':>12} {'multiply-adds':>14}"]
    for part, shape, parameters, count in rows:
        size = " x ".join(map(str, shape))
        lines.append(f"{part:12} {size:>18} {parameters / 1e6:>10.2f} M {count / 1e9:>12.2f} G")
    parameters, count = (sum(row[k] for row in rows) for k in (2, 3))
    return "\n".join([*lines, f"{'sum':31} {parameters / 1e6:>10.2f} M {count / 1e9:>12.2f} G"])
