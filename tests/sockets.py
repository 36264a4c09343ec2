"""Nothing but loopback and Unix sockets: a test that asks for another address fails, and names it,
whatever the code makes of the refusal. Python's child processes are covered too."""

import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "offline"
sys.path.insert(0, str(FOLDER))
sys.modules.pop("sitecustomize", None)  # the system's own
import sitecustomize  # noqa: E402

os.environ["PYTHONPATH"] = f"{FOLDER}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
handle, os.environ[sitecustomize.FILE] = tempfile.mkstemp(prefix="minidiff-sockets-")
os.close(handle)


def attempts() -> list[str]:
    """What was asked for since the last call."""
    file = Path(os.environ[sitecustomize.FILE])
    lines = file.read_text(encoding="utf-8").splitlines() if file.stat().st_size else []
    if lines:
        file.write_text("", encoding="utf-8")
    return lines


@pytest.fixture(autouse=True)
def offline() -> Iterator[None]:
    yield
    lines = attempts()
    assert not lines, f"only loopback and Unix sockets are allowed in the tests, not {lines}"


def pytest_unconfigure() -> None:
    Path(os.environ[sitecustomize.FILE]).unlink(missing_ok=True)
