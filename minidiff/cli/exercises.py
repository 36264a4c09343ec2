"""The verbs of the exercises: write the stubs, and check what a learner has written."""

import time
from contextlib import closing
from pathlib import Path
from typing import Annotated

import tyro

from minidiff.cli.options import Folder
from minidiff.errors import Terminated, UserError
from minidiff.exercises import folder as learner
from minidiff.exercises.table import Exercise, exercises, named
from minidiff.exercises.worker import Worker

Asked = tyro.conf.Positional[Annotated[tuple[str, ...], tyro.conf.arg(metavar="[DIR] [NAME ...]")]]
EVERY = 0.3  # seconds between two looks at the files


def start(folder: tyro.conf.Positional[Folder]) -> None:
    """Write the exercises: a stub of each function that you will write yourself.

    A file that is there already stays as it is.
    Example: minidiff exercises start learn

    Args:
        folder: where to write them.
    """
    files = list(learner.start(folder))
    for path, is_new in files:
        print(path if is_new else f"{path} is there, and stays as it is")
    print(f"Begin with {files[0][0]}; then: minidiff exercises check {folder}")


def check(asked: Asked = (), watch: bool = False) -> None:
    """Check your solutions: the library's tests, with your functions in the place of its own.

    Exit code 0 if all that was asked is right, 1 if not, 2 on bad input.
    Example: minidiff exercises check learn q_sample

    Args:
        asked: the folder (default: this one), and the exercises, by name, number or file. Default:
            all that you have begun.
        watch: check again whenever a file is saved, until Ctrl-C.
    """
    folder, chosen = wanted(asked)
    files = {each.name: learner.file_of(folder, each) for each in exercises().values()}
    if not any(files.values()):
        raise UserError(
            f"there are no exercises in {folder}; name their folder, or write them with "
            "minidiff exercises start DIR."
        )
    lacking = next((each for each in chosen if files[each.name] is None), None)
    if lacking is not None:
        raise UserError(
            f"there is no {lacking.file} in {folder}; minidiff exercises start {folder} writes it."
        )
    with closing(Worker()) as worker:
        everything = list(exercises().values())
        present = [each for each in chosen or everything if files[each.name]]
        is_right = report(worker, folder, present)
        if watch:
            follow(worker, folder, present)
        elif not is_right:
            raise SystemExit(1)


def wanted(asked: tuple[str, ...]) -> tuple[Path, list[Exercise]]:
    """The folder and the exercises that are named; none is all of them."""
    words, folder = list(asked), Path(".")
    if words and (Path(words[0]).is_dir() or len(Path(words[0]).parts) > 1):
        first = Path(words.pop(0))
        folder = first.parent if first.suffix == ".py" else first
        words = [first.name, *words] if first.suffix == ".py" else words
        if not folder.is_dir():
            raise UserError(f'there is no folder "{folder}".')
    return folder, [named(Path(word).name) for word in words]


def report(worker: Worker, folder: Path, chosen: list[Exercise]) -> bool:
    """Check these, print what came of it, and keep it; returns whether all are right."""
    before = learner.progress(folder)
    states, todo = dict(before), []
    for exercise in chosen:
        verdict = worker.grade(exercise.name, learner.file_of(folder, exercise))
        states[exercise.name] = verdict.state
        if verdict.state == "not begun":
            todo.append(f"{exercise.number:02} {exercise.name}")
            continue
        print(f"{exercise.number:02} {exercise.name}: {verdict.state}", flush=True)
        if verdict.state == "right":
            print(*(f"   {claim}" for claim in verdict.right), sep="\n")
            continue
        print(f"   {verdict.wrong}")
        if verdict.right:
            print(f"   Right: {'; '.join(dict.fromkeys(verdict.right))}.")
        if verdict.hint:
            print(f"   Hint: {verdict.hint}")
        if before.get(exercise.name) == "right":
            print("   It was right before.")
    if todo:
        print(f"not begun: {', '.join(todo)}")
    learner.keep(folder, states)
    is_right = [name for name in exercises() if states.get(name) == "right"]
    print(f"{len(is_right)} of {len(exercises())} are right.", flush=True)
    return all(states[exercise.name] == "right" for exercise in chosen)


def follow(worker: Worker, folder: Path, chosen: list[Exercise]) -> None:
    """Check again what is saved, until Ctrl-C."""
    print("Waiting for a file to be saved; Ctrl-C ends it.", flush=True)
    saved = times(folder, chosen)
    try:
        while True:
            time.sleep(EVERY)
            now = times(folder, chosen)
            again = [
                each for each in chosen if now.get(each.name, 0) not in (0, saved.get(each.name))
            ]
            saved |= now
            if again:
                print(flush=True)
                report(worker, folder, again)
    except Terminated:
        raise
    except KeyboardInterrupt:
        print()  # it ends a watch as it should


def times(folder: Path, chosen: list[Exercise]) -> dict[str, int]:
    """When each file was saved; an editor may have taken one away for a moment."""
    files = {each.name: learner.file_of(folder, each) for each in chosen}
    return {name: path.stat().st_mtime_ns for name, path in files.items() if path is not None}
