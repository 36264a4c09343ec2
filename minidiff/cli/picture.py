"""An image as text for the terminal: half blocks in 24-bit colour, or shades of ASCII."""

import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

SHADES = " .:-=+*#%@"  # from dark to light


def has_colour() -> bool:
    """Whether standard output is a terminal with colours that the user wants (no-color.org)."""
    unwanted = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    encoding = (sys.stdout.encoding or "").lower()
    return sys.stdout.isatty() and not unwanted and encoding.startswith("utf")


def as_text(image: "Tensor", columns: int, colour: bool) -> str:
    """An image (3, H, W) in [-1, 1]; a line of letters is two rows of pixels high."""
    import torch.nn.functional as F

    height, width = image.shape[1:]
    lines = max(1, round(columns * height / width / 2))
    sides = (2 * lines if colour else lines, columns)
    small = F.interpolate(image[None].float().cpu(), sides, mode="area")[0].clamp(-1, 1)
    if not colour:
        shades = ((small.mean(0) + 1) / 2 * (len(SHADES) - 1)).round().int().tolist()
        return "\n".join("".join(SHADES[k] for k in line) for line in shades)
    pixels = ((small + 1) * 127.5).round().int().movedim(0, -1).tolist()
    pairs = zip(pixels[::2], pixels[1::2], strict=True)
    return "\n".join("".join(map(_block, upper, lower)) + "\x1b[0m" for upper, lower in pairs)


def _block(upper: list[int], lower: list[int]) -> str:
    """Two pixels: the letter's colour is the upper one, its background the lower one."""
    (r, g, b), (r2, g2, b2) = upper, lower
    return f"\x1b[38;2;{r};{g};{b};48;2;{r2};{g2};{b2}m▀"
