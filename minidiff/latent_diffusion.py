"""Text-to-image latent diffusion: a VAE, a text encoder and a denoiser put together.

[1] Rombach et al. High-Resolution Image Synthesis with Latent Diffusion Models. arXiv:2112.10752
[2] Ho, Salimans. Classifier-Free Diffusion Guidance. 2022. arXiv:2207.12598
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from minidiff import schedules
from minidiff.condition import Context, repeat
from minidiff.denoiser import Denoise, Denoiser
from minidiff.errors import UserError, choice
from minidiff.guidance import guide
from minidiff.options.sampling import SampleConfig, Size, check_size
from minidiff.samplers import SAMPLERS, Frame, Noise, Normal, by_name, sample, times_of
from minidiff.steps import Step

Latents, Time = Float[Tensor, "B Z h w"], Shaped[Tensor, "B"]
Device, Dtype = str | torch.device, str | torch.dtype
DEFAULTS = SampleConfig()


class LatentDiffusion(nn.Module):
    """Composition only: prompts -> text -> context -> denoiser -> latents -> vae -> images."""

    def __init__(
        self,
        vae: nn.Module,
        text: nn.Module,
        denoiser: Denoiser,
        size: int,
        dropout: float = 0.1,
        guidance: float = 4.0,
        sampler: str = "ddim",
        spacing: str | None = "trailing",
    ):
        """size: side of the training images in pixels. dropout: how often a caption is dropped.

        guidance, sampler, spacing: what sampling uses by default. spacing None: each sampler's own.
        """
        super().__init__()
        self.vae, self.text, self.denoiser = vae, text, denoiser
        self.check_widths()
        choice("sampler", sampler, SAMPLERS)
        self.size, self.dropout, self.guidance = size, dropout, guidance
        self.sampler, self.spacing = sampler, spacing

    def check_widths(self) -> None:
        """Raise a UserError unless the parts fit together; those of SD 1 and SD 2 do not."""
        width, expected = self.text.dim, self.unet.context_dim
        if width != expected:
            widths = f"gives vectors of width {width}, the U-Net expects {expected}"
            raise UserError(f"the text encoder {widths}.")
        z, channels = self.vae.latent_channels, self.unet.config.out_channels
        if channels != z:
            raise UserError(f"the VAE's latents have {z} channels, the U-Net gives {channels}.")

    @property
    def unet(self) -> nn.Module:
        return self.denoiser.network

    @property
    def schedule(self) -> schedules.NoiseSchedule:
        return self.denoiser.schedule

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def loss(
        self, images: Float[Tensor, "B C H W"], captions: list[str], t: Time | None = None
    ) -> Float[Tensor, "B"]:
        """The denoiser's loss on the latents of images in [-1, 1]."""
        with torch.no_grad():
            latents = self.vae.encode(images)
        return self.latent_loss(latents, captions, t)  # eq: ldm-2

    def latent_loss(
        self, latents: Latents, captions: list[str], t: Time | None = None
    ) -> Float[Tensor, "B"]:
        """The same on latents. Captions are dropped with probability `dropout`, [2] algorithm 1."""
        dropped = (torch.rand(len(captions)) < self.dropout).tolist()
        captions = ["" if drop else c for c, drop in zip(captions, dropped, strict=True)]
        context = self.with_numbers(self.text.encode(captions), self.size_of(latents))
        return self.denoiser.loss(latents, context, t)  # eq: ldm-3

    def size_of(self, latents: Latents) -> Size:
        """That of the images, in pixels."""
        return Size(*(self.vae.factor * side for side in latents.shape[2:]))

    def with_numbers(
        self,
        context: Context | None,
        size: Size,
        config: SampleConfig = DEFAULTS,
        is_null: bool = False,
    ) -> Context | None:
        """The context, with what a network such as SDXL's is told of images of this size."""
        if context is None or not (names := getattr(self.text, "numbers", ())):
            return context
        row = context.numbers.new_tensor(config.numbers(names, size, is_null))
        return replace(context, numbers=row.expand_as(context.numbers))

    @torch.no_grad()
    def sample(
        self,
        prompts: list[str],
        steps: int | Shaped[Tensor, "steps1"] | None = None,
        guidance: float | None = None,
        generator: torch.Generator | Noise | None = None,
        step: Step | None = None,
        x_T: Latents | None = None,
        config: SampleConfig | None = None,
    ) -> Iterator[Frame]:
        """Yields a Frame of latents at each time; images are self.decode(frame.x0).

        config: the other options. steps (their number, or the times) and guidance, where given,
        override it. generator: seeds one generator for each image, in order, so that image k is the
        same in any batch; or noise such as samplers.Normal. Default: the config's seed, or without
        a config torch's own. x_T: where to start, in place of noise.
        """
        if generator is None and config is not None:
            generator = Normal.seeded(config.seed, range(len(prompts)))
        config = config or DEFAULTS
        step = step or by_name(config.sampler or self.sampler)
        times = self.times(step, config, steps, None if x_T is None else x_T.shape[2:])
        noise = generator if callable(generator) else Normal.split(generator, len(prompts))
        x = self.start(len(prompts), config, noise, times[0]) if x_T is None else x_T
        denoise = self.guided(prompts, replace(config, size=self.size_of(x)), guidance)
        yield from sample(denoise, self.schedule, x.to(self.device), times, step, noise=noise)

    def times(
        self,
        step: Step,
        config: SampleConfig,
        steps: int | Shaped[Tensor, "steps1"] | None = None,
        sides: Sequence[int] | None = None,
    ) -> Shaped[Tensor, "steps1"]:
        """The times that a sampler visits: of the config, but for steps. sides: of the latents; in
        FLUX.1-dev they decide, too. Default: the config's, or the model's own."""
        pixels = config.size or (self.size, self.size)
        sides = sides or [side // self.vae.factor for side in pixels]
        patches = math.prod(side // getattr(self.unet, "multiple", 1) for side in sides)
        steps = config.steps if steps is None else steps
        schedule = self.schedule.for_tokens(patches)
        return times_of(schedule, steps, self.spacing_of(step, config), step)

    def spacing_of(self, step: Step, config: SampleConfig) -> str:
        """The config's spacing, or the model's where the sampler takes it, or the sampler's own."""
        own = self.spacing if self.spacing and step.follows(self.spacing) else step.spacing
        return config.spacing or own

    def start(self, batch: int, config: SampleConfig, noise: Noise, t: Tensor) -> Latents:
        """x_T: noise with the standard deviation of x_t for data of unit variance."""
        alpha, sigma = self.schedule.alpha_sigma(t)
        return (alpha**2 + sigma**2).sqrt().item() * noise(self.blank(batch, config))

    def blank(self, batch: int, config: SampleConfig) -> Latents:
        """Zeros of the latents' shape; a size that the networks cannot take is a UserError."""
        height, width = config.size or (self.size, self.size)
        for side in (height, width):
            check_size(side, self.multiple)
        f, z = self.vae.factor, self.vae.latent_channels
        if self.device.type == "cpu":  # is there room for the decoder's last layer? Nothing is used
            widths = getattr(self.vae.config, "channels", z)
            torch.empty(widths if isinstance(widths, int) else widths[0], height, width)
        return torch.zeros(batch, z, height // f, width // f, device=self.device)

    @property
    def multiple(self) -> int:
        """The sides of an image, in pixels, must be multiples of this."""
        return self.vae.factor * getattr(self.unet.config, "patch", 1)

    def guided(
        self,
        prompts: list[str],
        config: SampleConfig,
        guidance: float | None = None,
        denoiser: Denoiser | None = None,
    ) -> Denoise:
        """(x, t) -> Prediction under these prompts. denoiser: in place of the model's own."""
        if config.of_sdxl and not hasattr(self.text.config, "empty"):
            raise UserError(f"{config.of_sdxl[0]} is for SDXL; this model does not read it.")
        empty = [config.empty] if config.empty else []
        is_told = "guidance" in getattr(self.text, "numbers", ())  # FLUX.1 is not steered
        if config.negative and is_told:
            raise UserError("negative needs a second pass; FLUX.1 is told its guidance in one.")
        context = self.text.encode(prompts, *empty)
        null = None if is_told else self.text.null(len(prompts), *empty)
        if config.negative and null is None:
            raise UserError("negative needs a model with a text encoder.")
        if config.negative:
            null = repeat(self.text.encode([config.negative]), len(prompts))
        guidance = config.guidance if guidance is None else guidance
        scale = self.guidance if guidance is None else guidance
        config, size = replace(config, guidance=scale), config.size or Size(self.size, self.size)
        context = self.with_numbers(context, size, config)
        null = self.with_numbers(null, size, config, is_null=True)
        interval = None if config.interval == (0, 1) else config.interval
        denoiser = denoiser or self.denoiser
        scale = 1.0 if is_told else scale
        return guide(denoiser, context, null, scale, config.rescale, interval)

    @torch.no_grad()
    def decode(self, latents: Latents) -> Float[Tensor, "B C H W"]:
        """Images, about [-1, 1], decoded a megapixel at a time to bound the memory."""
        pixels = latents[0, 0].numel() * self.vae.factor**2
        together = latents.split(max(1, 2**20 // pixels))
        return torch.cat([self.vae.decode(z) for z in together])

    def save(self, path: str | Path) -> Path:
        """Write the model folder (checkpoints/folder.py)."""
        from minidiff.checkpoints import folder

        return folder.save(self, path)

    @classmethod
    def from_pretrained(
        cls, path: str | Path, device: Device = "cpu", dtype: Dtype | None = torch.float32
    ) -> "LatentDiffusion":
        """Open anything that minidiff.load opens."""
        from minidiff.checkpoints.load import load

        return load(path, device, dtype)

    load, save_pretrained = from_pretrained, save
