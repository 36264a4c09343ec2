"""The critic: reads a picture of simple things and says, attribute by attribute, whether a caption holds. It is all in this file.

Nothing here is learnt, and nothing is shared with the code that draws the built-in world: a model that fooled one would not fool the other.
A picture is read in three steps: the background is the colour of the border; connected regions that differ from it are things; and a
thing is the shape whose outline fits it best once position, spread and contrast are taken out. Distances between colours are in RGB 0..1.
"""

import itertools
import math
import re
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from minidiff.errors import UserError

COLOURS = {
    "red": (0.87, 0.08, 0.12), "orange": (1.00, 0.55, 0.00), "yellow": (0.98, 0.90, 0.10), "green": (0.10, 0.62, 0.20),
    "cyan": (0.10, 0.80, 0.90), "blue": (0.10, 0.20, 0.88), "purple": (0.58, 0.12, 0.72), "brown": (0.48, 0.26, 0.08),
}  # fmt: skip
BACKGROUNDS = {
    "white": (0.96, 0.96, 0.96),
    "gray": (0.58, 0.58, 0.58),
    "black": (0.05, 0.05, 0.05),
    "pink": (0.98, 0.70, 0.80),
}
WORDS = {
    word: word
    for word in ("circle", "square", "triangle", "diamond", "cross", "ring", "star", "heart")
}
WORDS |= {
    "disc": "circle",
    "disk": "circle",
    "plus": "cross",
}  # what a caption may say, and what it means
SIZE_WORDS = {
    "small": "small",
    "tiny": "small",
    "little": "small",
    "large": "large",
    "big": "large",
    "huge": "large",
}
RELATION = re.compile(
    r"\b(?:(?:to|on) the )?(left of|right of|above|below|over|under|beneath)\b|\band (?=an? )"
)
GROUND = re.compile(rf"\bon (?:an? |the )?({'|'.join(BACKGROUNDS)})\b(?: background)?")
RELATION_WORDS = {"over": "above", "under": "below", "beneath": "below"}

FOREGROUND = 0.15  # a pixel closer than this to the background's colour is background
SPECK = 0.008  # a region smaller than this share of the picture is dirt, not a thing
LARGE = 0.165  # a thing whose box is wider or higher than twice this share of the side is large
COLOUR_REACH = 0.35  # a colour farther than this from every named colour has no name
MISFIT = 0.075  # the share of a thing's energy that its best shape may leave unexplained

GRID, REACH = (
    28,
    2.2,
)  # a thing is compared with the shapes on GRID x GRID points, out to REACH times its spread
BLURS = (
    0.05,
    0.12,
    0.2,
    0.3,
)  # softness of the outline, in units of the spread: small pictures and blurred ones are soft


@dataclass(frozen=True)
class Seen:
    """A thing in a picture; `shape` or `colour` is None if it is like none that has a name. `radius` is half its box; all in units of the side."""

    shape: str | None
    colour: str | None
    size: str
    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class Reading:
    background: str | None
    things: tuple[Seen, ...]


@dataclass(frozen=True)
class Said:
    """A thing in a caption; None is what it leaves open."""

    shape: str
    colour: str | None
    size: str | None


@dataclass(frozen=True)
class Claim:
    """What a caption says: things[0] is `relation` things[1]."""

    things: tuple[Said, ...]
    background: str | None
    relation: str | None


# Shapes


def polygons() -> dict[str, list[list[tuple[float, float]]]]:
    """Outlines as polygons, y down; a second polygon is a hole."""

    def turn(radius, angle):  # degrees clockwise from "up"
        return radius * math.sin(math.radians(angle)), -radius * math.cos(math.radians(angle))

    def valentine(
        angle,
    ):  # the parametric curve of the textbooks, unlike the discs and tangents of the world
        t = math.radians(angle)
        return 16 * math.sin(t) ** 3, -13 * math.cos(t) + 5 * math.cos(2 * t) + 2 * math.cos(
            3 * t
        ) + math.cos(4 * t)

    outer, hole = ([turn(radius, angle) for angle in range(0, 360, 5)] for radius in (1, 0.5))
    quarter = [(1 / 3, -1), (1 / 3, -1 / 3), (1, -1 / 3)]
    turned = [[(x, y), (-y, x), (-x, -y), (y, -x)] for x, y in quarter]
    return {
        "circle": [outer],
        "square": [[turn(1, angle) for angle in (45, 135, 225, 315)]],
        "triangle": [[turn(1, angle) for angle in (0, 120, 240)]],
        "diamond": [[turn(1, angle) for angle in (0, 90, 180, 270)]],
        "cross": [[points[k] for k in range(4) for points in turned]],
        "ring": [outer, hole],
        "star": [[turn((1, 0.45)[k % 2], 36 * k) for k in range(10)]],
        "heart": [[valentine(angle) for angle in range(0, 360, 5)]],
    }


def crosses(outline, x: Tensor, y: Tensor) -> Bool[Tensor, "h w"]:
    """Even-odd rule: a point is inside if a ray to its right crosses the outline an odd number of times."""
    inside = torch.zeros_like(x, dtype=torch.bool)
    for (x0, y0), (x1, y1) in itertools.pairwise([*outline, outline[0]]):
        if y0 != y1:
            inside ^= ((y0 > y) != (y1 > y)) & (x < x0 + (y - y0) * (x1 - x0) / (y1 - y0))
    return inside


@cache
def templates() -> tuple[list[str], Float[Tensor, "n"], Float[Tensor, "n points"]]:
    """Every shape at every softness, brought to mean 0 and spread 1: names, half the box, and the coverage of the grid's points."""
    names, radii, pictures = [], [], []
    fine = 4 * GRID
    y, x = torch.meshgrid(
        *[(torch.arange(fine) + 0.5) / fine * 2 * REACH - REACH] * 2, indexing="ij"
    )
    for name, outlines in polygons().items():
        points = torch.tensor(outlines[0])
        box = (points.amax(0) - points.amin(0)).max() / 2
        for blur in BLURS:
            grow, middle = 1.0, torch.zeros(2)
            for _ in range(
                6
            ):  # blurring widens the shape, so the scale that ends with a spread of 1 is found by repetition
                sharp = torch.zeros_like(x, dtype=torch.bool)
                for outline in outlines:
                    sharp ^= crosses(((torch.tensor(outline) - middle) * grow).tolist(), x, y)
                soft = gaussian_blur(sharp.float()[None], blur * fine / (2 * REACH))[0]
                mean_x, mean_y, spread = moments(soft, x, y)
                middle, grow = middle + torch.stack([mean_x, mean_y]) / grow, grow / spread
            names.append(name)
            radii.append(box * grow)
            pictures.append(F.avg_pool2d(soft[None], 4).flatten())
    return names, torch.stack(radii), torch.stack(pictures)


def gaussian_blur(picture: Float[Tensor, "c h w"], sigma: float) -> Float[Tensor, "c h w"]:
    reach = math.ceil(3 * sigma)
    kernel = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / sigma) ** 2).to(picture)
    kernel = kernel / kernel.sum()
    picture = F.pad(picture[:, None], (reach,) * 4, mode="replicate")
    return F.conv2d(F.conv2d(picture, kernel.view(1, 1, 1, -1)), kernel.view(1, 1, -1, 1))[:, 0]


def moments(
    weight: Float[Tensor, "h w"], x: Float[Tensor, "h w"], y: Float[Tensor, "h w"]
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean x, mean y and spread (root mean square distance from the mean); contrast does not matter to them."""
    total = weight.sum()
    mean_x, mean_y = (weight * x).sum() / total, (weight * y).sum() / total
    return (
        mean_x,
        mean_y,
        ((weight * ((x - mean_x) ** 2 + (y - mean_y) ** 2)).sum() / total).clamp(min=1e-12).sqrt(),
    )


# Reading a picture


def nearest(
    colour: Float[Tensor, "*n rgb"], names: dict[str, tuple[float, float, float]]
) -> tuple[Float[Tensor, "*n"], Int[Tensor, "*n"]]:
    """Distance to, and place of, the closest named colour."""
    return (
        torch.cdist(colour.reshape(-1, 3), torch.tensor(list(names.values())))
        .view(*colour.shape[:-1], -1)
        .min(-1)
    )


def name_of(
    colour: Float[Tensor, "rgb"], names: dict[str, tuple[float, float, float]]
) -> str | None:
    distance, place = nearest(colour, names)
    return list(names)[place] if distance < COLOUR_REACH else None


def dilate(picture: Float[Tensor, "h w"], reach: int = 1) -> Float[Tensor, "h w"]:
    return F.max_pool2d(picture[None], 2 * reach + 1, 1, reach)[0]


def regions(foreground: Bool[Tensor, "h w"]) -> Float[Tensor, "h w"]:
    """Label connected pixels alike: each starts with a number of its own, and the highest spreads until nothing changes."""
    labels = torch.arange(1.0, foreground.numel() + 1).view_as(foreground) * foreground
    while not torch.equal(spread := dilate(labels) * foreground, labels):
        labels = spread
    return labels


def split_by_colour(
    inside: Bool[Tensor, "h w"], strong: Bool[Tensor, "h w"], smooth: Float[Tensor, "h w rgb"]
) -> list[Bool[Tensor, "h w"]]:
    """Things of two colours that touch are two things: their colours sit apart, while the rim and the core of one thing share a centre."""
    core = inside & strong
    _, names = nearest(smooth, COLOURS)
    counts = torch.bincount(names[core], minlength=len(COLOURS))
    votes, both = counts.topk(2)
    if votes[1] <= 0.2 * votes.sum():
        return [inside]
    a, b = (core & (names == name) for name in both)
    if (
        a.nonzero().float().mean(0) - b.nonzero().float().mean(0)
    ).norm() < 0.4 * inside.sum().sqrt():
        return [inside]
    closer = (smooth - smooth[a].median(0).values).norm(dim=-1) < (
        smooth - smooth[b].median(0).values
    ).norm(dim=-1)
    return [inside & closer, inside & ~closer]


def read(image: Float[Tensor, "3 H W"]) -> Reading:
    """Background and things of a picture in [-1, 1], largest thing first."""
    image = ((image.detach().float().cpu() + 1) / 2).permute(1, 2, 0)
    height, width, _ = image.shape
    unit = max(1, round(width / 32))  # what is one pixel at 32 x 32
    border = torch.cat([image[0], image[-1], image[:, 0], image[:, -1]])
    background = border.median(0).values

    smooth = gaussian_blur(image.permute(2, 0, 1), 0.6).permute(
        1, 2, 0
    )  # against noise; only regions and first colours are read from it
    distance = (smooth - background).norm(dim=-1)
    peak = dilate(
        distance, 2 * unit
    )  # half-way to the strongest pixel nearby is where an outline runs, however soft it is
    labels, counts = regions((distance > FOREGROUND) & (distance > 0.5 * peak)).unique(
        return_inverse=True, return_counts=True
    )[1:]
    whole = [labels == k for k in range(1, len(counts)) if counts[k] >= SPECK * labels.numel()]
    inside = [
        part for region in whole for part in split_by_colour(region, distance > 0.8 * peak, smooth)
    ]

    territory = sum(
        (k * part.float() for k, part in enumerate(inside, 1)), start=torch.zeros(height, width)
    )
    for _ in range(2 * unit):  # each thing keeps the soft edge around it
        territory = torch.where(territory > 0, territory, dilate(territory))
    things = [
        read_thing(image, background, smooth, distance, part, territory == k)
        for k, part in enumerate(inside, 1)
    ]
    return Reading(
        name_of(background, BACKGROUNDS), tuple(sorted(things, key=lambda thing: -thing.radius))
    )


def read_thing(
    image, background, smooth, distance, inside: Bool[Tensor, "h w"], around: Bool[Tensor, "h w"]
) -> Seen:
    """Fit every shape to one region and its soft edge."""
    height, width, _ = image.shape
    strongest = inside & (distance >= distance[inside].quantile(0.7))
    contrast = smooth[strongest].median(0).values - background
    coverage = (
        (image - background) @ contrast / contrast.square().sum() * around
    )  # up to a factor, which the fit below finds

    y, x = torch.meshgrid(
        (torch.arange(height) + 0.5) / height, (torch.arange(width) + 0.5) / width, indexing="ij"
    )
    mean_x, mean_y, spread = moments(coverage, x, y)
    at = ((torch.arange(GRID) + 0.5) / GRID * 2 - 1) * REACH * spread
    points = (
        torch.stack(torch.broadcast_tensors(mean_x + at[None, :], mean_y + at[:, None]), -1) * 2 - 1
    )
    found = F.grid_sample(coverage[None, None], points[None], align_corners=False).flatten()

    names, radii, pictures = templates()
    factor = pictures @ found / pictures.square().sum(1)  # least squares: found = factor * picture
    misfit = (found - factor[:, None] * pictures).square().sum(1) / found.square().sum()
    best = misfit.argmin()
    radius = float(radii[best] * spread)
    shape = names[best] if misfit[best] < MISFIT else None
    colour = name_of(background + factor[best] * contrast, COLOURS)
    return Seen(
        shape, colour, "large" if radius > LARGE else "small", float(mean_x), float(mean_y), radius
    )


# Reading a caption, and comparing


def parse(caption: str) -> Claim:
    """Understand captions like "a small blue circle above a large red square on a white background"; words that are not known are passed over."""
    text = re.sub(r"\bgrey\b", "gray", caption.lower())
    ground = GROUND.search(text)
    text = GROUND.sub("", text)
    relations = [match[1] for match in RELATION.finditer(text)]
    things = []
    for part in RELATION.sub("|", text).split("|"):
        words = re.findall(r"[a-z]+", part)
        shapes = [WORDS[word] for word in words if word in WORDS]
        if len(shapes) != 1:
            raise UserError(
                f'caption "{caption}": "{part.strip()}" names {len(shapes)} shapes, not one; known are {", ".join(WORDS)}.'
            )
        colours, sizes = (
            [word for word in words if word in COLOURS],
            [SIZE_WORDS[word] for word in words if word in SIZE_WORDS],
        )
        things.append(Said(shapes[0], colours[0] if colours else None, sizes[0] if sizes else None))
    relation = RELATION_WORDS.get(relations[0], relations[0]) if len(things) == 2 else None
    return Claim(tuple(things), ground[1] if ground else None, relation)


def related(a: Seen, b: Seen, relation: str) -> bool:
    """Is a above, below, left of or right of b, along the axis on which they are farther apart?"""
    dx, dy = b.x - a.x, b.y - a.y
    return {
        "above": dy > abs(dx),
        "below": -dy > abs(dx),
        "left of": dx > abs(dy),
        "right of": -dx > abs(dy),
    }[relation]


def compare(reading: Reading, claim: Claim) -> dict[str, bool]:
    """One verdict for each attribute the claim states (the count it always does), with the things matched in the way that suits it best."""
    verdict = {"count": len(reading.things) == len(claim.things)}
    if claim.background:
        verdict["background"] = reading.background == claim.background
    best: dict[str, bool] = {}
    candidates = [
        *reading.things[:4],
        *[None] * len(claim.things),
    ]  # None: a thing that is missing fails in every attribute
    for seen in itertools.permutations(candidates, len(claim.things)):
        match = {}
        for k, (thing, said) in enumerate(zip(seen, claim.things, strict=True), 1):
            stated = {"shape": said.shape, "colour": said.colour, "size": said.size}
            match |= {
                f"{key} {k}": getattr(thing, key, None) == value
                for key, value in stated.items()
                if value
            }
        if claim.relation:
            match["relation"] = None not in seen and related(*seen, claim.relation)
        if not best or sum(match.values()) > sum(best.values()):
            best = match
    return verdict | best


def judge(image: Float[Tensor, "3 H W"], caption: str) -> dict[str, bool]:
    """For each attribute the caption states, "count", "background", "shape 1", "colour 1", "size 1", "shape 2", ..., "relation": does it hold?"""
    return compare(read(image), parse(caption))


def holds(image: Float[Tensor, "3 H W"], caption: str) -> bool:
    """Does everything hold that the caption says?"""
    return all(judge(image, caption).values())


def accuracy(images: Float[Tensor, "B 3 H W"], captions: list[str]) -> float:
    """The share of the pictures that are as their captions say."""
    return sum(
        holds(image, caption) for image, caption in zip(images, captions, strict=True)
    ) / len(captions)
