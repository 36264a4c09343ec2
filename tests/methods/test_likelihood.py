"""The likelihood by the probability-flow ODE against mixtures whose density is known."""

import math

import pytest
import torch

from minidiff import schedules
from minidiff.denoiser import Denoiser
from minidiff.methods.exact import Mixture
from minidiff.methods.likelihood import _trace, bits_per_dim, log_likelihood

SCHEDULES = [schedules.linear(), schedules.cosine(), schedules.Flow(), schedules.Karras()]


def world():
    """Six modes of unequal widths in four dimensions, two and two opposite, so that their mean is 0; variances about 1."""
    generator = torch.Generator().manual_seed(1)
    means = 0.8 * torch.randn(3, 2, 2, generator=generator, dtype=torch.float64)
    std = 0.2 + 0.4 * torch.rand(3, 2, 2, generator=generator, dtype=torch.float64)
    return Mixture(
        torch.cat([means, -means]), torch.cat([std, std]), torch.tensor([1.0, 2.0, 3.0] * 2)
    )


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: getattr(s, "betas", type(s).__name__))
def test_it_is_the_closed_form(schedule):
    """To 1e-3 bits per dimension at every point, with the exact trace."""
    mixture = world()
    x0 = mixture.draw(16, torch.Generator().manual_seed(0))
    found = log_likelihood(mixture.denoiser(schedule), schedule, x0)
    expected = mixture.log_likelihood(x0)
    gap = bits_per_dim(found, 4) - bits_per_dim(expected, 4)
    assert gap.abs().max() < 1e-3


def test_a_mean_is_drowned_only_so_far():
    """Data about m are taken for data about 0 at the upper level s: |z m / s| nats, which a higher level takes away."""
    schedule, mixture = schedules.Flow(), Mixture(torch.tensor([[1.5]], dtype=torch.float64), 0.5)
    x0 = mixture.draw(64, torch.Generator().manual_seed(0))
    gaps = [
        log_likelihood(mixture.denoiser(schedule), schedule, x0, 200, between=(0.002, s))
        - mixture.log_likelihood(x0)
        for s in (80, 8000)
    ]
    assert 1e-2 < gaps[0].abs().max() < 4 * 1.5 / 80  # z within 4 deviations
    assert gaps[1].abs().max() < 1e-3


def test_the_probes_are_unbiased():
    """The mean over draws of the same point is the exact figure, to three of its standard errors; and for one Gaussian with equal widths, whose
    Jacobian is a multiple of the identity, signs make no error at all."""
    mixture, schedule = world(), schedules.cosine()
    x0 = mixture.draw(1, torch.Generator().manual_seed(0))
    many = x0.expand(400, 2, 2)
    denoise = mixture.denoiser(schedule)
    exact = log_likelihood(denoise, schedule, x0, steps=30)
    found = log_likelihood(
        denoise, schedule, many, steps=30, probes=1, generator=torch.Generator().manual_seed(3)
    )
    assert found.std() > 0.01
    assert abs(found.mean() - exact.item()) < 3 * found.std() / math.sqrt(400)
    round_one = Mixture(torch.zeros(1, 2, 2), 0.7)
    exact, one = (
        log_likelihood(round_one.denoiser(schedule), schedule, x0, 30, probes)
        for probes in (None, 1)
    )
    torch.testing.assert_close(one, exact, rtol=1e-12, atol=0)


def test_the_trace_by_its_definition():
    """Of eps = A y: the sum of A's diagonal, or Hutchinson's mean of v . A v over the probes."""
    A = torch.randn(4, 4, dtype=torch.float64)
    y = torch.randn(3, 2, 2, dtype=torch.float64, requires_grad=True)
    eps = (y.flatten(1) @ A.T).view(3, 2, 2)
    torch.testing.assert_close(_trace(eps, y, None), A.trace().expand(3))
    signs = (torch.randint(2, (5, 3, 2, 2)) * 2 - 1).double()
    v = signs.flatten(2)
    torch.testing.assert_close(_trace(eps, y, signs), ((v @ A.T) * v).sum(-1).mean(0))


def test_runge_kutta_by_its_equations():
    """One step of the classical method in u = log(sigma / alpha), for data about 0 of deviation 1,
    whose eps is s y / (1 + s^2) in y = x / alpha: the same four slopes, of y and of log p; then the
    prior N(0, 1 + s^2) at the upper end."""
    schedule, x0 = schedules.Flow(), torch.tensor([[0.7], [-2.0]], dtype=torch.float64)
    normal = Mixture(torch.zeros(1, 1, dtype=torch.float64), 1.0)
    low, high = 0.5, 1.5
    h, u = math.log(high / low), math.log(low)

    def slope(u, y):
        s = math.exp(u)
        return s * s * y / (1 + s * s), -s * s / (1 + s * s)

    y_1, p_1 = slope(u, x0)
    y_2, p_2 = slope(u + h / 2, x0 + h / 2 * y_1)
    y_3, p_3 = slope(u + h / 2, x0 + h / 2 * y_2)
    y_4, p_4 = slope(u + h, x0 + h * y_3)
    y = x0 + h / 6 * (y_1 + 2 * y_2 + 2 * y_3 + y_4)
    gained = h / 6 * (p_1 + 2 * p_2 + 2 * p_3 + p_4)
    prior = -(y[:, 0] ** 2 / (1 + high**2) + math.log(2 * math.pi * (1 + high**2))) / 2
    found = log_likelihood(normal.denoiser(schedule), schedule, x0, 1, between=(low, high))
    torch.testing.assert_close(found, prior - gained, rtol=1e-11, atol=0)


def test_defaults_of_the_likelihood():
    """100 steps between sigma / alpha = 0.002 and 80, the exact trace; a schedule that ends below
    80 ends there."""
    mixture, x0 = world(), world().draw(2, torch.Generator().manual_seed(0))
    for schedule, most in ((schedules.Flow(), 80), (schedules.scaled_linear(), 80)):
        alpha, sigma = schedule.alpha_sigma(schedule.timesteps(1)[0])
        most = min(most, (sigma / alpha).item())
        denoise = mixture.denoiser(schedule)
        expected = log_likelihood(denoise, schedule, x0, 100, None, None, (0.002, most))
        assert torch.equal(log_likelihood(denoise, schedule, x0), expected)


def test_the_order_of_the_method():
    """Runge-Kutta's fourth: half the stride, a sixteenth of the error."""
    mixture, schedule = world(), schedules.Karras()
    x0 = mixture.draw(8, torch.Generator().manual_seed(0))
    coarse, fine, best = (
        log_likelihood(mixture.denoiser(schedule), schedule, x0, steps) for steps in (60, 120, 480)
    )
    slope = ((coarse - best).abs().mean() / (fine - best).abs().mean()).log2()
    assert slope == pytest.approx(4, abs=0.6)


def test_it_takes_a_denoiser_with_weights_and_leaves_no_gradients():
    network = torch.nn.Module()
    network.scale = torch.nn.Parameter(torch.tensor(0.5))
    network.forward = lambda x, c_noise, context=None: network.scale * x
    schedule = schedules.cosine()
    found = log_likelihood(
        Denoiser(network, schedule), schedule, torch.randn(2, 3), steps=4, probes=2
    )
    assert found.shape == (2,) and not found.requires_grad and network.scale.grad is None


def test_bits_of_bytes():
    """Bytes that are all equally likely have 8 bits, whatever the range they are brought to."""
    dims, density = 5, 1 / (256 * 2 / 255)  # of 256 cells that are 2 / 255 wide
    assert bits_per_dim(
        torch.tensor([dims * math.log(density)]), dims, 2 / 255
    ).item() == pytest.approx(8, rel=1e-6)
    assert bits_per_dim(torch.tensor([-2 * math.log(2)]), 2).item() == pytest.approx(1)  # cell 1
