"""Quality, diversity, speed: pick two. A table with one line for each way to sample, those that no
other beats, and the figure of the table.

[1] Xiao, Kreis, Vahdat. Tackling the Generative Learning Trilemma with Denoising Diffusion GANs.
    2022. arXiv:2112.07804
"""

import csv
import hashlib
import io
import logging
import math
from collections.abc import Iterable
from itertools import cycle
from pathlib import Path

import numpy as np

from minidiff.errors import UserError
from minidiff.evaluation.bench import Bench, Figure, draw, figures
from minidiff.figures import labels
from minidiff.figures.curves import save, style
from minidiff.latent_diffusion import LatentDiffusion
from minidiff.options.sampling import SampleConfig
from minidiff.training import atomic

NETWORKS = ["pixels-8x8", "random-conv-0"]
QUALITY = ("accuracy critic", "precision random-conv-0")  # the first that was measured
OURS = {"sampler", "steps", "guidance"}  # columns of every line
DIVERSITY, SPEED = "diversity per prompt pixels-8x8", "evaluations per picture"
Row = dict[str, str]  # a line of the CSV file, its numbers as they are written there

logger = logging.getLogger(__name__)


def columns(config: SampleConfig) -> Row:
    """The columns that say how a line's images were sampled."""
    return {
        "sampler": config.sampler,
        "steps": str(config.steps),
        "guidance": f"{config.guidance:g}",
        "interval": "-".join(f"{end:g}" for end in config.interval),
        "spacing": config.spacing or "trailing",
    }


def flat(rows: Iterable[Figure]) -> Row:
    """Figures as columns: "frechet pixels-8x8", and beside it "frechet pixels-8x8 floor"."""
    columns = {}
    for row in rows:
        name = f"{row.metric} {row.features}".strip()
        columns[name] = f"{row.value:.6g}"
        if row.floor is not None:
            columns[f"{name} floor"] = f"{row.floor:.6g}"
    return columns


def read(path: Path) -> list[Row]:
    """The lines of a file that `append` wrote; any other file is a UserError."""
    if not path.exists():
        return []
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        text = "?"  # no header of ours
    table = csv.DictReader(io.StringIO(text, newline=""))
    rows = list(table)
    uneven = any(None in row or None in row.values() for row in rows)
    if uneven or not OURS <= set(table.fieldnames or OURS):
        raise UserError(
            f"{path} is not a table of evaluations; name another `out`, or move the file away."
        )
    return rows


def append(path: Path, row: Row) -> Path:
    """One line more, and never half a line. What only some lines have is empty in the others."""
    rows = [*read(path), row]
    text = io.StringIO()
    names = dict.fromkeys(column for each in rows for column in each)
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    with atomic.write(path) as new:
        new.write_text(text.getvalue(), encoding="utf-8")
    return path


def fingerprint(model: LatentDiffusion) -> str:
    """Eight letters that change with the weights: another training is another model."""
    sums = [weight.double().sum().item() for weight in model.state_dict().values()]
    return hashlib.sha256(repr(sums).encode()).hexdigest()[:8]


def sweep(
    model: LatentDiffusion, bench: Bench, configs: list[SampleConfig], path: Path, run: Row
) -> list[Row]:
    """Measure the configs that have no line in the file yet; returns the lines of all.

    run: what else a line must have in common to count.
    """
    wanted = [run | columns(config) for config in configs]
    for number, (config, key) in enumerate(zip(configs, wanted, strict=True), 1):
        if not lines_of(key, path):
            logger.info("%d of %d: %s", number, len(configs), name(key))
            generated = draw(model, bench, config, progress=True)
            append(path, key | flat(figures(bench, generated, config.seed)))
    return [lines_of(key, path)[0] for key in wanted]


def lines_of(key: Row, path: Path) -> list[Row]:
    """The lines of a file with these entries whose figures are all there."""
    return [row for row in read(path) if key.items() <= row.items() and is_whole(row)]


def is_whole(row: Row) -> bool:
    try:
        return all(map(math.isfinite, point(row))) and float(row[SPEED]) > 0
    except (ValueError, LookupError, StopIteration):
        return False


def name(row: Row) -> str:
    """A line's settings in short: the usual ones are left out."""
    where = "" if row["interval"] == "0-1" or row["guidance"] == "1" else f" in {row['interval']}"
    spacing = "" if row["spacing"] == "trailing" else f", {row['spacing']}"
    return f"{row['sampler']}, {row['steps']} steps{spacing}, guidance {row['guidance']}{where}"


def quality(row: Row) -> str:
    """The column that stands for quality in this file."""
    return next(column for column in QUALITY if row.get(column))


def point(row: Row) -> tuple[float, float, float]:
    """Quality, diversity and minus the evaluations: more is better in each. More diversity than
    real images have counts as theirs: the rest is errors."""
    diversity = min(float(row[DIVERSITY]), real_diversity(row))
    return float(row[quality(row)]), diversity, -float(row[SPEED])


def real_diversity(row: Row) -> float:
    return float(row.get(f"{DIVERSITY} floor") or math.inf)


def front(rows: list[Row]) -> list[Row]:
    """The Pareto front: the lines that no other beats."""
    return [row for row in rows if not any(beats(point(other), point(row)) for other in rows)]


def beats(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    """Whether a is better in something and worse in nothing."""
    return a != b and all(x >= y for x, y in zip(a, b, strict=True))


def cheapest(rows: list[Row], share: float = 0.99) -> Row:
    """The fewest evaluations that reach this share of the best quality; of equals the better."""
    enough = share * max(point(row)[0] for row in rows)
    good = [row for row in rows if point(row)[0] >= enough]
    return max(good, key=lambda row: (point(row)[2], point(row)[0]))


def figure(rows: list[Row], path: Path) -> Path:
    """Quality against diversity, colour for speed, a mark for each sampler. The front is ringed and
    numbered from the fastest; equal lines share a number."""
    import matplotlib.figure
    from matplotlib.colors import LogNorm

    best: dict[tuple, list[Row]] = {}
    for row in sorted(front(rows), key=lambda row: -point(row)[2]):
        best.setdefault(point(row), []).append(row)
    speed = [float(row[SPEED]) for row in rows]
    samplers = list(dict.fromkeys(row["sampler"] for row in rows))
    colours = LogNorm(min(speed), max(speed) * 1.01)
    with style():
        sheet = matplotlib.figure.Figure((9.0, 5.0), layout="constrained")
        axis, names = sheet.subplots(1, 2, width_ratios=(5, 3))
        for sampler, mark in zip(samplers, cycle("os^vDPX*p"), strict=False):
            some = [row for row in rows if row["sampler"] == sampler]
            columns = (DIVERSITY, quality(rows[0]), SPEED)
            x, y, z = ([float(row[column]) for row in some] for column in columns)
            marks = {"marker": mark, "linewidths": 0}
            dots = axis.scatter(x, y, 30, z, cmap="viridis_r", norm=colours, zorder=2, **marks)
            axis.scatter([], [], 30, "grey", label=sampler, **marks)
        places, lines = [], ["The Pareto front\n"]
        for number, (row, *others) in enumerate(best.values(), 1):
            place = float(row[DIVERSITY]), point(row)[0]
            axis.scatter(*place, 100, "none", edgecolors="black", linewidths=0.8, zorder=3)
            places.append(place)
            more = f", and {len(others)} more" if others else ""
            lines.append(f"{number}  {name(row)}{more}")
        if math.isfinite(real := real_diversity(rows[0])):
            axis.axvline(real, color="black", linestyle=":", linewidth=1, label="real pictures")
        title = f"quality against diversity, {len(rows)} settings, n = {rows[0]['n']}"
        axis.set(xlabel=DIVERSITY, ylabel=quality(rows[0]), title=title)
        bar = sheet.colorbar(dots, ax=axis, label=SPEED)
        ticks = [2**k for k in range(20) if min(speed) <= 2**k <= max(speed)] or sorted(set(speed))
        bar.set_ticks(ticks, labels=[f"{tick:g}" for tick in ticks])
        bar.minorticks_off()
        names.axis("off")
        names.legend(*axis.get_legend_handles_labels(), loc="lower left", ncols=2, fontsize=7)
        names.text(0, 1, "\n".join(lines), verticalalignment="top", fontsize=7)
        dots = np.array([[float(row[DIVERSITY]), point(row)[0]] for row in rows])
        labels.beside(axis, np.array(places), [str(k + 1) for k in range(len(places))], dots)
        return save(sheet, path)
