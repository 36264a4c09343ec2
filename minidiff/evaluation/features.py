"""From pictures to features: the networks that a distance between pictures can be measured in, in this file. Four are always there, offline.

A distance says what its features see and nothing else: small pixels see where colours are, a random network sees texture, the critic sees
attributes, a classifier of CIFAR-10 what tells its ten classes apart. Pictures are (B, 3, H, W) in [-1, 1], of any one size.

[1] Naeem et al. Reliable Fidelity and Diversity Metrics for Generative Models. 2020. arXiv:2002.09797 (section 5: random networks)
[2] Heusel et al. GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash Equilibrium. 2017. arXiv:1706.08500
[3] Hessel et al. CLIPScore: A Reference-free Evaluation Metric for Image Captioning. 2021. arXiv:2104.08718
"""

import math
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from safetensors.torch import load_file
from torch import Tensor

from minidiff.data import critic
from minidiff.data.folder import to_uint8
from minidiff.errors import UserError
from minidiff.evaluation.classifier import Classifier

Pictures = Float[Tensor, "B 3 H W"]
SIDE = 32  # what the random network sees, whatever the size
WIDTHS = (3, 32, 64, 64)
INCEPTION, CIFAR10 = "inception-v3-compat", "cifar10-resnet"


def pixels(pictures: Pictures) -> Float[Tensor, "B 192"]:
    """Mean colours of 8 x 8 patches."""
    return F.adaptive_avg_pool2d(pictures, 8).flatten(1)


def random_conv(pictures: Pictures) -> Float[Tensor, "B 128"]:
    """Three convolutions with random weights, seed 0, each halving the side; then mean and spread of each channel. [1] recommends random
    weights where pictures are far from the photographs that pretrained networks know."""
    x = F.adaptive_avg_pool2d(pictures, SIDE)
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
    """What the critic sees, as numbers: the background, and of the two largest things shape, colour, size and place; how many things there are."""
    things = [*reading.things, None, None][:2]
    numbers = [float(len(reading.things)), *_one_hot(reading.background, critic.BACKGROUNDS)]
    for thing in things:
        numbers += _one_hot(thing and thing.shape, dict.fromkeys(critic.WORDS.values())) + _one_hot(
            thing and thing.colour, critic.COLOURS
        )
        numbers += (
            [thing.x, thing.y, 4 * thing.radius] if thing else [0.0] * 3
        )  # radii up to 1/4: as large as the others
    return torch.tensor(numbers)


def _one_hot(name: str | None, names: dict) -> list[float]:
    return [float(name == other) for other in names]


def critic_attributes(pictures: Pictures) -> Float[Tensor, "B D"]:
    """For pictures of the built-in world: `attributes` of each."""
    return torch.stack([attributes(critic.read(picture)) for picture in pictures])


@torch.no_grad()
def cifar10(pictures: Pictures) -> Float[Tensor, "B 128"]:
    """What a small classifier of CIFAR-10 has before its last layer; networks/README.md is its card. For small photographs."""
    return _cifar10().features(F.adaptive_avg_pool2d(pictures.cpu(), SIDE))


@cache
def _cifar10() -> torch.nn.Module:
    network = Classifier(10)
    network.load_state_dict(
        load_file(Path(__file__).parents[1] / "networks" / "cifar10_resnet.safetensors")
    )
    return network.float().eval()


def inception(pictures: Pictures) -> Float[Tensor, "B 2048"]:
    """Inception v3 as published with [2], through torch-fidelity; distances in it are called FID."""
    with torch.no_grad():
        return _inception()(to_uint8(pictures).cpu())[0]


@cache
def _inception() -> torch.nn.Module:
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
            f"Inception's weights cannot be had ({reason}); go online once, or use other features: {others}."
        ) from None


NETWORKS: dict[str, Callable[[Tensor], Tensor]] = {
    "pixels-8x8": pixels,
    "random-conv-0": random_conv,
    "critic-attributes": critic_attributes,
    CIFAR10: cifar10,
    INCEPTION: inception,
}
DEFAULTS = (
    "pixels-8x8",
    "random-conv-0",
    "critic-attributes",
)  # what nobody named is measured in; the last only on the built-in world


def by_name(name: str) -> Callable[[Tensor], Tensor]:
    """The network a command line names."""
    if name not in NETWORKS:
        raise UserError(f'no features "{name}"; there is {", ".join(NETWORKS)}.')
    if name == INCEPTION:
        _inception()  # complains before anything slow
    return NETWORKS[name]


def features(name: str, pictures: Pictures, batch: int = 256) -> Float[Tensor, "B D"]:
    """A named network's features of pictures, a batch at a time."""
    network = by_name(name)
    return torch.cat([network(some) for some in pictures.split(batch)])


@cache
def _clip(name: str, weights: str) -> tuple[torch.nn.Module, Callable]:
    import open_clip

    try:
        model, _, _ = open_clip.create_model_and_transforms(name, pretrained=weights)
    except (OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:120]
        raise UserError(
            f"CLIP's weights {name}/{weights} cannot be had ({reason}); go online once, or leave --clip out."
        ) from None
    return model, open_clip.get_tokenizer(name)


def clip_similarity(
    pictures: Pictures, prompts: list[str], name: str = "ViT-B-32", weights: str = "openai"
) -> Float[Tensor, "B"]:
    """The cosine between each picture and its prompt in CLIP's space: what [3] multiplies by 2.5, others by 100. Weights are fetched on first use."""
    model, tokenizer = _clip(name, weights)
    side = (
        model.visual.image_size[0]
        if isinstance(model.visual.image_size, tuple)
        else model.visual.image_size
    )
    mean, std = (
        torch.tensor(numbers).view(3, 1, 1)
        for numbers in (model.visual.image_mean, model.visual.image_std)
    )
    tokens = tokenizer(prompts)
    found = []
    with torch.no_grad():
        for some, words in zip(pictures.cpu().split(64), tokens.split(64), strict=True):
            shown = (
                F.interpolate(some / 2 + 0.5, (side, side), mode="bicubic", antialias=True).clamp(
                    0, 1
                )
                - mean
            ) / std
            found.append(
                (
                    F.normalize(model.encode_image(shown), dim=1)
                    * F.normalize(model.encode_text(words), dim=1)
                ).sum(1)
            )
    return torch.cat(found)
