"""The verb that trains a small model from nothing."""

from pathlib import Path

from minidiff.cli import options
from minidiff.cli.options import Device
from minidiff.errors import UserError


@options.alone
def quickstart(
    out: Path = Path("out/quickstart"),
    seed: int = 0,
    device: Device = "auto",
    resume: bool = False,
    minutes: float | None = None,
) -> None:
    """Train a small text-to-image model here and now, from nothing, and show how it happened.

    Example: minidiff quickstart --out out/quickstart

    Args:
        out: folder for the model, the pictures and results.json.
        seed: everything random follows from it.
        device: where to compute; auto takes the CPU, which the recipe is made for.
        resume: go on where an interrupted run stopped.
        minutes: take as many steps as fit into this time on this machine; default: the recipe's.
    """
    options.check_out(out)
    options.check_seed(seed)
    if minutes is not None and not 0 < minutes < 1e5:
        raise UserError(f"--minutes {minutes:g}: choose a time above 0, such as 5.")
    device = "cpu" if device == "auto" else options.pick_device(device)
    from minidiff.recipes.quickstart import quickstart as train

    train(out, seed, device, resume, minutes)
