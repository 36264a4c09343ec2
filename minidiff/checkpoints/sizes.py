"""A network's config from the shapes of its tensors. Without torch.

Sizes come from the tensors, never from a file's name. What leaves no trace in them is assumed: how
many heads share a width, and a text encoder's activation and padding (SD 1.x: OpenAI's CLIP; SD
2.x: OpenCLIP's ViT-H).
"""

import re
from collections.abc import Mapping

from minidiff.errors import UserError

Shapes = Mapping[str, tuple[int, ...]]  # by our names
END = 49407  # the last of CLIP's tokens


def unet_config(shapes: Shapes) -> dict:
    """The arguments of UNetConfig."""
    levels = _count(shapes, "encoder")
    if not levels:
        raise UserError("no U-Net: no tensor of an encoder.")
    blocks = _count(shapes, "encoder.0.residual")
    for level in range(levels):
        down = _count(shapes, f"encoder.{level}.residual")
        up = _count(shapes, f"decoder.{levels - 1 - level}.residual")
        if (down, up) != (blocks, blocks + 1):
            what = f"level {level} of the U-Net has {down} and {up} residual blocks"
            raise UserError(f"{what}; {blocks} and {blocks + 1} are supported.")
    channels = _widths(shapes, "encoder", levels)
    projection = _first(shapes, ".proj_in.weight")
    linear = projection in shapes and len(shapes[projection]) == 2
    hidden, width = _shape(shapes, _first(shapes, ".ff.up.weight"), 2)  # hidden: twice, for GEGLU
    depth = tuple(_count(shapes, f"encoder.{k}.attention.0.blocks") for k in range(levels))
    deep = _count(shapes, "middle.attention.0.blocks")
    return dict(
        in_channels=_shape(shapes, "conv_in.weight", 4)[1],
        out_channels=_shape(shapes, "conv_out.weight", 4)[0],
        channels=channels,
        blocks=blocks,
        depth=depth,
        heads=tuple(max(1, c // 64) for c in channels) if linear else (8,) * levels,
        context_dim=_shape(shapes, _first(shapes, ".cross_attention.k.weight"), 2)[1],
        ff_mult=hidden // (2 * width),
        linear_projection=linear,
        middle=_count(shapes, "middle.residual") > 0,
        middle_depth=deep if deep not in (0, max(depth[-1], 1)) else None,
        added=_shape(shapes, "add.0.weight", 2)[1] if "add.0.weight" in shapes else None,
    )


def vae_config(shapes: Shapes) -> dict:
    """The arguments of VAEConfig."""
    levels = _count(shapes, "encoder.levels")
    return dict(
        in_channels=_shape(shapes, "encoder.conv_in.weight", 4)[1],
        latent_channels=_shape(shapes, "decoder.conv_in.weight", 4)[1],
        channels=_widths(shapes, "encoder.levels", levels),
        blocks=_count(shapes, "encoder.levels.0.residual"),
        quant="post_quant.weight" in shapes,
    )


def text_config(shapes: Shapes) -> dict:
    """The arguments of TextConfig: OpenCLIP's at widths 1024 and 1280, else OpenAI's."""
    vocabulary, width = _shape(shapes, "token_embedding.weight", 2)
    activation, pad = "quick_gelu", min(vocabulary - 1, END)
    if width in (1024, 1280):
        activation, pad = "gelu", 0
    projection = "projection.weight"
    return dict(
        width=width,
        layers=_count(shapes, "blocks"),
        heads=max(1, width // 64),
        activation=activation,
        pad=pad,
        context_length=_shape(shapes, "position_embedding.weight", 2)[0],
        vocabulary=vocabulary,
        projection=_shape(shapes, projection, 2)[0] if projection in shapes else None,
    )


def _count(shapes: Shapes, piece: str) -> int:
    """How many numbers follow a piece of a name; of "encoder" it is the number of levels."""
    pattern = re.compile(re.escape(piece) + r"\.(\d+)\.")
    numbers = {int(match[1]) for name in shapes if (match := pattern.match(name))}
    if numbers != set(range(len(numbers))):
        why = "some of its tensors are missing"
        raise UserError(f'"{piece}" is numbered {sorted(numbers)}: {why}.')
    return len(numbers)


def _shape(shapes: Shapes, name: str, axes: int) -> tuple[int, ...]:
    if name not in shapes:
        why = "this is not a network of Stable Diffusion, or a damaged one"
        raise UserError(f'tensor "{name}" is missing: {why}.')
    if len(shape := shapes[name]) != axes or not all(shape):
        raise UserError(f'tensor "{name}" has shape {list(shape)}; it should have {axes} axes.')
    return tuple(shapes[name])


def _widths(shapes: Shapes, piece: str, levels: int) -> tuple[int, ...]:
    names = (f"{piece}.{level}.residual.0.conv2.weight" for level in range(levels))
    return tuple(_shape(shapes, name, 4)[0] for name in names)


def _first(shapes: Shapes, ending: str) -> str:
    return next((name for name in shapes if name.endswith(ending)), ending)
