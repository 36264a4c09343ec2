"""What a run shows and leaves: a progress bar, the memory it took, results.json."""

import json
import math
import sys
import time
from collections.abc import Generator
from contextlib import closing
from pathlib import Path

from tqdm import tqdm

from minidiff.training import atomic


def follow(training: Generator, name: str, steps: int, batch: int = 1) -> dict[str, float | None]:
    """Run train.train to the end behind a bar that shows examples a second and the time left.

    batch: examples a step. Default: the bar counts steps. Returns the seconds it took here, and
    the speed after the first step.
    """
    start, done, after_first = time.perf_counter(), 0, None
    unit = " examples" if batch > 1 else " steps"
    with (
        closing(training),
        tqdm(desc=name, total=steps * batch, unit=unit, unit_scale=batch > 1) as bar,
    ):
        for step in training:
            if after_first is None:
                bar.initial = bar.n = (step.step - 1) * batch  # a resumed run has these behind it
                after_first = time.perf_counter()
            else:
                done += batch
            bar.set_postfix(loss=f"{step.loss:.4f}", refresh=False)
            bar.update(batch)
    end = time.perf_counter()
    return {
        "seconds": round(end - start, 1),
        "images_per_second": round(done / (end - after_first), 1) if done else None,
    }


def last_loss(log: list[dict]) -> float:
    """The mean over the last tenth of the steps, at most 500: a single step's loss says little."""
    tail = [record["loss"] for record in log][-min(500, max(1, len(log) // 10)) :]
    return round(sum(tail) / len(tail), 5)


def human(count: float) -> str:
    """Bytes, as 14.9 GB, 95 MB, 3.2 MB."""
    if count >= 1e9:
        return f"{count / 1e9:.1f} GB"
    return f"{count / 1e6:.{0 if count >= 1e7 else 1}f} MB"


def peak_memory_gb() -> float | None:
    """The most memory this process has held; Windows does not say."""
    if sys.platform == "win32":
        return None
    import resource  # not there on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # macOS counts bytes, Linux kilobytes
    return round(peak / (2**30 if sys.platform == "darwin" else 2**20), 2)


def write_results(out: Path, **figures: object) -> Path:
    """results.json: every figure that the study prints, and what it was run with. Another file of
    that name is not written over."""
    path = out / "results.json"
    with atomic.write(path, atomic.unsigned) as new:
        whole = {"about": atomic.SIGNATURE, **figures}
        new.write_text(json.dumps(whole, indent=2, default=str) + "\n", encoding="utf-8")
    return path


def duration(seconds: float) -> str:
    """A time as people say it: 42 s, 3 min 10 s, 2 h 05 min."""
    seconds = max(0, round(seconds))
    if seconds < 60:
        return f"{seconds} s"
    minutes, rest = divmod(seconds, 60)
    hours = minutes // 60
    return f"{hours} h {minutes % 60:02d} min" if hours else f"{minutes} min {rest:02d} s"


def stretches(values: list[float], count: int) -> list[tuple[float, float]]:
    """At most `count` points (last step, mean) of stretches of equal length; a value a step."""
    length = max(1, math.ceil(len(values) / count))
    starts = range(0, len(values), length)
    parts = [(k, values[k : k + length]) for k in starts]
    return [(k + len(part), sum(part) / len(part)) for k, part in parts]
