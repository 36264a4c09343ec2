"""Sample grids, chains as strips and as GIFs, latents as colours, schedules, training curves, and the 2-D toy's panels: every figure is in this file.

It knows tensors and lists, no diffusion class. Figures made of pictures are drawn pixel by pixel, so that a picture is enlarged
but never blurred; figures made of curves are matplotlib's. Each function returns the path it wrote.
"""
import io
import math
from functools import cache
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin
from torch import Tensor

from minidiff import atomic
from minidiff.data.folder import to_uint8
from minidiff.errors import UserError

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe & Ito: safe for colour-blind eyes
RIGHT, WRONG = ("✓", COLOURS[2]), ("✗", COLOURS[1])
DPI = 200

# Figures made of pictures.


def save_png(
    image: Float[Tensor, "C H W"], path: str | Path, text: dict[str, str] | None = None, stranger: atomic.Stranger = atomic.unsigned
) -> Path:
    """One picture in [-1, 1] at its own size; `text` travels inside the file, as in Image.open(path).text. stranger: see atomic.write."""
    return _write_png(_images(image[None])[0], path, text, stranger)


def grid(
    images: Float[Tensor, "B C H W"], captions: list[str] | None, path: str | Path,
    columns: int | None = None, title: str | None = None, marks: list[bool] | None = None,
) -> Path:
    """Samples side by side, each with its caption below; a mark says right or wrong of each."""
    tiles = _enlarged(_images(images), at_least=200)
    columns = min(columns or math.ceil(math.sqrt(len(tiles))), len(tiles))
    width, height = tiles[0].size
    text = max(18, width // 12)
    line, gap = round(1.3 * text), max(8, width // 20)
    below = [_wrapped(caption, width - (line if marks else 0), text, 4) for caption in captions or [""] * len(tiles)]
    rows = [range(k, min(k + columns, len(tiles))) for k in range(0, len(tiles), columns)]
    lines = [max(bool(marks), *(len(below[k]) for k in row)) for row in rows]
    sheet, draw, y = _canvas(columns * (width + gap) + gap, sum(height + n * line + gap for n in lines) + gap, gap, title, text)
    for row, n in zip(rows, lines, strict=True):
        for column, k in enumerate(row):
            x = gap + column * (width + gap)
            sheet.paste(tiles[k], (x, y))
            if marks:
                draw.text((x, y + height + 2), *(RIGHT if marks[k] else WRONG), _font(text))
            for m, words in enumerate(below[k]):
                draw.text((x + (line if marks else 0), y + height + 2 + m * line), words, "black", _font(text))
        y += height + n * line + gap
    return _write_png(sheet, path)


def strip(rows: dict[str, Float[Tensor, "K _ _ _"]], labels: list[str], path: str | Path, title: str | None = None) -> Path:
    """Rows of pictures, named at the left, with a label over each column: the forward chain, or a reverse chain and what it guesses.
    Rows may differ in size and channels; what has neither 1 nor 3 channels is shown by `latents_to_rgb`."""
    return _write_png(_sheet({name: _images(row) for name, row in rows.items()}, labels, title, at_least=128), path)


def animate(
    frames: list[dict[str, Float[Tensor, "N _ _ _"]]], labels: list[str], path: str | Path,
    seconds: float = 5.0, hold: float = 2.5, max_bytes: int = 3_000_000,
) -> Path:
    """A GIF of the chain: each frame has named rows of N samples and a label such as "t = 740"; the last frame is held, then it starts again.

    A file over `max_bytes` is written again with every second, fourth, ... frame, always keeping the last.
    """
    if not frames:
        raise UserError(f"{path}: an animation needs at least one frame")
    # A row is turned into colours over the whole film at once, or the colours of latents would flicker.
    rows = {name: _images(torch.cat([frame[name].detach().float().cpu() for frame in frames])) for name in frames[0]}
    sheets = []
    for k, (frame, label) in enumerate(zip(frames, labels, strict=True)):
        parts = {name: rows[name][k * len(samples) : (k + 1) * len(samples)] for name, samples in frame.items()}
        sheets.append(_sheet(parts, [], label, at_least=96).quantize(255, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE))
    while True:
        lasts = [max(20, round(1000 * seconds / len(sheets)))] * (len(sheets) - 1) + [round(1000 * hold)]
        sheets[0].save(data := io.BytesIO(), "GIF", save_all=True, append_images=sheets[1:], duration=lasts, loop=0, comment=atomic.SIGNATURE)
        if data.tell() <= max_bytes or len(sheets) == 1:
            return _write(path, data.getvalue(), {".gif"})
        sheets = sheets[::-2][::-1]


def latents_to_rgb(latents: Float[Tensor, "B C H W"]) -> Float[Tensor, "B 3 H W"]:
    """The first three principal components over batch and place, 2.5 standard deviations to [-1, 1]. For looking only: colours mean
    nothing beyond alike and unlike, and two calls do not share them. The VAE's decoder is the one true picture of a latent."""
    pixels = latents.detach().double().cpu().movedim(1, -1).flatten(0, 2)
    pixels = pixels - pixels.mean(0)
    directions = torch.linalg.eigh(pixels.T @ pixels).eigenvectors.flip(1)[:, :3]  # largest first
    shown = pixels @ (directions * torch.where(directions.sum(0) < 0, -1, 1))  # an eigenvector's sign is arbitrary: fix it
    shown = (shown / (2.5 * shown.std(0, correction=0)).clamp(min=1e-12)).clamp(-1, 1)
    shown = torch.nn.functional.pad(shown, (0, 3 - shown.shape[1]))
    return shown.view(latents.shape[0], *latents.shape[2:], 3).movedim(-1, 1).float()


def _images(pictures: Float[Tensor, "K C H W"]) -> list[Image.Image]:
    pictures = pictures.detach().float().cpu()
    if pictures.shape[1] not in (1, 3):
        pictures = latents_to_rgb(pictures)
    return [Image.fromarray(p.numpy()) for p in to_uint8(pictures).expand(-1, 3, -1, -1).movedim(1, -1).contiguous()]


def _enlarged(images: list[Image.Image], at_least: int) -> list[Image.Image]:
    factor = math.ceil(at_least / images[0].width)
    return [image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST) for image in images]


def _sheet(rows: dict[str, list[Image.Image]], labels: list[str], title: str | None, at_least: int) -> Image.Image:
    largest = max((row[0] for row in rows.values()), key=lambda image: image.width)
    width, height = _enlarged([largest], at_least)[0].size
    text = max(14, width // 9)
    line, gap = round(1.3 * text), max(4, width // 32)
    names = {name: _wrapped(name, 8 * text, text, 3) for name in rows}
    left = 2 * gap + math.ceil(max(_font(text).getlength(words) for lines in names.values() for words in [*lines, ""]))
    tops = [_wrapped(label, width, text, 2) for label in labels]
    above = line * max((len(words) for words in tops), default=0)
    count = max(len(row) for row in rows.values())
    sheet, draw, top = _canvas(left + count * (width + gap), above + gap + len(rows) * (height + gap), gap, title, text)
    top += above
    for k, words in enumerate(tops):
        draw.multiline_text((left + k * (width + gap) + width / 2, top - gap / 2), "\n".join(words), "black", _font(text), "md", align="center")
    for r, (name, row) in enumerate(rows.items()):
        y = top + r * (height + gap)
        draw.multiline_text((left - gap, y + height / 2), "\n".join(names[name]), "black", _font(text), "rm", align="right")
        for k, image in enumerate(row):
            sheet.paste(image.resize((width, height), Image.Resampling.NEAREST), (left + k * (width + gap), y))
    return sheet


def _canvas(width: int, height: int, gap: int, title: str | None, text: int) -> tuple[Image.Image, ImageDraw.ImageDraw, int]:
    """White paper with the title on it; `height` is what is needed below the title, and the number is where that begins."""
    large, head = round(1.2 * text), 2 * text if title else 0
    sheet = Image.new("RGB", (width, head + height), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((gap, head), "".join(_wrapped(title or "", width - 2 * gap, large, 1)), "black", _font(large), "ld")
    return sheet, draw, head + gap


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    import matplotlib

    return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans.ttf"), size)


def _wrapped(words: str, width: int, text: int, lines: int) -> list[str]:
    """Break into lines no wider than `width` pixels, inside a word only if it must; what does not fit in `lines` ends in an ellipsis."""
    font, done, rest = _font(text), [], " ".join(words.split())
    while rest:
        fits = next((n for n in range(min(len(rest), width), 1, -1) if font.getlength(rest[:n]) <= width), 1)
        if fits < len(rest) and len(done) == lines - 1:
            while fits > 1 and font.getlength(rest[:fits] + "…") > width:
                fits -= 1
            return [*done, rest[:fits].rstrip() + "…"]
        cut = fits if fits == len(rest) or rest[fits] == " " or " " not in rest[:fits] else rest.rindex(" ", 0, fits)
        done, rest = [*done, rest[:cut]], rest[cut:].lstrip()
    return done


def _write(path: str | Path, data: bytes, suffixes: set[str], stranger: atomic.Stranger = atomic.unsigned) -> Path:
    """Write a figure whole or not at all; a file of that name is replaced only if it is a figure of ours."""
    path = Path(path)
    if path.suffix.lower() not in suffixes:
        raise UserError(f'{path}: this figure is written as {" or ".join(sorted(suffixes))}; end the file name so')
    with atomic.write(path, stranger) as new:
        new.write_bytes(data)
    return path


def _write_png(
    image: Image.Image, path: str | Path, text: dict[str, str] | None = None, stranger: atomic.Stranger = atomic.unsigned
) -> Path:
    info = PngImagePlugin.PngInfo()
    info.add(b"mdIf", atomic.SIGNATURE.encode())  # a private chunk, which other readers skip
    for key, value in (text or {}).items():
        info.add_text(key, value)
    image.save(data := io.BytesIO(), "PNG", dpi=(DPI, DPI), pnginfo=info)
    return _write(path, data.getvalue(), {".png"}, stranger)


# Figures made of curves.

def _style():
    """One look for all: a context in which figures are made."""
    import matplotlib
    from cycler import cycler

    look = {"font.size": 8, "axes.titlesize": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25}
    look |= {"axes.prop_cycle": cycler(color=COLOURS), "lines.linewidth": 1.5, "legend.frameon": False, "savefig.dpi": DPI}
    return matplotlib.rc_context(look | {"text.parse_math": False})  # "$5" in a title is a price, not an equation


def _panels(count: int, width: float = 3.0, height: float = 2.6):
    from matplotlib.figure import Figure  # the object API: no window, no global state

    figure = Figure((width * count, height), layout="constrained")
    return figure, figure.subplots(1, count, squeeze=False)[0]


def _save(figure, path: str | Path) -> Path:
    data, kind, kinds = io.BytesIO(), Path(path).suffix.lower(), {".png", ".pdf", ".svg"}
    signed = {"Creator" if kind in {".pdf", ".svg"} else "Software": atomic.SIGNATURE}
    figure.savefig(data, format=kind[1:] if kind in kinds else "png", metadata=signed)
    return _write(path, data.getvalue(), kinds)


def schedules(curves: dict[str, tuple[Float[Tensor, "N"], Float[Tensor, "N"], Float[Tensor, "N"]]], path: str | Path) -> Path:
    """Signal, noise and log signal-to-noise ratio against t in [0, 1]; a curve is (t, alpha_t, sigma_t)."""
    with _style(), np.errstate(divide="ignore", invalid="ignore"):  # where alpha_t or sigma_t is 0, or -1e-17, log SNR has no point to draw
        figure, (signal, noise, ratio) = _panels(3)
        for k, (name, curve) in enumerate(curves.items()):
            t, alpha, sigma = _arrays(curve)
            line = ("-", "--", "-.", ":")[k % 4]  # told apart in grey print as well
            signal.plot(t, alpha, line, label=name)
            noise.plot(t, sigma, line)
            ratio.plot(t, 2 * (np.log(alpha) - np.log(sigma)), line)
        if noise.get_ylim()[1] > 3:  # EDM's sigma goes to 80
            noise.set(yscale="log", ylim=(1e-3, None))
            noise.yaxis.set_major_formatter("{x:g}")
        ratio.set_ylim(max(ratio.get_ylim()[0], -20), min(ratio.get_ylim()[1], 20))
        for axes, title in ((signal, "signal  α"), (noise, "noise  σ"), (ratio, "log SNR = log α²/σ²")):
            axes.set(title=title, xlabel="t  (0 = data, 1 = noise)")
        figure.legend(loc="outside lower center", ncols=len(curves) if len(curves) < 6 else 4)
        return _save(figure, path)


def loss(log: list[dict], path: str | Path) -> Path:
    """The training loss, raw and smoothed, from records {"step", "loss", "bins"}; where `bins` (mean loss per stretch of t, or None) is
    recorded, also the loss by t in the first and the last quarter of training: easy and hard times differ more than early and late do."""
    if not log:
        raise UserError(f"{path}: the log is empty: there is no loss to plot yet")
    steps, losses = np.array([record["step"] for record in log]), np.array([record["loss"] for record in log], float)
    bins = np.array([record["bins"] for record in log if record.get("bins") is not None], float)  # a None inside becomes nan
    with _style():
        figure, panels = _panels(2 if len(bins) else 1, width=3.6)
        panels[0].plot(steps, losses, color=COLOURS[5], linewidth=0.6, alpha=0.6, label="as logged")
        window = max(1, len(losses) // 50)
        smooth = [_mean(losses[max(0, k - window) : k]) for k in range(1, len(losses) + 1)]
        panels[0].plot(steps, smooth, color=COLOURS[0], label=f"mean of {window}")
        panels[0].set(title="training loss", xlabel="step")
        panels[0].xaxis.get_major_locator().set_params(integer=True)
        if len(bins):
            quarter, t = max(1, len(bins) // 4), (np.arange(bins.shape[1]) + 0.5) / bins.shape[1]
            panels[1].plot(t, _mean(bins[:quarter]), "o--", color=COLOURS[1], markersize=4, label="first quarter of training")
            panels[1].plot(t, _mean(bins[-quarter:]), "s-", color=COLOURS[0], markersize=4, label="last quarter")
            panels[1].set(title="loss by noise level", xlabel="t  (0 = data, 1 = noise)", xlim=(0, 1))
        for axis, values in zip(panels, (losses, bins), strict=False):
            axis.legend()
            finite = values[np.isfinite(values)]
            if len(finite) and finite.min() > 0:
                _log_scale(axis, finite.min(), finite.max())
        return _save(figure, path)


def _mean(values: np.ndarray) -> np.ndarray:
    """Over the first axis, leaving out what is not a number."""
    return np.ma.filled(np.ma.masked_invalid(values).mean(0), np.nan)


def _log_scale(axis, low: float, high: float) -> None:
    """A logarithmic y axis with plain numbers, and more of them where less than a decade is seen."""
    from matplotlib.ticker import LogLocator

    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high > 5 * low else (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8, 9)))
    axis.yaxis.set_major_formatter("{x:g}")
    axis.minorticks_off()


def points(panels: list[dict], path: str | Path) -> Path:
    """The 2-D toy, one panel beside the other on the same axes. A panel is a dict with a "title" and any of "points" (N 2), "paths"
    (K N 2: K steps of N trajectories, the first is where they start) and "arrows" ((N 2) where, (N 2) what way)."""
    panels = [{key: value if key == "title" else _arrays(value) for key, value in panel.items()} for panel in panels]
    every = [p[key][0] if key == "arrows" else p[key].reshape(-1, 2) for p in panels for key in ("points", "paths", "arrows") if key in p]
    low, high = np.percentile(np.concatenate(every), [0.5, 99.5], axis=0)  # a stray point must not shrink everything else
    margin = 0.08 * (high - low).max()
    longest = max((np.percentile(np.linalg.norm(p["arrows"][1], axis=1), 99) for p in panels if "arrows" in p), default=1)
    with _style():
        figure, axes = _panels(len(panels), width=2.8, height=3.0)
        for axis, panel in zip(axes, panels, strict=True):
            if "points" in panel:
                axis.scatter(*panel["points"].T, s=3, color=COLOURS[0], alpha=0.5, linewidths=0)
            if "paths" in panel:
                axis.plot(panel["paths"][..., 0], panel["paths"][..., 1], color=COLOURS[4], linewidth=0.6, alpha=0.7)
                axis.scatter(*panel["paths"][0].T, s=8, color=COLOURS[6], label="start", zorder=3, linewidths=0)
                axis.scatter(*panel["paths"][-1].T, s=8, color=COLOURS[1], label="end", zorder=3, linewidths=0)
                axis.legend(loc="upper right", handletextpad=0.1)
            if "arrows" in panel:
                where, way = panel["arrows"]  # one scale for all panels, so that an exact and a learnt field can be compared
                axis.quiver(*where.T, *way.T, color=COLOURS[2], angles="xy", scale_units="xy", scale=longest / margin, width=0.005)
            axis.set(title=panel.get("title", ""), xlim=(low[0] - margin, high[0] + margin), ylim=(low[1] - margin, high[1] + margin), aspect="equal")
        return _save(figure, path)


def _arrays(value):
    return [_arrays(v) for v in value] if isinstance(value, tuple | list) else np.asarray(value.detach().double().cpu())
