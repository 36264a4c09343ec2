"""The command line: the table of verbs. A verb is one function; its signature is its options.

Torch is imported by the verbs when they run, not by --help. Bad input ends with one line and exit
code 2; the library says so by raising UserError.
"""

import sys
from collections.abc import Callable

from minidiff.cli import console, data, exercises, plot
from minidiff.cli.convert import convert
from minidiff.cli.dreambooth import dreambooth
from minidiff.cli.evaluate import evaluate
from minidiff.cli.explore import explore
from minidiff.cli.finetune import finetune
from minidiff.cli.generate import generate
from minidiff.cli.inspect import inspect
from minidiff.cli.quickstart import quickstart
from minidiff.cli.step import step
from minidiff.cli.train import train
from minidiff.cli.watch import watch

VERBS: dict[str, Callable[..., None]] = {
    "quickstart": quickstart,
    "generate": generate,
    "plot forward": plot.forward,
    "plot reverse": plot.reverse,
    "plot attention": plot.attention,
    "plot schedules": plot.schedules,
    "step": step,
    "explore": explore,
    "data coco": data.coco,
    "data check": data.check,
    "train": train,
    "finetune": finetune,
    "dreambooth": dreambooth,
    "evaluate": evaluate,
    "watch": watch,
    "inspect": inspect,
    "convert": convert,
    "exercises start": exercises.start,
    "exercises check": exercises.check,
}


def main(args: list[str] | None = None) -> None:
    """Run one verb. Exit code 0 on success, 2 with one line on bad input, 130 on Ctrl-C, 143 on
    SIGTERM."""
    args = sys.argv[1:] if args is None else args
    console.run("minidiff", "Text-to-image diffusion from scratch.", VERBS, args)


if __name__ == "__main__":
    main()
