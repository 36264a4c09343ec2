"""The options of a captioned folder made from COCO's files. This file imports no torch."""

from dataclasses import dataclass
from pathlib import Path

from minidiff.errors import UserError


@dataclass(frozen=True)
class CocoConfig:
    """Which images and captions to take, and what to do to the images.

    annotations: COCO caption files, such as captions_val2017.json.
    images: the folder of COCO's images; needed unless `download` is set.
    size: how many images to take.
    contains: words that a caption of each image must have, all in one caption.
    category: categories that each image must show; needs `instances`.
    instances: COCO's file of the objects in each image, such as instances_val2017.json.
    crop: "centre" takes the middle square, "none" keeps the shape.
    pixels: length of the shorter side to scale to; None keeps the size.
    download: download images that are not in the folder.
    seed: determines which images are taken, and which caption is an image's text.
    """

    annotations: tuple[Path, ...]
    images: Path | None = None
    size: int = 100
    contains: tuple[str, ...] = ()
    category: tuple[str, ...] = ()
    instances: Path | None = None
    crop: str = "none"
    pixels: int | None = None
    download: bool = False
    seed: int = 0

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
            raise UserError(
                "category needs instances: the COCO file that says what is where, "
                "such as instances_val2017.json."
            )
        if self.crop not in ("centre", "none"):
            raise UserError(f'no crop "{self.crop}"; crop is centre or none.')
        for name in ("size", "pixels"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} is {value}; it must be at least 1.")
