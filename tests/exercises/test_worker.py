"""What a learner's file may do: hang, crash, raise, print; and what is said of each result."""

import pytest

from minidiff.exercises.grade import grade
from minidiff.exercises.table import exercises, named
from minidiff.exercises.worker import Worker

EXERCISE = exercises()["q_sample"]
HEADER = (
    "import os, sys, torch\nfrom minidiff.ddpm import _like\n\ndef q_sample(self, x0, t, eps):\n"
)
LAST = "return a * x0 + b * eps"
FIRST = "a = self.alpha_bar[t]; a, b = _like(a.sqrt(), x0), _like((1 - a).sqrt(), x0)\n    "


def said(body, path, header=HEADER):
    path.write_text(f"{header}    {body}\n")
    verdict = grade(EXERCISE, path)
    assert verdict.state == "wrong"
    return f"{verdict.wrong} {verdict.hint}"


@pytest.mark.parametrize(
    "body, line",
    [
        ("return None", "result is None; right is a tensor of shape (4, 3)"),
        ("return x0, eps", "the result is one of result[0], result[1]; right is result"),
        ("return x0[0]", "result has the shape (3,); right is (4, 3)"),
        ("return x0.float()", "result is torch.float32; right is torch.float64"),
        (f"{FIRST}return a.double() * x0.double() + b * eps", "float64; right is torch.float32"),
        ("return x0 / 0", "result[0, 0] is inf; right is"),
        (f"{FIRST}return a * x0 + b * eps * (t[:, None] < 500)", "t[2] = 500"),
        (f"{FIRST}x0 *= a; return x0 + b * eps", "x0 is changed in place"),
        (
            FIRST.replace("self.alpha_bar[t]", "self.alpha_bar.float()[t].to(x0)") + LAST,
            "is float32",
        ),
        ("return x0 @ eps", "08.py, line 5: RuntimeError: mat1 and mat2 shapes"),
        ("return len(", "08.py, line 5: SyntaxError: '(' was never closed"),
        ("sys.exit(3)", "it ended the process: SystemExit"),
    ],
)
def test_each_fault_has_a_line_of_its_own(body, line, tmp_path):
    assert line in said(body, tmp_path / "08.py")


def test_a_file_without_the_function(tmp_path):
    assert "there is no function q_sample in 08.py" in said(
        "", tmp_path / "08.py", "if True:\n    1\n"
    )


def test_two_mistakes_at_once_are_both_named(tmp_path):
    body = "a = self.alpha_bar[t - 1]; return _like(a.sqrt(), x0) * x0 + _like(1 - a, x0) * eps"
    text = said(body, tmp_path / "08.py")
    assert "off by one" in text and " And: " in text and "square root is missing" in text


def test_one_exercise_wrong_in_three_ways_has_three_hints(tmp_path):
    """Written by hand, not by an edit of the library's text."""
    hints = {
        "return torch.cat([torch.sin(w), torch.cos(w)], dim=1)": "The sines stand first",
        "return torch.stack([w.cos(), w.sin()], dim=-1).reshape(len(t), -1)": "alternate",
        "w = w ** (5 / 4) * t[:, None] ** (-1 / 4); w[0] = 0; return torch.cat([w.cos(), w.sin()], 1)": "dim/2 - 1",
    }
    for body, hint in hints.items():
        path = tmp_path / "15.py"
        path.write_text(
            "import torch\n\ndef timestep_embedding(t, dim, max_period=10_000):\n"
            "    i = torch.arange(dim // 2, dtype=t.dtype)\n"
            "    w = t[:, None] * max_period ** (-i / (dim // 2))\n"
            f"    {body}\n"
        )
        verdict = grade(exercises()["timestep_embedding"], path)
        assert verdict.state == "wrong" and hint in verdict.hint


def test_what_hangs_or_ends_the_process_is_stopped_and_the_next_is_graded(tmp_path):
    worker, path = Worker(seconds=5), tmp_path / "08.py"
    try:
        path.write_text(f"{HEADER}    os._exit(7)\n")
        assert "ended the whole process (exit code 7)" in worker.grade("q_sample", path).wrong
        path.write_text(f"{HEADER}    while True: pass\n")
        assert "more than 5 seconds" in worker.grade("q_sample", path).wrong
        path.write_text(f"{HEADER}    print('hello')\n    {FIRST}return a * x0 + b * eps\n")
        assert worker.grade("q_sample", path).state == "right"
    finally:
        worker.close()


@pytest.mark.parametrize("word", ["q_sample", "02_q_sample.py", "02", "2"])
def test_names(word):
    assert named(word) is EXERCISE


def test_an_unknown_name():
    with pytest.raises(ValueError, match='no exercise "q_sampel"'):
        named("q_sampel")
