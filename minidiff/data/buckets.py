"""Images of many shapes in one training: buckets of similar aspect ratio, one size in each batch.

A model trained on images cut to squares learns cut-off heads ([1]). So each image goes to the size
nearest its own shape, among sizes of about equal area, which cost about equal memory and time.

[1] NovelAI. NovelAI Improvements on Stable Diffusion: Aspect Ratio Bucketing. 2022.
    github.com/NovelAI/novelai-aspect-ratio-bucketing
[2] Podell et al. SDXL: Improving Latent Diffusion Models for High-Resolution Image Synthesis. 2023.
    arXiv:2307.01952
"""

import math
import random
from collections.abc import Iterator
from functools import lru_cache
from itertools import count


@lru_cache
def shapes(area: int, multiple: int) -> list[tuple[int, int]]:
    """All sizes (height, width) in multiples of `multiple` that nearly fill the area.

    For each side from half to twice the square's, the other side is the longest that keeps within
    the area ([1]). Raises ValueError if nothing fits.
    """
    side = math.isqrt(area)
    if side < multiple:
        raise ValueError(f"an area of {area} has no room for a side of {multiple}")
    sizes = set()
    for first in range(multiple, 2 * side + 1, multiple):
        second = area // first // multiple * multiple
        if side <= 2 * first and side <= 2 * second <= 4 * side:
            sizes |= {(first, second), (second, first)}
    return sorted(sizes)


def bucket(width: int, height: int, area: int, multiple: int) -> tuple[int, int]:
    """The size (height, width) nearest in the logarithm of the aspect ratio, then the largest."""
    sizes, ratio = shapes(area, multiple), math.log(width / height)
    distances = {(h, w): round(abs(math.log(w / h) - ratio), 9) for h, w in sizes}
    return min(sizes, key=lambda size: (distances[size], -math.prod(size)))


def cut(width: int, height: int, size: tuple[int, int]) -> float:
    """The share of an image lost when it is scaled to cover a size (height, width) and cut."""
    ratio = (width / height) / (size[1] / size[0])
    return 1 - min(ratio, 1 / ratio)


def corner(width: int, height: int, size: tuple[int, int]) -> tuple[int, int]:
    """How much is cut off at the top and at the left of an image that is scaled to cover a size
    (height, width) and cut in the centre; in scaled pixels, as [2] section 2.2."""
    scale = max(size[0] / height, size[1] / width)
    return round((scale * height - size[0]) / 2), round((scale * width - size[1]) / 2)


def batches(sizes: list[tuple[int, int]], batch: int, seed: int, start: int) -> Iterator[list[int]]:
    """Yield batches start, start + 1, ... without end, as indices into `sizes`.

    All images of a batch have one size. Batch k follows from (sizes, batch, seed, k) alone. Each
    epoch has an order of its own and meets every image once, but repeats some to fill a batch.
    """
    members: dict[tuple[int, int], list[int]] = {}
    for i, size in enumerate(sizes):
        members.setdefault(size, []).append(i)
    per_epoch = sum(math.ceil(len(alike) / batch) for alike in members.values())
    first, skip = divmod(start, per_epoch)
    for epoch in count(first):
        plan = _plan(list(members.values()), batch, random.Random(f"{seed} {epoch}"))
        yield from plan[skip:]
        skip = 0


def _plan(members: list[list[int]], batch: int, rng: random.Random) -> list[list[int]]:
    plan = []
    for alike in members:
        order = rng.sample(alike, len(alike))
        for first in range(0, len(order), batch):
            plan.append([order[i % len(order)] for i in range(first, first + batch)])
    return rng.sample(plan, len(plan))
