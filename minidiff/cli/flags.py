"""The options of a verb as flags: the library's `resume` is --resume on the command line."""

import inspect
import re
from collections.abc import Callable, Container
from dataclasses import is_dataclass, replace
from functools import partial
from typing import Annotated, Any, NamedTuple, TypeVar, get_args, get_type_hints

import tyro

from minidiff.cli.types import without_none
from minidiff.options.finetuning import FITTED, TuningConfig

T = TypeVar("T")
Flat = Annotated[T, tyro.conf.OmitArgPrefixes, tyro.conf.arg(name="")]  # a config as plain flags


class Flag(NamedTuple):
    """One option of a verb."""

    word: str  # the argument's own name, in words
    kind: Any  # the type, without None
    required: bool
    positional: bool
    metavar: str


def flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def flags(verb: Callable) -> dict[str, Flag]:
    """The options of a verb by name, as in "--steps"; those of its dataclasses among them."""
    options: dict[str, Flag] = {}
    hints = get_type_hints(verb, include_extras=True)
    for name, parameter in inspect.signature(verb).parameters.items():
        marks = getattr(hints[name], "__metadata__", ())
        kind = without_none(get_args(hints[name])[0] if marks else hints[name])
        if is_dataclass(kind):
            options |= flags(kind)
            continue
        own_name = next((mark.name for mark in marks if getattr(mark, "name", None)), name)
        metavar = next((mark.metavar for mark in marks if getattr(mark, "metavar", None)), "")
        required, positional = parameter.default is parameter.empty, tyro.conf.Positional in marks
        word = name.replace("_", " ")
        options[flag(own_name)] = Flag(word, kind, required, positional, metavar)
    return options


def keeping(call: partial, args: list[str]) -> partial:
    """The call of a verb; what was given on the command line, `fit` leaves as it is."""
    names = {arg.partition("=")[0].removeprefix("--").removeprefix("no-") for arg in args}
    given = [name for name in FITTED if name in names]
    values = {
        name: replace(value, keep=(*value.keep, *given))
        for name, value in call.keywords.items()
        if isinstance(value, TuningConfig)
    }
    return partial(call, **values)


def in_flags(message: str, options: Container[str] = ()) -> str:
    """A message of the library with its options as flags: `resume` becomes --resume, `batch=1`
    becomes --batch 1, and "steps is 0" becomes "--steps is 0" where --steps is among the options.
    """
    first = re.match(r"(\w+)(?= (?:is|are|takes|needs|does|holds) )", message)
    if first and flag(first[1]) in options:
        message = f"`{first[1]}`{message[first.end() :]}"
    return re.sub(r"`([a-z]\w*)(?:=([^`]*))?`", _with_value, message)


def _with_value(option: re.Match[str]) -> str:
    return f"{flag(option[1])} {option[2] or ''}".rstrip()
