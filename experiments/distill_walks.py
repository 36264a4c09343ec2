"""The walks of distill.py: made by a model, kept in files, read as batches of points.

A walk is the way of one noise through a sampler's steps to its end. Its model, its captions and its
noise follow from a seed, so that walks are made once and many trainings read them.

[1] Luhman, Luhman. Knowledge Distillation in Iterative Generative Models for Improved Sampling
    Speed. 2021. arXiv:2101.02388
"""

import random
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float, Shaped
from torch import Tensor
from tqdm import tqdm

from minidiff.data.world import World
from minidiff.latent_diffusion import LatentDiffusion
from minidiff.options.sampling import Interval, SampleConfig
from minidiff.training import atomic
from minidiff.training.seeds import generator_of

TWO_OBJECTS = 0.8  # the share of images that show two
CHUNK = 250  # walks in a file
# The teacher's walks. Whose colour is whose is decided above t = 840 (docs/box.md): guide there,
# and hard.
TEACHER_WALK = SampleConfig(8, 3.0, "dpmpp_2m", interval=Interval(0.7, 1.0))
STEPS = TEACHER_WALK.steps


class Walks(NamedTuple):
    """Where a model went from pure noise, and the contexts of its captions."""

    x: Float[Tensor, "N steps1 Z h w"]  # float16
    context: Float[Tensor, "N L D"]


class Points(NamedTuple):
    """A batch of points on walks, their times, and where the walks ended."""

    x: Float[Tensor, "B Z h w"]
    t: Shaped[Tensor, "B"]
    end: Float[Tensor, "B Z h w"]
    context: Float[Tensor, "B L D"]


@torch.no_grad()
def chunk(
    model: LatentDiffusion, world: World, config: SampleConfig, k: int, size: int
) -> tuple[list[str], Float[Tensor, "N steps1 Z h w"]]:
    """Chunk k of a model's walks: captions of training scenes, half of them in full, and the points
    of the walks, in float16."""
    rng, generator = random.Random(f"walks {config.seed} {k}"), generator_of(config.seed, -1 - k)
    scenes = [world.scene(rng, two_objects=TWO_OBJECTS) for _ in range(size)]
    captions = [world.caption(scene, rng, full=rng.random() < 0.5) for scene in scenes]
    side = model.size // model.vae.factor
    noise = torch.randn(size, model.vae.latent_channels, side, side, generator=generator)
    walks = []
    for i in range(0, size, 50):
        some = slice(i, i + 50)
        frames = model.sample(captions[some], generator=generator, x_T=noise[some], config=config)
        walks.append(torch.stack([frame.x for frame in frames], dim=1))
    return captions, torch.cat(walks).half()


@torch.no_grad()
def all_walks(
    model: LatentDiffusion,
    world: World,
    config: SampleConfig,
    n: int,
    folder: Path,
    resume: bool,
    title: str,
) -> Walks:
    """n walks of a model, [1], also in files of the folder. To resume, files that are there are not
    made again."""
    folder.mkdir(parents=True, exist_ok=True)
    x, contexts = [], []
    for k in tqdm(range(-(-n // CHUNK)), desc=title, unit=f" x {CHUNK}"):
        file = folder / f"{k:03d}.pt"
        atomic.check(file, atomic.unsigned)
        if not (resume and file.exists()):
            captions, walks = chunk(model, world, config, k, min(CHUNK, n - k * CHUNK))
            with atomic.write(file, atomic.unsigned) as new:
                torch.save({"captions": captions, "x": walks, "about": atomic.SIGNATURE}, new)
        content = torch.load(file, weights_only=True)
        contexts.append(model.text.encode(content["captions"]))
        x.append(content["x"])
    return Walks(torch.cat(x), torch.cat(contexts))


def points(
    walks: Walks, times: Shaped[Tensor, "steps1"], batch: int, far: float, seed: int, start: int
) -> Iterator[Points]:
    """Batches start, start + 1, ...; times: of the walks' points. A share `far` of the points, and
    some more by chance, is pure noise, from which the way is longest."""
    for k in count(start):
        generator = generator_of(seed, k)
        i = torch.randint(0, len(walks.x), (batch,), generator=generator)
        n = torch.randint(0, len(times) - 1, (batch,), generator=generator)
        n *= torch.rand(batch, generator=generator) < 1 - far
        x, end = (
            walks.x[i, m].float().contiguous(memory_format=torch.channels_last)
            for m in (n, torch.full_like(n, -1))
        )
        yield Points(x, times[n], end, walks.context[i])
