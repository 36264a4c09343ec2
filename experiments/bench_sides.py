"""The two networks' sides of bench.py: each function builds what one library's users build, and
gives the call that is timed.

tuned: channels last, and bf16 where the processor computes in it. Not a study: nothing runs here.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import cifar_ddpm
import cifar_recipes
import diffusers_side
import torch
from gpu_training import fine_tuning, tuning
from measuring import Setup, stable_diffusion
from torch import nn

import minidiff
from minidiff import pipeline
from minidiff.conditioners import Unconditional
from minidiff.denoiser import Denoiser
from minidiff.latent_diffusion import LatentDiffusion
from minidiff.options.finetuning import FineTuneConfig
from minidiff.options.sampling import SampleConfig
from minidiff.train import EMA, TrainConfig, train
from minidiff.vae import Pixels

BF16 = any(getattr(torch.cpu, f"_is_{name}_supported")() for name in ("avx512_bf16", "amx_tile"))
CAPTIONS = ["a small blue circle above a large red square"] * 8
PAPER = cifar_recipes.PRESETS["paper"]


class Side(NamedTuple):
    call: Callable[[], object]
    network: nn.Module | None = None  # whose convolutions and linear layers are the floor
    autocast: torch.dtype | None = None


def half(tuned: bool) -> torch.dtype:
    return torch.bfloat16 if tuned and BF16 else torch.float32


def autocast(tuned: bool) -> torch.dtype | None:
    return torch.bfloat16 if tuned and BF16 else None


def placed(module: nn.Module, tuned: bool) -> nn.Module:
    """To draw with: bf16 weights and channels last, where it is tuned."""
    layout = torch.channels_last if tuned else torch.preserve_format
    return module.to(dtype=half(tuned), memory_format=layout).eval()


@torch.no_grad()
def drawn(network: nn.Module, dtype: torch.dtype | None, *inputs: torch.Tensor) -> object:
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        return network(*inputs)


def images(setup: Setup, tuned: bool, batch: int = 16) -> torch.Tensor:
    """Of CIFAR-10's size."""
    x = torch.randn(2 if setup.tiny else batch, 3, 32, 32)
    return x.contiguous(memory_format=torch.channels_last) if tuned else x


# CIFAR-10: the paper's network; a step with AdamW, clipping and an average of the weights.


def cifar_unet(setup: Setup) -> nn.Module:
    return cifar_recipes.unet_tiny(None) if setup.tiny else PAPER.unet(None)


def cifar_forward(setup: Setup, tuned: bool) -> Side:
    unet = placed(cifar_unet(setup), True).to(half(tuned))
    x = images(setup, True).to(half(tuned))
    return Side(partial(drawn, unet, None, x, torch.full((len(x),), 500.0)), unet)


def cifar_step(setup: Setup, tuned: bool) -> Side:
    denoiser = Denoiser(cifar_unet(setup), PAPER.schedule, PAPER.target)
    model = LatentDiffusion(Pixels(), Unconditional(), denoiser, size=32)
    model.to(memory_format=torch.channels_last)
    x = images(setup, True)
    config = TrainConfig(10**6, PAPER.lr, autocast=autocast(tuned))
    loss, stream = partial(cifar_ddpm.loss, model, PAPER.chain), partial(again, x)
    steps = train(loss, model, stream, config, EMA(model, PAPER.ema))
    return Side(partial(next, steps), model, autocast(tuned))


def again(x: torch.Tensor, _start: int) -> Iterator[tuple[torch.Tensor, list[str]]]:
    while True:
        yield x, [""] * len(x)


def diffusers_cifar_unet(setup: Setup) -> nn.Module:
    """google/ddpm-cifar10-32."""
    from diffusers import UNet2DModel

    wide = dict(block_out_channels=(128, 256, 256, 256), layers_per_block=2, norm_num_groups=32)
    down, up = ["DownBlock2D"] * 4, ["UpBlock2D"] * 4
    down[1], up[2] = "AttnDownBlock2D", "AttnUpBlock2D"
    if setup.tiny:
        wide = dict(block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4)
        down, up = ["DownBlock2D", "AttnDownBlock2D"], ["AttnUpBlock2D", "UpBlock2D"]
    heads = None if not setup.tiny else 8
    unet = UNet2DModel(
        32, down_block_types=down, up_block_types=up, attention_head_dim=heads, dropout=0.1, **wide
    )
    return unet


def diffusers_cifar_forward(setup: Setup, tuned: bool) -> Side:
    unet = placed(diffusers_cifar_unet(setup), tuned)
    x = images(setup, tuned).to(half(tuned))
    return Side(partial(drawn, unet, None, x, torch.full((len(x),), 500)))


def diffusers_cifar_step(setup: Setup, tuned: bool) -> Side:
    from diffusers import DDPMScheduler
    from diffusers.training_utils import EMAModel

    unet = diffusers_cifar_unet(setup).train()
    if tuned:
        unet.to(memory_format=torch.channels_last)
    weights = list(unet.parameters())
    optimizer = torch.optim.AdamW(weights, lr=2e-4, betas=(0.95, 0.999))
    average = EMAModel(weights, decay=0.9999)
    done = (unet, weights, optimizer, average, DDPMScheduler(), images(setup, tuned))
    return Side(partial(diffusers_side.step, *done, None, autocast(tuned)))


def ddp_cifar_unet(setup: Setup, tuned: bool) -> nn.Module:
    """denoising-diffusion-pytorch's own network, of about as many weights."""
    from denoising_diffusion_pytorch import Unet

    return Unet(8 if setup.tiny else 128, dim_mults=(1, 2, 2, 2), flash_attn=tuned)


def ddp_cifar_forward(setup: Setup, tuned: bool) -> Side:
    """Its embedding of the time is in fp32 whatever the weights: autocast, as its Trainer has it."""
    unet = ddp_cifar_unet(setup, tuned).eval()
    if tuned:
        unet.to(memory_format=torch.channels_last)
    x = images(setup, tuned)
    return Side(partial(drawn, unet, autocast(tuned), x, torch.full((len(x),), 500.0)))


def ddp_cifar_step(setup: Setup, tuned: bool) -> Side:
    """What its Trainer does in a step, without its progress bar."""
    from denoising_diffusion_pytorch import GaussianDiffusion
    from ema_pytorch import EMA as Average

    diffusion = GaussianDiffusion(ddp_cifar_unet(setup, tuned), image_size=32).train()
    if tuned:
        diffusion.to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(diffusion.parameters(), lr=1e-4, betas=(0.9, 0.99))
    average = Average(diffusion, beta=0.995, update_every=10)
    x = images(setup, tuned).clamp(-1, 1) / 2 + 0.5
    return Side(partial(ddp_step, diffusion, optimizer, average, x, autocast(tuned)))


def ddp_step(
    diffusion: nn.Module,
    optimizer: torch.optim.Optimizer,
    average: nn.Module,
    x: torch.Tensor,
    dtype: torch.dtype | None,
) -> float:
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        loss = diffusion(x)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(diffusion.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    average.update()
    return loss.item()


# Stable Diffusion 1.5's shapes and random weights, at 256x256: at 512x512 everything takes four
# times as long.

SIDE = 256


def sd_forward(setup: Setup, tuned: bool) -> Side:
    unet = placed(stable_diffusion(setup, torch.float32).unet, tuned)
    return Side(partial(drawn, unet, None, *sd_inputs(setup, tuned, unet.context_dim)), unet)


def diffusers_sd_forward(setup: Setup, tuned: bool) -> Side:
    unet = placed(diffusers_side.unet_of(setup.tiny), tuned)
    return Side(
        partial(drawn, unet, None, *sd_inputs(setup, tuned, unet.config.cross_attention_dim))
    )


def sd_inputs(setup: Setup, tuned: bool, width: int) -> tuple[torch.Tensor, ...]:
    """For one image under guidance."""
    side = 8 if setup.tiny else SIDE // 8
    x, context = torch.randn(2, 4, side, side), torch.randn(2, 77, width)
    if tuned:
        x = x.contiguous(memory_format=torch.channels_last)
    return x.to(half(tuned)), torch.full((2,), 500.0), context.to(half(tuned))


def sd_config(method: str, tuned: bool) -> FineTuneConfig:
    """Batch 1; without an average of the weights, for which 24 GB have no room."""
    dtype = "bf16" if autocast(tuned) else "fp32"
    return replace(tuning(method, 1, False), dtype=dtype, ema=None)


def sd_step(method: str, setup: Setup, tuned: bool) -> Side:
    """From cached latents."""
    config = sd_config(method, tuned)
    model = stable_diffusion(setup, torch.float32, SIDE)
    if tuned:
        model.to(memory_format=torch.channels_last)
    steps = fine_tuning(model, config)
    return Side(partial(next, steps), model, autocast(tuned))


def diffusers_sd_step(method: str, setup: Setup, tuned: bool) -> Side:
    config = sd_config(method, tuned)
    return Side(diffusers_side.training(setup.tiny, "cpu", config, SIDE // 8))


def sd_sample(setup: Setup, tuned: bool) -> Side:
    model = placed(stable_diffusion(setup, torch.float32, SIDE), tuned)
    config = SampleConfig(2 if setup.tiny else 5, sampler="ddim")
    return Side(partial(pipeline.generate, model, CAPTIONS[:1], config), model)


def diffusers_sd_sample(setup: Setup, tuned: bool) -> Side:
    pipe = diffusers_side.pipeline(setup.tiny, "cpu", half(tuned))
    if tuned:
        pipe.unet.to(memory_format=torch.channels_last)
        pipe.vae.to(memory_format=torch.channels_last)
    steps, side = (2, 32) if setup.tiny else (5, SIDE)
    return Side(partial(diffusers_side.draw, pipe, 1, steps, side))


# The model in the box, and a pipeline of diffusers of as many channels with random weights.


def box_sample(setup: Setup, tuned: bool) -> Side:
    model = placed(minidiff.load(), tuned)
    config = SampleConfig(2 if setup.tiny else 25)
    return Side(partial(pipeline.generate, model, CAPTIONS, config), model)


def diffusers_box_sample(setup: Setup, tuned: bool) -> Side:
    pipe = diffusers_side.box(half(tuned))
    if tuned:
        pipe.unet.to(memory_format=torch.channels_last)
    return Side(partial(diffusers_side.draw, pipe, len(CAPTIONS), 2 if setup.tiny else 25, 32))
