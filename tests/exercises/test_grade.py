"""The grader: the library's own code passes every exercise, and each typical mistake is named."""

import ast
import textwrap

import pytest

from minidiff.exercises import source
from minidiff.exercises.grade import grade, judged
from minidiff.exercises.table import exercises

EXERCISES = list(exercises().values())
MISTAKES = [
    pytest.param(exercise, mistake, id=f"{exercise.name}-{k}")
    for exercise in EXERCISES
    for k, mistake in enumerate(exercise.mistakes)
]


def solved(exercise):
    """The stub with the library's own code in it, whose names come from the module of the place."""
    _, _, node, text = source.source(exercise.place)
    if isinstance(node, ast.Lambda):
        body = f"return {ast.unparse(node.body)}"
    else:
        function = ast.parse(text).body[0]
        first = function.body[bool(ast.get_docstring(function))]
        body = textwrap.dedent("\n".join(text.splitlines()[first.lineno - 1 :]))
    names = f"from minidiff.{exercise.place.partition(':')[0]} import *\n"
    names = f"import minidiff.{exercise.place.partition(':')[0]} as home\nglobals().update(vars(home))\n"
    stub = exercise.stub()
    assert stub.count("    raise NotImplementedError\n") == 1
    return names + stub.replace(
        "    raise NotImplementedError\n", textwrap.indent(body, "    ") + "\n"
    )


@pytest.mark.parametrize("exercise", EXERCISES, ids=lambda exercise: exercise.name)
def test_the_stub_is_not_begun_and_the_librarys_own_code_is_right(exercise, tmp_path):
    path = tmp_path / exercise.file
    path.write_text(exercise.stub())
    assert grade(exercise, path).state == "not begun"
    path.write_text(solved(exercise))
    verdict = grade(exercise, path)
    assert (verdict.state, verdict.wrong) == ("right", "")
    assert len(verdict.right) == 1 + len(exercise.checks)


@pytest.mark.parametrize("exercise, mistake", MISTAKES)
def test_a_typical_mistake_gets_the_hint_that_names_it(exercise, mistake, tmp_path):
    verdict = judged(exercise, exercise.edited(mistake), tmp_path)
    assert verdict.state == "wrong" and verdict.hint == mistake.hint
    assert verdict.wrong and exercise.hint != mistake.hint
