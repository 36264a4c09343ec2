"""Which device to compute on; its name, its work and its memory; copies that do not wait for it."""

import contextlib
import ctypes
import os
import platform
import sys
import warnings
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

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


def warn_of_imitation(dtype: torch.dtype | None, device: str) -> None:
    """Warn of bf16 where the processor must imitate it. torch can tell of x86 alone."""
    is_native = getattr(torch.cpu, "_is_avx512_bf16_supported", None)  # AMX comes with it
    is_x86 = platform.machine().lower() in ("x86_64", "amd64")
    if dtype == torch.bfloat16 and device == "cpu" and is_x86 and is_native and not is_native():
        warnings.warn(
            "this processor does not compute in bf16, and imitates it slowly; fp32 is many times "
            "faster",
            stacklevel=3,
        )


def plain_attention(
    device: str, dtype: torch.dtype | None
) -> contextlib.AbstractContextManager[None]:
    """PyTorch's attention as plain products of matrices, where a CPU computes in bf16: its fused
    kernel takes ten times as long there for a few dozen positions. For long sequences it needs
    memory."""
    plain = device == "cpu" and dtype == torch.bfloat16
    return sdpa_kernel(SDPBackend.MATH) if plain else contextlib.nullcontext()


def overlaps(device: torch.device) -> bool:
    """Whether it works in order while the CPU goes on; MPS may copy what was changed since."""
    return device.type not in ("cpu", "mps")


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on this device. A GPU copies from pinned memory, when it comes to it."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = torch.empty_like(tensor, pin_memory=True).copy_(tensor)
    return tensor.to(device, non_blocking=overlaps(device))


def to_cpu(tensors: list[Tensor]) -> list[Tensor]:
    """The same on the CPU, all those of a GPU in one copy: it is waited for once."""
    there = [tensor for tensor in tensors if tensor.device.type != "cpu"]
    if not there:
        return tensors
    together = torch.cat([tensor.detach().flatten() for tensor in there]).cpu()
    rows = iter(together.split([tensor.numel() for tensor in there]))
    return [
        next(rows).to(tensor.dtype).view(tensor.shape) if tensor.device.type != "cpu" else tensor
        for tensor in tensors
    ]


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
