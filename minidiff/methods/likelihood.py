"""The likelihood that a denoiser gives to data, exactly: the probability-flow ODE from data to noise, and how it squeezes space, in this file.

Sampling without noise follows an ODE, and an ODE can be walked both ways: from a picture up to its noise, whose density is known. In y = x / alpha
and s = sigma / alpha every schedule's ODE is dy/ds = eps ([2] eq. 1), and along it d log p / ds = -div eps: the trace of its Jacobian. Here it is
walked in u = log s, with the classical Runge-Kutta method.

[1] Song et al. Score-Based Generative Modeling through Stochastic Differential Equations. 2021. arXiv:2011.13456
[2] Karras, Aittala, Aila, Laine. Elucidating the Design Space of Diffusion-Based Generative Models. 2022. arXiv:2206.00364
[3] Hutchinson. A Stochastic Estimator of the Trace of the Influence Matrix. 1989
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from minidiff.denoiser import Denoise
from minidiff.schedules import SIGMA_MAX, NoiseSchedule

State = Float[Tensor, "B *dims"]


def log_likelihood(
    denoise: Denoise,
    schedule: NoiseSchedule,
    x0: State,
    steps: int = 100,
    probes: int | None = None,
    generator: torch.Generator | None = None,
    between: tuple[float, float] = (0.002, SIGMA_MAX),
) -> Float[Tensor, "B"]:
    """log p(x0) in nats, [1] eq. 39. Four evaluations of the denoiser a step, and one pass backwards for each probe.

    probes: random signs that the trace is estimated with, unbiased ([3], [1] eq. 40), kept for the whole way; None takes every axis in turn: exact,
    and for few dimensions. between: the levels sigma / alpha that are walked; what is measured is the density of data blurred by the lower one,
    and at the upper one, or at the schedule's own end, data are taken to have mean 0 and variance 1. A mean m, in place of 0, costs about m over
    that level in nats. Compute in float64 if digits matter.
    """
    alpha, sigma = schedule.alpha_sigma(schedule.timesteps(1)[:1])
    low, high = math.log(between[0]), math.log(min(between[1], (sigma / alpha).item()))
    shape = (probes, *x0.shape)
    signs = (
        None if probes is None else (torch.randint(2, shape, generator=generator) * 2 - 1).to(x0)
    )

    def slope(u: float, y: State) -> tuple[State, Float[Tensor, "B"]]:
        """dy/du and d log p / du."""
        t = schedule.at_log_snr(torch.tensor([-2 * u], dtype=torch.float64)).expand(len(y))
        alpha, s = schedule.alpha_sigma(t)[0][0].item(), math.exp(u)
        with torch.enable_grad():
            y = y.detach().requires_grad_()
            eps = denoise(alpha * y, t).eps
            trace = _trace(eps, y, signs)
        return s * eps.detach(), -s * trace

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


def _trace(
    eps: State, y: State, signs: Float[Tensor, "probes B *dims"] | None
) -> Float[Tensor, "B"]:
    """Of d eps / d y, for each example: the mean of v . J v over the probes v, or the sum over all axes."""
    along = signs
    if along is None:
        dims = y[0].numel()
        along = torch.eye(dims).to(y).view(dims, 1, *y.shape[1:]).expand(dims, *y.shape)
    pulled = [torch.autograd.grad(eps, y, v, retain_graph=True)[0] for v in along]
    each = torch.stack(
        [(v * back).flatten(1).sum(1) for v, back in zip(along, pulled, strict=True)]
    )
    return each.sum(0) if signs is None else each.mean(0)


def bits_per_dim(log_p: Float[Tensor, "B"], dims: int, cell: float = 1.0) -> Float[Tensor, "B"]:
    """-log2 of the density per dimension, for data counted in cells of this width: 2 / 255 for bytes brought to [-1, 1], where it is the
    customary figure if the bytes were blurred evenly over their cells before."""
    return -(log_p / dims + math.log(cell)) / math.log(2)
