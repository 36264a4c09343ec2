"""What a checkpoint's tensors say about the network they belong to: widths, depths and kinds, from names and shapes alone.

Sizes come from the tensors, never from a file's name. Only what leaves no trace in them is known otherwise: how many heads share
a width, and a text tower's activation and padding (SD 1.x: OpenAI's CLIP; SD 2.x: OpenCLIP's ViT-H).
"""
import re
from collections.abc import Mapping

from minidiff.clip import END
from minidiff.errors import UserError

Shapes = Mapping[str, tuple[int, ...]]  # by our names


def _count(shapes: Shapes, piece: str) -> int:
    """How many numbers follow a piece of a name: _count(shapes, "encoder") is the number of levels."""
    found = {int(m[1]) for name in shapes if (m := re.match(re.escape(piece) + r"\.(\d+)\.", name))}
    if found != set(range(len(found))):
        raise UserError(f'"{piece}" is numbered {sorted(found)}: some of its tensors are missing.')
    return len(found)


def _of(shapes: Shapes, name: str) -> tuple[int, ...]:
    if name not in shapes:
        raise UserError(f'tensor "{name}" is missing: this is not a network of Stable Diffusion, or a damaged one.')
    return tuple(shapes[name])


def unet_numbers(shapes: Shapes) -> dict:
    """The arguments of UNet."""
    levels = _count(shapes, "encoder")
    if not levels or not _count(shapes, "middle.residual"):
        raise UserError("no U-Net with an encoder and a middle; those without a middle (pruned ones) are not supported.")
    channels = tuple(_of(shapes, f"encoder.{level}.residual.0.conv2.weight")[0] for level in range(levels))
    blocks = _count(shapes, "encoder.0.residual")
    depth = tuple(_count(shapes, f"encoder.{level}.attention.0.blocks") for level in range(levels))
    for level in range(levels):
        found = _count(shapes, f"encoder.{level}.residual"), _count(shapes, f"decoder.{levels - 1 - level}.residual")
        if found != (blocks, blocks + 1):
            raise UserError(f"level {level} of the U-Net has {found[0]} and {found[1]} residual blocks; {blocks} and {blocks + 1} are supported.")
    linear = len(_of(shapes, "middle.attention.0.proj_in.weight")) == 2
    block = "middle.attention.0.blocks.0"
    return dict(
        in_channels=_of(shapes, "conv_in.weight")[1],
        out_channels=_of(shapes, "conv_out.weight")[0],
        channels=channels,
        blocks=blocks,
        depth=depth,
        heads=tuple(max(1, c // 64) for c in channels) if linear else (8,) * levels,
        context_dim=_of(shapes, f"{block}.cross_attention.k.weight")[1],
        ff_mult=_of(shapes, f"{block}.ff.up.weight")[0] // (2 * channels[-1]),
        linear_projection=linear,
    )


def vae_numbers(shapes: Shapes) -> dict:
    """The arguments of VAE."""
    levels = _count(shapes, "encoder.levels")
    return dict(
        in_channels=_of(shapes, "encoder.conv_in.weight")[1],
        latent_channels=_of(shapes, "post_quant.weight")[0],
        channels=tuple(_of(shapes, f"encoder.levels.{level}.residual.0.conv2.weight")[0] for level in range(levels)),
        blocks=_count(shapes, "encoder.levels.0.residual"),
        latent_scale=0.18215,
    )


def text_numbers(shapes: Shapes) -> dict:
    """The arguments of CLIPText. A width of 1024 is OpenCLIP's tower, anything else OpenAI's: heads of 64 in both."""
    vocabulary, width = _of(shapes, "token_embedding.weight")
    openclip = width == 1024
    return dict(
        width=width,
        layers=_count(shapes, "blocks"),
        heads=max(1, width // 64),
        activation="gelu" if openclip else "quick_gelu",
        pad=0 if openclip else END,
        context_length=_of(shapes, "position_embedding.weight")[0],
        vocabulary=vocabulary,
    )
