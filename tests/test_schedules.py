"""Schedules against their published formulas and against diffusers."""

import math

import pytest
import torch

from minidiff import schedules
from minidiff.checkpoints.folder import schedule_from_json, schedule_to_json
from minidiff.errors import UserError
from minidiff.exercises import checks
from minidiff.exercises.checks import curve

ALL = [
    schedules.linear(),
    schedules.scaled_linear(),
    schedules.cosine(),
    schedules.sigmoid(),
    schedules.Flow(shift=3.0),
    schedules.Karras(),
]


def name(schedule):
    return getattr(schedule, "betas", type(schedule).__name__)


@pytest.mark.parametrize(
    "ours, theirs",
    [
        (schedules.linear(), {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}),
        (
            schedules.scaled_linear(),
            {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
        ),
        (schedules.cosine(), {"beta_schedule": "squaredcos_cap_v2"}),
    ],
    ids=lambda v: name(v) if isinstance(v, schedules.Discrete) else "",
)
def test_betas_equal_diffusers(ours, theirs):
    diffusers = pytest.importorskip("diffusers")
    beta = 1 - ours.alpha_bar[1:] / ours.alpha_bar[:-1]
    torch.testing.assert_close(
        beta, diffusers.DDPMScheduler(**theirs).betas.double(), rtol=2e-6, atol=0
    )  # their betas are fp32


@pytest.mark.equation("lin-rescale")
def test_zero_terminal_snr_equals_diffusers():
    """Lin et al. algorithm 1, in float64 on both sides; the signal vanishes at T and nothing changes at t = 1."""
    ddim = pytest.importorskip("diffusers.schedulers.scheduling_ddim")
    ours, plain = (
        schedules.Discrete("scaled_linear", 1000, 0.00085, 0.012, zero_terminal_snr=True),
        schedules.scaled_linear(),
    )
    beta = 1 - plain.alpha_bar[1:] / plain.alpha_bar[:-1]
    theirs = torch.cumprod(1 - ddim.rescale_zero_terminal_snr(beta), 0)
    torch.testing.assert_close(ours.alpha_bar[1:], theirs, rtol=0, atol=1e-12)
    assert ours.alpha_bar[-1] == 0
    torch.testing.assert_close(ours.alpha_bar[1], plain.alpha_bar[1], rtol=1e-14, atol=0)


@pytest.mark.parametrize("steps", [1, 2, 7, 20, 25, 30, 50, 100, 250, 1000])
@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
def test_timesteps_equal_diffusers(steps, spacing):
    """Exactly. diffusers counts noise levels from 0, we count clean data as 0."""
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.DDIMScheduler(
        timestep_spacing=spacing,
        steps_offset=1 if 1000 // steps > 1 and spacing == "leading" else 0,
    )
    theirs.set_timesteps(steps)
    expected = [t + 1 for t in theirs.timesteps.tolist()]
    if (steps, spacing) == (1, "linspace"):
        expected = [1000]  # diffusers' only step starts at t = 0, from data; ours from noise
    assert schedules.linear().timesteps(steps, spacing).tolist() == [*expected, 0]


test_timesteps_are_the_nearest_integers_for_every_number_of_steps = (
    checks.timesteps_are_the_nearest_integers_for_every_number_of_steps
)


GRIDS = [(s, spacing) for s in ALL for spacing in ("karras", "log-snr")]
GRIDS += [
    (s, spacing) for s in ALL if isinstance(s, schedules.Discrete) for spacing in ("ays", "shifted")
]
ZERO_SNR = schedules.Discrete("scaled_linear", 1000, 0.00085, 0.012, zero_terminal_snr=True)


@pytest.mark.parametrize(
    "schedule, spacing", [*GRIDS, (ZERO_SNR, "karras"), (ZERO_SNR, "log-snr")], ids=str
)
@pytest.mark.parametrize("steps", [1, 2, 3, 10, 50])
def test_grids_keep_the_promise(schedule, spacing, steps):
    times = schedule.timesteps(steps, spacing)
    assert times.shape == (steps + 1,) and (times.diff() < 0).all() and times[-1] == 0
    assert times[0] <= schedule.timesteps(1)[0] and schedule.snr(times[:1]) < 0.01


@pytest.mark.parametrize("schedule", [s for s, spacing in GRIDS if spacing == "karras"], ids=name)
def test_equal_strides(schedule):
    """In (sigma / alpha)^(1/7), a flow's in t^(1/7); and in log SNR. Ends: EDM's sigma_max or the noisiest level, and the cleanest."""
    for spacing, axis in (
        (
            "karras",
            lambda t, noise: (t if isinstance(schedule, schedules.Flow) else noise) ** (1 / 7),
        ),
        ("log-snr", lambda t, noise: noise.log()),
    ):
        times = schedule.timesteps(20, spacing)[:-1]
        alpha, sigma = schedule.alpha_sigma(times)
        strides = axis(times, sigma / alpha).diff()
        assert (
            (strides / strides.mean() - 1).abs() < 1e-9
        ).all()  # roundings: what is left of log SNR where alpha is nearly 1
    if isinstance(schedule, schedules.Discrete):
        noise = schedule.snr(times).rsqrt()
        assert abs(times[-1] - 1) < 1e-9 and noise[0] == pytest.approx(
            min(80, schedule.snr(torch.tensor(schedule.T)).rsqrt().item()), rel=1e-9
        )


def test_shifted():
    """Half way in even strides is at 2 t / (1 + t) = 2/3 of the way."""
    assert schedules.cosine().timesteps(4, "shifted").tolist() == pytest.approx(
        [1000, 6000 / 7, 2000 / 3, 400, 0]
    )


@pytest.mark.parametrize("schedule", [*ALL, ZERO_SNR], ids=name)
def test_times_between_levels(schedule):
    """Finite and monotone all the way, also next to clean data and to pure noise; at_log_snr is the inverse."""
    most = schedule.timesteps(1)[0].item()
    times = torch.linspace(most, 0, 12_345, dtype=torch.float64)
    alpha, sigma = schedule.alpha_sigma(times)
    assert (alpha.diff() >= 0).all() and (sigma.diff() < 0).all()
    inner = times[
        (alpha > 1e-3) & (sigma > 1e-3)
    ]  # elsewhere snr(t) itself has too few digits left
    torch.testing.assert_close(
        schedule.at_log_snr(schedule.snr(inner).log()), inner, rtol=1e-7, atol=1e-9
    )


@pytest.mark.parametrize("schedule", ALL, ids=name)
def test_mix_is_the_one_equation(schedule):
    """x_t = alpha_t x0 + sigma_t eps, in this sign: at a time for each example, and at one for
    all."""
    x0, eps = torch.randn(3, 2, 4, dtype=torch.float64), torch.randn(3, 2, 4, dtype=torch.float64)
    times = schedule.timesteps(4)[:3]
    alpha, sigma = (scale.view(3, 1, 1) for scale in schedule.alpha_sigma(times))
    expected = alpha * x0 + sigma * eps
    torch.testing.assert_close(schedule.mix(x0, eps, times), expected, rtol=0, atol=1e-12)
    for k, t in enumerate(times):
        torch.testing.assert_close(schedule.mix(x0, eps, t)[k], expected[k], rtol=0, atol=1e-12)


def test_limits_of_discrete():
    """From one level to 100,000, betas in (0, 1], a beta for each level."""
    for T in (1, 100_000):
        assert len(schedules.Discrete("linear", T=T).alpha_bar) == T + 1
    for T in (0, 100_001):
        with pytest.raises(UserError, match=f"T is {T}; it must be from 1 to 100,000"):
            schedules.Discrete("linear", T=T)
    torch.testing.assert_close(
        schedules.Discrete((0.5, 1.0), T=2).alpha_bar, torch.tensor([1, 0.5, 0]).double()
    )
    for betas in ((0.0, 0.5), (0.5, 1.001), (0.5,), (0.5, 0.5, 0.5)):
        with pytest.raises(UserError, match="T = 2 numbers above 0 and at most 1"):
            schedules.Discrete(betas, T=2)


def test_defaults_are_the_published_ones():
    """DDPM's betas; the logit-normal(0, 1) of Esser et al., unshifted; EDM table 1. Clean data is
    the last time of all but the models that say otherwise."""
    assert schedules.Discrete("linear") == schedules.linear()
    assert schedules.linear() == schedules.Discrete("linear", 1000, 1e-4, 0.02, mean=None, std=1.0)
    assert schedules.Flow() == schedules.Flow(mean=0.0, std=1.0, shift=1.0)
    assert schedules.Karras() == schedules.Karras(0.002, 80.0, 7.0, -1.2, 1.2)
    assert [schedule.final for schedule in ALL] == [0] * len(ALL)


def test_training_times_by_their_equations():
    """t = sigmoid(mean + std n), of a flow; sigma = exp(P_mean + P_std n); and of a discrete
    schedule ceil(T sigmoid(mean + std n)), from 1 to T at any mean."""
    n = torch.randn(50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def times(schedule):
        return schedule.sample_t(50, torch.Generator().manual_seed(0))

    expected = torch.sigmoid(0.3 + 0.8 * n)
    torch.testing.assert_close(times(schedules.Flow(mean=0.3, std=0.8)), expected)
    torch.testing.assert_close(times(schedules.Karras()), torch.exp(-1.2 + 1.2 * n))
    discrete = times(schedules.Discrete("cosine", mean=0.3, std=0.8))
    assert torch.equal(discrete, (1000 * expected).ceil().long())
    for mean, level in ((-9.0, 1), (9.0, 1000), (-800.0, 1)):
        found = times(schedules.Discrete("cosine", mean=mean, std=0.1))
        assert (found == level).all(), mean


def test_ends_of_a_flows_grids():
    """karras from pure noise, t = 1; log-snr from 1 - 1/1000; both to 1/1000, then clean data."""
    for spacing, first in (("karras", 1), ("log-snr", 0.999)):
        times = schedules.Flow().timesteps(9, spacing)[[0, -2, -1]]
        expected = torch.tensor([first, 0.001, 0], dtype=torch.float64)
        torch.testing.assert_close(times, expected, rtol=1e-12, atol=0)


def test_clean_data_count_as_little_noise_between_levels():
    """log SNR is infinite at t = 0. There alpha_bar counts as 1 - 1e-12, so that half way from
    data to level 1 log SNR is the mean of the two."""
    schedule = schedules.cosine()
    clean, first = math.log(1e12 - 1), schedule.snr(torch.tensor(1)).log()
    half = schedule.snr(torch.tensor(0.5, dtype=torch.float64)).log()
    torch.testing.assert_close(half, (clean + first) / 2, rtol=1e-5, atol=0)  # 1 - alpha_bar


def test_progress_of_karras_is_in_log_sigma():
    """From 0 at sigma_min to 1 at sigma_max; training times may lie outside, and count as the
    end."""
    schedule = schedules.Karras()
    t = torch.tensor([0.0, 0.001, 0.002, 0.4, 80.0, 200.0], dtype=torch.float64)
    expected = torch.tensor([0, 0, 0, 0.5, 1, 1], dtype=torch.float64)  # 0.4^2 = 0.002 * 80
    torch.testing.assert_close(schedule.progress(t), expected, rtol=1e-12, atol=1e-12)


def test_the_scale_of_heuns_method():
    """EDM table 1: s(t) = alpha for a variance-preserving schedule, at least sigma / 80; 1 for the
    others."""
    t = torch.tensor([1, 500, 999, 1000])
    alpha, sigma = ZERO_SNR.alpha_sigma(t)
    torch.testing.assert_close(ZERO_SNR.unit(t), alpha.maximum(sigma / 80), rtol=1e-14, atol=0)
    assert ZERO_SNR.unit(t)[-1] == 1 / 80 and ZERO_SNR.unit(t)[0] == alpha[0]
    for schedule in (schedules.Flow(), schedules.Karras()):
        assert schedule.unit(torch.tensor([0.1, 0.9])).tolist() == [1, 1]


def test_whole_times_are_the_table_itself():
    schedule, t = schedules.linear(), torch.arange(1001)
    for ours, theirs in zip(schedule.alpha_sigma(t), schedule.alpha_sigma(t.double()), strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(schedule.alpha_sigma(t)[0], schedule.alpha_bar.sqrt())


@pytest.mark.parametrize(
    "steps", [2, 10, 25]
)  # of 1, diffusers' only step starts at the cleanest level
def test_karras_grid_equals_diffusers(steps):
    """Its Euler's times are real numbers, too: log sigma read between levels. Their tables are fp32, their times fp32 numbers up to 1000."""
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.EulerDiscreteScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, use_karras_sigmas=True
    )
    theirs.set_timesteps(steps)
    schedule = schedules.scaled_linear()
    times = schedule.timesteps(steps, "karras")
    torch.testing.assert_close(
        schedule.snr(times[:-1]).rsqrt(), theirs.sigmas[:-1].double(), rtol=2e-5, atol=0
    )  # fp32: 1 - alpha_bar_1 = 0.00085
    torch.testing.assert_close(times[:-1], theirs.timesteps.double() + 1, rtol=0, atol=2e-2)


def test_align_your_steps_is_the_published_table():
    """Exactly at 10 steps; at others log sigma is interpolated along the list, whose last entry is then clean data."""
    utils = pytest.importorskip("diffusers.schedulers.scheduling_utils")
    published = utils.AysSchedules["StableDiffusionTimesteps"]
    schedule = schedules.scaled_linear()
    assert schedule.timesteps(10, "ays").tolist() == [*(t + 1 for t in published), 0]
    assert schedule.timesteps(20, "ays")[::2].tolist() == [*(t + 1 for t in published), 0]
    noise = schedule.snr(schedule.timesteps(20, "ays")[:-1]).rsqrt()
    torch.testing.assert_close(
        noise[1:-1:2], (noise[:-2:2] * noise[2::2]).sqrt(), rtol=1e-9, atol=0
    )  # geometric means
    cleanest = schedule.snr(torch.tensor([25, 1])).rsqrt().prod().sqrt()
    torch.testing.assert_close(noise[-1], cleanest, rtol=1e-9, atol=0)  # the list ends at level 1
    torch.testing.assert_close(
        schedules.cosine().snr(schedules.cosine().timesteps(20, "ays")[:-1]).rsqrt(),
        noise,
        rtol=1e-9,
        atol=0,
    )


@pytest.mark.parametrize("schedule", ALL, ids=name)
def test_what_every_schedule_promises(schedule):
    times = schedule.timesteps(10)
    assert times.shape == (11,) and (times.diff() < 0).all() and times[-1] == 0
    alpha, sigma = schedule.alpha_sigma(times)
    assert alpha.dtype == sigma.dtype == torch.float64
    assert alpha[-1] == 1 and sigma[-1] == 0 and torch.isinf(schedule.snr(times[-1:]))
    assert (schedule.snr(times[:-1]).diff() > 0).all()
    progress = schedule.progress(times)
    assert (progress[:-1].diff() < 0).all() and abs(progress[0] - 1) < 1e-12 and progress[-1] == 0
    t = schedule.sample_t(1000, torch.Generator().manual_seed(0))
    assert t.min() > 0 and 0 <= schedule.progress(t).min() and schedule.progress(t).max() <= 1
    assert torch.equal(t, schedule.sample_t(1000, torch.Generator().manual_seed(0)))
    assert schedule_from_json(schedule_to_json(schedule)) == schedule


@pytest.mark.parametrize(
    "schedule", [s for s in ALL if isinstance(s, schedules.Discrete)], ids=name
)
def test_discrete_is_variance_preserving_and_clean_at_zero(schedule):
    alpha, sigma = schedule.alpha_sigma(torch.arange(1001))
    torch.testing.assert_close(
        alpha**2 + sigma**2, torch.ones(1001, dtype=torch.float64), rtol=0, atol=1e-15
    )
    assert schedule.alpha_bar[0] == 1


test_cosine_formula = pytest.mark.equation("iddpm-17")(checks.cosine_formula)


def test_sigmoid_formula():
    """Jabri et al. 2022, appendix B: (sigmoid(3) - sigmoid(6u - 3)) / (sigmoid(3) - sigmoid(-3))."""

    def s(x):
        return 1 / (1 + math.exp(-x))

    expected = curve(lambda u: (s(3) - s(6 * u - 3)) / (s(3) - s(-3)))
    torch.testing.assert_close(
        schedules.sigmoid().alpha_bar[:-1], expected[:-1], rtol=0, atol=1e-12
    )


def test_karras_times_equal_the_published_formula():
    """EDM eq. 5 for 18 steps: 80 down to 0.002."""
    i = torch.arange(18, dtype=torch.float64)
    expected = (80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    torch.testing.assert_close(schedules.Karras().timesteps(18)[:-1], expected, rtol=1e-12, atol=0)


@pytest.mark.equation("sd3-23")
def test_flow_shift_equals_the_published_formula():
    """Esser et al. eq. 23, with sqrt(m/n) = shift: 1 stays 1, 0 stays 0, SNR falls by shift^2 at every time."""
    t, shifted = schedules.Flow().timesteps(10), schedules.Flow(shift=3.0).timesteps(10)
    torch.testing.assert_close(shifted, 3 * t / (1 + 2 * t), rtol=1e-14, atol=0)
    plain = schedules.Flow()
    torch.testing.assert_close(plain.snr(shifted[1:-1]), plain.snr(t[1:-1]) / 9, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    "schedule, normal, mean, std",
    [
        (schedules.Flow(mean=0.3, std=0.8), torch.logit, 0.3, 0.8),
        (schedules.Karras(P_mean=-0.4, P_std=1.0), torch.log, -0.4, 1.0),
    ],
    ids=["logit-normal", "log-normal"],
)
def test_training_times_are_normal_on_the_right_scale(schedule, normal, mean, std):
    n = 100_000
    z = (normal(schedule.sample_t(n, torch.Generator().manual_seed(0))) - mean) / std
    standard_errors = {
        1: 1 / n,
        2: 2 / n,
        3: 15 / n,
        4: 96 / n,
    }  # variances of the first four sample moments of N(0, 1)
    for moment, variance in standard_errors.items():
        assert abs((z**moment).mean() - (0, 1, 0, 3)[moment - 1]) < 5 * variance**0.5


def test_discrete_training_times_are_uniform():
    n, T = 100_000, 20
    counts = (
        schedules.Discrete("linear", T=T)
        .sample_t(n, torch.Generator().manual_seed(0))
        .bincount(minlength=T + 1)
    )
    assert counts[0] == 0 and len(counts) == T + 1
    chi2 = ((counts[1:] - n / T) ** 2 / (n / T)).sum()
    assert (
        chi2 < (T - 1) + 5 * (2 * (T - 1)) ** 0.5
    )  # mean and five standard deviations of chi-squared


def test_discrete_training_times_can_be_logit_normal():
    """The median of t is T sigmoid(mean), and the share below any t that of the normal distribution; every level can come."""
    schedule = schedules.Discrete("cosine", mean=1.3, std=1.4)
    t = schedule.sample_t(100_000, torch.Generator().manual_seed(0))
    assert t.dtype == torch.int64 and 1 <= t.min() and t.max() <= 1000
    for level in (100, 500, 786, 950):
        share = torch.special.ndtr(
            torch.tensor((math.log(level / (1000 - level)) - 1.3) / 1.4)
        ).item()
        assert (
            abs((t <= level).double().mean().item() - share)
            < 5 * (share * (1 - share) / 100_000) ** 0.5
        )
    assert schedule_from_json(schedule_to_json(schedule)) == schedule


@pytest.mark.parametrize(
    "schedule, t, shown",
    [
        (schedules.linear(), 1000, 999),
        (schedules.Flow(), 0.25, 250),
        (schedules.Karras(), 2.0, math.log(2) / 4),
    ],
    ids=["discrete", "flow", "karras"],
)
def test_c_noise(schedule, t, shown):
    assert abs(schedule.c_noise(torch.tensor(t, dtype=torch.float64)).item() - shown) < 1e-15


@pytest.mark.parametrize("steps, spacing", [(0, "trailing"), (1001, "trailing"), (10, "sideways")])
def test_bad_steps(steps, spacing):
    with pytest.raises(
        UserError,
        match=r"steps is 0|at most 1000|trailing, leading, linspace, karras, log-snr, ays, shifted",
    ):
        schedules.linear().timesteps(steps, spacing)


def test_unknown_betas():
    with pytest.raises(UserError, match="linear, scaled_linear, cosine, sigmoid"):
        schedules.Discrete("quadratic")


def test_an_older_model_folder_has_no_final():
    numbers = schedule_to_json(schedules.scaled_linear())
    assert numbers.pop("final") == 0
    assert schedule_from_json(numbers) == schedules.scaled_linear()
