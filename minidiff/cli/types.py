"""How words on the command line become values: one rule for each type that tyro does not read as we
want it. The defaults and help texts stand with the options themselves."""

import re
import types
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from minidiff.cli import options
from minidiff.errors import UserError
from minidiff.options.sampling import Corner, Interval, Size

REGISTRY = ConstructorRegistry()


def without_none(kind: Any) -> Any:
    """T of T | None, and any other type as it is."""
    members = get_args(kind) if get_origin(kind) in (Union, types.UnionType) else ()
    others = [member for member in members if member is not type(None)]
    return others[0] if len(others) == 1 and len(members) == 2 else kind


def size(words: list[str]) -> Size:
    """Of "512", or "768x512" where the width comes first."""
    match = re.fullmatch(r"(-?\d+)(?:[xX](-?\d+))?", words[0])
    if not match:
        raise UserError(
            f'size takes a side in pixels, or a width and a height as in 768x512; not "{words[0]}".'
        )
    return Size(height=int(match[2] or match[1]), width=int(match[1]))


def interval(words: list[str]) -> Interval:
    """Of "0.8,1"."""
    try:
        low, high = map(float, words[0].split(","))
    except ValueError:
        raise UserError(
            f'interval is "{words[0]}"; write two numbers from 0 (data) to 1 (noise), '
            "the smaller one first, as in 0.8,1."
        ) from None
    return Interval(low, high)


def corner(words: list[str]) -> Corner:
    """Of "0,128"."""
    if not (match := re.fullmatch(r"(\d+),(\d+)", words[0])):
        what = "crop takes two numbers of pixels, from the top and the left, as in 0,128"
        raise UserError(f'{what}; not "{words[0]}".')
    return Corner(int(match[1]), int(match[2]))


def path(words: list[str]) -> Path:
    """Of "runs/tuned". As pathlib drops "./", a missing path that begins so becomes absolute: it is
    no name on the Hugging Face Hub."""
    path = Path(words[0])
    is_here = re.match(r"\.[/\\]", words[0]) and not path.parent.exists()
    return path.absolute() if is_here else path


RULES = {
    Path: PrimitiveConstructorSpec(
        1,
        "PATH",
        instance_from_str=path,
        is_instance=lambda value: isinstance(value, Path),
        str_from_instance=lambda path: [str(path)],
    ),
    Size: PrimitiveConstructorSpec(
        1,
        "INT|WIDTHxHEIGHT",
        instance_from_str=size,
        is_instance=lambda value: isinstance(value, Size),
        str_from_instance=lambda size: [f"{size.width}x{size.height}"],
    ),
    Corner: PrimitiveConstructorSpec(
        1,
        "TOP,LEFT",
        instance_from_str=corner,
        is_instance=lambda value: isinstance(value, Corner),
        str_from_instance=lambda corner: [f"{corner.top},{corner.left}"],
    ),
    Interval: PrimitiveConstructorSpec(
        1,
        "N,N",
        instance_from_str=interval,
        is_instance=lambda value: isinstance(value, Interval),
        str_from_instance=lambda interval: [f"{interval.low:g},{interval.high:g}"],
    ),
    Sequence[str]: PrimitiveConstructorSpec(
        1,
        "WORD,WORD",
        instance_from_str=lambda words: tuple(options.words(words[0])),
        is_instance=lambda value: isinstance(value, tuple),
        str_from_instance=lambda words: [",".join(words)],
    ),
}


@REGISTRY.primitive_rule
def _by_type(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
    return RULES.get(info.type)


@REGISTRY.primitive_rule
def _choice(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
    """Words to choose from, shown as in fp32|bf16."""
    choices = get_args(info.type) if get_origin(info.type) is Literal else ()
    if not choices or not all(isinstance(word, str) for word in choices):
        return None
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="|".join(choices),
        instance_from_str=lambda words: words[0],
        is_instance=lambda value: value in choices,
        str_from_instance=lambda value: [value],
        choices=choices,
    )


@REGISTRY.primitive_rule
def _optional(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
    """T | None is read as T, and bool | None is a flag that stands alone."""
    kind = without_none(info.type)
    if kind is info.type:
        return None
    if kind is bool:
        return PrimitiveConstructorSpec(
            nargs=0,
            metavar="",
            instance_from_str=lambda words: True,
            is_instance=lambda value: value is None or isinstance(value, bool),
            str_from_instance=lambda value: [str(value)],
        )
    spec = ConstructorRegistry.get_primitive_spec(PrimitiveTypeInfo.make(kind, info.markers))
    if not isinstance(spec, PrimitiveConstructorSpec):
        return None
    return replace(
        spec,
        is_instance=lambda value: value is None or spec.is_instance(value),
        str_from_instance=lambda value: (
            ["None"] if value is None else spec.str_from_instance(value)
        ),
    )
