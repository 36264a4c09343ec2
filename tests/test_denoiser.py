"""The table of targets, the weightings and guidance."""

import pytest
import torch

from minidiff import schedules
from minidiff.denoiser import TARGETS, Denoiser
from minidiff.errors import UserError
from minidiff.exercises import checks
from minidiff.exercises.models import Knows, Linear, oracle
from minidiff.guidance import guide
from minidiff.losses import (
    LEVELS,
    LR_MULTIPLIER,
    SIGMA_DATA,
    WEIGHTINGS,
    balanced,
    log_error,
)
from minidiff.methods.thresholding import Thresholded

ALL_SCHEDULES = [
    schedules.linear(),
    schedules.scaled_linear(),
    schedules.cosine(),
    schedules.sigmoid(),
    schedules.Flow(),
    schedules.Karras(),
]
PAIRS = [(target, s) for target in TARGETS for s in ALL_SCHEDULES]


def name(value):
    return value if isinstance(value, str) else getattr(value, "betas", type(value).__name__)


@pytest.mark.equation("frame-solve", "vpred-v")
@pytest.mark.parametrize("target, schedule", PAIRS, ids=name)
def test_every_row_gives_back_x0_and_eps(target, schedule):
    checks.row_gives_back_x0_and_eps(target, schedule)


@pytest.mark.equation("edm-7", "edm-8")
def test_edm_row_is_the_published_preconditioning():
    """D(x) = c_skip x + c_out F, EDM table 1."""
    t, x = (
        torch.tensor([0.01, 0.5, 40.0], dtype=torch.float64),
        torch.randn(3, 4, dtype=torch.float64),
    )
    network = Knows()
    network.answer = torch.randn(3, 4, dtype=torch.float64)
    s, s_d = t.view(-1, 1), SIGMA_DATA
    c_skip, c_out = s_d**2 / (s**2 + s_d**2), s * s_d / (s**2 + s_d**2).sqrt()
    expected = c_skip * x + c_out * network.answer
    assert torch.allclose(
        Denoiser(network, schedules.Karras(), "edm")(x, t).x0, expected, atol=1e-12, rtol=0
    )


@pytest.mark.parametrize("schedule", [schedules.Karras(), schedules.cosine()], ids=name)
def test_edm_shows_the_network_unit_variance(schedule):
    """EDM table 1: c_in = 1 / sqrt(sigma^2 + 0.5^2), for x / alpha at the level sigma / alpha. So
    for data of standard deviation 0.5, what the network is shown has variance 1 at every t."""

    class Sees(torch.nn.Module):
        def forward(self, x, c_noise, context=None):
            self.input = x
            return x

    network, t = Sees(), schedule.timesteps(10)[:-1]
    alpha, sigma = (scale[:, None] for scale in schedule.alpha_sigma(t))
    x = torch.randn(10, 4, dtype=torch.float64)
    Denoiser(network, schedule, "edm")(alpha * x, t)
    expected = x / ((sigma / alpha) ** 2 + 0.5**2).sqrt()
    assert torch.allclose(network.input, expected, rtol=1e-9, atol=0)
    variance = (0.5 * alpha) ** 2 + sigma**2
    Denoiser(network, schedule, "edm")(variance.sqrt().expand(10, 4), t)
    assert torch.allclose(network.input, torch.ones(10, 4, dtype=torch.float64), rtol=1e-12)


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


@pytest.mark.equation("frame-weight")
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


def test_weightings_are_the_published_ones():
    """As functions of SNR = (alpha / sigma)^2, each from its paper's own formula at alpha = 1."""
    sigma = torch.tensor([0.01, 0.3, 1.0, 7.0, 80.0], dtype=torch.float64)
    snr = sigma**-2
    published = {
        "eps": 1 / sigma**2,  # || eps - eps_hat ||^2 = || x0 - x0_hat ||^2 / sigma^2
        "x0": torch.ones(5, dtype=torch.float64),
        "v": 1 / sigma**2 + 1,  # Salimans & Ho, section 4: SNR + 1
        "flow": (1 + 1 / sigma) ** 2,  # 1 / t^2 at the t with (1 - t) / t = 1 / sigma
        "edm": (sigma**2 + 0.5**2) / (sigma * 0.5) ** 2,  # Karras et al., table 1, lambda(sigma)
        "min-snr": (1 / sigma**2).minimum(torch.tensor(5.0)),  # Hang et al., section 3.4
        "p2": 1 / (1 + snr) * snr,  # Choi et al. eq. 8: 1 / (1 + SNR) times the weight of eps
        "learned": torch.ones(5, dtype=torch.float64),
    }
    assert published.keys() == WEIGHTINGS.keys() and SIGMA_DATA == 0.5
    for weighting, expected in published.items():
        assert torch.allclose(WEIGHTINGS[weighting](snr), expected, rtol=1e-12, atol=0), weighting


@pytest.mark.parametrize(
    "target, schedule",
    [
        ("eps", schedules.linear()),
        ("x0", schedules.linear()),
        ("v", schedules.linear()),
        ("flow", schedules.Flow()),
        ("edm", schedules.Karras()),
    ],
)
def test_default_weighting_is_plain_squared_error(target, schedule):
    x0, eps, error = (torch.randn(6, 5, dtype=torch.float64) for _ in range(3))
    t = schedule.sample_t(6, torch.Generator().manual_seed(0))
    denoiser, _ = oracle(target, schedule, x0, eps, t, error=error)
    assert torch.allclose(denoiser.loss(x0, t=t, eps=eps), error.pow(2).mean(1), rtol=1e-8, atol=0)


test_min_snr_published_forms = pytest.mark.equation("minsnr-weight")(checks.min_snr_published_forms)


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
    assert torch.allclose(LR_MULTIPLIER * denoiser.log_error.detach(), expected, atol=0.4)

    t, answer = torch.tensor([100, 900]), torch.ones(2, 50, requires_grad=True)
    denoiser.network.answer = answer
    loss = denoiser.loss(x0[:2], t=t)
    u = LR_MULTIPLIER * denoiser.log_error[[2, 18]]
    assert torch.allclose(loss, 1 / u.exp() + u)
    assert torch.allclose(
        torch.autograd.grad(loss.sum(), answer)[0], (2 / 50 / u.exp())[:, None].expand(-1, 50)
    )
    assert Denoiser(Knows(), schedule, "x0").log_error is None


def test_learned_weighting_by_its_equation():
    """error / e^u + u, with u = 20 theta of the level: 20 levels of equal width, from data (0) to
    noise (1), whose ends belong to the first and the last."""
    theta = torch.linspace(-0.1, 0.1, 20, dtype=torch.float64)
    assert log_error().shape == (20,) and not log_error().any()
    progress = torch.tensor([0.0, 0.049, 0.051, 0.5, 0.951, 1.0], dtype=torch.float64)
    u = 20 * theta[torch.tensor([0, 0, 1, 10, 19, 19])]
    error = torch.rand(6, dtype=torch.float64)
    torch.testing.assert_close(balanced(error, progress, theta), error / u.exp() + u)


def test_zero_terminal_snr_needs_a_target_that_sees_x0():
    schedule = schedules.Discrete("linear", zero_terminal_snr=True)
    assert schedule.alpha_bar[-1] == 0
    with pytest.raises(UserError, match="zero_terminal_snr"):
        Denoiser(Knows(), schedule, "eps")
    x0, eps, t = (
        torch.randn(2, 3, dtype=torch.float64),
        torch.randn(2, 3, dtype=torch.float64),
        torch.tensor([1000, 1000]),
    )
    denoiser, x = oracle("v", schedule, x0, eps, t)
    assert torch.allclose(
        denoiser(x, t).x0, x0, atol=1e-14, rtol=0
    )  # alpha = 0: x is pure noise, the network alone knows
    assert torch.equal(denoiser.loss(x0, t=t, eps=eps), torch.zeros(2, dtype=torch.float64))


def test_unknown_names():
    with pytest.raises(UserError, match='no target "noise"; there is eps, x0, v, flow, edm'):
        Denoiser(Knows(), schedules.linear(), "noise")
    with pytest.raises(
        UserError, match='no weighting "snr"; there is eps, x0, v, flow, edm, min-snr, p2'
    ):
        Denoiser(Knows(), schedules.linear(), "v", "snr")


test_guidance_formula_and_special_scales = pytest.mark.equation("cfg-6")(
    checks.guidance_formula_and_special_scales
)


def test_guiding_the_output_x0_or_eps_is_the_same():
    """At a fixed x_t the 2x2 solve is affine in F."""
    denoiser = Denoiser(Linear(), schedules.linear(), "v").double()
    x, t = torch.randn(2, 3, dtype=torch.float64), torch.tensor([10, 900])
    context, null = (
        torch.ones(2, 1, 4, dtype=torch.float64),
        torch.zeros(2, 1, 4, dtype=torch.float64),
    )
    F = denoiser.output(x, t, null) + 7.5 * (
        denoiser.output(x, t, context) - denoiser.output(x, t, null)
    )
    network = Knows()
    network.answer = F
    by_output, by_prediction = (
        Denoiser(network, schedules.linear(), "v")(x, t),
        guide(denoiser, context, null, 7.5)(x, t),
    )
    assert torch.allclose(by_output.x0, by_prediction.x0, atol=1e-12, rtol=0)
    assert torch.allclose(by_output.eps, by_prediction.eps, atol=1e-12, rtol=0)


def test_guidance_costs_one_evaluation_and_none_more_where_it_is_off():
    class Counts(Linear):
        calls = []  # noqa: RUF012

        def forward(self, x, c_noise, context=None):
            self.calls.append(len(x))
            return super().forward(x, c_noise, context)

    denoiser, x, t = (
        Denoiser(Counts(), schedules.linear(), "eps"),
        torch.randn(2, 3),
        torch.tensor([10, 900]),
    )
    for scale in (1, 0, 7.5):
        guide(denoiser, torch.ones(2, 1, 4), torch.zeros(2, 1, 4), scale)(x, t)
    assert Counts.calls == [2, 2, 4]


class Shifts(torch.nn.Module):
    """An output of its own for every context, with a standard deviation of its own, too."""

    def __init__(self, strength=1.0):
        super().__init__()
        self.strength, self.calls = strength, []

    def forward(self, x, c_noise, context=None):
        self.calls.append(len(x))
        word = 0 if context is None else context.mean(dim=(1, 2)).view(-1, 1, 1, 1)
        return torch.sin(3 * x) + self.strength * word * x.flip(-1)


def pictures(target="eps"):
    denoiser, other = (
        Denoiser(Shifts(), schedules.scaled_linear(), target),
        Denoiser(Shifts(0.3), schedules.scaled_linear(), "x0"),
    )
    x, t = torch.randn(2, 3, 4, 4, dtype=torch.float64), torch.tensor([400, 400])
    context, null = (
        torch.full((2, 1, 4), 0.8, dtype=torch.float64),
        torch.full((2, 1, 4), -0.4, dtype=torch.float64),
    )
    return denoiser, other, x, t, context, null


@pytest.mark.parametrize("target", ["eps", "v"])
@pytest.mark.parametrize("rescale", [0.0, 0.7, 1.0])
def test_rescaled_guidance_equals_diffusers(target, rescale):
    """On the network's own output, as there: on eps of an eps-model, on v of a v-model."""
    pipeline = pytest.importorskip("diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion")
    denoiser, _, x, t, context, null = pictures(target)
    with_text, without = denoiser.output(x, t, context), denoiser.output(x, t, null)
    F = pipeline.rescale_noise_cfg(without + 7.5 * (with_text - without), with_text, rescale)
    for ours, theirs in zip(
        guide(denoiser, context, null, 7.5, rescale)(x, t), denoiser.solve(x, t, F), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


def test_fully_rescaled_output_has_the_conditional_standard_deviation():
    denoiser, _, x, t, context, null = pictures("v")
    F = denoiser.unsolve(guide(denoiser, context, null, 7.5, 1.0)(x, t), t)
    torch.testing.assert_close(
        F.flatten(1).std(1), denoiser.output(x, t, context).flatten(1).std(1), rtol=1e-11, atol=0
    )


@pytest.mark.parametrize("target", TARGETS)
def test_unsolve_is_the_inverse_of_solve(target):
    denoiser, x, t = (
        Denoiser(Knows(), schedules.cosine(), target),
        torch.randn(3, 5, dtype=torch.float64),
        torch.tensor([1, 500, 999]),
    )
    F = torch.randn(3, 5, dtype=torch.float64)
    torch.testing.assert_close(
        denoiser.unsolve(denoiser.solve(x, t, F), t), F, rtol=1e-9, atol=1e-9
    )  # eps at alpha = 0.002 costs digits


def test_guidance_in_an_interval():
    """Inside as everywhere, outside the conditional prediction, at half the cost; each example by its own t."""
    denoiser, _, x, _, context, null = pictures()
    limited, always = (
        guide(denoiser, context, null, 7.5, interval=(0.2, 0.6)),
        guide(denoiser, context, null, 7.5),
    )
    for t, where in (((200, 600), "inside"), ((199, 601), "outside"), ((300, 900), "both")):
        t = torch.tensor(t)
        denoiser.network.calls.clear()
        found = limited(x, t)
        assert denoiser.network.calls == ([2] if where == "outside" else [4])
        inside, outside = always(x, t).x0, denoiser(x, t, context).x0
        expected = {
            "inside": inside,
            "outside": outside,
            "both": torch.stack([inside[0], outside[1]]),
        }[where]
        torch.testing.assert_close(found.x0, expected, rtol=1e-12, atol=1e-12)


def test_guidance_by_its_equation_in_a_batch_of_three():
    """null + scale (context - null), at scales on both sides of 1; rescale 0 is off, as it must be
    for one number, which has no standard deviation."""
    denoiser = Denoiser(Linear(), schedules.linear(), "eps")
    x, t = torch.randn(3, 1, dtype=torch.float64), torch.tensor([10, 500, 900])
    context = torch.rand(3, 1, 4, dtype=torch.float64)
    with_text, without = denoiser(x, t, context), denoiser(x, t, 0 * context)
    for scale in (0.5, 2.0, 7.5):
        found = guide(denoiser, context, 0 * context, scale)(x, t)
        for a, b, ours in zip(without, with_text, found, strict=True):
            torch.testing.assert_close(ours, a + scale * (b - a), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("interval", [(0.0, 1.0), (0.0, 0.0), (1.0, 1.0), (0.4, 0.4)])
def test_an_interval_may_be_all_or_a_point(interval):
    """0 <= low <= high <= 1, and both ends belong to it."""
    denoiser, _, x, _, context, null = pictures()
    limited, always = (guide(denoiser, context, null, 3.0, interval=i) for i in (interval, None))
    t = torch.tensor([round(1000 * max(edge, 0.001)) for edge in interval])
    if interval[1] > 0:
        torch.testing.assert_close(limited(x, t).x0[1], always(x, t).x0[1])
    else:  # no noise level is clean data
        torch.testing.assert_close(limited(x, t).x0, denoiser(x, t, context).x0)


def test_dynamic_thresholding_equals_diffusers():
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDIMScheduler(
        thresholding=True, dynamic_thresholding_ratio=0.9, sample_max_value=1e9
    )
    denoiser, _, x, t, context, null = pictures()
    plain, found = (
        guide(denoiser, context, null, 7.5)(x, t),
        Thresholded(guide(denoiser, context, null, 7.5), denoiser.schedule, 0.9)(x, t),
    )
    assert plain.x0.abs().max() > 1 >= found.x0.abs().max()
    torch.testing.assert_close(
        found.x0, scheduler._threshold_sample(plain.x0), rtol=1e-12, atol=1e-12
    )
    alpha, sigma = (scale.view(-1, 1, 1, 1) for scale in denoiser.schedule.alpha_sigma(t))
    torch.testing.assert_close(
        alpha * found.x0 + sigma * found.eps, x, rtol=1e-12, atol=1e-12
    )  # eps says the same as x0
    small = Denoiser(Shifts(), denoiser.schedule, "x0")
    torch.testing.assert_close(
        Thresholded(small, denoiser.schedule, 1.0)(0.1 * x, t).x0, small(0.1 * x, t).x0
    )  # within [-1, 1]: untouched


def test_a_negative_prompt_is_another_null_for_each_example():
    denoiser, _, x, t, context, null = pictures()
    null = torch.cat([null[:1], 3 * null[1:]])
    found = guide(denoiser, context, null, 4.0)(x, t)
    for k in range(2):
        alone = guide(denoiser, context[k : k + 1], null[k : k + 1], 4.0)(
            x[k : k + 1], t[k : k + 1]
        )
        torch.testing.assert_close(found.x0[k], alone.x0[0], rtol=1e-12, atol=1e-12)


def test_autoguidance_steers_away_from_a_weak_denoiser():
    """Both see the context, or none; the weak one may predict another target."""
    denoiser, weak, x, t, context, _ = pictures()
    for shown in (context, None):
        good, bad = denoiser(x, t, shown), weak(x, t, shown)
        found = guide(denoiser, shown, None, 2.5, weak=weak)(x, t)
        torch.testing.assert_close(
            found.x0, bad.x0 + 2.5 * (good.x0 - bad.x0), rtol=1e-12, atol=1e-12
        )
        torch.testing.assert_close(
            found.eps, bad.eps + 2.5 * (good.eps - bad.eps), rtol=1e-12, atol=1e-12
        )


@pytest.mark.parametrize(
    "how, complaint",
    [
        ({"rescale": 1.5}, "rescale is 1.5; it must be from 0"),
        ({"interval": (0.6, 0.2)}, "smaller one first"),
        ({"interval": (0.0, 600)}, "from 0 .data. to 1"),
        ({"interval": (0.0, 1.5)}, "from 0 .data. to 1"),
        ({"interval": (-0.1, 0.5)}, "from 0 .data. to 1"),
    ],
)
def test_bad_guidance(how, complaint):
    denoiser, _, _, _, context, null = pictures()
    with pytest.raises(UserError, match=complaint):
        guide(denoiser, context, null, 7.5, **how)


@pytest.mark.parametrize(
    "share, complaint",
    [(0.0, "0.0; it must be above 0"), (1.5, "it must be above 0"), (99.5, "as in 0.995")],
)
def test_bad_thresholds(share, complaint):
    with pytest.raises(UserError, match=complaint):
        Thresholded(lambda x, t: None, schedules.linear(), share)


@pytest.mark.parametrize("scale", [7.5, 2.0, 0.0])
def test_guidance_needs_something_to_steer_away_from(scale):
    denoiser, _, _, _, context, _ = pictures()
    with pytest.raises(UserError, match="needs null or weak, to steer away from"):
        guide(denoiser, context, None, scale)


def test_the_network_is_shown_exact_times_in_bfloat16():
    """bfloat16 has 8 binary digits: it would show t = 1000 where it means 999."""

    class Sees(torch.nn.Module):
        def forward(self, x, c_noise, context=None):
            self.seen = c_noise
            return x

    network, t = Sees(), torch.arange(1, 1001)
    Denoiser(network, schedules.linear(), "eps")(torch.zeros(1000, 1, dtype=torch.bfloat16), t)
    assert network.seen.tolist() == list(range(1000))
