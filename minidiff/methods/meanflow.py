"""MeanFlow: a network learns the average velocity of a walk and draws in one step, with no teacher.

On a flow, x_t = (1 - t) x0 + t eps, a walk leads from x_t to x_r by its average velocity alone:

    x_r = x_t - (t - r) u(x_t, r, t),        u(x_t, r, t) = 1 / (t - r) (integral of v from r to t)

Nobody knows u, but its derivative along the walk is known, so u can be trained by an identity:

    u = v - (t - r) du/dt

    model = MeanFlow(Denoiser(network, Flow(mean=-0.4), target="flow"))

    def loss(batch):
        x0, context = batch
        (r, t), eps = two_times(model.schedule, len(x0)), torch.randn_like(x0)
        x, v = model.schedule.mix(x0, eps, t), eps - x0
        return {"loss": meanflow_loss(model.velocity, x, r, t, v, context)}

    *_, last = sample(partial(model, context=context), model.schedule, x_T, 1, meanflow())

[1] Geng, Deng, Bai, Kolter, He. Mean Flows for One-step Generative Modeling. 2025.
    arXiv:2505.13447
[2] Geng, Lu, Wu, Shechtman, Kolter, He. Improved Mean Flows: On the Challenges of Fastforward
    Generative Models. 2025. arXiv:2512.02012
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from minidiff.condition import Condition, Context
from minidiff.denoiser import Denoiser, Prediction
from minidiff.errors import UserError
from minidiff.layers import timestep_embedding
from minidiff.schedules import Flow, per_example
from minidiff.steps import Step
from minidiff.training.device import to_device

X, Times, Losses = Float[Tensor, "B *dims"], Shaped[Tensor, "B"], Float[Tensor, "B"]
Velocity = Callable[..., Tensor]  # u(x, r, t, context), or u(x, r, t) where there is no context


class MeanFlow(nn.Module):
    """A denoiser that is shown two times: t as ever, and t - r as one more vector of its context
    ([2] conditions in the context, too). So any network with a context will do, unchanged.

    The new layers start at zero: the vector is 0 at first, whatever t - r.
    """

    def __init__(self, denoiser: Denoiser, width: int = 64):
        """denoiser: on a Flow; any target. width: of the waves that t - r is shown as."""
        super().__init__()
        if not isinstance(denoiser.schedule, Flow):
            raise UserError("MeanFlow needs the schedule Flow, whose velocity is eps - x0.")
        dim = getattr(denoiser.network, "context_dim", None)
        if dim is None:
            raise UserError("MeanFlow needs a network with a context_dim: t - r is a vector of it.")
        self.denoiser, self.width = denoiser, width
        self.span = nn.Sequential(nn.Linear(width, dim), nn.SiLU(), nn.Linear(dim, dim))
        nn.init.zeros_(self.span[2].weight)
        nn.init.zeros_(self.span[2].bias)

    @property
    def schedule(self) -> Flow:
        return self.denoiser.schedule

    def forward(
        self, x: X, t: Times, r: Times | None = None, context: Context | None = None
    ) -> Prediction:
        """x0 and eps at the ends of the straight line through x_t and x_r.

        Default: r = t, the ordinary prediction, with which every sampler works.
        """
        if isinstance(context, Condition):
            raise UserError("MeanFlow adds a vector to a context tensor, and this is a Condition.")
        span = to_device(torch.zeros_like(t) if r is None else t - r, x.device)
        # slow waves, at most 10 radians: du/dt multiplies a wave by its frequency
        waves = timestep_embedding(10 * span, self.width, max_period=100)
        vector = self.span(waves.to(self.span[0].weight.dtype))[:, None]
        context = vector if context is None else torch.cat([context, vector], dim=1)
        return self.denoiser(x, t, context)

    def velocity(self, x: X, r: Times, t: Times, context: Context | None = None) -> X:
        """u(x_t, r, t), which is eps - x0; at r = t it is v."""
        x0, eps = self(x, t, r, context)
        return eps - x0


def two_times(
    schedule: Flow, batch: int, equal: float = 0.5, generator: torch.Generator | None = None
) -> tuple[Times, Times]:
    """Random r <= t to train on, [1] section 4.3: two draws of sample_t, sorted; r = t for the
    first `equal` of the batch, which learns v. [1] uses Flow(mean=-0.4) and 0.75."""
    draws = [schedule.sample_t(batch, generator) for _ in range(2)]
    r, t = torch.minimum(*draws), torch.maximum(*draws)
    return torch.where(torch.arange(batch) < round(equal * batch), t, r), t


def total_derivative(u: Velocity, x: X, r: Times, t: Times, v: X) -> X:
    """du/dt along the walk, [1] eq. 8: v du/dx + du/dt at a fixed r, by one forward-mode product.

    Fused attention has no forward mode, so the plain one is named.
    """
    tangents = v, torch.zeros_like(r), torch.ones_like(t)
    with sdpa_kernel(SDPBackend.MATH):
        return torch.func.jvp(u, (x, r, t), tangents)[1]  # eq: meanflow-8


@torch.no_grad()
def meanflow_target(
    u: Velocity,
    x: X,
    r: Times,
    t: Times,
    v: X,
    context: Context | None = None,
    tangent: X | None = None,
) -> X:
    """v - (t - r) du/dt, [1] eq. 6: what u(x, r, t) is to be. Where r = t it is v, at no cost.

    v: eps - x0, or any velocity with the same mean. tangent: the direction of du/dt. Default: v, as
    in [1]; the network's own velocity, u(x, t, t), as in [2] eq. 12, which x alone decides.
    """
    apart = r < t
    if not apart.any():
        return v
    along = v if tangent is None else tangent
    own = partial(u, context=context[apart]) if context is not None else u
    rate = torch.zeros_like(v)
    rate[apart] = total_derivative(own, x[apart], r[apart], t[apart], along[apart])
    return v - per_example(t - r, v) * rate  # eq: meanflow-6, imf-12


def meanflow_loss(
    u: Velocity,
    x: X,
    r: Times,
    t: Times,
    v: X,
    context: Context | None = None,
    tangent: X | None = None,
    power: float = 1.0,
) -> Losses:
    """The squared distance of u(x, r, t) from its target, each divided by its own size.

    power: of [1]'s adaptive weighting; 0 is off. Arguments as in meanflow_target.
    """
    own = u if context is None else partial(u, context=context)
    error = own(x, r, t) - meanflow_target(u, x, r, t, v, context, tangent)
    return adaptive(error.pow(2).flatten(1).sum(1), power)


def adaptive(squared: Losses, power: float = 1.0, floor: float = 1e-3) -> Losses:
    """w d, w = 1 / (d + floor)^power without gradient, for squared distances d ([1] section 4.3).

    At power 1 every example weighs about the same. The minimum is then no longer quite the mean of
    the targets: little in many dimensions, where all distances are alike; much in two.
    """
    return squared / (squared.detach() + floor) ** power  # eq: meanflow-weight


def guided_velocity(v: X, own: X, null: X, scale: float, kappa: float = 0.0) -> X:
    """The velocity to train on for a network that needs no guidance later ([1] section 4.2).

    own, null: u(x, t, t) with the condition and without. The network then learns
    null + scale (v - null) for every kappa below 1, which says how much of it is its own word.
    """
    omega = (1 - kappa) * scale
    return omega * v + kappa * own + (1 - omega - kappa) * null  # eq: meanflow-cfg


@dataclass(frozen=True)
class MeanFlowStep(Step):
    """x_s = x_t - (t - s) u(x_t, s, t): one step from noise to data, or more.

    denoise is called with the next time too: denoise(x, t, s).
    """

    spacing = "trailing"

    def __call__(self, denoise, schedule, x, t, s, noise, memory=None):
        x0, eps = denoise(x, t.expand(len(x)), s.expand(len(x)))
        return schedule.mix(x0, eps, s), x0, None  # eq: meanflow-sampling


meanflow = MeanFlowStep
