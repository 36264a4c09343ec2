"""diffusers' side of gpu.py and bench.py: its networks, its pipeline and its training step, with the
same shapes and settings as ours.

pipeline_of and training_of give what they make, and why they could not: diffusers may not be
installed. Not a study: nothing runs here.
"""

import traceback
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F

from minidiff.finetuning.loop import DTYPES
from minidiff.options.finetuning import FineTuneConfig

WIDTHS = {"sd": (320, 640, 1280, 1280), "tiny": (32, 64)}
VAE_WIDTHS = {"sd": (128, 256, 512, 512), "tiny": (32, 32)}


def unet_of(tiny: bool) -> torch.nn.Module:
    from diffusers import UNet2DConditionModel

    widths = WIDTHS["tiny" if tiny else "sd"]
    levels = len(widths) - 1
    return UNet2DConditionModel(
        sample_size=8 if tiny else 64,
        block_out_channels=widths,
        layers_per_block=1 if tiny else 2,
        down_block_types=("CrossAttnDownBlock2D",) * levels + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * levels,
        attention_head_dim=8,
        cross_attention_dim=64 if tiny else 768,
    )


def vae_of(tiny: bool) -> torch.nn.Module:
    from diffusers import AutoencoderKL

    widths = VAE_WIDTHS["tiny" if tiny else "sd"]
    return AutoencoderKL(
        block_out_channels=widths,
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        layers_per_block=1 if tiny else 2,
    )


def pipeline_of(tiny: bool, device: str) -> tuple[object | None, str]:
    try:
        return pipeline(tiny, device), ""
    except Exception as error:  # whatever an installation may lack: said in the table
        traceback.print_exc()
        return None, f"{type(error).__name__}: {error}".splitlines()[0]


def pipeline(tiny: bool, device: str, dtype: torch.dtype = torch.bfloat16) -> object:
    """StableDiffusionPipeline with random weights."""
    from diffusers import DDIMScheduler

    width, layers, heads = (64, 1, 1) if tiny else (768, 12, 12)
    with torch.device(device):
        vae, unet = vae_of(tiny), unet_of(tiny)
        text = text_of(width, layers, heads, 77)
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        steps_offset=1,
    )
    return assembled(vae, text, unet, scheduler).to(device, dtype)


def box(dtype: torch.dtype) -> object:
    """The same with the channels of the model in minidiff's box."""
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel

    vae = AutoencoderKL(
        block_out_channels=(16, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        norm_num_groups=16,
    )
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(64,) * 4,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        attention_head_dim=2,  # the number of heads, whatever its name
        cross_attention_dim=64,
        norm_num_groups=16,
    )
    scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2", clip_sample=False, steps_offset=1)
    return assembled(vae, text_of(64, 2, 2, 32), unet, scheduler).to(dtype)


def text_of(width: int, layers: int, heads: int, length: int) -> torch.nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=length,
        vocab_size=49408,
    )
    return CLIPTextModel(config)


def assembled(
    vae: torch.nn.Module, text: torch.nn.Module, unet: torch.nn.Module, scheduler: object
) -> object:
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline(
        vae=vae.eval(),
        text_encoder=text.eval(),
        tokenizer=None,  # its vocabulary is not here: prompts are numbers
        unet=unet.eval(),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
def draw(pipe: object, batch: int, steps: int, size: int) -> torch.Tensor:
    """Images, the text encoder included."""
    length = pipe.text_encoder.config.max_position_embeddings
    ids = torch.full((2 * batch, length), 49407, device=pipe.unet.device)
    null, context = pipe.text_encoder(ids)[0].chunk(2)
    return pipe(
        prompt_embeds=context,
        negative_prompt_embeds=null,
        num_inference_steps=steps,
        guidance_scale=7.5,
        height=size,
        width=size,
        output_type="pt",
        generator=torch.Generator().manual_seed(0),
    ).images


def training_of(
    tiny: bool, device: str, config: FineTuneConfig
) -> tuple[Callable[[], float] | None, str]:
    """A training step, as its examples have it, with the same settings."""
    try:
        return training(tiny, device, config), ""
    except Exception as error:  # as above; or out of memory with both models there
        traceback.print_exc()
        return None, f"{type(error).__name__}: {error}".splitlines()[0]


def training(
    tiny: bool, device: str, config: FineTuneConfig, side: int = 64
) -> Callable[[], float]:
    from diffusers import DDPMScheduler
    from diffusers.training_utils import EMAModel

    with torch.device(device):
        unet = unet_of(tiny)
    if config.method == "lora":
        from peft import LoraConfig

        unet.requires_grad_(False)
        names = ["to_q", "to_k", "to_v", "to_out.0"]
        unet.add_adapter(LoraConfig(r=config.lora.rank, target_modules=names))
        unet.to(device)
    if config.checkpointing:
        unet.enable_gradient_checkpointing()
    unet.train()
    weights = [p for p in unet.parameters() if p.requires_grad]
    fused = device.startswith(("cuda", "cpu"))
    optimizer = torch.optim.AdamW(weights, lr=config.lr, betas=(0.9, 0.99), fused=fused)
    average = EMAModel(weights, decay=config.ema, foreach=True) if config.ema else None
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    latents = torch.randn(config.batch, 4, *[8 if tiny else side] * 2)
    context = torch.randn(config.batch, 77, unet.config.cross_attention_dim)
    autocast = DTYPES[config.dtype]
    return partial(step, unet, weights, optimizer, average, scheduler, latents, context, autocast)


def step(
    unet: torch.nn.Module,
    weights: list[torch.nn.Parameter],
    optimizer: torch.optim.Optimizer,
    average: object | None,
    scheduler: object,
    latents: torch.Tensor,
    context: torch.Tensor | None,
    autocast: torch.dtype | None,
) -> float:
    """As in diffusers' examples. autocast: None computes as the weights are."""
    device = weights[0].device
    x0, condition = latents.to(device), () if context is None else (context.to(device),)
    eps, t = torch.randn_like(x0), torch.randint(0, 1000, (len(x0),), device=device)
    with torch.autocast(device.type, autocast, enabled=autocast is not None):
        found = unet(scheduler.add_noise(x0, eps, t), t, *condition).sample
        loss = F.mse_loss(found.float(), eps)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(weights, 1.0)
    optimizer.step()
    optimizer.zero_grad()
    if average is not None:
        average.step(weights)
    return loss.item()
