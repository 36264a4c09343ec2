"""LoRA files as diffusers, PEFT and kohya write them: their names, their alpha, and what they do to
a model. A layer has its published name there, behind a prefix. kohya writes "_" for every dot; only
a list of the model's layers can undo that.
"""

import json
import math
import re
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor

from minidiff.checkpoints import embedding, files, kinds, names, names_flow
from minidiff.errors import UserError
from minidiff.latent_diffusion import LatentDiffusion
from minidiff.methods import inversion
from minidiff.methods.lora import Layer, LoRA, adapted, attach, check_free, ends
from minidiff.mmdit import MMDiT
from minidiff.t5 import T5
from minidiff.text import CLIPText
from minidiff.training import atomic
from minidiff.unet import UNet, UNetConfig

# Prefixes of diffusers and PEFT, and of kohya: the first of each is written, all are read.
_MODEL = "text_model."
DOTTED = {
    "unet": ["unet.", "base_model.model.", "", "diffusion_model.", "model.diffusion_model."],
    "text": [f"text_encoder.{_MODEL}", "text_encoder.", f"base_model.model.{_MODEL}", _MODEL],
    "text.clip_l": [f"text_encoder.{_MODEL}", "text_encoder."],
    "text.clip_g": [f"text_encoder_2.{_MODEL}", "text_encoder_2."],
    "text.t5": ["text_encoder_3.", "text_encoder_2."],  # of SD 3, of FLUX.1
}
UNDERSCORED = {
    "unet": ["lora_unet_"],
    "text": ["lora_te_text_model_", "lora_te1_text_model_", "lora_te1_"],
    "text.clip_l": ["lora_te1_text_model_", "lora_te1_"],
    "text.clip_g": ["lora_te2_text_model_", "lora_te2_"],
    "text.t5": ["lora_te3_"],
}
HALVES = {
    "diffusers": (".lora_A.weight", ".lora_B.weight"),
    "kohya": (".lora_down.weight", ".lora_up.weight"),
}
STEMS = ("adapter_model", "pytorch_lora_weights")
# A1111's textual inversion in a LoRA file
BUNDLED = re.compile(
    r"bundle_emb\.(?P<word>.+)\.(?P<of>string_to_param\.\*|emb_params|clip_l|clip_g)"
)
Tensors = dict[str, Tensor | float]  # of one layer: A, B, and alpha where the file tells it


class Loaded(NamedTuple):
    """What a file did to a model."""

    layers: list[str]  # that it changes, as unet.encoder.0.attention.0.blocks.0.self_attention.q
    moved: float  # ||after - before|| / ||before||, the U-Net's output on a fixed input
    words: list[str]  # of the textual inversions in it


class Place(NamedTuple):
    """A layer of a model, and its names in files."""

    name: str  # as in unet.encoder.0.attention.0.blocks.0.self_attention.q
    layer: Layer
    diffusers: list[str]  # the first is written, all are read
    kohya: list[str]


def _places(model: LatentDiffusion) -> Iterator[Place]:
    """Every layer that files have names for."""
    for part, network in _parts(model).items():
        layers = {n: layer for n, layer in network.named_modules() if isinstance(layer, Layer)}
        itself, is_unet = {name: name for name in layers}, isinstance(network, UNet)
        if isinstance(network, MMDiT):
            yield from _flow_places(network, layers)
            continue
        table = names.UNET_DIFFUSERS if is_unet else names.CLIP_TRANSFORMERS
        table = names.T5 if isinstance(network, T5) else table
        compvis = _compvis(network.config, itself) if is_unet else {}
        for theirs, name in names.to_published(itself, table).items():
            spellings = [theirs, compvis[name]] if name in compvis else [theirs]
            dotted = [prefix + each for each in spellings for prefix in DOTTED[part]]
            if is_unet and network.config.added:  # kohya writes CompVis's names for SDXL
                spellings.reverse()
            flat = [p + each.replace(".", "_") for each in spellings for p in UNDERSCORED[part]]
            yield Place(f"{part}.{name}", layers[name], dotted, flat)


def _flow_places(network: MMDiT, layers: dict[str, Layer]) -> Iterator[Place]:
    """Those of SD 3 and FLUX.1. kohya's names are Stability's and Black Forest Labs', where q, k, v
    (in FLUX.1's single blocks with the MLP's first layer) are one layer, so share a name. A layer
    whose rows or columns stand in another order in a layout (see names_flow) has no name there."""
    flux, layouts = network.config.axes is not None, (names_flow.SD3_DIFFUSERS, names_flow.SD3)
    if flux:
        layouts = names_flow.FLUX_DIFFUSERS, names_flow.FLUX
    last = f"joint.{network.config.joint - 1}.text.modulation"
    turned = {"patch_in", "patch_out", "modulation_out", *([] if network.config.single else [last])}
    dotted = _published(layers, layouts[0].table)
    fused = _published(map(names_flow.fused, layers), layouts[1].table)
    for name, layer in layers.items():
        diffusers, kohya = [], []
        if name != ("patch_in" if flux else "patch_out"):
            theirs = fused[names_flow.fused(name)]
            kohya += [f"lora_unet_{theirs.replace('.', '_')}", f"diffusion_model.{theirs}"]
        if name not in turned:
            theirs = dotted[name]
            diffusers = [prefix + theirs for prefix in ("transformer.", "base_model.model.", "")]
            kohya.append(f"lora_transformer_{theirs.replace('.', '_')}")
        yield Place(f"unet.{name}", layer, diffusers, kohya)


def _parts(model: LatentDiffusion) -> dict[str, UNet | MMDiT | CLIPText | T5]:
    """The networks that files have names for, by ours."""
    text = {f"text.{name}".rstrip("."): each for name, each in model.text.named_modules()}
    parts = {"unet": model.unet} | text
    ours = UNet | MMDiT | CLIPText | T5
    return {name: parts[name] for name in DOTTED if isinstance(parts.get(name), ours)}


def _compvis(config: UNetConfig, itself: dict[str, str]) -> dict[str, str]:
    """CompVis's names of the U-Net's layers, by ours, as Stability's and ComfyUI's tools write."""
    return _published(
        itself, names.unet_compvis([depth > 0 for depth in config.depth], config.blocks)
    )


def _published(layers: Iterable[str], table: names.Table) -> dict[str, str]:
    """The published names of layers, by ours."""
    itself = {name: name for name in layers}
    return {ours: theirs for theirs, ours in names.to_published(itself, table).items()}


def save(model: LatentDiffusion, file: str | Path, layout: str = "diffusers") -> Path:
    """Write the LoRAs of a model, as trained: without the scale of sampling.

    layout: "diffusers" (PEFT's names; not every reader knows its alpha, so B is multiplied by
    alpha / r) or "kohya". Written beside its place, then renamed.
    """
    file = Path(file)
    if file.suffix != ".safetensors":
        raise UserError(f"{file} should end in .safetensors; pickles are not written.")
    if layout not in HALVES:
        raise UserError(f'no layout "{layout}" of LoRA files; there is {", ".join(HALVES)}.')
    names_of = [(name, place) for place in _places(model) for name in getattr(place, layout)[:1]]
    count, total = sum(hasattr(place.layer, "lora") for _, place in names_of), len(adapted(model))
    if not count or count < total:
        why = "only LoRAs of a U-Net or a CLIPText have names in files, of T5, and most of an MMDiT"
        why = why if total else "lora.add gives it one"
        count = f"{count} of the model's {total} LoRAs can be"
        raise UserError(f"{file} is not written: {count}; {why}.")
    whole = {}
    for name, places in _grouped(names_of).items():
        if not any(hasattr(place.layer, "lora") for place in places):
            continue
        A, B, alpha = _fused([place.layer for place in places])
        if layout == "kohya":
            whole[f"{name}.alpha"] = torch.tensor(alpha)
        else:
            B = B * (alpha / len(A))
        down, up = HALVES[layout]
        whole[name + down], whole[name + up] = A.contiguous(), B.contiguous()
    atomic.check_new(file)
    with atomic.write(file) as new:
        save_file(whole, new, {"software": atomic.SIGNATURE})
    return file


def _grouped(names_of: Iterable[tuple[str, Place]]) -> dict[str, list[Place]]:
    """What each name means: a layer, or those of a fused layer, in the order of its rows."""
    groups: dict[str, list[Place]] = {}
    for name, place in names_of:
        groups.setdefault(name, []).append(place)
    return groups


@torch.no_grad()
def _fused(layers: list[Layer]) -> tuple[Tensor, Tensor, float]:
    """A, B and alpha of one LoRA for the rows of all these layers. Where all have one A, as fused
    files give them, it stays; else the A stand below each other and B is block-diagonal."""
    loras = [getattr(layer, "lora", None) for layer in layers]
    first, *others = present = [lora for lora in loras if lora is not None]
    shared = all(torch.equal(lora.A, first.A) and lora.alpha == first.alpha for lora in others)
    ratios = [lora.alpha / len(lora.A) for lora in present]
    common = ratios[0] if len(set(ratios)) == 1 else None  # else each B is multiplied by its own
    blocks = []
    for layer, lora in zip(layers, loras, strict=True):
        if lora is None:
            blocks.append(first.B.new_zeros(len(layer.weight), len(first.A) if shared else 0))
        else:
            blocks.append(lora.B * (lora.alpha / len(lora.A) if common is None else 1))
    if shared:
        return first.A.detach(), torch.cat(blocks), first.alpha
    A = torch.cat([lora.A for lora in present])
    return A, torch.block_diag(*blocks), len(A) * (1.0 if common is None else common)


def load(model: LatentDiffusion, file: str | Path, scale: float = 1.0) -> Loaded:
    """Give a model the LoRAs of a file (or folder) of diffusers, PEFT or kohya; all else in it is
    frozen. Textual inversions in the file give their words to the text encoder.

    Nothing is done unless every tensor of the file finds its place. A file that changes nothing is
    warned of.
    """
    file = _file_at(Path(file))
    content, bundled = _read(file)
    spellings = ((p, dict.fromkeys(p.diffusers + p.kohya)) for p in _places(model))
    places = _grouped((name, p) for p, own in spellings for name in own)  # two may be one
    strange = [name for name in content if name not in places]
    if strange:
        what = f"{len(strange)} of its {len(content)} layers are not in this model"
        kinds_of = kinds.lora_versions({name: values["A"] for name, values in content.items()})
        kind = f" ({', '.join(kinds_of)})" if kinds_of else ""
        fix = f"It is for another model{kind}: `minidiff inspect` says of which kind each is."
        raise UserError(f'{file}: {what}; the first is "{strange[0]}". {fix}')
    loras: dict[str, tuple[Layer, LoRA]] = {}
    for name, values in content.items():
        for place, piece in _pieces(places[name], values, where := f'{file}: "{name}"'):
            if place.name in loras:
                why = f'two of its layers mean {place.name}; the second is "{name}".'
                raise UserError(f"{file}: {why}")
            loras[place.name] = place.layer, _fitted(place, piece, where)
    check_free({name: layer for name, (layer, _) in loras.items()})
    if bundled and not inversion.encoders(model.text):
        raise UserError(f"{file} has textual inversions, and this model has no CLIPText for them.")
    words = [embedding.give(model.text, file, *each) for each in bundled.items()]
    before = _probe(model)
    for _, lora in loras.values():
        lora.scale = float(scale)
    attach(model, loras.values())
    change = _probe(model) - before
    moved = (change.norm() / before.norm().clamp(min=1e-12)).item()
    if moved == 0:
        why = "all its B are zero, as before training, or the U-Net's own output is"
        why = "its scale is 0" if scale == 0 else why
        warnings.warn(f"{file.name} changes nothing: {why}", stacklevel=2)
    return Loaded(list(loras), moved, words)


def _file_at(path: Path) -> Path:
    """The file of a folder, as PEFT and diffusers save it."""
    files_in = (path / f"{stem}{suffix}" for stem in STEMS for suffix in (".safetensors", ".bin"))
    return next((file for file in files_in if file.is_file()), path)


def _read(file: Path) -> tuple[dict[str, Tensors], dict[str, Tensors]]:
    """The tensors of each layer, by the file's name of the layer; and the vectors of each word, by
    their text encoder."""
    content: dict[str, Tensors] = {}
    others, bundled = [], {}
    for key, value in files.tensors(file).items():
        if match := BUNDLED.fullmatch(key):
            bundled.setdefault(match["word"], {})[match["of"]] = value
            continue
        match = names.LORA.fullmatch(key)
        if match is None:
            others.append(key)
            continue
        half = {"down": "A", "up": "B", None: "alpha"}.get(match["half"], match["half"])
        if half == "alpha" and value.numel() != 1:
            raise UserError(f'{file}: "{key}" is {tuple(value.shape)}; alpha is one number.')
        (name,) = names.to_ours({match["layer"]: None}, names.LORA_OLD)
        if half in content.setdefault(name, {}):
            why = "stands in it twice, by two names; a file has one of the two"
            raise UserError(f'{file}: "{key}" {why}.')
        content[name][half] = value
    if not content:
        first = min(others, default="none")
        raise UserError(f'{file} holds no LoRA; its first tensor is "{first}".')
    if others:
        what = f"{len(others)} of its tensors are neither A, B nor alpha of a LoRA"
        fix = "Relatives of LoRA (LoHa, LoKr, DoRA) are not read."
        raise UserError(f'{file}: {what}; the first is "{others[0]}". {fix}')
    for name, values in content.items():
        for half, kohya in (("A", "down"), ("B", "up")):
            if half not in values:
                why = f"has no {half} ({kohya}); a LoRA is two matrices"
                raise UserError(f'{file}: "{name}" {why}.')
        if (mid := values.pop("mid", None)) is not None:
            values["A"] = _composed(mid, values["A"], f'{file}: "{name}"')
    _add_alphas(file, content)
    return content, bundled


def _composed(mid: Tensor, A: Tensor, where: str) -> Tensor:
    """LyCORIS's third matrix of a convolution, a kernel between A and B of 1x1, as one with A."""
    if mid.ndim != 4 or A.ndim != 4 or mid.shape[1] != len(A) or A.shape[2:] != (1, 1):
        shapes = f"{tuple(mid.shape)} and {tuple(A.shape)}"
        raise UserError(f"{where}: lora_mid and lora_down are {shapes}, which do not fit.")
    return torch.einsum("rshw,si->rihw", mid.float(), A[:, :, 0, 0].float())


def _add_alphas(file: Path, content: dict[str, Tensors]) -> None:
    """Alpha from PEFT's configuration, where no tensor tells it: in the file's metadata where
    diffusers wrote it, or in adapter_config.json beside it."""
    beside, text = file.with_name("adapter_config.json"), files.metadata(file)
    config = files.read_json(beside) if file.stem == "adapter_model" and beside.is_file() else {}
    try:
        config = config | json.loads(text.get("lora_adapter_metadata", "{}"))
        for name, values in content.items():
            alpha = _alpha(config, name, values["A"])
            if alpha is not None:
                values.setdefault("alpha", alpha)
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        why = f"its LoRA configuration is damaged ({type(error).__name__}: {error})"
        raise UserError(f"{file}: {why}; {files.AGAIN}.") from error


def _alpha(config: dict, name: str, A: Tensor) -> float | None:
    """A layer's alpha in PEFT's configuration, whose keys may stand behind the part's name."""
    part, layer = "", name
    if re.match(r"(unet|transformer|text_encoder(_[23])?)\.", name):
        part, layer = name.split(".", 1)
    prefix = f"{part}."
    config = config | {k.removeprefix(prefix): v for k, v in config.items() if k.startswith(prefix)}
    patterns = (config.get("alpha_pattern") or {}).items()
    special = [value for key, value in patterns if ends(layer, key.removeprefix("^"))]
    alpha = special[0] if special else config.get("lora_alpha")
    if alpha is None:
        return None
    # With rslora the factor is alpha / sqrt(r).
    return float(alpha) * (math.sqrt(len(A)) if config.get("use_rslora") else 1)


def _pieces(places: list[Place], values: Tensors, where: str) -> Iterator[tuple[Place, Tensors]]:
    """The LoRA of a fused layer as one for each of its layers: the same A, their rows of B."""
    B, rows = values["B"], [len(place.layer.weight) for place in places]
    if len(places) > 1 and (B.ndim == 0 or len(B) != sum(rows)):
        raise UserError(
            f"{where}: B is {tuple(B.shape)}; this model's layer takes {sum(rows)} rows."
        )
    pieces = [B] if len(places) == 1 else B.split(rows)
    return ((place, values | {"B": piece}) for place, piece in zip(places, pieces, strict=True))


def _fitted(place: Place, values: Tensors, where: str) -> LoRA:
    """The LoRA of a layer, from a file's tensors. The two axes of a 1x1 kernel may be absent."""
    out, *inner = place.layer.weight.shape
    rank = len(values["A"]) if values["A"].ndim else 0
    for half, expected in (("A", (rank, *inner)), ("B", (out, rank, *[1] * (len(inner) - 1)))):
        value = values[half]
        if _without_1x1(value.shape) != _without_1x1(expected) or not rank:
            fitting = f"at rank {rank} this model's layer takes {expected}"
            raise UserError(f"{where}: {half} is {tuple(value.shape)}; {fitting}.")
        if not value.is_floating_point() or not value.float().sum().isfinite():
            what = "holds what is no finite number; training broke before it was saved"
            raise UserError(f"{where}: {half} {what}.")
    lora = LoRA(place.layer, rank, float(values.get("alpha", rank)))
    if not math.isfinite(lora.alpha):
        raise UserError(f"{where}: alpha is {lora.alpha}; it must be finite.")
    for half in ("A", "B"):
        getattr(lora, half).data.copy_(values[half].view_as(getattr(lora, half)))
    return lora


def _without_1x1(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(shape[:2]) if tuple(shape[2:]) == (1, 1) else tuple(shape)


@torch.no_grad()
def _probe(model: LatentDiffusion) -> Float[Tensor, "B C H W"]:
    """The U-Net's output halfway to noise, on fixed latents and, if it reads CLIP's text encoders,
    on fixed words."""
    side, text, channels = 2 * model.unet.multiple, model.text, model.unet.config.in_channels
    x = torch.randn(1, channels, side, side, generator=torch.Generator().manual_seed(0))
    if isinstance(text, CLIPText):
        tokens = torch.arange(1000, 1000 + text.context_length, device=model.device)
        context = text(tokens[None] % text.config.vocabulary)
    else:
        context = text.encode(["a photo of a cat"]) if inversion.encoders(text) else text.null(1)
    t = model.schedule.timesteps(2)[1:2]
    return model.denoiser.output(x.to(model.device), t, context).float()
