"""What to do about a fine-tune, in one plain sentence made from its measurements: every rule and every threshold is in this file.

The rules are asked from top to bottom and the first that holds speaks. They are rules of thumb, and say the number they go by, so that
a reader can disagree. docs/flight_recorder.md has them as a table.
"""
import math
from statistics import fmean, median
from typing import NamedTuple

NOISE = 0.02  # a mean loss this near to another is as good as the same
FAR = 3.0  # times the distance between two seeds: what a prompt nobody trains should not move
STILL = 0.1  # times the distance between two seeds: pictures that moved less look as they did
COPIED = 0.5  # share of copies among the pictures of taught prompts
CLOSE = 1 / 3  # times the floor: no two training pictures are as near to each other, as a rule


class Record(NamedTuple):
    """One measurement: a line of record.jsonl."""

    step: int
    losses: dict[str, float]  # what the trainer says
    lr: float | None
    validation: list[float | None]  # mean loss in each tenth of progress(t), None where training never is; empty without examples
    train: list[float | None]  # the same of as many training examples
    moved: dict[str, float]  # by label: how far its pictures are from those of the first measure; 1 is as far as another seed's
    nearest: dict[str, list[tuple[float, int]]]  # by taught label, for each of its pictures: distance over the floor, which training picture
    copies: float | None  # share of those pictures that are copies
    seconds_per_step: float | None  # of training, since the measure before
    seconds: float  # that this measure took
    memory_gb: float  # the most that was held: on the GPU where the model is on one


def relative(records: list[Record], which: str) -> list[float | None]:
    """The mean over the tenths of a loss ("validation" or "train") over that of the first measure, so that each tenth has the same say."""
    first = getattr(records[0], which) if records else []
    return [_mean(getattr(r, which), first) if first and getattr(r, which) else None for r in records]


def _mean(now: list[float | None], first: list[float | None]) -> float:
    return fmean(a / b for a, b in zip(now, first, strict=True) if a is not None and b is not None)


def closeness(record: Record) -> float | None:
    """The median distance from a picture of a taught prompt to the nearest training picture, in units of the floor."""
    each = [distance for near in record.nearest.values() for distance, _ in near]
    return median(each) if each else None


def drift(record: Record) -> tuple[float, str] | None:
    """Of the prompts that should stay, the one that moved furthest."""
    return max(((moved, label) for label, moved in record.moved.items() if label.startswith("unrelated")), default=None)


def advise(records: list[Record]) -> str:
    """One sentence: keep going, stop, lower the learning rate, or nothing learnt yet; and the number that says so."""
    if not records:
        return "Nothing was measured yet."
    last, step = records[-1], records[-1].step
    numbers = {**last.losses, **{f"moved of {k}": v for k, v in last.moved.items()}}
    numbers |= {f"{which}, tenth {b} of t": v for which in ("validation", "train") for b, v in enumerate(getattr(last, which)) if v is not None}
    if bad := [name for name, value in numbers.items() if not math.isfinite(value)]:
        return f"Lower the learning rate to a tenth: at step {step} {bad[0]} is not a finite number."
    if len(records) == 1:
        return f"Keep going: step {step} is the only measure yet, and what later ones are compared with."

    validation, train = relative(records, "validation"), relative(records, "train")
    fitted, afar, early = train[-1], drift(last), drift(records[1])
    if fitted is not None and fitted > 1 + NOISE:
        return f"Lower the learning rate: at step {step} the loss of the training examples themselves is {fitted:.2f} times what it was at first."
    if early and afar and early[0] >= FAR and afar[0] >= FAR:
        return (
            f'Lower the learning rate: by step {records[1].step} already, "{early[1]}" had moved {early[0]:.1f} times as far as another seed '
            f"would take it (now {afar[0]:.1f}); nobody trains it."
        )
    if last.copies is not None and last.copies >= COPIED:
        return f"Stop{_back(records, _copied)}: at step {step} {last.copies:.0%} of the samples are copies of a training picture."
    if (near := closeness(last)) is not None and near < CLOSE:
        return f"Stop{_back(records, _copied)}: at step {step} samples lie {near:.2f} times as far from a training picture as those from each other."
    if None not in validation:
        best = min(range(len(records)), key=validation.__getitem__)
        rises = [value > (1 + NOISE) * validation[best] for value in validation[-2:]]
        if best < len(records) - 2 and all(rises):
            return (
                f"Stop, and use step {records[best].step}: the validation loss has risen since, from {validation[best]:.2f} to "
                f"{validation[-1]:.2f} of what it was at first."
            )
    if afar and afar[0] >= FAR:
        return (
            f'Stop{_back(records, _strayed)}, or keep the rest in place (class pictures, LoRA): at step {step} "{afar[1]}" has moved '
            f"{afar[0]:.1f} times as far as another seed would take it."
        )
    taught = [moved for label, moved in last.moved.items() if not label.startswith(("unrelated", "class"))]
    if fitted is not None and fitted > 1 - NOISE and max(taught, default=0.0) < STILL:
        return (
            f"Nothing learnt yet: at step {step} the loss of the training examples is {fitted:.3f} of what it was at first; "
            "raise the learning rate, or adapt more layers."
        )
    if None not in validation:
        if validation[-1] < (1 - NOISE / 4) * validation[-2]:
            return f"Keep going: the validation loss still falls, from {validation[-2]:.3f} to {validation[-1]:.3f} of what it was at first."
        return (
            f"Keep going while the pictures get better: the validation loss is level at {validation[-1]:.3f} of what it was at first, "
            f"lowest at step {records[best].step} ({validation[best]:.3f})."
        )
    if fitted is not None:
        return (
            f"Keep going while the pictures get better: the loss of the training examples is {fitted:.2f} of what it was at first, "
            "and no validation examples were given that could say when to stop."
        )
    return f"Look at the pictures of step {step}: no examples were given whose loss could say more."


def _copied(record: Record) -> bool:
    near = closeness(record)
    return (record.copies is not None and record.copies >= COPIED) or (near is not None and near < CLOSE)


def _strayed(record: Record) -> bool:
    return (drift(record) or (0.0, ""))[0] >= FAR


def _back(records: list[Record], wrong) -> str:
    """Which step to go back to: the last one before it went wrong for good."""
    right = [record.step for record in records if not wrong(record)]
    return f", and use step {right[-1]}" if len(right) > 1 or (right and right[-1] > records[0].step) else ""
