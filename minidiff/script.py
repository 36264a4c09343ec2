"""What the experiments share: a main that is a command, the device a name means, training behind a progress bar, the memory
it took, and results.json."""
import inspect
import json
import sys
import time
from collections.abc import Callable, Generator
from contextlib import closing
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from minidiff import atomic, console
from minidiff.errors import UserError
from minidiff.train import TrainStep
from minidiff.training.lock import locked
from minidiff.training.resume import read_log

__all__ = ["follow", "last_loss", "peak_memory_gb", "pick_device", "read_log", "run", "write_results"]


def run(main: Callable[..., None]) -> None:
    """main's signature is the command line. Exit code 2 with one line on bad input, 130 on Ctrl-C, 143 on SIGTERM. A study that trains is
    alone in its folder."""
    script = Path(sys.argv[0]).name
    with console.one_line(script):
        job = console.parsed(main, sys.argv[1:], script)
        check_results(job)
        options = getattr(job, "keywords", {})
        with locked(options.get("out") if "resume" in options else None):
            console.call(job)


def check_results(ready: Callable[[], None]) -> None:
    """Refuse another's results.json before anything slow; ready is a main with its arguments, the folder `out` among them."""
    if isinstance(ready, partial):
        bound = inspect.signature(ready.func).bind(*ready.args, **ready.keywords)
        bound.apply_defaults()
        if isinstance(out := bound.arguments.get("out"), Path):
            atomic.check(out / "results.json", atomic.unsigned)


def pick_device(name: str) -> str:
    """The device a name means here; auto is the GPU if there is one."""
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        return next(device for device in ("cuda", "mps", "cpu") if there[device])
    if name not in there:
        raise UserError(f'no device "{name}"; --device is one of auto, {", ".join(there)}.')
    if not there[name]:
        raise UserError(f'no "{name}" on this machine; pass --device cpu, or auto.')
    return name


def follow(training: Generator[TrainStep], name: str, steps: int, batch: int) -> dict[str, float | None]:
    """Train to the end behind a bar that shows examples a second and the time left; returns the seconds it took here, and the speed
    after the first step."""
    start, done, rest = time.perf_counter(), 0, None
    with closing(training), tqdm(desc=name, total=steps * batch, unit=" examples", unit_scale=True) as bar:
        for step in training:
            if rest is None:
                bar.initial = bar.n = (step.step - 1) * batch  # a resumed run has these behind it
                rest = time.perf_counter()
            else:
                done += batch
            bar.set_postfix(loss=f"{step.loss:.4f}", refresh=False)
            bar.update(batch)
    end = time.perf_counter()
    return {"seconds": round(end - start, 1), "images_per_second": round(done / (end - rest), 1) if done else None}


def last_loss(log: list[dict]) -> float:
    """The mean over the last tenth of the steps, at most 500: a single step's loss says little."""
    tail = [record["loss"] for record in log][-min(500, max(1, len(log) // 10)) :]
    return round(sum(tail) / len(tail), 5)


def peak_memory_gb() -> float | None:
    """The most memory this process has held; Windows does not say."""
    if sys.platform == "win32":
        return None
    import resource  # not there on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (2**30 if sys.platform == "darwin" else 2**20), 2)  # macOS counts bytes, Linux kilobytes


def write_results(out: Path, **figures: object) -> Path:
    """results.json: every figure that the study prints, and what it was run with. Another file of that name is not written over."""
    path = out / "results.json"
    with atomic.write(path, atomic.unsigned) as new:
        new.write_text(json.dumps({"about": atomic.SIGNATURE, **figures}, indent=2, default=str) + "\n", encoding="utf-8")
    return path
