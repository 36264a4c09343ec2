"""Learners' code runs in a process of its own: an endless loop, a crash or an exit ends that alone.

No torch here: the process imports it.
"""

import multiprocessing
import signal
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING

from minidiff.exercises.table import exercises

if TYPE_CHECKING:
    from minidiff.exercises.grade import Verdict

SECONDS = 20.0  # for one exercise; the library's own functions take less than two
START = 300.0  # to import torch, on a slow disk


class Worker:
    """Grades exercises, one after the other. After a time-out or a crash the next one gets a new
    process."""

    def __init__(self, seconds: float = SECONDS):
        self.seconds, self.process = seconds, None

    def grade(self, name: str, path: Path) -> "Verdict":
        """The verdict on a learner's file."""
        self._start()
        self.connection.send((name, path))
        try:
            if self.connection.poll(self.seconds):
                return self.connection.recv()
            wrong = f"it runs for more than {self.seconds:g} seconds, and was stopped."
            return self._failed(name, wrong, "Is there a loop that does not end?")
        except (EOFError, ConnectionError):
            self.process.join(1)
            wrong = f"it ended the whole process (exit code {self.process.exitcode})."
            return self._failed(name, wrong, "Return a value; do not exit.")

    def _start(self) -> None:
        if self.process is not None:
            return
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()
        if not self.connection.poll(START):
            raise TimeoutError(f"the grader did not start within {START:g} seconds")
        self.connection.recv()

    def _failed(self, name: str, wrong: str, hint: str) -> "Verdict":
        from minidiff.exercises.grade import Verdict

        self.close()
        return Verdict(name, "wrong", wrong=wrong, hint=hint)

    def close(self) -> None:
        """End the process."""
        if self.process is not None:
            self.process.kill()
            self.process.join()
            self.connection.close()
            self.process = None


def serve(connection: Connection) -> None:
    """The process: grade what is asked for until nobody asks any more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the other process's to handle
    import torch

    from minidiff.exercises.grade import grade

    torch.set_num_threads(1)
    connection.send("ready")
    while True:
        try:
            name, path = connection.recv()
        except EOFError:
            return
        verdict = grade(exercises()[name], path)
        print(end="", flush=True)  # what the learner prints stands before it
        connection.send(verdict)
