"""What the house is made of, counted from the source: `python tests/house.py [FOLDER]`.

Counts lines, files, argument lists, nested functions and ** parameters, so that "plainer" is a number.
"""

import ast
import sys
from pathlib import Path
from typing import NamedTuple

HOUSE = Path(__file__).parents[1] / "minidiff"
WIDTH, LONGEST_FILE, MOST_ARGUMENTS = 100, 400, 8


class Counts(NamedTuple):
    lines: int
    long_lines: int
    core_files: int
    core_lines: int
    longest_file: tuple[int, str]
    most_arguments: tuple[int, str]
    nested_functions: int
    star_star_parameters: int


def files(house: Path = HOUSE) -> dict[str, str]:
    """The source of each module by its path below the house."""
    return {
        str(path.relative_to(house)): path.read_text(encoding="utf-8")
        for path in sorted(house.rglob("*.py"))
    }


def functions(source: str) -> list[tuple[ast.FunctionDef, bool]]:
    """Every function of a module, and whether it stands inside another one."""
    found, todo = [], [(ast.parse(source), False)]
    while todo:
        parent, inside = todo.pop()
        for node in ast.iter_child_nodes(parent):
            is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            if is_function:
                found.append((node, inside))
            todo.append((node, inside or is_function))
    return found


def arguments(function: ast.FunctionDef) -> list[str]:
    """The names of a function's arguments, without self and cls."""
    of = function.args
    names = [arg.arg for arg in (*of.posonlyargs, *of.args, *of.kwonlyargs)]
    return [name for name in names if name not in ("self", "cls")]


def count(house: Path = HOUSE) -> Counts:
    sources = files(house)
    lines = {name: source.splitlines() for name, source in sources.items()}
    core = {name for name in sources if "/" not in name}
    all_functions = [
        (f"{name}:{node.lineno} {node.name}", node, inside)
        for name, source in sources.items()
        for node, inside in functions(source)
    ]
    return Counts(
        lines=sum(map(len, lines.values())),
        long_lines=sum(len(line) > WIDTH for each in lines.values() for line in each),
        core_files=len(core),
        core_lines=sum(len(lines[name]) for name in core),
        longest_file=max((len(each), name) for name, each in lines.items()),
        most_arguments=max((len(arguments(node)), where) for where, node, _ in all_functions),
        nested_functions=sum(inside for _, _, inside in all_functions),
        star_star_parameters=sum(node.args.kwarg is not None for _, node, _ in all_functions),
    )


if __name__ == "__main__":
    for name, value in count(Path(sys.argv[1]) if sys.argv[1:] else HOUSE)._asdict().items():
        print(f"{name.replace('_', ' '):22}", *(value if isinstance(value, tuple) else (value,)))
