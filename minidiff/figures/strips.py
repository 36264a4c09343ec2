"""Many small pictures in one file: strips for a page that holds all its images itself."""

import base64
import io
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from minidiff.data.folder import to_uint8

LOSSLESS = 64  # pixels: larger tiles are WebP with losses
QUALITY = 82  # of WebP


@dataclass(frozen=True)
class Strip:
    """Tiles of one size in rows and columns, as one image."""

    src: str  # a data URI
    width: int  # of a tile, in pixels
    height: int


def colour(images: Float[Tensor, "rows 3 H W"]) -> Strip:
    """A column of images in [-1, 1]."""
    pixels = to_uint8(images).movedim(1, -1).flatten(0, 1)
    tile = images.shape[3], images.shape[2]
    return Strip(uri(Image.fromarray(pixels.numpy()), max(tile) <= LOSSLESS), *tile)


def grey(tiles: Float[Tensor, "rows columns H W"]) -> Strip:
    """Tiles in [-1, 1], from black to white."""
    return _sheet(to_uint8(tiles), None)


def heat(tiles: Float[Tensor, "rows columns H W"]) -> Strip:
    """Tiles in any range; each runs from dark, its least value, to light, its largest."""
    from matplotlib import colormaps

    low, high = tiles.amin((2, 3), keepdim=True), tiles.amax((2, 3), keepdim=True)
    levels = (255 * (tiles - low) / (high - low).clamp(min=1e-12)).round().to(torch.uint8)
    return _sheet(levels, colormaps["inferno"](range(256), bytes=True)[:, :3])


def shrunk(images: Float[Tensor, "B C H W"], side: int) -> Float[Tensor, "B C h w"]:
    """Images whose larger side is at most this; each pixel is the mean of those it covers."""
    height, width = images.shape[2:]
    share = min(1.0, side / max(height, width))
    sides = max(1, round(share * height)), max(1, round(share * width))
    return images if share == 1 else F.interpolate(images.float(), sides, mode="area")


def uri(image: Image.Image, lossless: bool = True) -> str:
    """An image as a data URI, PNG or WebP."""
    kind, how = ("PNG", {"optimize": True}) if lossless else ("WEBP", {"quality": QUALITY})
    image.save(data := io.BytesIO(), kind, **how)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(data.getvalue()).decode()}"


def _sheet(tiles: UInt8[Tensor, "rows columns H W"], palette: np.ndarray | None) -> Strip:
    sheet = tiles.permute(0, 2, 1, 3).flatten(0, 1).flatten(1)
    image = Image.fromarray(sheet.contiguous().numpy())
    if palette is not None:
        image.putpalette(palette.tobytes())
    return Strip(uri(image), tiles.shape[3], tiles.shape[2])
