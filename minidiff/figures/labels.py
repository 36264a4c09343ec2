"""Texts beside points of a matplotlib figure, where they cover nothing."""

import math

import numpy as np
from jaxtyping import Float

TURNS, DISTANCES = 16, (9, 14, 20, 27, 35, 44, 54, 66, 80, 96)  # how many directions; points


def beside(
    axis,
    places: Float[np.ndarray, "N 2"],
    texts: list[str],
    dots: Float[np.ndarray, "M 2"],
    size: float = 7,
) -> list:
    """Write texts beside places, each where it covers no dot, no text and no edge, as near as can
    be; a thin line leads to it from afar. Returns the annotations. Call it last: limits and layout
    must be final. dots: all that is drawn, in the axis' units."""
    figure = axis.figure
    figure.draw_without_rendering()
    scale, frame = figure.dpi / 72, axis.get_window_extent()
    pixels = axis.transData.transform(np.concatenate([dots, places]))
    taken, notes = [], []
    for place, text in zip(pixels[len(dots) :], texts, strict=True):
        note = axis.annotate(text, place, xycoords="figure pixels", fontsize=size, zorder=4)
        note.set(ha="center", va="center", in_layout=False)
        box = note.get_window_extent()
        half = np.array([box.width, box.height]) / 2 + scale
        offset = min(_offsets(), key=lambda o: _cost(place + scale * o, half, pixels, taken, frame))
        note.remove()
        taken.append((place + scale * offset, half))
        far = {"arrowstyle": "-", "linewidth": 0.4, "shrinkB": 5, "shrinkA": 0}
        note = axis.annotate(
            text,
            axis.transData.inverted().transform(place),
            offset,
            textcoords="offset points",
            ha="center",
            va="center",
            fontsize=size,
            zorder=4,
            arrowprops=far if math.hypot(*offset) > DISTANCES[1] else None,
        )
        note.set_in_layout(False)
        notes.append(note)
    return notes


def _offsets() -> list[Float[np.ndarray, "2"]]:
    """Directions, from the upper right on, at growing distances, in points."""
    angles = [math.pi / 4 + 2 * math.pi * k / TURNS for k in range(TURNS)]
    return [r * np.array([math.cos(a), math.sin(a)]) for r in DISTANCES for a in angles]


def _cost(centre, half, dots, taken, frame) -> int:
    """How much a text of this half size would cover at this place; texts weigh most."""
    dots_inside = (np.abs(dots - centre) < half + 2).all(1).sum()
    others = sum((np.abs(centre - other) < half + size).all() for other, size in taken)
    low, high = centre - half, centre + half
    outside = (low < frame.min).any() or (high > frame.max).any()
    return int(dots_inside + 100 * others + 100 * outside)
