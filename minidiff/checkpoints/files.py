"""Files of tensors and of settings, opened as data and never as programs: every check of a
stranger's file is in this file.

A safetensors file is a length, a JSON header and bytes. `header` reads the first two without torch,
in milliseconds whatever the file's size; tensors are memory maps. A .ckpt or .bin is a zip of a
pickle and raw storages; `weights_only` runs nothing in it.
"""

import json
import math
import re
import warnings
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from zipfile import ZIP_STORED, BadZipFile, ZipFile

from minidiff.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

SUFFIXES = (".safetensors", ".ckpt", ".bin", ".pt", ".pth")
MAX_JSON = 16 * 2**20  # bytes; a header of Stable Diffusion's 1,131 tensors takes 0.15 MB
MAX_PICKLE = 64 * 2**20  # what describes tensors, without the tensors
BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1}
BYTES |= {"I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
# A class that Stable Diffusion's own .ckpt files name beside their tensors.
CALLBACK = ("pytorch_lightning.callbacks.model_checkpoint", "ModelCheckpoint")
AROUND = ("state_dict", "string_to_param")  # of a checkpoint, and of a textual inversion
AGAIN = "fetch or copy it again"
TOO_MUCH = "unpacks to more than it holds; PyTorch writes no such file"
NO_LIST = "its header is no list of tensors"
ASK = "ask for a .safetensors of it"


class Stored(NamedTuple):
    """A tensor, as far as a file's header tells. It has the few methods of tensors that reading a
    layout needs, so that names and sizes are read alike from both."""

    dtype: str  # a key of BYTES
    shape: tuple[int, ...]

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def numel(self) -> int:
        return math.prod(self.shape)

    def flatten(self, start: int) -> "Stored":
        return Stored(self.dtype, (*self.shape[:start], math.prod(self.shape[start:])))

    @property
    def T(self) -> "Stored":
        return Stored(self.dtype, self.shape[::-1])

    def chunk(self, pieces: int) -> tuple["Stored", ...]:
        return self.split((self.shape[0] // pieces,) * pieces)

    def split(self, rows: Sequence[int]) -> tuple["Stored", ...]:
        return tuple(self.reshape(count, *self.shape[1:]) for count in rows)

    def reshape(self, *shape: int) -> "Stored":
        return Stored(self.dtype, shape)

    def transpose(self, first: int, second: int) -> "Stored":
        shape = list(self.shape)
        shape[first], shape[second] = shape[second], shape[first]
        return self.reshape(*shape)

    def roll(self, shift: int, axis: int) -> "Stored":
        return self


def checked(file: Path) -> Path:
    """The file, if it is there and is one of tensors by its name."""
    if not file.is_file():
        raise UserError(f'no file "{file}".')
    if file.suffix == ".gguf":
        raise UserError(f"{file} is quantized (GGUF), for other programs; {ASK}.")
    if file.suffix not in SUFFIXES:
        raise UserError(f"{file} is no checkpoint by its name; one ends in {', '.join(SUFFIXES)}.")
    return file


def inside(folder: Path, file: Path) -> Path:
    """The file, unless a link leads out of the folder, but for Hugging Face's cache."""
    if not file.exists():
        return file
    root, real = folder.resolve(), file.resolve()
    is_cached = any(re.fullmatch(r"models--.+", part) for part in real.parts)
    if not real.is_relative_to(root) and not is_cached:
        fix = "put the file itself there"
        raise UserError(f"{file} is a link out of its folder, to {real}; {fix}.")
    return file


def damaged(file: Path, why: str) -> UserError:
    return UserError(f"{file} is damaged ({why}); {AGAIN}.")


def read_json(file: Path) -> dict:
    """The object in a JSON file of reasonable size."""
    if not file.exists():
        raise UserError(f"{file} is missing; {AGAIN}.")
    if (size := file.stat().st_size) > MAX_JSON:
        usual = "a file of settings has a few kilobytes"
        raise UserError(f"{file} has {size / 2**20:.0f} MB; {usual}.")
    return _object(file, file.read_bytes(), "", "it should hold an object")


def _object(file: Path, text: bytes, which: str, no_object: str) -> dict:
    read = dict.fromkeys(("parse_int", "parse_float", "parse_constant"), _number)
    try:
        content = json.loads(text.decode("utf-8"), **read)
        json.dumps(content, ensure_ascii=False).encode("utf-8")  # fails on half a character
    except (ValueError, RecursionError) as error:
        raise damaged(file, f"{which}not JSON: {error}") from error
    if not isinstance(content, dict):
        raise damaged(file, no_object)
    return content


def _number(text: str) -> int | float:
    """A number in JSON, if a float64 can hold it."""
    if not math.isfinite(float(text)):
        raise ValueError(f"{text[:20]} is no finite number")
    return int(text) if text.lstrip("-").isdecimal() else float(text)


def header(file: Path) -> tuple[dict[str, Stored], dict[str, str]]:
    """A safetensors file's tensors and metadata, as its header has them. Whatever it claims is
    compared with the file's length."""
    total = file.stat().st_size
    with open(file, "rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if total < 8 or length > total - 8:
            why = f"its header should have {length} bytes, the file has {total}"
            raise damaged(file, why)
        if length > MAX_JSON:
            raise damaged(file, f"its header has {length / 2**20:.0f} MB, where 1 is plenty")
        content = _object(file, opened.read(length), "its header is ", NO_LIST)
    metadata = content.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise damaged(file, NO_LIST)
    stored, spans = {}, []
    for name, claim in content.items():
        stored[name], span = _claimed(file, name, claim, total - 8 - length)
        spans.append(span)
    spans.sort()
    if any(end > begin for (_, end), (begin, _) in pairwise(spans)):
        raise damaged(file, "two of its tensors share bytes")
    return stored, metadata


def _claimed(file: Path, name: str, claim: Any, total: int) -> tuple[Stored, tuple[int, int]]:
    """One tensor of a header, and where its bytes begin and end among so many."""
    try:
        dtype, shape = claim["dtype"], tuple(claim["shape"])
        begin, end = claim["data_offsets"]
    except (TypeError, KeyError, ValueError) as error:
        raise damaged(file, f'its header does not describe "{name}"') from error
    if not isinstance(dtype, str) or dtype not in BYTES:
        known = ", ".join(BYTES)
        raise UserError(f'{file}: "{name}" is of type {dtype!r}; known here are {known}.')
    whole = all(type(number) is int and number >= 0 for number in (*shape, begin, end))
    if not whole or end - begin != math.prod(shape) * BYTES[dtype] or end > total:
        what = f'"{name}", {dtype} of shape {list(shape)}'
        raise damaged(file, f"{what}, does not fit the bytes {begin} to {end} of {total}")
    return Stored(dtype, shape), (begin, end)


def metadata(file: Path) -> dict[str, str]:
    """A safetensors file's metadata; other files have none."""
    return header(file)[1] if file.suffix == ".safetensors" else {}


def tensors(file: Path) -> "dict[str, Tensor]":
    """All tensors of a file by the names it gives them, as memory maps."""
    if checked(file).suffix != ".safetensors":
        return _widened(file, _pickled(file))
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    header(file)
    try:
        return _widened(file, load_file(file))
    except (SafetensorError, OSError, RuntimeError, ValueError, KeyError) as error:
        raise damaged(file, first_line(error)) from error


def _pickled(file: Path) -> "dict[str, Tensor]":
    """The tensors of a zip as torch.save writes it since version 1.6, alone or in a dictionary
    (AROUND) with others."""
    import pickle

    import torch
    from torch import Tensor

    _check_archive(file)
    module, name = CALLBACK
    stub = type(name, (), {"__module__": module})  # has the name, and does nothing
    try:
        with torch.serialization.safe_globals([stub, torch.nn.ParameterDict]):
            state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        what = "more than tensors: code that would run when it is opened"
        raise UserError(f"{file} holds {what}; {ASK}.") from error
    except Exception as error:  # a pickle is a program for a small machine: it can fail in any way
        raise damaged(file, first_line(error)) from error
    for key in AROUND:
        state = state.get(key, state) if isinstance(state, dict) else state
    # old textual inversions
    state = (
        getattr(state, "_parameters", state) if isinstance(state, torch.nn.ParameterDict) else state
    )
    if not isinstance(state, dict):
        raise UserError(f"{file} holds no dictionary of tensors.")
    state = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    state = {str(name): value for name, value in state.items() if _is_array(value)}
    if sum(value.nbytes for value in state.values()) > 2 * file.stat().st_size:
        raise UserError(f"{file} {TOO_MUCH}.")  # one number, say, as a tensor of any size
    return state


def _is_array(value: "Tensor") -> bool:
    """Whether a tensor is numbers in memory: not sparse, nested, quantized, or without numbers."""
    import torch

    strange = value.is_nested or value.is_quantized or value.is_meta
    return value.layout == torch.strided and not strange


def _widened(file: Path, state: "dict[str, Tensor]") -> "dict[str, Tensor]":
    """The same numbers, those of 8 bits as bfloat16, which holds them all: nothing computes in 8
    bits here."""
    import torch

    short = [
        name for name, value in state.items() if value.is_floating_point() and value.itemsize == 1
    ]
    if short:
        what = f"{len(short)} of its tensors are floats of 8 bits"
        warnings.warn(f"{file.name}: {what}; they are read as bf16", stacklevel=2)
    return state | {name: state[name].to(torch.bfloat16) for name in short}


def _check_archive(file: Path) -> None:
    """That a zip unpacks to no more than it holds."""
    try:
        with ZipFile(file) as archive:
            entries = archive.infolist()
    except (BadZipFile, OSError, ValueError, RuntimeError, OverflowError) as error:
        why = "damaged, of before PyTorch 1.6, or a program in disguise"
        raise UserError(f"{file} is no archive of tensors: {why}; {ASK}.") from error
    described = sum(entry.file_size for entry in entries if entry.filename.endswith(".pkl"))
    packed = any(entry.compress_type != ZIP_STORED for entry in entries)
    unpacked = sum(entry.file_size for entry in entries)
    if packed or described > MAX_PICKLE or unpacked > file.stat().st_size:
        raise UserError(f"{file} {TOO_MUCH}.")


def stored(file: Path) -> dict[str, Stored]:
    """Dtype and shape of every tensor of a file; a pickle must be opened for them."""
    if checked(file).suffix == ".safetensors":
        return header(file)[0]
    return {name: Stored(_short(t), tuple(t.shape)) for name, t in _pickled(file).items()}


def _short(value: "Tensor") -> str:
    """A dtype as safetensors writes it."""
    name = str(value.dtype).removeprefix("torch.")
    short = {"bfloat16": "BF16", "bool": "BOOL", "uint8": "U8"}
    short |= {"float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2"}
    return short.get(name, re.sub(r"^(f|i)[a-z]*", lambda match: match[1].upper(), name))


def first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__
