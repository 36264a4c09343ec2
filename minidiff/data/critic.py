"""The critic reads an image of simple things and says for each attribute of a caption if it holds.

Nothing here is learnt, and it shares no code with the built-in world: a model that fooled one
would not fool the other. The background is the colour of
the border. Connected regions that differ from it are things. A thing is the shape that fits it best
once position, spread and contrast are removed. Distances between colours are in RGB, 0..1.
"""

import itertools
import math
import re
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from minidiff.errors import UserError

# The critic's own tables: it shares no code with the world that it judges.
COLOURS = {"red": (0.87, 0.08, 0.12), "orange": (1.00, 0.55, 0.00), "yellow": (0.98, 0.90, 0.10)}
COLOURS |= {"green": (0.10, 0.62, 0.20), "cyan": (0.10, 0.80, 0.90), "blue": (0.10, 0.20, 0.88)}
COLOURS |= {"purple": (0.58, 0.12, 0.72), "brown": (0.48, 0.26, 0.08)}
BACKGROUNDS = {"white": (0.96, 0.96, 0.96), "gray": (0.58, 0.58, 0.58)}
BACKGROUNDS |= {"black": (0.05, 0.05, 0.05), "pink": (0.98, 0.70, 0.80)}
# Words of captions and their meanings.
SHAPES = ("circle", "square", "triangle", "diamond", "cross", "ring", "star", "heart")
WORDS = dict(zip(SHAPES, SHAPES, strict=True), disc="circle", disk="circle", plus="cross")
SIZE_WORDS = dict.fromkeys(("small", "tiny", "little"), "small")
SIZE_WORDS |= dict.fromkeys(("large", "big", "huge"), "large")
RELATION = re.compile(
    r"\b(?:(?:to|on) the )?(left of|right of|above|below|over|under|beneath)\b|\band (?=an? )"
)
GROUND = re.compile(rf"\bon (?:an? |the )?({'|'.join(BACKGROUNDS)})\b(?: background)?")
RELATION_WORDS = {"over": "above", "under": "below", "beneath": "below"}

FOREGROUND = 0.15  # a pixel closer than this to the background's colour is background
SPECK = 0.008  # a region smaller than this share of the image is dirt, not a thing
LARGE = 0.165  # a thing is large if half its box is more than this share of the side
COLOUR_REACH = 0.35  # a colour farther than this from every named colour has no name
MISFIT = 0.075  # the share of a thing's energy that its best shape may leave unexplained

GRID, REACH = 28, 2.2  # shapes are compared on GRID^2 points, out to REACH times the spread
BLURS = (0.05, 0.12, 0.2, 0.3)  # softness of the outline, in units of the spread

Polygon = list[tuple[float, float]]
Palette = dict[str, tuple[float, float, float]]


class ReadThing(NamedTuple):
    """A thing in an image; shape or colour is None if none with a name fits."""

    shape: str | None
    colour: str | None
    size: str
    x: float  # in units of the side, as are y and radius
    y: float
    radius: float  # half its box


class Reading(NamedTuple):
    """What an image shows, the largest thing first."""

    background: str | None
    things: tuple[ReadThing, ...]


class ClaimedThing(NamedTuple):
    """A thing in a caption; None is what the caption leaves open."""

    shape: str
    colour: str | None
    size: str | None


class Claim(NamedTuple):
    """What a caption says: things[0] is `relation` things[1]."""

    things: tuple[ClaimedThing, ...]
    background: str | None
    relation: str | None


# Shapes.


def polygons() -> dict[str, list[Polygon]]:
    """Outlines of the shapes, y down; a second polygon is a hole."""
    outer, hole = ([_turn(radius, angle) for angle in range(0, 360, 5)] for radius in (1, 0.5))
    quarter = [(1 / 3, -1), (1 / 3, -1 / 3), (1, -1 / 3)]
    turned = [[(x, y), (-y, x), (-x, -y), (y, -x)] for x, y in quarter]
    return {
        "circle": [outer],
        "square": [[_turn(1, angle) for angle in (45, 135, 225, 315)]],
        "triangle": [[_turn(1, angle) for angle in (0, 120, 240)]],
        "diamond": [[_turn(1, angle) for angle in (0, 90, 180, 270)]],
        "cross": [[points[k] for k in range(4) for points in turned]],
        "ring": [outer, hole],
        "star": [[_turn((1, 0.45)[k % 2], 36 * k) for k in range(10)]],
        "heart": [[_heart(math.radians(angle)) for angle in range(0, 360, 5)]],
    }


def _turn(radius: float, angle: float) -> tuple[float, float]:
    """The point at this radius, `angle` degrees clockwise from "up"."""
    return radius * math.sin(math.radians(angle)), -radius * math.cos(math.radians(angle))


def _heart(t: float) -> tuple[float, float]:
    """The textbooks' parametric curve, unlike the discs and tangents of the world."""
    y = -13 * math.cos(t) + 5 * math.cos(2 * t) + 2 * math.cos(3 * t) + math.cos(4 * t)
    return 16 * math.sin(t) ** 3, y


def _is_inside(outline: list[list[float]], x: Tensor, y: Tensor) -> Bool[Tensor, "h w"]:
    """Even-odd rule: right of a point inside, the outline is crossed an odd number of times."""
    inside = torch.zeros_like(x, dtype=torch.bool)
    for (x0, y0), (x1, y1) in itertools.pairwise([*outline, outline[0]]):
        if y0 != y1:
            inside ^= ((y0 > y) != (y1 > y)) & (x < x0 + (y - y0) * (x1 - x0) / (y1 - y0))
    return inside


@cache
def templates() -> tuple[list[str], Float[Tensor, "n"], Float[Tensor, "n points"]]:
    """Every shape at every softness, with mean 0 and spread 1: names, half-sides, coverages."""
    names, radii, coverages = [], [], []
    fine = 4 * GRID
    axis = (torch.arange(fine) + 0.5) / fine * 2 * REACH - REACH
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    for name, outlines in polygons().items():
        points = torch.tensor(outlines[0])
        box = (points.amax(0) - points.amin(0)).max() / 2
        for blur in BLURS:
            grow, middle = 1.0, torch.zeros(2)
            # Blurring widens the shape; iteration finds the scale that gives a spread of 1.
            for _ in range(6):
                sharp = torch.zeros_like(x, dtype=torch.bool)
                for outline in outlines:
                    sharp ^= _is_inside(((torch.tensor(outline) - middle) * grow).tolist(), x, y)
                soft = gaussian_blur(sharp.float()[None], blur * fine / (2 * REACH))[0]
                mean_x, mean_y, spread = moments(soft, x, y)
                middle, grow = middle + torch.stack([mean_x, mean_y]) / grow, grow / spread
            names.append(name)
            radii.append(box * grow)
            coverages.append(F.avg_pool2d(soft[None], 4).flatten())
    return names, torch.stack(radii), torch.stack(coverages)


def gaussian_blur(image: Float[Tensor, "c h w"], sigma: float) -> Float[Tensor, "c h w"]:
    """Blur with a Gaussian cut at 3 sigma; the edge is repeated outwards."""
    reach = math.ceil(3 * sigma)
    kernel = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / sigma) ** 2).to(image)
    kernel = kernel / kernel.sum()
    padded = F.pad(image[:, None], (reach,) * 4, mode="replicate")
    return F.conv2d(F.conv2d(padded, kernel.view(1, 1, 1, -1)), kernel.view(1, 1, -1, 1))[:, 0]


def moments(
    weight: Float[Tensor, "h w"], x: Float[Tensor, "h w"], y: Float[Tensor, "h w"]
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean x, mean y and spread: the root mean square distance from the mean."""
    total = weight.sum()
    mean_x, mean_y = (weight * x).sum() / total, (weight * y).sum() / total
    variance = (weight * ((x - mean_x) ** 2 + (y - mean_y) ** 2)).sum() / total
    return mean_x, mean_y, variance.clamp(min=1e-12).sqrt()


# Reading an image.


def nearest(
    colour: Float[Tensor, "*n rgb"], names: Palette
) -> tuple[Float[Tensor, "*n"], Int[Tensor, "*n"]]:
    """Distance to the closest named colour, and its index."""
    distances = torch.cdist(colour.reshape(-1, 3), torch.tensor(list(names.values())))
    return distances.view(*colour.shape[:-1], -1).min(-1)


def name_of(colour: Float[Tensor, "rgb"], names: Palette) -> str | None:
    """The name of the closest named colour, or None if it is too far."""
    distance, index = nearest(colour, names)
    return list(names)[index] if distance < COLOUR_REACH else None


def dilate(values: Float[Tensor, "h w"], reach: int = 1) -> Float[Tensor, "h w"]:
    """The maximum over a square of `reach` pixels around each pixel."""
    return F.max_pool2d(values[None], 2 * reach + 1, 1, reach)[0]


def regions(foreground: Bool[Tensor, "h w"]) -> Float[Tensor, "h w"]:
    """Give connected pixels one label, the highest of their numbers; 0 is background."""
    labels = torch.arange(1.0, foreground.numel() + 1).view_as(foreground) * foreground
    while not torch.equal(spread := dilate(labels) * foreground, labels):
        labels = spread
    return labels


def split_by_colour(
    inside: Bool[Tensor, "h w"], strong: Bool[Tensor, "h w"], smooth: Float[Tensor, "h w rgb"]
) -> list[Bool[Tensor, "h w"]]:
    """Split a region if it is two things of different colours that touch.

    Colours of two things have centres that are apart; one thing's rim and core share a centre.
    """
    core = inside & strong
    _, names = nearest(smooth, COLOURS)
    votes, both = torch.bincount(names[core], minlength=len(COLOURS)).topk(2)
    if votes[1] <= 0.2 * votes.sum():
        return [inside]
    a, b = (core & (names == name) for name in both)
    centre_a, centre_b = (part.nonzero().float().mean(0) for part in (a, b))
    if (centre_a - centre_b).norm() < 0.4 * inside.sum().sqrt():
        return [inside]
    to_a, to_b = ((smooth - smooth[part].median(0).values).norm(dim=-1) for part in (a, b))
    return [inside & (to_a < to_b), inside & ~(to_a < to_b)]


def read(image: Float[Tensor, "3 H W"]) -> Reading:
    """Read background and things from an image in [-1, 1], the largest thing first."""
    image = ((image.detach().float().cpu() + 1) / 2).permute(1, 2, 0)
    unit = max(1, round(image.shape[1] / 32))  # what is one pixel at 32 x 32
    border = torch.cat([image[0], image[-1], image[:, 0], image[:, -1]])
    background = border.median(0).values

    # Smoothed against noise; only regions and first colours are read from it.
    smooth = gaussian_blur(image.permute(2, 0, 1), 0.6).permute(1, 2, 0)
    distance = (smooth - background).norm(dim=-1)
    # However soft an outline is, it runs half-way to the strongest pixel nearby.
    peak = dilate(distance, 2 * unit)
    labels = regions((distance > FOREGROUND) & (distance > 0.5 * peak))
    sizes = zip(*labels.unique(return_counts=True), strict=True)
    whole = [labels == k for k, size in sizes if k > 0 and size >= SPECK * labels.numel()]
    strong = distance > 0.8 * peak
    inside = [part for region in whole for part in split_by_colour(region, strong, smooth)]

    territory = sum(
        (k * part.float() for k, part in enumerate(inside, 1)), torch.zeros(labels.shape)
    )
    for _ in range(2 * unit):  # each thing gets the soft edge around it
        territory = torch.where(territory > 0, territory, dilate(territory))
    things = []
    for k, part in enumerate(inside, 1):
        strongest = part & (distance >= distance[part].quantile(0.7))
        contrast = smooth[strongest].median(0).values - background
        things.append(_read_thing(image, background, contrast, territory == k))
    largest_first = sorted(things, key=lambda thing: -thing.radius)
    return Reading(name_of(background, BACKGROUNDS), tuple(largest_first))


def _read_thing(
    image: Float[Tensor, "h w rgb"],
    background: Float[Tensor, "rgb"],
    contrast: Float[Tensor, "rgb"],
    around: Bool[Tensor, "h w"],
) -> ReadThing:
    """Fit every shape to a region with its soft edge; the fit finds the factor of `contrast`."""
    coverage = (image - background) @ contrast / contrast.square().sum() * around
    y, x = ((torch.arange(length) + 0.5) / length for length in around.shape)
    mean_x, mean_y, spread = moments(coverage, *torch.meshgrid(x, y, indexing="xy"))
    at = ((torch.arange(GRID) + 0.5) / GRID * 2 - 1) * REACH * spread
    points = torch.stack(torch.broadcast_tensors(mean_x + at[None, :], mean_y + at[:, None]), -1)
    grid = points[None] * 2 - 1
    values = F.grid_sample(coverage[None, None], grid, align_corners=False).flatten()

    # Least squares: values = factor * template.
    names, radii, coverages = templates()
    factor = coverages @ values / coverages.square().sum(1)
    misfit = (values - factor[:, None] * coverages).square().sum(1) / values.square().sum()
    best = misfit.argmin()
    radius = float(radii[best] * spread)
    shape = names[best] if misfit[best] < MISFIT else None
    colour = name_of(background + factor[best] * contrast, COLOURS)
    size = "large" if radius > LARGE else "small"
    return ReadThing(shape, colour, size, float(mean_x), float(mean_y), radius)


# Reading a caption, and comparing.


def parse(caption: str) -> Claim:
    """Parse captions like "a small blue circle above a red square on a white background".

    Unknown words are skipped. Raises UserError unless each part names exactly one shape.
    """
    text = re.sub(r"\bgrey\b", "gray", caption.lower())
    ground = GROUND.search(text)
    text = GROUND.sub("", text)
    relations = [match[1] for match in RELATION.finditer(text)]
    things = []
    for part in RELATION.sub("|", text).split("|"):
        words = re.findall(r"[a-z]+", part)
        shapes = [WORDS[word] for word in words if word in WORDS]
        if len(shapes) != 1:
            problem = f'"{part.strip()}" names {len(shapes)} shapes, not one'
            raise UserError(f'caption "{caption}": {problem}; known are {", ".join(WORDS)}.')
        colour = next((word for word in words if word in COLOURS), None)
        size = next((SIZE_WORDS[word] for word in words if word in SIZE_WORDS), None)
        things.append(ClaimedThing(shapes[0], colour, size))
    relation = RELATION_WORDS.get(relations[0], relations[0]) if len(things) == 2 else None
    return Claim(tuple(things), ground[1] if ground else None, relation)


def related(a: ReadThing, b: ReadThing, relation: str) -> bool:
    """Whether a is above, below, left of or right of b, on the axis of their larger distance."""
    dx, dy = b.x - a.x, b.y - a.y
    along = {"above": dy, "below": -dy, "left of": dx, "right of": -dx}[relation]
    return along > abs(dx if relation in ("above", "below") else dy)


def compare(reading: Reading, claim: Claim) -> dict[str, bool]:
    """One verdict for each attribute that the claim states, by the best match of the things."""
    verdict = {"count": len(reading.things) == len(claim.things)}
    if claim.background:
        verdict["background"] = reading.background == claim.background
    best: dict[str, bool] = {}
    # None stands for a missing thing, which fails in every attribute.
    candidates = [*reading.things[:4], *[None] * len(claim.things)]
    for things in itertools.permutations(candidates, len(claim.things)):
        match = {
            f"{key} {k}": getattr(thing, key, None) == getattr(claimed, key)
            for k, (thing, claimed) in enumerate(zip(things, claim.things, strict=True), 1)
            for key in ("shape", "colour", "size")
            if getattr(claimed, key)
        }
        if claim.relation:
            match["relation"] = None not in things and related(*things, claim.relation)
        if not best or sum(match.values()) > sum(best.values()):
            best = match
    return verdict | best


def judge(image: Float[Tensor, "3 H W"], caption: str) -> dict[str, bool]:
    """Whether each attribute holds: "count", "background", "shape 1", ..., "relation"."""
    return compare(read(image), parse(caption))


def holds(image: Float[Tensor, "3 H W"], caption: str) -> bool:
    """Whether everything holds that the caption says."""
    return all(judge(image, caption).values())


def accuracy(images: Float[Tensor, "B 3 H W"], captions: list[str]) -> float:
    """The share of the images for which the caption holds."""
    return sum(holds(*pair) for pair in zip(images, captions, strict=True)) / len(captions)
