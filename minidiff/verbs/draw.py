"""Verbs that draw: quickstart and generate."""
import re
from pathlib import Path

from minidiff.errors import UserError
from minidiff.verbs import options
from minidiff.verbs.options import EXAMPLE, MODEL, Device, Integer, Number, Prompts, Sampler


def quickstart(out: Path = Path("out/quickstart"), seed: int = 0, device: Device = "auto", resume: bool = False) -> None:
    """Train a small text-to-image model here and now, from nothing, and show how it happened.

    Args:
        out: folder for the model, the pictures and results.json.
        seed: everything random follows from it.
        device: where to compute; auto takes the CPU, which the recipe is made for.
        resume: go on where an interrupted run stopped.
    """
    options.check_out(out)
    options.check_seed(seed)
    device = "cpu" if device == "auto" else options.pick_device(device)
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
        model: box, the small model that ships with minidiff; or our folder, a diffusers folder, one .safetensors or .ckpt file of Stable Diffusion.
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
    options.check_positive("--n", n)
    diffusion, how = options.sampling(model, steps, guidance, sampler, seed, device, out)
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


def slug(prompt: str) -> str:
    """A prompt as a piece of a file name."""
    return re.sub(r"[\W_]+", "-", prompt.lower()).strip("-")[:50] or "empty"
