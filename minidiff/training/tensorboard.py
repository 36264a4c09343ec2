"""A run's numbers for TensorBoard, beside its log. TensorBoard is an optional extra."""

import time
from collections.abc import Generator, Iterable
from contextlib import closing
from pathlib import Path
from typing import Any

from minidiff.options.finetuning import check_tensorboard
from minidiff.training import lock

EVERY = 1.0  # seconds between two readings of the speed


def logged(training: Generator, folder: Path, wanted: bool = True) -> Generator:
    """The steps of train.train(..., folder=folder), each written to an event file in the folder as
    it passes. Steps that a resume does again replace those written before. Without `wanted` the
    steps alone."""
    if not wanted:
        return training
    check_tensorboard()
    return _written(training, folder)


def _written(training: Generator, folder: Path) -> Generator:
    from torch.utils.tensorboard import SummaryWriter  # a second or more

    writer, next_speed = None, 0.0
    try:
        with closing(training):
            for step in training:
                # hide what is already there of this step and later ones
                writer = writer or SummaryWriter(folder, purge_step=step.step)
                _add(writer, scalars(step).items(), step.step)
                if time.monotonic() >= next_speed:
                    next_speed = time.monotonic() + EVERY
                    _add(writer, speed(lock.told(folder)[1]).items(), step.step)
                yield step
    finally:
        if writer is not None:
            writer.close()


def scalars(step: Any) -> dict[str, float]:
    """The numbers of a TrainStep, by TensorBoard's names; bins in tenths from data to noise."""
    values = {"loss": step.loss, "learning rate": step.lr, "gradient norm": step.grad_norm}
    values |= {f"loss of/{name}": value for name, value in step.parts.items()}
    bins = {f"loss by noise level/{k / 10:.1f}": value for k, value in enumerate(step.bins)}
    return values | {name: value for name, value in bins.items() if value is not None}


def speed(status: dict) -> dict[str, float]:
    """What a run tells of its speed (meter.py), by TensorBoard's names."""
    if not (seconds := status.get("seconds_per_step")):
        return {}
    share = status["operations_per_step"] / seconds / status["peak_per_second"]
    values = {
        "speed/examples per second": status["examples_per_step"] / seconds,
        "speed/share of the peak": share,  # 0: not counted
        "speed/GB held at most": status["memory_gb"],
    }
    return {name: value for name, value in values.items() if value}


def _add(writer: Any, values: Iterable[tuple[str, float]], step: int) -> None:
    for name, value in values:
        writer.add_scalar(name, value, step)
