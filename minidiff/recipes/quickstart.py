"""The quickstart: a text-to-image latent diffusion model trained from nothing on the built-in world, on two CPU cores, in minutes.

Four acts: a VAE learns to squeeze pictures, a text tower learns to read captions, a U-Net learns to denoise latents with both frozen, and the
critic counts how often pictures show what held-out captions say. Every number of the recipe stands in this file.

[1] Kingma et al. Variational Diffusion Models. 2021. arXiv:2107.00630
[2] Esser et al. Scaling Rectified Flow Transformers for High-Resolution Image Synthesis. 2024. arXiv:2403.03206
"""

import json
import random
import sys
import time
from collections.abc import Iterator
from functools import partial
from itertools import count
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm

from minidiff import schedules
from minidiff.cli.script import peak_memory_gb, write_results
from minidiff.data import critic
from minidiff.data.world import World
from minidiff.denoiser import Denoiser
from minidiff.errors import UserError
from minidiff.evaluation import bench as evaluate
from minidiff.figures import chains, plots
from minidiff.latent_diffusion import LatentDiffusion
from minidiff.recipes import reading
from minidiff.samplers import Normal
from minidiff.text import CLIPText, TextConfig
from minidiff.train import EMA, TrainStep, seed_of, train
from minidiff.unet import UNet, UNetConfig
from minidiff.vae import VAE, VAEConfig

SIZE = 32  # pixels; the world's default of 64 would cost four times the VAE
SHAPES = ("circle", "square", "triangle")  # the part of the world that ten minutes suffice for
COLOURS = ("red", "yellow", "green", "blue")
VAE_STEPS, VAE_BATCH, VAE_LR = 750, 32, 3e-3
TEXT_STEPS, TEXT_BATCH, TEXT_LR = 800, 128, 2e-3
STEPS, LR = 3600, 2e-3
PARTS = 2  # a step is PARTS batches, on as many cores at once
SMALL_STEPS, SMALL_BATCH, BATCH = (
    1000,
    48,
    16,
)  # the first steps see pictures of half the side: three times as many for the same work
TWO_OBJECTS = 0.7  # the share of pictures that show two
POOL = 12_000  # pictures of two objects; half as many of one
T_CENTRE, T_SPREAD = 0.6, 0.85  # of logit(t / 1000)
GUIDANCE = 2.0
CAPTIONS = 200  # held-out captions behind each accuracy
PROMPTS = [
    "a small blue circle above a large red square",
    "a large yellow triangle on a black background",
    "a large green circle to the left of a small yellow square",
    "a small red triangle below a large blue circle on pink",
]


def vae_quickstart() -> VAE:
    """32x32x3 pictures to 16x16x4 latents."""
    return VAE(VAEConfig(3, 4, channels=(16, 32), blocks=1, groups=0))


def text_quickstart() -> CLIPText:
    """CLIP's transformer, small; the world's captions fit in 32 tokens."""
    return CLIPText(TextConfig(width=64, layers=2, heads=2, context_length=32, words_only=True))


def unet_quickstart() -> UNet:
    """Four levels, 16x16 to 2x2, mostly convolutions; attention at 4x4 and in the middle."""
    return UNet(
        UNetConfig(
            4,
            4,
            channels=(64, 64, 64, 64),
            blocks=1,
            depth=(0, 0, 1, 0),
            heads=(2, 2, 2, 2),
            context_dim=64,
            ff_mult=2,
            groups=16,
            pooled=True,
            scale_shift=True,
        )
    )


def batches(world: World, key: str, start: int) -> Iterator[Float[Tensor, "B 3 H W"]]:
    """Batches start, start + 1, ... of pictures of the endless world; each follows from (key, its number) alone."""
    for k in count(start):
        yield world.batch(VAE_BATCH, (key, k), two_objects=TWO_OBJECTS)[0].contiguous(
            memory_format=torch.channels_last
        )


def crops(
    pictures: Float[Tensor, "B 3 H W"], count: int, side: int = 16, stride: int = 8
) -> Float[Tensor, "N 3 h w"]:
    """The `count` liveliest windows of a batch. A network of convolutions learns edges from them as from whole pictures, and flat
    background is most of every picture."""
    windows = (
        pictures.unfold(2, side, stride)
        .unfold(3, side, stride)
        .permute(0, 2, 3, 1, 4, 5)
        .flatten(0, 2)
    )
    return windows[windows.flatten(2).std(2).mean(1).topk(count).indices].contiguous(
        memory_format=torch.channels_last
    )


def watched(loop: Iterator[TrainStep], steps: int, title: str) -> None:
    """Run a training loop to its end behind a progress bar."""
    with tqdm(desc=title, total=steps, unit="step") as bar:
        for step in loop:
            if not bar.n:
                bar.initial = bar.n = step.step - 1  # a resumed loop starts further on
            bar.set_postfix_str(f"loss {step.loss:.3f}", refresh=False)
            bar.update()


def train_vae(world: World, folder: Path, seed: int, device: str, resume: bool) -> VAE:
    """Act one: pictures to latents and back."""
    torch.manual_seed(seed)
    vae = vae_quickstart().to(device, memory_format=torch.channels_last)
    loop = train(
        lambda pictures: (vae.loss(crops(pictures, 2 * VAE_BATCH).to(device)), None),
        vae,
        lambda start: batches(world, f"vae {seed}", start),
        VAE_STEPS,
        VAE_LR,
        seed=seed,
        folder=folder,
        resume=resume,
    )
    watched(loop, VAE_STEPS, "1/4 a VAE learns to squeeze pictures")
    vae.measure_scale(world.batch(256, f"scale {seed}", two_objects=TWO_OBJECTS)[0].to(device))
    return vae.requires_grad_(False).eval()


def train_text(world: World, folder: Path, seed: int, device: str, resume: bool) -> CLIPText:
    """Act two: the tower learns to read (reading.py), then stays as it is."""
    torch.manual_seed(seed)
    text = text_quickstart()
    codes = reading.codes(world, text.dim)
    loop = train(
        partial(reading.loss, text.to(device)),
        text,
        partial(reading.lessons, world, codes, TEXT_BATCH // PARTS, TWO_OBJECTS, seed),
        TEXT_STEPS,
        TEXT_LR,
        accumulate=PARTS,
        threads=min(PARTS, torch.get_num_threads()),
        seed=seed,
        folder=folder,
        resume=resume,
    )
    watched(loop, TEXT_STEPS, "2/4 a text tower learns to read captions")
    return text.requires_grad_(False).eval()


class Pool:
    """Scenes drawn and encoded once, and once more at half the side. They are met many times, each time with new words, new noise and a
    new t, which is what makes them new."""

    def __init__(self, world: World, vae: VAE, size: int, seed: str, objects: int, device: str):
        latents, small, self.scenes, batch = [], [], [], 64
        for k in range(-(-size // batch)):
            pictures, _, scenes = world.batch(batch, (seed, objects, k), objects=objects)
            with torch.no_grad():
                for kept, shown in ((latents, pictures), (small, F.avg_pool2d(pictures, 2))):
                    kept.append(vae.encode(shown.to(device, memory_format=torch.channels_last)))
            self.scenes += scenes
        self.latents, self.small = torch.cat(latents), torch.cat(small)


def noise_levels(
    n: int, generator: torch.Generator, centre: float = T_CENTRE, spread: float = T_SPREAD
) -> Int[Tensor, "B"]:
    """t for n examples, stratified ([1] appendix I.1): logit-normal ([2] section 3.1) around the t where shapes are decided; one in four
    anywhere."""
    u = (torch.arange(n) + torch.rand(n, generator=generator)) / n
    t = torch.sigmoid(centre + spread * torch.special.ndtri(u.double().clamp(1e-6, 1 - 1e-6)))
    anywhere = torch.rand(n, generator=generator) < 1 / 4
    return (1000 * torch.where(anywhere, u, t)).ceil().long().clamp(1, 1000)


class Part(NamedTuple):
    """A training batch, or a part of one, with all that is random about it."""

    latents: Float[Tensor, "B Z h w"]
    captions: list[str]
    t: Int[Tensor, "B"]
    eps: Float[Tensor, "B Z h w"]


def parts(
    world: World, one: Pool, two: Pool, seed: int, dropout: float, start: int
) -> Iterator[Part]:
    """Parts start, start + 1, ... of the endless stream of training batches, small pictures first."""
    for k in count(start):
        generator, rng = (
            torch.Generator().manual_seed(seed_of(seed, k)),
            random.Random(f"{seed} {k}"),
        )
        small = k < SMALL_STEPS * PARTS
        latents, captions = [], []
        for _ in range(SMALL_BATCH if small else BATCH):
            pool = two if rng.random() < TWO_OBJECTS else one
            i = rng.randrange(len(pool.scenes))
            latents.append((pool.small if small else pool.latents)[i])
            captions.append("" if rng.random() < dropout else world.caption(pool.scenes[i], rng))
        x0 = torch.stack(latents).contiguous(memory_format=torch.channels_last)
        yield Part(
            x0,
            captions,
            noise_levels(len(x0), generator),
            torch.randn(x0.shape, generator=generator).to(x0.device),
        )


def train_model(
    world: World, vae: VAE, text: CLIPText, folder: Path, seed: int, device: str, resume: bool
) -> LatentDiffusion:
    """Act three: a U-Net, on latents. Returns the average of the weights."""
    torch.manual_seed(seed + 1)
    denoiser = Denoiser(unet_quickstart(), schedules.cosine(), target="x0", weighting="learned")
    model = LatentDiffusion(vae, text, denoiser, SIZE, guidance=GUIDANCE, sampler="ddpm").to(
        device, memory_format=torch.channels_last
    )
    ema = EMA(model, decay=0.998)
    one, two = (
        Pool(world, vae, size, f"model {seed}", objects, device)
        for objects, size in ((1, POOL // 2), (2, POOL))
    )

    def loss(part: Part) -> tuple[Tensor, Tensor]:
        return denoiser.loss(
            part.latents, model.text.encode(part.captions), part.t, part.eps
        ), model.schedule.progress(part.t)

    loop = train(
        loss,
        model,
        lambda start: parts(world, one, two, seed, model.dropout, start),
        STEPS,
        LR,
        accumulate=PARTS,
        threads=min(PARTS, torch.get_num_threads()),
        ema=ema,
        seed=seed,
        folder=folder,
        resume=resume,
    )
    watched(loop, STEPS, "3/4 a U-Net learns to denoise latents")
    return ema.average


def judge(
    model: LatentDiffusion, world: World, seed: int, count: int = CAPTIONS
) -> tuple[dict, Float[Tensor, "N 3 H W"], list[str], list[bool]]:
    """Act four: the critic on `count` held-out captions of each kind. Returns figures, and a few pictures with captions and verdicts."""
    figures, shown = {}, ([], [], [])
    for objects, name in ((1, "one_object"), (2, "two_objects")):
        captions = evaluate.held_out(world, count, objects, seed)
        accuracy, pictures, verdicts = evaluate.caption_accuracy(model, captions, seed=seed)
        figures[f"accuracy_{name}"] = accuracy
        figures[f"mistakes_{name}"] = evaluate.mistakes(pictures, captions)
        figures[f"accuracy_{name}_shuffled_captions"] = critic.accuracy(
            pictures, evaluate.shuffled(captions)
        )
        for some, values in zip(
            shown, (list(pictures[:12]), captions[:12], verdicts[:12]), strict=True
        ):
            some.extend(values)
        truth = world.batch(count, f"truth {seed}", objects=objects, split="held-out", full=True)
        with torch.no_grad():
            rebuilt = (
                model.vae.decode(model.vae.encode(truth[0].to(model.device))).clamp(-1, 1).cpu()
            )
        figures[f"accuracy_{name}_vae_alone"] = critic.accuracy(
            rebuilt, truth[1]
        )  # no model can beat its VAE
    return figures, torch.stack(shown[0]), shown[1], shown[2]


def quickstart(out: Path, seed: int = 0, device: str = "cpu", resume: bool = False) -> dict:
    """Train, draw, judge, and leave everything in `out`; returns what results.json says."""
    started = time.perf_counter()
    if (out / "training").exists() and not resume:
        raise UserError(
            f"{out} holds a quickstart already; pass --resume to go on with it, or another --out."
        )
    world = World(SIZE, SHAPES, COLOURS)
    vae = train_vae(world, out / "training" / "vae", seed, device, resume)
    text = train_text(world, out / "training" / "text", seed, device, resume)
    model = train_model(world, vae, text, out / "training" / "model", seed, device, resume)
    wrote = [model.save(out / "model")]

    tqdm.write("4/4 the critic judges pictures of captions never trained on", file=sys.stderr)
    figures, pictures, captions, verdicts = judge(model, world, seed)
    wrote.append(
        plots.grid(
            pictures,
            captions,
            out / "samples.png",
            columns=8,
            title="held-out captions, judged by the critic",
            marks=verdicts,
        )
    )
    wrote += chains.plot_forward(
        world.batch(1, f"forward {seed}", objects=2)[0],
        model.schedule,
        out,
        torch.Generator().manual_seed(seed),
    )
    frames = list(model.sample(PROMPTS, generator=Normal.seeded(seed, range(len(PROMPTS)))))
    wrote += chains.plot_reverse(model, frames, PROMPTS, out)
    log = [
        json.loads(line)
        for line in (out / "training" / "model" / "log.jsonl")
        .read_text(encoding="utf-8")
        .splitlines()
    ]
    wrote.append(plots.loss(log, out / "loss.png"))

    results = {
        "minutes": round((time.perf_counter() - started) / 60, 2),
        "resumed": resume,
        "seed": seed,
        **figures,
        "captions_each": CAPTIONS,
        "peak_memory_gb": peak_memory_gb(),
        "pictures_seen": {
            "vae": VAE_STEPS * VAE_BATCH,
            "model": PARTS * (SMALL_STEPS * SMALL_BATCH + (STEPS - SMALL_STEPS) * BATCH),
        },
        "prompts": PROMPTS,
    }
    for path in [*wrote, write_results(out, **results)]:
        print(path)
    print(
        f"{results['minutes']:.1f} minutes; all attributes right on held-out captions: one object {figures['accuracy_one_object']:.2f}, "
        f"two objects {figures['accuracy_two_objects']:.2f}; with shuffled captions {figures['accuracy_one_object_shuffled_captions']:.2f}"
    )
    print(
        f'now draw your own: minidiff generate "{PROMPTS[0]}" --model {out / "model"} --n 4 --seed 7'
    )
    return results
