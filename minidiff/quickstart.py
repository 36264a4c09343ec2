"""The quickstart: a text-to-image latent diffusion model trained from nothing on the built-in world, on two CPU cores, in minutes.

Three acts: a VAE learns to squeeze pictures, a text tower and a U-Net learn to denoise its latents, and the critic counts how often
the pictures show what held-out captions say. Every number of the recipe stands in this file.
"""
import json
import os
import random
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from minidiff import evaluate, plots, schedules
from minidiff.clip import CLIPText
from minidiff.data import critic
from minidiff.data.world import World
from minidiff.denoiser import Denoiser
from minidiff.latent_diffusion import LatentDiffusion
from minidiff.samplers import Frame
from minidiff.train import EMA, train
from minidiff.unet import UNet
from minidiff.vae import VAE

SIZE = 32  # pixels; the world's 64 would cost four times the VAE
PROMPTS = [
    "a small blue circle above a large red square",
    "a large yellow star on a black background",
    "a large green ring to the left of a small purple heart",
    "a small orange triangle below a large cyan diamond on pink",
]


def vae_quickstart() -> VAE:
    """32x32x3 pictures to 16x16x4 latents."""
    return VAE(3, 4, channels=(16, 32), blocks=1, groups=4)


def text_quickstart() -> CLIPText:
    """CLIP's transformer, small: captions of the world have at most 24 tokens."""
    return CLIPText(width=128, layers=2, heads=4, context_length=32)


def unet_quickstart() -> UNet:
    """Four levels, 16x16 to 2x2; attention from 8x8 down."""
    return UNet(4, 4, channels=(64, 128, 256, 256), blocks=1, depth=(0, 1, 1, 1), heads=(2, 4, 8, 8), context_dim=128)


def pictures(world: World, batch: int, key: str, start: int, two_objects: float) -> Iterator[tuple[Float[Tensor, "B 3 H W"], list[str]]]:
    """Batches k = start, start + 1, ... of the endless world; each follows from (key, k) alone."""
    for k in count(start):
        images, captions, _ = world.batch(batch, (key, k), two_objects=two_objects)
        yield images.contiguous(memory_format=torch.channels_last), captions
