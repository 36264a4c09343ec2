"""Tensors into networks: nothing is initialized, nothing is copied that need not be, and every tensor has its place."""

import ctypes
import mmap

import torch
from torch import Tensor, nn

from minidiff.errors import UserError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def empty(network: type[nn.Module], numbers: dict) -> nn.Module:
    """A network of these numbers whose tensors have shapes and no memory."""
    with torch.device("meta"):
        return network(network.Config(**numbers))


def fill(
    module: nn.Module, state: dict[str, Tensor], where: str, dtype: torch.dtype | None = None
) -> nn.Module:
    """The module, holding these very tensors, or its parameters in another precision. A tensor that is missing, left over, of another shape
    or kind, or not finite is named. `where` is the file, for messages. What is converted is used up: nobody may read `state` afterwards."""
    expected = module.state_dict()
    missing, extra = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
    if missing or extra:
        kind, found = ("missing", missing) if missing else ("left over", extra)
        raise UserError(
            f'{where}: {len(missing)} tensors are missing and {len(extra)} left over; the first {kind} is "{found[0]}".'
        )
    state, parameters = dict(state), dict(module.named_parameters())
    for name, value in state.items():
        if value.shape != expected[name].shape:
            raise UserError(
                f'{where}: "{name}" is {tuple(value.shape)}, where {tuple(expected[name].shape)} would fit the other tensors.'
            )
        if not value.is_floating_point():
            raise UserError(
                f'{where}: "{name}" is made of {str(value.dtype).removeprefix("torch.")}; weights are floating-point numbers.'
            )
        if not value.sum(dtype=torch.promote_types(value.dtype, torch.float32)).isfinite():
            raise UserError(
                f'{where}: "{name}" holds numbers that are not finite (NaN or infinity); training broke before it was saved.'
            )
        if dtype not in (None, value.dtype) and name in parameters:
            state[name] = value.to(dtype)
            _forget(value)
    module.load_state_dict(state, assign=True)
    return module.eval()


def _forget(value: Tensor) -> None:
    """Tell the system that a tensor will not be read again. One that is a map of a file leaves memory at once: without this, a file
    that is converted stands in memory whole beside the result."""
    madvise = (
        getattr(ctypes.CDLL(None), "madvise", None) if hasattr(mmap, "MADV_DONTNEED") else None
    )
    page = mmap.PAGESIZE
    first, end = (
        -(-value.data_ptr() // page),
        (value.data_ptr() + value.nbytes) // page,
    )  # its whole pages; others share the first and last
    if madvise is not None and value.is_contiguous() and end > first:
        madvise(
            ctypes.c_void_p(first * page), ctypes.c_size_t((end - first) * page), mmap.MADV_DONTNEED
        )


def precision_of(part: str, dtype: torch.dtype | None) -> torch.dtype | None:
    """That of one part. In float16 the VAE stays in float32: Stable Diffusion's overflows and draws black pictures."""
    return torch.float32 if part == "vae" and dtype == torch.float16 else dtype


def dtype_named(name: str | torch.dtype | None) -> torch.dtype | None:
    """A torch.dtype, from its short name where it is one. None: as stored."""
    if name is None or isinstance(name, torch.dtype):
        return name
    if name not in DTYPES:
        raise UserError(f'no dtype "{name}"; there is {", ".join(DTYPES)}.')
    return DTYPES[name]
