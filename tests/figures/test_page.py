"""The page of a run: what it shows, for whom, and that it is whole whenever it is read."""

import math
import re
from html.parser import HTMLParser

import pytest
import torch

from minidiff.errors import UserError
from minidiff.figures.page import POINTS, Page
from minidiff.training.progress import duration, stretches

VOID = {"meta", "img"}


class Elements(HTMLParser):
    """All elements with their attributes; open ones must be closed in order."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.open, self.texts = [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


def images(count):
    return torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_a_running_page_reloads_and_a_finished_one_stays(tmp_path):
    running = Page("a run", "act 3 of 4, step 9 of 90", 0.567, 192, {"loss": [2.0, 1.0]})
    page = Elements(running.write(tmp_path / "index.html").read_text(encoding="utf-8"))
    assert {"http-equiv": "refresh", "content": "5"} in page.all("meta")
    assert page.all("progress")[0]["value"] == "56"
    text = " ".join(page.texts)
    assert "act 3 of 4, step 9 of 90" in text and "3 min 12 s left" in text and "56 % a run" in text
    done = Page("a run", "done", 1, notes={"two objects": "0.81"}, command="minidiff x", done=True)
    page = Elements(done.write(tmp_path / "index.html").read_text(encoding="utf-8"))
    assert not any("http-equiv" in each for each in page.all("meta")) and not page.all("progress")
    assert {"two objects", "0.81", "minidiff x", "a run"} <= set(page.texts)
    assert [file.name for file in tmp_path.iterdir()] == ["index.html"]


def test_it_stands_alone_and_has_words_for_every_picture():
    captions, verdicts = ['<b> & "it\'s"', "a cat", ""], [True, False, None]
    losses = {"<i>": [1.0] * 3, "none": [], "nan": [math.nan]}
    text = Page("t", "s", 0, None, losses, images(3), captions, verdicts).text()
    page = Elements(text)
    assert "<script" not in text and not re.search(r'(src|href)="(?!data:)', text)
    assert [image["alt"] for image in page.all("img")] == [
        'sample for the prompt: <b> & "it\'s"',
        "sample for the prompt: a cat",
        "sample without a prompt",
    ]
    assert all(image["src"].startswith("data:image/png;base64,") for image in page.all("img"))
    assert [svg["aria-label"] for svg in page.all("svg")] == [
        "<i>: from 1 to 1 in 3 steps, on a logarithmic scale",
        "nan: no finite loss",
    ]
    assert page.texts.count("✓ right") == page.texts.count("✗ wrong") == 1
    assert any(meta.get("name") == "viewport" for meta in page.all("meta"))
    assert "prefers-color-scheme" in text


def test_long_curves_are_means_of_stretches_and_small_files():
    values = [float(k) for k in range(100_000)]
    points = stretches(values, POINTS)
    assert len(points) <= POINTS and points[-1][0] == 100_000 and points[0] == (667, 333.0)
    assert stretches([1.0, 3.0], POINTS) == [(1, 1.0), (2, 3.0)]
    assert len(Page("t", "s", 0, losses={"a": values}).text()) < 10_000
    (line,) = Elements(Page("t", "s", losses={"a": [4.0, 2.0, 1.0]}).text()).all("polyline")
    heights = [float(point.split(",")[1]) for point in line["points"].split()]
    assert heights == pytest.approx([4, 55, 106])  # halves are equal strides, downwards


def test_a_strangers_page_stays(tmp_path):
    (tmp_path / "index.html").write_text("my own page")
    with pytest.raises(UserError, match=r"index\.html was not written by minidiff"):
        Page("t", "s").write(tmp_path / "index.html")
    assert (tmp_path / "index.html").read_text() == "my own page"


def test_what_does_not_fit_together_is_refused():
    with pytest.raises(UserError, match=r"fraction 1\.2: choose a number from 0 to 1"):
        Page("t", "s", 1.2)
    with pytest.raises(UserError, match="1 captions for 2 images; give one for each"):
        Page("t", "s", images=images(2), captions=["a"])


def test_durations_as_people_say_them():
    seconds = (-1, 42.4, 59.6, 190, 3599, 7500, 360_000)
    words = "0 s|42 s|1 min 00 s|3 min 10 s|59 min 59 s|2 h 05 min|100 h 00 min".split("|")
    assert list(map(duration, seconds)) == words
