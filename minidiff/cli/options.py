"""What the verbs share: options, and checks that find all that can be wrong before anything slow. Torch is imported where it is needed."""

import math
import os
from pathlib import Path
from typing import Annotated

import tyro

from minidiff.errors import UserError
from minidiff.options.sampling import Interval, SampleConfig

Device = Annotated[str, tyro.conf.arg(metavar="auto|cpu|cuda|mps")]
Number = Annotated[float | None, tyro.conf.arg(metavar="FLOAT")]
Sampler = Annotated[
    str | None,
    tyro.conf.arg(metavar="ddim|ddpm|euler|euler_ancestral|heun|dpmpp_2m|dpmpp_2m_sde|unipc|lcm"),
]  # all of SAMPLERS
Integer = Annotated[int | None, tyro.conf.arg(metavar="INT")]
Size = Annotated[str | None, tyro.conf.arg(metavar="INT|WIDTHxHEIGHT")]
Spacing = Annotated[
    str | None, tyro.conf.arg(metavar="trailing|leading|linspace|karras|log-snr|ays|shifted")
]
Target = Annotated[str | None, tyro.conf.arg(metavar="eps|v")]
Dtype = Annotated[str, tyro.conf.arg(metavar="fp32|bf16|fp16")]
Listed = Annotated[str, tyro.conf.arg(metavar="NAME,NAME")]
Numbers = Annotated[str, tyro.conf.arg(metavar="N,N")]
File = Annotated[Path | None, tyro.conf.arg(metavar="PATH")]
Loras = Annotated[tuple[str, ...], tyro.conf.arg(metavar="FILE[:SCALE]"), tyro.conf.UseAppendAction]
Embeddings = Annotated[
    tuple[str, ...], tyro.conf.arg(metavar="FILE[:WORD]"), tyro.conf.UseAppendAction
]
Prompts = tyro.conf.Positional[Annotated[tuple[str, ...], tyro.conf.arg(metavar="PROMPT ...")]]

MODEL = Path("box")  # what minidiff.load takes for the model that ships with it
EXAMPLE = "a small blue circle above a large red square"


def sampling(
    model: Path,
    steps: int,
    guidance: float | None,
    sampler: str | None,
    seed: int,
    device: str,
    out: Path,
    spacing: str | None = None,
    interval: tuple[float, float] = (0.0, 1.0),
    **loading: object,
):
    """The model (LatentDiffusion), and a SampleConfig with the model's own values filled in.
    loading: more of minidiff.load's arguments."""
    check_out(out)
    check_seed(seed)
    check_positive("--steps", steps)
    if guidance is not None and not math.isfinite(guidance):
        raise UserError(f"--guidance is {guidance}; it must be finite, as in --guidance 4.")
    device = pick_device(device)
    from minidiff import load
    from minidiff.samplers import by_name

    if sampler is not None:
        by_name(sampler)  # complains of unknown ones before anything slow
    diffusion = load(model, device, **loading)
    sampler, spacing = sampler or diffusion.sampler, spacing or diffusion.spacing
    guidance = diffusion.guidance if guidance is None else guidance
    # complains of unknown spacings, and of more steps than noise levels
    diffusion.schedule.timesteps(steps, spacing)
    return diffusion, SampleConfig(
        steps, guidance, sampler, spacing, interval=Interval(*interval), seed=seed
    )


def parsed_loras(loras: tuple[str, ...]) -> list[tuple[Path, float]]:
    """Files and scales, from FILE or FILE:SCALE."""
    pairs = []
    for lora in loras:
        name, colon, scale = lora.rpartition(":")
        try:
            pair = (
                (Path(name), float(scale))
                if colon and not Path(lora).exists()
                else (Path(lora), 1.0)
            )
        except ValueError:  # the colon is a part of the name
            pair = Path(lora), 1.0
        if not math.isfinite(pair[1]):
            raise UserError(f"--lora {lora}: the scale must be finite, as in --lora {name}:0.8.")
        if not pair[0].is_file():
            raise UserError(f'--lora {lora}: no file "{pair[0]}".')
        pairs.append(pair)
    return pairs


def put_in(diffusion, loras: list[tuple[Path, float]]) -> None:
    """Merge LoRAs into the weights for good, one after the other, and say what each did."""
    from minidiff.methods import lora

    for file, scale in loras:
        found = lora.load(diffusion, file, scale)
        lora.merge(diffusion)
        lora.remove(diffusion)
        print(f"{file}: {len(found.layers)} layers, probe moved by {100 * found.moved:.2g} %")


def put_words_in(diffusion, embeddings: tuple[str, ...]) -> None:
    """Give words the vectors of textual inversions, from FILE or FILE:WORD, and say which."""
    from minidiff.methods import inversion

    for embedding in embeddings:
        name, colon, word = embedding.rpartition(":")
        file, word = (
            (Path(name), word)
            if colon and not Path(embedding).exists()
            else (Path(embedding), None)
        )
        if not file.is_file():
            raise UserError(f'--embedding {embedding}: no file "{file}".')
        print(f'{file}: the word is "{inversion.load(diffusion.text, file, word)}"')


def words(text: str) -> list[str]:
    """The words of "apple, bowl"."""
    return [word for part in text.split(",") if (word := part.strip())]


def numbers(option: str, text: str) -> list[float]:
    """The numbers of "5, 10, 25"."""
    try:
        found = [float(part) for part in words(text)]
    except ValueError:
        found = []
    if not found or not all(map(math.isfinite, found)):
        raise UserError(f'{option} is "{text}"; write numbers with commas between, as in 5,10,25.')
    return found


def parsed_interval(text: str) -> tuple[float, float]:
    """Where guidance acts, of "0.8,1"."""
    ends = tuple(numbers("--interval", text))
    if len(ends) != 2 or not 0 <= ends[0] <= ends[1] <= 1:
        raise UserError(
            f'--interval is "{text}"; write two numbers from 0 (data) to 1 (noise), the smaller one first, as in 0.8,1.'
        )
    return ends


def check_positive(option: str, value: int) -> None:
    if value < 1:
        raise UserError(f"{option} is {value}; it must be at least 1.")


def check_seed(seed: int) -> None:
    if not 0 <= seed < 2**63:
        raise UserError(f"--seed is {seed}; it must be from 0 to {2**63 - 1}.")


def check_out(out: Path) -> None:
    """That files can be written there; nothing is made yet, so that bad input leaves nothing behind."""
    there = next(place for place in (out, *out.absolute().parents) if place.exists())
    if not there.is_dir():
        raise UserError(f'--out {out}: "{there}" is a file; name a folder.')
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f'--out {out}: no permission to write in "{there}"; name another folder.')


def pick_device(name: str) -> str:
    """The device a name means here; finding out imports torch."""
    from minidiff.cli import script

    return script.pick_device(name)
