"""How the command line writes the options of the library: its `resume` is --resume here."""

import re
from typing import Annotated, TypeVar

import tyro

T = TypeVar("T")
Flat = Annotated[T, tyro.conf.OmitArgPrefixes, tyro.conf.arg(name="")]  # a config as plain flags


def in_flags(message: str) -> str:
    """A message of the library with its options as flags: `resume` becomes --resume, `batch=1`
    becomes --batch 1."""
    return re.sub(r"`([a-z]\w*)(?:=([^`]*))?`", _flag, message)


def _flag(option: re.Match[str]) -> str:
    name, value = option.groups()
    return f"--{name.replace('_', '-')}" + (f" {value}" if value else "")
