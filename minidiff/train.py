"""Training: one loop that knows nothing of diffusion; DDPM and VAE are loss functions to it.

    for step in train(loss_fn, module, batches, TrainConfig(steps=1000, lr=1e-3)):
        ...  # a generator: the caller logs, plots, samples, stops

Everything random in step k follows from (seed, k): the batch, the noise, dropout. So a resumed run
ends, bit for bit, where an uninterrupted one would, with no random state to save. The loop's
helpers are in training/.

[1] Loshchilov, Hutter. Decoupled Weight Decay Regularization. 2019. arXiv:1711.05101
[2] Ho, Jain, Abbeel. Denoising Diffusion Probabilistic Models. 2020. arXiv:2006.11239
"""

import copy
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from minidiff.training import nonfinite, optimizers
from minidiff.training.bins import BINS, Loss, by_bin, means
from minidiff.training.config import TrainConfig
from minidiff.training.lock import locked
from minidiff.training.meter import Meter
from minidiff.training.nonfinite import NonFiniteError
from minidiff.training.resume import Progress, Signals, closed_at_exit
from minidiff.training.seeds import seed_of
from minidiff.training.workers import workers

__all__ = ["BINS", "EMA", "Loss", "LossFn", "NonFiniteError", "TrainConfig", "TrainStep", "train"]
__all__ += ["backward_all", "by_bin", "seed_of"]

# A batch -> "loss" of each example, whose mean is minimized; "progress" of each in [0, 1], for the
# loss by noise level; and other entries, whose means are reported.
LossFn = Callable[[Any], Loss]


class TrainStep(NamedTuple):
    """What the caller sees after each optimizer step."""

    step: int  # counted from 1
    loss: float
    bins: list[float | None]  # mean loss in each tenth of progress; None: no example there
    lr: float
    grad_norm: float
    parts: dict[str, float] = {}  # means of the loss function's other entries  # noqa: RUF012


class EMA:
    """Exponential moving average of a module's parameters ([2] section 4), its decay warmed up."""

    def __init__(self, module: nn.Module, decay: float):
        self.decay, self.average = decay, copy.deepcopy(module).requires_grad_(False).eval()
        self.averages, self.weights = list(self.average.parameters()), list(module.parameters())

    @torch.no_grad()
    def update(self, step: int) -> None:
        """average <- d average + (1 - d) weights, d = min(decay, step / (step + 9)).

        So early on it averages over about the last tenth of the steps so far, not the random start.
        """
        torch._foreach_lerp_(self.averages, self.weights, 1 - min(self.decay, step / (step + 9)))


@closed_at_exit
def train(
    loss_fn: LossFn,
    module: nn.Module,
    batches: Callable[[int], Iterable[Any]],
    config: TrainConfig,
    ema: EMA | None = None,
    folder: Path | None = None,
    resume: bool = False,
) -> Iterator[TrainStep]:
    """AdamW ([1]) on module's trainable parameters; yields after every optimizer step.

    batches(k): an endless iterable of batches from the k-th on; config.accumulate of them make a
    step. config.threads: compute this many at a time (CPU only); the loss must then draw no random
    numbers. config.pieces: batches(k) yields each batch in this many pieces, to save memory.

    folder: locked during the run; every step adds a line to log.jsonl, and a checkpoint is written
    every config.save_every steps, at the end, and on Ctrl-C and SIGTERM. resume: go on from the
    newest checkpoint. Its step is yielded again, because the run may have been killed before the
    caller handled it.
    """
    parameters = [p for p in module.parameters() if p.requires_grad]
    device, groups = parameters[0].device, optimizers.grouped(parameters, config.weight_decay)
    optimizer = optimizers.named(config.optimizer, groups, config.lr, config.betas, device)
    optimizer.zero_grad()  # whatever the caller left there
    forward = partial(_forward, loss_fn, device.type, config.autocast)
    meter = Meter(folder, config, device)
    with locked(folder), Signals() as signals, workers(config.threads) as pool:
        averages = None if ema is None else ema.average
        plan = config.save_every, config.steps
        progress = Progress(folder, config.identity(), module, optimizer, averages, *plan)
        last = progress.start(resume)
        start = last["step"] if last else 0
        if last and last.keys() == set(TrainStep._fields):
            signals.saved = start
            yield TrainStep(**last)

        data = iter(batches(start * config.accumulate))
        for step in range(start, config.steps):
            module.train()  # the caller may have sampled in between
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate(step) * group.get("lr_multiplier", 1.0)

            torch.manual_seed(seed_of(config.seed, step))
            micro = [next(data) for _ in range(config.accumulate * config.pieces)]
            signals.saved = None
            losses = meter(backward_all, forward, parameters, micro, pool)

            loss = torch.cat([each["loss"] for each in losses]).float().cpu()
            norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
            if not (loss.isfinite().all() and norm.isfinite()):
                torch.manual_seed(seed_of(config.seed, step))
                culprit = nonfinite.in_step(module, partial(list, map(forward, micro)))
                remedy = "lower the learning rate, or compute in float32"
                raise NonFiniteError(f"step {step + 1}: {culprit}; {remedy}.")
            nn.utils.clip_grads_with_norm_(parameters, config.clip, norm)
            optimizer.step()
            optimizer.zero_grad()
            if ema is not None:
                ema.update(step + 1)

            lr, mean, bins = config.learning_rate(step), loss.mean().item(), by_bin(loss, losses)
            done = TrainStep(step + 1, mean, bins, lr, norm.item(), means(losses))
            progress.log(done._asdict())
            if progress.due(done.step) or signals.received:
                progress.save(done._asdict())
                signals.saved = done.step if folder is not None else None
            signals.stop()
            yield done
            if signals.received and signals.saved is None:  # while the caller had the step
                progress.save(done._asdict())
                signals.saved = done.step if folder is not None else None
            signals.stop()
    module.eval()


def backward_all(
    forward: LossFn,
    parameters: list[nn.Parameter],
    batches: list[Any],
    pool: Executor | None = None,
) -> list[Loss]:
    """Add the gradients of the mean loss over all batches to .grad; returns losses."""
    if pool is None:
        return [_backward(forward, len(batches), batch) for batch in batches]
    losses, gradients = [], partial(_gradients, forward, parameters, len(batches))
    for loss, grads in pool.map(gradients, batches):  # in the order of the batches
        losses.append(loss)
        for p, g in zip(parameters, grads, strict=True):
            if g is not None:
                p.grad = g if p.grad is None else p.grad.add_(g)
    return losses


def _forward(loss_fn: LossFn, device: str, autocast: torch.dtype | None, batch: Any) -> Loss:
    with torch.autocast(device, autocast, enabled=autocast is not None):
        return loss_fn(batch)


def _backward(forward: LossFn, batches: int, batch: Any) -> Loss:
    loss = forward(batch)
    (loss["loss"].mean() / batches).backward()
    return {name: value.detach() for name, value in loss.items()}


def _gradients(
    forward: LossFn, parameters: list[nn.Parameter], batches: int, batch: Any
) -> tuple[Loss, tuple[Tensor | None, ...]]:
    """As _backward, but safe in threads: it returns the gradients and leaves .grad alone."""
    loss = forward(batch)
    grads = torch.autograd.grad(loss["loss"].mean() / batches, parameters, allow_unused=True)
    return {name: value.detach() for name, value in loss.items()}, grads
