"""The book: each formula has its test, its marks lead somewhere, the notebooks are the chapters."""

import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"
sys.path.insert(0, str(DOCS / "_ext"))
sys.path.insert(0, str(DOCS))
import check_links  # noqa: E402
import equations  # noqa: E402
import notebooks  # noqa: E402
import quoted  # noqa: E402

CHAPTERS = sorted((DOCS / "chapters").glob("*.md"))


def test_each_formula_is_of_a_paper_and_has_a_test():
    for each in equations.equations():
        assert each.paper, f"{each.chapter}: {each.id} begins with no paper of equations.PAPERS"
        assert each.tests, f"no test is marked with pytest.mark.equation({each.id!r})"


@pytest.mark.parametrize("places", [equations.comments, equations.marks])
def test_each_mark_leads_to_a_formula(places):
    known = equations.formulas()
    for label, where in places().items():
        assert label in known, f"{where[0].file}, line {where[0].line}: no chapter has {label}"


def test_the_line_and_its_function():
    [place] = equations.comments()["ddpm-4"]
    line = (quoted.ROOT / place.file).read_text(encoding="utf-8").splitlines()[place.line - 1]
    assert place.name == "DDPM.q_sample" and "def q_sample" in line


@pytest.mark.parametrize("page", CHAPTERS, ids=lambda page: page.stem)
def test_the_notebook_is_the_chapter(page):
    file = DOCS / "notebooks" / f"{page.stem}.ipynb"
    assert file.read_text(encoding="utf-8") == notebooks.written(page), "python docs/notebooks.py"


def test_no_notebook_without_a_chapter():
    files = (DOCS / "notebooks").glob("*")
    assert {file.name for file in files} == {f"{page.stem}.ipynb" for page in CHAPTERS}


def test_a_quotation_of_what_moved_is_an_error():
    with pytest.raises(ValueError, match=r"ddpm\.py has no DDPM\.gone"):
        quoted.source("minidiff/ddpm.py", "DDPM.gone")
    with pytest.raises(ValueError, match="no such file"):
        quoted.source("minidiff/gone.py", "DDPM")


def test_dead_links_of_the_site_are_told(tmp_path):
    pages = {
        "index.html": '<a href="other.html#there">x</a><a href="https://example.org">x</a>',
        "other.html": '<h1 id="there">x</h1><img src="data:image/png;base64,AA">',
    }
    for name, text in pages.items():
        (tmp_path / name).write_text(text)
    assert check_links.faults(tmp_path) == []
    bad = '<a href="gone.html">x</a><a href="other.html#gone">x</a><script src="https://cdn.io/x">'
    (tmp_path / "index.html").write_text(bad)
    assert check_links.faults(tmp_path) == [
        "index.html: no file for gone.html",
        "index.html: no anchor for other.html#gone",
        "index.html loads https://cdn.io/x",
    ]
