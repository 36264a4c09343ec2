"""What to do about a fine-tune, in one plain sentence made from its measurements: every rule and every threshold is in this file.

The rules are asked from top to bottom and the first that holds speaks. They are rules of thumb, and say the number they go by, so that
a reader can disagree. docs/flight_recorder.md has them as a table.
"""

import math
from statistics import fmean, median
from typing import NamedTuple

NOISE = 0.02  # a mean loss this near to another is as good as the same
ASTRAY, FAR = (
    1.0,
    3.0,
)  # times the distance between two seeds: a prompt nobody trains that moved so far is worth a word, or is lost
STILL = 0.1  # times the distance between two seeds: pictures that moved less look as they did
COPIED = 0.5  # share of copies among the pictures of taught prompts, if it is above that among the training pictures
CLOSE = 1 / 3  # times the floor: no two training pictures are as near to each other, as a rule


class Record(NamedTuple):
    """One measurement: a line of record.jsonl."""

    step: int
    losses: dict[str, float]  # what the trainer says
    lr: float | None
    validation: list[
        float | None
    ]  # mean loss in each tenth of progress(t), None where training never is; empty without examples
    train: list[float | None]  # the same of as many training examples
    moved: dict[
        str, float
    ]  # by label: how far its pictures are from those of the first measure; 1 is as far as another seed's
    nearest: dict[
        str, list[tuple[float, int]]
    ]  # by taught label, for each of its pictures: distance over the floor, which training picture
    copies: (
        float | None
    )  # share of those pictures that are copies; None where the training pictures have no floor
    copies_floor: float  # the same share of the training pictures among themselves; 0 where they are too few to say
    seconds_per_step: float | None  # of training, since the measure before
    seconds: float  # that this measure took
    memory_gb: (
        float | None
    )  # the most that was held: on the GPU where the model is on one; None where the system does not say


def relative(records: list[Record], which: str) -> list[float | None]:
    """The mean over the tenths of a loss ("validation" or "train") over that of the first measure, so that each tenth has the same say."""
    first = getattr(records[0], which) if records else []
    return [
        _mean(getattr(r, which), first) if first and getattr(r, which) else None for r in records
    ]


def _mean(now: list[float | None], first: list[float | None]) -> float:
    return fmean(a / b for a, b in zip(now, first, strict=True) if a is not None and b is not None)


def closeness(record: Record) -> float | None:
    """The median distance from a picture of a taught prompt to the nearest training picture, in units of the floor."""
    each = [distance for near in record.nearest.values() for distance, _ in near]
    return median(each) if each else None


def drift(record: Record) -> tuple[float, str]:
    """Of the prompts that should stay, how far the one that moved furthest did, and its label; 0 where there is none."""
    return max(
        ((moved, label) for label, moved in record.moved.items() if label.startswith("unrelated")),
        default=(0.0, ""),
    )


def advise(records: list[Record]) -> str:
    """One sentence: keep going, stop, lower the learning rate, or nothing learnt yet; and the number that says so."""
    if not records:
        return "Nothing was measured yet."
    last, step = records[-1], records[-1].step
    if bad := _not_finite(last):
        return f"Lower the learning rate to a tenth: at step {step} {bad} is not a finite number."
    if len(records) == 1:
        return f"Keep going: step {step} is the only measure yet, and what later ones are compared with."

    validation, fitted = relative(records, "validation"), relative(records, "train")[-1]
    (far, label), (early, _) = drift(last), drift(records[1])
    if fitted is not None and fitted > 1 + NOISE:
        return f"Lower the learning rate: at step {step} the loss of the training examples themselves is {fitted:.2f} times what it was at first."
    if _copies(last):
        return (
            f"Stop{_back(records)}: samples of step {step} lie {closeness(last):.2f} times as far from a training picture as those "
            f"from each other, {last.copies:.0%} of them copies; more pictures or fewer steps help."
        )
    if min(early, far) >= FAR:
        return (
            f'Lower the learning rate: "{label}", which nobody trains, had by step {records[1].step} moved {early:.1f} times as far as another '
            f"seed would take it, and by step {step} {far:.1f} times."
        )
    if rise := _rise(records, validation):
        before, now = rise
        return f"Stop{_back(records)}: the validation loss rose from {before:.2f} to {now:.2f} of what it was at first."
    stray = f'"{label}" moved {far:.1f} times as far as another seed would take it; class pictures, LoRA or a lower rate keep it in place'
    if far >= FAR:
        return f"Stop{_back(records)}: at step {step} {stray}."
    but = f"; but {stray}." if far >= ASTRAY else "."
    taught = [
        moved for name, moved in last.moved.items() if not name.startswith(("unrelated", "class"))
    ]
    if fitted is not None and fitted > 1 - NOISE and max(taught, default=0.0) < STILL:
        return (
            f"Nothing learnt yet: at step {step} the loss of the training examples is {fitted:.3f} of what it was at first; "
            "raise the learning rate, or adapt more layers."
        )
    if validation[-1] is not None and validation[-2] is not None:
        if validation[-1] < (1 - NOISE / 4) * validation[-2]:
            return f"Keep going: the validation loss still falls, from {validation[-2]:.3f} to {validation[-1]:.3f} of what it was at first{but}"
        return f"Keep going while the pictures get better: the validation loss is level at {validation[-1]:.3f} of what it was at first{but}"
    if fitted is not None:
        return (
            f"Keep going while the pictures get better: the loss of the training examples is {fitted:.2f} of what it was at first, and there "
            f"are no validation examples to say when to stop{but}"
        )
    return f"Look at the pictures of step {step}: no examples were given whose loss could say more{but}"


def _not_finite(record: Record) -> str | None:
    """The first number that is not finite, by name."""
    numbers = {
        **record.losses,
        **{f"how far {label} moved": moved for label, moved in record.moved.items()},
    }
    for which in ("validation", "train"):
        numbers |= {
            f"{which} loss in tenth {b + 1} of t": v
            for b, v in enumerate(getattr(record, which))
            if v is not None
        }
    return next((name for name, value in numbers.items() if not math.isfinite(value)), None)


def _rise(records: list[Record], validation: list[float | None]) -> tuple[float, float] | None:
    """The lowest validation loss and the last, if the last two measures both lie above the lowest by more than noise."""
    known = [value for value in validation if value is not None]
    if len(known) < 3 or min(known[-2:]) <= (1 + NOISE) * min(known):
        return None
    return min(known), known[-1]


def _copies(record: Record) -> bool:
    near = closeness(record)
    if near is None or record.copies is None:
        return False
    return near < CLOSE or (record.copies >= COPIED and record.copies > record.copies_floor)


def _strayed(record: Record) -> bool:
    return drift(record)[0] >= FAR


def best(records: list[Record]) -> int | None:
    """The step whose weights to use: of those that neither copy nor strayed that of the lowest validation loss, or else the last; if any was
    trained at all."""
    losses = relative(records, "validation")
    wrong = [bool(_not_finite(record)) or _copies(record) or _strayed(record) for record in records]
    right = [
        (-math.inf if loss is None else -loss, r.step)
        for loss, r, no in zip(losses, records, wrong, strict=True)
        if not no
    ]
    step = max(right, default=(0.0, records[0].step))[1] if records else None
    return step if records and step > records[0].step else None


def _back(records: list[Record]) -> str:
    step = best(records)
    return "" if step is None else f", and use step {step}"
