"""A hundred kills, in every verb that takes long or writes much: resumed, each leaves what it would
have left, every file byte for byte but for measured times, and nothing else (tests/kills.py)."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SHARES = [pytest.param(150, marks=pytest.mark.slow), pytest.param(1000, marks=pytest.mark.nightly)]


@pytest.mark.parametrize("per_mille", SHARES)
def test_killed_and_resumed_is_as_if_nothing_had_happened(tmp_path, per_mille):
    ended = subprocess.run(
        [sys.executable, "-m", "tests.kills", str(tmp_path), str(per_mille)],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    outcomes = json.loads(ended.stdout)
    faults = {name: one["faults"] for name, one in outcomes.items() if one["faults"]}
    assert not faults, json.dumps(faults, indent=1)
    kills = [sum(one["signals"].values()) for one in outcomes.values()]
    assert all(kills) and sum(kills) >= per_mille / 10, outcomes
