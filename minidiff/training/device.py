"""Which device to compute on; its name, its work and its memory."""

import platform

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


def device_name(device: str) -> str:
    """The model of a GPU, or the kind of the processor."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} {device}, {torch.get_num_threads()} threads"


def wait(device: str) -> None:
    """Until a GPU has done all its work; a CPU is never behind."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def held_bytes(device: str) -> int:
    """What tensors take on a GPU now; 0 elsewhere."""
    return torch.cuda.memory_allocated(device) if device.startswith("cuda") else 0


def peak_bytes(device: str, anew: bool = False) -> int | None:
    """The most that tensors took on a GPU since the count began anew; None elsewhere."""
    if not device.startswith("cuda"):
        return None
    peak = torch.cuda.max_memory_allocated(device)
    if anew:
        torch.cuda.reset_peak_memory_stats(device)
    return peak
