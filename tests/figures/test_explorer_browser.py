"""The explorer's page in a browser, from the disk: no error, no network, and every control changes what it should.

MINIDIFF_BROWSER: see the fixture `browser`.
"""

import base64
import inspect
import io
import json
import re

import numpy as np
import pytest
from PIL import Image

from minidiff.cli.main import main
from minidiff.layers import ResBlock

PROMPT = "a blue circle </script><img src=x onerror=alert(1)>"
OTHER = "a red square {{data}}"
NAMES = """[...document.querySelectorAll("button, input, canvas, img, svg, [role=region]")].filter(
  e => !e.closest("[aria-hidden=true], [hidden]")).map(e => [e.outerHTML.slice(0, 99),
  (e.ariaLabel || e.alt || e.labels?.[0]?.textContent || e.textContent).trim()])"""


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("explorer") / "explore.html"
    options = ["--steps", "4", "--scales", "1,3", "--against", OTHER, "--out", str(path)]
    main(["explore", PROMPT, *options])
    return path


@pytest.fixture(scope="module")
def page(file):
    """The JSON of the page."""
    return json.loads(re.search(r'id="data">(.*?)</script>', file.read_text(), re.DOTALL)[1])


@pytest.fixture
def open_tab(browser, file):
    """Opens the page; at the end nothing was said on the console, and nothing was asked of the network."""
    complaints, requests, contexts = [], [], []

    def open_page(width=1280, **options):
        context = browser.new_context(viewport={"width": width, "height": 844}, **options)
        contexts.append(context)
        context.set_offline(True)
        tab = context.new_page()
        for event in ("console", "pageerror", "dialog", "requestfailed"):
            tab.on(event, lambda message: complaints.append(str(message)))
        tab.on("request", lambda request: requests.append(request.url))
        tab.goto(file.as_uri())
        return tab

    yield open_page
    for context in contexts:
        context.close()
    assert complaints == []
    assert {url for url in requests if not url.startswith("data:")} == {file.as_uri()}


def shown(canvas):
    """The pixels of a canvas."""
    uri = canvas.evaluate("canvas => canvas.toDataURL()")
    return np.asarray(
        Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).convert("RGB")
    )


def tile(strip, row, column=0):
    image = Image.open(io.BytesIO(base64.b64decode(strip["src"].partition(",")[2]))).convert("RGB")
    w, h = strip["width"], strip["height"]
    return np.asarray(image)[row * h : (row + 1) * h, column * w : (column + 1) * w]


def same(canvas, strip, row, column=0):
    return np.array_equal(shown(canvas), tile(strip, row, column))


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_opens(open_tab, page, width, scheme):
    tab = open_tab(width, color_scheme=scheme)
    assert tab.locator("h1").text_content() == PROMPT == page["prompt"]
    assert tab.locator("img[src=x]").count() == 0 and tab.locator("script").count() == 2
    tab.locator("#map button").nth(3).click()
    assert tab.evaluate("document.documentElement.scrollWidth") == width
    names = tab.evaluate(NAMES)
    assert len(names) > 60 and not [element for element, name in names if not name]
    assert tab.evaluate("document.querySelector('#final').naturalWidth") == 32
    back = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    assert back == {"light": "rgb(255, 255, 255)", "dark": "rgb(22, 24, 27)"}[scheme]


def test_the_step_slider(open_tab, page):
    tab = open_tab()
    slider = tab.locator("#step")
    slider.focus()
    tab.keyboard.press("Home")
    tab.locator("#map button").first.click()
    slider.focus()
    cursors = [float("inf")]
    for k, moment in enumerate(page["moments"]):
        label = slider.get_attribute("aria-valuetext")
        assert label.startswith(f"step {k + 1} of 4, t = {moment['t']:g}")
        assert (
            f"{k + 1} of 4, t = {moment['t']:g} to {moment['s']:g}"
            in tab.locator("#where").text_content()
        )
        panels = tab.locator("#panels canvas").all()
        for canvas, panel in zip(panels, page["panels"], strict=True):
            assert same(canvas, panel["strip"], k), panel["name"]
        _, deviation = moment["values"]["x_t"]
        assert f"deviation {deviation:.2f}" in panels[0].get_attribute("aria-label")
        assert f"alpha {moment['alpha']:.3f}" in tab.locator("#schedule-numbers").text_content()
        assert f"alpha {moment['alpha']:.3f}" in tab.locator("#scales").get_attribute("aria-label")
        assert same(tab.locator("#maps canvas").nth(2), page["places"][0]["maps"], k, 2)
        assert same(tab.locator("#heat"), page["levels"][0]["strip"], k, 2)  # "blue"
        assert same(tab.locator("#guided"), page["scales"][1]["x0"], k)
        first, second = page["pair"]["first"], page["pair"]["second"]
        canvases = tab.locator("#pair canvas").all()
        assert same(canvases[0], first["x0"], k) and same(canvases[1], first["x_t"], k)
        assert same(canvases[2], second["x0"], k) and same(canvases[3], second["x_t"], k)
        assert (
            f"{page['pair']['differences'][k]:.1f} of 255"
            in tab.locator("#difference").text_content()
        )
        cursor = float(tab.locator("#scales .cursor").get_attribute("x1"))
        assert cursor < cursors[-1]  # towards data
        cursors.append(cursor)
        tab.keyboard.press("ArrowRight")
    assert slider.input_value() == "3"


def test_a_level_opens_with_the_keyboard(open_tab, page):
    tab = open_tab(390)
    assert tab.locator("#place").is_hidden()
    boxes = tab.locator("#map button")
    assert boxes.count() == len(page["places"])
    for k in (1, 8, 18):
        boxes.nth(k).focus()
        tab.keyboard.press("Enter")
        place = page["places"][k]
        assert tab.evaluate("document.activeElement.id") == "place-name"
        assert place["name"] in tab.locator("#place-name").text_content()
        assert boxes.nth(k).get_attribute("aria-pressed") == "true"
        assert tab.locator("#map button[aria-pressed=true]").count() == 1
        canvases = tab.locator("#maps canvas").all()
        assert len(canvases) == len(place["channels"])
        for n, canvas in enumerate(canvases):
            assert same(canvas, place["maps"], 2, n)  # the page begins in the middle
        _, deviation = place["values"][2]
        assert (
            f"deviation {deviation:.2f} at step 3" in tab.locator("#place-numbers").text_content()
        )
        assert tab.locator("#source pre").count() == len(place["sources"])
    boxes.nth(1).click()
    assert tab.locator("#source pre").first.text_content() == inspect.getsource(ResBlock)
    assert "minidiff/layers.py:" in tab.locator("#source h3").first.text_content()
    tab.locator("#back").click()
    assert tab.evaluate("document.activeElement === document.querySelectorAll('#map button')[1]")


def test_a_word_shows_where_it_looks(open_tab, page):
    tab = open_tab()
    words, levels = tab.locator("#words button"), tab.locator("#levels button")
    assert words.all_text_contents() == page["words"]
    assert levels.all_text_contents() == [level["name"] for level in page["levels"]]
    circle, said = page["words"].index("circle"), tab.locator("#word-numbers")
    for number, level in enumerate(page["levels"]):
        levels.nth(number).click()
        for word in (circle, 0):
            words.nth(word).focus()
            tab.keyboard.press("Space")
            assert same(tab.locator("#heat"), level["strip"], 2, word)
            share = f"“{page['words'][word]}” gets {100 * level['shares'][2][word]:.1f} %"
            assert share in said.text_content()
            assert share in tab.locator("#heat").get_attribute("aria-label")
            assert words.nth(word).get_attribute("aria-pressed") == "true"
    assert same(tab.locator("#under"), page["panels"][1]["strip"], 2)
    tab.locator("#mean").check()
    assert same(tab.locator("#heat"), page["levels"][-1]["strip"], 4, 0)
    assert "over all steps" in said.text_content()


def test_the_guidance_slider(open_tab, page):
    tab = open_tab()
    slider, finals = tab.locator("#scale"), tab.locator("#finals button")
    slider.focus()
    tab.keyboard.press("Home")
    for k, run in enumerate(page["scales"]):
        assert tab.locator("#scale-label").text_content() == run["label"]
        assert same(tab.locator("#guided"), run["x0"], 2)
        assert finals.nth(k).get_attribute("aria-pressed") == "true"
        assert finals.nth(k).locator("img").get_attribute("src") == run["image"]
        tab.keyboard.press("ArrowRight")
    finals.first.click()
    assert (slider.input_value(), slider.get_attribute("aria-valuetext")) == ("0", "1")


def test_two_runs(open_tab, page):
    tab = open_tab()
    assert tab.locator("#pair h3").all_text_contents() == [PROMPT, OTHER]
    finished = [image.get_attribute("src") for image in tab.locator("#pair img").all()]
    assert finished == [page["pair"]["first"]["image"], page["pair"]["second"]["image"]]
    assert finished[0] != finished[1] and tab.locator("#no-pair").is_hidden()


def test_play(open_tab):
    tab = open_tab()
    tab.locator("#play").click()
    assert tab.locator("#play").text_content() == "Stop"
    tab.locator("#play", has_text="Play").wait_for()  # it ends by itself
    assert tab.locator("#step").input_value() == "3"
    assert tab.locator("#where").text_content().startswith("4 of 4")
    assert open_tab(reduced_motion="reduce").locator("#play").is_hidden()


def test_everything_is_reached_by_tab(open_tab):
    tab = open_tab()
    reached = set()
    for _ in range(120):
        tab.keyboard.press("Tab")
        reached.add(
            tab.evaluate("document.activeElement.id || document.activeElement.parentElement.id")
        )
    assert {"step", "play", "map", "words", "levels", "mean", "scale", "finals"} <= reached
