"""The built book in a browser, from the disk: each page without an error, a network or a missing picture.

MINIDIFF_SITE is the folder that sphinx-build has written; without it there is nothing to open.
MINIDIFF_BROWSER: see the fixture `browser`.
"""

import os
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"
PAGES = ["index", "equations", "exercises", "flips"]
PAGES += [f"chapters/{page.stem}" for page in sorted((DOCS / "chapters").glob("*.md"))]
FORMULAS = (
    "document.querySelectorAll('.math').length == document.querySelectorAll('mjx-container').length"
)
BROKEN = "[...document.images].filter(i => !i.complete || i.naturalWidth == 0).map(i => i.src)"
WRONG_FORMULAS = "document.querySelectorAll('mjx-merror').length"
TOO_WIDE = "document.documentElement.scrollWidth - window.innerWidth"


@pytest.fixture(scope="module")
def site() -> Path:
    if not os.environ.get("MINIDIFF_SITE"):
        pytest.skip("MINIDIFF_SITE names no built site: sphinx-build -W -b html docs out/site")
    return Path(os.environ["MINIDIFF_SITE"]).resolve()


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("name", PAGES)
def test_the_page_opens_from_the_disk(browser, site, name, width):
    complaints, addresses = [], []
    tab = browser.new_page(viewport={"width": width, "height": 900})
    tab.context.set_offline(True)
    tab.on("console", lambda message: complaints.append(message.text))
    tab.on("pageerror", lambda error: complaints.append(str(error)))
    tab.on("request", lambda request: addresses.append(request.url))
    tab.goto((site / f"{name}.html").as_uri())
    if "/" in name:
        tab.wait_for_function(FORMULAS)
    assert complaints == []
    assert {url.split(":")[0] for url in addresses} <= {"file", "data"}
    assert tab.evaluate(BROKEN) == [] and tab.evaluate(WRONG_FORMULAS) == 0
    assert tab.evaluate(TOO_WIDE) <= 1, "the page scrolls sideways"
    tab.close()


def test_every_chapter_has_a_picture_and_its_notebook(browser, site):
    tab = browser.new_page()
    for name in PAGES[4:]:
        tab.goto((site / f"{name}.html").as_uri())
        assert tab.locator(".cell_output img").count() >= 1, name
        assert tab.locator("a.download[href$='.ipynb']").count() == 1, name
        assert tab.locator("details").count() >= 2, f"{name}: questions with folded answers"
    tab.close()
