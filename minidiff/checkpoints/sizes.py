"""What a checkpoint's tensors say about the network they belong to, and which tensors a network of such numbers has. Without torch.

Sizes come from the tensors, never from a file's name. Only what leaves no trace in them is known otherwise: how many heads share
a width, and a text tower's activation and padding (SD 1.x: OpenAI's CLIP; SD 2.x: OpenCLIP's ViT-H).
"""

import re
from collections.abc import Iterator, Mapping

from minidiff.errors import UserError

Shapes = Mapping[str, tuple[int, ...]]  # by our names


def _count(shapes: Shapes, piece: str) -> int:
    """How many numbers follow a piece of a name: _count(shapes, "encoder") is the number of levels."""
    found = {int(m[1]) for name in shapes if (m := re.match(re.escape(piece) + r"\.(\d+)\.", name))}
    if found != set(range(len(found))):
        raise UserError(f'"{piece}" is numbered {sorted(found)}: some of its tensors are missing.')
    return len(found)


def _of(shapes: Shapes, name: str, axes: int) -> tuple[int, ...]:
    if name not in shapes:
        raise UserError(
            f'tensor "{name}" is missing: this is not a network of Stable Diffusion, or a damaged one.'
        )
    if len(shapes[name]) != axes or not all(shapes[name]):
        raise UserError(
            f'tensor "{name}" has shape {list(shapes[name])}; it should have {axes} axes.'
        )
    return tuple(shapes[name])


def _first(shapes: Shapes, ending: str) -> str:
    return next((name for name in shapes if name.endswith(ending)), ending)


def unet_numbers(shapes: Shapes) -> dict:
    """The arguments of UNet."""
    levels = _count(shapes, "encoder")
    if not levels:
        raise UserError("no U-Net: no tensor of an encoder.")
    channels = tuple(
        _of(shapes, f"encoder.{level}.residual.0.conv2.weight", 4)[0] for level in range(levels)
    )
    blocks = _count(shapes, "encoder.0.residual")
    depth = tuple(_count(shapes, f"encoder.{level}.attention.0.blocks") for level in range(levels))
    for level in range(levels):
        found = (
            _count(shapes, f"encoder.{level}.residual"),
            _count(shapes, f"decoder.{levels - 1 - level}.residual"),
        )
        if found != (blocks, blocks + 1):
            raise UserError(
                f"level {level} of the U-Net has {found[0]} and {found[1]} residual blocks; {blocks} and {blocks + 1} are supported."
            )
    proj_in, cross, up = (
        _first(shapes, name)
        for name in (".proj_in.weight", ".cross_attention.k.weight", ".ff.up.weight")
    )
    linear = proj_in in shapes and len(shapes[proj_in]) == 2
    doubled, width = _of(shapes, up, 2)  # the width of the hidden layer, twice for GEGLU's gate
    return dict(
        in_channels=_of(shapes, "conv_in.weight", 4)[1],
        out_channels=_of(shapes, "conv_out.weight", 4)[0],
        channels=channels,
        blocks=blocks,
        depth=depth,
        heads=tuple(max(1, c // 64) for c in channels) if linear else (8,) * levels,
        context_dim=_of(shapes, cross, 2)[1],
        ff_mult=doubled // (2 * width),
        linear_projection=linear,
        middle=_count(shapes, "middle.residual") > 0,
    )


def vae_numbers(shapes: Shapes) -> dict:
    """The arguments of VAE."""
    levels = _count(shapes, "encoder.levels")
    return dict(
        in_channels=_of(shapes, "encoder.conv_in.weight", 4)[1],
        latent_channels=_of(shapes, "post_quant.weight", 4)[0],
        channels=tuple(
            _of(shapes, f"encoder.levels.{level}.residual.0.conv2.weight", 4)[0]
            for level in range(levels)
        ),
        blocks=_count(shapes, "encoder.levels.0.residual"),
        latent_scale=0.18215,
    )


def text_numbers(shapes: Shapes) -> dict:
    """The arguments of CLIPText. A width of 1024 is OpenCLIP's tower, anything else OpenAI's: heads of 64 in both."""
    vocabulary, width = _of(shapes, "token_embedding.weight", 2)
    openclip = width == 1024
    return dict(
        width=width,
        layers=_count(shapes, "blocks"),
        heads=max(1, width // 64),
        activation="gelu" if openclip else "quick_gelu",
        pad=0 if openclip else vocabulary - 1,  # the last token is the end
        context_length=_of(shapes, "position_embedding.weight", 2)[0],
        vocabulary=vocabulary,
    )


# The tensors of a network, by name: what `state_dict` would list, known without building it. A test holds both side by side.


def _affine(*layers: str) -> Iterator[str]:
    for layer in layers:
        yield from (f"{layer}.weight", f"{layer}.bias")


def _residual(name: str, c_in: int, c_out: int, time: bool) -> Iterator[str]:
    layers = (
        "norm1",
        "conv1",
        *(["time"] if time else []),
        "norm2",
        "conv2",
        *(["skip"] if c_in != c_out else []),
    )
    yield from _affine(*(f"{name}.{layer}" for layer in layers))


def _transformer(name: str, depth: int) -> Iterator[str]:
    yield from _affine(f"{name}.norm", f"{name}.proj_in", f"{name}.proj_out")
    for block in (f"{name}.blocks.{i}" for i in range(depth)):
        for attention in ("self_attention", "cross_attention"):
            yield from (f"{block}.{attention}.{piece}.weight" for piece in "qkv")
            yield from _affine(f"{block}.{attention}.out")
        yield from _affine(
            *(f"{block}.{layer}" for layer in ("norm1", "norm2", "norm3", "ff.up", "ff.down"))
        )


def unet_names(numbers: dict) -> Iterator[str]:
    """The tensors of UNet(**numbers), as `unet_numbers` gives them."""
    channels, blocks, depth = numbers["channels"], numbers["blocks"], numbers["depth"]
    yield from _affine("time.0", "time.2", "conv_in", "norm_out", "conv_out")
    skips, width, last = [channels[0]], channels[0], len(channels) - 1

    def level(name: str, at: int, entering: list[int]) -> Iterator[str]:
        for i, c_in in enumerate(entering):
            yield from _residual(f"{name}.residual.{i}", c_in, channels[at], time=True)
            yield from _transformer(f"{name}.attention.{i}", depth[at]) if depth[at] else ()

    for at, c in enumerate(channels):
        yield from level(f"encoder.{at}", at, [width] + [c] * (blocks - 1))
        yield from _affine(f"encoder.{at}.resample.conv") if at < last else ()
        skips += [c] * (blocks + (at < last))
        width = c
    if numbers["middle"]:
        for i in range(2):
            yield from _residual(f"middle.residual.{i}", width, width, time=True)
        yield from _transformer("middle.attention.0", max(depth[last], 1))
    for k, at in enumerate(reversed(range(len(channels)))):
        entering = [(width if i == 0 else channels[at]) + skips.pop() for i in range(blocks + 1)]
        yield from level(f"decoder.{k}", at, entering)
        yield from _affine(f"decoder.{k}.resample.conv") if at else ()
        width = channels[at]


def vae_names(numbers: dict) -> Iterator[str]:
    """The tensors of VAE(**numbers)."""
    channels, blocks = numbers["channels"], numbers["blocks"]
    yield from ("latent_scale", *_affine("quant", "post_quant"))
    for half, count, order in (
        ("encoder", blocks, channels),
        ("decoder", blocks + 1, channels[::-1]),
    ):
        width = channels[0] if half == "encoder" else channels[-1]
        for k, c in enumerate(order):
            for i in range(count):
                yield from _residual(
                    f"{half}.levels.{k}.residual.{i}", width if i == 0 else c, c, time=False
                )
            yield from _affine(f"{half}.levels.{k}.resample.conv") if k < len(channels) - 1 else ()
            width = c
        yield from _affine(
            f"{half}.conv_in", f"{half}.conv_out", f"{half}.norm_out", f"{half}.middle.norm"
        )
        for middle in ("first", "second"):
            yield from _residual(f"{half}.middle.{middle}", 1, 1, time=False)
        yield from _affine(
            *(f"{half}.middle.attention.{piece}" for piece in ("q", "k", "v", "out"))
        )


def text_names(numbers: dict) -> Iterator[str]:
    """The tensors of CLIPText(**numbers)."""
    yield from ("token_embedding.weight", "position_embedding.weight", *_affine("norm_out"))
    for block in (f"blocks.{i}" for i in range(numbers["layers"])):
        yield from _affine(*(f"{block}.{layer}" for layer in ("norm1", "norm2", "up", "down")))
        yield from _affine(*(f"{block}.attention.{piece}" for piece in ("q", "k", "v", "out")))
