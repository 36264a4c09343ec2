"""The command line: every verb is one function in verbs/, and its signature is its options. Torch is imported by the verbs, not by --help.

Bad input ends with one line and exit code 2; the library says so by raising UserError.
"""
import sys
from collections.abc import Callable

from minidiff import console
from minidiff.verbs import checkpoint, data, draw, dreambooth, evaluate, finetune, plot

VERBS: dict[str, Callable[..., None]] = {
    "quickstart": draw.quickstart,
    "generate": draw.generate,
    "plot forward": plot.forward,
    "plot reverse": plot.reverse,
    "plot schedules": plot.schedules,
    "data coco": data.coco,
    "data check": data.check,
    "finetune": finetune.finetune,
    "dreambooth": dreambooth.dreambooth,
    "evaluate": evaluate.evaluate,
    "inspect": checkpoint.inspect,
    "convert": checkpoint.convert,
}


def main(args: list[str] | None = None) -> None:
    """Run one verb. Exit code 0 on success, 2 with one line on bad input, 130 on Ctrl-C, 143 on SIGTERM."""
    console.run("minidiff", "Text-to-image diffusion from scratch.", VERBS, sys.argv[1:] if args is None else args)


if __name__ == "__main__":
    main()
