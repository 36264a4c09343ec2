"""LoRA files as diffusers, PEFT and kohya write them: their names, their alpha, and what they do to a model.

A layer's name there is the published one behind a prefix. kohya's writes "_" for every dot, which only a list of the model's layers can undo.
"""
import json
import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor

from minidiff import atomic
from minidiff.clip import CLIPText
from minidiff.errors import UserError
from minidiff.latent_diffusion import LatentDiffusion
from minidiff.lora import Layer, Loaded, LoRA, adapted, check_free, ends, hang
from minidiff.unet import UNet
from minidiff.weights import files, names

PREFIXES = {  # the rename table, then what stands before a name at diffusers and at kohya; the first of each is written, all are read
    "unet": (names.UNET_DIFFUSERS, ("unet.", "base_model.model.", ""), ("lora_unet_",)),
    "text": (names.CLIP_TRANSFORMERS, ("text_encoder.text_model.", "text_encoder.", "base_model.model.text_model.", "text_model."),
             ("lora_te_text_model_", "lora_te1_text_model_", "lora_te1_")),
}
HALVES = {"diffusers": (".lora_A.weight", ".lora_B.weight"), "kohya": (".lora_down.weight", ".lora_up.weight")}


class Place(NamedTuple):
    """A layer of a model, and what it is called."""

    name: str  # as in unet.encoder.0.attention.0.blocks.0.self_attention.q
    layer: Layer
    diffusers: str
    kohya: str


def _places(model: LatentDiffusion) -> Iterator[tuple[Place, list[str]]]:
    """Every layer that files have names for, with all its names."""
    for part, kind in (("unet", UNet), ("text", CLIPText)):
        network = getattr(model, part)
        if not isinstance(network, kind):
            continue
        table, dotted, underscored = PREFIXES[part]
        layers = {name: layer for name, layer in network.named_modules() if isinstance(layer, Layer)}
        for published, name in names.to_published({name: name for name in layers}, table).items():
            spelled = [prefix + published for prefix in dotted]
            flat = [prefix + published.replace(".", "_") for prefix in underscored]
            yield Place(f"{part}.{name}", layers[name], spelled[0], flat[0]), spelled + flat


def save(model: LatentDiffusion, file: str | Path, layout: str = "diffusers") -> Path:
    """Write the LoRAs of a LatentDiffusion, as trained: without the scale of sampling. layout "diffusers" (PEFT's names, which have no
    place for alpha that all readers know: B is multiplied by alpha / r) or "kohya". Written beside its place, then renamed."""
    file = Path(file)
    if file.suffix != ".safetensors":
        raise UserError(f"{file} should end in .safetensors; pickles are not written.")
    if layout not in HALVES:
        raise UserError(f'no layout "{layout}" of LoRA files; there is {", ".join(HALVES)}.')
    places = [place for place, _ in _places(model) if hasattr(place.layer, "lora")]
    if not places or len(places) < len(adapted(model)):
        what = "only LoRAs of a U-Net or a CLIPText have names in files" if adapted(model) else "lora.add gives it one"
        raise UserError(f"{file} is not written: {len(places)} of the model's {len(adapted(model))} LoRAs can be; {what}.")
    whole = {}
    for place in places:
        lora, name = place.layer.lora, getattr(place, layout)
        A, B = lora.A.detach(), lora.B.detach()
        if layout == "kohya":
            whole[f"{name}.alpha"] = torch.tensor(lora.alpha)
        else:
            B = B * (lora.alpha / len(A))
        whole |= dict(zip((name + half for half in HALVES[layout]), (A, B), strict=True))
    atomic.check_new(file)
    with atomic.write(file) as new:
        save_file({name: value.contiguous() for name, value in whole.items()}, new, {"format": "pt", "software": atomic.SIGNATURE})
    return file


def load(model: LatentDiffusion, file: str | Path, scale: float = 1.0) -> Loaded:
    """Give a LatentDiffusion the LoRAs of a file of diffusers, PEFT or kohya; the whole model is frozen but for them. Nothing is done unless
    every tensor of the file finds its place. A file that changes nothing is warned of."""
    file = Path(file)
    found = _read(file)
    known = {name: place for place, all_names in _places(model) for name in all_names}
    strange = [name for name in found if name not in known]
    if strange:
        said = f'{len(strange)} of its {len(found)} layers are not in this model; the first is "{strange[0]}"'
        raise UserError(f"{file}: {said}. It is for another model: `minidiff inspect` says of which kind each is.")
    ready: dict[str, tuple[Layer, LoRA]] = {}
    for name, values in found.items():
        place = known[name]
        if place.name in ready:
            raise UserError(f'{file}: two of its layers mean {place.name}; the second is "{name}".')
        ready[place.name] = place.layer, _fitted(place, values, f'{file}: "{name}"')
    check_free({name: layer for name, (layer, _) in ready.items()})
    before = _probe(model)
    for _, lora in ready.values():
        lora.scale = float(scale)
    hang(model, ready.values())
    after = _probe(model)
    moved = ((after - before).norm() / before.norm().clamp(min=1e-12)).item()
    if moved == 0:
        why = "its scale is 0" if scale == 0 else "all its B are zero, as before training, or the U-Net's own output is"
        warnings.warn(f"{file.name} changes nothing: {why}", stacklevel=3)
    return Loaded(list(ready), moved)


def _read(file: Path) -> dict[str, dict[str, Tensor | float]]:
    """By the file's name of a layer: its A, its B, and alpha where the file tells it."""
    found: dict[str, dict[str, Tensor | float]] = {}
    left = []
    for key, value in files.tensors(file).items():
        match = names.LORA.fullmatch(key)
        if match is None:
            left.append(key)
            continue
        half = {"down": "A", "up": "B", None: "alpha"}.get(match["half"], match["half"])
        if half == "alpha" and value.numel() != 1:
            raise UserError(f'{file}: "{key}" is {tuple(value.shape)}; alpha is one number.')
        (name,) = names.to_ours({match["layer"]: None}, names.LORA_OLD)
        if half in found.setdefault(name, {}):
            raise UserError(f'{file}: "{key}" stands in it twice, by two names; a file has one of the two.')
        found[name][half] = value
    if not found:
        raise UserError(f'{file} holds no LoRA; its first tensor is "{min(left, default="none")}".')
    if left:
        said = f'{len(left)} of its tensors are neither A, B nor alpha of a LoRA; the first is "{left[0]}"'
        raise UserError(f"{file}: {said}. Relatives of LoRA (LoHa, LoKr, DoRA) are not read.")
    for name, values in found.items():
        if missing := [half for half in ("A", "B") if half not in values]:
            raise UserError(f'{file}: "{name}" has no {missing[0]} ({"down" if missing[0] == "A" else "up"}); a LoRA is two matrices.')
    for name, alpha in _told_alphas(file, found).items():
        found[name].setdefault("alpha", alpha)
    return found


def _told_alphas(file: Path, found: dict[str, dict[str, Tensor | float]]) -> dict[str, float]:
    """What PEFT's configuration says: in the file's metadata where diffusers wrote it, or in adapter_config.json beside it."""
    text, beside = files.metadata(file).get("lora_adapter_metadata", "{}"), file.with_name("adapter_config.json")
    config = files.read_json(beside) if file.stem == "adapter_model" and beside.is_file() else {}
    try:
        said, told = config | json.loads(text), {}
        for name, values in found.items():
            part, layer = name.split(".", 1) if name.startswith(("unet.", "text_encoder.")) else ("", name)
            of = said | {key.removeprefix(f"{part}."): value for key, value in said.items() if key.startswith(f"{part}.")}
            special = [value for key, value in (of.get("alpha_pattern") or {}).items() if ends(layer, key.removeprefix("^"))]
            alpha = special[0] if special else of.get("lora_alpha")
            if alpha is not None:
                told[name] = float(alpha) * (math.sqrt(len(values["A"])) if of.get("use_rslora") else 1)  # then it means alpha / sqrt(r)
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise UserError(f"{file}: its LoRA configuration is damaged ({type(error).__name__}: {error}); {files.AGAIN}.") from error
    return told


def _fitted(place: Place, values: dict[str, Tensor | float], where: str) -> LoRA:
    """The LoRA of a layer, of a file's tensors. A 1x1 kernel may be left out or written out."""
    out, *inner = place.layer.weight.shape
    rank = len(values["A"]) if values["A"].ndim else 0
    for half, expected in (("A", (rank, *inner)), ("B", (out, rank, *[1] * (len(inner) - 1)))):
        value = values[half]
        if _trimmed(value.shape) != _trimmed(expected) or not rank:
            raise UserError(f"{where}: {half} is {tuple(value.shape)}; at rank {rank} this model's layer takes {expected}.")
        if not value.is_floating_point() or not value.float().sum().isfinite():
            raise UserError(f"{where}: {half} holds what is no finite number; training broke before it was saved.")
    lora = LoRA(place.layer, rank, float(values.get("alpha", rank)))
    for half in ("A", "B"):
        getattr(lora, half).data.copy_(values[half].view_as(getattr(lora, half)))
    if not math.isfinite(lora.alpha):
        raise UserError(f"{where}: alpha is {lora.alpha}; it must be finite.")
    return lora


def _trimmed(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Without a kernel of 1x1."""
    return tuple(shape[:2]) if tuple(shape[2:]) == (1, 1) else tuple(shape)


@torch.no_grad()
def _probe(model: LatentDiffusion) -> Float[Tensor, "B C H W"]:
    """The U-Net's output halfway to noise, on fixed latents and, if it reads a CLIPText, on fixed words."""
    side, text = 2 * model.unet.multiple, model.text
    x = torch.randn(1, model.unet.numbers["in_channels"], side, side, generator=torch.Generator().manual_seed(0)).to(model.device)
    if isinstance(text, CLIPText):
        tokens = torch.arange(1000, 1000 + text.context_length, device=model.device)[None] % text.numbers["vocabulary"]
        context = text(tokens)
    else:
        context = text.null(1)
    return model.denoiser.output(x, model.schedule.timesteps(2)[1:2], context).float()
