"""Pictures from disk: reading one picture, folders of captions, folders of classes, and the step from bytes to [-1, 1], are all in this file.

A captioned folder follows the Hugging Face image-folder convention, one line a picture:

    DIR/metadata.jsonl      {"file_name": "images/apple.png", "text": "a red apple"}
    DIR/images/apple.png

A class folder is the older layout, DIR/<class>/<any name>.png; there the name of the class is the caption.

What cannot be trained on is decided in this file alone, and raised as a Fault by whatever meets it first; the data doctor (doctor.py) asks the
same functions about every line and every picture.
"""

import codecs
import difflib
import json
import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from minidiff.errors import UserError

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
CAPTION_NAMES = (
    "text",
    "caption",
    "prompt",
    "description",
    "captions",
)  # what people call the column, for a better suggestion
_EXAMPLE = '{"file_name": "a.png", "text": "a caption"}'


class Fault(UserError):
    """Data that cannot be trained on; `trap` is what the doctor calls a fault of this kind."""

    def __init__(self, trap: str, message: str):
        super().__init__(message)
        self.trap = trap


def to_model(pictures: UInt8[Tensor, "*dims"]) -> Float[Tensor, "*dims"]:
    """Bytes 0..255 to floats in [-1, 1]."""
    return pictures.float() / 127.5 - 1


def to_uint8(pictures: Float[Tensor, "*dims"]) -> UInt8[Tensor, "*dims"]:
    """Floats in [-1, 1] to the nearest byte: the exact inverse of `to_model`; what lies outside is clamped."""
    return ((pictures.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def load_picture(
    path: str | Path, size: int | tuple[int, int] | None = None
) -> UInt8[Tensor, "3 H W"]:
    """Any picture as upright RGB on white; with a size (a side, or height and width), it is scaled to cover that and the centre is cut out."""
    if not os.path.isfile(path):
        raise Fault("missing picture", f"{path}: no such picture")
    advice = "replace it, or take it out of the data"
    if not os.path.getsize(path):
        raise Fault("empty file", f"{path}: not a readable picture (the file is empty); {advice}")
    try:
        with Image.open(path) as file:
            image = _rgb(ImageOps.exif_transpose(file))
    except Exception as error:  # a damaged file makes Pillow raise almost anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise Fault(
            "unreadable picture", f"{path}: not a readable picture ({reason}); {advice}"
        ) from None
    if size is not None:
        height, width = (size, size) if isinstance(size, int) else size
        image = ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith(
        "I"
    ):  # 16-bit grey: Pillow's own conversion does not scale every such mode
        image = Image.fromarray(
            (np.asarray(image).astype(np.float64) / 257).round().clip(0, 255).astype(np.uint8)
        )
    if image.mode == "F":
        raise ValueError("floating-point pixels have no agreed range: save it with 8 or 16 bits")
    if image.has_transparency_data:  # alpha, or one colour of a palette declared transparent
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def pictures_in(folder: str | Path) -> list[Path]:
    """Every picture below the folder, sorted; hidden files and folders (.DS_Store, ._x.png, .ipynb_checkpoints) and other files are skipped."""
    found = []
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".") and name != "__MACOSX"]
        found += [
            Path(place, name)
            for name in names
            if not name.startswith(".") and Path(name).suffix.lower() in SUFFIXES
        ]
    return sorted(found)


class Pictures(Dataset):
    """Picture files with one caption each; they are read when asked for."""

    def __init__(self, paths: list[Path], captions: list[str], size: int | None = None):
        self.paths, self.captions, self.size = paths, captions, size

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> tuple[UInt8[Tensor, "3 H W"], str]:
        return load_picture(self.paths[i], self.size), self.captions[i]


class CaptionedFolder(Pictures):
    """DIR/metadata.jsonl says which pictures and which captions. Of a list of captions the first is taken; to use
    all of them, give the picture one line per caption."""

    def __init__(self, folder: str | Path, size: int | None = None, caption_column: str = "text"):
        folder = existing(folder)
        paths, captions = [], []
        for where, line in metadata_lines(folder):
            row = row_of(where, line)
            paths.append(picture_of(folder, where, row, lambda: pictures_in(folder)))
            captions.append(caption_of(where, row, caption_column))
        super().__init__(paths, captions, size)


class ClassFolder(Pictures):
    """DIR/<class>/<picture>: `classes` are the sorted names of the folders that hold pictures, `labels` one index into them per picture."""

    def __init__(self, folder: str | Path, size: int | None = None):
        folder = existing(folder)
        by_class = class_folders(folder)
        if not by_class:
            hint = (
                "put the pictures of each class into a folder of its own"
                if pictures_in(folder)
                else "there are no pictures below it"
            )
            raise Fault(
                "no class folders", f"{folder}: no class folders (DIR/<class>/<name>.png); {hint}"
            )
        self.classes = list(by_class)
        self.labels = [label for label, paths in enumerate(by_class.values()) for _ in paths]
        paths = [path for paths in by_class.values() for path in paths]
        super().__init__(paths, [self.classes[label] for label in self.labels], size)


def load_all(
    dataset: Pictures, size: int, limit: int | None = None
) -> tuple[UInt8[Tensor, "N 3 S S"], list[str]]:
    """Everything in memory, for small sets; a limit takes that many, spread evenly, so that every class of a sorted folder has its share."""
    count = len(dataset) if limit is None else min(limit, len(dataset))
    chosen = [i * len(dataset) // count for i in range(count)]
    pictures = torch.empty(count, 3, size, size, dtype=torch.uint8)
    with ThreadPoolExecutor() as pool:  # Pillow decodes outside Python's lock
        loaded = pool.map(lambda i: load_picture(dataset.paths[i], size), chosen)
        for k, picture in enumerate(tqdm(loaded, "reading pictures", count, unit="", leave=False)):
            pictures[k] = picture
    return pictures, [dataset.captions[i] for i in chosen]


# Reading metadata.jsonl: every complaint names the file and the line.


def metadata_lines(folder: Path) -> Iterator[tuple[str, bytes]]:
    """Yield ("DIR/metadata.jsonl, line 3", that line); blank lines are skipped."""
    path = folder / "metadata.jsonl"
    if not path.is_file():
        raise Fault("no metadata.jsonl", f"{path}: not found; {_instead(folder)}")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise Fault(
            "no metadata.jsonl", f"{path}: {error.strerror}; check its permissions"
        ) from None
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise Fault("not UTF-8", f"{path}: this is UTF-16; save the file as UTF-8")
    empty = True
    for number, line in enumerate(content.removeprefix(codecs.BOM_UTF8).splitlines(), 1):
        if line.strip():
            empty = False
            yield f"{path}, line {number}", line
    if empty:
        raise Fault("no metadata.jsonl", f"{path}: empty; write one object a line, {_EXAMPLE}")


def row_of(where: str, line: bytes) -> dict:
    """The object on a line."""
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        message = f"{where}: not UTF-8 (byte {line[error.start]:#x} at column {error.start + 1}); save the file as UTF-8"
        raise Fault("not UTF-8", message) from None
    except (
        ValueError,
        RecursionError,
    ) as error:  # also numbers of thousands of digits, and brackets within brackets within ...
        reason = (
            f"{error.msg} at column {error.colno}"
            if isinstance(error, json.JSONDecodeError)
            else str(error).split(";")[0]
        )
        raise Fault(
            "not JSON", f"{where}: not JSON ({reason}); write one object a line, {_EXAMPLE}"
        ) from None
    if not isinstance(row, dict):
        raise Fault("not JSON", f"{where}: not a JSON object; write one object a line, {_EXAMPLE}")
    return row


def _quoted(name: str) -> str:
    return json.dumps(name, ensure_ascii=False)


def _shown(value: object) -> str:
    """A wrong value, short; what may be nested beyond what can be printed is only named."""
    return (
        f"a {type(value).__name__}"
        if value and isinstance(value, dict | list)
        else json.dumps(value)[:60]
    )


def _column(where: str, row: dict, column: str) -> object:
    if column in row:
        return row[column]
    others = [
        name for name, value in row.items() if name != "file_name" and isinstance(value, str | list)
    ]
    close = difflib.get_close_matches(column, row if column == "file_name" else others, 1)
    best = (
        close[0]
        if close
        else next((name for name in (*CAPTION_NAMES, *others) if name in others), None)
    )
    found = ", ".join(_quoted(name) for name in row) or "nothing"
    advice = "Add it"
    if column == "file_name":
        advice = (
            f"Rename {_quoted(close[0])}"
            if close
            else "Add it, with the picture's path inside the folder"
        )
    elif best:
        advice = f"Rename it, or pass --caption-column {best}"
    trap = "no file_name column" if column == "file_name" else "no caption column"
    raise Fault(trap, f"{where}: no column {_quoted(column)}; found {found}. {advice}.")


def caption_of(where: str, row: dict, column: str) -> str:
    """The caption in a row; of a list, the first."""
    value = _column(where, row, column)
    first = value[0] if isinstance(value, list) and value else value
    if not isinstance(first, str):
        message = f"{where}: column {_quoted(column)} holds {_shown(value)}, not a caption; write a string, or a list of strings"
        raise Fault("not a caption", message)
    if re.search("[\ud800-\udfff]", first):  # JSON can write them, and no tokenizer can read them
        raise Fault(
            "not a caption",
            f"{where}: column {_quoted(column)} holds half a character, {first[:60]!a}; write the caption anew",
        )
    return first


def picture_of(folder: Path, where: str, row: dict, known: Callable[[], list[Path]]) -> Path:
    """The picture that a row names. `known` lists those there are, and is asked for a better name only if this one is wrong."""
    name = _column(where, row, "file_name")
    if not isinstance(name, str) or not name:
        raise Fault(
            "no file_name column",
            f'{where}: "file_name" holds {_shown(name)}; write the path of a picture inside the folder',
        )
    path = folder / name
    if not inside(folder, path):
        raise Fault(
            "outside the folder",
            f'{where}: "file_name" {_quoted(name)} points outside the folder; copy the picture into {folder}',
        )
    if not os.path.isfile(path):
        near = difflib.get_close_matches(
            name, [p.relative_to(folder).as_posix() for p in known()], 1
        )
        hint = (
            f"did you mean {_quoted(near[0])}?" if near else "add the picture, or take the line out"
        )
        raise Fault("missing picture", f"{where}: picture {_quoted(name[:200])} is missing; {hint}")
    return path


def inside(folder: Path, path: Path) -> bool:
    """Whether the path, its links followed, stays in the folder; so does one that cannot be followed."""
    try:
        return path.resolve().is_relative_to(folder.resolve())
    except (
        OSError,
        ValueError,
        RuntimeError,
    ):  # too long to be a name, a NUL in it, links in a circle
        return True


def existing(folder: str | Path) -> Path:
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(
            f"{folder}: {'this is a file; pass the folder it lies in' if folder.exists() else 'no such folder'}"
        )
    if not any(folder.iterdir()):
        raise UserError(
            f"{folder}: the folder is empty; put pictures and a metadata.jsonl there, or one folder of pictures per class"
        )
    return folder


def class_folders(folder: Path) -> dict[str, list[Path]]:
    below = sorted(
        place
        for place in folder.iterdir()
        if place.is_dir() and not place.name.startswith(".") and place.name != "__MACOSX"
    )
    return {place.name: paths for place in below if (paths := pictures_in(place))}


def _instead(folder: Path) -> str:
    """What to do about a folder without metadata.jsonl depends on what is there."""
    if (folder / "metadata.csv").is_file():
        return f"metadata.csv is not read; write the same as one JSON object a line, {_EXAMPLE}"
    if nested := sorted(folder.glob("*/metadata.jsonl")):
        return f"there is {nested[0]}; pass the folder it lies in"
    if classes := class_folders(folder):
        names = ", ".join(list(classes)[:3]) + (", ..." if len(classes) > 3 else "")
        return f"there are folders of pictures ({names}): load it as class folders if those are classes, or write one line a picture, {_EXAMPLE}"
    return f"write one line a picture there, {_EXAMPLE}"
