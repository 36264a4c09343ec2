"""Samplers against exact denoisers of known distributions, and against published algorithms written out; parity/ compares trajectories."""

import math
from itertools import pairwise

import numpy
import pytest
import torch

from minidiff import schedules
from minidiff.denoiser import Prediction
from minidiff.errors import UserError
from minidiff.exercises import checks
from minidiff.methods.ddim_inversion import invert
from minidiff.methods.exact import Mixture
from minidiff.samplers import (
    SAMPLERS,
    Normal,
    by_name,
    ddim,
    ddpm,
    dpmpp_2m,
    dpmpp_2m_sde,
    euler_ancestral,
    heun,
    lcm,
    pndm,
    sample,
    times_of,
    unipc,
)
from minidiff.steps import ADAMS_BASHFORTH, consistent

from .noise import seeded

SCHEDULES = [schedules.cosine(), schedules.Flow(), schedules.Karras()]
MEAN, STD = 0.7, 0.4


def name(schedule):
    return type(schedule).__name__


def exact_gaussian(schedule):
    """The posterior mean of x0 for data N(MEAN, STD^2), in closed form."""
    return Mixture(torch.full((1, 1), MEAN, dtype=torch.float64), STD).denoiser(schedule)


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


ORDERS = {
    "euler": 1,
    "heun": 2,
    "pndm": 2,  # Liu et al. 2022, section 3.4: though its weights are of order 4
    "dpmpp_2m": 2,
    "unipc": 3,
}  # UniPC-p is of order p + 1: its corrector adds one (Zhao et al. 2023)


def even(schedule, steps, noisiest=80.0, cleanest=1e-5):
    """Equal strides in log SNR, then clean data; down to where the last step's error is nothing."""
    ends = [-2 * math.log(noisiest), -2 * math.log(cleanest)]
    visited = schedule.at_log_snr(torch.linspace(*ends, steps, dtype=torch.float64))
    return torch.cat([visited, torch.zeros(1, dtype=torch.float64)])


@pytest.mark.parametrize("sampler, order", [*ORDERS.items(), ("ddim", 1)])
@pytest.mark.parametrize("schedule", SCHEDULES, ids=name)
def test_order_of_accuracy(schedule, sampler, order):
    """In one dimension a flow cannot cross itself, so it keeps quantiles: CDF_0(x_0) = CDF_T(x_T), here for two Gaussians. That is the exact
    answer, and the error falls as steps^-order."""
    mixture = Mixture(
        torch.tensor([[-1.0], [0.6]], dtype=torch.float64), 0.3, torch.tensor([0.3, 0.7])
    )

    def cdf(x, t):
        alpha, sigma = schedule.alpha_sigma(t)
        spread = ((alpha * mixture.std) ** 2 + sigma**2).sqrt()
        return (
            mixture.weights
            * torch.distributions.Normal(alpha * mixture.means, spread).cdf(x[..., None])[..., 0]
        ).sum(1)

    counts, errors = torch.tensor([50, 100, 200, 400]), []
    for steps in counts.tolist():
        times = even(schedule, steps)
        alpha, sigma = schedule.alpha_sigma(times[0])
        x_T = (
            alpha * 0.12 + sigma * torch.linspace(-1.5, 1.5, 9, dtype=torch.float64)[:, None]
        )  # 0.12: the mixture's mean
        *_, last = sample(mixture.denoiser(schedule), schedule, x_T, times, by_name(sampler))
        errors.append((cdf(last.x0, times[-1]) - cdf(x_T, times[0])).abs().max())
    logs, errors = counts.double().log(), torch.stack(errors).log()
    fitted = -((logs - logs.mean()) * errors).sum() / (logs - logs.mean()).pow(2).sum()
    assert abs(fitted / order - 1) < 0.1, fitted


class Impulses:
    """In place of random numbers: the k-th draw is 1 in row k + 2 of the batch, and 0 elsewhere."""

    def __init__(self):
        self.draws = 0

    def __call__(self, x):
        self.draws += 1
        return torch.nn.functional.one_hot(torch.tensor(self.draws + 1), len(x)).to(x)[:, None]


def moments(step, schedule, times, denoise):
    """Mean and variance of what a sampler draws where every step is affine in x and in its noise, as on Gaussian data: row 0 has no
    noise at all, row 1 a unit of it in x_T, each other row a unit of one draw. Exact; nothing is sampled."""
    steps = len(times) - 1
    alpha, sigma = schedule.alpha_sigma(times[0])
    x_T = (alpha * MEAN).expand(steps + 2, 1).clone()
    x_T[1] += (alpha**2 * STD**2 + sigma**2).sqrt()
    *_, last = sample(denoise, schedule, x_T, times, step, noise=Impulses())
    return last.x[0].item(), (last.x[1:] - last.x[0]).pow(2).sum().item()


@pytest.mark.parametrize(
    "make, order",
    [
        (lambda steps: ddpm(), 1),
        (lambda steps: euler_ancestral(), 1),
        (lambda steps: dpmpp_2m_sde(), 2),
        (lambda steps: heun(churn=20 / steps), 2),
    ],
    ids=["ddpm", "euler_ancestral", "dpmpp_2m_sde", "heun, S_churn 20"],
)
@pytest.mark.parametrize("schedule", SCHEDULES, ids=name)
def test_stochastic_samplers_have_the_right_mean_and_variance(schedule, make, order):
    """The mean is exact, and the variance is off by a share that falls as steps^-order."""
    off = []
    for steps in (100, 200):
        mean, variance = moments(
            make(steps), schedule, even(schedule, steps), exact_gaussian(schedule)
        )
        assert abs(mean - MEAN) < 1e-10
        off.append(variance / STD**2 - 1)
    assert (orders(off) / order - 1).abs().max() < 0.1, off


@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize("schedule", SCHEDULES[:2], ids=name)
def test_lcm_is_exact_for_an_exact_consistency_function(schedule, steps):
    """One that jumps from anywhere on the probability-flow ODE of Gaussian data to its end, where x is MEAN + STD z."""

    def jump(x, t):
        alpha, sigma = (scale.view(-1, 1) for scale in schedule.alpha_sigma(t))
        x0 = MEAN + STD * (x - alpha * MEAN) / (alpha**2 * STD**2 + sigma**2).sqrt()
        return Prediction(x0, (x - alpha * x0) / sigma)

    mean, variance = moments(lcm(), schedule, schedule.timesteps(steps), jump)
    assert (
        abs(mean - MEAN) < 1e-6 and abs(variance / STD**2 - 1) < 1e-6
    )  # c_skip is at most 4e-8 from t = 0.25 on


@pytest.mark.equation("ddim-13")
@pytest.mark.parametrize("schedule", [schedules.Flow(), schedules.Karras()], ids=name)
def test_ddim_is_eulers_method(schedule):
    """For flow matching x_s = x + (s - t) v with v = eps - x0; in sigma x_s = x + (s - t) (x - x0) / t, EDM algorithm 1."""
    denoise, x = exact_gaussian(schedule), torch.randn(5, 1, dtype=torch.float64)
    for t, s in pairwise(schedule.timesteps(10)):
        x0, eps = denoise(x, t.expand(5))
        slope = eps - x0 if isinstance(schedule, schedules.Flow) else (x - x0) / t
        x_s, guess, _ = ddim()(denoise, schedule, x, t, s, seeded(0))
        assert torch.equal(guess, x0)
        torch.testing.assert_close(
            x_s, x + (s - t) * slope, rtol=1e-12, atol=1e-12
        )  # a few roundings in float64


def test_heun_is_heuns_method_in_time_for_a_flow():
    """x_s = x + (s - t) (v_t + v_s) / 2 with v = eps - x0, where v_s is looked up at the end of Euler's step; from pure noise on."""
    schedule, x = schedules.Flow(), torch.randn(5, 1, dtype=torch.float64)
    denoise = exact_gaussian(schedule)

    def v(x, t):
        x0, eps = denoise(x, t.expand(5))
        return eps - x0

    for t, s in pairwise(schedule.timesteps(10)[:-1]):
        euler_end = x + (s - t) * v(x, t)
        x_s, *_ = heun()(denoise, schedule, x, t, s, seeded(0))
        torch.testing.assert_close(
            x_s, x + (s - t) * (v(x, t) + v(euler_end, s)) / 2, rtol=1e-11, atol=1e-11
        )


@pytest.mark.equation("edm-heun")
@pytest.mark.parametrize("S_churn", [0.0, 5.0, 40.0])
def test_heun_equals_edm_algorithm_2(S_churn):
    """Karras et al. 2022, written out with their names; gamma reaches its bound sqrt(2) - 1 in the caller's hands."""
    schedule, steps, S_tmin, S_tmax, S_noise = schedules.Karras(), 18, 0.05, 50.0, 1.003
    gamma = min(S_churn / steps, 2**0.5 - 1)
    denoise, z, t = (
        exact_gaussian(schedule),
        torch.Generator().manual_seed(4),
        schedule.timesteps(steps),
    )
    x = x_T = 80 * torch.randn(5, 1, dtype=torch.float64)
    for i in range(steps):
        t_hat = t[i] * (1 + gamma) if S_tmin <= t[i] <= S_tmax else t[i]
        if t_hat > t[i]:
            x = x + (t_hat**2 - t[i] ** 2).sqrt() * S_noise * torch.randn(
                5, 1, dtype=torch.float64, generator=z
            )
        d = (x - denoise(x, t_hat.expand(5)).x0) / t_hat
        x_next = x + (t[i + 1] - t_hat) * d
        if t[i + 1] != 0:
            d_next = (x_next - denoise(x_next, t[i + 1].expand(5)).x0) / t[i + 1]
            x_next = x + (t[i + 1] - t_hat) * (d + d_next) / 2
        x = x_next
    step = heun(gamma, S_noise, (S_tmin, S_tmax))
    *_, last = sample(denoise, schedule, x_T, steps, step, noise=seeded(4))
    assert (last.x - x).abs().max() < 1e-12


def test_churn_between_its_bounds():
    """EDM algorithm 2: noise is added where S_tmin <= sigma / alpha <= S_tmax, both included."""
    edm, cosine, calls = schedules.Karras(), schedules.cosine(), []
    level = cosine.at_log_snr(torch.tensor(2.0).double().log() * -2)  # of sigma / alpha = 2

    def noise(x):
        calls.append(len(x))
        return torch.zeros_like(x)

    for schedule, t, bounds, drawn in (
        (edm, 2.0, (2.0, 2.0), 1),
        (edm, 1.999, (2.0, 2.0), 0),
        (edm, 2.001, (2.0, 2.0), 0),
        (cosine, level, (1.99, 2.01), 1),
        (cosine, level, (2.01, 3.0), 0),
    ):
        calls.clear()
        t = torch.as_tensor(t, dtype=torch.float64)
        x = torch.ones(3, 1, dtype=torch.float64)
        heun(0.3, between=bounds)(exact_gaussian(schedule), schedule, x, t, t / 2, noise)
        assert len(calls) == drawn, (t, bounds)


def test_churn_leaves_pure_noise_as_it_is():
    """Where alpha = 0 there is nothing to drown: no factor, and no noise added."""
    schedule, x, asked = schedules.Flow(), torch.randn(3, 1, dtype=torch.float64), []

    def denoise(x, t):
        asked.append((x, t))
        return exact_gaussian(schedule)(x, t)

    t, s = torch.tensor([1.0, 0.5], dtype=torch.float64)
    heun(0.3)(denoise, schedule, x, t, s, torch.ones_like)
    assert torch.equal(asked[0][0], x) and (asked[0][1] == 1).all()


@pytest.mark.parametrize(
    "schedule, t, s, evaluations",
    [
        (schedules.Karras(), 80.0, 0.5, 2),
        (schedules.Karras(), 80.1, 0.5, 1),  # sigma / alpha above 80: almost no data
        (schedules.Flow(), 0.9, 0.4, 2),
        (schedules.Flow(), 0.9, 0.0, 1),  # eps is not defined at clean data
        (schedules.cosine(), 900.0, 1.0, 2),
    ],
)
def test_pndms_first_step_looks_at_its_end(schedule, t, s, evaluations):
    asked = []

    def denoise(x, t):
        asked.append(t)
        return Prediction(x, x)

    t, s = torch.tensor([t, s], dtype=torch.float64)
    pndm()(denoise, schedule, torch.ones(2, 1, dtype=torch.float64), t, s, None)
    assert len(asked) == evaluations


@pytest.mark.parametrize("terms", [1, 2, 3, 4])
def test_adams_bashforth_weights(terms):
    """They integrate over the next unit of time, exactly, every polynomial of degree below their
    number, from its values at 0, -1, -2, ...: sum_k w_k (-k)^p = 1 / (p + 1)."""
    weights = torch.tensor(ADAMS_BASHFORTH[terms], dtype=torch.float64)
    assert len(weights) == terms
    places = -torch.arange(terms, dtype=torch.float64)
    for power in range(terms):
        assert abs((weights * places**power).sum() - 1 / (power + 1)) < 1e-14


def stretch(schedule, t, s):
    """alpha and sigma at both ends, and h = lambda_s - lambda_t of lambda = log(alpha / sigma)."""
    (alpha_t, sigma_t), (alpha_s, sigma_s) = schedule.alpha_sigma(t), schedule.alpha_sigma(s)
    return alpha_t, sigma_t, alpha_s, sigma_s, ((alpha_s * sigma_t) / (sigma_s * alpha_t)).log()


def told(*predictions):
    """A denoiser that answers with these, one at a call."""
    answers = iter(predictions)
    return lambda x, t: next(answers)


def test_pndm_by_its_equations():
    """Liu et al. 2022, eq. 11: DDIM's transfer along a sum of the last four eps. The first step
    takes the mean of eps at its two ends."""
    schedule, times = schedules.cosine(), torch.tensor([900, 750, 600, 450, 300, 150])
    eps = torch.randn(7, 2, 3, dtype=torch.float64)
    start = x = torch.randn(2, 3, dtype=torch.float64)
    memory = None
    for k, (t, s) in enumerate(pairwise(times)):
        alpha_t, sigma_t, alpha_s, sigma_s, _ = stretch(schedule, t, s)
        predictions = [
            Prediction(
                (x - sigma_t * eps[0 if k == 0 else k + 1]) / alpha_t, eps[k + 1 if k else 0]
            ),
            Prediction(x, eps[1]),  # of the first step's end
        ]
        found, _, memory = pndm()(told(*predictions), schedule, x, t, s, None, memory)
        last = [eps[0], *eps[2 : k + 2]][::-1][:4]  # newest first
        mean = sum(w * e for w, e in zip(ADAMS_BASHFORTH[len(last)], last, strict=True))
        mean = (eps[0] + eps[1]) / 2 if k == 0 else mean
        expected = alpha_s * (x - sigma_t * mean) / alpha_t + sigma_s * mean
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)
        assert len(memory) == min(k + 1, 4)
        x = found
    assert not torch.equal(x, start)


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_dpmpp_2m_by_its_equations(eta):
    """Lu et al. 2022 (DPM-Solver++), algorithm 2, and k-diffusion's eta: with r = h_last / h,
    x_s = (sigma_s / sigma_t) e^(-eta h) x + alpha_s (1 - e^(-h - eta h)) D + noise of variance
    sigma_s^2 (1 - e^(-2 eta h)), where D = x0 + (x0 - x0_last) / (2 r)."""
    schedule, times = schedules.cosine(), torch.tensor([900, 700, 600])
    x, z, *x0 = torch.randn(4, 2, 3, dtype=torch.float64)
    memory = h_last = None
    for k, (t, s) in enumerate(pairwise(times)):
        _, sigma_t, alpha_s, sigma_s, h = stretch(schedule, t, s)
        denoise = told(Prediction(x0[k], x))
        found, _, memory = dpmpp_2m(eta)(denoise, schedule, x, t, s, lambda x: z, memory)
        D = x0[k] if k == 0 else x0[k] + (x0[k] - x0[k - 1]) / (2 * h_last / h)
        expected = sigma_s / sigma_t * (-eta * h).exp() * x
        expected = expected + alpha_s * (1 - (-h - eta * h).exp()) * D
        expected = expected + sigma_s * (1 - (-2 * eta * h).exp()).sqrt() * z
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)
        x, h_last = found, h


def integral(function, h):
    """Of e^(u - h) function(u) over u = 0..h, by Gauss and Legendre: exact but for roundings."""
    places, weights = map(torch.from_numpy, numpy.polynomial.legendre.leggauss(20))
    u = (h * (places + 1) / 2)[:, None, None]
    return (weights[:, None, None] * (u - h).exp() * function(u)).sum(0) * h / 2


@pytest.mark.parametrize("variant", ["bh1", "bh2"])
def test_unipc_by_its_equations(variant):
    """Zhao et al. 2023, section 3. The predictor is x_s = (sigma_s / sigma_t) x + alpha_s ((1 -
    e^-h) x0 + B(h) / 2 (x0 - x0_last) h / h_last); the first has no second-order term. The
    corrector integrates e^(u - h) x0(u) along the parabola through the last three x0; the first
    has two of them, and x_s = ... + alpha_s B(h) / 2 (x0_s - x0)."""
    schedule, times = schedules.cosine(), torch.tensor([900, 700, 600, 520])
    x, *x0 = torch.randn(4, 2, 3, dtype=torch.float64)
    memory, steps = None, []  # of (x, h, factor of x, alpha_s) before each step
    for k, (t, s) in enumerate(pairwise(times)):
        _, sigma_t, alpha_s, sigma_s, h = stretch(schedule, t, s)
        denoise = told(Prediction(x0[k], x))
        found, _, memory = unipc(variant)(denoise, schedule, x, t, s, None, memory)
        if k == 1:
            start, h1, shrink, alpha = steps[0]
            B = h1 if variant == "bh1" else 1 - (-h1).exp()
            x = shrink * start + alpha * ((1 - (-h1).exp()) * x0[0] + B / 2 * (x0[1] - x0[0]))
        if k == 2:
            (_, h0, _, _), (start, h1, shrink, alpha) = steps

            def parabola(u, h0=h0, h1=h1):
                return (
                    x0[0] * u * (u - h1) / (h0 * (h0 + h1))
                    - x0[1] * (u + h0) * (u - h1) / (h0 * h1)
                    + x0[2] * (u + h0) * u / ((h0 + h1) * h1)
                )

            x = shrink * start + alpha * integral(parabola, h1)
        steps.append((x, h, sigma_s / sigma_t, alpha_s))
        ahead = (1 - (-h).exp()) * x0[k]
        if k > 0:
            B = h if variant == "bh1" else 1 - (-h).exp()
            ahead = ahead + B / 2 * (x0[k] - x0[k - 1]) * h / steps[k - 1][1]
        expected = sigma_s / sigma_t * x + alpha_s * ahead
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
        x = found


@pytest.mark.parametrize("variant, weight", [("bh1", 0.0), ("bh2", 0.5)])
def test_unipc_corrects_a_step_from_pure_noise(variant, weight):
    """There h is infinite: x_s = sigma_s x + alpha_s (x0 + B / 2 (x0_s - x0)), with B = 1 - e^-h =
    1; of the variant with B = h no finite correction exists, and none is made."""
    schedule, (t, s, end) = schedules.Flow(), torch.tensor([1.0, 0.6, 0.3], dtype=torch.float64)
    start, first, second = torch.randn(3, 2, 3, dtype=torch.float64)
    denoise = told(Prediction(first, start), Prediction(second, start))
    x, _, memory = unipc(variant)(denoise, schedule, start, t, s, None)
    torch.testing.assert_close(x, 0.6 * start + 0.4 * first)
    *_, memory = unipc(variant)(denoise, schedule, x, s, end, None, memory)
    expected = 0.6 * start + 0.4 * (first + weight * (second - first))
    torch.testing.assert_close(memory.x, expected)


def test_the_consistency_function_by_its_equation():
    """Luo et al. 2023, eq. 9 as published with Stable Diffusion: c_skip = 0.25 / (tau^2 + 0.25) and
    c_out = tau / sqrt(tau^2 + 0.25) at tau = 10 (t - 1); x itself at the first level and below."""
    schedule, x, x0 = schedules.cosine(), *torch.randn(2, 5, 3, dtype=torch.float64)
    t = torch.tensor([0.0, 1.0, 1.02, 1.5, 40.0], dtype=torch.float64)
    tau = (10 * (t - 1)).clamp(min=0)[:, None]
    expected = 0.25 / (tau**2 + 0.25) * x + tau / (tau**2 + 0.25).sqrt() * x0
    found = consistent(lambda *_: Prediction(x0, x), schedule, x, t)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    assert torch.equal(found[:2], x[:2])
    x0[:2] = math.nan  # as a solve at clean data may be
    found = consistent(lambda *_: Prediction(x0, x), schedule, x, t)
    assert torch.equal(found[:2], x[:2]) and found.isfinite().all()


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize(
    "schedule",
    [
        schedules.Flow(),
        schedules.Discrete("linear", zero_terminal_snr=True),
        schedules.cosine(),
        schedules.Karras(),
    ],
    ids=["flow", "zero terminal SNR", "cosine", "karras"],
)
@pytest.mark.parametrize("steps", [1, 2, 3, 8])
def test_every_sampler_lives_with_pure_noise_and_clean_data(schedule, sampler, steps):
    """alpha = 0 at the first time, sigma = 0 at the last, and no time between where anything is infinite, or larger than it should be."""
    mixture = Mixture(torch.tensor([[-1.0, 0.5], [0.6, -0.5]], dtype=torch.float64), 0.3)
    alpha, sigma = schedule.alpha_sigma(schedule.timesteps(1)[0])
    x_T = (alpha**2 + sigma**2).sqrt() * torch.randn(20, 2, dtype=torch.float64)
    frames = list(
        sample(
            mixture.denoiser(schedule),
            schedule,
            x_T,
            steps,
            by_name(sampler),
            noise=seeded(0),
        )
    )
    assert all(frame.x.isfinite().all() for frame in frames)
    if not (
        sampler in ("heun", "pndm") and isinstance(schedule, schedules.Karras) and steps < 8
    ):  # EDM's and PNDM's first step take the mean slope of sigma = 80 and 0.002 there
        assert all(frame.x0.abs().max() < 4 for frame in frames)


@pytest.mark.parametrize(
    "make",
    [lambda: heun(churn=0.2), lambda: unipc("bh1"), lambda: dpmpp_2m(eta=0.5)],
    ids=["churn", "bh1", "eta 0.5"],
)
def test_variants_live_with_pure_noise_too(make):
    schedule = schedules.Flow()
    *_, last = sample(
        exact_gaussian(schedule), schedule, torch.randn(20, 1, dtype=torch.float64), 8, make()
    )
    assert (last.x - MEAN).abs().max() < 6 * STD


@pytest.mark.parametrize(
    "schedule",
    [*SCHEDULES, schedules.Discrete("scaled_linear", 1000, 0.00085, 0.012, final=1)],
    ids=["cosine", "flow", "karras", "final = 1"],
)
def test_inversion_is_what_ddim_undoes(schedule):
    mixture = Mixture(torch.tensor([[-1.0, 0.5], [0.6, -0.5]], dtype=torch.float64), 0.3)
    denoise, x0 = mixture.denoiser(schedule), mixture.draw(20, torch.Generator().manual_seed(0))

    def there_and_back(steps, rounds):
        frames = list(invert(denoise, schedule, x0, steps, rounds=rounds))
        assert [frame.t for frame in frames] == schedule.timesteps(steps).flip(
            0
        ).tolist() and torch.equal(frames[0].x, x0)
        *_, last = sample(denoise, schedule, frames[-1].x, steps, ddim())
        return (last.x - x0).abs().max().item()

    assert there_and_back(50, rounds=100) < 1e-12
    assert there_and_back(50, rounds=5) < 1e-2
    if schedule != schedules.Karras():  # there, sigma grows by half in one of 50 strides
        # first order, but for the last stride, into pure noise, where eps at (x_s, t) is x_s
        assert orders([there_and_back(steps, rounds=1) for steps in (100, 200)]).item() > 0.8


@pytest.mark.equation("ddim-12", "ddim-16")
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_ddim_step_equals_the_paper(eta):
    checks.ddim_step_equals_the_paper(eta)


test_dpmpp_2m_is_of_second_order = checks.dpmpp_2m_is_of_second_order


def test_the_loop_is_a_generator_that_leaves_the_caller_alone():
    schedule = schedules.cosine()
    frames = sample(
        exact_gaussian(schedule), schedule, torch.randn(2, 1, dtype=torch.float64), 5, ddim()
    )
    first = next(frames)
    assert torch.is_grad_enabled() and first.t == 1000
    rest = list(frames)
    assert [frame.t for frame in rest] == [800, 600, 400, 200, 0] and torch.equal(
        rest[-1].x, rest[-1].x0
    )


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_noise_is_drawn_on_the_cpu_whatever_the_device(sampler):
    """The meta device stands in for a GPU: a step there takes the CPU's generators, and draws from them what it draws on the CPU."""
    schedule, (t, s) = schedules.cosine(), torch.tensor([500, 400])
    after = []
    for device in ("cpu", "meta"):
        noise, x = Normal.seeded(0, [0, 1]), torch.zeros(2, 3, device=device)
        x_s, *_ = by_name(sampler)(lambda x, t: Prediction(x, x), schedule, x, t, s, noise)
        assert x_s.device.type == device
        after.append(torch.stack([generator.get_state() for generator in noise.generators]))
    assert torch.equal(*after)


@pytest.mark.parametrize(
    "times, complaint",
    [
        ([], "run from nowhere"),
        ([0], "run from 0 to 0"),
        ([1000, 800, 600, 600, 200, 0], "600 follows 600"),
        ([1000, 800, 600, float("nan"), 200, 0], "nan follows 600"),
        ([1001, 800, 600, 400, 200, 0], "run from 1001 to 0; they must begin at 1000 or below"),
        ([1000, 800, 600, 400, 200, 1], "end at 0"),
    ],
)
def test_bad_times(times, complaint):
    with pytest.raises(UserError, match=complaint):
        next(
            sample(
                exact_gaussian(schedules.cosine()),
                schedules.cosine(),
                torch.zeros(1, 1),
                torch.tensor(times),
                ddim(),
            )
        )


def test_bad_numbers():
    with pytest.raises(UserError, match="rounds is 0"):
        next(
            invert(
                exact_gaussian(schedules.cosine()),
                schedules.cosine(),
                torch.zeros(1, 1),
                5,
                rounds=0,
            )
        )
    with pytest.raises(UserError, match='no variant of UniPC "bh3"; there is bh1, bh2'):
        unipc("bh3")


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
@pytest.mark.parametrize(
    "spacing", ["trailing", "leading", "linspace", "karras", "log-snr", "ays", "shifted"]
)
def test_final_with_every_grid(sampler, spacing):
    """Those that visit level 1 do so to a rounding, above or below, and stay there."""
    schedule = schedules.Discrete("scaled_linear", 1000, 0.00085, 0.012, final=1)
    frames = list(
        sample(
            exact_gaussian(schedule),
            schedule,
            torch.randn(4, 1, dtype=torch.float64),
            7,
            by_name(sampler),
            spacing,
        )
    )
    assert all(frame.x.isfinite().all() for frame in frames)
    if frames[-2].t == pytest.approx(1):
        torch.testing.assert_close(frames[-1].x, frames[-2].x, rtol=1e-9, atol=1e-9)


def test_where_each_sampler_lays_its_times():
    """linspace: Euler and Heun do not round, the multistep solvers lay out one time more and leave
    out the last level (in as many steps as levels there is none more); leading alike, but for Euler
    and Heun; every other spacing is the schedule's. None is the sampler's own."""
    schedule = schedules.cosine()

    def times(sampler, spacing, steps=5):
        return times_of(schedule, steps, spacing, by_name(sampler)).tolist()

    even = [1000, 750.25, 500.5, 250.75, 1, 0]
    assert [times(each, "linspace") for each in ("euler", "heun")] == [even, even]
    for sampler in ("dpmpp_2m", "dpmpp_2m_sde", "unipc"):
        assert times(sampler, "linspace") == [1000, 800, 600, 401, 201, 0]
        assert times(sampler, "leading") == [832, 666, 500, 334, 168, 0]  # of 6 strides of 166
        for spacing in ("linspace", "leading"):
            assert times(sampler, spacing, 1000) == list(range(1000, -1, -1))
            assert times(sampler, spacing, 999)[-2:] == [2, 0]
    for sampler in SAMPLERS:
        assert times(sampler, "trailing") == [1000, 800, 600, 400, 200, 0]
        assert times(sampler, None) == times(sampler, by_name(sampler).spacing)
    for sampler in ("ddim", "ddpm", "pndm", "euler", "heun"):
        assert times(sampler, "leading") == [802, 602, 402, 202, 2, 0]
    assert times("ddim", "linspace") == [1000, 750, 501, 251, 1, 0]
    assert times_of(schedule, 5).tolist() == [1000, 800, 600, 400, 200, 0]


def test_defaults_are_the_published_ones():
    """DDIM's and DPM-Solver++'s own are without new noise; Heun's churn is off, and where it is on
    its noise has unit variance at every level; UniPC's B(h) is the second."""
    assert ddim() == ddim(eta=0.0, final=True) and dpmpp_2m() == dpmpp_2m(eta=0.0)
    assert heun() == heun(churn=0.0, noise_scale=1.0, between=(0.0, math.inf))
    assert unipc() == unipc("bh2") and dpmpp_2m_sde() == dpmpp_2m(eta=1.0)
    assert (ddpm(), euler_ancestral()) == (ddim(1.0), ddim(1.0, final=False))


def test_which_spacings_a_sampler_follows():
    """Those that its class in diffusers reads: LCM none, and Karras's only those with
    use_karras_sigmas."""
    karras = {"euler", "heun", "dpmpp_2m", "dpmpp_2m_sde", "unipc"}
    assert {name for name, step in SAMPLERS.items() if step.follows("karras")} == karras
    assert {name for name, step in SAMPLERS.items() if step.follows("leading")} == {*SAMPLERS} - {
        "lcm"
    }


def test_noise_by_its_definition():
    """Row k comes from a generator of its own; split draws their seeds from one generator, each
    below 2^63 - 1; seeded makes them of (seed, index)."""
    seeds = torch.randint(2**63 - 1, (16,), generator=torch.Generator().manual_seed(5)).tolist()
    x = torch.zeros(16, 2, 3, dtype=torch.float64)
    expected = [
        torch.randn(2, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        for seed in seeds
    ]
    found = Normal.split(torch.Generator().manual_seed(5), 16)(x)
    assert torch.equal(found, torch.stack(expected))
    both, alone = Normal.seeded(7, [0, 3]), Normal.seeded(7, [3])
    assert torch.equal(both(x[:2])[1:], alone(x[:1]))
    with pytest.raises(UserError, match="noise for 2 examples, asked for 3"):
        both(x[:3])
    assert both(x[:2].bfloat16()).dtype == torch.bfloat16


def test_times_replace_the_spacing():
    schedule, x = schedules.cosine(), torch.randn(2, 1, dtype=torch.float64)
    times = torch.tensor([900.0, 333.3, 20.5, 0.0], dtype=torch.float64)
    assert [
        frame.t for frame in sample(exact_gaussian(schedule), schedule, x, times, ddim())
    ] == times.tolist()


@pytest.mark.parametrize("multistep", [dpmpp_2m, dpmpp_2m_sde, unipc])
def test_memory_starts_afresh(multistep):
    """One step object for several chains: after a whole one, one broken off, one of another shape, each is what a new object gives."""
    schedule, denoise = schedules.cosine(), exact_gaussian(schedules.cosine())

    def chain(step, x, stop=None):
        torch.manual_seed(3)
        return [
            frame.x
            for _, frame in zip(
                range(stop or 9), sample(denoise, schedule, x, 8, step), strict=False
            )
        ]

    x, used = torch.randn(4, 1, dtype=torch.float64), multistep()
    for start, stop in ((x, None), (x, None), (x, 3), (x, None), (x[:2], 5), (x, None)):
        assert all(
            torch.equal(a, b)
            for a, b in zip(chain(used, start, stop), chain(multistep(), start, stop), strict=True)
        )


def test_names():
    schedule, x, (t, s) = (
        schedules.cosine(),
        torch.randn(2, 1, dtype=torch.float64),
        torch.tensor([500, 400]),
    )
    for name, step in (("ddim", ddim(0.0)), ("ddpm", ddim(1.0))):
        assert torch.equal(
            by_name(name)(exact_gaussian(schedule), schedule, x, t, s, seeded(3))[0],
            step(exact_gaussian(schedule), schedule, x, t, s, seeded(3))[0],
        )
    with pytest.raises(
        UserError,
        match="ddim, ddpm, euler, euler_ancestral, heun, pndm, dpmpp_2m, dpmpp_2m_sde, unipc, lcm",
    ):
        by_name("dimm")


def test_the_command_line_lists_every_sampler(ran):
    text = "".join(ran("generate", "--help").out.replace("│", "").split())
    assert f"--sampler{'|'.join(SAMPLERS)}how" in text


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_chains_walked_in_turn_do_not_mix(sampler):
    """Two with one step object, of one shape and at the same times: each is what it is alone."""
    schedule, step = schedules.cosine(), by_name(sampler)

    def chain(seed):
        x_T = torch.randn(4, 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        return sample(exact_gaussian(schedule), schedule, x_T, 8, step, noise=seeded(seed))

    alone = [list(chain(seed)) for seed in (0, 1)]
    in_turn = zip(*zip(chain(0), chain(1), strict=True), strict=True)
    for expected, found in zip(alone, in_turn, strict=True):
        assert all(torch.equal(a.x, b.x) for a, b in zip(expected, found, strict=True))
    assert not torch.equal(alone[0][-1].x, alone[1][-1].x)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_sampler_that_adds_no_noise_draws_none(sampler):
    """And one that adds some takes it from the caller alone: torch's own generator is left as it was."""
    schedule, calls, before = schedules.cosine(), [], torch.get_rng_state()

    def noise(x):
        calls.append(len(x))
        return torch.zeros_like(x)

    x_T = torch.ones(3, 1, dtype=torch.float64)
    list(sample(exact_gaussian(schedule), schedule, x_T, 4, by_name(sampler), noise=noise))
    noisy = {"ddpm", "euler_ancestral", "dpmpp_2m_sde", "lcm"}
    assert calls == ([3] * 4 if sampler in noisy else [])
    assert torch.equal(torch.get_rng_state(), before)
