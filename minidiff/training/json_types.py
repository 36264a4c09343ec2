"""Whether JSON is of a type, as our own files must be before their content is used."""

from types import UnionType
from typing import get_args, get_origin


def fits(value: object, kind: object) -> bool:
    """Whether a value is of a type such as dict[str, list[float | None]]; a tuple is a list in
    JSON, and an int is a float where a float can hold it."""
    origin, args = get_origin(kind), get_args(kind)
    if isinstance(kind, UnionType):
        return any(fits(value, one) for one in args)
    if origin is list:
        return isinstance(value, list) and all(fits(one, args[0]) for one in value)
    if origin is tuple:
        same_length = isinstance(value, list) and len(value) == len(args)
        return same_length and all(map(fits, value, args))
    if origin is dict:
        return isinstance(value, dict) and all(fits(one, args[1]) for one in value.values())
    if kind is float and type(value) is int:
        return abs(value) < 2**63
    return type(value) is kind or (kind is None and value is None)
