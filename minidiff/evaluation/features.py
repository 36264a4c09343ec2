"""From images to features: the networks in which distances between images are measured.

A distance shows only what its features show. Small pixels show where colours are, a random network
texture, the critic attributes, a classifier of CIFAR-10 or of photographs what tells its classes
apart. All but Inception's and CLIP's are always there, offline. Images are (B, 3, H, W) in [-1, 1],
of any size.

[1] Naeem et al. Reliable Fidelity and Diversity Metrics for Generative Models. 2020.
    arXiv:2002.09797 (section 5: random networks)
[2] Heusel et al. GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash
    Equilibrium. 2017. arXiv:1706.08500
[3] Hessel et al. CLIPScore: A Reference-free Evaluation Metric for Image Captioning. 2021.
    arXiv:2104.08718
[4] He et al. Deep Residual Learning for Image Recognition. 2016. arXiv:1512.03385
"""

import json
import math
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from minidiff.data import critic
from minidiff.data.folder import to_uint8
from minidiff.errors import UserError
from minidiff.layers import ResBlock

Images = Float[Tensor, "B 3 H W"]
SIDE = 32  # the side that the random network and the classifier see
WIDTHS = (3, 32, 64, 64)
FOLDER = Path(__file__).parents[1] / "networks"
GROUPS = 8  # group norm: an image's features do not depend on its batch
INCEPTION, CIFAR10, PHOTOS = "inception-v3-compat", "cifar10-resnet", "photos-resnet"
PHOTOS_SIDE, PHOTOS_WIDTHS = 64, (32, 64, 128, 256)


def pixels(images: Images) -> Float[Tensor, "B 192"]:
    """Mean colours of 8 x 8 patches."""
    return F.adaptive_avg_pool2d(images, 8).flatten(1)


def random_conv(images: Images) -> Float[Tensor, "B 128"]:
    """Mean and standard deviation of each channel after three random convolutions (seed 0), each of
    which halves the side. [1] recommends random weights for images unlike photographs."""
    x = F.adaptive_avg_pool2d(images, SIDE)
    for weight in _random_weights():
        x = F.leaky_relu(F.conv2d(x, weight.to(x), stride=2, padding=1), 0.2)
    return torch.cat([x.mean((2, 3)), x.std((2, 3))], 1)


@cache
def _random_weights() -> list[Float[Tensor, "out in 3 3"]]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(b, a, 3, 3, generator=generator) * math.sqrt(2 / (9 * a))
        for a, b in pairwise(WIDTHS)
    ]


def attributes(reading: critic.Reading) -> Float[Tensor, "D"]:
    """The number of things; the background; shape, colour, place and size of the two largest
    things. Radii reach 1/4, and are multiplied by 4 to weigh as much as the others."""
    numbers = [float(len(reading.things)), *_one_hot(reading.background, critic.BACKGROUNDS)]
    for thing in [*reading.things, None, None][:2]:
        numbers += _one_hot(thing and thing.shape, dict.fromkeys(critic.WORDS.values()))
        numbers += _one_hot(thing and thing.colour, critic.COLOURS)
        numbers += [thing.x, thing.y, 4 * thing.radius] if thing else [0.0] * 3
    return torch.tensor(numbers)


def _one_hot(name: str | None, names: dict) -> list[float]:
    return [float(name == other) for other in names]


def critic_attributes(images: Images) -> Float[Tensor, "B D"]:
    """`attributes` of each image of the built-in world."""
    return torch.stack([attributes(critic.read(image)) for image in images])


class Classifier(nn.Module):
    """A classifier of small images, used for its features: a residual block ([4]) at each size, of
    32x32 images at 16x16, 8x8 and 4x4. The mean over places gives the features, and one linear
    layer the logits."""

    def __init__(self, classes: int, channels: tuple[int, ...] = (32, 64, 128)):
        super().__init__()
        self.stages = nn.ModuleList(
            nn.Sequential(nn.Conv2d(a, b, 3, stride=2, padding=1), ResBlock(b, b, groups=GROUPS))
            for a, b in pairwise((3, *channels))
        )
        self.norm = nn.GroupNorm(GROUPS, channels[-1])
        self.out = nn.Linear(channels[-1], classes)

    def features(self, images: Images) -> Float[Tensor, "B D"]:
        h = images
        for stage in self.stages:
            h = stage(h)
        return F.silu(self.norm(h)).mean((2, 3))

    def forward(self, images: Images) -> Float[Tensor, "B K"]:
        """The logit of each class."""
        return self.out(self.features(images))


@torch.no_grad()
def cifar10(images: Images) -> Float[Tensor, "B 128"]:
    """Features of a `Classifier` of CIFAR-10, for small photographs; see networks/README.md."""
    return cifar10_classifier().features(F.adaptive_avg_pool2d(images.cpu(), SIDE))


@cache
def cifar10_classifier() -> Classifier:
    """The classifier itself; see networks/README.md."""
    network = Classifier(10)
    network.load_state_dict(load_file(FOLDER / "cifar10_resnet.safetensors"))
    return network.float().eval()


@torch.no_grad()
def photos(images: Images) -> Float[Tensor, "B 256"]:
    """Features of a `Classifier` of 67 things in 64x64 photographs; see networks/README.md."""
    return _photos()[0].features(F.adaptive_avg_pool2d(images.cpu(), PHOTOS_SIDE))


@torch.no_grad()
def photo_things(images: Images, best: int = 1) -> list[list[str]]:
    """The first guesses of that classifier: names of the things that each image shows."""
    network, classes = _photos()
    logits = network(F.adaptive_avg_pool2d(images.cpu(), PHOTOS_SIDE))
    return [[classes[k] for k in row] for row in logits.topk(best).indices.tolist()]


@cache
def _photos() -> tuple[Classifier, list[str]]:
    """The classifier, and the names of its classes from the header of its file."""
    with safe_open(FOLDER / "photos_resnet.safetensors", "pt") as file:
        classes = json.loads(file.metadata()["classes"])
        weights = {name: file.get_tensor(name) for name in file.keys()}
    network = Classifier(len(classes), PHOTOS_WIDTHS)
    network.load_state_dict(weights)
    return network.float().eval(), classes


def inception(images: Images) -> Float[Tensor, "B 2048"]:
    """Inception v3 of [2], through torch-fidelity. Distances in it are called FID."""
    with torch.no_grad():
        return _inception()(to_uint8(images).cpu())[0]


@cache
def _inception() -> nn.Module:
    try:
        from torch_fidelity.utils import create_feature_extractor
    except ImportError:
        raise UserError(
            "Inception's features need torch-fidelity: pip install 'minidiff[eval]'."
        ) from None
    try:
        return create_feature_extractor(INCEPTION, ["2048"], cuda=False)
    except OSError as error:
        reason = " ".join(str(error).split())
        others = ", ".join(name for name in NETWORKS if name != INCEPTION)
        raise UserError(
            f"Inception's weights cannot be had ({reason}); go online once, "
            f"or use other features: {others}."
        ) from None


NETWORKS: dict[str, Callable[[Tensor], Tensor]] = {
    "pixels-8x8": pixels,
    "random-conv-0": random_conv,
    "critic-attributes": critic_attributes,
    CIFAR10: cifar10,
    PHOTOS: photos,
    INCEPTION: inception,
}
# Measured by default; the last one only on the built-in world.
DEFAULTS = ("pixels-8x8", "random-conv-0", "critic-attributes")


def by_name(name: str) -> Callable[[Tensor], Tensor]:
    """The network of this name; UserError if there is none, or if its weights cannot be had."""
    if name not in NETWORKS:
        raise UserError(f'no features "{name}"; there is {", ".join(NETWORKS)}.')
    if name == INCEPTION:
        _inception()  # fails before anything slow has begun
    return NETWORKS[name]


def features(name: str, images: Images, batch: int = 256) -> Float[Tensor, "B D"]:
    """Features of images in a named network, a batch at a time."""
    network = by_name(name)
    return torch.cat([network(some) for some in images.split(batch)])


@cache
def _clip(name: str, weights: str) -> tuple[nn.Module, Callable]:
    import open_clip

    try:
        model, _, _ = open_clip.create_model_and_transforms(name, pretrained=weights)
    except (OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:120]
        raise UserError(
            f"CLIP's weights {name}/{weights} cannot be had ({reason}); "
            "go online once, or leave `clip` out."
        ) from None
    return model, open_clip.get_tokenizer(name)


@torch.no_grad()
def clip_similarity(
    images: Images, prompts: list[str], name: str = "ViT-B-32", weights: str = "openai"
) -> Float[Tensor, "B"]:
    """The cosine between each image and its prompt in CLIP's space; [3] multiplies it by 2.5. The
    weights are downloaded on first use."""
    model, tokenizer = _clip(name, weights)
    visual, cosines = model.visual, []
    side = visual.image_size[0] if isinstance(visual.image_size, tuple) else visual.image_size
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (visual.image_mean, visual.image_std))
    for some, words in zip(images.cpu().split(64), tokenizer(prompts).split(64), strict=True):
        scaled = F.interpolate(some / 2 + 0.5, (side, side), mode="bicubic", antialias=True)
        image_vectors = model.encode_image((scaled.clamp(0, 1) - mean) / std)
        cosines.append(F.cosine_similarity(image_vectors, model.encode_text(words)))
    return torch.cat(cosines)
