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
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import tyro
from tqdm import tqdm

from minidiff.cli.flags import Flag, flags, in_flags, keeping
from minidiff.cli.types import REGISTRY
from minidiff.errors import Terminated, UserError, choice, printable
from minidiff.training import atomic, ranks

Verb = Callable[..., None]
Verbs = dict[str, Verb]  # by name; a name of two words is a verb of a group, as in "plot forward"
LONGEST = 1200  # letters of a message; a longer one loses its middle
# flags of other programs, and ours for them
OTHERS = """
dataset=data train-data-dir=data instance-data-dir=subject instance-prompt=prompt ckpt=model
class-data-dir=class-dir num-class-images=class-pictures prior-loss-weight=prior output-dir=out
pretrained-model-name-or-path=model resolution=size learning-rate=lr text-encoder-lr=text-lr
train-text-encoder=text lr-scheduler=lr-schedule lr-warmup-steps=warmup train-batch-size=batch
gradient-accumulation-steps=accumulate gradient-checkpointing=checkpointing mixed-precision=dtype
max-train-steps=steps num-inference-steps=steps guidance-scale=guidance cfg-scale=guidance
negative-prompt=negative network-dim=rank network-alpha=alpha scheduler=sampler
"""
OURS = dict(pair.split("=") for pair in OTHERS.split())
# how torch says it, on any device
NO_MEMORY = re.compile(r"out of memory|allocate memory|bad_alloc|alloc_cpu", re.IGNORECASE)
LESS = ("--size", "--batch", "--n", "--method lora", "--checkpointing", "--dtype bf16")
NUMBERS = {int: "a whole number", float: "a number"}


def run(program: str, purpose: str, verbs: Verbs, args: list[str]) -> None:
    """Run the verb that is named."""
    with one_line(program):
        if args[:1] == ["--version"]:
            from minidiff import __version__

            return print(f"{program} {__version__}")
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
            with messages_of(verbs[name]):
                job = parsed(verbs[name], args[words:], f"{program} {name}")
                with contextlib.redirect_stdout(Printable(sys.stdout)):
                    return job()
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
    """The verb with its arguments, not yet called."""
    output = io.StringIO()
    try:
        with contextlib.redirect_stderr(output):
            job, unknown = tyro.cli(
                # takes the verb's arguments, and returns the call
                functools.update_wrapper(functools.partial(functools.partial, verb), verb),
                prog=prog,
                description=(inspect.getdoc(verb) or "").partition("\n\nArgs:")[0],
                args=args,
                return_unknown_args=True,
                registry=REGISTRY,
                config=(tyro.conf.OmitArgPrefixes,),
            )
    except SystemExit as end:
        if not end.code:  # --help, which tyro has printed
            return lambda: None
        error = end.__context__
        while error is not None and not isinstance(error, UserError):
            error = error.__context__
        message = complaint(flags(verb), args, prog) or plain(output.getvalue())
        raise error or UserError(f"{message}; see {prog} --help.") from None
    if unknown:
        raise UserError(f"{unrecognized(unknown, flags(verb))}; see {prog} --help.")
    return keeping(job, args)


@contextlib.contextmanager
def messages_of(verb: Verb) -> Iterator[None]:
    """The library's messages as a verb gives them: its options are flags, one that can resume says
    so where it is interrupted, and out of memory its options help that take less."""
    try:
        yield
    except UserError as error:
        raise UserError(in_flags(str(error), flags(verb))) from error
    except KeyboardInterrupt as error:
        if "--resume" not in flags(verb):
            raise
        advice = "the same command with --resume goes on from there"
        raise type(error)(f"{error}; {advice}" if str(error) else advice) from error
    except (MemoryError, RuntimeError) as error:
        if not (isinstance(error, MemoryError) or NO_MEMORY.search(str(error))):
            raise
        helpful = [name for name in LESS if name.partition(" ")[0] in flags(verb)]
        remedy = f"these take less: {', '.join(helpful)}" if helpful else "close other programs"
        asked = re.search(r"allocate (\d+) bytes|allocate ([\d.]+ [KMGT]iB)", str(error))
        amount = asked and (asked[2] or f"{int(asked[1]) / 1e9:.1f} GB")
        size = f" ({amount} at once)" if amount else ""
        raise UserError(f"there is not enough memory for this{size}; {remedy}.") from error


def complaint(options: dict[str, Flag], args: list[str], prog: str) -> str:
    """What is wrong with arguments that tyro refused; empty where it is none of the usual things.
    A wrong choice is a UserError."""
    given = [
        (name, list(takewhile(is_value, args))) for name in options if options[name].positional
    ]
    wrong = [wrong_value(name, options[name], values) for name, values in given[:1]]
    for place, arg in enumerate(args):
        name, equals, value = arg.partition("=")
        if name in options and options[name].kind is not bool:
            values = [value] if equals else list(takewhile(is_value, args[place + 1 :]))
            if not values:
                return f"{name} takes a value, and none follows"
            wrong.append(wrong_value(name, options[name], values))
    if any(wrong):
        return next(filter(None, wrong))
    names = {*options, "--help", *(f"--no-{name[2:]}" for name in options)}
    if unknown := [arg for arg in args if not is_value(arg) and arg.partition("=")[0] not in names]:
        return unrecognized(unknown, options)
    missing = [
        flag.metavar if flag.positional else f"{name} {flag.metavar}".strip()
        for name, flag in options.items()
        if flag.required and name not in args
    ]
    return f"missing from {prog}: {', '.join(missing)}" if missing else ""


def wrong_value(name: str, flag: Flag, values: list[str]) -> str:
    """Why an option cannot have these values, or nothing. A wrong choice is a UserError."""
    several = get_origin(flag.kind) is tuple
    kind = get_args(flag.kind)[0] if several else flag.kind
    for value in values if several else values[:1]:
        if get_origin(kind) is Literal:
            choice(flag.word.removesuffix("s") if several else flag.word, value, get_args(kind))
        try:
            kind(value) if kind in NUMBERS else None
        except ValueError:
            return f'{name} takes {NUMBERS[kind]}, not "{value}"'
    return ""


def is_value(arg: str) -> bool:
    return not arg.startswith("--")


def unrecognized(args: list[str], options: dict[str, Flag]) -> str:
    """Arguments that a verb does not have, with the nearest flags that it has."""
    names = [arg.partition("=")[0] for arg in args if arg.startswith("-")]
    nearest = set()
    for name in (name.replace("_", "-") for name in names):
        ours = f"--{OURS.get(name.lstrip('-'))}"
        nearest |= {ours} if ours in options else set(difflib.get_close_matches(name, options, 1))
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
        warnings.showwarning = functools.partial(_warn, program)
        logger = logging.getLogger("minidiff")
        logger.handlers, logger.propagate = [_Log()], False
        logger.setLevel(logging.INFO)  # loggers below it may have noted another level
        try:
            _open_streams()
            _limit_memory()
            with contextlib.nullcontext() if ranks.is_main() else _silent():
                yield
            sys.stdout.flush()
        except UserError as error:
            _fail(program, str(error), 2)
        except BrokenPipeError:  # the reader has seen enough, as in `| head`
            _silence(sys.stdout)
            _silence(sys.stderr)
        except OSError as error:
            advice = "check the path, its permissions and the free space."
            place = error.filename
            if place is None and error.errno in atomic.NO_ROOM:
                place = "standard output"  # files are named
                _silence(sys.stdout)
            line = f"{place}: {error.strerror}; {advice}" if place else str(error)
            _fail(program, line, 2)
        except MemoryError as error:
            reason = f" ({error})" if str(error) else ""
            _fail(program, f"out of memory{reason}; a smaller size or batch takes less.", 2)
        except KeyboardInterrupt as error:
            is_terminated = isinstance(error, Terminated)
            name, code = ("terminated", 143) if is_terminated else ("interrupted", 130)
            _fail(program, f"{name}; {error}." if str(error) else f"{name}.", code)


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Nothing is said by any process but the first, which says it for all."""
    with (
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        yield


def _open_streams() -> None:
    """Refuse a closed standard output; let no file take the place of a closed standard error; and
    write what a terminal has no letters for as \\u2026."""
    closed = sys.stdout is None
    for stream in range(3):
        try:
            os.fstat(stream)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
    if sys.stderr is None:
        sys.stderr = open(2, "w", closefd=False)
    for stream in filter(None, (sys.stdout, sys.stderr)):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    if closed:
        raise UserError("standard output is closed; send it to a file, or to /dev/null.")


def _limit_memory() -> None:
    """Have Linux refuse more memory than the machine has, where it would end the process. Drivers
    of GPUs reserve more than there is, so not beside them."""
    if sys.platform != "linux" or any(map(os.path.exists, ("/dev/nvidiactl", "/dev/kfd"))):
        return
    import resource  # not there on Windows

    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    lines = Path("/proc/meminfo").read_text().splitlines()
    sizes = {line.split(":")[0]: 1024 * int(line.split()[1]) for line in lines}
    if soft == resource.RLIM_INFINITY:
        limit = sizes["MemTotal"] + sizes["SwapTotal"]
        resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))


def _silence(stream: io.IOBase) -> None:
    """What is left in the buffer goes nowhere at exit."""
    with contextlib.suppress(io.UnsupportedOperation):  # it is no file
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


@contextlib.contextmanager
def _terminated() -> Iterator[None]:
    """SIGTERM ends things as Ctrl-C does, so that nothing is left half-written. Only the main
    thread can listen for it."""
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, _terminate)
    before, sys.unraisablehook = sys.unraisablehook, _unraisable
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        sys.unraisablehook = before


def _terminate(*_: object) -> None:
    raise Terminated


def _unraisable(lost: "sys.UnraisableHookArgs") -> None:
    """A signal that arrives while Python destroys an object is lost there: send it again."""
    if not isinstance(lost.exc_value, KeyboardInterrupt):
        return sys.__unraisablehook__(lost)
    is_terminated = isinstance(lost.exc_value, Terminated)
    number = signal.SIGTERM if is_terminated else signal.SIGINT
    threading.Timer(0.01, os.kill, (os.getpid(), number)).start()


class Printable:
    """A text stream on which strangers' names and captions print as themselves or escaped, and
    never move the cursor, whatever the terminal can show."""

    def __init__(self, stream: Any):  # such as sys.stdout
        self.stream = stream

    def write(self, text: str) -> int:
        text = "\n".join(map(printable, text.split("\n")))
        encoding = self.stream.encoding or "utf-8"
        return self.stream.write(text.encode(encoding, "backslashreplace").decode(encoding))

    def __getattr__(self, name: str) -> object:
        return getattr(self.stream, name)


class _Log(logging.Handler):
    """What the library logs, on stderr, above a progress bar where there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(printable(record.getMessage()), file=sys.stderr)


def _warn(program: str, message: Warning | str, *_: object, **__: object) -> None:
    tqdm.write(f"{program}: {_line(' '.join(str(message).split()))}", file=sys.stderr)


def _line(message: str) -> str:
    """A message with flags, whatever a stranger's file put into it."""
    line = printable(in_flags(message))
    return line if len(line) <= LONGEST else f"{line[: LONGEST // 2]} ... {line[-LONGEST // 4 :]}"


def _fail(program: str, message: str, code: int) -> None:
    try:
        if not ranks.is_main():
            sys.exit(code)
        print(f"{program}: {_line(' '.join(message.splitlines()))}", file=sys.stderr)
    except OSError:  # nobody can be told
        _silence(sys.stderr)
    sys.exit(code)
