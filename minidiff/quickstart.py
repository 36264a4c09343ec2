"""The quickstart: a text-to-image latent diffusion model trained from nothing on the built-in world, on two CPU cores, in minutes.

Three acts: a VAE learns to squeeze pictures, a text tower and a U-Net learn to denoise its latents, and the critic counts how often
pictures show what held-out captions say. Every number of the recipe stands in this file.
"""
import json
import os
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from minidiff import chains, evaluate, plots, schedules
from minidiff.clip import CLIPText
from minidiff.data.world import World
from minidiff.denoiser import Denoiser
from minidiff.errors import UserError
from minidiff.latent_diffusion import LatentDiffusion
from minidiff.train import EMA, train
from minidiff.unet import UNet
from minidiff.vae import VAE

SIZE = 32  # pixels; the world's default of 64 would cost four times the VAE
VAE_STEPS, VAE_BATCH, VAE_LR = 1200, 32, 2e-3
STEPS, BATCH, LR = 1800, 64, 2e-3
TWO_OBJECTS = 0.75  # of the training pictures; they are the harder ones
CAPTIONS = 256  # held-out captions for each accuracy
PROMPTS = [
    "a small blue circle above a large red square",
    "a large yellow star on a black background",
    "a large green ring to the left of a small purple heart",
    "a small orange triangle below a large cyan diamond on pink",
]


def vae_quickstart() -> VAE:
    """32x32x3 pictures to 16x16x8 latents."""
    return VAE(3, 8, channels=(16, 32), blocks=1, groups=0)


def text_quickstart() -> CLIPText:
    """CLIP's transformer, small; the world's captions fit in 32 tokens."""
    return CLIPText(width=128, layers=2, heads=4, context_length=32)


def unet_quickstart() -> UNet:
    """Four levels, 16x16 to 2x2; attention from 8x8 down."""
    return UNet(8, 8, channels=(64, 128, 256, 256), blocks=1, depth=(0, 1, 1, 1), heads=(2, 4, 8, 8), context_dim=128)


def batches(world: World, size: int, key: str, start: int) -> Iterator[tuple[Float[Tensor, "B 3 H W"], list[str]]]:
    """Batches start, start + 1, ... of the endless world; each follows from (key, its number) alone."""
    for k in count(start):
        pictures, captions, _ = world.batch(size, (key, k), two_objects=TWO_OBJECTS)
        yield pictures.contiguous(memory_format=torch.channels_last), captions


def train_vae(out: Path, seed: int, device: str, resume: bool) -> VAE:
    """Act one: pictures to latents and back."""
    torch.manual_seed(seed)
    world, vae = World(SIZE), vae_quickstart().to(device, memory_format=torch.channels_last)
    loop = train(
        lambda batch: (vae.loss(batch[0].to(device)), None),
        vae,
        lambda start: batches(world, VAE_BATCH, f"vae {seed}", start),
        VAE_STEPS,
        VAE_LR,
        seed=seed,
        folder=out / "training" / "vae",
        resume=resume,
    )
    with tqdm(loop, "1/3 the VAE learns to squeeze pictures", VAE_STEPS, unit="step") as bar:
        for step in bar:
            bar.set_postfix_str(f"loss {step.loss:.3f}", refresh=False)
    pictures, _ = next(batches(world, 256, f"scale {seed}", 0))
    vae.measure_scale(pictures.to(device))
    return vae.requires_grad_(False).eval()


def train_model(vae: VAE, out: Path, seed: int, device: str, resume: bool) -> LatentDiffusion:
    """Act two: the text tower and the U-Net, together, on latents."""
    torch.manual_seed(seed + 1)
    denoiser = Denoiser(unet_quickstart(), schedules.cosine(), target="v")
    model = LatentDiffusion(vae, text_quickstart(), denoiser, SIZE, guidance=3.0).to(device, memory_format=torch.channels_last)
    ema, world = EMA(model, decay=0.995), World(SIZE)

    def loss(batch: tuple[Tensor, list[str]]) -> tuple[Tensor, Tensor]:
        pictures, captions = batch
        t = model.schedule.sample_t(len(captions))
        return model.loss(pictures.to(device), captions, t), model.schedule.progress(t)

    loop = train(
        loss,
        model,
        lambda start: batches(world, BATCH, f"model {seed}", start),
        STEPS,
        LR,
        ema=ema,
        seed=seed,
        folder=out / "training" / "model",
        resume=resume,
    )
    with tqdm(loop, "2/3 the U-Net learns to denoise latents", STEPS, unit="step") as bar:
        for step in bar:
            bar.set_postfix_str(f"loss {step.loss:.3f}", refresh=False)
    return ema.average


def quickstart(out: Path, seed: int = 0, device: str = "cpu", resume: bool = False) -> dict:
    """Train, draw, judge, and leave everything in `out`; returns what results.json says."""
    started = time.perf_counter()
    if (out / "results.json").exists() and not resume:
        raise UserError(f"{out} holds a finished quickstart; pass another --out, or remove the folder.")
    before = minutes_before(out) if resume else 0.0
    vae = train_vae(out, seed, device, resume)
    model = train_model(vae, out, seed, device, resume)
    model.save(out / "model")
    return {}
