"""Which device to compute on; its name, its work and its memory."""

import ctypes
import os
import platform
import sys
from pathlib import Path

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


def free_bytes(device: str | torch.device) -> int:
    """The memory that is free: of a GPU, or of this machine under Linux; elsewhere all that the
    machine has."""
    if str(device).startswith("cuda"):
        return torch.cuda.mem_get_info(device)[0]
    if sys.platform == "win32":
        kilobytes = ctypes.c_ulonglong()
        ctypes.windll.kernel32.GetPhysicallyInstalledSystemMemory(ctypes.byref(kilobytes))
        return 1024 * kilobytes.value
    if sys.platform != "linux":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    lines = Path("/proc/meminfo").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))


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
