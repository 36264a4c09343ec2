"""The verbs that make and check folders of captioned images."""

import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import tyro

from minidiff.cli import options
from minidiff.cli.flags import Flat, in_flags
from minidiff.cli.options import MODEL, Folder
from minidiff.data.coco_config import CocoConfig
from minidiff.errors import UserError


def coco(config: Flat[CocoConfig], out: Path = Path("out/coco")) -> None:
    """A captioned folder out of COCO's images and annotation files.

    Example: minidiff data coco --annotations captions_val2017.json --images val2017 --size 100

    Args:
        out: the captioned folder to write; it must not be there yet.
    """
    options.check_out(out)
    from minidiff.data import coco

    coco.check_new(out)
    source = coco.read(config)
    with written(out):
        record = coco.write(source, out)
    print(out / "metadata.jsonl", out / "selection.json", coco.summary(record), sep="\n")


@contextlib.contextmanager
def written(out: Path) -> Iterator[None]:
    """A full disk names the folder that is written: Python names the file that is read, or none."""
    try:
        yield
    except OSError as error:
        if error.filename and error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
            raise
        reason = error.strerror or str(error)
        remedy = "make room, or name another folder"
        raise UserError(f"--out {out}: cannot be written ({reason}); {remedy}.") from error


def check(
    folder: tyro.conf.Positional[Folder],
    layout: Literal["captions", "classes", "pictures"] = "captions",
    caption_column: str = "text",
    size: int | None = None,
    model: Path = MODEL,
    seed: int = 0,
    out: Path = Path("out/check"),
) -> None:
    """The data doctor: everything that is wrong with a folder of images, before you train on it.

    Exit code 0 if it can be trained on, whatever the warnings; 2 if not.
    Example: minidiff data check coco100 --size 512

    Args:
        folder: the folder to check.
        layout: captions (metadata.jsonl has a line for each image), classes (a folder for each), or
            pictures (no captions).
        caption_column: where metadata.jsonl has the captions.
        size: the side in pixels that you will train at. Default: the model's.
        model: the model that you will train, as finetune takes it; box is the one that ships with
            minidiff. Only its size matters.
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

    multiple, purpose = 64, "a model of Stable Diffusion's kind"
    if size is None:
        from minidiff import load

        loaded = load(model, dtype=None)
        size, multiple, purpose = loaded.size, loaded.multiple, model
    report = doctor.examine(folder, layout, caption_column, size, multiple)
    with written(out):
        paths = [doctor.write(report, out), *contact_sheet(report.data, out / "contact.png", seed)]
    print(f"checked for {purpose}, at {size}x{size} pixels")
    print(in_flags(doctor.as_text(report)), *paths, sep="\n")
    if report.errors:
        raise UserError(f"{doctor.verdict(report)} (all in {out / 'report.json'})")
