"""The order of each sampler: its error, where the truth is known, against evaluations.

    python experiments/sampler_order.py [--schedule flow] [--spacing trailing]

Seconds. Writes sampler_order.png and results.json, and prints the fitted orders. Left, the
deterministic samplers: three Gaussians in the plane, whose denoiser is exact, and the distance from
the end of the true path of each noise. Right, the samplers that draw noise and so have no path: one
Gaussian, and the error of the variance of the samples, computed without sampling.
"""

from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from minidiff import schedules
from minidiff.cli.script import run
from minidiff.errors import UserError
from minidiff.figures.curves import COLOURS, new_figure, save, style
from minidiff.methods.exact import Mixture
from minidiff.samplers import by_name, sample
from minidiff.training.progress import write_results

SCHEDULES = {"cosine": schedules.cosine(), "flow": schedules.Flow(), "karras": schedules.Karras()}
PATHS = {"euler": 1, "heun": 2, "dpmpp_2m": 1, "unipc": 1}  # evaluations a step
NOISY = {"ddpm": 1, "dpmpp_2m_sde": 1}
ISLANDS = Mixture(
    torch.tensor([[-1.0, -0.6], [0.7, -0.4], [0.2, 1.1]]), 0.35, torch.tensor([0.3, 0.5, 0.2])
)
STD = 0.5
ONE = Mixture(torch.zeros(1, 1), STD)


def ends(
    name: str,
    schedule: schedules.NoiseSchedule,
    spacing: str,
    steps: int,
    noise: Float[Tensor, "N 2"],
) -> Float[Tensor, "N 2"]:
    """Where a deterministic sampler takes unit noise."""
    times = schedule.timesteps(steps, spacing)
    alpha, sigma = schedule.alpha_sigma(times[0])
    *_, last = sample(
        ISLANDS.denoiser(schedule),
        schedule,
        (alpha**2 + sigma**2).sqrt() * noise,
        times,
        by_name(name),
    )
    return last.x


def variance(
    name: str, schedule: schedules.NoiseSchedule, spacing: str, steps: int, seed: int
) -> float:
    """The variance of a stochastic sampler's samples.

    On Gaussian data a chain is linear in its noises, x = c_T x_T + sum_k c_k z_k. Twice as many
    chains as coefficients determine these.
    """
    times, chains = schedule.timesteps(steps, spacing), 2 * (steps + 1)
    alpha, sigma = schedule.alpha_sigma(times[0])
    generator = torch.Generator().manual_seed(seed)
    noises = torch.randn(chains, steps + 1, generator=generator, dtype=torch.float64)
    columns = iter(noises.split(1, dim=1))
    x_T = (alpha**2 * STD**2 + sigma**2).sqrt() * next(columns)
    *_, last = sample(
        ONE.denoiser(schedule), schedule, x_T, times, by_name(name), noise=lambda x: next(columns)
    )
    return torch.linalg.lstsq(noises, last.x).solution.pow(2).sum().item()


def order(counts: tuple[int, ...], errors: list[float]) -> float:
    """The exponent p of the straight line errors ~ counts^-p."""
    x, y = (torch.tensor(values, dtype=torch.float64).log() for values in (counts, errors))
    return -(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).pow(2).sum()).item()


def plot(panels: dict[str, dict[str, tuple[list[int], list[float], float]]], path: Path) -> Path:
    """A panel for each kind of error, a line for each sampler: (evaluations, errors, order)."""
    with style():
        figure, axes = new_figure(len(panels), width=3.6, height=3.2)
        colours = iter(COLOURS)
        for axis, (title, lines) in zip(axes, panels.items(), strict=True):
            for (name, (evaluations, errors, p)), mark in zip(lines.items(), "os^D", strict=False):
                axis.loglog(
                    evaluations,
                    errors,
                    f"{mark}-",
                    color=next(colours),
                    markersize=4,
                    label=f"{name}: order {p:.2f}",
                )
            axis.set(title=title, xlabel="evaluations of the denoiser")
            axis.xaxis.set_major_formatter("{x:g}")
            axis.yaxis.set_major_formatter("{x:g}")
            axis.minorticks_off()
            axis.legend(loc="lower left")
        return save(figure, path)


OUTPUTS = ("sampler_order.png",)  # beside results.json


def main(
    schedule: Literal["cosine", "flow", "karras"] = "karras",
    spacing: Literal["trailing", "karras", "log-snr"] = "log-snr",
    steps: tuple[int, ...] = (8, 16, 32, 64, 128, 256),
    points: int = 256,
    seed: int = 0,
    out: Path = Path("out/sampler_order"),
) -> None:
    """Measure the order of every sampler.

    Args:
        schedule: of the noise.
        spacing: which times are visited.
        steps: how many steps, from few to many; the order is fitted over the last four.
        points: noises whose paths are followed.
        seed: everything random follows from it.
        out: folder for everything written.
    """
    if len(steps) < 2 or min(steps) < 1:
        raise UserError(
            f"--steps is {' '.join(map(str, steps))}; give at least two numbers, each at least 1."
        )
    noises = SCHEDULES[schedule]
    noise = torch.randn(
        points, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )

    # Where every path truly ends: eight times as many steps of the most accurate method.
    truth = ends("unipc", noises, spacing, 8 * max(steps), noise)
    errors = {
        name: [
            (ends(name, noises, spacing, n, noise) - truth).pow(2).sum(1).mean().sqrt().item()
            for n in steps
        ]
        for name in PATHS
    }
    errors |= {
        name: [abs(variance(name, noises, spacing, n, seed) / STD**2 - 1) for n in steps]
        for name in NOISY
    }
    lines = {
        name: ([k * n for n in steps], errors[name], order(steps[-4:], errors[name][-4:]))
        for name, k in (PATHS | NOISY).items()
    }

    titles = {"distance from the true end": PATHS, "relative error of the variance drawn": NOISY}
    print(
        plot(
            {title: {name: lines[name] for name in names} for title, names in titles.items()},
            out / "sampler_order.png",
        )
    )
    figures = {
        name: {"evaluations": e, "error": errors, "order": round(p, 3)}
        for name, (e, errors, p) in lines.items()
    }
    print(write_results(out, schedule=schedule, spacing=spacing, seed=seed, **figures))
    print(", ".join(f"{name} {figure['order']:.2f}" for name, figure in figures.items()))


if __name__ == "__main__":
    run(main, OUTPUTS)
