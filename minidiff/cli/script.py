"""A study as a command: the signature of its main is the command line."""

import inspect
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from minidiff.checkpoints import folder
from minidiff.cli import console
from minidiff.cli.flags import flags
from minidiff.training import atomic
from minidiff.training.lock import locked


def run(main: Callable[..., None], outputs: tuple[str, ...] = ()) -> None:
    """Call main with the arguments of the command line. Exit code 2 with one line on bad input, 130
    on Ctrl-C, 143 on SIGTERM. A study that trains is alone in its folder.

    outputs: what it writes to its `out` beside results.json: files, and folders of models. A
    stranger's file of such a name is refused before anything slow."""
    script = Path(sys.argv[0]).name
    with console.one_line(script), console.messages_of(main):
        job = console.parsed(main, sys.argv[1:], script)
        out = out_of(job)
        if out is not None:
            for name in ("results.json", *outputs):
                foreign = atomic.unsigned if Path(name).suffix else folder.foreign
                atomic.check(out / name, foreign)
        with locked(out if "--resume" in flags(main) else None):
            job()


def out_of(job: Callable[[], None]) -> Path | None:
    """The folder `out` of a main with its arguments; None after --help."""
    if not isinstance(job, partial):
        return None
    bound = inspect.signature(job.func).bind(*job.args, **job.keywords)
    bound.apply_defaults()
    out = bound.arguments.get("out")
    return out if isinstance(out, Path) else None
