"""What must hold of the library's functions, by the papers. The library's tests run these checks
on its own functions, and the exercises run them on a learner's.

A check takes no argument that it must be given, says in its first line what must hold, and raises
an AssertionError.
"""

import math
from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minidiff import schedules
from minidiff.ddpm import DDPM
from minidiff.denoiser import Denoiser, Prediction
from minidiff.evaluation.metrics import Moments, frechet
from minidiff.exercises.models import (
    Linear,
    Toy,
    oracle,
    randomize,
    tiny_model,
    tiny_text,
    tiny_vae,
)
from minidiff.finetuning.groups import Batch, GroupLoss, Part
from minidiff.guidance import guide
from minidiff.latent_diffusion import LatentDiffusion
from minidiff.layers import GEGLU, Attention, timestep_embedding
from minidiff.methods import inversion, lora
from minidiff.methods.exact import Mixture
from minidiff.samplers import ddim, dpmpp_2m, sample
from minidiff.text import CLIPText, TextConfig
from minidiff.train import EMA

EXACT = 1e-10  # float64 algebra over a thousand steps
DOUBLE = {"rtol": 0, "atol": 1e-12}  # a few hundred roundings in float64


def _normal(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


# Chains and schedules.


def forward_chain_composed_equals_closed_form():
    """Composing the linear-Gaussian steps of eq. 2 gives eq. 4's mean factor and variance at every
    t."""
    chain = DDPM(T=1000)
    one, zero = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
    factor, variance = one, zero
    for time in range(1, 1001):
        t = torch.tensor([time])
        factor = chain.q_step(factor, t, zero)
        variance = chain.q_step(zero, t, one) ** 2 + chain.q_step(one, t, zero) ** 2 * variance
        assert torch.allclose(factor, chain.q_sample(one, t, zero), atol=EXACT, rtol=0)
        assert torch.allclose(variance, chain.q_sample(zero, t, one) ** 2, atol=EXACT, rtol=0)


def posterior_is_bayes():
    """q(x_{t-1} | x_t, x_0) is the product of two Gaussians in x_{t-1}: precisions add, means weigh
    by precision."""
    for time in (1, 2, 500, 1000):
        chain, t, x0, x_t = DDPM(), torch.tensor([time]), _normal(1, 5), _normal(1, 5)
        mean, variance = chain.q_posterior(x0, x_t, t)
        beta, before = chain.beta[time], chain.alpha_bar[time - 1]
        if time == 1:  # the prior is a point: x_0 itself
            assert torch.allclose(mean, x0, atol=EXACT, rtol=0) and variance.item() == 0
            continue
        # precisions of q(x_{t-1} | x_0) and of q(x_t | x_{t-1}) as a function of x_{t-1}
        prior, likelihood = 1 / (1 - before), (1 - beta) / beta
        both = prior + likelihood
        expected = (prior * before.sqrt() * x0 + likelihood * x_t / (1 - beta).sqrt()) / both
        assert torch.allclose(mean, expected, atol=EXACT, rtol=0)
        assert torch.allclose(variance, 1 / both, atol=EXACT, rtol=0)


def last_step_adds_no_noise():
    """At t = 1 the result does not depend on z."""
    chain, t = DDPM(), torch.ones(2, dtype=torch.long)
    x = torch.randn(2, 3)
    silent = chain.p_sample(Toy(), x, t, torch.zeros_like(x))
    assert torch.equal(chain.p_sample(Toy(), x, t, torch.randn_like(x)), silent)


def predict_x0_inverts_q_sample():
    """x_0 goes through q_sample and comes back."""
    chain, t = DDPM(), torch.tensor([1, 500, 1000])
    x0, eps = _normal(3, 4), _normal(3, 4)
    back = chain.predict_x0(chain.q_sample(x0, t, eps), t, eps)
    assert torch.allclose(back, x0, atol=EXACT, rtol=0)


def simple_loss_of_the_true_noise_is_zero():
    """A model that answers eps has no loss; one that is wrong by 2 everywhere has 4."""
    chain, t = DDPM(), torch.randint(1, 1001, (4,))
    x0, eps = torch.randn(4, 3, 8, 8), torch.randn(4, 3, 8, 8)
    assert torch.equal(chain.simple_loss(lambda x, t: eps, x0, t, eps), torch.zeros(4))
    by_two = chain.simple_loss(lambda x, t: eps + 2, x0, t, eps)
    assert torch.allclose(by_two, torch.full((4,), 4.0), rtol=1e-6, atol=0)  # fp32


def curve(formula: Callable[[float], float]) -> Tensor:
    """A formula's values at t / 1000."""
    return torch.tensor([formula(t / 1000) for t in range(1001)], dtype=torch.float64)


def _cosine(u: float) -> float:
    return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2


def cosine_formula():
    """Nichol & Dhariwal 2021, eq. 17: f(u)/f(0) with f(u) = cos^2((u + s)/(1 + s) pi/2). The very
    last beta is capped at 0.999."""
    expected = curve(lambda u: _cosine(u) / _cosine(0))
    found = schedules.cosine().alpha_bar
    torch.testing.assert_close(found[:-1], expected[:-1], rtol=0, atol=1e-12)
    torch.testing.assert_close(found[-1], found[-2] * 0.001, rtol=1e-12, atol=0)


def timesteps_are_the_nearest_integers_for_every_number_of_steps():
    """For every number of steps, trailing and linspace are the nearest whole times, and all times
    decrease from at most T to 0."""
    # In integer arithmetic, so exact; a tie may go either way. (diffusers' trailing grid has a time
    # too many for 61, 103, ... steps.)
    T = 1000
    for steps in range(1, T + 1):
        trailing = schedules.linear().timesteps(steps).tolist()
        assert len(trailing) == steps + 1
        assert all(2 * abs(t * steps - T * (steps - i)) <= steps for i, t in enumerate(trailing))
        linspace = schedules.linear().timesteps(steps, "linspace").tolist()
        assert all(
            2 * abs((t - 1) * (steps - 1) - (T - 1) * (steps - 1 - i)) <= steps - 1
            for i, t in enumerate(linspace[:-1])
        )
        for times in (trailing, linspace, schedules.linear().timesteps(steps, "leading").tolist()):
            assert times[-1] == 0 and times[0] <= T and all(a > b for a, b in pairwise(times))


# Targets, weights, guidance and steps.


def row_gives_back_x0_and_eps(target: str = "v", schedule: schedules.NoiseSchedule | None = None):
    """What the network answers exactly, the 2x2 solve turns back into x0 and eps."""
    x0, eps, schedule = _normal(5, 7), _normal(5, 7), schedule or schedules.cosine()
    t = schedule.sample_t(5, torch.Generator().manual_seed(0))
    denoiser, x = oracle(target, schedule, x0, eps, t)
    found = denoiser(x, t)
    assert torch.allclose(found.x0, x0, atol=1e-10, rtol=0)
    assert torch.allclose(found.eps, eps, atol=1e-10, rtol=0)


def min_snr_published_forms():
    """Hang et al.: min(SNR, 5)/SNR for eps, min(SNR, 5) for x0, min(SNR, 5)/(SNR + 1) for v, each
    on the target's own squared error."""
    schedule, t = schedules.linear(), torch.tensor([1, 50, 400, 1000])
    snr = schedule.snr(t)
    for target, own in (
        ("eps", snr.clamp(max=5) / snr),
        ("x0", snr.clamp(max=5)),
        ("v", snr.clamp(max=5) / (snr + 1)),
    ):
        x0, eps, error = (_normal(4, 9) for _ in range(3))
        denoiser, _ = oracle(target, schedule, x0, eps, t, error=error)
        denoiser.weighting = "min-snr"
        assert torch.allclose(
            denoiser.loss(x0, t=t, eps=eps), own * error.pow(2).mean(1), rtol=1e-8, atol=0
        )


def guidance_formula_and_special_scales():
    """Scale 1 is the prediction with the text, scale 0 that without, 7.5 goes on along the line
    through both."""
    denoiser = Denoiser(Linear(), schedules.linear(), "eps")
    x, t = torch.randn(2, 3), torch.tensor([10, 900])
    context, null = torch.ones(2, 1, 4), torch.zeros(2, 1, 4)
    with_text, without = denoiser(x, t, context), denoiser(x, t, null)
    assert isinstance(with_text, Prediction)
    for scale, expected in (
        (1, with_text.eps),
        (0, without.eps),
        (7.5, without.eps + 7.5 * (with_text.eps - without.eps)),
    ):
        found = guide(denoiser, context, null, scale)(x, t).eps
        assert torch.allclose(found, expected, atol=1e-5, rtol=0)  # fp32


def ddim_step_equals_the_paper(eta: float = 0.3):
    """DDIM eq. 12 and 16, with the paper's alpha (= alpha_bar here)."""
    schedule, (z, x, x0, eps) = schedules.linear(), (_normal(2, 3) for _ in range(4))
    for t, s in pairwise(schedule.timesteps(10)):
        a_t, a_s = schedule.alpha_bar[t], schedule.alpha_bar[s]
        sigma = eta * ((1 - a_s) / (1 - a_t)).sqrt() * (1 - a_t / a_s).sqrt()
        expected = a_s.sqrt() * x0 + (1 - a_s - sigma**2).sqrt() * eps + sigma * z
        found = ddim(eta)(lambda *_: Prediction(x0, eps), schedule, x, t, s, lambda _: z)[0]
        torch.testing.assert_close(found, expected, **DOUBLE)


def dpmpp_2m_is_of_second_order():
    """Twice the steps, a quarter of the error: on data N(0, 0.5^2), whose x_t only shrinks with its
    standard deviation."""
    schedule, errors, x = schedules.Karras(), [], torch.ones(1, 1, dtype=torch.float64)
    denoise = Mixture(torch.zeros(1, 1), 0.5).denoiser(schedule)
    for steps in (40, 80):
        *chain, _ = sample(denoise, schedule, x, schedule.timesteps(steps, "log-snr"), dpmpp_2m())
        exact = (0.25 + chain[-1].t ** 2) ** 0.5 / (0.25 + chain[0].t ** 2) ** 0.5
        errors.append(abs(chain[-1].x.item() - exact))
    assert 3.3 < errors[0] / errors[1] < 4.7


# Networks.


def timestep_embedding_formula():
    """[cos(t f_i), sin(t f_i)] with f_i = 10000^(-i / half), i = 0 .. half - 1."""
    t = torch.tensor([0.0, 3.0, 999.0], dtype=torch.float64)
    angles = [[time * 10_000 ** (-i / 5) for i in range(5)] for time in t.tolist()]
    rows = [[f(a) for f in (math.cos, math.sin) for a in row] for row in angles]
    expected = torch.tensor(rows, dtype=torch.float64)
    torch.testing.assert_close(timestep_embedding(t, 10), expected, **DOUBLE)
    # fp32 and whole numbers: t = 999 has an error of 3e-5 of its own
    whole = timestep_embedding(t.long(), 10).double()
    torch.testing.assert_close(whole, expected, rtol=0, atol=2e-4)
    # sines of large numbers are never computed in bfloat16
    assert timestep_embedding(t.bfloat16(), 10).dtype == torch.float32


def attention_equals_its_formula(heads: int = 3, causal: bool = True, cross: bool = False):
    """softmax(Q K^T / sqrt(d)) V for every head, Vaswani et al. eq. 1."""
    dim, d = 12, 12 // heads
    layer = randomize(Attention(dim, heads, context_dim=7 if cross else None, bias=True)).double()
    x, context = _normal(2, 5, dim), _normal(2, 4, 7) if cross else None
    source, out = x if context is None else context, []
    for h in range(heads):
        rows = slice(h * d, (h + 1) * d)
        q, k, v = (
            F.linear(s, p.weight[rows], p.bias[rows])
            for s, p in ((x, layer.q), (source, layer.k), (source, layer.v))
        )
        scores = q @ k.mT / math.sqrt(d)
        if causal:
            scores = scores.masked_fill(torch.ones(5, 5).triu(1).bool(), -math.inf)
        out.append(scores.softmax(-1) @ v)
    expected = layer.out(torch.cat(out, dim=-1))
    torch.testing.assert_close(layer(x, context, causal=causal), expected, **DOUBLE)


def geglu_formula():
    """The value comes first, then the gate, through the exact gelu x Phi(x)."""
    layer, x = GEGLU(6).double(), _normal(2, 3, 6)
    value, gate = layer.up(x)[..., :24], layer.up(x)[..., 24:]
    expected = layer.down(value * gate * 0.5 * (1 + torch.erf(gate / math.sqrt(2))))
    torch.testing.assert_close(layer(x), expected, **DOUBLE)


@torch.no_grad()
def vae_shapes_and_latent_scale():
    """encode gives the scaled mean, or a sample of the posterior; what it multiplies, decode
    divides."""
    vae = randomize(tiny_vae(latent_scale=0.25)).double()
    images, noise = _normal(2, 3, 16, 24), _normal(2, 4, 4, 6)
    mean, log_variance = vae.posterior(images)
    assert vae.factor == 4 and mean.shape == log_variance.shape == (2, 4, 4, 6)
    torch.testing.assert_close(vae.encode(images), 0.25 * mean, **DOUBLE)
    sampled = 0.25 * (mean + (log_variance / 2).exp() * noise)
    torch.testing.assert_close(vae.encode(images, noise), sampled, **DOUBLE)
    pictures = vae.decode(mean * 0.25)
    assert pictures.shape == images.shape
    vae.latent_scale.fill_(2.0)  # whatever the scale, what encode multiplies decode divides
    torch.testing.assert_close(vae.decode(vae.encode(images)), pictures, rtol=1e-12, atol=1e-12)


def vae_loss_equals_its_formula():
    """Mean absolute error of a posterior sample, plus kl_weight times torch's own KL(q(z|x) || N(0,
    I)), summed over the latent."""
    vae, images = randomize(tiny_vae(kl_weight=0.01)).double(), _normal(2, 3, 8, 8)
    mean, log_variance = vae.posterior(images)
    q = torch.distributions.Normal(mean, (log_variance / 2).exp())
    p = torch.distributions.Normal(torch.zeros_like(mean), torch.ones_like(mean))
    torch.manual_seed(5)
    found = vae.loss(images)
    torch.manual_seed(5)
    z = q.mean + q.stddev * torch.randn_like(mean)
    error = (vae.decode(z * vae.latent_scale) - images).abs().mean(dim=(1, 2, 3))
    kl = torch.distributions.kl_divergence(q, p).sum(dim=(1, 2, 3))
    torch.testing.assert_close(found, error + 0.01 * kl, rtol=1e-12, atol=0)


@torch.no_grad()
def a_later_word_never_changes_an_earlier_vector():
    """A word changes its own vector and those after it, and none before it."""
    # "a small" are tokens 1 and 2; token 3 differs
    a, b = tiny_text().double().encode(["a small red square", "a small blue square"])
    # float64; exactly equal, if the matrix product treats all rows alike
    assert (a - b)[:3].abs().max() < 1e-12
    assert (a - b)[3:].abs().amax(1).min() > 1e-4  # every vector from there on knows


# Training and fine-tuning.


def ema_formula():
    """average <- d average + (1 - d) weight, d = min(decay, step / (step + 9)): 0.1 at first, the
    full decay from step 81 on."""
    module = nn.Linear(1, 1, bias=False, dtype=torch.float64)
    ema, expected = EMA(module, 0.9), module.weight.item()
    for step in range(1, 101):
        module.weight.data.fill_(math.sin(step))
        ema.update(step)
        d = min(0.9, step / (step + 9))
        expected = d * expected + (1 - d) * math.sin(step)
        assert abs(ema.average.weight.item() - expected) < 1e-14
    assert d == 0.9 and not ema.average.weight.requires_grad and not ema.average.training


def lora_is_the_product_of_its_matrices():
    """W x + b + (alpha / r) B A x equals a layer with (alpha / r) B A added to its weight, written
    out and by merged."""
    layer, x = nn.Linear(6, 5), _normal(2, 7, 6)
    network = nn.Sequential(layer).double()
    lora.add(network, rank=2, alpha=3.0, targets=["0"])
    nn.init.normal_(layer.lora.B)
    whole = layer.weight + 1.5 * layer.lora.B @ layer.lora.A
    torch.testing.assert_close(network(x), F.linear(x, whole, layer.bias), **DOUBLE)
    torch.testing.assert_close(layer.lora.merged(layer.weight), whole.detach(), **DOUBLE)


def loss_of_groups_is_the_sum_it_claims_to_be(
    model: LatentDiffusion | None = None, batch: Batch | None = None
):
    """Weight times mean, summed, to the bit; and each mean is that of the denoiser's own loss on
    the group alone."""
    model = model or tiny_model().double()
    batch = batch or [
        Part(name, weight, _normal(2, 4, 8, 8), ["a dog", ""], t, _normal(2, 4, 8, 8))
        for name, weight, t in (
            ("subject", 1.0, torch.tensor([7, 830])),
            ("class", 0.7, torch.tensor([400, 90])),
        )
    ]
    found = GroupLoss(model)(batch)
    assert list(found) == ["loss", "subject", "class"]
    assert found["subject"].shape == found["class"].shape == (2,)
    subject, of_class = found["subject"].mean(), found["class"].mean()
    assert torch.equal(found["loss"], (1.0 * subject + 0.7 * of_class)[None])
    for part, mean in zip(batch, (subject, of_class), strict=True):
        context = model.text.encode(part.captions)
        alone = model.denoiser.loss(part.latents, context, part.t, part.eps).mean()
        # a batch of four is not summed in the order of two of two
        assert abs(alone - mean) < 1e-13 * alone


def the_trained_vector_is_what_the_text_encoder_reads():
    """The vector of the word, and no other, is replaced and learns."""
    text = CLIPText(TextConfig(8, 1, 1))
    word = inversion.Word(text, "sks", like="dog", lr_multiplier=4.0)
    (hook,) = word.attach(text)
    text.requires_grad_(False)
    assert torch.equal(word.vector, text.token_embedding.weight[inversion.token_of("dog")])
    # the LayerNorm's output: not constant in the vector, since its gain is one per channel
    text.encode(["a sks dog"]).square().sum().backward()
    assert word.change.grad.abs().sum() > 0
    said, meant = text.encode(["a dog"]), text.encode(["a sks dog"])
    with torch.no_grad():
        word.change[0] += 1
    assert torch.equal(text.encode(["a dog"]), said)
    assert math.isclose((word.vector - word.start)[0].item(), 4.0, rel_tol=1e-6)
    changed = text.encode(["a sks dog"])
    assert not torch.equal(changed, meant)
    hook.remove()
    inversion.put_in(text, "sks", word.vector.detach())
    assert torch.equal(text.encode(["a sks dog"]), changed)


# Metrics.


def moments(mean: Tensor, root: Tensor) -> Moments:
    """Moments that are exactly these: points at mean + and - the columns of the root."""
    points = root.T * math.sqrt((2 * len(root) - 1) / 2)
    return Moments().add(torch.cat([mean + points, mean - points]))


def frechet_of_gaussians_whose_covariances_commute():
    """sum (mean difference)^2 + (std difference)^2 along the shared axes."""
    axes = torch.linalg.qr(_normal(5, 5)).Q
    a, b, gap = (torch.rand(5, dtype=torch.float64) for _ in range(3))
    found = frechet(moments(torch.zeros(5).double(), axes * a), moments(gap, axes * b))
    expected = (gap.square() + (a - b).square()).sum().item()
    assert math.isclose(found, expected, rel_tol=1e-12)
