"""Reads the project's own source by name, for the book and its notebooks."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[2]


def lines_of(file: str, name: str) -> tuple[int, int]:
    """First and last line, counted from 1, of the function, class or constant that name is."""
    scope: list[ast.stmt] = ast.parse((ROOT / file).read_text(encoding="utf-8")).body
    for part in name.split("."):
        node = next((each for each in scope if part in names_of(each)), None)
        if node is None:
            raise ValueError(f"{file} has no {name}")
        scope = getattr(node, "body", [])
    decorators = getattr(node, "decorator_list", [])
    return min(each.lineno for each in [node, *decorators]), node.end_lineno


def names_of(node: ast.stmt) -> list[str]:
    """What a statement defines: a function, a class, constants."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    return [target.id for target in targets if isinstance(target, ast.Name)]


def source(file: str, name: str | None = None) -> tuple[str, int]:
    """The text of a file, or of one thing in it without its indentation; and its first line."""
    if not (ROOT / file).is_file():
        raise ValueError(f"{file}: no such file")
    text = (ROOT / file).read_text(encoding="utf-8")
    if not name:
        return text, 1
    first, last = lines_of(file, name)
    lines = text.splitlines()[first - 1 : last]
    indent = len(lines[0]) - len(lines[0].lstrip())
    return "\n".join(line[indent:] for line in lines) + "\n", first
