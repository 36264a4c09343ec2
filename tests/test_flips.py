"""Nothing survives: each flip of an operator, a comparison or a number fails a test (flips.py)."""

import ast
import re
import subprocess
import sys

import pytest

from . import flips, places

SAMPLE, SHARE, EQUIVALENT = 60, 0.95, 0.03
# the files whose every formula the course teaches; the others are run and counted
HELD = "ddpm schedules denoiser losses guidance steps samplers"
HELD = [f"{name}.py" for name in HELD.split()]
HELD += ["methods/lora.py", "methods/likelihood.py", "evaluation/metrics.py"]


def test_what_is_flipped():
    """Operators, signs, comparisons, numbers and defaults; no annotations, no messages."""
    tree = ast.parse("""
LEVELS = 20
class A:
    rate: float = 0.5
    def f(self, x: Float[Tensor, "2"], k=1) -> Literal[3]:
        if 0 < x <= k:
            raise ValueError(x + 7)
        return f"{x + 8}" if x is None else -x @ x ** 2.5
""")
    before = ast.unparse(tree)
    assert list(places.flipped(tree)) == [
        ("", "LEVELS = 20 -> LEVELS = 21"),
        ("A", "rate: float = 0.5 -> rate: float = 1.0"),
        ("A.f", "k=1 -> k=2"),
        ("A.f", "0 < x <= k -> 0 <= x <= k"),
        ("A.f", "0 < x <= k -> 0 < x < k"),
        ("A.f", "0 < x <= k -> 1 < x <= k"),
        ("A.f", "x is None -> x is not None"),
        ("A.f", "-x @ x ** 2.5 -> -x * x ** 2.5"),
        ("A.f", "-x @ x ** 2.5 -> +x @ x ** 2.5"),
        ("A.f", "x ** 2.5 -> x * 2.5"),
        ("A.f", "x ** 2.5 -> x ** 5.0"),
    ]
    assert ast.unparse(tree) == before


def test_places_are_told_apart_and_few_are_called_equivalent():
    """Every entry of flips_equivalent.json is the place of a flip, and has a reason."""
    all_places = [flip.place for file in flips.TESTS for flip in places.flips(file)]
    reasons = flips.equivalent()  # raises for a place that is none
    assert len(set(all_places)) == len(all_places) > 1000
    assert len(reasons) <= EQUIVALENT * len(all_places)
    assert all(len(reason.split()) > 3 for reason in reasons.values())


def killed(tmp_path, *options):
    """Run flips; the number tried and the number killed of each file, and all that was printed."""
    command = [sys.executable, "-m", "tests.flips", "--results", tmp_path / "flips.jsonl", *options]
    ended = subprocess.run(command, cwd=flips.ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr[-2000:]
    rows = re.findall(r"^\| (\S+) \| \d+ \| (\d+) \| (\d+) \|", ended.stdout, re.M)
    return {name: (int(tried), int(dead)) for name, tried, dead in rows}, ended.stdout


@pytest.mark.slow
def test_a_sample_is_killed(tmp_path):
    rows, printed = killed(tmp_path, "--sample", str(SAMPLE))
    tried, dead = rows["all"]
    assert tried == SAMPLE and dead >= SHARE * tried, printed


@pytest.mark.nightly
def test_all_are_killed(tmp_path):
    rows, printed = killed(tmp_path)
    assert rows.keys() == {*flips.TESTS, "all"}
    short = {name for name in HELD if rows[name][1] < SHARE * rows[name][0]}
    assert not short, printed
