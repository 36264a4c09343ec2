"""Data with exact denoiser, score, loss and likelihood: Gaussians, their mixtures, small data sets.

All three are one class, because a mixture of Gaussians with noise is a mixture of Gaussians:
x_t = alpha_t x0 + sigma_t eps has the means alpha_t mean_k and variances alpha_t^2 std_k^2 +
sigma_t^2. One component is a Gaussian; components of no width are a data set, whose ideal denoiser
is a softmax over its items.

[1] Karras, Aittala, Aila, Laine. Elucidating the Design Space of Diffusion-Based Generative Models.
    2022. arXiv:2206.00364
[2] Efron. Tweedie's Formula and Selection Bias. 2011. JASA 106
"""

import math
from functools import partial

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from minidiff.denoiser import Denoise, Prediction
from minidiff.schedules import NoiseSchedule

Points = Float[Tensor, "B *dims"]
Times = Shaped[Tensor, "B"]


class Mixture:
    """sum_k weight_k N(mean_k, diag(std_k^2)), over points of any shape. Computes in float64 on the
    CPU; results have the dtype of the points."""

    def __init__(
        self,
        means: Float[Tensor, "K *dims"],
        std: float | Float[Tensor, "..."] = 0.0,
        weights: Float[Tensor, "K"] | None = None,
    ):
        """std: broadcast with means; 0 makes the means a data set. weights: ratios."""
        self.shape = means.shape[1:]
        self.means = means.double().flatten(1)
        self.std = torch.as_tensor(std, dtype=torch.float64).expand(means.shape).flatten(1)
        weights = torch.ones(len(means)) if weights is None else weights
        self.weights = weights.double() / weights.double().sum()

    def draw(self, n: int, generator: torch.Generator | None = None) -> Float[Tensor, "n *dims"]:
        """n points of the data, in float64."""
        which = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        eps = torch.randn(n, self.means.shape[1], generator=generator, dtype=torch.float64)
        return (self.means[which] + self.std[which] * eps).unflatten(1, self.shape)

    def _parts(
        self, x: Points, alpha: Float[Tensor, "B"], sigma: Float[Tensor, "B"]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """log(weight_k p_k(x)) (B, K), and mean and variance of x0 given x and k (B, K, D)."""
        alpha, sigma = alpha.view(-1, 1, 1), sigma.view(-1, 1, 1)
        spread = (alpha * self.std) ** 2 + sigma**2  # variance of x about alpha mean
        away = x.double().flatten(1)[:, None] - alpha * self.means
        log_density = -(away**2 / spread + (2 * math.pi * spread).log()).sum(-1) / 2
        mean = self.means + alpha * self.std**2 / spread * away
        return self.weights.log() + log_density, mean, (self.std * sigma) ** 2 / spread

    def denoiser(self, schedule: NoiseSchedule) -> Denoise:
        """The exact one: (x, t) -> x0 = E[x0 | x_t], and eps to match ([1] appendix B.3)."""
        return partial(self._denoise, schedule)

    def _denoise(self, schedule: NoiseSchedule, x: Points, t: Times) -> Prediction:
        """Each component's posterior mean, weighted by the probability that x_t came from it."""
        alpha, sigma = schedule.alpha_sigma(t)
        log_share, mean, _ = self._parts(x, alpha, sigma)
        x0 = (log_share.softmax(1)[..., None] * mean).sum(1).unflatten(1, self.shape)
        alpha, sigma = (scale.view(-1, *[1] * len(self.shape)) for scale in (alpha, sigma))
        return Prediction(x0.to(x), ((x - alpha * x0) / sigma).to(x))

    def score(self, schedule: NoiseSchedule, x: Points, t: Times) -> Points:
        """The gradient of log p_t at x: -eps / sigma_t (Tweedie's formula, [2])."""
        sigma = schedule.alpha_sigma(t)[1].view(-1, *[1] * len(self.shape))
        return -self.denoiser(schedule)(x, t).eps / sigma.to(x)  # eq: efron-tweedie

    def log_likelihood(
        self, x: Points, schedule: NoiseSchedule | None = None, t: Times | None = None
    ) -> Float[Tensor, "B"]:
        """log p(x) in nats, of clean data, or of x_t at time t of a schedule."""
        ones = torch.ones(len(x), dtype=torch.float64)
        alpha, sigma = (ones, 0 * ones) if schedule is None else schedule.alpha_sigma(t)
        return self._parts(x, alpha, sigma)[0].logsumexp(1).to(x.dtype)

    def posterior_variance(
        self, schedule: NoiseSchedule, x: Points, t: Times
    ) -> Float[Tensor, "B"]:
        """E[|x0 - E[x0 | x_t]|^2 | x_t], mean over dims: the least squared error at x_t."""
        log_share, mean, variance = self._parts(x, *schedule.alpha_sigma(t))
        share = log_share.softmax(1)[..., None]
        about = mean - (share * mean).sum(1, keepdim=True)
        return (share * (variance + about**2)).sum(1).mean(1).to(x.dtype)

    def optimal_loss(
        self,
        schedule: NoiseSchedule,
        t: Shaped[Tensor, ""],
        n: int = 4096,
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, ""]:
        """E|x0 - E[x0 | x_t]|^2, mean over dims: the least loss at t, for the weighting "x0"; the
        mean over n draws of x_t. For one Gaussian: std^2 sigma^2 / (alpha^2 std^2 + sigma^2)."""
        alpha, sigma = schedule.alpha_sigma(t)
        x0 = self.draw(n, generator)
        x = alpha * x0 + sigma * torch.randn(x0.shape, generator=generator, dtype=torch.float64)
        return self.posterior_variance(schedule, x, t.expand(n)).mean()
