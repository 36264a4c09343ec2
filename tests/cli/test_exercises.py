"""minidiff exercises: stubs are written once, what was learned is kept, nothing is written over."""

import inspect
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from minidiff.cli import exercises as verbs
from minidiff.exercises import source
from minidiff.exercises.grade import grade
from minidiff.exercises.table import exercises
from minidiff.exercises.worker import Worker

RIGHT = """from minidiff.ddpm import _like

def q_step(self, x, t, eps):
    beta = self.beta[t]
    return _like((1 - beta).sqrt(), x) * x + _like(beta.sqrt(), x) * eps
"""


@pytest.fixture
def learn(tmp_path, ran):
    ran("exercises", "start", tmp_path / "learn")
    return tmp_path / "learn"


class Here(Worker):
    """Grades in this process: torch is here already."""

    def grade(self, name, path):
        return grade(exercises()[name], path)


@pytest.fixture
def here(monkeypatch):
    monkeypatch.setattr(verbs, "Worker", Here)


def checked(capsys, *args):
    from minidiff.cli.main import main

    try:
        main(["exercises", "check", *map(str, args)])
        code = 0
    except SystemExit as end:
        code = end.code
    return code, capsys.readouterr().out


def test_start_writes_every_stub_and_nothing_twice(learn, ran):
    files = sorted(learn.iterdir())
    assert [path.name for path in files] == [each.file for each in exercises().values()]
    assert 20 <= len(files) <= 30
    mine, moved = files[2], learn / "77_q_step.py"
    mine.write_text("# mine\n")
    files[0].rename(moved)
    files[1].unlink()
    said = ran("exercises", "start", learn).out
    assert f"{mine} is there, and stays as it is" in said and f"{moved} is there" in said
    assert mine.read_text() == "# mine\n" and not files[0].exists()
    assert files[1].read_text() == exercises()["q_sample"].stub()


@pytest.mark.parametrize("exercise", exercises().values(), ids=lambda exercise: exercise.name)
def test_a_stub_has_the_signature_of_the_library_and_not_its_answer(exercise):
    text = exercise.stub()
    assert max(map(len, text.splitlines())) <= 100
    names = {"__name__": "stub"}
    exec(compile(text, exercise.file, "exec"), names)
    ours, theirs = (
        list(inspect.signature(each).parameters.values())
        for each in (names[exercise.name], source.original(exercise.place))
    )
    assert [(p.name, p.default, p.kind) for p in ours] == [
        (p.name, p.default, p.kind) for p in theirs
    ]
    assert exercise.text.strip().splitlines()[0] in text
    for mistake in exercise.mistakes:
        assert "\n" in mistake.old or mistake.old in source.source(exercise.place).text


def test_what_is_right_is_kept_and_losing_it_is_said(learn, here, capsys):
    path = learn / "01_q_step.py"
    code, said = checked(capsys, learn)
    assert code == 1 and "not begun: 01 q_step, 02 q_sample" in said and "0 of" in said
    path.write_text(RIGHT)
    code, said = checked(capsys, path)
    assert code == 0 and "01 q_step: right" in said and "1 of" in said
    assert "Composing the linear-Gaussian steps of eq. 2" in said
    path.write_text(RIGHT.replace("beta.sqrt()", "beta"))
    code, said = checked(capsys, learn, "q_step")
    assert code == 1 and "01 q_step: wrong" in said and "It was right before." in said
    assert "result[0, 0] is " in said and "; right is " in said and "t[0] = 1" in said
    assert "Hint: eps is multiplied by beta_t. That is the variance" in said
    content = json.loads((learn / "progress.json").read_text())
    assert content["exercises"]["q_step"] == "wrong"
    assert content["exercises"]["q_sample"] == "not begun"


def test_this_folder_is_the_default(learn, here, capsys, monkeypatch):
    monkeypatch.chdir(learn)
    (learn / "01_q_step.py").write_text(RIGHT)
    assert checked(capsys, "q_step")[0] == checked(capsys, "1")[0] == 0
    assert checked(capsys, ".", "q_step", "q_sample")[0] == 1


def test_a_file_that_is_saved_is_checked_again(learn, here, capsys, monkeypatch):
    """The third look finds a file that was saved; then comes Ctrl-C."""
    looks = iter(range(3))

    def sleep(_):
        if next(looks, None) is None:
            raise KeyboardInterrupt
        path = learn / "01_q_step.py"
        path.write_text(RIGHT)
        os.utime(path, ns=(1, 2))

    monkeypatch.setattr(verbs.time, "sleep", sleep)
    code, said = checked(capsys, learn, "q_step", "--watch")
    assert code == 0 and said.count("01 q_step: right") == 1 and "0 of" in said and "1 of" in said


def test_bad_input_is_one_line(learn, tmp_path, refused):
    assert 'no folder "' in refused("exercises", "check", tmp_path / "a" / "b")
    assert "there are no exercises in" in refused("exercises", "check", tmp_path)
    assert 'no exercise "q_sampel"' in refused("exercises", "check", learn, "q_sampel")
    (learn / "02_q_sample.py").unlink()
    assert "exercises start" in refused("exercises", "check", learn, "q_sample")
    (tmp_path / "file").write_text("")
    assert "is a file; name a folder" in refused("exercises", "start", tmp_path / "file")
    (learn / "progress.json").write_text('{"mine": 1}')
    assert "was not written by minidiff" in refused("exercises", "check", learn)
    assert (learn / "progress.json").read_text() == '{"mine": 1}'
    (learn / "progress.json").write_text('{"note": "made with minidiff"')
    assert "cannot be read" in refused("exercises", "check", learn)


def test_the_command_in_a_process_of_its_own(learn):
    (learn / "01_q_step.py").write_text(RIGHT.replace("return", "print('seen')\n    return"))
    command = [sys.executable, "-m", "minidiff.cli", "exercises", "check", str(learn), "q_step"]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert (ran.returncode, ran.stderr) == (0, "") and "01 q_step: right" in ran.stdout
    assert ran.stdout.startswith("seen\n")


def test_the_page_shows_what_a_check_says_and_lists_every_exercise(
    learn, here, capsys, monkeypatch
):
    page = (Path(__file__).parents[2] / "docs" / "exercises.md").read_text(encoding="utf-8")
    for exercise in exercises().values():
        assert f"| {exercise.number} | `{exercise.name}` | {exercise.title}: `" in page
    path = learn / "02_q_sample.py"
    wrong = "_like(self.alpha_bar[t].sqrt(), x0) * x0 + _like(1 - self.alpha_bar[t], x0) * eps"
    path.write_text(path.read_text().replace("raise NotImplementedError", f"return {wrong}"))
    said = checked(capsys, learn, "q_sample")[1]
    assert textwrap.indent(said, "    ") in page
