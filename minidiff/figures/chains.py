"""The pictures of both chains and of the schedules: the one place that joins plots to diffusion. All of them are in this file.

x_t is shown divided by its scale sqrt(alpha_t^2 + sigma_t^2) where that is above 1, as it is for the Karras schedule, whose noise
grows to 80 times the picture; the row's name says so. Everywhere else x_t is shown as it is.
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
FILM = 60  # frames of a GIF, at most


def plot_forward(
    picture: Float[Tensor, "1 3 H W"],
    schedule: NoiseSchedule,
    out: Path,
    generator: torch.Generator | None = None,
    title: str | None = None,
) -> list[Path]:
    """One picture turning into noise, x_t = alpha_t x0 + sigma_t eps with one eps for all t; writes forward.png and forward.gif."""
    times = _times(schedule, 5 * (COLUMNS - 1))
    alpha, sigma = (
        scale.to(picture.dtype).view(-1, 1, 1, 1) for scale in schedule.alpha_sigma(times)
    )
    eps = torch.randn(picture.shape, generator=generator, dtype=picture.dtype)
    scale, name = _shown(schedule, times)
    chain = (alpha * picture.cpu() + sigma * eps) / scale.to(picture.dtype).view(-1, 1, 1, 1)
    labels = [_label(t) for t in times.tolist()]
    some = _spread(len(times), COLUMNS)
    strip = plots.strip(
        {name: chain[some]}, [labels[k] for k in some], Path(out) / "forward.png", title
    )
    return [
        strip,
        plots.animate([{name: x_t[None]} for x_t in chain], labels, Path(out) / "forward.gif"),
    ]


@torch.no_grad()
def plot_reverse(
    model: LatentDiffusion,
    frames: list[Frame],
    captions: list[str],
    out: Path,
    title: str | None = None,
) -> list[Path]:
    """Noise turning into pictures. reverse.png follows the first sample: the latent, the latent decoded, and the guess of the end made
    there, decoded. reverse.gif has all samples side by side, without the bare latent."""
    times = torch.tensor([frame.t for frame in frames], dtype=torch.float64)
    scales, x_t = _shown(model.schedule, times)
    latents = not isinstance(model.vae, Pixels)
    decoded = f"{x_t} decoded" if latents else x_t

    def shown(k: int) -> dict[str, Tensor]:
        x, x0 = frames[k].x / scales[k].item(), frames[k].x0
        return {
            decoded: model.vae.decode(x).clamp(-1, 1),
            "guess of x0": model.vae.decode(x0).clamp(-1, 1),
        }

    some, film = _spread(len(frames), COLUMNS), _spread(len(frames), FILM)
    pictures = {k: shown(k) for k in {*some, *film}}
    labels = [_label(t) for t in times.tolist()]
    rows = {f"latent {x_t}": torch.cat([frames[k].x[:1] for k in some])} if latents else {}
    rows |= {name: torch.cat([pictures[k][name][:1] for k in some]) for name in pictures[0]}
    strip = plots.strip(
        rows, [labels[k] for k in some], Path(out) / "reverse.png", title or captions[0]
    )
    return [
        strip,
        plots.animate(
            [pictures[k] for k in film], [labels[k] for k in film], Path(out) / "reverse.gif"
        ),
    ]


def plot_schedules(schedules: dict[str, NoiseSchedule], out: Path) -> Path:
    """Signal, noise and their ratio of each schedule, against the way from data to noise; writes schedules.png."""
    curves = {}
    for name, schedule in schedules.items():
        times = _times(schedule, 250)
        curves[name] = (schedule.progress(times), *schedule.alpha_sigma(times))
    return plots.schedules(curves, Path(out) / "schedules.png")


def _times(schedule: NoiseSchedule, count: int) -> Shaped[Tensor, "N"]:
    """From data to noise in `count` of the sampler's strides; a chain with fewer noise levels shows them all."""
    levels = schedule.T if isinstance(schedule, Discrete) else count
    return schedule.timesteps(min(count, levels)).flip(0)


def _spread(count: int, most: int) -> list[int]:
    """At most `most` of `count` places, equally spaced, the first and the last among them."""
    return (
        torch.linspace(0, count - 1, min(count, most), dtype=torch.float64).round().long().tolist()
    )


def _shown(schedule: NoiseSchedule, times: Shaped[Tensor, "N"]) -> tuple[Float[Tensor, "N"], str]:
    """What x_t is divided by to be looked at, and what it is called then."""
    alpha, sigma = schedule.alpha_sigma(times)
    scale = (alpha**2 + sigma**2).sqrt().clamp(min=1)
    return scale, "x_t / √(α² + σ²)" if scale.max() > 1.001 else "x_t"


def _label(t: float) -> str:
    return f"t = {t:.0f}" if t == round(t) else f"t = {t:.3g}"
