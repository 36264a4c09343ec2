"""Figures of curves and points, by matplotlib: schedules, losses, the 2-D toy, SVG for HTML."""

import html
import io
import math
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from torch import Tensor

from minidiff.errors import UserError
from minidiff.training import atomic

# Okabe and Ito's colours, which colour-blind readers can tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DPI = 200
NOISE_AXIS = "t  (0 = data, 1 = noise)"

Points = list[tuple[float, float | None]]


def write(
    path: str | Path, data: bytes, suffixes: set[str], stranger: atomic.Stranger = atomic.unsigned
) -> Path:
    """Write a figure whole or not at all, over nothing but a figure of ours."""
    path = Path(path)
    if path.suffix.lower() not in suffixes:
        kinds = " or ".join(sorted(suffixes))
        raise UserError(f"{path}: this figure is written as {kinds}; end the file name so")
    with atomic.write(path, stranger) as new:
        new.write_bytes(data)
    return path


def style():
    """The look of all figures, as a context in which they are made."""
    import matplotlib
    from cycler import cycler

    look = {"font.size": 8, "axes.titlesize": 9, "lines.linewidth": 1.5, "savefig.dpi": DPI}
    look |= {"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}
    look |= {"axes.grid": True, "grid.alpha": 0.25, "axes.prop_cycle": cycler(color=COLOURS)}
    # "$5" in a title is a price, not an equation.
    return matplotlib.rc_context(look | {"text.parse_math": False})


def new_figure(count: int, width: float = 3.0, height: float = 2.6, rows: int = 1):
    """A matplotlib Figure with rows of `count` axes, each of this size in inches, and its axes."""
    from matplotlib.figure import Figure  # the object API: no window, no global state

    figure = Figure((width * count, height * rows), layout="constrained")
    return figure, figure.subplots(rows, count, squeeze=False).ravel()


def save(figure, path: str | Path) -> Path:
    """Write a matplotlib Figure as .png, .pdf or .svg, whichever the name says."""
    data, kind, kinds = io.BytesIO(), Path(path).suffix.lower(), {".png", ".pdf", ".svg"}
    signature = {"Creator" if kind in {".pdf", ".svg"} else "Software": atomic.SIGNATURE}
    figure.savefig(data, format=kind[1:] if kind in kinds else "png", metadata=signature)
    return write(path, data.getvalue(), kinds)


def schedules(
    curves: dict[str, tuple[Float[Tensor, "N"], Float[Tensor, "N"], Float[Tensor, "N"]]],
    path: str | Path,
) -> Path:
    """Plot signal, noise and log SNR over t in [0, 1]; curves: name -> (t, alpha_t, sigma_t)."""
    # Where alpha_t or sigma_t is 0 (or -1e-17), the logarithm gives no point.
    with style(), np.errstate(divide="ignore", invalid="ignore"):
        figure, (signal, noise, ratio) = new_figure(3)
        for k, (name, curve) in enumerate(curves.items()):
            t, alpha, sigma = map(_array, curve)
            line = ("-", "--", "-.", ":")[k % 4]  # lines differ in grey print as well
            signal.plot(t, alpha, line, label=name)
            noise.plot(t, sigma, line)
            ratio.plot(t, 2 * (np.log(alpha) - np.log(sigma)), line)
        if noise.get_ylim()[1] > 3:  # EDM's sigma goes to 80
            noise.set(yscale="log", ylim=(1e-3, None))
            noise.yaxis.set_major_formatter("{x:g}")
        ratio.set_ylim(max(ratio.get_ylim()[0], -20), min(ratio.get_ylim()[1], 20))
        titles = "signal  α", "noise  σ", "log SNR = log α²/σ²"
        for axis, title in zip((signal, noise, ratio), titles, strict=True):
            axis.set(title=title, xlabel=NOISE_AXIS)
        figure.legend(loc="outside lower center", ncols=len(curves) if len(curves) < 6 else 4)
        return save(figure, path)


def loss(log: list[dict], path: str | Path) -> Path:
    """Plot the training loss; and in the first and last quarter by noise level, if recorded.

    log: records {"step", "loss", "bins"}; bins: the mean loss, or None, in each stretch of t.
    """
    if not log:
        raise UserError(f"{path}: the log is empty: there is no loss to plot yet")
    steps = np.array([record["step"] for record in log])
    losses = np.array([record["loss"] for record in log], float)
    bins = [record["bins"] for record in log if record.get("bins") is not None]
    bins = np.array(bins, float)  # turns None into nan
    with style():
        figure, axes = new_figure(2 if len(bins) else 1, width=3.6)
        axes[0].plot(steps, losses, color=COLOURS[5], linewidth=0.6, alpha=0.6, label="as logged")
        window = max(1, len(losses) // 50)
        smooth = [_mean(losses[max(0, k - window) : k]) for k in range(1, len(losses) + 1)]
        axes[0].plot(steps, smooth, color=COLOURS[0], label=f"mean of {window}")
        axes[0].set(title="training loss", xlabel="step")
        axes[0].xaxis.get_major_locator().set_params(integer=True)
        if len(bins):
            quarter, t = max(1, len(bins) // 4), (np.arange(bins.shape[1]) + 0.5) / bins.shape[1]
            for stretch, line, colour, label in (
                (bins[:quarter], "o--", COLOURS[1], "first quarter of training"),
                (bins[-quarter:], "s-", COLOURS[0], "last quarter"),
            ):
                axes[1].plot(t, _mean(stretch), line, color=colour, markersize=4, label=label)
            axes[1].set(title="loss by noise level", xlabel=NOISE_AXIS, xlim=(0, 1))
        for axis, values in zip(axes, (losses, bins), strict=False):
            axis.legend()
            _log_scale(axis, values[np.isfinite(values)])
        return save(figure, path)


def _mean(values: np.ndarray) -> np.ndarray:
    """The mean over the first axis; what is not finite is left out."""
    return np.ma.filled(np.ma.masked_invalid(values).mean(0), np.nan)


def _log_scale(axis, values: np.ndarray) -> None:
    """Make the y axis logarithmic, with at least two plain numbers, if all values are positive."""
    from matplotlib.ticker import LogLocator

    if not len(values) or values.min() <= 0:
        return
    axis.set_yscale("log")
    wide = values.max() > 5 * values.min()
    subs = (1, 2, 5) if wide else (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8, 9)
    axis.yaxis.set_major_locator(LogLocator(subs=subs))
    axis.yaxis.set_major_formatter("{x:g}")
    axis.minorticks_off()


class Panel(NamedTuple):
    """What one panel of `points` shows; leave out what it does not."""

    title: str = ""
    points: Float[Tensor, "N 2"] | None = None
    paths: Float[Tensor, "K N 2"] | None = None  # K steps of N paths; row 0 is the start
    arrows: tuple[Float[Tensor, "M 2"], Float[Tensor, "M 2"]] | None = None  # places, directions


def points(panels: list[Panel], path: str | Path, columns: int = 3) -> Path:
    """Plot the 2-D toy: panels in rows, all with the same axes and the same arrow scale."""
    places = [
        _array(part).reshape(-1, 2)
        for panel in panels
        for part in (panel.points, panel.paths, panel.arrows and panel.arrows[0])
        if part is not None
    ]
    # Percentiles: one stray point must not shrink everything else.
    low, high = np.percentile(np.concatenate(places), [0.5, 99.5], axis=0)
    margin = 0.08 * (high - low).max()
    x_limits, y_limits = np.stack([low - margin, high + margin], 1)
    lengths = [np.linalg.norm(_array(p.arrows[1]), axis=1) for p in panels if p.arrows is not None]
    longest = max((np.percentile(length, 99) for length in lengths), default=1)
    with style():
        columns, (across, up) = min(columns, len(panels)), high - low + 2 * margin
        rows, height = math.ceil(len(panels) / columns), min(4.0, 2.8 * up / across) + 0.4
        figure, axes = new_figure(columns, 2.8, height, rows)
        for axis, panel in zip(axes, panels, strict=True):
            if panel.points is not None:
                places = _array(panel.points).T
                axis.scatter(*places, s=3, color=COLOURS[0], alpha=0.5, linewidths=0)
            if panel.paths is not None:
                _draw_paths(axis, _array(panel.paths))
            if panel.arrows is not None:
                look = {"color": COLOURS[2], "scale": longest / margin, "width": 0.005}
                places, directions = map(_array, panel.arrows)
                axis.quiver(*places.T, *directions.T, angles="xy", scale_units="xy", **look)
            axis.set(title=panel.title, aspect="equal", xlim=x_limits, ylim=y_limits)
        for axis in axes[len(panels) :]:
            axis.axis("off")
        ends = [axis.get_legend_handles_labels() for axis in axes]
        if legend := next((each for each in ends if each[1]), None):
            figure.legend(*legend, loc="outside lower center", ncols=2)  # it covers no path
        return save(figure, path)


def _draw_paths(axis, paths: Float[np.ndarray, "K N 2"]) -> None:
    axis.plot(paths[..., 0], paths[..., 1], color=COLOURS[4], linewidth=0.6, alpha=0.7)
    for ends, colour, label in ((paths[0], COLOURS[6], "start"), (paths[-1], COLOURS[1], "end")):
        axis.scatter(*ends.T, s=8, color=colour, label=label, zorder=3, linewidths=0)


def _array(values: Tensor) -> np.ndarray:
    return np.asarray(values.detach().double().cpu())


def chart(
    title: str,
    lines: dict[str, Points],
    x_label: str,
    levels: dict[str, float] | None = None,
    log: bool = False,
    greys: bool = False,
) -> str:
    """Draw named lines as an <svg> element to stand inside an HTML page; equal input, equal bytes.

    A line is broken where y is None or not finite.
    levels: named horizontal lines.
    log: a logarithmic y axis, if all values are positive.
    greys: colours from light to dark, for lines that have an order.
    """
    import matplotlib

    levels = levels or {}
    arrays = {name: np.array(line, float) for name, line in lines.items()}  # turns None into nan
    ends = []
    for name, array in arrays.items():
        finite = np.isfinite(array[:, 1])
        array[~finite, 1] = np.nan
        if finite.any():
            first, last = array[finite, 1][[0, -1]]
            ends.append(f"{name} from {first:.3g} to {last:.3g}")
    columns = max(1, 54 // (6 + max(map(len, (*lines, *levels)))))
    rows = math.ceil((len(lines) + len(levels)) / columns)
    # Texts stay texts, and ids follow from the content.
    look = {"svg.fonttype": "none", "svg.hashsalt": title, "font.sans-serif": ["DejaVu Sans"]}
    with style(), matplotlib.rc_context(look):
        figure, (axis,) = new_figure(1, 4.2, 2.5 + 0.17 * rows)
        for k, (name, array) in enumerate(arrays.items()):
            grey = 0.78 * (1 - k / max(1, len(lines) - 1))
            colour = str(grey) if greys else COLOURS[k % len(COLOURS)]
            axis.plot(*array.T, "o-", color=colour, markersize=3, label=name)
        for name, level in levels.items():
            axis.axhline(level, color="#777", linestyle="--", linewidth=1, label=name)
        if log:
            values = np.concatenate([*(a[:, 1] for a in arrays.values()), [*levels.values()]])
            _log_scale(axis, values[np.isfinite(values)])
        axis.set(title=title, xlabel=x_label)
        figure.legend(loc="outside lower left", ncols=columns)
        no_date = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(data := io.StringIO(), format="svg", metadata=no_date)
    svg = data.getvalue()
    svg = re.sub(r'<g id="[^"]*"', "<g", svg[svg.index("<svg") :])  # ids would repeat in one page
    label = html.escape(f"{title}: {'; '.join(ends)}")
    return svg.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)
