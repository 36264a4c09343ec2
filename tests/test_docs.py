"""The pages name what is there: links and headings, files, and what their Python blocks import.

`python -m tests.test_docs` renews the last column of the counts in docs/architecture.md.
"""

import ast
import importlib
import re
from pathlib import Path

import pytest

from . import house

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
CHAPTERS = sorted((ROOT / "docs" / "chapters").glob("*.md"))
FENCED = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
PYTHON_FILE = re.compile(r"[\w./-]*\w\.py\b")
FOLDERS = (ROOT, ROOT / "minidiff", ROOT / "experiments", ROOT / "tests")


def prose(page):
    return FENCED.sub("", page.read_text(encoding="utf-8"))


def anchors(page):
    """GitHub's names of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def blocks():
    for page in PAGES:
        for k, (language, code) in enumerate(FENCED.findall(page.read_text(encoding="utf-8"))):
            if language == "python":
                yield pytest.param(code, id=f"{page.stem}-{k}")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    for link in LINK.findall(prose(page)):
        path, _, anchor = link.partition("#")
        if path.startswith(("http://", "https://")):
            continue
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name}: {link}"
        assert not anchor or anchor in anchors(target), f"{page.name}: no heading for {link}"


@pytest.mark.parametrize("page", [*PAGES, *CHAPTERS], ids=lambda page: page.stem)
def test_no_labels(page):
    """MyST's (name)= before a heading is literal text on GitHub; links use the heading's name."""
    assert not re.search(r"^\([\w-]+\)=$", prose(page), re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_files_are_there(page):
    names = {path.name for path in (ROOT / "minidiff").rglob("*.py")}
    for file in set(PYTHON_FILE.findall(page.read_text(encoding="utf-8"))):
        path = file.removeprefix("../")
        there = any((folder / path).is_file() for folder in FOLDERS)
        assert there or file in names or Path(file).name == "NAME.py", f"{page.name} names {file}"


@pytest.mark.parametrize("code", blocks())
def test_blocks_import_what_is_there(code):
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "minidiff":
            module = importlib.import_module(node.module)
            for alias in node.names:
                if not hasattr(module, alias.name):
                    importlib.import_module(f"{node.module}.{alias.name}")
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "minidiff":
                    importlib.import_module(alias.name)


def code_lines(source):
    """Without blank lines, comments and docstrings."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(
            node
        ):
            lines, text = source.splitlines(), node.body[0]
            for number in range(text.lineno - 1, text.end_lineno):
                lines[number] = ""
            source = "\n".join(lines)
    return sum(bool(line.split("#")[0].strip()) for line in source.splitlines())


def refresh(page=ROOT / "docs" / "architecture.md"):
    """Write today's counts into the last column of the table of counts."""
    text = page.read_text(encoding="utf-8")
    counts = house.count()._asdict() | {
        "lines of code": sum(map(code_lines, house.files().values()))
    }
    for name, value in counts.items():
        value = f"{value[0]:,} (`{value[1]}`)" if isinstance(value, tuple) else f"{value:,}"
        row = re.compile(rf"^(\| {name.replace('_', ' ')} \|.*\|) [^|]* \|$", re.MULTILINE)
        text = row.sub(lambda match, value=value: f"{match[1]} {value} |", text)
    page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    refresh()
