"""The table of targets, the weightings and guidance."""
import pytest
import torch

from minidiff import schedules
from minidiff.denoiser import HASTE, LEVELS, SIGMA_DATA, TARGETS, WEIGHTINGS, Denoiser, Prediction, guide

ALL_SCHEDULES = [schedules.linear(), schedules.scaled_linear(), schedules.cosine(), schedules.sigmoid(), schedules.Flow(), schedules.Karras()]
PAIRS = [(target, s) for target in TARGETS for s in ALL_SCHEDULES]


def name(value):
    return value if isinstance(value, str) else getattr(value, "betas", type(value).__name__)


class Knows(torch.nn.Module):
    """A network that answers a x0 + b eps exactly."""

    def forward(self, x, c_noise, context=None):
        return self.answer


def oracle(target, schedule, x0, eps, t, error=0.0):
    network = Knows()
    denoiser = Denoiser(network, schedule, target)
    alpha, sigma = (s.view(-1, 1) for s in schedule.alpha_sigma(t))
    a, b = TARGETS[target](alpha, sigma)
    network.answer = a * x0 + b * eps + error
    return denoiser, alpha * x0 + sigma * eps


@pytest.mark.parametrize("target, schedule", PAIRS, ids=name)
def test_every_row_gives_back_x0_and_eps(target, schedule):
    x0, eps = torch.randn(5, 7, dtype=torch.float64), torch.randn(5, 7, dtype=torch.float64)
    t = schedule.sample_t(5, torch.Generator().manual_seed(0))
    denoiser, x = oracle(target, schedule, x0, eps, t)
    found = denoiser(x, t)
    assert torch.allclose(found.x0, x0, atol=1e-10, rtol=0) and torch.allclose(found.eps, eps, atol=1e-10, rtol=0)


def test_edm_row_is_the_published_preconditioning():
    """D(x) = c_skip x + c_out F, EDM table 1."""
    t, x = torch.tensor([0.01, 0.5, 40.0], dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    network = Knows()
    network.answer = torch.randn(3, 4, dtype=torch.float64)
    s, s_d = t.view(-1, 1), SIGMA_DATA
    c_skip, c_out = s_d**2 / (s**2 + s_d**2), s * s_d / (s**2 + s_d**2).sqrt()
    expected = c_skip * x + c_out * network.answer
    assert torch.allclose(Denoiser(network, schedules.Karras(), "edm")(x, t).x0, expected, atol=1e-12, rtol=0)


def test_edm_row_is_the_same_on_every_schedule():
    """The same network says the same of x0 at one sigma / alpha, whether x is scaled by alpha or not: c_in, c_skip and c_out agree."""

    class Linear(torch.nn.Module):
        def forward(self, x, c_noise, context=None):
            return 0.3 * x - 0.1

    cosine, x = schedules.cosine(), torch.randn(1, 4, dtype=torch.float64)
    t = torch.tensor([500])
    alpha, sigma = cosine.alpha_sigma(t)
    here = Denoiser(Linear(), cosine, "edm")(alpha * x, t).x0
    there = Denoiser(Linear(), schedules.Karras(), "edm")(x, sigma / alpha).x0
    assert torch.allclose(here, there, atol=1e-12, rtol=0)


@pytest.mark.parametrize("target", ["eps", "x0", "v", "flow"])
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_weighting_means_the_same_for_every_target(target, weighting):
    """The loss is w(SNR) |x0 - x0_hat|^2 whatever the network predicts. 1e-8: x0_hat from eps divides a rounding error by alpha."""
    schedule = schedules.Flow() if target == "flow" else schedules.cosine()
    x0, eps = torch.randn(6, 5, dtype=torch.float64), torch.randn(6, 5, dtype=torch.float64)
    t = schedule.sample_t(6, torch.Generator().manual_seed(0))
    denoiser, x = oracle(target, schedule, x0, eps, t, error=torch.randn(6, 5, dtype=torch.float64))
    denoiser.weighting = weighting
    expected = WEIGHTINGS[weighting](schedule.snr(t)) * (x0 - denoiser(x, t).x0).pow(2).mean(1)
    assert torch.allclose(denoiser.loss(x0, t=t, eps=eps), expected, rtol=1e-8, atol=0)


@pytest.mark.parametrize("target, schedule", [("eps", schedules.linear()), ("x0", schedules.linear()), ("v", schedules.linear()),
                                              ("flow", schedules.Flow()), ("edm", schedules.Karras())])
def test_default_weighting_is_plain_squared_error(target, schedule):
    x0, eps, error = (torch.randn(6, 5, dtype=torch.float64) for _ in range(3))
    t = schedule.sample_t(6, torch.Generator().manual_seed(0))
    denoiser, _ = oracle(target, schedule, x0, eps, t, error=error)
    assert torch.allclose(denoiser.loss(x0, t=t, eps=eps), error.pow(2).mean(1), rtol=1e-8, atol=0)


def test_min_snr_published_forms():
    """Hang et al.: min(SNR, 5)/SNR for eps, min(SNR, 5) for x0, min(SNR, 5)/(SNR + 1) for v, each on the target's own squared error."""
    schedule, t = schedules.linear(), torch.tensor([1, 50, 400, 1000])
    snr = schedule.snr(t)
    for target, own in (("eps", snr.clamp(max=5) / snr), ("x0", snr.clamp(max=5)), ("v", snr.clamp(max=5) / (snr + 1))):
        x0, eps, error = (torch.randn(4, 9, dtype=torch.float64) for _ in range(3))
        denoiser, _ = oracle(target, schedule, x0, eps, t, error=error)
        denoiser.weighting = "min-snr"
        assert torch.allclose(denoiser.loss(x0, t=t, eps=eps), own * error.pow(2).mean(1), rtol=1e-8, atol=0)


def test_learned_weighting_makes_every_level_pull_equally():
    """u settles where each level's loss has mean 1 + u, u = log E[error | t], though the errors differ a thousandfold; and the network
    feels the error divided by e^u."""
    torch.manual_seed(0)
    schedule = schedules.cosine()
    denoiser = Denoiser(Knows(), schedule, "x0", "learned")
    optimizer = torch.optim.Adam(denoiser.parameters(), lr=2e-3)
    x0 = torch.zeros(64, 50)
    for _ in range(400):
        t = schedule.sample_t(64)
        spread = 10 ** (1.5 * schedule.progress(t) - 1.5)[:, None].float()
        denoiser.network.answer = spread * torch.randn(64, 50)
        optimizer.zero_grad()
        denoiser.loss(x0, t=t).mean().backward()
        optimizer.step()
    middles = (torch.arange(LEVELS) + 0.5) / LEVELS
    expected = (10 ** (3 * middles - 3)).log()
    assert torch.allclose(HASTE * denoiser.log_error.detach(), expected, atol=0.4)

    t, answer = torch.tensor([100, 900]), torch.ones(2, 50, requires_grad=True)
    denoiser.network.answer = answer
    loss = denoiser.loss(x0[:2], t=t)
    u = HASTE * denoiser.log_error[[2, 18]]
    assert torch.allclose(loss, 1 / u.exp() + u)
    assert torch.allclose(torch.autograd.grad(loss.sum(), answer)[0], (2 / 50 / u.exp())[:, None].expand(-1, 50))
    assert Denoiser(Knows(), schedule, "x0").log_error is None


def test_zero_terminal_snr_needs_a_target_that_sees_x0():
    schedule = schedules.Discrete("linear", zero_terminal_snr=True)
    assert schedule.alpha_bar[-1] == 0
    with pytest.raises(ValueError, match="zero_terminal_snr"):
        Denoiser(Knows(), schedule, "eps")
    x0, eps, t = torch.randn(2, 3, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64), torch.tensor([1000, 1000])
    denoiser, x = oracle("v", schedule, x0, eps, t)
    assert torch.allclose(denoiser(x, t).x0, x0, atol=1e-14, rtol=0)  # alpha = 0: x is pure noise, the network alone knows
    assert torch.equal(denoiser.loss(x0, t=t, eps=eps), torch.zeros(2, dtype=torch.float64))


def test_unknown_names():
    with pytest.raises(ValueError, match='no target "noise"; there is eps, x0, v, flow, edm'):
        Denoiser(Knows(), schedules.linear(), "noise")
    with pytest.raises(ValueError, match='no weighting "snr"; there is eps, x0, v, flow, edm, min-snr, p2'):
        Denoiser(Knows(), schedules.linear(), "v", "snr")


class Linear(torch.nn.Module):
    """An output that depends on the context."""

    def forward(self, x, c_noise, context=None):
        return x + context.mean(dim=(1, 2)).view(-1, 1)


def test_guidance_formula_and_special_scales():
    denoiser = Denoiser(Linear(), schedules.linear(), "eps")
    x, t, context, null = torch.randn(2, 3), torch.tensor([10, 900]), torch.ones(2, 1, 4), torch.zeros(2, 1, 4)
    with_text, without = denoiser(x, t, context), denoiser(x, t, null)
    assert isinstance(with_text, Prediction)
    for scale, expected in ((1, with_text.eps), (0, without.eps), (7.5, without.eps + 7.5 * (with_text.eps - without.eps))):
        assert torch.allclose(guide(denoiser, context, null, scale)(x, t).eps, expected, atol=1e-5, rtol=0)  # fp32


def test_guiding_the_output_x0_or_eps_is_the_same():
    """At a fixed x_t the 2x2 solve is affine in F."""
    denoiser = Denoiser(Linear(), schedules.linear(), "v").double()
    x, t = torch.randn(2, 3, dtype=torch.float64), torch.tensor([10, 900])
    context, null = torch.ones(2, 1, 4, dtype=torch.float64), torch.zeros(2, 1, 4, dtype=torch.float64)
    F = denoiser.output(x, t, null) + 7.5 * (denoiser.output(x, t, context) - denoiser.output(x, t, null))
    network = Knows()
    network.answer = F
    by_output, by_prediction = Denoiser(network, schedules.linear(), "v")(x, t), guide(denoiser, context, null, 7.5)(x, t)
    assert torch.allclose(by_output.x0, by_prediction.x0, atol=1e-12, rtol=0)
    assert torch.allclose(by_output.eps, by_prediction.eps, atol=1e-12, rtol=0)


def test_guidance_costs_one_evaluation_and_none_more_where_it_is_off():
    class Counts(Linear):
        calls = []  # noqa: RUF012

        def forward(self, x, c_noise, context=None):
            self.calls.append(len(x))
            return super().forward(x, c_noise, context)

    denoiser, x, t = Denoiser(Counts(), schedules.linear(), "eps"), torch.randn(2, 3), torch.tensor([10, 900])
    for scale in (1, 0, 7.5):
        guide(denoiser, torch.ones(2, 1, 4), torch.zeros(2, 1, 4), scale)(x, t)
    assert Counts.calls == [2, 2, 4]


def test_the_network_is_shown_exact_times_in_bfloat16():
    """bfloat16 has 8 binary digits: it would show t = 1000 where it means 999."""
    class Sees(torch.nn.Module):
        def forward(self, x, c_noise, context=None):
            self.seen = c_noise
            return x

    network, t = Sees(), torch.arange(1, 1001)
    Denoiser(network, schedules.linear(), "eps")(torch.zeros(1000, 1, dtype=torch.bfloat16), t)
    assert network.seen.tolist() == list(range(1000))
