"""Training: one loop that knows nothing of diffusion. A DDPM, a VAE and a fine-tune are three loss functions, not three trainers.

    for step in train(loss_fn, module, batches, steps=1000, lr=1e-3):
        ...                                     # a generator: the caller logs, plots, samples, stops

Everything random in step k follows from (seed, k): the batch, the noise, dropout. So a run that was killed and resumed
ends, bit for bit, where an uninterrupted one would, with no random state to save.

[1] Loshchilov, Hutter. Decoupled Weight Decay Regularization. 2019. arXiv:1711.05101
[2] Loshchilov, Hutter. SGDR: Stochastic Gradient Descent with Warm Restarts. 2017. arXiv:1608.03983
[3] Ho, Jain, Abbeel. Denoising Diffusion Probabilistic Models. 2020. arXiv:2006.11239
"""

import copy
import json
import math
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from minidiff.errors import UserError
from minidiff.training import optimizers
from minidiff.training.seeds import seed_of

# A batch of any kind to (a loss for each example, where each lies in [0, 1] on the axis of the loss-by-t plot, or None).
LossFn = Callable[[Any], tuple[Tensor, Tensor | None]]
Run = dict[
    str, int | float
]  # what a checkpoint must have in common with the run that goes on from it
BINS = 10


class TrainStep(NamedTuple):
    """What the caller sees after each optimizer step."""

    step: int  # counted from 1
    loss: float
    bins: list[float | None]  # mean loss in each tenth of [0, 1]; None where no example fell
    lr: float
    grad_norm: float


class NonFiniteError(UserError):
    """The loss or a gradient became NaN or infinite; the message names the first module it happened in."""


class EMA:
    """Exponential moving average of a module's parameters ([3] section 4), its decay warmed up so that early averages are not noise."""

    def __init__(self, module: nn.Module, decay: float):
        self.decay, self.average = decay, copy.deepcopy(module).requires_grad_(False).eval()
        self.averages, self.weights = list(self.average.parameters()), list(module.parameters())

    @torch.no_grad()
    def update(self, step: int) -> None:
        """average <- d average + (1 - d) weights with d = min(decay, step / (step + 9)): at first a mean over the last tenth of the run."""
        torch._foreach_lerp_(self.averages, self.weights, 1 - min(self.decay, step / (step + 9)))


def learning_rate(step: int, steps: int, lr: float, warmup: int) -> float:
    """Linear warm-up, then half a cosine down to zero ([2] eq. 5). step is counted from 0."""
    if step < warmup:
        return lr * (step + 1) / warmup
    return lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def train(
    loss_fn: LossFn,
    module: nn.Module,
    batches: Callable[[int], Iterable[Any]],
    steps: int,
    lr: float,
    *,
    warmup: int = 100,
    betas: tuple[float, float] = (0.9, 0.99),
    weight_decay: float = 0.0,
    clip: float = 1.0,
    optimizer: str = "adamw",
    accumulate: int = 1,
    threads: int = 1,
    ema: EMA | None = None,
    autocast: torch.dtype | None = None,
    seed: int = 0,
    folder: Path | None = None,
    resume: bool = False,
    save_every: int = 500,
) -> Iterator[TrainStep]:
    """AdamW ([1]; optimizer "adamw8bit" keeps its moments in 8 bits) on module's trainable parameters; yields after every optimizer step.

    batches(k) iterates over batches from the k-th on, endlessly; `accumulate` of them make a step, `threads` of them at a time: on a CPU,
    small networks share two cores far better by pictures than by operations. Then all that is random must come with the batch, since
    threads that draw from one generator draw in any order. With a folder, every step adds a line to log.jsonl, and checkpoint.pt is
    written every save_every steps, at the end, and on Ctrl-C; resume continues from it, if steps, lr, warmup, accumulate and seed are its own.
    autocast: compute in this dtype (bfloat16); the weights stay float32, so there is no loss to scale.
    """
    if steps < 1:
        raise UserError(f"steps is {steps}; it must be at least 1.")
    parameters = [p for p in module.parameters() if p.requires_grad]
    device = parameters[0].device
    groups = [  # biases and norms are not decayed
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    adamw = optimizers.named(optimizer, groups, lr, betas, device)
    adamw.zero_grad()  # whatever the caller left there
    start, run = (
        0,
        {"seed": seed, "steps": steps, "lr": lr, "warmup": warmup, "accumulate": accumulate},
    )
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        if not resume:  # a checkpoint of an earlier run must not be what a later --resume finds
            (folder / "checkpoint.pt").unlink(missing_ok=True)
        start = load_checkpoint(folder, run, module, adamw, ema) if resume else 0
        _cut_log(folder / "log.jsonl", start)

    def forward(batch: Any) -> tuple[Tensor, Tensor | None]:
        with torch.autocast(device.type, autocast, enabled=autocast is not None):
            return loss_fn(batch)

    def backward_all(micro: list[Any]) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Sum the gradients of all parts of a batch into .grad; yields the losses."""
        if workers is None:
            for batch in micro:
                each, where = forward(batch)
                (each.mean() / accumulate).backward()
                yield each, where
            return

        def gradients(batch: Any) -> tuple[Tensor, Tensor | None, tuple[Tensor | None, ...]]:
            each, where = forward(batch)
            return (
                each,
                where,
                torch.autograd.grad(each.mean() / accumulate, parameters, allow_unused=True),
            )

        for each, where, grads in workers.map(
            gradients, micro
        ):  # in the order of the parts: the sum is the same whoever came first
            for p, g in zip(parameters, grads, strict=True):
                if g is not None:
                    p.grad = g if p.grad is None else p.grad.add_(g)
            yield each, where

    data = iter(batches(start * accumulate))
    with _workers(threads) as workers, _interrupts_wait() as interrupted:
        for step in range(start, steps):
            module.train()  # the caller may have sampled in between
            for group in adamw.param_groups:
                group["lr"] = learning_rate(step, steps, lr, warmup)

            torch.manual_seed(seed_of(seed, step))
            losses, places, micro = [], [], [next(data) for _ in range(accumulate)]
            for each, where in backward_all(micro):
                losses.append(each.detach().float())
                places.append(where)

            loss = torch.cat(losses).cpu()
            grads = [p.grad for p in parameters if p.grad is not None]
            norm = nn.utils.get_total_norm(grads)
            if not (loss.isfinite().all() and norm.isfinite()):
                torch.manual_seed(seed_of(seed, step))
                culprit = _first_bad(loss_fn, module, micro, autocast)
                raise NonFiniteError(
                    f"step {step + 1}: {culprit}; lower the learning rate, or compute in float32."
                )
            nn.utils.clip_grads_with_norm_(parameters, clip, norm)
            del grads  # this list would keep them alive beside those of the next step
            adamw.step()
            adamw.zero_grad()
            if ema is not None:
                ema.update(step + 1)

            done = TrainStep(
                step + 1,
                loss.mean().item(),
                by_bin(loss, places),
                adamw.param_groups[0]["lr"],
                norm.item(),
            )
            if folder is not None:
                with open(folder / "log.jsonl", "a", encoding="utf-8") as log:
                    log.write(json.dumps(done._asdict()) + "\n")
                if done.step % save_every == 0 or done.step == steps or interrupted.is_set():
                    save_checkpoint(folder, done.step, run, module, adamw, ema)
            if interrupted.is_set():
                raise KeyboardInterrupt
            yield done
        if interrupted.is_set():  # while the caller had the last step
            raise KeyboardInterrupt
    module.eval()


def by_bin(loss: Tensor, places: list[Tensor | None]) -> list[float | None]:
    """Mean loss in each tenth of [0, 1]."""
    if any(where is None for where in places):
        return [None] * BINS
    index = (torch.cat(places).cpu() * BINS).long().clamp(0, BINS - 1)
    return [loss[index == b].mean().item() if (index == b).any() else None for b in range(BINS)]


def _first_bad(
    loss_fn: LossFn, module: nn.Module, batches: list[Any], autocast: torch.dtype | None
) -> str:
    """Run the same step again and watch: the first weight, module output, or gradient that is not finite."""
    for name, p in module.named_parameters():
        if not p.isfinite().all():
            return f'the weight "{name}" is not finite'
    found: list[str] = []

    def watch(name: str) -> Callable:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if not found and isinstance(output, Tensor) and not output.isfinite().all():
                found.append(
                    f'the output of "{name or "the whole module"}" is the first that is not finite'
                )

        return hook

    handles = [m.register_forward_hook(watch(name)) for name, m in module.named_modules()]
    try:
        with (
            torch.no_grad(),
            torch.autocast(
                next(module.parameters()).device.type, autocast, enabled=autocast is not None
            ),
        ):
            for batch in batches:
                loss_fn(batch)
    finally:
        for handle in handles:
            handle.remove()
    if found:
        return found[0]
    gradient = next(
        (
            name
            for name, p in module.named_parameters()
            if p.grad is not None and not p.grad.isfinite().all()
        ),
        None,
    )
    return (
        "the loss is not finite"
        if gradient is None
        else f'the gradient of "{gradient}" is not finite'
    )


@contextmanager
def _workers(threads: int) -> Iterator[ThreadPoolExecutor | None]:
    """Threads that share out the cores evenly between them; None where one is enough."""
    if threads == 1:
        yield None
        return
    cores = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(
            threads, initializer=torch.set_num_threads, initargs=(max(1, cores // threads),)
        ) as workers:
            yield workers
    finally:
        torch.set_num_threads(cores)


@contextmanager
def _interrupts_wait() -> Iterator[threading.Event]:
    """Ctrl-C lets the step finish and be saved; a second one interrupts at once. Only the main thread can listen for it."""
    interrupted = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield interrupted
        return
    before = signal.getsignal(signal.SIGINT)

    def first(*_: Any) -> None:
        interrupted.set()
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, first)
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, before)


def save_checkpoint(
    folder: Path,
    step: int,
    run: Run,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    ema: EMA | None,
) -> None:
    """All that resuming needs, written beside its place and renamed: a crash, or a full disk, leaves the last checkpoint whole."""
    state = {
        "step": step,
        "run": run,
        "module": module.state_dict(),
        "optimizer": optimizer.state_dict(),
    }
    state["ema"] = ema.average.state_dict() if ema is not None else None
    fresh = folder / "checkpoint.pt.new"
    try:
        torch.save(state, fresh)
        os.replace(fresh, folder / "checkpoint.pt")
    except (
        OSError,
        RuntimeError,
    ) as error:  # torch's writer says RuntimeError where the disk is full
        fresh.unlink(missing_ok=True)
        said = f"step {step} could not be saved ({str(error).splitlines()[0]})"
        raise UserError(
            f"{folder / 'checkpoint.pt'}: {said}; what was saved before is whole. Make room, and go on with --resume."
        ) from error


def load_checkpoint(
    folder: Path, run: Run, module: nn.Module, optimizer: torch.optim.Optimizer, ema: EMA | None
) -> int:
    """Put everything back as it was; returns the steps done, 0 where there is no checkpoint."""
    file = folder / "checkpoint.pt"
    if not file.exists():
        return 0
    try:
        state = torch.load(
            file, map_location="cpu", weights_only=True
        )  # a checkpoint is numbers: it cannot run code
    except (OSError, RuntimeError, UnpicklingError, EOFError, LookupError, ValueError) as error:
        raise UserError(
            f"{file} is damaged, or no checkpoint; start afresh without --resume."
        ) from error
    if not isinstance(state, dict) or not state.keys() >= {
        "step",
        "run",
        "module",
        "optimizer",
        "ema",
    }:
        raise UserError(
            f"{file} is not a checkpoint of a minidiff run; start afresh without --resume."
        )
    for name, value in run.items():
        if (before := state["run"].get(name)) != value:
            raise UserError(
                f"{file} is of a run with {name} {before}, not {value}; pass --{name} {before}, or another --out."
            )
    try:
        module.load_state_dict(state["module"])
        optimizer.load_state_dict(state["optimizer"])
        if ema is not None:
            ema.average.load_state_dict(state["ema"])
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        line = (
            str(error).splitlines()[:2][-1].strip()
        )  # torch's first line is a heading where there are more
        raise UserError(
            f"{file} does not fit this run ({line}); resume with the settings it was made with, or drop --resume."
        ) from error
    return state["step"]


def _cut_log(file: Path, start: int) -> None:
    """Keep the lines up to the checkpoint: what came after it is about to happen again."""
    lines = file.read_text(encoding="utf-8").splitlines()[:start] if start and file.exists() else []
    file.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
