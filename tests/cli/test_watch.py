"""minidiff watch: what it says of a run that is at work, is over, or is not there yet; and that it
only reads."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from minidiff.cli import watch as module
from minidiff.cli.main import main
from minidiff.cli.watch import BLOCKS, Log, Run, sparkline
from minidiff.training import lock

TOLD = {
    "steps": 400,
    "seconds_per_step": 0.5,
    "examples_per_step": 16,
    "operations_per_step": 25e9,
    "peak_per_second": 100e9,
    "memory_gb": 1.25,
}


def line(step, loss=1.0):
    bins = [None, *([loss] * 9)]
    whole = {"step": step, "loss": loss, "bins": bins, "lr": 1e-3, "grad_norm": 0.5, "parts": {}}
    return json.dumps(whole) + "\n"


def written(folder, steps=100):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "log.jsonl").write_text("".join(line(k, 10 / k) for k in range(1, steps + 1)))
    return folder


def looked(capsys, folder):
    main(["watch", str(folder), "--once"])
    return capsys.readouterr().out


def content(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_run_at_work(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path.parent)
    folder = written(tmp_path / "training")
    (folder / "checkpoint-000080.pt").write_bytes(b"")
    with lock.locked(folder):
        lock.tell(folder, TOLD)
        before = content(tmp_path)
        text = looked(capsys, Path(tmp_path.name))
        assert content(tmp_path) == before
    assert text.startswith(f"running, process {os.getpid()} since 20")
    rows = dict(row.strip().split(maxsplit=1) for row in text.splitlines()[2:])
    assert "training: step 100 of 400" in text
    assert rows["progress"].endswith("25%, 2 min 30 s left")
    assert rows["speed"] == "32 examples/s" and rows["memory"] == "1.25 GB at most"
    assert rows["arithmetic"] == "50 GFLOP/s, 50% of this machine's 100"
    assert rows["checkpoint"].startswith("step 80, ") and rows["checkpoint"].endswith(" s ago")
    recent = sum(10 / k for k in range(51, 101)) / 50
    assert rows["loss"].split()[0] == f"{recent:.4g}"
    assert rows["learning"].split() == ["rate", "0.001"]
    assert rows["gradient"].split() == ["norm", "0.5"]
    assert "data" in rows["by"] and "noise" in rows["by"]


def test_a_run_that_is_over_or_stopped(tmp_path, capsys):
    folder = written(tmp_path / "training")
    assert "not running: " in looked(capsys, tmp_path)
    (tmp_path / "run.json").write_text(json.dumps({"settings": {"steps": 100}}))
    text = looked(capsys, tmp_path)
    assert "finished: " in text and "step 100 of 100" in text and "left" not in text
    (tmp_path / "run.json").unlink()
    (tmp_path / "results.json").write_text("{}")
    assert "finished: " in looked(capsys, tmp_path)
    killed = {"process": 2**22 + 1, "host": lock.socket.gethostname(), "since": "today"}
    (tmp_path / "results.json").unlink()
    (folder / lock.LOCK).write_text(json.dumps(killed) + "\n" + json.dumps(TOLD) + "\n")
    text = looked(capsys, tmp_path)
    assert "not running: " in text and "left" not in text


def test_acts_one_after_another(tmp_path, capsys):
    for k, act in enumerate(("vae", "text", "model")):
        file = written(tmp_path / "training" / act, 10 * (k + 1)) / "log.jsonl"
        os.utime(file, (1000 + k, 1000 + k))
    (tmp_path / "training" / "other").mkdir()
    rows = looked(capsys, tmp_path).splitlines()
    assert rows[1].startswith("vae: step 10, loss ") and rows[2].startswith("text: step 20, loss ")
    assert rows[3] == "model: step 30" and rows[4].startswith("  loss ")


@pytest.mark.parametrize("there", [False, True])
def test_a_run_that_has_not_begun(tmp_path, capsys, there):
    folder = tmp_path / "run"
    if there:
        (folder / "training").mkdir(parents=True)
        (folder / "training" / "log.jsonl").touch()
    rows = looked(capsys, folder).splitlines()
    state = "not running: " if there else "waiting for it to begin: "
    assert rows[0].startswith(state) and len(rows) == 2
    assert folder.exists() == there


def test_lines_that_are_half_written_damaged_or_strange(tmp_path):
    log, file = Log(tmp_path), tmp_path / "log.jsonl"
    file.write_bytes(b"")
    log.read()
    assert log.losses == [] and log.step == 0
    one, two = line(1), line(2, 0.5)
    file.write_text(one + two[:30])
    log.read()
    assert log.losses == [1.0]
    strange = b'\xff\n[]\n3\n{"step": 1}\n{"step": "x", "loss": 1, "bins": [], "lr": 1}\n'
    file.write_bytes((one + two).encode() + strange + line(3, 0.25).encode())
    log.read()
    assert log.losses == [1.0, 0.5, 0.25] and log.step == 3
    file.rename(tmp_path / "old")
    file.write_text(one)  # as a resume cuts it
    log.read()
    assert log.losses == [1.0] and log.step == 1


def test_the_recorders_last_measurement(tmp_path):
    written(tmp_path / "training", 3)
    measured = {"step": 0, "losses": {}, "lr": None, "validation": [2.0, None], "train": []}
    measured |= {"moved": {}, "nearest": {"subject": [[0.5, 0]]}, "copies": None}
    measured |= {"copies_floor": 0.0, "seconds_per_step": None, "seconds": 1.0, "memory_gb": None}
    rows = [json.dumps(measured), json.dumps(measured | {"step": 2, "validation": [1.0, None]})]
    (tmp_path / "record.jsonl").write_text("\n".join([*rows, '{"step": 3, "lo']))
    run = Run(tmp_path)
    run.read()
    assert run.lines()[-1].split(maxsplit=1)[1] == (
        "step 2, held-out loss 0.5 times the first, "
        "nearest training picture at 0.5 of the usual distance"
    )
    (tmp_path / "record.jsonl").write_text("[]\n{}\n")
    run.read()
    assert run.records == []


def test_sparklines_are_as_high_as_the_values():
    assert sparkline([1, 10, 100], 3) == "▁▅█" or sparkline([1, 10, 100], 3) == "▁▄█"
    assert sparkline([-1, 0, None, 1], 4)[2] == " " and sparkline([], 4) == ""
    assert sparkline([None], 4) == "" and sparkline([2.0, 2.0], 4) == BLOCKS[0] * 2
    assert len(sparkline([1.0] * 1000, 10)) == 10


class Terminal(io.TextIOWrapper):
    """A terminal that keeps what it is sent."""

    def __init__(self, encoding="utf-8"):
        super().__init__(io.BytesIO(), encoding, write_through=True)

    def isatty(self):
        return True

    def text(self):
        return self.buffer.getvalue().decode(self.encoding)


def test_a_narrow_ascii_terminal(tmp_path, monkeypatch):
    folder = written(tmp_path / "training")
    terminal = Terminal("ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("COLUMNS", "40")
    with lock.locked(folder):
        lock.tell(folder, TOLD)
        main(["watch", str(tmp_path), "--once"])
    rows = terminal.text().splitlines()
    assert all(len(row) < 40 for row in rows) and "\x1b" not in terminal.text()
    assert "\\u" not in terminal.text() and any("#" in row for row in rows)


def test_a_terminal_is_drawn_again_in_place_until_the_run_ends(tmp_path, monkeypatch):
    folder, terminal, looks = written(tmp_path / "training", 3), Terminal(), []

    def sleep(_seconds):
        looks.append(terminal.text())
        (folder / "log.jsonl").open("a").write(line(4))
        if len(looks) == 2:
            (folder / lock.LOCK).unlink()

    monkeypatch.setattr(module.time, "sleep", sleep)
    monkeypatch.setattr(sys, "stdout", terminal)
    (folder / lock.LOCK).write_text(
        json.dumps({"process": os.getpid(), "host": lock.socket.gethostname()}) + "\n"
    )
    main(["watch", str(tmp_path)])
    text = terminal.text()
    rows = looks[0].count("\n")
    assert len(looks) == 2 and text.count(f"\x1b[{rows}F\x1b[J") == 2
    assert text.rindex("not running") > text.rindex("\x1b[")


def heeding():
    """Ctrl-C, even where the tests run in the background."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_without_a_terminal_each_change_is_a_line_and_ctrl_c_ends_it(tmp_path):
    folder = written(tmp_path / "training", 3)
    code = [sys.executable, "-m", "minidiff.cli", "watch", str(tmp_path), "--every", "0.1"]
    for number, ending in ((signal.SIGINT, 0), (signal.SIGTERM, 143)):
        with lock.locked(folder):
            lock.tell(folder, TOLD)
            process = subprocess.Popen(code, stdout=subprocess.PIPE, text=True, preexec_fn=heeding)
            first = process.stdout.readline()
            time.sleep(0.3)
            with open(folder / "log.jsonl", "a") as log:
                log.write(line(4, 2.0))
            second = process.stdout.readline()
            process.send_signal(number)
            rest, _ = process.communicate(timeout=30)
        assert "32 examples/s" in first and "left" in first and "step 4" in second and rest == ""
        assert process.returncode == ending


def test_it_imports_no_torch(tmp_path):
    code = f"from minidiff.cli.main import main; main(['watch', {str(tmp_path)!r}, '--once'])"
    code += "; import sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("args, words", [
    (["--every", "0"], "--every is 0; it must be at least 0.1 seconds"),
    ([], "is a file; name the folder of a run"),
])  # fmt: skip
def test_what_cannot_be_watched(tmp_path, capsys, args, words):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as end:
        main(["watch", str(tmp_path / "file"), *args])
    assert end.value.code == 2 and words in capsys.readouterr().err
