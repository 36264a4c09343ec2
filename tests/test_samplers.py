"""Samplers against an exact denoiser, and against diffusers over whole trajectories."""
import pytest
import torch

from minidiff import schedules
from minidiff.denoiser import Denoiser, Prediction
from minidiff.errors import UserError
from minidiff.samplers import by_name, ddim, ddpm, sample

MEAN, STD = 0.7, 0.4


def exact_gaussian(schedule):
    """The posterior mean of x0 for data N(MEAN, STD^2), in closed form."""

    def denoise(x, t):
        alpha, sigma = (s.view(-1, 1) for s in schedule.alpha_sigma(t))
        x0 = MEAN + STD**2 * alpha / (alpha**2 * STD**2 + sigma**2) * (x - alpha * MEAN)
        return Prediction(x0, (x - alpha * x0) / sigma)

    return denoise


@pytest.mark.parametrize("schedule", [schedules.cosine(), schedules.Flow(), schedules.Karras()], ids=lambda s: type(s).__name__)
def test_ddim_carries_noise_to_the_data_distribution(schedule):
    """The probability-flow ODE of Gaussian data maps x_T to MEAN + STD (x_T - alpha MEAN) / std(x_T), so the error must fall as 1/steps."""
    alpha, sigma = schedule.alpha_sigma(schedule.timesteps(1)[0])
    spread = (alpha**2 * STD**2 + sigma**2).sqrt()
    x_T = alpha * MEAN + spread * torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    expected = MEAN + STD * (x_T - alpha * MEAN) / spread
    errors = []
    for steps in (125, 250, 500):
        *_, last = sample(exact_gaussian(schedule), schedule, x_T, steps, ddim())
        errors.append((last.x0 - expected).abs().max().item())
    order = torch.tensor(errors).log2().diff().neg().mean().item()
    assert errors[-1] < 0.02 and abs(order - 1) < 0.1


def test_ancestral_sampling_has_the_right_mean_and_variance():
    """Every step of ddpm on Gaussian data is Gaussian, so mean and variance over 40,000 chains must match within five standard errors."""
    schedule, n = schedules.cosine(), 40_000
    generator = torch.Generator().manual_seed(0)
    x_T = torch.randn(n, 1, generator=generator, dtype=torch.float64)
    *_, last = sample(exact_gaussian(schedule), schedule, x_T, 500, ddpm(generator))
    assert abs(last.x0.mean() - MEAN) < 5 * STD / n**0.5 + 1e-3
    assert abs(last.x0.std() / STD - 1) < 5 / (2 * n) ** 0.5 + 1e-2  # 1e-2: 500 steps are not infinitely many


class Net(torch.nn.Module):
    def forward(self, x, t, context=None):
        return torch.sin(3 * x) * 0.5 + 0.3 * x * (1 + t.to(x).view(-1, 1, 1, 1) / 1000)


@pytest.mark.parametrize("target, theirs", [("eps", "epsilon"), ("x0", "sample"), ("v", "v_prediction")])
@pytest.mark.parametrize("steps", [1, 2, 3, 10, 50, 1000])
def test_ddim_trajectories_equal_diffusers(target, theirs, steps):
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, timestep_spacing="trailing", prediction_type=theirs, clip_sample=False
    )
    schedule, net = schedules.scaled_linear(), Net()
    scheduler.set_timesteps(steps)
    scheduler.alphas_cumprod = schedule.alpha_bar[1:]  # the same table on both sides: theirs is fp32
    scheduler.final_alpha_cumprod = torch.tensor(1.0, dtype=torch.float64)
    x = x_T = torch.randn(2, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(steps))
    expected = [x]
    for t in scheduler.timesteps:
        x = scheduler.step(net(x, t.expand(2)), t, x).prev_sample
        expected.append(x)
    ours = [frame.x for frame in sample(Denoiser(net, schedule, target), schedule, x_T, steps, ddim())]
    if 1000 % steps == 0:  # elsewhere diffusers strides by 1000 // steps, and its grid is not quite "trailing"
        for a, b in zip(ours, expected, strict=True):
            assert ((a - b).abs().max() / b.abs().max()) < 2e-6
    else:
        assert ((ours[-1] - expected[-1]).abs().max() / expected[-1].abs().max()) < 0.2


def test_flow_euler_equals_diffusers():
    diffusers = pytest.importorskip("diffusers")
    scheduler, schedule, net = diffusers.FlowMatchEulerDiscreteScheduler(), schedules.Flow(), Net()
    scheduler.set_timesteps(sigmas=schedule.timesteps(20)[:-1].tolist())
    x = x_T = torch.randn(2, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for t in scheduler.timesteps:
        x = scheduler.step(net(x, t.double().expand(2)), t, x).prev_sample
    *_, last = sample(Denoiser(net, schedule, "flow"), schedule, x_T, 20, ddim())
    assert ((last.x0 - x).abs().max() / x.abs().max()) < 2e-6


def test_the_loop_is_a_generator_that_leaves_the_caller_alone():
    schedule = schedules.cosine()
    frames = sample(exact_gaussian(schedule), schedule, torch.randn(2, 1, dtype=torch.float64), 5, ddim())
    first = next(frames)
    assert torch.is_grad_enabled() and first.t == 1000
    rest = list(frames)
    assert len(rest) == 5 and rest[-1].t == 0 and torch.equal(rest[-1].x, rest[-1].x0)


def test_unknown_sampler():
    with pytest.raises(UserError, match="ddim, ddpm"):
        by_name("dimm")
