"""Where NaN began: numbers that are not finite spread through everything after them, so the first module that gives one is the one to know."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from minidiff.errors import UserError


@contextmanager
def watched(module: nn.Module, advice: str) -> Iterator[None]:
    """While it lasts, the first submodule whose output is not finite is named in a UserError. It costs a look at every output."""

    def look(name: str):
        def hook(_, __, output: object) -> None:
            if isinstance(output, torch.Tensor) and not output.isfinite().all():
                precision = str(output.dtype).removeprefix("torch.")
                raise UserError(
                    f"numbers that are not finite (NaN or infinity) began in {name or 'the model'}, computed in {precision}; {advice}"
                )

        return hook

    handles = [part.register_forward_hook(look(name)) for name, part in module.named_modules()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
