"""Write a file or a folder whole or not at all, and never over what somebody else put there.

New content is made in a private folder beside its target, `.NAME.minidiff-XXXXXXXX`, reaches the disk (fsync), and is renamed into place. A private
folder holds a lock file with our mark. The lock ends with its process, so that a later write tells the rest of a killed one from one that is at work.
"""
import glob
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from minidiff.errors import UserError

try:
    import fcntl
except ImportError:  # Windows: no locks, so the rest of a killed write stays where it is
    fcntl = None

LOCK = "minidiff.lock"
MARK = b"minidiff writes a file or folder here and then renames it. If no minidiff runs, the next write removes this folder.\n"
SIGNATURE = "made with minidiff"  # stands in what we write by a fixed name, near its beginning or its end
Stranger = Callable[[Path], Path | None]  # of a path that exists: what in it we did not write, or None


def check(path: str | Path, stranger: Stranger) -> None:
    """Raise a UserError where writing to path would lose what is not ours. An empty folder is free."""
    path = _real(path)
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    if (other := stranger(path)) is not None:
        raise UserError(f"{other} was not written by minidiff, and would be lost; move it away, or choose another name for the output.")


def check_new(path: str | Path) -> None:
    """Raise a UserError where something is there already."""
    if os.path.lexists(path):
        raise UserError(f'"{path}" exists; nothing is written over it: name another place, or remove it.')


def unsigned(path: Path) -> Path | None:
    """A Stranger: a file is ours if our signature stands in its first or last 64 KB; a folder never is."""
    if not path.is_file():
        return path
    with path.open("rb") as file:
        head = file.read(2**16)
        file.seek(max(0, path.stat().st_size - 2**16))
        return None if SIGNATURE.encode() in head + file.read() else path


@contextmanager
def write(path: str | Path, stranger: Stranger | None = None) -> Iterator[Path]:
    """Give the path of a new file or folder, which the caller makes; then it takes the place of `path`, if nothing failed.

        with atomic.write("results.json") as new:
            new.write_text(...)

    stranger: what of an existing `path` is not ours, see check(); without it whatever is there is replaced.
    """
    path = _real(path)
    if stranger is not None:
        check(path, stranger)
    path.parent.mkdir(parents=True, exist_ok=True)
    recover(path)
    private = Path(tempfile.mkdtemp(prefix=f".{path.name}.minidiff-", dir=path.parent))
    new, old = private / "new" / path.name, private / "old"
    lock = os.open(private / LOCK, os.O_RDWR | os.O_CREAT)
    try:
        _take(lock)
        os.write(lock, MARK)
        new.parent.mkdir()
        yield new
        _flush(new)
        if stranger is not None:
            check(path, stranger)  # it may have come in the meantime
        if path.is_dir():
            os.replace(path, old)
        os.replace(new, path)
        _flush_folder(path.parent)
    finally:
        if old.exists() and not path.exists():
            os.replace(old, path)
        shutil.rmtree(private, ignore_errors=True)
        os.close(lock)


def recover(path: str | Path) -> None:
    """Clean up after writes to path that were killed; one killed between its two renames gets the old folder back."""
    path = _real(path)
    for private in path.parent.glob(f".{glob.escape(path.name)}.minidiff-????????"):
        try:
            lock = os.open(private / LOCK, os.O_RDONLY)
        except OSError:
            continue  # not ours, or not yet
        try:
            if not _take(lock) or os.read(lock, len(MARK) + 1) != MARK:
                continue
            new, old = private / "new" / path.name, private / "old"
            if old.exists() and new.exists():
                if path.exists():
                    continue  # somebody put another thing in its place: both stay
                os.replace(old, path)
            shutil.rmtree(private, ignore_errors=True)
        finally:
            os.close(lock)


def _real(path: str | Path) -> Path:
    return Path(os.path.realpath(path))  # a link stays a link: what it leads to is written


def _take(lock: int) -> bool:
    """Lock an open file; False where another process has it, or where there are no locks."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (AttributeError, OSError):
        return False
    return True


def _flush(path: Path) -> None:
    """Force a file, or a folder with all that is in it, to the disk."""
    if path.is_dir():
        for entry in path.iterdir():
            _flush(entry)
        _flush_folder(path)
        return
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _flush_folder(path: Path) -> None:
    with suppress(OSError):  # not every system can do this to a folder
        folder = os.open(path, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
