"""Verbs that plot chains and schedules."""

from pathlib import Path
from typing import Annotated

import tyro
from tqdm import tqdm

from minidiff.cli import options
from minidiff.cli.options import EXAMPLE, MODEL, Device, Number, Prompts, Sampler
from minidiff.errors import UserError

Names = tyro.conf.Positional[Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME ...")]]


def forward(
    image: Path | None = None,
    schedule: str = "linear",
    size: int = 64,
    seed: int = 0,
    device: Device = "auto",
    out: Path = Path("out/plot"),
) -> None:
    """The forward chain: a picture turning into noise, as PNG and GIF.

    Args:
        image: the picture to drown in noise; left out, one of the built-in world.
        schedule: linear, scaled_linear, cosine, sigmoid, flow or karras.
        size: side of the picture in pixels.
        seed: of the noise, and of the built-in world's picture.
        device: accepted as everywhere; this is quick on the CPU.
        out: folder for forward.png and forward.gif.
    """
    options.check_out(out)
    options.check_seed(seed)
    options.check_positive("--size", size)
    options.pick_device(device)
    import torch

    from minidiff.data.folder import load_picture, to_model
    from minidiff.data.world import World
    from minidiff.figures import chains

    noises = named_schedule(schedule)
    picture = (
        to_model(load_picture(image, size)[None])
        if image
        else World(size).batch(1, seed, objects=2)[0]
    )
    title = f"forward chain, {schedule} schedule"
    print(
        *chains.plot_forward(picture, noises, out, torch.Generator().manual_seed(seed), title),
        sep="\n",
    )


def reverse(
    prompts: Prompts = (EXAMPLE,),
    model: Path = MODEL,
    steps: int = 25,
    guidance: Number = None,
    sampler: Sampler = None,
    seed: int = 0,
    device: Device = "auto",
    out: Path = Path("out/plot"),
) -> None:
    """The reverse chain: noise turning into pictures, with the model's guess of the end at every step, as PNG and GIF.

    Args:
        prompts: what to draw; the PNG shows the first, the GIF all.
        model: box, the small model that ships with minidiff; or our folder, a diffusers folder, one .safetensors or .ckpt file of Stable Diffusion.
        steps: sampling steps.
        guidance: how strongly the text steers; 1 is off, 0 ignores the text. Left out, it is the model's own.
        sampler: how to step from noise to picture; dpmpp_2m or unipc where steps are few. Left out, it is the model's own.
        seed: everything random follows from it.
        device: where to compute; auto takes a GPU if there is one.
        out: folder for reverse.png and reverse.gif.
    """
    diffusion, config = options.sampling(model, steps, guidance, sampler, seed, device, out)
    from minidiff.figures import chains
    from minidiff.samplers import Normal

    noise = Normal.seeded(seed, range(len(prompts)))
    chain = diffusion.sample(list(prompts), generator=noise, config=config)
    frames = list(tqdm(chain, "sampling", steps + 1, unit="frame", delay=0.01))
    print(*chains.plot_reverse(diffusion, frames, list(prompts), out), sep="\n")


def schedules(
    schedules: Names = ("linear", "scaled_linear", "cosine", "sigmoid", "flow"),
    seed: int = 0,
    device: Device = "auto",
    out: Path = Path("out/plot"),
) -> None:
    """Noise schedules side by side: alpha, sigma and the signal-to-noise ratio against t.

    Args:
        schedules: any of linear, scaled_linear, cosine, sigmoid, flow, karras.
        seed: accepted as everywhere; nothing here is random.
        device: accepted as everywhere; this is quick on the CPU.
        out: folder for schedules.png.
    """
    options.check_out(out)
    options.check_seed(seed)
    options.pick_device(device)
    from minidiff.figures import chains

    print(chains.plot_schedules({name: named_schedule(name) for name in schedules}, out))


def named_schedule(name: str):  # a NoiseSchedule
    from minidiff import schedules

    known = {
        make.__name__: make
        for make in (schedules.linear, schedules.scaled_linear, schedules.cosine, schedules.sigmoid)
    }
    known |= {"flow": schedules.Flow, "karras": schedules.Karras}
    if name not in known:
        raise UserError(f'no schedule "{name}"; there is {", ".join(known)}.')
    return known[name]()
