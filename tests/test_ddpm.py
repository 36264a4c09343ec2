"""The literal chain: its parts against each other, in float64."""

import pytest
import torch

from minidiff import schedules
from minidiff.ddpm import DDPM
from minidiff.denoiser import Denoiser
from minidiff.samplers import ddpm, sample

from .noise import seeded

EXACT = 1e-10  # float64 algebra over a thousand steps


def test_forward_chain_composed_equals_closed_form():
    """Composing the linear-Gaussian steps of eq. 2 gives eq. 4's mean factor and variance at every t."""
    chain = DDPM(T=1000)
    one, zero = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
    factor, variance = one, zero
    for time in range(1, 1001):
        t = torch.tensor([time])
        factor = chain.q_step(factor, t, zero)
        variance = chain.q_step(zero, t, one) ** 2 + chain.q_step(one, t, zero) ** 2 * variance
        assert torch.allclose(factor, chain.q_sample(one, t, zero), atol=EXACT, rtol=0)
        assert torch.allclose(variance, chain.q_sample(zero, t, one) ** 2, atol=EXACT, rtol=0)


def test_one_step_is_equation_2():
    """x_t = sqrt(1 - beta_t) x_{t-1} + sqrt(beta_t) eps: signal and noise add, in this sign."""
    x, eps = torch.randn(4, 5, dtype=torch.float64), torch.randn(4, 5, dtype=torch.float64)
    t = torch.tensor([1, 2, 500, 1000])
    beta = (1e-4 + (t.double() - 1) / 999 * (0.02 - 1e-4))[:, None]  # section 4
    expected = (1 - beta).sqrt() * x + beta.sqrt() * eps
    assert torch.allclose(DDPM().q_step(x, t, eps), expected, atol=EXACT, rtol=0)


@pytest.mark.parametrize("time", [1, 2, 500, 1000])
def test_posterior_is_bayes(time):
    """q(x_{t-1} | x_t, x_0) from the product of two Gaussians in x_{t-1}: precisions add, means weigh by precision."""
    chain, t = DDPM(), torch.tensor([time])
    x0, x_t = torch.randn(1, 5, dtype=torch.float64), torch.randn(1, 5, dtype=torch.float64)
    mean, variance = chain.q_posterior(x0, x_t, t)
    beta, before = chain.beta[time], chain.alpha_bar[time - 1]
    if time == 1:  # the prior is a point: x_0 itself
        assert torch.allclose(mean, x0, atol=EXACT, rtol=0) and variance.item() == 0
        return
    prior, likelihood = (
        1 / (1 - before),
        (1 - beta) / beta,
    )  # precisions of q(x_{t-1} | x_0) and of q(x_t | x_{t-1}) as a function of x_{t-1}
    expected = (prior * before.sqrt() * x0 + likelihood * x_t / (1 - beta).sqrt()) / (
        prior + likelihood
    )
    assert torch.allclose(mean, expected, atol=EXACT, rtol=0)
    assert torch.allclose(variance, 1 / (prior + likelihood), atol=EXACT, rtol=0)


class Toy(torch.nn.Module):
    """A fixed nonlinear eps model that takes the chain's own t."""

    def forward(self, x, t, context=None):
        return torch.tanh(x) * (1 + 0.001 * t.to(x).view(-1, 1))


def test_general_sampler_equals_the_literal_chain():
    """eta = 1 over all T steps of the linear schedule is algorithm 2, given the same noise."""
    x_T = torch.randn(3, 4, dtype=torch.float64)
    literal = list(
        DDPM().p_sample_loop(lambda x, t: Toy()(x, t - 1), x_T, torch.Generator().manual_seed(1))
    )
    denoiser = Denoiser(Toy(), schedules.linear(), "eps")
    general = [
        frame.x
        for frame in sample(denoiser, schedules.linear(), x_T, 1000, ddpm(), noise=seeded(1))
    ][1:]
    assert len(literal) == len(general) == 1000
    for a, b in zip(literal, general, strict=True):
        assert (a - b).abs().max() / a.abs().max() < EXACT


def test_last_step_adds_no_noise():
    chain, t = DDPM(), torch.ones(2, dtype=torch.long)
    x = torch.randn(2, 3)
    silent = chain.p_sample(Toy(), x, t, torch.zeros_like(x))
    assert torch.equal(chain.p_sample(Toy(), x, t, torch.randn_like(x)), silent)


def test_predict_x0_inverts_q_sample():
    chain, t = DDPM(), torch.tensor([1, 500, 1000])
    x0, eps = torch.randn(3, 4, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    assert torch.allclose(
        chain.predict_x0(chain.q_sample(x0, t, eps), t, eps), x0, atol=EXACT, rtol=0
    )


def test_the_loop_is_a_generator_that_leaves_the_caller_alone():
    chain = DDPM(T=10, beta_T=0.5)
    states = chain.p_sample_loop(Toy(), torch.randn(2, 3))
    next(states)
    assert torch.is_grad_enabled() and len(list(states)) == 9


def test_simple_loss_of_the_true_noise_is_zero():
    chain, x0, eps, t = (
        DDPM(),
        torch.randn(4, 3, 8, 8),
        torch.randn(4, 3, 8, 8),
        torch.randint(1, 1001, (4,)),
    )
    assert torch.equal(chain.simple_loss(lambda x, t: eps, x0, t, eps), torch.zeros(4))
    assert torch.allclose(
        chain.simple_loss(lambda x, t: eps + 2, x0, t, eps),
        torch.full((4,), 4.0),
        rtol=1e-6,
        atol=0,
    )  # fp32


def test_simple_loss_equals_the_general_one():
    x0, eps, t = (
        torch.randn(4, 6, dtype=torch.float64),
        torch.randn(4, 6, dtype=torch.float64),
        torch.randint(1, 1001, (4,)),
    )
    literal = DDPM().simple_loss(lambda x, t: Toy()(x, t - 1), x0, t, eps)
    assert torch.allclose(
        literal,
        Denoiser(Toy(), schedules.linear(), "eps").loss(x0, t=t, eps=eps),
        atol=EXACT,
        rtol=0,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_coefficients_are_rounded_last(dtype):
    """In low precision, every method is its float64 result but for a few roundings of its own terms, at every t: also where
    1 - alpha_bar is 1e-4, which bfloat16 cannot tell from 0."""
    chain, t = DDPM(), torch.arange(1, 1001)
    x, y, z = (torch.randn(1000, 8).to(dtype) for _ in range(3))
    eps = torch.finfo(dtype).eps

    def near(method, *arrays):
        """Within 8 roundings of the sum of the terms' sizes, which the same method gives for sizes where none is subtracted."""
        found, exact = method(*arrays), method(*(array.double() for array in arrays))
        assert found.dtype == dtype and found.isfinite().all()
        size = sum(
            method(
                *(a.double().abs() if a is b else torch.zeros_like(a).double() for a in arrays)
            ).abs()
            for b in arrays
        )
        assert ((found.double() - exact).abs() <= 8 * eps * size).all()

    near(lambda x, y: chain.q_step(x, t, y), x, y)
    near(lambda x, y: chain.q_sample(x, t, y), x, y)
    near(lambda x, y: chain.q_posterior(x, y, t)[0], x, y)
    near(lambda x, y: chain.predict_x0(x, t, y), x, y)
    near(lambda x, y, z: chain.p_sample(lambda *_: y, x, t, z), x, y, z)
    variance = chain.q_posterior(x, y, t)[1].double()
    exact = chain.q_posterior(x.double(), y.double(), t)[1]
    assert ((variance - exact).abs() <= eps * exact).all()
