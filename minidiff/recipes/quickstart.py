"""The quickstart: a text-to-image latent diffusion model trained from nothing on the built-in
world, on a laptop's CPU, in minutes.

Four acts: a VAE learns to compress images, a text encoder learns to read captions, a U-Net learns
to denoise latents with both frozen, and the critic counts how often images show what held-out
captions say. Every number of the recipe stands in this file. How long it takes is measured first
(plan.py), and it can be watched (live.py).

[1] Kingma et al. Variational Diffusion Models. 2021. arXiv:2107.00630
[2] Esser et al. Scaling Rectified Flow Transformers for High-Resolution Image Synthesis. 2024.
    arXiv:2403.03206
"""

import random
import shlex
import sys
import time
from collections.abc import Iterator
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm

from minidiff import schedules
from minidiff.checkpoints.folder import foreign
from minidiff.data.world import World
from minidiff.denoiser import Denoiser
from minidiff.errors import UserError
from minidiff.figures import chains, plots
from minidiff.latent_diffusion import LatentDiffusion
from minidiff.recipes import judging, reading
from minidiff.recipes import plan as plans
from minidiff.recipes.judging import Examples, drawing, judge, judged_grid
from minidiff.recipes.live import Drawing, Live, rebuilt
from minidiff.recipes.plan import Act, Cost, Plan, cost
from minidiff.samplers import Normal
from minidiff.text import CLIPText, TextConfig
from minidiff.train import EMA, Loss, TrainConfig
from minidiff.training import atomic
from minidiff.training.progress import peak_memory_gb, write_results
from minidiff.training.resume import read_log
from minidiff.training.seeds import generator_of
from minidiff.unet import UNet, UNetConfig
from minidiff.vae import VAE, VAEConfig

Images = Float[Tensor, "B 3 H W"]

SIZE = 32  # pixels; the world's default of 64 would cost four times the VAE
SHAPES = ("circle", "square", "triangle")  # the part of the world that ten minutes suffice for
COLOURS = ("red", "yellow", "green", "blue")
VAE_STEPS, VAE_BATCH, VAE_LR = 1000, 32, 4e-3
TEXT_STEPS, TEXT_BATCH, TEXT_LR = 600, 128, 4e-3
STEPS, BATCH, LR = 1170, 32, 3e-3
PARTS = 2  # a step is PARTS batches, on as many cores at once
MOMENTUM = (0.95, 0.99)  # of Muon, and of Adam's square (training/muon.py)
TWO_OBJECTS = 0.62  # the share of images that show two
FULL = 0.85  # of the captions are made to say everything; the others leave things out by chance
POOL = 12_000  # images of two objects; half as many of one
T_CENTRE, T_SPREAD = -0.03, 1.1  # of logit(t / 1000)
GUIDANCE = 2.0
CAPTIONS = 200  # held-out captions behind each accuracy
DRAWN_STEPS = 10  # of sampling, for the page in between
ACTS = (
    "1/4 a VAE learns to compress images",
    "2/4 a text encoder learns to read captions",
    "3/4 a U-Net learns to denoise latents",
    "4/4 the critic judges images of captions never trained on",
)
# what is written beside the model
WRITTEN = (
    "samples.png forward.png forward.gif reverse.png reverse.gif loss.png index.html results.json"
).split()
PROMPTS = [
    "a small blue circle above a large red square",
    "a large yellow triangle on a black background",
    "a large green circle to the left of a small yellow square",
    "a small red triangle below a large blue circle on pink",
]


def vae_quickstart() -> VAE:
    """32x32x3 images to 8x8x4 latents."""
    return VAE(VAEConfig(3, 4, channels=(16, 32, 48), blocks=1, groups=0))


def text_quickstart() -> CLIPText:
    """CLIP's transformer, small; the world's captions fit in 32 tokens."""
    return CLIPText(TextConfig(width=64, layers=2, heads=2, context_length=32, words_only=True))


def unet_quickstart() -> UNet:
    """Three levels, 8x8 to 2x2, mostly convolutions; attention at 4x4 and in the middle."""
    levels = {"channels": (64, 64, 64), "depth": (0, 1, 0), "heads": (2, 2, 2)}
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


def vae_act(world: World, seed: int, device: str, steps: int) -> Act:
    """Act one: images to latents and back."""
    torch.manual_seed(seed)
    vae = vae_quickstart().to(device, memory_format=torch.channels_last)
    data = partial(batches, world, f"vae {seed}")
    config = TrainConfig(steps, VAE_LR, 50, optimizer="muon", betas=MOMENTUM, seed=seed)
    return Act(ACTS[0], vae, partial(vae_loss, vae), data, config)


def text_act(world: World, seed: int, device: str, steps: int) -> Act:
    """Act two: the text encoder learns to read (reading.py)."""
    torch.manual_seed(seed)
    text = text_quickstart()
    codes = reading.codes(world, text.dim)
    data = partial(reading.lessons, world, codes, TEXT_BATCH // PARTS, TWO_OBJECTS, seed)
    loss, config = partial(reading.loss, text.to(device)), parallel(steps, TEXT_LR, seed)
    return Act(ACTS[1], text, loss, data, config)


def model_act(
    world: World,
    vae: VAE,
    text: CLIPText,
    seed: int,
    device: str,
    steps: int,
    pool: int,
) -> Act:
    """Act three: a U-Net learns to denoise latents. pool: images of two objects."""
    torch.manual_seed(seed + 1)
    denoiser = Denoiser(unet_quickstart(), schedules.cosine(), target="x0", weighting="learned")
    model = LatentDiffusion(vae, text, denoiser, SIZE, guidance=GUIDANCE, sampler="ddpm")
    model.to(device, memory_format=torch.channels_last)
    one = Pool(world, vae, pool // 2, f"model {seed}", 1, device)
    two = Pool(world, vae, pool, f"model {seed}", 2, device)
    data = partial(latent_batches, world, one, two, seed, model.dropout)
    config = parallel(steps, LR, seed)
    ema = EMA(model, decay=0.998)
    return Act(ACTS[2], model, partial(model_loss, model), data, config, ema)


def parallel(steps: int, lr: float, seed: int) -> TrainConfig:
    """A step is PARTS batches, on as many cores at once as there are."""
    threads = min(PARTS, torch.get_num_threads())
    return TrainConfig(
        steps, lr, optimizer="muon", betas=MOMENTUM, accumulate=PARTS, threads=threads, seed=seed
    )


class Pool:
    """Latents of scenes, each trained on many times."""

    def __init__(self, world: World, vae: VAE, size: int, seed: str, objects: int, device: str):
        latents, self.scenes, batch = [], [], 64
        for k in range(-(-size // batch)):
            images, _, scenes = world.batch(batch, (seed, objects, k), objects=objects)
            with torch.no_grad():
                latents.append(vae.encode(channels_last(images.to(device))))
            self.scenes += scenes
        self.latents = torch.cat(latents)


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
    """Batches start, start + 1, ... of the endless stream."""
    for k in count(start):
        generator, rng = generator_of(seed, k), random.Random(f"{seed} {k}")
        latents, captions = [], []
        for _ in range(BATCH):
            pool = two if rng.random() < TWO_OBJECTS else one
            i = rng.randrange(len(pool.scenes))
            latents.append(pool.latents[i])
            caption = world.caption(pool.scenes[i], rng, full=rng.random() < FULL)
            captions.append("" if rng.random() < dropout else caption)
        x0 = channels_last(torch.stack(latents))
        t = noise_levels(len(x0), generator)
        yield LatentBatch(x0, captions, t, torch.randn(x0.shape, generator=generator).to(x0.device))


def model_loss(model: LatentDiffusion, batch: LatentBatch) -> Loss:
    """The denoiser's loss of each example, and where its t lies."""
    context = model.text.encode(batch.captions)
    each = model.denoiser.loss(batch.latents, context, batch.t, batch.eps)
    return {"loss": each, "progress": model.schedule.progress(batch.t)}


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


def measured(world: World, seed: int, device: str) -> tuple[list[Cost], Cost]:
    """What a step of each act costs on this machine, and the judging of one caption."""
    vae, text = vae_act(world, seed, device, VAE_STEPS), text_act(world, seed, device, TEXT_STEPS)
    costs = [cost(vae), cost(text)]
    frozen = vae.module.requires_grad_(False), text.module.requires_grad_(False)
    model = model_act(world, *frozen, seed, device, STEPS, pool=64)
    costs.append(cost(model))
    return costs, judging.cost(model.module.eval(), world, seed)


def quickstart(
    out: Path,
    seed: int = 0,
    device: str = "cpu",
    resume: bool = False,
    minutes: float | None = None,
) -> dict[str, Any]:
    """Train, draw, judge, and leave everything in `out`; returns what results.json says. minutes:
    take as many steps as fit into this time on this machine. Default: the recipe's."""
    started = time.perf_counter()
    check_folder(out, resume)
    world, training = World(SIZE, SHAPES, COLOURS), out / "training"
    costs, verdict = measured(world, seed, device)
    usual, rest = [VAE_STEPS, TEXT_STEPS, STEPS], 2 * CAPTIONS * verdict.seconds
    begun = resume and (training / "vae").exists()  # made after the plan
    plan = plans.of_run(training / "plan.json", usual, costs, rest, minutes, begun)
    times = [n * cost.seconds for n, cost in zip(plan.steps, costs, strict=True)]
    operations = sum(n * cost.flops for n, cost in zip(plan.steps, costs, strict=True))
    operations += 2 * CAPTIONS * verdict.flops
    told = (sum(times) + rest) / 60
    page = out / "index.html"
    tqdm.write(
        f"about {told:.0f} minutes on this machine, {operations / 1e12:.0f} TFLOP; "
        f"watch it learn in {page}",
        file=sys.stderr,
    )
    acts = dict(zip(ACTS, [*times, rest], strict=True))
    live = Live(page, "minidiff quickstart", acts)
    with live.running(f"minidiff quickstart --out {shlex.quote(str(out))} --seed {seed} --resume"):
        model = trained(world, training, plan, seed, device, resume, live)
        paths = [model.save(out / "model")]
        live.say(ACTS[3])
        figures, examples = judge(model, world, seed, CAPTIONS)
        paths += draw_figures(model, world, examples, seed, out)
        results = {
            "minutes": round((time.perf_counter() - started) / 60, 2),
            "minutes_told": round(told, 2),
            "tflop": round(operations / 1e12, 2),
            "steps": dict(zip(("vae", "text", "model"), plan.steps, strict=True)),
            "resumed": resume,
            "seed": seed,
            **figures,
            "captions_each": CAPTIONS,
            "peak_memory_gb": peak_memory_gb(),
            "pictures_seen": {
                "vae": plan.steps[0] * VAE_BATCH,
                "model": plan.steps[2] * PARTS * BATCH,
            },
            "prompts": PROMPTS,
        }
        folder = shlex.quote(str(out / "model"))
        command = f'minidiff generate "{PROMPTS[0]}" --model {folder} --n 4 --seed 7'
        live.notes = judging.notes(figures)
        live.drawing = Drawing(examples.images, examples.captions, examples.verdicts)
        live.write(f"done in {results['minutes']:.1f} minutes", command, done=True)
    print(*paths, page, write_results(out, **results), sep="\n")
    print(
        f"{results['minutes']:.1f} minutes; all attributes right on held-out captions: "
        f"one object {figures['accuracy_one_object']:.2f}, "
        f"two objects {figures['accuracy_two_objects']:.2f}; "
        f"with shuffled captions {figures['accuracy_one_object_shuffled_captions']:.2f}"
    )
    print(f"now draw your own: {command}")
    return results


def trained(
    world: World, training: Path, plan: Plan, seed: int, device: str, resume: bool, live: Live
) -> LatentDiffusion:
    """Acts one to three. Returns the model with the average of the U-Net's weights."""
    act = vae_act(world, seed, device, plan.steps[0])
    vae, images = act.module, world.batch(4, f"shown {seed}", split="held-out")[0]
    live.follow(act, training / "vae", resume, partial(rebuilt, vae, images))
    scaled = world.batch(256, f"scale {seed}", two_objects=TWO_OBJECTS)[0]
    vae.requires_grad_(False).eval().measure_scale(scaled.to(device))

    act = text_act(world, seed, device, plan.steps[1])
    text = act.module
    live.follow(act, training / "text", resume)
    text.requires_grad_(False).eval()

    act = model_act(world, vae, text, seed, device, plan.steps[2], POOL)
    average = act.ema.average
    draw = partial(drawing, average, PROMPTS, DRAWN_STEPS, seed)
    live.follow(act, training / "model", resume, draw)
    return average


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
