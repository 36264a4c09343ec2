"""The quickstart: a text-to-image latent diffusion model trained from nothing on the built-in
world, on two CPU cores, in minutes.

Four acts: a VAE learns to compress images, a text encoder learns to read captions, a U-Net learns
to denoise latents with both frozen, and the critic counts how often images show what held-out
captions say. Every number of the recipe stands in this file.

[1] Kingma et al. Variational Diffusion Models. 2021. arXiv:2107.00630
[2] Esser et al. Scaling Rectified Flow Transformers for High-Resolution Image Synthesis. 2024.
    arXiv:2403.03206
"""

import random
import sys
import time
from collections.abc import Iterator
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm

from minidiff import schedules
from minidiff.checkpoints.folder import foreign
from minidiff.data import critic
from minidiff.data.world import World
from minidiff.denoiser import Denoiser
from minidiff.errors import UserError
from minidiff.evaluation import bench
from minidiff.figures import chains, plots
from minidiff.latent_diffusion import LatentDiffusion
from minidiff.recipes import reading
from minidiff.samplers import Normal
from minidiff.text import CLIPText, TextConfig
from minidiff.train import EMA, Loss, TrainConfig, train
from minidiff.training import atomic
from minidiff.training.progress import follow, peak_memory_gb, write_results
from minidiff.training.resume import read_log
from minidiff.training.seeds import generator_of
from minidiff.unet import UNet, UNetConfig
from minidiff.vae import VAE, VAEConfig

Images = Float[Tensor, "B 3 H W"]

SIZE = 32  # pixels; the world's default of 64 would cost four times the VAE
SHAPES = ("circle", "square", "triangle")  # the part of the world that ten minutes suffice for
COLOURS = ("red", "yellow", "green", "blue")
VAE_STEPS, VAE_BATCH, VAE_LR = 750, 32, 3e-3
TEXT_STEPS, TEXT_BATCH, TEXT_LR = 800, 128, 2e-3
STEPS, LR = 3600, 2e-3
PARTS = 2  # a step is PARTS batches, on as many cores at once
# the first steps see images of half the side: three times as many for the same work
SMALL_STEPS, SMALL_BATCH, BATCH = 1000, 48, 16
TWO_OBJECTS = 0.7  # the share of images that show two
POOL = 12_000  # images of two objects; half as many of one
T_CENTRE, T_SPREAD = 0.6, 0.85  # of logit(t / 1000)
GUIDANCE = 2.0
CAPTIONS = 200  # held-out captions behind each accuracy
# what is written beside the model
WRITTEN = (
    "samples.png forward.png forward.gif reverse.png reverse.gif loss.png results.json".split()
)
PROMPTS = [
    "a small blue circle above a large red square",
    "a large yellow triangle on a black background",
    "a large green circle to the left of a small yellow square",
    "a small red triangle below a large blue circle on pink",
]


def vae_quickstart() -> VAE:
    """32x32x3 images to 16x16x4 latents."""
    return VAE(VAEConfig(3, 4, channels=(16, 32), blocks=1, groups=0))


def text_quickstart() -> CLIPText:
    """CLIP's transformer, small; the world's captions fit in 32 tokens."""
    return CLIPText(TextConfig(width=64, layers=2, heads=2, context_length=32, words_only=True))


def unet_quickstart() -> UNet:
    """Four levels, 16x16 to 2x2, mostly convolutions; attention at 4x4 and in the middle."""
    levels = {"channels": (64, 64, 64, 64), "depth": (0, 0, 1, 0), "heads": (2, 2, 2, 2)}
    text = {"context_dim": 64, "pooled": True, "scale_shift": True}
    return UNet(UNetConfig(4, 4, blocks=1, ff_mult=2, groups=16, **levels, **text))


def batches(world: World, key: str, start: int) -> Iterator[Images]:
    """Batches start, start + 1, ... of images of the world; batch k follows from (key, k)."""
    for k in count(start):
        yield channels_last(world.batch(VAE_BATCH, (key, k), two_objects=TWO_OBJECTS)[0])


def crops(images: Images, count: int, side: int = 16, stride: int = 8) -> Float[Tensor, "N 3 h w"]:
    """The `count` windows of a batch with the most contrast: most of an image is background."""
    windows = images.unfold(2, side, stride).unfold(3, side, stride)
    windows = windows.permute(0, 2, 3, 1, 4, 5).flatten(0, 2)
    best = windows.flatten(2).std(2).mean(1).topk(count).indices
    return channels_last(windows[best])


def vae_loss(vae: VAE, images: Images) -> Loss:
    windows = crops(images, 2 * VAE_BATCH)
    return {"loss": vae.loss(windows.to(next(vae.parameters()).device))}


def train_vae(world: World, folder: Path, seed: int, device: str, resume: bool) -> VAE:
    """Act one: images to latents and back."""
    torch.manual_seed(seed)
    vae = vae_quickstart().to(device, memory_format=torch.channels_last)
    data = partial(batches, world, f"vae {seed}")
    config = TrainConfig(VAE_STEPS, VAE_LR, seed=seed)
    loop = train(partial(vae_loss, vae), vae, data, config, folder=folder, resume=resume)
    follow(loop, "1/4 a VAE learns to compress images", VAE_STEPS)
    vae.measure_scale(world.batch(256, f"scale {seed}", two_objects=TWO_OBJECTS)[0].to(device))
    return vae.requires_grad_(False).eval()


def train_text(world: World, folder: Path, seed: int, device: str, resume: bool) -> CLIPText:
    """Act two: the text encoder learns to read (reading.py), then stays as it is."""
    torch.manual_seed(seed)
    text = text_quickstart()
    codes = reading.codes(world, text.dim)
    data = partial(reading.lessons, world, codes, TEXT_BATCH // PARTS, TWO_OBJECTS, seed)
    loss, config = partial(reading.loss, text.to(device)), parallel(TEXT_STEPS, TEXT_LR, seed)
    loop = train(loss, text, data, config, folder=folder, resume=resume)
    follow(loop, "2/4 a text encoder learns to read captions", TEXT_STEPS)
    return text.requires_grad_(False).eval()


def parallel(steps: int, lr: float, seed: int) -> TrainConfig:
    """A step is PARTS batches, on as many cores at once as there are."""
    threads = min(PARTS, torch.get_num_threads())
    return TrainConfig(steps, lr, accumulate=PARTS, threads=threads, seed=seed)


class Pool:
    """Latents of scenes, at the full and at half the side; each is trained on many times."""

    def __init__(self, world: World, vae: VAE, size: int, seed: str, objects: int, device: str):
        latents, small, self.scenes, batch = [], [], [], 64
        for k in range(-(-size // batch)):
            images, _, scenes = world.batch(batch, (seed, objects, k), objects=objects)
            images = images.to(device)
            with torch.no_grad():
                latents.append(vae.encode(channels_last(images)))
                small.append(vae.encode(channels_last(F.avg_pool2d(images, 2))))
            self.scenes += scenes
        self.latents, self.small = torch.cat(latents), torch.cat(small)


def channels_last(images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
    return images.contiguous(memory_format=torch.channels_last)


def noise_levels(
    n: int, generator: torch.Generator, centre: float = T_CENTRE, spread: float = T_SPREAD
) -> Int[Tensor, "B"]:
    """t of n examples, stratified ([1] appendix I.1): logit-normal ([2] section 3.1), one in four
    uniform."""
    u = (torch.arange(n) + torch.rand(n, generator=generator)) / n
    t = torch.sigmoid(centre + spread * torch.special.ndtri(u.double().clamp(1e-6, 1 - 1e-6)))
    uniform = torch.rand(n, generator=generator) < 1 / 4
    return (1000 * torch.where(uniform, u, t)).ceil().long().clamp(1, 1000)


class LatentBatch(NamedTuple):
    """A training batch, with all that is random about it."""

    latents: Float[Tensor, "B Z h w"]
    captions: list[str]
    t: Int[Tensor, "B"]
    eps: Float[Tensor, "B Z h w"]


def latent_batches(
    world: World, one: Pool, two: Pool, seed: int, dropout: float, start: int
) -> Iterator[LatentBatch]:
    """Batches start, start + 1, ... of the endless stream, small images first."""
    for k in count(start):
        generator = generator_of(seed, k)
        rng, small = random.Random(f"{seed} {k}"), k < SMALL_STEPS * PARTS
        latents, captions = [], []
        for _ in range(SMALL_BATCH if small else BATCH):
            pool = two if rng.random() < TWO_OBJECTS else one
            i = rng.randrange(len(pool.scenes))
            latents.append((pool.small if small else pool.latents)[i])
            captions.append("" if rng.random() < dropout else world.caption(pool.scenes[i], rng))
        x0 = channels_last(torch.stack(latents))
        t = noise_levels(len(x0), generator)
        yield LatentBatch(x0, captions, t, torch.randn(x0.shape, generator=generator).to(x0.device))


def model_loss(model: LatentDiffusion, batch: LatentBatch) -> Loss:
    """The denoiser's loss of each example, and where its t lies."""
    context = model.text.encode(batch.captions)
    each = model.denoiser.loss(batch.latents, context, batch.t, batch.eps)
    return {"loss": each, "progress": model.schedule.progress(batch.t)}


def train_model(
    world: World, vae: VAE, text: CLIPText, folder: Path, seed: int, device: str, resume: bool
) -> LatentDiffusion:
    """Act three: a U-Net, on latents. Returns the average of the weights."""
    torch.manual_seed(seed + 1)
    denoiser = Denoiser(unet_quickstart(), schedules.cosine(), target="x0", weighting="learned")
    model = LatentDiffusion(vae, text, denoiser, SIZE, guidance=GUIDANCE, sampler="ddpm")
    model.to(device, memory_format=torch.channels_last)
    ema = EMA(model, decay=0.998)
    one = Pool(world, vae, POOL // 2, f"model {seed}", 1, device)
    two = Pool(world, vae, POOL, f"model {seed}", 2, device)
    data = partial(latent_batches, world, one, two, seed, model.dropout)
    config = parallel(STEPS, LR, seed)
    loop = train(partial(model_loss, model), model, data, config, ema, folder, resume)
    follow(loop, "3/4 a U-Net learns to denoise latents", STEPS)
    return ema.average


class Examples(NamedTuple):
    """Images of held-out captions, and whether the critic accepts each."""

    images: list[Tensor]
    captions: list[str]
    verdicts: list[bool]


def judge(
    model: LatentDiffusion, world: World, seed: int, count: int = CAPTIONS
) -> tuple[dict[str, Any], Examples]:
    """Act four: the critic judges. Returns figures, and the first twelve images of each kind."""
    figures, examples = {}, Examples([], [], [])
    for objects, kind in ((1, "one_object"), (2, "two_objects")):
        captions = bench.held_out(world, count, objects, seed)
        accuracy, images, verdicts = bench.caption_accuracy(model, captions, seed=seed)
        figures[f"accuracy_{kind}"] = accuracy
        figures[f"mistakes_{kind}"] = bench.mistakes(images, captions)
        shuffled = bench.shuffled(captions)
        figures[f"accuracy_{kind}_shuffled_captions"] = critic.accuracy(images, shuffled)
        for some, values in zip(examples, (images, captions, verdicts), strict=True):
            some.extend(values[:12])
        truth = world.batch(count, f"truth {seed}", objects=objects, split="held-out", full=True)
        with torch.no_grad():
            rebuilt = model.vae.decode(model.vae.encode(truth[0].to(model.device)))
        alone = critic.accuracy(rebuilt.clamp(-1, 1).cpu(), truth[1])
        figures[f"accuracy_{kind}_vae_alone"] = alone  # no model can beat its VAE
    return figures, examples


def check_folder(out: Path, resume: bool) -> None:
    """Raise a UserError rather than continue by mistake or overwrite other files."""
    atomic.clean(out)
    trained, drawn = (out / "training").exists(), (out / "model").exists()
    if (trained or drawn) and not resume:
        raise UserError(f"{out} holds a quickstart already; `resume` it, or choose another `out`.")
    if drawn and not trained:
        raise UserError(f"{out / 'model'} has no training to go on with; choose another `out`.")
    for name in WRITTEN:
        atomic.check(out / name, atomic.unsigned)
    atomic.check(out / "model", foreign)


def quickstart(
    out: Path, seed: int = 0, device: str = "cpu", resume: bool = False
) -> dict[str, Any]:
    """Train, draw, judge, and leave everything in `out`; returns what results.json says."""
    started = time.perf_counter()
    check_folder(out, resume)
    world, training = World(SIZE, SHAPES, COLOURS), out / "training"
    vae = train_vae(world, training / "vae", seed, device, resume)
    text = train_text(world, training / "text", seed, device, resume)
    model = train_model(world, vae, text, training / "model", seed, device, resume)
    paths = [model.save(out / "model")]

    tqdm.write("4/4 the critic judges images of captions never trained on", file=sys.stderr)
    figures, examples = judge(model, world, seed)
    paths += draw_figures(model, world, examples, seed, out)
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
    print(*paths, write_results(out, **results), sep="\n")
    print(
        f"{results['minutes']:.1f} minutes; all attributes right on held-out captions: "
        f"one object {figures['accuracy_one_object']:.2f}, "
        f"two objects {figures['accuracy_two_objects']:.2f}; "
        f"with shuffled captions {figures['accuracy_one_object_shuffled_captions']:.2f}"
    )
    command = f'minidiff generate "{PROMPTS[0]}" --model {out / "model"} --n 4 --seed 7'
    print(f"now draw your own: {command}")
    return results


def draw_figures(
    model: LatentDiffusion, world: World, examples: Examples, seed: int, out: Path
) -> list[Path]:
    """The judged images, both chains, and the loss."""
    paths = [judged_grid(examples, out / "samples.png")]
    x0 = world.batch(1, f"forward {seed}", objects=2)[0]
    paths += chains.plot_forward(x0, model.schedule, out, torch.Generator().manual_seed(seed))
    noise = Normal.seeded(seed, range(len(PROMPTS)))
    frames = list(model.sample(PROMPTS, generator=noise))
    paths += chains.plot_reverse(model, frames, PROMPTS, out)
    return [*paths, plots.loss(read_log(out / "training" / "model"), out / "loss.png")]


def judged_grid(examples: Examples, path: Path) -> Path:
    title, images = "held-out captions, judged by the critic", torch.stack(examples.images)
    return plots.grid(images, examples.captions, path, 8, title, examples.verdicts)
