"""The forward chain of one image under several noise schedules, with the same noise in every row.

    python experiments/forward_chain.py [--image PICTURE.jpg] [--schedules linear cosine flow]

Seconds. Writes forward_chain.png (a row for each schedule, a column for each t), schedules.png (the
curves behind it) and results.json. Prints the signal-to-noise ratio along each chain, and where
signal and noise are equal. Look at the right half of the linear row: most of its steps are spent
where the image is invisible, which is why the cosine schedule was made.
"""

from pathlib import Path
from typing import Literal

import torch

from minidiff.cli.script import run
from minidiff.data.folder import load_image, to_model
from minidiff.data.world import World
from minidiff.errors import UserError
from minidiff.figures import chains, plots
from minidiff.schedules import Flow, cosine, linear, scaled_linear, sigmoid
from minidiff.training.progress import write_results

SCHEDULES = {
    "linear": linear(),
    "scaled_linear": scaled_linear(),
    "cosine": cosine(),
    "sigmoid": sigmoid(),
    "flow": Flow(),
}
SHOWN = (
    0.1,
    0.3,
    0.5,
    0.7,
    0.9,
)  # of the way from data to noise: where the signal-to-noise ratio is printed

OUTPUTS = ("forward_chain.png",)  # beside results.json


def main(
    image: Path | None = None,
    schedules: tuple[Literal["linear", "scaled_linear", "cosine", "sigmoid", "flow"], ...] = tuple(
        SCHEDULES
    ),
    size: int = 128,
    columns: int = 9,
    seed: int = 0,
    out: Path = Path("out/forward_chain"),
) -> None:
    """Compare noise schedules on one picture.

    Args:
        image: the picture; left out, one of the built-in world.
        schedules: which rows.
        size: side of the picture in pixels.
        columns: times shown, the first clean and the last noise.
        seed: of the noise, and of the built-in picture.
        out: folder for everything written.
    """
    if columns < 2:
        raise UserError(
            f"--columns is {columns}; it must be at least 2, one for data and one for noise."
        )
    picture = (
        to_model(load_image(image, size))[None]
        if image
        else World(size).batch(1, seed, objects=2)[0]
    )
    eps = torch.randn(picture.shape, generator=torch.Generator().manual_seed(seed))

    rows, figures = {}, {}
    for name in schedules:
        schedule = SCHEDULES[name]
        alpha, sigma = (
            scale.float().view(-1, 1, 1, 1)
            for scale in schedule.alpha_sigma(schedule.timesteps(columns - 1).flip(0))
        )
        rows[name] = alpha * picture + sigma * eps

        # Read the ratio off a thousand times; signal and noise are equal where its logarithm is
        # nearest to 0.
        times = schedule.timesteps(1000).flip(0)
        snr = schedule.snr(times)
        equal = schedule.progress(times)[snr.log().abs().argmin()].item()
        figures[name] = {
            "alpha_is_sigma_at": round(equal, 3),
            "snr": {u: float(f"{snr[round(1000 * u)].item():.3g}") for u in SHOWN},
        }

    labels = [f"t = {k / (columns - 1):.3g}" for k in range(columns)]
    print(plots.strip(rows, labels, out / "forward_chain.png", "x_t = α_t x0 + σ_t ε, by schedule"))
    print(chains.plot_schedules({name: SCHEDULES[name] for name in schedules}, out))
    print(write_results(out, image=image, size=size, seed=seed, schedules=figures))
    for name, row in figures.items():
        snr = ", ".join(f"{value:g} at t = {u}" for u, value in row["snr"].items())
        print(f"{name}: alpha = sigma at t = {row['alpha_is_sigma_at']}; SNR {snr}")


if __name__ == "__main__":
    run(main, OUTPUTS)
