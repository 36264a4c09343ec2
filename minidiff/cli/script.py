"""A study as a command: the signature of its main is the command line."""

import contextlib
import inspect
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

from minidiff.checkpoints import folder
from minidiff.cli import console
from minidiff.cli.flags import flags
from minidiff.training import atomic, distributed, ranks
from minidiff.training.lock import locked


def run(main: Callable[..., None], outputs: tuple[str, ...] = ()) -> None:
    """Call main with the arguments of the command line. Exit code 2 with one line on bad input, 130
    on Ctrl-C, 143 on SIGTERM. A study that trains is alone in its folder. Of several processes the
    first alone writes there; the folder of another is one that is removed in the end.

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
        with contextlib.ExitStack() as stack:
            with distributed.main_first():
                if ranks.is_main() and "--resume" in flags(main):
                    stack.enter_context(locked(out))
            if out is not None and not ranks.is_main():
                nowhere = stack.enter_context(tempfile.TemporaryDirectory())
                job = partial(job, out=Path(nowhere))
            job()


def out_of(job: Callable[[], None]) -> Path | None:
    """The folder `out` of a main with its arguments; None after --help."""
    if not isinstance(job, partial):
        return None
    bound = inspect.signature(job.func).bind(*job.args, **job.keywords)
    bound.apply_defaults()
    out = bound.arguments.get("out")
    return out if isinstance(out, Path) else None
