"""What the verbs share: types of options, groups of options, and checks before anything slow.

Torch is imported where it is needed.
"""

import contextlib
import functools
import math
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from minidiff.errors import UserError, printable
from minidiff.options.sampling import SampleConfig, Size
from minidiff.training import atomic

if TYPE_CHECKING:
    from minidiff.latent_diffusion import LatentDiffusion

Device = Literal["auto", "cpu", "cuda", "mps"]
Dtype = Literal["fp32", "bf16", "fp16"]
Target = Literal["eps", "v"]
File = Path | None
Folder = Annotated[Path, tyro.conf.arg(metavar="DIR")]
Listed = Annotated[str, tyro.conf.arg(metavar="NAME,NAME")]
Numbers = Annotated[str, tyro.conf.arg(metavar="N,N")]
Loras = Annotated[tuple[str, ...], tyro.conf.arg(metavar="FILE[:SCALE]"), tyro.conf.UseAppendAction]
Embeddings = Annotated[
    tuple[str, ...], tyro.conf.arg(metavar="FILE[:WORD]"), tyro.conf.UseAppendAction
]
Prompts = tyro.conf.Positional[Annotated[tuple[str, ...], tyro.conf.arg(metavar="PROMPT ...")]]
Source = tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="FILE_OR_DIR")]]

MODEL = Path("box")  # what minidiff.load takes for the model that ships with it
EXAMPLE = "a small blue circle above a large red square"
SAMPLE = SampleConfig()


@dataclass(frozen=True)
class Parts:
    """Where the parts of a model come from, and what is added to them."""

    # what the U-Net predicts, if its file does not say: single files of SD 2.x predict v at 768
    # pixels, eps at 512
    target: Target | None = None
    # it was trained with zero terminal SNR, and its file does not say
    zero_terminal_snr: bool = False
    # take the VAE from this checkpoint instead
    vae: Path | None = None
    # take the text encoder from this checkpoint instead; or MODEL:TAG of open_clip, as in
    # ViT-L-14:openai
    text: Path | None = None
    # take the U-Net from this checkpoint instead
    unet: Path | None = None
    # low-rank weights to add to the model's, and how much of them, as in style.safetensors:0.8;
    # give it again for more
    lora: Loras = ()
    # the vector of a word that textual inversion learnt; with :WORD, the word of the vocabulary
    # that is to mean it
    embedding: Embeddings = ()
    # ask the Hugging Face Hub for nothing; what its cache has is used
    offline: bool = False

    def __post_init__(self) -> None:
        for file, scale in self.loras():
            if not math.isfinite(scale):
                raise UserError(
                    f"--lora {file}: the scale must be finite, as in --lora {file}:0.8."
                )
        files = [("lora", file) for file, _ in self.loras()]
        for name, file in files + [("embedding", file) for file, _ in self.embeddings()]:
            if not file.exists():
                raise UserError(f'--{name} {file}: no file "{file}".')

    def loras(self) -> list[tuple[Path, float]]:
        """Files and scales."""
        pairs = []
        for text in self.lora:
            file, scale = divided(text)
            try:
                pairs.append((Path(file), 1.0 if scale is None else float(scale)))
            except ValueError:  # the colon is a part of the name
                pairs.append((Path(text), 1.0))
        return pairs

    def embeddings(self) -> list[tuple[Path, str | None]]:
        """Files and words."""
        return [(Path(file), word) for file, word in map(divided, self.embedding)]

    def load(self, model: Path, device: str, dtype: str | None) -> "LatentDiffusion":
        """The model of these parts; prints what each LoRA and each embedding changed."""
        from minidiff import load
        from minidiff.checkpoints import embedding, hub
        from minidiff.checkpoints import lora as lora_files
        from minidiff.methods import lora

        if self.offline:
            hub.go_offline()
        loaded = load(
            model,
            device,
            dtype,
            self.target,
            self.vae,
            self.text,
            self.unet,
            self.zero_terminal_snr,
        )
        for file, scale in self.loras():
            report = lora_files.load(loaded, file, scale)
            lora.merge(loaded)
            lora.remove(loaded)
            moved = f"probe moved by {100 * report.moved:.2g} %"
            words = f"; its words are {', '.join(report.words)}" if report.words else ""
            print(f"{file}: {len(report.layers)} layers, {moved}{words}")
        for file, word in self.embeddings():
            name = printable(embedding.load(loaded.text, file, word))
            print(f'{file}: the word is "{name}"')
        return loaded


def divided(text: str) -> tuple[str, str | None]:
    """FILE:REST as FILE and REST; a file with a colon in its name is a file."""
    file, colon, rest = text.rpartition(":")
    return (file, rest) if colon and not Path(text).exists() else (text, None)


def completed(config: SampleConfig, model: "LatentDiffusion") -> SampleConfig:
    """The config with the model's own values filled in, checked against its schedule."""
    from minidiff import samplers

    step = samplers.by_name(config.sampler or model.sampler)
    config = replace(
        config,
        guidance=model.guidance if config.guidance is None else config.guidance,
        sampler=config.sampler or model.sampler,
        spacing=model.spacing_of(step, config),
        empty=config.empty or getattr(model.text.config, "empty", None),
    )
    times = samplers.times_of(model.schedule, config.steps, config.spacing, step)
    start = model.schedule.progress(2 * times[0] - times[1]).item()
    if config.spacing == "leading" and start < 0.9:  # the remainder of T / steps is left out
        first = f"{config.steps} steps start at t = {times[0]:g} of {model.schedule.T}"
        fix = "take a number of steps that divides it, or --spacing trailing"
        lost = "with leading spacing the first noise levels are left out"
        warnings.warn(f"{lost}: {first}; {fix}", stacklevel=2)
    return config


def size_text(size: Size | None) -> str:
    """As 768x512; the width comes first."""
    return f"{size.width}x{size.height}" if size else ""


def words(text: str) -> list[str]:
    """The words of "apple, bowl"."""
    return [word for part in text.split(",") if (word := part.strip())]


def numbers(name: str, text: str) -> list[float]:
    """The numbers of "5, 10, 25"; name is the option's."""
    try:
        values = [float(part) for part in words(text)]
    except ValueError:
        values = []
    if not values or not all(map(math.isfinite, values)):
        raise UserError(f'{name} is "{text}"; write numbers with commas between, as in 5,10,25.')
    return values


def changed(config: object, names: tuple[str, ...]) -> list[str]:
    """Which of these fields of a dataclass have another value than their default."""
    defaults = {field.name: field.default for field in fields(config)}
    return [name for name in names if getattr(config, name) != defaults[name]]


def check_least(name: str, value: int | None, least: int = 1) -> None:
    """Raise a UserError if the option of this name is given and too small."""
    if value is not None and value < least:
        raise UserError(f"{name} is {value}; it must be at least {least}.")


def check_seed(seed: int) -> None:
    SampleConfig(seed=seed)  # its check, in its words


def check_out(out: Path, *names: str) -> None:
    """Check that files can be written there, and that files of these names are ours to replace."""
    there = next(place for place in (out, *out.absolute().parents) if place.exists())
    if not there.is_dir():
        raise UserError(f'--out {out}: "{there}" is a file; name a folder.')
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f'--out {out}: no permission to write in "{there}"; name another folder.')
    for name in names:
        atomic.check(out / name, atomic.unsigned)


def alone(verb: Callable[..., None]) -> Callable[..., None]:
    """Have a verb that trains be the only one to write in its --out folder: one process, or the
    first of several. If torchrun has restarted them, they resume."""

    @functools.wraps(verb)
    def locked_verb(*args: object, out: Path, **options: object) -> None:
        check_out(out)
        from minidiff.training import distributed, ranks
        from minidiff.training.lock import locked

        with contextlib.ExitStack() as stack:
            with distributed.main_first():
                stack.enter_context(locked(out if ranks.is_main() else None))
            if ranks.begun(out):
                options["resume"] = True
            verb(*args, out=out, **options)

    return locked_verb


def pick_device(name: str) -> str:
    """The device a name means here; to tell, it imports torch."""
    from minidiff.training import device

    return device.pick_device(name)


def warn_of_imitation(dtype: Dtype, device: str) -> None:
    """Warn of a precision that this processor computes slowly."""
    from minidiff.checkpoints.folder import dtype_named
    from minidiff.training.device import warn_of_imitation

    warn_of_imitation(dtype_named(dtype), device)
