"""The students of distill.py: what each learns from walks, and how it is trained.

[1] Luhman, Luhman. Knowledge Distillation in Iterative Generative Models for Improved Sampling
    Speed. 2021. arXiv:2101.02388
[2] Luo et al. LCM-LoRA: A Universal Stable-Diffusion Acceleration Module. 2023. arXiv:2311.05556
[3] Sauer, Lorenz, Blattmann, Rombach. Adversarial Diffusion Distillation. 2023. arXiv:2311.17042
[4] Meng et al. On Distillation of Guided Diffusion Models. 2022. arXiv:2210.03142
[5] Ross, Gordon, Bagnell. A Reduction of Imitation Learning and Structured Prediction to No-Regret
    Online Learning. 2011. arXiv:1011.0686
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from distill_walks import STEPS, TEACHER_WALK, Points, Walks, points
from jaxtyping import Shaped
from torch import Tensor, nn

from minidiff.denoiser import Denoise, Denoiser
from minidiff.guidance import guide
from minidiff.latent_diffusion import LatentDiffusion
from minidiff.methods import lora
from minidiff.methods.distill import (
    consistency_loss,
    endpoint_loss,
    guided_loss,
    matching_loss,
    pseudo_huber,
    renoised_loss,
)
from minidiff.options.sampling import Interval, SampleConfig
from minidiff.train import EMA, Loss, LossFn, TrainConfig, train
from minidiff.training.progress import follow

# The t that a guess is noised to: where a thing is shows through, its shape does not.
RENOISED = 400, 751
# This U-Net hears words by "pool" more than by attention (docs/lora.md).
LAYERS = (*lora.ATTENTION, "pool", "conv1", "conv2")
# The guidance that a student takes in; below t = 600 it decides nothing (docs/distillation.md).
TAKEN_IN = SampleConfig(guidance=2.0, interval=Interval(0.6, 1.0))
# The t that it is trained at: three in four from MIDDLE up, where there is guidance to take in; the
# others from FLOOR up.
FLOOR, MIDDLE, CEILING = 250, 600, 1001

Taught = Callable[[Tensor], Denoise]  # contexts to what the guided teacher predicts with them


@dataclass(frozen=True)
class Round:
    """A training on points of walks."""

    folder: Path  # of its log and checkpoints
    config: TrainConfig
    batch: int  # points in a step
    resume: bool

    def train(
        self,
        title: str,
        module: nn.Module,
        loss: LossFn,
        walks: Walks,
        times: Shaped[Tensor, "steps1"],
        far: float = 0.0,
        ema: EMA | None = None,
    ) -> None:
        """times: of the walks' points. far: the share of the points that are pure noise."""
        data = partial(points, walks, times, self.batch, far, self.config.seed)
        training = train(loss, module, data, self.config, ema, self.folder, self.resume)
        follow(training, title, self.config.steps, self.batch)


def train_student(
    start: LatentDiffusion, walks: Walks, stage: Round, far: float, sharpen: bool
) -> LatentDiffusion:
    """A round of act two: all weights learn where walks end; and to sharpen, what `start` makes of
    their guess. far: the share of the points that are pure noise. Returns the average of the
    weights, as a model that needs no guidance."""
    torch.manual_seed(stage.config.seed)
    student = copy.deepcopy(start.denoiser).requires_grad_(True)
    ema, times = EMA(student.network, decay=0.998), start.schedule.timesteps(STEPS)
    loss = partial(end_loss, student)
    if sharpen:
        loss = partial(sharp_loss, student, start.denoiser, times[0])
    title = f"2/5 student, {stage.folder.name}"
    stage.train(title, student.network, loss, walks, times, far, ema)
    return guideless(start, ema.average, "lcm")


def guideless(
    like: LatentDiffusion, network: nn.Module, sampler: str, spacing: str = "trailing"
) -> LatentDiffusion:
    """The model with another network, which needs no guidance, and this sampler."""
    denoiser = Denoiser(network, like.schedule, like.denoiser.target)
    parts = like.vae, like.text, denoiser, like.size, like.dropout
    return LatentDiffusion(*parts, guidance=1.0, sampler=sampler, spacing=spacing)


def end_loss(student: Denoiser, points: Points) -> Loss:
    """From any point of a walk, guess its end, [1]."""
    ours, schedule = guide(student, points.context, None, 1), student.schedule
    each = endpoint_loss(ours, schedule, points.x, points.t, points.end, pseudo_huber)
    return {"loss": each, "progress": schedule.progress(points.t)}


def sharp_loss(
    student: Denoiser, teacher: Denoiser, last: Shaped[Tensor, ""], points: Points
) -> Loss:
    """The same, and from pure noise what the teacher makes of the guess given new noise, [3].
    last: the time of pure noise."""
    walked = end_loss(student, points)
    ours, theirs = (guide(denoiser, points.context, None, 1) for denoiser in (student, teacher))
    noise, s = torch.randn_like(points.x), torch.randint(*RENOISED, points.t.shape)
    more = renoised_loss(
        ours, theirs, student.schedule, noise, last.expand(len(noise)), s, pseudo_huber
    )
    return {
        "loss": torch.cat([walked["loss"], more]),
        "progress": torch.cat([walked["progress"], torch.ones_like(walked["progress"])]),
    }


def train_lora(teacher: LatentDiffusion, walks: Walks, stage: Round, rank: int) -> LatentDiffusion:
    """Act three, [2]: the data are the ends of the teacher's walks. Returns a copy of the teacher
    with its LoRA attached."""
    torch.manual_seed(stage.config.seed)
    student = copy.deepcopy(teacher)
    lora.add(student.unet, rank, targets=LAYERS)
    times = teacher.schedule.timesteps(STEPS)
    taught = guided_by(teacher, TEACHER_WALK, stage.batch)
    loss = partial(lora_loss, student.denoiser, taught, times)
    stage.train("3/5 LCM-LoRA", student.unet, loss, walks, times)
    return student.eval()


def lora_loss(
    student: Denoiser, taught: Taught, times: Shaped[Tensor, "steps1"], points: Points
) -> Loss:
    """The guesses at neighbouring times are to agree."""
    ours, theirs = guide(student, points.context, None, 1), taught(points.context)
    each = consistency_loss(ours, ours, student.schedule, points.end, times, theirs, pseudo_huber)
    return {"loss": each}


def train_guided(
    start: LatentDiffusion,
    teacher: LatentDiffusion,
    walks: Walks,
    stage: Round,
    own: bool,
    sampler: str,
) -> LatentDiffusion:
    """A round of act four, the first stage of [4] at one scale. walks: the teacher's, or own ones
    of `start`. Returns the average of the weights, as a model that needs no guidance and is sampled
    with this sampler."""
    torch.manual_seed(stage.config.seed)
    student = copy.deepcopy(start.denoiser).requires_grad_(True)
    ema, taught = EMA(student.network, decay=0.998), guided_by(teacher, TAKEN_IN, stage.batch)
    loss = partial(own_loss if own else noised_loss, student, taught)
    times = teacher.schedule.timesteps(STEPS, "shifted" if own else "trailing")
    title = f"4/5 student, {stage.folder.name}"
    stage.train(title, student.network, loss, walks, times, ema=ema)
    return guideless(teacher, ema.average, sampler, "shifted")


def guided_by(teacher: LatentDiffusion, config: SampleConfig, batch: int) -> Taught:
    """The teacher's prediction with this guidance, for a batch of contexts."""
    null, scale, interval = teacher.text.null(batch), config.guidance, config.interval
    return partial(guide, teacher.denoiser, null=null, scale=scale, interval=interval)


def noised_loss(student: Denoiser, taught: Taught, points: Points) -> Loss:
    """What the guided teacher says of the ends of walks, noised, is to be said in one
    evaluation, [4]."""
    ours, theirs = guide(student, points.context, None, 1), taught(points.context)
    high, shape = torch.rand(points.t.shape) < 0.75, points.t.shape
    t = torch.where(
        high, torch.randint(MIDDLE, CEILING, shape), torch.randint(FLOOR, CEILING, shape)
    )
    each = guided_loss(ours, theirs, student.schedule, points.end, t)
    return {"loss": each, "progress": student.schedule.progress(t)}


def own_loss(student: Denoiser, taught: Taught, points: Points) -> Loss:
    """The same at points of the student's own walks: where it goes wrong, it hears what would have
    been right [5]."""
    ours, theirs = guide(student, points.context, None, 1), taught(points.context)
    each = matching_loss(ours, theirs, student.schedule, points.x, points.t)
    return {"loss": each, "progress": student.schedule.progress(points.t)}
