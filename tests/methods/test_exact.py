"""Exact worlds against autograd, quadrature, Monte Carlo and brute force."""

import math

import pytest
import torch

from minidiff import schedules
from minidiff.denoiser import Denoiser
from minidiff.methods.exact import Mixture

SCHEDULES = [schedules.cosine(), schedules.Flow(), schedules.Karras()]


def name(schedule):
    return type(schedule).__name__


def world(dims=(3,), K=4):
    """Every component with a width of its own along every axis."""
    generator = torch.Generator().manual_seed(1)
    means, std = (
        torch.randn(K, *dims, generator=generator),
        0.2 + torch.rand(K, *dims, generator=generator),
    )
    return Mixture(means.double(), std.double(), torch.tensor([1.0, 2.0, 3.0, 4.0])[:K])


def middle(schedule):
    return schedule.timesteps(10)[[3, 5, 8]]


@pytest.mark.equation("efron-tweedie")
@pytest.mark.parametrize("schedule", SCHEDULES, ids=name)
def test_score_is_the_gradient_of_the_log_likelihood(schedule):
    mixture, t = world((2, 2)), middle(schedule)
    x = torch.randn(3, 2, 2, dtype=torch.float64, requires_grad=True)
    gradient = torch.autograd.grad(mixture.log_likelihood(x, schedule, t).sum(), x)[0]
    torch.testing.assert_close(
        mixture.score(schedule, x.detach(), t), gradient, rtol=1e-9, atol=1e-9
    )
    found = mixture.denoiser(schedule)(x.detach(), t)
    alpha, sigma = (scale.view(-1, 1, 1) for scale in schedule.alpha_sigma(t))
    torch.testing.assert_close(
        alpha * found.x0 + sigma * found.eps, x.detach(), rtol=1e-12, atol=1e-12
    )


def test_log_likelihood_is_a_density():
    """It integrates to 1 on a fine grid, clean and noisy, and is the textbook formula for one Gaussian."""
    mixture, schedule = world((1,)), schedules.cosine()
    x = torch.linspace(-12, 12, 20_001, dtype=torch.float64)[:, None]
    for more in ((), (schedule, torch.full((len(x),), 400))):
        assert abs(mixture.log_likelihood(x, *more).exp().sum() * 24 / 20_000 - 1) < 1e-10
    mean, std = torch.randn(5, dtype=torch.float64), torch.rand(5, dtype=torch.float64) + 0.1
    points = torch.randn(7, 5, dtype=torch.float64)
    expected = torch.distributions.Normal(mean, std).log_prob(points).sum(1)
    torch.testing.assert_close(
        Mixture(mean[None], std).log_likelihood(points), expected, rtol=1e-12, atol=0
    )


@pytest.mark.parametrize("schedule", SCHEDULES, ids=name)
def test_posterior_by_quadrature(schedule):
    """Mean and variance of x0 given x_t, by Bayes' rule on a fine grid of x0."""
    mixture, x = world((1,)), torch.tensor([[-0.7], [0.1], [1.3]], dtype=torch.float64)
    t = middle(schedule)
    alpha, sigma = (scale.view(-1, 1) for scale in schedule.alpha_sigma(t))
    grid = torch.linspace(-12, 12, 40_001, dtype=torch.float64)
    log_joint = mixture.log_likelihood(grid[:, None])[None] - (x - alpha * grid) ** 2 / (
        2 * sigma**2
    )
    p = log_joint.softmax(1)
    mean = (p * grid).sum(1, keepdim=True)
    torch.testing.assert_close(mixture.denoiser(schedule)(x, t).x0, mean, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(
        mixture.posterior_variance(schedule, x, t),
        (p * (grid - mean) ** 2).sum(1),
        rtol=1e-9,
        atol=1e-9,
    )


def test_a_data_set_is_a_mixture_of_no_width():
    """Its ideal denoiser is the softmax of -|x - alpha y|^2 / (2 sigma^2) over its items y, of any shape; where noise is little, the nearest."""
    items, schedule = torch.randn(6, 3, 4, 4), schedules.cosine()
    data = Mixture(items)
    x, t = torch.randn(5, 3, 4, 4), torch.tensor([1, 200, 500, 800, 1000])
    found = data.denoiser(schedule)(x, t).x0
    for k in range(5):
        alpha, sigma = (scale.item() for scale in schedule.alpha_sigma(t[k]))
        share = (
            -(x[k] - alpha * items).pow(2).flatten(1).sum(1).double() / (2 * sigma**2)
        ).softmax(0)
        torch.testing.assert_close(
            found[k], (share.view(-1, 1, 1, 1) * items).sum(0).float(), rtol=1e-4, atol=1e-5
        )  # fp32 answers
    assert found.dtype == torch.float32
    nearest = torch.cdist(x[:1].flatten(1), items.flatten(1)).argmin()
    torch.testing.assert_close(found[0], items[nearest])
    assert all((items == draw).flatten(1).all(1).any() for draw in data.draw(10).float())


def test_optimal_loss():
    """Closed form for one Gaussian; for a mixture, what its own denoiser loses on fresh draws; and no denoiser loses less."""
    schedule, t = schedules.cosine(), torch.tensor(300)
    alpha, sigma = schedule.alpha_sigma(t)
    std = torch.tensor([0.5, 2.0], dtype=torch.float64)
    expected = (std**2 * sigma**2 / (alpha**2 * std**2 + sigma**2)).mean()
    torch.testing.assert_close(
        Mixture(torch.zeros(1, 2), std).optimal_loss(schedule, t, n=3), expected, rtol=1e-12, atol=0
    )

    mixture, n, generator = world(), 100_000, torch.Generator().manual_seed(0)
    x0 = mixture.draw(n, generator)
    eps = torch.randn(x0.shape, dtype=torch.float64, generator=generator)

    class Exact(torch.nn.Module):
        def forward(self, x, c_noise, context=None):
            return mixture.denoiser(schedule)(x, c_noise + 1).x0

    losses = Denoiser(Exact(), schedule, "x0").loss(x0, t=t.expand(n), eps=eps)
    least = mixture.optimal_loss(schedule, t, n, generator)
    assert abs(losses.mean() - least) < 5 * math.sqrt(2) * losses.std() / math.sqrt(
        n
    )  # five standard errors of a difference
    network = Exact()
    network.forward = lambda x, c_noise, context=None: (
        0.97 * mixture.denoiser(schedule)(x, c_noise + 1).x0
    )
    assert Denoiser(network, schedule, "x0").loss(x0, t=t.expand(n), eps=eps).mean() > losses.mean()


def test_draws_follow_weights_means_and_widths():
    mixture, n = world((1,)), 200_000
    draws = mixture.draw(n, torch.Generator().manual_seed(0))[:, 0]
    mean = (mixture.weights * mixture.means[:, 0]).sum()
    variance = (
        mixture.weights * (mixture.std[:, 0] ** 2 + mixture.means[:, 0] ** 2)
    ).sum() - mean**2
    assert abs(draws.mean() - mean) < 5 * (variance / n).sqrt()
    assert (
        abs(draws.var() / variance - 1) < 5 * (3 / n) ** 0.5
    )  # no heavier tails than a Gaussian's, with room
    x = torch.tensor([-0.5, 0.5, 1.5], dtype=torch.float64)
    cdf = (
        mixture.weights[:, None] * torch.distributions.Normal(mixture.means, mixture.std).cdf(x)
    ).sum(0)
    assert ((draws[:, None] < x).double().mean(0) - cdf).abs().max() < 5 * 0.5 / n**0.5
