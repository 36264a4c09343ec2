"""The likelihood that a denoiser gives to data, by the probability-flow ODE from data to noise.

Sampling without noise follows an ODE, which can also be solved from an image up to its noise, whose
density is known. In y = x / alpha and s = sigma / alpha every schedule's ODE is dy/ds = eps ([2]
eq. 1), and along it d log p / ds = -div eps, the trace of the Jacobian. It is solved here in
u = log s, by the classical Runge-Kutta method.

[1] Song et al. Score-Based Generative Modeling through Stochastic Differential Equations. 2021.
    arXiv:2011.13456
[2] Karras, Aittala, Aila, Laine. Elucidating the Design Space of Diffusion-Based Generative Models.
    2022. arXiv:2206.00364
[3] Hutchinson. A Stochastic Estimator of the Trace of the Influence Matrix. 1989
"""

import math
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from minidiff.denoiser import Denoise
from minidiff.schedules import SIGMA_MAX, NoiseSchedule

State = Float[Tensor, "B *dims"]
Signs = Float[Tensor, "probes B *dims"]


def log_likelihood(
    denoise: Denoise,
    schedule: NoiseSchedule,
    x0: State,
    steps: int = 100,
    probes: int | None = None,
    generator: torch.Generator | None = None,
    between: tuple[float, float] = (0.002, SIGMA_MAX),
) -> Float[Tensor, "B"]:
    """log p(x0) in nats, [1] eq. 39: four evaluations a step, and a backward pass for each probe.

    probes: how many random sign vectors estimate the trace, without bias ([3], [1] eq. 40).
    Default: every axis in turn, exact and for few dimensions. between: sigma / alpha at the two
    ends. Data are blurred by the lower one; at the upper one the prior is N(0, 1 + level^2).
    """
    alpha, sigma = schedule.alpha_sigma(schedule.timesteps(1)[:1])
    low, high = math.log(between[0]), math.log(min(between[1], (sigma / alpha).item()))
    signs = None
    if probes is not None:
        signs = (torch.randint(2, (probes, *x0.shape), generator=generator) * 2 - 1).to(x0)
    slope = partial(_slope, denoise, schedule, signs)
    y, gained, h = x0, x0.new_zeros(len(x0)), (high - low) / steps
    for k in range(steps):
        u = low + k * h
        dy_1, dp_1 = slope(u, y)
        dy_2, dp_2 = slope(u + h / 2, y + h / 2 * dy_1)
        dy_3, dp_3 = slope(u + h / 2, y + h / 2 * dy_2)
        dy_4, dp_4 = slope(u + h, y + h * dy_3)
        y = y + h / 6 * (dy_1 + 2 * dy_2 + 2 * dy_3 + dy_4)
        gained = gained + h / 6 * (dp_1 + 2 * dp_2 + 2 * dp_3 + dp_4)
    variance = 1 + math.exp(2 * high)  # of y, for data of unit variance
    log_prior = -(y.flatten(1) ** 2 / variance + math.log(2 * math.pi * variance)).sum(1) / 2
    return log_prior - gained


def _slope(
    denoise: Denoise, schedule: NoiseSchedule, signs: Signs | None, u: float, y: State
) -> tuple[State, Float[Tensor, "B"]]:
    """dy/du and d log p / du."""
    t = schedule.at_log_snr(torch.tensor([-2 * u], dtype=torch.float64)).expand(len(y))
    alpha, s = schedule.alpha_sigma(t)[0][0].item(), math.exp(u)
    with torch.enable_grad():
        y = y.detach().requires_grad_()
        eps = denoise(alpha * y, t).eps
        trace = _trace(eps, y, signs)
    return s * eps.detach(), -s * trace


def _trace(eps: State, y: State, signs: Signs | None) -> Float[Tensor, "B"]:
    """Of d eps / d y: the mean of v . J v over the probes v, or the sum over all axes."""
    dims = y[0].numel()
    axes = torch.eye(dims).to(y).view(dims, 1, *y.shape[1:]).expand(dims, *y.shape)
    vectors = axes if signs is None else signs
    products = [v * torch.autograd.grad(eps, y, v, retain_graph=True)[0] for v in vectors]
    total = torch.stack(products).flatten(2).sum((0, 2))
    return total if signs is None else total / len(signs)


def bits_per_dim(log_p: Float[Tensor, "B"], dims: int, cell: float = 1.0) -> Float[Tensor, "B"]:
    """-log2 of the density per dimension, for data counted in cells of this width: 2 / 256 for
    uniformly dequantized bytes in [-1, 1]."""
    return -(log_p / dims + math.log(cell)) / math.log(2)
