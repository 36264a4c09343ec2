"""The figure of distill.py, and of meanflow.py: accuracy by evaluations, and images."""

from pathlib import Path
from typing import Any

import torch.nn.functional as F
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from minidiff.figures import curves

Images = Float[Tensor, "N 3 H W"]


def plot(rows: list[dict[str, Any]], images: dict[str, Images], path: Path) -> Path:
    """Left, accuracy against evaluations, a line for each model and sampler; right, the same
    captions and noise in many and few steps."""
    with curves.style():
        figure = Figure((8.0, 3.6), layout="constrained")
        axis, *strips = figure.subplot_mosaic(
            [["plot", str(k)] for k in range(len(images))], width_ratios=(1, 1)
        ).values()
        plot_rows(axis, rows)
        figure.legend(loc="outside lower left", ncols=3)  # below: it covers no line
        for strip, (name, some) in zip(strips, images.items(), strict=True):
            plot_strip(strip, name, some)
        return curves.save(figure, path)


def plot_rows(axis: Axes, rows: list[dict[str, Any]]) -> None:
    lines = dict.fromkeys((row["model"], row["sampler"]) for row in rows)
    for line, colour, mark in zip(lines, curves.COLOURS, "osD^v", strict=False):
        of_line = [row for row in rows if (row["model"], row["sampler"]) == line]
        dots = sorted((row["evaluations"], row["mean"]) for row in of_line)
        label = ", ".join(line)
        axis.plot(*zip(*dots, strict=True), f"{mark}-", color=colour, markersize=4, label=label)
    best = rows[0]["mean"]
    for share, style in ((0.95, "--"), (0.90, ":")):
        label = f"{share:.0%} of the teacher's best"
        axis.axhline(share * best, color="black", linestyle=style, linewidth=1, label=label)
    ticks = sorted({row["evaluations"] for row in rows})
    axis.set(
        xscale="log",
        xlabel="evaluations of the U-Net for a picture",
        ylabel="captions drawn right",
        ylim=(-0.03, 1.03),
    )
    axis.set_xticks(ticks, [str(tick) for tick in ticks])
    axis.minorticks_off()


def plot_strip(axis: Axes, name: str, images: Images) -> None:
    """Images beside each other, with a white rim."""
    rimmed = F.pad((images + 1) / 2, (1, 1), value=1.0)
    axis.imshow(rimmed.permute(2, 0, 3, 1).flatten(1, 2).numpy(), interpolation="nearest")
    axis.spines[:].set_visible(False)
    axis.set_ylabel(name, rotation=0, ha="right", va="center")
    axis.set(xticks=[], yticks=[])
