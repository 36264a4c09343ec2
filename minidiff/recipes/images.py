"""The images of a training from scratch: what is in a folder, what of it is held out."""

import hashlib
import random
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean, median
from typing import NamedTuple

import torch
from jaxtyping import UInt8
from torch import Tensor
from tqdm import tqdm

from minidiff.data import buckets
from minidiff.data.captions import Fault, captions_file, class_folders, images_in
from minidiff.data.folder import (
    CaptionedFolder,
    CaptionedImages,
    ClassFolder,
    check_folder,
)
from minidiff.data.shards import Shards
from minidiff.errors import UserError
from minidiff.options.training import Layout

LEAST, SMALLEST = 10, 16  # how many images there must be, and how many pixels a side
LOOKED_AT = 64  # images that tell the size of all
PROMPTS = 8  # of the samples


class Folder(NamedTuple):
    """A folder of images, not yet read."""

    layout: Layout
    files: CaptionedImages | Shards
    side: int  # the median of the shorter sides
    cut: float  # the mean share of an image outside its middle square


def opened(data: Path, layout: Layout | None, caption_column: str) -> Folder:
    """What is in a folder. Too few images, or too small ones, are a UserError."""
    layout = layout or layout_of(check_folder(data))
    if layout == "shards":
        files = Shards(data, caption_column=caption_column)
    elif layout == "captions":
        files = CaptionedFolder(data, caption_column=caption_column, several=True)
    elif layout == "classes":
        files = ClassFolder(data)
        names = (name.replace("_", " ") for name in files.captions)
        files.alternatives = [[f"a photo of a {name}"] for name in names]
    else:
        paths = images_in(check_folder(data))
        files = CaptionedImages(paths, [""] * len(paths))
    count = len(files) if layout == "shards" else len(set(files.paths))
    if count < LEAST:
        remedy = "put more there, or teach a model that is trained: minidiff finetune, dreambooth"
        raise UserError(f"{data}: {count} images; training from scratch needs {LEAST}; {remedy}.")
    every = range(0, len(files), -(-len(files) // LOOKED_AT))
    shapes = [tuple(files[i][0].shape[1:]) for i in every]
    side = int(median(map(min, shapes)))
    if side < SMALLEST:
        raise UserError(f"{data}: images of {side} pixels; at least {SMALLEST} a side are needed.")
    return Folder(layout, files, side, mean(buckets.cut(w, h, (1, 1)) for h, w in shapes))


def layout_of(folder: Path) -> Layout:
    """shards where there are *.tar; captions where there are any; classes where the images are in
    two folders or more, and none beside them; else pictures."""
    if next(folder.glob("*.tar"), None):
        return "shards"
    if captions_file(folder):
        return "captions"
    classes = class_folders(folder)
    inside = sum(map(len, classes.values()))
    return "classes" if len(classes) > 1 and inside == len(images_in(folder)) else "pictures"


class Images(NamedTuple):
    """Images in memory, as bytes, with their captions; which are trained on and which held out."""

    pixels: UInt8[Tensor, "N 3 S S"]
    captions: list[list[str]]  # of each, those that are as good
    training: list[int]
    held_out: list[int]

    def fingerprint(self) -> str:
        """Changes with any pixel and any caption."""
        digest = hashlib.sha256(self.pixels.numpy().data)
        digest.update(repr(self.captions).encode())
        return f"{len(self.pixels)} images, {digest.hexdigest()[:16]}"

    def prompts(self) -> list[str]:
        """Different captions to draw: those of images that are held out come first."""
        order = (self.captions[i][0] for i in [*self.held_out, *self.training])
        different = list(dict.fromkeys(order))[:PROMPTS]
        return different * PROMPTS if different == [""] else different


def read(folder: Folder, data: Path, size: int, validation: float, seed: int) -> Images:
    """All images, scaled to cover a square and cut. This share of them is held out, each with all
    its captions."""
    if 2 * folder.side < size:
        remedy = f"choose a `size` of about {folder.side}"
        raise UserError(f"{data}: half the images have at most {folder.side} pixels; {remedy}.")
    if folder.cut > 0.25:
        what = f"images are cut to squares, and lose {folder.cut:.0%} on average"
        warnings.warn(f"{data}: {what}", stacklevel=2)
    files, captions = folder.files, []
    files.size, pixels = size, torch.empty(len(files), 3, size, size, dtype=torch.uint8)
    try:
        with ThreadPoolExecutor() as pool:  # Pillow decodes outside Python's lock
            examples = pool.map(files.__getitem__, range(len(files)))
            bar = tqdm(examples, "reading images", len(files), unit="", leave=False)
            for k, (image, caption) in enumerate(bar):
                pixels[k] = image
                captions.append([caption])
    except Fault as fault:
        raise UserError(f"{fault}; minidiff data check lists all that cannot be read.") from fault
    captions = getattr(files, "alternatives", captions)
    paths = getattr(files, "paths", range(len(files)))
    distinct = list(dict.fromkeys(paths))
    chosen = random.Random(f"held out {seed}").sample(distinct, int(validation * len(distinct)))
    apart = set(chosen)
    training = [i for i, path in enumerate(paths) if path not in apart]
    held_out = [i for i, path in enumerate(paths) if path in apart]
    return Images(pixels, captions, training, held_out)
