"""How much the flight recorder may measure: its share of a fine-tune's time, a tenth at most.

Time is counted in evaluations: passes of the U-Net over one image. Training takes three for each
image, one forward and two backward; sampling takes one a step, two with guidance.
"""

import math
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from minidiff.latent_diffusion import LatentDiffusion
from minidiff.options.finetuning import FineTuneConfig, RecorderConfig

SHARE, TRAINING = 0.1, 3
READ = 0.25  # evaluations that take as long as reading an image file
COMPARED = 64, 2048  # training images that samples are compared with: at least, at most


class Level(NamedTuple):
    """How thoroughly to measure."""

    n: int  # images of each prompt
    steps: int  # of sampling
    probe: int  # held-out examples, and as many training examples
    noises: int  # in each tenth of t
    measurements: int  # with fewer than these the next level is better


LEVELS = (
    Level(4, 25, 8, 2, 9),
    Level(4, 20, 4, 2, 7),
    Level(4, 16, 4, 1, 5),
    Level(3, 12, 3, 1, 4),
    Level(2, 8, 2, 1, 3),
    Level(2, 5, 2, 1, 3),
    Level(2, 4, 1, 1, 2),
)


class Plan(NamedTuple):
    """What the recorder of a fine-tune measures, and what that costs."""

    config: RecorderConfig
    measurements: int
    evaluations: int  # in all
    share: float  # of the evaluations of the training

    def __str__(self) -> str:
        config, often = self.config, f"step 0 and every {self.config.every} steps"
        what = f"{config.n} pictures of each prompt in {config.steps} steps"
        cost = f"about {self.share:.0%} of the training's time"
        if self.share > SHARE:
            cost += ", because the training is short"
        return f"flight recorder: at {often}, {what}; {cost}"


class Counts(NamedTuple):
    """What there is to measure."""

    groups: int  # of examples in a batch
    prompts: int
    validation: int
    images: int  # trained on


def planned(
    model: LatentDiffusion, training: FineTuneConfig, counts: Counts, folder: Path | None = None
) -> Plan:
    """The most thorough level that a tenth of the training's time allows; the least one where that
    is too little. folder: of a run that is resumed, which goes on at the level it was begun at."""
    steps, every = training.steps, training.every
    batch = training.batch * training.accumulate * counts.groups
    whole = TRAINING * batch * steps
    budget = int(SHARE * whole)
    compared = min(COMPARED[1], max(COMPARED[0], budget // 4))
    reading = READ * min(compared, counts.images)
    most = 1 + math.ceil(steps / every)  # a measurement needs a checkpoint to be resumed from
    for level in _levels(folder):
        each = _evaluations(model, level, counts)
        affordable = int((budget - reading) // each)
        if affordable >= min(level.measurements, most):
            break
    gap = every * math.ceil(steps / every / max(1, min(affordable, most) - 1))
    measurements = 1 + math.ceil(steps / gap)
    total = round(measurements * each + reading)
    config = RecorderConfig(
        every=gap,
        n=level.n,
        steps=level.steps,
        seed=training.seed,
        probe=level.probe,
        noises=level.noises,
        compared=compared,
    )
    return Plan(config, measurements, total, total / whole)


def _evaluations(model: LatentDiffusion, level: Level, counts: Counts) -> int:
    """Of one measurement, at most."""
    a_step = (1 if model.guidance in (0, 1) else 2) * (2 if model.sampler == "heun" else 1)
    examples = 2 * min(level.probe, counts.validation) or level.probe
    return counts.prompts * level.n * level.steps * a_step + examples * 10 * level.noises


def _levels(folder: Path | None) -> tuple[Level, ...]:
    """All levels, or the one that the first images of a run were drawn at."""
    grid = min(folder.glob("grids/step_*.png"), default=None) if folder else None
    if grid is None:
        return LEVELS
    try:
        with Image.open(grid) as image:
            text = image.text
    except (OSError, AttributeError):
        return LEVELS  # the recorder refuses it
    drawn = text.get("n"), text.get("steps")
    return tuple(each for each in LEVELS if (str(each.n), str(each.steps)) == drawn) or LEVELS
