"""From prompts to finished images: batches, progress, editing, tiles, and where NaN began."""

from collections.abc import Callable, Iterator
from itertools import count

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from minidiff.errors import UserError
from minidiff.latent_diffusion import LatentDiffusion
from minidiff.methods import editing
from minidiff.options.sampling import SampleConfig
from minidiff.samplers import Normal
from minidiff.training import finite

Images = Float[Tensor, "B C H W"]
MEGAPIXEL = 2**20
ADVICE = "compute in bf16 or fp32."  # float16 overflows


def generate(
    model: LatentDiffusion,
    prompts: list[str],
    config: SampleConfig | None = None,
    batch: int = 64,
    edit: editing.Edit | None = None,
    first: int = 0,
    progress: bool = False,
) -> Images:
    """Images in [-1, 1], one for each prompt, all at once; the arguments are draw's."""
    return torch.cat(list(draw(model, prompts, config, batch, edit, first, progress)))


@torch.no_grad()
def draw(
    model: LatentDiffusion,
    prompts: list[str],
    config: SampleConfig | None = None,
    batch: int = 64,
    edit: editing.Edit | None = None,
    first: int = 0,
    progress: bool = False,
) -> Iterator[Images]:
    """The same, yielded a batch at a time.

    edit: start from an image; outside its mask that image stays, to the bit. first: the number of the
    first image; the noise of image k follows from (config.seed, k) alone, so that it is the same in any
    batch. progress: show a bar. Numbers that are not finite are a UserError that names the module where
    they began.
    """
    config = config or SampleConfig()
    if not prompts:
        raise UserError("no prompts to generate from; name at least one.")
    chunks = [prompts[start : start + batch] for start in range(0, len(prompts), batch)]
    steps = config.steps if edit is None else max(1, int(config.steps * edit.strength))
    total = len(chunks) * steps
    with tqdm(desc="sampling", total=total, unit="step", delay=0.01, disable=not progress) as bar:
        for chunk, start in zip(chunks, count(first, batch), strict=False):
            images = _batch(model, chunk, config, edit, start, bar)
            if not images.isfinite().all():  # once more, with a look at every module
                with finite.watched(model, ADVICE):
                    _batch(model, chunk, config, edit, start, bar)
                raise UserError(f"the images hold numbers that are not finite; {ADVICE}")
            images = images.clamp(-1, 1)
            yield images if edit is None else edit.paste(images)


def _batch(
    model: LatentDiffusion,
    prompts: list[str],
    config: SampleConfig,
    edit: editing.Edit | None,
    first: int,
    bar: tqdm,
) -> Images:
    noise = Normal.seeded(config.seed, range(first, first + len(prompts)))
    if edit is not None:
        frames = editing.edited(model, prompts, edit, config, noise)
    elif model.unet.config.in_channels != model.vae.latent_channels:
        editing.inpainting_denoiser(model, edit)  # says what is missing
    else:
        frames = model.sample(prompts, generator=noise, config=config)
    for frame in frames:
        bar.update(frame.t > 0)  # the last frame is clean, and took no step
    return decode(model, frame.x0, config.tile)


def decode(
    model: LatentDiffusion, latents: Float[Tensor, "B Z h w"], tile: bool | None = None
) -> Images:
    """Images from latents in bounded memory, in tiles where asked, by default above a megapixel."""
    f = model.vae.factor
    if tile or (tile is None and latents[0, 0].numel() * f**2 > MEGAPIXEL):
        return torch.cat(
            [tiled(model.vae.decode, z, 512 // f, 128 // f, f) for z in latents.split(1)]
        )
    return model.decode(latents)


def tiled(
    decode: Callable[[Tensor], Tensor],
    x: Float[Tensor, "B Z h w"],
    tile: int,
    overlap: int,
    scale: int,
) -> Images:
    """decode(x), from tiles of tile x tile that overlap; decode makes images `scale` times as large.

    Where two tiles overlap, one fades linearly into the other, so that no seam shows.
    """
    height, width = x.shape[2:]
    images = weight = None
    for top in _starts(height, tile, tile - overlap):
        for left in _starts(width, tile, tile - overlap):
            part = decode(x[:, :, top : top + tile, left : left + tile])
            if images is None:
                images = part.new_zeros(*part.shape[:2], height * scale, width * scale)
                weight = images[:1, :1].clone()
            rows = slice(top * scale, top * scale + part.shape[2])
            columns = slice(left * scale, left * scale + part.shape[3])
            fade = _fade(part.shape[2], overlap * scale, part)[:, None]
            fade = fade * _fade(part.shape[3], overlap * scale, part)
            images[:, :, rows, columns] += part * fade
            weight[:, :, rows, columns] += fade
    return images / weight


def _starts(length: int, tile: int, stride: int) -> list[int]:
    """Where tiles begin; the last one ends where the image does."""
    return [*range(0, max(length - tile, 0), stride), max(length - tile, 0)]


def _fade(length: int, overlap: int, like: Tensor) -> Float[Tensor, "N"]:
    """Up over the overlap, flat, and down again; never 0, because an image's edge has one tile only."""
    ramp = torch.arange(1, length + 1, device=like.device, dtype=like.dtype)
    return torch.minimum(ramp, ramp.flip(0)).clamp(max=overlap + 1) / (overlap + 1)
