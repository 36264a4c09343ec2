"""One writer for each folder: a lock that ends with its process, however the process ends."""
import json
import os
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import BinaryIO

from minidiff.errors import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None
    import msvcrt

LOCK = ".minidiff-lock"
BEYOND = 2**20  # Windows locks bytes, and locked ones cannot be read: lock one that is far from what the file says


@contextmanager
def locked(folder: Path | None) -> Iterator[None]:
    """Nobody else may lock this folder meanwhile. The folder is made, and removed again if it is left empty. None locks nothing.
    A UserError says which process holds the lock."""
    if folder is None:
        yield
        return
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    file = _taken(folder)
    try:
        yield
    finally:
        with suppress(OSError):  # Windows removes no open file: then the next run takes it over
            (folder / LOCK).unlink()
        file.close()
        for path in missing:
            with suppress(OSError):  # it is not empty
                path.rmdir()


def _taken(folder: Path) -> BinaryIO:
    """The open lock file, which says who holds it."""
    while True:
        file = open(folder / LOCK, "a+b")
        try:
            _lock(file)
        except (BlockingIOError, PermissionError) as error:
            file.seek(0)
            holder = _holder(file.read(1000))
            file.close()
            raise UserError(f"{folder}: {holder} is writing here; wait until it has ended, or choose another folder.") from error
        except OSError as error:  # a file system without locks
            warnings.warn(f"{folder} cannot be locked ({error.strerror}); start no second run there.", stacklevel=2)
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), os.stat(folder / LOCK)):
                break
        file.close()  # its holder has just removed it: lock the new one
    file.truncate(0)
    now = datetime.now().isoformat(" ", "seconds")
    file.write(json.dumps({"process": os.getpid(), "host": socket.gethostname(), "since": now}).encode() + b"\n")
    file.flush()
    return file


def _lock(file: BinaryIO) -> None:
    if fcntl is not None:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return
    file.seek(BEYOND)
    msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)


def _holder(text: bytes) -> str:
    try:
        said = json.loads(text)
        return f"process {int(said['process'])} on {said['host']!a:.80}, since {said['since']!s:.19},"
    except (ValueError, LookupError, TypeError):  # it is about to say who it is
        return "another run"
