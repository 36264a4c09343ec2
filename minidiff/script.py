"""What the experiments share: a main that is a command, the device a name means, training behind a progress bar, the memory
it took, and results.json."""
import inspect
import json
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from minidiff import atomic, console
from minidiff.errors import UserError
from minidiff.train import TrainStep


def run(main: Callable[..., None]) -> None:
    """main's signature is the command line. Exit code 2 with one line on bad input, 130 on Ctrl-C."""
    script = Path(sys.argv[0]).name
    with console.one_line(script, "interrupted; where it was training, --resume goes on from there."):
        ready = console.parsed(main, sys.argv[1:], script)
        check_results(ready)
        ready()


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


def follow(training: Iterator[TrainStep], name: str, steps: int, batch: int) -> dict[str, float | None]:
    """Train to the end behind a bar that shows examples a second and the time left; returns the seconds it took here, and the speed."""
    start, done = time.perf_counter(), 0
    with tqdm(desc=name, total=steps * batch, unit=" examples", unit_scale=True) as bar:
        for step in training:
            if not done:
                bar.initial = bar.n = (step.step - 1) * batch  # a resumed run has these behind it
            done += batch
            bar.set_postfix(loss=f"{step.loss:.4f}", refresh=False)
            bar.update(batch)
    seconds = time.perf_counter() - start
    return {"seconds": round(seconds, 1), "images_per_second": round(done / seconds, 1) if done else None}


def read_log(folder: Path) -> list[dict]:
    """The lines that training wrote: one for each step, those before a resume included."""
    return [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]


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
