"""A bug as a switch: a piece of the library's own code with something wrong in its place; and what
shows it, drawn twice from the same noise, without and with the bug.

museum.py and traps.py have tables of them.
"""

import inspect
import pkgutil
import textwrap
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

import torch
from museum_pictures import Picture

from minidiff.errors import choice
from minidiff.figures import plots

GAP = 8


@dataclass(frozen=True)
class Change:
    """A piece of a function's source, and what the bug has in its place."""

    place: str  # "minidiff.module:Class.method"
    right: str
    wrong: str


@dataclass(frozen=True)
class Bug:
    title: str
    what: str  # is wrong, in a sentence
    notice: str  # how to notice it
    test: str  # the test that catches it
    picture: Callable[..., Picture]  # what shows it
    changes: tuple[Change, ...]


def function_in(thing: Any) -> FunctionType:
    """The plain function inside a method, a property or decorators."""
    thing = thing.fget if isinstance(thing, property) else thing
    return inspect.unwrap(getattr(thing, "__func__", thing))


def changed(function: FunctionType, change: Change) -> CodeType:
    """The code of the function with the piece replaced."""
    source = textwrap.dedent(inspect.getsource(function))
    if source.count(change.right) != 1:
        raise ValueError(f"{change.place} has {source.count(change.right)} of: {change.right}")
    names: dict[str, Any] = {}
    exec(source.replace(change.right, change.wrong), function.__globals__, names)
    return function_in(names[function.__name__]).__code__


@contextmanager
def switched_on(bug: Bug) -> Iterator[None]:
    """The library has the bug inside the block, and is as before after it, whatever happens.

    The function gets other code and stays the same object, so all who imported it have the bug."""
    with ExitStack() as stack:
        for change in bug.changes:
            function = function_in(pkgutil.resolve_name(change.place))
            stack.callback(setattr, function, "__code__", function.__code__)
            function.__code__ = changed(function, change)
        yield


def pair(bug: Bug, right: Picture | None = None) -> tuple[Picture, Picture]:
    """What shows the bug without it and with it; the first may be at hand already."""
    torch.manual_seed(0)
    right = bug.picture() if right is None else right
    with switched_on(bug):
        return right, bug.picture()


def names_of(bugs: str, table: Mapping[str, Bug]) -> list[str]:
    """Names with commas; one that is not in the table is a UserError."""
    names = [part.strip() for part in bugs.split(",")]
    for name in names:
        choice("bug", name, table)
    return names


def gallery(names: list[str], table: Mapping[str, Bug], sheet: Path) -> dict[str, float]:
    """Draw these bugs of the table: NAME.png for each, and all of them as one sheet in the same
    folder. Returns the mean difference of each pair, of a range of 2."""
    right: dict[Callable[..., Picture], Picture] = {}
    pairs, differences = [], {}
    for name in names:
        bug = table[name]
        a, b = pair(bug, right.get(bug.picture))
        right[bug.picture] = a
        title = f"{list(table).index(name) + 1}. {bug.title}"
        file = sheet.with_name(f"{name}.png")
        plots.strip({"": torch.stack([a, b])}, ["right", "wrong"], file, title)
        pairs.append((title, torch.cat([a, torch.ones(*a.shape[:2], GAP), b], dim=2)))
        differences[name] = round((a - b).abs().mean().item(), 4)
        print(f"{name}: {bug.what}")

    titles, images = zip(*pairs, strict=True)
    heading = "Left: as it should be. Right: with the bug."
    print(plots.grid(torch.stack(images), list(titles), sheet, 4, heading))
    return differences
