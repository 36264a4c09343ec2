"""What a model is told: text encoders as one condition, a class, or nothing.

[1] Podell et al. SDXL: Improving Latent Diffusion Models for High-Resolution Image Synthesis. 2023.
    arXiv:2307.01952
[2] Esser et al. Scaling Rectified Flow Transformers for High-Resolution Image Synthesis. 2024.
    arXiv:2403.03206
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from minidiff.condition import Condition, repeat
from minidiff.errors import UserError
from minidiff.options.sampling import SDXL, SDXL_REFINER, Empty, SampleConfig, Size
from minidiff.t5 import T5, T5Config
from minidiff.text import BIGG14, SDXL_L, CLIPText, TextConfig
from minidiff.training.device import to_device

Vectors = Float[Tensor, "B L D"]


@dataclass(frozen=True)
class PairConfig:
    """The text encoders of SDXL. Its refiner has no clip_l."""

    clip_l: TextConfig | Mapping | None
    clip_g: TextConfig | Mapping
    size: int = 1024  # encode tells of whole images whose sides are so long
    empty: Empty = "zeros"  # what an empty prompt is: zeros, or encoded as any other

    def __post_init__(self) -> None:
        for name in ("clip_l", "clip_g"):  # JSON has mappings
            if isinstance(value := getattr(self, name), dict):
                object.__setattr__(self, name, TextConfig(**value))


class CLIPPair(nn.Module):
    """[1] section 2.1: two text encoders side by side, and the pooled vector of the second."""

    Config = PairConfig

    def __init__(self, config: PairConfig):
        super().__init__()
        self.config = config
        self.clip_l = CLIPText(config.clip_l) if config.clip_l else None
        self.clip_g = CLIPText(config.clip_g)
        self.dim = config.clip_g.width + (config.clip_l.width if config.clip_l else 0)
        self.numbers = SDXL if config.clip_l else SDXL_REFINER  # their names, in order

    def encode(self, prompts: list[str], empty: Empty | None = None) -> Condition:
        """empty: what an empty prompt is. Default: the config's."""
        encoders = [each for each in (self.clip_l, self.clip_g) if each is not None]
        contexts, pooled = zip(*(each.both(each.tokens(prompts)) for each in encoders), strict=True)
        context, pooled = torch.cat(contexts, dim=2), pooled[-1]
        if (empty or self.config.empty) == "zeros":
            words = to_device(torch.tensor([[bool(p)] for p in prompts]), pooled.device)
            context, pooled = context * words[..., None], pooled * words
        size = Size(self.config.size, self.config.size)
        numbers = to_device(torch.tensor(SampleConfig().numbers(self.numbers, size)), pooled.device)
        return Condition(context, pooled, numbers.expand(len(prompts), -1))

    def null(self, batch: int, empty: Empty | None = None) -> Condition:
        """The empty prompt: what guidance steers away from."""
        return repeat(self.encode([""], empty), batch)


@dataclass(frozen=True)
class LabelsConfig:
    classes: Sequence[str]
    dim: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "classes", tuple(self.classes))  # JSON has lists


class ClassLabels(nn.Module):
    """A class as a sequence of length one. The condition "" is the null class."""

    Config = LabelsConfig

    def __init__(self, config: LabelsConfig):
        super().__init__()
        self.config, self.dim = config, config.dim
        self.index = {name: i for i, name in enumerate([*config.classes, ""])}
        self.embedding = nn.Embedding(len(self.index), config.dim)

    def encode(self, prompts: list[str]) -> Float[Tensor, "B 1 D"]:
        """One vector for each class name."""
        unknown = next((p for p in prompts if p not in self.index), None)
        if unknown is not None:
            classes = ", ".join(self.config.classes)
            raise UserError(f'this model knows no class "{unknown}"; it knows {classes}.')
        classes = torch.tensor([self.index[p] for p in prompts])
        return self.embedding(to_device(classes, self.embedding.weight.device))[:, None]

    def null(self, batch: int) -> Float[Tensor, "B 1 D"]:
        """The null class: what guidance steers away from."""
        return self.encode([""] * batch)


@dataclass(frozen=True)
class NoCondition:
    pass


class Unconditional(nn.Module):
    """No condition: the number of prompts is the number of images; their text is ignored."""

    Config = NoCondition

    def __init__(self, config: NoCondition | None = None) -> None:
        super().__init__()
        self.config, self.dim = config or NoCondition(), None

    def encode(self, prompts: list[str]) -> None:
        return None

    def null(self, batch: int) -> None:
        return None


@dataclass(frozen=True)
class T5TextConfig:
    """CLIP-L, in SD 3 CLIP-G, and T5. length: tokens of T5; a seed's picture depends on it. FLUX.1
    has 512, schnell 256; SD 3 has 256 in diffusers, 77 in Stability's code."""

    clip_l: TextConfig | dict  # JSON has dicts
    clip_g: TextConfig | dict | None
    t5: T5Config | dict | None  # None: zeros, which [2] section 5.3 allows
    length: int
    dim: int = 4096  # of the context

    def __post_init__(self) -> None:
        for name, kind in dict(clip_l=TextConfig, clip_g=TextConfig, t5=T5Config).items():
            if isinstance(value := getattr(self, name), dict):
                object.__setattr__(self, name, kind(**value))


class FluxText(nn.Module):
    """Context: of T5. Pooled: CLIP-L's, without projection. numbers: the guidance that the network
    is told, which LatentDiffusion sets."""

    Config = T5TextConfig
    numbers: tuple[str, ...] = ("guidance",)

    def __init__(self, config: T5TextConfig):
        super().__init__()
        self.config, self.dim = config, config.dim
        self.clip_l = CLIPText(config.clip_l)
        self.clip_g = CLIPText(config.clip_g) if config.clip_g else None
        self.t5 = T5(config.t5) if config.t5 else None

    def words(self, prompts: list[str], like: Tensor) -> Vectors:
        """T5's vectors, or zeros of like's device and dtype."""
        if self.t5 is None:
            return like.new_zeros(len(prompts), self.config.length, self.dim)
        return self.t5(self.t5.tokens(prompts, self.config.length))

    def encode(self, prompts: list[str]) -> Condition:
        pooled = self.clip_l.both(self.clip_l.tokens(prompts))[1]
        numbers = pooled.new_ones(len(pooled), 1, dtype=torch.float32)  # bfloat16 has three digits
        return Condition(self.words(prompts, pooled), pooled, numbers)

    def null(self, batch: int) -> Condition:
        """The empty prompt: what guidance steers away from."""
        return repeat(self.encode([""]), batch)


class SD3Text(FluxText):
    """[2] figure 2. Context: both CLIPs' vectors side by side, padded to T5's width, then T5's.
    Pooled: CLIP-L's, without projection, and CLIP-G's, with one. No numbers."""

    numbers = ()

    def encode(self, prompts: list[str]) -> Condition:
        both = [clip.both(clip.tokens(prompts)) for clip in (self.clip_l, self.clip_g)]
        clips, pooled = (torch.cat(each, dim=-1) for each in zip(*both, strict=True))
        clips = F.pad(clips, (0, self.dim - clips.shape[-1]))
        context = torch.cat([clips, self.words(prompts, clips)], dim=1)
        return Condition(context, pooled, pooled[:, :0])


def clip_sdxl() -> CLIPPair:
    """The text encoders of SDXL ([1]), OpenAI's ViT-L/14 and ViT-bigG/14: 817.72 M parameters."""
    return CLIPPair(PairConfig(SDXL_L, BIGG14))
