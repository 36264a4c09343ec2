"""Files of every format that minidiff reads, damaged in every way: one line each, never a traceback,
in at most 10 seconds and 1 GB (tests/mutants.py, whose command line opens a single mutant again)."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.readers import READERS

SLOW, NIGHTLY = 700, 2000  # below 40 of a format, shares are chance
STRICT = {"run.json"}  # compares every value: hardly any change can be harmless


@pytest.mark.parametrize(
    "total",
    [pytest.param(SLOW, marks=pytest.mark.slow), pytest.param(NIGHTLY, marks=pytest.mark.nightly)],
)
def test_mutated_files_are_one_line_each(total):
    count = -(-total // len(READERS))
    ended = subprocess.run(
        [sys.executable, "-m", "tests.mutants", str(count)],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    outcomes = json.loads(ended.stdout)
    faults = {name: found["faults"] for name, found in outcomes.items() if found["faults"]}
    assert not faults, json.dumps(faults, indent=1)
    for name, found in outcomes.items():
        assert found["refused"] + found["opened"] == count
        tame, wild = count / 10, 0 if name in STRICT else count / 20
        assert found["refused"] >= tame and found["opened"] >= wild, (name, found)
    assert sum(found["opened"] for found in outcomes.values()) >= total / 10
