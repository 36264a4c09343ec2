"""The model in the box, from nothing: the VAE, text encoder and U-Net that ship in minidiff/box,
in a little over an hour of one CPU core.

    python experiments/pretrain_box.py --out out/box

Three acts on the built-in world, which is endless: a VAE learns to compress images; a text encoder
learns to read captions, before it sees an image; a U-Net learns to denoise, with both frozen.
Writes box/ (float16), samples.png, loss.png, text_loss.png and results.json. Ctrl-C saves;
--resume goes on, bit for bit.

[1] Saharia et al. Photorealistic Text-to-Image Diffusion Models with Deep Language Understanding.
    2022. arXiv:2205.11487
"""

import random
from collections.abc import Iterator
from functools import partial
from itertools import count
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from minidiff import schedules
from minidiff.cli.script import run
from minidiff.data.world import Scene, World
from minidiff.denoiser import Denoiser
from minidiff.figures import plots
from minidiff.latent_diffusion import LatentDiffusion
from minidiff.recipes import judging, quickstart, reading
from minidiff.recipes.quickstart import COLOURS, SHAPES, SIZE, LatentBatch, channels_last
from minidiff.text import CLIPText
from minidiff.train import EMA, TrainConfig, train
from minidiff.training.progress import follow, last_loss, peak_memory_gb, write_results
from minidiff.training.resume import read_log
from minidiff.training.seeds import generator_of
from minidiff.unet import UNet, UNetConfig
from minidiff.vae import VAE, VAEConfig

TWO_OBJECTS = 0.8  # the share of images that show two
# Centre and spread of logit(t / 1000): shapes are decided at medium noise, whose colour is whose
# above 840.
EARLY, LATE = (0.6, 0.85), (1.9, 0.9)


def vae_box() -> VAE:
    """32x32x3 images to 16x16x4 latents."""
    return VAE(VAEConfig(3, 4, channels=(16, 32), blocks=1, groups=0))


def unet_box() -> UNet:
    """Four levels, 16x16 to 2x2, mostly convolutions; attention at 4x4 and in the middle."""
    levels = {"channels": (64, 64, 64, 64), "depth": (0, 0, 1, 0), "heads": (2, 2, 2, 2)}
    text = {"context_dim": 64, "pooled": True, "scale_shift": True}
    return UNet(UNetConfig(4, 4, blocks=1, ff_mult=2, groups=16, **levels, **text))


def train_text(
    world: World, folder: Path, steps: int, batch: int, lr: float, seed: int, resume: bool
) -> CLIPText:
    """Act two: the text encoder learns to read (reading.py), then stays as it is, as in [1]."""
    torch.manual_seed(seed)
    text = quickstart.text_quickstart()
    data = partial(reading.lessons, world, reading.codes(world, text.dim), batch, TWO_OBJECTS, seed)
    loss, config = partial(reading.loss, text), TrainConfig(steps, lr, seed=seed)
    training = train(loss, text, data, config, folder=folder, resume=resume)
    follow(training, "2/3 text", steps, batch)
    return text.requires_grad_(False).eval()


def train_vae(world: World, folder: Path, steps: int, lr: float, seed: int, resume: bool) -> VAE:
    """Act one: images to latents and back."""
    torch.manual_seed(seed)
    vae = vae_box().to(memory_format=torch.channels_last)
    data = partial(quickstart.batches, world, f"vae {seed}")
    loss, config = partial(quickstart.vae_loss, vae), TrainConfig(steps, lr, seed=seed)
    training = train(loss, vae, data, config, folder=folder, resume=resume)
    follow(training, "1/3 VAE", steps, quickstart.VAE_BATCH)
    vae.measure_scale(world.batch(256, f"scale {seed}", two_objects=TWO_OBJECTS)[0])
    return vae.requires_grad_(False).eval()


class Pool(NamedTuple):
    """Scenes drawn and encoded once; each time one is met, its words and the noise are new."""

    latents: Float[Tensor, "N Z h w"]
    scenes: list[Scene]


@torch.no_grad()
def pool_of(world: World, vae: VAE, size: int, objects: int, seed: int) -> Pool:
    latents, scenes, batch = [], [], 100
    for k in range(-(-size // batch)):
        images, _, some = world.batch(batch, f"pool {seed} {objects} {k}", objects=objects)
        latents.append(vae.encode(channels_last(images)))
        scenes += some
    return Pool(torch.cat(latents), scenes)


def latent_batches(
    world: World, one: Pool, two: Pool, batch: int, late: int, seed: int, dropout: float, start: int
) -> Iterator[LatentBatch]:
    """Batches start, start + 1, ... with all that is random about them; from batch `late` on, t is
    higher."""
    for k in count(start):
        generator, rng = generator_of(seed, k), random.Random(f"{seed} {k}")
        latents, captions = [], []
        for _ in range(batch):
            pool = two if rng.random() < TWO_OBJECTS else one
            i = rng.randrange(len(pool.scenes))
            latents.append(pool.latents[i])
            captions.append("" if rng.random() < dropout else world.caption(pool.scenes[i], rng))
        x0 = channels_last(torch.stack(latents))
        t = quickstart.noise_levels(batch, generator, *(EARLY if k < late else LATE))
        yield LatentBatch(x0, captions, t, torch.randn(x0.shape, generator=generator))


OUTPUTS = ("samples.png", "text_loss.png", "loss.png", "box")  # beside results.json


def main(
    out: Path = Path("out/box"),
    vae_steps: int = 2000,
    vae_lr: float = 3e-3,
    text_steps: int = 1500,
    text_batch: int = 128,
    text_lr: float = 2e-3,
    steps: int = 34_000,
    late: int = 15_000,
    batch: int = 16,
    lr: float = 1.5e-3,
    pool: int = 60_000,
    guidance: float = 2.0,
    captions: int = 500,
    seed: int = 0,
    resume: bool = False,
) -> None:
    """Train the model in the box on one CPU core, and let the critic judge what is shipped.

    Args:
        out: folder for everything written.
        vae_steps: training steps of the VAE.
        vae_lr: its peak learning rate.
        text_steps: training steps of the text encoder.
        text_batch: its captions a step.
        text_lr: its peak learning rate.
        steps: training steps of the U-Net.
        late: from this step on, it sees more of the highest noise.
        batch: its images a step.
        lr: its peak learning rate.
        pool: images of two objects that are drawn and encoded once; a quarter as many of one.
        guidance: how strongly the text steers when the model is used.
        captions: held-out captions behind each accuracy.
        seed: everything random follows from it.
        resume: go on where an interrupted run stopped.
    """
    torch.set_num_threads(1)  # on networks this small a second thread would mostly wait
    world, training = World(SIZE, SHAPES, COLOURS), out / "training"
    vae = train_vae(world, training / "vae", vae_steps, vae_lr, seed, resume)
    text = train_text(world, training / "text", text_steps, text_batch, text_lr, seed, resume)

    # Act three: the U-Net learns to denoise latents.
    torch.manual_seed(seed + 1)
    unet, schedule = unet_box(), schedules.cosine()
    denoiser = Denoiser(unet, schedule, target="x0", weighting="learned")
    model = LatentDiffusion(vae, text, denoiser, SIZE, guidance=guidance, sampler="ddpm")
    model.to(memory_format=torch.channels_last)
    ema = EMA(model, decay=0.999)
    one, two = pool_of(world, vae, -(-pool // 4), 1, seed), pool_of(world, vae, pool, 2, seed)
    data = partial(latent_batches, world, one, two, batch, late, seed, model.dropout)
    loss, config = partial(quickstart.model_loss, model), TrainConfig(steps, lr, seed=seed)
    loop = train(loss, model, data, config, ema, training / "unet", resume)
    speed = follow(loop, "3/3 U-Net", steps, batch)

    # What is judged is what is shipped: half precision, read back from the folder.
    box = ema.average.half().save(out / "box")
    model = LatentDiffusion.load(box)
    figures, examples = judging.judge(model, world, seed, captions)
    print(box)
    print(judging.judged_grid(examples, out / "samples.png"))
    logs = {name: read_log(training / name) for name in ("vae", "text", "unet")}
    print(plots.loss(logs["text"], out / "text_loss.png"))
    print(plots.loss(logs["unet"], out / "loss.png"))
    megabytes = round(sum(file.stat().st_size for file in box.iterdir()) / 1e6, 2)
    results = {
        "vae_steps": vae_steps,
        "text_steps": text_steps,
        "steps": steps,
        "late": late,
        "batch": batch,
        "lr": lr,
        "pool": pool,
        "guidance": guidance,
        "seed": seed,
        **figures,
        "captions_each": captions,
        **{f"{name}_loss": last_loss(log) for name, log in logs.items()},
        **speed,
        "megabytes": megabytes,
        "peak_memory_gb": peak_memory_gb(),
    }
    print(write_results(out, **results))
    print(
        f"one object {figures['accuracy_one_object']:.3f}, "
        f"two objects {figures['accuracy_two_objects']:.3f}; {megabytes} MB"
    )


if __name__ == "__main__":
    run(main, OUTPUTS)
