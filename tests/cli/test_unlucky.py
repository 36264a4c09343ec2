"""No memory, a full disk, a closed or ascii terminal: one line, exit code 2, nothing half-written, whatever the verb."""

import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from minidiff.cli import console
from minidiff.training import atomic
from tests.test_strangers_files import NAMES, code, place, verbs  # noqa: F401 (a fixture)

HERE = Path(__file__).parents[2]


def shell(command, tmp_path, **environment):
    """A command line with $M for minidiff; its exit code, stdout and stderr."""
    settings = {
        "PYTHONPATH": str(HERE),
        "M": f"{sys.executable} -m minidiff.cli",
        "MPLBACKEND": "Agg",
    }
    ended = subprocess.run(
        ["bash", "-c", command],
        cwd=tmp_path,
        env=os.environ | settings | environment,
        capture_output=True,
        timeout=120,
    )
    return ended.returncode, ended.stdout.decode(), ended.stderr.decode()


@pytest.mark.parametrize("arguments", ["--version", "--help", "generate --help", "inspect box"])
def test_standard_output_that_takes_nothing(arguments, tmp_path):
    ended, _, error = shell(f"$M {arguments} > /dev/full", tmp_path)
    message = "minidiff: standard output: No space left on device; check the path"
    assert ended == 2 and error.startswith(message) and error.count("\n") == 1
    ended, _, error = shell(f"$M {arguments} >&-", tmp_path)
    message = "minidiff: standard output is closed; send it to a file, or to /dev/null.\n"
    assert (ended, error) == (2, message)
    # quiet, as other tools are
    assert shell(f"set -o pipefail; $M {arguments} | :", tmp_path) == (0, "", "")


def test_standard_error_that_takes_nothing(tmp_path):
    """What was to be told there is lost, and no file takes its number."""
    for way in (">&-", "> /dev/full"):
        assert shell(f"$M inspect nowhere 2{way}", tmp_path) == (2, "", "")
        ended, said, _ = shell(f"$M plot schedules --out . 2{way}", tmp_path)
        assert ended == 0 and "schedules.png" in said


def test_a_terminal_without_letters(tmp_path):
    """Paths and messages that it cannot show are written with escapes, and the work is done."""
    ascii_only = {"LC_ALL": "C", "PYTHONIOENCODING": "ascii"}
    draw = "$M generate 'un café ☕' --steps 1 --out dé"
    ended, said, error = shell(draw, tmp_path, **ascii_only)
    assert ended == 0 and "d\\xe9/000-un-caf\\xe9.png" in said and said.isascii()
    assert list((tmp_path / "dé").glob("000-un-café*.png")) and "Traceback" not in error
    ended, _, error = shell("$M inspect é☕", tmp_path, **ascii_only)
    assert (ended, error) == (2, 'minidiff: no file or folder "\\xe9\\u2615".\n')


@pytest.mark.parametrize(
    "error, size",
    [
        (MemoryError(), ""),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU"), "20.00 GiB"),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't "
                      "allocate memory: you tried to allocate 17179869184 bytes."), "17.2 GB"),
        (RuntimeError("MPS backend out of memory (MPS allocated: 1.00 GB)"), ""),
    ],
)  # fmt: skip
def test_no_memory(error, size, capsys):
    def draw(size: int = 1, batch: int = 1) -> None:
        """Draw."""
        raise error

    with pytest.raises(SystemExit) as end:
        console.run("minidiff", "Tests.", {"draw": draw}, ["draw"])
    amount = f" ({size} at once)" if size else ""
    message = f"minidiff: there is not enough memory for this{amount}; these take less: --size, --batch.\n"
    assert end.value.code == 2 and capsys.readouterr().err == message


def test_other_errors_of_torch_are_not_hidden():
    def draw() -> None:
        """Draw."""
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes"):
        console.run("minidiff", "Tests.", {"draw": draw}, ["draw"])


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have other limits")
def test_an_image_larger_than_memory(tmp_path):
    """Refused by the system before the first step, and told in one line."""
    for limit, size in (("2000000", 8192), ("unlimited", 65536)):
        command = f"ulimit -d {limit}; $M generate x --steps 1 --size {size} --out out"
        ended, _, error = shell(command, tmp_path)
        last = error.splitlines()[-1]
        assert ended == 2 and "there is not enough memory for this" in last and "--size" in last
        assert (
            not {"Traceback", "sampling"} & set(error.split()) and not (tmp_path / "out").exists()
        )


def test_no_more_memory_than_the_machine_has(monkeypatch):
    """Linux would hand it out and end the process when it is used."""
    asked = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: (resource.RLIM_INFINITY,) * 2)
    monkeypatch.setattr(resource, "setrlimit", lambda which, limits: asked.append((which, *limits)))
    monkeypatch.setattr(os.path, "exists", lambda path: False)
    console._limit_memory()
    ((which, soft, hard),) = asked
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert which == resource.RLIMIT_DATA and soft >= 0.9 * pages and hard == resource.RLIM_INFINITY
    monkeypatch.setattr(os.path, "exists", lambda path: path == "/dev/nvidiactl")
    console._limit_memory()
    assert len(asked) == 1


@pytest.mark.parametrize("verb", [*NAMES, "quickstart"])
def test_a_full_disk(verb, place, tmp_path, capsys):  # noqa: F811
    """No file may grow beyond 300 bytes: the system's answer is as that of a full disk."""
    out = tmp_path / "out"
    args = ["quickstart", "--out", out] if verb == "quickstart" else verbs(place, out)[verb][0]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300, before[1]))
    try:
        ended = code(args)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    last = capsys.readouterr().err.splitlines()[-1]
    assert ended == 2 and str(out) in last and re.search("File too large|No space left", last)
    assert not list(tmp_path.rglob(".*.minidiff-*"))
    # a log's last line may be half; resuming cuts it off
    files = {path for path in tmp_path.rglob("*") if path.is_file() and path.name != "log.jsonl"}
    sizes = {path: path.stat().st_size for path in files}
    assert all(size < 300 for size in sizes.values()), sizes


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        OSError(28, "No space left on device", "/somewhere/else"),
        RuntimeError("[enforce fail at inline_container.cc:664] . PytorchStreamWriter failed writing file data/3: file write failed"),
        ValueError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)  # fmt: skip
def test_a_full_disk_is_told_with_the_files_name(error, tmp_path):
    with pytest.raises(OSError, match="No space left on device") as told:
        with atomic.write(tmp_path / "a.bin"):
            raise error
    assert told.value.filename == str(tmp_path / "a.bin") and not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match=r"^other$"), atomic.write(tmp_path / "a.bin"):
        raise ValueError("other")
