"""Distillation against exact worlds: what a loss asks for is the closed form, and few-step students land where the exact path of each noise ends."""

import copy
import math
from itertools import count, pairwise

import pytest
import torch
from torch import nn

from minidiff import schedules
from minidiff.denoiser import Denoiser, Prediction
from minidiff.errors import UserError
from minidiff.guidance import guide
from minidiff.layers import timestep_embedding
from minidiff.methods import lora
from minidiff.methods.distill import (
    consistency_loss,
    endpoint_loss,
    guided_loss,
    intervals,
    lognormal,
    progressive_loss,
    progressive_target,
    pseudo_huber,
    renoised_loss,
    squared,
)
from minidiff.methods.exact import Mixture
from minidiff.samplers import ddim, lcm, sample, unipc, unseeded
from minidiff.steps import consistent
from minidiff.train import EMA, TrainConfig, seed_of, train
from minidiff.unet import UNet, UNetConfig

SCHEDULES = [schedules.cosine(), schedules.Flow(), schedules.Karras()]
ISLANDS = Mixture(
    torch.tensor([[-1.0, -0.6], [0.7, -0.4], [0.2, 1.1]]), 0.35, torch.tensor([0.3, 0.5, 0.2])
)


def name(schedule):
    return type(schedule).__name__


def column(scale):
    return scale.view(-1, 1)


def saying(schedule, x0_of):
    """A denoiser that says x0_of(x, t)."""

    def denoise(x, t):
        alpha, sigma = (column(scale) for scale in schedule.alpha_sigma(t))
        x0 = x0_of(x, t)
        return Prediction(x0, (x - alpha * x0) / sigma)

    return denoise


# Progressive distillation.


@pytest.mark.equation("pd-target")
@pytest.mark.parametrize("stride", [2, 4])
@pytest.mark.parametrize("schedule", SCHEDULES, ids=name)
def test_one_step_to_the_progressive_target_is_the_teachers_steps(schedule, stride):
    teacher, times = ISLANDS.denoiser(schedule), schedule.timesteps(8)
    student = saying(
        schedule,
        lambda x, t: progressive_target(
            teacher, schedule, x, times[first : first + stride + 1, None].expand(-1, len(x))
        ),
    )
    for first in range(0, 8, stride):
        x = schedule.mix(
            ISLANDS.draw(5), torch.randn(5, 2, dtype=torch.float64), times[first].expand(5)
        )
        expected, found = (
            x,
            ddim(final=False)(student, schedule, x, times[first], times[first + stride], unseeded)[
                0
            ],
        )
        for t, s in zip(times[first : first + stride], times[first + 1 :], strict=False):
            expected = ddim(final=False)(teacher, schedule, expected, t, s, unseeded)[0]
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_progressive_loss_is_zero_at_its_target_and_weighs_by_truncated_snr():
    schedule, x0, eps = schedules.cosine(), ISLANDS.draw(2), torch.randn(2, 2, dtype=torch.float64)
    teacher, times, n = ISLANDS.denoiser(schedule), schedule.timesteps(4), torch.tensor([0, 2])
    path = torch.stack([times[n + k] for k in range(3)])
    right = saying(schedule, lambda x, t: progressive_target(teacher, schedule, x, path))
    off = saying(schedule, lambda x, t: right(x, t).x0 + 0.1)
    assert progressive_loss(right, teacher, schedule, x0, times, n=n, eps=eps).abs().max() < 1e-24
    found = progressive_loss(off, teacher, schedule, x0, times, n=n, eps=eps)
    torch.testing.assert_close(
        found, 0.01 * torch.maximum(schedule.snr(times[n]), torch.ones(2)), rtol=1e-9, atol=0
    )
    assert schedule.snr(times[0]) < 1e-8 < 1 and 0.01 <= found[0] < found[1] * 1.001
    assert progressive_loss(off, teacher, schedule, x0, times).shape == (2,)
    with pytest.raises(
        UserError, match="the teacher's 4 steps are not a whole number of 3 strides"
    ):
        progressive_loss(right, teacher, schedule, x0, times, stride=3)


# Guided distillation.


def small_unet():
    torch.manual_seed(0)
    unet = UNet(UNetConfig(2, 2, (16, 16), 1, (0, 1), (1, 1), 8, groups=4)).double()
    nn.init.normal_(unet.conv_out.weight, std=0.2)
    return unet


def test_guided_loss_asks_for_the_guided_teacher():
    schedule, context, null = (
        schedules.cosine(),
        torch.randn(3, 5, 8).double(),
        torch.randn(3, 5, 8).double(),
    )
    denoiser = Denoiser(small_unet(), schedule, "v")
    teacher, plain = guide(denoiser, context, null, 3.0), guide(denoiser, context, None, 1)
    x0, eps, t = (
        torch.randn(3, 2, 8, 8).double(),
        torch.randn(3, 2, 8, 8).double(),
        torch.tensor([900, 400, 100]),
    )
    assert guided_loss(teacher, teacher, schedule, x0, t, eps).abs().max() == 0
    x = schedule.mix(x0, eps, t)
    with_words, without = denoiser(x, t, context).x0, denoiser(x, t, null).x0
    expected = schedule.snr(t).clamp(min=1) * (2 * (with_words - without)).pow(2).flatten(1).mean(1)
    torch.testing.assert_close(
        guided_loss(plain, teacher, schedule, x0, t, eps), expected, rtol=1e-9, atol=0
    )
    assert guided_loss(plain, teacher, schedule, x0).shape == (3,)


# Consistency.


@pytest.mark.parametrize("schedule", SCHEDULES, ids=name)
def test_clean_data_is_its_own_guess(schedule):
    """To the bit, whatever the network says of it."""
    clean, x = torch.zeros(4, dtype=schedule.timesteps(1).dtype), torch.randn(4, 3)
    assert torch.equal(
        consistent(lambda x, t: Prediction(x * math.nan, x * math.nan), schedule, x, clean), x
    )
    if schedule == schedules.cosine():
        assert torch.equal(consistent(lambda x, t: Prediction(x + 1, x), schedule, x, clean + 1), x)
        far = consistent(lambda x, t: Prediction(x + 1, x), schedule, x, clean + 900)
        torch.testing.assert_close(far, x + 1, rtol=1e-4, atol=1e-4)


MEAN, STD = 0.8, 0.5
GAUSSIAN = Mixture(torch.tensor([[MEAN]]), STD)


def gaussian_consistency(schedule, warp=0.0):
    """The denoiser whose consistency function follows the exact path of Gaussian data, x0 = mean + std (x_t - alpha mean) / sqrt(alpha^2 std^2 +
    sigma^2), or with a warp strays from it ever more with noise."""

    def x0_of(x, t):
        alpha, sigma = (column(scale) for scale in schedule.alpha_sigma(t))
        end = (
            MEAN
            + STD * (x - alpha * MEAN) / (alpha**2 * STD**2 + sigma**2).sqrt()
            + warp * column(schedule.progress(t)) * x
        )
        tau = column(10 * (1000 * schedule.progress(t) - 1).clamp(min=0))
        return (end - 0.25 / (tau**2 + 0.25) * x) * (tau**2 + 0.25).sqrt() / tau.clamp(min=1e-9)

    return saying(schedule, x0_of)


@pytest.mark.parametrize("schedule", [schedules.cosine(), schedules.Flow()], ids=name)
def test_consistency_distillation_wants_the_exact_path_of_a_gaussian(schedule):
    """At the closed form only the error of the teacher's DDIM step is left, of order h^2, so h^4 in the loss; elsewhere the loss is of order h^2."""
    x_T = torch.randn(500, 1, dtype=torch.float64)
    exact, warped = gaussian_consistency(schedule), gaussian_consistency(schedule, warp=0.2)
    *_, last = sample(GAUSSIAN.denoiser(schedule), schedule, x_T, 1000, unipc())
    T = schedule.timesteps(1)[:1].expand(500)
    torch.testing.assert_close(
        consistent(exact, schedule, x_T, T), last.x, rtol=0, atol=1e-3
    )  # the sampler errs by 1e-4

    def loss(student, steps):
        times, n = schedule.timesteps(steps), torch.full((len(x_T),), steps // 2)
        how = {"n_eps": (n, x_T), "teacher": GAUSSIAN.denoiser(schedule)}
        return consistency_loss(
            student,
            student,
            schedule,
            GAUSSIAN.draw(len(x_T), torch.Generator().manual_seed(1)),
            times,
            **how,
        ).mean()

    ratio, elsewhere = (loss(f, 50) / loss(f, 100) for f in (exact, warped))
    assert ratio == pytest.approx(16, rel=0.1) and elsewhere == pytest.approx(4, rel=0.1)
    assert loss(warped, 100) > 100 * loss(exact, 100)


def test_consistency_training_is_distillation_from_the_exact_teacher_as_steps_shrink():
    """The gradients of [2] eq. 7 and eq. 10 in the mean over data and noise, by quadrature: their relative difference shrinks with the stride."""
    schedule, data = schedules.cosine(), Mixture(torch.tensor([[-1.0], [0.6]]))
    import numpy as np

    nodes, weights = (torch.from_numpy(values) for values in np.polynomial.hermite_e.hermegauss(80))
    x0, eps = data.means.repeat_interleave(80, 0), nodes[:, None].repeat(2, 1)
    share = (weights / weights.sum()).repeat(2) / 2
    parameters = torch.tensor([0.7, -0.4, 0.3], dtype=torch.float64, requires_grad=True)

    def student(x, t):
        a, b, c = parameters
        return Prediction(torch.tanh(a * x + b * column(schedule.progress(t)) + c), x)

    def gradient(t, stride, teacher):
        times, n = torch.tensor([t, t - stride]), torch.zeros(len(x0), dtype=torch.long)
        each = consistency_loss(
            student, student, schedule, x0, times, teacher=teacher, n_eps=(n, eps)
        )
        return torch.autograd.grad((share * each).sum(), parameters)[0]

    for t in (300, 600, 900):
        apart = []
        for stride in (80, 20, 5):
            distilled, trained = (
                gradient(t, stride, data.denoiser(schedule)),
                gradient(t, stride, None),
            )
            apart.append((trained - distilled).norm() / distilled.norm())
        assert apart[0] > 2.5 * apart[1] > 2.5 * 2.5 * apart[2] > 0  # of first order: 4 and 16
        assert apart[2] < 0.05


def test_a_guided_teachers_step_is_the_latent_consistency_models():
    """[5] section 4.2: z_s = z_t + (1 + w) Psi(z_t, c) - w Psi(z_t, null), where Psi is the solver's step and 1 + w our scale."""
    schedule, context, null = (
        schedules.scaled_linear(),
        torch.randn(2, 5, 8).double(),
        torch.randn(2, 5, 8).double(),
    )
    denoiser, times = Denoiser(small_unet(), schedule), schedule.timesteps(50)
    x0, eps, n = (
        torch.randn(2, 2, 8, 8).double(),
        torch.randn(2, 2, 8, 8).double(),
        torch.tensor([3, 30]),
    )
    z, w = schedule.mix(x0, eps, times[n]), 6.5
    psi = [
        schedule.mix(*denoiser(z, times[n], words), times[n + 1]) - z for words in (context, null)
    ]
    z_s = z + (1 + w) * psi[0] - w * psi[1]
    student = guide(denoiser, context, None, 1)
    with torch.no_grad():
        expected = squared(
            consistent(student, schedule, z, times[n]),
            consistent(student, schedule, z_s, times[n + 1]),
        )
    found = consistency_loss(
        student, student, schedule, x0, times, guide(denoiser, context, null, 1 + w), n_eps=(n, eps)
    )
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=0)


def test_no_gradient_goes_through_teacher_or_target():
    schedule, x0 = schedules.cosine(), torch.randn(2, 2, 8, 8).double()
    student, target, teacher = (Denoiser(small_unet(), schedule, "x0") for _ in range(3))
    consistency_loss(
        *(guide(d, torch.zeros(2, 1, 8).double(), None, 1) for d in (student, target)),
        schedule,
        x0,
        schedule.timesteps(4),
        guide(teacher, torch.zeros(2, 1, 8).double(), None, 1),
    ).sum().backward()
    assert any(p.grad is not None for p in student.parameters())
    assert all(p.grad is None for other in (target, teacher) for p in other.parameters())


def test_lora_alone_is_trained_by_latent_consistency():
    """LCM-LoRA: A and B get gradients, nothing else."""
    schedule = schedules.cosine()
    teacher = Denoiser(small_unet(), schedule, "x0").requires_grad_(False)
    student = copy.deepcopy(teacher)
    lora.add(student.network, rank=2)
    student.double()
    words = torch.randn(2, 5, 8).double()
    ours, taught = guide(student, words, None, 1), guide(teacher, words, 0 * words, 2.0)
    consistency_loss(
        ours, ours, schedule, torch.randn(2, 2, 8, 8).double(), schedule.timesteps(4), taught
    ).sum().backward()
    moved = {
        name.rsplit(".", 1)[-1] for name, p in student.named_parameters() if p.grad is not None
    }
    assert moved == {"A", "B"}


def test_renoised_loss_leans_to_the_likelier_side():
    """Two points of data, +1 and -1. A guess between them is pulled away from their mean, which regression would leave it at, and one of the
    points is its own best guess. Without noise to hide anything nothing changes; in much noise the mean is all there is."""
    schedule, data = schedules.cosine(), Mixture(torch.tensor([[-1.0], [1.0]]))
    eps = torch.randn(20_000, 1, dtype=torch.float64)

    def slope(guess, s):
        """Of the mean loss in the guess: negative where the guess grows."""
        g = torch.tensor(guess, dtype=torch.float64, requires_grad=True)
        student, t, s = (
            saying(schedule, lambda x, t: g.expand(len(x), 1)),
            torch.full((len(eps),), 1000),
            torch.full((len(eps),), s),
        )
        return torch.autograd.grad(
            renoised_loss(student, data.denoiser(schedule), schedule, eps, t, s, eps=eps).mean(), g
        )[0]

    assert (
        slope(0.2, 250) < -0.1 and slope(-0.2, 250) > 0.1 and slope(0.2, 900) > 0.1
    )  # their standard error is 0.013
    assert abs(slope(1.0, 100)) < 1e-6 < 0.01 < abs(slope(0.9, 100))


def test_renoised_loss_by_its_formula():
    """[8] eq. 4: d(f(x_t), f_teacher(alpha_s f(x_t) + sigma_s eps)), and the gradient goes through the first f alone."""
    schedule, x, eps = (
        schedules.cosine(),
        torch.randn(2, 2, 8, 8).double(),
        torch.randn(2, 2, 8, 8).double(),
    )
    student, teacher = (Denoiser(small_unet(), schedule, "x0") for _ in range(2))
    ours, theirs = (
        guide(denoiser, torch.zeros(2, 1, 8).double(), None, 1) for denoiser in (student, teacher)
    )
    t, s = torch.tensor([1000, 1000]), torch.tensor([400, 700])
    found = renoised_loss(ours, theirs, schedule, x, t, s, eps=eps)
    guess = consistent(ours, schedule, x, t)
    expected = (
        (guess - consistent(theirs, schedule, schedule.mix(guess, eps, s), s))
        .pow(2)
        .flatten(1)
        .mean(1)
    )
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    found.sum().backward()
    assert any(p.grad is not None for p in student.parameters()) and all(
        p.grad is None for p in teacher.parameters()
    )


def test_pseudo_huber():
    """[3] section 3.3 with c = 0.00054 sqrt(d), over sqrt(d)."""
    x, y = torch.randn(4, 3, 5), torch.randn(4, 3, 5)
    c = 0.00054 * 15**0.5
    torch.testing.assert_close(
        pseudo_huber(x, y), (((x - y) ** 2).sum((1, 2)) + c**2).sqrt() / 15**0.5 - c / 15**0.5
    )
    assert pseudo_huber(x, x).max() == 0


def test_intervals_double_and_levels_are_lognormal():
    """[3] section 3.4 and 3.5, by its own formulas."""
    assert [intervals(k, 8000) for k in (0, 999, 1000, 1999, 2000, 7000, 7999)] == [
        10,
        10,
        20,
        20,
        40,
        1280,
        1280,
    ]
    assert [intervals(k, 3, 2, 4) for k in range(3)] == [2, 4, 4]
    assert [intervals(k, 8) for k in range(8)] == [10 * 2**k for k in range(8)]
    with pytest.raises(UserError, match="10 to 1280 intervals take at least 8"):
        intervals(0, 7)
    sigma = schedules.Karras().timesteps(20)[:-1]
    found = lognormal(sigma)
    erf = torch.erf((sigma.log() + 1.1) / (2**0.5 * 2.0))
    expected = torch.stack([above - below for above, below in pairwise(erf)])
    torch.testing.assert_close(found / found.sum(), expected / expected.sum(), rtol=1e-9, atol=0)


# Students in the plane.


class MLP(nn.Module):
    def __init__(self, width=96):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(2 + 32, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, 2),
        )

    def forward(self, x, t, context=None):
        return self.layers(torch.cat([x, timestep_embedding(t, 32).to(x)], dim=1))


SCHEDULE = schedules.cosine()
TEACHER, TIMES = ISLANDS.denoiser(SCHEDULE), SCHEDULE.timesteps(16)


def distilled(loss, student, steps, lr=4e-3):
    """The average of the weights after training on exact draws."""
    ema = EMA(student, decay=0.98)

    def batches(start):
        for k in count(start):
            yield ISLANDS.draw(256, torch.Generator().manual_seed(seed_of(0, -1 - k))).float()

    for _ in train(
        lambda x0: {"loss": loss(x0, ema.average)},
        student,
        batches,
        TrainConfig(steps, lr, warmup=20),
        ema,
    ):
        pass
    return ema.average


def misses(denoise, step, steps):
    """Root mean square distance from where the exact path of each noise ends."""
    x_T = torch.randn(1000, 2, generator=torch.Generator().manual_seed(7))
    *_, truth = sample(TEACHER, SCHEDULE, x_T.double(), 100, unipc(), "log-snr")
    *_, last = sample(torch.no_grad()(denoise), SCHEDULE, x_T, steps, step)
    return (last.x - truth.x).pow(2).sum(1).mean().sqrt().item()


@pytest.fixture(scope="module")
def three_steps():
    """What the exact teacher misses by in three steps. A student in one is to be nearer; the teacher in one misses by three times as much."""
    found = misses(TEACHER, ddim(), 3)
    assert misses(TEACHER, ddim(), 1) > 2.5 * found
    return found


def test_progressive_student(three_steps):
    """16 steps to 4 to 1, each student the next one's teacher."""
    teacher, times, student = TEACHER, TIMES, Denoiser(MLP(), SCHEDULE, "x0")
    for _ in range(2):
        student = copy.deepcopy(student).requires_grad_(True)
        student = distilled(
            lambda x0, _, s=student, t=teacher, g=times: progressive_loss(
                s, t, SCHEDULE, x0, g, stride=4
            ),
            student,
            300,
        )
        teacher, times = student, times[::4]
    assert misses(student, ddim(), 1) < three_steps


def test_endpoint_student(three_steps):
    x_T = torch.randn(4000, 2)
    walks = torch.stack([frame.x for frame in sample(TEACHER, SCHEDULE, x_T, 16, unipc())])
    student = Denoiser(MLP(), SCHEDULE, "x0")

    def loss(x0, _):
        n, i = (
            torch.randint(0, 16, (len(x0),)) * (torch.rand(len(x0)) < 0.5),
            torch.randint(0, 4000, (len(x0),)),
        )
        return endpoint_loss(student, SCHEDULE, walks[n, i], TIMES[n], walks[-1, i])

    assert misses(distilled(loss, student, 300), lcm(), 1) < three_steps


@pytest.mark.parametrize("teacher", [TEACHER, None], ids=["distillation", "training"])
def test_consistency_student(teacher, three_steps):
    student = Denoiser(MLP(), SCHEDULE, "x0")
    made = distilled(
        lambda x0, average: consistency_loss(student, average, SCHEDULE, x0, TIMES, teacher),
        student,
        600,
    )
    assert misses(made, lcm(), 1) < three_steps
