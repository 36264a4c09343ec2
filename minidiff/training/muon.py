"""Muon: a step along the gradient's singular directions, all of one length.

A weight matrix learns along few directions if its gradient's singular values differ by orders of
magnitude, as they mostly do. Muon takes the gradient's momentum G = U S V^T and steps along
about U V^T. A few products of matrices give that, without an SVD (Newton-Schulz iteration). What is
not a matrix (biases, norms) follows AdamW.

[1] Jordan et al. Muon: An optimizer for hidden layers in neural networks. 2024.
    https://kellerjordan.github.io/posts/muon
[2] Liu et al. Muon is Scalable for LLM Training. 2025. arXiv:2502.16982
"""

from collections import defaultdict
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

A, B, C = 3.4445, -4.7750, 2.0315  # [1]: x -> A x + B x^3 + C x^5, five times, takes (0, 1] to ~1
ITERATIONS = 5
RMS = 0.2  # the update's root mean square, about that of AdamW's ([2] section 2.2)


def orthogonal(matrices: Float[Tensor, "n r c"]) -> Float[Tensor, "n r c"]:
    """About U V^T of each G = U S V^T: its singular values go through the polynomial of [1].

    X <- (A I + B X X^T + C (X X^T)^2) X = P X. The factors P commute, being polynomials of one
    Gram matrix, so only that small matrix is iterated, and X is multiplied once.
    """
    x = matrices / (matrices.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    if tall := x.shape[-2] > x.shape[-1]:
        x = x.mT
    gram = x @ x.mT
    identity = torch.eye(len(gram[0]), dtype=x.dtype, device=x.device)
    product = factor = A * identity + B * gram + C * (gram @ gram)
    for _ in range(ITERATIONS - 1):
        gram = factor @ gram @ factor
        factor = A * identity + B * gram + C * (gram @ gram)
        product = factor @ product
    x = product @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Muon for tensors of two dimensions and more (a convolution is a matrix, its output channels
    by all the rest), Adam for the others, at one learning rate."""

    def __init__(self, groups: list[dict[str, Any]], lr: float, betas: tuple[float, float]):
        """groups: matrices apart from the rest, as optimizers.grouped makes them. betas: Adam's;
        the first is Muon's momentum as well."""
        super().__init__(groups, {"lr": lr, "betas": betas, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            alike = defaultdict(list)  # matrices of one shape are computed together
            for p in group["params"]:
                if p.grad is not None:
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    alike[p.flatten(1).shape if p.ndim > 1 else None].append(p)
            for shape, parameters in alike.items():
                step = self._adam if shape is None else self._muon
                for p, update in zip(parameters, step(parameters, *group["betas"]), strict=True):
                    p.add_(update.view_as(p), alpha=-group["lr"])

    def _muon(self, parameters: list[Tensor], momentum: float, _: float) -> Tensor:
        """The update of matrices of one shape."""
        nesterov = []
        for p in parameters:
            mean = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
            mean.lerp_(p.grad, 1 - momentum)
            nesterov.append(p.grad.lerp(mean, momentum).flatten(1))
        update = orthogonal(torch.stack(nesterov))
        return update * RMS * max(update.shape[1:]) ** 0.5

    def _adam(self, parameters: list[Tensor], beta1: float, beta2: float) -> list[Tensor]:
        updates = []
        for p in parameters:
            state = self.state[p]
            if not state:
                state["step"] = torch.zeros(())
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
            state["step"] += 1
            mean = state["exp_avg"].lerp_(p.grad, 1 - beta1)
            square = state["exp_avg_sq"].lerp_(p.grad.square(), 1 - beta2)
            k = state["step"].item()
            unbiased = (square / (1 - beta2**k)).sqrt() + 1e-8
            updates.append(mean / (1 - beta1**k) / unbiased)
        return updates
