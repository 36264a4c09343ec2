"""The built-in world: an endless, seeded supply of captioned images of simple things.

An image shows one or two flat-coloured things on a plain background. Every attribute is known, so
an image can be checked against its caption exactly (critic.py), and combinations of attributes can
be held out of training (split_of). x points right, y down; a thing's own unit is its radius.
"""

import hashlib
import math
import random
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from minidiff.errors import UserError

COLOURS = {
    "red": (0.87, 0.08, 0.12),
    "orange": (1.00, 0.55, 0.00),
    "yellow": (0.98, 0.90, 0.10),
    "green": (0.10, 0.62, 0.20),
    "cyan": (0.10, 0.80, 0.90),
    "blue": (0.10, 0.20, 0.88),
    "purple": (0.58, 0.12, 0.72),
    "brown": (0.48, 0.26, 0.08),
}
BACKGROUNDS = {
    "white": (0.96, 0.96, 0.96),
    "gray": (0.58, 0.58, 0.58),
    "black": (0.05, 0.05, 0.05),
    "pink": (0.98, 0.70, 0.80),
}
SIZES = ("small", "large")
SYNONYMS = {"small": ("tiny", "little"), "large": ("big", "big")}
RELATIONS = ("above", "below", "left of", "right of")
INVERSE = {"above": "below", "below": "above", "left of": "right of", "right of": "left of"}
SPLITS = ("train", "held-out")

RADIUS = {"small": (0.130, 0.145), "large": (0.205, 0.220)}  # in units of the image's side
MARGIN, GAP = 0.025, 0.07  # two large things just fit: 4 * 0.22 + 2 * MARGIN + GAP = 1
COLOUR_JITTER = 0.03  # at most, in each channel


@dataclass(frozen=True)
class Thing:
    shape: str
    colour: str
    size: str


@dataclass(frozen=True)
class Scene:
    """One or two things; of two, things[0] is `relation` things[1]."""

    things: tuple[Thing, ...]
    background: str
    relation: str | None = None


# Shapes: signed distance to the outline, negative inside. Each about fills the box [-1, 1]^2.


def circle(x: Tensor, y: Tensor) -> Tensor:
    return torch.hypot(x, y) - 1


def square(x: Tensor, y: Tensor) -> Tensor:
    return torch.maximum(x.abs(), y.abs()) - 0.9  # as high as it should look beside the others


def triangle(x: Tensor, y: Tensor) -> Tensor:
    """Equilateral, tip up: base 2, height sqrt(3)."""
    height = math.sqrt(3)
    return torch.maximum(x.abs() * height / 2 - (y + height / 2) / 2, y - height / 2)


def diamond(x: Tensor, y: Tensor) -> Tensor:
    return (x.abs() + y.abs() - 1) / math.sqrt(2)


def cross(x: Tensor, y: Tensor) -> Tensor:
    x, y = x.abs(), y.abs()
    return torch.maximum(torch.maximum(x, y) - 1, torch.minimum(x, y) - 0.34)


def ring(x: Tensor, y: Tensor) -> Tensor:
    return (torch.hypot(x, y) - 0.75).abs() - 0.25


def star(x: Tensor, y: Tensor) -> Tensor:
    """Five points, one up. Mirrors fold the plane onto half a point with one straight edge."""
    outer, inner = 1.05, 0.47
    c, s = math.cos(math.radians(36)), math.sin(math.radians(36))
    x, y = x.abs(), 0.095 - y  # centre the box, turn y up
    for nx, ny in ((c, -s), (-c, -s)):  # the two mirrors' normals
        over = 2 * (nx * x + ny * y).clamp(min=0)
        x, y = x - over * nx, y - over * ny
    along_x, along_y = inner * s, inner * c - outer  # the edge, from the tip to the notch
    return (along_x * (y - outer) - along_y * x.abs()) / math.hypot(along_x, along_y)


def heart(x: Tensor, y: Tensor) -> Tensor:
    """Two discs, and the tangents from them to the tip (lean: the angle of their normals)."""
    lean = math.radians(40)
    nx, ny = math.cos(lean), math.sin(lean)
    radius = 1 / (1 + nx)
    x, y = x.abs() - radius * nx, y + 0.415  # from the disc's centre
    return torch.where(nx * y > ny * x, nx * x + ny * y, torch.hypot(x, y)) - radius


SHAPES = {f.__name__: f for f in (circle, square, triangle, diamond, cross, ring, star, heart)}


def split_of(scene: Scene) -> str:
    """The split of this combination of attributes; a stable hash holds out about a fifth."""
    things, relation = scene.things, scene.relation
    if relation in ("below", "right of"):  # "A below B" is the same combination as "B above A"
        things, relation = things[::-1], INVERSE[relation]
    attributes = [f"{t.size} {t.colour} {t.shape}" for t in things]
    canonical = "; ".join([*attributes, str(relation), scene.background])
    return "held-out" if hashlib.sha256(canonical.encode()).digest()[0] % 5 == 0 else "train"


class World:
    """Scenes, their captions and their images of `size` pixels a side, at least 32."""

    def __init__(
        self,
        size: int = 64,
        shapes: tuple[str, ...] = tuple(SHAPES),
        colours: tuple[str, ...] = tuple(COLOURS),
        backgrounds: tuple[str, ...] = tuple(BACKGROUNDS),
    ):
        for kind, names, table in (
            ("shape", shapes, SHAPES),
            ("colour", colours, COLOURS),
            ("background", backgrounds, BACKGROUNDS),
        ):
            if not names or set(names) - set(table):
                valid, got = ", ".join(table), ", ".join(names) or "none"
                raise UserError(f"World: each {kind} must be one of {valid}; got {got}.")
        if size < 32:
            reason = "too small to tell the shapes apart; use a size of 32 or more"
            raise UserError(f"World: pictures of {size} pixels are {reason}.")
        self.size, self.shapes = size, tuple(shapes)
        self.colours, self.backgrounds = tuple(colours), tuple(backgrounds)

    def scene(
        self,
        rng: random.Random,
        objects: int | None = None,
        split: str | None = "train",
        two_objects: float = 0.5,
    ) -> Scene:
        """Draw attributes until they belong to `split` (None: any), of 1, 2 or any `objects`."""
        if split not in (None, *SPLITS):
            raise UserError(f'World: split must be "train", "held-out" or None, not "{split}".')
        if objects not in (None, 1, 2):
            raise UserError(f"World: a scene holds 1 or 2 objects, not {objects}.")
        count = objects or (2 if rng.random() < two_objects else 1)
        for _ in range(1000):
            things = tuple(
                Thing(rng.choice(self.shapes), rng.choice(self.colours), rng.choice(SIZES))
                for _ in range(count)
            )
            background = rng.choice(self.backgrounds)
            scene = Scene(things, background, rng.choice(RELATIONS) if count == 2 else None)
            distinct = len({(thing.shape, thing.colour) for thing in things}) == count
            if distinct and split in (None, split_of(scene)):
                return scene
        few = "so few shapes, colours and backgrounds; allow more of them"
        raise UserError(f"World: no {split} scene of {count} object(s) with {few}.")

    def caption(self, scene: Scene, rng: random.Random, full: bool = False) -> str:
        """Describe the scene; unless `full`, omit sizes (1 in 5) and the background (1 in 2)."""
        things, relation = scene.things, scene.relation
        if relation and rng.random() < 0.5:
            things, relation = things[::-1], INVERSE[relation]
        if relation in ("left of", "right of") and rng.random() < 0.75:
            relation = f"to the {relation}"
        alone = len(things) == 1
        text = f" {relation} ".join(_describe(thing, rng, full, alone) for thing in things)
        opening = rng.choices(("", "there is ", "a picture of ", "an image of "), (6, 2, 1, 1))[0]
        if full or rng.random() < 0.5:
            background = _article(scene.background)
            text += rng.choice((f" on {background} background", f" on {scene.background}"))
        return opening + text

    def vocabulary(self) -> set[str]:
        """Every word that a caption may have; the rarest is in one of 80."""
        rng = random.Random(0)
        captions = (self.caption(self.scene(rng, split=None), rng) for _ in range(2000))
        return {word for caption in captions for word in caption.split()}

    def draw(self, scenes: list[Scene], rng: random.Random) -> Float[Tensor, "B 3 H W"]:
        """Draw anti-aliased images in [-1, 1]; `rng` chooses exact positions, sizes and colours."""
        generator = torch.Generator().manual_seed(rng.getrandbits(63))
        # A lone thing fills both places, so that all scenes share one shape of tensors.
        things = [thing for scene in scenes for thing in (scene.things * 2)[:2]]
        lone = torch.tensor([len(scene.things) == 1 for scene in scenes])

        low, high = torch.tensor([RADIUS[thing.size] for thing in things]).view(-1, 2, 2).unbind(-1)
        radius = low + (high - low) * torch.rand(low.shape, generator=generator)
        centre = _place(scenes, radius, lone, generator)
        colour = _jitter(COLOURS, [thing.colour for thing in things], generator).view(-1, 2, 3)
        background = _jitter(BACKGROUNDS, [scene.background for scene in scenes], generator)

        coverage = self._coverage(things, lone, centre.flatten(0, 1), radius.flatten())
        inside = coverage.view(-1, 2, 1, self.size, self.size)
        image = background[:, :, None, None].expand(-1, -1, self.size, self.size)
        for k in (0, 1):
            image = torch.lerp(image, colour[:, k, :, None, None], inside[:, k])
        return image * 2 - 1

    def _coverage(
        self,
        things: list[Thing],
        lone: Bool[Tensor, "B"],
        centre: Float[Tensor, "N xy"],
        radius: Float[Tensor, "N"],
    ) -> Float[Tensor, "N H W"]:
        """The share of each pixel that a thing covers: its signed distance, clipped to +-0.5."""
        pixels = (torch.arange(self.size) + 0.5) / self.size
        inside = torch.zeros(len(things), self.size, self.size)
        absent = {2 * k + 1 for k in lone.nonzero().flatten().tolist()}
        for name, signed_distance in SHAPES.items():
            group = [k for k, thing in enumerate(things) if thing.shape == name and k not in absent]
            if group:
                scale = 1 / radius[group, None]
                x, y = ((pixels - centre[group, axis, None]) * scale for axis in (0, 1))
                distance = signed_distance(x[:, None, :], y[:, :, None])
                distance = distance * (radius[group, None, None] * self.size)
                inside[group] = (0.5 - distance).clamp(0, 1)
        return inside

    def batch(
        self,
        n: int,
        seed: object,
        objects: int | None = None,
        split: str | None = "train",
        full: bool = False,
        two_objects: float = 0.5,
    ) -> tuple[Float[Tensor, "B 3 H W"], list[str], list[Scene]]:
        """Draw n images with captions and scenes; the arguments alone determine them."""
        rng = random.Random(str(seed))
        scenes = [self.scene(rng, objects, split, two_objects) for _ in range(n)]
        captions = [self.caption(scene, rng, full) for scene in scenes]
        return self.draw(scenes, rng), captions, scenes


def _article(phrase: str) -> str:
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase


def _describe(thing: Thing, rng: random.Random, full: bool, alone: bool) -> str:
    """A phrase for a thing, such as "a tiny ring in blue"."""
    with_size = full or rng.random() < 0.8
    size = rng.choices((thing.size, *SYNONYMS[thing.size]), (8, 1, 1))[0]
    form, start = rng.random(), f"{size} " if with_size else ""
    if form < 0.10:
        return _article(f"{start}{thing.shape} in {thing.colour}")
    if form < 0.15 and alone:
        size = f"{size} and " if with_size else ""
        return _article(f"{thing.shape} that is {size}{thing.colour}")
    return _article(f"{start}{thing.colour} {thing.shape}")


def _jitter(table: dict, names: list[str], generator: torch.Generator) -> Float[Tensor, "N rgb"]:
    """Colours by name, each a little off."""
    noise = 2 * torch.rand(len(names), 3, generator=generator) - 1
    return (torch.tensor([table[name] for name in names]) + COLOUR_JITTER * noise).clamp(0, 1)


def _place(
    scenes: list[Scene],
    radius: Float[Tensor, "B 2"],
    lone: Bool[Tensor, "B"],
    generator: torch.Generator,
) -> Float[Tensor, "B 2 xy"]:
    """Centres in units of the side, farther apart along the relation than across it."""
    B = len(scenes)
    room = 1 - 2 * MARGIN - 2 * radius
    anywhere = torch.rand(B, 2, 2, generator=generator)
    alone = MARGIN + radius[..., None] + room[..., None] * anywhere
    # The room left along the relation when both things stand as close as allowed.
    spare = 1 - 2 * MARGIN - GAP - 2 * radius.sum(1)
    shares = torch.rand(B, 3, generator=generator) + 1e-6
    before, between, _ = (spare[:, None] * shares / shares.sum(1, keepdim=True)).unbind(1)
    first = MARGIN + radius[:, 0] + before
    second = first + radius.sum(1) + GAP + between
    across = alone[:, 0, 1]
    beside = across + (second - first) * 0.4 * (2 * torch.rand(B, generator=generator) - 1)
    beside = beside.clamp(MARGIN + radius[:, 1], 1 - MARGIN - radius[:, 1])
    # things[0] left of things[1]; then turned for the other relations.
    pair = torch.stack([torch.stack([first, across], 1), torch.stack([second, beside], 1)], 1)
    vertical = torch.tensor([scene.relation in ("above", "below") for scene in scenes])
    backward = torch.tensor([scene.relation in ("below", "right of") for scene in scenes])
    pair = torch.where(vertical[:, None, None], pair.flip(2), pair)
    pair = torch.where(backward[:, None, None], 1 - pair, pair)
    return torch.where(lone[:, None, None], alone, pair)
