"""What goes wrong in image folders without stopping the training: every trap is a row of TRAPS.

The loader (folder.py) decides what does stop it; examine.py searches a folder for both.
"""

import codecs
import hashlib
import os
import re
import unicodedata
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
from jaxtyping import Bool, Float
from PIL import Image

from minidiff.data.captions import OTHER_FORMATS, inside
from minidiff.data.folder import load_image, opened, profile_of
from minidiff.text import token_ids, tokenizer

ROOM = 75  # tokens of a caption that CLIP reads: 77 with start and end
JUNK = {".DS_Store", "Thumbs.db", "ehthumbs.db", "desktop.ini", ".ipynb_checkpoints", "__MACOSX"}
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
    profile: str  # the colour profile's name, "" without one that changes anything
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

    @property
    def line_number(self) -> str:
        return self.where.rpartition(", ")[2]


@dataclass
class Folder:
    """The content of a folder after one pass."""

    folder: Path
    size: int  # to be trained at
    multiple: int  # that the model's sizes are divisible by
    names: list[str]  # all files, links and folders below it
    unlisted: list[str]  # images that no line names
    entries: list[Entry]
    images: dict[str, ImageInfo]  # by name, those that are named and can be read


Places = Iterable[tuple[str, str]]  # where, and what is there


class Trap(NamedTuple):
    """What to search for, and what to do about it."""

    level: str  # "warning": you will not get what you expect; "note": the loader deals with it
    find: Callable[[Folder], Places]
    advice: str


def examine_image(path: Path) -> ImageInfo:
    """Read an image as training will, or raise the loader's Fault."""
    pixels = load_image(path).permute(1, 2, 0).numpy()
    height, width = pixels.shape[:2]
    with opened(path) as file:
        # Pillow opens 16-bit RGB as RGB; only the tile tells.
        deep = file.mode.startswith("I") or re.search(r";16[BLN]", str(file.tile)) is not None
        orientation, transparent = file.getexif().get(0x0112, 1), file.has_transparency_data
        try:
            animated = getattr(file, "is_animated", False)
        except Exception:  # there is a second frame, and it is damaged; only the first is read
            animated = True
        mode, profile = file.mode, profile_of(file)
        profile = profile and (profile.profile.profile_description or "without a name")
    small = np.asarray(Image.fromarray(pixels).resize((9, 8), Image.Resampling.BOX), float)
    # A difference hash: is a pixel brighter than its left neighbour, in each of three colours?
    bits = (small[:, 1:] > small[:, :-1]).ravel()
    content = pixels.tobytes() + repr(pixels.shape).encode()
    digest = hashlib.blake2b(content, digest_size=16).digest()
    # Rows and columns with any light in them; JPEG's black is not 0.
    lit = [np.flatnonzero(pixels.max(axes) > 16) for axes in ((1, 2), (0, 2))]
    inner = np.prod([line[-1] + 1 - line[0] if len(line) else 0 for line in lit])
    bars, colour = float(1 - inner / (height * width)), small.mean((0, 1))
    traits = (mode, orientation, transparent, deep, animated, profile or "")
    return ImageInfo(width, height, *traits, bars, digest, bits, colour)


def each_image(check: Callable[[ImageInfo, int], str | bool]) -> Callable[[Folder], Places]:
    """A trap that checks each image by itself; `check` also takes the size to be trained at."""
    return lambda data: (
        (name, what) for name, image in data.images.items() if (what := check(image, data.size))
    )


def each_caption(check: Callable[[str], str]) -> Callable[[Folder], Places]:
    """A trap that checks each caption by itself."""
    return lambda data: (
        (entry.where, what)
        for entry in data.entries
        if entry.caption is not None and (what := check(entry.caption))
    )


def junk(data: Folder) -> Places:
    files = ((name, os.path.basename(name)) for name in data.names)
    return ((name, "") for name, file in files if file in JUNK or file.startswith("._"))


def other_formats(data: Folder) -> Places:
    names = {name: "" for name in data.names if Path(name).suffix.lower() in OTHER_FORMATS}
    for entry in data.entries:
        names.pop(entry.name, None)
    return names.items()


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
    lines = any(entry.where.startswith(f"{path}, ") for entry in data.entries)
    if lines and path.read_bytes().startswith(codecs.BOM_UTF8):
        yield str(path), ""


def same_lines(data: Folder) -> Places:
    lines = ((entry, entry.line.strip()) for entry in data.entries if entry.line.strip())
    return ((entry.where, f"as {first.line_number}") for entry, first in repeats(lines))


def same_names(data: Folder) -> Places:
    for entry, first in repeats((entry, entry.name) for entry in data.entries if entry.name):
        if entry.line.strip() != first.line.strip():
            yield entry.where, f'"{entry.name}", as {first.line_number}'


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


def empty(caption: str) -> str:
    return "" if caption.strip() else "nothing in it"


def too_long(caption: str) -> str:
    ids = token_ids(caption)
    if len(ids) <= ROOM:
        return ""
    return f'{len(ids)} tokens; cut off: "{tokenizer().decode(list(ids[ROOM:])).strip()}"'


def training_size(data: Folder) -> Places:
    if data.size % data.multiple:
        below = data.size // data.multiple * data.multiple
        valid = f"{below} and {below + data.multiple}" if below else f"{data.multiple}"
        yield f"`size={data.size}`", f"the nearest that are: {valid}"


def indivisible(image: ImageInfo, size: int) -> str:
    # A VAE halves sides three times (8), with Stable Diffusion's U-Net six times (64).
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


def bars(image: ImageInfo, _: int) -> str:
    return f"{image.bars:.0%} of it" if image.bars > 0.05 else ""


def turned(image: ImageInfo, _: int) -> str:
    return f"orientation {image.orientation}" if image.orientation in range(2, 9) else ""


def of_mode(*modes: str) -> Callable[[Folder], Places]:
    return each_image(lambda image, _: image.mode if image.mode in modes else "")


warning, note = partial(Trap, "warning"), partial(Trap, "note")
UNREAD = "never read: give it a line in metadata.jsonl, or take it out"
TOO_LONG = f"CLIP reads {ROOM} tokens (77 with start and end): shorten it, what matters first"
TWICE = "equal in every pixel, and trained on twice as often: take one out, or join the captions"
ALIKE = "look at both: what is seen often is learnt by heart; take one out if they show the same"
TRAPS = {
    "picture without a caption": warning(unlisted, UNREAD),
    "picture in another format": warning(other_formats, "never read: save it as PNG or JPEG"),
    "empty caption": warning(each_caption(empty), "write one, or take the line out"),
    "caption too long": warning(each_caption(too_long), TOO_LONG),
    "the same line twice": warning(same_lines, "trained on twice as often: take one out"),
    "the same picture twice": warning(same_pixels, TWICE),
    "near-duplicate": warning(near_duplicates, ALIKE),
    "smaller than the training size": warning(
        each_image(enlarged), "it is blurred: take a larger picture, or a smaller `size`"
    ),
    "long and narrow": warning(each_image(elongated), "only its centre is seen: crop it yourself"),
    "black bars": warning(each_image(bars), "they are learnt and drawn: cut them off"),
    "training size not divisible by 64": warning(training_size, "Stable Diffusion needs it"),
    "link out of the folder": warning(links_out, "a copy will lack it: copy the file here"),
    "names that differ in case alone": warning(
        alike_names, "one overwrites the other on Windows and macOS: rename one"
    ),
    "one picture in several lines": note(same_names, "it is trained on once for each caption"),
    "byte-order mark": note(byte_order_mark, "other programs stumble: save as UTF-8 without it"),
    "turned by EXIF": note(each_image(turned), "turned upright"),
    "grey": note(of_mode("1", "L", "LA"), "made RGB, and learnt as grey"),
    "transparent": note(each_image(lambda i, _: i.transparent and i.mode), "laid on white"),
    "palette": note(of_mode("P", "PA"), "made RGB"),
    "CMYK": note(of_mode("CMYK"), "made RGB: look at the colours"),
    "colour profile": note(each_image(lambda i, _: i.profile), "made sRGB"),
    "16-bit": note(each_image(lambda i, _: i.deep and i.mode), "scaled to 8 bits"),
    "animated": note(
        each_image(lambda i, _: i.animated and "several frames"), "its first frame is taken"
    ),
    "sides not divisible by 64": note(
        each_image(indivisible), "of no matter: images are scaled and cut to `size`"
    ),
    "junk": note(junk, "skipped; delete it"),
}
