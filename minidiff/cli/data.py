"""The verbs that make and check folders of captioned images."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from minidiff.cli import options
from minidiff.cli.options import Folder
from minidiff.errors import UserError

Files = Annotated[tuple[Path, ...], tyro.conf.arg(metavar="FILE ...")]
Words = Annotated[str, tyro.conf.arg(metavar="WORD,WORD")]


@dataclass(frozen=True)
class Selection:
    """Which images to take, and their shape."""

    # how many images to take
    size: int = 100
    # take only images of which one caption has all these words, in the singular or with an s
    contains: Words = ""
    # take only images that show all these, as in bowl,apple; needs --instances
    category: Words = ""
    # the COCO file that says what is where, such as instances_val2017.json
    instances: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    # centre cuts out the middle square, none leaves the shape as it is
    crop: Literal["centre", "none"] = "none"
    # length of the shorter side to scale to. Default: images keep their size
    pixels: int | None = None
    # which images are taken, and which of its captions is an image's text, follow from it
    seed: int = 0

    def __post_init__(self) -> None:
        options.check_least("size", self.size)
        options.check_least("pixels", self.pixels)
        options.check_seed(self.seed)


ALL = Selection()


def coco(
    annotations: Files,
    images: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None,
    selection: Selection = ALL,
    download: bool = False,
    out: Path = Path("out/coco"),
) -> None:
    """A captioned folder out of COCO's images and annotation files.

    Example: minidiff data coco --annotations captions_val2017.json --images val2017 --size 100

    Args:
        annotations: COCO caption files, such as captions_val2017.json.
        images: the folder of images. Not needed with --download.
        download: fetch images that are not in the folder from where COCO has them.
        out: the captioned folder to write; it must not be there yet.
    """
    options.check_out(out)
    from minidiff.data import coco
    from minidiff.data.coco_config import CocoConfig

    coco.check_new(out)
    config = CocoConfig(
        annotations=annotations,
        images=images,
        size=selection.size,
        contains=tuple(options.words(selection.contains)),
        category=tuple(options.words(selection.category)),
        instances=selection.instances,
        crop=selection.crop,
        pixels=selection.pixels,
        download=download,
        seed=selection.seed,
    )
    record = coco.write(coco.read(config), out)
    print(out / "metadata.jsonl", out / "selection.json", coco.summary(record), sep="\n")


def check(
    folder: tyro.conf.Positional[Folder],
    layout: Literal["captions", "classes", "pictures"] = "captions",
    caption_column: str = "text",
    size: int = 512,
    seed: int = 0,
    out: Path = Path("out/check"),
) -> None:
    """The data doctor: everything that is wrong with a folder of images, before you train on it.

    Exit code 0 if it can be trained on, whatever the warnings; 2 if not.
    Example: minidiff data check coco100 --size 256

    Args:
        folder: the folder to check.
        layout: captions (metadata.jsonl has a line for each image), classes (a folder for each), or
            pictures (no captions).
        caption_column: where metadata.jsonl has the captions.
        size: the side in pixels that you will train at.
        seed: which images the sheet shows, if there are many.
        out: folder for report.json and contact.png.
    """
    options.check_out(out, "report.json", "contact.png")
    options.check_seed(seed)
    if out.resolve().is_relative_to(folder.resolve()):
        raise UserError(
            f"--out {out} lies in the folder that is checked, and would become part of the data; "
            "name another folder."
        )
    from minidiff.data.doctor import examine as doctor
    from minidiff.figures.contact import contact_sheet

    report = doctor.examine(folder, layout, caption_column, size)
    paths = [doctor.write(report, out), *contact_sheet(report.data, out / "contact.png", seed)]
    text = "\n".join([doctor.as_text(report), *map(str, paths)])
    encoding = sys.stdout.encoding  # strangers' captions on any terminal
    print(text.encode(encoding, "backslashreplace").decode(encoding))
    if report.errors:
        raise UserError(f"{doctor.verdict(report)} (all in {out / 'report.json'})")
