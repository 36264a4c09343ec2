"""Every flip of a source file: its operators, comparisons and numbers, one changed at a time."""

import ast
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]

OPERATORS = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult, ast.Mod: ast.FloorDiv, ast.Pow: ast.Mult, ast.MatMult: ast.Mult,
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.Is: ast.IsNot, ast.IsNot: ast.Is,
    ast.In: ast.NotIn, ast.NotIn: ast.In, ast.USub: ast.UAdd,
}  # fmt: skip


class Flip(NamedTuple):
    """One change of one file; its place is free of line numbers."""

    file: str
    function: str
    change: str  # "a + b -> a - b"; a change that comes again in a function ends in "#2"

    @property
    def place(self) -> str:
        return f"{self.file}: {self.function}: {self.change}"


def parsed(file: str) -> ast.Module:
    return ast.parse((ROOT / "minidiff" / file).read_text(encoding="utf-8"))


def flips(file: str) -> list[Flip]:
    return [Flip(file, function, change) for function, change in flipped(parsed(file))]


def source(flip: Flip) -> str:
    """The whole file with this change."""
    tree = parsed(flip.file)
    for function, change in flipped(tree):
        if (function, change) == (flip.function, flip.change):
            return ast.unparse(tree)
    raise ValueError(f"no such flip: {flip.place}")


def flipped(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """Flip the tree in every way, one at a time; yields function and change while it is flipped."""
    times: Counter[tuple[str, str]] = Counter()
    for function, shown, node in nodes(tree, "", tree):
        for field, index, old, new in changes(node):
            before = ast.unparse(shown)
            put(node, field, index, new)
            change = f"{before} -> {ast.unparse(shown)}"
            times[function, change] += 1
            again = times[function, change]
            yield function, f"{change} #{again}" if again > 1 else change
            put(node, field, index, old)


def nodes(node: ast.AST, function: str, shown: ast.AST) -> Iterator[tuple[str, ast.AST, ast.AST]]:
    """Every node that may be flipped, its function, and what to show of its surroundings."""
    if isinstance(node, ast.JoinedStr | ast.Raise):
        return
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        function = f"{function}.{node.name}".lstrip(".")
    large = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.arguments, ast.comprehension)
    compound = (ast.For, ast.If, ast.With, ast.While, ast.Try)
    if isinstance(node, ast.arguments):
        yield from defaults(node, function)
        return
    own = isinstance(node, ast.operator | ast.BinOp | ast.Compare | ast.AugAssign)
    if own or not isinstance(node, ast.Constant | ast.UnaryOp | ast.keyword | ast.Starred):
        shown = node
    if isinstance(shown, (*large, *compound)):
        shown = node
    yield function, shown, node
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield from nodes(child, function, shown)


def defaults(node: ast.arguments, function: str) -> Iterator[tuple[str, ast.AST, ast.AST]]:
    """The default values of a function's arguments, shown as name=value."""
    places = [*node.posonlyargs, *node.args]
    late = list(zip(node.kwonlyargs, node.kw_defaults, strict=True))
    early = list(zip(places[len(places) - len(node.defaults) :], node.defaults, strict=True))
    for name, value in [*early, *late]:
        for _, _, inner in nodes(value, function, value) if value is not None else ():
            yield function, ast.keyword(name.arg, value), inner


def changes(node: ast.AST) -> Iterator[tuple[str, int | None, object, object]]:
    """(field, index, old, new) of each flip of this very node."""
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        value = node.value
        yield "value", None, value, value + 1 if isinstance(value, int) else 2 * value or 1.0
    elif isinstance(node, ast.BinOp | ast.UnaryOp | ast.AugAssign) and type(node.op) in OPERATORS:
        yield "op", None, node.op, OPERATORS[type(node.op)]()
    elif isinstance(node, ast.Compare):
        for index, op in enumerate(node.ops):
            yield "ops", index, op, OPERATORS[type(op)]()


def put(node: ast.AST, field: str, index: int | None, value: object) -> None:
    if index is None:
        setattr(node, field, value)
    else:
        getattr(node, field)[index] = value
