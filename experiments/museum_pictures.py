"""What the bug museum draws: every function gives one picture, in which a bug of museum.py shows.

They call the library as a user would, and know nothing of bugs. Most draw with the model in the
box. Where a bug strikes in training, a small model is trained; where the box cannot show it, the
exact denoiser of a few images takes its place.
"""

import io
import random
import tempfile
import warnings
from collections.abc import Iterator
from functools import cache, partial
from itertools import count
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn
from toy_2d import MLP, moons

import minidiff
from minidiff import pipeline, schedules
from minidiff.cli.generate import mask_of
from minidiff.conditioners import ClassLabels, LabelsConfig
from minidiff.data import folder
from minidiff.data.world import World
from minidiff.ddpm import DDPM
from minidiff.denoiser import Denoiser
from minidiff.figures.curves import COLOURS, new_figure, style
from minidiff.latent_diffusion import LatentDiffusion
from minidiff.methods import lora
from minidiff.methods.editing import Edit
from minidiff.methods.exact import Mixture
from minidiff.options.sampling import SampleConfig
from minidiff.recipes import quickstart
from minidiff.schedules import per_example
from minidiff.text import quick_gelu
from minidiff.train import EMA, TrainConfig, train
from minidiff.training.seeds import generator_of
from minidiff.vae import Pixels, PixelsConfig

Images, Picture = Float[Tensor, "4 3 32 32"], Float[Tensor, "3 264 264"]
Batch = tuple[Float[Tensor, "B Z h w"], list[str]]
SIDE, TILE = 264, 128
PROMPTS = (
    "a large red circle on a white background",
    "a small blue square above a large green triangle",
    "a large yellow triangle on a black background",
    "a small green circle to the left of a large red square",
)
HEARTS = ("a large orange heart", "a small orange heart", *PROMPTS[1:3])
SEED = 4


def tiled(images: Images) -> Picture:
    """Four images as one picture. What is not a number is black, as in an image file."""
    images = images.nan_to_num(-1).clamp(-1, 1)
    large = images.repeat_interleave(TILE // 32, 2).repeat_interleave(TILE // 32, 3)
    picture = torch.ones(3, SIDE, SIDE)
    for k, image in enumerate(large):
        top, left = (SIDE - TILE) * (k // 2), (SIDE - TILE) * (k % 2)
        picture[:, top : top + TILE, left : left + TILE] = image
    return picture


def rendered(figure) -> Picture:
    """A matplotlib figure of 2x2 inches as a picture."""
    data = io.BytesIO()
    figure.savefig(data, dpi=SIDE / 2)
    return folder.to_model(folder.load_image(data))


# The model in the box.


@cache
def box() -> LatentDiffusion:
    return minidiff.load()


def drawn(
    model: LatentDiffusion, prompts: tuple[str, ...] = PROMPTS, config: SampleConfig | None = None
) -> Picture:
    config = config or SampleConfig(seed=SEED)
    return tiled(pipeline.generate(model, list(prompts), config))


def samples() -> Picture:
    return drawn(box())


def few_steps() -> Picture:
    """In 8 steps, so that the last one has much noise to remove."""
    return drawn(box(), config=SampleConfig(8, seed=SEED))


def one_seed() -> Picture:
    """One prompt and one seed, four times."""
    images = [pipeline.generate(box(), [PROMPTS[1]], SampleConfig(seed=SEED)) for _ in range(4)]
    return tiled(torch.cat(images))


class PredictsV(nn.Module):
    """The box's network, which gives x0, as one that gives v = alpha eps - sigma x0."""

    def __init__(self, model: LatentDiffusion):
        super().__init__()
        self.network, self.schedule = model.unet, model.schedule
        self.config, self.context_dim = model.unet.config, model.unet.context_dim

    def forward(
        self, x: Float[Tensor, "B Z h w"], t: Tensor, context: Tensor
    ) -> Float[Tensor, "B Z h w"]:
        alpha, sigma = self.schedule.alpha_sigma(t + 1)  # t is c_noise here
        x0 = self.network(x, t, context)
        return per_example(alpha / sigma, x) * x - per_example(1 / sigma, x) * x0


def predicts_v() -> Picture:
    """A model that was trained to predict v."""
    denoiser = Denoiser(PredictsV(box()), box().schedule, "v")
    return drawn(LatentDiffusion(box().vae, box().text, denoiser, 32, guidance=2, sampler="ddpm"))


def large_activations() -> Picture:
    """The box, with numbers as large as in SDXL's VAE: v of the decoder's attention is 2^18 times
    as large, and the weights that follow as much smaller, so that it computes the same."""
    model = minidiff.load()
    attention = model.vae.decoder.middle.attention
    for weight in (attention.v.weight, attention.v.bias):
        weight.data *= 2**18
    attention.out.weight.data /= 2**18
    return drawn(model)


# Images of the built-in world.


@cache
def scenes() -> Images:
    rng, world = random.Random(6), World(32, quickstart.SHAPES, quickstart.COLOURS)
    return world.draw([world.scene(rng, objects=1) for _ in range(4)], rng)


def files() -> list[io.BytesIO]:
    """The scenes as PNG files."""
    pngs = [io.BytesIO() for _ in range(4)]
    for image, png in zip(scenes(), pngs, strict=True):
        pixels = ((image + 1) * 127.5).round().byte().permute(1, 2, 0)
        Image.fromarray(pixels.numpy()).save(png, "PNG")
    return pngs


def loaded() -> Picture:
    """Files as they are read."""
    return tiled(torch.stack([folder.load_image(file) for file in files()]) / 127.5 - 1)


@torch.no_grad()
def through_vae() -> Picture:
    """Files read, encoded and decoded."""
    images = folder.to_model(torch.stack([folder.load_image(file) for file in files()]))
    return tiled(box().vae.decode(box().vae.encode(images)))


def inpainted() -> Picture:
    """A blue circle drawn inside a mask, whose file has white strokes on a transparent layer."""
    strokes = Image.new("RGBA", (32, 32), (255, 255, 255, 0))
    strokes.paste((255, 255, 255, 255), (0, 0, 32, 14))  # the upper part
    with tempfile.TemporaryDirectory() as out, warnings.catch_warnings(action="ignore"):
        strokes.save(Path(out, "mask.png"))
        mask = mask_of(Path(out, "mask.png"), 32, 32)
    edits = [Edit(image[None], mask=mask) for image in scenes()]
    prompt, config = ["a small blue circle"], SampleConfig(seed=SEED)
    return tiled(torch.cat([pipeline.generate(box(), prompt, config, edit=e) for e in edits]))


# ddpm.py itself.


def noised() -> Picture:
    """Images after 300 of the 1000 steps of the forward chain, one after another."""
    chain, x, generator = DDPM(), scenes(), torch.Generator().manual_seed(0)
    for time in range(1, 301):
        eps = torch.randn(x.shape, generator=generator)
        x = chain.q_step(x, torch.full((4,), time), eps)
    return tiled(x)


def reverse_chain() -> Picture:
    """The reverse chain of 50 steps, with the exact denoiser of four images."""
    chain, generator = DDPM(T=50, beta_1=0.002, beta_T=0.35), torch.Generator().manual_seed(7)
    schedule = schedules.Discrete(tuple(chain.beta[1:].tolist()), T=50)
    denoise = Mixture(scenes()).denoiser(schedule)
    x_T = torch.randn(4, 3, 32, 32, generator=generator)
    *_, x0 = chain.p_sample_loop(lambda x, t: denoise(x, t).eps, x_T, generator)
    return tiled(x0)


# Curves.


def activation() -> Picture:
    """How far CLIP's activation is from the exact gelu."""
    x = torch.linspace(-5, 5, 501)
    with style():
        figure, (axis,) = new_figure(1, 2, 2)
        axis.plot(x, quick_gelu(x) - nn.functional.gelu(x))
        axis.set(title="activation - gelu(x)", xlabel="x", ylim=(-0.025, 0.025))
        return rendered(figure)


class Zero(nn.Module):
    """A network that predicts 0."""

    def forward(self, x: Tensor, t: Tensor, context: None) -> Tensor:
        return torch.zeros_like(x)


def min_snr_weights() -> Picture:
    """What an error of 1 in v counts at each t under min-SNR."""
    schedule, t = schedules.cosine(), torch.arange(1, 1000)
    alpha = schedule.alpha_sigma(t)[0][:, None]
    denoiser = Denoiser(Zero(), schedule, "v", "min-snr")
    loss = denoiser.loss(torch.zeros_like(alpha), t=t, eps=1 / alpha)  # so that v is 1
    with style():
        figure, (axis,) = new_figure(1, 2, 2)
        axis.plot(t / 1000, loss)
        axis.set(title="weight of the error of v", xlabel="t", ylim=(0, 1.05))
        return rendered(figure)


# Small trainings.


class Channels(NamedTuple):
    """What LatentDiffusion asks of a network's config."""

    in_channels: int = 4
    out_channels: int = 4


class Points(nn.Module):
    """toy_2d's network for points of two classes: x is the first of four channels, y the last."""

    config, context_dim = Channels(), 2

    def __init__(self):
        super().__init__()
        self.mlp = MLP(64)

    def forward(
        self, x: Float[Tensor, "B 4 1 1"], t: Tensor, context: Float[Tensor, "B 1 2"]
    ) -> Float[Tensor, "B 4 1 1"]:
        out = torch.zeros_like(x)
        out[:, ::3, 0, 0] = self.mlp(x[:, ::3, 0, 0] + 3 * context[:, 0], t)
        return out


def moons_from(start: int) -> Iterator[Batch]:
    """Batches of points of two moons, each a class."""
    for k in count(start):
        generator = generator_of(0, k)
        u = torch.rand(256, generator=generator, dtype=torch.float64)
        x = 1.3 * (moons(u) - torch.tensor([0.5, 0.25]))
        x = x + 0.08 * torch.randn(x.shape, generator=generator)
        latents = torch.zeros(256, 4, 1, 1)
        latents[:, ::3, 0, 0] = x.float()
        yield latents, ["lower" if lower else "upper" for lower in u > 0.5]


def latent_loss(model: LatentDiffusion, batch: Batch) -> dict[str, Tensor]:
    latents, captions = batch
    t = model.schedule.sample_t(len(latents))
    loss = model.latent_loss(latents, captions, t)
    return {"loss": loss, "progress": model.schedule.progress(t)}


def guided_points(guidance: float = 2.0, steps: int = 400) -> Picture:
    """Two moons, each a class, learnt in 400 steps, and drawn with guidance by the average."""
    torch.manual_seed(0)
    text = ClassLabels(LabelsConfig(("upper", "lower"), 2))
    denoiser = Denoiser(Points(), schedules.cosine(), "v")
    model = LatentDiffusion(Pixels(PixelsConfig(4)), text, denoiser, 1)
    ema, config = EMA(model, 0.99), TrainConfig(steps, lr=4e-3, warmup=20)
    for _ in train(partial(latent_loss, model), model, moons_from, config, ema):
        pass

    names = ["upper"] * 300 + ["lower"] * 300
    *_, last = ema.average.sample(names, 30, guidance, torch.Generator().manual_seed(0))
    x = last.x[:, ::3, 0, 0].clamp(-3.4, 3.4)
    with style():
        figure, (axis,) = new_figure(1, 2, 2)
        for half, colour in zip(x.chunk(2), COLOURS, strict=False):
            axis.scatter(*half.T, s=2, color=colour)
        axis.set(xlim=(-3.5, 3.5), ylim=(-3.5, 3.5), xticks=[], yticks=[])
        axis.set(xlabel="channel 1", ylabel="channel 4")
        return rendered(figure)


def strongly_guided_points() -> Picture:
    return guided_points(3.0)


def hearts_from(model: LatentDiffusion, start: int) -> Iterator[Batch]:
    """Batches of orange hearts, of which the box knows neither the shape nor the colour."""
    world = World(32, ("heart",), ("orange",))
    for k in count(start):
        rng = random.Random(k)
        batch = [world.scene(rng, objects=1, split=None) for _ in range(16)]
        with torch.no_grad():
            latents = model.vae.encode(world.draw(batch, rng))
        yield latents, [world.caption(scene, rng) for scene in batch]


@cache
def with_lora(steps: int = 60) -> LatentDiffusion:
    """The box with a LoRA of rank 8 and alpha 1, trained on orange hearts for 60 steps."""
    model = minidiff.load()
    torch.manual_seed(0)
    layers = ("conv1", "conv2", *lora.ATTENTION)
    lora.add(model.unet, rank=8, alpha=1.0, targets=layers)
    model.text.requires_grad_(False)
    model.vae.requires_grad_(False)
    config, batches = TrainConfig(steps, lr=2e-2, warmup=10), partial(hearts_from, model)
    for _ in train(partial(latent_loss, model), model, batches, config):
        pass
    return model


def hearts() -> Picture:
    return drawn(with_lora(), HEARTS)
