"""A large picture through a network in overlapping tiles, so that memory does not grow with the picture. Nothing here knows of diffusion."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor


def tiled(
    f: Callable[[Tensor], Tensor],
    x: Float[Tensor, "B C H W"],
    tile: int,
    overlap: int,
    scale: float = 1,
) -> Float[Tensor, "B C2 H2 W2"]:
    """f(x), from f of tiles of tile x tile that overlap by `overlap`; f makes pictures `scale` times as large. Where tiles overlap, one fades
    into the next along a straight line, so that no seam shows."""
    height, width = x.shape[2:]
    tops, lefts = _starts(height, tile, tile - overlap), _starts(width, tile, tile - overlap)
    total, weight = None, None
    for top in tops:
        for left in lefts:
            part = f(x[:, :, top : top + tile, left : left + tile])
            if total is None:
                total = part.new_zeros(*part.shape[:2], round(height * scale), round(width * scale))
                weight = total[:1, :1].clone()
            fade = _fade(part.shape[2], round(overlap * scale), part)[:, None] * _fade(
                part.shape[3], round(overlap * scale), part
            )
            rows = slice(round(top * scale), round(top * scale) + part.shape[2])
            columns = slice(round(left * scale), round(left * scale) + part.shape[3])
            total[:, :, rows, columns] += part * fade
            weight[:, :, rows, columns] += fade
    return total / weight


def _starts(length: int, tile: int, stride: int) -> list[int]:
    """Where tiles begin; the last ends where the picture does."""
    return [*range(0, max(length - tile, 0), stride), max(length - tile, 0)]


def _fade(length: int, overlap: int, like: Tensor) -> Float[Tensor, "N"]:
    """Up over the overlap, flat, and down again; never 0, since at the picture's edge there is no other tile."""
    ramp = torch.arange(1, length + 1, device=like.device, dtype=like.dtype)
    return torch.minimum(ramp, ramp.flip(0)).clamp(max=overlap + 1) / (overlap + 1)
