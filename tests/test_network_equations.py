"""The formulas of the chapters on the networks, each evaluated as it is written there."""

import math
from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from minidiff import Denoiser, schedules
from minidiff.layers import Attention, ResBlock, group_norm, timestep_embedding
from minidiff.vae import VAE, VAEConfig

EXACT = 1e-12  # float64, a few operations


def normal(*shape):
    return torch.randn(
        *shape, generator=torch.Generator().manual_seed(len(shape)), dtype=torch.float64
    )


def block(**options):
    """A residual block whose branch is not zero."""
    net = ResBlock(32, 32, groups=8, **options).double()
    nn.init.normal_(net.conv2.weight)
    return net


@pytest.mark.equation("timestep-embedding")
def test_clock_hands():
    h, t = 32, [3.0, 500.0]
    f = [10000 ** (-i / h) for i in range(h)]
    hands = [[math.cos(x * g) for g in f] + [math.sin(x * g) for g in f] for x in t]
    ours = timestep_embedding(torch.tensor(t, dtype=torch.float64), 2 * h)
    assert (ours - torch.tensor(hands, dtype=torch.float64)).abs().max() < 1e-10


@pytest.mark.equation("groupnorm-layer")
def test_group_norm_is_per_example_and_group():
    x, layer = normal(2, 32, 4, 4), group_norm(8, 32, 1e-5).double()
    nn.init.normal_(layer.weight), nn.init.normal_(layer.bias)
    rows = x.view(2, 8, -1)
    mean, variance = rows.mean(-1, keepdim=True), rows.var(-1, correction=0, keepdim=True)
    flat = ((rows - mean) / (variance + 1e-5).sqrt()).view_as(x)
    by_hand = layer.weight[:, None, None] * flat + layer.bias[:, None, None]
    assert (layer(x) - by_hand).abs().max() < EXACT


@pytest.mark.equation("resnet-block", "adagn-block")
def test_residual_block():
    x, emb = normal(2, 32, 4, 4), normal(2, 16)
    net = block()
    h = net.conv1(F.silu(net.norm1(x)))
    assert (net(x) - (x + net.conv2(F.silu(net.norm2(h))))).abs().max() < EXACT
    net = block(time_dim=16, scale_shift=True)
    s, b = net.time(F.silu(emb))[..., None, None].chunk(2, dim=1)
    h = (1 + s) * net.norm2(net.conv1(F.silu(net.norm1(x)))) + b
    assert (net(x, emb) - (x + net.conv2(F.silu(h)))).abs().max() < EXACT


@pytest.mark.equation("attention-1", "ldm-attention")
def test_attention_is_a_soft_lookup():
    net, x, context = Attention(16, 1, 8).double(), normal(1, 5, 16), normal(1, 7, 8)
    q, k, v = x @ net.q.weight.T, context @ net.k.weight.T, context @ net.v.weight.T
    scores = q @ k.mT / math.sqrt(16)
    shares = scores.exp() / scores.exp().sum(-1, keepdim=True)
    assert (net(x, context) - net.out(shares @ v)).abs().max() < EXACT


@pytest.fixture
def vae():
    torch.manual_seed(0)
    vae = VAE(VAEConfig(channels=(8, 8), blocks=1, groups=2, kl_weight=0.3)).double()
    nn.init.normal_(vae.quant.weight)
    return vae


@pytest.mark.equation("vae-9", "vae-sample")
def test_posterior_draws(vae):
    images = normal(2, 3, 8, 8)
    (mean, log_variance), noise = vae.posterior(images), normal(2, 4, 4, 4)
    z = torch.distributions.Normal(mean, (log_variance / 2).exp())
    drawn = vae.encode(images, noise) / vae.latent_scale
    assert ((drawn - z.mean) / z.stddev - noise).abs().max() < 1e-10


@pytest.mark.equation("vae-7", "vae-kl")
def test_vae_loss(vae):
    images = normal(2, 3, 8, 8)
    torch.manual_seed(1)
    loss = vae.loss(images)
    torch.manual_seed(1)
    mean, log_variance = vae.posterior(images)
    q = torch.distributions.Normal(mean, (log_variance / 2).exp())
    z = mean + q.stddev * torch.randn_like(mean)
    prior = torch.distributions.Normal(torch.zeros_like(mean), torch.ones_like(mean))
    kl = torch.distributions.kl_divergence(q, prior).flatten(1).sum(1)
    error = (vae.decoder(vae.post_quant(z)) - images).abs().flatten(1).mean(1)
    assert (loss - (error + 0.3 * kl)).abs().max() < 1e-10


@pytest.mark.equation("ldm-scale")
def test_latent_scale(vae):
    images, other = normal(2, 3, 8, 8), deepcopy(vae)
    other.measure_scale(images)
    assert abs(other.encode(images).std().item() - 1) < 1e-6


class Net(nn.Module):
    context_dim, config = 3, VAEConfig()

    def forward(self, x, t, context):
        return 0.3 * x + context.mean() + t.double()[:, None, None, None] / 1000


@pytest.mark.equation("ldm-2", "ldm-3")
def test_loss_of_latent_diffusion(vae):
    denoiser = Denoiser(Net(), schedules.linear(), "eps")
    images, context, t = normal(3, 3, 8, 8), normal(3, 2, 3), torch.tensor([1, 500, 1000])
    z0 = vae.encode(images)
    eps = normal(*z0.shape)
    error = eps - Net()(denoiser.schedule.mix(z0, eps, t), t - 1, context)
    by_hand = error.pow(2).flatten(1).mean(1)
    assert (denoiser.loss(z0, context, t, eps) - by_hand).abs().max() < EXACT
