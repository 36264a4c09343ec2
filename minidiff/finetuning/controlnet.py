"""Training a ControlNet: pairs of images and hints, batches of them, and the loss.

The model stays as it is; its ControlNet alone learns ([1] section 3.3). Everything random about
batch k follows from (seed, k).

[1] Zhang, Rao, Agrawala. Adding Conditional Control to Text-to-Image Diffusion Models. 2023.
    arXiv:2302.05543
"""

from collections.abc import Iterator
from functools import partial
from itertools import count
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from minidiff.condition import apply
from minidiff.data.folder import CaptionedImages, load_image
from minidiff.data.latents import encode_captions, encode_images
from minidiff.errors import UserError
from minidiff.latent_diffusion import LatentDiffusion
from minidiff.methods.controlnet import Control, ControlNet, controlled_denoiser
from minidiff.train import Loss, TrainConfig, TrainStep, train
from minidiff.training.seeds import generator_of


class Pairs(NamedTuple):
    """What a ControlNet learns from. hints: bytes, of the images' size."""

    latents: Float[Tensor, "N Z h w"]
    captions: list[str]
    hints: Shaped[Tensor, "N 3 H W"]


class Batch(NamedTuple):
    """Examples with everything random about them."""

    latents: Float[Tensor, "B Z h w"]
    captions: list[str]  # "" where the caption is hidden
    hints: Float[Tensor, "B 3 H W"]  # in [0, 1]
    t: Shaped[Tensor, "B"]
    eps: Float[Tensor, "B Z h w"]


def pairs_of(
    model: LatentDiffusion, data: CaptionedImages, hints: Path, size: int, cache: Path | None = None
) -> Pairs:
    """Captioned images, squares of this side, each with the image of its name in the folder
    `hints`. cache: a folder for the latents."""
    files = [hints / path.name for path in data.paths]
    if absent := [file for file in files if not file.is_file()]:
        what = f"{len(absent)} of {len(files)} images have no hint; the first is {absent[0]}"
        raise UserError(f"{what}. A hint has the name of its image.")
    latents = encode_images(model.vae, data.paths, [(size, size)] * len(files), cache)
    shown = torch.stack([load_image(file, size) for file in files])
    return Pairs(torch.stack(latents), list(data.captions), shown)


def batches(
    pairs: Pairs, model: LatentDiffusion, batch: int, hidden: float, seed: int, start: int
) -> Iterator[Batch]:
    """Batches start, start + 1, ... hidden: the share of captions that are; [1] hides one in two,
    so that the ControlNet learns to read the hint itself."""
    for k in count(start):
        generator = generator_of(seed, k)
        rows = torch.randint(len(pairs.captions), (batch,), generator=generator)
        hide = torch.rand(batch, generator=generator) < hidden
        captions = zip(rows.tolist(), hide.tolist(), strict=True)
        latents = pairs.latents[rows]
        yield Batch(
            latents,
            ["" if hide else pairs.captions[i] for i, hide in captions],
            pairs.hints[rows].float() / 255,  # not to [-1, 1], as images are
            model.schedule.sample_t(batch, generator),
            torch.randn(latents.shape, generator=generator),
        )


def loss(
    model: LatentDiffusion,
    controlnet: ControlNet,
    contexts: dict[str, Tensor],
    weighting: str,
    batch: Batch,
) -> Loss:
    """The denoiser's loss, [1] eq. 5, with this weighting. contexts: of every caption and of ""."""
    device = model.device
    context = apply(lambda *each: torch.stack(each).to(device), *map(contexts.get, batch.captions))
    denoiser = controlled_denoiser(model.denoiser, Control(controlnet, batch.hints.to(device)))
    denoiser.weighting, denoiser.log_error = weighting, None
    losses = denoiser.loss(batch.latents.to(device), context, batch.t, batch.eps.to(device))
    return {"loss": losses, "progress": model.schedule.progress(batch.t)}


def train_controlnet(
    model: LatentDiffusion,
    controlnet: ControlNet,
    pairs: Pairs,
    config: TrainConfig,
    batch: int = 16,
    hidden: float = 0.5,
    folder: Path | None = None,
    resume: bool = False,
) -> Iterator[TrainStep]:
    """Train a ControlNet for a model, on the model's device; yields after every step. hidden: see
    batches. folder, resume: as of train. The weighting is the target's own."""
    model.requires_grad_(False)
    contexts = encode_captions(model.text, pairs.captions, None)
    data = partial(batches, pairs, model, batch, hidden, config.seed)
    loss_fn = partial(loss, model, controlnet, contexts, model.denoiser.target)
    yield from train(loss_fn, controlnet.requires_grad_(True), data, config, None, folder, resume)
