"""A command with verbs: which verb is meant, what its options are, every complaint in one line.

A verb is a function, and its signature is its command line, which tyro reads; a dataclass among its
arguments stands for its fields, each a flag of its own. No torch here.
"""

import contextlib
import difflib
import functools
import inspect
import io
import logging
import os
import re
import signal
import sys
import textwrap
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import is_dataclass
from itertools import takewhile
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

import tyro
from tqdm import tqdm

from minidiff.cli.flags import in_flags
from minidiff.cli.types import REGISTRY, without_none
from minidiff.errors import Terminated, UserError, choice

Verb = Callable[..., None]
Verbs = dict[str, Verb]  # by name; a name of two words is a verb of a group, as in "plot forward"
NUMBERS = {int: "a whole number", float: "a number"}


def run(program: str, purpose: str, verbs: Verbs, args: list[str]) -> None:
    """Run the verb that is named."""
    with one_line(program):
        for arg in args:
            if re.search("[\ud800-\udfff]", arg):  # how Python keeps bytes that are no text
                raise UserError(
                    f"the argument {arg!a} is not valid UTF-8; type it anew, or rename the file."
                )
        command(program, purpose, verbs, args or ["--help"])


def command(program: str, purpose: str, verbs: Verbs, args: list[str]) -> None:
    """Find the verb, and call it with the arguments that follow it."""
    for words in (2, 1):
        if (name := " ".join(args[:words])) in verbs:
            return call(parsed(verbs[name], args[words:], f"{program} {name}"), verbs[name])
    group = args[0] if any(name.startswith(f"{args[0]} ") for name in verbs) else ""
    rest = args[1:] if group else args
    below = {name: verb for name, verb in verbs.items() if name.startswith(group)}
    if rest and rest[0] in ("-h", "--help"):
        return print(overview(f"{program} {group}".strip(), purpose, below))
    if not rest:
        raise UserError(f"{group} what? There is {', '.join(below)}.")
    name = f"{group} {rest[0]}".strip()
    nearest = difflib.get_close_matches(name, below, 1)
    perhaps = f"perhaps you meant {nearest[0]}; " if nearest else ""
    raise UserError(f'no verb "{name}"; {perhaps}there is {", ".join(below)}.')


def overview(usage: str, purpose: str, verbs: Verbs) -> str:
    """What --help prints where no verb is named: each verb and the first line of its docstring."""
    width = 4 + max(len(name) for name in verbs)
    lines = [f"usage: {usage} VERB [OPTIONS]", "", f"{purpose} Each verb has its own --help:", ""]
    for name, verb in verbs.items():
        line = f"{'  ' + name:{width}}{verb.__doc__.splitlines()[0]}"
        lines.append(textwrap.fill(line, 100, subsequent_indent=" " * width))
    return "\n".join(lines)


def parsed(verb: Verb, args: list[str], prog: str) -> Callable[[], None]:
    """The verb with its arguments, not yet called, so that tyro's complaints are told from the
    verb's own."""
    output = io.StringIO()
    try:
        with contextlib.redirect_stderr(output):
            job, unknown = tyro.cli(
                later(verb),
                prog=prog,
                description=(inspect.getdoc(verb) or "").partition("\n\nArgs:")[0],
                args=args,
                return_unknown_args=True,
                registry=REGISTRY,
                config=(tyro.conf.OmitArgPrefixes,),
            )
    except UserError as error:  # of a dataclass that checks itself
        raise UserError(with_flags(str(error), verb)) from error
    except SystemExit as end:
        if not end.code:  # --help, which tyro has printed
            return lambda: None
        if (error := user_error(end)) is not None:
            raise UserError(with_flags(str(error), verb)) from None
        message = complaint(verb, args, prog) or plain(output.getvalue())
        raise UserError(f"{message}; see {prog} --help.") from None
    if unknown:
        raise UserError(f"{unrecognized(unknown, flags(verb))}; see {prog} --help.")
    return job


def later(verb: Verb) -> Callable[..., Callable[[], None]]:
    """A function with the verb's signature that gives the call instead of making it."""

    @functools.wraps(verb)
    def not_yet(*values: object, **options: object) -> Callable[[], None]:
        return functools.partial(verb, *values, **options)

    return not_yet


def call(job: Callable[[], None], verb: Verb) -> None:
    """Run a verb with its options; one that can resume says so where it is interrupted."""
    try:
        job()
    except UserError as error:
        raise UserError(with_flags(str(error), verb)) from error
    except KeyboardInterrupt as error:
        if "--resume" not in flags(verb):
            raise
        advice = "the same command with --resume goes on from there"
        raise type(error)(f"{error}; {advice}" if str(error) else advice) from error


class Flag(NamedTuple):
    """One option of a verb."""

    word: str  # the argument's own name, in words
    kind: Any  # the type, without None
    required: bool
    positional: bool
    metavar: str


def flags(verb: Callable) -> dict[str, Flag]:
    """The options of a verb by name, as in "--steps"; those of its dataclasses among them."""
    options: dict[str, Flag] = {}
    hints = get_type_hints(verb, include_extras=True)
    for name, parameter in inspect.signature(verb).parameters.items():
        if name not in hints:
            continue
        marks = getattr(hints[name], "__metadata__", ())
        kind = get_args(hints[name])[0] if marks else hints[name]
        if is_dataclass(kind):
            options |= flags(kind)
            continue
        metavar = next((m.metavar for m in marks if getattr(m, "metavar", None)), "")
        flag = next((m.name for m in marks if getattr(m, "name", None)), name)
        options[f"--{flag.replace('_', '-')}"] = Flag(
            name.replace("_", " "),
            without_none(kind),
            parameter.default is inspect.Parameter.empty,
            tyro.conf.Positional in marks,
            metavar,
        )
    return options


def with_flags(message: str, verb: Verb) -> str:
    """The library's complaint about an option, with the name that it has on the command line."""
    match = re.match(r"(\w+) (?:is|are|takes|needs|does|holds) ", message)
    flag = match and f"--{match[1].replace('_', '-')}"
    return f"{flag}{message[match.end(1) :]}" if flag in flags(verb) else message


def user_error(error: BaseException | None) -> UserError | None:
    """The UserError that another exception was raised for."""
    while error is not None and not isinstance(error, UserError):
        error = error.__cause__ or error.__context__
    return error


def complaint(verb: Verb, args: list[str], prog: str) -> str:
    """What is wrong with arguments that tyro refused; empty where it is none of the usual things.
    A wrong choice is a UserError."""
    options = flags(verb)
    positional = [(name, flag) for name, flag in options.items() if flag.positional]
    for name, flag in positional[:1]:
        check_values(name, flag, list(takewhile(is_value, args)))
    for place, arg in enumerate(args):
        name, equals, value = arg.partition("=")
        if name in options and options[name].kind is not bool:
            values = [value] if equals else list(takewhile(is_value, args[place + 1 :]))
            if not values:
                return f"{name} takes a value, and none follows"
            if wrong := check_values(name, options[name], values):
                return wrong
    known = {*options, "--help", *(f"--no-{name[2:]}" for name in options)}
    unknown = [arg for arg in args if not is_value(arg) and arg.partition("=")[0] not in known]
    if unknown:
        return unrecognized(unknown, options)
    missing = [
        flag.metavar if flag.positional else f"{name} {flag.metavar}".strip()
        for name, flag in options.items()
        if flag.required and name not in args
    ]
    return f"missing from {prog}: {', '.join(missing)}" if missing else ""


def check_values(name: str, flag: Flag, values: list[str]) -> str:
    """Why an option cannot have these values, or nothing. A wrong choice is a UserError."""
    several = get_origin(flag.kind) is tuple
    kind = get_args(flag.kind)[0] if several else flag.kind
    for value in values if several else values[:1]:
        if get_origin(kind) is Literal:
            word = flag.word.removesuffix("s") if several else flag.word
            choice(word, value, get_args(kind))
        if kind in NUMBERS:
            try:
                kind(value)
            except ValueError:
                return f'{name} takes {NUMBERS[kind]}, not "{value}"'
    return ""


def is_value(arg: str) -> bool:
    return not arg.startswith("--")


def unrecognized(args: list[str], options: dict[str, Flag]) -> str:
    """What is said of arguments that a verb does not have, with the nearest flags it has."""
    names = [arg.partition("=")[0] for arg in args if arg.startswith("-")]
    nearest = {near for name in names for near in difflib.get_close_matches(name, options, 1)}
    perhaps = f"; perhaps you meant {', '.join(sorted(nearest))}" if nearest else ""
    return f"unrecognized options: {', '.join(args)}{perhaps}"


def plain(text: str) -> str:
    """A text in one line, without colours and lines that are drawn."""
    return " ".join(re.sub(r"\x1b\[[\d;]*m|[\u2500-\u257f]", " ", text).split()).rstrip(".")


@contextlib.contextmanager
def one_line(program: str) -> Iterator[None]:
    """Every complaint in one line. Exit code 0 on success, 2 on bad input, 130 on Ctrl-C, 143 on
    SIGTERM."""
    with _terminated(), warnings.catch_warnings():
        # a warning is one line too, above a progress bar where there is one
        warnings.showwarning = functools.partial(_warn, program)
        logger = logging.getLogger("minidiff")
        logger.handlers, logger.level, logger.propagate = [_Log()], logging.INFO, False
        try:
            yield
            sys.stdout.flush()
        except UserError as error:
            _fail(program, str(error), 2)
        except BrokenPipeError:  # the reader has seen enough, as in `| head`
            # what is left in the buffer must not go to it at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        except OSError as error:
            advice = "check the path, its permissions and the free space."
            line = f"{error.filename}: {error.strerror}; {advice}" if error.filename else str(error)
            _fail(program, line, 2)
        except KeyboardInterrupt as error:
            is_terminated = isinstance(error, Terminated)
            name, code = ("terminated", 143) if is_terminated else ("interrupted", 130)
            _fail(program, f"{name}; {error}." if str(error) else f"{name}.", code)


@contextlib.contextmanager
def _terminated() -> Iterator[None]:
    """SIGTERM ends things as Ctrl-C does, so that nothing is left half-written. Only the main
    thread can listen for it."""
    if (
        threading.current_thread() is not threading.main_thread()
        or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
    ):
        yield
        return
    signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _terminate(*_: object) -> None:
    raise Terminated


class _Log(logging.Handler):
    """What the library logs, on stderr, above a progress bar where there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(record.getMessage(), file=sys.stderr)


def _warn(program: str, message: Warning | str, *_: object, **__: object) -> None:
    tqdm.write(f"{program}: {in_flags(' '.join(str(message).split()))}", file=sys.stderr)


def _fail(program: str, message: str, code: int) -> None:
    print(f"{program}: {in_flags(' '.join(message.splitlines()))}", file=sys.stderr)
    sys.exit(code)
