"""Text-to-image latent diffusion: a VAE, a text tower and a denoiser put together, trained, sampled, saved and loaded. No new mathematics.

A model folder holds model.json (kinds and numbers) and one safetensors file for each part.

[1] Rombach et al. High-Resolution Image Synthesis with Latent Diffusion Models. 2022. arXiv:2112.10752
[2] Ho, Salimans. Classifier-Free Diffusion Guidance. 2022. arXiv:2207.12598
"""
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from jaxtyping import Float, Shaped
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from minidiff import atomic, editing, schedules
from minidiff.clip import CLIPText
from minidiff.data.folder import check_size
from minidiff.denoiser import Denoiser, guide
from minidiff.errors import UserError
from minidiff.labels import ClassLabels, Unconditional
from minidiff.lora import merged_state
from minidiff.samplers import SAMPLERS, Frame, by_name, sample
from minidiff.steps import Step
from minidiff.tiling import tiled
from minidiff.training.nonfinite import NonFiniteError, first_bad
from minidiff.unet import UNet
from minidiff.vae import VAE, Pixels
from minidiff.weights import files
from minidiff.weights.fill import empty, fill, precision_of

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
        size: int | tuple[int, int] | None = None,
        generator: torch.Generator | None = None,
        x_T: Float[Tensor, "B Z h w"] | None = None,
        negative: str = "",
        spacing: str | None = None,
        times: Shaped[Tensor, "steps1"] | None = None,
        image: Float[Tensor, "1 C H W"] | None = None,
        strength: float = 1.0,
        mask: Float[Tensor, "1 1 H W"] | None = None,
        **steering,
    ) -> Iterator[Frame]:
        """Yields a Frame of latents for each of steps + 1 times; pictures are self.vae.decode(frame.x0).

        size: side, or height and width, in pixels. negative: what guidance steers away from. spacing or times: which times are visited.
        image: a picture in [-1, 1] to start from; the last `strength` of the steps are walked. mask: 1 where the image is to be drawn anew;
        all else stays. steering: more of guide's arguments.

        Noise is drawn on the CPU, so a seed means the same picture on every device. x_T, where given, is that noise.
        """
        height, width = self._shape(size if image is None else tuple(image.shape[2:]))
        times = self.schedule.timesteps(steps, spacing or self.spacing) if times is None else times
        step = step or by_name(self.sampler, generator)
        shape = (len(conditions), self.vae.latent_channels, height // self.vae.factor, width // self.vae.factor)
        noise = (torch.randn(shape, generator=generator) if x_T is None else x_T).to(self.device)
        denoiser, x = self.denoiser, noise
        if x_T is None:
            alpha, sigma = self.schedule.alpha_sigma(times[0])
            x = (alpha**2 + sigma**2).sqrt().item() * noise  # the spread of x_T, for data of unit variance
        if mask is not None and image is None:
            raise UserError("a mask needs an image that it belongs to.")
        if image is not None:
            z0 = self.vae.encode(image.to(self.device)).expand(shape)
            times = editing.late(times, strength)
            if mask is None or strength < 1:
                x = editing.noised(self.schedule, z0, noise, times[0])
        if self.unet.numbers["in_channels"] != self.vae.latent_channels:
            denoiser = self._inpainting(image, mask)
        elif mask is not None:
            step = editing.keeping(step, z0, noise, editing.shrunk(mask, self.vae.factor).to(self.device))
        context, null = self.text.encode(conditions), self.text.null(len(conditions))
        if negative:
            null = self.text.encode([negative]).expand(len(conditions), -1, -1)
        scale = self.guidance if guidance is None else guidance
        denoise = guide(denoiser, context, null, scale, **steering)
        yield from sample(denoise, self.schedule, x, len(times) - 1, step, times=times)

    def _shape(self, size: int | tuple[int, int] | None) -> tuple[int, int]:
        height, width = (size, size) if isinstance(size, int) else size or (self.size, self.size)
        for side in (height, width):
            check_size(side, self.vae.factor * self.unet.multiple)
        return height, width

    def _inpainting(self, image: Float[Tensor, "1 C H W"] | None, mask: Float[Tensor, "1 1 H W"] | None) -> Denoiser:
        channels, z = self.unet.numbers["in_channels"], self.vae.latent_channels
        if channels != 2 * z + 1:
            raise UserError(f"this U-Net takes {channels} channels; known are {z}, and {2 * z + 1} for inpainting.")
        if image is None or mask is None:
            raise UserError("this model is for inpainting; it needs an image and a mask (--image FILE --mask FILE).")
        kept = self.vae.encode((image * (mask < 0.5)).to(self.device))
        network = editing.Inpainting(self.unet, editing.shrunk(mask, self.vae.factor).to(self.device), kept)
        return Denoiser(network, self.schedule, self.denoiser.target)

    def generate(self, conditions: list[str], batch: int = 64, steps: int = 25, **how) -> Float[Tensor, "B C H W"]:
        """Pictures in [-1, 1], all at once; `how` are draw's arguments and sample's."""
        return torch.cat(list(self.draw(conditions, batch, steps, **how)))

    @torch.no_grad()
    def draw(
        self, conditions: list[str], batch: int = 64, steps: int = 25, progress: bool = False, tile: bool | None = None, **how
    ) -> Iterator[Float[Tensor, "B C H W"]]:
        """The same, yielded a batch at a time. progress: show a bar, once the first step is done. tile: decode in tiles; None does above
        1024x1024 pixels. Numbers that are not finite are a UserError that names the module where they began."""
        if not conditions:
            raise UserError("no conditions to generate from; name at least one.")
        generator, starts = how.get("generator"), range(0, len(conditions), batch)
        walked = max(1, int(steps * how.get("strength", 1.0)))
        with tqdm(desc="sampling", total=len(starts) * walked, unit="step", delay=0.01, disable=not progress) as bar:

            def drawn(some: list[str]) -> Float[Tensor, "B C H W"]:
                for frame in self.sample(some, steps, **how):
                    bar.update(frame.t > 0)  # the last frame of a chain is clean, and took no step
                return self.decode(frame.x0, tile)

            for some in (conditions[i : i + batch] for i in starts):
                before = None if generator is None else generator.get_state()
                pictures = drawn(some)
                if not pictures.isfinite().all():  # the same again, with a look at every module
                    if generator is not None:
                        generator.set_state(before)
                    culprit = first_bad(self, partial(drawn, some)) or "no module gives such numbers alone"
                    raise NonFiniteError(f"the pictures hold numbers that are not finite: {culprit}; compute in bf16 or fp32.")
                yield pictures.clamp(-1, 1)

    @torch.no_grad()
    def decode(self, latents: Float[Tensor, "B Z h w"], tile: bool | None = None) -> Float[Tensor, "B C H W"]:
        """Pictures from latents in bounded memory: about a megapixel at a time, and above it, or where asked, in tiles."""
        pixels = latents[0, 0].numel() * self.vae.factor**2
        together = latents.split(max(1, 2**20 // pixels))
        if tile or (tile is None and pixels > 2**20):
            f = self.vae.factor
            return torch.cat([tiled(self.vae.decode, z, 512 // f, 128 // f, f) for z in together])
        return torch.cat([self.vae.decode(z) for z in together])

    def save(self, path: str | Path) -> Path:
        """Write the model folder whole or not at all: an interrupted save leaves the old folder as it was. What LoRAs change is written into
        the weights. A folder that is there is replaced only if it is a model folder with nothing else in it."""
        path = Path(path)
        parts = {"vae": self.vae, "text": self.text, "unet": self.unet}
        numbers = {name: {"kind": type(part).__name__, **part.numbers} for name, part in parts.items()}
        how = {"target": self.denoiser.target, "weighting": self.denoiser.weighting, "schedule": schedules.to_json(self.schedule)}
        settings = {name: getattr(self, name) for name in ("size", "dropout", "guidance", "sampler", "spacing")}
        whole = {"format": FORMAT, **settings, "denoiser": how, **numbers}
        with atomic.write(path, foreign) as new:
            new.mkdir()
            for name, part in parts.items():
                save_file({k: v.contiguous() for k, v in merged_state(part).items()}, new / f"{name}.safetensors")
            (new / "model.json").write_text(json.dumps(whole, indent=2) + "\n", encoding="utf-8")
        return path

    @classmethod
    def load(cls, path: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype | None = torch.float32) -> "LatentDiffusion":
        """Read a model folder, in this precision or as stored (None); every problem is a UserError that names the file."""
        path = Path(path)
        if not path.exists():
            atomic.recover(path)  # a save that was killed
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
            fill(part, files.tensors(files.inside(path, file)), f"{file} does not fit model.json", precision_of(name, dtype))
        return model.to(device).eval()


def foreign(path: Path) -> Path | None:
    """What in path is not a part of a model folder of ours; see atomic.Stranger."""
    names = {"model.json", "vae.safetensors", "text.safetensors", "unet.safetensors"}
    if not path.is_dir():
        return path
    for entry in sorted(path.iterdir()):
        if entry.name not in names or not entry.is_file():
            return entry
    try:
        whole = files.read_json(path / "model.json")
    except (UserError, OSError):
        return path
    return None if isinstance(whole, dict) and str(whole.get("format", "")).startswith("minidiff") else path / "model.json"


def _empty(numbers: dict) -> nn.Module:
    return empty(PARTS[numbers["kind"]], {k: v for k, v in numbers.items() if k != "kind"})
