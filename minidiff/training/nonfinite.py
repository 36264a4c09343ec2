"""Where NaN began. Numbers that are not finite spread to everything after them, so the first module that gives one is the one to know."""
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from minidiff.errors import UserError


class NonFiniteError(UserError):
    """A number became NaN or infinite; the message names the weight, the module or the gradient where it began."""


class _FirstBad(Exception):
    """The output of a module is not finite: what is computed after it does not matter."""


def first_bad(module: nn.Module, compute: Callable[[], object]) -> str | None:
    """Call compute() and watch module: the first weight, or output of a submodule, that is not finite, in words. None if all are finite.
    This looks at every output, so call it only after something went wrong."""
    for name, parameter in module.named_parameters():
        if not parameter.isfinite().all():
            return f'the weight "{name}" is not finite'
    handles = [part.register_forward_hook(partial(_look, name)) for name, part in module.named_modules()]
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
    """Where the numbers of a training step that are not finite begin, in words; forward() computes its loss again."""
    if found := first_bad(module, forward):
        return found
    for name, parameter in module.named_parameters():
        if parameter.grad is not None and not parameter.grad.isfinite().all():
            return f'the gradient of "{name}" is not finite'
    return "the loss is not finite"


def _look(name: str, _module: nn.Module, _inputs: tuple, output: object) -> None:
    if isinstance(output, Tensor) and not output.isfinite().all():
        dtype = str(output.dtype).removeprefix("torch.")
        raise _FirstBad(f'the output of "{name or "the whole module"}" is the first that is not finite (in {dtype})')
