"""Figures made of images: grids of samples, chains as strips and GIFs, and latents as colours.

They are drawn pixel by pixel, so that an image is enlarged but never blurred. The functions know
tensors and lists, no diffusion class. Each returns the path of the file it wrote. Three figures of
curves.py are named here too, for `minidiff.plots`.
"""

import io
import math
from functools import cache
from pathlib import Path

import torch
from jaxtyping import Float
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin
from torch import Tensor

from minidiff.data.folder import to_uint8
from minidiff.errors import UserError
from minidiff.figures.curves import COLOURS, DPI, loss, points, schedules, write
from minidiff.training import atomic

__all__ = ["animate", "grid", "latents_to_rgb", "loss", "points", "save_png", "schedules", "strip"]

NEAREST = Image.Resampling.NEAREST
RIGHT, WRONG = ("✓", COLOURS[2]), ("✗", COLOURS[1])


def save_png(
    image: Float[Tensor, "C H W"],
    path: str | Path,
    text: dict[str, str] | None = None,
    stranger: atomic.Stranger = atomic.unsigned,
) -> Path:
    """Write an image in [-1, 1] with `text` as PNG text chunks; `stranger`: see atomic.write."""
    return _write_png(_to_pil(image[None])[0], path, text, stranger)


def grid(
    images: Float[Tensor, "B C H W"],
    captions: list[str] | None,
    path: str | Path,
    columns: int | None = None,
    title: str | None = None,
    marks: list[bool] | None = None,
) -> Path:
    """Draw samples side by side, each with its caption below.

    columns: default: about as many as rows.
    marks: for each image, whether it is right; drawn before its caption.
    """
    tiles = _enlarge(_to_pil(images), at_least=200)
    columns = min(columns or math.ceil(math.sqrt(len(tiles))), len(tiles))
    width, height = tiles[0].size
    size = max(18, width // 12)  # of the letters
    line, gap = round(1.3 * size), max(8, width // 20)
    indent = line if marks else 0
    texts = [_wrap(caption, width - indent, size, 4) for caption in captions or [""] * len(tiles)]
    rows = [range(k, min(k + columns, len(tiles))) for k in range(0, len(tiles), columns)]
    lines = [max(bool(marks), *(len(texts[k]) for k in row)) for row in rows]
    below = sum(height + n * line + gap for n in lines) + gap
    sheet, draw, y = _canvas(columns * (width + gap) + gap, below, gap, title, size)
    for row, n in zip(rows, lines, strict=True):
        for column, k in enumerate(row):
            x = gap + column * (width + gap)
            sheet.paste(tiles[k], (x, y))
            if marks:
                draw.text((x, y + height + 2), *(RIGHT if marks[k] else WRONG), _font(size))
            for m, words in enumerate(texts[k]):
                draw.text((x + indent, y + height + 2 + m * line), words, "black", _font(size))
        y += height + n * line + gap
    return _write_png(sheet, path)


def strip(
    rows: dict[str, Float[Tensor, "K _ _ _"]],
    labels: list[str],
    path: str | Path,
    title: str | None = None,
) -> Path:
    """Write what `show` returns as a PNG file."""
    return _write_png(show(rows, labels, title), path)


def show(
    rows: dict[str, Float[Tensor, "K _ _ _"]], labels: list[str], title: str | None = None
) -> Image.Image:
    """Named rows of images in [-1, 1], which may differ in size, with a label over each column.

    Rows with neither 1 nor 3 channels are coloured by `latents_to_rgb`. A notebook shows it.
    """
    images = {name: _to_pil(row) for name, row in rows.items()}
    return _sheet(images, labels, title, at_least=128)


def animate(
    frames: list[dict[str, Float[Tensor, "N _ _ _"]]],
    labels: list[str],
    path: str | Path,
    seconds: float = 5.0,
    hold: float = 2.5,
    max_bytes: int = 3_000_000,
) -> Path:
    """Write a GIF that repeats: each frame has named rows of N samples and a label ("t = 740").

    seconds: how long all frames but the last take together.
    hold: how many seconds the last frame stays.
    max_bytes: a larger file is written again with every second, fourth, ... frame and the last.
    """
    if not frames:
        raise UserError(f"{path}: an animation needs at least one frame")
    # All frames of a row become colours together, or the colours of latents would flicker.
    rows = {
        name: _to_pil(torch.cat([frame[name].detach().float().cpu() for frame in frames]))
        for name in frames[0]
    }
    sheets = []
    for k, (frame, label) in enumerate(zip(frames, labels, strict=True)):
        images = {name: rows[name][k * len(x) : (k + 1) * len(x)] for name, x in frame.items()}
        sheet = _sheet(images, [], label, at_least=96)
        sheets.append(sheet.quantize(255, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE))
    while True:
        each, data = max(20, round(1000 * seconds / len(sheets))), io.BytesIO()
        durations = [each] * (len(sheets) - 1) + [round(1000 * hold)]
        options = {"append_images": sheets[1:], "duration": durations, "loop": 0}
        sheets[0].save(data, "GIF", save_all=True, comment=atomic.SIGNATURE, **options)
        if data.tell() <= max_bytes or len(sheets) == 1:
            return write(path, data.getvalue(), {".gif"})
        sheets = sheets[::-2][::-1]


def latents_to_rgb(latents: Float[Tensor, "B C H W"]) -> Float[Tensor, "B 3 H W"]:
    """Show latents by their first three principal components over batch and place.

    2.5 standard deviations become [-1, 1]. Colours of two calls do not compare.
    """
    pixels = latents.detach().double().cpu().movedim(1, -1).flatten(0, 2)
    pixels = pixels - pixels.mean(0)
    directions = torch.linalg.eigh(pixels.T @ pixels).eigenvectors.flip(1)[:, :3]  # largest first
    signs = torch.where(directions.sum(0) < 0, -1, 1)  # an eigenvector's sign is arbitrary: fix it
    colours = pixels @ (directions * signs)
    colours = (colours / (2.5 * colours.std(0, correction=0)).clamp(min=1e-12)).clamp(-1, 1)
    colours = torch.nn.functional.pad(colours, (0, 3 - colours.shape[1]))
    return colours.view(latents.shape[0], *latents.shape[2:], 3).movedim(-1, 1).float()


def _to_pil(images: Float[Tensor, "K C H W"]) -> list[Image.Image]:
    images = images.detach().float().cpu()
    if images.shape[1] not in (1, 3):
        images = latents_to_rgb(images)
    pixels = to_uint8(images).expand(-1, 3, -1, -1).movedim(1, -1).contiguous()
    return [Image.fromarray(image.numpy()) for image in pixels]


def _enlarge(images: list[Image.Image], at_least: int) -> list[Image.Image]:
    """Scale by the least whole number that makes images at least so many pixels wide."""
    factor = math.ceil(at_least / images[0].width)
    return [image.resize([factor * n for n in image.size], NEAREST) for image in images]


def _sheet(
    rows: dict[str, list[Image.Image]], labels: list[str], title: str | None, at_least: int
) -> Image.Image:
    """Draw rows with their names at the left and a label over each column."""
    largest = max((row[0] for row in rows.values()), key=lambda image: image.width)
    width, height = _enlarge([largest], at_least)[0].size
    size = max(14, width // 9)
    font, line, gap = _font(size), round(1.3 * size), max(4, width // 32)
    names = [_wrap(name, 8 * size, size, 3) for name in rows]
    left = 2 * gap + math.ceil(max(font.getlength(text) for name in names for text in [*name, ""]))
    headings = [_wrap(label, width, size, 2) for label in labels]
    above = line * max((len(heading) for heading in headings), default=0)
    full_width = left + max(len(row) for row in rows.values()) * (width + gap)
    below = above + gap + len(rows) * (height + gap)
    sheet, draw, top = _canvas(full_width, below, gap, title, size)
    top += above
    for k, heading in enumerate(headings):
        place = left + k * (width + gap) + width / 2, top - gap / 2
        draw.multiline_text(place, "\n".join(heading), "black", font, "md", align="center")
    for r, (name, row) in enumerate(zip(names, rows.values(), strict=True)):
        y = top + r * (height + gap)
        place = left - gap, y + height / 2
        draw.multiline_text(place, "\n".join(name), "black", font, "rm", align="right")
        for k, image in enumerate(row):
            place = left + k * (width + gap), y
            sheet.paste(image.resize((width, height), NEAREST), place)
    return sheet


def _canvas(
    width: int, height: int, gap: int, title: str | None, size: int
) -> tuple[Image.Image, ImageDraw.ImageDraw, int]:
    """Return a white sheet with a title, its drawing tool, and the y at which space begins.

    height: of the space below the title.
    """
    large, top = round(1.2 * size), 2 * size if title else 0
    sheet = Image.new("RGB", (width, top + height), "white")
    draw = ImageDraw.Draw(sheet)
    words = "".join(_wrap(title or "", width - 2 * gap, large, 1))
    draw.text((gap, top), words, "black", _font(large), "ld")
    return sheet, draw, top + gap


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    import matplotlib

    return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans.ttf"), size)


def _wrap(words: str, width: int, size: int, lines: int) -> list[str]:
    """Break a text into at most `lines` lines of `width` pixels, at spaces where there are any."""
    font, wrapped, rest = _font(size), [], " ".join(words.split())
    while rest:
        longest = min(len(rest), width)
        fits = next((n for n in range(longest, 1, -1) if font.getlength(rest[:n]) <= width), 1)
        if fits < len(rest) and len(wrapped) == lines - 1:
            while fits > 1 and font.getlength(rest[:fits] + "…") > width:
                fits -= 1
            return [*wrapped, rest[:fits].rstrip() + "…"]
        inside_word = fits < len(rest) and rest[fits] != " "
        cut = rest.rindex(" ", 0, fits) if inside_word and " " in rest[:fits] else fits
        wrapped, rest = [*wrapped, rest[:cut]], rest[cut:].lstrip()
    return wrapped


def _write_png(
    image: Image.Image,
    path: str | Path,
    text: dict[str, str] | None = None,
    stranger: atomic.Stranger = atomic.unsigned,
) -> Path:
    info = PngImagePlugin.PngInfo()
    info.add(b"mdIf", atomic.SIGNATURE.encode())  # a private chunk, which other readers skip
    for key, value in (text or {}).items():
        info.add_text(key, value)
    image.save(data := io.BytesIO(), "PNG", dpi=(DPI, DPI), pnginfo=info)
    return write(path, data.getvalue(), {".png"}, stranger)
