"""Charts as SVG inside HTML: lines, gaps, texts, and the words for those who cannot see."""

import math
import re
from xml.etree import ElementTree

import pytest

from minidiff.figures.curves import COLOURS, chart

SVG = "{http://www.w3.org/2000/svg}"


def parts(svg):
    """The root, the lines of the chart as lists of strokes of points, the dots, and the texts."""
    root = ElementTree.fromstring(svg)
    lines = {}
    for path in root.iter(f"{SVG}path"):
        colour = re.search(r"stroke: (#\w+); stroke-width: 1.5", path.get("style") or "")
        if colour and path.get("clip-path") and path.get("d"):
            strokes = re.findall(r"M ([^M]*)", path.get("d"))
            numbers = [[float(n) for n in re.findall(r"-?[\d.]+", stroke)] for stroke in strokes]
            lines[colour[1].upper()] = [list(zip(n[::2], n[1::2], strict=True)) for n in numbers]
    clipped = [g for g in root.iter(f"{SVG}g") if g.get("clip-path")]
    dots = [(float(u.get("x")), float(u.get("y"))) for g in clipped for u in g.iter(f"{SVG}use")]
    return root, lines, dots, ["".join(text.itertext()) for text in root.iter(f"{SVG}text")]


def test_points_lie_in_proportion_and_everything_is_named():
    points = {"a": [(0, 0.0), (50, 5.0), (100, 10.0)]}
    _, lines, dots, texts = parts(chart("loss", points, "step"))
    assert {"loss", "step", "a", "0", "10", "100"} <= set(texts)
    ((left, middle, right),) = lines[COLOURS[0]]
    assert middle == pytest.approx(((left[0] + right[0]) / 2, (left[1] + right[1]) / 2), abs=0.01)
    assert left[0] < right[0] and right[1] < left[1]  # y points down
    assert dots == [left, middle, right]


def test_logarithms_are_equal_strides():
    points = {"a": [(0, 0.01), (1, 0.1), (2, 1.0)]}
    _, _, dots, texts = parts(chart("loss", points, "t", log=True))
    assert dots[0][1] - dots[1][1] == pytest.approx(dots[1][1] - dots[2][1], abs=0.01)
    assert {"0.01", "0.1", "1"} <= set(texts)
    below = {"a": [(0, -1.0), (1, 0.1), (2, 1.0)]}
    assert chart("loss", below, "t", log=True) == chart("loss", below, "t")


@pytest.mark.parametrize("nothing", [None, math.nan, math.inf])
def test_a_line_is_broken_where_there_is_no_number(nothing):
    points = [(0, 1.0), (1, 2.0), (2, nothing), (3, 3.0), (4, 4.0), (5, nothing)]
    svg = chart("loss", {"a": points}, "step")
    root, lines, dots, _ = parts(svg)
    assert len(dots) == 4 and [len(stroke) for stroke in lines[COLOURS[0]]] == [2, 2]
    assert root.get("aria-label") == "loss: a from 1 to 4" and not re.search(r"\bnan|\binf", svg)
    assert len(parts(chart("loss", {"a": [(0, nothing)]}, "step", log=True))[2]) == 0


def test_level_lines_and_single_points():
    for y in (0.0, 1e-4, -3.0):
        _, _, dots, _ = parts(chart("rate", {"a": [(0, y), (10, y)]}, "step"))
        assert len(dots) == 2 and dots[0][1] == dots[1][1]
    svg = chart("rate", {"a": [(7, 1.0)]}, "step", {"floor": 2.0})
    assert len(parts(svg)[2]) == 1 and "floor" in parts(svg)[3] and "stroke-dasharray" in svg


def test_names_are_words_and_the_legend_breaks_into_lines():
    names = [f'<a> & "b" $number {k}' for k in range(9)]
    lines = {name: [(0, 1.0), (1, float(k))] for k, name in enumerate(names)}
    root, strokes, _, texts = parts(chart("x", lines, "t", greys=True))
    assert set(names) <= set(texts) and len(strokes) == 9
    few = parts(chart("x", {"a": lines[names[0]]}, "t"))[0]
    assert float(root.get("viewBox").split()[3]) > float(few.get("viewBox").split()[3]) + 30
    assert [int(grey[1:3], 16) for grey in strokes] == sorted(
        (int(grey[1:3], 16) for grey in strokes), reverse=True
    )


def test_equal_charts_are_equal_bytes_without_ids_or_links():
    lines = {"a": [(0, 1.0), (1, 2.0)]}
    svg = chart("loss", lines, "step")
    assert svg == chart("loss", lines, "step") and svg.startswith("<svg role=")
    others = set(re.findall(r'id="([^"]*)"', chart("another", lines, "step")))
    assert not others & set(re.findall(r'id="([^"]*)"', svg))  # two charts share a page
    assert "<metadata" not in svg and "<script" not in svg and not re.search(r'href="[^#]', svg)
