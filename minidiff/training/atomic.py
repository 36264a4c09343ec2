"""Write a file or a folder whole or not at all, and never over what somebody else put there.

New content is made in a private folder beside its target, `.NAME.minidiff-XXXXXXXX`, reaches the
disk (fsync), and is renamed into place. The private folder holds a lock file with our mark, which
comes first and goes last. The lock ends with its process, so a later write tells a killed write
from one that is at work.
"""

import errno
import glob
import os
import re
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
MARK = b"minidiff makes a file here and renames it. The next write removes what is left of it.\n"
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# how torch and safetensors say it
NO_ROOM_TEXT = re.compile(r"os error (28|122|27)\b|No space left|PytorchStreamWriter failed")
SIGNATURE = "made with minidiff"  # near the beginning or the end of what we write
Stranger = Callable[[Path], Path | None]  # of a path that exists: what in it is not ours, or None


def check(path: str | Path, stranger: Stranger) -> None:
    """Raise a UserError where writing to path, unless empty, would lose what is not ours."""
    path = _real(path)
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    if (other := stranger(path)) is not None:
        remedy = "move it away, or choose another name for the output"
        raise UserError(f"{other} was not written by minidiff, and would be lost; {remedy}.")


def check_new(path: str | Path) -> None:
    """Raise a UserError where something is there already."""
    clean(Path(path).parent)
    if os.path.lexists(path):
        remedy = "name another place, or remove it"
        raise UserError(f'"{path}" exists and is not overwritten; {remedy}.')


def unsigned(path: Path) -> Path | None:
    """A Stranger: a file is ours if its first or last 64 KB hold our signature; no folder is."""
    if not path.is_file():
        return path
    with path.open("rb") as file:
        head = file.read(2**16)
        file.seek(max(0, path.stat().st_size - 2**16))
        return None if SIGNATURE.encode() in head + file.read() else path


@contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Name the file that a full disk, or an OSError without a name, is about."""
    try:
        yield
    except OSError as error:
        if error.errno is None or (error.filename is not None and error.errno not in NO_ROOM):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
    except Exception as error:
        if not (text := NO_ROOM_TEXT.search(str(error))):
            raise
        code = int(text[1] or errno.ENOSPC)
        raise OSError(code, os.strerror(code), str(path)) from error


@contextmanager
def write(path: str | Path, stranger: Stranger | None = None) -> Iterator[Path]:
    """Yield a path at which the caller makes a file or folder, which then replaces `path`.

        with atomic.write("results.json") as new:
            new.write_text(...)

    stranger: says what of an existing `path` is not ours, see check(); None replaces anything.
    """
    path = _real(path)
    if stranger is not None:
        check(path, stranger)
    path.parent.mkdir(parents=True, exist_ok=True)
    clean(path.parent)
    with naming(path), _replacing(path, stranger) as new:
        yield new


@contextmanager
def _replacing(path: Path, stranger: Stranger | None) -> Iterator[Path]:
    """Yield a path in a private folder; what is made there then replaces `path`."""
    private, lock = _private(path)
    new, old = private / "new" / path.name, private / "old"
    try:
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
        _discard(private)
        os.close(lock)


def remove(folder: Path) -> None:
    """Remove a folder whole or not at all."""
    private, lock = _private(_real(folder))
    try:
        os.replace(folder, private / "old")
    finally:
        _discard(private)
        os.close(lock)


def recover(path: str | Path) -> None:
    """Clean up after killed writes to path, and put an old folder back that was moved away."""
    path = _real(path)
    clean(path.parent, glob.escape(path.name))


def clean(folder: Path, name: str = "*") -> None:
    """Clean up after killed writes in a folder, to all files or to those that a pattern names."""
    for private in folder.glob(f".{name}.minidiff-????????"):
        try:
            lock = os.open(private / LOCK, os.O_RDONLY)
        except OSError:  # not ours; or a write was killed when it had made, or emptied, its folder
            with suppress(OSError):
                private.rmdir()
            continue
        try:
            if _take(lock) and _is_ours(private, lock):
                _put_back(private, folder / private.name[1:].rpartition(".minidiff-")[0])
        finally:
            os.close(lock)


def _is_ours(private: Path, lock: int) -> bool:
    """Whether the lock has our mark, or is empty and alone: the mark was about to be written."""
    mark = os.read(lock, len(MARK) + 1)
    return mark == MARK or (not mark and os.listdir(private) == [LOCK])


def _put_back(private: Path, path: Path) -> None:
    """Move back what a killed write had moved away from path, and remove the rest."""
    old = private / "old"
    if old.exists() and (private / "new" / path.name).exists():
        if path.exists():
            return  # somebody put another thing in its place: both stay
        os.replace(old, path)
    _discard(private)


def _private(path: Path) -> tuple[Path, int]:
    """A new folder beside path, and its open lock."""
    while True:
        private = Path(tempfile.mkdtemp(prefix=f".{path.name}.minidiff-", dir=path.parent))
        with suppress(FileNotFoundError):  # another write cleaned up before there was a lock
            lock = os.open(private / LOCK, os.O_RDWR | os.O_CREAT)
            if _take(lock) is not False and (private / LOCK).exists():
                os.write(lock, MARK)
                return private, lock
            os.close(lock)


def _discard(private: Path) -> None:
    for part in (private / "new", private / "old", private):  # the lock goes last
        shutil.rmtree(part, ignore_errors=True)


def _real(path: str | Path) -> Path:
    return Path(os.path.realpath(path))  # a link stays a link: what it leads to is written


def _take(lock: int) -> bool | None:
    """Lock an open file; False where another process has it, None where there are no locks."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (AttributeError, OSError):
        return None
    return True


def _flush(path: Path) -> None:
    """Force a file, or a folder with all that is in it, to the disk."""
    if path.is_dir():
        for entry in path.iterdir():
            _flush(entry)
        _flush_folder(path)
    else:
        with path.open("rb") as file:
            os.fsync(file.fileno())


def _flush_folder(path: Path) -> None:
    with suppress(OSError):  # not every system can do this to a folder
        folder = os.open(path, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
