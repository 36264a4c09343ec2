"""Samplers against exact denoisers of known distributions, and against published loops over whole trajectories."""
from itertools import pairwise

import pytest
import torch

from minidiff import schedules
from minidiff.denoiser import Denoiser, Prediction
from minidiff.errors import UserError
from minidiff.samplers import SAMPLERS, by_name, ddim, ddpm, dpmpp_2m, dpmpp_2m_sde, sample, unipc
from minidiff.verbs import options

SCHEDULES = [schedules.cosine(), schedules.Flow(), schedules.Karras()]
MEAN, STD = 0.7, 0.4


def name(schedule):
    return type(schedule).__name__


def exact_gaussian(schedule):
    """The posterior mean of x0 for data N(MEAN, STD^2), in closed form."""

    def denoise(x, t):
        alpha, sigma = (s.view(-1, 1) for s in schedule.alpha_sigma(t))
        x0 = MEAN + STD**2 * alpha / (alpha**2 * STD**2 + sigma**2) * (x - alpha * MEAN)
        return Prediction(x0, (x - alpha * x0) / sigma)

    return denoise


def orders(errors):
    """The exponents p of errors ~ steps^-p, where steps double from one error to the next."""
    return torch.tensor(errors, dtype=torch.float64).abs().log2().diff().neg()


@pytest.mark.parametrize("schedule", SCHEDULES, ids=name)
def test_ddim_carries_noise_to_the_data_distribution(schedule):
    """The probability-flow ODE of Gaussian data maps x_T to MEAN + STD (x_T - alpha MEAN) / std(x_T). DDIM is a first-order method for
    it: the error falls as 1/steps, which it could not do if it fell to anything but zero."""
    alpha, sigma = schedule.alpha_sigma(schedule.timesteps(1)[0])
    spread = (alpha**2 * STD**2 + sigma**2).sqrt()
    x_T = alpha * MEAN + spread * torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    expected = MEAN + STD * (x_T - alpha * MEAN) / spread
    errors = []
    for steps in (125, 250, 500, 1000):
        *_, last = sample(exact_gaussian(schedule), schedule, x_T, steps, ddim())
        errors.append((last.x0 - expected).abs().max().item())
    assert (orders(errors) - 1).abs().max() < 0.1


@pytest.mark.parametrize("schedule", SCHEDULES, ids=name)
def test_ddim_carries_quantiles_of_a_mixture(schedule):
    """In one dimension a flow cannot cross itself, so it keeps quantiles: CDF_0(x_0) = CDF_T(x_T), here for two Gaussians."""
    weights, means, std = (torch.tensor(v, dtype=torch.float64) for v in ([0.3, 0.7], [-1.0, 0.6], 0.2))

    def parts(alpha, sigma):
        return torch.distributions.Normal(alpha * means, (alpha**2 * std**2 + sigma**2).sqrt())

    def denoise(x, t):
        alpha, sigma = (s.view(-1, 1) for s in schedule.alpha_sigma(t))
        share = torch.softmax(parts(alpha, sigma).log_prob(x) + weights.log(), dim=1)
        x0 = (share * (means + std**2 * alpha / (alpha**2 * std**2 + sigma**2) * (x - alpha * means))).sum(1, keepdim=True)
        return Prediction(x0, (x - alpha * x0) / sigma)

    def cdf(x, t):
        return (weights * parts(*schedule.alpha_sigma(t)).cdf(x)).sum(1)

    start, end = schedule.timesteps(1)
    alpha, sigma = schedule.alpha_sigma(start)
    x_T = alpha * 0.12 + sigma * torch.linspace(-1.5, 1.5, 9, dtype=torch.float64)[:, None]  # 0.12: the mixture's mean
    errors = []
    for steps in (250, 500, 1000):
        *_, last = sample(denoise, schedule, x_T, steps, ddim())
        errors.append((cdf(last.x0, end) - cdf(x_T, start)).abs().max().item())
    assert (orders(errors) - 1).abs().max() < 0.1


@pytest.mark.parametrize("schedule", SCHEDULES, ids=name)
def test_ancestral_sampling_has_the_right_mean_and_variance(schedule):
    """On Gaussian data every ancestral step is x_s = A x + b + up z, so mean and variance of the whole chain follow without sampling:
    the mean is exact, and the variance falls short by a share that goes as 1/steps."""
    shortfall = []
    x = torch.tensor([[0.0], [0.0], [1.0]], dtype=torch.float64)
    for steps in (250, 500):
        times = schedule.timesteps(steps)
        alpha, sigma = schedule.alpha_sigma(times[0])
        mean, variance = alpha * MEAN, alpha**2 * STD**2 + sigma**2
        for k, (t, s) in enumerate(pairwise(times)):
            z = torch.randn(x.shape, generator=torch.Generator().manual_seed(k), dtype=x.dtype)  # what the step will draw
            x_s, _ = ddpm(torch.Generator().manual_seed(k))(exact_gaussian(schedule), schedule, x, t, s)
            up = (x_s[0] - x_s[1]) / (z[0] - z[1])
            b = x_s[0] - up * z[0]
            A = x_s[2] - up * z[2] - b
            mean, variance = A * mean + b, A**2 * variance + up**2
        assert abs(mean - MEAN) < 1e-10
        shortfall.append((variance / STD**2 - 1).item())
    assert (orders(shortfall) - 1).abs().max() < 0.1


@pytest.mark.parametrize("schedule", [schedules.Flow(), schedules.Karras()], ids=name)
def test_ddim_is_eulers_method(schedule):
    """For flow matching x_s = x + (s - t) v with v = eps - x0; in sigma x_s = x + (s - t) (x - x0) / t, EDM algorithm 1."""
    denoise, x = exact_gaussian(schedule), torch.randn(5, 1, dtype=torch.float64)
    for t, s in pairwise(schedule.timesteps(10)):
        x0, eps = denoise(x, t.expand(5))
        slope = eps - x0 if isinstance(schedule, schedules.Flow) else (x - x0) / t
        x_s, guess = ddim()(denoise, schedule, x, t, s)
        assert torch.equal(guess, x0)
        torch.testing.assert_close(x_s, x + (s - t) * slope, rtol=1e-12, atol=1e-12)  # a few roundings in float64


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_ddim_step_equals_the_paper(eta):
    """DDIM eq. 12 and 16, with the paper's alpha (= alpha_bar here)."""
    schedule, z = schedules.linear(), torch.randn(2, 3, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    x, x0, eps = (torch.randn(2, 3, dtype=torch.float64) for _ in range(3))
    for t, s in pairwise(schedule.timesteps(10)):
        a_t, a_s = schedule.alpha_bar[t], schedule.alpha_bar[s]
        sigma = eta * ((1 - a_s) / (1 - a_t)).sqrt() * (1 - a_t / a_s).sqrt()
        expected = a_s.sqrt() * x0 + (1 - a_s - sigma**2).sqrt() * eps + sigma * z
        step = ddim(eta, torch.Generator().manual_seed(7))
        torch.testing.assert_close(step(lambda *_: Prediction(x0, eps), schedule, x, t, s)[0], expected, rtol=0, atol=1e-12)


class Net(torch.nn.Module):
    """A fixed nonlinear function of x and t."""

    def forward(self, x, t, context=None):
        return torch.sin(3 * x) * 0.5 + 0.3 * x * (1 + t.to(x).view(-1, 1, 1, 1) / 1000)


def picture_noise(seed=0):
    return torch.randn(2, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("eta", [0.0, 1.0], ids=["ddim", "ddpm"])
@pytest.mark.parametrize("target, theirs", [("eps", "epsilon"), ("x0", "sample"), ("v", "v_prediction")])
@pytest.mark.parametrize("steps", [1, 2, 10, 50, 1000])  # divisors of 1000: elsewhere diffusers' stride is not the distance of its own times
def test_trajectories_equal_diffusers(target, theirs, steps, eta):
    """Every state on the way, with the same noise. Their tables are replaced by ours in float64 (fp32 tables are compared in
    test_schedules), so only the order of roundings differs."""
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, timestep_spacing="trailing", prediction_type=theirs, clip_sample=False
    )
    schedule, net = schedules.scaled_linear(), Net()
    scheduler.set_timesteps(steps)
    scheduler.alphas_cumprod = schedule.alpha_bar[1:]
    scheduler.final_alpha_cumprod = torch.tensor(1.0, dtype=torch.float64)
    x = x_T = picture_noise()
    expected, generator = [x], torch.Generator().manual_seed(1)
    for t in scheduler.timesteps:
        z = torch.randn(x.shape, generator=generator, dtype=x.dtype) if eta else None
        x = scheduler.step(net(x, t.expand(2)), t, x, eta=eta, variance_noise=z).prev_sample
        expected.append(x)
    step = ddim(eta, torch.Generator().manual_seed(1))
    ours = [frame.x for frame in sample(Denoiser(net, schedule, target), schedule, x_T, steps, step)]
    for a, b in zip(ours, expected, strict=True):
        assert (a - b).abs().max() / b.abs().max() < 1e-10


def test_flow_euler_equals_diffusers():
    diffusers = pytest.importorskip("diffusers")
    scheduler, schedule, net = diffusers.FlowMatchEulerDiscreteScheduler(), schedules.Flow(), Net()
    scheduler.set_timesteps(sigmas=schedule.timesteps(20)[:-1].tolist())
    x = x_T = picture_noise()
    for t in scheduler.timesteps:
        x = scheduler.step(net(x, t.double().expand(2)), t, x).prev_sample
    *_, last = sample(Denoiser(net, schedule, "flow"), schedule, x_T, 20, ddim())
    assert (last.x0 - x).abs().max() / x.abs().max() < 2e-6  # their times and sums are fp32


def test_the_loop_is_a_generator_that_leaves_the_caller_alone():
    schedule = schedules.cosine()
    frames = sample(exact_gaussian(schedule), schedule, torch.randn(2, 1, dtype=torch.float64), 5, ddim())
    first = next(frames)
    assert torch.is_grad_enabled() and first.t == 1000
    rest = list(frames)
    assert [frame.t for frame in rest] == [800, 600, 400, 200, 0] and torch.equal(rest[-1].x, rest[-1].x0)


def test_noise_is_drawn_on_the_cpu_whatever_the_device():
    """The meta device stands in for a GPU: a step there takes the CPU's generator, and draws from it what it draws on the CPU."""
    schedule, (t, s) = schedules.cosine(), torch.tensor([500, 400])
    after = []
    for device in ("cpu", "meta"):
        generator, x = torch.Generator().manual_seed(0), torch.zeros(2, 3, device=device)
        x_s, _ = ddpm(generator)(lambda x, t: Prediction(x, x), schedule, x, t, s)
        assert x_s.device.type == device
        after.append(generator.get_state())
    assert torch.equal(*after)


@pytest.mark.parametrize("times, complaint", [
    ([1000, 500, 0], "3 times for 5 steps"),
    ([1000, 800, 600, 600, 200, 0], "600 follows 600"),
    ([1000, 800, 600, float("nan"), 200, 0], "nan follows 600"),
    ([1001, 800, 600, 400, 200, 0], "run from 1001 to 0; they must begin at 1000 or below"),
    ([1000, 800, 600, 400, 200, 1], "end at 0"),
])
def test_bad_times(times, complaint):
    with pytest.raises(UserError, match=complaint):
        next(sample(exact_gaussian(schedules.cosine()), schedules.cosine(), torch.zeros(1, 1), 5, ddim(), times=torch.tensor(times)))


def test_times_replace_the_spacing():
    schedule, x = schedules.cosine(), torch.randn(2, 1, dtype=torch.float64)
    times = torch.tensor([900.0, 333.3, 20.5, 0.0], dtype=torch.float64)
    assert [frame.t for frame in sample(exact_gaussian(schedule), schedule, x, 3, ddim(), times=times)] == times.tolist()


@pytest.mark.parametrize("multistep", [dpmpp_2m, dpmpp_2m_sde, unipc])
def test_memory_starts_afresh(multistep):
    """One step object for several chains: after a whole one, one broken off, one of another shape, each is what a new object gives."""
    schedule, denoise = schedules.cosine(), exact_gaussian(schedules.cosine())

    def chain(step, x, stop=None):
        torch.manual_seed(3)
        return [frame.x for _, frame in zip(range(stop or 9), sample(denoise, schedule, x, 8, step), strict=False)]

    x, used = torch.randn(4, 1, dtype=torch.float64), multistep()
    for start, stop in ((x, None), (x, None), (x, 3), (x, None), (x[:2], 5), (x, None)):
        assert all(torch.equal(a, b) for a, b in zip(chain(used, start, stop), chain(multistep(), start, stop), strict=True))


def test_names():
    schedule, x, (t, s) = schedules.cosine(), torch.randn(2, 1, dtype=torch.float64), torch.tensor([500, 400])
    for name, step in (("ddim", ddim(0.0)), ("ddpm", ddim(1.0, torch.Generator().manual_seed(3)))):
        named = by_name(name, torch.Generator().manual_seed(3))
        assert torch.equal(named(exact_gaussian(schedule), schedule, x, t, s)[0], step(exact_gaussian(schedule), schedule, x, t, s)[0])
    with pytest.raises(UserError, match="ddim, ddpm, euler, euler_ancestral, heun, dpmpp_2m, dpmpp_2m_sde, unipc, lcm"):
        by_name("dimm")


def test_the_command_line_lists_every_sampler():
    assert options.Sampler.__metadata__[0].metavar == "|".join(SAMPLERS)  # written out there, since --help imports no torch
