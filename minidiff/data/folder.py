"""Images from disk: one image, folders with captions, folders of classes, and bytes as floats.

A captioned folder has its captions in a table or in text files (captions.py). A class folder is
DIR/<class>/<any name>.png; the name of the class is the caption.

These two files alone decide what cannot be trained on. They raise a Fault at the first; the data
doctor (doctor/) calls the same functions on every line and every image.
"""

import contextlib
import math
import os
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import ExifTags, Image, ImageCms, ImageOps
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from minidiff.data.captions import (
    Fault,
    caption_lines,
    caption_of,
    captions_of,
    check_folder,
    class_folders,
    image_of,
    images_in,
    parse_row,
)

# load_image refuses what Pillow only warns of.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)

FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "BMP", "GIF", "TIFF", "AVIF", "HEIF")
DRAFT = 2  # docs/data.md says what it costs
LYING = (5, 6, 7, 8)  # EXIF's marks of images that a quarter turn makes upright
Box = tuple[float, float, float, float]  # left, top, right, bottom
SRGB = ImageCms.createProfile("sRGB")
Item, Result = TypeVar("Item"), TypeVar("Result")
PROFILES = {"RGB": "RGB", "RGBA": "RGB", "L": "GRAY", "CMYK": "CMYK"}
PROFILES["P"] = "RGB"  # the kind of colour profile that fits a mode


def to_model(images: UInt8[Tensor, "*dims"]) -> Float[Tensor, "*dims"]:
    """Bytes 0..255 to floats in [-1, 1]."""
    return images.float() / 127.5 - 1


def to_uint8(images: Float[Tensor, "*dims"]) -> UInt8[Tensor, "*dims"]:
    """Floats in [-1, 1], clamped, to the nearest byte: the exact inverse of `to_model`."""
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def load_image(
    path: str | Path | BytesIO,
    size: int | tuple[int, int] | None = None,
    background: str = "white",
    name: str | None = None,
) -> UInt8[Tensor, "3 H W"]:
    """Read an image file of any kind as upright RGB, or raise a Fault. Transparent parts show the
    background, and a warning says so.

    size: a side, or (height, width); the image is scaled to cover it and cut in the centre.
    name: of the image in messages. Default: its path.
    """
    if size is not None:
        size = (size, size) if isinstance(size, int) else size
    with _header(path, name or str(path)) as file:
        box = _draft(file, size) if size is not None else None
        ImageOps.exif_transpose(file, in_place=True)
        image = _rgb(file, background)
    if size is not None:
        box = _centre(box or (0, 0, *image.size), size)
        image = image.resize(size[::-1], Image.Resampling.LANCZOS, box)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def upright_size(path: str | Path) -> tuple[int, int]:
    """The (height, width) that load_image gives, from the header alone where that is enough."""
    with _header(path, str(path)) as file:
        if file.format == "TIFF":  # some versions of Pillow turn the size, some do not
            ImageOps.exif_transpose(file, in_place=True)
        elif file.getexif().get(ExifTags.Base.Orientation) in LYING:
            return file.width, file.height
        return file.height, file.width


def _draft(image: Image.Image, size: tuple[int, int]) -> Box | None:
    """Have a JPEG decoded to 1/2, 1/4 or 1/8, but not under DRAFT times the size asked for, so that
    Lanczos has the last word. Returns the part of the upright result that the image fills: of 427
    pixels, a quarter is 106.75, and the decoder makes 107."""
    if image.format not in ("JPEG", "MPO"):
        return None
    width, height = image.size
    turned = image.getexif().get(ExifTags.Base.Orientation, 1)
    down, across = size[::-1] if turned in LYING else size
    image.draft(None, (DRAFT * across, DRAFT * down))
    scale = round(width / image.width)
    width, height, right, bottom = width / scale, height / scale, *image.size
    if turned in LYING:
        width, height, right, bottom = height, width, bottom, right
    left = right - width if turned in (2, 3, 6, 7) else 0
    top = bottom - height if turned in (3, 4, 7, 8) else 0
    return left, top, left + width, top + height


def _centre(box: Box, size: tuple[int, int]) -> Box:
    """The largest box with the shape of a size (height, width) in the centre of another."""
    left, top, right, bottom = box
    width, height, ratio = right - left, bottom - top, size[1] / size[0]
    across, down = (ratio * height, height) if width / height >= ratio else (width, width / ratio)
    x, y = left + max(0, (width - across) / 2), top + max(0, (height - down) / 2)
    return x, y, min(x + across, right), min(y + down, bottom)


@contextlib.contextmanager
def _header(path: str | Path | BytesIO, name: str) -> Iterator[Image.Image]:
    """Open an image; whatever goes wrong while it is open is a Fault."""
    if isinstance(path, str | Path) and not os.path.isfile(path):
        raise Fault("missing picture", f"{name}: no such picture")
    size = path.getbuffer().nbytes if isinstance(path, BytesIO) else os.path.getsize(path)
    advice = "replace it, or take it out of the data"
    if not size:
        raise Fault("empty file", f"{name}: not a readable picture (the file is empty); {advice}")
    if name.lower().endswith((".heic", ".heif")):
        advice = "save it as JPEG, or install pillow-heif, which reads HEIC"
        with contextlib.suppress(ImportError):
            import pillow_heif

            pillow_heif.register_heif_opener()
    try:
        with opened(path) as file:
            _check_pixels(file)
            yield file
    except Exception as error:  # a damaged file makes Pillow raise almost anything
        reason = " ".join(str(error).split()) or type(error).__name__
        message = f"{name}: not a readable picture ({reason}); {advice}"
        raise Fault("unreadable picture", message) from None


def opened(path: str | Path | BytesIO) -> Image.Image:
    """An image file by its header, of the formats that are read: Pillow knows others, and runs a
    program of its own for one (Ghostscript, for EPS), whatever the file is called."""
    Image.init()
    return Image.open(path, formats=[name for name in FORMATS if name in Image.OPEN])


def _check_pixels(image: Image.Image) -> None:
    """Refuse, by its header, an image that takes more than a gigabyte to unpack."""
    most = Image.MAX_IMAGE_PIXELS or math.inf
    if image.mode.startswith("I") or image.has_transparency_data:
        most *= 0.75
    if image.width * image.height > most:
        raise ValueError(f"{image.width}x{image.height} pixels; at most {most:,.0f} are read")


def _rgb(image: Image.Image, background: str) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey: Pillow's conversion does not scale all such modes
        grey = (np.asarray(image).astype(np.float32) / 257).round().clip(0, 255)
        image = Image.fromarray(grey.astype(np.uint8))
    if image.mode == "F":
        raise ValueError("floating-point pixels have no agreed range: save it with 8 or 16 bits")
    if image.has_transparency_data:  # alpha, or one transparent colour of a palette
        image = _in_srgb(image if image.mode == "RGBA" else image.convert("RGBA"))
        if image.getchannel("A").getextrema()[0] < 255:
            # without the file's name, so that it is said once
            what = "transparent parts of images are read as"
            warnings.warn(f"{what} {background}", stacklevel=2)
        image = Image.alpha_composite(Image.new("RGBA", image.size, background), image)
    image = _in_srgb(image.convert("RGB") if image.mode == "P" else image)
    image.load()
    return image if image.mode == "RGB" else image.convert("RGB")


def profile_of(image: Image.Image) -> ImageCms.ImageCmsProfile | None:
    """The colour profile (ICC) that says what the numbers of an image mean; None for sRGB's own,
    for one of another kind of pixels, and for a damaged one, which other programs ignore too."""
    content = image.info.get("icc_profile")
    try:
        profile = ImageCms.ImageCmsProfile(BytesIO(content)) if content else None
    except (OSError, TypeError, ImageCms.PyCMSError):
        return None
    if profile is None or (profile.profile.profile_description or "").startswith("sRGB"):
        return None
    space = PROFILES.get(image.mode)
    return profile if space == profile.profile.xcolor_space.strip() else None


def _in_srgb(image: Image.Image) -> Image.Image:
    """The image in sRGB, by its colour profile."""
    if (profile := profile_of(image)) is None:
        return image
    mode = "RGBA" if image.mode == "RGBA" else "RGB"
    return ImageCms.profileToProfile(image, profile, SRGB, outputMode=mode)


class CaptionedImages(Dataset):
    """Image files with one caption each; a file is read when it is asked for."""

    def __init__(self, paths: list[Path], captions: list[str], size: int | None = None):
        self.paths, self.captions, self.size = paths, captions, size
        self.alternatives = [[caption] for caption in captions]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> tuple[UInt8[Tensor, "3 H W"], str]:
        return load_image(self.paths[i], self.size), self.captions[i]


class CaptionedFolder(CaptionedImages):
    """The images and captions of a folder; of a list of captions the first is taken, or with
    `several` all are in alternatives[i]."""

    def __init__(
        self,
        folder: str | Path,
        size: int | None = None,
        caption_column: str = "text",
        several: bool = False,
    ):
        folder = check_folder(folder)
        paths, captions = [], []
        for where, line in caption_lines(folder):
            row = parse_row(where, line)
            paths.append(image_of(folder, where, row, lambda: images_in(folder)))
            if several:
                captions.append(captions_of(where, row, caption_column))
            else:
                captions.append([caption_of(where, row, caption_column)])
        super().__init__(paths, [own[0] for own in captions], size)
        self.alternatives = captions


class ClassFolder(CaptionedImages):
    """The images of DIR/<class>/<name>, with the name of the class as the caption.

    classes: the sorted names of the folders that hold images; labels: each image's index into them.
    """

    def __init__(self, folder: str | Path, size: int | None = None):
        folder = check_folder(folder)
        by_class = class_folders(folder)
        if not by_class:
            remedy = "put the pictures of each class into a folder of its own"
            hint = remedy if images_in(folder) else "there are no pictures below it"
            message = f"{folder}: no class folders (DIR/<class>/<name>.png); {hint}"
            raise Fault("no class folders", message)
        self.classes = list(by_class)
        self.labels = [label for label, paths in enumerate(by_class.values()) for _ in paths]
        paths = [path for paths in by_class.values() for path in paths]
        super().__init__(paths, [self.classes[label] for label in self.labels], size)


def load_all(
    dataset: CaptionedImages, size: int, limit: int | None = None
) -> tuple[UInt8[Tensor, "N 3 S S"], list[str]]:
    """Load images and captions into memory, at most `limit`, spread evenly over the set."""
    count = len(dataset) if limit is None else min(limit, len(dataset))
    indices = [i * len(dataset) // count for i in range(count)]
    images = torch.empty(count, 3, size, size, dtype=torch.uint8)
    loaded = ahead(lambda i: load_image(dataset.paths[i], size), indices)
    for k, image in enumerate(tqdm(loaded, "reading pictures", count, unit="", leave=False)):
        images[k] = image
    return images, [dataset.captions[i] for i in indices]


def ahead(
    function: Callable[[Item], Result], items: Iterable[Item], most: int = 16
) -> Iterator[Result]:
    """map(function, items), computed in threads, at most `most` items ahead: Pillow decodes outside
    Python's lock. An exception comes at its item's place."""
    pool, waiting = ThreadPoolExecutor(min(8, (os.cpu_count() or 1) + 4)), deque()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > most:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
