"""The networks of a training from scratch, by space and size: a row of PRESETS for each.

The small U-Nets are those of experiments/cifar_ddpm.py and experiments/text_to_image.py; the base
ones are meant for a GPU, where nothing was measured. All estimate x0, as the weighting "learned"
(losses.py) wants it; docs/train.md compares that with "v".
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain

from minidiff import schedules
from minidiff.denoiser import Denoiser
from minidiff.options.sampling import check_size
from minidiff.options.training import TrainingConfig
from minidiff.text import CLIPText, TextConfig, token_ids
from minidiff.unet import UNet, UNetConfig
from minidiff.vae import VAE, VAEConfig

MANY, MOST_EPOCHS = 5000, 1000  # images that a base preset wants; how often steps show an image
CONTEXTS = (32, 48, 77)  # lengths of a context, of which captions get the first that holds them
LEVELS = 4


@dataclass(frozen=True)
class Preset:
    """How large the networks are, and how they are trained."""

    width: int  # of the U-Net's finest level
    multipliers: tuple[int, int, int, int]  # of the width, by level
    blocks: int  # residual blocks a level
    text: tuple[int, int]  # the text encoder's width and layers
    batch: int
    lr: float
    steps: int
    vae_width: int = 0  # of the VAE's finest level
    vae_batch: int = 8


PIXELS, LATENTS = (1, 2, 4, 8), (1, 1, 2, 2)
PRESETS = {
    ("pixels", "tiny"): Preset(8, PIXELS, 1, (16, 1), 4, 1e-3, 20),
    ("pixels", "small"): Preset(32, PIXELS, 1, (128, 2), 16, 1e-3, 5000),
    ("pixels", "base"): Preset(64, PIXELS, 2, (256, 4), 64, 3e-4, 50_000),
    ("latents", "tiny"): Preset(16, LATENTS, 1, (16, 1), 4, 1e-3, 20, 8, 4),
    ("latents", "small"): Preset(64, LATENTS, 1, (128, 2), 16, 1.5e-3, 5000, 16),
    ("latents", "base"): Preset(192, LATENTS, 2, (256, 4), 64, 3e-4, 50_000, 48, 32),
}


def completed(config: TrainingConfig, count: int, side: int, device: str) -> TrainingConfig:
    """The config with what suits `count` images, of this shorter side, filled in; not yet what
    depends on the number of steps."""
    size = config.size or (64 if side >= 64 else 32)
    trains_vae = config.vae or config.vae_steps
    space = config.space or ("pixels" if size <= 32 and not trains_vae else "latents")
    large = device.startswith("cuda") and count >= MANY
    preset = config.preset or ("base" if large else "small")
    row = PRESETS[space, preset]
    filled = {"batch": config.batch or row.batch, "lr": config.lr or row.lr}
    return replace(config, size=size, space=space, preset=preset, **filled)


def default_steps(config: TrainingConfig, count: int) -> int:
    """The preset's, but no image is seen more than MOST_EPOCHS times."""
    steps = PRESETS[config.space, config.preset].steps
    return min(steps, max(500, MOST_EPOCHS * count // config.batch))


def vae_of(config: TrainingConfig) -> VAE:
    """One whose latents are an eighth of the side, a quarter up to 128 pixels, half up to 32."""
    width, levels = PRESETS[config.space, config.preset].vae_width, 2
    levels += (config.size > 32) + (config.size > 128)
    channels = tuple(width * 2 ** min(level, 2) for level in range(levels))
    return VAE(VAEConfig(3, 4, channels, blocks=1, groups=0))


def text_of(config: TrainingConfig, captions: Sequence[Sequence[str]]) -> CLIPText:
    """A small text encoder that begins as a bag of words (text.py), long enough for the captions
    with their start and end (or for any, where none are known yet)."""
    width, layers = PRESETS[config.space, config.preset].text
    lengths = (len(token_ids(caption)) for caption in chain(*captions))
    longest = 2 + max(lengths, default=CONTEXTS[-1])
    length = next((n for n in CONTEXTS if n >= longest), CONTEXTS[-1])
    heads, vectors = max(1, width // 32), {"context_length": length, "words_only": True}
    return CLIPText(TextConfig(width, layers, heads, **vectors))


def denoiser_of(
    config: TrainingConfig, channels: int, factor: int, context_dim: int | None
) -> Denoiser:
    """A U-Net on latents of so many channels, `factor` times smaller than the images, with its
    schedule and target. A size that the networks cannot take is a UserError."""
    check_size(config.size, factor * 2 ** (LEVELS - 1))
    row, side = PRESETS[config.space, config.preset], config.size // factor
    widths = tuple(row.width * multiplier for multiplier in row.multipliers)
    network = UNetConfig(
        channels,
        channels,
        channels=widths,
        blocks=row.blocks,
        # attention where maps are small, and never at the finest
        depth=tuple(int(level > 0 and side >> level <= 16) for level in range(LEVELS)),
        heads=tuple(max(1, width // 32) for width in widths),
        context_dim=context_dim,
        ff_mult=0 if config.space == "pixels" else 4,
        groups=min(32, row.width),
        pooled=context_dim is not None,
        scale_shift=config.space == "latents",
    )
    return Denoiser(UNet(network), schedules.cosine(), "x0", "learned")
