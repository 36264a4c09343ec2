"""Textual inversion: the vector of one word, to be trained.

A vector v of the text encoder's vocabulary is trained so that captions with the word fit the
images, [1] eq. 2:

    v* = argmin_v  E || eps - eps_theta(x_t, t, c_v(caption)) ||^2         all but v is frozen

So the file is 3 KB, and the model draws only what it could draw before and had no word for. Of two
text encoders, as SDXL has, v is both vectors, one after the other. Trained beside the U-Net or a
LoRA, v names what the U-Net learns, while the text encoder stays as it is (pivotal tuning [2]).

[1] Gal et al. An Image is Worth One Word: Personalizing Text-to-Image Generation using Textual
    Inversion. 2022. arXiv:2208.01618
[2] Roich et al. Pivotal Tuning for Latent-based Editing of Real Images. 2021. arXiv:2106.05744
"""

import re
from dataclasses import replace
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from minidiff.errors import UserError
from minidiff.text import CLIPText, token_ids

EVERYDAY = 40_000  # CLIP's tokens are sorted by frequency: those below have a meaning to undo


def encoders(text: nn.Module) -> list[CLIPText]:
    """Those of CLIP in a model's text encoder: itself, SDXL's two, or none."""
    return [each for each in text.modules() if isinstance(each, CLIPText)]


def halves(text: nn.Module, vectors: Float[Tensor, "*N D"]) -> list[tuple[CLIPText, Tensor]]:
    """Each encoder with its part of the vectors; of one encoder all of them."""
    each = encoders(text)
    return list(zip(each, vectors.split([one.dim for one in each], dim=-1), strict=True))


def token_of(word: str) -> int:
    """The number of a word that is one token of the vocabulary."""
    ids = token_ids(word.strip().removeprefix("<").removesuffix(">"))
    if len(ids) != 1:
        raise UserError(
            f'"{word}" is {len(ids)} tokens of the vocabulary; take a word that is one, as "sks".'
        )
    return ids[0]


def check_rare(word: str) -> None:
    """Raise for a word that is not one token, or that other prompts need."""
    if token_of(word) < EVERYDAY:
        raise UserError(
            f'the word "{word}" is an everyday one, and training its vector would change what it '
            'means in every prompt; use a rare token for the subject, as "sks".'
        )


def word_of(words: list[str], prompt: str) -> str:
    """The rarest of the words that may name the subject (or of the whole prompt); one token."""
    candidates = words or re.findall(r"\w+", prompt)
    single = [word for word in candidates if len(token_ids(word)) == 1]
    if not single:  # says what is wrong with the first
        token_of(candidates[0] if candidates else prompt)
    return max(single, key=token_of)


class Word(nn.Module):
    """The vector of one token. While attached, the text encoder reads it in place of its own."""

    def __init__(
        self, text: nn.Module, word: str, like: str | None = None, lr_multiplier: float = 1.0
    ):
        """like: start from the vector of this word, the subject's class ([1] section 4). Default:
        the token's own. lr_multiplier: the vector learns at that many times the learning rate; we
        train change / lr_multiplier, as Adam's step does not depend on the gradient's scale."""
        super().__init__()
        self.word, self.token, self.lr_multiplier = word, token_of(word), lr_multiplier
        self.widths = [each.dim for each in encoders(text)]
        token = token_of(like) if like else self.token
        start = torch.cat([each.token_embedding.weight[token] for each in encoders(text)])
        self.register_buffer("start", start.detach().float().clone(), persistent=False)
        self.change = nn.Parameter(torch.zeros_like(self.start))

    @property
    def vector(self) -> Float[Tensor, "D"]:
        return self.start + self.lr_multiplier * self.change  # eq: textual-2

    def attach(self, text: nn.Module) -> list[RemovableHandle]:
        """Have the text encoder read this vector for the token, until each handle's remove()."""
        tables = enumerate(each.token_embedding for each in encoders(text))
        return [each.register_forward_hook(partial(self._replaced, k)) for k, each in tables]

    def _replaced(
        self, k: int, _: nn.Module, inputs: tuple[Tensor, ...], output: Float[Tensor, "B L E"]
    ) -> Float[Tensor, "B L E"]:
        """The forward hook of the k-th encoder's token embedding."""
        here, vector = (inputs[0] == self.token)[..., None], self.vector.split(self.widths)[k]
        return torch.where(here, vector.to(output.dtype), output)


@torch.no_grad()
def put_in(text: nn.Module, word: str, vector: Float[Tensor, "D"]) -> None:
    """Give the word this vector for good."""
    for each, part in halves(text, vector):
        each.token_embedding.weight[token_of(word)] = part.to(each.token_embedding.weight)


@torch.no_grad()
def add_word(text: nn.Module, word: str, vectors: Float[Tensor, "N D"]) -> None:
    """Have the text encoder read a word as N new tokens with these vectors, for good."""
    for each, part in halves(text, vectors):
        old = each.token_embedding.weight
        table = torch.cat([old, part.to(old)])
        each.token_embedding = nn.Embedding.from_pretrained(table, freeze=not old.requires_grad)
        added = {**each.config.added, word.lower(): range(len(old), len(table))}
        each.config = replace(each.config, vocabulary=len(table), added=added)
    names = [name for name, each in text.named_children() if isinstance(each, CLIPText)]
    text.config = replace(text.config, **{name: getattr(text, name).config for name in names})
