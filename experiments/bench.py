"""How fast is minidiff on this machine, beside diffusers and denoising-diffusion-pytorch?

    python experiments/bench.py                          # everything; an hour on two cores
    python experiments/bench.py --parts step,start
    python experiments/bench.py --tiny                   # everything at its smallest: seconds

Every library does the same work in turns, in one process, so that what else the machine does meets
all of them; figures are medians. "As run" is what a library's users do, "tuned" adds channels last
and, where the processor has it, bf16. The floor is ours without all but its convolutions and linear
layers, timed in the same turns. Weights are random. A library that is not installed is said to be
so. Writes bench.csv, bench.png, table.md (the README's table) and results.json.
"""

import csv
import io
import math
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":  # before anything reads them: figures alone are printed
    os.environ |= {"TQDM_DISABLE": "1", "DIFFUSERS_VERBOSITY": "error"}

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))  # the files beside this one
import bench_files as files_side
import bench_sides as sides
from bench_sides import Side
from measuring import Setup, turns

from minidiff.cli.script import run
from minidiff.errors import UserError
from minidiff.figures import curves
from minidiff.methods.lora import LoRA
from minidiff.training import atomic
from minidiff.training.device import device_name
from minidiff.training.progress import write_results

OURS, THEIRS, THIRD, FLOOR = "minidiff", "diffusers", "denoising-diffusion-pytorch", "floor"
Build = Callable[[Setup, bool], Side]


class Case(NamedTuple):
    """The same work by each library; ours comes first. apart: each turn in a process of its own,
    because two libraries' memory at once would not fit."""

    what: str
    batch: int
    build: dict[str, Build]
    tuned: bool = True
    train: bool = False
    apart: bool = False


@dataclass(frozen=True)
class Figure:
    """One line of bench.csv. ratio: this library's time by ours, of the turns; share: floor by
    seconds; peak: of a process that does this alone, all libraries included."""

    part: str
    what: str
    library: str
    dtype: str = "fp32"
    batch: int | None = None
    seconds: float | None = None
    spread: float | None = None  # between the quartiles
    ratio: float | None = None
    floor: float | None = None
    share: float | None = None
    peak_gb: float | None = None
    turns: int = 0
    error: str = ""  # why it was not measured


BATCH, CAPTIONS = 16, len(sides.CAPTIONS)
PARTS: dict[str, list[Case]] = {
    "forward": [
        Case("CIFAR-10 U-Net, forward", BATCH, {
            OURS: sides.cifar_forward,
            THEIRS: sides.diffusers_cifar_forward,
            THIRD: sides.ddp_cifar_forward,
        }),
        Case("SD 1.5 U-Net, 256x256 with guidance", 1, {
            OURS: sides.sd_forward,
            THEIRS: sides.diffusers_sd_forward,
        }),
    ],
    "step": [
        Case("CIFAR-10 training step", BATCH, {
            OURS: sides.cifar_step,
            THEIRS: sides.diffusers_cifar_step,
            THIRD: sides.ddp_cifar_step,
        }, train=True),
        Case("SD 1.5 LoRA step, 256x256", 1, {
            OURS: partial(sides.sd_step, "lora"),
            THEIRS: partial(sides.diffusers_sd_step, "lora"),
        }, train=True),
        Case("SD 1.5 full step, 256x256", 1, {
            OURS: partial(sides.sd_step, "full"),
            THEIRS: partial(sides.diffusers_sd_step, "full"),
        }, tuned=False, train=True, apart=True),
    ],
    "sample": [
        Case("the box, 25 steps", CAPTIONS, {
            OURS: sides.box_sample,
            THEIRS: sides.diffusers_box_sample,
        }),
        Case("SD 1.5, 256x256, 5 steps", 1, {
            OURS: sides.sd_sample,
            THEIRS: sides.diffusers_sd_sample,
        }),
    ],
    "start": [
        Case("importing what draws, torch included", 1, {
            OURS: partial(files_side.started, "from minidiff import pipeline"),
            THEIRS: partial(files_side.started, "from diffusers import StableDiffusionPipeline"),
            THIRD: partial(files_side.started, "from denoising_diffusion_pytorch import Unet"),
        }, tuned=False),
        Case("minidiff --help", 1, {OURS: files_side.helped}, tuned=False),
        Case("minidiff generate, the box, from start to image", 1, {
            OURS: files_side.generated,
        }, tuned=False),
        Case("opening SD 1.5 and reading all of it, from start", 1, {
            OURS: partial(files_side.opening, "minidiff"),
            THEIRS: partial(files_side.opening, "diffusers"),
        }, tuned=False),
    ],
    "read": [
        Case("reading photographs, 1024x768 to 256x256", files_side.PHOTOS, {
            OURS: files_side.read,
            THEIRS: files_side.diffusers_read,
            THIRD: files_side.ddp_read,
        }, tuned=False),
    ],
    "cache": [
        Case("caching latents, SD 1.5's VAE, 256x256", files_side.CACHED, {
            OURS: files_side.cache,
            THEIRS: files_side.diffusers_cache,
        }, tuned=False),
    ],
}  # fmt: skip


class Layers:
    """The convolutions, linear layers and LoRAs that a call passes through, each with its input."""

    def __init__(self, side: Side, train: bool):
        self.train, self.autocast = train, side.autocast
        self.passes: list[tuple[nn.Module, torch.Tensor]] = []
        kinds = nn.Conv2d | nn.Linear | LoRA
        layers = [layer for layer in side.network.modules() if isinstance(layer, kinds)]
        hooks = [layer.register_forward_pre_hook(self.record) for layer in layers]
        side.call()
        for hook in hooks:
            hook.remove()

    def record(self, layer: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        self.passes.append((layer, inputs[0].detach().clone().requires_grad_(self.train)))

    def __call__(self) -> None:
        """All of them once more, in training with their gradients, and nothing between them."""
        autocast = torch.autocast("cpu", self.autocast, enabled=self.autocast is not None)
        with torch.set_grad_enabled(self.train), autocast:
            for layer, x in self.passes:
                y = layer.forward(x)  # without the hook that adds a LoRA
                if self.train:
                    weights = [p for p in layer.parameters(recurse=False) if p.requires_grad]
                    torch.autograd.grad(y, [x, *weights], torch.ones_like(y))


def measured(part: str, case: Case, setup: Setup, tuned: bool, limit: float) -> Iterator[Figure]:
    """The figures of a case, ours first; a library that is not installed is a figure without."""
    what = f"{case.what}, {'tuned' if tuned else 'as run'}" if case.tuned else case.what
    dtype, apart = "bf16" if tuned and sides.BF16 else "fp32", case.apart and not setup.tiny
    built: dict[str, Side] = {}
    for library, build in case.build.items():
        try:
            built[library] = build(setup, tuned)
        except ImportError as error:
            yield Figure(
                part,
                what,
                library,
                error=f"not installed: {(error.name or str(error)).partition('.')[0]}",
            )
        if apart:
            built[library] = Side(partial(alone, build, setup))
    peaks: dict[str, float | None] = dict.fromkeys(built)
    if apart:
        rounds = [{library: side.call() for library, side in built.items()} for _ in range(5)]
        seconds = {library: [each[library][0] for each in rounds] for library in built}
        peaks = {library: max(each[library][1] for each in rounds) for library in built}
    else:
        calls = {library: side.call for library, side in built.items()}
        with_floor = built[OURS].network is not None
        if with_floor:
            calls[FLOOR] = Layers(built[OURS], case.train)
        seconds = {name: each.seconds for name, each in turns(calls, setup, limit, 5).items()}
        if with_floor and not (tuned or setup.tiny):
            names = list(built)
            calls.clear()  # their memory, for the processes
            built.clear()
            peaks = {name: alone(case.build[name], setup)[1] for name in names}
    floor = statistics.median(seconds.pop(FLOOR)) if FLOOR in seconds else None
    for library, times in seconds.items():
        low, median, high = statistics.quantiles(times, n=4)
        ratio = statistics.median(b / a for a, b in zip(seconds[OURS], times, strict=True))
        share = floor / median if floor else None
        figure = Figure(part, what, library, dtype, case.batch, median, high - low, ratio)
        extra = {"floor": floor, "share": share, "peak_gb": peaks[library], "turns": len(times)}
        yield replace(figure, **extra)


def alone(build: Build, setup: Setup) -> tuple[float, float | None]:
    """Seconds of a second call in a process of its own, and the peak of that process in GB."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=play, args=(build, setup, theirs))
    process.start()
    theirs.close()
    try:
        return ours.recv()
    except EOFError as error:
        process.join()
        raise RuntimeError(f"the process ended with {process.exitcode}") from error
    finally:
        ours.close()
        process.join()


def play(build: Build, setup: Setup, results: Connection) -> None:
    """Send what `alone` gives."""
    side = build(setup, False)
    side.call()
    start = time.perf_counter()
    side.call()
    results.send((time.perf_counter() - start, files_side.peak_gb()))


# What is written.


def line(figure: Figure) -> str:
    """A figure for the terminal."""
    units = {
        "seconds": "{:.4g} s",
        "spread": "+- {:.2g}",
        "ratio": "{:.2f} times ours",
        "share": "floor {:.0%} of it",
        "peak_gb": "peak {:.2f} GB",
        "error": "NOT MEASURED: {}",
    }
    values = asdict(figure)
    texts = [text.format(values[key]) for key, text in units.items() if values[key]]
    return ", ".join([f"{figure.part:8} {figure.what}: {figure.library}", *texts])


def table(figures: list[Figure], about: str) -> str:
    """The README's table: a row for each case; times of the others by ours."""
    head = ["what", OURS, f"{THEIRS}, by ours", f"{THIRD}, by ours", "floor, of ours", "peak, GB"]
    lines = [head, ["---"] * len(head)]
    for what in dict.fromkeys(figure.what for figure in figures):
        row = {figure.library: figure for figure in figures if figure.what == what}
        others, ours = [row.get(THEIRS), row.get(THIRD)], row[OURS]
        ratios = [f"{other.ratio:.2f}" if other and other.ratio else "" for other in others]
        peaks = [f"{each.peak_gb:.2f}" for each in (ours, *others) if each and each.peak_gb]
        share = f"{ours.share:.0%}" if ours.share else ""
        lines.append([f"{what} ({ours.dtype})", f"{ours.seconds:.3g} s", *ratios, share])
        lines[-1].append(" / ".join(peaks))
    return "\n".join([*(f"| {' | '.join(cells)} |" for cells in lines), "", about, ""])


def chart(figures: list[Figure], path: Path) -> Path:
    """Everybody's time by ours, a bar for each."""
    bars = [each for each in figures if each.ratio and each.library != OURS]
    colours = {THEIRS: curves.COLOURS[0], THIRD: curves.COLOURS[1]}
    with curves.style():
        figure, (axis,) = curves.new_figure(1, 7.5, 0.8 + 0.22 * max(1, len(bars)))
        names = [f"{each.what}: {each.library}" for each in bars]
        axis.barh(names, [e.ratio for e in bars], color=[colours[e.library] for e in bars])
        axis.axvline(1, color="#777", linewidth=1)
        axis.invert_yaxis()
        axis.set(xlabel="their time, by minidiff's")
        return curves.save(figure, path)


OUTPUTS = ("bench.csv", "bench.png", "table.md")  # beside results.json


def main(
    parts: str = ",".join(PARTS),
    seconds: float = 60.0,
    tiny: bool = False,
    seed: int = 0,
    out: Path = Path("out/bench"),
) -> None:
    """Measure part after part.

    Args:
        parts: names with commas.
        seconds: for the turns of each case; at least five are made.
        tiny: everything at its smallest, to try this file out.
        seed: of the random weights.
        out: folder for everything written.
    """
    names = [name for part in parts.split(",") if (name := part.strip())]
    unknown = next((name for name in names if name not in PARTS), None)
    if unknown is not None or not names:
        raise UserError(f'no part "{unknown or ""}"; there is {", ".join(PARTS)}.')
    out.mkdir(parents=True, exist_ok=True)
    figures: list[Figure] = []
    flags = "bf16 in the processor" if sides.BF16 else "no bf16 in the processor"
    about = f"{device_name('cpu')}, {flags}, torch {torch.__version__}; {atomic.SIGNATURE}"
    with tempfile.TemporaryDirectory(dir=out) as work:
        setup = Setup("cpu", tiny, out, Path(work), seed, deadline=math.inf)
        cases = [(name, case) for name in names for case in PARTS[name]]
        for name, case in cases:
            for tuned in (False, True) if case.tuned else (False,):
                torch.manual_seed(seed)
                for figure in measured(name, case, setup, tuned, seconds):
                    figures.append(figure)
                    print(line(figure), flush=True)
                results = write_results(out, about=about, figures=list(map(asdict, figures)))
    text = io.StringIO(f"# {about}\n")
    text.seek(0, io.SEEK_END)
    writer = csv.DictWriter(text, [each.name for each in fields(Figure)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(map(asdict, figures))
    for name, content in (("bench.csv", text.getvalue()), ("table.md", table(figures, about))):
        with atomic.write(out / name, atomic.unsigned) as new:
            new.write_text(content, encoding="utf-8")
        print(out / name)
    print(chart(figures, out / "bench.png"), results, sep="\n")


if __name__ == "__main__":
    run(main, OUTPUTS)
