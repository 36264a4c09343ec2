"""A command with verbs: which verb is meant, what its options are, and every complaint in one line, are all in this file. No torch here.

A verb is a function; tyro reads its options off its signature.
"""
import contextlib
import difflib
import functools
import io
import os
import re
import signal
import sys
import textwrap
import threading
import warnings
from collections.abc import Callable, Iterator

import tyro
from tqdm import tqdm

from minidiff.errors import Terminated, UserError

Verbs = dict[str, Callable[..., None]]  # by name; a name of two words is a verb of a group, as in "plot forward"


def run(program: str, purpose: str, verbs: Verbs, args: list[str]) -> None:
    """Run the verb that is named."""
    with one_line(program):
        for arg in args:
            if re.search("[\ud800-\udfff]", arg):  # how Python keeps bytes that are no text
                raise UserError(f"the argument {arg!a} is not valid UTF-8; type it anew, or rename the file.")
        call(chosen(program, purpose, verbs, args or ["--help"]))


def call(job: Callable[[], None]) -> None:
    """Run a verb with its options; one that can resume says so where it is interrupted."""
    try:
        job()
    except KeyboardInterrupt as error:
        if "resume" not in getattr(job, "keywords", {}):
            raise
        advice = "the same command with --resume goes on from there"
        raise type(error)(f"{error}; {advice}" if str(error) else advice) from error


@contextlib.contextmanager
def one_line(program: str) -> Iterator[None]:
    """Every complaint in one line. Exit code 0 on success, 2 on bad input, 130 on Ctrl-C, 143 on SIGTERM."""
    with _terminated(), warnings.catch_warnings():  # a warning is one line too, above a progress bar where there is one
        warnings.showwarning = lambda message, *_, **__: tqdm.write(f"{program}: {_flat(str(message))}", file=sys.stderr)
        try:
            yield
            sys.stdout.flush()
        except UserError as error:
            _fail(program, str(error), 2)
        except BrokenPipeError:  # the reader has seen enough, as in `| head`; what is left in the buffer must not go to it at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        except OSError as error:
            advice = "check the path, its permissions and the free space."
            _fail(program, f"{error.filename}: {error.strerror}; {advice}" if error.filename else str(error), 2)
        except KeyboardInterrupt as error:
            name, code = ("terminated", 143) if isinstance(error, Terminated) else ("interrupted", 130)
            _fail(program, f"{name}; {error}." if str(error) else f"{name}.", code)


@contextlib.contextmanager
def _terminated() -> Iterator[None]:
    """SIGTERM ends things as Ctrl-C does, so that nothing is left half-written. Only the main thread can listen for it."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _terminate(*_: object) -> None:
    raise Terminated


def chosen(program: str, purpose: str, verbs: Verbs, args: list[str]) -> Callable[[], None]:
    """The verb that is named, with the arguments that follow it, ready to be called."""
    for words in (2, 1):
        if (name := " ".join(args[:words])) in verbs:
            return parsed(verbs[name], args[words:], f"{program} {name}")
    group = args[0] if any(name.startswith(f"{args[0]} ") for name in verbs) else ""
    rest = args[1:] if group else args
    below = {name: verb for name, verb in verbs.items() if name.startswith(group)}
    if rest and rest[0] in ("-h", "--help"):
        return lambda: print(overview(f"{program} {group}".strip(), purpose, below))
    if not rest:
        raise UserError(f"{group} what? There is {', '.join(below)}.")
    name = f"{group} {rest[0]}".strip()
    near = difflib.get_close_matches(name, below, 1)
    perhaps = f"perhaps you meant {near[0]}; " if near else ""
    raise UserError(f'no verb "{name}"; {perhaps}there is {", ".join(below)}.')


def overview(usage: str, purpose: str, verbs: Verbs) -> str:
    """What --help prints where no verb is named: each verb and the first line of its docstring."""
    width = 4 + max(len(name) for name in verbs)
    first = {name: verb.__doc__.splitlines()[0] for name, verb in verbs.items()}
    listed = [textwrap.fill(f"{'  ' + name:{width}}{line}", 100, subsequent_indent=" " * width) for name, line in first.items()]
    return "\n".join([f"usage: {usage} VERB [OPTIONS]", "", f"{purpose} Each verb has its own --help:", "", *listed])


def parsed(function: Callable[..., None], args: list[str], command: str) -> Callable[[], None]:
    """The function with its arguments, not yet called, so that what tyro says is told apart from what the function says."""

    @functools.wraps(function)
    def later(*values: object, **options: object) -> Callable[[], None]:
        return functools.partial(function, *values, **options)

    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            return tyro.cli(later, prog=command, args=args)
    except SystemExit as end:
        if not end.code:  # --help, which tyro has printed
            return lambda: None
        raise UserError(f"{complaint(box.getvalue())}; see {command} --help.") from None


def complaint(box: str) -> str:
    """What stands in tyro's box, in one line: the message, and the options it would rather have seen."""
    lines = [line.strip("│| ") for line in re.sub(r"\x1b\[[\d;]*m", "", box).splitlines()]
    said, *more = re.split(r"\n?.*[─-]{5}.*\n", "\n".join(lines))[1:] or [" ".join(lines)]  # rules part it; what is before the first is the title
    said, hints = _flat(said.split("\n\n")[0]).rstrip("."), "\n".join(more)
    if bad := re.match(r"""Error parsing (--[\w-]+): .*(['"])(.*)\2""", said):  # what follows is Python's, not the reader's
        whole = re.search(rf"^{bad[1]} INT", hints, re.M)
        return f'{bad[1]} takes {"a whole number" if whole else "a number"}, not "{bad[3]}"'
    options = sorted(set(re.findall(r"^--[\w-]+", hints, re.M)))
    said = said[:1].lower() + said[1:].removesuffix(". Expected 1 values")
    return said + (f"; perhaps you meant {', '.join(options)}" if options else "")


def _flat(text: str) -> str:
    return " ".join(text.split())


def _fail(program: str, message: str, code: int) -> None:
    print(f"{program}: {' '.join(message.splitlines())}", file=sys.stderr)
    sys.exit(code)
