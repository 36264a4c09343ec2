"""Sphinx's settings for the book: `sphinx-build -W -b html docs out/site`, offline.

Sphinx with MyST-NB, not Jupyter Book 2: that one fetches its template from the network at each
build. Chapters are notebooks in Markdown; they run when the book is built, and are cached.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "_ext"))
os.environ["MPLBACKEND"] = "module://matplotlib_inline.backend_inline"  # plt.show() draws in cells
os.environ.setdefault("OMP_NUM_THREADS", "1")  # small networks: a second thread costs more

project = "minidiff"
author = "the minidiff authors"
html_title = "minidiff, the book"
extensions = [
    "myst_nb",
    "sphinx_design",  # folded answers
    "sphinx_copybutton",
    "sphinx-mathjax-offline",  # formulas without a network
    "source_pages",  # ours: the project's source beside the text
    "equations",  # ours: the equation index
    "equation_ids",  # ours: formulas are numbered by their ids, such as ddpm-4
]
exclude_patterns = ["_ext", "_build", "notebooks"]
html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["book.css"]
html_show_sourcelink = False
pygments_style, pygments_dark_style = "friendly", "github-dark"

myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence", "deflist", "attrs_inline"]
myst_heading_anchors = 4  # headings are link targets by GitHub's names
myst_dmath_double_inline = True
math_number_all = False
numfig = False
mathjax3_config = {"chtml": {"displayAlign": "left", "displayIndent": "1.5em"}}

nb_execution_mode = "cache"
nb_execution_timeout = 900  # seconds for a cell: machines differ threefold
nb_execution_raise_on_error = True
nb_merge_streams = True
nb_render_markdown_format = "myst"


def link_notebook(app, docname: str, source: list[str]) -> None:
    """Under the title of a chapter: the same as a notebook."""
    if docname.startswith("chapters/"):
        front, title, rest = source[0].partition("\n# ")
        heading, _, text = rest.partition("\n")
        file = f"../notebooks/{Path(docname).name}.ipynb"
        link = f"{{download}}`This chapter as a notebook <{file}>`"
        source[0] = f"{front}{title}{heading}\n\n{link}\n{text}"


def setup(app) -> None:
    app.connect("source-read", link_notebook)
