"""The exercises, from exercises.toml, and a stub for each. No torch here."""

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from minidiff.errors import choice
from minidiff.exercises import source

STUB = '''"""Exercise {exercise.number}: {exercise.title}.

{text}

The checks put your function in the place of {path} in {where}:

    minidiff exercises check {exercise.file}
{references}"""

{imports}


{header}
    raise NotImplementedError
'''


class Mistake(NamedTuple):
    """A typical wrong solution: the library's function with one piece of its text replaced."""

    old: str
    new: str
    hint: str  # names the mistake, and not the answer


@dataclass(frozen=True)
class Exercise:
    """One function of the library for the learner to write."""

    number: int
    name: str
    place: str  # of the function, see source.py
    title: str
    text: str  # of the exercise, in the stub
    hint: str  # for a mistake that is not typical
    checks: Sequence[str]  # functions of checks.py
    mistakes: Sequence[Mistake]
    tools: Sequence[str] = ()  # names that the stub imports beside those of its signature
    results: Sequence[str] = ()  # names of the parts of the result
    signature: str = ""  # the place whose signature and docstring the stub takes; "" is its own

    @property
    def file(self) -> str:
        return f"{self.number:02}_{self.name}.py"

    def edited(self, *mistakes: Mistake) -> source.Function | None:
        """The library's function with these mistakes; None where they exclude each other."""
        return source.edited(self.place, [(mistake.old, mistake.new) for mistake in mistakes])

    def stub(self) -> str:
        """The file in which the learner writes the function."""
        module, _, path = self.place.partition(":")
        home = self.signature or self.place
        header = source.header(home, self.name)
        text = self.text.strip("\n")
        references = source.references(self.place, text + header)
        return STUB.format(
            exercise=self,
            text=text,
            references=references and f"\n{references}\n",
            path=path,
            where=f"minidiff/{module.replace('.', '/')}.py",
            imports=source.imports(home, header, self.tools),
            header=header,
        )


@lru_cache(maxsize=1)
def exercises() -> dict[str, Exercise]:
    """Every exercise by name, in order."""
    text = Path(__file__).with_name("exercises.toml").read_text(encoding="utf-8")
    rows = tomllib.loads(text)["exercise"]
    for row in rows:
        row["mistakes"] = [Mistake(*mistake) for mistake in row["mistakes"]]
    return {row["name"]: Exercise(number, **row) for number, row in enumerate(rows, 1)}


def named(name: str) -> Exercise:
    """The exercise of this name, or of this number, or of a file's name."""
    word = name.removesuffix(".py")
    by_number = {f"{each.number:02}": key for key, each in exercises().items()}
    start, _, rest = word.partition("_")
    word = rest if start.isdigit() and rest else by_number.get(word.zfill(2), word)
    choice("exercise", word, exercises())
    return exercises()[word]
