"""Where each word of a prompt looks: cross-attention weights, recorded while an image is drawn.

    maps = attention_maps(model, "a red circle", SampleConfig(seed=7))
    maps.words                       # ("<begin>", "a", "red", "circle", "<end>", "<padding>")
    maps.mean()                      # (words, H, W), over all levels and steps
    maps.mean(size=(4, 4), t=500)    # of one level, at one step

[1] Tang et al. What the DAAM: Interpreting Stable Diffusion Using Cross Attention. 2022.
    arXiv:2210.04885
[2] Hertz et al. Prompt-to-Prompt Image Editing with Cross Attention Control. 2022. arXiv:2208.01626
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from minidiff.errors import UserError
from minidiff.latent_diffusion import LatentDiffusion
from minidiff.layers import Attention, SpatialTransformer, TransformerBlock
from minidiff.options.sampling import SampleConfig
from minidiff.samplers import Normal
from minidiff.text import END, CLIPText, tokenizer

BEGIN_WORD, END_WORD, PADDING = "<begin>", "<end>", "<padding>"  # tokens that are no word


@dataclass(frozen=True)
class AttentionMap:
    """What one cross-attention layer looked at in one evaluation of the U-Net."""

    layer: str  # its name in the U-Net
    t: float
    weights: Float[Tensor, "words h w"]  # mean over heads; at each place they sum to 1 over words


@dataclass(frozen=True)
class AttentionMaps:
    """All maps of one image, as they were computed. A word of several tokens has their sum."""

    words: tuple[str, ...]
    maps: tuple[AttentionMap, ...]
    image: Float[Tensor, "3 H W"]  # in [-1, 1]

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """(height, width) of each level's maps, the largest first."""
        return sorted({tuple(m.weights.shape[1:]) for m in self.maps}, reverse=True)

    @property
    def times(self) -> list[float]:
        """The times of the steps, decreasing."""
        return sorted({m.t for m in self.maps}, reverse=True)

    def mean(
        self, size: tuple[int, int] | None = None, t: float | None = None
    ) -> Float[Tensor, "words H W"]:
        """The mean map of each word, enlarged to the image: of the layers whose maps have this
        size, at this time. Default: of all of them ([1] section 3)."""
        chosen = [
            m.weights
            for m in self.maps
            if size in (None, tuple(m.weights.shape[1:])) and t in (None, m.t)
        ]
        if not chosen:
            sizes, times = self.sizes, ", ".join(f"{t:g}" for t in self.times)
            raise UserError(f"no maps of size {size} at t = {t}; sizes: {sizes}, times: {times}.")
        sides = self.image.shape[1:]
        large = [F.interpolate(w[None], sides, mode="bilinear")[0] for w in chosen]
        return torch.stack(large).mean(0)


@torch.no_grad()
def attention_maps(
    model: LatentDiffusion, prompt: str, config: SampleConfig | None = None
) -> AttentionMaps:
    """Draw the image of a prompt, the same as without recording, and see where its words look."""
    config = config or SampleConfig()
    scale = model.guidance if config.guidance is None else config.guidance
    if scale == 0:
        raise UserError("guidance is 0, which ignores the prompt; take 1 or more.")
    counted = words_of(model.text, prompt)
    noise = Normal.seeded(config.seed, [0])
    with record(model, [count for _, count in counted]) as maps:
        *_, last = model.sample([prompt], generator=noise, config=config)
    image = model.decode(last.x0).clamp(-1, 1)[0].float().cpu()
    return AttentionMaps(tuple(word for word, _ in counted), tuple(maps), image)


def words_of(text: nn.Module, prompt: str) -> list[tuple[str, int]]:
    """The words of a prompt and how many vectors of the context each of them has, in order. The
    tokens around them have names in angle brackets."""
    text = getattr(text, "clip_g", text)  # SDXL's two have the same tokens, but for padding
    if not isinstance(text, CLIPText):  # a class is one vector
        return [(prompt, 1)]
    ids = text.ids(prompt)[: text.context_length - 2]
    added = {id: word for word, its in text.config.added.items() for id in its if id > END}
    words, start = [], 0
    while start < len(ids):
        word, stop = added.get(ids[start]), start + 1
        if word is not None:
            stop = start + len(text.config.added[word])
        else:
            while stop < len(ids) and not tokenizer().decoder[ids[stop - 1]].endswith("</w>"):
                stop += 1
            word = tokenizer().decode(ids[start:stop]).strip()
        words.append((word, len(ids[start:stop])))
        start = stop
    words = [(BEGIN_WORD, 1), *words, (END_WORD, 1)]
    padding = text.context_length - sum(count for _, count in words)
    return [*words, (PADDING, padding)] if padding else words


def attention_weights(
    attention: Attention, x: Float[Tensor, "B N D"], context: Float[Tensor, "B L _"]
) -> Float[Tensor, "B heads N L"]:
    """softmax(q k^T / sqrt(d)): what fused attention computes inside and never shows."""
    q, k = (
        rearrange(p, "b n (h d) -> b h n d", h=attention.heads).float()
        for p in (attention.q(x), attention.k(context))
    )
    return (q @ k.mT / q.shape[-1] ** 0.5).softmax(dim=-1)


@contextlib.contextmanager
def record(model: LatentDiffusion, counts: list[int]) -> Iterator[list[AttentionMap]]:
    """The maps of the batch's last image, which under guidance is that of the prompt.

    counts: how many vectors of the context each word has."""
    unet = dict(model.unet.named_modules())
    layers = {
        f"{name}.cross_attention": block.cross_attention
        for name, block in unet.items()
        if isinstance(block, TransformerBlock) and block.has_context
    }
    if not layers:
        raise UserError("this model's U-Net has no cross-attention; there is nothing to record.")
    recorder = _Recorder(torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts)))
    handles = [model.denoiser.register_forward_pre_hook(recorder.set_time)]
    for module in unet.values():
        if isinstance(module, SpatialTransformer):
            handles.append(module.register_forward_pre_hook(recorder.set_size))
    for name, layer in layers.items():
        handles.append(layer.register_forward_pre_hook(partial(recorder.look, name)))
    try:
        yield recorder.maps
    finally:
        for handle in handles:
            handle.remove()


class _Recorder:
    """What the hooks share."""

    def __init__(self, word_of: Int[Tensor, "L"]):
        self.word_of = word_of  # the number of the word that each vector of the context belongs to
        self.t, self.size = 0.0, (0, 0)
        self.maps: list[AttentionMap] = []

    def set_time(self, _denoiser: nn.Module, args: tuple) -> None:
        self.t = args[1][-1].item()

    def set_size(self, _transformer: nn.Module, args: tuple) -> None:
        self.size = tuple(args[0].shape[2:])

    def look(self, name: str, attention: Attention, args: tuple) -> None:
        x, context = (each[-1:] for each in args)
        each = attention_weights(attention, x, context)[0].mean(0).cpu()
        words = each.new_zeros(len(each), int(self.word_of[-1]) + 1)
        words.index_add_(1, self.word_of, each)
        weights = rearrange(words, "(h w) words -> words h w", h=self.size[0])
        self.maps.append(AttentionMap(name, self.t, weights.contiguous()))
