"""A fine-tune as one HTML file that needs no other, its pictures (PNG in base64) and curves (SVG) inside: the page is made in this file.

It knows records, bytes of pictures and strings; it opens no file and asks no network, and the page runs no script.
"""
import base64
import html
import io
import math
import shlex
import sys
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from minidiff import atomic
from minidiff.advice import ASTRAY, CLOSE, Record, closeness, relative
from minidiff.svg import chart

SHOWN = 6  # measures whose pictures are in the page, evenly from the first to the last; and the best
SIDE = 160  # pictures are at most this wide in the page; in the grids they are whole

STYLE = """
body { margin: 0 auto; padding: 1rem; max-width: 42rem; font: 1rem/1.45 system-ui, sans-serif; color: #1a1a1a; background: #fff; }
h1 { font-size: 1.5rem; margin: 0 0 .5rem; } h2 { font-size: 1.2rem; margin: 2rem 0 .5rem; border-top: 1px solid #ccc; padding-top: 1rem; }
h3 { font-size: 1rem; margin: 1.2rem 0 .3rem; overflow-wrap: anywhere; }
.advice { padding: .8rem 1rem; background: #fff4d6; border-left: .4rem solid #e69f00; font-size: 1.15rem; }
figure { margin: .6rem 0; } figcaption, .small { font-size: .9rem; color: #444; }
figure img { width: 100%; display: block; image-rendering: pixelated; } svg { width: 100%; height: auto; display: block; }
.pairs { display: grid; grid-template-columns: 1fr 1fr; gap: .8rem; } .pairs figure { margin: 0; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; }
td, th { text-align: left; vertical-align: top; padding: .25rem .5rem .25rem 0; border-bottom: 1px solid #ddd; overflow-wrap: break-word; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; font-size: .85rem; }
"""


class Pair(NamedTuple):
    """A sample, and the training picture nearest to it."""

    label: str
    sample: UInt8[Tensor, "3 H W"]
    training: UInt8[Tensor, "3 H2 W2"]
    distance: float  # over the floor


def page(
    advice: str,
    records: list[Record],
    prompts: dict[str, str],
    grids: dict[int, dict[str, UInt8[Tensor, "n 3 H W"]]],
    pairs: list[Pair],
    settings: dict[str, object],
) -> str:
    """The whole page. prompts: by label; grids: step -> label -> pictures, of the steps that `shown` names."""
    last = records[-1]
    parts = [
        f"<h1>Flight recorder, step {last.step}</h1>",
        f'<p class="advice"><strong>{html.escape(advice)}</strong></p>',
        "<h2>Curves</h2>",
        *curves(records),
        "<h2>The same seeds, step by step</h2>",
    ]
    for label, prompt in prompts.items():
        parts.append(f"<h3>{html.escape(label)}: {html.escape(prompt)}</h3>")
        for step, drawn in grids.items():
            row = Image.fromarray(np.concatenate([_array(picture) for picture in drawn[label]], axis=1))
            far = next(r.moved[label] for r in records if r.step == step)
            parts.append(_figure(_picture(row, len(drawn[label]), f"{label}, step {step}: {prompt}"), f"step {step}, moved {far:.2f}"))
    if pairs:
        parts.append("<h2>Samples, and the training pictures nearest to them</h2>")
        parts.append(
            f'<p class="small">Left the sample of step {last.step}, right its nearest training picture. Distances are over the floor, the median '
            f"distance of a training picture to its nearest other one; below {CLOSE:.2f} a sample is suspiciously near.</p>"
        )
        parts.append(f'<div class="pairs">{"".join(map(_pair, pairs))}</div>')
    said = {f"prompt: {label}": prompt for label, prompt in prompts.items()} | settings
    parts += ["<h2>Every measure</h2>", _measures(records), "<h2>Settings</h2>", _rows(said), "<h2>Command</h2>"]
    parts.append(f"<pre>{html.escape(shlex.join(sys.argv))}</pre>")
    head = f'<meta name="generator" content="{atomic.SIGNATURE}">'
    head += '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1"><title>Flight recorder</title>'
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}<style>{STYLE}</style></head><body>\n' + "\n".join(parts) + "\n</body></html>\n"


def shown(records: list[Record]) -> list[int]:
    """The steps whose pictures are in the page: the first, the last, that of the lowest validation loss, and others evenly between."""
    losses = relative(records, "validation")
    finite = [k for k, value in enumerate(losses) if value is not None and math.isfinite(value)]
    best = {min(finite, key=losses.__getitem__)} if finite else set()
    room = min(len(records), SHOWN)
    evenly = {round(k * (len(records) - 1) / max(1, room - 1)) for k in range(room)}
    return [records[k].step for k in sorted(evenly | best)]


# Curves.


def curves(records: list[Record]) -> list[str]:
    """One figure below the other: losses at fixed t and noise, by tenth of t, as the trainer says them, distances, the learning rate."""
    steps = [float(record.step) for record in records]

    def over_steps(title: str, lines: dict[str, list[float | None]], caption: str, levels: dict[str, float] | None = None) -> list[str]:
        there = {name: list(zip(steps, line, strict=True)) for name, line in lines.items() if any(v is not None for v in line)}
        return [_figure(chart(title, there, "step", levels), caption)] if there else []

    held_out, fitted = relative(records, "validation"), relative(records, "train")
    named = {name: [r.losses.get(name) for r in records] for name in dict.fromkeys(name for r in records for name in r.losses)}
    moved = {label: [r.moved.get(label) for r in records] for label in records[-1].moved}
    near = {"median of the samples": [closeness(r) for r in records], "share of copies": [r.copies for r in records]}
    return [
        *over_steps(
            "Loss at fixed t and noise, 1 = at first", {"validation": held_out, "training examples": fitted},
            "Only the model changes between two points. Where the two curves part, the training pictures are learnt by heart.",
        ),
        *_by_tenth(records),
        *over_steps("Loss as the trainer counts it", named, "At random t and noise: it jumps about."),
        *over_steps(
            "How far pictures of the same seed moved", moved,
            "1 is as far as another seed would take them. Unrelated prompts should stay below.", {"another seed": ASTRAY},
        ),
        *over_steps(
            "Distance to the nearest training picture", near,
            "The floor, 1, is the median distance of a training picture to its nearest other one. Samples far below it are copies.", {"floor": 1.0},
        ),
        *over_steps("Learning rate", {"learning rate": [r.lr for r in records]}, "At the steps that were measured."),
    ]


def _by_tenth(records: list[Record]) -> list[str]:
    which, title = ("validation", "Validation loss") if records[0].validation else ("train", "Loss of the training examples")
    by_step = {record.step: getattr(record, which) for record in records}
    lines = {f"step {step}": [((b + 0.5) / len(by_step[step]), v) for b, v in enumerate(by_step[step])] for step in shown(records) if by_step[step]}
    if not lines:
        return []
    return [_figure(chart(f"{title} by noise level", lines, "t  (0 = data, 1 = noise)", log=True, greys=True), "Light is early, dark is late.")]


# Pictures and tables.


def _array(picture: UInt8[Tensor, "3 H W"]) -> np.ndarray:
    return picture.movedim(0, -1).contiguous().numpy()


def _picture(image: Image.Image, across: int, alt: str) -> str:
    """An <img> with the picture inside, `across` pictures wide."""
    if image.width > across * SIDE:
        image = image.resize((across * SIDE, round(image.height * across * SIDE / image.width)), Image.Resampling.LANCZOS)
    image.save(data := io.BytesIO(), "PNG", optimize=True)
    return f'<img alt="{html.escape(alt)}" src="data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}">'


def _figure(inside: str, caption: str) -> str:
    return f"<figure>{inside}<figcaption>{html.escape(caption)}</figcaption></figure>"


def _pair(pair: Pair) -> str:
    height, width = pair.sample.shape[1:]
    other = Image.fromarray(_array(pair.training)).resize((width, height), Image.Resampling.BICUBIC)
    gap = np.full((height, max(1, width // 16), 3), 255, np.uint8)
    both = Image.fromarray(np.concatenate([_array(pair.sample), gap, np.asarray(other)], axis=1))
    alt = f"a sample of {pair.label}, and the training picture nearest to it"
    return _figure(_picture(both, 2, alt), f"{pair.label}, distance {pair.distance:.2f}")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _measures(records: list[Record]) -> str:
    """A line for each measure: losses over those of the first, seconds, memory."""
    rows = [("step", "valid.", "train", "s/step", "s", "GB")]
    for record, held_out, fitted in zip(records, relative(records, "validation"), relative(records, "train"), strict=True):
        costs = ("-" if cost is None else f"{cost:.2g}" for cost in (record.seconds_per_step, record.seconds, record.memory_gb))
        rows.append((str(record.step), _number(held_out), _number(fitted), *costs))
    lines = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f'<table>{lines}</table><p class="small">s is what the measure itself took; GB is the most memory held so far.</p>'


def _rows(settings: dict[str, object]) -> str:
    cells = (f"<tr><th>{html.escape(name)}</th><td>{html.escape(str(value))}</td></tr>" for name, value in settings.items())
    return f"<table>{''.join(cells)}</table>"
