"""Stable Diffusion, line by line: everything between a prompt and a picture stands in this file,
and the trace of what runs inside.

    python experiments/sd_generate.py                                       the trace of Stable
    Diffusion 1.5, no weights needed
    python experiments/sd_generate.py --model stable-diffusion-v1-5 --prompt "a photograph of an
    astronaut riding a horse"

Writes trace.txt: shapes, parameters and multiply-adds, from 512x512 pixels to the 8x8 bottom of the
U-Net and back. With a model also picture.png, chain.png (the guess of the picture along the way)
and results.json. Look at the trace: five sixths of the U-Net's parameters sit where maps are 16x16
or smaller, and two thirds of its work where they are 64x64 and 32x32.
"""

from pathlib import Path

import torch
from tqdm import tqdm

import minidiff
from minidiff.cli.script import run
from minidiff.figures import plots
from minidiff.figures.trace import trace
from minidiff.guidance import guide
from minidiff.samplers import Normal, by_name, times_of
from minidiff.text import clip_vit_l14
from minidiff.training import atomic
from minidiff.training.device import pick_device
from minidiff.training.progress import write_results
from minidiff.unet import unet_sd1
from minidiff.vae import vae_sd

OUTPUTS = ("trace.txt", "picture.png", "chain.png")  # beside results.json


def main(
    model: str | None = None,
    prompt: str = "a photograph of an astronaut riding a horse",
    negative: str = "",
    steps: int = 25,
    guidance: float = 7.5,
    sampler: str = "dpmpp_2m",
    size: int | None = None,
    dtype: str = "fp32",
    device: str = "auto",
    seed: int = 0,
    out: Path = Path("out/sd_generate"),
) -> None:
    """Draw one picture with Stable Diffusion, step by step, and say what ran.

    Args:
        model: a diffusers folder, a single file, a folder of ours, or a name on the Hugging Face
            Hub. Default: only the trace is made.
        prompt: what to draw.
        negative: what the picture should not show.
        steps: sampling steps.
        guidance: how strongly the prompt steers.
        sampler: how to step from noise to picture.
        size: side in pixels; left out, the model's own.
        dtype: the precision to compute in: fp32, bf16 or fp16.
        device: where to compute.
        seed: of the noise.
        out: folder for everything written.
    """
    if model is None:
        with torch.device("meta"):  # shapes without numbers
            vae, text, unet, side = vae_sd(), clip_vit_l14(), unet_sd1(), size or 512
    else:
        found = minidiff.load(model, pick_device(device), dtype)
        vae, text, unet, side = found.vae, found.text, found.unet, size or found.size
    traced = traces(vae, text, unet, side)
    print(traced)
    with atomic.write(out / "trace.txt", atomic.unsigned) as new:
        new.write_text(f"{traced}\n\n{atomic.SIGNATURE}\n", encoding="utf-8")
    print(out / "trace.txt")
    if model is None:
        return

    # Words become vectors, 77 of them; what guidance steers away from are the vectors of other
    # words, or of none.
    with torch.no_grad():
        context, null = text.encode([prompt]), text.encode([negative])

    # Noise, on the CPU, so that a seed means the same picture everywhere.
    noise = Normal.seeded(seed, [0])
    shape = 1, vae.latent_channels, side // vae.factor, side // vae.factor
    x = noise(torch.empty(shape, device=found.device))

    # From noise to latents: at each time the U-Net guesses what is noise in x, once with and once
    # without the words.
    denoise, step = guide(found.denoiser, context, null, guidance), by_name(sampler)
    times, guesses, memory = times_of(found.schedule, steps, found.spacing, step), [], None
    with torch.no_grad():
        for t, s in zip(tqdm(times[:-1], "sampling"), times[1:], strict=True):
            x, x0, memory = step(denoise, found.schedule, x, t, s, noise, memory)
            guesses.append(x0)

    # Latents become pixels, also those of the guesses along the way.
    shown = [guesses[round(k * (steps - 1) / 5)] for k in range(6)] if steps > 5 else guesses
    chain = torch.cat([found.decode(x0) for x0 in shown]).clamp(-1, 1).cpu()
    picture = found.decode(x).clamp(-1, 1).cpu()[0]
    print(
        plots.save_png(
            picture,
            out / "picture.png",
            {"prompt": prompt, "seed": str(seed), "steps": str(steps), "sampler": sampler},
        )
    )
    print(
        plots.grid(
            chain,
            [f"guess {k + 1} of {len(chain)}" for k in range(len(chain))],
            out / "chain.png",
            columns=len(chain),
        )
    )
    settings = {
        "model": model,
        "prompt": prompt,
        "negative": negative,
        "steps": steps,
        "guidance": guidance,
        "sampler": sampler,
    }
    print(write_results(out, **settings, size=side, dtype=dtype, seed=seed))


def traces(vae, text, unet, side: int) -> str:
    """Encoder, U-Net and decoder, on networks of the same numbers without memory."""
    z, small = vae.latent_channels, side // vae.factor
    words, width, n = text.context_length, text.dim, unet.config
    with torch.device("meta"):
        vae, unet = type(vae)(vae.config), type(unet)(unet.config)
        images, latents = torch.empty(1, 3, side, side), torch.empty(1, z, small, small)
        x_t, t = torch.empty(1, n.in_channels, small, small), torch.empty(1)
        context = torch.empty(1, words, n.context_dim)
    parameters = sum(p.numel() for p in text.parameters())
    return "\n\n".join(
        [
            f"VAE encoder, from 3 x {side} x {side}\n{table(vae.encoder, images)}",
            f"U-Net, from {z} x {small} x {small} and {words} x {width} of words\n"
            f"{table(unet, x_t, t, context)}",
            f"VAE decoder, from {z} x {small} x {small}\n{table(vae.decoder, latents)}",
            f"text encoder: {words} tokens to {words} x {width}, "
            f"{parameters / 1e6:.2f} M parameters",
        ]
    )


def table(network: torch.nn.Module, *inputs: torch.Tensor) -> str:
    """What runs in a network, level by level."""
    with trace(network) as rows, torch.no_grad():
        network(*inputs)
    return rows.table(depth=2)


if __name__ == "__main__":
    run(main, OUTPUTS)
