"""The likelihood by the probability-flow ODE against mixtures whose density is known."""

import math

import pytest
import torch

from minidiff import schedules
from minidiff.denoiser import Denoiser
from minidiff.methods.exact import Mixture
from minidiff.methods.likelihood import bits_per_dim, log_likelihood

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
