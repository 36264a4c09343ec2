"""Distillation: a student needs few steps where its teacher needs many. Methods are loss functions.

    teacher = minidiff.load()
    student = copy.deepcopy(teacher)
    times = teacher.schedule.timesteps(8)  # the teacher's 8 steps; the student's will be 4

    def loss(batch):
        latents, captions = batch
        context, null = teacher.text.encode(captions), teacher.text.null(len(captions))
        guided = guide(teacher.denoiser, context, null, 2.0)  # the student needs no guidance then
        plain = guide(student.denoiser, context, None, 1)
        return {"loss": progressive_loss(plain, guided, teacher.schedule, latents, times)}

    for step in train(loss, student.denoiser, batches, TrainConfig(steps=1000, lr=3e-4)): ...

Teacher and student are what samplers ask for, (x, t) -> Prediction, with conditions and guidance
inside. So guided distillation ([4]) is any of these losses with a guided teacher; `guided_loss` is
its first stage, which keeps the number of steps.

| method | the student learns | sample with |
| --- | --- | --- |
| guided | what the guided teacher predicts, at every t | any sampler, guidance 1 |
| progressive | one step where the teacher takes two | ddim, the student's times |
| endpoints | the end of the teacher's whole chain, from x_T | one step; more by lcm |
| renoised | what the teacher makes of the student's x0 with new noise | one step |
| consistency | the same x0 all along the teacher's chain | lcm, 1 to 8 steps |

[1] Salimans, Ho. Progressive Distillation for Fast Sampling of Diffusion Models. arXiv:2202.00512
[2] Song, Dhariwal, Chen, Sutskever. Consistency Models. 2023. arXiv:2303.01469
[3] Song, Dhariwal. Improved Techniques for Training Consistency Models. 2023. arXiv:2310.14189
[4] Meng et al. On Distillation of Guided Diffusion Models. 2022. arXiv:2210.03142
[5] Luo, Tan, Huang, Li, Zhao. Latent Consistency Models. 2023. arXiv:2310.04378
[6] Luo et al. LCM-LoRA: A Universal Stable-Diffusion Acceleration Module. 2023. arXiv:2311.05556
[7] Luhman, Luhman. Knowledge Distillation in Iterative Generative Models for Improved Sampling
    Speed. 2021. arXiv:2101.02388
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

Batch = Float[Tensor, "B *dims"]
Times = Shaped[Tensor, "B"]
Losses = Float[Tensor, "B"]
Distance = Callable[[Tensor, Tensor], Tensor]  # two batches to (B,)


def squared(x: Batch, y: Batch) -> Losses:
    """Mean over dims of the squared difference."""
    return (x - y).pow(2).flatten(1).mean(1)


def pseudo_huber(x: Batch, y: Batch, c: float = 0.00054) -> Losses:
    """[3] section 3.3 over sqrt(d): sqrt(|x - y|^2 + c^2) - c, robust to far-off targets."""
    return (squared(x, y) + c**2).sqrt() - c


def guided_loss(
    student: Denoise,
    teacher: Denoise,
    schedule: NoiseSchedule,
    x0: Batch,
    t: Times | None = None,
    eps: Batch | None = None,
) -> Losses:
    """[4] section 3.1 for one guidance scale: matching_loss on noisy data, a guided teacher."""
    t = schedule.sample_t(len(x0)) if t is None else t
    eps = torch.randn_like(x0) if eps is None else eps
    return matching_loss(student, teacher, schedule, schedule.mix(x0, eps, t), t)


def matching_loss(
    student: Denoise, teacher: Denoise, schedule: NoiseSchedule, x: Batch, t: Times
) -> Losses:
    """max(SNR_t, 1) |x0_student(x_t) - x0_teacher(x_t)|^2 at any x_t, such as the student's own."""
    with torch.no_grad():
        x0 = teacher(x, t).x0
    return schedule.snr(t).clamp(min=1).to(x) * squared(student(x, t).x0, x0)


def progressive_target(
    teacher: Denoise, schedule: NoiseSchedule, x: Batch, times: Shaped[Tensor, "n1 B"]
) -> Batch:
    """[1] algorithm 2: the x0 with which one DDIM step ends where the teacher's n steps end.

    x0 = (x_s - (sigma_s / sigma_t) x_t) / (alpha_s - (sigma_s / sigma_t) alpha_t), from t =
    times[0] to s = times[-1].
    """
    x_s = x
    with torch.no_grad():
        for t, s in pairwise(times):
            x_s = schedule.mix(*teacher(x_s, t), s)
    alpha_t, sigma_t = schedule.alpha_sigma(times[0])
    alpha_s, sigma_s = schedule.alpha_sigma(times[-1])
    ratio = sigma_s / sigma_t  # eq: pd-target
    return (x_s - per_example(ratio, x) * x) / per_example(alpha_s - ratio * alpha_t, x)


def progressive_loss(
    student: Denoise,
    teacher: Denoise,
    schedule: NoiseSchedule,
    x0: Batch,
    times: Shaped[Tensor, "N1"],
    stride: int = 2,
    n: Int[Tensor, "B"] | None = None,
    eps: Batch | None = None,
) -> Losses:
    """[1] algorithm 2: the student's step from times[n] to times[n + stride] ends where the
    teacher's `stride` steps end. The weight is max(SNR, 1), the "truncated SNR" of its section 4.

    times: the teacher's, N steps; the student's are times[::stride], and it is the next teacher.
    n: where each example starts, 0, stride, 2 stride, ... Default: n and eps at random.
    """
    steps = len(times) - 1
    if stride < 1 or steps < stride or steps % stride:
        raise UserError(f"the teacher's {steps} steps are not a whole number of {stride} strides.")
    n = stride * torch.randint(0, steps // stride, (len(x0),)) if n is None else n
    x = schedule.mix(x0, torch.randn_like(x0) if eps is None else eps, times[n])
    stops = torch.stack([times[n + k] for k in range(stride + 1)])
    target = progressive_target(teacher, schedule, x, stops)
    return schedule.snr(times[n]).clamp(min=1).to(x0) * squared(student(x, times[n]).x0, target)


def endpoint_loss(
    student: Denoise,
    schedule: NoiseSchedule,
    x: Batch,
    t: Times,
    end: Batch,
    distance: Distance = squared,
) -> Losses:
    """[7], from any point of a deterministic sampler's chain: the student's x0 is to be its end.
    t = T alone teaches it one step; all t, a consistency function ([2] section 3)."""
    return distance(consistent(student, schedule, x, t), end)


def consistency_loss(
    student: Denoise,
    target: Denoise,
    schedule: NoiseSchedule,
    x0: Batch,
    times: Shaped[Tensor, "N1"],
    teacher: Denoise | None = None,
    distance: Distance = squared,
    n_eps: tuple[Int[Tensor, "B"], Batch] | None = None,
) -> Losses:
    """d(f_student(x_t, t), f_target(x_s, s)) for neighbours t = times[n] > s = times[n + 1], where
    f is steps.consistent.

    With a teacher it is consistency distillation, [2] eq. 7: x_s is the teacher's DDIM step. With a
    guided teacher on latents it is LCM ([5] section 4; its k = 20 of 1000 levels is
    schedule.timesteps(50)); where only LoRAs are trained, LCM-LoRA ([6]). Without a teacher it is
    consistency training, [2] eq. 10: x_s is the same data with the same noise.

    target: an average of the student ([2] algorithm 2), or the student itself ([3] section 3.2).
    distance: pseudo_huber in [3]. n_eps: the interval and noise of each example. Default: random.
    """
    if n_eps is None:
        n_eps = torch.randint(0, len(times) - 1, (len(x0),)), torch.randn_like(x0)
    n, eps = n_eps
    t, s = times[n], times[n + 1]
    x = schedule.mix(x0, eps, t)
    with torch.no_grad():
        x_s = schedule.mix(*((x0, eps) if teacher is None else teacher(x, t)), s)
        end = consistent(target, schedule, x_s, s)  # eq: consistency-7
    return distance(consistent(student, schedule, x, t), end)


def renoised_loss(
    student: Denoise,
    teacher: Denoise,
    schedule: NoiseSchedule,
    x: Batch,
    t: Times,
    s: Times,
    distance: Distance = squared,
    eps: Batch | None = None,
) -> Losses:
    """[8] eq. 4 without its adversary: the student's x0 from (x, t) gets new noise of time s, and
    is to be what the teacher makes of that.

    It needs only noise x, sharpens what regression leaves as a mean, and costs variety. It cannot
    correct what noise of time s does not hide, as an image's colour: mix it with another loss.
    """
    x0 = consistent(student, schedule, x, t)
    with torch.no_grad():
        x_s = schedule.mix(x0, torch.randn_like(x) if eps is None else eps, s)
        target = consistent(teacher, schedule, x_s, s)
    return distance(x0, target)


def intervals(step: int, steps: int, first: int = 10, last: int = 1280) -> int:
    """[3] section 3.4: the number of intervals at this training step, counted from 0. It starts at
    `first` and doubles every floor(steps / (log2(last / first) + 1)) steps, up to `last`."""
    stages = int(math.log2(last / first)) + 1
    if steps < stages:
        raise UserError(f"steps is {steps}; {first} to {last} intervals take at least {stages}.")
    return min(first * 2 ** (step // (steps // stages)), last)


def lognormal(
    sigma: Float[Tensor, "N1"], mean: float = -1.1, std: float = 2.0
) -> Float[Tensor, "N"]:
    """[3] section 3.5: the probability of each interval of decreasing sigma; ln sigma is normal."""
    below = torch.special.ndtr((sigma.log() - mean) / std)
    return below[:-1] - below[1:]
