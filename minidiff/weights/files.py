"""Files of tensors and of settings, opened as data and never as programs: every check of a stranger's file is in this file.

A safetensors file is a length, a JSON header and bytes; `header` reads the first two without torch, in milliseconds whatever the
file's size. Its tensors are memory maps: what is not used is never read. A .ckpt or .bin is a zip of a pickle and raw storages;
`weights_only` runs nothing in it. What is written is written `beside` its place first.
"""
import json
import math
import re
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple
from zipfile import ZIP_STORED, BadZipFile, ZipFile

from minidiff.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

SUFFIXES = (".safetensors", ".ckpt", ".bin", ".pt", ".pth")
MAX_JSON = 16 * 2**20  # bytes; a header of Stable Diffusion's 1,131 tensors takes 0.15 MB
MAX_PICKLE = 64 * 2**20  # what describes tensors, without the tensors
BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
AGAIN = "fetch or copy it again"


class Stored(NamedTuple):
    """A tensor, as far as a file's header tells. It can be taken apart as tensors can, so that names and sizes are read alike from both."""

    dtype: str  # a key of BYTES
    shape: tuple[int, ...]

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def numel(self) -> int:
        return math.prod(self.shape)

    def flatten(self, start: int) -> "Stored":
        return Stored(self.dtype, (*self.shape[:start], math.prod(self.shape[start:])))

    def chunk(self, pieces: int) -> tuple["Stored", ...]:
        return (Stored(self.dtype, (self.shape[0] // pieces, *self.shape[1:])),) * pieces


def checked(file: Path) -> Path:
    """The file, if it is there and is one of tensors by its name."""
    if not file.is_file():
        raise UserError(f'no file "{file}".')
    if file.suffix not in SUFFIXES:
        raise UserError(f"{file} is no checkpoint by its name; one ends in {', '.join(SUFFIXES)}.")
    return file


def inside(folder: Path, file: Path) -> Path:
    """The file, unless a link leads out of the folder. A folder of Hugging Face's cache may link to the blobs beside it."""
    if not file.exists():
        return file
    root, real = folder.resolve(), file.resolve()
    allowed = [root, root.parents[1] / "blobs"] if root.parent.name == "snapshots" else [root]
    if not any(real.is_relative_to(place) for place in allowed):
        raise UserError(f"{file} is a link out of its folder, to {real}; put the file itself there.")
    return file


def read_json(file: Path) -> dict:
    """The object in a JSON file of reasonable size."""
    try:
        size = file.stat().st_size
        if size > MAX_JSON:
            raise UserError(f"{file} has {size / 2**20:.0f} MB; a file of settings has a few kilobytes.")
        found = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{file} is missing; {AGAIN}.") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is damaged (not JSON: {error}); {AGAIN}.") from error
    if not isinstance(found, dict):
        raise UserError(f"{file} is damaged (it should hold an object); {AGAIN}.")
    return found


def header(file: Path) -> tuple[dict[str, Stored], dict[str, str]]:
    """What a safetensors file says of its tensors, and its metadata. Whatever the header claims is compared with the file's length."""

    def damaged(why: str) -> UserError:
        return UserError(f"{file} is damaged ({why}); {AGAIN}.")

    total = file.stat().st_size
    with open(file, "rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if total < 8 or length > total - 8:
            raise damaged(f"its header should have {length} bytes, the file has {total}")
        if length > MAX_JSON:
            raise damaged(f"its header has {length / 2**20:.0f} MB, where 1 is plenty")
        try:
            found = json.loads(opened.read(length).decode("utf-8"))
            metadata = found.pop("__metadata__", {}) if isinstance(found, dict) else None
        except (ValueError, RecursionError) as error:
            raise damaged(f"its header is not JSON: {error}") from error
    if not isinstance(found, dict) or not isinstance(metadata, dict):
        raise damaged("its header is no list of tensors")
    stored, spans = {}, []
    for name, claim in found.items():
        try:
            dtype, shape, (begin, end) = claim["dtype"], tuple(claim["shape"]), claim["data_offsets"]
            whole = all(type(number) is int and number >= 0 for number in (*shape, begin, end))
        except (TypeError, KeyError, ValueError) as error:
            raise damaged(f'its header does not describe "{name}"') from error
        if dtype not in BYTES:
            raise UserError(f'{file}: "{name}" is of type {dtype!r}; known here are {", ".join(BYTES)}.')
        if not whole or end - begin != math.prod(shape) * BYTES[dtype] or end > total - 8 - length:
            raise damaged(f'"{name}", {dtype} of shape {list(shape)}, does not fit the bytes {begin} to {end} of {total - 8 - length}')
        stored[name] = Stored(dtype, shape)
        spans.append((begin, end))
    spans.sort()
    if any(end > begin for (_, end), (begin, _) in pairwise(spans)):
        raise damaged("two of its tensors share bytes")
    return stored, metadata


def metadata(file: Path) -> dict[str, str]:
    """What a safetensors file says of itself; other files say nothing."""
    return header(file)[1] if file.suffix == ".safetensors" else {}


def tensors(file: Path) -> "dict[str, Tensor]":
    """All tensors of a file by the names it gives them, as memory maps."""
    return _safetensors(file) if checked(file).suffix == ".safetensors" else _pickled(file)


def _safetensors(file: Path) -> "dict[str, Tensor]":
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    header(file)
    try:
        return load_file(file)
    except (SafetensorError, OSError, RuntimeError, ValueError, KeyError) as error:
        raise UserError(f"{file} is damaged ({_first_line(error)}); {AGAIN}.") from error


def _pickled(file: Path) -> "dict[str, Tensor]":
    """The tensors of a zip as torch.save writes it since version 1.6, with or without "state_dict" around them."""
    import pickle

    import torch
    from torch import Tensor

    try:
        with ZipFile(file) as archive:
            entries = archive.infolist()
    except (BadZipFile, OSError, ValueError, NotImplementedError, RuntimeError, OverflowError) as error:
        why = f"{file} is no archive of tensors: damaged, of before PyTorch 1.6, or a program in disguise"
        raise UserError(f"{why}; ask for a .safetensors of it.") from error
    described = sum(entry.file_size for entry in entries if entry.filename.endswith(".pkl"))
    packed = any(entry.compress_type != ZIP_STORED for entry in entries)
    if packed or described > MAX_PICKLE or sum(entry.file_size for entry in entries) > file.stat().st_size:
        raise UserError(f"{file} unpacks to more than it holds; PyTorch writes no such file.")
    try:
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise UserError(f"{file} holds more than tensors: code that would run when it is opened; ask for a .safetensors of it.") from error
    except Exception as error:  # a pickle is a program for a small machine: a mutated one can fail in any way
        raise UserError(f"{file} is damaged ({_first_line(error)}); {AGAIN}.") from error
    state = state.get("state_dict", state) if isinstance(state, dict) else None
    if not isinstance(state, dict):
        raise UserError(f"{file} holds no dictionary of tensors.")
    return {name: value for name, value in state.items() if isinstance(name, str) and isinstance(value, Tensor) and value.layout == torch.strided}


def stored(file: Path) -> dict[str, Stored]:
    """What any file of tensors says of them; one that is a pickle must be opened for it."""
    if checked(file).suffix == ".safetensors":
        return header(file)[0]
    short = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "bool": "BOOL", "uint8": "U8"}
    found = {}
    for name, value in _pickled(file).items():
        kind = str(value.dtype).removeprefix("torch.")
        found[name] = Stored(short.get(kind, re.sub(r"^int", "I", kind)), tuple(value.shape))
    return found


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__
