"""The variational autoencoder: images to latents a few times smaller, and back; and its loss.

[1] Kingma, Welling. Auto-Encoding Variational Bayes. 2013. arXiv:1312.6114
[2] Rombach et al. High-Resolution Image Synthesis with Latent Diffusion Models. arXiv:2112.10752
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from minidiff.errors import UserError
from minidiff.layers import Attention, ResBlock, group_norm
from minidiff.unet import Upsample

Images, Latents = Float[Tensor, "B C H W"], Float[Tensor, "B Z h w"]


class Downsample(nn.Module):
    """Halve the size: 3x3 convolution of stride 2, padded at the right and bottom only."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H2 W2"]:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Middle(nn.Module):
    """Residual block, single-head self-attention over all positions, residual block."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.first = ResBlock(channels, channels, groups=groups, eps=1e-6)
        self.norm = group_norm(groups, channels, 1e-6)
        self.attention = Attention(channels, heads=1, bias=True)
        self.second = ResBlock(channels, channels, groups=groups, eps=1e-6)

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        x = self.first(x)
        h = self.attention(rearrange(self.norm(x), "b c h w -> b (h w) c"))
        return self.second(x + rearrange(h, "b (h w) c -> b c h w", h=x.shape[2]))


def _level(
    width: int, channels: int, blocks: int, groups: int, resample: nn.Module
) -> nn.Sequential:
    """One resolution: residual blocks, then a change of size."""
    widths = [width] + [channels] * (blocks - 1)
    residual = (ResBlock(w, channels, groups=groups, eps=1e-6) for w in widths)
    return nn.Sequential(OrderedDict(residual=nn.Sequential(*residual), resample=resample))


class Encoder(nn.Module):
    """Images to the mean and log-variance of each latent: twice the latent channels."""

    def __init__(
        self, in_channels: int, out_channels: int, channels: Sequence[int], blocks: int, groups: int
    ):
        super().__init__()
        self.conv_in = nn.Conv2d(in_channels, channels[0], 3, padding=1)
        self.levels, width = nn.ModuleList(), channels[0]
        for level, c in enumerate(channels):
            down = Downsample(c) if level < len(channels) - 1 else nn.Identity()
            self.levels.append(_level(width, c, blocks, groups, down))
            width = c
        self.middle = Middle(width, groups)
        self.norm_out = group_norm(groups, width, 1e-6)
        self.conv_out = nn.Conv2d(width, out_channels, 3, padding=1)

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B Z2 h w"]:
        h = self.conv_in(x)
        for level in self.levels:
            h = level(h)
        return self.conv_out(F.silu(self.norm_out(self.middle(h))))


class Decoder(nn.Module):
    """The encoder reversed, with one more residual block a level."""

    def __init__(
        self, in_channels: int, out_channels: int, channels: Sequence[int], blocks: int, groups: int
    ):
        super().__init__()
        width = channels[-1]
        self.conv_in = nn.Conv2d(in_channels, width, 3, padding=1)
        self.middle = Middle(width, groups)
        self.levels = nn.ModuleList()
        for level, c in reversed(list(enumerate(channels))):
            up = Upsample(c) if level > 0 else nn.Identity()
            self.levels.append(_level(width, c, blocks + 1, groups, up))
            width = c
        self.norm_out = group_norm(groups, width, 1e-6)
        self.conv_out = nn.Conv2d(width, out_channels, 3, padding=1)

    def forward(self, z: Float[Tensor, "B Z h w"]) -> Float[Tensor, "B C H W"]:
        h = self.middle(self.conv_in(z))
        for level in self.levels:
            h = level(h)
        return self.conv_out(F.silu(self.norm_out(h)))


@dataclass(frozen=True)
class VAEConfig:
    """All that defines a VAE; channels has one entry a level, finest first."""

    in_channels: int = 3
    latent_channels: int = 4
    channels: Sequence[int] = (128, 256, 512, 512)
    blocks: int = 2  # residual blocks a level in the encoder; the decoder has one more
    groups: int = 32  # of the group normalizations; 0: no normalization
    kl_weight: float = 1e-6  # [2] appendix G
    quant: bool = True  # a 1x1 convolution beside the latents, on both sides; not in SD3 and FLUX.1
    latent_shift: float = 0.0  # mean of the raw latents

    def __post_init__(self) -> None:
        object.__setattr__(self, "channels", tuple(self.channels))  # JSON has lists
        if not self.channels:
            raise UserError("channels is empty; a VAE has at least one level.")


class VAE(nn.Module):
    """Images in [-1, 1] to latents of unit variance and back. It alone knows shift and scale."""

    Config = VAEConfig

    def __init__(self, config: VAEConfig, latent_scale: float = 1.0):
        """latent_scale: 1 / std of the raw latents, saved with the weights; SD's is 0.18215."""
        super().__init__()
        self.config = config
        in_channels, latent_channels = config.in_channels, config.latent_channels
        channels, blocks, groups = config.channels, config.blocks, config.groups
        self.latent_channels, self.factor = latent_channels, 2 ** (len(channels) - 1)
        self.encoder = Encoder(in_channels, 2 * latent_channels, channels, blocks, groups)
        self.decoder = Decoder(latent_channels, in_channels, channels, blocks, groups)
        quant = nn.Conv2d if config.quant else nn.Identity
        self.quant = quant(2 * latent_channels, 2 * latent_channels, 1)
        self.post_quant = quant(latent_channels, latent_channels, 1)
        self.register_buffer("latent_scale", torch.tensor(latent_scale))
        self._init_weights()

    def _init_weights(self) -> None:
        """PyTorch's defaults, but residual branches start at zero, and posteriors at std 0.05."""
        for module in self.modules():
            if isinstance(module, ResBlock):
                nn.init.zeros_(module.conv2.weight)
                nn.init.zeros_(module.conv2.bias)
        last = self.quant if self.config.quant else self.encoder.conv_out
        nn.init.constant_(last.bias.data[self.latent_channels :], -6.0)

    def posterior(self, images: Images) -> tuple[Latents, Latents]:
        """Mean and log-variance of q(z | image), [1] section 3, before shift and scale."""
        dtype = self.encoder.conv_in.weight.dtype
        moments = self.quant(self.encoder(images.to(dtype))).to(images.dtype)
        mean, log_variance = moments.chunk(2, dim=1)  # eq: vae-9
        return mean, log_variance.clamp(-30, 20)

    def encode(self, images: Images, noise: Latents | None = None) -> Latents:
        """Scaled latents: the posterior's mean, or, given standard normal noise, a sample of it."""
        mean, log_variance = self.posterior(images)
        z = mean if noise is None else mean + (0.5 * log_variance).exp() * noise
        return (z - self.config.latent_shift) * self.latent_scale

    def decode(self, latents: Latents) -> Images:
        """Images from scaled latents; about [-1, 1], not clamped."""
        z = latents / self.latent_scale + self.config.latent_shift
        z = z.to(self.decoder.conv_in.weight.dtype)
        return self.decoder(self.post_quant(z)).to(latents.dtype)

    def loss(self, images: Images) -> Float[Tensor, "B"]:
        """[1] eq. 7 with the L1 error of [2]:  |error| + kl_weight KL(q(z | image) || N(0, I)).

        |error| is the mean over pixels and channels, KL ([1] appendix B) the sum over latents.
        """
        mean, log_variance = self.posterior(images)
        z = mean + (0.5 * log_variance).exp() * torch.randn_like(mean)  # eq: vae-sample
        error = (self.decoder(self.post_quant(z)) - images).abs().flatten(1).mean(1)
        kl = 0.5 * (mean.pow(2) + log_variance.exp() - 1 - log_variance).flatten(1).sum(1)
        return error + self.config.kl_weight * kl  # eq: vae-7, vae-kl

    @torch.no_grad()
    def measure_scale(self, images: Images) -> float:
        """Set the latent scale to 1 / std of the images' raw latents, [2] appendix G; return it."""
        self.latent_scale.fill_(1 / self.posterior(images)[0].std())  # eq: ldm-scale
        return self.latent_scale.item()


@dataclass(frozen=True)
class PixelsConfig:
    channels: int = 3


class Pixels(nn.Module):
    """The VAE that does nothing: pixel diffusion is latent diffusion with this one."""

    Config = PixelsConfig

    def __init__(self, config: PixelsConfig | None = None):
        super().__init__()
        self.config = config or PixelsConfig()
        self.latent_channels, self.factor = self.config.channels, 1

    def encode(self, images: Images) -> Images:
        return images

    def decode(self, latents: Images) -> Images:
        return latents


def vae_sd() -> VAE:
    """Stable Diffusion's: 83.65 M parameters, 512x512x3 to 64x64x4."""
    return VAE(VAEConfig(3, 4, channels=(128, 256, 512, 512), blocks=2), latent_scale=0.18215)


def vae_flow(latent_scale: float, latent_shift: float) -> VAE:
    """SD3's: 1.5305, 0.0609; FLUX.1's: 0.3611, 0.1159. 83.82 M parameters, 16 channels."""
    return VAE(VAEConfig(latent_channels=16, quant=False, latent_shift=latent_shift), latent_scale)
