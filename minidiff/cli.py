"""The command line: every verb is one function here, and its signature is its options. Heavy imports happen inside the verbs.

Bad input ends with one line and exit code 2; the library says so by raising UserError.
"""
import contextlib
import io
import re
import sys
import warnings
from pathlib import Path
from typing import Annotated

import tyro

from minidiff.errors import UserError

Device = Annotated[str, tyro.conf.arg(metavar="auto|cpu|cuda|mps")]
Positional = tyro.conf.Positional


def quickstart(out: Path = Path("out/quickstart"), seed: int = 0, device: Device = "auto", resume: bool = False) -> None:
    """Train a small text-to-image model here and now, from nothing, and show how it happened.

    Args:
        out: folder for the model, the pictures and results.json.
        seed: everything random follows from it.
        device: where to compute; auto takes the CPU, which the recipe is made for.
        resume: go on where an interrupted run stopped.
    """
    from minidiff.quickstart import quickstart as run

    run(out, seed, "cpu" if device == "auto" else pick_device(device), resume)


def generate(
    prompts: Positional[tuple[str, ...]],
    model: Path = Path("out/quickstart/model"),
    n: int = 1,
    steps: int = 25,
    guidance: float | None = None,
    sampler: str = "ddim",
    size: int | None = None,
    seed: int = 0,
    device: Device = "auto",
    out: Path = Path("out/generate"),
) -> None:
    """Draw pictures of prompts.

    Args:
        prompts: what to draw; each in quotes.
        model: the model's folder.
        n: pictures of each prompt.
        steps: sampling steps; more is slower and a little better.
        guidance: how strongly the text steers; 1 is off, 0 ignores the text. Left out, it is the model's own.
        sampler: ddim (deterministic) or ddpm (adds noise on the way).
        size: side of the pictures in pixels. Left out, it is the size the model was trained at.
        seed: everything random follows from it; the same seed gives the same bytes.
        device: where to compute; auto takes a GPU if there is one.
        out: folder for the pictures.
    """
    if n < 1:
        raise UserError(f"--n is {n}; it must be at least 1.")
    if not prompts:
        raise UserError('no prompt; say what to draw, as in: minidiff generate "a small blue circle above a large red square".')
    import torch

    from minidiff import load, plots
    from minidiff.samplers import by_name

    diffusion = load(model, pick_device(device))
    generator = torch.Generator().manual_seed(seed)
    wanted = [prompt for prompt in prompts for _ in range(n)]
    how = dict(steps=steps, guidance=guidance, step=by_name(sampler, generator), size=size, generator=generator)
    pictures = diffusion.generate(wanted, progress=True, **how).cpu()
    for k, (picture, prompt) in enumerate(zip(pictures, wanted, strict=True)):
        print(plots.save_png(picture, out / f"{k:03d}-{slug(prompt)}.png"))
    print(plots.grid(pictures, wanted, out / "grid.png", columns=min(n, 8) if n > 1 else None))


def plot_forward(image: Path | None = None, schedule: str = "linear", size: int = 64, seed: int = 0, device: Device = "auto", out: Path = Path("out/plot")) -> None:
    """The forward chain: a picture turning into noise, as PNG and GIF.

    Args:
        image: the picture to drown in noise; left out, one of the built-in world.
        schedule: linear, scaled_linear, cosine, sigmoid, flow or karras.
        size: side of the picture in pixels.
        seed: of the noise.
        device: accepted for symmetry; this is quick anywhere.
        out: folder for forward.png and forward.gif.
    """
    import torch

    from minidiff import chains
    from minidiff.data.folder import load_picture, to_model
    from minidiff.data.world import World

    pick_device(device)
    picture = to_model(load_picture(image, size)[None]) if image else World(size).batch(1, seed, objects=2)[0]
    for path in chains.plot_forward(picture, named_schedule(schedule), out, torch.Generator().manual_seed(seed), f"forward chain, {schedule} schedule"):
        print(path)


def plot_reverse(
    prompts: Positional[tuple[str, ...]] = ("a small blue circle above a large red square",),
    model: Path = Path("out/quickstart/model"),
    steps: int = 25,
    guidance: float | None = None,
    sampler: str = "ddim",
    seed: int = 0,
    device: Device = "auto",
    out: Path = Path("out/plot"),
) -> None:
    """The reverse chain: noise turning into pictures, with the model's guess of the end at every step, as PNG and GIF.

    Args:
        prompts: what to draw; the PNG shows the first, the GIF all.
        model: the model's folder.
        steps: sampling steps.
        guidance: how strongly the text steers; left out, it is the model's own.
        sampler: ddim or ddpm.
        seed: of the noise.
        device: where to compute; auto takes a GPU if there is one.
        out: folder for reverse.png and reverse.gif.
    """
    import torch

    from minidiff import chains, load
    from minidiff.samplers import by_name

    diffusion = load(model, pick_device(device))
    generator = torch.Generator().manual_seed(seed)
    frames = list(diffusion.sample(list(prompts), steps=steps, guidance=guidance, step=by_name(sampler, generator), generator=generator))
    for path in chains.plot_reverse(diffusion, frames, list(prompts), out):
        print(path)


def plot_schedules(
    schedules: Positional[tuple[str, ...]] = ("linear", "scaled_linear", "cosine", "sigmoid", "flow"),
    seed: int = 0,
    device: Device = "auto",
    out: Path = Path("out/plot"),
) -> None:
    """Noise schedules side by side: alpha, sigma and the signal-to-noise ratio against t.

    Args:
        schedules: any of linear, scaled_linear, cosine, sigmoid, flow, karras.
        seed: accepted for symmetry; nothing here is random.
        device: accepted for symmetry.
        out: folder for schedules.png.
    """
    from minidiff import chains

    pick_device(device)
    print(chains.plot_schedules({name: named_schedule(name) for name in schedules}, out))


def named_schedule(name: str):  # noqa: ANN201 (typing it would import torch)
    """A schedule by the name of its builder."""
    from minidiff import schedules

    known = {f.__name__: f for f in (schedules.linear, schedules.scaled_linear, schedules.cosine, schedules.sigmoid)}
    known |= {"flow": schedules.Flow, "karras": schedules.Karras}
    if name not in known:
        raise UserError(f'no schedule "{name}"; there is {", ".join(known)}.')
    return known[name]()


def pick_device(name: str) -> str:
    """The device a name means here."""
    import torch

    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        return next(device for device in ("cuda", "mps", "cpu") if there[device])
    if name not in there:
        raise UserError(f'no device "{name}"; there is auto, {", ".join(there)}.')
    if not there[name]:
        raise UserError(f'no "{name}" on this machine; pass --device cpu, or auto.')
    return name


def slug(prompt: str) -> str:
    """A prompt as a piece of a file name."""
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60] or "empty"


VERBS = {
    "quickstart": quickstart,
    "generate": generate,
    "plot forward": plot_forward,
    "plot reverse": plot_reverse,
    "plot schedules": plot_schedules,
}


def main(args: list[str] | None = None) -> None:
    """Run one verb. Exit code 0 on success, 2 with one line on bad input, 130 on Ctrl-C."""
    warnings.showwarning = lambda message, *_, **__: print(f"minidiff: {message}", file=sys.stderr)
    verbs = tyro.extras.SubcommandApp()
    for name, verb in VERBS.items():
        verbs.command(name=name)(verb)
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint) if False else contextlib.nullcontext():
            verbs.cli(args=args, prog="minidiff", description=__doc__)
    except UserError as error:
        print(f"minidiff: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("minidiff: interrupted.", file=sys.stderr)
        sys.exit(130)
