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
BEYOND = 2**20  # Windows cannot read a locked byte, so the locked one is beyond the text


@contextmanager
def locked(folder: Path | None) -> Iterator[None]:
    """Lock a folder, or raise a UserError that says which process holds the lock.

    The folder is made, and removed again if it is left empty. None locks nothing.
    """
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
            with file:
                holder = _holder(file)
            remedy = "wait until it has ended, or choose another folder"
            raise UserError(f"{folder}: {holder} is writing here; {remedy}.") from error
        except OSError as error:  # a file system without locks
            reason = f"cannot be locked ({error.strerror})"
            warnings.warn(f"{folder} {reason}; start no second run there.", stacklevel=2)
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), os.stat(folder / LOCK)):
                break
        file.close()  # its holder has just removed it: lock the new one
    file.truncate(0)
    now = datetime.now().isoformat(" ", "seconds")
    holder = {"process": os.getpid(), "host": socket.gethostname(), "since": now}
    file.write(json.dumps(holder).encode() + b"\n")
    file.flush()
    return file


def tell(folder: Path, status: dict[str, object]) -> None:
    """Say how the run in a locked folder is doing, in the second line of its lock file; what was
    told before is replaced, and all of it goes with the lock."""
    with suppress(OSError):  # it is there to be looked at: no run ends for it
        with open(folder / LOCK, "r+b") as file:
            file.readline()
            file.truncate(file.tell())
            file.write(json.dumps(status).encode() + b"\n")


def told(folder: Path) -> tuple[dict, dict]:
    """Who holds a folder's lock, and what that process told last; empty where there is nothing, or
    it is half written. Takes no lock."""
    lines = []
    with suppress(OSError, ValueError, RecursionError):
        for line in (folder / LOCK).read_bytes().splitlines()[:2]:
            lines.append(json.loads(line))
    holder, status = (line if isinstance(line, dict) else {} for line in [*lines, {}, {}][:2])
    return holder, status


def is_held(holder: dict) -> bool:
    """Whether the process that a lock file names is there; of another machine nobody can tell."""
    if not holder or fcntl is None or holder.get("host") != socket.gethostname():
        return bool(holder)
    with suppress(ProcessLookupError, OverflowError, TypeError):
        with suppress(PermissionError):  # another user's
            os.kill(holder.get("process"), 0)
        return True
    return False


def _lock(file: BinaryIO) -> None:
    if fcntl is not None:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    else:
        file.seek(BEYOND)
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)


def _holder(file: BinaryIO) -> str:
    file.seek(0)
    try:
        holder = json.loads(file.readline(1000))
        number, host, since = int(holder["process"]), holder["host"], holder["since"]
        return f"process {number} on {host!a:.80}, since {since!s:.19},"
    except (ValueError, LookupError, TypeError):  # it is about to say who it is
        return "another run"
