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
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.amp import GradScaler

from minidiff.training import distributed, nonfinite, optimizers
from minidiff.training.ahead import Ahead
from minidiff.training.backward import autocasting, backward_all
from minidiff.training.bins import BINS, Loss, by_bin, means, on_cpu
from minidiff.training.config import TrainConfig
from minidiff.training.device import warn_of_imitation
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
    grad_norm: float  # not finite: in float16 it overflowed, and the step was skipped
    parts: dict[str, float] = {}  # means of the loss function's other entries  # noqa: RUF012


class EMA:
    """Exponential moving average of a module's parameters ([2] section 4), its decay warmed up.

    average: a copy of the module, which shares with it the parameters that are frozen."""

    def __init__(self, module: nn.Module, decay: float):
        frozen = {id(p): p for p in module.parameters() if not p.requires_grad}
        self.decay, self.average = decay, copy.deepcopy(module, frozen).requires_grad_(False).eval()
        self.follow(module)

    def follow(self, module: nn.Module) -> None:
        """Average the module's parameters as they are now: others, once it is in shards."""
        pairs = list(zip(self.average.parameters(), module.parameters(), strict=True))
        self.averages = [average for average, weight in pairs if average is not weight]
        self.weights = [weight for average, weight in pairs if average is not weight]

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
    numbers. config.pieces: batches(k) yields each batch in this many pieces, to save memory. While
    a GPU computes a step, the next one's batches are made: they must not depend on the weights.

    folder: locked during the run; every step adds a line to log.jsonl, and a checkpoint is written
    every config.save_every steps, at the end, and on Ctrl-C and SIGTERM. resume: go on from the
    newest checkpoint. Its step is yielded again, because the run may have been killed before the
    caller handled it.
    """
    device = next(p.device for p in module.parameters() if p.requires_grad)
    forward = partial(autocasting, loss_fn, device.type, config.autocast)
    forward = distributed.joint(forward, module, config, ema and ema.average)
    parameters = [p for p in module.parameters() if p.requires_grad]
    groups = optimizers.grouped(parameters, config.weight_decay)
    if ema is not None:
        ema.follow(module)
    optimizer = optimizers.named(config.optimizer, groups, config.lr, config.betas, device)
    optimizer.zero_grad()  # whatever the caller left there
    folder = distributed.own_folder(folder)
    warn_of_imitation(config.autocast, device.type)
    scaler = GradScaler(device.type, enabled=config.autocast == torch.float16)
    averages = None if ema is None else ema.average
    meter = Meter(folder, config, module)
    plan = config.save_every, config.steps, scaler, config.background
    progress = Progress(folder, config.identity(), module, optimizer, averages, *plan)
    with locked(folder), Signals() as signals, workers(config.threads) as pool, progress:
        last = progress.start(resume)
        start = last["step"] if last else 0
        if last and last.keys() == set(TrainStep._fields):
            signals.saved = start
            yield TrainStep(**last)

        data = Ahead(iter(batches(start * config.accumulate)), config, device)
        for step in range(start, config.steps):
            module.train()  # the caller may have sampled in between
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate(step) * group.get("lr_multiplier", 1.0)

            micro = distributed.share(data.take(step))
            signals.saved = None
            losses = meter.backward_all(forward, parameters, micro, pool, scaler)
            scaler.unscale_(optimizer)
            norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
            losses, norm = distributed.gathered(losses), distributed.whole(norm)

            data.prepare(step + 1)
            losses, grad_norm = on_cpu(losses, norm)  # here alone the loop waits for a GPU
            loss = torch.cat([each["loss"] for each in losses]).float()
            skipped = not grad_norm.isfinite() and scaler.is_enabled() and scaler.get_scale() > 1
            if not (loss.isfinite().all() and (grad_norm.isfinite() or skipped)):
                torch.manual_seed(seed_of(config.seed, step))
                culprit = nonfinite.in_step(module, partial(list, map(forward, micro)))
                remedy = "lower the learning rate, or compute in float32"
                raise NonFiniteError(f"step {step + 1}: {culprit}; {remedy}.")
            if not skipped:
                nn.utils.clip_grads_with_norm_(parameters, config.clip, norm)
                optimizer.step()
            scaler.update()
            optimizer.zero_grad()
            if ema is not None:
                ema.update(step + 1)

            lr, mean, bins = config.learning_rate(step), loss.mean().item(), by_bin(loss, losses)
            done = TrainStep(step + 1, mean, bins, lr, grad_norm.item(), means(losses))
            progress.log(done._asdict())
            signals.agree()
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
