"""Several processes are one: the same weights at any number of them, through kills, signals and restarts."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from minidiff.errors import UserError
from minidiff.options.finetuning import FineTuneConfig
from minidiff.train import TrainConfig
from minidiff.training import distributed, joint, ranks
from tests.finetuning.test_loop import folder  # noqa: F401 (a fixture)
from tests.training import together

ROOT = Path(__file__).parents[2]


def torchrun(count, *command, restarts=0, **options):
    """A command in so many processes."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    torchrun += [
        "--nproc-per-node",
        str(count),
        "--max-restarts",
        str(restarts),
        *map(str, command),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        torchrun,
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def trained(count, out, restarts=0, **options):
    """What so many processes end with: the weights, and the steps they took."""
    out.mkdir(exist_ok=True, parents=True)
    if count == 1:
        together.run(out, **options)
    else:
        ended = torchrun(
            count, "-m", "tests.training.together", out, json.dumps(options), restarts=restarts
        )
        assert ended.returncode == 0, ended.stderr[-3000:]
    files = [out / f"weights-{rank}.pt" for rank in range(count)]
    weights = [torch.load(file, weights_only=True) for file in files]
    steps = [json.loads((out / f"steps-{rank}.json").read_text()) for rank in range(count)]
    for other in weights[1:]:
        assert distance(weights[0], other) == 0  # every process has the same
    assert steps[1:] == steps[:-1]
    return weights[0], steps[0]


def distance(one, other):
    """The largest relative distance of two tensors with one name."""
    pairs = [
        (one[part][name], other[part][name]) for part in one if one[part] for name in one[part]
    ]
    return max(((a - b).norm() / b.norm()).item() for a, b in pairs)


def test_two_processes_equal_one_with_twice_the_batch(tmp_path):
    """Twenty steps of 8 examples, 4 in each process; and of two batches, one in each."""
    for accumulate in (1, 2):
        alone, log = trained(1, tmp_path / f"alone{accumulate}", accumulate=accumulate, ema=0.9)
        both, same_log = trained(2, tmp_path / f"both{accumulate}", accumulate=accumulate, ema=0.9)
        assert distance(both, alone) < 1e-6
        print(distance(both, alone))
        for step, same in zip(log, same_log, strict=True):
            assert same["lr"] == step["lr"] and same["loss"] == pytest.approx(
                step["loss"], rel=1e-6
            )
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


def test_gradients_are_held_once():
    """After a step's last backward pass they lie in the memory that DDP sends."""
    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1))
        config = TrainConfig(2, 1e-3, accumulate=2)
        loss_fn = joint.joint(lambda x: {"loss": net(x).mean(1)}, net, config, None)
        for _ in range(2):
            for _ in range(2):
                loss_fn(torch.randn(5, 3))["loss"].mean().backward()
            held = {p.grad.untyped_storage().data_ptr() for p in net.parameters()}
            assert len(held) == 1
            net.zero_grad()
    finally:
        dist.destroy_process_group()


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
    names = [
        {path.name for path in (tmp_path / run / "training").iterdir()}
        for run in ("whole", "again")
    ]
    assert names[0] == names[1]


GOODBYE = """
import atexit, sys
import torch.distributed as dist
atexit.register(lambda: print("open at the end:", dist.is_initialized(), file=sys.stderr))
from minidiff.errors import UserError
from minidiff.training import distributed, ranks
try:
    with distributed.main_first():
        if ranks.is_main():
            raise UserError("no")
except UserError:
    if len(sys.argv) > 1:
        raise
    sys.exit(2)
"""


@pytest.mark.slow
@pytest.mark.parametrize("crash", [False, True], ids=["refused", "crashed"])
def test_the_connections_are_closed_before_python_ends(tmp_path, crash):
    """Gloo may abort a process that ends with them open, so that a refusal has exit code -6, not 2.
    A crash closes nothing: it does not wait for the others."""
    (tmp_path / "goodbye.py").write_text(GOODBYE)
    ended = torchrun(2, tmp_path / "goodbye.py", *["crash"] * crash)
    left = crash or torch.cuda.is_available()  # NCCL may wait for the others
    assert f"open at the end: {left}" in ended.stderr  # of the first to end; then the other stops
    assert f"open at the end: {not left}" not in ended.stderr
    if not left:
        assert "exitcode  : 2 " in ended.stderr


# The command line.


def commanded(count, *command):
    """What one process, or several, say of a command, and how they end."""
    if count > 1:
        return torchrun(count, *command)
    return subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def model_of(out):
    parts = [load_file(path) for path in sorted((out / "model").glob("*.safetensors"))]
    return {
        "model": {
            f"{k} {name}": value for k, part in enumerate(parts) for name, value in part.items()
        }
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [(), ("--shard", "--ema", "0.9", "--text")], ids=["copies", "shards"]
)
def test_finetune_and_its_recorder(folder, tmp_path, options):  # noqa: F811
    for count in (1, 2):
        command = ["-m", "minidiff.cli", "finetune", "--model", folder / "model", "--data", folder]
        command += [
            "--steps",
            "4",
            "--every",
            "2",
            "--batch",
            "4",
            "--lr",
            "1e-3",
            "--out",
            tmp_path / str(count),
            *options,
        ]
        ended = commanded(count, *command)
        assert ended.returncode == 0, ended.stderr[-3000:]
        assert ended.stdout.count("9 pictures to train on") == 1  # only one process speaks
    one, two = tmp_path / "1", tmp_path / "2"
    assert distance(model_of(two), model_of(one)) < 1e-5
    for file in ("record.jsonl", "training/log.jsonl"):
        assert len((two / file).read_text().splitlines()) == len(
            (one / file).read_text().splitlines()
        )
    assert {path.name for path in two.iterdir()} == {path.name for path in one.iterdir()}
    refused = commanded(2, *command)  # OUT holds a training already
    lines = [line for line in refused.stderr.splitlines() if line.startswith("minidiff: ")]
    assert len(lines) == 1 and "holds a training already; pass --resume" in lines[0]
    assert "exitcode  : 2 " in refused.stderr


@pytest.mark.slow
def test_dreambooth(folder, tmp_path):  # noqa: F811
    """The first process draws the class images; the other reads them."""
    (tmp_path / "subject").mkdir()
    for k in range(3):
        Image.effect_noise((16, 16), 50 + k).convert("RGB").save(tmp_path / "subject" / f"{k}.png")
    command = [
        "-m",
        "minidiff.cli",
        "dreambooth",
        "--model",
        folder / "model",
        "--subject",
        tmp_path / "subject",
    ]
    command += [
        "--prompt",
        "a sks picture",
        "--class-prompt",
        "a picture",
        "--class-pictures",
        "2",
        "--text",
        "no",
    ]
    command += ["--steps", "2", "--every", "2", "--batch", "2", "--out"]
    for count in (1, 2):
        ended = commanded(count, *command, tmp_path / str(count))
        assert ended.returncode == 0, ended.stderr[-3000:]
    assert distance(model_of(tmp_path / "2"), model_of(tmp_path / "1")) < 1e-5
    for path in (tmp_path / "1" / "class").glob("*.png"):
        assert (tmp_path / "2" / "class" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.slow
def test_an_experiment(tmp_path):
    """The study itself knows nothing of processes: the first one's folder has the results, and no other's is left."""
    for k in range(8):
        (tmp_path / "data" / "ab"[k % 2]).mkdir(parents=True, exist_ok=True)
        Image.effect_noise((32, 32), 50 + k).convert("RGB").save(
            tmp_path / "data" / "ab"[k % 2] / f"{k}.png"
        )
    command = [
        "experiments/cifar_ddpm.py",
        "--data",
        tmp_path / "data",
        "--preset",
        "tiny",
        "--each",
        "1",
    ]
    ended = torchrun(2, *command, "--out", tmp_path / "out")
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert len((tmp_path / "out" / "training" / "log.jsonl").read_text().splitlines()) == 4
    assert {"model", "results.json", "samples.png"} <= {
        path.name for path in (tmp_path / "out").iterdir()
    }
    assert ended.stdout.count("results.json") == 1


# Its parts, in one process.


def test_a_process_takes_batches_or_rows_of_them(monkeypatch):
    """Together the processes have every example once."""
    monkeypatch.setattr(ranks, "size", lambda: 2)
    batch = (torch.arange(4), list("abcd"), [], {"name": "data"}, 0.5)
    shares = []
    for rank in (0, 1):
        monkeypatch.setattr(ranks, "rank", lambda rank=rank: rank)
        shares.append(distributed.share([batch])[0])
        assert distributed.share([1, 2, 3, 4]) == [1, 3] if rank == 0 else [2, 4]
    assert torch.equal(torch.cat([share[0] for share in shares]), batch[0])
    assert shares[0][1] + shares[1][1] == batch[1] and shares[0][3:] == batch[3:]


def test_processes_refuse_what_they_cannot_share(monkeypatch):
    monkeypatch.setattr(ranks, "size", lambda: 2)
    monkeypatch.setattr(ranks, "rank", lambda: 1)
    with pytest.raises(UserError, match="2 processes cannot share 3 examples"):
        distributed.share([torch.zeros(3)])


def test_a_restart_goes_on_with_its_own_run_alone(monkeypatch, tmp_path):
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE", raising=False)
    ranks.begin(tmp_path / "a")
    assert not ranks.begun(tmp_path / "a")  # without torchrun
    monkeypatch.setenv(
        "TORCHELASTIC_ERROR_FILE", str(tmp_path / "run" / "attempt_0" / "0" / "error.json")
    )
    (tmp_path / "run").mkdir()
    ranks.begin(tmp_path / "a" / "training")
    monkeypatch.setenv(
        "TORCHELASTIC_ERROR_FILE", str(tmp_path / "run" / "attempt_1" / "0" / "error.json")
    )
    assert ranks.begun(tmp_path / "a") and not ranks.begun(tmp_path / "b")


@pytest.mark.parametrize(
    "other", [{"method": "lora"}, {"word": "sks"}, {"optimizer": "adamw8bit"}, {"dtype": "fp16"}]
)
def test_shards_are_for_the_whole_network_alone(other):
    with pytest.raises(UserError, match="`shard` is for the method full"):
        FineTuneConfig(shard=True, **other)
