"""The command line: every verb is one function here, and its signature is its options. Torch is imported by the verbs, not by --help.

Bad input ends with one line and exit code 2; the library says so by raising UserError.
"""
import math
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import tyro
from tqdm import tqdm

from minidiff import console
from minidiff.errors import UserError

Device = Annotated[str, tyro.conf.arg(metavar="auto|cpu|cuda|mps")]
Number = Annotated[float | None, tyro.conf.arg(metavar="FLOAT")]
Sampler = Annotated[str | None, tyro.conf.arg(metavar="ddim|ddpm")]
Integer = Annotated[int | None, tyro.conf.arg(metavar="INT")]
Prompts = tyro.conf.Positional[Annotated[tuple[str, ...], tyro.conf.arg(metavar="PROMPT ...")]]
Names = tyro.conf.Positional[Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME ...")]]

MODEL = Path("out/quickstart/model")
EXAMPLE = "a small blue circle above a large red square"


def quickstart(out: Path = Path("out/quickstart"), seed: int = 0, device: Device = "auto", resume: bool = False) -> None:
    """Train a small text-to-image model here and now, from nothing, and show how it happened.

    Args:
        out: folder for the model, the pictures and results.json.
        seed: everything random follows from it.
        device: where to compute; auto takes the CPU, which the recipe is made for.
        resume: go on where an interrupted run stopped.
    """
    check_out(out)
    check_seed(seed)
    device = "cpu" if device == "auto" else pick_device(device)
    from minidiff.quickstart import quickstart as run

    run(out, seed, device, resume)


def generate(
    prompts: Prompts,
    model: Path = MODEL,
    n: int = 1,
    steps: int = 25,
    guidance: Number = None,
    sampler: Sampler = None,
    size: Integer = None,
    seed: int = 0,
    device: Device = "auto",
    out: Path = Path("out/generate"),
) -> None:
    """Draw pictures of prompts.

    Args:
        prompts: what to draw; each in quotes, before the options.
        model: the model: our folder, a diffusers folder, or one .safetensors or .ckpt file of Stable Diffusion.
        n: pictures of each prompt.
        steps: sampling steps; more is slower and a little better.
        guidance: how strongly the text steers; 1 is off, 0 ignores the text. Left out, it is the model's own.
        sampler: ddim (deterministic) or ddpm (adds noise on the way). Left out, it is the model's own.
        size: side of the pictures in pixels. Left out, it is the size the model was trained at.
        seed: everything random follows from it; the same seed gives the same bytes.
        device: where to compute; auto takes a GPU if there is one.
        out: folder for the pictures; each carries its prompt and its settings inside.
    """
    if not prompts:
        raise UserError(f'no prompt; say what to draw, as in: minidiff generate "{EXAMPLE}".')
    check_positive("--n", n)
    diffusion, how = sampling(model, steps, guidance, sampler, seed, device, out)
    from minidiff import plots
    from minidiff.data.folder import check_size

    size = diffusion.size if size is None else size
    check_size(size, diffusion.vae.factor * diffusion.unet.multiple)
    wanted = [prompt for prompt in prompts for _ in range(n)]
    pictures = diffusion.generate(wanted, size=size, progress=True, **how).cpu()
    sampler = sampler or diffusion.sampler
    settings = {"seed": seed, "steps": steps, "guidance": how["guidance"], "sampler": sampler, "size": size, "model": model.resolve().name}
    settings = {name: str(value) for name, value in settings.items()}
    written = []
    for k, (picture, prompt) in enumerate(zip(pictures, wanted, strict=True)):
        text = {"prompt": prompt, "picture": f"{k + 1} of {len(wanted)}", **settings}
        written.append(plots.save_png(picture, out / f"{k:03d}-{slug(prompt)}.png", text))
    written.append(plots.grid(pictures, wanted, out / "grid.png", columns=min(n, 8) if n > 1 else None))
    print(*written, sep="\n")


def plot_forward(
    image: Path | None = None, schedule: str = "linear", size: int = 64, seed: int = 0, device: Device = "auto", out: Path = Path("out/plot")
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
    check_out(out)
    check_seed(seed)
    check_positive("--size", size)
    pick_device(device)
    import torch

    from minidiff import chains
    from minidiff.data.folder import load_picture, to_model
    from minidiff.data.world import World

    noises = named_schedule(schedule)
    picture = to_model(load_picture(image, size)[None]) if image else World(size).batch(1, seed, objects=2)[0]
    title = f"forward chain, {schedule} schedule"
    print(*chains.plot_forward(picture, noises, out, torch.Generator().manual_seed(seed), title), sep="\n")


def plot_reverse(
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
        model: the model: our folder, a diffusers folder, or one .safetensors or .ckpt file of Stable Diffusion.
        steps: sampling steps.
        guidance: how strongly the text steers; 1 is off, 0 ignores the text. Left out, it is the model's own.
        sampler: ddim (deterministic) or ddpm (adds noise on the way). Left out, it is the model's own.
        seed: everything random follows from it.
        device: where to compute; auto takes a GPU if there is one.
        out: folder for reverse.png and reverse.gif.
    """
    diffusion, how = sampling(model, steps, guidance, sampler, seed, device, out)
    from minidiff import chains

    with tqdm(diffusion.sample(list(prompts), **how), "sampling", steps + 1, unit="frame", delay=0.01) as bar:
        frames = list(bar)
    print(*chains.plot_reverse(diffusion, frames, list(prompts), out), sep="\n")


def plot_schedules(
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
    check_out(out)
    check_seed(seed)
    pick_device(device)
    from minidiff import chains

    print(chains.plot_schedules({name: named_schedule(name) for name in schedules}, out))


VERBS: dict[str, Callable[..., None]] = {
    "quickstart": quickstart,
    "generate": generate,
    "plot forward": plot_forward,
    "plot reverse": plot_reverse,
    "plot schedules": plot_schedules,
}

# What the verbs share. All that can be wrong is found before anything slow.


def sampling(model: Path, steps: int, guidance: float | None, sampler: str | None, seed: int, device: str, out: Path):
    """The model (LatentDiffusion), and the arguments of its `sample`."""
    check_out(out)
    check_seed(seed)
    check_positive("--steps", steps)
    if guidance is not None and not math.isfinite(guidance):
        raise UserError(f"--guidance is {guidance}; it must be finite, as in --guidance 4.")
    device = pick_device(device)
    import torch

    from minidiff import load
    from minidiff.samplers import by_name

    generator = torch.Generator().manual_seed(seed)
    if sampler is not None:
        by_name(sampler)  # complains of unknown ones before anything slow
    diffusion = load(model, device)
    step = by_name(sampler or diffusion.sampler, generator)
    diffusion.schedule.timesteps(steps)  # complains of more steps than noise levels
    guidance = diffusion.guidance if guidance is None else guidance
    return diffusion, {"steps": steps, "guidance": guidance, "step": step, "generator": generator}


def check_positive(option: str, value: int) -> None:
    if value < 1:
        raise UserError(f"{option} is {value}; it must be at least 1.")


def check_seed(seed: int) -> None:
    if not 0 <= seed < 2**63:
        raise UserError(f"--seed is {seed}; it must be from 0 to {2**63 - 1}.")


def check_out(out: Path) -> None:
    """That files can be written there; nothing is made yet, so that bad input leaves nothing behind."""
    there = next(place for place in (out, *out.absolute().parents) if place.exists())
    if not there.is_dir():
        raise UserError(f'--out {out}: "{there}" is a file; name a folder.')
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f'--out {out}: no permission to write in "{there}"; name another folder.')


def pick_device(name: str) -> str:
    """The device a name means here; finding out imports torch."""
    from minidiff import script

    return script.pick_device(name)


def named_schedule(name: str):  # a NoiseSchedule
    from minidiff import schedules

    known = {make.__name__: make for make in (schedules.linear, schedules.scaled_linear, schedules.cosine, schedules.sigmoid)}
    known |= {"flow": schedules.Flow, "karras": schedules.Karras}
    if name not in known:
        raise UserError(f'no schedule "{name}"; there is {", ".join(known)}.')
    return known[name]()


def slug(prompt: str) -> str:
    """A prompt as a piece of a file name."""
    return re.sub(r"[\W_]+", "-", prompt.lower()).strip("-")[:50] or "empty"


def main(args: list[str] | None = None) -> None:
    """Run one verb. Exit code 0 on success, 2 with one line on bad input, 130 on Ctrl-C."""
    console.run("minidiff", "Text-to-image diffusion from scratch.", VERBS, sys.argv[1:] if args is None else args)


if __name__ == "__main__":
    main()
