"""Textual inversion: one word's vector is all that is trained, and the model as it is draws the subject by that word. All in this file.

A vector v of the text tower's vocabulary is sought that makes captions with the word fit the pictures, [1] eq. 2:

    v* = argmin_v  E || eps - eps_theta(x_t, t, c_v(caption)) ||^2         everything but v is frozen

So the file is 3 KB, and the model can draw nothing that it could not draw before: only what no words of its own would have called.

[1] Gal et al. An Image is Worth One Word: Personalizing Text-to-Image Generation using Textual Inversion. 2022. arXiv:2208.01618
"""
import os
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from minidiff.clip import CLIPText, token_ids
from minidiff.errors import UserError
from minidiff.finetune import settle
from minidiff.groups import Batch, Group, batches, loss
from minidiff.identity import identity, same_run
from minidiff.latent_diffusion import LatentDiffusion
from minidiff.recorder import Recorder
from minidiff.train import train
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
    """The vector of one token, trained in the place of the tower's own by a forward hook on its vocabulary."""

    def __init__(self, text: CLIPText, word: str, like: str | None = None):
        """like: a word whose vector to begin from, the coarse class of the subject ([1] section 4); None begins from the token's own."""
        super().__init__()
        self.token = token_of(word)
        start = text.token_embedding.weight[token_of(like) if like else self.token]
        self.vector = nn.Parameter(start.detach().float().clone())
        self.hook = text.token_embedding.register_forward_hook(self.replaced)

    def replaced(self, _: nn.Module, inputs: tuple[Tensor, ...], output: Float[Tensor, "B L D"]) -> Float[Tensor, "B L D"]:
        return torch.where((inputs[0] == self.token)[..., None], self.vector.to(output.dtype), output)


def invert(
    model: LatentDiffusion,
    word: str,
    groups: list[Group],
    out: Path,
    *,
    like: str | None = None,
    steps: int,
    lr: float,
    batch: int = 4,
    every: int = 100,
    seed: int = 0,
    recorder: Recorder | None = None,
    resume: bool = False,
) -> Path:
    """Train the vector of this word on groups of examples whose captions have it; writes OUT/embedding.safetensors, and leaves it in the model."""
    settings = dict(method="inversion", word=word, like=like, steps=steps, lr=lr, batch=batch, every=every, seed=seed)
    same_run(out, identity(model, groups, settings), resume)
    model.requires_grad_(False)
    trained, seen = Word(model.text, word, like).to(model.device), {}
    loss_fn = loss(model, None, model.denoiser, seen)

    def data(start: int) -> Iterator[Batch]:
        return batches(groups, model.schedule, batch, 0.0, seed, start)

    if model.denoiser.log_error is not None:
        settle(model.denoiser, loss_fn, data(0))
    if recorder is not None and not (out / "training" / "checkpoint.pt").exists():
        recorder.measure(0, {})
    loop = train(loss_fn, trained, data, steps, lr, warmup=10, seed=seed, folder=out / "training", resume=resume, save_every=every)
    with tqdm(desc="textual inversion", total=steps, unit="step") as bar:
        for step in loop:
            if not bar.n:
                bar.initial = bar.n = step.step - 1  # a resumed loop starts further on
            bar.set_postfix_str(f"loss {step.loss:.3f}", refresh=False)
            bar.update()
            if recorder is not None and (step.step % every == 0 or step.step == steps):
                recorder.measure(step.step, {"subject": step.loss}, step.lr)
    trained.hook.remove()
    put_in(model.text, word, trained.vector.detach())
    return save(word, trained.vector, out / "embedding.safetensors")


@torch.no_grad()
def put_in(text: CLIPText, word: str, vector: Float[Tensor, "D"]) -> None:
    """Give the word this vector for good."""
    text.token_embedding.weight[token_of(word)] = vector.to(text.token_embedding.weight)


def save(word: str, vector: Float[Tensor, "D"], file: Path) -> Path:
    """{"<word>": (1, D)}, as diffusers' load_textual_inversion reads it; written beside, then renamed."""
    fresh = file.with_name(file.name + ".new")
    save_file({f"<{word}>": vector.detach().float().cpu()[None].contiguous()}, fresh)
    os.replace(fresh, file)
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
