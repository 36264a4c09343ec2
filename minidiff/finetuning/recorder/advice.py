"""What to do about a fine-tune, in one sentence with the number it rests on: the first rule of
thumb that holds. docs/flight_recorder.md lists them."""

import math
from collections.abc import Iterable
from statistics import fmean, median
from typing import NamedTuple, get_type_hints

from minidiff.training.json_types import fits

NOISE = 0.02  # mean losses this close are as good as equal
# in units of the distance between two seeds: how far a prompt that nobody trains may move
ASTRAY, FAR = 1.0, 3.0  # worth a word; lost
STILL = 0.1  # images that moved less look as they did
COPIED = 0.5  # share of copies among the images of taught prompts (above that of training images)
CLOSE = 1 / 3  # times the floor: two training images are hardly ever as close to each other


class Record(NamedTuple):
    """One measurement: a line of record.jsonl."""

    step: int
    losses: dict[str, float]  # those of the training, by group
    lr: float | None
    # mean loss in each tenth of progress(t), None where training never is; empty without examples
    validation: list[float | None]
    train: list[float | None]  # the same of as many training examples
    # by label: how far its images are from those of the first measurement; 1 is as far as another
    # seed's
    moved: dict[str, float]
    # by taught label, for each image: distance over the floor, and to which training image
    nearest: dict[str, list[tuple[float, int]]]
    copies: float | None  # share of copies among these images; None without a floor
    copies_floor: float  # the same among the training images; 0 where they are too few to say
    seconds_per_step: float | None  # of training, since the measurement before
    seconds: float  # of this measurement
    memory_gb: float | None  # the most held so far; on the GPU if the model is on one


def are_whole(records: list[Record], prompts: Iterable[str], images: int) -> bool:
    """Whether records, as read back from a file, are one run's, of these prompts and so many
    training images."""
    if not records or not all(_is_whole(record, set(prompts), images) for record in records):
        return False
    steps = [record.step for record in records]
    same = {tuple(map(_missing, (record.validation, record.train))) for record in records}
    return steps == sorted(set(steps)) and len(same) == 1


def _is_whole(record: Record, prompts: set[str], images: int) -> bool:
    kinds = get_type_hints(Record).items()
    if not all(fits(getattr(record, name), kind) for name, kind in kinds):
        return False
    losses = [loss for loss in record.validation + record.train if loss is not None]
    indices = [index for near in record.nearest.values() for _, index in near]
    labels = record.moved.keys() == prompts and record.nearest.keys() <= prompts
    return labels and not any(x <= 0 for x in losses) and all(0 <= k < images for k in indices)


def _missing(losses: list[float | None]) -> tuple[bool, ...]:
    return tuple(loss is None for loss in losses)


def relative(records: list[Record], which: str) -> list[float | None]:
    """A loss ("validation" or "train") over that of the first measurement, as the mean over the
    tenths, so that each tenth weighs the same."""
    first = getattr(records[0], which) if records else []
    losses = [getattr(record, which) for record in records]
    return [_mean_ratio(now, first) if first and now else None for now in losses]


def _mean_ratio(now: list[float | None], first: list[float | None]) -> float:
    return fmean(a / b for a, b in zip(now, first, strict=True) if a is not None and b is not None)


def closeness(record: Record) -> float | None:
    """The median distance, over the floor, of images of taught prompts to training images."""
    distances = [distance for near in record.nearest.values() for distance, _ in near]
    return median(distances) if distances else None


def drift(record: Record) -> tuple[float, str]:
    """How far the prompts that should stay moved at most, and the label of that one."""
    stay = [(moved, name) for name, moved in record.moved.items() if name.startswith("unrelated")]
    return max(stay, default=(0.0, ""))


def advise(records: list[Record]) -> str:
    """One sentence: keep going, stop, lower the learning rate, or nothing learnt yet; and why."""
    if not records:
        return "Nothing was measured yet."
    last, step = records[-1], records[-1].step
    if name := _not_finite(last):
        return f"Lower the learning rate to a tenth: at step {step} {name} is not a finite number."
    if len(records) == 1:
        return f"Keep going: step {step} is the only measure yet; later ones are compared with it."

    # What went wrong.
    validation, fitted = relative(records, "validation"), relative(records, "train")[-1]
    (far, label), (early, _) = drift(last), drift(records[1])
    if fitted is not None and fitted > 1 + NOISE:
        return (
            f"Lower the learning rate: at step {step} the loss of the training examples themselves "
            f"is {fitted:.2f} times what it was at first."
        )
    if _copies(last):
        return (
            f"Stop{_back(records)}: samples of step {step} lie {closeness(last):.2f} times as far "
            f"from a training picture as those from each other, {last.copies:.0%} of them copies; "
            "more pictures or fewer steps help."
        )
    if min(early, far) >= FAR:
        return (
            f'Lower the learning rate: "{label}", which nobody trains, had by step '
            f"{records[1].step} moved {early:.1f} times as far as another seed would take it, and "
            f"by step {step} {far:.1f} times."
        )
    if rise := _rise(validation):
        return (
            f"Stop{_back(records)}: the validation loss rose from {rise[0]:.2f} to {rise[1]:.2f} "
            "of what it was at first."
        )
    stray = (
        f'"{label}" moved {far:.1f} times as far as another seed would take it; class pictures, '
        "LoRA or a lower rate keep it in place"
    )
    if far >= FAR:
        return f"Stop{_back(records)}: at step {step} {stray}."

    # What goes well, or not yet.
    but = f"; but {stray}." if far >= ASTRAY else "."
    if fitted is not None and fitted > 1 - NOISE and _taught_most(last) < STILL:
        return (
            f"Nothing learnt yet: at step {step} the loss of the training examples is {fitted:.3f} "
            "of what it was at first; raise the learning rate, or adapt more layers."
        )
    before, now = validation[-2:]
    if before is not None and now is not None:
        go_on = " while the pictures get better: the validation loss is level at"
        if now < (1 - NOISE / 4) * before:
            go_on = f": the validation loss still falls, from {before:.3f} to"
        return f"Keep going{go_on} {now:.3f} of what it was at first{but}"
    if fitted is not None:
        return (
            "Keep going while the pictures get better: the loss of the training examples is "
            f"{fitted:.2f} of what it was at first, and no validation loss says when to stop{but}"
        )
    return f"Look at the pictures of step {step}: there is no example whose loss says more{but}"


def _not_finite(record: Record) -> str | None:
    """The name of the first number that is not finite."""
    numbers = dict(record.losses)
    numbers |= {f"how far {label} moved": moved for label, moved in record.moved.items()}
    for which in ("validation", "train"):
        losses = enumerate(getattr(record, which), start=1)
        numbers |= {f"{which} loss in tenth {b} of t": loss for b, loss in losses}
    bad = (name for name, value in numbers.items() if not math.isfinite(value or 0))
    return next(bad, None)


def _taught_most(record: Record) -> float:
    """How far the taught prompts moved at most."""
    other = ("unrelated", "class")
    return max((d for name, d in record.moved.items() if not name.startswith(other)), default=0.0)


def _rise(validation: list[float | None]) -> tuple[float, float] | None:
    """The lowest validation loss and the last, if the last two are both above it by more than
    noise."""
    losses = [loss for loss in validation if loss is not None]
    if len(losses) < 3 or min(losses[-2:]) <= (1 + NOISE) * min(losses):
        return None
    return min(losses), losses[-1]


def _copies(record: Record) -> bool:
    near = closeness(record)
    if near is None or record.copies is None:
        return False
    return near < CLOSE or (record.copies >= COPIED and record.copies > record.copies_floor)


def best(records: list[Record]) -> int | None:
    """The step whose weights to use: that of the lowest validation loss among those that neither
    copy nor stray (the last where there is no such loss); None for the untrained model's."""
    right = [
        (-math.inf if loss is None else -loss, record.step)
        for loss, record in zip(relative(records, "validation"), records, strict=True)
        if not (_not_finite(record) or _copies(record) or drift(record)[0] >= FAR)
    ]
    step = max(right)[1] if right else None
    return step if right and step > records[0].step else None


def _back(records: list[Record]) -> str:
    step = best(records)
    return "" if step is None else f", and use step {step}"
