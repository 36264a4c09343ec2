"""What goes wrong in image folders without stopping the training: every trap is a row of TRAPS.

The loader (folder.py) decides what does stop the training. The data doctor (examine.py) searches
for traps after one pass over the folder.
"""

import codecs
import hashlib
import os
import re
import unicodedata
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
from jaxtyping import Bool, Float
from PIL import Image

from minidiff.data.folder import inside, load_image
from minidiff.text import token_ids, tokenizer

ROOM = 75  # tokens of a caption that CLIP reads: 77 with start and end
JUNK = {".DS_Store", "Thumbs.db", "ehthumbs.db", "desktop.ini", ".ipynb_checkpoints", "__MACOSX"}
OTHER_FORMATS = {".heic", ".heif", ".avif", ".jfif", ".jp2", ".jxl", ".svg", ".psd"}
OTHER_FORMATS |= {".raw", ".dng", ".cr2", ".nef"}
T = TypeVar("T")
# Near-duplicates differ in at most so many of 192 bits, and so many grey levels of mean colour.
MAX_BITS, MAX_COLOUR = 16, 40.0


class ImageInfo(NamedTuple):
    """What is remembered of an image after it was read."""

    width: int  # upright
    height: int
    mode: str  # Pillow's name for the kind of pixels in the file
    orientation: int  # EXIF's, 1 is upright
    transparent: bool
    deep: bool  # 16 bits a channel
    animated: bool
    bars: float  # share of black margins
    digest: bytes  # of the pixels
    bits: Bool[np.ndarray, "192"]  # a hash that similar images nearly share
    colour: Float[np.ndarray, "3"]  # the mean


class Entry(NamedTuple):
    """An image to train on, or a line of metadata.jsonl that names one."""

    where: str  # "DIR/metadata.jsonl, line 3", or the image where there is no metadata
    name: str | None  # inside the folder; None if the line has none
    path: Path | None  # None if the loader refuses it
    caption: str | None
    line: bytes


@dataclass
class Folder:
    """The content of a folder after one pass."""

    folder: Path
    size: int  # to be trained at
    names: list[str]  # all files, links and folders below it
    unlisted: list[str]  # images that no line names
    entries: list[Entry]
    images: dict[str, ImageInfo]  # by name, those that are named and can be read


Places = Iterable[tuple[str, str]]  # where, and what is there


class Trap(NamedTuple):
    """What to search for, and what to do about it.

    level: "warning": you will not get what you expect; "note": the loader deals with it.
    """

    level: str
    find: Callable[[Folder], Places]
    advice: str


def examine_image(path: Path) -> ImageInfo:
    """Read an image as training will, or raise the loader's Fault."""
    pixels = load_image(path).permute(1, 2, 0).numpy()
    height, width = pixels.shape[:2]
    with Image.open(path) as file:
        # Pillow opens 16-bit RGB as RGB; only the tile tells.
        deep = file.mode.startswith("I") or re.search(r";16[BLN]", str(file.tile)) is not None
        orientation, transparent = file.getexif().get(0x0112, 1), file.has_transparency_data
        try:
            animated = getattr(file, "is_animated", False)
        except Exception:  # there is a second frame, and it is damaged; only the first is read
            animated = True
        mode = file.mode
    small = np.asarray(Image.fromarray(pixels).resize((9, 8), Image.Resampling.BOX), float)
    # A difference hash: is a pixel brighter than its left neighbour, in each of three colours?
    bits = (small[:, 1:] > small[:, :-1]).ravel()
    content = pixels.tobytes() + repr(pixels.shape).encode()
    digest = hashlib.blake2b(content, digest_size=16).digest()
    # Rows and columns with any light in them; JPEG's black is not 0.
    lit = [np.flatnonzero(pixels.max(axes) > 16) for axes in ((1, 2), (0, 2))]
    inner = np.prod([line[-1] + 1 - line[0] if len(line) else 0 for line in lit])
    bars, colour = float(1 - inner / (height * width)), small.mean((0, 1))
    traits = (mode, orientation, transparent, deep, animated)
    return ImageInfo(width, height, *traits, bars, digest, bits, colour)


# What the traps search for.


def each_image(check: Callable[[ImageInfo, int], str | bool]) -> Callable[[Folder], Places]:
    """A trap that checks each image by itself; `check` also takes the size to be trained at."""
    return lambda data: (
        (name, str(problem))
        for name, image in data.images.items()
        if (problem := check(image, data.size))
    )


def each_caption(check: Callable[[str], str]) -> Callable[[Folder], Places]:
    """A trap that checks each caption by itself."""
    return lambda data: (
        (entry.where, problem)
        for entry in data.entries
        if entry.caption is not None and (problem := check(entry.caption))
    )


def junk(data: Folder) -> Places:
    for name in data.names:
        if os.path.basename(name) in JUNK or os.path.basename(name).startswith("._"):
            yield name, ""


def other_formats(data: Folder) -> Places:
    named = {entry.name for entry in data.entries}
    for name in data.names:
        if Path(name).suffix.lower() in OTHER_FORMATS and name not in named:
            yield name, ""


def unlisted(data: Folder) -> Places:
    """Images that no line names. Without any line there is one fault, and it is another."""
    return ((name, "") for name in data.unlisted if data.entries)


def links_out(data: Folder) -> Places:
    refused = {entry.name for entry in data.entries if entry.path is None}
    for name in data.names:
        path = data.folder / name
        if name not in refused and path.is_symlink() and not inside(data.folder, path):
            yield name, f"to {os.readlink(path)}"


def repeats(items: Iterable[tuple[T, Hashable]]) -> Iterator[tuple[T, T]]:
    """Yield each item whose key an earlier item had, with the first such item."""
    first: dict[Hashable, T] = {}
    for item, key in items:
        if (earlier := first.setdefault(key, item)) is not item:
            yield item, earlier


def alike_names(data: Folder) -> Places:
    """Names that are one on Windows and macOS: case, and accents written in one sign or two."""
    folded = ((name, unicodedata.normalize("NFC", name).casefold()) for name in data.names)
    return ((name, f'beside "{other}"') for name, other in repeats(folded))


def byte_order_mark(data: Folder) -> Places:
    path = data.folder / "metadata.jsonl"
    if any(entry.line for entry in data.entries) and path.read_bytes().startswith(codecs.BOM_UTF8):
        yield str(path), ""


def _line_number(entry: Entry) -> str:
    return f"as {entry.where.rpartition(', ')[2]}"


def same_lines(data: Folder) -> Places:
    lines = ((entry, entry.line.strip()) for entry in data.entries if entry.line.strip())
    return ((entry.where, _line_number(first)) for entry, first in repeats(lines))


def same_names(data: Folder) -> Places:
    names = ((entry, entry.name) for entry in data.entries if entry.name)
    for entry, first in repeats(names):
        if entry.line.strip() != first.line.strip():
            yield entry.where, f'"{entry.name}", {_line_number(first)}'


def same_pixels(data: Folder) -> Places:
    digests = ((name, image.digest) for name, image in data.images.items())
    return ((name, f"as {other}") for name, other in repeats(digests))


def near_duplicates(data: Folder, chunk: int = 1024) -> Places:
    """For each image the most similar one before it; of equal images only the first takes part."""
    first: dict[bytes, str] = {}
    for name, image in data.images.items():
        first.setdefault(image.digest, name)
    names = list(first.values())
    if not names:
        return
    bits = np.stack([data.images[name].bits for name in names]).astype(np.float32) * 2 - 1
    colours = np.stack([data.images[name].colour for name in names])
    for start in range(0, len(names), chunk):
        # A product of signs is the count of bits that agree minus the count of those that do not.
        differing = (bits.shape[1] - bits[start : start + chunk] @ bits.T) / 2
        for k, distances in enumerate(differing, start):
            close = np.flatnonzero(distances[:k] <= MAX_BITS)
            close = close[np.abs(colours[close] - colours[k]).max(1, initial=0) <= MAX_COLOUR]
            if len(close):
                j = close[distances[close].argmin()]
                differ = f"{distances[j]:.0f} of {bits.shape[1]} bits differ"
                yield names[k], f"like {names[j]} ({differ})"


def too_long(caption: str) -> str:
    ids = token_ids(caption)
    if len(ids) <= ROOM:
        return ""
    return f'{len(ids)} tokens; cut off: "{tokenizer().decode(list(ids[ROOM:])).strip()}"'


def training_size(data: Folder) -> Places:
    below = data.size // 64 * 64
    if data.size % 64:
        valid = f"{below} and {below + 64}" if below else "64"
        yield f"--size {data.size}", f"the nearest that are: {valid}"


def indivisible(image: ImageInfo, size: int) -> str:
    """Sides that an uncropped training cannot take.

    A VAE halves them three times (8), with Stable Diffusion's U-Net six times (64). Images smaller
    than the training size are another trap.
    """
    sides = image.width, image.height
    if image.width % 64 == 0 == image.height % 64 or min(sides) < size:
        return ""
    valid = {m: " x ".join(str(max(m, round(side / m) * m)) for side in sides) for m in (8, 64)}
    return f"{image.width} x {image.height}; nearest by 8 {valid[8]}, by 64 {valid[64]}"


def elongated(image: ImageInfo, _: int) -> str:
    short, long = sorted((image.width, image.height))
    cut = f"{image.width} x {image.height}: {1 - short / long:.0%} is cut off"
    return cut if long > 2 * short else ""


def enlarged(image: ImageInfo, size: int) -> str:
    side = min(image.width, image.height)
    text = f"{image.width} x {image.height}: enlarged {size / side:.3g} times"
    return text if side < size else ""


def of_mode(*modes: str) -> Callable[[Folder], Places]:
    """A trap for images with one of these kinds of pixels."""
    return each_image(lambda image, _: image.mode in modes and image.mode)


NEVER_READ = "never read: give it a line in metadata.jsonl, or take it out"
TRAPS = {
    "picture without a caption": Trap("warning", unlisted, NEVER_READ),
    "picture in another format": Trap(
        "warning", other_formats, "never read: save it as PNG or JPEG, and give it a line"
    ),
    "empty caption": Trap(
        "warning",
        each_caption(lambda caption: "" if caption.strip() else "nothing in it"),
        "write one, or take the line out",
    ),
    "caption too long": Trap(
        "warning",
        each_caption(too_long),
        f"CLIP reads {ROOM} tokens (77 with start and end): shorten it, what matters first",
    ),
    "the same line twice": Trap(
        "warning", same_lines, "it is trained on twice as often: take one out"
    ),
    "the same picture twice": Trap(
        "warning",
        same_pixels,
        "equal in every pixel, and trained on twice as often: take one out, or join the captions",
    ),
    "near-duplicate": Trap(
        "warning",
        near_duplicates,
        "look at both: what is seen often is learnt by heart; take one out if they show the same",
    ),
    "smaller than the training size": Trap(
        "warning", each_image(enlarged), "it is blurred: take a larger picture, or a smaller --size"
    ),
    "long and narrow": Trap(
        "warning", each_image(elongated), "only its centre square is seen: crop it yourself"
    ),
    "black bars": Trap(
        "warning",
        each_image(lambda image, _: image.bars > 0.05 and f"{image.bars:.0%} of it"),
        "they are learnt and drawn: cut them off",
    ),
    "training size not divisible by 64": Trap(
        "warning", training_size, "Stable Diffusion needs it"
    ),
    "link out of the folder": Trap(
        "warning", links_out, "a copy of the folder will lack it: copy the file here"
    ),
    "names that differ in case alone": Trap(
        "warning", alike_names, "one overwrites the other on Windows and macOS: rename one"
    ),
    "one picture in several lines": Trap(
        "note", same_names, "right for several captions; it is trained on once for each"
    ),
    "byte-order mark": Trap(
        "note",
        byte_order_mark,
        "read all the same; other programs stumble: save the file as UTF-8 without it",
    ),
    "turned by EXIF": Trap(
        "note",
        each_image(
            lambda image, _: image.orientation in range(2, 9) and f"orientation {image.orientation}"
        ),
        "turned upright",
    ),
    "grey": Trap("note", of_mode("1", "L", "LA"), "made RGB, and learnt as grey"),
    "transparent": Trap(
        "note", each_image(lambda image, _: image.transparent and image.mode), "laid on white"
    ),
    "palette": Trap("note", of_mode("P", "PA"), "made RGB"),
    "CMYK": Trap("note", of_mode("CMYK"), "made RGB without its profile: look at the colours"),
    "16-bit": Trap(
        "note", each_image(lambda image, _: image.deep and image.mode), "scaled to 8 bits"
    ),
    "animated": Trap(
        "note",
        each_image(lambda image, _: image.animated and "several frames"),
        "its first frame is taken",
    ),
    "sides not divisible by 64": Trap(
        "note",
        each_image(indivisible),
        "of no matter: what is trained on is scaled and cut to --size",
    ),
    "junk": Trap("note", junk, "skipped; delete it"),
}
