"""Models small enough to be seen through, for the checks and for the cases of the exercises."""

import math

import torch
from torch import nn

from minidiff import schedules
from minidiff.conditioners import ClassLabels, LabelsConfig
from minidiff.denoiser import TARGETS, Denoiser
from minidiff.latent_diffusion import LatentDiffusion
from minidiff.text import CLIPText, TextConfig
from minidiff.unet import UNet, UNetConfig
from minidiff.vae import VAE, VAEConfig


class Toy(nn.Module):
    """A fixed nonlinear eps model that takes the chain's own t."""

    def forward(self, x, t, context=None):
        return torch.tanh(x) * (1 + 0.001 * t.to(x).view(-1, 1))


class Knows(nn.Module):
    """A network that answers a x0 + b eps exactly."""

    def forward(self, x, c_noise, context=None):
        return self.answer


class Linear(nn.Module):
    """An output that depends on the context."""

    def forward(self, x, c_noise, context=None):
        return x + context.mean(dim=(1, 2)).view(-1, 1)


def oracle(target, schedule, x0, eps, t, error=0.0):
    """A denoiser whose network is right but for the error, and x_t."""
    network = Knows()
    denoiser = Denoiser(network, schedule, target)
    alpha, sigma = (s.view(-1, 1) for s in schedule.alpha_sigma(t))
    a, b = TARGETS[target](alpha, sigma)
    network.answer = a * x0 + b * eps + error
    return denoiser, alpha * x0 + sigma * eps


def randomize(module: nn.Module) -> nn.Module:
    """Random numbers for every weight, also for those that start at zero."""
    for p in module.parameters():
        nn.init.normal_(p, std=1 / math.sqrt(max(p[0].numel(), 4)))
    return module


def tiny_vae(latent_scale: float = 1.0, kl_weight: float = 1e-6) -> VAE:
    channels, blocks, groups = (8, 16, 16), 1, 4
    return VAE(VAEConfig(3, 4, channels, blocks, groups, kl_weight), latent_scale)


def tiny_text() -> CLIPText:
    """As if trained: what starts at zero would hide everything."""
    text = CLIPText(TextConfig(width=16, layers=2, heads=2))
    for block in text.blocks:
        for linear in (block.attention.out, block.down):
            nn.init.normal_(linear.weight, std=0.2)
    return text


def tiny_model() -> LatentDiffusion:
    """A model of 20,000 numbers; its random weights are such that no branch starts at zero."""
    torch.manual_seed(3)
    unet = UNet(UNetConfig(4, 4, (8, 16), 1, (0, 1), (1, 2), 8, groups=4))
    for p in unet.parameters():
        nn.init.normal_(p, std=0.1)
    vae, text = VAE(VAEConfig(3, 4, (8, 8), 1, 0)), ClassLabels(LabelsConfig(["a cat", "a dog"], 8))
    return LatentDiffusion(vae, text, Denoiser(unet, schedules.linear(), "eps"), 16).eval()
