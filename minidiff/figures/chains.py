"""Figures of both Markov chains and of the schedules: the one file that joins plots to diffusion.

Where the scale sqrt(alpha_t^2 + sigma_t^2) of x_t is above 1, x_t is shown divided by it, and the
name of the row says so. Only the Karras schedule needs it: its noise grows to 80 times the image.
"""

from pathlib import Path

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from minidiff.figures import plots
from minidiff.latent_diffusion import LatentDiffusion
from minidiff.samplers import Frame
from minidiff.schedules import Discrete, NoiseSchedule
from minidiff.vae import Pixels

COLUMNS = 9  # of a strip
MAX_FRAMES = 60  # of a GIF


def plot_forward(
    image: Float[Tensor, "1 3 H W"],
    schedule: NoiseSchedule,
    out: Path,
    generator: torch.Generator | None = None,
    title: str | None = None,
) -> list[Path]:
    """Plot x_t = alpha_t x0 + sigma_t eps, with one eps for all t: forward.png and forward.gif."""
    out, times = Path(out), _times(schedule, 5 * (COLUMNS - 1))
    alpha, sigma = (s.to(image.dtype).view(-1, 1, 1, 1) for s in schedule.alpha_sigma(times))
    eps = torch.randn(image.shape, generator=generator, dtype=image.dtype)
    scale, name = _display_scale(schedule, times)
    chain = (alpha * image.cpu() + sigma * eps) / scale.to(image.dtype).view(-1, 1, 1, 1)
    labels, columns = [_label(t) for t in times.tolist()], _spread(len(times), COLUMNS)
    column_labels = [labels[k] for k in columns]
    strip = plots.strip({name: chain[columns]}, column_labels, out / "forward.png", title)
    frames = [{name: x_t[None]} for x_t in chain]
    return [strip, plots.animate(frames, labels, out / "forward.gif")]


@torch.no_grad()
def plot_reverse(
    model: LatentDiffusion,
    frames: list[Frame],
    captions: list[str],
    out: Path,
    title: str | None = None,
) -> list[Path]:
    """Plot noise turning into images: reverse.png and reverse.gif.

    The PNG follows the first sample: x_t as a latent, x_t decoded, and the guess of x0, decoded.
    The GIF shows all samples, without the latent. title: default: the caption.
    """
    times = torch.tensor([frame.t for frame in frames], dtype=torch.float64)
    scales, x_t = _display_scale(model.schedule, times)
    in_latents = not isinstance(model.vae, Pixels)
    columns, film = _spread(len(frames), COLUMNS), _spread(len(frames), MAX_FRAMES)
    images = {}
    for k in {*columns, *film}:
        x, x0 = frames[k].x / scales[k].item(), frames[k].x0
        images[k] = {
            f"{x_t} decoded" if in_latents else x_t: model.vae.decode(x).clamp(-1, 1),
            "guess of x0": model.vae.decode(x0).clamp(-1, 1),
        }
    labels, out = [_label(t) for t in times.tolist()], Path(out)
    rows = {f"latent {x_t}": torch.cat([frames[k].x[:1] for k in columns])} if in_latents else {}
    rows |= {name: torch.cat([images[k][name][:1] for k in columns]) for name in images[0]}
    column_labels, title = [labels[k] for k in columns], title or captions[0]
    strip = plots.strip(rows, column_labels, out / "reverse.png", title)
    film_labels = [labels[k] for k in film]
    return [strip, plots.animate([images[k] for k in film], film_labels, out / "reverse.gif")]


def plot_schedules(schedules: dict[str, NoiseSchedule], out: Path) -> Path:
    """Plot signal, noise and their ratio from data to noise, a curve for each: schedules.png."""
    curves = {}
    for name, schedule in schedules.items():
        times = _times(schedule, 250)
        curves[name] = (schedule.progress(times), *schedule.alpha_sigma(times))
    return plots.schedules(curves, Path(out) / "schedules.png")


def _times(schedule: NoiseSchedule, count: int) -> Shaped[Tensor, "N"]:
    """Timesteps from data to noise in `count` strides, or in all of a chain that has fewer."""
    levels = schedule.T if isinstance(schedule, Discrete) else count
    return schedule.timesteps(min(count, levels)).flip(0)


def _spread(count: int, most: int) -> list[int]:
    """At most `most` of `count` indices, equally spaced, with the first and the last."""
    places = torch.linspace(0, count - 1, min(count, most), dtype=torch.float64)
    return places.round().long().tolist()


def _display_scale(
    schedule: NoiseSchedule, times: Shaped[Tensor, "N"]
) -> tuple[Float[Tensor, "N"], str]:
    """The scale that x_t is divided by to be shown, and the name of the row."""
    alpha, sigma = schedule.alpha_sigma(times)
    scale = (alpha**2 + sigma**2).sqrt().clamp(min=1)
    return scale, "x_t / √(α² + σ²)" if scale.max() > 1.001 else "x_t"


def _label(t: float) -> str:
    return f"t = {t:.0f}" if t == round(t) else f"t = {t:.3g}"
