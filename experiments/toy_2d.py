"""A diffusion with a known answer: a density in the plane, its exact score, and a learnt one.

    python experiments/toy_2d.py [--density ring]

A minute on one CPU core. Writes toy_2d.png (draws, score fields and sampling paths, exact and
learnt), loss.png and results.json. The exact denoiser is an oracle: with the same sampler and the
same noise, only the network differs between the rows of the figure. Distances are printed beside
their floor, the distance between two exact draws of the same size.
"""

import math
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from minidiff import schedules
from minidiff.cli.script import run
from minidiff.denoiser import Denoiser
from minidiff.figures import plots
from minidiff.figures.curves import Panel
from minidiff.layers import timestep_embedding
from minidiff.methods.exact import Mixture
from minidiff.samplers import ddim, sample
from minidiff.train import EMA, Loss, TrainConfig, train
from minidiff.training.progress import follow, last_loss, write_results
from minidiff.training.resume import read_log
from minidiff.training.seeds import generator_of


def moons(u: Float[Tensor, "K"]) -> Float[Tensor, "K 2"]:
    """Two half circles, one hooked into the other."""
    angle, lower = 2 * math.pi * u, (u > 0.5).double()
    return torch.stack([angle.cos() + lower, angle.sin() + 0.5 * lower], dim=1)


def ring(u: Float[Tensor, "K"]) -> Float[Tensor, "K 2"]:
    """Eight islands on a circle."""
    angle = 2 * math.pi * (8 * u).floor() / 8
    return torch.stack([angle.cos(), angle.sin()], dim=1)


class Curve(Mixture):
    """64 equal Gaussians along a curve, scaled to zero mean and unit variance: everything about it
    is known in closed form.
    """

    def __init__(self, density: str, std: float = 0.08):
        centres = {"moons": moons, "ring": ring}[density](
            (torch.arange(64, dtype=torch.float64) + 0.5) / 64
        )
        centres = centres - centres.mean(0)
        scale = (centres.pow(2).mean() + std**2).sqrt().item()
        super().__init__(centres / scale, std / scale)

    def draw(self, n: int, generator: torch.Generator) -> Float[Tensor, "N 2"]:
        return super().draw(n, generator).float()

    def strays(self, x: Float[Tensor, "N 2"]) -> float:
        """The share of points more than 4 standard deviations from every centre: of exact draws, at
        most exp(-8) = 0.0003.
        """
        return (
            (torch.cdist(x.double(), self.means).min(dim=1).values > 4 * self.std[0, 0])
            .double()
            .mean()
            .item()
        )


class MLP(nn.Module):
    """Waves of x and of t through four hidden layers: from the bare numbers, a network learns the
    broad shape and blurs the rest.
    """

    def __init__(self, width: int):
        super().__init__()
        self.first, self.last = nn.Linear(2 * 7 + 64, width), nn.Linear(width, 2)
        self.hidden = nn.ModuleList(nn.Linear(width, width) for _ in range(3))

    def forward(
        self, x: Float[Tensor, "N 2"], t: Float[Tensor, "N"], context: None = None
    ) -> Float[Tensor, "N 2"]:
        waves = [wave(k * x) for k in (1, 2, 4) for wave in (torch.sin, torch.cos)]
        h = self.first(torch.cat([x, *waves, timestep_embedding(t, 64)], dim=1))
        for layer in self.hidden:
            h = layer(F.silu(h))
        return self.last(F.silu(h))


def energy_distance(x: Float[Tensor, "N 2"], y: Float[Tensor, "M 2"]) -> float:
    """2 E|x - y| - E|x - x'| - E|y - y'|: zero only where two distributions are the same (Székely &
    Rizzo 2013).
    """
    return (
        2 * torch.cdist(x, y).mean() - torch.cdist(x, x).mean() - torch.cdist(y, y).mean()
    ).item()


OUTPUTS = ("toy_2d.png", "loss.png")  # beside results.json


def main(
    density: Literal["moons", "ring"] = "moons",
    out: Path = Path("out/toy_2d"),
    steps: int = 8000,
    batch: int = 512,
    lr: float = 4e-3,
    width: int = 128,
    n: int = 4000,
    sampling_steps: int = 50,
    field_at: int = 120,
    seed: int = 0,
    resume: bool = False,
) -> None:
    """Learn a density in the plane and compare with the truth.

    Args:
        density: the curve its Gaussians lie on.
        out: folder for everything written.
        steps: training steps.
        batch: points in a step.
        lr: peak learning rate.
        width: of the network's hidden layers.
        n: points in each set of samples.
        sampling_steps: DDIM steps.
        field_at: the t, 1 to 1000, at which the score fields are drawn.
        seed: everything random follows from it.
        resume: go on where an interrupted run stopped.
    """
    torch.manual_seed(seed)
    schedule, mixture = schedules.cosine(), Curve(density)
    denoiser = Denoiser(MLP(width), schedule, target="v")
    ema = EMA(denoiser, decay=0.999)

    def batches(start: int) -> Iterator[Tensor]:
        # Training seeds its noise with steps from 0 up; equal seeds would correlate data and noise.
        for k in count(start):
            yield mixture.draw(batch, generator_of(seed, -1 - k))

    def loss(x0: Tensor) -> Loss:
        t = schedule.sample_t(len(x0))
        return {"loss": denoiser.loss(x0, t=t), "progress": schedule.progress(t)}

    training = train(
        loss, denoiser, batches, TrainConfig(steps, lr, seed=seed), ema, out / "training", resume
    )
    speed = follow(training, f"learning the {density}", steps, batch)
    log = read_log(out / "training")
    denoisers = {"exact": mixture.denoiser(schedule), "learnt": torch.no_grad()(ema.average)}

    # Sample with both denoisers from the same noise, and measure how far from exact draws they end.
    generator = torch.Generator().manual_seed(seed)
    truth, x_T = mixture.draw(n, generator), torch.randn(n, 2, generator=generator)
    chains = {
        name: list(sample(denoise, schedule, x_T, sampling_steps, ddim()))
        for name, denoise in denoisers.items()
    }
    figures = {
        "distance_floor": sum(energy_distance(mixture.draw(n, generator), truth) for _ in range(5))
        / 5
    }
    figures |= {
        f"distance_{name}": energy_distance(chain[-1].x, truth) for name, chain in chains.items()
    }
    figures |= {f"strays_{name}": mixture.strays(chain[-1].x) for name, chain in chains.items()}

    # The score is -eps / sigma_t: compare sqrt(E|learnt - exact|^2 / E|exact|^2) where x_t lives.
    for t in (100, 250, 500, 750):
        times = torch.full((n,), t)
        alpha, sigma = (scale[:, None].float() for scale in schedule.alpha_sigma(times))
        x = alpha * truth + sigma * torch.randn(n, 2, generator=generator)
        exact, learnt = (denoise(x, times).eps for denoise in denoisers.values())
        figures[f"score_error_t{t}"] = (
            ((learnt - exact).pow(2).sum() / exact.pow(2).sum()).sqrt().item()
        )

    # Draw the fields on a grid, as far as x_t comes: beyond, no network has ever been shown
    # anything.
    alpha, sigma = (scale.item() for scale in schedule.alpha_sigma(torch.tensor(field_at)))
    grid = torch.cartesian_prod(torch.linspace(-3, 3, 31), torch.linspace(-3, 3, 31))
    grid = grid[torch.cdist(grid, alpha * truth + sigma * x_T).min(dim=1).values < 0.1]
    scores = {
        name: -denoise(grid, torch.full((len(grid),), field_at)).eps / sigma
        for name, denoise in denoisers.items()
    }
    paths = {name: torch.stack([frame.x[:60] for frame in chain]) for name, chain in chains.items()}
    print(
        plots.points(
            [
                Panel("exact draws", points=truth),
                Panel(f"exact score at t = {field_at}", arrows=(grid, scores["exact"])),
                Panel("exact DDIM paths", paths=paths["exact"]),
                Panel("learnt draws", points=chains["learnt"][-1].x),
                Panel(f"learnt score at t = {field_at}", arrows=(grid, scores["learnt"])),
                Panel("learnt DDIM paths", paths=paths["learnt"]),
            ],
            out / "toy_2d.png",
        )
    )
    print(plots.loss(log, out / "loss.png"))

    print(
        write_results(
            out,
            density=density,
            steps=steps,
            n=n,
            seed=seed,
            loss=last_loss(log),
            **figures,
            **speed,
        )
    )
    print(", ".join(f"{name} {value:.2g}" for name, value in figures.items()))


if __name__ == "__main__":
    run(main, OUTPUTS)
