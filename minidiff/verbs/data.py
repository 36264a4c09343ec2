"""Verbs that make and check folders of captioned pictures."""
import sys
from pathlib import Path
from typing import Annotated

import tyro

from minidiff.errors import UserError
from minidiff.verbs import options
from minidiff.verbs.options import Device, Integer

Files = Annotated[tuple[Path, ...], tyro.conf.arg(metavar="FILE ...")]
Words = Annotated[str, tyro.conf.arg(metavar="WORD,WORD")]
File = Annotated[Path | None, tyro.conf.arg(metavar="FILE")]
Folder = tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="DIR")]]


def coco(
    annotations: Files,
    images: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None,
    size: int = 100,
    contains: Words = "",
    category: Words = "",
    instances: File = None,
    crop: Annotated[str, tyro.conf.arg(metavar="centre|none")] = "none",
    pixels: Integer = None,
    download: bool = False,
    seed: int = 0,
    device: Device = "auto",
    out: Path = Path("out/coco"),
) -> None:
    """A captioned folder out of COCO's pictures and annotation files.

    Args:
        annotations: COCO caption files, such as captions_val2017.json.
        images: the folder of pictures. May be left out with --download.
        size: how many pictures to take.
        contains: take only pictures of which one caption has all these words, in the singular or with an s.
        category: take only pictures that show all these, as in bowl,apple; needs --instances.
        instances: the COCO file that says what is where, such as instances_val2017.json.
        crop: centre cuts out the middle square, none leaves the shape as it is.
        pixels: length of the shorter side to scale to. Left out, pictures keep their size.
        download: fetch pictures that are not in the folder from where COCO has them.
        seed: which pictures are taken, and which of its captions is a picture's text, follow from it.
        device: accepted as everywhere; nothing here is computed on it.
        out: the captioned folder to write; it must not be there yet.
    """
    options.check_out(out)
    options.check_seed(seed)
    options.check_positive("--size", size)
    if pixels is not None:
        options.check_positive("--pixels", pixels)
    options.pick_device(device)
    from minidiff.data import coco

    if not annotations:
        raise UserError("no --annotations; name a COCO caption file, such as captions_val2017.json.")
    shape = coco.Shape(crop, pixels)
    coco.check_new(out)
    source = coco.read(annotations, options.words(contains), instances, options.words(category))
    selection = coco.write(source, images, out, size, shape, download, seed)
    print(out / "metadata.jsonl", out / "selection.json", coco.summary(selection), sep="\n")


def check(
    folder: Folder,
    layout: Annotated[str, tyro.conf.arg(metavar="captions|classes|pictures")] = "captions",
    caption_column: str = "text",
    size: int = 512,
    seed: int = 0,
    device: Device = "auto",
    out: Path = Path("out/check"),
) -> None:
    """The data doctor: everything that is wrong with a folder of pictures, before you train on it.

    Exit code 0 if it can be trained on, whatever the warnings; 2 if not.

    Args:
        folder: the folder to check.
        layout: captions (metadata.jsonl has a line for each picture), classes (a folder for each), or pictures (no captions).
        caption_column: where metadata.jsonl has the captions.
        size: the side in pixels that you will train at.
        seed: which pictures the sheet shows, if there are many.
        device: accepted as everywhere; nothing here is computed on it.
        out: folder for report.json and contact.png.
    """
    options.check_out(out, "report.json", "contact.png")
    options.check_seed(seed)
    options.pick_device(device)
    if out.resolve().is_relative_to(folder.resolve()):
        raise UserError(f"--out {out} lies in the folder that is checked, and would become part of the data; name another folder.")
    from minidiff.data import doctor

    report = doctor.examine(folder, layout, caption_column, size)
    written = doctor.write(report, out, seed)
    said = "\n".join([doctor.as_text(report), *map(str, written)])
    print(said.encode(sys.stdout.encoding, "backslashreplace").decode(sys.stdout.encoding))  # strangers' captions on any terminal
    if report.errors:
        raise UserError(f"{doctor.verdict(report)} (all in {out / 'report.json'})")
