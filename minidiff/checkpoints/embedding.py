"""Textual inversions as files, with the names of diffusers."""

from pathlib import Path

from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor

from minidiff.checkpoints import files
from minidiff.errors import UserError
from minidiff.methods.inversion import put_in
from minidiff.text import CLIPText, token_ids
from minidiff.training import atomic


def save(word: str, vector: Float[Tensor, "D"], file: Path) -> Path:
    """Write {"<word>": (1, D)}, as diffusers' load_textual_inversion reads it. A stranger's file of
    that name is not written over."""
    with atomic.write(file, atomic.unsigned) as new:
        save_file(
            {f"<{word}>": vector.detach().float().cpu()[None].contiguous()},
            new,
            {"software": atomic.SIGNATURE},
        )
    return file


def load(text: CLIPText, file: Path, word: str | None = None) -> str:
    """Give a word the vector of a file, for good; returns the word. Default: the word that the file
    names. In other tools a word can be new; here it is one token of CLIP's vocabulary."""
    tensors = files.tensors(file)
    if len(tensors) != 1:
        raise UserError(
            f"{file}: {len(tensors)} tensors, {', '.join(list(tensors)[:3])}; a textual inversion "
            "has one, with the name of its word."
        )
    ((name, vector),) = tensors.items()
    vector = vector[None] if vector.ndim == 1 else vector
    if tuple(vector.shape) != (1, text.dim):
        raise UserError(
            f'{file}: "{name}" has the shape {tuple(vector.shape)}; this text encoder takes 1 '
            f"vector of width {text.dim}."
        )
    word = word or name.strip().removeprefix("<").removesuffix(">")
    if len(token_ids(word)) != 1:
        raise UserError(
            f'{file}: its word "{name}" is not one token of the vocabulary; name another word for '
            f"it, as in {file}:sks."
        )
    put_in(text, word, vector[0])
    return word
