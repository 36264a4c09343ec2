"""A learner's folder: their files, which are never written over, and their progress."""

import json
from collections.abc import Iterator
from pathlib import Path

from minidiff.errors import UserError
from minidiff.exercises.table import Exercise, exercises
from minidiff.training import atomic

PROGRESS = "progress.json"


def file_of(folder: Path, exercise: Exercise) -> Path | None:
    """The learner's file, whatever its number: another version may have counted otherwise."""
    same = sorted(folder.glob(f"[0-9][0-9]_{exercise.name}.py"))
    return same[0] if same else None


def start(folder: Path) -> Iterator[tuple[Path, bool]]:
    """Write the stubs that are missing; yields every file, and whether it is new."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; name a folder.")
    for exercise in exercises().values():
        there = file_of(folder, exercise)
        if there is None:
            with atomic.write(folder / exercise.file, stranger=Path) as new:
                new.write_text(exercise.stub(), encoding="utf-8")
        yield there or folder / exercise.file, there is None


def progress(folder: Path) -> dict[str, str]:
    """The last state of each exercise that was checked."""
    path = folder / PROGRESS
    atomic.check(path, atomic.unsigned)
    if not path.exists():
        return {}
    try:
        states = json.loads(path.read_text(encoding="utf-8"))["exercises"]
        return {str(name): str(state) for name, state in states.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} cannot be read ({error}); remove it, and check again.") from error


def keep(folder: Path, states: dict[str, str]) -> None:
    """Write the progress."""
    content = {"note": f"{atomic.SIGNATURE} exercises check", "exercises": states}
    with atomic.write(folder / PROGRESS, atomic.unsigned) as new:
        new.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
