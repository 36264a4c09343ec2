"""Quality, diversity, speed: pick two. One line of a CSV file for every way to sample, the ways that no other beats, and the figure, in this file.

[1] Xiao, Kreis, Vahdat. Tackling the Generative Learning Trilemma with Denoising Diffusion GANs. 2022. arXiv:2112.07804
"""

import csv
import hashlib
import io
import math
import os
from collections.abc import Iterable
from itertools import cycle
from pathlib import Path

from minidiff.errors import UserError
from minidiff.evaluation.bench import Bench, Figure, draw, figures
from minidiff.figures.plots import _save, _style
from minidiff.latent_diffusion import LatentDiffusion
from minidiff.options.sampling import SampleConfig

NETWORKS = ["pixels-8x8", "random-conv-0"]
QUALITY = ("accuracy critic", "precision random-conv-0")  # the first that was measured
OURS = {"sampler", "steps", "guidance"}  # columns of every line
DIVERSITY, SPEED = "diversity per prompt pixels-8x8", "evaluations per picture"


Row = dict[str, str]  # a line of the CSV file, its numbers as they are written there


def columns(config: SampleConfig) -> Row:
    """The columns that say how a line's images were sampled."""
    return {
        "sampler": config.sampler,
        "steps": str(config.steps),
        "guidance": f"{config.guidance:g}",
        "interval": "-".join(f"{end:g}" for end in config.interval),
        "spacing": config.spacing or "trailing",
    }


def flat(rows: Iterable[Figure]) -> dict[str, str]:
    """Figures as columns: "frechet pixels-8x8", and beside it "frechet pixels-8x8 floor"."""
    columns = {}
    for row in rows:
        name = f"{row.metric} {row.features}".strip()
        columns[name] = f"{row.value:.6g}"
        if row.floor is not None:
            columns[f"{name} floor"] = f"{row.floor:.6g}"
    return columns


def read(path: Path) -> list[Row]:
    """The lines of a file that `append` wrote; any other file is refused, for `append` would write over it."""
    if not path.exists():
        return []
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        text = "?"  # no header of ours
    table = csv.DictReader(io.StringIO(text, newline=""))
    rows = list(table)
    if not OURS <= set(table.fieldnames or OURS) or any(
        None in row or None in row.values() for row in rows
    ):
        raise UserError(
            f"{path} is not a table of evaluations; name another --out, or move the file away."
        )
    return rows


def append(path: Path, row: Row) -> Path:
    """One line more, and never half a line: written beside, then renamed. What only some lines have is empty in the others."""
    rows = read(path)
    text = io.StringIO()
    writer = csv.DictWriter(
        text, dict.fromkeys(column for each in (*rows, row) for column in each), lineterminator="\n"
    )
    writer.writeheader()
    writer.writerows([*rows, row])
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(path.name + ".new")
    fresh.write_text(text.getvalue(), encoding="utf-8")
    os.replace(fresh, path)
    return path


def fingerprint(model: LatentDiffusion) -> str:
    """Eight letters that change with the weights: a line measured on another training of the same folder is not taken for this one's."""
    sums = [weight.double().sum().item() for weight in model.state_dict().values()]
    return hashlib.sha256(repr(sums).encode()).hexdigest()[:8]


def sweep(
    model: LatentDiffusion,
    bench: Bench,
    settings: list[SampleConfig],
    path: Path,
    run: Row,
) -> list[Row]:
    """Measure the settings that have no line in the file yet; returns the lines of all. run: what else a line must have in common to count."""
    wanted = [run | columns(config) for config in settings]
    for number, (config, key) in enumerate(zip(settings, wanted, strict=True), 1):
        if not any(key.items() <= row.items() for row in read(path)):
            print(f"{number} of {len(settings)}: {name(key)}", flush=True)
            drawn = draw(model, bench, config, progress=True)
            append(path, key | flat(figures(bench, drawn, config.seed)))
    rows = read(path)
    return [next(row for row in rows if key.items() <= row.items()) for key in wanted]


def name(row: Row) -> str:
    """Said as shortly as it can be: what is as usual is left out."""
    where = "" if row["interval"] == "0-1" or row["guidance"] == "1" else f" in {row['interval']}"
    grid = "" if row["spacing"] == "trailing" else f", {row['spacing']}"
    return f"{row['sampler']}, {row['steps']} steps{grid}, guidance {row['guidance']}{where}"


def quality(row: Row) -> str:
    """The column that stands for quality in this file."""
    return next(column for column in QUALITY if row.get(column))


def point(row: Row) -> tuple[float, float, float]:
    """Quality, diversity and minus the evaluations: more is better in each. More diversity than real pictures have counts as theirs: it is errors."""
    return (
        float(row[quality(row)]),
        min(float(row[DIVERSITY]), real_diversity(row)),
        -float(row[SPEED]),
    )


def real_diversity(row: Row) -> float:
    return float(row.get(f"{DIVERSITY} floor") or math.inf)


def front(rows: list[Row]) -> list[Row]:
    """The Pareto front: those that no other equals in quality, diversity and speed and beats in one of them."""

    def beaten(row: Row) -> bool:
        return any(
            point(other) != point(row)
            and all(a >= b for a, b in zip(point(other), point(row), strict=True))
            for other in rows
        )

    return [row for row in rows if not beaten(row)]


def cheapest(rows: list[Row], share: float = 0.99) -> Row:
    """The fewest evaluations that reach this share of the best quality; of equals the better."""
    enough = share * max(point(row)[0] for row in rows)
    return max(
        (row for row in rows if point(row)[0] >= enough),
        key=lambda row: (point(row)[2], point(row)[0]),
    )


def figure(rows: list[Row], path: Path) -> Path:
    """Quality against diversity, colour for speed, a mark for each sampler; the front is ringed, numbered from the fastest, and named beside.
    Those that came out alike share a number: where they take the same steps, a name stands for all."""
    import matplotlib.figure
    from matplotlib.colors import LogNorm

    best: dict[tuple, list[Row]] = {}
    for row in sorted(front(rows), key=lambda row: -point(row)[2]):
        best.setdefault(point(row), []).append(row)
    speed, samplers = (
        [float(row[SPEED]) for row in rows],
        list(dict.fromkeys(row["sampler"] for row in rows)),
    )
    colours = LogNorm(min(speed), max(speed) * 1.01)
    with _style():
        sheet = matplotlib.figure.Figure((9.0, 5.0), layout="constrained")
        axis, names = sheet.subplots(1, 2, width_ratios=(5, 3))
        for sampler, mark in zip(samplers, cycle("os^vDPX*p"), strict=False):
            some = [row for row in rows if row["sampler"] == sampler]
            x, y, z = (
                [float(row[column]) for row in some]
                for column in (DIVERSITY, quality(rows[0]), SPEED)
            )
            dots = axis.scatter(
                x, y, 30, z, mark, cmap="viridis_r", norm=colours, linewidths=0, zorder=2
            )
            axis.scatter([], [], 30, "grey", mark, linewidths=0, label=sampler)
        for number, (row, *_) in enumerate(best.values(), 1):
            place = float(row[DIVERSITY]), point(row)[0]
            axis.scatter(
                *place, 100, facecolors="none", edgecolors="black", linewidths=0.8, zorder=3
            )
            axis.annotate(str(number), place, (5, 5), textcoords="offset points", fontsize=7)
        if math.isfinite(real := real_diversity(rows[0])):
            axis.axvline(real, color="black", linestyle=":", linewidth=1)
            axis.annotate(
                "real pictures",
                (real, axis.get_ylim()[0]),
                (3, 3),
                textcoords="offset points",
                rotation=90,
            )
        axis.set(
            xlabel=DIVERSITY,
            ylabel=quality(rows[0]),
            title=f"quality against diversity, {len(rows)} settings, n = {rows[0]['n']}",
        )
        bar = sheet.colorbar(dots, ax=axis, label=SPEED)
        ticks = [2**k for k in range(20) if min(speed) <= 2**k <= max(speed)] or sorted(set(speed))
        bar.set_ticks(ticks, labels=[f"{tick:g}" for tick in ticks])
        bar.minorticks_off()
        names.axis("off")
        names.legend(*axis.get_legend_handles_labels(), loc="lower left", ncols=2, fontsize=7)
        alike = [
            name(row) + (f", and {len(others)} more" if others else "")
            for row, *others in best.values()
        ]
        said = "\n".join(f"{number}  {line}" for number, line in enumerate(alike, 1))
        names.text(0, 1, f"The Pareto front\n\n{said}", verticalalignment="top", fontsize=7)
        return _save(sheet, path)
