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
    ["museum", "museum_pictures", "switches"],
    "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))",
):
    import museum
    import switches

PAGE = ROOT / "docs" / "museum.md"
QUICK = ("bgr", "quick_gelu", "beta", "off_by_one", "min_snr")  # drawn in a tenth of a second
SLOW_TESTS = ("other_schedule",)  # half a minute


def codes(bug):
    places = [switches.pkgutil.resolve_name(change.place) for change in bug.changes]
    return [switches.function_in(place).__code__ for place in places]


def is_undone(bug):
    """The switch is the one change, and is taken out again."""
    before = codes(bug)
    with pytest.raises(KeyError, match="inside"), switches.switched_on(bug):
        during = codes(bug)
        raise KeyError("inside")
    assert all(a is b for a, b in zip(before, codes(bug), strict=True))
    for a, b in zip(before, during, strict=True):
        assert a is not b and a.co_name == b.co_name
        assert a.co_varnames[: a.co_argcount] == b.co_varnames[: b.co_argcount]


@pytest.mark.parametrize("name", museum.BUGS)
def test_a_switch_is_the_one_change_and_is_undone(name):
    is_undone(museum.BUGS[name])


def test_a_change_of_code_that_moved_is_refused():
    change = switches.Change("minidiff.text:quick_gelu", "1.7021", "1")
    bug = switches.Bug("", "", "", "", museum.pictures.activation, (change,))
    with pytest.raises(ValueError, match=r"minidiff.text:quick_gelu has 0 of: 1.7021"):
        switches.switched_on(bug).__enter__()


def differs(bug):
    right, wrong = switches.pair(bug)
    assert (right - wrong).abs().mean() > 0.02  # of a range of 2
    assert torch.equal(bug.picture(), right)  # the bug is gone, and what is drawn is seeded


@pytest.mark.parametrize("name", QUICK)
def test_the_bug_shows(name):
    differs(museum.BUGS[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in museum.BUGS if name not in QUICK])
def test_the_others_show_too(name):
    differs(museum.BUGS[name])


def failing(bugs):
    """The tests of these bugs that fail, each under its bug."""
    nodes = {bug.test for bug in bugs}
    command = [sys.executable, "-m", "pytest", "-p", "tests.bugged", "-q", "-rf", "--tb=no", *nodes]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    return nodes, set(re.findall(r"^FAILED ([^\s\[]+)", run.stdout, re.M)), run.stdout


def test_the_named_test_catches_the_bug():
    """In a process of its own, where it runs with the bug; all tests are there (or pytest would
    run none), and no two bugs have one test."""
    nodes, failed, output = failing([b for n, b in museum.BUGS.items() if n not in SLOW_TESTS])
    assert failed == nodes, output
    assert len({bug.test for bug in museum.BUGS.values()}) == len(museum.BUGS) == 20


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW_TESTS)
def test_the_named_slow_test_catches_the_bug(name):
    nodes, failed, output = failing([museum.BUGS[name]])
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


def says_what_the_table_says(page, table, option):
    """A section for each bug, in order: its number, title, sentences, change and test."""
    text = page.read_text(encoding="utf-8")
    sections = re.split(r"^## (?=\d+\. )", text, flags=re.M)[1:]
    assert len(sections) == len(table)
    for number, (section, (name, bug)) in enumerate(zip(sections, table.items(), strict=True), 1):
        assert section.startswith(f"{number}. {bug.title}\n"), section
        plain = " ".join(FENCED.sub("", section).split())
        for words in (bug.what, bug.notice, f"--{option} {name}", bug.test.partition("::")[2]):
            assert words in plain, f"{name}: {words}"
        diff = "".join(f"-{c.right}\n+{c.wrong}\n" for c in bug.changes)
        assert f"```diff\n{diff}```" in section, name
        assert f"](../{bug.test.partition('::')[0]})" in section, name


def test_the_page_says_what_the_table_says():
    says_what_the_table_says(PAGE, museum.BUGS, "bugs")


def test_the_figure_is_small():
    assert (ROOT / "docs" / "figures" / "museum.png").stat().st_size < 600_000
