"""The options of sampling."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from minidiff.errors import UserError

SamplerName = Literal[
    "ddim",
    "ddpm",
    "euler",
    "euler_ancestral",
    "heun",
    "pndm",
    "dpmpp_2m",
    "dpmpp_2m_sde",
    "unipc",
    "lcm",
]
Spacing = Literal["trailing", "leading", "linspace", "karras", "log-snr", "ays", "shifted"]

Empty = Literal["zeros", "encoded"]
# The numbers that a network is told, by name and in order: of SDXL, and of its refiner.
SDXL = (
    "original_height", "original_width", "crop_top", "crop_left", "target_height", "target_width",
)  # fmt: skip
SDXL_REFINER = (*SDXL[:4], "aesthetic")
REFINED = 2.5  # the aesthetic score that guidance steers away from


class Size(NamedTuple):
    """Of an image, in pixels."""

    height: int
    width: int


class Corner(NamedTuple):
    """Of a part of an image, in pixels."""

    top: int
    left: int


class Interval(NamedTuple):
    """A part of the way from data (0) to noise (1)."""

    low: float
    high: float


EVERYWHERE = Interval(0.0, 1.0)


def check_size(size: int, multiple: int) -> None:
    """Raise a UserError that names the nearest valid sizes, unless this one is divisible."""
    if size > 0 and size % multiple == 0:
        return
    below = max(size, 0) // multiple * multiple
    nearest = f"sizes are {below} and {below + multiple}" if below else f"size is {multiple}"
    raise UserError(f"size {size} is not divisible by {multiple}; the nearest valid {nearest}")


@dataclass(frozen=True)
class SampleConfig:
    """How to sample. None stands for the model's own value."""

    # sampling steps; more is slower and a little better
    steps: int = 25
    # how strongly the text steers; 1 is off, 0 ignores the text. Default: the model's own
    guidance: float | None = None
    # how to step from noise to image; dpmpp_2m or unipc for few steps. Default: the model's own
    sampler: SamplerName | None = None
    # which noise levels the steps visit. Default: the model's own
    spacing: Spacing | None = None
    # side of the images in pixels, or width and height as in 768x512. Default: the training size
    size: Size | None = None
    # what the images should not show; guidance steers away from it
    negative: str = ""
    # from 0 to 1, how much of the contrast that guidance adds is taken back (0.7 for burnt images)
    rescale: float = 0.0
    # guide only in this interval, from 0 (data) to 1 (noise); a step outside it costs half
    interval: Interval = EVERYWHERE
    # everything random follows from it; the same seed gives the same bytes
    seed: int = 0
    # decode in tiles: less memory. Default: above 1024x1024
    tile: bool | None = None
    # SDXL: draw as an image that once had this size; small ones were blurred. Default: its size
    original_size: Size | None = None
    # SDXL: draw as an image of which so much was cut off at the top and left. Default: nothing
    crop: Corner | None = None
    # SDXL: draw as a part of an image of this size. Default: its size
    target_size: Size | None = None
    # SDXL: an empty prompt is zeros, or encoded as any other. Default: the model's own
    empty: Empty | None = None
    # SDXL's refiner: draw as an image of this score, from 1 to 10
    aesthetic: float = 6.0

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise UserError(f"steps is {self.steps}; it must be at least 1.")
        if self.guidance is not None and not math.isfinite(self.guidance):
            raise UserError(f"guidance is {self.guidance}; it must be finite, as in 4.")
        if not 0 <= self.rescale <= 1:
            raise UserError(f"rescale is {self.rescale:g}; it must be from 0 to 1.")
        if not 0 <= self.interval[0] <= self.interval[1] <= 1:
            low, high = self.interval
            raise UserError(
                f"interval is {low:g},{high:g}; it must be two numbers from 0 (data) to 1 (noise), "
                "the smaller one first, as in 0.8,1."
            )
        if not 0 <= self.seed < 2**63:
            raise UserError(f"seed is {self.seed}; it must be from 0 to {2**63 - 1}.")

    def numbers(self, names: Sequence[str], size: Size, is_null: bool = False) -> list[float]:
        """Those of these names that a network is told of an image of this size. is_null: of the
        prompt that guidance steers away from."""
        original, target = self.original_size or size, self.target_size or size
        crop = self.crop or (0, 0)
        sizes = dict(zip(SDXL, (*original, *crop, *target), strict=True))
        values = sizes | dict(aesthetic=REFINED if is_null else self.aesthetic)
        values |= dict(guidance=1.0 if self.guidance is None else self.guidance)  # of FLUX.1
        return [float(values[name]) for name in names]

    @property
    def of_sdxl(self) -> list[str]:
        """The options in use that SDXL alone reads."""
        names = ("original_size", "crop", "target_size", "empty")
        return [name for name in names if getattr(self, name) is not None]
