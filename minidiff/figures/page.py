"""A run as one HTML file without scripts; it reloads itself while the run goes on."""

import base64
import html
import io
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from jaxtyping import Float
from PIL import Image
from torch import Tensor

from minidiff.data.folder import to_uint8
from minidiff.errors import UserError
from minidiff.figures.curves import write
from minidiff.training import atomic
from minidiff.training.progress import duration, stretches

RELOAD = 5  # seconds
POINTS = 150  # of a curve at most, each the mean of a stretch of steps
WIDTH, HEIGHT = 300, 110  # of a curve, in its own units

# System colours follow the reader's choice of light or dark.
STYLE = """
:root { color-scheme: light dark; accent-color: var(--line); --right: #00704f;
  --wrong: #b34700; --line: #0072b2; }
@media (prefers-color-scheme: dark) {
  :root { --right: #4fd1a8; --wrong: #ff9d5c; --line: #6cb8f0; } }
body { margin: 0 auto; padding: 1rem; max-width: 60rem; font: 1rem/1.45 system-ui, sans-serif;
  background: Canvas; color: CanvasText; }
h1 { font-size: 1.4rem; margin: 0 0 .5rem; } h2 { font-size: 1.1rem; margin: 1.5rem 0 .5rem; }
p { margin: .4rem 0; } figure { margin: 0; min-width: 0; }
progress { width: 100%; height: 1.2rem; }
.small, figcaption { font-size: .9rem; overflow-wrap: anywhere; }
.curves, .images { display: grid; gap: .8rem 1rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 16rem), 1fr)); }
.images { grid-template-columns: repeat(auto-fill, minmax(8rem, 1fr)); }
img { width: 100%; display: block; image-rendering: pixelated; }
svg { width: 100%; height: auto; display: block; border-bottom: 1px solid; }
polyline { fill: none; stroke: var(--line); stroke-width: 2; stroke-linejoin: round; }
.right, .wrong { font-weight: bold; }
.right { color: var(--right); } .wrong { color: var(--wrong); }
table { border-collapse: collapse; } td { padding: .15rem 1rem .15rem 0; vertical-align: top; }
td + td { font-variant-numeric: tabular-nums; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; padding: .6rem; border: 1px solid; }
"""


@dataclass(frozen=True)
class Page:
    """What the page of a run shows; write() puts it into a file.

    fraction: how much of the run is done, from 0 to 1.
    seconds_left: None where nobody can say yet.
    losses: the loss of each step so far, by a name such as the act's.
    images: in [-1, 1], each (3, H, W); captions and verdicts (None: not judged) belong to them.
    notes: figures by name, such as accuracies.
    command: what the reader may type next.
    done: the run has ended, well or not, and the page does not reload.
    """

    title: str
    state: str  # such as "act 3 of 4: a U-Net learns to denoise latents, step 120 of 3600"
    fraction: float = 0.0
    seconds_left: float | None = None
    losses: dict[str, list[float]] = field(default_factory=dict)
    images: Sequence[Float[Tensor, "3 H W"]] | Float[Tensor, "N 3 H W"] = ()
    captions: Sequence[str] = ()
    verdicts: Sequence[bool | None] = ()
    notes: dict[str, str] = field(default_factory=dict)
    command: str = ""
    done: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.fraction <= 1:
            raise UserError(f"fraction {self.fraction}: choose a number from 0 to 1.")
        for name in ("captions", "verdicts"):
            if (count := len(getattr(self, name))) not in (0, len(self.images)):
                raise UserError(f"{count} {name} for {len(self.images)} images; give one for each.")

    def write(self, path: str | Path) -> Path:
        """Write the page whole or not at all, over nothing but a page of ours."""
        return write(path, self.text().encode(), {".html"})

    def text(self) -> str:
        percent = math.floor(100 * self.fraction)
        reload = "" if self.done else f'<meta http-equiv="refresh" content="{RELOAD}">'
        title, state = html.escape(self.title), html.escape(self.state)
        parts = [self._progress(percent), self._notes(), self._images(), self._curves()]
        body = "\n".join(part for part in parts if part)
        return f"""<!DOCTYPE html>
<html lang="en"><head><meta name="generator" content="{atomic.SIGNATURE}"><meta charset="utf-8">
{reload}<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{"" if self.done else f"{percent} % "}{title}</title>
<style>{STYLE}</style></head><body>
<h1>{title}</h1>
<p><strong>{state}</strong></p>
{body}
</body></html>
"""

    def _progress(self, percent: int) -> str:
        clock = time.strftime("%H:%M:%S")
        left = "" if self.seconds_left is None else f", {duration(self.seconds_left)} left"
        line = f"{percent} % done{left}; written at {clock}, reloads every {RELOAD} seconds."
        if self.done:
            line = f"Written at {clock}."
        bar = f'<progress aria-label="the whole run" max="100" value="{percent}"></progress>'
        return f'{"" if self.done else bar}\n<p class="small">{line}</p>'

    def _notes(self) -> str:
        rows = (
            f"<tr><td>{html.escape(name)}</td><td>{html.escape(value)}</td></tr>"
            for name, value in self.notes.items()
        )
        table = f"<table>{''.join(rows)}</table>" if self.notes else ""
        command = f"<h2>Next</h2>\n<pre>{html.escape(self.command)}</pre>" if self.command else ""
        return f"{table}\n{command}".strip()

    def _images(self) -> str:
        count = len(self.images)
        captions, verdicts = self.captions or [""] * count, self.verdicts or [None] * count
        figures = map(_figure, self.images, captions, verdicts)
        return f'<h2>Samples</h2>\n<div class="images">{"".join(figures)}</div>' if count else ""

    def _curves(self) -> str:
        figures = [_curve(name, losses) for name, losses in self.losses.items() if losses]
        return f'<h2>Loss</h2>\n<div class="curves">{"".join(figures)}</div>' if figures else ""


def _figure(image: Float[Tensor, "3 H W"], caption: str, verdict: bool | None) -> str:
    pixels = to_uint8(image.detach().float().cpu()).movedim(0, -1).contiguous()
    Image.fromarray(pixels.numpy()).save(data := io.BytesIO(), "PNG")
    source = "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()
    caption = html.escape(caption)
    judged = {True: ("right", "✓ right"), False: ("wrong", "✗ wrong")}
    mark = '<span class="{}">{}</span> '.format(*judged[verdict]) if verdict is not None else ""
    alt = f"sample for the prompt: {caption}" if caption else "sample without a prompt"
    return (
        f'<figure><img alt="{alt}" src="{source}"><figcaption>{mark}{caption}</figcaption></figure>'
    )


def _curve(name: str, losses: list[float]) -> str:
    """Losses as an SVG line: a logarithmic axis where all are positive."""
    points = stretches(losses, POINTS)
    finite = [y for _, y in points if math.isfinite(y)]
    caption = f"{html.escape(name)}: no finite loss"
    line = ""
    if finite:
        shape = math.log if min(finite) > 0 else float
        low, high = shape(min(finite)), shape(max(finite))
        scale = (HEIGHT - 8) / ((high - low) or 1)
        line = " ".join(
            f"{WIDTH * x / len(losses):.1f},{HEIGHT - 4 - scale * (shape(y) - low):.1f}"
            for x, y in points
            if math.isfinite(y)
        )
        ends = f"from {finite[0]:.3g} to {finite[-1]:.3g} in {len(losses)} steps"
        ends += ", on a logarithmic scale" if shape is math.log else ""
        caption = f"{html.escape(name)}: {ends}"
    return (
        f'<figure><svg role="img" aria-label="{caption}" viewBox="0 0 {WIDTH} {HEIGHT}">'
        f'<polyline points="{line}"/></svg><figcaption>{caption}</figcaption></figure>'
    )
