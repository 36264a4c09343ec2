"""What is right and what is wrong with a learner's function.

The function is called with the arguments of cases.py, and so is the library's; the results are
compared number by number. A result that equals that of a typical mistake gets the hint that names
it. When all numbers are right, the function takes the place of the library's, and the checks of
checks.py, which are the library's own tests, run with it.
"""

import inspect
import re
import traceback
import types
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from minidiff.exercises import cases, checks
from minidiff.exercises.source import Function, in_place, original
from minidiff.exercises.table import Exercise

State = Literal["right", "wrong", "not begun"]
# relative to the largest number: algebra in another order, in float64 and float32
TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-5}
ROUNDED = 1e-5  # what agrees to this, but not better, was rounded to float32 on the way
ROUGH = (
    "The numbers agree to five digits and not to eight: something on the way is float32, as what "
    "torch.arange, torch.linspace and torch.tensor make. Compute in float64, and round last."
)


@dataclass(frozen=True)
class Verdict:
    """What the grader says of one exercise."""

    name: str
    state: State
    right: list[str] = field(default_factory=list)  # what holds
    wrong: str = ""  # what does not
    hint: str = ""


class Outcome(NamedTuple):
    """What came of one call."""

    result: dict[str, object]  # the tensors in it by name, as result[0] or result.x0
    error: BaseException | None = None
    changed: str = ""  # the place of an argument that the call has changed, as [1]


def leaves(value: object, path: str = "") -> Iterator[tuple[str, object]]:
    """Every tensor or number in nested tuples, lists and dicts, and where it is."""
    if hasattr(value, "_fields"):
        value = {f".{name}": each for name, each in value._asdict().items()}
    elif isinstance(value, tuple | list):
        value = {f"[{k}]": each for k, each in enumerate(value)}
    elif isinstance(value, dict):
        value = {f'["{key}"]': each for key, each in value.items()}
    else:
        yield path, value
        return
    for part, each in value.items():
        yield from leaves(each, f"{path}{part}")


def arguments(exercise: Exercise) -> list[cases.Case]:
    """The calls of an exercise, the same each time."""
    torch.manual_seed(0)
    return getattr(cases, exercise.name)()


def outcomes(function: Function, exercise: Exercise) -> list[Outcome]:
    """Call the function with the arguments of every case."""
    pairs = zip(arguments(exercise), arguments(exercise), strict=True)
    return [called(function, *pair) for pair in pairs]


def called(function: Function, case: cases.Case, untouched: cases.Case) -> Outcome:
    """What comes of one call; untouched: the same case once more, to see what it changes."""
    torch.manual_seed(0)
    try:
        result = function(*case.args)
    except (Exception, SystemExit) as error:  # whatever a learner's function may raise
        return Outcome({}, error)
    if case.read:
        return Outcome(dict(leaves(case.read(case.args))))
    before = dict(leaves(untouched.args))
    changed = [path for path, value in leaves(case.args) if not _same(value, before[path])]
    return Outcome(dict(leaves(result)), changed=changed[0] if changed else "")


def _same(a: object, b: object) -> bool:
    return not isinstance(a, Tensor) or torch.equal(a.nan_to_num(), b.nan_to_num())


def close(actual: object, expected: object, tolerance: float | None = None) -> Tensor:
    """Where two tensors or numbers of one shape agree, number by number."""
    a, b = (torch.as_tensor(each).detach().double() for each in (actual, expected))
    if tolerance is None:
        tolerance = TOLERANCE.get(getattr(expected, "dtype", torch.float64), 0.0)
    largest = b.nan_to_num(posinf=0, neginf=0).abs().max() if b.numel() else 0.0
    return ((a - b).abs() <= tolerance * (b.abs() + largest * 1e-3)) | (a == b)


def complaint(actual: object, expected: object) -> str:
    """What is wrong with the kind, shape or dtype of a result."""
    if not isinstance(expected, Tensor):
        wanted = "None" if expected is None else f"a {type(expected).__name__}"
        return "" if type(actual) is type(expected) else f"is {kind(actual)}; right is {wanted}"
    if not isinstance(actual, Tensor):
        return f"is {kind(actual)}; right is a tensor of shape {tuple(expected.shape)}"
    if actual.shape != expected.shape:
        return f"has the shape {tuple(actual.shape)}; right is {tuple(expected.shape)}"
    if actual.dtype != expected.dtype:
        return f"is {actual.dtype}; right is {expected.dtype}"
    return ""


def kind(value: object) -> str:
    return "None" if value is None else f"a {type(value).__name__}"


def agree(a: Outcome, b: Outcome, tolerance: float | None = None) -> bool:
    """Whether two calls came to the same."""
    if a.error or b.error:
        return type(a.error) is type(b.error) and str(a.error) == str(b.error)
    return a.result.keys() == b.result.keys() and all(
        not complaint(value, b.result[path]) and _all_close(value, b.result[path], tolerance)
        for path, value in a.result.items()
    )


def _all_close(a: object, b: object, tolerance: float | None) -> bool:
    return a is b or bool(close(a, b, tolerance).all())


def recognised(exercise: Exercise, found: list[Outcome], expected: list[Outcome]) -> str:
    """The hints of the one or two typical mistakes that give these results; "" for none."""
    if all(agree(a, b, ROUNDED) for a, b in zip(found, expected, strict=True)):
        return ROUGH
    for count in (1, 2):
        for mistakes in combinations(exercise.mistakes, count):
            wrong = exercise.edited(*mistakes)
            if wrong and all(map(agree, found, outcomes(wrong, exercise))):
                return " And: ".join(mistake.hint for mistake in mistakes)
    return ""


def grade(exercise: Exercise, path: Path) -> Verdict:
    """Load a learner's file, and say what is right and what is wrong with its function."""
    torch.set_default_dtype(torch.float32)  # another learner's file may have chosen
    try:
        function = load(path, exercise.name)
        if function is None:
            wrong = f"there is no function {exercise.name} in {path.name}."
            return Verdict(exercise.name, "wrong", wrong=wrong, hint="Keep the stub's name.")
        return judged(exercise, function, path)
    except (Exception, SystemExit) as error:  # whatever a learner's file may raise
        return Verdict(exercise.name, "wrong", wrong=raised(error, path))


def load(path: Path, name: str) -> Function | None:
    """The function of this name in a file of Python."""
    module = types.ModuleType(name)
    module.__file__ = str(path)
    exec(compile(path.read_bytes(), str(path), "exec"), vars(module))
    function = vars(module).get(name)
    return function if callable(function) else None


def raised(error: BaseException, path: Path) -> str:
    """An exception, with the line of the learner's file."""
    message = f"{type(error).__name__}: {error}".splitlines()[0]
    if isinstance(error, SystemExit):
        message = f"it ended the process: {message}"
    if isinstance(error, SyntaxError) and error.filename == str(path):
        return f"{path.name}, line {error.lineno}: {type(error).__name__}: {error.msg}"
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == str(path)]
    return f"{path.name}, line {lines[-1]}: {message}" if lines else message


def judged(exercise: Exercise, function: Function, path: Path) -> Verdict:
    """The verdict on a function."""
    found, expected = outcomes(function, exercise), outcomes(original(exercise.place), exercise)
    if any(isinstance(each.error, NotImplementedError) for each in found):
        return Verdict(exercise.name, "not begun")
    right: list[str] = []
    for number, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        wrong = raised(ours.error, path) if ours.error else ""
        wrong = wrong or first_wrong(exercise, ours, theirs, number, right)
        if wrong:
            hint = recognised(exercise, found, expected) or exercise.hint
            return Verdict(exercise.name, "wrong", right, wrong, hint)
        if ours.changed:
            names = list(inspect.signature(original(exercise.place)).parameters)
            argument = names[int(re.findall(r"\d+", ours.changed)[0])]
            wrong = f"{argument} is changed in place; the caller still needs it."
            hint = "Operators with = and methods that end in _ change a tensor; make a new one."
            return Verdict(exercise.name, "wrong", [*right, "every number"], wrong, hint)
    values = (value for each in expected for value in each.result.values() if value is not None)
    count = sum(torch.as_tensor(value).numel() for value in values)
    return tested(exercise, function, path, [f"{count:,} number{'s' * (count > 1)}"])


def tested(exercise: Exercise, function: Function, path: Path, right: list[str]) -> Verdict:
    """The verdict of the library's tests on a function whose numbers are right."""
    for name in exercise.checks:
        check = getattr(checks, name)
        claim = " ".join(inspect.getdoc(check).split())
        torch.manual_seed(0)
        try:
            with in_place(exercise.place, function):
                check()
        except AssertionError:
            wrong = f"this does not hold: {claim}"
            return Verdict(exercise.name, "wrong", right, wrong, exercise.hint)
        except Exception as error:
            wrong = f"{raised(error, path)} (while this was checked: {claim})"
            return Verdict(exercise.name, "wrong", right, wrong, exercise.hint)
        right = [*right, claim]
    return Verdict(exercise.name, "right", right)


def first_wrong(
    exercise: Exercise, ours: Outcome, theirs: Outcome, number: int, right: list[str]
) -> str:
    """The first thing that is wrong with a result; what is right before is added to `right`."""
    if ours.result.keys() != theirs.result.keys():
        parts = ", ".join(named(exercise, path) for path in theirs.result)
        if list(ours.result) == [""]:
            return f"the result is {kind(ours.result[''])}; right is one of {parts}."
        extra = ", ".join(named(exercise, path) for path in ours.result) or "nothing"
        return f"the result is one of {extra}; right is {parts}."
    for path, value in ours.result.items():
        name, expected = named(exercise, path), theirs.result[path]
        if text := complaint(value, expected):
            return f"{name} {text}."
        if expected is None:
            continue
        good = close(value, expected)
        if good.all():
            right.append(f"all of {name}")
            continue
        right.append(f"the shape and dtype of {name}")
        if good.any():
            right.append(f"{int(good.sum()):,} of {good.numel():,} numbers of {name}")
        place = tuple(torch.nonzero(~good)[0].tolist())
        wrong = f"{name}{list(place) if place else ''} is {digits(value, place)}; "
        wrong += f"right is {digits(expected, place)}"
        given = inputs(exercise, number, tuple(good.shape), place)
        return f"{wrong}, for {given}." if given else f"{wrong}."
    return ""


def named(exercise: Exercise, path: str) -> str:
    """A part of the result in the words of the exercise."""
    for k, name in enumerate(exercise.results):
        if path == f"[{k}]" or path.startswith((f"[{k}].", f"[{k}][")):
            return name + path.removeprefix(f"[{k}]")
    return f"result{path}"


def digits(value: object, place: tuple[int, ...] = ()) -> str:
    number = torch.as_tensor(value)[place].item()
    return f"{number:.9g}" if isinstance(number, float) else str(number)


def inputs(exercise: Exercise, number: int, shape: tuple[int, ...], place: tuple[int, ...]) -> str:
    """The arguments of a case at the place of a number of its result."""
    args = arguments(exercise)[number].args
    names = inspect.signature(original(exercise.place)).parameters
    parts = []
    for name, value in zip(names, args, strict=False):
        if isinstance(value, Tensor) and value.shape == shape and place:
            parts.append(f"{name}{list(place)} = {digits(value, place)}")
        elif isinstance(value, Tensor) and value.ndim == 1 and shape[:1] == value.shape:
            parts.append(f"{name}[{place[0]}] = {digits(value, place[:1])}")
        elif isinstance(value, int | float | str) or (isinstance(value, Tensor) and not value.ndim):
            parts.append(f"{name} = {value if isinstance(value, str) else digits(value)}")
        elif name == "self" and hasattr(value, "__dataclass_fields__"):
            own = (f"self.{key} = {each}" for key, each in vars(value).items())
            parts += [text for text in own if text.rpartition(" ")[2].replace(".", "").isdigit()]
    return ", ".join(parts)
