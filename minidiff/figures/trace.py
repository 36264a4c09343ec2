"""What runs inside a network, part by part: shapes, parameters and multiply-adds. On the meta device, so that no number is computed."""

from typing import NamedTuple

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


class Row(NamedTuple):
    """One part of a network: the shape of what it gives, its parameters, and its multiply-adds for one example."""

    part: str
    shape: tuple[int, ...]
    parameters: int
    multiply_adds: int


def trace(network: nn.Module, parts: list[str], *inputs: torch.Tensor) -> list[Row]:
    """A row for each named part in the order in which they run; inputs are one example, on the meta device as the network is."""
    shapes: dict[str, tuple[int, ...]] = {}  # in the order in which the parts first give something

    def seen(part: str):
        def hook(_, __, output: torch.Tensor) -> None:
            shapes[part] = tuple(output.shape[1:])  # the last thing that a part gives stays

        return hook

    handles = []
    for name, module in network.named_modules():
        for part in parts:
            if f"{name}.".startswith(f"{part}."):
                handles.append(module.register_forward_hook(seen(part)))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(*inputs)
    for handle in handles:
        handle.remove()
    flops = counter.get_flop_counts()
    root = type(network).__name__
    rows = []
    for part, shape in shapes.items():
        within = {
            name: sum(ops.values())
            for name, ops in flops.items()
            if f"{name}.".startswith(f"{root}.{part}.")
        }
        top = [
            name for name in within if not any(name.startswith(f"{other}.") for other in within)
        ]  # a module's count includes its children's
        parameters = sum(
            p.numel() for name, p in network.named_parameters() if name.startswith(f"{part}.")
        )
        rows.append(Row(part, shape, parameters, sum(within[name] for name in top) // 2))
    return rows


def trace_unet(unet: nn.Module, side: int, words: int = 77) -> list[Row]:
    """A U-Net level by level, down to its smallest maps and back; side is that of its input."""
    n = unet.config
    levels = range(len(n.channels))
    parts = [
        "time",
        "conv_in",
        *(f"encoder.{i}" for i in levels),
        "middle",
        *(f"decoder.{i}" for i in levels),
        "norm_out",
        "conv_out",
    ]
    with torch.device("meta"):
        return trace(
            unet,
            parts,
            torch.empty(1, n.in_channels, side, side),
            torch.empty(1),
            torch.empty(1, words, n.context_dim),
        )


def trace_half(half: nn.Module, channels: int, side: int) -> list[Row]:
    """A VAE's encoder or decoder, level by level."""
    parts = [
        "conv_in",
        *(f"levels.{i}" for i in range(len(half.levels))),
        "middle",
        "norm_out",
        "conv_out",
    ]
    return trace(half, parts, torch.empty(1, channels, side, side, device="meta"))


def table(rows: list[Row]) -> str:
    """The rows as lines of text, with their sum."""
    lines = [f"{'part':12} {'shape':>18} {'parameters':>12} {'multiply-adds':>14}"]
    for part, shape, parameters, count in rows:
        lines.append(
            f"{part:12} {' x '.join(map(str, shape)):>18} {parameters / 1e6:>10.2f} M {count / 1e9:>12.2f} G"
        )
    total = [sum(getattr(row, what) for row in rows) for what in ("parameters", "multiply_adds")]
    return "\n".join([*lines, f"{'sum':31} {total[0] / 1e6:>10.2f} M {total[1] / 1e9:>12.2f} G"])
