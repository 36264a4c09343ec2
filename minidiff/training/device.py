"""Which device to compute on."""

import torch

from minidiff.errors import UserError, choice


def pick_device(name: str | torch.device) -> str:
    """The device that a name means here; auto is the GPU if there is one.

    A torch.device, and a number as in cuda:1, are taken too.
    """
    name = str(name)
    present = {
        "cpu": True,
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
    }
    if name == "auto":
        return next(device for device in ("cuda", "mps", "cpu") if present[device])
    kind = name.partition(":")[0]
    choice("device", kind, ("auto", *present))
    if not present[kind]:
        raise UserError(f'no "{name}" on this machine; choose the device cpu, or auto.')
    return name
