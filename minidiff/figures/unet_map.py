"""The U-Net as it ran: its maps down and up, and the skips that were really concatenated.

[1] Ronneberger, Fischer, Brox. U-Net. 2015. arXiv:1505.04597
"""

from dataclasses import dataclass
from pathlib import Path

from minidiff.errors import UserError
from minidiff.figures import curves
from minidiff.figures.trace import Trace

WIDTH, HEIGHT, GAP = 3.4, 0.5, 0.32  # of a box, and between two, in inches
INDENT = 0.45  # of each level, inches


@dataclass(frozen=True)
class Box:
    """Calls in a row, from one place where a skip starts or ends to the next."""

    calls: tuple[int, ...]  # indices of rows
    home: str  # the level, as in "encoder.0"
    names: tuple[str, ...]  # of the calls, in that level
    skip_to: int | None = None  # the call that takes this box's output from a concatenation
    takes_skip: bool = False


def boxes_of(rows: Trace) -> list[Box]:
    """The calls that the first U-Net of a trace makes itself, cut where skips start and end.

    A U-Net is a call that makes calls whose inputs are concatenations of two earlier ones."""
    joins = [join for join in rows.joins if None not in join.sources]
    joins = [
        join for join in joins if _caller(rows, join.sources[-1]) == _caller(rows, join.target)
    ]
    if not joins:
        raise UserError(
            "the trace has no skips to draw; trace a whole U-Net of ours while it runs."
        )
    unet = _caller(rows, joins[0].target)
    targets = {j.target: j.sources[-1] for j in joins if _caller(rows, j.target) == unet}
    starts = {source: target for target, source in targets.items()}
    calls = [
        k for k, row in enumerate(rows) if row.parent == unet and row.shape and len(row.shape) == 4
    ]
    prefix = "" if unet is None or not rows[unet].name else f"{rows[unet].name}."
    homes = {k: _home(rows[k].name.removeprefix(prefix)) for k in calls}
    stretches: list[list[int]] = []
    for k in calls:
        before = stretches[-1][-1] if stretches else None
        if before is None or k in targets or before in starts or homes[k] != homes[before]:
            stretches.append([])
        stretches[-1].append(k)
    boxes = []
    for stretch in stretches:
        inside = f"{prefix}{homes[stretch[0]]}"
        names = tuple(rows[k].name.removeprefix(inside).lstrip(".") for k in stretch)
        skip_to, takes_skip = starts.get(stretch[-1]), stretch[0] in targets
        boxes.append(Box(tuple(stretch), homes[stretch[0]], names, skip_to, takes_skip))
    return boxes


def plot_unet(rows: Trace, path: str | Path) -> Path:
    """Draw it: time runs down on the left and up on the right; a line is a skip, with its channels.
    Boxes are further in the smaller their maps are."""
    boxes = boxes_of(rows)
    first = next(k for k, box in enumerate(boxes) if box.takes_skip)
    last = max(k for k, box in enumerate(boxes) if box.skip_to is not None)
    down, middle, up = boxes[: last + 1], boxes[last + 1 : first], boxes[first:]
    places, pitch = {}, HEIGHT + GAP
    sides = sorted({_side(rows, box) for box in boxes}, reverse=True)
    depth = {side: INDENT * k for k, side in enumerate(sides)}
    right = 2 * INDENT * len(sides) + WIDTH + 1.2
    for k, box in enumerate(down):
        places[box] = depth[_side(rows, box)], -k * pitch
    for k, box in enumerate(middle):
        places[box] = right / 2, -(len(down) + k) * pitch
    level_of = {box.skip_to: places[box][1] for box in down if box.skip_to is not None}
    y = -len(down) * pitch
    for box in up:
        y = level_of.get(box.calls[0], y + pitch)
        places[box] = right - depth[_side(rows, box)], y
    with curves.style():
        return curves.save(_figure(rows, boxes, places, sides), path)


def _figure(rows: Trace, boxes: list[Box], places: dict, sides: list[int]):
    from matplotlib.figure import Figure
    from matplotlib.patches import FancyBboxPatch

    xs, ys = zip(*places.values(), strict=True)
    x_limits = min(xs) - 0.1, max(xs) + WIDTH + 0.1
    y_limits = min(ys) - 0.4, max(ys) + HEIGHT + 0.25
    figure = Figure((x_limits[1] - x_limits[0], y_limits[1] - y_limits[0]))
    axis = figure.add_axes((0, 0, 1, 1), xlim=x_limits, ylim=y_limits)
    axis.axis("off")
    takers = {box.calls[0]: box for box in boxes}
    arrow = {"arrowstyle": "->", "color": "#444", "linewidth": 1.0}
    for box, after in zip(boxes, [*boxes[1:], None], strict=True):
        (x, y), colour = places[box], curves.COLOURS[sides.index(_side(rows, box)) % 6]
        look = {"facecolor": f"{colour}22", "edgecolor": colour, "linewidth": 1.2}
        axis.add_patch(
            FancyBboxPatch((x, y), WIDTH, HEIGHT, "round,pad=0,rounding_size=0.06", **look)
        )
        shape = " × ".join(map(str, rows[box.calls[-1]].shape[1:]))
        axis.text(
            x + 0.1,
            y + HEIGHT / 2,
            "\n".join(filter(None, (box.home, " + ".join(box.names)))),
            fontsize=7.5,
            va="center",
        )
        axis.text(
            x + WIDTH - 0.1,
            y + HEIGHT / 2,
            shape,
            fontsize=8,
            va="center",
            ha="right",
            weight="bold",
        )
        if after is not None:
            _arrow(axis, places[box], places[after], arrow)
        if box.skip_to is not None:
            end, channels = places[takers[box.skip_to]], rows[box.calls[-1]].shape[1]
            middle = y + HEIGHT / 2
            skip = arrow | {"color": colour, "linestyle": "--"}
            axis.annotate("", (end[0], end[1] + HEIGHT / 2), (x + WIDTH, middle), arrowprops=skip)
            axis.text(
                (x + WIDTH + end[0]) / 2,
                middle + 0.04,
                f"{channels}",
                fontsize=7,
                ha="center",
                va="bottom",
            )
    return figure


def _arrow(axis, start: tuple, end: tuple, look: dict) -> None:
    """From the box at `start` to the one at `end`, which is below, above, or beside it."""
    (x0, y0), (x1, y1) = start, end
    half = WIDTH / 2
    if y1 < y0:
        points = (x1 + half, y1 + HEIGHT), (x0 + half, y0)
    elif y1 > y0:
        points = (x1 + half, y1), (x0 + half, y0 + HEIGHT)
    else:
        points = (x1, y1 + HEIGHT / 2), (x0 + WIDTH, y0 + HEIGHT / 2)
    axis.annotate("", *points, arrowprops=look)


def _caller(rows: Trace, call: int) -> int | None:
    return rows[call].parent


def _home(name: str) -> str:
    """The level that a call belongs to: "encoder.0" of "encoder.0.residual.1"."""
    parts = name.split(".")
    depth = 2 if len(parts) > 1 and parts[1].isdigit() else 1
    return ".".join(parts[:depth])


def _side(rows: Trace, box: Box) -> int:
    """The larger side of the box's first map: a box that halves it belongs to the level above."""
    return max(rows[box.calls[-1]].shape[2:])
