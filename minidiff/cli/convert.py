"""The verb that writes a checkpoint in another layout."""

from pathlib import Path
from typing import Annotated, Literal

import tyro

from minidiff.cli import options
from minidiff.cli.options import Dtype, Parts, Source
from minidiff.errors import UserError
from minidiff.training import atomic

Destination = tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="DST")]]
NO_PARTS = Parts()


def convert(
    source: Source,
    destination: Destination,
    layout: Annotated[Literal["minidiff", "diffusers", "compvis"], tyro.conf.arg(name="to")],
    dtype: Dtype | None = None,
    parts: Parts = NO_PARTS,
    out: Path = Path("."),
) -> None:
    """Write a checkpoint in another layout: the same tensors under other names.

    Example: minidiff convert sd15.safetensors sd15 --to diffusers --dtype fp16

    Args:
        source: what to read: a folder of ours, a diffusers folder, one .safetensors or .ckpt file,
            or a name on the Hugging Face Hub.
        destination: what to write; a folder, or for compvis a file that ends in .safetensors. It
            must not exist.
        layout: the layout to write.
        dtype: the precision to write. Default: as it is.
        out: the folder that the destination is in.
    """
    options.check_out(out)
    destination = out / destination
    atomic.check_new(destination)
    options.check_out(destination.parent)
    if layout == "compvis" and destination.suffix != ".safetensors":
        raise UserError(f"{destination} should end in .safetensors; pickles are not written.")
    from minidiff.checkpoints import write

    model = parts.load(source, "cpu", dtype)
    if layout == "minidiff":
        print(model.save(destination))
    elif layout == "diffusers":
        print(write.save_diffusers(model, destination))
    else:
        print(write.save_compvis(model, destination))
