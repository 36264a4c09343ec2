"""Mutants of every format's files, opened one by one.

    python -m tests.mutants COUNT [FORMAT [NUMBER]]     # COUNT of each format; or one of them alone

Prints JSON: by format how many were refused, how many opened, and the faults with their numbers.
A child process opens them, whose memory and time are limited; it is replaced when it dies.
"""

import contextlib
import io
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from minidiff.cli import console
from tests.mutations import mutated
from tests.readers import READERS, Opener

SECONDS, MEMORY = 10, 2**30
SEED = os.environ.get("MINIDIFF_MUTANTS", "0")  # another one makes other mutants


def said(job: Callable[[], object]) -> tuple[str, str]:
    """What came of a job: "opened", "refused" or "fault", with the text behind it."""
    errors = io.TextIOWrapper(io.BytesIO(), "utf-8", "backslashreplace")  # as Python's own
    output, code = io.TextIOWrapper(io.BytesIO(), "utf-8"), 0
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(output):
        try:
            with console.one_line("minidiff"), warnings.catch_warnings():
                warnings.simplefilter("always")
                job()
        except SystemExit as end:
            code = end.code
        except BaseException as error:
            place = error.__traceback__
            while place.tb_next:
                place = place.tb_next
            where = f"{Path(place.tb_frame.f_code.co_filename).name}:{place.tb_lineno}"
            return "fault", f"{type(error).__name__} in {where}: {str(error)[:200]}"
    text, printed = map(text_of, (errors, output))
    if strange := {c for c in text + printed if c not in "\n\t" and ord(c) < 32}:
        return "fault", f"{sorted(strange)} reach the terminal: {(text + printed)[-300:]}"
    last = text.splitlines()[-1] if text else ""
    if code not in (0, 2) or (code == 2 and not last.startswith("minidiff: ")):
        return "fault", f"exit code {code}: {text[-300:]}"
    if len(last) > 1500:
        return "fault", f"a line of {len(last)} letters: {last[:200]}"
    return ("refused" if code else "opened"), last


def text_of(stream: io.TextIOWrapper) -> str:
    stream.flush()
    return stream.buffer.getvalue().decode()


def without_bars() -> None:
    """Progress bars write what is not to be found in messages."""
    begin = tqdm.__init__
    tqdm.__init__ = lambda bar, *args, **options: begin(bar, *args, **options | {"disable": True})


def one(files: list[Path], job: Opener, key: str) -> tuple[str, str]:
    """Mutate one of the files, open, and say what came of it."""
    draw = random.Random(key)
    file = draw.choice(files)
    file.write_bytes(mutated(file, draw))
    result, text = said(partial(job, draw))
    return result, f"{file.name}: {text}"


def child(format: str, numbers: range, results: Path) -> None:
    """In a process of its own: each mutant in a fresh copy of the files."""
    torch.set_num_threads(1)
    without_bars()
    place = Path(tempfile.mkdtemp(prefix="minidiff-mutants-"))
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            files, job = READERS[format](place)
        contents = {file: file.read_bytes() for file in place.rglob("*") if file.is_file()}
        own = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (own + MEMORY, own + MEMORY))
        for number in numbers:
            for path in place.iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            for file, content in contents.items():
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(content)
            for empty in ("out/training",) if format == "run.json" else ():
                (place / empty).mkdir(exist_ok=True)
            with open(results, "a") as log:
                log.write(json.dumps([number, "started", ""]) + "\n")
            signal.alarm(SECONDS)  # nobody listens: it ends the process
            result = one(files, job, f"{SEED} {format} {number}")
            signal.alarm(0)
            with open(results, "a") as log:
                log.write(json.dumps([number, *result]) + "\n")
    finally:
        shutil.rmtree(place, ignore_errors=True)


def mutants(format: str, numbers: range) -> dict[str, object]:
    """Open so many mutants; counts, and faults by number."""
    results = Path(tempfile.mkstemp(prefix="minidiff-mutants-")[1])
    outcomes: dict[int, tuple[str, str]] = {}
    while len(outcomes) < len(numbers):
        rest = range(numbers.start + len(outcomes), numbers.stop)
        results.write_text("")
        if not (process := os.fork()):
            code = 1
            try:
                child(format, rest, results)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        ended = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        for line in results.read_text().splitlines():
            number, result, text = json.loads(line)
            outcomes[number] = (result, text)
        if not outcomes:
            raise SystemExit(f"{format}: the files could not be made")
        for number, (result, _) in outcomes.items():
            if result == "started":
                why = f"over {SECONDS} s" if ended == -signal.SIGALRM else f"it died ({ended})"
                outcomes[number] = ("fault", why)
    results.unlink()
    counts = {kind: sum(r == kind for r, _ in outcomes.values()) for kind in ("refused", "opened")}
    faults = {n: text for n, (result, text) in outcomes.items() if result == "fault"}
    return counts | {"faults": faults}


if __name__ == "__main__":
    torch.set_num_threads(1)
    count, *only = sys.argv[1:]
    numbers = range(int(only[1]), int(only[1]) + 1) if len(only) > 1 else range(int(count))
    names = only[:1] or list(READERS)
    print(json.dumps({name: mutants(name, numbers) for name in names}, indent=1))
