"""The captions of a folder's images: in metadata.jsonl, .csv or .parquet, or in text files.

The tables follow the Hugging Face image-folder convention, with one line for each image:

    DIR/metadata.jsonl      {"file_name": "images/apple.png", "text": "a red apple"}
    DIR/images/apple.png

Without a table, apple.txt beside apple.png has its caption. Every table and text file is read as
lines of JSON, and every Fault names the file and the line.
"""

import codecs
import csv
import difflib
import io
import json
import os
import re
import unicodedata
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

from minidiff.errors import UserError

SUFFIXES = set(".png .jpg .jpeg .jfif .webp .bmp .gif .tif .tiff .avif .heic .heif".split())
OTHER_FORMATS = set(".jp2 .jxl .svg .psd .raw .dng .cr2 .nef .arw".split())  # images, never read
SIDECARS = (".txt", ".caption")
# Data sets with the pictures inside: of `datasets`, of img2dataset, of WebDataset.
PACKED = ("*.arrow", "*/*.arrow", "*.parquet", "*/*.parquet", "*.tar", "metadata.json")
# Usual names of the caption column, for suggestions.
CAPTION_NAMES = ("text", "caption", "prompt", "description", "captions")
_EXAMPLE = '{"file_name": "a.png", "text": "a caption"}'
_ONE_A_LINE = f"write one object a line, {_EXAMPLE}"


class Fault(UserError):
    """Data that cannot be trained on; `trap` is the data doctor's name for such faults."""

    def __init__(self, trap: str, message: str):
        super().__init__(message)
        self.trap = trap


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def images_in(folder: str | Path, suffixes: set[str] = SUFFIXES) -> list[Path]:
    """Every image file below the folder, sorted; hidden files and folders are skipped."""
    paths = []
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not _is_hidden(name)]
        paths += [Path(place, name) for name in names if not name.startswith(".")]
    return sorted(path for path in paths if path.suffix.lower() in suffixes)


def nfc(name: str) -> str:
    """A name with its accents in one spelling: macOS writes them in two signs."""
    return unicodedata.normalize("NFC", name)


def caption_lines(folder: Path) -> Iterator[tuple[str, bytes]]:
    """Yield ("DIR/metadata.jsonl, line 3", that line as JSON); blank lines are skipped."""
    tables = _tables(folder)
    if len(tables) > 1:
        others = " and ".join(path.name for path in tables[1:])
        warnings.warn(f"{tables[0]} has the captions; {others} is not read.", stacklevel=2)
    if tables:
        yield from TABLES[tables[0].suffix](tables[0])
        return
    images = images_in(folder)
    files = {image: file for image in images if (file := sidecar(image)) is not None}
    if not files:
        message = f"{folder / 'metadata.jsonl'}: not found; {_advice_without_captions(folder)}"
        raise Fault("no metadata.jsonl", message)
    if without := [image for image in images if image not in files]:
        message = f"{len(without)} pictures have no text file beside them ({without[0].name})"
        warnings.warn(f"{folder}: {message}, and are not read.", stacklevel=2)
    for image, file in files.items():
        captions = [line for line in map(str.strip, _text(file).splitlines()) if line]
        row = {"file_name": image.relative_to(folder).as_posix()}
        row["text"] = captions if len(captions) > 1 else "".join(captions)
        yield str(file), json.dumps(row).encode()


def _tables(folder: Path) -> list[Path]:
    return [path for kind in TABLES if (path := folder / f"metadata{kind}").is_file()]


def captions_file(folder: Path) -> Path | None:
    """A file that has captions of a folder's images, if there is one."""
    return next(
        (file for file in [*_tables(folder), *map(sidecar, images_in(folder))] if file), None
    )


def sidecar(image: Path) -> Path | None:
    """The text file beside an image that has its caption, or captions, one a line."""
    files = (image.with_suffix(suffix) for suffix in SIDECARS)
    return next((file for file in files if file.is_file()), None)


def _content(path: Path) -> bytes:
    """The bytes of a table or text file, without a byte-order mark."""
    try:
        content = path.read_bytes()
    except OSError as error:
        message = f"{path}: {error.strerror}; check its permissions"
        raise Fault("no metadata.jsonl", message) from None
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise Fault("not UTF-8", f"{path}: this is UTF-16; save the file as UTF-8")
    return content.removeprefix(codecs.BOM_UTF8)


def _text(path: Path) -> str:
    return _decoded(str(path), _content(path))


def _decoded(where: str, line: bytes) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        byte = f"byte {line[error.start]:#x} at column {error.start + 1}"
        message = f"{where}: not UTF-8 ({byte}); save the file as UTF-8"
        raise Fault("not UTF-8", message) from None


def _jsonl(path: Path) -> Iterator[tuple[str, bytes]]:
    content = _content(path)
    if not content.strip():
        raise Fault("no metadata.jsonl", f"{path}: empty; {_ONE_A_LINE}")
    for number, line in enumerate(content.splitlines(), 1):
        if line.strip():
            yield f"{path}, line {number}", line


def _csv(path: Path) -> Iterator[tuple[str, bytes]]:
    """Comma-separated; with semicolons or tabs, as spreadsheets write it, too."""
    text = _text(path)
    separator = max(",;\t", key=text.partition("\n")[0].count)
    table = csv.DictReader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    try:
        for row in table:
            yield f"{path}, line {table.line_num}", json.dumps(row).encode()
    except csv.Error as error:
        place = f"{path}, after line {table.line_num}"
        raise Fault("not CSV", f"{place}: not CSV ({error}); save the table anew") from None
    if table.line_num < 2:
        raise Fault("no metadata.jsonl", f"{path}: empty; write the columns file_name,text")


def _parquet(path: Path) -> Iterator[tuple[str, bytes]]:
    try:
        from pyarrow import ArrowException, parquet, types
    except ImportError:
        message = f"{path}: reading it needs pyarrow; pip install pyarrow, or write metadata.jsonl"
        raise Fault("no metadata.jsonl", message) from None
    try:
        schema = parquet.read_schema(path)
        readable = (types.is_string, types.is_large_string, types.is_list, types.is_null)
        names = [field.name for field in schema if any(is_a(field.type) for is_a in readable)]
        rows = parquet.read_table(path, columns=names).to_pylist()
    except (ArrowException, OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:100]
        raise Fault("no metadata.jsonl", f"{path}: not a Parquet file ({reason})") from None
    for number, row in enumerate(rows, 1):
        yield f"{path}, row {number}", json.dumps(row, default=str).encode()


TABLES = {".jsonl": _jsonl, ".csv": _csv, ".parquet": _parquet}  # the first that is there is read


def parse_row(where: str, line: bytes) -> dict:
    """The JSON object of a line."""
    text = _decoded(where, line)
    try:
        row = json.loads(text)
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
    names = ", ".join(map(_quote, row))[:300] or "nothing"
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
    return _checked(where, column, value[0] if isinstance(value, list) and value else value)


def captions_of(where: str, row: dict, column: str) -> list[str]:
    """The caption in a row, or all of a list."""
    value = _column(where, row, column)
    values = value if isinstance(value, list) and value else [value]
    return [_checked(where, column, each) for each in values]


def _checked(where: str, column: str, caption: object) -> str:
    if not isinstance(caption, str):
        problem = f"{_describe(caption)}, not a caption; write a string, or a list of strings"
    elif re.search("[\ud800-\udfff]", caption):  # valid in JSON, but no tokenizer can read it
        problem = f"half a character, {caption[:60]!a}; write the caption anew"
    else:
        return caption
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
    if not os.path.isfile(path):  # the same name, its accents in another spelling
        spellings = (folder / unicodedata.normalize(form, name) for form in ("NFC", "NFD"))
        path = next(filter(os.path.isfile, spellings), path)
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


def _advice_without_captions(folder: Path) -> str:
    """What to do about a folder without captions, by what is there instead."""
    if nested := sorted(folder.glob("*/metadata.*")):
        return f"there is {nested[0]}; pass the folder it lies in"
    if packed := [path for name in PACKED for path in sorted(folder.glob(name))]:
        return f"{packed[0].name} is not read; save its pictures, and one line for each, {_EXAMPLE}"
    if classes := class_folders(folder):
        names = ", ".join(list(classes)[:3]) + (", ..." if len(classes) > 3 else "")
        remedy = "put NAME.txt with the caption beside each, or write one line a picture"
        return f"there are folders of pictures ({names}): {remedy}, {_EXAMPLE}"
    return f"write one line a picture there, {_EXAMPLE}"
