"""Training: one loop that knows nothing of diffusion. A DDPM, a VAE and a fine-tune are three loss functions, not three trainers.

    for step in train(loss_fn, module, batches, TrainConfig(steps=1000, lr=1e-3)):
        ...                                     # a generator: the caller logs, plots, samples, stops

Everything random in step k follows from (seed, k): the batch, the noise, dropout. So a run that was killed and resumed
ends, bit for bit, where an uninterrupted one would, with no random state to save. The room beside it is training/.

[1] Loshchilov, Hutter. Decoupled Weight Decay Regularization. 2019. arXiv:1711.05101
[2] Ho, Jain, Abbeel. Denoising Diffusion Probabilistic Models. 2020. arXiv:2006.11239
"""
import copy
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from minidiff.training import nonfinite, optimizers
from minidiff.training.config import TrainConfig
from minidiff.training.lock import locked
from minidiff.training.nonfinite import NonFiniteError
from minidiff.training.resume import Progress, Signals, closed_at_exit
from minidiff.training.workers import workers

__all__ = ["BINS", "EMA", "Loss", "LossFn", "NonFiniteError", "TrainConfig", "TrainStep", "by_bin", "seed_of", "train"]

# "loss": of each example, what is minimised in the mean; "progress": where each lies in [0, 1] for the loss by noise level, if anywhere;
# whatever else is named is reported by its mean.
Loss = dict[str, Tensor]
LossFn = Callable[[Any], Loss]  # of a batch of any kind
BINS = 10


class TrainStep(NamedTuple):
    """What the caller sees after each optimizer step."""

    step: int  # counted from 1
    loss: float
    bins: list[float | None]  # mean loss in each tenth of [0, 1]; None where no example lies
    lr: float
    grad_norm: float
    parts: dict[str, float] = {}  # the means of what else the loss function names  # noqa: RUF012


class EMA:
    """Exponential moving average of a module's parameters ([2] section 4). Its decay is warmed up so that early averages are not noise."""

    def __init__(self, module: nn.Module, decay: float):
        self.decay, self.average = decay, copy.deepcopy(module).requires_grad_(False).eval()
        self.averages, self.weights = list(self.average.parameters()), list(module.parameters())

    @torch.no_grad()
    def update(self, step: int) -> None:
        """average <- d average + (1 - d) weights with d = min(decay, step / (step + 9)): at first a mean over the last tenth of the run."""
        torch._foreach_lerp_(self.averages, self.weights, 1 - min(self.decay, step / (step + 9)))


def seed_of(seed: int, step: int) -> int:
    """One number for (seed, step), spread out so that neighbouring seeds share none."""
    return (seed * 1_000_003 + step) * 2_654_435_761 % 2**63


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
    """AdamW ([1]; optimizer "adamw8bit" keeps its moments in 8 bits) on module's trainable parameters; yields after every optimizer step.

    batches(k) iterates over batches from the k-th on, endlessly; config.accumulate of them make a step, config.threads of them at a time:
    on a CPU, small networks share two cores far better by pictures than by operations. Then all that is random must come with the batch,
    since threads that draw from one generator draw in any order. Where a machine wants smaller batches, batches() yields each in
    config.pieces.

    With a folder, which is locked meanwhile, every step adds a line to log.jsonl, and a checkpoint is written every config.save_every
    steps, at the end, and on Ctrl-C and SIGTERM. resume goes on from the newest one. It first yields the step of that checkpoint once
    more, so that what the caller does after a step is done also where a kill came in between.
    """
    parameters = [p for p in module.parameters() if p.requires_grad]
    device, groups = parameters[0].device, optimizers.grouped(parameters, config.weight_decay)
    optimizer = optimizers.named(config.optimizer, groups, config.lr, config.betas, device)
    optimizer.zero_grad()  # whatever the caller left there
    forward = partial(_forward, loss_fn, device.type, config.autocast)
    with locked(folder), Signals() as signals, workers(config.threads) as pool:
        progress = Progress(folder, config.identity(), module, optimizer, None if ema is None else ema.average)
        last = progress.start(resume)
        start = last["step"] if last else 0
        if last and last.keys() == set(TrainStep._fields):
            signals.saved = start
            yield TrainStep(**last)

        data = iter(batches(start * config.accumulate))
        for step in range(start, config.steps):
            module.train()  # the caller may have sampled in between
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate(step)

            torch.manual_seed(seed_of(config.seed, step))
            micro = [next(data) for _ in range(config.accumulate * config.pieces)]
            signals.saved = None
            losses = backward_all(forward, parameters, micro, pool)

            loss = torch.cat([each["loss"] for each in losses]).float().cpu()
            norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
            if not (loss.isfinite().all() and norm.isfinite()):
                torch.manual_seed(seed_of(config.seed, step))
                culprit = nonfinite.in_step(module, partial(list, map(forward, micro)))
                raise NonFiniteError(f"step {step + 1}: {culprit}; lower the learning rate, or compute in float32.")
            nn.utils.clip_grads_with_norm_(parameters, config.clip, norm)
            optimizer.step()
            optimizer.zero_grad()
            if ema is not None:
                ema.update(step + 1)

            lr = optimizer.param_groups[0]["lr"]
            done = TrainStep(step + 1, loss.mean().item(), by_bin(loss, losses), lr, norm.item(), _means(losses))
            progress.log(done._asdict())
            if done.step % config.save_every == 0 or done.step == config.steps or signals.received:
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
    forward: LossFn, parameters: list[nn.Parameter], batches: list[Any], pool: ThreadPoolExecutor | None = None
) -> list[Loss]:
    """Add the gradients of the mean loss over all batches to .grad; returns what the loss function said of each, without gradients."""
    if pool is None:
        return [_backward(forward, len(batches), batch) for batch in batches]
    losses = []
    for loss, grads in pool.map(partial(_gradients, forward, parameters, len(batches)), batches):  # in this order, whoever ends first
        losses.append(loss)
        for p, g in zip(parameters, grads, strict=True):
            if g is not None:
                p.grad = g if p.grad is None else p.grad.add_(g)
    return losses


def by_bin(loss: Tensor, losses: list[Loss]) -> list[float | None]:
    """Mean loss in each tenth of [0, 1]."""
    if any(each.get("progress") is None for each in losses):
        return [None] * BINS
    index = (torch.cat([each["progress"] for each in losses]).cpu() * BINS).long().clamp(0, BINS - 1)
    return [loss[index == b].mean().item() if (index == b).any() else None for b in range(BINS)]


def _means(losses: list[Loss]) -> dict[str, float]:
    names = [name for name in losses[0] if name not in ("loss", "progress")]
    return {name: torch.cat([each[name] for each in losses]).float().mean().item() for name in names}


def _forward(loss_fn: LossFn, device: str, autocast: torch.dtype | None, batch: Any) -> Loss:
    with torch.autocast(device, autocast, enabled=autocast is not None):
        return loss_fn(batch)


def _backward(forward: LossFn, batches: int, batch: Any) -> Loss:
    loss = forward(batch)
    (loss["loss"].mean() / batches).backward()
    return {name: value.detach() for name, value in loss.items()}


def _gradients(forward: LossFn, parameters: list[nn.Parameter], batches: int, batch: Any) -> tuple[Loss, tuple[Tensor | None, ...]]:
    """As _backward, and beside other threads: nothing is written to .grad."""
    loss = forward(batch)
    grads = torch.autograd.grad(loss["loss"].mean() / batches, parameters, allow_unused=True)
    return {name: value.detach() for name, value in loss.items()}, grads
