"""Writes that are whole or not at all: failures, a full disk, kills at every point, and what others put beside them."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from minidiff.errors import UserError
from minidiff.training import atomic


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def foreign(path: Path) -> Path | None:
    """Ours is a folder of nothing but model.json, and a file that begins with "ours"."""
    if path.is_dir():
        return next((p for p in path.iterdir() if p.name != "model.json"), None)
    return None if path.read_bytes().startswith(b"ours") else path


def run(code: str, folder: Path) -> int:
    before = (
        "import os, signal, sys\nfrom pathlib import Path\nfrom minidiff.training import atomic\n"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.run(
        [sys.executable, "-c", before + code], cwd=folder, env=environment
    ).returncode


def save(path: Path, text: str = "ours") -> None:
    with atomic.write(path, foreign) as new:
        new.mkdir()
        (new / "model.json").write_text(text)


def test_file_is_replaced_and_nothing_else_stays(tmp_path):
    for text in ("ours 1", "ours 2"):
        with atomic.write(tmp_path / "deep" / "a.txt", foreign) as new:
            assert new.suffix == ".txt"
            new.write_text(text)
    assert tree(tmp_path) == {"deep/a.txt": b"ours 2"}
    assert os.listdir(tmp_path / "deep") == ["a.txt"]


def test_mode_of_a_file_follows_umask(tmp_path):
    (tmp_path / "plain").write_text("")
    with atomic.write(tmp_path / "a") as new:
        new.write_text("")
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), KeyboardInterrupt(), ValueError()]
)
def test_failing_writer_leaves_the_old_content(tmp_path, error):
    (tmp_path / "a").write_text("ours")
    save(tmp_path / "m")
    before = tree(tmp_path)
    for name in ("a", "m"):
        with pytest.raises(type(error)), atomic.write(tmp_path / name, foreign) as new:
            new.write_text("half")
            raise error
    assert tree(tmp_path) == before and sorted(os.listdir(tmp_path)) == ["a", "m"]


def test_full_disk(tmp_path):
    (tmp_path / "a").write_text("ours")
    code = """
import resource
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    with atomic.write("a") as new:
        new.write_bytes(bytes(5000))
except OSError:
    sys.exit(3)
"""
    assert run(code, tmp_path) == 3
    assert tree(tmp_path) == {"a": b"ours"} and os.listdir(tmp_path) == ["a"]


def test_second_rename_fails(tmp_path, monkeypatch):
    save(tmp_path / "m", "old")
    replace = os.replace

    def failing(source, target):
        if Path(source).parent.name == "new":
            raise OSError(5, "Input/output error")
        replace(source, target)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(OSError):
        save(tmp_path / "m", "new")
    assert tree(tmp_path) == {"m/model.json": b"old"} and os.listdir(tmp_path) == ["m"]


def test_killed_while_writing(tmp_path):
    save(tmp_path / "m", "old")
    code = "with atomic.write('m') as new:\n    new.mkdir()\n    (new / 'model.json').write_text('half')\n    os.kill(os.getpid(), signal.SIGKILL)"
    assert run(code, tmp_path) == -signal.SIGKILL
    assert (tmp_path / "m" / "model.json").read_text() == "old" and len(os.listdir(tmp_path)) == 2
    save(tmp_path / "m", "new")
    assert tree(tmp_path) == {"m/model.json": b"new"} and os.listdir(tmp_path) == ["m"]


KILL = """
replace, renames = os.replace, 0
def killing(source, target):
    global renames
    replace(source, target)
    renames += 1
    if renames == {at}:
        os.kill(os.getpid(), signal.SIGKILL)
os.replace = killing
with atomic.write("m") as new:
    new.mkdir()
    (new / "model.json").write_text("new")
"""


@pytest.mark.parametrize("at, content", [(1, b"old"), (2, b"new")])
def test_killed_after_a_rename(tmp_path, at, content):
    save(tmp_path / "m", "old")
    assert run(KILL.format(at=at), tmp_path) == -signal.SIGKILL
    assert (tmp_path / "m").exists() == (at == 2)
    atomic.recover(tmp_path / "m")
    assert tree(tmp_path) == {"m/model.json": content} and os.listdir(tmp_path) == ["m"]


def test_what_was_put_in_place_of_a_killed_write_stays(tmp_path):
    save(tmp_path / "m", "old")
    run(KILL.format(at=1), tmp_path)
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "model.json").write_text("another")
    before = tree(tmp_path)
    atomic.recover(tmp_path / "m")
    assert tree(tmp_path) == before


def test_strangers_are_named_and_stay(tmp_path):
    (tmp_path / "a").write_text("thesis")
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "notes.txt").write_text("mine")
    before = tree(tmp_path)
    for name, said in (("a", "a"), ("m", "notes.txt")):
        with pytest.raises(UserError, match=said), atomic.write(tmp_path / name, foreign):
            pytest.fail("refused before any work")
    assert tree(tmp_path) == before


def test_stranger_that_comes_in_the_meantime(tmp_path):
    with pytest.raises(UserError), atomic.write(tmp_path / "a", foreign) as new:
        new.write_text("ours")
        (tmp_path / "a").write_text("thesis")
    assert tree(tmp_path) == {"a": b"thesis"}


def test_names_like_ours_are_left_alone(tmp_path):
    for name in ("m.old", "m.new", ".m.minidiff-12345678", ".m.minidiff-abcdefgh", "m.bak"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "precious").write_text(name)
    (tmp_path / ".m.minidiff-abcdefgh" / atomic.LOCK).write_text("not with our mark")
    before = tree(tmp_path)
    atomic.recover(tmp_path / "m")
    assert not (tmp_path / "m").exists()
    save(tmp_path / "m")
    assert tree(tmp_path) == before | {"m/model.json": b"ours"}


def test_empty_folder_is_free_and_links_are_followed(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "m").symlink_to("real")
    save(tmp_path / "m")
    assert (tmp_path / "m").is_symlink() and (
        tmp_path / "real" / "model.json"
    ).read_text() == "ours"


def test_a_write_at_work_is_not_cleaned_up(tmp_path):
    with atomic.write(tmp_path / "a") as first:
        first.write_text("first")
        with atomic.write(tmp_path / "a") as second:
            second.write_text("second")
    assert tree(tmp_path) == {"a": b"first"}


EVERYWHERE = """
operations, last = 0, int(sys.argv[1])
def hook(event, args):
    global operations
    writing = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)
    if writing or event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir"):
        operations += 1
        if operations == last:
            os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(hook)
with atomic.write("m") as new:
    new.mkdir()
    (new / "model.json").write_text("new")
"""


def test_killed_at_every_operation_leaves_nothing_once_the_folder_is_opened_again(tmp_path):
    """As it begins and as it ends too, where there is no lock yet, or no longer."""
    for last in range(1, 100):
        save(tmp_path / "m", "old")
        code = run(f"sys.argv[1:] = ['{last}']\n" + EVERYWHERE, tmp_path)
        atomic.clean(tmp_path)
        assert os.listdir(tmp_path) == ["m"], last
        assert (tmp_path / "m" / "model.json").read_text() in ("old", "new")
        if code == 0:
            break
    assert last > 10


def test_two_processes_that_write_one_file_at_once(tmp_path):
    """Each cleans what the other has only begun, and begins again."""
    code = "for k in range(200):\n    with atomic.write('a') as new: new.write_text('ours')"
    before = "import os\nfrom minidiff.training import atomic\n"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", before + code]
    both = [subprocess.Popen(command, cwd=tmp_path, env=environment) for _ in range(3)]
    assert [one.wait(60) for one in both] == [0, 0, 0]
    assert tree(tmp_path) == {"a": b"ours"} and os.listdir(tmp_path) == ["a"]


def test_a_folder_is_removed_whole_or_not_at_all(tmp_path):
    for last in range(1, 100):
        save(tmp_path / "m", "old")
        before = EVERYWHERE.partition("with atomic")[0]
        code = run(f"sys.argv[1:] = ['{last}']\n{before}\natomic.remove(Path('m'))", tmp_path)
        atomic.clean(tmp_path)
        assert tree(tmp_path) in ({}, {"m/model.json": b"old"}), last
        assert os.listdir(tmp_path) in ([], ["m"]), last
        if code == 0:
            break
    assert last > 5
