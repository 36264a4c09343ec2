"""The gradients of a step: forward and backward passes of its batches, in turn or in threads."""

from collections.abc import Callable
from concurrent.futures import Executor
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp import GradScaler

from minidiff.training.bins import Loss

Forward = Callable[[Any], Loss]
UNSCALED = GradScaler("cpu", enabled=False)


def backward_all(
    forward: Forward,
    parameters: list[nn.Parameter],
    batches: list[Any],
    pool: Executor | None = None,
    scaler: GradScaler = UNSCALED,
) -> list[Loss]:
    """Add the gradients of the mean loss over all batches, scaled, to .grad; returns losses."""
    if pool is None:
        return [_backward(forward, len(batches), scaler, batch) for batch in batches]
    losses, gradients = [], partial(_gradients, forward, parameters, len(batches), scaler)
    for loss, grads in pool.map(gradients, batches):  # in the order of the batches
        losses.append(loss)
        for p, g in zip(parameters, grads, strict=True):
            if g is not None:
                p.grad = g if p.grad is None else p.grad.add_(g)
    return losses


def autocasting(loss_fn: Forward, device: str, autocast: torch.dtype | None, batch: Any) -> Loss:
    """The loss, computed in the dtype autocast."""
    with torch.autocast(device, autocast, enabled=autocast is not None):
        return loss_fn(batch)


def _backward(forward: Forward, batches: int, scaler: GradScaler, batch: Any) -> Loss:
    loss = forward(batch)
    scaler.scale(loss["loss"].mean() / batches).backward()
    return {name: value.detach() for name, value in loss.items()}


def _gradients(
    forward: Forward,
    parameters: list[nn.Parameter],
    batches: int,
    scaler: GradScaler,
    batch: Any,
) -> tuple[Loss, tuple[Tensor | None, ...]]:
    """As _backward, but safe in threads: it returns the gradients and leaves .grad alone."""
    loss = forward(batch)
    scaled = scaler.scale(loss["loss"].mean() / batches)
    grads = torch.autograd.grad(scaled, parameters, allow_unused=True)
    return {name: value.detach() for name, value in loss.items()}, grads
