"""Schedules against their published formulas and against diffusers."""
import math

import numpy as np
import pytest
import torch

from minidiff import schedules
from minidiff.errors import UserError

SINGLE = 2e-6  # diffusers keeps its tables in fp32


@pytest.mark.parametrize("ours, theirs", [
    (schedules.linear(), {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}),
    (schedules.scaled_linear(), {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}),
    (schedules.cosine(), {"beta_schedule": "squaredcos_cap_v2"}),
    (schedules.Discrete("linear", zero_terminal_snr=True), {"beta_schedule": "linear", "rescale_betas_zero_snr": True}),
])
def test_tables_equal_diffusers(ours, theirs):
    diffusers = pytest.importorskip("diffusers")
    expected = diffusers.DDPMScheduler(**theirs).alphas_cumprod.double()
    relative = ((ours.alpha_bar[1:] - expected).abs() / expected.clamp(min=1e-30))[: -1 if ours.zero_terminal_snr else None]
    # fp32 sums of up to a thousand logarithms: the relative error grows to a few 1e-5 where alpha_bar is near 1e-5
    near = expected[: len(relative)] > 1e-2
    assert relative[near].max() < 20 * SINGLE and (ours.alpha_bar[1:] - expected).abs().max() < SINGLE


@pytest.mark.parametrize("steps", [1, 2, 7, 25, 50, 1000])
@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
def test_timesteps_equal_diffusers(steps, spacing):
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.DDIMScheduler(timestep_spacing=spacing, steps_offset=1 if 1000 // steps > 1 and spacing == "leading" else 0)
    theirs.set_timesteps(steps)
    ours = schedules.linear().timesteps(steps, spacing)
    assert ours.shape == (steps + 1,) and ours[-1] == 0
    expected = theirs.timesteps.numpy() + 1  # diffusers counts noise levels from 0, we count clean data as 0
    if spacing == "linspace" and steps == 1:
        expected = np.array([1000])  # diffusers' single step starts at t = 0, from data; ours from noise
    assert np.abs(ours[:-1].numpy() - expected).max() <= (0 if spacing == "leading" else 1)  # rounding halves


@pytest.mark.parametrize("schedule", [schedules.linear(), schedules.scaled_linear(), schedules.cosine(), schedules.sigmoid(),
                                      schedules.Flow(shift=3.0), schedules.Karras()])
def test_what_every_schedule_promises(schedule):
    times = schedule.timesteps(10)
    assert (times.diff() < 0).all() and times[-1] == 0
    alpha, sigma = schedule.alpha_sigma(times)
    assert alpha.dtype == sigma.dtype == torch.float64
    assert alpha[-1] == 1 and sigma[-1] == 0
    snr = schedule.snr(times[:-1])
    assert (snr.diff() > 0).all()
    t = schedule.sample_t(1000, torch.Generator().manual_seed(0))
    assert t.min() > 0 and 0 <= schedule.progress(t).min() and schedule.progress(t).max() <= 1
    assert schedules.from_json(schedules.to_json(schedule)) == schedule


def test_discrete_is_variance_preserving_and_clean_at_zero():
    for schedule in (schedules.linear(), schedules.cosine(), schedules.sigmoid()):
        alpha, sigma = schedule.alpha_sigma(torch.arange(1001))
        assert torch.allclose(alpha**2 + sigma**2, torch.ones(1001, dtype=torch.float64), atol=1e-12)
        assert schedule.alpha_bar[0] == 1


def test_sigmoid_formula():
    """Jabri et al. 2022, appendix B: (sigmoid(3) - sigmoid(6u - 3)) / (sigmoid(3) - sigmoid(-3))."""
    s = lambda x: 1 / (1 + math.exp(-x))  # noqa: E731
    for t in (100, 500, 900):
        expected = (s(3) - s(6 * t / 1000 - 3)) / (s(3) - s(-3))
        assert abs(schedules.sigmoid().alpha_bar[t].item() - expected) < 1e-12


def test_karras_times_equal_the_published_formula():
    """EDM eq. 5 for 18 steps: 80 down to 0.002."""
    i = torch.arange(18, dtype=torch.float64)
    expected = (80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    assert torch.allclose(schedules.Karras().timesteps(18)[:-1], expected, rtol=1e-12)


def test_flow_training_times_are_logit_normal():
    t = schedules.Flow(mean=0.3, std=0.8).sample_t(200_000, torch.Generator().manual_seed(0))
    logit = (t / (1 - t)).log()
    assert abs(logit.mean() - 0.3) < 0.01 and abs(logit.std() - 0.8) < 0.01  # five standard errors


@pytest.mark.parametrize("steps, spacing", [(0, "trailing"), (1001, "trailing"), (10, "sideways")])
def test_bad_steps(steps, spacing):
    with pytest.raises(UserError):
        schedules.linear().timesteps(steps, spacing)
