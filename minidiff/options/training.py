"""The options of a training from scratch."""

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, get_args

from minidiff.errors import UserError, choice
from minidiff.options.finetuning import Precision, check_limits

Space = Literal["pixels", "latents"]
Layout = Literal["captions", "classes", "pictures", "shards"]
PresetName = Literal["tiny", "small", "base"]


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How a model is trained from scratch. None stands for what suits the images."""

    # side of the images in pixels. Default: 64, or 32 where the images are smaller
    size: int | None = None
    # denoise pixels, or latents of a VAE that is trained first. Default: pixels up to size 32
    space: Space | None = None
    # captions: a table or text files; classes: a folder for each, whose name is the caption;
    # pictures: no text, an unconditional model; shards: WebDataset's *.tar, with captions. Default:
    # what is in the folder
    layout: Layout | None = None
    # the key of the captions in the table
    caption_column: str = "text"
    # how large the networks are: tiny to try it out, small for a CPU, base for a GPU. Default:
    # base on a GPU with 5,000 images or more, else small
    preset: PresetName | None = None
    # optimizer steps. Default: the preset's, fewer for few images
    steps: int | None = None
    # take as many steps as fit in so many minutes on this machine, the VAE's included
    minutes: float | None = None
    # images in a step. Default: the preset's
    batch: int | None = None
    # peak learning rate. Default: the preset's
    lr: float | None = None
    # decay of the average of the weights, which is drawn with and saved. Default: about the last
    # tenth of the steps
    ema: float | None = None
    # steps between two grids of samples. Default: a tenth of all
    every: int | None = None
    # train on mirrored images too; do not if captions say left or right
    flip: bool = False
    # share of the images to hold out: never trained on
    validation: float = 0.1
    # how often a caption is dropped, so that guidance works
    dropout: float = 0.1
    # optimizer steps of the VAE. Default: half of the others
    vae_steps: int | None = None
    # take the VAE from this model or checkpoint; it is not trained
    vae: Path | None = None
    # take the text encoder from this model or checkpoint; it is not trained
    text: Path | None = None
    # precision to compute in; the weights stay in fp32
    dtype: Precision = "fp32"
    # everything random follows from it
    seed: int = 0

    def __post_init__(self) -> None:
        choice("dtype", self.dtype, get_args(Precision))
        for name, names in (("space", Space), ("layout", Layout), ("preset", PresetName)):
            if getattr(self, name) is not None:
                choice(name, getattr(self, name), get_args(names))
        check_limits(self)
        if self.vae_steps is not None and self.vae_steps < 1:
            raise UserError(f"vae_steps is {self.vae_steps}; it must be at least 1.")
        if self.minutes is not None and not 0 < self.minutes < math.inf:
            raise UserError(f"minutes is {self.minutes:g}; it must be above 0, as in 30.")
        if self.minutes is not None and (self.steps or self.vae_steps):
            raise UserError("minutes chooses the number of steps; leave `steps` or `minutes` out.")
        if self.space == "pixels" and (self.vae or self.vae_steps):
            raise UserError('pixels need no VAE; leave it out, or choose the space "latents".')
        if self.vae and self.vae_steps:
            raise UserError("vae_steps does nothing here: the VAE that is given is not trained.")
        if self.layout == "pictures" and self.text:
            raise UserError("text does nothing here: pictures without text need no text encoder.")

    def identity(self) -> dict[str, object]:
        """What a run must have in common with the run that it resumes, by name."""
        settings = {name: value for name, value in asdict(self).items() if name != "every"}
        return {k: str(v) if isinstance(v, Path) else v for k, v in settings.items()}
