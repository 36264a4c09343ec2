"""Textual inversions as files: those of diffusers, and of AUTOMATIC1111's and InvokeAI's programs.

diffusers                {"<cat-toy>": (N, D) or (D)}
AUTOMATIC1111, InvokeAI  {"string_to_param": {"*": (N, D)}} in a pickle, {"emb_params": (N, D)};
                         the word is the name of the file
all, for SDXL            {"clip_l": (N, 768), "clip_g": (N, 1280)}; likewise, but our files have the
                         word in their metadata
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor, nn

from minidiff.checkpoints import files
from minidiff.checkpoints.kinds import VERSIONS
from minidiff.errors import UserError
from minidiff.methods.inversion import add_word, encoders, put_in
from minidiff.text import token_ids
from minidiff.training import atomic

NAMELESS = ("*", "emb_params")
PAIR = ("clip_l", "clip_g")  # SDXL's text encoders


def save(word: str, vector: Float[Tensor, "D"], file: Path, widths: Sequence[int] = ()) -> Path:
    """Write {"<word>": (1, D)}, as diffusers' load_textual_inversion reads it; where the vector has
    the widths of two text encoders, SDXL's two. A stranger's file of that name is not written
    over."""
    rows = vector.detach().float().cpu()[None]
    state = {f"<{word}>": rows}
    if len(widths) == len(PAIR):
        state = dict(zip(PAIR, rows.split(list(widths), dim=1), strict=True))
    with atomic.write(file, atomic.unsigned) as new:
        contiguous = {name: each.contiguous() for name, each in state.items()}
        save_file(contiguous, new, {"software": atomic.SIGNATURE, "word": f"<{word}>"})
    return file


def load(text: nn.Module, file: Path, word: str | None = None) -> str:
    """Give a word the vectors of a file, for good; returns the word, as prompts should have it.
    Default: the word that the file names."""
    return give(text, file, *_read(file), word)


def give(
    text: nn.Module, file: Path, name: str, tensors: dict[str, Tensor], word: str | None = None
) -> str:
    """Give a word vectors that a file has under a name, for each text encoder those of a tensor.

    One vector goes to a word that is one token of CLIP's vocabulary, without its brackets. Several,
    and any other word, become new tokens.
    """
    is_pair = tensors.keys() == set(PAIR)
    each = [_checked(file, name, tensors[key]) for key in (PAIR if is_pair else tensors)]
    widths, expected = [len(v[0]) for v in each], [one.dim for one in encoders(text)]
    if widths != expected:
        kind = VERSIONS[2048] if is_pair else VERSIONS.get(sum(widths))
        kind = f" It is for {kind}." if kind else ""
        takes = " and ".join(map(str, expected)) or "none"
        what = f"vectors of width {' and '.join(map(str, widths))}; this text encoder takes {takes}"
        raise UserError(f"{file}: {what}.{kind}")
    if len({len(v) for v in each}) > 1:
        raise UserError(f"{file}: {' and '.join(str(len(v)) for v in each)} vectors of one word.")
    vectors = torch.cat(each, dim=1)
    bare = (word or name).removeprefix("<").removesuffix(">")
    if len(vectors) == 1 and len(token_ids(bare)) == 1:
        put_in(text, bare, vectors[0])
        return bare
    add_word(text, word or name, vectors)
    return word or name


def _read(file: Path) -> tuple[str, dict[str, Tensor]]:
    """The word and the tensors of a file."""
    tensors = files.tensors(file)
    if len(tensors) != 1 and tensors.keys() != set(PAIR):
        raise UserError(
            f"{file}: {len(tensors)} tensors, {', '.join(list(tensors)[:3])}; a textual inversion "
            "has one, with the name of its word; of Stable Diffusion XL clip_l and clip_g."
        )
    name = next(iter(tensors)).strip()
    if name in NAMELESS + PAIR:
        name = files.metadata(file).get("word", file.stem).strip()
    if not name.strip("<> "):
        raise UserError(f"{file} names no word; name one for it, as in {file}:sks.")
    return name, tensors


def _checked(file: Path, name: str, vectors: Tensor) -> Float[Tensor, "N D"]:
    """The tensor, if it is vectors of finite numbers, or one vector."""
    vectors = vectors[None] if vectors.ndim == 1 else vectors
    if vectors.ndim != 2 or not len(vectors) or not vectors.is_floating_point():
        kind = f"{str(vectors.dtype).removeprefix('torch.')} of shape {tuple(vectors.shape)}"
        raise UserError(f'{file}: "{name}" is {kind}, and no vectors.')
    if not vectors.isfinite().all():
        raise UserError(f"{file}: its vectors hold numbers that are not finite.")
    return vectors
