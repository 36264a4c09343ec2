"""The built-in world: an endless, seeded supply of captioned pictures of simple things is drawn, described and split all in this file.

A picture shows one or two flat-coloured things on a plain background. Every attribute is known, so a picture can be checked
against its caption exactly (critic.py), and whole combinations of attributes can be kept away from training (split_of).
Pixel coordinates: x to the right, y down; lengths in a thing's own frame are in units of its radius.
"""

import hashlib
import math
import random
from dataclasses import dataclass

import torch
from jaxtyping import Float
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

RADIUS = {"small": (0.130, 0.145), "large": (0.205, 0.220)}  # in units of the picture's side
MARGIN, GAP = (
    0.025,
    0.07,
)  # to the picture's edge and between two things: 4 * 0.22 + 2 * MARGIN + GAP = 1, so two large ones just fit
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


# Shapes: signed distance to the outline, negative inside. Each fills the box [-1, 1]^2 or nearly so.


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
    """Five points, one up: mirrors fold the plane onto half a point, whose outline is one straight edge."""
    outer, inner = 1.05, 0.47
    c, s = math.cos(math.radians(36)), math.sin(math.radians(36))
    x, y = x.abs(), 0.095 - y  # centre the box, turn y up
    for nx, ny in ((c, -s), (-c, -s)):  # the two mirrors' normals
        over = 2 * (nx * x + ny * y).clamp(min=0)
        x, y = x - over * nx, y - over * ny
    along_x, along_y = inner * s, inner * c - outer  # the edge, from the tip to the notch
    return (along_x * (y - outer) - along_y * x.abs()) / math.hypot(along_x, along_y)


def heart(x: Tensor, y: Tensor) -> Tensor:
    """Two discs and the tangents from them to the tip; `lean` is the angle of the tangents' normals."""
    lean = math.radians(40)
    nx, ny = math.cos(lean), math.sin(lean)
    radius = 1 / (1 + nx)
    x, y = x.abs() - radius * nx, y + 0.415  # from the disc's centre
    return torch.where(nx * y > ny * x, nx * x + ny * y, torch.hypot(x, y)) - radius


SHAPES = {f.__name__: f for f in (circle, square, triangle, diamond, cross, ring, star, heart)}


def split_of(scene: Scene) -> str:
    """The one split that this whole combination of attributes belongs to: about a fifth is held out, chosen by a stable hash."""
    things, relation = scene.things, scene.relation
    if relation in ("below", "right of"):  # "A below B" is the same combination as "B above A"
        things, relation = things[::-1], INVERSE[relation]
    canonical = "; ".join(
        [f"{t.size} {t.colour} {t.shape}" for t in things] + [str(relation), scene.background]
    )
    return "held-out" if hashlib.sha256(canonical.encode()).digest()[0] % 5 == 0 else "train"


class World:
    """Scenes, their captions and their pictures. A world can know only some of the shapes, colours and backgrounds."""

    def __init__(
        self,
        size: int = 64,
        shapes=tuple(SHAPES),
        colours=tuple(COLOURS),
        backgrounds=tuple(BACKGROUNDS),
    ):
        for what, names, known in (
            ("shape", shapes, SHAPES),
            ("colour", colours, COLOURS),
            ("background", backgrounds, BACKGROUNDS),
        ):
            if not names or set(names) - set(known):
                raise UserError(
                    f"World: each {what} must be one of {', '.join(known)}; got {', '.join(names) or 'none'}."
                )
        if size < 32:
            raise UserError(
                f"World: pictures of {size} pixels are too small to tell the shapes apart; use a size of 32 or more."
            )
        self.size, self.shapes, self.colours, self.backgrounds = (
            size,
            tuple(shapes),
            tuple(colours),
            tuple(backgrounds),
        )

    def scene(
        self,
        rng: random.Random,
        objects: int | None = None,
        split: str | None = "train",
        two_objects: float = 0.5,
    ) -> Scene:
        """Draw attributes until they belong to `split` (None: any); `objects` None: two with probability `two_objects`, else one."""
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
            scene = Scene(
                things, rng.choice(self.backgrounds), rng.choice(RELATIONS) if count == 2 else None
            )
            told_apart = len({(t.shape, t.colour) for t in things}) == count
            if told_apart and split in (None, split_of(scene)):
                return scene
        raise UserError(
            f"World: no {split} scene of {count} object(s) with so few shapes, colours and backgrounds; allow more of them."
        )

    def caption(self, scene: Scene, rng: random.Random, full: bool = False) -> str:
        """Say what is to be seen. Sizes (1 in 5) and the background (1 in 2) may go unsaid, unless `full`."""

        def article(phrase):
            return ("an " if phrase[0] in "aeiou" else "a ") + phrase

        def describe(thing):
            said = full or rng.random() < 0.8
            size = rng.choices((thing.size, *SYNONYMS[thing.size]), (8, 1, 1))[0]
            form = rng.random()
            if form < 0.10:
                return article(
                    f"{size} {thing.shape} in {thing.colour}"
                    if said
                    else f"{thing.shape} in {thing.colour}"
                )
            if form < 0.15 and len(scene.things) == 1:
                return article(
                    f"{thing.shape} that is {size} and {thing.colour}"
                    if said
                    else f"{thing.shape} that is {thing.colour}"
                )
            return article(
                f"{size} {thing.colour} {thing.shape}" if said else f"{thing.colour} {thing.shape}"
            )

        things, relation = scene.things, scene.relation
        if relation and rng.random() < 0.5:
            things, relation = things[::-1], INVERSE[relation]
        if relation in ("left of", "right of") and rng.random() < 0.75:
            relation = f"to the {relation}"
        text = f" {relation} ".join(describe(thing) for thing in things)
        text = (
            rng.choices(("", "there is ", "a picture of ", "an image of "), (6, 2, 1, 1))[0] + text
        )
        if full or rng.random() < 0.5:
            text += rng.choice(
                (f" on {article(scene.background)} background", f" on {scene.background}")
            )
        return text

    def draw(self, scenes: list[Scene], rng: random.Random) -> Float[Tensor, "B 3 H W"]:
        """Anti-aliased pictures in [-1, 1]; `rng` chooses the positions, the exact sizes and the exact colours."""
        generator = torch.Generator().manual_seed(rng.getrandbits(63))

        def uniform(*shape):
            return torch.rand(shape, generator=generator)

        def jittered(table, names):
            return (
                torch.tensor([table[name] for name in names])
                + COLOUR_JITTER * (2 * uniform(len(names), 3) - 1)
            ).clamp(0, 1)

        things = [
            thing for scene in scenes for thing in (scene.things * 2)[:2]
        ]  # a lone thing fills both places: one shape for all tensors
        lone = torch.tensor([len(scene.things) == 1 for scene in scenes])

        low, high = torch.tensor([RADIUS[thing.size] for thing in things]).view(-1, 2, 2).unbind(-1)
        radius = low + (high - low) * uniform(*low.shape)
        centre = self._place(scenes, radius, lone, uniform)
        colour = jittered(COLOURS, [thing.colour for thing in things]).view(-1, 2, 3)
        background = jittered(BACKGROUNDS, [scene.background for scene in scenes])

        pixels = (torch.arange(self.size) + 0.5) / self.size
        inside = self._coverage(things, lone, centre.flatten(0, 1), radius.flatten(), pixels).view(
            -1, 2, 1, self.size, self.size
        )
        picture = background[:, :, None, None].expand(-1, -1, self.size, self.size)
        for k in (0, 1):
            picture = torch.lerp(picture, colour[:, k, :, None, None], inside[:, k])
        return picture * 2 - 1

    def _place(
        self, scenes, radius: Float[Tensor, "B 2"], lone, uniform
    ) -> Float[Tensor, "B 2 xy"]:
        """Centres, in units of the side: clear of the edge, clear of each other, and clearly more apart along the relation than across it."""
        B = len(scenes)
        room = 1 - 2 * MARGIN - 2 * radius
        alone = (
            MARGIN + radius[..., None] + room[..., None] * uniform(B, 2, 2)
        )  # each anywhere by itself
        spare = (
            1 - 2 * MARGIN - GAP - 2 * radius.sum(1)
        )  # what is left along the relation when both stand as close as allowed
        shares = uniform(B, 3) + 1e-6
        before, between, _ = (spare[:, None] * shares / shares.sum(1, keepdim=True)).unbind(1)
        first = MARGIN + radius[:, 0] + before
        second = first + radius.sum(1) + GAP + between
        across = alone[:, 0, 1]
        beside = across + (second - first) * 0.4 * (2 * uniform(B) - 1)
        beside = torch.minimum(
            torch.maximum(beside, MARGIN + radius[:, 1]), 1 - MARGIN - radius[:, 1]
        )
        pair = torch.stack(
            [torch.stack([first, across], 1), torch.stack([second, beside], 1)], 1
        )  # things[0] left of things[1]
        vertical = torch.tensor([scene.relation in ("above", "below") for scene in scenes])
        backward = torch.tensor([scene.relation in ("below", "right of") for scene in scenes])
        pair = torch.where(vertical[:, None, None], pair.flip(2), pair)
        pair = torch.where(
            backward[:, None, None], 1 - pair, pair
        )  # turned about the middle of the picture
        return torch.where(lone[:, None, None], alone, pair)

    def _coverage(self, things, lone, centre, radius, pixels) -> Float[Tensor, "N H W"]:
        """How much of every pixel each thing covers: the signed distance in pixels, clipped to half a pixel either side."""
        inside = torch.zeros(len(things), self.size, self.size)
        absent = {2 * k + 1 for k in lone.nonzero().flatten().tolist()}
        for name in SHAPES:
            group = [k for k, thing in enumerate(things) if thing.shape == name and k not in absent]
            if group:
                scale = 1 / radius[group, None]
                x, y = ((pixels - centre[group, axis, None]) * scale for axis in (0, 1))
                distance = SHAPES[name](x[:, None, :], y[:, :, None]) * (
                    radius[group, None, None] * self.size
                )
                inside[group] = (0.5 - distance).clamp(0, 1)
        return inside

    def batch(
        self,
        n: int,
        seed,
        objects: int | None = None,
        split: str | None = "train",
        full: bool = False,
        two_objects: float = 0.5,
    ) -> tuple[Float[Tensor, "B 3 H W"], list[str], list[Scene]]:
        """`n` pictures, captions and scenes: a pure function of the arguments, so that no data need ever be stored."""
        rng = random.Random(str(seed))
        scenes = [self.scene(rng, objects, split, two_objects) for _ in range(n)]
        captions = [self.caption(scene, rng, full) for scene in scenes]
        return self.draw(scenes, rng), captions, scenes
