"""Several processes are one: the same weights at any number of them, through kills, signals and restarts."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.training import together

ROOT = Path(__file__).parents[2]


def torchrun(count, *command, restarts=0, **options):
    """A command in so many processes."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    torchrun += ["--nproc-per-node", str(count), "--max-restarts", str(restarts), *map(str, command)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(torchrun, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)


def trained(count, out, restarts=0, **options):
    """What so many processes end with: the weights, and the steps they took."""
    out.mkdir(exist_ok=True, parents=True)
    if count == 1:
        together.run(out, **options)
    else:
        ended = torchrun(count, "-m", "tests.training.together", out, json.dumps(options), restarts=restarts)
        assert ended.returncode == 0, ended.stderr[-3000:]
    weights = [torch.load(out / f"weights-{rank}.pt") for rank in range(count)]
    steps = [json.loads((out / f"steps-{rank}.json").read_text()) for rank in range(count)]
    for other in weights[1:]:
        assert distance(weights[0], other) == 0  # every process has the same
    assert steps[1:] == steps[:-1]
    return weights[0], steps[0]


def distance(one, other):
    """The largest relative distance of two tensors with one name."""
    pairs = [(one[part][name], other[part][name]) for part in one if one[part] for name in one[part]]
    return max(((a - b).norm() / b.norm()).item() for a, b in pairs)


def test_two_processes_equal_one_with_twice_the_batch(tmp_path):
    """Twenty steps of 8 examples, 4 in each process; and of two batches, one in each."""
    for accumulate in (1, 2):
        alone, log = trained(1, tmp_path / f"alone{accumulate}", accumulate=accumulate, ema=0.9)
        both, same_log = trained(2, tmp_path / f"both{accumulate}", accumulate=accumulate, ema=0.9)
        assert distance(both, alone) < 1e-6
        print(distance(both, alone))
        for step, same in zip(log, same_log, strict=True):
            assert same["lr"] == step["lr"] and same["loss"] == pytest.approx(step["loss"], rel=1e-6)
            assert same["grad_norm"] == pytest.approx(step["grad_norm"], rel=1e-6)


def test_shards_equal_whole_copies(tmp_path):
    """FSDP2 and DDP, with accumulation and an average; what is written is whole."""
    for accumulate in (1, 4):
        options = {"accumulate": accumulate, "ema": 0.9, "steps": 10}
        copies, log = trained(2, tmp_path / f"copies{accumulate}", **options)
        shards, same_log = trained(2, tmp_path / f"shards{accumulate}", shard=True, **options)
        print(distance(copies, shards))
        assert distance(shards, copies) < 1e-5
        for step, same in zip(log, same_log, strict=True):
            assert same["loss"] == pytest.approx(step["loss"], rel=1e-5)
            assert same["grad_norm"] == pytest.approx(step["grad_norm"], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("shard", [False, True], ids=["copies", "shards"])
def test_a_run_goes_on_with_another_number_of_processes(tmp_path, shard):
    """Two processes save the one file that one process saves; one and four go on from it."""
    options = {"steps": 12, "ema": 0.9, "folder": True, "shard": shard}
    alone, _ = trained(1, tmp_path / "alone", **options)
    stopped = {"kill": [1, 7, int(signal.SIGTERM)], "save_every": 100}
    for count in (1, 4):
        out = tmp_path / f"on {count}"
        out.mkdir()
        ended = torchrun(2, "-m", "tests.training.together", out, json.dumps(options | stopped))
        assert ended.returncode and "step 7 is saved" in ended.stderr
        names = {path.name for path in (out / "training").iterdir()}
        assert names == {"log.jsonl", "checkpoint-000007.pt", "checkpoint-000007.pt.sha256"}
        weights, steps = trained(count, out, resume=True, **options)
        assert [step["step"] for step in steps] == list(range(7, 13))
        assert distance(weights, alone) < 1e-6
        log = (out / "training" / "log.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in log] == list(range(1, 13))


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_process_changes_nothing(tmp_path, rank):
    """torchrun starts both again; they go on from the last checkpoint by themselves, and end bit for bit as if nothing had been."""
    options = {"steps": 10, "ema": 0.9, "folder": True}
    whole, _ = trained(2, tmp_path / "whole", **options)
    kill = [rank, 7, int(signal.SIGKILL)]
    again, steps = trained(2, tmp_path / "again", restarts=1, kill=kill, **options)
    assert [step["step"] for step in steps] == list(range(4, 11))
    assert distance(again, whole) == 0
    for path in (tmp_path / "whole" / "training").iterdir():
        assert (tmp_path / "again" / "training" / path.name).read_bytes() == path.read_bytes()
