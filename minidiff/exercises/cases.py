"""The arguments with which each exercise's function is called, the learner's and the library's.

Numbers are float64 and have two digits, so that they can be printed whole. Every call makes them
anew, and they are the same each time.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from minidiff import schedules
from minidiff.ddpm import DDPM
from minidiff.denoiser import Denoiser, Prediction
from minidiff.evaluation.metrics import Moments
from minidiff.exercises.models import Linear, Toy, randomize, tiny_model, tiny_vae
from minidiff.finetuning.groups import GroupLoss, Part
from minidiff.guidance import Guided
from minidiff.layers import GEGLU, Attention
from minidiff.methods.inversion import Word
from minidiff.methods.lora import LoRA
from minidiff.steps import DDIM, DPMpp2M, Last, Stride
from minidiff.text import Block, CLIPText, TextConfig
from minidiff.train import EMA


class Case(NamedTuple):
    """The arguments of one call; the result is what it returns, or what `read` finds in them."""

    args: tuple
    read: Callable[[tuple], object] | None = None


Cases = list[Case]
TIMES = torch.tensor([1, 2, 500, 1000])


def numbers(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal numbers of two digits."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).mul(100).round() / 100


def _one(*args: object) -> Cases:
    return [Case(args)]


def q_step() -> Cases:
    return _one(DDPM(), numbers(4, 3), TIMES, numbers(4, 3, seed=1))


def q_sample() -> Cases:
    x0, eps = numbers(4, 3), numbers(4, 3, seed=1)
    images = numbers(2, 1, 2, 2).float(), TIMES[1:3], numbers(2, 1, 2, 2, seed=1).float()
    return [Case((DDPM(), x0, TIMES, eps)), Case((DDPM(), *images))]


def q_posterior() -> Cases:
    return _one(DDPM(), numbers(4, 3), numbers(4, 3, seed=1), TIMES)


def predict_x0() -> Cases:
    return _one(DDPM(), numbers(4, 3), TIMES, numbers(4, 3, seed=1))


def p_sample() -> Cases:
    return _one(DDPM(), Toy(), numbers(4, 3), TIMES, numbers(4, 3, seed=1))


def simple_loss() -> Cases:
    return _one(DDPM(), Toy(), numbers(4, 3), TIMES, numbers(4, 3, seed=1))


def cosine() -> Cases:
    return [Case((8, 1e-4, 0.02)), Case((1000, 1e-4, 0.02))]


def timesteps() -> Cases:
    asked = [(10, "trailing"), (7, "trailing"), (10, "leading"), (7, "leading"), (7, "linspace")]
    return [Case((schedules.linear(), *each)) for each in asked]


def solve() -> Cases:
    x, F = numbers(4, 3), numbers(4, 3, seed=1)
    return [
        Case((Denoiser(Toy(), schedules.linear(), row), x, TIMES, F)) for row in ("eps", "v", "x0")
    ]


def v() -> Cases:
    return _one(*schedules.linear().alpha_sigma(TIMES))


def min_snr() -> Cases:
    return _one(torch.tensor([0.01, 0.5, 4.0, 5.0, 80.0], dtype=torch.float64))


def _knows(x: Tensor, t: Tensor) -> Prediction:
    """A denoiser: its x0 depends on x and t."""
    return Prediction(x.tanh() + 0.001 * t[:, None], x.cos())


def _noise(x: Tensor) -> Tensor:
    return numbers(*x.shape, seed=9)


def ddim() -> Cases:
    t, schedule = torch.tensor([1000, 500, 0]), schedules.linear()
    ways = [(eta, t[k], t[k + 1]) for eta in (0.0, 0.5) for k in (0, 1)]
    return [
        Case((DDIM(eta), _knows, schedule, numbers(2, 3), *way, _noise, None)) for eta, *way in ways
    ]


def dpmpp_2m() -> Cases:
    schedule, times = schedules.linear(), torch.tensor([900, 700, 400, 0])
    strides = [Stride.between(schedule, times[k], times[k + 1]) for k in range(3)]
    memories = [None, Last(strides[0], numbers(2, 3, seed=4)), Last(strides[1], numbers(2, 3))]
    return [
        Case((DPMpp2M(), _knows, schedule, numbers(2, 3), t, s, _noise, memory))
        for t, s, memory in zip(times, times[1:], memories, strict=False)
    ]


def guidance() -> Cases:
    denoiser = Denoiser(Linear(), schedules.linear(), "eps").double()
    contexts = numbers(2, 1, 4), numbers(2, 1, 4, seed=1)
    return [
        Case((Guided(denoiser, *contexts, scale, 0.0, None, None), numbers(2, 3), TIMES[1:3]))
        for scale in (7.5, 1.0, 0.0)
    ]


def timestep_embedding() -> Cases:
    return _one(torch.tensor([0.0, 3.0, 999.0], dtype=torch.float64), 10)


def attention() -> Cases:
    layer = randomize(Attention(6, 2, 6)).double()
    x, context = numbers(2, 3, 6), numbers(2, 4, 6, seed=1)
    return [Case((layer, x, context, False)), Case((layer, x, None, True))]


def geglu() -> Cases:
    return _one(randomize(GEGLU(3, 2)).double(), numbers(2, 2, 3))


def vae_encode() -> Cases:
    vae, images = randomize(tiny_vae(latent_scale=0.25)).double(), numbers(1, 3, 8, 8)
    return [Case((vae, images, None)), Case((vae, images, numbers(1, 4, 2, 2, seed=1)))]


def vae_loss() -> Cases:
    return _one(randomize(tiny_vae(kl_weight=0.3)).double(), numbers(2, 3, 8, 8))


def clip_block() -> Cases:
    return _one(randomize(Block(4, 2, "quick_gelu")).double(), numbers(1, 3, 4))


def ema() -> Cases:
    return [Case(_moving(step), _averages) for step in (1, 5, 500)]


def _moving(step: int) -> tuple[EMA, int]:
    """An average of two weights that have moved since, and the step."""
    layer = nn.Linear(2, 1, bias=False, dtype=torch.float64)
    layer.weight.data = numbers(1, 2)
    average = EMA(layer, 0.9)
    layer.weight.data = numbers(1, 2, seed=1)
    return average, step


def _averages(args: tuple) -> dict[str, Tensor]:
    ema, _ = args
    return {"averages": ema.averages[0], "weights": ema.weights[0]}


def _lora(layer: nn.Module) -> LoRA:
    """A LoRA whose B is no longer zero."""
    lora = LoRA(layer, rank=2, alpha=3.0).double()
    lora.A.data, lora.B.data = numbers(*lora.A.shape, seed=2), numbers(*lora.B.shape, seed=3)
    lora.scale = 0.7
    return lora


def lora() -> Cases:
    image = _lora(nn.Conv2d(2, 3, 3, padding=1)), numbers(1, 2, 4, 4)
    return [Case((_lora(nn.Linear(3, 4)), numbers(2, 3))), Case(image)]


def lora_merge() -> Cases:
    return _one(_lora(nn.Linear(3, 4)), numbers(4, 3))


def prior() -> Cases:
    names, shape = ("subject", "class"), (2, 4, 8, 8)
    parts = [
        Part(
            name, weight, numbers(*shape, seed=k), ["a dog", ""], TIMES[k : k + 2], numbers(*shape)
        )
        for k, (name, weight) in enumerate(zip(names, (1.0, 0.7), strict=True))
    ]
    return _one(GroupLoss(tiny_model().double()), parts)


def word() -> Cases:
    text = CLIPText(TextConfig(3, 0, 1))
    trained = Word(text, "sks", lr_multiplier=4.0).double()
    trained.start, trained.change.data = numbers(3), numbers(3, seed=1)
    tokens = torch.tensor([[320, trained.token, 1929]])
    return _one(trained, 0, text.token_embedding, (tokens,), numbers(1, 3, 3, seed=2))


def frechet() -> Cases:
    return _one(Moments().add(numbers(9, 3)), Moments().add(numbers(9, 3, seed=1) + 1))
