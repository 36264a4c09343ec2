"""Denoising diffusion probabilistic models, literally: the two Markov chains and the loss.

Read it with the paper open. The rest of the library generalizes these seven methods, and a test
shows that the general sampler reproduces this chain to 1e-10.

[1] Ho, Jain, Abbeel. Denoising Diffusion Probabilistic Models. 2020. arXiv:2006.11239
"""

from collections.abc import Callable, Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor

from minidiff.training.device import to_device

X = Float[Tensor, "B *dims"]
EpsModel = Callable[[Tensor, Tensor], Tensor]  # (x_t, t) -> the network's estimate of eps


class DDPM:
    """The forward chain adds noise in T small steps, the reverse chain learns to remove it.

    x_0 is data, x_T is noise: t runs from 0 (clean) to T. beta[t] is the variance of the step from
    t-1 to t, so beta[0] = 0 and alpha_bar[0] = 1. The paper's bare alpha_t is written 1 - beta_t.
    Coefficients are computed in float64 on the CPU and cast last, to x's dtype and device.
    """

    def __init__(self, T: int = 1000, beta_1: float = 1e-4, beta_T: float = 0.02):
        """Linear betas, [1] section 4."""
        self.T = T
        betas = torch.linspace(beta_1, beta_T, T, dtype=torch.float64)
        self.beta = torch.cat([torch.zeros(1, dtype=torch.float64), betas])
        self.alpha_bar = torch.cumprod(1 - self.beta, dim=0)

    def q_step(self, x: X, t: Int[Tensor, "B"], eps: X) -> X:  # eq: ddpm-2
        """One step, [1] eq. 2:  q(x_t | x_{t-1}) = N(sqrt(1 - beta_t) x_{t-1}, beta_t I)."""
        beta = self.beta[t.cpu()]
        return _like((1 - beta).sqrt(), x) * x + _like(beta.sqrt(), x) * eps

    def q_sample(self, x0: X, t: Int[Tensor, "B"], eps: X) -> X:  # eq: ddpm-4
        """t steps, [1] eq. 4:  q(x_t | x_0) = N(sqrt(alpha_bar_t) x_0, (1 - alpha_bar_t) I)."""
        alpha_bar = self.alpha_bar[t.cpu()]
        return _like(alpha_bar.sqrt(), x0) * x0 + _like((1 - alpha_bar).sqrt(), x0) * eps

    def q_posterior(self, x0: X, x_t: X, t: Int[Tensor, "B"]) -> tuple[X, Float[Tensor, "B *ones"]]:
        """Mean and variance of q(x_{t-1} | x_t, x_0), [1] eq. 6-7.

        The distribution of the previous, cleaner state of a chain that started at x_0.
        """
        t = t.cpu()  # eq: ddpm-6
        beta, alpha_bar, alpha_bar_prev = self.beta[t], self.alpha_bar[t], self.alpha_bar[t - 1]
        weight_x0 = alpha_bar_prev.sqrt() * beta / (1 - alpha_bar)  # eq: ddpm-7
        weight_x_t = (1 - beta).sqrt() * (1 - alpha_bar_prev) / (1 - alpha_bar)
        variance = (1 - alpha_bar_prev) / (1 - alpha_bar) * beta
        return _like(weight_x0, x_t) * x0 + _like(weight_x_t, x_t) * x_t, _like(variance, x_t)

    def predict_x0(self, x_t: X, t: Int[Tensor, "B"], eps: X) -> X:  # eq: ddpm-15
        """[1] eq. 15, solving eq. 4:  (x_t - sqrt(1 - alpha_bar_t) eps) / sqrt(alpha_bar_t)."""
        alpha_bar = self.alpha_bar[t.cpu()]
        return (x_t - _like((1 - alpha_bar).sqrt(), x_t) * eps) / _like(alpha_bar.sqrt(), x_t)

    def p_sample(self, model: EpsModel, x_t: X, t: Int[Tensor, "B"], z: X) -> X:  # eq: ddpm-11
        """One reverse step from t to t-1, [1] algorithm 2: the posterior for the estimated x_0.

        The variance is the posterior's (the paper's second choice, section 3.2). It is 0 at t = 1,
        so the last step adds no noise and needs no special case.
        """
        mean, variance = self.q_posterior(self.predict_x0(x_t, t, model(x_t, t)), x_t, t)
        return mean + variance.sqrt() * z

    @torch.no_grad()
    def p_sample_loop(
        self, model: EpsModel, x_T: X, generator: torch.Generator | None = None
    ) -> Iterator[X]:
        """The reverse chain, [1] algorithm 2: yields x_{T-1}, ..., x_0; the caller may stop early.

        The noise z is drawn on the generator's device, by default the CPU; a seed gives one chain.
        """
        x, device = x_T, generator.device if generator else "cpu"
        for time in range(self.T, 0, -1):  # eq: ddpm-1
            t = torch.full((len(x),), time, device=x.device)
            z = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=device)
            x = self.p_sample(model, x, t, z.to(x.device))
            yield x

    def simple_loss(  # eq: ddpm-12
        self, model: EpsModel, x0: X, t: Int[Tensor, "B"], eps: X
    ) -> Float[Tensor, "B"]:
        """The training loss of each example, [1] eq. 14 (mean over dims):

        || eps - eps_theta(sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps, t) ||^2
        """
        return (eps - model(self.q_sample(x0, t, eps), t)).pow(2).flatten(1).mean(1)  # eq: ddpm-14


def _like(coefficient: Float[Tensor, "B"], x: X) -> Float[Tensor, "B *ones"]:
    """One coefficient for each example, shaped to multiply x."""
    # The cast comes before the move: some devices have no float64.
    return to_device(coefficient.to(x.dtype), x.device).view(-1, *[1] * (x.ndim - 1))
