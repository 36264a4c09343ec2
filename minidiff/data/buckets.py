"""Pictures of many shapes in one training: buckets of like aspect ratio, and batches that hold one size each. All in this file.

A picture that is cut to a square loses its sides, and a model trained on such learns cut-off heads ([1]). So each picture goes to the size
nearest its own shape among those of about equal area, which cost about equal memory and time; what sticks out of that is cut away.

[1] NovelAI. NovelAI Improvements on Stable Diffusion: Aspect Ratio Bucketing. 2022. github.com/NovelAI/novelai-aspect-ratio-bucketing
"""

import math
import random
from collections.abc import Iterator
from functools import lru_cache
from itertools import count


@lru_cache
def shapes(area: int, multiple: int) -> list[tuple[int, int]]:
    """All sizes (height, width) of multiples of `multiple`: for every side from half to twice the square's, the longest other side that keeps
    within the area ([1]; a first side of the height, then of the width)."""
    side = math.isqrt(area)
    if side < multiple:
        raise ValueError(f"an area of {area} has no room for a side of {multiple}")
    found = set()
    for first in range(multiple, 2 * side + 1, multiple):
        second = area // first // multiple * multiple
        if side <= 2 * first and side <= 2 * second <= 4 * side:
            found |= {(first, second), (second, first)}
    return sorted(found)


def bucket(width: int, height: int, area: int, multiple: int) -> tuple[int, int]:
    """The (height, width) for a picture: the nearest aspect ratio by its logarithm, so that a picture and the same on its side go alike."""
    wanted = math.log(width / height)
    return min(
        shapes(area, multiple),
        key=lambda shape: (
            round(abs(math.log(shape[1] / shape[0]) - wanted), 9),
            -math.prod(shape),
        ),
    )


def cut(width: int, height: int, size: tuple[int, int]) -> float:
    """The share of a picture's pixels that is lost when it is scaled to cover a size (height, width) and the centre is cut out."""
    ratio = (width / height) / (size[1] / size[0])
    return 1 - min(ratio, 1 / ratio)


def batches(sizes: list[tuple[int, int]], batch: int, seed: int, start: int) -> Iterator[list[int]]:
    """Batches start, start + 1, ... as indices into `sizes`, endlessly; those of one batch are of one size, and batch k follows from
    (sizes, batch, seed, k) alone.

    In every epoch each picture is met once, in an order of its own. What does not fill a batch is filled up with others of the same size,
    met once more (a size of fewer pictures than a batch has meets all of them as often): so every batch costs the same.
    """
    members: dict[tuple[int, int], list[int]] = {}
    for i, size in enumerate(sizes):
        members.setdefault(size, []).append(i)
    per_epoch = sum(-(-len(alike) // batch) for alike in members.values())
    planned, plan = None, []
    for k in count(start):
        epoch, place = divmod(k, per_epoch)
        if epoch != planned:
            planned, plan = (
                epoch,
                _plan(list(members.values()), batch, random.Random(f"{seed} {epoch}")),
            )
        yield plan[place]


def _plan(members: list[list[int]], batch: int, dice: random.Random) -> list[list[int]]:
    plan = []
    for alike in members:
        order = dice.sample(alike, len(alike))
        for first in range(0, len(order), batch):
            plan.append([order[i % len(order)] for i in range(first, first + batch)])
    return dice.sample(plan, len(plan))
