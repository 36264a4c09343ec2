"""No text of a figure lies on another, or on what is plotted: labels beside points, and the figures of four studies from made-up results."""

import importlib
import random
import sys
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.legend import Legend
from matplotlib.text import Text

from minidiff.evaluation import sweep
from minidiff.figures import curves, labels
from minidiff.figures.curves import Panel

sys.path.insert(0, str(Path(__file__).parents[2] / "experiments"))
distill_figure, dreambooth = map(importlib.import_module, ("distill_figure", "dreambooth"))


def overlapping(figure):
    """Pairs of texts that are drawn and lie on each other by a pixel or more."""
    drawn, draw = [], Text.draw
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Text, "draw", lambda text, *args: drawn.append(text) or draw(text, *args))
        figure.draw_without_rendering()
    texts = {text for text in drawn if text.get_visible() and text.get_text().strip()}
    boxes = [(t.get_text(), Text.get_window_extent(t).padded(-1)) for t in texts]
    return [(a, b) for (a, one), (b, two) in combinations(boxes, 2) if one.overlaps(two)]


def legends_inside(figure):
    """Legends that may lie on what is plotted."""
    drawn = [axis for axis in figure.axes if axis.axison]
    boxes = [axis.get_window_extent().padded(-1) for axis in drawn]
    legends = [legend.get_window_extent() for legend in figure.findobj(Legend)]
    return [legend for legend in legends if any(legend.overlaps(box) for box in boxes)]


@pytest.mark.parametrize("spread", [0.0, 0.01, 0.2])
def test_labels_cover_no_dot_and_no_label(spread):
    places = (0.9 + np.random.default_rng(0).normal(0, spread, (9, 2))).clip(0, 1)
    dots = np.concatenate([places, np.random.default_rng(1).random((60, 2))])
    figure, (axis,) = curves.new_figure(1, 5, 5)
    axis.scatter(*dots.T)
    axis.set(xlim=(0, 1), ylim=(0, 1))
    notes = labels.beside(axis, places, [f"label {k}" for k in range(9)], dots)
    assert len(notes) == 9 and not overlapping(figure)
    figure.draw_without_rendering()
    pixels, frame = axis.transData.transform(dots), axis.get_window_extent()
    for note in notes:
        box = Text.get_window_extent(note)
        assert not box.count_contains(pixels) and frame.count_contains(box.corners()) == 4


def studies():
    dice, noise = random.Random(0), torch.rand(6, 3, 8, 8) * 2 - 1
    ways = [("teacher", "ddpm"), ("student", "lcm"), ("guided student", "dpmpp_2m_sde")]
    lines = [
        {"model": model, "sampler": sampler, "evaluations": n, "mean": dice.random()}
        for model, sampler in ways
        for n in (50, 16, 8, 6, 4, 2, 1)
    ]
    names = ("teacher, 25 steps", "student, 4", "student, 2", "student, 1")
    yield "distill", lambda path: distill_figure.plot(lines, dict.fromkeys(names, noise), path)

    columns = {"spacing": "trailing", "interval": "0-1", "n": "100"}
    rows = [
        {"sampler": sampler, "steps": str(steps), "guidance": "1", **columns}
        | {"accuracy critic": f"{quality - 0.3 / steps + dice.gauss(0, 0.01):.3f}"}
        | {sweep.DIVERSITY: f"{diversity + dice.gauss(0, 0.01):.3f}", sweep.SPEED: str(steps)}
        | {f"{sweep.DIVERSITY} floor": "0.253"}
        for sampler, quality, diversity in (("ddim", 1, 0.25), ("lcm", 1, 0.25), ("heun", 0.3, 0.9))
        for steps in range(4, 24)
    ]
    yield "trilemma", lambda path: sweep.figure(rows, path)

    captions = 5 * [
        "a large red panna circle to the right of a large red triangle on a white background",
        "a small blue triangle on a black background",
    ]
    pictures = dict.fromkeys(("before", "without prior", "second round"), torch.zeros(10, 3, 8, 8))
    results = {name: {"subject": 0.0, "others": 1.0} for name in pictures}
    yield "dreambooth", lambda path: dreambooth.figure(pictures, results, captions, path)

    torch.manual_seed(0)
    xy, paths = torch.randn(99, 2), torch.randn(5, 40, 2)
    panels = [Panel("exact draws", xy), Panel("exact score at t = 120", arrows=(xy, -xy))]
    panels = 2 * [*panels, Panel("exact DDIM paths", paths=paths)]
    yield "toy_2d", lambda path: curves.points(panels, path)


@pytest.mark.parametrize(
    "name, draw", studies(), ids=lambda value: value if isinstance(value, str) else ""
)
def test_texts_of_a_study_lie_on_nothing(name, draw, tmp_path, monkeypatch):
    figures = []
    for module in (curves, sweep):
        monkeypatch.setattr(module, "save", lambda figure, path: figures.append(figure) or path)
    draw(tmp_path / f"{name}.png")
    assert not overlapping(figures[0]) and not legends_inside(figures[0])
