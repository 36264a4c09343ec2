"""Runs that are stopped, killed, doubled or moved to another machine: nothing is lost, and what goes on is the uninterrupted run."""

import json
import os
import signal
import subprocess
import sys
from itertools import repeat
from pathlib import Path

import pytest
import torch

from minidiff.errors import Terminated, UserError
from minidiff.finetuning import loop as finetune
from minidiff.finetuning.groups import Group
from minidiff.finetuning.recorder.recorder import Recorder
from minidiff.options.finetuning import RecorderConfig
from minidiff.train import TrainConfig, train
from minidiff.training.lock import LOCK, locked
from tests.finetuning.test_loop import Recording, examples, moved, run, stop_at_4, tiny, weights

ROOT = Path(__file__).parents[2]


def python(script, *args, **how):
    """A script in a process of its own."""
    command = [sys.executable, "-c", script, *map(str, args)]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False, **how
    )


STOPPED = """
import signal, sys
from itertools import count
from pathlib import Path
import torch
from minidiff.cli import console
from tests.finetuning.test_loop import run, tiny
signal.signal(signal.SIGINT, signal.default_int_handler)
torch.set_num_threads(1)  # as the tests: the last bits depend on it
model, calls = tiny(), count(1)
def hook(*_):
    if next(calls) == 3:
        signal.raise_signal(getattr(signal, sys.argv[2]))
model.unet.register_forward_hook(hook)
with console.one_line("minidiff"):
    run(Path(sys.argv[1]), model, steps=6, batch=1, every=4)
"""


@pytest.mark.parametrize("name, code", [("SIGTERM", 143), ("SIGINT", 130)])
def test_a_signal_saves_and_the_message_says_how_to_go_on(tmp_path, name, code):
    """Ctrl-C, and what a cluster or a container sends: the step is finished and saved, and the run resumes bit for bit."""
    ended = python(STOPPED, tmp_path / "parts", name)
    last = ended.stderr.splitlines()[-1]
    assert (
        ended.returncode == code
        and last.startswith("minidiff: ")
        and "step 3 is saved" in last
        and "Traceback" not in ended.stderr
    )
    whole, parts = (
        run(tmp_path / kind, steps=6, batch=1, every=4, resume=True) for kind in ("whole", "parts")
    )
    assert not moved(weights(whole), parts)
    logs = [(tmp_path / kind / "training" / "log.jsonl").read_text() for kind in ("whole", "parts")]
    assert logs[0] == logs[1]


DROPPED = """
import builtins, sys
from itertools import repeat
import torch
from torch import nn
from minidiff.train import *
module = nn.Linear(4, 4)
config = TrainConfig(9, 1e-3, accumulate=2, threads=2)
loop = train(lambda x: {"loss": module(x).pow(2).mean(1)}, module, lambda k: repeat(torch.ones(2, 4)), config)
next(loop)
if len(sys.argv) > 1:
    builtins.loop = loop
"""


@pytest.mark.parametrize("outlives", [(), ("modules",)])
def test_a_dropped_generator_ends_without_a_word(outlives):
    ended = python(DROPPED, *outlives)
    assert (ended.returncode, ended.stderr) == (0, "")


@pytest.mark.parametrize("first, then", [(2, 1), (1, 2)])
def test_a_run_goes_on_where_the_batch_is_split_otherwise(tmp_path, monkeypatch, first, then):
    """A CPU's cores share a batch in two pieces, a GPU takes it whole: the same examples, the same noise, the same run."""

    def on(pieces, out, **how):
        monkeypatch.setattr(finetune, "shares", lambda *_: pieces)
        return run(out, batch=4, **how)

    whole = on(first, tmp_path / "whole")
    with pytest.raises(InterruptedError):
        on(first, tmp_path / "parts", recorder=Recording(stop_at_4))
    parts = on(then, tmp_path / "parts", resume=True)
    for name, value in weights(whole).items():
        torch.testing.assert_close(
            parts.state_dict()[name], value, rtol=1e-4, atol=1e-5
        )  # another order of additions, through Adam


@pytest.mark.parametrize("gap, steps", [(2, [0, 2, 4, 6]), (4, [0, 4, 6])])
def test_a_kill_between_checkpoint_and_measure_loses_no_line(tmp_path, gap, steps):
    """Killed when step 4 was saved and not yet measured, and once more between checkpoints: the record is the uninterrupted one."""
    pictures = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1

    def recorder(out, model, killed_at=None):
        class Killed(Recorder):
            def measure(self, step, losses, lr=None):
                if step == killed_at:
                    raise InterruptedError
                return super().measure(step, losses, lr)

        config = RecorderConfig(every=gap, n=2, steps=2, probe=2, noises=1, network="pixels-8x8")
        prompts = {"training caption": "a cat"}
        return Killed(model, out, prompts, pictures, examples=examples(2), config=config)

    def go(out, killed_at=None, **how):
        model = tiny()
        return run(
            out,
            model,
            groups=[Group("data", examples(6))],
            recorder=recorder(out, model, killed_at),
            **how,
        )

    go(tmp_path / "whole")
    for killed_at in (4, 6):
        with pytest.raises(InterruptedError):
            go(tmp_path / "parts", killed_at, resume=killed_at > 4)
    go(tmp_path / "parts", resume=True)
    records = []
    for kind in ("whole", "parts"):
        lines = [
            json.loads(line) for line in (tmp_path / kind / "record.jsonl").read_text().splitlines()
        ]
        records.append(
            [
                {
                    k: v
                    for k, v in line.items()
                    if k not in ("seconds_per_step", "seconds", "memory_gb")
                }
                for line in lines
            ]
        )
    assert [line["step"] for line in records[0]] == steps
    assert records[1] == records[0]


SECOND = """
import sys
from pathlib import Path
from minidiff.cli import console
from tests.finetuning.test_loop import run
with console.one_line("minidiff"):
    run(Path(sys.argv[1]), resume=True)
"""


def test_a_second_run_into_one_folder_is_refused(tmp_path):
    """While the first is at work: one line that says who, exit code 2, and nothing has changed. When it has ended, the folder is free."""
    ended = []

    def second(step, losses):
        if step == 4:
            before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
            ended.append(python(SECOND, tmp_path))
            assert {
                file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()
            } == before

    run(tmp_path, recorder=Recording(second), background=False)
    (end,) = ended
    line = end.stderr.splitlines()[-1]
    assert (
        end.returncode == 2
        and line.startswith("minidiff: ")
        and f"process {os.getpid()} on " in line
        and "Traceback" not in end.stderr
    )
    assert python(SECOND, tmp_path).returncode == 0


def test_a_damaged_checkpoint_falls_back_to_the_one_before(tmp_path):
    """Cut short, or one bit turned: said in one line, and the run ends where it would have."""
    whole = run(tmp_path / "whole")
    for spoil in (
        lambda data: data[: len(data) // 2],
        lambda data: data[:5000] + bytes([data[5000] ^ 1]) + data[5001:],
    ):
        out = tmp_path / f"parts {len(list(tmp_path.iterdir()))}"
        with pytest.raises(InterruptedError):
            run(out, recorder=Recording(stop_at_4))
        newest = max((out / "training").glob("checkpoint*.pt"))
        newest.write_bytes(spoil(newest.read_bytes()))
        with pytest.warns(UserWarning, match=f"{newest.name} is damaged"):
            parts = run(out, resume=True)
        assert not moved(weights(whole), parts)
        assert (out / "training" / "log.jsonl").read_text() == (
            tmp_path / "whole" / "training" / "log.jsonl"
        ).read_text()


@pytest.mark.parametrize(
    "verb",
    [
        ("finetune", "--data", "pictures"),
        ("dreambooth", "--subject", "pictures", "--prompt", "a sks dog", "--prior", "0"),
        ("quickstart",),
    ],
    ids=lambda verb: verb[0],
)
def test_verbs_that_train_are_alone_in_their_folder(tmp_path, refused, verb):
    """Whatever else they were asked: the folder is looked at first, and stays as it is."""
    (tmp_path / "run.json").write_text("{}")
    with locked(tmp_path):
        before = {file: file.read_bytes() for file in tmp_path.rglob("*")}
        said = refused(*verb, "--out", tmp_path)
        assert {file: file.read_bytes() for file in tmp_path.rglob("*")} == before
    assert (
        said.startswith(f"{tmp_path}: process {os.getpid()} on ")
        and ", since 20" in said
        and "wait until it has ended" in said
    )


def test_bad_input_leaves_no_folder_behind(tmp_path, refused):
    refused("finetune", "--data", tmp_path / "missing", "--out", tmp_path / "a" / "b")
    assert not list(tmp_path.iterdir())


def test_a_lock_dies_with_its_process(tmp_path):
    """A killed process leaves the file, which holds nobody off; a process that ends leaves nothing."""
    killed = "import os, signal, sys; from pathlib import Path; from minidiff.training.lock import locked\n"
    killed += "with locked(Path(sys.argv[1])): os.kill(os.getpid(), signal.SIGKILL)"
    assert python(killed, tmp_path / "run").returncode == -9
    assert [file.name for file in (tmp_path / "run").iterdir()] == [LOCK]
    with locked(tmp_path / "run"):
        assert json.loads((tmp_path / "run" / LOCK).read_text())["process"] == os.getpid()
    assert not list((tmp_path / "run").iterdir())


def test_a_lock_that_does_not_say_whose_it_is(tmp_path):
    with locked(tmp_path), pytest.raises(UserError, match="another run is writing here"):
        (tmp_path / LOCK).write_bytes(b"\xff{")
        with locked(tmp_path):
            pass


def test_a_signal_while_a_saved_step_is_measured_interrupts_at_once(tmp_path):
    """A measure can take longer than a cluster waits; it is made up for on resume."""

    def look(step, losses):
        if step == 4:
            signal.raise_signal(signal.SIGTERM)
            raise AssertionError("it went on")

    with pytest.raises(Terminated, match="step 4 is saved"):
        run(tmp_path, recorder=Recording(look))
    looked = []
    run(tmp_path, recorder=Recording(lambda step, losses: looked.append(step)), resume=True)
    assert looked == [4, 6]


def test_terminated_elsewhere_is_one_line(tmp_path):
    script = "import signal; from minidiff.cli import console\nwith console.one_line('minidiff'): signal.raise_signal(signal.SIGTERM)"
    ended = python(script)
    assert (ended.returncode, ended.stderr) == (143, "minidiff: terminated.\n")


@pytest.mark.parametrize("resume", [False, True])
def test_a_strangers_log_stays(tmp_path, resume):
    (tmp_path / "log.jsonl").write_text('{"epoch": 1}\n')
    module = torch.nn.Linear(1, 1)
    config = TrainConfig(1, 1e-3)
    with pytest.raises(UserError, match=r"log\.jsonl was not written by minidiff"):
        next(
            train(
                lambda x: {"loss": module(x)[:, 0]}, module, repeat, config, None, tmp_path, resume
            )
        )
    assert (tmp_path / "log.jsonl").read_text() == '{"epoch": 1}\n'


IN_A_DESTRUCTOR = """
import signal, sys, time
from minidiff.cli import console
class Object:
    def __del__(self):
        signal.raise_signal(getattr(signal, sys.argv[1]))
with console.one_line('minidiff'):
    Object()
    time.sleep(10)
"""


@pytest.mark.parametrize(
    "name, word, code", [("SIGTERM", "terminated", 143), ("SIGINT", "interrupted", 130)]
)
def test_a_signal_in_a_destructor_is_not_lost(name, word, code):
    """What is raised there, Python prints and forgets."""
    ended = python(IN_A_DESTRUCTOR, name)
    assert (ended.returncode, ended.stderr) == (code, f"minidiff: {word}.\n")


@pytest.mark.parametrize("steps, at", [(14, 13), (14, 5), (3, 2), (9, 4)])
def test_a_checkpoint_of_an_interruption_goes_with_the_next(tmp_path, steps, at):
    """Every 4 steps; the last two of these stay, as in a run that nobody interrupted."""

    def run(folder, stop=None):
        module = torch.nn.Linear(1, 1)
        config = TrainConfig(steps, 1e-3, save_every=4)
        batches = lambda start: iter([torch.ones(2, 1)] * (steps - start))  # noqa: E731
        loss = lambda x: {"loss": module(x)[:, 0]}  # noqa: E731
        for step in train(loss, module, batches, config, None, folder, resume=True):
            if step.step == stop:
                signal.raise_signal(signal.SIGINT)
        return sorted(file.name for file in folder.glob("checkpoint*"))

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "stopped", at)
    assert f"checkpoint-{at:06d}.pt" in {file.name for file in (tmp_path / "stopped").iterdir()}
    assert run(tmp_path / "stopped") == run(tmp_path / "whole")


KILLS = """
import os, random, signal, sys, time
from pathlib import Path
import torch
from minidiff.cli import console
from minidiff.errors import UserError
from tests.finetuning.test_loop import Group, examples, tiny, run
from minidiff.finetuning.recorder.recorder import Recorder
from minidiff.options.finetuning import RecorderConfig
torch.set_num_threads(1)
out, kills = Path(sys.argv[1]), int(sys.argv[2])
pictures = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1

def go(folder):
    model = tiny()
    config = RecorderConfig(every=2, n=2, steps=2, probe=2, noises=1, network="pixels-8x8")
    recorder = Recorder(
        model, folder, {"training caption": "a cat"}, pictures, examples=examples(2), config=config
    )
    run(folder, model, groups=[Group("data", examples(6))], steps=14, ema=0.9, recorder=recorder, resume=True)

go(out / "whole")
dice, log = random.Random(7), out / "killed" / "training" / "log.jsonl"
for number in [*(dice.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGINT]) for _ in range(kills)), None]:
    child = os.fork()
    if not child:
        sys.stderr = open(os.devnull, "w")
        signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            with console.one_line("minidiff"):
                go(out / "killed")
        except SystemExit as end:
            os._exit(end.code)
        os._exit(0)
    if number is not None:
        time.sleep(dice.uniform(0.05, 0.5))
        os.kill(child, number)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    allowed = {signal.SIGKILL: (-9,), signal.SIGTERM: (143, -15), signal.SIGINT: (130, 1, -2), None: ()}[number]
    assert code in (0, *allowed), (number, code)
"""


@pytest.mark.slow
def test_killed_in_every_way_at_any_moment_leaves_the_files_of_an_uninterrupted_run(tmp_path):
    """Training, saving, measuring: every file is the same but for measured times, and there is nothing to clean up."""
    ended = subprocess.run(
        [sys.executable, "-c", KILLS, tmp_path, "20"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    whole, killed = (
        {
            str(file.relative_to(tmp_path / kind)): file
            for file in (tmp_path / kind).rglob("*")
            if file.is_file()
        }
        for kind in ("whole", "killed")
    )
    assert killed.keys() == whole.keys()
    for name, file in whole.items():
        if name == "record.jsonl":
            records = [
                [json.loads(line) for line in path.read_text().splitlines()]
                for path in (file, killed[name])
            ]
            times = {"per_step", "seconds", "memory", "seconds_per_step", "memory_gb"}
            whole_record, killed_record = (
                [{k: v for k, v in line.items() if k not in times} for line in lines]
                for lines in records
            )
            assert killed_record == whole_record
        elif name != "report.html":
            assert killed[name].read_bytes() == file.read_bytes(), name
