"""ControlNet: an image of outlines, a pose or depths steers a U-Net that stays as it is.

    residuals = controlnet(x_t, t, context, hint)
    F = unet(x_t, t, context, residuals)              # added to the skips and the middle's output

A ControlNet is a trained copy of the U-Net's encoder and middle, which also reads the hint. Each of
its outputs passes a zero convolution, a 1x1 convolution that starts at zero. So before the first
training step the U-Net draws what it drew without it, to the bit ([1] section 3.1).

[1] Zhang, Rao, Agrawala. Adding Conditional Control to Text-to-Image Diffusion Models. 2023.
    arXiv:2302.05543
"""

import copy
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from minidiff.condition import Context
from minidiff.denoiser import Denoiser
from minidiff.errors import UserError
from minidiff.latent_diffusion import LatentDiffusion
from minidiff.methods.lora import merged_state
from minidiff.unet import UNet, UNetConfig

Hint, Latents = Float[Tensor, "N 3 H W"], Float[Tensor, "B Z h w"]
HINT_WIDTHS = (16, 32, 96, 256)  # [1] section 3.2, for latents an eighth of the image's side
SAME = "channels blocks depth context_dim linear_projection middle added".split()


@dataclass(frozen=True)
class ControlNetConfig(UNetConfig):
    """Of the U-Net that is controlled, and the widths of the hint encoder: each level but the first
    halves the sides."""

    hint: Sequence[int] = HINT_WIDTHS

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "hint", tuple(self.hint))  # JSON has lists
        if not self.hint:
            raise UserError("hint is empty; a hint encoder has at least one level.")


class ControlNet(UNet):
    """A U-Net's encoder and middle; its forward gives the residuals of the skips, then the
    middle's."""

    Config = ControlNetConfig

    def __init__(self, config: ControlNetConfig):
        super().__init__(config)
        del self.decoder, self.norm_out, self.conv_out
        self.factor = 2 ** (len(config.hint) - 1)
        layers: list[nn.Module] = [nn.Conv2d(3, config.hint[0], 3, padding=1), nn.SiLU()]
        for width, wider in pairwise(config.hint):
            layers += [nn.Conv2d(width, width, 3, padding=1), nn.SiLU()]
            layers += [nn.Conv2d(width, wider, 3, stride=2, padding=1), nn.SiLU()]
        layers.append(_zero(nn.Conv2d(config.hint[-1], config.channels[0], 3, padding=1)))
        self.hint = nn.Sequential(*layers)
        last, widths = len(config.channels) - 1, [config.channels[0]]
        for level, c in enumerate(config.channels):
            widths += [c] * (config.blocks + (level < last))
        self.zero = nn.ModuleList(_zero(nn.Conv2d(c, c, 1)) for c in widths)
        self.zero_middle = _zero(nn.Conv2d(widths[-1], widths[-1], 1))

    def forward(
        self, x: Latents, t: Shaped[Tensor, "B"], context: Context | None, hint: Hint
    ) -> list[Float[Tensor, "B _ _ _"]]:
        """hint: RGB in [0, 1], not [-1, 1] as images are; one, or one of each x."""
        sides, expected = tuple(hint.shape[2:]), tuple(self.factor * side for side in x.shape[2:])
        if sides != expected:
            raise UserError(f"the hint is {_by(sides)} pixels; these latents take {_by(expected)}.")
        if len(x) % len(hint):
            raise UserError(f"{len(hint)} hints for {len(x)} images; give one, or one of each.")
        features = self.hint(hint.to(self.conv_in.weight)).repeat(len(x) // len(hint), 1, 1, 1)
        maps, _, _ = self.encode(x, t, context, features)
        return [zero(h) for zero, h in zip([*self.zero, self.zero_middle], maps, strict=True)]


def _zero(layer: nn.Conv2d) -> nn.Conv2d:
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def _by(sides: tuple[int, ...]) -> str:
    return f"{sides[1]}x{sides[0]}"


def copy_of(unet: UNet, factor: int) -> ControlNet:
    """An untrained ControlNet for this U-Net, in float32. factor: the VAE's, of pixels to latents.
    Its hint encoder starts at random, but for its last layer, which is zero."""
    levels = factor.bit_length()
    if not 1 <= levels <= len(HINT_WIDTHS) or factor != 2 ** (levels - 1):
        raise UserError(f"a factor of {factor}; hint encoders are known for 1, 2, 4 and 8.")
    config = asdict(unet.config) | {"hint": HINT_WIDTHS[:levels]}
    controlnet = ControlNet(ControlNetConfig(**config))
    controlnet.load_state_dict(controlnet.state_dict() | _shared(controlnet, unet))
    return controlnet


def _shared(controlnet: ControlNet, unet: UNet) -> dict[str, Tensor]:
    """The U-Net's tensors that a ControlNet has too."""
    names = controlnet.state_dict().keys()
    return {name: value for name, value in merged_state(unet).items() if name in names}


@dataclass(frozen=True)
class Control:
    """A ControlNet; what it is shown: RGB in [0, 1], one for all images or one of each; and how
    much of its residuals is added."""

    network: ControlNet
    hint: Hint
    scale: float = 1.0

    def __post_init__(self) -> None:
        low, high = self.hint.min().item(), self.hint.max().item()
        if not 0 <= low <= high <= 1:
            raise UserError(f"the hint's values are {low:g} to {high:g}; they must be in [0, 1].")


class Controlled(nn.Module):
    """A U-Net with a ControlNet, called as a U-Net is."""

    def __init__(self, unet: UNet, control: Control):
        super().__init__()
        own, other = control.network.config, unet.config
        for name in SAME:
            if getattr(own, name) != getattr(other, name):
                what = f"its {name} is {getattr(own, name)}, the U-Net's is {getattr(other, name)}"
                raise UserError(f"this ControlNet is of another model: {what}.")
        self.unet, self.controlnet = unet, control.network
        self.hint, self.scale = control.hint, control.scale
        self.config, self.context_dim, self.multiple = other, unet.context_dim, unet.multiple

    def forward(
        self, x: Latents, t: Shaped[Tensor, "B"], context: Context | None = None
    ) -> Float[Tensor, "B _ h w"]:
        latents = x[:, : self.controlnet.config.in_channels]  # without an inpainting model's mask
        residuals = self.controlnet(latents, t, context, self.hint)
        like = self.unet.conv_in.weight
        return self.unet(x, t, context, [self.scale * r.to(like) for r in residuals])


def controlled_denoiser(denoiser: Denoiser, control: Control) -> Denoiser:
    """The denoiser with its U-Net controlled; they share all weights."""
    network = denoiser.network
    copied = copy.deepcopy(denoiser, {id(network): network})
    copied.network = Controlled(network, control)
    return copied


def controlled(model: LatentDiffusion, control: Control) -> LatentDiffusion:
    """The model with its U-Net controlled, to sample from; they share all weights."""
    shared = (model.vae, model.text, model.denoiser)
    copied = copy.deepcopy(model, {id(part): part for part in shared})
    copied.denoiser = controlled_denoiser(model.denoiser, control)
    return copied


def outlines(images: Float[Tensor, "N 3 H W"], threshold: float = 0.5) -> Hint:
    """White where a channel of an image in [-1, 1] changes by more than the threshold to the next
    pixel, right or down; else black."""
    padded = F.pad(images, (0, 1, 0, 1), mode="replicate")
    right, down = padded[..., :-1, 1:] - images, padded[..., 1:, :-1] - images
    change = torch.maximum(right.abs(), down.abs()).amax(1, keepdim=True)
    return (change > threshold).to(images).repeat(1, 3, 1, 1)
