"""Images from disk: one image, folders with captions, folders of classes, and bytes as floats.

A captioned folder follows the Hugging Face image-folder convention, with one line for each image:

    DIR/metadata.jsonl      {"file_name": "images/apple.png", "text": "a red apple"}
    DIR/images/apple.png

A class folder is DIR/<class>/<any name>.png; the name of the class is the caption.

This file alone decides what cannot be trained on. It raises a Fault at the first; the data doctor
(doctor/) calls the same functions on every line and every image.
"""

import codecs
import difflib
import json
import math
import os
import re
import warnings
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

# load_image refuses what Pillow only warns of.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
# Usual names of the caption column, for suggestions.
CAPTION_NAMES = ("text", "caption", "prompt", "description", "captions")
_EXAMPLE = '{"file_name": "a.png", "text": "a caption"}'
_ONE_A_LINE = f"write one object a line, {_EXAMPLE}"


class Fault(UserError):
    """Data that cannot be trained on; `trap` is the data doctor's name for such faults."""

    def __init__(self, trap: str, message: str):
        super().__init__(message)
        self.trap = trap


def to_model(images: UInt8[Tensor, "*dims"]) -> Float[Tensor, "*dims"]:
    """Bytes 0..255 to floats in [-1, 1]."""
    return images.float() / 127.5 - 1


def to_uint8(images: Float[Tensor, "*dims"]) -> UInt8[Tensor, "*dims"]:
    """Floats in [-1, 1], clamped, to the nearest byte: the exact inverse of `to_model`."""
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def load_image(
    path: str | Path, size: int | tuple[int, int] | None = None, background: str = "white"
) -> UInt8[Tensor, "3 H W"]:
    """Read an image file of any kind as upright RGB, or raise a Fault. Transparent parts show the
    background, and a warning says so.

    size: a side, or (height, width); the image is scaled to cover it and cut in the centre.
    """
    if not os.path.isfile(path):
        raise Fault("missing picture", f"{path}: no such picture")
    advice = "replace it, or take it out of the data"
    if not os.path.getsize(path):
        raise Fault("empty file", f"{path}: not a readable picture (the file is empty); {advice}")
    try:
        with Image.open(path) as file:
            _check_pixels(file)
            ImageOps.exif_transpose(file, in_place=True)
            image = _rgb(file, background)
    except Exception as error:  # a damaged file makes Pillow raise almost anything
        reason = " ".join(str(error).split()) or type(error).__name__
        message = f"{path}: not a readable picture ({reason}); {advice}"
        raise Fault("unreadable picture", message) from None
    if size is not None:
        height, width = (size, size) if isinstance(size, int) else size
        image = ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def _check_pixels(image: Image.Image) -> None:
    """Refuse, by its header, an image that takes more than a gigabyte to unpack."""
    most = Image.MAX_IMAGE_PIXELS or math.inf
    if image.mode.startswith("I") or image.has_transparency_data:
        most *= 0.75
    if image.width * image.height > most:
        raise ValueError(f"{image.width}x{image.height} pixels; at most {most:,.0f} are read")


def _rgb(image: Image.Image, background: str) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey: Pillow's conversion does not scale all such modes
        grey = (np.asarray(image).astype(np.float32) / 257).round().clip(0, 255)
        image = Image.fromarray(grey.astype(np.uint8))
    if image.mode == "F":
        raise ValueError("floating-point pixels have no agreed range: save it with 8 or 16 bits")
    if image.has_transparency_data:  # alpha, or one transparent colour of a palette
        image = image if image.mode == "RGBA" else image.convert("RGBA")
        if image.getchannel("A").getextrema()[0] < 255:
            # without the file's name, so that it is said once
            what = "transparent parts of images are read as"
            warnings.warn(f"{what} {background}", stacklevel=2)
        image = Image.alpha_composite(Image.new("RGBA", image.size, background), image)
    image.load()
    return image if image.mode == "RGB" else image.convert("RGB")


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def images_in(folder: str | Path) -> list[Path]:
    """Every image file below the folder, sorted; hidden files and folders are skipped."""
    paths = []
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not _is_hidden(name)]
        paths += [Path(place, name) for name in names if not name.startswith(".")]
    return sorted(path for path in paths if path.suffix.lower() in SUFFIXES)


class CaptionedImages(Dataset):
    """Image files with one caption each; a file is read when it is asked for."""

    def __init__(self, paths: list[Path], captions: list[str], size: int | None = None):
        self.paths, self.captions, self.size = paths, captions, size

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> tuple[UInt8[Tensor, "3 H W"], str]:
        return load_image(self.paths[i], self.size), self.captions[i]


class CaptionedFolder(CaptionedImages):
    """The images and captions of DIR/metadata.jsonl; of a list of captions the first is taken."""

    def __init__(self, folder: str | Path, size: int | None = None, caption_column: str = "text"):
        folder = check_folder(folder)
        paths, captions = [], []
        for where, line in metadata_lines(folder):
            row = parse_row(where, line)
            paths.append(image_of(folder, where, row, lambda: images_in(folder)))
            captions.append(caption_of(where, row, caption_column))
        super().__init__(paths, captions, size)


class ClassFolder(CaptionedImages):
    """The images of DIR/<class>/<name>, with the name of the class as the caption.

    classes: the sorted names of the folders that hold images; labels: each image's index into them.
    """

    def __init__(self, folder: str | Path, size: int | None = None):
        folder = check_folder(folder)
        by_class = class_folders(folder)
        if not by_class:
            remedy = "put the pictures of each class into a folder of its own"
            hint = remedy if images_in(folder) else "there are no pictures below it"
            message = f"{folder}: no class folders (DIR/<class>/<name>.png); {hint}"
            raise Fault("no class folders", message)
        self.classes = list(by_class)
        self.labels = [label for label, paths in enumerate(by_class.values()) for _ in paths]
        paths = [path for paths in by_class.values() for path in paths]
        super().__init__(paths, [self.classes[label] for label in self.labels], size)


def load_all(
    dataset: CaptionedImages, size: int, limit: int | None = None
) -> tuple[UInt8[Tensor, "N 3 S S"], list[str]]:
    """Load images and captions into memory, at most `limit`, spread evenly over the set."""
    count = len(dataset) if limit is None else min(limit, len(dataset))
    indices = [i * len(dataset) // count for i in range(count)]
    images = torch.empty(count, 3, size, size, dtype=torch.uint8)
    with ThreadPoolExecutor() as pool:  # Pillow decodes outside Python's lock
        loaded = pool.map(lambda i: load_image(dataset.paths[i], size), indices)
        for k, image in enumerate(tqdm(loaded, "reading pictures", count, unit="", leave=False)):
            images[k] = image
    return images, [dataset.captions[i] for i in indices]


# metadata.jsonl: every Fault names the file and the line.


def metadata_lines(folder: Path) -> Iterator[tuple[str, bytes]]:
    """Yield ("DIR/metadata.jsonl, line 3", that line); blank lines are skipped."""
    path = folder / "metadata.jsonl"
    if not path.is_file():
        raise Fault("no metadata.jsonl", f"{path}: not found; {_advice_without_metadata(folder)}")
    try:
        content = path.read_bytes()
    except OSError as error:
        message = f"{path}: {error.strerror}; check its permissions"
        raise Fault("no metadata.jsonl", message) from None
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise Fault("not UTF-8", f"{path}: this is UTF-16; save the file as UTF-8")
    content = content.removeprefix(codecs.BOM_UTF8)
    if not content.strip():
        raise Fault("no metadata.jsonl", f"{path}: empty; {_ONE_A_LINE}")
    for number, line in enumerate(content.splitlines(), 1):
        if line.strip():
            yield f"{path}, line {number}", line


def parse_row(where: str, line: bytes) -> dict:
    """The JSON object of a line."""
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        byte = f"byte {line[error.start]:#x} at column {error.start + 1}"
        message = f"{where}: not UTF-8 ({byte}); save the file as UTF-8"
        raise Fault("not UTF-8", message) from None
    # Not only JSONDecodeError: numbers of thousands of digits, and very deep nesting.
    except (ValueError, RecursionError) as error:
        column = f" at column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
        reason = getattr(error, "msg", str(error).split(";")[0]) + column
        raise Fault("not JSON", f"{where}: not JSON ({reason}); {_ONE_A_LINE}") from None
    if not isinstance(row, dict):
        raise Fault("not JSON", f"{where}: not a JSON object; {_ONE_A_LINE}")
    return row


def _quote(name: str) -> str:
    return json.dumps(name, ensure_ascii=False)


def _describe(value: object) -> str:
    """A wrong value in short; printing a deep list or dict may fail."""
    if value and isinstance(value, dict | list):
        return f"a {type(value).__name__}"
    return json.dumps(value)[:60]


def _column(where: str, row: dict, column: str) -> object:
    """The value of a column. If it is missing, raise a Fault that names the likely column."""
    if column in row:
        return row[column]
    names = ", ".join(map(_quote, row)) or "nothing"
    if column == "file_name":
        trap, close = "no file_name column", difflib.get_close_matches(column, row, 1)
        advice = "Add it, with the picture's path inside the folder"
        advice = f"Rename {_quote(close[0])}" if close else advice
    else:
        others = [k for k, v in row.items() if k != "file_name" and isinstance(v, str | list)]
        trap, close = "no caption column", difflib.get_close_matches(column, others, 1)
        close += [name for name in (*CAPTION_NAMES, *others) if name in others]
        advice = f"Rename it, or pass `caption_column={close[0]}`" if close else "Add it"
    raise Fault(trap, f"{where}: no column {_quote(column)}; found {names}. {advice}.")


def caption_of(where: str, row: dict, column: str) -> str:
    """The caption in a row; of a list, the first."""
    value = _column(where, row, column)
    first = value[0] if isinstance(value, list) and value else value
    if not isinstance(first, str):
        problem = f"{_describe(value)}, not a caption; write a string, or a list of strings"
    elif re.search("[\ud800-\udfff]", first):  # valid in JSON, but no tokenizer can read it
        problem = f"half a character, {first[:60]!a}; write the caption anew"
    else:
        return first
    raise Fault("not a caption", f"{where}: column {_quote(column)} holds {problem}")


def image_of(folder: Path, where: str, row: dict, candidates: Callable[[], list[Path]]) -> Path:
    """The path of the image that a row names; `candidates` lists names to suggest for it."""
    name = _column(where, row, "file_name")
    if not isinstance(name, str) or not name:
        problem = f"holds {_describe(name)}; write the path of a picture inside the folder"
        raise Fault("no file_name column", f'{where}: "file_name" {problem}')
    path = folder / name
    if not inside(folder, path):
        problem = f"points outside the folder; copy the picture into {folder}"
        raise Fault("outside the folder", f'{where}: "file_name" {_quote(name)} {problem}')
    if not os.path.isfile(path):
        names = [p.relative_to(folder).as_posix() for p in candidates()]
        near = difflib.get_close_matches(name, names, 1)
        remedy = "add the picture, or take the line out"
        hint = f"did you mean {_quote(near[0])}?" if near else remedy
        raise Fault("missing picture", f"{where}: picture {_quote(name[:200])} is missing; {hint}")
    return path


def inside(folder: Path, path: Path) -> bool:
    """Whether the path, with its links resolved, stays in the folder."""
    try:
        return path.resolve().is_relative_to(folder.resolve())
    except (OSError, ValueError, RuntimeError):  # too long, a NUL in it, links in a circle
        return True


def check_folder(folder: str | Path) -> Path:
    """The folder as a Path; UserError if it is missing or empty."""
    folder = Path(folder)
    if not folder.is_dir():
        file = "this is a file; pass the folder it lies in"
        raise UserError(f"{folder}: {file if folder.exists() else 'no such folder'}")
    if not any(folder.iterdir()):
        remedy = "put pictures and a metadata.jsonl there, or one folder of pictures per class"
        raise UserError(f"{folder}: the folder is empty; {remedy}")
    return folder


def class_folders(folder: Path) -> dict[str, list[Path]]:
    """The images of each folder in this one, by its name; folders without images are left out."""
    folders = sorted(p for p in folder.iterdir() if p.is_dir() and not _is_hidden(p.name))
    return {place.name: paths for place in folders if (paths := images_in(place))}


def _advice_without_metadata(folder: Path) -> str:
    """What to do about a folder without metadata.jsonl, by what is there instead."""
    if (folder / "metadata.csv").is_file():
        return f"metadata.csv is not read; write the same as one JSON object a line, {_EXAMPLE}"
    if nested := sorted(folder.glob("*/metadata.jsonl")):
        return f"there is {nested[0]}; pass the folder it lies in"
    if classes := class_folders(folder):
        names = ", ".join(list(classes)[:3]) + (", ..." if len(classes) > 3 else "")
        remedy = "load it as class folders if those are classes, or write one line a picture"
        return f"there are folders of pictures ({names}): {remedy}, {_EXAMPLE}"
    return f"write one line a picture there, {_EXAMPLE}"
