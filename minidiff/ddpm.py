"""Denoising diffusion probabilistic models, literally: both Markov chains and the loss of the paper are all in this file.

Read it with the paper open. The rest of the library is one generalization of these six methods, and a test shows that the
general sampler reproduces this chain to 1e-10.

[1] Ho, Jain, Abbeel. Denoising Diffusion Probabilistic Models. 2020. arXiv:2006.11239
"""

from collections.abc import Callable, Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor

EpsModel = Callable[
    [Tensor, Tensor], Tensor
]  # (x_t, t) -> the network's estimate of eps, shaped as x_t


class DDPM:
    """The forward chain adds noise in T small steps, the reverse chain learns to take it away; x_0 is data, x_T is noise.

    Time runs from 0 (clean) to T: beta[t] is the variance of the step from t-1 to t, so beta[0] = 0 and alpha_bar[0] = 1.
    The paper's bare alpha_t is always written 1 - beta_t here. Tables are float64 on the CPU; results have x's dtype and device.
    """

    def __init__(self, T: int = 1000, beta_1: float = 1e-4, beta_T: float = 0.02):
        """Linear betas, [1] section 4."""
        self.T = T
        self.beta = torch.cat(
            [
                torch.zeros(1, dtype=torch.float64),
                torch.linspace(beta_1, beta_T, T, dtype=torch.float64),
            ]
        )
        self.alpha_bar = torch.cumprod(1 - self.beta, dim=0)

    def _at(self, table: Float[Tensor, "T1"], t: Int[Tensor, "B"], x: Tensor) -> Tensor:
        """table[t], ready to be multiplied with x."""
        return table[t.cpu()].view(-1, *[1] * (x.ndim - 1)).to(x)

    def q_step(
        self, x: Float[Tensor, "B *dims"], t: Int[Tensor, "B"], eps: Float[Tensor, "B *dims"]
    ) -> Float[Tensor, "B *dims"]:
        """One forward step from t-1 to t, [1] eq. 2:  q(x_t | x_{t-1}) = N(sqrt(1 - beta_t) x_{t-1}, beta_t I)."""
        beta = self._at(self.beta, t, x)
        return (1 - beta).sqrt() * x + beta.sqrt() * eps

    def q_sample(
        self, x0: Float[Tensor, "B *dims"], t: Int[Tensor, "B"], eps: Float[Tensor, "B *dims"]
    ) -> Float[Tensor, "B *dims"]:
        """Take t forward steps at once, [1] eq. 4:  q(x_t | x_0) = N(sqrt(alpha_bar_t) x_0, (1 - alpha_bar_t) I)."""
        alpha_bar = self._at(self.alpha_bar, t, x0)
        return alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * eps

    def q_posterior(
        self, x0: Float[Tensor, "B *dims"], x_t: Float[Tensor, "B *dims"], t: Int[Tensor, "B"]
    ) -> tuple[Float[Tensor, "B *dims"], Float[Tensor, "B *ones"]]:
        """Mean and variance of q(x_{t-1} | x_t, x_0), [1] eq. 6-7: where the chain was one step ago, had it started at x_0."""
        beta, alpha_bar, alpha_bar_before = (
            self._at(table, time, x_t)
            for table, time in ((self.beta, t), (self.alpha_bar, t), (self.alpha_bar, t - 1))
        )
        mean = (
            alpha_bar_before.sqrt() * beta * x0 + (1 - beta).sqrt() * (1 - alpha_bar_before) * x_t
        ) / (1 - alpha_bar)
        variance = (1 - alpha_bar_before) / (1 - alpha_bar) * beta
        return mean, variance

    def predict_x0(
        self, x_t: Float[Tensor, "B *dims"], t: Int[Tensor, "B"], eps: Float[Tensor, "B *dims"]
    ) -> Float[Tensor, "B *dims"]:
        """Equation 4 solved for x_0, [1] eq. 15:  x_0 = (x_t - sqrt(1 - alpha_bar_t) eps) / sqrt(alpha_bar_t)."""
        alpha_bar = self._at(self.alpha_bar, t, x_t)
        return (x_t - (1 - alpha_bar).sqrt() * eps) / alpha_bar.sqrt()

    def p_sample(
        self,
        model: EpsModel,
        x_t: Float[Tensor, "B *dims"],
        t: Int[Tensor, "B"],
        z: Float[Tensor, "B *dims"],
    ) -> Float[Tensor, "B *dims"]:
        """One reverse step from t to t-1, [1] algorithm 2: the posterior, with x_0 replaced by the model's guess of it.

        The variance is the posterior's (the paper's second choice, section 3.2). It is 0 at t = 1, so the last step adds no
        noise without having to be told.
        """
        mean, variance = self.q_posterior(self.predict_x0(x_t, t, model(x_t, t)), x_t, t)
        return mean + variance.sqrt() * z

    @torch.no_grad()
    def p_sample_loop(
        self,
        model: EpsModel,
        x_T: Float[Tensor, "B *dims"],
        generator: torch.Generator | None = None,
    ) -> Iterator[Float[Tensor, "B *dims"]]:
        """The reverse chain, [1] algorithm 2: yields x_{T-1}, ..., x_0. The caller plots, logs, or stops early."""
        x = x_T
        for time in range(self.T, 0, -1):
            t = torch.full((len(x),), time)
            z = torch.randn(x.shape, generator=generator, dtype=x.dtype).to(
                x.device
            )  # drawn on the CPU: one seed, one picture
            x = self.p_sample(model, x, t, z)
            yield x

    def simple_loss(
        self,
        model: EpsModel,
        x0: Float[Tensor, "B *dims"],
        t: Int[Tensor, "B"],
        eps: Float[Tensor, "B *dims"],
    ) -> Float[Tensor, "B"]:
        """[1] eq. 14, per example:  || eps - eps_theta(sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps, t) ||^2 (mean over dims)."""
        return (eps - model(self.q_sample(x0, t, eps), t)).pow(2).flatten(1).mean(1)
