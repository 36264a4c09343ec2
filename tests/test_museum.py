"""The bug museum: every switch sets its bug in the library and takes it out again, changes the
picture, and makes the named test fail; and the page says what the table says."""

import re
import subprocess
import sys

import pytest
import torch
from jaxtyping import install_import_hook

from minidiff.errors import UserError

from .test_docs import FENCED, ROOT

sys.path.insert(0, str(ROOT / "experiments"))
with install_import_hook(
    ["museum", "museum_pictures"],
    "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))",
):
    import museum

PAGE = ROOT / "docs" / "museum.md"
QUICK = ("bgr", "quick_gelu", "beta", "off_by_one", "min_snr")  # drawn in a tenth of a second
SLOW_TESTS = ("other_schedule",)  # half a minute


def codes(bug):
    places = [museum.pkgutil.resolve_name(change.place) for change in bug.changes]
    return [museum.function_in(place).__code__ for place in places]


@pytest.mark.parametrize("name", museum.BUGS)
def test_a_switch_is_the_one_change_and_is_undone(name):
    bug = museum.BUGS[name]
    before = codes(bug)
    with pytest.raises(KeyError, match="inside"), museum.switched_on(bug):
        during = codes(bug)
        raise KeyError("inside")
    assert all(a is b for a, b in zip(before, codes(bug), strict=True))
    for a, b in zip(before, during, strict=True):
        assert a is not b and a.co_name == b.co_name
        assert a.co_varnames[: a.co_argcount] == b.co_varnames[: b.co_argcount]


def test_a_change_of_code_that_moved_is_refused():
    change = museum.Change("minidiff.text:quick_gelu", "1.7021", "1")
    bug = museum.Bug("", "", "", "", museum.pictures.activation, (change,))
    with pytest.raises(ValueError, match=r"minidiff.text:quick_gelu has 0 of: 1.7021"):
        museum.switched_on(bug).__enter__()


def differs(bug):
    right, wrong = museum.pair(bug)
    assert (right - wrong).abs().mean() > 0.02  # of a range of 2
    assert torch.equal(bug.picture(), right)  # the bug is gone, and what is drawn is seeded


@pytest.mark.parametrize("name", QUICK)
def test_the_bug_shows(name):
    differs(museum.BUGS[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in museum.BUGS if name not in QUICK])
def test_the_others_show_too(name):
    differs(museum.BUGS[name])


def failing(names):
    """The tests of these bugs that fail, each under its bug."""
    nodes = {museum.BUGS[name].test for name in names}
    command = [sys.executable, "-m", "pytest", "-p", "tests.bugged", "-q", "-rf", "--tb=no", *nodes]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    return nodes, set(re.findall(r"^FAILED ([^\s\[]+)", run.stdout, re.M)), run.stdout


def test_the_named_test_catches_the_bug():
    """In a process of its own, where it runs with the bug; all tests are there (or pytest would
    run none), and no two bugs have one test."""
    nodes, failed, output = failing([name for name in museum.BUGS if name not in SLOW_TESTS])
    assert failed == nodes, output
    assert len({bug.test for bug in museum.BUGS.values()}) == len(museum.BUGS) == 20


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW_TESTS)
def test_the_named_slow_test_catches_the_bug(name):
    nodes, failed, output = failing([name])
    assert failed == nodes, output


def test_main(tmp_path, capsys):
    museum.main("bgr, beta", tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "bgr.png",
        "beta.png",
        "museum.png",
        "results.json",
    }
    assert capsys.readouterr().out.startswith("2 bugs: about 6 s on one thread")
    with pytest.raises(UserError, match='no bug "cyan"'):
        museum.main("bgr,cyan", tmp_path)


def test_the_page_says_what_the_table_says():
    """A section for each bug, in order: its number, title, sentences, change and test."""
    text = PAGE.read_text(encoding="utf-8")
    sections = re.split(r"^## (?=\d+\. )", text, flags=re.M)[1:]
    assert len(sections) == len(museum.BUGS)
    for number, (section, (name, bug)) in enumerate(
        zip(sections, museum.BUGS.items(), strict=True), 1
    ):
        assert section.startswith(f"{number}. {bug.title}\n"), section
        plain = " ".join(FENCED.sub("", section).split())
        for words in (bug.what, bug.notice, f"--bugs {name}", bug.test.partition("::")[2]):
            assert words in plain, f"{name}: {words}"
        diff = "".join(f"-{c.right}\n+{c.wrong}\n" for c in bug.changes)
        assert f"```diff\n{diff}```" in section, name
        assert f"](../{bug.test.partition('::')[0]})" in section, name


def test_the_figure_is_small():
    assert (ROOT / "docs" / "figures" / "museum.png").stat().st_size < 600_000
