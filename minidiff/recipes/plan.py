"""How long a recipe takes on this machine, told before it starts.

A few steps of each act are timed, and their operations counted. Asked for a number of minutes,
every act gets its share of the steps.
"""

import json
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from minidiff.errors import UserError
from minidiff.train import EMA, LossFn, TrainConfig, train
from minidiff.training import atomic
from minidiff.training.json_types import fits

TIMED = 4  # steps
LEAST, MOST = 0.1, 4.0  # times the recipe's steps that `minutes` may choose


class Act(NamedTuple):
    """A training: what learns, what is minimized, from which batches."""

    title: str
    module: nn.Module
    loss: LossFn
    batches: Callable[[int], Iterable[Any]]
    config: TrainConfig
    ema: EMA | None = None


class Cost(NamedTuple):
    """Of one step."""

    seconds: float
    flops: int  # multiplications and additions of matrix products and convolutions


def cost(act: Act) -> Cost:
    """Train act.module for a few steps. The module is not used afterwards."""
    once, timed = replace(act.config, steps=1, threads=1), replace(act.config, steps=TIMED + 1)
    with FlopCounterMode(display=False) as counter:  # it does not see other threads
        for _ in train(act.loss, act.module, act.batches, once):
            pass
    steps = train(act.loss, act.module, act.batches, timed, act.ema)
    next(steps)
    start = time.perf_counter()
    for _ in steps:
        pass
    return Cost((time.perf_counter() - start) / TIMED, counter.get_total_flops())


class Plan(NamedTuple):
    """The steps of each act, and the minutes that were asked for, if any."""

    steps: list[int]
    minutes: float | None = None

    def write(self, file: Path) -> None:
        with atomic.write(file) as new:
            new.write_text(json.dumps(self._asdict()) + "\n", encoding="utf-8")


def read(file: Path, acts: int) -> Plan:
    """The plan of a run that is resumed."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        remedy = "another version made this run; start afresh in another folder"
        raise UserError(f"{file} is missing: {remedy}.") from error
    except (ValueError, RecursionError):
        content = None
    known = isinstance(content, dict) and content.keys() == set(Plan._fields)
    if not (known and fits(content["steps"], list[int]) and fits(content["minutes"], float | None)):
        raise UserError(f"{file} is damaged; start afresh in another folder.")
    if len(content["steps"]) != acts or min(content["steps"]) < 1:
        raise UserError(f"{file} is damaged; start afresh in another folder.")
    return Plan(**content)


def of_run(
    file: Path,
    usual: Sequence[int],
    costs: Sequence[Cost],
    rest: float,
    minutes: float | None,
    begun: bool,
) -> Plan:
    """The plan of a new run, which is written, or that of a run that has begun. The other arguments
    are those of `fitted`."""
    if not begun:
        plan = fitted(usual, costs, rest, minutes)
        file.parent.mkdir(parents=True, exist_ok=True)
        plan.write(file)
        return plan
    plan = read(file, len(costs))
    if minutes not in (None, plan.minutes):
        asked = "no time" if plan.minutes is None else f"{plan.minutes:g} minutes"
        remedy = "resume it without minutes, or choose another folder"
        raise UserError(f"{file}: the run was begun for {asked}; {remedy}.")
    return plan


def fitted(usual: Sequence[int], costs: Sequence[Cost], rest: float, minutes: float | None) -> Plan:
    """The usual steps, or as many of each as take `minutes` with the rest of the run (seconds)."""
    if minutes is None:
        return Plan(list(usual))
    training = sum(n * cost.seconds for n, cost in zip(usual, costs, strict=True))
    scale = (60 * minutes - rest) / training
    if scale < LEAST:
        least = math.ceil((LEAST * training + rest) / 6) / 10
        remedy = f"give it at least {least:g}, or leave it out"
        raise UserError(f"{minutes:g} minutes are too few to learn on this machine; {remedy}.")
    scale = min(scale, MOST)
    return Plan([max(1, round(n * scale)) for n in usual], minutes)
