"""What a GPU does with minidiff, in one command: is it right, how fast, does memory fit?

    python experiments/gpu.py --out OUT --minutes 6
    python experiments/gpu.py --parts ceiling,train
    python experiments/gpu.py --parts cifar --data cifar10 --minutes 5
    python experiments/gpu.py --parts photos --data photos --minutes 8
    python experiments/gpu.py --tiny --device cpu              # everything at its smallest

A part is a function that yields rows. It runs in a process of its own, in a share of the minutes
(what one leaves, the next ones get), and is ended when its time is up. Every row is written to
results.json at once, so a run that is killed keeps what it has. Weights are random.
"""

import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
import traceback
import xml.etree.ElementTree as xml
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).parent))  # the files beside this one
from gpu_long import cifar, photos
from gpu_sampling import sample
from gpu_training import capped, stalls, training
from measuring import Row, Setup, limits_of, one_line, row

from minidiff.cli.script import run
from minidiff.errors import UserError
from minidiff.training import atomic
from minidiff.training.device import device_name, pick_device
from minidiff.training.progress import write_results

ROOT = Path(__file__).parents[1]
METHODS = multiprocessing.get_all_start_methods()
PROCESSES = multiprocessing.get_context("forkserver" if "forkserver" in METHODS else "spawn")


def correct(setup: Setup) -> Iterator[Row]:
    """The tests marked gpu, here against the CPU's float64; their output is in correct.txt."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "tests/gpu", "-q", "--tb=short"]
    command += [
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        *(["-k", "times"] if setup.tiny else []),
    ]
    begun, cases = time.perf_counter(), []
    text = open(setup.out / "correct.txt", "w", encoding="utf-8")
    with tempfile.TemporaryDirectory() as folder, text:
        report = Path(folder) / "report.xml"
        text.write(f"{atomic.SIGNATURE}: pytest -m gpu\n")
        text.flush()  # before pytest's own lines
        ran = subprocess.run(
            [*command, f"--junitxml={report}"],
            cwd=ROOT,
            env=os.environ | {"MINIDIFF_TEST_DEVICE": setup.device},
            stdout=text,
            stderr=subprocess.STDOUT,
            timeout=max(1.0, setup.left - 2),
        )
        if report.exists():
            cases = list(xml.parse(report).iter("testcase"))
    seconds = time.perf_counter() - begun
    if not cases:
        raise RuntimeError(f"pytest ended with {ran.returncode} and no report; see correct.txt")
    bad = [
        case for case in cases if case.find("failure") is not None or case.find("error") is not None
    ]
    skipped = sum(case.find("skipped") is not None for case in cases)
    passed = len(cases) - len(bad) - skipped
    note = f"{passed} passed, {len(bad)} failed, {skipped} skipped"
    yield Row("tests", dtype="float64 on the CPU beside it", seconds=seconds, note=note)
    for case in bad:
        yield Row(f"test {case.get('name')}", error="failed; see correct.txt")


def ceiling(setup: Setup) -> Iterator[Row]:
    """The two limits of the device."""
    limits, product, copy = limits_of(setup)
    made = row("matrix product", product, 1)
    yield replace(made, per_second=None, note=f"{limits.flops / 1e12:.1f} TFLOP/s")
    made = row("copy", copy, 1)
    yield replace(made, per_second=None, note=f"{limits.bandwidth / 1e9:.0f} GB/s")


class Part(NamedTuple):
    rows: Callable[[Setup], Iterator[Row]]
    weight: int  # seconds of six minutes


PARTS = {
    "correct": Part(correct, 45),
    "ceiling": Part(ceiling, 15),
    "sample": Part(sample, 130),
    "train": Part(training, 75),
    "stalls": Part(stalls, 60),
    "capped": Part(capped, 35),
    "cifar": Part(cifar, 300),
    "photos": Part(photos, 300),
}


# Processes.


def play(name: str, part: Callable[[Setup], Iterator[Row]], setup: Setup, rows: Connection) -> None:
    """Run a part in this process and send its rows."""
    try:
        torch.manual_seed(setup.seed)
        setup = replace(setup, device=pick_device(setup.device))
        about = {"device": device_name(setup.device), "torch": torch.__version__}
        for made in part(setup):
            rows.send({"part": name} | asdict(made) | about)
    except Exception as error:  # the parent writes it into the table, and goes on
        traceback.print_exc()
        rows.send({"part": name} | asdict(Row(name, error=one_line(error))))
    rows.close()


def apart(name: str, part: Callable[[Setup], Iterator[Row]], setup: Setup) -> Iterator[dict]:
    """The rows of a part in a process of its own: what it breaks, it breaks alone, all its memory
    is free afterwards, and it ends at its deadline whatever it does."""
    ours, theirs = PROCESSES.Pipe(duplex=False)
    process = PROCESSES.Process(target=play, args=(name, part, setup, theirs))
    error = "its time was up"
    try:
        process.start()
        theirs.close()
        while ours.poll(max(0.0, setup.left)):
            yield ours.recv()
    except (EOFError, OSError):  # it is done, or dead
        process.join(10)
        error = "" if process.exitcode == 0 else f"the process ended with {process.exitcode}"
    finally:
        process.kill()
        process.join()
        ours.close()
    if error:
        yield {"part": name} | asdict(Row(name, error=error))


def line(made: dict) -> str:
    """A row for the terminal."""
    texts = [f"{made['part']:8} {made['what']}"]
    units = {
        "batch": "batch {}",
        "seconds": "{:.4g} s",
        "spread": "+- {:.2g}",
        "per_second": "{:.4g} images/s",
        "share": "{:.0%} of the floor",
        "ratio": "{:.2f} times diffusers",
        "peak_gb": "peak {:.2f} GB",
        "estimated_gb": "estimated {:.2f} GB",
    }
    texts += [text.format(made[key]) for key, text in units.items() if made[key] is not None]
    texts += [made["note"]] if made["note"] else []
    return ", ".join(texts + ([f"NOT MEASURED: {made['error']}"] if made["error"] else []))


OUTPUTS = ("correct.txt",)  # beside results.json


def main(
    parts: str = "correct,ceiling,sample,train,stalls,capped",
    minutes: float = 6.0,
    tiny: bool = False,
    device: str = "auto",
    data: Path | None = None,
    seed: int = 0,
    out: Path = Path("out/gpu"),
) -> None:
    """Measure part after part.

    Args:
        parts: names with commas; cifar and photos run only where they are named.
        minutes: for all parts together.
        tiny: everything at its smallest, to try this file out.
        device: auto, cuda or cpu.
        data: for the part cifar, a folder with CIFAR-10 as mosaics, train_0.webp and so on; for
            photos, one with shards.
        seed: of the random weights.
        out: folder for results.json and what parts write.
    """
    names = [name for part in parts.split(",") if (name := part.strip())]
    unknown = next((name for name in names if name not in PARTS), None)
    if unknown is not None or not names:
        raise UserError(f'no part "{unknown or ""}"; there is {", ".join(PARTS)}.')
    out.mkdir(parents=True, exist_ok=True)
    PROCESSES.set_forkserver_preload(
        ["torch", "minidiff.finetuning.loop", "minidiff.figures.plots"]
    )
    settings = {"parts": parts, "minutes": minutes, "tiny": tiny, "seed": seed}
    rows, end = [], time.time() + 60 * minutes
    for k, name in enumerate(names):
        share = PARTS[name].weight / sum(PARTS[other].weight for other in names[k:])
        deadline = time.time() + share * (end - time.time())
        begun = time.perf_counter()
        setup = Setup(device, tiny, out, data, seed, deadline)
        for made in apart(name, PARTS[name].rows, setup):
            rows.append(made)
            print(line(made), flush=True)
            written = write_results(out, **settings, rows=rows)
        print(f"{name:8} took {time.perf_counter() - begun:.0f} s", flush=True)
    print(written)


if __name__ == "__main__":
    os.environ["TQDM_DISABLE"] = "1"  # of the processes that are started: rows alone are printed
    run(main, OUTPUTS)
