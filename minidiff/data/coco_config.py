"""The options of a captioned folder made from COCO's files. This file imports no torch."""

from dataclasses import dataclass
from pathlib import Path

from minidiff.errors import UserError


@dataclass(frozen=True)
class CocoConfig:
    """Which images and captions to take, and what to do to the images."""

    annotations: tuple[Path, ...]  # COCO caption files, such as captions_val2017.json
    images: Path | None = None  # the folder of COCO's images; needed unless `download` is set
    size: int = 100  # how many images to take
    contains: tuple[str, ...] = ()  # words that one caption of each image must have
    category: tuple[str, ...] = ()  # categories that each image must show; needs `instances`
    instances: Path | None = None  # COCO's objects in each image, such as instances_val2017.json
    crop: str = "none"  # "centre" takes the middle square, "none" keeps the shape
    pixels: int | None = None  # length of the shorter side to scale to; None keeps the size
    download: bool = False  # download images that are not in the folder
    seed: int = 0  # determines the images, and which caption is an image's text

    def __post_init__(self):
        if not self.annotations:
            raise UserError("no annotations; name a COCO file such as captions_val2017.json.")
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
