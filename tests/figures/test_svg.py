"""Curves as SVG: what is drawn where, what is left out, and what is said to those who cannot see."""

import math
import re
from xml.etree import ElementTree

import pytest

from minidiff.figures.svg import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, _decades, _ticks, chart


def drawn(svg):
    """Dots, lines through them, and texts."""
    root = ElementTree.fromstring(svg)
    dots = [(float(dot.get("cx")), float(dot.get("cy"))) for dot in root.iter("circle")]
    lines = [
        [tuple(map(float, place.split(","))) for place in line.get("points").split()]
        for line in root.iter("polyline")
    ]
    return root, dots, lines, [text.text for text in root.iter("text")]


def test_points_lie_where_the_axes_say():
    _, dots, lines, texts = drawn(chart("loss", {"a": [(0, 0.0), (50, 5.0), (100, 10.0)]}, "step"))
    assert lines == [dots] and {"loss", "step", "a", "0", "10", "100"} <= set(texts)
    left, middle, right = dots
    assert (left[0], right[0]) == (LEFT, WIDTH - RIGHT) and middle == pytest.approx(
        ((left[0] + right[0]) / 2, (left[1] + right[1]) / 2), abs=0.1
    )
    assert TOP < right[1] < left[1] < HEIGHT - BOTTOM


def test_logarithms_are_equal_strides():
    _, dots, _, texts = drawn(chart("loss", {"a": [(0, 0.01), (1, 0.1), (2, 1.0)]}, "t", log=True))
    assert dots[0][1] - dots[1][1] == pytest.approx(dots[1][1] - dots[2][1], abs=0.2) and {
        "0.01",
        "0.1",
        "1",
    } <= set(texts)
    below = {"a": [(0, -1.0), (1, 0.1), (2, 1.0)]}
    assert chart("loss", below, "t", log=True) == chart("loss", below, "t")


@pytest.mark.parametrize("nothing", [None, math.nan, math.inf])
def test_a_line_is_broken_where_there_is_no_number(nothing):
    svg = chart(
        "loss", {"a": [(0, 1.0), (1, 2.0), (2, nothing), (3, 3.0), (4, 4.0), (5, nothing)]}, "step"
    )
    root, dots, lines, _ = drawn(svg)
    assert len(dots) == 4 and [len(line) for line in lines] == [2, 2]
    assert root.get("aria-label") == "loss: a from 1 to 4" and not re.search("nan|inf|None", svg)
    assert len(drawn(chart("loss", {"a": [(0, nothing)]}, "step"))[1]) == 0


def test_a_level_line_and_a_single_point_are_in_the_middle():
    for y in (0.0, 1e-4, -3.0):
        _, dots, _, _ = drawn(chart("rate", {"a": [(0, y), (10, y)]}, "step"))
        assert {dot[1] for dot in dots} == {(TOP + HEIGHT - BOTTOM) / 2}
    assert len(drawn(chart("rate", {"a": [(7, 1.0)]}, "step", {"floor": 2.0}))[1]) == 1


def test_names_are_words_and_the_legend_breaks_into_lines():
    names = [f'<a> & "b" number {k}' for k in range(9)]
    root, _, _, texts = drawn(
        chart("x", {name: [(0, 1.0), (1, k)] for k, name in enumerate(names)}, "t", greys=True)
    )
    assert set(names) <= set(texts)
    assert all(
        float(text.get("x")) + 5 * len(text.text) < WIDTH
        for text in root.iter("text")
        if text.text in names
    )
    assert float(root.get("viewBox").split()[3]) > HEIGHT + 5 * 18


@pytest.mark.parametrize(
    "low, high", [(0, 1), (0, 300), (-0.5, -0.1), (1e-5, 3e-4), (0, 77.8), (2.9, 3.0)]
)
def test_ticks_are_round_and_few(low, high):
    ticks = _ticks(low, high)
    assert (
        3 <= len(ticks) <= 7
        and low <= ticks[0]
        and ticks[-1] <= high
        and all(len(f"{tick:g}") <= 7 for tick in ticks)
    )


def test_decades():
    assert _decades(0.003, 3000) == [0.01, 0.1, 1, 10, 100, 1000] and _decades(0.01, 0.3) == [
        0.01,
        0.02,
        0.05,
        0.1,
        0.2,
    ]
