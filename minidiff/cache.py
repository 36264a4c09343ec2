"""Latents and text embeddings, computed once and kept on disk: what training would otherwise compute again at every step. All in this file.

A cache is one safetensors file in a folder: latents.safetensors, contexts.safetensors. The name of an entry is its key, the SHA-256 of all it
was computed from: the bytes of the picture, its size and whether it is mirrored, or the caption; and of the network its numbers and every
weight. So what has changed has another key and is computed anew, and nothing has to be asked of dates or names of files.

Entries are computed one at a time: what is in one then follows from its key, to the bit, whatever else was missing with it.
"""
import hashlib
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from minidiff import atomic
from minidiff.data.folder import load_picture, to_model
from minidiff.errors import UserError
from minidiff.lora import merged_state
from minidiff.weights import files

VERSION = "minidiff cache 1"  # another one wherever entries are computed otherwise, as by another way to scale pictures


class Example(NamedTuple):
    """A picture as training sees it."""

    latents: Float[Tensor, "Z h w"]
    caption: str


@torch.no_grad()
def encoded(vae: nn.Module, paths: list[Path], sizes: list[tuple[int, int]], folder: Path | None, flip: bool = False) -> list[Float[Tensor, "Z h w"]]:
    """The latents of each picture, scaled to cover its size (height, width) and cut in the centre; on the CPU.

    flip: after those of all pictures come those of their mirror images, so that captions * 2 go with them.
    folder: where latents.safetensors is kept; None keeps nothing.
    """
    of_vae, where = fingerprint(vae), next(vae.parameters(), torch.empty(0)).device
    contents = [hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in paths]

    def encode(path: Path, size: tuple[int, int], mirrored: bool) -> Tensor:
        picture = to_model(load_picture(path, size))[None].to(where)
        latents = vae.encode(picture.flip(-1) if mirrored else picture)[0].cpu()
        if not latents.isfinite().all():
            raise UserError(f"{path}: its latents are not finite; load the VAE in float32 or bfloat16.")
        return latents

    wanted = {}
    keys = []
    for mirrored in (False, True) if flip else (False,):
        for path, size, content in zip(paths, sizes, contents, strict=True):
            keys.append(_key(of_vae, content, *size, mirrored))
            wanted[keys[-1]] = path, size, mirrored
    found = _served("latents", folder, wanted, encode, "encoding pictures")
    return [found[key] for key in keys]


@torch.no_grad()
def contexts(text: nn.Module, captions: list[str], folder: Path | None) -> dict[str, Float[Tensor, "L D"]]:
    """What the text tower says of each caption, and of "", which captions are dropped to; on the CPU. folder: where contexts.safetensors is kept."""
    of_text = fingerprint(text)
    keys = {caption: _key(of_text, caption) for caption in dict.fromkeys(["", *captions])}
    wanted = {key: (caption,) for caption, key in keys.items()}
    found = _served("contexts", folder, wanted, lambda caption: text.encode([caption])[0].cpu(), "encoding captions")
    return {caption: found[key] for caption, key in keys.items()}


def fingerprint(network: nn.Module) -> str:
    """One word for all that a network computes with: its kind, its numbers, and every weight with its precision, LoRAs included."""
    digest = hashlib.sha256(repr((type(network).__name__, sorted(network.numbers.items()))).encode())
    for name, value in sorted(merged_state(network).items()):
        digest.update(repr((name, value.dtype, tuple(value.shape))).encode())
        digest.update(_bytes(value))
    return digest.hexdigest()


def _key(*parts: object) -> str:
    return hashlib.sha256(repr((VERSION, *parts)).encode("utf-8")).hexdigest()


def _bytes(value: Tensor) -> memoryview:
    return value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data


def _served(name: str, folder: Path | None, wanted: dict[str, tuple], encode: Callable[..., Tensor], title: str) -> dict[str, Tensor]:
    """An entry for each key: from the file if it has it, else encode(*wanted[key]). Then the file holds these entries and no others;
    where it ends early, by Ctrl-C or by a damaged picture, those that were ready."""
    file = None if folder is None else folder / f"{name}.safetensors"
    kept = {} if file is None else _read(file)
    found = {key: kept[key] for key in wanted if key in kept}
    missing = [key for key in wanted if key not in kept]
    try:
        for key in tqdm(missing, title, unit="", leave=False, disable=not missing):
            found[key] = encode(*wanted[key])
    finally:
        if file is not None and found.keys() != kept.keys():
            _write(file, found)
    return found


def _checksum(entries: dict[str, Tensor]) -> str:
    total = 0
    for key in sorted(entries):
        total = zlib.crc32(_bytes(entries[key]), zlib.crc32(key.encode(), total))
    return str(total)


def _read(file: Path) -> dict[str, Tensor]:
    """The entries of a file as memory maps, which take no memory until they are read; none of a file that is not whole."""
    if not file.exists():
        return {}
    atomic.check(file, foreign)
    try:
        entries = files.tensors(file)
        if files.metadata(file).get("checksum") == _checksum(entries):
            return entries
        why = "its bytes are not those that were written"
    except UserError as error:
        why = str(error).rstrip(".")
    warnings.warn(f"{file} is made anew: {why}", stacklevel=2)
    return {}


def foreign(file: Path) -> Path | None:
    """file, where it is no cache of ours, damaged or not; see atomic.Stranger."""
    if not file.is_file():
        return file
    with file.open("rb") as opened:
        return None if b'"checksum"' in opened.read(2**16) else file


def _write(file: Path, entries: dict[str, Tensor]) -> None:
    """Written beside its place, then renamed: who reads meanwhile, and what was mapped before, sees the old file whole."""
    try:
        with atomic.write(file, foreign) as new:
            save_file({key: value.contiguous() for key, value in entries.items()}, new, {"checksum": _checksum(entries)})
    except (SafetensorError, OSError) as error:
        size = sum(value.nbytes for value in entries.values()) / 1e6
        why = " ".join(str(error).split())
        raise UserError(f"{file}: {size:.1f} MB cannot be written ({why}); free some space, or name another folder.") from error
