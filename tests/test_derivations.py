"""The steps of the chapters' derivations, evaluated: each formula beside the code that it leads to."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from minidiff import schedules, steps
from minidiff.ddpm import DDPM
from minidiff.methods import distill
from minidiff.methods.exact import Mixture

EXACT = 1e-10  # float64 algebra
MEAN, STD = 0.7, 0.4  # of the data
GAUSSIAN = Mixture(torch.tensor([[MEAN]], dtype=torch.float64), STD)
GROUPS = Mixture(torch.tensor([[-1.0], [0.5]]), 0.1, weights=torch.tensor([1.0, 2.0]))


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def log_normal(x, mean, variance):
    return -((x - mean) ** 2) / (2 * variance) - torch.log(2 * math.pi * variance) / 2


def divergence(mean_1, variance_1, mean_2, variance_2):
    """D_KL of two normal distributions of one number."""
    ratio = variance_1 / variance_2
    return (ratio + (mean_1 - mean_2) ** 2 / variance_2 - 1 - ratio.log()) / 2


class Chains:
    """Forward chains of N(0.7, 0.4^2) in T = 20 steps, and their best reverse steps."""

    def __init__(self, n=200_000, T=20):
        g, self.T = seeded(0), T
        self.chain = DDPM(T, 0.1 / T, 10 / T)
        self.x = [GAUSSIAN.draw(n, g)]
        for time in range(1, T + 1):
            noise = torch.randn(n, 1, generator=g, dtype=torch.float64)
            self.x.append(self.chain.q_step(self.x[-1], torch.full((n,), time), noise))

    def best_eps(self, x, t):
        a = self.chain.alpha_bar[t].view(-1, 1)
        return (1 - a).sqrt() * (x - a.sqrt() * MEAN) / (a * STD**2 + 1 - a)

    def reverse(self, time):
        """Mean and variance of p(x_{t-1} | x_t), equations 1 and 11, with the variance beta."""
        t = torch.full((len(self.x[0]),), time)
        eps, beta = self.best_eps(self.x[time], t), self.chain.beta[time]
        share = beta / (1 - self.chain.alpha_bar[time]).sqrt()
        return (self.x[time] - share * eps) / (1 - beta).sqrt(), beta


@pytest.mark.equation("ddpm-1", "ddpm-3", "ddpm-5")
def test_both_forms_of_the_bound_agree_and_lie_above_the_entropy():
    it = Chains()
    x, T, zero, one = it.x, it.T, torch.zeros(()), torch.ones((), dtype=torch.float64)
    plain = -log_normal(x[T], zero, one)
    turned = divergence(it.chain.alpha_bar[T].sqrt() * x[0], 1 - it.chain.alpha_bar[T], zero, one)
    for time in range(1, T + 1):
        mean, variance = it.reverse(time)
        forward = (1 - it.chain.beta[time]).sqrt() * x[time - 1]
        step = log_normal(x[time - 1], mean, variance)
        plain = plain - step + log_normal(x[time], forward, it.chain.beta[time])
        if time == 1:
            turned = turned - step
            continue
        posterior = it.chain.q_posterior(x[0], x[time], torch.full((len(x[0]),), time))
        turned = turned + divergence(*posterior, mean, variance)
    entropy = math.log(2 * math.pi * math.e * STD**2) / 2
    error = (plain - turned).std() / math.sqrt(len(plain))  # of the mean of the difference
    assert abs(plain.mean() - turned.mean()) < 4 * error
    assert entropy < turned.mean() < entropy + 0.1


@pytest.mark.equation("ddpm-8", "ddpm-9", "ddpm-10", "ddpm-11", "ddpm-12")
def test_the_distance_of_the_means_is_the_error_of_the_noise():
    chain, g, B = DDPM(), seeded(1), 64
    t = torch.randint(2, 1001, (B,), generator=g)
    x0, eps, guess = torch.randn(3, B, 5, generator=g, dtype=torch.float64)
    x_t = chain.q_sample(x0, t, eps)
    beta, alpha_bar = chain.beta[t][:, None], chain.alpha_bar[t][:, None]

    def mean(noise):  # equation 10 and 11
        return (x_t - beta / (1 - alpha_bar).sqrt() * noise) / (1 - beta).sqrt()

    exact = chain.q_posterior(x0, x_t, t)[0]
    from_noise = chain.q_posterior(chain.predict_x0(x_t, t, eps), x_t, t)
    learnt = chain.p_sample(lambda x, t: guess, x_t, t, torch.zeros_like(x_t))
    torch.testing.assert_close(exact, from_noise[0], atol=EXACT, rtol=0)
    torch.testing.assert_close(exact, mean(eps), atol=EXACT, rtol=0)
    torch.testing.assert_close(learnt, mean(guess), atol=EXACT, rtol=0)
    weight = beta**2 / (2 * beta * (1 - beta) * (1 - alpha_bar))
    distance = (exact - learnt) ** 2 / (2 * beta)
    torch.testing.assert_close(distance, weight * (eps - guess) ** 2, atol=EXACT, rtol=1e-8)


def rates(tau, T=1000):
    """beta(t) of the continuous linear schedule, and alpha, sigma, for t = tau in [0, 1]."""
    beta = 0.1 + 19.9 * tau
    alpha = math.exp(-(0.1 * tau + 19.9 * tau**2 / 2) / 2)
    return beta, alpha, math.sqrt(1 - alpha**2)


@pytest.mark.equation("score-sde-13", "flow-11")
def test_the_probability_flow_is_the_mean_velocity():
    """f - g^2 score / 2 = x0 d(alpha)/dt + eps d(sigma)/dt, for the mean x0 and eps."""
    tau, h, x, x0 = 0.4, 1e-5, 0.7, 0.3
    beta, alpha, sigma = rates(tau)
    eps = (x - alpha * x0) / sigma
    (_, a1, s1), (_, a2, s2) = rates(tau - h), rates(tau + h)
    velocity = x0 * (a2 - a1) / (2 * h) + eps * (s2 - s1) / (2 * h)
    assert velocity == pytest.approx(-beta * x / 2 - beta * (-eps / sigma) / 2, abs=1e-7)


@pytest.mark.equation("score-sde-5", "score-sde-6", "score-sde-11")
def test_the_sde_leads_from_data_to_noise_and_back():
    """Euler-Maruyama in 1,000 steps there and back, with the exact score, gives the data again."""
    g, n, schedule = seeded(2), 8_000, schedules.linear()
    x = GROUPS.draw(n, g)

    def noise():
        return torch.randn(n, 1, generator=g, dtype=torch.float64)

    chain = DDPM()
    for time in range(1, 1001):
        beta = chain.beta[time]
        x = x - beta * x / 2 + beta.sqrt() * noise()
    assert x.mean().abs() < 0.03 and abs(x.std() - 1) < 0.03  # three standard errors
    for time in range(1000, 0, -1):
        beta, t = chain.beta[time], torch.full((n,), time)
        score = GROUPS.score(schedule, x, t)
        x = x + beta * x / 2 + beta * score + beta.sqrt() * noise()
    assert (x < -0.25).double().mean() == pytest.approx(1 / 3, abs=0.02)
    assert x.mean() == pytest.approx(0, abs=0.03) and x.std() == pytest.approx(0.714, abs=0.02)


@pytest.mark.equation("score-sde-7")
def test_denoising_score_matching_is_the_error_of_the_noise():
    g = seeded(3)
    x0, eps, guess = torch.randn(3, 100, generator=g, dtype=torch.float64)
    _, alpha, sigma = rates(0.3)
    target = -(alpha * x0 + sigma * eps - alpha * x0) / sigma**2
    matching = sigma**2 * (-guess / sigma - target) ** 2
    torch.testing.assert_close(matching, (eps - guess) ** 2, atol=EXACT, rtol=0)


def velocity(x, t, data=GAUSSIAN):
    guess = data.denoiser(schedules.Flow())(x, t.expand(len(x)))
    return guess.eps - guess.x0


@pytest.mark.equation("flow-8", "flow-22")
def test_points_that_move_with_the_mean_velocity_are_distributed_as_the_lines():
    """For N(0.7, 0.4^2): mean and spread of (1 - t) x0 + t eps, at t = 0.5 and 0."""
    x = start = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    times = torch.linspace(1, 0, 4001, dtype=torch.float64)
    for t, s in pairwise(times):
        x = x + (s - t) * velocity(x, t)
        if s.item() in (0.5, 0.0):  # a Gaussian stays one, so the map is linear
            mean, std = (1 - s) * MEAN, ((1 - s) ** 2 * STD**2 + s**2).sqrt()
            torch.testing.assert_close(x, mean + std * start, atol=1e-3, rtol=0)


@pytest.mark.equation("flow-euler")
def test_eulers_step_along_the_velocity_is_the_samplers():
    flow, t, s = schedules.Flow(), torch.tensor(0.7), torch.tensor(0.4)
    x = torch.randn(50, 1, generator=seeded(4), dtype=torch.float64)
    ours, _, _ = steps.euler()(GROUPS.denoiser(flow), flow, x, t, s, torch.randn_like)
    torch.testing.assert_close(ours, x + (s - t) * velocity(x, t, GROUPS), atol=1e-6, rtol=0)


@pytest.mark.equation("flow-5", "flow-23")
def test_both_flow_losses_differ_by_a_constant():
    """E over x0 and eps by quadrature, exact for a v that is linear in x."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(12)
    x0, eps = (torch.from_numpy(a).reshape(-1, 1) for a in np.meshgrid(MEAN + STD * nodes, nodes))
    weight = torch.from_numpy(np.outer(weights, weights)).reshape(-1, 1) / (2 * math.pi)
    t = torch.tensor(0.6, dtype=torch.float64)
    x = (1 - t) * x0 + t * eps
    gaps = []
    for slope, bias in ((0.0, 0.0), (1.0, -0.3), (-2.0, 0.8)):
        v = slope * x + bias
        conditional = (weight * (v - (eps - x0)) ** 2).sum()
        marginal = (weight * (v - velocity(x, t)) ** 2).sum()
        gaps.append((conditional - marginal).item())
    assert gaps == pytest.approx(gaps[:1] * 3, abs=EXACT) and gaps[0] > 0.01


@pytest.mark.equation("dpm-solver-2m")
def test_the_second_step_of_2m():
    """The line through both estimates, at half the step, by the chapter's formula."""
    schedule = schedules.cosine()
    times = torch.tensor([800.0, 600.0, 350.0], dtype=torch.float64)
    alpha, sigma = schedule.alpha_sigma(times)
    half_log_snr = (alpha / sigma).log()
    h_last, h = half_log_snr.diff()
    denoise, noise = GROUPS.denoiser(schedule), iter(())
    x = torch.randn(5, 1, dtype=torch.float64)
    step = steps.dpmpp_2m()
    y, _, memory = step(denoise, schedule, x, times[0], times[1], noise)
    ours, _, _ = step(denoise, schedule, y, times[1], times[2], noise, memory)
    first, second = denoise(x, times[:1].expand(5)).x0, denoise(y, times[1:2].expand(5)).x0
    line = second + h / (2 * h_last) * (second - first)
    by_hand = sigma[2] / sigma[1] * y + alpha[2] * (1 - (-h).exp()) * line
    torch.testing.assert_close(ours, by_hand, rtol=EXACT, atol=EXACT)


@pytest.mark.equation("edm-5")
def test_noise_levels_of_edm():
    """Equal strides in the seventh root, from the largest level to the smallest, then 0."""
    schedule, n = schedules.Karras(), 8
    times = schedule.timesteps(n)
    high, low = times[0].item() ** (1 / 7), times[-2].item() ** (1 / 7)
    by_hand = [(high + i / (n - 1) * (low - high)) ** 7 for i in range(n)]
    assert times[:-1].tolist() == pytest.approx(by_hand, rel=EXACT) and times[-1] == 0
    assert (times[0].item(), times[-2].item()) == pytest.approx((80, 0.002), rel=EXACT)


@pytest.mark.equation("lcm-9", "consistency-7")
def test_the_consistency_loss_by_its_formulas():
    """c_skip and c_out with tau = 10 (t - 1), sigma_data = 0.5; neighbours on the teacher's walk."""
    schedule, data = schedules.cosine(), GAUSSIAN.draw(6, seeded(0))
    teacher, student = GAUSSIAN.denoiser(schedule), GROUPS.denoiser(schedule)
    times, n = torch.tensor([900, 500, 2, 0]), torch.tensor([0, 0, 1, 1, 2, 2])
    eps = torch.randn(data.shape, generator=seeded(1), dtype=torch.float64)

    def f(denoise, x, t):
        tau = 10 * (t.view(-1, 1).double() - 1).clamp(min=0)
        c_skip, c_out = 0.25 / (tau**2 + 0.25), tau / (tau**2 + 0.25).sqrt()
        return torch.where(tau > 0, c_skip * x + c_out * denoise(x, t).x0, x)

    t, s = times[n], times[n + 1]
    x = schedule.mix(data, eps, t)
    x_s = schedule.mix(*teacher(x, t), s)
    by_hand = (f(student, x, t) - f(teacher, x_s, s)).pow(2).flatten(1).mean(1)
    ours = distill.consistency_loss(
        student, teacher, schedule, data, times, teacher, n_eps=(n, eps)
    )
    torch.testing.assert_close(ours, by_hand, rtol=EXACT, atol=EXACT)
