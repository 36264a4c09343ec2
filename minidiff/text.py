"""CLIP's text encoder: prompts to sequences of vectors, and one vector of the whole prompt.

The tokenizer and its vocabulary come from open_clip.

[1] Radford et al. Learning Transferable Visual Models From Natural Language Supervision. 2021.
    arXiv:2103.00020
[2] Cherti et al. Reproducible Scaling Laws for Contrastive Language-Image Learning. 2022.
    arXiv:2212.07143
[3] Rombach et al. High-Resolution Image Synthesis with Latent Diffusion Models. arXiv:2112.10752
"""

import importlib.util
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import chain

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from minidiff.condition import repeat
from minidiff.errors import UserError
from minidiff.layers import Attention, run
from minidiff.training.device import to_device

START, END = 49406, 49407  # the last two of CLIP's 49,408 tokens


@lru_cache(maxsize=1)
def tokenizer():
    """open_clip's, from its file alone: importing the whole package takes seconds."""
    folder = importlib.util.find_spec("open_clip").submodule_search_locations[0]
    spec = importlib.util.spec_from_file_location("open_clip_tokenizer", f"{folder}/tokenizer.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.SimpleTokenizer()


@lru_cache(maxsize=100_000)
def token_ids(prompt: str) -> tuple[int, ...]:
    """The byte-pair ids of one prompt, without start and end; <|endoftext|> in it is one token."""
    prompt = re.sub(r"<\|(start|end)oftext\|>", r"<\1_of_text>", prompt, flags=re.I)  # open_clip's
    return tuple(tokenizer().encode(prompt))


def quick_gelu(x: Tensor) -> Tensor:
    """OpenAI's approximation of gelu; its weights need it."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": F.gelu}


class Block(nn.Module):
    """Causal self-attention and an MLP, each with a LayerNorm before and a skip around."""

    def __init__(self, width: int, heads: int, activation: str):
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), Attention(width, heads, bias=True)
        self.norm2, self.up = nn.LayerNorm(width), nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)
        self.activation = ACTIVATIONS[activation]

    def forward(self, x: Float[Tensor, "B L D"]) -> Float[Tensor, "B L D"]:
        x = x + self.attention(self.norm1(x), causal=True)
        return x + self.down(self.activation(self.up(self.norm2(x))))


@dataclass(frozen=True)
class TextConfig:
    """All that defines CLIP's text encoder."""

    width: int
    layers: int
    heads: int
    activation: str = "quick_gelu"
    pad: int = END  # SD 1.x pads with the end token, SD 2.x and open_clip with 0
    context_length: int = 77
    vocabulary: int = 49408
    words_only: bool = False  # set the vectors of start, end and padding to zero
    penultimate: bool = False  # the context is what the last block reads, without final LayerNorm
    projection: int | None = None  # width of the linear map of the pooled vector; None: no map
    # words beyond CLIP's vocabulary, in lower case, and the tokens of each
    added: Mapping[str, Sequence[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        added = {word: tuple(ids) for word, ids in self.added.items()}  # JSON has lists
        object.__setattr__(self, "added", added)
        for word, ids in added.items():
            if not word or not ids or not all(0 <= token < self.vocabulary for token in ids):
                limit = f"the vocabulary has {self.vocabulary}"
                raise UserError(f'the added word "{word}" has the tokens {list(ids)}; {limit}.')
        if self.activation not in ACTIVATIONS:
            names = ", ".join(ACTIVATIONS)
            raise UserError(f'no activation "{self.activation}"; there is {names}.')


class CLIPText(nn.Module):
    """[1] section 2.4: each vector depends on the tokens up to it. No padding mask, as in [3]."""

    Config = TextConfig

    def __init__(self, config: TextConfig):
        super().__init__()
        self.config, self.dim = config, config.width
        self.pad, self.context_length = config.pad, config.context_length
        self.checkpointing = False  # True: compute blocks again in the backward pass, keep less
        width, vocabulary = config.width, config.vocabulary
        self.token_embedding = nn.Embedding(vocabulary, width)
        self.position_embedding = nn.Embedding(config.context_length, width)
        self.blocks = nn.ModuleList(
            Block(width, config.heads, config.activation) for _ in range(config.layers)
        )
        self.norm_out, projection = nn.LayerNorm(width), config.projection
        self.projection = nn.Linear(width, projection, bias=False) if projection else None
        self._init_weights()

    def _init_weights(self) -> None:
        """As [1], but the blocks' output weights start at zero and token embeddings have unit std:
        an encoder trained from scratch starts as a bag of words, and learns their order later."""
        nn.init.normal_(self.token_embedding.weight)
        nn.init.normal_(self.position_embedding.weight, std=0.3)
        for block in self.blocks:
            for linear in (block.attention.q, block.attention.k, block.attention.v, block.up):
                nn.init.normal_(linear.weight, std=self.dim**-0.5)
            for linear in (block.attention.out, block.down):
                nn.init.zeros_(linear.weight)

    def ids(self, prompt: str) -> tuple[int, ...]:
        """The tokens of a prompt, without start and end; an added word has its own."""
        added = self.config.added
        if not added:
            return token_ids(prompt)
        words = sorted(added, key=len, reverse=True)
        pieces = re.split(f"({'|'.join(map(_pattern, words))})", prompt, flags=re.IGNORECASE)
        return tuple(chain.from_iterable(added.get(p.lower()) or token_ids(p) for p in pieces))

    def tokens(self, prompts: list[str]) -> Int[Tensor, "B L"]:
        """start, words, end, padding. Words that do not fit are cut, and a warning names them."""
        rows, room = [], self.context_length - 2
        for prompt in prompts:
            ids = self.ids(prompt)
            if len(ids) > room:
                known = [token for token in ids[room:] if token <= END]
                rest = f'the model does not see: "{tokenizer().decode(known).strip()}"'
                warnings.warn(f"prompt cut after {room} tokens; {rest}", stacklevel=2)
            row = [START, *ids[:room], END]
            rows.append(row + [self.pad] * (self.context_length - len(row)))
        return to_device(torch.tensor(rows, dtype=torch.long), self.token_embedding.weight.device)

    def forward(self, tokens: Int[Tensor, "B L"]) -> Float[Tensor, "B L D"]:
        return self._vectors(tokens)[0]

    def both(
        self, tokens: Int[Tensor, "B L"]
    ) -> tuple[Float[Tensor, "B L D"], Float[Tensor, "B P"]]:
        """The context, and one vector of the whole prompt: that of the first end token, the only
        one that has seen all words."""
        context, h = self._vectors(tokens)
        pooled = h[torch.arange(len(h), device=h.device), (tokens == END).int().argmax(dim=1)]
        return context, pooled if self.projection is None else self.projection(pooled)

    def _vectors(self, tokens: Int[Tensor, "B L"]) -> tuple[Tensor, Tensor]:
        """The context, and the last block's vectors after the final LayerNorm."""
        h = self.token_embedding(tokens) + self.position_embedding.weight[: tokens.shape[1]]
        before = h
        for block in self.blocks:
            before, h = h, run(block, h, recompute=self.checkpointing)
        h = self.norm_out(h)
        context = before if self.config.penultimate else h
        if self.config.words_only:
            words = (tokens != START) & (tokens != END) & (tokens != self.pad)
            context = context * words[..., None]
        return context, h

    def encode(self, prompts: list[str]) -> Float[Tensor, "B L D"]:
        """One sequence of vectors for each prompt."""
        return self(self.tokens(prompts))

    def null(self, batch: int) -> Float[Tensor, "B L D"]:
        """The empty prompt: what guidance steers away from."""
        return repeat(self.encode([""]), batch)


def _pattern(word: str) -> str:
    """A regular expression of a word that is not a part of another."""
    start, end = (r"\b" if letter.isalnum() else "" for letter in (word[0], word[-1]))
    return start + re.escape(word) + end


def clip_vit_l14() -> CLIPText:
    """The text encoder of OpenAI's ViT-L/14, used by SD 1.x: 123.06 M parameters."""
    return CLIPText(TextConfig(width=768, layers=12, heads=12, activation="quick_gelu", pad=END))


def openclip_vit_h14() -> CLIPText:
    """That of OpenCLIP's ViT-H/14 ([2]), used by SD 2.x: 23 of 24 blocks, 340.39 M parameters."""
    return CLIPText(TextConfig(width=1024, layers=23, heads=16, activation="gelu", pad=0))


SDXL_L = TextConfig(width=768, layers=12, heads=12, penultimate=True)
BIGG14 = TextConfig(1280, 32, heads=20, activation="gelu", pad=0, penultimate=True, projection=1280)


def clip_bigg14() -> CLIPText:
    """That of OpenCLIP's ViT-bigG/14 ([2]): 694.66 M parameters."""
    return CLIPText(BIGG14)
