"""Where NaN began: numbers that are not finite spread, so the first module to give one counts."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from minidiff.errors import UserError


class NonFiniteError(UserError):
    """A number became NaN or infinite; the message names the weight, module or gradient."""


class _FirstBad(Exception):
    """The output of a module is not finite."""


def first_bad(module: nn.Module, compute: Callable[[], object]) -> str | None:
    """The first weight of module, or output of a submodule in compute(), that is not finite.

    In words; None if all are finite. This is slow: call it only after something went wrong.
    """
    for name, parameter in module.named_parameters():
        if not parameter.isfinite().all():
            return f'the weight "{name}" is not finite'
    parts = module.named_modules()
    handles = [part.register_forward_hook(partial(_look, name)) for name, part in parts]
    try:
        compute()
    except _FirstBad as found:
        return str(found)
    finally:
        for handle in handles:
            handle.remove()
    return None


@torch.no_grad()
def in_step(module: nn.Module, forward: Callable[[], object]) -> str:
    """Where NaN begins in a training step, in words; forward() computes its loss again."""
    if found := first_bad(module, forward):
        return found
    for name, parameter in module.named_parameters():
        if parameter.grad is not None and not parameter.grad.isfinite().all():
            return f'the gradient of "{name}" is not finite'
    return "the loss is not finite"


def _look(name: str, _module: nn.Module, _inputs: tuple, output: object) -> None:
    if isinstance(output, Tensor) and not output.isfinite().all():
        dtype, name = str(output.dtype).removeprefix("torch."), name or "the whole module"
        raise _FirstBad(f'the output of "{name}" is the first that is not finite (in {dtype})')
