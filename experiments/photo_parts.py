"""What pretrain_photos.py begins with: captioned photographs in memory; a VAE that keeps their
edges, without anybody's weights; a text encoder that tells the things apart.

[1] Rombach et al. High-Resolution Image Synthesis with Latent Diffusion Models. arXiv:2112.10752
[2] Mathieu, Couprie, LeCun. Deep Multi-Scale Video Prediction beyond Mean Square Error. 2016.
    arXiv:1511.05440 (section 3.2: the gradient difference loss)
[3] Zhang et al. The Unreasonable Effectiveness of Deep Features as a Perceptual Metric. 2018.
    arXiv:1801.03924
"""

import copy
import random
from collections.abc import Iterator
from functools import partial
from itertools import count
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from photo_judge import Pictures, pictures
from torch import Tensor, nn

from minidiff.data import buckets
from minidiff.data.folder import CaptionedFolder, load_all, to_model
from minidiff.evaluation import features
from minidiff.evaluation.features import Classifier
from minidiff.recipes import reading
from minidiff.recipes.plan import Act
from minidiff.recipes.reading import Lesson
from minidiff.text import CLIPText, TextConfig
from minidiff.train import Loss, TrainConfig
from minidiff.training.seeds import generator_of
from minidiff.vae import VAE, VAEConfig

Images = Float[Tensor, "B 3 H W"]

SIZE = 64
VAE_BATCH, VAE_LR, WINDOW = 32, 4e-3, 32  # windows of 32x32 in a step
WHOLE = 0.7  # from this share of the steps on, the VAE sees whole pictures, a quarter as many
SCALES, EDGES = 3, 0.25  # sizes at which edges are compared, and the weight of each
TEXTURE = 0.25  # weight of the difference in features, after each stage of their network
LATENT_CHANNELS = 8
TEXT_BATCH, TEXT_LR = 64, 4e-3
MOMENTUM = (0.95, 0.99)  # of Muon, and of Adam's square (training/muon.py)
# what a caption that names a thing is read as, one of them at a time
PHRASINGS = (
    "a photo of {}",
    "a photo of {}",
    "a picture of {}",
    "a photograph of {}",
    "a small photo of {}",
    "a close-up photo of {}",
    "there is {}",
    "{}",
    "{name}",
    "the {name}",
)


class Photos(NamedTuple):
    """Photographs, the captions that fit each, and of shards with labels the thing that each
    shows."""

    pixels: UInt8[Tensor, "N 3 S S"]
    captions: list[list[str]]
    labels: list[str] | None


def with_article(name: str) -> str:
    return f"an {name}" if name[0].lower() in "aeiou" else f"a {name}"


def phrasings(label: str) -> list[str]:
    """Captions of a thing; the first is the one that is asked for when a model is judged."""
    return [text.format(with_article(label), name=label) for text in PHRASINGS]


def photos(data: Path, part: str, limit: int | None = None) -> Photos:
    """The photographs of data/PART-*.tar; of a captioned folder all but every twentieth for
    "train", and those for "held_out"."""
    if list(data.glob("*.tar")):
        stored: Pictures = pictures(data, part, limit)
        return Photos(stored.pixels, [phrasings(name) for name in stored.labels], stored.labels)
    folder = CaptionedFolder(data, SIZE, several=True)
    pixels, _ = load_all(folder, SIZE)
    rows = [k for k in range(len(pixels)) if (k % 20 == 19) == (part == "held_out")][:limit]
    return Photos(pixels[rows], [list(folder.alternatives[k]) for k in rows], None)


# The VAE.


def vae_photos() -> VAE:
    """64x64x3 images to 16x16x8 latents. Through 4 channels, 22 dB, the judge knew 0.35 of pictures of
    which it knows 0.66: photographs this small have little that is smooth."""
    return VAE(VAEConfig(3, LATENT_CHANNELS, channels=(24, 48, 64), blocks=1, groups=0))


def windows(
    images: UInt8[Tensor, "N 3 S S"], batch: int, whole: int, seed: int, start: int
) -> Iterator[Images]:
    """Batches start, start + 1, ... of windows, half of them mirrored; from batch `whole` on a
    quarter as many pictures, whole."""
    orders = buckets.batches([(1, 1)] * len(images), min(batch, len(images)), seed, start)
    for k, rows in zip(count(start), orders, strict=False):
        generator = generator_of(seed, k)
        rows = rows[: max(1, len(rows) // 4)] if k >= whole else rows
        side = images.shape[-1] if k >= whole else WINDOW
        places = torch.randint(images.shape[-1] - side + 1, (len(rows), 2), generator=generator)
        chosen = torch.stack(
            [
                images[row, :, i : i + side, j : j + side]
                for row, (i, j) in zip(rows, places.tolist(), strict=True)
            ]
        )
        mirrored = torch.rand(len(rows), generator=generator) < 0.5
        chosen[mirrored] = chosen[mirrored].flip(-1)
        yield to_model(chosen).contiguous(memory_format=torch.channels_last)


def difference(a: Images, b: Images) -> Float[Tensor, "B"]:
    """The mean absolute error of pixels, and of their horizontal and vertical differences ([2]
    eq. 6, exponent 1, signed) at several sizes: an error of pixels alone leaves pictures blurred.
    """
    error = (a - b).float()
    total = error.abs().flatten(1).mean(1)
    for _ in range(SCALES):
        for axis in (2, 3):
            total = total + EDGES * error.diff(dim=axis).abs().flatten(1).mean(1)
        error = F.avg_pool2d(error, 2)
    return total


def texture(network: Classifier, a: Images, b: Images) -> Float[Tensor, "B"]:
    """The squared distance of features, of unit length at each place, after each stage of a
    classifier ([3] eq. 1 without its learned weights)."""
    total = torch.zeros(len(a), device=a.device)
    for stage in network.stages:
        a, b = stage(a), stage(b)
        apart = F.normalize(a.float(), dim=1) - F.normalize(b.float(), dim=1)
        total = total + apart.square().sum(1).flatten(1).mean(1)
    return total


def vae_loss(vae: VAE, classifier: Classifier, images: Images) -> Loss:
    """The differences of images and what the VAE makes of them, with the KL term of [1].
    classifier: of CIFAR-10, minidiff's own, which is not the judge."""
    images = images.to(vae.latent_scale.device)
    mean, log_variance = vae.posterior(images)
    z = mean + (0.5 * log_variance).exp() * torch.randn_like(mean)
    again = vae.decoder(vae.post_quant(z))
    kl = 0.5 * (mean.pow(2) + log_variance.exp() - 1 - log_variance).flatten(1).sum(1)
    size = images[0].numel() / (3 * SIZE**2)  # a window has fewer latents
    error = difference(again, images) + TEXTURE * texture(classifier, again, images)
    return {"loss": error + vae.config.kl_weight / size * kl}


def vae_act(
    train_set: Photos, steps: int, seed: int, dtype: torch.dtype | None, device: str
) -> Act:
    torch.manual_seed(seed)
    vae = vae_photos().to(device, memory_format=torch.channels_last)
    data = partial(windows, train_set.pixels, VAE_BATCH, round(WHOLE * steps), seed)
    classifier = copy.deepcopy(features.cifar10_classifier()).requires_grad_(False).to(device)
    return Act(
        "VAE", vae, partial(vae_loss, vae, classifier), data, config_of(steps, VAE_LR, seed, dtype)
    )


@torch.no_grad()
def through(vae: VAE, of: Photos) -> dict[str, float]:
    """Decibels of the pictures that come back from latents, and the share of them that the judge
    takes for what they show: no model of these latents is worth more."""
    errors, guesses = [], []
    for some in of.pixels.split(64):
        x = to_model(some)
        again = vae.decode(vae.encode(x.to(vae.latent_scale.device))).clamp(-1, 1).cpu()
        errors.append((again - x).square().flatten(1).mean(1))
        guesses += features.photo_things(again) if of.labels else []
    figures = {"vae_psnr_db": round(-10 * (torch.cat(errors) / 4).mean().log10().item(), 2)}
    if of.labels:
        right = [a == b for (a,), b in zip(guesses, of.labels, strict=True)]
        figures["vae_accuracy"] = round(sum(right) / len(right), 4)
    return figures


# The text encoder.


def text_photos() -> CLIPText:
    """As the quickstart's: CLIP's transformer, small."""
    return CLIPText(TextConfig(width=64, layers=2, heads=2, context_length=32, words_only=True))


def codes(things: list[str], dim: int) -> dict[str, Float[Tensor, "D"]]:
    """A direction for each thing, of length sqrt(dim), as near to right angles as they fit."""
    directions = nn.init.orthogonal_(torch.empty(len(things), dim))
    return dict(zip(things, dim**0.5 * F.normalize(directions, dim=1), strict=True))


def lessons(directions: dict[str, Tensor], batch: int, seed: int, start: int) -> Iterator[Lesson]:
    """Captions of random things, and the direction that the sum of each one's vectors should be."""
    things = list(directions)
    for k in count(start):
        rng = random.Random(f"photos {seed} {k}")
        chosen = rng.choices(things, k=batch)
        captions = [rng.choice(phrasings(thing)) for thing in chosen]
        yield Lesson(captions, torch.stack([directions[thing] for thing in chosen]))


def text_act(things: list[str], steps: int, seed: int, device: str) -> Act:
    """The text encoder learns which thing a caption names (recipes/reading.py), before it sees a
    picture. Words of no caption keep random vectors."""
    torch.manual_seed(seed)
    text = text_photos()
    data = partial(lessons, codes(things, text.dim), TEXT_BATCH, seed)
    loss = partial(reading.loss, text.to(device))
    return Act("text", text, loss, data, config_of(steps, TEXT_LR, seed, None))


def config_of(
    steps: int, lr: float, seed: int, dtype: torch.dtype | None, warmup: int = 100
) -> TrainConfig:
    return TrainConfig(
        steps,
        lr,
        warmup=min(warmup, steps // 10),
        optimizer="muon",
        betas=MOMENTUM,
        autocast=dtype,
        seed=seed,
    )
