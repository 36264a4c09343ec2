"""Textual inversion: the vector of one word as something that is trained, saved and loaded, all in this file; the training is finetune.py's.

A vector v of the text tower's vocabulary is sought that makes captions with the word fit the pictures, [1] eq. 2:

    v* = argmin_v  E || eps - eps_theta(x_t, t, c_v(caption)) ||^2         everything but v is frozen

So the file is 3 KB, and the model can draw nothing that it could not draw before: only what no words of its own would have called. Trained beside
the U-Net or a LoRA of it, v finds a place in the tower's language for what the U-Net learns to draw, and the tower stays as it is (pivotal
tuning [2]).

[1] Gal et al. An Image is Worth One Word: Personalizing Text-to-Image Generation using Textual Inversion. 2022. arXiv:2208.01618
[2] Roich et al. Pivotal Tuning for Latent-based Editing of Real Images. 2021. arXiv:2106.05744
"""
import re
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from minidiff import atomic
from minidiff.clip import CLIPText, token_ids
from minidiff.errors import UserError
from minidiff.weights import files


def token_of(word: str) -> int:
    """The number of a word that is one token of the vocabulary."""
    ids = token_ids(word.strip().removeprefix("<").removesuffix(">"))
    if len(ids) != 1:
        raise UserError(f'"{word}" is {len(ids)} tokens of the vocabulary; a vector can be learnt for one. Take a word that is one, as "sks".')
    return ids[0]


def word_of(words: list[str], prompt: str) -> str:
    """The word of a prompt whose vector is to be learnt: of those that may call the subject the one that is rarest; it must be one token."""
    said = words or re.findall(r"\w+", prompt)
    single = [word for word in said if len(token_ids(word)) == 1]
    if not single:
        token_of(said[0])
    return max(single, key=token_of)


class Word(nn.Module):
    """The vector of one token, trained in the place of the tower's own for as long as the hook that hang() gives is there."""

    def __init__(self, text: CLIPText, word: str, like: str | None = None, haste: float = 1.0):
        """like: a word whose vector to begin from, the coarse class of the subject ([1] section 4); None begins from the token's own.
        haste: learn this many times as fast as the learning rate says. Adam's steps do not depend on how large gradients are, so they are
        of the change divided by haste."""
        super().__init__()
        self.word, self.token, self.haste = word, token_of(word), haste
        start = text.token_embedding.weight[token_of(like) if like else self.token]
        self.register_buffer("start", start.detach().float().clone(), persistent=False)
        self.change = nn.Parameter(torch.zeros_like(self.start))

    @property
    def vector(self) -> Float[Tensor, "D"]:
        return self.start + self.haste * self.change

    def hang(self, text: CLIPText) -> RemovableHandle:
        """Have the tower read this vector where it meets the token."""

        def replaced(_: nn.Module, inputs: tuple[Tensor, ...], output: Float[Tensor, "B L D"]) -> Float[Tensor, "B L D"]:
            return torch.where((inputs[0] == self.token)[..., None], self.vector.to(output.dtype), output)

        return text.token_embedding.register_forward_hook(replaced)


@torch.no_grad()
def put_in(text: CLIPText, word: str, vector: Float[Tensor, "D"]) -> None:
    """Give the word this vector for good."""
    text.token_embedding.weight[token_of(word)] = vector.to(text.token_embedding.weight)


def save(word: str, vector: Float[Tensor, "D"], file: Path) -> Path:
    """{"<word>": (1, D)}, as diffusers' load_textual_inversion reads it; another file of that name is not written over."""
    with atomic.write(file, atomic.unsigned) as new:
        save_file({f"<{word}>": vector.detach().float().cpu()[None].contiguous()}, new, {"software": atomic.SIGNATURE})
    return file


def load(text: CLIPText, file: Path, word: str | None = None) -> str:
    """Give a word the vector of a file, for good; returns the word. It is the one that the file names, unless another is given: in other tools
    a word can be new, here it is one token of CLIP's vocabulary."""
    tensors = files.tensors(file)
    if len(tensors) != 1:
        raise UserError(f"{file}: {len(tensors)} tensors, {', '.join(list(tensors)[:3])}; a textual inversion has one, named as its word.")
    (name, vector), = tensors.items()
    vector = vector[None] if vector.ndim == 1 else vector
    if tuple(vector.shape) != (1, text.dim):
        fit = f"1 vector of width {text.dim}"
        raise UserError(f'{file}: "{name}" has the shape {tuple(vector.shape)}; this text tower takes {fit}.')
    word = word or name.strip().removeprefix("<").removesuffix(">")
    if len(token_ids(word)) != 1:
        raise UserError(f'{file}: its word "{name}" is not one token of the vocabulary; say which word is to mean it, as in {file}:sks.')
    put_in(text, word, vector[0])
    return word
