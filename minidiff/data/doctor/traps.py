"""What goes wrong in folders of pictures without stopping the training: every trap is one row of TRAPS, and what it looks at is in this file.

What does stop the training is decided by the loader, folder.py. Traps are looked for by the data doctor, doctor.py, after one pass over the folder.
"""

import codecs
import hashlib
import os
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float
from PIL import Image

from minidiff.data.folder import inside, load_image
from minidiff.text import token_ids, tokenizer

ROOM = 75  # tokens of a caption that CLIP reads: 77 with start and end
JUNK = {".DS_Store", "Thumbs.db", "ehthumbs.db", "desktop.ini", ".ipynb_checkpoints", "__MACOSX"}
OTHER_FORMATS = {
    ".heic",
    ".heif",
    ".avif",
    ".jfif",
    ".jp2",
    ".jxl",
    ".svg",
    ".psd",
    ".raw",
    ".dng",
    ".cr2",
    ".nef",
}
LOOK_BITS, LOOK_COLOUR = (
    16,
    40.0,
)  # near-duplicates: at most so many of 192 bits, and so many grey levels of the mean colour, apart


class Picture(NamedTuple):
    """What is kept of a picture when it has been read."""

    width: int  # upright
    height: int
    mode: str  # Pillow's name of what a pixel is in the file
    orientation: int  # EXIF's, 1 is upright
    transparent: bool
    deep: bool  # 16 bits a channel
    animated: bool
    bars: float  # share of black margins
    digest: bytes  # of the pixels
    bits: Bool[np.ndarray, "192"]
    colour: Float[np.ndarray, "3"]


class Row(NamedTuple):
    """One picture that is trained on, or a line that wants it to be."""

    where: str  # "DIR/metadata.jsonl, line 3", or the picture where there is no metadata
    name: str | None  # inside the folder; None if the line has none
    path: Path | None  # None if the loader refuses it
    caption: str | None
    line: bytes


@dataclass
class Seen:
    """The folder after one pass."""

    folder: Path
    size: int  # to be trained at
    entries: list[str]  # all files, links and folders below it
    unlisted: list[str]  # pictures no line names
    rows: list[Row]
    pictures: dict[str, Picture]  # by name, those that are named and can be read


Places = Iterable[tuple[str, str]]  # where, and what is there


class Trap(NamedTuple):
    level: str  # warning: you will not get what you expect; note: the loader deals with it
    find: Callable[[Seen], Places]
    advice: str


def look(path: Path) -> Picture:
    """Read a picture as training will, or raise the loader's Fault."""
    pixels = load_image(path).permute(1, 2, 0).numpy()
    with Image.open(path) as file:
        deep = (
            file.mode.startswith("I") or re.search(r";16[BLN]", str(file.tile)) is not None
        )  # Pillow opens 16-bit RGB as RGB
        orientation, transparent = file.getexif().get(0x0112, 1), file.has_transparency_data
        try:
            animated = getattr(file, "is_animated", False)
        except Exception:  # there is a second frame, and it is damaged; only the first is read
            animated = True
        mode = file.mode
    small = np.asarray(Image.fromarray(pixels).resize((9, 8), Image.Resampling.BOX), float)
    bits = (
        small[:, 1:] > small[:, :-1]
    ).ravel()  # a difference hash: is it brighter than its left neighbour, in each of three colours?
    digest = hashlib.blake2b(
        pixels.tobytes() + repr(pixels.shape).encode(), digest_size=16
    ).digest()
    height, width = pixels.shape[:2]
    lit = [
        np.flatnonzero(pixels.max(axes) > 16) for axes in ((1, 2), (0, 2))
    ]  # rows and columns with any light in them; JPEG's black is not 0
    bars = 1 - np.prod([line[-1] + 1 - line[0] if len(line) else 0 for line in lit]) / (
        height * width
    )
    return Picture(
        width,
        height,
        mode,
        orientation,
        transparent,
        deep,
        animated,
        float(bars),
        digest,
        bits,
        small.mean((0, 1)),
    )


# What a trap looks at.


def each_picture(sees: Callable[[Picture, int], str | bool]) -> Callable[[Seen], Places]:
    """A trap that looks at a picture (and the size to be trained at) by itself."""
    return lambda seen: (
        (name, str(said))
        for name, picture in seen.pictures.items()
        if (said := sees(picture, seen.size))
    )


def each_caption(sees: Callable[[str], str]) -> Callable[[Seen], Places]:
    return lambda seen: (
        (row.where, said)
        for row in seen.rows
        if row.caption is not None and (said := sees(row.caption))
    )


def junk(seen: Seen) -> Places:
    return (
        (name, "")
        for name in seen.entries
        if os.path.basename(name) in JUNK or os.path.basename(name).startswith("._")
    )


def other_formats(seen: Seen) -> Places:
    named = {row.name for row in seen.rows}
    return (
        (name, "")
        for name in seen.entries
        if Path(name).suffix.lower() in OTHER_FORMATS and name not in named
    )


def unlisted(seen: Seen) -> Places:
    return (
        (name, "") for name in seen.unlisted if seen.rows
    )  # without a single line there is one fault, and it is another


def links_out(seen: Seen) -> Places:
    refused = {row.name for row in seen.rows if row.path is None}
    paths = ((name, seen.folder / name) for name in seen.entries if name not in refused)
    return (
        (name, f"to {os.readlink(path)}")
        for name, path in paths
        if path.is_symlink() and not inside(seen.folder, path)
    )


def alike_names(seen: Seen) -> Places:
    """Names that are one name on Windows and macOS: upper and lower case, accents in one sign or two."""
    first: dict[str, str] = {}
    for name in seen.entries:
        if (other := first.setdefault(unicodedata.normalize("NFC", name).casefold(), name)) != name:
            yield name, f'beside "{other}"'


def byte_order_mark(seen: Seen) -> Places:
    path = seen.folder / "metadata.jsonl"
    if any(row.line for row in seen.rows) and path.read_bytes().startswith(codecs.BOM_UTF8):
        yield str(path), ""


def again(seen: Seen, key: Callable[[Row], object]) -> Iterator[tuple[Row, Row]]:
    """Rows whose key stood in an earlier row, and that row."""
    first: dict[object, Row] = {}
    for row in seen.rows:
        if key(row) and (earlier := first.setdefault(key(row), row)) is not row:
            yield row, earlier


def same_lines(seen: Seen) -> Places:
    return (
        (row.where, f"as {earlier.where.rpartition(', ')[2]}")
        for row, earlier in again(seen, lambda row: row.line.strip())
    )


def same_names(seen: Seen) -> Places:
    pairs = again(seen, lambda row: row.name)
    return (
        (row.where, f'"{row.name}", as {first.where.rpartition(", ")[2]}')
        for row, first in pairs
        if row.line.strip() != first.line.strip()
    )


def same_pixels(seen: Seen) -> Places:
    first: dict[bytes, str] = {}
    for name, picture in seen.pictures.items():
        if (other := first.setdefault(picture.digest, name)) != name:
            yield name, f"as {other}"


def near_duplicates(seen: Seen, chunk: int = 1024) -> Places:
    """Each picture's closest look-alike before it; of pictures equal in all pixels only the first takes part."""
    kinds = {picture.digest: name for name, picture in reversed(seen.pictures.items())}
    names = [name for name, picture in seen.pictures.items() if kinds[picture.digest] == name]
    if not names:
        return
    bits = np.stack([seen.pictures[name].bits for name in names]).astype(np.float32) * 2 - 1
    colours = np.stack([seen.pictures[name].colour for name in names])
    for start in range(0, len(names), chunk):
        apart = (
            bits.shape[1] - bits[start : start + chunk] @ bits.T
        ) / 2  # a product of signs counts the bits that agree less those that do not
        for k, distances in enumerate(apart, start):
            close = np.flatnonzero(distances[:k] <= LOOK_BITS)
            close = close[np.abs(colours[close] - colours[k]).max(1, initial=0) <= LOOK_COLOUR]
            if len(close):
                j = close[distances[close].argmin()]
                yield (
                    names[k],
                    f"like {names[j]} ({distances[j]:.0f} of {bits.shape[1]} bits differ)",
                )


def too_long(caption: str) -> str:
    ids = token_ids(caption)
    return (
        f'{len(ids)} tokens; cut off: "{tokenizer().decode(list(ids[ROOM:])).strip()}"'
        if len(ids) > ROOM
        else ""
    )


def training_size(seen: Seen) -> Places:
    if seen.size % 64:
        yield f"--size {seen.size}", f"the nearest that are: {nearest(seen.size, 64)}"


def nearest(side: int, multiple: int) -> str:
    below = side // multiple * multiple
    return f"{below} and {below + multiple}" if below else f"{multiple}"


def indivisible(p: Picture, size: int) -> str:
    """Sides that an uncropped training cannot take: a VAE halves them three times (8), with Stable Diffusion's U-Net six times (64)."""
    if (
        p.width % 64 == 0 == p.height % 64 or min(p.width, p.height) < size
    ):  # smaller ones are another trap
        return ""
    by = [
        f"by {m} {' x '.join(str(max(m, round(side / m) * m)) for side in (p.width, p.height))}"
        for m in (8, 64)
    ]
    return f"{p.width} x {p.height}; nearest {', '.join(by)}"


def elongated(p: Picture, _: int) -> str:
    short, long = sorted((p.width, p.height))
    return f"{p.width} x {p.height}: {1 - short / long:.0%} is cut off" if long > 2 * short else ""


def enlarged(p: Picture, size: int) -> str:
    side = min(p.width, p.height)
    return f"{p.width} x {p.height}: enlarged {size / side:.3g} times" if side < size else ""


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
        "warning",
        each_picture(enlarged),
        "it is blurred: take a larger picture, or a smaller --size",
    ),
    "long and narrow": Trap(
        "warning", each_picture(elongated), "only its centre square is seen: crop it yourself"
    ),
    "black bars": Trap(
        "warning",
        each_picture(lambda p, _: p.bars > 0.05 and f"{p.bars:.0%} of it"),
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
        each_picture(lambda p, _: p.orientation in range(2, 9) and f"orientation {p.orientation}"),
        "turned upright",
    ),
    "grey": Trap(
        "note",
        each_picture(lambda p, _: p.mode in ("1", "L", "LA") and p.mode),
        "made RGB, and learnt as grey",
    ),
    "transparent": Trap(
        "note", each_picture(lambda p, _: p.transparent and p.mode), "laid on white"
    ),
    "palette": Trap(
        "note", each_picture(lambda p, _: p.mode in ("P", "PA") and p.mode), "made RGB"
    ),
    "CMYK": Trap(
        "note",
        each_picture(lambda p, _: p.mode == "CMYK" and p.mode),
        "made RGB without its profile: look at the colours",
    ),
    "16-bit": Trap("note", each_picture(lambda p, _: p.deep and p.mode), "scaled to 8 bits"),
    "animated": Trap(
        "note",
        each_picture(lambda p, _: p.animated and "several frames"),
        "its first frame is taken",
    ),
    "sides not divisible by 64": Trap(
        "note",
        each_picture(indivisible),
        "of no matter: what is trained on is scaled and cut to --size",
    ),
    "junk": Trap("note", junk, "skipped; delete it"),
}
