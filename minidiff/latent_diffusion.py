"""Text-to-image latent diffusion: a VAE, a text encoder and a denoiser put together. No new mathematics.

[1] Rombach et al. High-Resolution Image Synthesis with Latent Diffusion Models. 2022. arXiv:2112.10752
[2] Ho, Salimans. Classifier-Free Diffusion Guidance. 2022. arXiv:2207.12598
"""

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from jaxtyping import Float, Shaped
from safetensors.torch import save_file
from torch import Tensor, nn

from minidiff import schedules
from minidiff.checkpoints import files
from minidiff.checkpoints.fill import empty, fill, precision_of
from minidiff.denoiser import Denoise, Denoiser
from minidiff.errors import UserError, choice
from minidiff.guidance import guide
from minidiff.methods.lora import merged_state
from minidiff.options.sampling import SampleConfig, check_size
from minidiff.samplers import SAMPLERS, Frame, Noise, Normal, by_name, sample, times_of
from minidiff.steps import Step
from minidiff.text import ClassLabels, CLIPText, Unconditional
from minidiff.unet import UNet
from minidiff.vae import VAE, Pixels

FORMAT = "minidiff 1"
PARTS = {cls.__name__: cls for cls in (VAE, Pixels, CLIPText, ClassLabels, Unconditional, UNet)}

Latents = Float[Tensor, "B Z h w"]
DEFAULTS = SampleConfig()


class LatentDiffusion(nn.Module):
    """Composition only: images -> vae -> latents <- denoiser <- context <- text encoder <- prompts."""

    def __init__(
        self,
        vae: nn.Module,
        text: nn.Module,
        denoiser: Denoiser,
        size: int,
        dropout: float = 0.1,
        guidance: float = 4.0,
        sampler: str = "ddim",
        spacing: str = "trailing",
    ):
        """size: side of the training images in pixels. dropout: how often training hides the caption.

        guidance, sampler, spacing: what sampling uses by default.
        """
        super().__init__()
        self.vae, self.text, self.denoiser = vae, text, denoiser
        self.check_widths()
        choice("sampler", sampler, SAMPLERS)
        self.size, self.dropout, self.guidance = size, dropout, guidance
        self.sampler, self.spacing = sampler, spacing

    def check_widths(self) -> None:
        """Raise a UserError unless the parts fit, as a U-Net of SD 1 and a text encoder of SD 2 do not."""
        width, expected = self.text.dim, self.unet.context_dim
        if width != expected:
            raise UserError(
                f"the text encoder gives vectors of width {width}, the U-Net expects {expected}."
            )
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
        self,
        images: Float[Tensor, "B C H W"],
        captions: list[str],
        t: Shaped[Tensor, "B"] | None = None,
    ) -> Float[Tensor, "B"]:
        """The denoiser's loss on the latents of images in [-1, 1]."""
        with torch.no_grad():
            latents = self.vae.encode(images)
        return self.latent_loss(latents, captions, t)

    def latent_loss(
        self, latents: Latents, captions: list[str], t: Shaped[Tensor, "B"] | None = None
    ) -> Float[Tensor, "B"]:
        """The same on latents. A caption is hidden with probability `dropout` ([2] algorithm 1)."""
        hidden = torch.rand(len(captions)) < self.dropout
        shown = ["" if hide else text for text, hide in zip(captions, hidden, strict=True)]
        return self.denoiser.loss(latents, self.text.encode(shown), t)

    @torch.no_grad()
    def sample(
        self,
        prompts: list[str],
        steps: int | Shaped[Tensor, "steps1"] | None = None,
        guidance: float | None = None,
        generator: torch.Generator | Noise | None = None,
        step: Step | None = None,
        x_T: Latents | None = None,
        config: SampleConfig = DEFAULTS,
    ) -> Iterator[Frame]:
        """Yields a Frame of latents at each time; images are self.decode(frame.x0).

        config: every other option of sampling; steps and guidance, where given, go before its own.
        steps: how many, or the times themselves. generator: each image gets one of its own, seeded from
        this one in order, so that image k is the same in any batch; or an object such as
        samplers.Normal. x_T: where to start, in place of noise.
        """
        steps = config.steps if steps is None else steps
        times = times_of(self.schedule, steps, config.spacing or self.spacing)
        noise = generator if callable(generator) else Normal.split(generator, len(prompts))
        x = self.start(len(prompts), config, noise, times[0]) if x_T is None else x_T
        denoise = self.guided(prompts, config, guidance)
        step = step or by_name(config.sampler or self.sampler)
        yield from sample(denoise, self.schedule, x.to(self.device), times, step, noise=noise)

    def start(
        self, batch: int, config: SampleConfig, noise: Noise, t: Shaped[Tensor, ""]
    ) -> Latents:
        """x_T: noise of the spread that data of unit variance have at time t."""
        alpha, sigma = self.schedule.alpha_sigma(t)
        return (alpha**2 + sigma**2).sqrt().item() * noise(self.blank(batch, config))

    def blank(self, batch: int, config: SampleConfig) -> Latents:
        """Zeros of the shape of these latents; a size that the networks cannot take is a UserError."""
        height, width = config.size or (self.size, self.size)
        for side in (height, width):
            check_size(side, self.multiple)
        f, z = self.vae.factor, self.vae.latent_channels
        return torch.zeros(batch, z, height // f, width // f, device=self.device)

    @property
    def multiple(self) -> int:
        """The sides of an image, in pixels, are multiples of this."""
        return self.vae.factor * self.unet.multiple

    def guided(
        self,
        prompts: list[str],
        config: SampleConfig,
        guidance: float | None = None,
        denoiser: Denoiser | None = None,
    ) -> Denoise:
        """(x, t) -> Prediction under these prompts. denoiser: in place of the model's own."""
        context, null = self.text.encode(prompts), self.text.null(len(prompts))
        if config.negative:
            null = self.text.encode([config.negative]).expand(len(prompts), -1, -1)
        guidance = config.guidance if guidance is None else guidance
        scale = self.guidance if guidance is None else guidance
        interval = None if config.interval == (0, 1) else config.interval
        denoiser = denoiser or self.denoiser
        return guide(denoiser, context, null, scale, config.rescale, interval)

    @torch.no_grad()
    def decode(self, latents: Latents) -> Float[Tensor, "B C H W"]:
        """Images, about [-1, 1], a megapixel at a time: memory does not grow with the batch."""
        pixels = latents[0, 0].numel() * self.vae.factor**2
        together = latents.split(max(1, 2**20 // pixels))
        return torch.cat([self.vae.decode(z) for z in together])

    def save(self, path: str | Path) -> Path:
        """Write the model folder beside its place, then rename: an interrupted save leaves the old folder as it was.
        What LoRAs change is written into the weights."""
        path = Path(path)
        fresh, old = path.with_name(path.name + ".new"), path.with_name(path.name + ".old")
        _finish_save(path)
        for folder in (fresh, old):
            shutil.rmtree(folder, ignore_errors=True)
        fresh.mkdir(parents=True)
        parts = {"vae": self.vae, "text": self.text, "unet": self.unet}
        for name, part in parts.items():
            save_file(
                {k: v.contiguous() for k, v in merged_state(part).items()},
                fresh / f"{name}.safetensors",
            )
        numbers = {
            name: {"kind": type(part).__name__, **asdict(part.config)}
            for name, part in parts.items()
        }
        how = {
            "target": self.denoiser.target,
            "weighting": self.denoiser.weighting,
            "schedule": schedules.to_json(self.schedule),
        }
        settings = {
            name: getattr(self, name)
            for name in ("size", "dropout", "guidance", "sampler", "spacing")
        }
        whole = {"format": FORMAT, **settings, "denoiser": how, **numbers}
        (fresh / "model.json").write_text(json.dumps(whole, indent=2) + "\n", encoding="utf-8")
        if path.exists():
            os.replace(path, old)
        os.replace(fresh, path)
        shutil.rmtree(old, ignore_errors=True)
        return path

    @classmethod
    def load(
        cls,
        path: str | Path,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = torch.float32,
    ) -> "LatentDiffusion":
        """Read a model folder, in this precision or as stored (None); every problem is a UserError that names the file."""
        path = Path(path)
        _finish_save(path)
        if not path.is_dir():
            raise UserError(
                f'no model folder "{path}"; `minidiff quickstart` makes one, or pass --model FOLDER.'
            )
        if not (path / "model.json").is_file():
            raise UserError(
                f'"{path}" is no model folder: it has no model.json (a folder as written by `minidiff quickstart` has one).'
            )
        whole = files.read_json(path / "model.json")
        try:
            if whole["format"] != FORMAT:
                raise ValueError(f'format "{whole["format"]}", but this version reads "{FORMAT}"')
            parts = {name: _empty(whole[name]) for name in ("vae", "text", "unet")}
            how = whole["denoiser"]
            denoiser = Denoiser(
                parts["unet"], schedules.from_json(how["schedule"]), how["target"], how["weighting"]
            )
            denoiser.schedule.timesteps(
                1
            )  # numbers of the wrong kind show now, not in the middle of a picture
            how_to_sample = (
                float(whole["guidance"]),
                str(whole.get("sampler", "ddim")),
                str(whole.get("spacing", "trailing")),
            )
            model = cls(
                parts["vae"],
                parts["text"],
                denoiser,
                int(whole["size"]),
                float(whole["dropout"]),
                *how_to_sample,
            )
        except (
            ValueError,
            KeyError,
            TypeError,
            AttributeError,
            RuntimeError,
            ZeroDivisionError,
        ) as error:
            raise UserError(
                f"{path / 'model.json'} is damaged ({type(error).__name__}: {error}); save the model again."
            ) from error
        for name, part in parts.items():
            file = path / f"{name}.safetensors"
            if not file.is_file():
                raise UserError(
                    f"{path} has no weights: {file.name} is missing; copy the whole folder, or save the model again."
                )
            fill(
                part,
                files.tensors(files.inside(path, file)),
                f"{file} does not fit model.json",
                precision_of(name, dtype),
            )
        return model.to(device).eval()


def _finish_save(path: Path) -> None:
    """A save that was killed between its two renames left the model under its old name: put it back."""
    old = path.with_name(path.name + ".old")
    if old.is_dir() and not path.exists():
        os.replace(old, path)


def _empty(numbers: dict) -> nn.Module:
    return empty(PARTS[numbers["kind"]], {k: v for k, v in numbers.items() if k != "kind"})
