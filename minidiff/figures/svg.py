"""Curves as SVG to stand inside a page, some kilobytes each: ticks, lines, marks and legend are all in this file. No library, no script."""

import html
import math

from minidiff.figures.plots import COLOURS

WIDTH, HEIGHT = 400, 250  # of the axes with their numbers; the legend comes below
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 30, 40
TEXT, LETTER = 13, 7.2  # the size of letters, and about how wide one is

Points = list[tuple[float, float | None]]


def chart(
    title: str,
    lines: dict[str, Points],
    x_label: str,
    levels: dict[str, float] | None = None,
    log: bool = False,
    greys: bool = False,
) -> str:
    """An <svg> of named lines over x; where a value is None or not finite, the line is broken. levels: named horizontal lines.
    log: a logarithmic y axis, where all values are above 0. greys: from light to dark, for lines that are an order, in place of colours."""
    points = [(x, y) for line in lines.values() for x, y in line if _shown(y)]
    heights = [y for _, y in points] + list((levels or {}).values()) or [0.0]
    log = log and min(heights) > 0
    scale = math.log10 if log else float
    (left, right), (low, high) = (
        _range([x for x, _ in points] or [0.0], 0.0),
        _range([scale(y) for y in heights], 0.05),
    )

    def place(x: float, y: float) -> tuple[float, float]:
        across, up = (x - left) / (right - left), (scale(y) - low) / (high - low)
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (
            HEIGHT - TOP - BOTTOM
        )

    parts = [
        _text(WIDTH / 2, 18, title, "middle", bold=True),
        _text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 4, x_label, "middle"),
    ]
    for y in _decades(10**low, 10**high) if log else _ticks(low, high):
        height = place(left, y)[1]
        parts += [
            _line(LEFT, height, WIDTH - RIGHT, height, "#ddd"),
            _text(LEFT - 5, height + 4, f"{y:g}", "end"),
        ]
    for x in _ticks(left, right):
        parts.append(_text(place(x, heights[0])[0], HEIGHT - BOTTOM + 17, f"{x:g}", "middle"))
    for y in (levels or {}).values():
        parts.append(
            _line(LEFT, place(left, y)[1], WIDTH - RIGHT, place(left, y)[1], "#777", "5 4")
        )
    legend = [(name, "#777", True) for name in levels or {}]
    for k, (name, line) in enumerate(lines.items()):
        grey = round(200 * (1 - k / max(1, len(lines) - 1)))
        colour = f"#{grey:02x}{grey:02x}{grey:02x}" if greys else COLOURS[k % len(COLOURS)]
        parts += _drawn([place(x, y) if _shown(y) else None for x, y in line], colour)
        legend.append((name, colour, False))
    below, height = _legend(legend)
    known = {name: [f"{y:.3g}" for _, y in line if _shown(y)] for name, line in lines.items()}
    ends = "; ".join(
        f"{name} from {values[0]} to {values[-1]}" for name, values in known.items() if values
    )
    said = html.escape(f"{title}: {ends}")
    head = f'<svg viewBox="0 0 {WIDTH} {height}" font-size="{TEXT}" font-family="sans-serif" role="img" aria-label="{said}">'
    return head + "".join(parts + below) + "</svg>"


def _shown(y: float | None) -> bool:
    return y is not None and math.isfinite(y)


def _range(values: list[float], margin: float) -> tuple[float, float]:
    low, high = min(values), max(values)
    if high == low:
        return low - abs(low) / 2 - (low == 0), high + abs(high) / 2 + (high == 0)
    return low - margin * (high - low), high + margin * (high - low)


def _ticks(low: float, high: float) -> list[float]:
    """Between three and seven round numbers: 1, 2 or 5 times a power of ten apart."""
    power = 10 ** math.floor(math.log10((high - low) / 5))
    step = next(power * k for k in (1, 2, 5, 10) if (high - low) / (power * k) <= 6)
    return [round(k * step, 12) for k in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _decades(low: float, high: float) -> list[float]:
    """Powers of ten, with twice and five times them where there are few."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    within = [
        [float(f"{k}e{p}") for p in powers for k in some if low <= float(f"{k}e{p}") <= high]
        for some in ((1,), (1, 2, 5))
    ]
    return within[0] if len(within[0]) > 3 else within[1]


def _line(
    x1: float, y1: float, x2: float, y2: float, colour: str, dashes: str = "none", width: int = 1
) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}" stroke-width="{width}" stroke-dasharray="{dashes}"/>'


def _text(x: float, y: float, words: str, anchor: str = "start", bold: bool = False) -> str:
    weight = ' font-weight="bold"' if bold else ""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{weight}>{html.escape(words)}</text>'
    )


def _drawn(places: list[tuple[float, float] | None], colour: str) -> list[str]:
    """A line through the places, broken at None, and a dot at each."""
    runs: list[list[str]] = [[]]
    for place in places:
        if place is None:
            runs.append([])
        else:
            runs[-1].append(f"{place[0]:.1f},{place[1]:.1f}")
    lines = [
        f'<polyline fill="none" stroke="{colour}" stroke-width="2" points="{" ".join(run)}"/>'
        for run in runs
        if len(run) > 1
    ]
    return lines + [
        f'<circle cx="{place[0]:.1f}" cy="{place[1]:.1f}" r="2.5" fill="{colour}"/>'
        for place in places
        if place is not None
    ]


def _legend(names: list[tuple[str, str, bool]]) -> tuple[list[str], int]:
    """As many beside each other as fit; and the height of the whole."""
    parts, x, y = [], LEFT, HEIGHT + 16
    for name, colour, dashed in names:
        wide = 34 + LETTER * len(name)
        if x > LEFT and x + wide > WIDTH:
            x, y = LEFT, y + 18
        parts += [
            _line(x, y - 4, x + 20, y - 4, colour, "5 4" if dashed else "none", 1 if dashed else 2),
            _text(x + 25, y, name),
        ]
        x += wide
    return parts, round(y + 8)
