"""The literal chain: its parts against each other, in float64. Some are checks of the exercises, too."""

import pytest
import torch

from minidiff import schedules
from minidiff.ddpm import DDPM
from minidiff.denoiser import Denoiser
from minidiff.exercises import checks
from minidiff.exercises.checks import EXACT
from minidiff.exercises.models import Toy
from minidiff.samplers import ddpm, sample

from .noise import seeded

test_forward_chain_composed_equals_closed_form = pytest.mark.equation("ddpm-2", "ddpm-4")(
    checks.forward_chain_composed_equals_closed_form
)
test_posterior_is_bayes = pytest.mark.equation("ddpm-6", "ddpm-7")(checks.posterior_is_bayes)
test_last_step_adds_no_noise = checks.last_step_adds_no_noise
test_predict_x0_inverts_q_sample = pytest.mark.equation("ddpm-15")(
    checks.predict_x0_inverts_q_sample
)
test_simple_loss_of_the_true_noise_is_zero = checks.simple_loss_of_the_true_noise_is_zero


@pytest.mark.equation("ddpm-2")
def test_one_step_is_equation_2():
    """x_t = sqrt(1 - beta_t) x_{t-1} + sqrt(beta_t) eps: signal and noise add, in this sign."""
    x, eps = torch.randn(4, 5, dtype=torch.float64), torch.randn(4, 5, dtype=torch.float64)
    t = torch.tensor([1, 2, 500, 1000])
    beta = (1e-4 + (t.double() - 1) / 999 * (0.02 - 1e-4))[:, None]  # section 4
    expected = (1 - beta).sqrt() * x + beta.sqrt() * eps
    assert torch.allclose(DDPM().q_step(x, t, eps), expected, atol=EXACT, rtol=0)


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


def test_the_loop_is_a_generator_that_leaves_the_caller_alone():
    chain = DDPM(T=10, beta_T=0.5)
    states = chain.p_sample_loop(Toy(), torch.randn(2, 3))
    next(states)
    assert torch.is_grad_enabled() and len(list(states)) == 9


@pytest.mark.equation("ddpm-14")
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
