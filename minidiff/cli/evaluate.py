"""The verb that measures: quality, diversity and speed."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import tyro

from minidiff.cli import options
from minidiff.cli.options import (
    MODEL,
    Device,
    Integer,
    Listed,
    Number,
    Numbers,
    Sampler,
    Spacing,
    numbers,
    words,
)
from minidiff.errors import UserError

STEPS, SAMPLERS, SWEEP_STEPS, SWEEP_GUIDANCE = (
    25,
    "ddim,ddpm,dpmpp_2m",
    "5,10,25",
    "1,2,4",
)  # unless told otherwise
LEAST = 10  # pictures: fewer have no neighbours to speak of


def evaluate(
    model: Path = MODEL,
    data: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None,
    n: int = 500,
    steps: Integer = None,
    guidance: Number = None,
    sampler: Sampler = None,
    spacing: Spacing = None,
    interval: Numbers = "0,1",
    world: Annotated[str, tyro.conf.arg(metavar="quickstart|whole")] = "quickstart",
    features: Listed = "",
    clip: bool = False,
    caption_column: str = "text",
    trilemma: bool = False,
    samplers: Listed = "",
    sweep_steps: Numbers = "",
    sweep_guidance: Numbers = "",
    seed: int = 0,
    device: Device = "auto",
    out: Path = Path("out/evaluate"),
) -> None:
    """Measure a model: quality, diversity and speed, each beside what real pictures score.

    Args:
        model: our folder, a diffusers folder, one .safetensors or .ckpt file of Stable Diffusion, or a name on the Hugging Face Hub.
        data: a captioned folder to measure against; left out, it is the built-in world.
        n: pictures; a fourth as many again are drawn for diversity. Of a folder, at most half.
        steps: sampling steps. Left out, 25.
        guidance: how strongly the text steers. Left out, it is the model's own.
        sampler: how to step from noise to picture. Left out, it is the model's own.
        spacing: which times are visited. Left out, it is the model's own.
        interval: guide only in this stretch of the way, from 0 (data) to 1 (noise); a step that is not guided costs half.
        world: how much of the built-in world the model knows: what quickstart teaches, or the whole.
        features: what distances are measured in: pixels-8x8, random-conv-0, critic-attributes, cifar10-resnet, inception-v3-compat.
            Left out, the first two, and for the built-in world the third.
        clip: also the CLIP score, if CLIP's weights can be had.
        caption_column: where the folder's metadata.jsonl has the captions.
        trilemma: measure every combination of the three lists below instead; goes on where it stopped.
        samplers: for the trilemma. Left out, ddim,ddpm,dpmpp_2m.
        sweep_steps: for the trilemma. Left out, 5,10,25.
        sweep_guidance: for the trilemma. Left out, 1,2,4.
        seed: everything random follows from it.
        device: where to compute; auto takes a GPU if there is one.
        out: folder for results.json and evaluate.csv, or trilemma.csv and trilemma.png.
    """
    if n < LEAST:
        raise UserError(f"--n is {n}; it must be at least {LEAST}.")
    if world not in ("quickstart", "whole"):
        raise UserError(f'no world "{world}"; --world is quickstart or whole.')
    single = {
        "--steps": steps,
        "--guidance": guidance,
        "--sampler": sampler,
        "--features": features or None,
    }
    lists = {
        "--samplers": samplers or None,
        "--sweep-steps": sweep_steps or None,
        "--sweep-guidance": sweep_guidance or None,
    }
    for option, value in (single if trilemma else lists).items():
        if value is not None:
            raise UserError(
                f"{option} does nothing {'beside' if trilemma else 'without'} --trilemma, which takes {', '.join(lists)}."
            )
    listed = (
        numbers("--sweep-steps", sweep_steps or SWEEP_STEPS),
        numbers("--sweep-guidance", sweep_guidance or SWEEP_GUIDANCE),
    )
    between, steps = options.parsed_interval(interval), STEPS if steps is None else steps
    diffusion, config = options.sampling(
        model, steps, guidance, sampler, seed, device, out, spacing, between
    )
    from minidiff.cli.script import write_results
    from minidiff.data.world import World
    from minidiff.evaluation import bench as evaluate
    from minidiff.evaluation import sweep as sweeps
    from minidiff.evaluation.features import DEFAULTS, INCEPTION, by_name
    from minidiff.recipes import quickstart

    suit = [name for name in DEFAULTS if data is None or name != "critic-attributes"]
    networks = sweeps.NETWORKS if trilemma else words(features) or suit
    for network in networks:
        by_name(network)
    if data is None:
        parts = (quickstart.SHAPES, quickstart.COLOURS) if world == "quickstart" else ()
        bench = evaluate.of_world(World(diffusion.size, *parts), n, seed, networks, clip)
    else:
        bench = evaluate.of_folder(data, diffusion.size, n, seed, networks, clip, caption_column)
    run = {
        "model": str(model),
        "weights": sweeps.fingerprint(diffusion),
        "data": str(data or f"{world} world"),
        "n": str(n),
        "seed": str(seed),
    }
    if trilemma:
        settings = swept(diffusion, words(samplers or SAMPLERS), *listed, config)
        rows = sweeps.sweep(diffusion, bench, settings, out / "trilemma.csv", run)
        best = sweeps.cheapest(rows)
        print(
            "the Pareto front of quality, diversity and speed:",
            *map(sweeps.name, sweeps.front(rows)),
            sep="\n  ",
        )
        said = f"{sweeps.quality(best)} {best[sweeps.quality(best)]} at {best[sweeps.SPEED]} evaluations per picture"
        print(f"99 % of the best quality at the fewest evaluations: {sweeps.name(best)} ({said})")
        print(out / "trilemma.csv", sweeps.figure(rows, out / "trilemma.png"), sep="\n")
        return
    sweeps.read(out / "evaluate.csv")  # complains of other people's files before anything slow
    drawn = evaluate.draw(diffusion, bench, config, progress=True)
    rows = evaluate.figures(bench, drawn, seed)
    print(table(rows))
    if data is None:
        print(
            "prompts are held-out captions; a floor is what as many real pictures score in the model's place."
        )
    if INCEPTION not in networks:
        print(
            "no Fréchet distance here is an FID: that name belongs to Inception's features (--features inception-v3-compat)."
        )
    key = run | sweeps.columns(config)
    written = write_results(out, **key, figures=[row._asdict() for row in rows])
    print(written, sweeps.append(out / "evaluate.csv", key | sweeps.flat(rows)), sep="\n")


def swept(
    diffusion,
    names: list[str],
    steps: list[float],
    guidance: list[float],
    config,  # SampleConfig
):
    """Every combination, each checked before anything slow."""
    from minidiff.samplers import by_name

    for name in names:
        by_name(name)
    for count in steps:
        if count != int(count):
            raise UserError(f"--sweep-steps holds {count:g}; steps are whole numbers.")
        diffusion.schedule.timesteps(int(count), config.spacing)
    if not names:
        raise UserError("--samplers names none; write them as in ddim,dpmpp_2m.")
    return [
        replace(config, sampler=name, steps=int(count), guidance=scale)
        for name in names
        for count in steps
        for scale in guidance
    ]


def table(rows) -> str:
    """Figures in columns; the interval is the middle 95 % of a bootstrap."""
    lines = [("metric", "features", "value", "95 %", "floor", "n")]
    for row in rows:
        between = "" if row.low is None else f"{row.low:.3g} .. {row.high:.3g}"
        lines.append(
            (
                row.metric,
                row.features,
                f"{row.value:.4g}",
                between,
                "" if row.floor is None else f"{row.floor:.4g}",
                str(row.n),
            )
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )
