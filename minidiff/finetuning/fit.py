"""Options of a fine-tune that fit in a given memory, the fastest first.

Precision, optimizer, checkpointing of activations, the pieces of a batch, how a checkpoint is
written, and LoRA in place of full training where the method is left open: every combination has a
cost in time and, by estimate.py, a peak of memory. The cheapest whose peak fits is chosen. The
batch of a step stays what it is: pieces of it are computed one after another.
"""

import importlib.util
import itertools
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch

from minidiff.checkpoints.folder import DTYPES
from minidiff.errors import UserError
from minidiff.finetuning.estimate import Estimate, Settings, estimate, forward_seconds, settings
from minidiff.latent_diffusion import LatentDiffusion
from minidiff.options.finetuning import (
    FITTED,
    FineTuneConfig,
    Method,
    OptimizerName,
    Precision,
    RecorderConfig,
    TuningConfig,
    bytes_of,
)
from minidiff.training.device import free_bytes
from minidiff.training.progress import human

WITHIN = 1.05  # an estimate is right to a twentieth
HOST = ("cpu", "mps")  # devices whose memory is the machine's
CONTEXT = 5e8  # bytes that CUDA takes beside all tensors
# what time a choice costs, as a factor; a pass of the U-Net is timed in each precision
RECOMPUTED = 4 / 3  # checkpointing: two forward passes and a backward pass, which is two
PER_PIECE = 0.03  # of one more piece
LORA = 0.75  # gradients of the activations alone
EIGHT_BITS, WAITING, OTHER_PRECISION = 1.02, 1.01, 1.05
UNTIMED = 2.0  # fp32 beside bf16, where there is no room to time it


class Choice(NamedTuple):
    """The options that are chosen; the names are those of TuningConfig."""

    method: Method
    dtype: Precision
    optimizer: OptimizerName
    checkpointing: bool
    pieces: int | None
    background: bool

    @classmethod
    def of(cls, config: TuningConfig) -> "Choice":
        return cls(*(getattr(config, name) for name in FITTED))

    def __str__(self) -> str:
        """The options, as the library's messages name them."""
        parts = [
            f"`method={self.method}`",
            f"`dtype={self.dtype}`",
            f"`optimizer={self.optimizer}`",
        ]
        parts += ["`checkpointing`"] if self.checkpointing else []
        parts += [f"`pieces={self.pieces}`"] if self.pieces else []
        parts += [] if self.background else ["`no_background`"]
        return " ".join(parts)


def applied(config: TuningConfig, choice: Choice) -> TuningConfig:
    """The config with the chosen options."""
    return replace(config, **choice._asdict())


@dataclass(frozen=True)
class Case:
    """A fine-tune that is to fit."""

    model: LatentDiffusion
    tuned: Callable[[Choice], FineTuneConfig]  # its options, with these among them
    size: tuple[int, int]  # height and width of the images, in pixels
    groups: int = 1  # of examples in a batch
    recorder: RecorderConfig | None = None
    reloads: bool = False  # the model will be loaded anew, as config.frozen says

    def settings(self, choice: Choice) -> Settings:
        config = self.tuned(choice)
        asked = settings(config, self.model, self.size, self.groups, self.recorder)
        return asked._replace(frozen=DTYPES[config.frozen]) if self.reloads else asked


class Row(NamedTuple):
    """One option by itself."""

    name: str
    saves: int  # bytes
    costs: float  # time, as a factor
    chosen: bool


class Fitted(NamedTuple):
    """What was chosen, and why."""

    choice: Choice
    peak: Estimate
    budget: int  # bytes
    asked: int  # bytes that the options take as they stand
    rows: list[Row]

    def __str__(self) -> str:
        """A table of the options that were open."""
        lines = [f"fit: {human(self.budget)} to fit in; as it stands it takes {human(self.asked)}"]
        for row in self.rows:
            saves = f"saves {human(row.saves)}" if row.saves > 0 else "saves nothing"
            taken = "chosen" if row.chosen else "not needed"
            lines.append(f"  {row.name:24} {saves:16} time x {row.costs:<6.2f} {taken}")
        if all(row.chosen is False or not row.name.startswith("`method") for row in self.rows):
            return "\n".join([*lines, self._peak])
        note = "  every weight does not fit, so a LoRA is trained; give `method=full` to insist"
        return "\n".join([*lines, note, self._peak])

    @property
    def _peak(self) -> str:
        return f"  peak: about {human(self.peak.total)} ({self.peak.parts})"


def fit(case: Case, config: TuningConfig, before: Choice | None = None) -> Fitted:
    """Choose the options of a fine-tune by config.fit; those of config.keep, and those that are not
    at their defaults, stay. before: what the run that is resumed chose.

    Raises a UserError, with the least that would do, where nothing fits.
    """
    asked, fixed = Choice.of(config), given(config)
    device = case.model.device
    on_gpu = device.type == "cuda"
    if before is not None:
        asked = Choice(
            *(o if n in fixed else b for n, o, b in zip(FITTED, asked, before, strict=True))
        )
    peaks = Peaks(case)
    budget = bytes_of(config.fit)
    if budget is None:
        tensors = (*case.model.parameters(), *case.model.buffers())
        budget = free_bytes(device) + sum(each.nbytes for each in tensors)
    elif on_gpu:
        budget -= int(CONTEXT)
    if before is not None:
        return Fitted(asked, peaks[asked], budget, peaks[asked].total, [])
    seconds = _seconds(case, asked, fixed, min(budget, free_bytes(device)))
    candidates = sorted(_candidates(case, asked, fixed), key=lambda each: _cost(each, seconds))
    for method in (asked.method, "lora"):  # every weight, if that fits
        group = [each for each in candidates if each.method == method]
        if min(peaks[each].total for each in _smallest(group) or [asked]) * WITHIN > budget:
            continue
        for choice in group:
            if peaks[choice].total * WITHIN <= budget:
                rows = _rows(asked, choice, candidates, peaks, seconds)
                return Fitted(choice, peaks[choice], budget, peaks[asked].total, rows)
    least = min(peaks, key=lambda each: peaks[each].total)
    need, reserved = peaks[least].total, CONTEXT if bytes_of(config.fit) and on_gpu else 0
    advice = "take a smaller `size`"
    if "pieces" in fixed or case.tuned(least).batch == 1:
        advice += ", or free what else is there"
    bare = Peaks(replace(case, recorder=None))[least].total
    if bare < need:
        without = human(up(WITHIN * bare + reserved))
        advice += f", or leave the flight recorder out, which comes to {without}"
    raise UserError(
        f"nothing fits in {human(budget + reserved)}: the least is "
        f"{human(up(WITHIN * need + reserved))}, with {least}; "
        f"{advice}."
    )


def given(config: TuningConfig) -> set[str]:
    """The options that stay as they are."""
    changed = {name for name in FITTED if getattr(config, name) != getattr(TuningConfig, name)}
    return changed | set(config.keep)


def measured_in(config: TuningConfig, device: str) -> Precision:
    """What to load a model in that options are chosen for: what takes least of all that may be."""
    is_full = config.method == "full" and "method" in given(config)
    if is_full or "dtype" in given(config) or not computes_bf16(torch.device(device).type):
        return "fp32" if is_full else config.dtype
    return "bf16"


def up(count: float) -> float:
    """Bytes, rounded up to the digits that `human` shows: what is told must do."""
    unit = 1e8 if count >= 1e9 else 1e6 if count >= 1e7 else 1e5
    return math.ceil(count / unit) * unit


class Peaks(dict):
    """The estimate of each choice, made when it is first asked for."""

    def __init__(self, case: Case):
        super().__init__()
        self.case, self.by_settings = case, {}

    def __missing__(self, choice: Choice) -> Estimate:
        asked = self.case.settings(choice)
        alone = asked._replace(background=False)  # the copy is added here: it takes no pass
        if alone not in self.by_settings:
            self.by_settings[alone] = estimate(self.case.model, alone)
        made = self.by_settings[alone]
        if asked.background and self.case.model.device.type in HOST:
            made = made._replace(copy=made.checkpoint)
        return self.setdefault(choice, made)


def _candidates(case: Case, asked: Choice, fixed: set[str]) -> list[Choice]:
    """Every combination of what is open."""
    device = case.model.device.type
    open_to: dict[str, list] = {name: [value] for name, value in asked._asdict().items()}
    ways: dict[str, list] = {"checkpointing": [True], "pieces": _divisors(case, asked)}
    ways["method"] = ["lora"] if asked.method == "full" else []
    ways["dtype"] = ["bf16"] if computes_bf16(device) else []
    has_eight_bits = device == "cuda" and importlib.util.find_spec("bitsandbytes")
    ways["optimizer"] = ["adamw8bit"] if has_eight_bits else []
    ways["background"] = [False] if device in HOST else []
    for name in ways.keys() - fixed:
        open_to[name] += [way for way in ways[name] if way != open_to[name][0]]
    return [Choice(*values) for values in itertools.product(*open_to.values())]


def _smallest(group: list[Choice]) -> list[Choice]:
    """In each precision the choice with everything that saves memory."""
    savings = sorted(
        group, key=lambda c: (c.checkpointing, c.pieces or 1, c.optimizer != "adamw", -c.background)
    )
    return list({each.dtype: each for each in savings}.values())


def _divisors(case: Case, asked: Choice) -> list[int]:
    """Numbers of equal pieces of a batch, more than one, each at least twice the one before."""
    batch, pieces = case.tuned(asked).batch, []
    for count in range(2, batch + 1):
        if batch % count == 0 and count >= 2 * (pieces or [1])[-1]:
            pieces.append(count)
    return pieces


def computes_bf16(device: str) -> bool:
    """Whether the device multiplies in bfloat16, rather than to convert."""
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device == "cpu" and torch.cpu._is_avx512_bf16_supported()


def _seconds(case: Case, asked: Choice, fixed: set[str], room: int) -> dict[str, float]:
    """Of a pass of the U-Net over one image, by precision; nothing is timed that is not open.
    room: bytes, for weights in fp32 where the model has others."""
    names = [asked.dtype]
    if "dtype" not in fixed and computes_bf16(case.model.device.type):
        names = ["fp32", "bf16"]
    if len(names) == 1:
        return {names[0]: 1.0}
    one = case.settings(asked)._replace(batch=1)
    low = forward_seconds(case.model, one._replace(bf16=True))
    weights = list(case.model.unet.parameters())
    own = weights[0].dtype
    if own.itemsize < 4 and room < 4 * sum(each.numel() for each in weights):
        return {"fp32": UNTIMED * low, "bf16": low}
    for each in weights:
        each.data = each.data.float()
    full = forward_seconds(case.model, one._replace(bf16=False))
    for each in weights:
        each.data = each.data.to(own)
    return {"fp32": full, "bf16": low}


def _cost(choice: Choice, seconds: dict[str, float]) -> float:
    """Time, up to a factor. Of two that take the same, what changes least is cheaper."""
    cost = seconds[choice.dtype] * (1 + PER_PIECE * ((choice.pieces or 1) - 1))
    cost *= OTHER_PRECISION if choice.dtype != "fp32" else 1
    cost *= LORA if choice.method == "lora" else 1
    cost *= RECOMPUTED if choice.checkpointing else 1
    cost *= EIGHT_BITS if choice.optimizer == "adamw8bit" else 1
    return cost * (1 if choice.background else WAITING)


def _rows(
    asked: Choice,
    choice: Choice,
    candidates: list[Choice],
    peaks: Peaks,
    seconds: dict[str, float],
) -> list[Row]:
    """Each option that is open, by itself, beside what was asked for."""
    rows = []
    for other in candidates:
        names = [name for name in FITTED if getattr(other, name) != getattr(asked, name)]
        if len(names) != 1:
            continue
        value = getattr(other, names[0])
        word = f"`{names[0]}={value}`"
        if isinstance(value, bool):
            word = f"`{names[0]}`" if value else f"`no_{names[0]}`"
        saves = peaks[asked].total - peaks[other].total
        costs = _cost(other, seconds) / _cost(asked, seconds)
        rows.append(Row(word, saves, costs, value == getattr(choice, names[0])))
    return rows


def earlier(out: Path) -> Choice | None:
    """What a run in this folder that used `fit` chose; None where there is none."""
    file = out / "run.json"
    if not (out / "training").exists() or not file.exists():
        return None
    try:
        content = json.loads(file.read_text(encoding="utf-8"))["settings"]
        return Choice(**{name: (content | content["fit"])[name] for name in FITTED})
    except (ValueError, LookupError, TypeError):  # it used none, or start() says what is wrong
        return None
