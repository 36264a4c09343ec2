"""The verb that shows in the terminal how a run of another process is doing. It only reads, and it
imports no torch."""

import json
import math
import os
import shutil
import sys
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Annotated, get_type_hints

import tyro

from minidiff.errors import Terminated, UserError, printable
from minidiff.finetuning.recorder.advice import Record, closeness, relative
from minidiff.training.json_types import fits
from minidiff.training.lock import is_held, told
from minidiff.training.progress import duration, stretches

Watched = tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="DIR")]]
RECENT = 50  # steps whose mean is shown
WIDTH = 100  # columns at most
BLOCKS, PLAIN = "▁▂▃▄▅▆▇█", "_.-=+*%#"
KINDS = {"step": int, "loss": float, "bins": list[float | None], "lr": float, "grad_norm": float}


def watch(folder: Watched, once: bool = False, every: float = 2.0) -> None:
    """Show how a run is doing: step, loss, speed, time left. It reads only, beside the run.

    Example: minidiff watch out/quickstart

    Args:
        folder: the --out of a run, or a training folder in it. It may be about to appear.
        once: print it once, and end.
        every: seconds between two looks. Without a terminal each look is one line.
    """
    if not 0.1 <= every < math.inf:
        raise UserError(f"every is {every:g}; it must be at least 0.1 seconds.")
    if folder.is_file():
        raise UserError(f"{folder} is a file; name the folder of a run.")
    try:
        follow(Run(folder), once, every)
    except Terminated:
        raise
    except KeyboardInterrupt:
        pass  # it ends a look as it should


def follow(run: "Run", once: bool, every: float) -> None:
    """Show the run again and again, until it has ended."""
    drawn, before = 0, ""
    while True:
        run.read()
        ended = once or run.state() in ("finished", "not running")
        if once or sys.stdout.isatty():
            drawn = draw(run.lines(), 0 if once else drawn)
        elif (line := run.line()) != before:
            before = line
            print(line, flush=True)
        if ended:
            return
        time.sleep(every)


def draw(lines: list[str], above: int) -> int:
    """Print lines in the place of as many `above`; returns how many rows they took."""
    width = min(WIDTH, shutil.get_terminal_size().columns)
    more = "…" if is_printable("…") else "~"
    lines = [
        line if len(line) < width else line[: width - 2] + more for line in map(printable, lines)
    ]
    if above:
        sys.stdout.flush()
        raw = getattr(sys.stdout, "stream", sys.stdout)  # below what keeps the cursor in its place
        raw.write(f"\x1b[{above}F\x1b[J")
    print(*lines, sep="\n", flush=True)
    return len(lines)


def is_printable(text: str) -> bool:
    """Whether standard output has these letters."""
    try:
        text.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return False
    return True


def sparkline(values: list[float | None], width: int) -> str:
    """A line of blocks, as high as the values, on a logarithmic axis where all are positive; a
    space where there is none."""
    numbers = [math.nan if value is None else value for value in values]
    points = [y for _, y in stretches(numbers, max(1, width))]
    finite = [y for y in points if math.isfinite(y)]
    blocks = BLOCKS if is_printable(BLOCKS) else PLAIN
    if not finite:
        return ""
    shape = math.log if min(finite) > 0 else float
    low, high = shape(min(finite)), shape(max(finite))
    scale = (len(blocks) - 1) / ((high - low) or 1)
    heights = (round(scale * (shape(y) - low)) if math.isfinite(y) else None for y in points)
    return "".join(" " if height is None else blocks[height] for height in heights)


@dataclass
class Log:
    """A training folder: its log.jsonl, of which each look reads what is new."""

    folder: Path
    offset: int = 0
    inode: int = 0  # a log that a resume has cut is another file
    losses: list[float] = field(default_factory=list)
    recent: deque[dict] = field(default_factory=lambda: deque(maxlen=RECENT))
    holder: dict = field(default_factory=dict)  # of the lock
    status: dict[str, float | None] = field(default_factory=dict)  # what the run told last
    planned: int | None = None  # steps, by run.json

    def read(self) -> None:
        self.holder, status = told(self.folder)
        if status and fits(status, dict[str, float | None]):
            self.status = status  # the last one stays when the lock has gone
        whole = b""
        with suppress(FileNotFoundError), open(self.folder / "log.jsonl", "rb") as log:
            info = os.fstat(log.fileno())
            if info.st_ino != self.inode or info.st_size < self.offset:
                self.offset, self.inode, self.losses = 0, info.st_ino, []
                self.recent.clear()
            log.seek(self.offset)
            whole, newline, _ = log.read().rpartition(b"\n")  # the last line may be half written
            self.offset += len(whole) + len(newline)
        for line in whole.splitlines():
            self._add(line)

    def _add(self, line: bytes) -> None:
        with suppress(ValueError, LookupError, TypeError, RecursionError):
            step = json.loads(line)
            if all(fits(step[name], kind) for name, kind in KINDS.items()):
                self.losses.append(step["loss"])
                self.recent.append(step)

    @property
    def name(self) -> str:
        return printable(self.folder.name)

    @property
    def step(self) -> int:
        return self.recent[-1]["step"] if self.recent else 0

    def steps(self) -> int | None:
        """Of the whole run, where it says so."""
        steps = self.status.get("steps") or self.planned
        return int(steps) if steps and math.isfinite(steps) else None

    def loss(self) -> str:
        return f"{fmean(step['loss'] for step in self.recent):.4g}"

    def place(self) -> str:
        """step 120 of 3600."""
        steps = self.steps()
        return f"step {self.step}" + (f" of {steps}" if steps else "")

    def speed(self) -> str:
        seconds, examples = map(self.status.get, ("seconds_per_step", "examples_per_step"))
        return f"{examples / seconds:.3g} examples/s" if seconds and examples else ""

    def arithmetic(self) -> str:
        """Beside what the machine can do."""
        names = "operations_per_step", "seconds_per_step", "peak_per_second"
        operations, seconds, peak = map(self.status.get, names)
        if not (operations and seconds and peak):
            return ""
        rate, share = operations / seconds, operations / seconds / peak
        return f"{rate / 1e9:.3g} GFLOP/s, {share:.0%} of this machine's {peak / 1e9:.3g}"

    def memory(self) -> str:
        gigabytes = self.status.get("memory_gb")
        return f"{gigabytes:.2f} GB at most" if gigabytes else ""

    def left(self) -> str:
        seconds, steps = self.status.get("seconds_per_step"), self.steps()
        if not (self.is_at_work() and seconds and steps):
            return ""
        return f"{duration((steps - self.step) * seconds)} left"

    def is_at_work(self) -> bool:
        return is_held(self.holder)

    def progress(self, width: int) -> str:
        """A bar, and the time left."""
        if not (steps := self.steps()):
            return ""
        share, left = min(1, self.step / steps), self.left()
        return f"{bar(share, width)} {share:.0%}" + (f", {left}" if left else "")

    def checkpoint(self) -> str:
        """The newest, and its age."""
        files = {file: file.stat().st_mtime for file in self.folder.glob("checkpoint-*.pt")}
        if not files:
            return ""
        newest = max(files, key=files.get)
        step = newest.stem.partition("-")[2].lstrip("0") or "0"
        return f"step {step}, {duration(time.time() - files[newest])} ago"

    def lines(self) -> list[str]:
        """All that there is to say, a line for each."""
        if not self.recent:
            return []
        last, width = self.recent[-1], min(WIDTH, shutil.get_terminal_size().columns) - 30
        bins = [means(list(bin)) for bin in zip(*(s["bins"] for s in self.recent), strict=False)]
        levels = [level for level in bins if level is not None]
        ends = f"{min(levels):.3g} to {max(levels):.3g}" if levels else ""
        rows = {
            "progress": self.progress(width // 2),
            "loss": f"{self.loss():<10} {sparkline(self.losses, width)}",
            "by noise level": levels and f"data {sparkline(bins, 10)} noise   {ends}",
            "learning rate": f"{last['lr']:.3g}",
            "gradient norm": f"{fmean(step['grad_norm'] for step in self.recent):.3g}",
            "speed": self.speed(),
            "arithmetic": self.arithmetic(),
            "memory": self.memory(),
            "checkpoint": self.checkpoint(),
        }
        return [f"  {name:15} {value}" for name, value in rows.items() if value]


def means(values: list[float | None]) -> float | None:
    numbers = [value for value in values if value is not None]
    return fmean(numbers) if numbers else None


class Run:
    """A run's folder, with the training folders in it; quickstart has one for each act."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.logs: dict[Path, Log] = {}
        self.holder: dict = {}
        self.records: list[Record] = []

    def read(self) -> None:
        for place in (self.folder, self.folder / "training", *self.folder.glob("training/*")):
            if (place / "log.jsonl").exists() or place in self.logs:
                self.logs.setdefault(place, Log(place, planned=planned(self.folder))).read()
        self.holder, _ = told(self.folder)
        self.records = records(self.folder / "record.jsonl")

    def holders(self) -> list[dict]:
        return [self.holder, *(log.holder for log in self.logs.values())]

    def state(self) -> str:
        """waiting, running, finished or not running."""
        if any(map(is_held, self.holders())):
            return "running"
        if not self.logs:
            return "waiting for it to begin"
        last = self.ordered()[-1]
        results = changed(self.folder / "results.json") >= changed(last.folder / "log.jsonl")
        return "finished" if results or last.step == last.steps() else "not running"

    def ordered(self) -> list[Log]:
        """The trainings, the one at work last."""
        return sorted(self.logs.values(), key=lambda log: changed(log.folder / "log.jsonl"))

    def line(self) -> str:
        """All in one line."""
        if not (logs := self.ordered()):
            return f"{printable(str(self.folder))}: {self.state()}"
        last = logs[-1]
        parts = [f"{last.name} {last.place()}"]
        if last.recent:
            parts += [f"loss {last.loss()}", last.speed(), last.left()]
        return f"{self.state()}: {', '.join(filter(None, parts))}"

    def lines(self) -> list[str]:
        *earlier, last = self.ordered() or [None]
        holder = next(filter(is_held, self.holders()), {})
        who = f", process {holder.get('process')} since {holder.get('since')}" if holder else ""
        lines = [f"{self.state()}{who}: {self.folder}"]  # a long path is cut off
        lines += [f"{log.name}: {log.place()}, loss {log.loss()}" for log in earlier if log.recent]
        if last is None:
            return [*lines, "  no log yet"]
        return [*lines, f"{last.name}: {last.place()}", *last.lines(), *self.recorder()]

    def recorder(self) -> list[str]:
        """What the flight recorder measured last."""
        if not self.records:
            return []
        last, words = self.records[-1], [f"step {self.records[-1].step}"]
        if (held_out := relative(self.records, "validation")[-1]) is not None:
            words.append(f"held-out loss {held_out:.3g} times the first")
        if (near := closeness(last)) is not None:
            words.append(f"nearest training picture at {near:.2g} of the usual distance")
        return [f"  {'recorder':15} {', '.join(words)}"]


def bar(share: float, width: int) -> str:
    full, empty = ("█", "░") if is_printable("█░") else ("#", ".")
    return full * round(share * width) + empty * (width - round(share * width))


def planned(folder: Path) -> int | None:
    """The steps of a fine-tune, by its run.json."""
    with suppress(OSError, ValueError, RecursionError, LookupError, TypeError):
        steps = json.loads((folder / "run.json").read_bytes())["settings"]["steps"]
        return steps if fits(steps, int) else None
    return None


def changed(file: Path) -> float:
    """When a file was changed last; 0 where there is none."""
    try:
        return file.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def records(file: Path) -> list[Record]:
    """The whole lines of record.jsonl, as far as they are measurements."""
    measured = []
    with suppress(OSError, ValueError, RecursionError, TypeError):
        for line in file.read_bytes().rpartition(b"\n")[0].splitlines():
            record = Record(**json.loads(line))
            if all(fits(getattr(record, n), kind) for n, kind in get_type_hints(Record).items()):
                measured.append(record)
    return measured
