"""The options of fine-tuning, of LoRAs and of DreamBooth."""

import math
import re
import sys
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, get_args

from minidiff.errors import UserError, choice

Method = Literal["full", "lora", "inversion"]
Precision = Literal["fp32", "bf16", "fp16"]
OptimizerName = Literal["adamw", "adamw8bit", "muon"]
TrainText = Literal["auto", "yes", "no", "word"]
Schedule = Literal["cosine", "constant"]
Captions = Literal["first", "random"]
# what suits the machine, or is only looked at, changes no result and is no part of a run
MACHINE = ("checkpointing", "pieces", "background", "save_every", "keep", "validation_prompt")
MACHINE += ("shard",)
FITTED = ("method", "dtype", "optimizer", "checkpointing", "pieces", "background")  # fit's choices
MACHINE += ("tensorboard",)
ABOVE_0, BELOW_1, FINITE = math.ulp(0.0), math.nextafter(1, 0), sys.float_info.max
COUNTS = ("rank", "accumulate", "steps", "batch", "every", "probe", "noises", "compared")
COUNTS += ("pieces", "save_every")
LIMITS = {  # of options by name: least, most, and both in words
    **dict.fromkeys(COUNTS, (1, math.inf, "at least 1")),
    **dict.fromkeys(
        ("lr", "word_lr", "text_lr", "t_std", "alpha"), (ABOVE_0, FINITE, "above 0, as in 1e-4")
    ),
    "warmup": (0, math.inf, "at least 0"),
    "n": (2, math.inf, "at least 2: one has no second seed to compare with"),
    "ema": (ABOVE_0, BELOW_1, "between 0 and 1, as in 0.999"),
    "dropout": (0, BELOW_1, "from 0 to below 1, as in 0.1"),
    "validation": (0, BELOW_1, "a share from 0 to below 1"),
    "seed": (0, 2**63 - 1, f"from 0 to {2**63 - 1}"),
    "prior": (0, FINITE, "0 or above; 1 is usual"),
    "size": (1, 8192, "from 1 to 8192 pixels"),
    "shift": (0, 0.5, "from 0 to 0.5 of the side"),
}


def check_limits(config: object) -> None:
    for name, value in vars(config).items():
        least, most, words = LIMITS.get(name, (None, None, ""))
        if isinstance(value, int) and abs(value) >= 2**63:  # more than a float or torch takes
            raise UserError(f"{name} is a number of {len(str(value))} digits; it must be smaller.")
        if words and value is not None and not least <= value <= most:
            raise UserError(f"{name} is {value:g}; it must be {words}.")


def check_tensorboard() -> None:
    """Raise a UserError where TensorBoard, an optional extra, is not installed."""
    if find_spec("tensorboard") is None:
        remedy = "pip install 'minidiff[tensorboard]'"
        raise UserError(f"TensorBoard is not installed; it comes with {remedy}.")


def bytes_of(size: str) -> int | None:
    """The bytes of a size such as 8GB, 7.5GiB or 900MB; None for auto."""
    if size == "auto":
        return None
    parts = re.fullmatch(r"(\d+\.?\d*) ?([GM])(i?)B?", size)
    if not parts or not (count := float(parts[1])):
        raise UserError(f'fit is "{size}"; write a size, as in 8GB, or auto.')
    return int(count * (1024 if parts[3] else 1000) ** {"M": 2, "G": 3}[parts[2]])


@dataclass(frozen=True)
class LoRAConfig:
    """Which layers a LoRA adapts, and how strongly."""

    # rank of the LoRA: how much it can learn, and how large its file is
    rank: int = 8
    # the LoRA's change is multiplied by alpha / rank. Default: the rank
    alpha: float | None = None
    # adapt the U-Net's layers whose names end so, as in q,k,v,out. Default: those that read text
    layers: str = ""

    def __post_init__(self) -> None:
        check_limits(self)

    @property
    def targets(self) -> tuple[str, ...]:
        """layers as single names; empty for the default."""
        return tuple(name for part in self.layers.split(",") if (name := part.strip()))


@dataclass(frozen=True, kw_only=True)
class TuningConfig:
    """What fine-tuning and DreamBooth have in common."""

    # full trains the whole U-Net and writes a model; lora trains a few weights beside it and writes
    # a small file; inversion trains the vector of one word alone
    method: Method = "full"
    # batches in a step: a larger step in the same memory
    accumulate: int = 1
    # what the learning rate does after the warm-up: fall to 0 as half a cosine, or stay
    lr_schedule: Schedule = "cosine"
    # peak learning rate of the text encoder, where it is trained. Default: that of all else
    text_lr: float | None = None
    # weight noise levels by min(SNR, 5): steadier, for Stable Diffusion
    min_snr: bool = False
    # also keep an average of the weights with this decay, as in 0.999, and write that
    ema: float | None = None
    # start the trained word's vector from that of this word, as in dog. Default: its own
    like: str | None = None
    # precision to compute in; trained weights stay in fp32. Frozen ones are loaded in it, but for
    # full, which writes them all. fp16 is for GPUs without bf16
    dtype: Precision = "fp32"
    # compute activations again in the backward pass: far less memory, a third more time
    checkpointing: bool = False
    # adamw8bit takes a quarter of AdamW's memory, and needs bitsandbytes; muon learns a small model
    # in fewer steps
    optimizer: OptimizerName = "adamw"
    # cut each batch into this many pieces, computed one after another: the same in less memory.
    # Default: what suits the machine
    pieces: int | None = None
    # choose method, precision, optimizer, checkpointing and pieces so that training fits in this
    # much memory, as in 8GB; auto takes what is free. Options that you give stay as they are
    fit: str | None = None
    # more options that fit leaves as they are, as in optimizer; give it again for more
    keep: tuple[str, ...] = ()
    # steps between two checkpoints. Default: as many as between two measurements (every)
    save_every: int | None = None
    # write checkpoints while training goes on; takes a copy of what is trained in main memory
    background: bool = True
    # a prompt of your own that the report shows beside the others; give it again for more
    validation_prompt: tuple[str, ...] = ()
    # also write the training's numbers for TensorBoard, beside its log
    tensorboard: bool = False
    # everything random follows from it
    seed: int = 0

    def __post_init__(self) -> None:
        choice("method", self.method, get_args(Method))
        choice("lr_schedule", self.lr_schedule, get_args(Schedule))
        choice("optimizer", self.optimizer, get_args(OptimizerName))
        choice("dtype", self.dtype, get_args(Precision))
        for name in self.keep:
            choice("option that fit chooses", name, FITTED)
        if self.fit is not None:
            bytes_of(self.fit)
        check_limits(self)
        if self.tensorboard:
            check_tensorboard()

    @property
    def frozen(self) -> Precision:
        """What to load a model in. The method full trains most weights, and writes all of them."""
        return "fp32" if self.method == "full" else self.dtype


@dataclass(frozen=True, kw_only=True)
class FineTuneConfig(TuningConfig):
    """How a model is fine-tuned."""

    # optimizer steps
    steps: int = 400
    # peak learning rate, after the warm-up. Default: 1e-5 for full, 1e-4 for lora,
    # 5e-4 for inversion; 20 times that for a small U-Net such as the box's
    lr: float | None = None
    # images of each group in a batch
    batch: int = 4
    # steps in which the learning rate rises
    warmup: int = 10
    # the LoRA
    lora: LoRAConfig = LoRAConfig()
    # train the text encoder too
    text: bool = False
    # train the vector of this word too; the method inversion trains nothing else
    word: str | None = None
    # peak learning rate of the word's vector. Default: that of all else
    word_lr: float | None = None
    # how often a caption is dropped, so that guidance still works. Default: the model's own
    dropout: float | None = None
    # mean of logit(t / T) in training; needs t_std. Default: the schedule's own distribution
    t_mean: float | None = None
    # standard deviation of logit(t / T) in training; needs t_mean
    t_std: float | None = None
    # the recorder measures at some multiples of this many steps
    every: int = 100
    # of several processes (torchrun), each keeps a shard of the weights, gradients and moments
    shard: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pieces and self.batch % self.pieces:
            raise UserError(
                f"pieces is {self.pieces}, and a batch of {self.batch} cannot be cut into so many "
                "of one size; take a divisor of it."
            )
        is_plain = self.method == "full" and self.optimizer == "adamw" and not self.word
        if self.shard and (not is_plain or self.dtype == "fp16"):
            raise UserError(
                "`shard` is for the method full, with the optimizer adamw, in fp32 or bf16, and "
                "without a word; leave it out."
            )
        if (self.t_mean is None) != (self.t_std is None):
            raise UserError("t_mean and t_std go together; set both or neither.")
        if self.text_lr is not None and not self.text:
            raise UserError("text_lr is of the text encoder, which is not trained; set `text` too.")
        if self.method == "inversion" and not self.word:
            raise UserError(
                'the method "inversion" trains the vector of one word; say which (`word`), or use '
                "minidiff dreambooth, which takes it from its prompt."
            )

    def identity(self) -> dict[str, object]:
        """What a run must have in common with the run that it resumes, by name."""
        settings = {name: value for name, value in asdict(self).items() if name not in MACHINE}
        settings |= settings.pop("lora")
        settings["fit"] = {name: getattr(self, name) for name in FITTED if name in MACHINE}
        unused = [] if self.method == "lora" else ["rank", "alpha", "layers"]
        unused += [] if self.word else ["word", "word_lr", "like"]
        unused += ["t_mean", "t_std"] if self.t_mean is None else []
        unused += ["text_lr"] if self.text_lr is None else []  # newer than the runs that resume
        unused += ["lr_schedule"] if self.lr_schedule == "cosine" else []
        unused += [] if self.fit else ["fit"]
        return {name: value for name, value in settings.items() if name not in unused}


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which images a fine-tune learns from, and how they are prepared."""

    # a captioned folder (metadata.jsonl and images); `minidiff data check` says whether it is fit
    data: Path
    # the key of the captions in metadata.jsonl
    caption_column: str = "text"
    # of several captions of an image: the first, or any of them, a new one whenever it is met
    captions: Captions = "first"
    # side of the images in pixels. Default: the size the model was trained at
    size: int | None = None
    # nearly keep the images' shapes, all with the same area. Default: cut out the middle square
    buckets: bool = False
    # train on mirrored images too; do not if captions say left or right
    flip: bool = False
    # share of the images to hold out: never trained on
    validation: float = 0.1

    def __post_init__(self) -> None:
        choice("captions", self.captions, get_args(Captions))
        check_limits(self)


@dataclass(frozen=True, kw_only=True)
class SubjectConfig:
    """The images of a subject and of its class."""

    # a folder with images of the subject; their own captions, if any, replace the prompt
    subject: Path
    # the key of the captions in metadata.jsonl
    caption_column: str = "text"
    # side of the images in pixels. Default: the size the model was trained at
    size: int | None = None
    # train on mirrored images of the subject too; do not if left and right matter
    flip: bool = False
    # a folder with class images of your own. Default: the model draws them
    class_dir: Path | None = None

    def __post_init__(self) -> None:
        check_limits(self)


@dataclass(frozen=True, kw_only=True)
class RecorderConfig:
    """What the flight recorder measures."""

    # steps of the training between two measurements
    every: int = 100
    # images of each prompt
    n: int = 4
    # sampling steps and guidance for them. None: the model's own guidance
    steps: int = 25
    guidance: float | None = None
    # everything random follows from it
    seed: int = 0
    # how many held-out and how many training examples are measured
    probe: int = 8
    # times t, each with its own noise, in each tenth of the way from data to noise
    noises: int = 2
    # how many training images, evenly chosen, samples are compared with
    compared: int = 2048
    # whose features (evaluation/features.py) say how far images moved
    network: str = "random-conv-0"

    def __post_init__(self) -> None:
        check_limits(self)


@dataclass(frozen=True, kw_only=True)
class DreamBoothConfig(TuningConfig):
    """How a model is taught a subject. None stands for what suits the model and the method."""

    # what the images show, with a rare token for the subject, as in "a photo of sks dog"
    prompt: str
    # the prompt without the token, as in "a photo of a dog": the model draws it and keeps learning
    # it, so that it is not forgotten. Repeat for more; {red|blue} stands for either
    class_prompt: tuple[str, ...] = ()
    # weight of the class images' loss; 0 trains without them, and the model forgets the class.
    # Default: chosen for the model and method
    prior: float | None = None
    # how many class images to draw, once. Default: suits the model
    class_pictures: int | None = None
    # optimizer steps. Default: suits the model
    steps: int | None = None
    # peak learning rate. Default: suits the model
    lr: float | None = None
    # images of the subject in a batch, and as many of the class. Default: suits the model
    batch: int | None = None
    # rank of the LoRA. Default: suits the model
    rank: int | None = None
    # the LoRA's change is multiplied by alpha / rank. Default: the rank
    alpha: float | None = None
    # train the text encoder too: yes, no, or the rare token's vector alone (word); auto suits the
    # model
    text: TrainText = "auto"
    # move the images about by up to this share of their side. Default: suits the model
    shift: float | None = None
    # the recorder measures at some multiples of this many steps
    every: int = 200

    def __post_init__(self) -> None:
        super().__post_init__()
        choice("text", self.text, get_args(TrainText))
        if self.text_lr is not None and self.text != "yes":
            raise UserError("text_lr is of the text encoder; train it too, with `text=yes`.")
        if not self.prompt.strip():
            raise UserError('prompt is empty; name the subject, as in "a photo of sks dog".')
        if self.preserves and not self.class_prompt:
            raise UserError(
                "prior preservation needs to know what class to preserve: give `class_prompt`, the "
                "prompt without its rare token; or `prior=0`, and the model forgets."
            )
        count = self.class_pictures
        if self.preserves and count is not None and count < 1:
            raise UserError(
                f"class_pictures is {count}, which preserves nothing; draw some, or give `prior=0`."
            )

    @property
    def preserves(self) -> bool:
        """Whether the class is trained on as well; textual inversion leaves the network alone."""
        return self.method != "inversion" and self.prior != 0
