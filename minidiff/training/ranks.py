"""Which of several processes this is, as torchrun says in the environment; alone, the first of one.

The first process (rank 0) writes the output; the others compute. No torch here.
"""

import os
from pathlib import Path


def size() -> int:
    """How many processes train together."""
    return int(os.environ["WORLD_SIZE"]) if "TORCHELASTIC_RUN_ID" in os.environ else 1


def rank() -> int:
    return int(os.environ["RANK"]) if size() > 1 else 0


def is_main() -> bool:
    return rank() == 0


def begin(folder: Path) -> None:
    """Note that a run writes its checkpoints here, for begun() after a restart."""
    if (notes := _notes()) is not None and not begun(folder):
        with open(notes, "a", encoding="utf-8") as file:
            file.write(f"{folder.resolve()}\n")


def begun(folder: Path) -> bool:
    """Whether torchrun has restarted the processes, and a run here or below is of those before: it
    goes on where they stopped. An earlier run, of another command, does not go on by itself."""
    notes = _notes()
    if notes is None or not notes.exists():
        return False
    noted = map(Path, notes.read_text(encoding="utf-8").splitlines())
    return any(other.is_relative_to(folder.resolve()) for other in noted)


def _notes() -> Path | None:
    """A file in the folder that torchrun keeps for the reports of its workers' errors, which are at
    RUN/attempt_K/RANK/error.json; None without torchrun."""
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE") if is_main() else None
    return Path(error_file).parents[2] / "minidiff" if error_file else None
