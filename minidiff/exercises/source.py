"""The library's functions as text: stubs with their signatures, and copies with typical mistakes.

A place names a function: "ddpm:DDPM.q_sample", or an entry of a table: "losses:WEIGHTINGS.min-snr".
All is read from the source when it is needed, so an exercise cannot differ from the library.
"""

import ast
import contextlib
import importlib
import importlib.util
import re
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

Function = Callable[..., object]


class Source(NamedTuple):
    """A function as it stands in the library."""

    module: str  # with its package, as in minidiff.ddpm
    tree: ast.Module
    node: ast.FunctionDef | ast.Lambda
    text: str  # of the function, not indented


@lru_cache
def source(place: str) -> Source:
    """The source of the function at a place. No module of the library is imported."""
    name, _, path = place.partition(":")
    module = f"minidiff.{name}"
    whole = Path(importlib.util.find_spec(module).origin).read_text(encoding="utf-8")
    tree = node = ast.parse(whole)
    for part in path.split("."):
        node = _inside(node, part)
    if isinstance(node, ast.Lambda):
        return Source(module, tree, node, ast.get_source_segment(whole, node))
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    lines = whole.splitlines()[first - 1 : node.end_lineno]
    return Source(module, tree, node, textwrap.dedent("\n".join(lines)))


def _inside(node: ast.AST, name: str) -> ast.AST:
    """The class, function or table of this name in a module or class; or an entry of a table."""
    if isinstance(node, ast.Dict):
        keys = [key.value for key in node.keys]
        return node.values[keys.index(name)]
    for child in node.body:
        if isinstance(child, ast.ClassDef | ast.FunctionDef) and child.name == name:
            return child
        if isinstance(child, ast.Assign | ast.AnnAssign) and name in _assigned(child):
            return child.value
    raise LookupError(name)


def _assigned(node: ast.Assign | ast.AnnAssign) -> list[str]:
    """The names that an assignment gives a value."""
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    return [each.id for target in targets for each in ast.walk(target) if hasattr(each, "id")]


def header(place: str, name: str) -> str:
    """The signature and docstring of the function, under another name."""
    _, _, node, text = source(place)
    if isinstance(node, ast.Lambda):
        return f"def {name}({ast.unparse(node.args)}):"
    function = ast.parse(text).body[0]
    is_documented = ast.get_docstring(function) is not None
    last = function.body[0].end_lineno if is_documented else function.body[0].lineno - 1
    lines = "\n".join(text.splitlines()[:last])
    return lines.replace(f"def {node.name}(", f"def {name}(", 1)


def imports(place: str, text: str, extra: Sequence[str] = ()) -> str:
    """The lines that give a text its names, and extra ones, as the module of the place has them:
    its imports and its types of shapes; what it defines itself is imported from it."""
    module, tree, _, _ = source(place)
    origins = dict(pair for node in tree.body for pair in _origins(node, module))
    todo, lines = [*extra, *_names(ast.parse(f"{text}\n    ..."))], set()
    for name in todo:  # grows by the names in the types
        line = origins.get(name)
        if line is not None and line not in lines:
            lines.add(line)
            todo += _names(ast.parse(line))
    froms: dict[str, list[str]] = {}
    for line in sorted(lines):
        if line.startswith("from "):
            home, _, name = line.partition(" import ")
            froms.setdefault(home, []).append(name)
    merged = [f"{home} import {', '.join(names)}" for home, names in froms.items()]
    plain = sorted(line for line in lines if line.startswith("import "))
    types = sorted(line for line in lines if not line.startswith(("from ", "import ")))
    return "\n\n".join("\n".join(block) for block in (plain, merged, types) if block)


def _origins(node: ast.stmt, module: str) -> Iterator[tuple[str, str]]:
    """Every name that a statement of a module gives, and the line that gives it to another file."""
    if isinstance(node, ast.Import | ast.ImportFrom):
        start = f"from {node.module} " if isinstance(node, ast.ImportFrom) else ""
        for alias in node.names:
            yield alias.asname or alias.name, f"{start}import {ast.unparse(alias)}"
    elif isinstance(node, ast.ClassDef | ast.FunctionDef):
        yield node.name, f"from {module} import {node.name}"
    elif isinstance(node, ast.Assign | ast.AnnAssign):
        names, value = _assigned(node), node.value
        parts = value.elts if isinstance(value, ast.Tuple) else [value]
        for name, part in zip(names, parts, strict=False):
            text = f"{name} = {ast.unparse(part)}".replace("'", '"')
            is_type = isinstance(part, ast.Subscript)  # as Float[Tensor, "B"]
            yield name, text if is_type else f"from {module} import {name}"


def _names(node: ast.AST) -> list[str]:
    return [each.id for each in ast.walk(node) if isinstance(each, ast.Name)]


def references(place: str, text: str) -> str:
    """The papers that a text cites, as in [1], from the docstring of the place's module."""
    listed = re.findall(
        r"^(\[\d+\]) (.*(?:\n    .*)*)", ast.get_docstring(source(place).tree), re.MULTILINE
    )
    cited = [f"{mark} {' '.join(paper.split())}" for mark, paper in listed if mark in text]
    return "\n".join(textwrap.fill(paper, 96, subsequent_indent="    ") for paper in cited)


def edited(place: str, edits: list[tuple[str, str]]) -> Function | None:
    """A copy of the function with pieces of its text replaced; None where one is not in it, as
    after an edit that replaced the same piece."""
    module, _, node, text = source(place)
    for old, new in edits:
        if old not in text:
            return None
        text = text.replace(old, new)
    names = dict(vars(importlib.import_module(module)))
    if isinstance(node, ast.Lambda):
        return eval(text, names)
    exec(compile(text, f"<{place}>", "exec"), names)
    return names[node.name]


def _owner(place: str) -> tuple[object, str]:
    """The module, class or table that holds the function, and the name there."""
    name, _, path = place.partition(":")
    owner, parts = importlib.import_module(f"minidiff.{name}"), path.split(".")
    for part in parts[:-1]:
        owner = getattr(owner, part)
    return owner, parts[-1]


def original(place: str) -> Function:
    """The function itself."""
    owner, name = _owner(place)
    return owner[name] if isinstance(owner, dict) else vars(owner)[name]


@contextlib.contextmanager
def in_place(place: str, function: Function) -> Iterator[None]:
    """Put a function in the place of the library's, wherever the library has it by name."""
    (owner, name), own = _owner(place), original(place)
    modules = [each for key, each in sys.modules.items() if key.startswith("minidiff")]
    here = [(m, key) for m in modules for key, value in [*vars(m).items()] if value is own]
    here.append((owner, name))
    try:
        for each, key in here:
            _put(each, key, function)
        yield
    finally:
        for each, key in here:
            _put(each, key, own)


def _put(owner: object, name: str, value: object) -> None:
    if isinstance(owner, dict):
        owner[name] = value
    else:
        setattr(owner, name, value)
