"""The quickstart: a text-to-image latent diffusion model trained from nothing on the built-in world, on two CPU cores, in minutes.

Three acts: a VAE learns to squeeze pictures, a text tower and a U-Net learn to denoise its latents, and the critic counts how often
pictures show what held-out captions say. Every number of the recipe stands in this file.
"""
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from minidiff import chains, evaluate, plots, schedules
from minidiff.clip import CLIPText
from minidiff.data import critic
from minidiff.data.world import World
from minidiff.denoiser import Denoiser
from minidiff.errors import UserError
from minidiff.latent_diffusion import LatentDiffusion
from minidiff.train import EMA, TrainStep, train
from minidiff.unet import UNet
from minidiff.vae import VAE

SIZE = 32  # pixels; the world's default of 64 would cost four times the VAE
SHAPES = ("circle", "square", "triangle", "cross", "ring")  # the part of the world that ten minutes suffice for
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple")
VAE_STEPS, VAE_BATCH, VAE_LR = 900, 32, 3e-3
STEPS, BATCH, LR = 2200, 16, 1e-3
TWO_OBJECTS = 0.85  # of the pictures, once the first third of the steps has taught single objects
CAPTIONS = 200  # held-out captions behind each accuracy
PROMPTS = [
    "a small blue circle above a large red square",
    "a large yellow cross on a black background",
    "a large green ring to the left of a small purple triangle",
    "a small orange circle below a large blue triangle on pink",
]


def vae_quickstart() -> VAE:
    """32x32x3 pictures to 16x16x4 latents."""
    return VAE(3, 4, channels=(16, 32), blocks=1, groups=0)


def text_quickstart() -> CLIPText:
    """CLIP's transformer, small; the world's captions fit in 32 tokens."""
    return CLIPText(width=128, layers=2, heads=4, context_length=32)


def unet_quickstart() -> UNet:
    """Four levels, 16x16 to 2x2; attention at 8x8 and 4x4, and in the middle."""
    return UNet(4, 4, channels=(48, 96, 128, 128), blocks=1, depth=(0, 1, 1, 0), heads=(2, 3, 4, 4), context_dim=128, pooled=True, groups=16)


Batch = tuple[Float[Tensor, "B 3 H W"], list[str]]


def batches(world: World, size: int, key: str, start: int, two_objects: Callable[[int], float]) -> Iterator[Batch]:
    """Batches start, start + 1, ... of the endless world; each follows from (key, its number) alone."""
    for k in count(start):
        pictures, captions, _ = world.batch(size, (key, k), two_objects=two_objects(k))
        yield pictures.contiguous(memory_format=torch.channels_last), captions


def crops(pictures: Float[Tensor, "B 3 H W"], count: int, side: int = 16, stride: int = 8) -> Float[Tensor, "N 3 h w"]:
    """The `count` liveliest windows of a batch. A network of convolutions learns edges from them as from whole pictures, and flat
    background is most of every picture."""
    windows = pictures.unfold(2, side, stride).unfold(3, side, stride).permute(0, 2, 3, 1, 4, 5).flatten(0, 2)
    return windows[windows.flatten(2).std(2).mean(1).topk(count).indices].contiguous(memory_format=torch.channels_last)


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
        lambda batch: (vae.loss(crops(batch[0], 2 * VAE_BATCH).to(device)), None),
        vae,
        lambda start: batches(world, VAE_BATCH, f"vae {seed}", start, lambda k: TWO_OBJECTS),
        VAE_STEPS,
        VAE_LR,
        seed=seed,
        folder=folder,
        resume=resume,
    )
    watched(loop, VAE_STEPS, "1/3 a VAE learns to squeeze pictures")
    vae.measure_scale(world.batch(256, f"scale {seed}", two_objects=TWO_OBJECTS)[0].to(device))
    return vae.requires_grad_(False).eval()


def train_model(world: World, vae: VAE, folder: Path, seed: int, device: str, resume: bool) -> LatentDiffusion:
    """Act two: a text tower and a U-Net, together, on latents. Returns the average of the weights."""
    torch.manual_seed(seed + 1)
    denoiser = Denoiser(unet_quickstart(), schedules.cosine(), target="v", weighting="x0")
    model = LatentDiffusion(vae, text_quickstart(), denoiser, SIZE, guidance=3.0).to(device, memory_format=torch.channels_last)
    ema = EMA(model, decay=0.998)

    def loss(batch: tuple[Tensor, list[str]]) -> tuple[Tensor, Tensor]:
        pictures, captions = batch
        t = model.schedule.sample_t(len(captions))
        return model.loss(pictures.to(device), captions, t), model.schedule.progress(t)

    loop = train(
        loss,
        model,
        lambda start: batches(world, BATCH, f"model {seed}", start, lambda k: TWO_OBJECTS * (k >= STEPS // 3)),
        STEPS,
        LR,
        ema=ema,
        seed=seed,
        folder=folder,
        resume=resume,
    )
    watched(loop, STEPS, "2/3 a U-Net learns to denoise latents")
    return ema.average


def judge(model: LatentDiffusion, world: World, seed: int) -> tuple[dict, Float[Tensor, "N 3 H W"], list[str], list[bool]]:
    """Act three: the critic on held-out captions. Returns figures, and a few pictures with captions and verdicts."""
    figures, shown = {}, ([], [], [])
    for objects, name in ((1, "one_object"), (2, "two_objects")):
        captions = evaluate.held_out(world, CAPTIONS, objects, seed)
        accuracy, pictures, verdicts = evaluate.caption_accuracy(model, captions, seed=seed)
        figures[f"accuracy_{name}"] = accuracy
        figures[f"mistakes_{name}"] = evaluate.mistakes(pictures, captions)
        figures[f"accuracy_{name}_shuffled_captions"] = critic.accuracy(pictures, evaluate.shuffled(captions))
        for some, values in zip(shown, (list(pictures[:12]), captions[:12], verdicts[:12]), strict=True):
            some.extend(values)
        truth = world.batch(CAPTIONS, f"truth {seed}", objects=objects, split="held-out", full=True)
        with torch.no_grad():
            rebuilt = model.vae.decode(model.vae.encode(truth[0].to(model.device))).clamp(-1, 1).cpu()
        figures[f"accuracy_{name}_vae_alone"] = critic.accuracy(rebuilt, truth[1])  # no model can beat its VAE
    return figures, torch.stack(shown[0]), shown[1], shown[2]


def quickstart(out: Path, seed: int = 0, device: str = "cpu", resume: bool = False) -> dict:
    """Train, draw, judge, and leave everything in `out`; returns what results.json says."""
    started = time.perf_counter()
    if (out / "training").exists() and not resume:
        raise UserError(f"{out} holds a quickstart already; pass --resume to go on with it, or another --out.")
    world = World(SIZE, SHAPES, COLOURS)
    vae = train_vae(world, out / "training" / "vae", seed, device, resume)
    model = train_model(world, vae, out / "training" / "model", seed, device, resume)
    wrote = [model.save(out / "model")]

    tqdm.write("3/3 the critic judges pictures of captions never trained on", file=sys.stderr)
    figures, pictures, captions, verdicts = judge(model, world, seed)
    wrote.append(plots.grid(pictures, captions, out / "samples.png", columns=8, title="held-out captions, judged by the critic", marks=verdicts))
    wrote += chains.plot_forward(world.batch(1, f"forward {seed}", objects=2)[0], model.schedule, out, torch.Generator().manual_seed(seed))
    frames = list(model.sample(PROMPTS, generator=torch.Generator().manual_seed(seed)))
    wrote += chains.plot_reverse(model, frames, PROMPTS, out)
    log = [json.loads(line) for line in (out / "training" / "model" / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    wrote.append(plots.loss(log, out / "loss.png"))

    results = {
        "minutes": round((time.perf_counter() - started) / 60, 2),
        "resumed": resume,
        "seed": seed,
        **figures,
        "captions_each": CAPTIONS,
        "peak_memory_gb": peak_memory_gb(),
        "pictures_seen": {"vae": VAE_STEPS * VAE_BATCH, "model": STEPS * BATCH},
        "prompts": PROMPTS,
    }
    (out / "results.json.new").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    os.replace(out / "results.json.new", out / "results.json")
    for path in [*wrote, out / "results.json"]:
        print(path)
    print(
        f"{results['minutes']:.1f} minutes; all attributes right on held-out captions: one object {figures['accuracy_one_object']:.2f}, "
        f"two objects {figures['accuracy_two_objects']:.2f}; with shuffled captions {figures['accuracy_one_object_shuffled_captions']:.2f}"
    )
    print(f'now draw your own: minidiff generate "{PROMPTS[0]}" --model {out / "model"} --n 4 --seed 7')
    return results


def peak_memory_gb() -> float:
    """The most memory this process has held."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (2**30 if sys.platform == "darwin" else 2**20), 2)  # macOS counts bytes, Linux kilobytes
