"""Distillation: a student that goes in few steps where its teacher goes in many. Every method is a loss function for train.py, all in this file.

    teacher = minidiff.load()
    student = copy.deepcopy(teacher)
    times = teacher.schedule.timesteps(8)               # the teacher's 8 steps; the student's will be 4

    def loss(batch):
        latents, captions = batch
        context, null = teacher.text.encode(captions), teacher.text.null(len(captions))
        taught = guide(teacher.denoiser, context, null, 2.0)    # guided, so that the student needs one evaluation a step
        return progressive_loss(guide(student.denoiser, context, None, 1), taught, teacher.schedule, latents, times), None

    for step in train(loss, student.denoiser, batches, steps=1000, lr=3e-4): ...

A teacher and a student are what samplers ask for, (x, t) -> Prediction, conditions and guidance already inside. So guided distillation ([4])
is any of these losses with a guided teacher, and `guided_loss` is its first stage, in which the number of steps stays.

| method | the student learns | sample with |
| --- | --- | --- |
| guided | what the guided teacher says, at every t | any sampler, guidance 1 |
| progressive | from one of its times to the next, where the teacher takes two steps | ddim, the student's times |
| endpoints | from x_T to where the teacher's whole walk ends | one step; more by lcm |
| renoised | to guess what the teacher would make of its guess, given new noise | one step |
| consistency | from any t to the end: the same guess all along the teacher's walk | lcm, 1 to 8 steps |

[1] Salimans, Ho. Progressive Distillation for Fast Sampling of Diffusion Models. 2022. arXiv:2202.00512
[2] Song, Dhariwal, Chen, Sutskever. Consistency Models. 2023. arXiv:2303.01469
[3] Song, Dhariwal. Improved Techniques for Training Consistency Models. 2023. arXiv:2310.14189
[4] Meng et al. On Distillation of Guided Diffusion Models. 2022. arXiv:2210.03142
[5] Luo, Tan, Huang, Li, Zhao. Latent Consistency Models. 2023. arXiv:2310.04378
[6] Luo et al. LCM-LoRA: A Universal Stable-Diffusion Acceleration Module. 2023. arXiv:2311.05556
[7] Luhman, Luhman. Knowledge Distillation in Iterative Generative Models for Improved Sampling Speed. 2021. arXiv:2101.02388
[8] Sauer, Lorenz, Blattmann, Rombach. Adversarial Diffusion Distillation. 2023. arXiv:2311.17042
"""

import math
from collections.abc import Callable
from itertools import pairwise

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from minidiff.denoiser import Denoise
from minidiff.errors import UserError
from minidiff.schedules import NoiseSchedule, per_example
from minidiff.steps import consistent

Distance = Callable[[Tensor, Tensor], Tensor]  # two batches to (B,)


def squared(x: Float[Tensor, "B *dims"], y: Float[Tensor, "B *dims"]) -> Float[Tensor, "B"]:
    """Mean over dims of the squared difference."""
    return (x - y).pow(2).flatten(1).mean(1)


def pseudo_huber(x: Float[Tensor, "B *dims"], y: Float[Tensor, "B *dims"]) -> Float[Tensor, "B"]:
    """[3] section 3.3, divided by sqrt(d): sqrt(|x - y|^2 + c^2) - c, c = 0.00054 sqrt(d). Between a mean and a median:
    far fewer of the odd, very wrong targets are obeyed."""
    c = 0.00054
    return (squared(x, y) + c**2).sqrt() - c


def guided_loss(
    student: Denoise,
    teacher: Denoise,
    schedule: NoiseSchedule,
    x0: Float[Tensor, "B *dims"],
    t: Shaped[Tensor, "B"] | None = None,
    eps: Float[Tensor, "B *dims"] | None = None,
) -> Float[Tensor, "B"]:
    """[4] section 3.1 for one scale of guidance: matching_loss with a guided teacher, where noise takes data."""
    t = schedule.sample_t(len(x0)) if t is None else t
    return matching_loss(
        student,
        teacher,
        schedule,
        schedule.mix(x0, torch.randn_like(x0) if eps is None else eps, t),
        t,
    )


def matching_loss(
    student: Denoise,
    teacher: Denoise,
    schedule: NoiseSchedule,
    x: Float[Tensor, "B *dims"],
    t: Shaped[Tensor, "B"],
) -> Float[Tensor, "B"]:
    """w(SNR_t) |x0_student(x_t) - x0_teacher(x_t)|^2 with w = max(SNR, 1), at any x_t: those of the student's own walks, say, where what
    it gets wrong leads it."""
    with torch.no_grad():
        taught = teacher(x, t).x0
    return schedule.snr(t).clamp(min=1).to(x) * squared(student(x, t).x0, taught)


def progressive_target(
    teacher: Denoise,
    schedule: NoiseSchedule,
    x: Float[Tensor, "B *dims"],
    times: Shaped[Tensor, "n1 B"],
) -> Float[Tensor, "B *dims"]:
    """[1] algorithm 2: the x0 with which one DDIM step from times[0] to times[-1] ends where the teacher's n steps through times end,
    x0 = (x_s - (sigma_s / sigma_t) x_t) / (alpha_s - (sigma_s / sigma_t) alpha_t)."""
    x_s = x
    with torch.no_grad():
        for t, s in pairwise(times):
            x_s = schedule.mix(*teacher(x_s, t), s)
    (alpha_t, sigma_t), (alpha_s, sigma_s) = (
        schedule.alpha_sigma(times[0]),
        schedule.alpha_sigma(times[-1]),
    )
    kept = sigma_s / sigma_t
    return (x_s - per_example(kept, x) * x) / per_example(alpha_s - kept * alpha_t, x)


def progressive_loss(
    student: Denoise,
    teacher: Denoise,
    schedule: NoiseSchedule,
    x0: Float[Tensor, "B *dims"],
    times: Shaped[Tensor, "N1"],
    stride: int = 2,
    n: Int[Tensor, "B"] | None = None,
    eps: Float[Tensor, "B *dims"] | None = None,
) -> Float[Tensor, "B"]:
    """[1] algorithm 2: the student's step from times[n] to times[n + stride] ends where the teacher's `stride` steps end. Weighted by max(SNR, 1),
    the "truncated SNR" of its section 4: at pure noise, where eps says nothing, x0 still counts.

    times: the teacher's, N steps; afterwards the student's are times[::stride], and it is the next teacher. n: where each example starts, 0,
    stride, 2 stride, ...; drawn, and eps too, unless given."""
    steps = len(times) - 1
    if stride < 1 or steps < stride or steps % stride:
        raise UserError(
            f"{steps} steps of the teacher are not a whole number of strides of {stride}."
        )
    n = stride * torch.randint(0, steps // stride, (len(x0),)) if n is None else n
    x = schedule.mix(x0, torch.randn_like(x0) if eps is None else eps, times[n])
    taught = progressive_target(
        teacher, schedule, x, torch.stack([times[n + k] for k in range(stride + 1)])
    )
    return schedule.snr(times[n]).clamp(min=1).to(x0) * squared(student(x, times[n]).x0, taught)


def endpoint_loss(
    student: Denoise,
    schedule: NoiseSchedule,
    x: Float[Tensor, "B *dims"],
    t: Shaped[Tensor, "B"],
    end: Float[Tensor, "B *dims"],
    distance: Distance = squared,
) -> Float[Tensor, "B"]:
    """[7], and not only from pure noise: the student's guess from a point x of a teacher's walk, passed at time t, is to be the end of that walk.
    Walks are made once, by samplers.sample with any deterministic sampler, and met many times. From t = T alone it teaches one step; from all t
    it makes a consistency function ([2] section 3) by plain regression."""
    return distance(consistent(student, schedule, x, t), end)


def consistency_loss(
    student: Denoise,
    target: Denoise,
    schedule: NoiseSchedule,
    x0: Float[Tensor, "B *dims"],
    times: Shaped[Tensor, "N1"],
    teacher: Denoise | None = None,
    distance: Distance = squared,
    n: Int[Tensor, "B"] | None = None,
    eps: Float[Tensor, "B *dims"] | None = None,
) -> Float[Tensor, "B"]:
    """d(f_student(x_t, t), f_target(x_s, s)) for neighbours t = times[n] > s = times[n + 1], f of steps.consistent, which is x itself at clean data.

    With a teacher it is consistency distillation, [2] eq. 7: x_s is the teacher's DDIM step from x_t. With a guided one, on latents, it is
    LCM's, [5] section 4, whose k = 20 levels of 1000 at a stride are schedule.timesteps(50); with LoRAs the only trainable weights of the student,
    LCM-LoRA ([6]). Without, it is consistency training, [2] eq. 10: x_s is the same data with the same noise, an unbiased guess of where the
    exact teacher's step would go.

    target: an average of the student (train.EMA's, [2] algorithm 2), or the student itself ([3] section 3.2); no gradient goes through it.
    distance: pseudo_huber in [3]. n: the interval of each example; drawn evenly, and eps too, unless given."""
    n = torch.randint(0, len(times) - 1, (len(x0),)) if n is None else n
    t, s = times[n], times[n + 1]
    eps = torch.randn_like(x0) if eps is None else eps
    x = schedule.mix(x0, eps, t)
    with torch.no_grad():
        x_s = schedule.mix(*((x0, eps) if teacher is None else teacher(x, t)), s)
        goal = consistent(target, schedule, x_s, s)
    return distance(consistent(student, schedule, x, t), goal)


def renoised_loss(
    student: Denoise,
    teacher: Denoise,
    schedule: NoiseSchedule,
    x: Float[Tensor, "B *dims"],
    t: Shaped[Tensor, "B"],
    s: Shaped[Tensor, "B"],
    distance: Distance = squared,
    eps: Float[Tensor, "B *dims"] | None = None,
) -> Float[Tensor, "B"]:
    """[8] eq. 4, without its adversary: the student's guess from x at t is given new noise, up to s, and is to be what the teacher makes of that.
    It needs neither data nor walks, only noise x. Regression leaves a mean where it is in doubt; this leans to the likelier side until there is
    none, and costs variety. What noise of s does not hide, a whole picture's colour say, it cannot correct: mix it with another loss."""
    guess = consistent(student, schedule, x, t)
    with torch.no_grad():
        x_s = schedule.mix(guess, torch.randn_like(x) if eps is None else eps, s)
        better = consistent(teacher, schedule, x_s, s)
    return distance(guess, better)


def intervals(step: int, steps: int, first: int = 10, last: int = 1280) -> int:
    """[3] section 3.4: how many intervals the times have at this step of training, counted from 0: `first`, and twice as many after every
    K' = floor(steps / (log2(last / first) + 1)) steps, at most `last`."""
    stages = int(math.log2(last / first)) + 1
    if steps < stages:
        raise UserError(
            f"steps is {steps}; from {first} intervals to {last} takes at least {stages}."
        )
    doublings = step // (steps // stages)
    return min(first * 2**doublings, last)


def lognormal(
    sigma: Float[Tensor, "N1"], mean: float = -1.1, std: float = 2.0
) -> Float[Tensor, "N"]:
    """[3] section 3.5: how often each interval of these decreasing noise levels is met if ln sigma is normal, for torch.multinomial to draw n by."""
    below = torch.special.ndtr((sigma.log() - mean) / std)
    return below[:-1] - below[1:]
