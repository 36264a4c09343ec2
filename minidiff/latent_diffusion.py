"""Text-to-image latent diffusion: a VAE, a text tower and a denoiser put together, trained, sampled, saved and loaded. No new mathematics.

A model folder holds model.json (kinds and numbers) and one safetensors file for each part.

[1] Rombach et al. High-Resolution Image Synthesis with Latent Diffusion Models. 2022. arXiv:2112.10752
[2] Ho, Salimans. Classifier-Free Diffusion Guidance. 2022. arXiv:2207.12598
"""
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from jaxtyping import Float, Shaped
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from minidiff import schedules
from minidiff.clip import CLIPText
from minidiff.data.folder import check_size
from minidiff.denoiser import Denoiser, guide
from minidiff.errors import UserError
from minidiff.labels import ClassLabels, Unconditional
from minidiff.samplers import SAMPLERS, Frame, Step, by_name, sample
from minidiff.unet import UNet
from minidiff.vae import VAE, Pixels
from minidiff.weights import files
from minidiff.weights.fill import empty, fill

FORMAT = "minidiff 1"
PARTS = {cls.__name__: cls for cls in (VAE, Pixels, CLIPText, ClassLabels, Unconditional, UNet)}


class LatentDiffusion(nn.Module):
    """Composition only: pictures -> vae -> latents <- denoiser <- context <- text <- prompts."""

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
        """size: the side of the training pictures in pixels. dropout: how often training hides the condition. guidance, sampler, spacing:
        what sampling uses unless told otherwise."""
        super().__init__()
        self.vae, self.text, self.denoiser = vae, text, denoiser
        self.check_widths()
        if sampler not in SAMPLERS:
            raise ValueError(f'no sampler "{sampler}"; there is {", ".join(SAMPLERS)}')
        self.size, self.dropout, self.guidance, self.sampler, self.spacing = size, dropout, guidance, sampler, spacing

    def check_widths(self) -> None:
        """That the parts fit: a U-Net of one version with the text tower of another does not."""
        if self.text.dim != self.unet.context_dim:
            raise UserError(f"the text encoder gives vectors of width {self.text.dim}, the U-Net expects {self.unet.context_dim}.")
        z = self.vae.latent_channels
        if self.unet.numbers["out_channels"] != z:
            raise UserError(f"the VAE's latents have {z} channels, the U-Net gives {self.unet.numbers['out_channels']}.")

    def cast(self, dtype: torch.dtype | None) -> "LatentDiffusion":
        """Compute in this precision. In float16 the VAE stays in float32: Stable Diffusion's overflows and draws black pictures."""
        for name, parameter in self.named_parameters():  # not the buffers: half a precision of the latent scale would shift colours
            kept = torch.float32 if dtype == torch.float16 and name.startswith("vae.") else dtype
            parameter.data = parameter.data.to(kept or parameter.dtype)
        return self

    @property
    def unet(self) -> nn.Module:
        return self.denoiser.network

    @property
    def schedule(self) -> schedules.NoiseSchedule:
        return self.denoiser.schedule

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def loss(self, images: Float[Tensor, "B C H W"], conditions: list[str], t: Shaped[Tensor, "B"] | None = None) -> Float[Tensor, "B"]:
        """The denoiser's loss on the latents of pictures in [-1, 1]."""
        with torch.no_grad():
            latents = self.vae.encode(images)
        return self.latent_loss(latents, conditions, t)

    def latent_loss(self, latents: Float[Tensor, "B Z h w"], conditions: list[str], t: Shaped[Tensor, "B"] | None = None) -> Float[Tensor, "B"]:
        """The same on latents encoded beforehand. A condition is hidden with probability `dropout`, here and only here ([2] algorithm 1)."""
        hidden = torch.rand(len(conditions)) < self.dropout
        context = self.text.encode(["" if h else c for c, h in zip(conditions, hidden, strict=True)])
        return self.denoiser.loss(latents, context, t)

    @torch.no_grad()
    def sample(
        self,
        conditions: list[str],
        steps: int = 25,
        guidance: float | None = None,
        step: Step | None = None,
        size: int | None = None,
        generator: torch.Generator | None = None,
        x_T: Float[Tensor, "B Z h w"] | None = None,
    ) -> Iterator[Frame]:
        """Yields a Frame of latents for each of steps + 1 times; pictures are self.vae.decode(frame.x0).

        Noise is drawn on the CPU, so a seed means the same picture on every device. x_T, where given, is that noise.
        """
        size = self.size if size is None else size
        check_size(size, self.vae.factor * self.unet.multiple)
        side = size // self.vae.factor
        first = self.schedule.timesteps(steps)[0]
        if x_T is None:
            alpha, sigma = self.schedule.alpha_sigma(first)
            spread = (alpha**2 + sigma**2).sqrt().item()  # of x_T, for data of unit variance
            x_T = spread * torch.randn(len(conditions), self.vae.latent_channels, side, side, generator=generator)
        scale = self.guidance if guidance is None else guidance
        denoise = guide(self.denoiser, self.text.encode(conditions), self.text.null(len(conditions)), scale)
        yield from sample(denoise, self.schedule, x_T.to(self.device), steps, step or by_name(self.sampler, generator))

    @torch.no_grad()
    def generate(self, conditions: list[str], batch: int = 64, steps: int = 25, progress: bool = False, **how) -> Float[Tensor, "B C H W"]:
        """Pictures in [-1, 1], a batch at a time; steps and `how` are sample's. progress: show a bar, once the first step is done."""
        if not conditions:
            raise UserError("no conditions to generate from; name at least one.")
        pictures, starts = [], range(0, len(conditions), batch)
        with tqdm(desc="sampling", total=len(starts) * steps, unit="step", delay=0.01, disable=not progress) as bar:
            for i in starts:
                for frame in self.sample(conditions[i : i + batch], steps, **how):
                    bar.update(frame.t > 0)  # the last frame of a chain is clean, and took no step
                pictures.append(self.vae.decode(frame.x0).clamp(-1, 1))
        return torch.cat(pictures)

    def save(self, path: str | Path) -> Path:
        """Write the model folder beside its place, then rename: an interrupted save leaves the old folder as it was."""
        path = Path(path)
        fresh, old = path.with_name(path.name + ".new"), path.with_name(path.name + ".old")
        _finish_save(path)
        for folder in (fresh, old):
            shutil.rmtree(folder, ignore_errors=True)
        fresh.mkdir(parents=True)
        parts = {"vae": self.vae, "text": self.text, "unet": self.unet}
        for name, part in parts.items():
            save_file({k: v.contiguous() for k, v in part.state_dict().items()}, fresh / f"{name}.safetensors")
        numbers = {name: {"kind": type(part).__name__, **part.numbers} for name, part in parts.items()}
        how = {"target": self.denoiser.target, "weighting": self.denoiser.weighting, "schedule": schedules.to_json(self.schedule)}
        settings = {name: getattr(self, name) for name in ("size", "dropout", "guidance", "sampler", "spacing")}
        whole = {"format": FORMAT, **settings, "denoiser": how, **numbers}
        (fresh / "model.json").write_text(json.dumps(whole, indent=2) + "\n", encoding="utf-8")
        if path.exists():
            os.replace(path, old)
        os.replace(fresh, path)
        shutil.rmtree(old, ignore_errors=True)
        return path

    @classmethod
    def load(cls, path: str | Path, device: str | torch.device = "cpu") -> "LatentDiffusion":
        """Read a model folder; every problem is a UserError that names the file."""
        path = Path(path)
        _finish_save(path)
        if not path.is_dir():
            raise UserError(f'no model folder "{path}"; `minidiff quickstart` makes one, or pass --model FOLDER.')
        if not (path / "model.json").is_file():
            raise UserError(f'"{path}" is no model folder: it has no model.json (a folder as written by `minidiff quickstart` has one).')
        whole = files.read_json(path / "model.json")
        try:
            if whole["format"] != FORMAT:
                raise ValueError(f'format "{whole["format"]}", but this version reads "{FORMAT}"')
            parts = {name: _empty(whole[name]) for name in ("vae", "text", "unet")}
            how = whole["denoiser"]
            denoiser = Denoiser(parts["unet"], schedules.from_json(how["schedule"]), how["target"], how["weighting"])
            denoiser.schedule.timesteps(1)  # numbers of the wrong kind show now, not in the middle of a picture
            how_to_sample = float(whole["guidance"]), str(whole.get("sampler", "ddim")), str(whole.get("spacing", "trailing"))
            model = cls(parts["vae"], parts["text"], denoiser, int(whole["size"]), float(whole["dropout"]), *how_to_sample)
        except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, ZeroDivisionError) as error:
            raise UserError(f"{path / 'model.json'} is damaged ({type(error).__name__}: {error}); save the model again.") from error
        for name, part in parts.items():
            file = path / f"{name}.safetensors"
            if not file.is_file():
                raise UserError(f"{path} has no weights: {file.name} is missing; copy the whole folder, or save the model again.")
            fill(part, files.tensors(files.inside(path, file)), f"{file} does not fit model.json")
        return model.to(device).eval()


def _finish_save(path: Path) -> None:
    """A save that was killed between its two renames left the model under its old name: put it back."""
    old = path.with_name(path.name + ".old")
    if old.is_dir() and not path.exists():
        os.replace(old, path)


def _empty(numbers: dict) -> nn.Module:
    return empty(PARTS[numbers["kind"]], {k: v for k, v in numbers.items() if k != "kind"})
