"""A fine-tune as one HTML file without scripts: images (PNG in base64), curves (SVG), tables."""

import base64
import html
import io
import math
import shlex
import sys
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from minidiff.figures.curves import chart
from minidiff.finetuning.recorder.advice import ASTRAY, CLOSE, Record, closeness, relative
from minidiff.training import atomic

SHOWN = 6  # measurements whose images are in the page, evenly from first to last; and the best
SIDE = 192  # pixels: images are at most this wide in the page; in the grids they are whole

STYLE = """
body { margin: 0 auto; padding: 1rem; max-width: 84rem; font: 1rem/1.45 system-ui, sans-serif;
  color: #1a1a1a; background: #fff; }
h1 { font-size: 1.5rem; margin: 0 0 .5rem; }
h2 { font-size: 1.2rem; margin: 2rem 0 .5rem; border-top: 1px solid #ccc; padding-top: 1rem; }
h3 { font-size: 1rem; margin: 1.2rem 0 .3rem; overflow-wrap: anywhere; }
.advice { padding: .8rem 1rem; background: #fff4d6; border-left: .4rem solid #e69f00;
  font-size: 1.15rem; }
figure { margin: .6rem 0; } figcaption, .small { font-size: .9rem; color: #444; }
img { width: 100%; display: block; image-rendering: pixelated; }
svg { width: 100%; height: auto; display: block; }
p, table { max-width: 42rem; }
.curves, .steps, .pairs { display: grid; gap: .8rem 2rem; grid-template-columns:
  repeat(auto-fill, minmax(min(100%, 24rem), 1fr)); }
.steps { grid-template-columns: repeat(auto-fill, minmax(min(100%, 18rem), 1fr)); }
.pairs { grid-template-columns: repeat(auto-fill, minmax(9rem, 1fr)); }
.row { display: flex; gap: .3rem; max-width: 42rem; } .row img { flex: 1; min-width: 0; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; }
td, th { text-align: left; vertical-align: top; padding: .25rem .5rem .25rem 0;
  border-bottom: 1px solid #ddd; overflow-wrap: break-word; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; font-size: .85rem; }
"""
HEAD = f"""<meta name="generator" content="{atomic.SIGNATURE}"><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1"><title>Flight recorder</title>
<style>{STYLE}</style>"""
# titles and captions of curves over the steps
FIXED = (
    "Loss at fixed t and noise, 1 = at first",
    "Only the model changes between two points. Where the two curves part, the training pictures "
    "are learnt by heart.",
)
LOSSES = ("Loss as the trainer counts it", "At random t and noise: it jumps about.")
MOVED = (
    "How far pictures of the same seed moved",
    "1 is as far as another seed would take them. Unrelated prompts should stay below.",
)
NEAREST = (
    "Distance to the nearest training picture",
    "The floor, 1, is the median distance of a training picture to its nearest other one. Samples "
    "far below it are copies.",
)
Lines = dict[str, list[float | None]]  # by name, a value for each measurement
Levels = dict[str, float] | None  # dashed lines by name
Grids = dict[int, dict[str, UInt8[Tensor, "n 3 H W"]]]  # images by step and label


class Pair(NamedTuple):
    """A sample, and the training image nearest to it."""

    label: str
    sample: UInt8[Tensor, "3 H W"]
    training: UInt8[Tensor, "3 H2 W2"]
    distance: float  # over the floor


def page(
    advice: str,
    records: list[Record],
    prompts: dict[str, str],
    grids: Grids,
    pairs: list[Pair],
    settings: dict[str, object],
) -> str:
    """The whole page. prompts: by label; grids: of steps_shown."""
    last = records[-1].step
    table = {f"prompt: {label}": prompt for label, prompt in prompts.items()} | settings
    line = "\n"
    return f"""<!DOCTYPE html>
<html lang="en"><head>{HEAD}</head><body>
<h1>Flight recorder, step {last}</h1>
<p class="advice"><strong>{html.escape(advice)}</strong></p>
<h2>Curves</h2>
<div class="curves">{line.join(curves(records))}</div>
<h2>The same seeds, step by step</h2>
{line.join(_rows_of_images(records, prompts, grids))}
{_pairs(pairs, last)}
<h2>Every measure</h2>
{_measures(records)}
<h2>Settings</h2>
{_table(table)}
<h2>Command</h2>
<pre>{html.escape(shlex.join(sys.argv))}</pre>
</body></html>
"""


def steps_shown(records: list[Record]) -> list[int]:
    """The steps whose images are in the page: evenly from first to last, and the best."""
    losses = relative(records, "validation")
    finite = [k for k, loss in enumerate(losses) if loss is not None and math.isfinite(loss)]
    best = {min(finite, key=losses.__getitem__)} if finite else set()
    gaps = max(1, min(len(records), SHOWN) - 1)
    evenly = {round(k * (len(records) - 1) / gaps) for k in range(min(len(records), SHOWN))}
    return [records[k].step for k in sorted(evenly | best)]


# Curves.


def curves(records: list[Record]) -> list[str]:
    steps = [float(record.step) for record in records]
    held_out, fitted = relative(records, "validation"), relative(records, "train")
    fixed = {"validation": held_out, "training examples": fitted}
    names = dict.fromkeys(name for record in records for name in record.losses)
    losses = {name: [record.losses.get(name) for record in records] for name in names}
    moved = {label: [r.moved.get(label) for r in records] for label in records[-1].moved}
    copies = [record.copies for record in records]
    near = {"median of the samples": list(map(closeness, records)), "share of copies": copies}
    rates = {"learning rate": [record.lr for record in records]}
    return [
        _curve(steps, fixed, *FIXED),
        _by_tenth(records),
        _curve(steps, losses, *LOSSES),
        _curve(steps, moved, *MOVED, {"another seed": ASTRAY}),
        _curve(steps, near, *NEAREST, {"floor": 1.0}),
        _curve(steps, rates, "Learning rate", "At the steps that were measured."),
    ]


def _curve(
    steps: list[float], lines: Lines, title: str, caption: str, levels: Levels = None
) -> str:
    """A figure over the steps; empty where there is nothing to show."""
    points = {
        name: list(zip(steps, values, strict=True))
        for name, values in lines.items()
        if any(value is not None for value in values)
    }
    return _figure(chart(title, points, "step", levels), caption) if points else ""


def _by_tenth(records: list[Record]) -> str:
    which, title = "train", "Loss of the training examples"
    if records[0].validation:
        which, title = "validation", "Validation loss"
    losses = {record.step: getattr(record, which) for record in records}
    lines = {
        f"step {step}": [((b + 0.5) / len(losses[step]), v) for b, v in enumerate(losses[step])]
        for step in steps_shown(records)
        if losses[step]
    }
    axis, title = "t  (0 = data, 1 = noise)", f"{title} by noise level"
    svg = chart(title, lines, axis, log=True, greys=True) if lines else ""
    return svg and _figure(svg, "Light is early, dark is late.")


# Images and tables.


def _rows_of_images(records: list[Record], prompts: dict[str, str], grids: Grids) -> Iterator[str]:
    """A heading for each prompt, and below it a row of images for each step."""
    moved = {record.step: record.moved for record in records}
    for label, prompt in prompts.items():
        yield f'<h3>{html.escape(label)}: {html.escape(prompt)}</h3><div class="steps">'
        for step, images in grids.items():
            alt = f"{label}, step {step}: {prompt}"
            row = "".join(_image(Image.fromarray(_array(one)), alt) for one in images[label])
            yield _figure(
                f'<div class="row">{row}</div>', f"step {step}, moved {moved[step][label]:.2f}"
            )
        yield "</div>"


def _pairs(pairs: list[Pair], step: int) -> str:
    if not pairs:
        return ""
    return f"""<h2>Samples, and the training pictures nearest to them</h2>
<p class="small">Left the sample of step {step}, right its nearest training picture. Distances are
over the floor, the median distance of a training picture to its nearest other one; below
{CLOSE:.2f} a sample is suspiciously near.</p>
<div class="pairs">{"".join(map(_pair, pairs))}</div>"""


def _array(image: UInt8[Tensor, "3 H W"]) -> np.ndarray:
    return image.movedim(0, -1).contiguous().numpy()


def _image(image: Image.Image, alt: str) -> str:
    """An <img> with the image inside."""
    if image.width > SIDE:
        size = SIDE, round(image.height * SIDE / image.width)
        image = image.resize(size, Image.Resampling.LANCZOS)
    image.save(data := io.BytesIO(), "PNG", optimize=True)
    png = base64.b64encode(data.getvalue()).decode()
    return f'<img alt="{html.escape(alt)}" src="data:image/png;base64,{png}">'


def _figure(inside: str, caption: str) -> str:
    return f"<figure>{inside}<figcaption>{html.escape(caption)}</figcaption></figure>"


def _pair(pair: Pair) -> str:
    height, width = pair.sample.shape[1:]
    other = Image.fromarray(_array(pair.training)).resize((width, height), Image.Resampling.BICUBIC)
    alts = f"a sample of {pair.label}", "the training picture nearest to it"
    both = zip((Image.fromarray(_array(pair.sample)), other), alts, strict=True)
    row = "".join(_image(image, alt) for image, alt in both)
    return _figure(f'<div class="row">{row}</div>', f"{pair.label}, distance {pair.distance:.2f}")


def _measures(records: list[Record]) -> str:
    """A line for each measurement: losses over those of the first, seconds, memory."""
    losses = zip(relative(records, "validation"), relative(records, "train"), strict=True)
    rows = [_row("step", "valid.", "train", "s/step", "s", "GB")]
    for record, pair in zip(records, losses, strict=True):
        costs = (record.seconds_per_step, record.seconds, record.memory_gb)
        numbers = [_number(loss, 3) for loss in pair] + [_number(cost, 2) for cost in costs]
        rows.append(_row(str(record.step), *numbers))
    note = "s is what the measure itself took; GB is the most memory held so far."
    return f'<table>{"".join(rows)}</table><p class="small">{note}</p>'


def _row(*cells: str) -> str:
    return f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}g}"


def _table(settings: dict[str, object]) -> str:
    rows = (
        f"<tr><th>{html.escape(name)}</th><td>{html.escape(str(value))}</td></tr>"
        for name, value in settings.items()
    )
    return f"<table>{''.join(rows)}</table>"
