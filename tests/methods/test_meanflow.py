"""MeanFlow against exact worlds: the true average velocity of Gaussians in closed form, and of
mixtures by an integrator that is itself differentiated."""

import contextlib
import math
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from minidiff import schedules
from minidiff.condition import Condition
from minidiff.denoiser import Denoiser, Prediction
from minidiff.errors import UserError
from minidiff.methods import meanflow as methods
from minidiff.methods.exact import Mixture
from minidiff.methods.meanflow import (
    MeanFlow,
    adaptive,
    guided_velocity,
    meanflow,
    meanflow_loss,
    meanflow_target,
    total_derivative,
    two_times,
)
from minidiff.samplers import ddim, sample
from minidiff.unet import UNet, UNetConfig

FLOW = schedules.Flow()
ISLANDS = Mixture(
    torch.tensor([[-1.0, -0.6], [0.7, -0.4], [0.2, 1.1]]), 0.35, torch.tensor([0.3, 0.5, 0.2])
)
MEAN, STD = torch.tensor([0.7, -0.2], dtype=torch.float64), 0.4
GAUSSIAN = Mixture(MEAN[None], STD)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def column(scale):
    return scale.view(-1, 1)


def velocity(data, x, t):
    x0, eps = data.denoiser(FLOW)(x, t)
    return eps - x0


def width(t):
    """The standard deviation of x_t for N(MEAN, STD^2)."""
    return ((1 - t) ** 2 * STD**2 + t**2).sqrt()


def straight(x, r, t):
    """The average velocity of N(MEAN, STD^2), where x_t keeps its place in units of its width."""
    place = (x - column(1 - t) * MEAN) / column(width(t))
    x_r = column(1 - r) * MEAN + column(width(r)) * place
    return (x - x_r) / column(t - r)


def walked(data, x, r, t, steps=150):
    """The average velocity of any data, by the classical Runge-Kutta method, fourth order."""
    start, h = x, (r - t) / steps
    for k in range(steps):
        now, step = t + k * h, column(h)
        a = velocity(data, x, now)
        b = velocity(data, x + step / 2 * a, now + h / 2)
        c = velocity(data, x + step / 2 * b, now + h / 2)
        d = velocity(data, x + step * c, now + h)
        x = x + step / 6 * (a + 2 * b + 2 * c + d)
    return (start - x) / column(t - r)


def points(n=6, least=0.05, seed=0):
    """x, r, t with r < t, not too near."""
    g = seeded(seed)
    x, low, long = (
        torch.randn(n, 2, generator=g, dtype=torch.float64),
        *torch.rand(2, n, generator=g, dtype=torch.float64),
    )
    r = least + 0.5 * low
    return x, r, r + 0.1 + (0.85 - r) * long


# The identity.


@pytest.mark.equation("meanflow-6", "meanflow-8")
@pytest.mark.parametrize("least", [0.0, 0.05])
def test_the_target_at_the_true_velocity_of_a_gaussian_is_that_velocity(least):
    x, r, t = points(least=least)
    r[0] = least
    target = meanflow_target(straight, x, r, t, velocity(GAUSSIAN, x, t))
    torch.testing.assert_close(target, straight(x, r, t), rtol=1e-12, atol=1e-12)


@pytest.mark.equation("meanflow-3", "meanflow-6")
def test_the_target_at_the_true_velocity_of_a_mixture_is_that_velocity():
    x, r, t = points()
    u = partial(walked, ISLANDS)
    target = meanflow_target(u, x, r, t, velocity(ISLANDS, x, t))
    torch.testing.assert_close(target, u(x, r, t), rtol=0, atol=1e-8)  # the integrator's error
    assert (u(x, r, t) - velocity(ISLANDS, x, t)).abs().max() > 0.05  # walks are curved
    wrong = meanflow_target(u, x, r, t, velocity(ISLANDS, x, t) + 0.1)
    assert (wrong - u(x, r, t)).abs().max() > 0.01


@pytest.mark.equation("meanflow-3")
def test_both_true_velocities_are_the_mean_of_v_along_the_walk():
    """Gauss-Legendre over the walk, from the closed form of x at each time."""
    x, r, t = points()
    torch.testing.assert_close(walked(GAUSSIAN, x, r, t), straight(x, r, t), rtol=0, atol=1e-9)
    nodes, weights = np.polynomial.legendre.leggauss(20)
    total = torch.zeros_like(x)
    for node, weight in zip(nodes, weights, strict=True):
        now = r + (t - r) * (node + 1) / 2
        there = x - column(t - now) * straight(x, now, t)
        total += weight / 2 * velocity(GAUSSIAN, there, now)
    torch.testing.assert_close(straight(x, r, t), total, rtol=0, atol=1e-9)


@pytest.mark.equation("meanflow-8")
def test_the_derivative_is_that_along_the_walk():
    """Beside (u(x_{t+h}) - u(x_{t-h})) / 2h, with x_{t+h} on the same walk, exactly."""
    x, r, t = points()
    h, v = 1e-5, velocity(GAUSSIAN, x, t)
    ends = [(x - column(t - s) * straight(x, s, t), s) for s in (t + h, t - h)]
    ahead, behind = (straight(z, r, s) for z, s in ends)
    found = total_derivative(straight, x, r, t, v)
    torch.testing.assert_close(found, (ahead - behind) / (2 * h), rtol=0, atol=1e-8)


def test_where_r_is_t_the_target_is_v_and_nothing_is_differentiated(monkeypatch):
    x, r, t = points()
    v = torch.randn_like(x)
    calls = []
    real = total_derivative
    monkeypatch.setattr(
        methods, "total_derivative", lambda u, x, *rest: calls.append(len(x)) or real(u, x, *rest)
    )
    assert torch.equal(meanflow_target(straight, x, t, t, v), v) and calls == []
    r[:4] = t[:4]
    target = meanflow_target(straight, x, r, t, v)
    assert torch.equal(target[:4], v[:4]) and calls == [2] and not (target[4:] == v[4:]).any()


def off(u, theta, x, r, t):
    """The true velocity, and a mistake of size theta."""
    return u(x, r, t) + theta * (torch.sin(3 * x) + column(t - r) * x)


@pytest.mark.parametrize("power", [0.0, 1.0])
@pytest.mark.parametrize("data, u", [(GAUSSIAN, straight), (ISLANDS, partial(walked, ISLANDS))])
def test_the_gradient_is_zero_at_the_true_velocity(data, u, power):
    x, r, t = points()
    for where, zero in ((0.0, True), (0.1, False)):
        theta = torch.tensor(where, dtype=torch.float64, requires_grad=True)
        loss = meanflow_loss(partial(off, u, theta), x, r, t, velocity(data, x, t), power=power)
        (slope,) = torch.autograd.grad(loss.sum(), theta)
        assert (slope.abs() < 1e-5) == zero  # 1e-8 of the integrator over the floor of 1e-3


@pytest.mark.parametrize("improved", [False, True])
def test_the_mean_gradient_of_single_pairs_is_zero_at_the_true_velocity(improved):
    """v = eps - x0 of each pair: E over x0 and eps by quadrature, exact for u linear in x."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(24)
    a, eps = (torch.from_numpy(z).reshape(-1, 1) for z in np.meshgrid(nodes, nodes))
    weight = torch.from_numpy(np.outer(weights, weights)).reshape(-1) / (2 * math.pi)
    x0, ones = MEAN + STD * a, torch.ones(len(a), dtype=torch.float64)
    t, r = 0.8 * ones, 0.1 * ones
    x, v = FLOW.mix(x0, eps.expand_as(x0), t), eps - x0
    tangent = straight(x, t - 1e-7, t) if improved else None  # the model's own v, to 1e-7
    for where, zero in ((0.0, True), (0.1, False)):
        theta = torch.tensor(where, dtype=torch.float64, requires_grad=True)
        u = partial(off, straight, theta)
        loss = meanflow_loss(u, x, r, t, v, tangent=tangent, power=0.0)
        (slope,) = torch.autograd.grad((weight * loss).sum(), theta)
        assert (slope.abs() < 1e-6) == zero


@pytest.mark.equation("imf-12")
def test_single_pairs_scatter_the_target_by_how_far_walks_part():
    """[1] along v: dx_r/dx of the noise of v is left; [2], along the network's own: all of it."""
    x, r, t = points()
    own, noise = velocity(GAUSSIAN, x, t), torch.randn(x.shape, generator=seeded(1)).double()
    exact = straight(x, r, t)
    plain = meanflow_target(straight, x, r, t, own + noise) - exact
    improved = meanflow_target(straight, x, r, t, own + noise, tangent=own) - exact
    torch.testing.assert_close(improved, noise, rtol=0, atol=1e-12)
    torch.testing.assert_close(plain, column(width(r) / width(t)) * noise, rtol=0, atol=1e-12)


def shifted(data, theta, x, r, t):
    return velocity(data, x, t) + theta


@pytest.mark.equation("meanflow-weight")
def test_adaptive_weights_divide_by_the_distance_and_move_the_minimum_in_few_dimensions():
    d = torch.tensor([0.0, 0.5, 40.0], dtype=torch.float64, requires_grad=True)
    for power in (0.0, 0.75, 1.0):
        (slope,) = torch.autograd.grad(adaptive(d, power).sum(), d)
        torch.testing.assert_close(slope, (d.detach() + 1e-3) ** -power, rtol=1e-12, atol=0)
    data = Mixture(torch.tensor([[-1.0], [1.0]]), weights=torch.tensor([1.0, 2.0]))
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    eps = torch.from_numpy(nodes).repeat(2)[:, None]
    weight = torch.from_numpy(weights).repeat(2) / math.sqrt(2 * math.pi)
    x0 = torch.tensor([-1.0, 1.0], dtype=torch.float64).repeat_interleave(60)[:, None]
    weight = weight * torch.tensor([1 / 3, 2 / 3]).double().repeat_interleave(60)
    t = torch.full((120,), 0.9, dtype=torch.float64)
    x, v = FLOW.mix(x0, eps, t), eps - x0
    slopes = []
    for power in (0.0, 1.0):
        theta = torch.zeros((), dtype=torch.float64, requires_grad=True)
        loss = meanflow_loss(partial(shifted, data, theta), x, t, t, v, power=power)
        slopes.append(torch.autograd.grad((weight * loss).sum(), theta)[0].abs())
    assert slopes[0] < 1e-10 and slopes[1] > 0.1


# The network, its two times, its derivative.


def unet(context_dim=8):
    torch.manual_seed(0)
    config = UNetConfig(2, 2, channels=(8, 8), blocks=1, depth=(0, 1), heads=(2, 2), groups=4)
    config = UNetConfig(**{**vars(config), "context_dim": context_dim, "ff_mult": 2})
    network = UNet(config).double()
    for weight in network.parameters():  # no branch may start at zero here
        nn.init.normal_(weight, std=0.2)
    return network


def model(target="x0", **options):
    return MeanFlow(Denoiser(unet(**options), FLOW, target)).double()


def batch(n=3):
    g = seeded(2)
    x, v = torch.randn(2, n, 2, 8, 8, generator=g, dtype=torch.float64)
    t = torch.linspace(0.5, 0.9, n, dtype=torch.float64)
    return x, t / 3, t, v, torch.randn(n, 4, 8, generator=g, dtype=torch.float64)


@pytest.mark.parametrize("target", ["x0", "flow"])
def test_the_derivative_of_a_unet_beside_finite_differences(target):
    ours, (x, r, t, v, context) = model(target), batch()
    nn.init.normal_(ours.span[2].weight, std=0.3)
    u, h = partial(ours.velocity, context=context), 1e-7  # waves of 1000 t: h is small
    found = total_derivative(u, x, r, t, v)
    steps = (u(x + h * v, r, t + h) - u(x - h * v, r, t - h)) / (2 * h)
    torch.testing.assert_close(found, steps, rtol=1e-5, atol=1e-6)
    at_fixed_span = total_derivative(lambda x, r, t: u(x, r + (t - r.detach()), t), x, r, t, v)
    assert (found - at_fixed_span).abs().max() > 1e-3  # t - r moves with t


def test_a_condition_is_refused():
    """As SDXL, SD 3 and FLUX.1 read."""
    ours, (x, r, t, v, context) = model(), batch()
    condition = Condition(context, context[:, 0], context[:, 0, :0])
    with pytest.raises(UserError, match="a vector to a context tensor, and this is a Condition"):
        meanflow_loss(ours.velocity, x, r, t, v, condition)


def test_the_backend_with_a_forward_mode_is_named(monkeypatch):
    ours, (x, r, t, v, context) = model(), batch()
    meanflow_target(ours.velocity, x, r, t, v, context)
    monkeypatch.setattr(methods, "sdpa_kernel", lambda _: contextlib.nullcontext())
    with pytest.raises(NotImplementedError, match="forward"):
        meanflow_target(ours.velocity, x, r, t, v, context)


def test_the_second_time_is_a_vector_of_the_context_that_starts_at_zero():
    ours, (x, r, t, _, context) = model(), batch()
    longer = torch.cat([context, torch.zeros_like(context[:, :1])], dim=1)
    expected = ours.denoiser(x, t, longer)
    for given in (None, t, r):
        for ours_, theirs in zip(ours(x, t, given, context), expected, strict=True):
            assert torch.equal(ours_, theirs)
    nn.init.normal_(ours.span[2].weight)
    assert (ours(x, t, r, context).x0 - expected.x0).abs().max() > 1e-3
    for a, b in zip(ours(x, t, None, context), ours(x, t, t, context), strict=True):
        assert torch.equal(a, b)
    assert ours(x, t, r).x0.shape == x.shape  # no other context


def test_the_velocity_is_the_flow_target_of_any_row():
    ours, (x, r, t, _, context) = model("flow"), batch()
    longer = torch.cat([context, torch.zeros_like(context[:, :1])], dim=1)
    F = ours.denoiser.output(x, t, longer)
    torch.testing.assert_close(ours.velocity(x, r, t, context), F, rtol=1e-12, atol=1e-12)


def test_what_it_cannot_be_made_of_is_told():
    with pytest.raises(UserError, match="needs the schedule Flow"):
        MeanFlow(Denoiser(unet(), schedules.cosine(), "x0"))
    with pytest.raises(UserError, match="context_dim"):
        MeanFlow(Denoiser(unet(context_dim=None), FLOW, "x0"))


def test_the_loss_trains_every_weight_and_only_through_u():
    ours, (x, r, t, v, context) = model(), batch()
    nn.init.normal_(ours.span[2].weight, std=0.1)
    r[0] = t[0]
    loss = meanflow_loss(ours.velocity, x, r, t, v, context, power=0.0)
    target = meanflow_target(ours.velocity, x, r, t, v, context)
    by_hand = (ours.velocity(x, r, t, context) - target).pow(2).flatten(1).sum(1)
    weights = list(ours.parameters())
    for a, b in zip(*(torch.autograd.grad(e.sum(), weights) for e in (loss, by_hand)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    assert not target.requires_grad and loss.shape == (3,)


# Times, guidance, steps.


def test_two_times():
    r, t = two_times(schedules.Flow(mean=-0.4), 10_000, 0.25, seeded())
    again = two_times(schedules.Flow(mean=-0.4), 10_000, 0.25, seeded())
    assert torch.equal(r, again[0]) and torch.equal(t, again[1])
    assert (r[:2500] == t[:2500]).all() and (r[2500:] < t[2500:]).all() and (r > 0).all()
    middle = torch.cat([r[2500:], t[2500:]]).median().item()  # of both: of the schedule itself
    assert middle == pytest.approx(1 / (1 + math.exp(0.4)), abs=0.01)
    for share, count in ((0.0, 0), (1.0, 8)):
        r, t = two_times(FLOW, 8, share, seeded())
        assert (r == t).sum() == count


@pytest.mark.equation("meanflow-cfg")
@pytest.mark.parametrize("kappa", [0.0, 0.5, 0.9])
def test_the_guided_velocity_is_its_own_fixed_point(kappa):
    v, null = torch.randn(2, 5, 2, generator=seeded(), dtype=torch.float64)
    own = null + 3.0 * (v - null)
    target = guided_velocity(v, own, null, 3.0, kappa)
    torch.testing.assert_close(target, own, rtol=1e-12, atol=1e-12)
    if kappa:  # and a mistake of the network's own comes back kappa times
        moved = guided_velocity(v, own + 1, null, 3.0, kappa) - target
        torch.testing.assert_close(moved, torch.full_like(v, kappa), rtol=1e-9, atol=0)
    assert torch.equal(guided_velocity(v, own, null, 1.0), v)


def exact(x, t, r):
    """The denoiser of the true average velocity."""
    u = straight(x, r, t)
    return Prediction(x - column(t) * u, x + column(1 - t) * u)


@pytest.mark.equation("meanflow-sampling")
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_the_true_velocity_arrives_in_any_number_of_steps(steps):
    x_T = torch.randn(50, 2, generator=seeded(), dtype=torch.float64)
    *chain, last = sample(exact, FLOW, x_T, steps, meanflow())
    torch.testing.assert_close(last.x, MEAN + STD * x_T, rtol=0, atol=1e-12)
    assert len(chain) == steps and last.t == 0
    straight_on = list(sample(GAUSSIAN.denoiser(FLOW), FLOW, x_T, steps, ddim()))[-1].x
    assert (straight_on - last.x).abs().max() > 0.1  # one velocity for the whole step misses


class Plane(nn.Module):
    """A small network of points in the plane, told t - r by its context."""

    context_dim = 16

    def __init__(self, width=96):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(3 + 16, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(),
            nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 2),
        )  # fmt: skip

    def forward(self, x, c_noise, context):
        return self.layers(torch.cat([x, c_noise[:, None] / 500 - 1, context.sum(1)], dim=1))


@pytest.mark.parametrize("improved", [False, True])
def test_a_small_network_learns_to_arrive_in_one_step(improved):
    """Distance of its ends from those of the exact walks, beside the exact denoiser's one step."""
    torch.manual_seed(0)
    learner, g = MeanFlow(Denoiser(Plane(), schedules.Flow(std=1.5), "flow")), seeded(3)
    optimizer = torch.optim.Adam(learner.parameters())
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 6e-3, 600)
    for _ in range(600):
        r, t = two_times(learner.schedule, 256, 0.5, g)
        x0, eps = ISLANDS.draw(256, g).float(), torch.randn(256, 2, generator=g)
        x, v = FLOW.mix(x0, eps, t), eps - x0
        tangent = learner.velocity(x, t, t).detach() if improved else None
        loss = meanflow_loss(learner.velocity, x, r, t, v, tangent=tangent, power=0.0)
        optimizer.zero_grad(), loss.mean().backward(), optimizer.step(), rate.step()
    x_T = torch.randn(1000, 2, generator=g)
    ones = torch.ones(1000, dtype=torch.float64)
    ends = x_T - 0.99 * walked(ISLANDS, x_T.double(), 0.01 * ones, ones, steps=100)
    misses = [
        (list(sample(denoise, FLOW, x_T, steps, step))[-1].x - ends).norm(dim=1).mean().item()
        for denoise, steps, step in (
            (learner, 1, meanflow()),
            (learner, 4, meanflow()),
            (ISLANDS.denoiser(FLOW), 1, ddim()),
        )
    ]
    assert misses[0] < 0.25 * misses[2] and misses[1] < 0.25 * misses[2], misses
