"""The chapters as Jupyter notebooks: `python docs/notebooks.py` writes docs/notebooks/*.ipynb.

A chapter is written in MyST Markdown; a notebook knows only Markdown. So the source that a chapter
includes is put in, labels become tags, and folded answers become <details>. Outputs are left out:
run the cells. A test holds the notebooks against the chapters.
"""

import re
import sys
from pathlib import Path

import jupytext
import nbformat

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS / "_ext"))
from equations import FORMULA  # noqa: E402
from quoted import source  # noqa: E402

INSTALL = "Where minidiff is not installed, as in Colab, install it first: `%pip install PATH`, with the address or folder of your copy."
SOURCE = re.compile(r"^```\{source\} (\S+)(?: (\S+))?\n```$", re.MULTILINE)
FOLDED = re.compile(r"^:::\{dropdown\} (.*?)\n(.*?)^:::$", re.MULTILINE | re.DOTALL)
DIRECTIVE = re.compile(r"^(?:```|:::)\{", re.MULTILINE)


def notebook(page: Path) -> nbformat.NotebookNode:
    """A chapter as a notebook of plain Markdown and code."""
    book = jupytext.read(page, fmt="md:myst")
    for cell in book.cells:
        if cell.cell_type == "markdown":
            cell.source = plain(cell.source, page)
    title, _, rest = book.cells[0].source.partition("\n")
    book.cells[0].source = f"{title}\n\n*{INSTALL}*\n{rest}"
    for number, cell in enumerate(book.cells):
        cell.id = f"cell-{number}"  # the same at each run
    book.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    return book


def plain(text: str, page: Path) -> str:
    """MyST without what only MyST knows."""
    text = SOURCE.sub(_source, text)
    text = FORMULA.sub(r"$$\n\1 \\tag{\2}\n$$", text)
    text = re.sub(r"\{eq\}`([\w.-]+)`", r"(\1)", text)
    text = FOLDED.sub(r"<details>\n<summary>\1</summary>\n\n\2\n</details>", text)
    text = re.sub(r"\]\((\d\d_\w+)\.md", r"](\1.ipynb", text)
    left = DIRECTIVE.search(text) or re.search(r"\{\w+\}`", text)
    if left:
        raise ValueError(f"{page.name}: a notebook cannot show {left[0]!r}")
    return text


def _source(match: re.Match) -> str:
    text, _ = source(match[1], match[2])  # no line number: it would change with every edit above
    where = match[1] + (f": {match[2]}" if match[2] else "")
    return f"*{where}*\n```python\n{text.rstrip()}\n```"


def written(page: Path) -> str:
    return nbformat.writes(notebook(page)) + "\n"


def main() -> None:
    out = DOCS / "notebooks"
    out.mkdir(exist_ok=True)
    for page in sorted((DOCS / "chapters").glob("*.md")):
        file = out / f"{page.stem}.ipynb"
        file.write_text(written(page), encoding="utf-8")
        print(file.relative_to(DOCS.parent))


if __name__ == "__main__":
    main()
