"""Latents and text embeddings, computed once and stored on disk for training.

A cache is one safetensors file: latents.safetensors or contexts.safetensors. The name of an entry
is its key, the SHA-256 of all it was computed from: the bytes of the image, its size and whether it
is mirrored, or the caption; and the network's config and every weight. Images are encoded in
batches that are always full, so an entry follows from its key, to the bit, whatever else is there.
"""

import hashlib
import math
import warnings
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float, UInt8
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from minidiff.checkpoints import files
from minidiff.condition import Condition, apply
from minidiff.data.captions import Fault
from minidiff.data.folder import ahead, load_image, to_model
from minidiff.errors import UserError
from minidiff.methods.lora import merged_state
from minidiff.training import atomic

VERSION = "minidiff cache 2"  # change it when entries are computed in another way
READING = "JPEG draft, batches"  # change it when latents alone are
PIXELS_CPU, PIXELS_GPU = 2**16, 2**20  # of a batch: 64 of 32x32, 1 of 512x512; 4 of 512x512


class Example(NamedTuple):
    latents: Float[Tensor, "Z h w"]
    caption: str
    others: tuple[str, ...] = ()  # captions that are as good: any of them all is taken
    numbers: tuple[float, ...] = ()  # of a Condition: its size and cut, where the network reads it


@torch.no_grad()
def encode_images(
    vae: nn.Module,
    paths: list[Path],
    sizes: list[tuple[int, int]],
    folder: Path | None,
    flip: bool = False,
) -> list[Float[Tensor, "Z h w"]]:
    """Encode images, scaled to cover their sizes (height, width) and cut; on the CPU.

    folder: where latents.safetensors is stored; None stores nothing.
    flip: the latents of all mirror images follow those of all images, as captions * 2 do.
    """
    of_vae = fingerprint(vae)
    keys, pictures = [], {}
    contents = list(ahead(_digest, paths))
    for mirrored in (False, True) if flip else (False,):
        for path, size, content in zip(paths, sizes, contents, strict=True):
            keys.append(_key(of_vae, content, *size, mirrored, READING))
            pictures[keys[-1]] = Picture(path, size, mirrored)
    encode = partial(_encode_images, vae, pictures)
    entries = _entries("latents", folder, keys, encode, "encoding pictures")
    return [entries[key] for key in keys]


class Picture(NamedTuple):
    path: Path
    size: tuple[int, int]
    mirrored: bool


def _digest(path: Path) -> str:
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _encode_images(
    vae: nn.Module, pictures: dict[str, Picture], keys: list[str]
) -> Iterator[tuple[str, Float[Tensor, "Z h w"]]]:
    device = next(vae.parameters(), torch.empty(0)).device
    pixels = PIXELS_CPU if device.type == "cpu" else PIXELS_GPU
    for batch, images in _batches(pictures, keys, pixels):
        latents = vae.encode(to_model(images.to(device)))[: len(batch)].cpu()
        for key, each in zip(batch, latents, strict=True):
            if not each.isfinite().all():
                problem = "its latents are not finite; load the VAE in float32 or bfloat16"
                raise UserError(f"{pictures[key].path}: {problem}.")
            yield key, each.clone()


def _batches(
    pictures: dict[str, Picture], keys: list[str], pixels: int
) -> Iterator[tuple[list[str], UInt8[Tensor, "B 3 H W"]]]:
    """Yield keys and their images, of one size; the last batch of a size is filled up with black,
    for a network may compute other last bits in a smaller one.

    A file is read once for the image and its mirror, ahead in threads. At a damaged file those read
    before it come first.
    """
    wanted: dict[tuple[Path, tuple[int, int]], list[str]] = {}
    for key in keys:
        wanted.setdefault(pictures[key][:2], []).append(key)
    full = {size: max(1, pixels // math.prod(size)) for _, size in wanted}
    waiting, damaged = {size: [] for size in full}, None
    try:
        images = ahead(lambda file: load_image(*file), wanted)
        for (file, size), image in zip(wanted, images, strict=True):
            alike = waiting[size]
            for key in wanted[file, size]:
                alike.append((key, image.flip(-1) if pictures[key].mirrored else image))
            while len(alike) >= full[size]:
                yield _stacked(alike[: full[size]], full[size])
                del alike[: full[size]]
    except Fault as fault:
        damaged = fault
    for size, alike in waiting.items():
        if alike:
            yield _stacked(alike, full[size])
    if damaged:
        raise damaged


def _stacked(
    alike: list[tuple[str, UInt8[Tensor, "3 H W"]]], full: int
) -> tuple[list[str], UInt8[Tensor, "B 3 H W"]]:
    keys, images = zip(*alike, strict=True)
    black = [torch.zeros_like(images[0])] * (full - len(images))
    return list(keys), torch.stack([*images, *black])


@torch.no_grad()
def encode_captions(
    text: nn.Module, captions: list[str], folder: Path | None
) -> dict[str, Float[Tensor, "L D"] | Condition]:
    """Encode each caption, and "" for dropped captions; on the CPU.

    folder: where contexts.safetensors is stored; None stores nothing.
    """
    of_text = fingerprint(text)
    keys = {caption: _key(of_text, caption) for caption in dict.fromkeys(["", *captions])}
    of_key = {key: caption for caption, key in keys.items()}
    encode = partial(_encode_captions, text, of_key)
    entries = _entries("contexts", folder, list(of_key), encode, "encoding captions")
    return {caption: _context(entries, key) for caption, key in keys.items()}


def _encode_captions(
    text: nn.Module, captions: dict[str, str], keys: list[str]
) -> Iterator[tuple[str, Float[Tensor, "L D"]]]:
    """The context of a caption under its key; before it, what else a Condition has."""
    for key in keys:
        context = apply(lambda each: each[0].cpu(), text.encode([captions[key]]))
        if isinstance(context, Condition):
            yield f"{key}.pooled", context.pooled
            yield f"{key}.numbers", context.numbers
            context = context.context
        yield key, context


def _context(entries: dict[str, Tensor], key: str) -> Float[Tensor, "L D"] | Condition:
    if f"{key}.pooled" not in entries:
        return entries[key]
    return Condition(entries[key], entries[f"{key}.pooled"], entries[f"{key}.numbers"])


def fingerprint(network: nn.Module) -> str:
    """A hash of all that a network computes with: class, config, and weights with LoRAs merged."""
    config = type(network).__name__, sorted(asdict(network.config).items())
    digest = hashlib.sha256(repr(config).encode())
    for name, value in sorted(merged_state(network).items()):
        digest.update(repr((name, value.dtype, tuple(value.shape))).encode())
        digest.update(_bytes(value))
    return digest.hexdigest()


def _key(*parts: object) -> str:
    return hashlib.sha256(repr((VERSION, *parts)).encode("utf-8")).hexdigest()


def _bytes(value: Tensor) -> memoryview:
    return value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data


def _entries(
    name: str,
    folder: Path | None,
    keys: list[str],
    encode: Callable[[list[str]], Iterator[tuple[str, Tensor]]],
    title: str,
) -> dict[str, Tensor]:
    """Return an entry for each key: from the file, or else from encode(those that it lacks).

    Afterwards the file holds these entries alone; if computing ends early, those that were ready.
    """
    if folder:
        atomic.clean(folder)
    file = folder and folder / f"{name}.safetensors"
    stored = _read(file) if file else {}
    wanted = dict.fromkeys(keys)
    entries = {name: value for name, value in stored.items() if name.partition(".")[0] in wanted}
    missing = [key for key in wanted if key not in stored]
    try:
        entries.update(tqdm(encode(missing), title, len(missing), leave=False, disable=not missing))
    finally:
        if file and entries.keys() != stored.keys():
            _write(file, entries)
    return entries


def _checksum(entries: dict[str, Tensor]) -> str:
    total = 0
    for key in sorted(entries):
        total = zlib.crc32(_bytes(entries[key]), zlib.crc32(key.encode(), total))
    return str(total)


def _read(file: Path) -> dict[str, Tensor]:
    """The entries of a file as memory maps; none, with a warning, if the file is damaged."""
    if not file.exists():
        return {}
    atomic.check(file, foreign)
    try:
        entries = files.tensors(file)
        if files.metadata(file).get("checksum") == _checksum(entries):
            return entries
        reason = "its bytes are not those that were written"
    except UserError as error:
        reason = str(error).rstrip(".")
    warnings.warn(f"{file} is made anew: {reason}", stacklevel=2)
    return {}


def foreign(file: Path) -> Path | None:
    """file, where it is no cache of ours, damaged or not; see atomic.Stranger."""
    if not file.is_file():
        return file
    with file.open("rb") as opened:
        return None if b'"checksum"' in opened.read(2**16) else file


def _write(file: Path, entries: dict[str, Tensor]) -> None:
    """Write whole or not at all: other readers and open memory maps keep the old file."""
    try:
        with atomic.write(file, foreign) as new:
            contiguous = {key: value.contiguous() for key, value in entries.items()}
            save_file(contiguous, new, {"checksum": _checksum(entries)})
    except (SafetensorError, OSError) as error:
        size = sum(value.nbytes for value in entries.values())
        why = getattr(error, "strerror", None) or " ".join(str(error).split())
        remedy = "free some space, or name another folder"
        message = f"{file}: {size / 1e6:.1f} MB cannot be written ({why}); {remedy}."
        raise UserError(message) from error
