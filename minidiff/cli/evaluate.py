"""The verb that measures: quality, diversity and speed."""

from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, get_args

import tyro

from minidiff.cli import options
from minidiff.cli.options import MODEL, SAMPLE, Device, Listed, Numbers
from minidiff.errors import UserError, choice
from minidiff.options.sampling import SampleConfig, SamplerName

if TYPE_CHECKING:
    from minidiff.evaluation.bench import Bench, Figure
    from minidiff.latent_diffusion import LatentDiffusion

LEAST = 10  # images: fewer have no neighbours to speak of
LISTS = ("samplers", "sweep_steps", "sweep_guidance")


@dataclass(frozen=True)
class EvaluateOptions:
    """What to measure, and against what."""

    # a captioned folder to measure against. Default: the built-in world
    data: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    # images; a fourth as many again are made for diversity. Of a folder, at most half
    n: int = 500
    # how much of the built-in world the model knows: what quickstart teaches, or the whole
    world: Literal["quickstart", "whole"] = "quickstart"
    # what distances are measured in: pixels-8x8, random-conv-0, critic-attributes, cifar10-resnet,
    # inception-v3-compat. Default: the first two, and for the built-in world the third
    features: Listed = ""
    # also the CLIP score, if CLIP's weights can be had
    clip: bool = False
    # where the folder's metadata.jsonl has the captions
    caption_column: str = "text"

    def __post_init__(self) -> None:
        options.check_least("n", self.n, LEAST)


@dataclass(frozen=True)
class SweepOptions:
    """Every combination of three lists."""

    # measure every combination of the three lists below instead; goes on where it stopped
    trilemma: bool = False
    # for the trilemma
    samplers: Listed = "ddim,ddpm,dpmpp_2m"
    # for the trilemma
    sweep_steps: Numbers = "5,10,25"
    # for the trilemma
    sweep_guidance: Numbers = "1,2,4"

    def __post_init__(self) -> None:
        if not self.trilemma and (names := options.changed(self, LISTS)):
            raise UserError(f"{names[0]} does nothing without --trilemma.")
        if not options.words(self.samplers):
            raise UserError("--samplers names none; write them as in ddim,dpmpp_2m.")
        for name in options.words(self.samplers):
            choice("sampler", name, get_args(SamplerName))
        for count in options.numbers("sweep_steps", self.sweep_steps):
            if count != int(count):
                raise UserError(f"sweep_steps holds {count:g}; steps are whole numbers.")
        options.numbers("sweep_guidance", self.sweep_guidance)

    def configs(self, config: SampleConfig) -> list[SampleConfig]:
        """A config for each combination; each checks itself."""
        steps = map(int, options.numbers("sweep_steps", self.sweep_steps))
        guidance = options.numbers("sweep_guidance", self.sweep_guidance)
        return [
            replace(config, sampler=sampler, steps=count, guidance=scale)
            for sampler, count, scale in product(options.words(self.samplers), steps, guidance)
        ]


BENCH, SWEEP = EvaluateOptions(), SweepOptions()


def evaluate(
    model: Path = MODEL,
    config: SampleConfig = SAMPLE,
    measure: EvaluateOptions = BENCH,
    sweep: SweepOptions = SWEEP,
    device: Device = "auto",
    out: Path = Path("out/evaluate"),
) -> None:
    """Measure a model: quality, diversity and speed, each beside what real images score.

    Example: minidiff evaluate --model out/quickstart/model --n 500 --sampler dpmpp_2m --steps 10

    Args:
        model: our folder, a diffusers folder, one .safetensors or .ckpt file of Stable Diffusion,
            or a name on the Hugging Face Hub.
        device: where to compute; auto takes a GPU if there is one.
        out: folder for results.json and evaluate.csv, or trilemma.csv and trilemma.png.
    """
    check_idle(config, measure, sweep)
    options.check_out(out, "trilemma.png" if sweep.trilemma else "results.json")
    device = options.pick_device(device)
    from minidiff import load
    from minidiff.evaluation import features
    from minidiff.evaluation import sweep as sweeps

    suited = [n for n in features.DEFAULTS if measure.data is None or n != "critic-attributes"]
    networks = sweeps.NETWORKS if sweep.trilemma else options.words(measure.features) or suited
    for network in networks:
        features.by_name(network)
    table = out / ("trilemma.csv" if sweep.trilemma else "evaluate.csv")
    sweeps.read(table)  # complains of other people's files before anything slow
    loaded = load(model, device)
    configs = sweep.configs(config) if sweep.trilemma else [config]
    configs = [options.completed(each, loaded) for each in configs]
    bench = bench_of(measure, loaded.size, networks, config.seed)
    run = {
        "model": str(model),
        "weights": sweeps.fingerprint(loaded),
        "data": str(measure.data or f"{measure.world} world"),
        "n": str(measure.n),
        "seed": str(config.seed),
    }
    if sweep.trilemma:
        trilemma(loaded, bench, configs, table, run)
    else:
        single(loaded, bench, configs[0], table, run)


def check_idle(config: SampleConfig, measure: EvaluateOptions, sweep: SweepOptions) -> None:
    """Raise a UserError for an option that would do nothing."""
    if names := options.changed(config, ("size", "tile")):
        raise UserError(f"{names[0]} does nothing here: images are measured at the training size.")
    names = options.changed(config, ("steps", "guidance", "sampler"))
    names += options.changed(measure, ("features",))
    if sweep.trilemma and names:
        lists = ", ".join(f"--{name.replace('_', '-')}" for name in LISTS)
        raise UserError(f"{names[0]} does nothing beside --trilemma, which takes {lists}.")


def bench_of(measure: EvaluateOptions, size: int, networks: list[str], seed: int) -> "Bench":
    """Real images of this size, and prompts."""
    from minidiff.data.world import World
    from minidiff.evaluation import bench
    from minidiff.recipes import quickstart

    if measure.data is not None:
        return bench.of_folder(
            measure.data, size, measure.n, seed, networks, measure.clip, measure.caption_column
        )
    parts = (quickstart.SHAPES, quickstart.COLOURS) if measure.world == "quickstart" else ()
    world = World(size, *parts)
    return bench.of_world(world, measure.n, seed, networks, measure.clip)


def trilemma(
    model: "LatentDiffusion",
    bench: "Bench",
    configs: list[SampleConfig],
    table: Path,
    run: dict[str, str],
) -> None:
    """Measure what is not in the table yet; print the Pareto front, draw the figure."""
    from minidiff.evaluation import sweep

    rows = sweep.sweep(model, bench, configs, table, run)
    print("the Pareto front of quality, diversity and speed:", end="\n  ")
    print(*map(sweep.name, sweep.front(rows)), sep="\n  ")
    best = sweep.cheapest(rows)
    column = sweep.quality(best)
    score = f"{column} {best[column]} at {best[sweep.SPEED]} evaluations per picture"
    print(f"99 % of the best quality at the fewest evaluations: {sweep.name(best)} ({score})")
    print(table, sweep.figure(rows, table.with_suffix(".png")), sep="\n")


def single(
    model: "LatentDiffusion", bench: "Bench", config: SampleConfig, table: Path, run: dict[str, str]
) -> None:
    """Measure one way to sample; print the figures, write results.json, add a line to the table."""
    from minidiff.evaluation import bench as benches
    from minidiff.evaluation import sweep
    from minidiff.evaluation.features import INCEPTION
    from minidiff.training.progress import write_results

    drawn = benches.draw(model, bench, config, progress=True)
    figures = benches.figures(bench, drawn, config.seed)
    print(as_text(figures))
    if "accuracy" in bench.real:  # of the built-in world
        print("prompts are held-out captions; a floor is the score of as many real images.")
    if INCEPTION not in bench.networks:
        print(f"no Fréchet distance here is an FID, which takes --features {INCEPTION}.")
    key = run | sweep.columns(config)
    print(write_results(table.parent, **key, figures=[figure._asdict() for figure in figures]))
    print(sweep.append(table, key | sweep.flat(figures)))


def as_text(figures: list["Figure"]) -> str:
    """Figures in columns; the interval is the middle 95 % of a bootstrap."""
    lines = [("metric", "features", "value", "95 %", "floor", "n")]
    for row in figures:
        interval = "" if row.low is None else f"{row.low:.3g} .. {row.high:.3g}"
        floor = "" if row.floor is None else f"{row.floor:.4g}"
        lines.append((row.metric, row.features, f"{row.value:.4g}", interval, floor, str(row.n)))
    columns = [
        [cell.ljust(max(map(len, cells))) for cell in cells] for cells in zip(*lines, strict=True)
    ]
    return "\n".join("  ".join(line).rstrip() for line in zip(*columns, strict=True))
