"""The trilemma of the model in the box: what sampler, number of steps and guidance give and cost,
and the least that is nearly as good as the best.

    python experiments/trilemma.py --out out/trilemma

8 samplers x 5 numbers of steps x 4 guidances, and a few that guide in a part of the way only. A
quarter of an hour of one free core; what was interrupted goes on where it stopped. Writes
trilemma.csv, trilemma.png and results.json.

[1] Xiao, Kreis, Vahdat. Tackling the Generative Learning Trilemma with Denoising Diffusion GANs.
    2022. arXiv:2112.07804
[2] Kynkäänniemi et al. Applying Guidance in a Limited Interval Improves Sample and Distribution
    Quality in Diffusion Models. 2024. arXiv:2404.07724
"""

from dataclasses import replace
from itertools import product
from pathlib import Path

import torch

from minidiff import load
from minidiff.cli.script import run
from minidiff.data.world import World
from minidiff.evaluation import sweep as trilemma
from minidiff.evaluation.bench import of_world
from minidiff.options.sampling import Interval, SampleConfig
from minidiff.recipes import quickstart
from minidiff.training.progress import write_results

SAMPLERS = (
    "ddim",
    "ddpm",
    "euler",
    "dpmpp_2m",
    "dpmpp_2m_sde",
    "unipc",
    "lcm",
    "heun",
)  # heun takes two evaluations a step
# guided in two steps only, which settle what stands where ([2])
PART = SampleConfig(5, 2.5, "ddpm", "shifted", interval=Interval(0.78, 0.95))
# the model's own setting, and the fewest evaluations
MORE = [SampleConfig(25, 2.0, "ddpm"), *(replace(PART, steps=count) for count in (5, 6, 7, 8))]

OUTPUTS = ("trilemma.png",)  # beside results.json


def main(
    model: Path = Path("box"),
    samplers: tuple[str, ...] = SAMPLERS,
    steps: tuple[int, ...] = (2, 3, 4, 6, 10),
    guidance: tuple[float, ...] = (1, 1.5, 2, 3),
    more: bool = True,
    n: int = 100,
    seed: int = 0,
    out: Path = Path("out/trilemma"),
) -> None:
    """Measure every way to sample, and name the cheapest that is nearly as good as the best.

    Args:
        model: what minidiff.load takes; it must know the built-in world that quickstart teaches.
        samplers: how to step from noise to picture.
        steps: numbers of steps.
        guidance: how strongly the text steers.
        more: also the settings of MORE, beside these lists.
        n: pictures for each setting; a fourth as many again for diversity.
        seed: everything random follows from it.
        out: folder for everything written.
    """
    torch.set_num_threads(1)
    diffusion = load(model, "cpu").to(memory_format=torch.channels_last)  # a fifth faster
    bench = of_world(
        World(diffusion.size, quickstart.SHAPES, quickstart.COLOURS), n, seed, trilemma.NETWORKS
    )
    key = {
        "model": str(model),
        "weights": trilemma.fingerprint(diffusion),
        "data": "quickstart world",
        "n": str(n),
        "seed": str(seed),
    }
    settings = [
        SampleConfig(count, scale, name)
        for count, name, scale in product(steps, samplers, guidance)
    ]  # the fast ones first
    settings = [replace(setting, seed=seed) for setting in [*settings, *(MORE if more else [])]]
    rows = trilemma.sweep(diffusion, bench, settings, out / "trilemma.csv", key)

    best, enough = max(rows, key=trilemma.point), trilemma.cheapest(rows)
    said = {
        name: f"{trilemma.name(row)}: {row['accuracy critic']} at {row[trilemma.SPEED]}"
        for name, row in (("best", best), ("enough", enough))
    }
    print(trilemma.figure(rows, out / "trilemma.png"))
    print(
        write_results(
            out,
            **key,
            settings=len(rows),
            **said,
            front=[trilemma.name(row) for row in trilemma.front(rows)],
        )
    )
    print(
        f"accuracy and evaluations a picture: best {said['best']}; "
        f"99 % of it with the fewest {said['enough']}"
    )


if __name__ == "__main__":
    run(main, OUTPUTS)
