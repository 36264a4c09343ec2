"""The options of a captioned folder made from COCO's files. This file imports no torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from minidiff.errors import UserError


@dataclass(frozen=True)
class CocoConfig:
    """Which images and captions to take, and what to do to the images."""

    annotations: tuple[Path, ...]  # COCO caption files, such as captions_val2017.json
    images: Path | None = None  # the folder of COCO's images; needed unless they are downloaded
    size: int = 100  # how many images to take
    # take only images of which one caption has all these words, in the singular or with an s
    contains: Sequence[str] = ()
    category: Sequence[str] = ()  # take only images that show all these; needs instances
    instances: Path | None = None  # the file that says what is where: instances_val2017.json
    crop: Literal["centre", "none"] = "none"  # centre: the middle square; none: the shape as it is
    pixels: int | None = None  # length of the shorter side to scale to. Default: as it is
    download: bool = False  # download images that are not in the folder from where COCO has them
    seed: int = 0  # determines which images are taken, and which caption is an image's text

    def __post_init__(self):
        if not self.annotations:
            raise UserError(
                "no annotations; name a COCO caption file, such as captions_val2017.json."
            )
        if self.images is None and not self.download:
            raise UserError("no images; name the folder of COCO's pictures, or set download.")
        if self.images is not None and not self.images.is_dir():
            raise UserError(f"images {self.images}: no such folder.")
        if self.category and self.instances is None:
            raise UserError("category needs instances: a file such as instances_val2017.json.")
        if self.crop not in ("centre", "none"):
            raise UserError(f'no crop "{self.crop}"; crop is centre or none.')
        for name, value in (("size", self.size), ("pixels", self.pixels)):
            if value is not None and value < 1:
                raise UserError(f"{name} is {value}; it must be at least 1.")
        if self.pixels is not None and self.pixels > 8192:
            raise UserError(f"pixels is {self.pixels}; it must be from 1 to 8192.")
        if not 0 <= self.seed < 2**63:
            raise UserError(f"seed is {self.seed}; it must be from 0 to {2**63 - 1}.")
