"""The verbs that plot chains, attention and schedules."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from tqdm import tqdm

from minidiff.cli import options
from minidiff.cli.options import EXAMPLE, MODEL, SAMPLE, Device, Prompts
from minidiff.errors import UserError
from minidiff.options.sampling import SampleConfig

if TYPE_CHECKING:
    from minidiff.schedules import NoiseSchedule

ScheduleName = Literal["linear", "scaled_linear", "cosine", "sigmoid", "flow", "karras"]
ScheduleNames = tyro.conf.Positional[
    Annotated[tuple[ScheduleName, ...], tyro.conf.arg(metavar="NAME ...")]
]


def forward(
    image: Path | None = None,
    schedule: ScheduleName = "linear",
    size: int = 64,
    seed: int = 0,
    out: Path = Path("out/plot"),
) -> None:
    """The forward chain: an image turning into noise, as PNG and GIF.

    Example: minidiff plot forward --image cat.png --schedule cosine

    Args:
        image: the image to turn into noise. Default: one of the built-in world.
        schedule: the noise schedule.
        size: side of the image in pixels.
        seed: of the noise, and of the built-in world's image.
        out: folder for forward.png and forward.gif.
    """
    options.check_out(out, "forward.png", "forward.gif")
    options.check_seed(seed)
    options.check_least("size", size)
    import torch

    from minidiff.data.folder import load_image, to_model
    from minidiff.data.world import World
    from minidiff.figures import chains

    if image is None:
        x0 = World(size).batch(1, seed, objects=2)[0]
    else:
        x0 = to_model(load_image(image, size)[None])
    title, generator = f"forward chain, {schedule} schedule", torch.Generator().manual_seed(seed)
    print(*chains.plot_forward(x0, by_name(schedule), out, generator, title), sep="\n")


def reverse(
    prompts: Prompts = (EXAMPLE,),
    model: Path = MODEL,
    config: SampleConfig = SAMPLE,
    device: Device = "auto",
    out: Path = Path("out/plot"),
) -> None:
    """The reverse chain: noise turning into images, with the guess of the end at every step.

    Example: minidiff plot reverse "a small blue circle" --steps 20 --sampler euler

    Args:
        prompts: what to show; the PNG has the first, the GIF all.
        model: box, the small model that ships with minidiff; or our folder, a diffusers folder, one
            .safetensors or .ckpt file of Stable Diffusion.
        device: where to compute; auto takes a GPU if there is one.
        out: folder for reverse.png and reverse.gif.
    """
    options.check_out(out, "reverse.png", "reverse.gif")
    device = options.pick_device(device)
    from minidiff import load
    from minidiff.figures import chains
    from minidiff.samplers import Normal

    loaded, captions = load(model, device), list(prompts)
    config = options.completed(config, loaded)
    noise = Normal.seeded(config.seed, range(len(captions)))
    chain = loaded.sample(captions, generator=noise, config=config)
    frames = list(tqdm(chain, "sampling", config.steps + 1, unit="frame", delay=0.01))
    print(*chains.plot_reverse(loaded, frames, captions, out), sep="\n")


def attention(
    prompts: Prompts = (EXAMPLE,),
    model: Path = MODEL,
    config: SampleConfig = SAMPLE,
    device: Device = "auto",
    out: Path = Path("out/plot"),
) -> None:
    """Where each word of a prompt looks: cross-attention over the image, by level and by step.

    Example: minidiff plot attention "a small blue circle" --seed 7

    Args:
        prompts: what to show: one prompt, in quotes.
        model: box, the small model that ships with minidiff; or our folder, a diffusers folder, one
            .safetensors or .ckpt file of Stable Diffusion.
        device: where to compute; auto takes a GPU if there is one.
        out: folder for attention.png and attention_steps.png.
    """
    options.check_out(out, "attention.png", "attention_steps.png")
    if len(prompts) != 1:
        raise UserError(f"attention takes one prompt, not {len(prompts)}; put it in quotes.")
    device = options.pick_device(device)
    from minidiff import load
    from minidiff.figures.attention import plot_attention
    from minidiff.methods.attention_maps import attention_maps

    loaded = load(model, device)
    maps = attention_maps(loaded, prompts[0], options.completed(config, loaded))
    print(*plot_attention(maps, out, prompts[0]), sep="\n")


def schedules(
    schedules: ScheduleNames = ("linear", "scaled_linear", "cosine", "sigmoid", "flow"),
    out: Path = Path("out/plot"),
) -> None:
    """Noise schedules side by side: alpha, sigma and the signal-to-noise ratio against t.

    Example: minidiff plot schedules linear cosine

    Args:
        schedules: any of linear, scaled_linear, cosine, sigmoid, flow, karras.
        out: folder for schedules.png.
    """
    options.check_out(out, "schedules.png")
    from minidiff.figures import chains

    print(chains.plot_schedules({name: by_name(name) for name in schedules}, out))


def by_name(name: str) -> "NoiseSchedule":
    from minidiff import schedules

    return getattr(schedules, {"flow": "Flow", "karras": "Karras"}.get(name, name))()
