"""Latents and text embeddings, computed once and stored on disk for training.

A cache is one safetensors file: latents.safetensors or contexts.safetensors. The name of an entry
is its key, the SHA-256 of all it was computed from: the bytes of the image, its size and whether it
is mirrored, or the caption; and the network's config and every weight. Entries are computed one at
a time, so an entry follows from its key, to the bit.
"""

import hashlib
import warnings
import zlib
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from minidiff.checkpoints import files
from minidiff.data.folder import load_image, to_model
from minidiff.errors import UserError
from minidiff.methods.lora import merged_state
from minidiff.training import atomic

VERSION = "minidiff cache 2"  # change it when entries are computed in another way


class Example(NamedTuple):
    latents: Float[Tensor, "Z h w"]
    caption: str
    others: tuple[str, ...] = ()  # captions that are as good: any of them all is taken


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
    contents = [hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in paths]
    keys, arguments = [], {}
    for mirrored in (False, True) if flip else (False,):
        for path, size, content in zip(paths, sizes, contents, strict=True):
            keys.append(_key(of_vae, content, *size, mirrored))
            arguments[keys[-1]] = vae, path, size, mirrored
    entries = _entries("latents", folder, arguments, _encode_image, "encoding pictures")
    return [entries[key] for key in keys]


def _encode_image(
    vae: nn.Module, path: Path, size: tuple[int, int], mirrored: bool
) -> Float[Tensor, "Z h w"]:
    device = next(vae.parameters(), torch.empty(0)).device
    image = to_model(load_image(path, size))[None].to(device)
    latents = vae.encode(image.flip(-1) if mirrored else image)[0].cpu()
    if not latents.isfinite().all():
        raise UserError(f"{path}: its latents are not finite; load the VAE in float32 or bfloat16.")
    return latents


@torch.no_grad()
def encode_captions(
    text: nn.Module, captions: list[str], folder: Path | None
) -> dict[str, Float[Tensor, "L D"]]:
    """Encode each caption, and "" for dropped captions; on the CPU.

    folder: where contexts.safetensors is stored; None stores nothing.
    """
    of_text = fingerprint(text)
    keys = {caption: _key(of_text, caption) for caption in dict.fromkeys(["", *captions])}
    arguments = {key: (text, caption) for caption, key in keys.items()}
    entries = _entries("contexts", folder, arguments, _encode_caption, "encoding captions")
    return {caption: entries[key] for caption, key in keys.items()}


def _encode_caption(text: nn.Module, caption: str) -> Float[Tensor, "L D"]:
    return text.encode([caption])[0].cpu()


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
    arguments: dict[str, tuple],
    encode: Callable[..., Tensor],
    title: str,
) -> dict[str, Tensor]:
    """Return an entry for each key: from the file, or else encode(*arguments[key]).

    Afterwards the file holds these entries alone; if computing ends early, those that were ready.
    """
    if folder:
        atomic.clean(folder)
    file = folder and folder / f"{name}.safetensors"
    stored = _read(file) if file else {}
    entries = {key: stored[key] for key in arguments if key in stored}
    missing = [key for key in arguments if key not in stored]
    try:
        for key in tqdm(missing, title, unit="", leave=False, disable=not missing):
            entries[key] = encode(*arguments[key])
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
