"""Textual inversions as files: those of diffusers, and of AUTOMATIC1111's and InvokeAI's programs.

diffusers                {"<cat-toy>": (N, D) or (D)}
AUTOMATIC1111, InvokeAI  {"string_to_param": {"*": (N, D)}} in a pickle, {"emb_params": (N, D)};
                         the word is the name of the file
"""

from pathlib import Path

from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor

from minidiff.checkpoints import files
from minidiff.errors import UserError
from minidiff.methods.inversion import add_word, put_in
from minidiff.text import CLIPText, token_ids
from minidiff.training import atomic

NAMELESS = ("*", "emb_params")
VERSIONS = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x"}  # by their vectors' width


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
    """Give a word the vectors of a file, for good; returns the word, as prompts should have it.
    Default: the word that the file names."""
    return give(text, file, *_read(file), word)


def give(text: CLIPText, file: Path, name: str, vectors: Tensor, word: str | None = None) -> str:
    """Give a word vectors that a file has under a name.

    One vector goes to a word that is one token of CLIP's vocabulary, without its brackets. Several,
    and any other word, become new tokens.
    """
    vectors = _checked(file, name, vectors)
    if vectors.shape[1] != text.dim:
        kind = VERSIONS.get(vectors.shape[1])
        kind = f" It is for {kind}." if kind else ""
        what = f"vectors of width {vectors.shape[1]}; this text encoder takes {text.dim}"
        raise UserError(f"{file}: {what}.{kind}")
    bare = (word or name).removeprefix("<").removesuffix(">")
    if len(vectors) == 1 and len(token_ids(bare)) == 1:
        put_in(text, bare, vectors[0])
        return bare
    add_word(text, word or name, vectors)
    return word or name


def _read(file: Path) -> tuple[str, Tensor]:
    """The word and the vectors of a file."""
    tensors = files.tensors(file)
    if tensors.keys() >= {"clip_l", "clip_g"}:
        raise UserError(
            f"{file} is a textual inversion of Stable Diffusion XL; 1.x and 2.x are read."
        )
    if len(tensors) != 1:
        raise UserError(
            f"{file}: {len(tensors)} tensors, {', '.join(list(tensors)[:3])}; a textual inversion "
            "has one, with the name of its word."
        )
    ((name, vectors),) = tensors.items()
    name = file.stem if name in NAMELESS else name.strip()
    if not name.strip("<> "):
        raise UserError(f"{file} names no word; name one for it, as in {file}:sks.")
    return name, vectors


def _checked(file: Path, name: str, vectors: Tensor) -> Float[Tensor, "N D"]:
    """The tensor, if it is vectors of finite numbers, or one vector."""
    vectors = vectors[None] if vectors.ndim == 1 else vectors
    if vectors.ndim != 2 or not len(vectors) or not vectors.is_floating_point():
        kind = f"{str(vectors.dtype).removeprefix('torch.')} of shape {tuple(vectors.shape)}"
        raise UserError(f'{file}: "{name}" is {kind}, and no vectors.')
    if not vectors.isfinite().all():
        raise UserError(f"{file}: its vectors hold numbers that are not finite.")
    return vectors
