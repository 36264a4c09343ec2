"""Checkpoints of Stable Diffusion 3, 3.5 and FLUX.1: which they are, and their parts under our
names. Without torch; read from tensors or from headers alone, as in layouts.

    diffusers     a folder: transformer, vae, text_encoder (CLIP-L), text_encoder_2 (CLIP-G, SD 3);
                  T5 is in the last text encoder's folder; each text encoder has a tokenizer
    single file   each network behind a prefix; files of FLUX.1 hold the transformer alone
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from minidiff.checkpoints import files, kinds, layouts, names, names_flow, parts, sizes
from minidiff.checkpoints.parts import Part, Read, State
from minidiff.errors import UserError


class Family(NamedTuple):
    """What the published members have in common, and no tensor says."""

    name: str
    pipeline: str  # diffusers' class, and the beginning of its relatives'
    transformer: str
    encoders: Mapping[str, str]  # our name of a text encoder, and the number of its folder
    latent: tuple[float, float]  # scale and shift
    length: int  # tokens of T5


SD3 = Family(
    "Stable Diffusion 3",
    "StableDiffusion3Pipeline",
    "SD3Transformer2DModel",
    {"clip_l": "", "clip_g": "_2", "t5": "_3"},
    (1.5305, 0.0609),
    256,
)
FLUX = Family(
    "FLUX.1",
    "FluxPipeline",
    "FluxTransformer2DModel",
    {"clip_l": "", "t5": "_2"},
    (0.3611, 0.1159),
    512,
)
FAMILIES = (SD3, FLUX)
PREFIXES = {  # of a single file; the first that occurs
    "unet": ("model.diffusion_model.", "diffusion_model."),
    "vae": ("first_stage_model.", "vae."),
    "clip_l": ("text_encoders.clip_l.transformer.",),
    "clip_g": ("text_encoders.clip_g.transformer.",),
    "t5": ("text_encoders.t5xxl.transformer.",),
}
NONE: Mapping = {}  # no configuration file
MISSING = "zeros stand in for T5's vectors, as in SD 3 they may"


@dataclass
class Checkpoint:
    """What a folder or file holds; parts by a key of layouts.KINDS."""

    family: Family
    layout: str
    parts: dict[str, Part] = field(default_factory=dict)
    vocabulary: str = ""  # of T5: the text of tokenizer.json
    scheduler: dict = field(default_factory=dict)  # scheduler_config.json, where there is one
    size: int = 1024  # side of the training images in pixels
    notes: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)

    @property
    def guided(self) -> bool:
        """Whether the transformer is told the guidance scale."""
        return "unet" in self.parts and self.parts["unet"].config["guidance"]


def family_of(path: Path) -> Family | None:
    """The family of a folder of diffusers, or of a file whose header has its names; of a LoRA and
    of anything else None."""
    if path.is_dir():
        index = layouts._settings(path, "model_index.json", optional=True)
        kind = str(
            index.get("_class_name") or layouts._settings(path, optional=True).get("_class_name")
        )
        if not index:
            return next((each for each in FAMILIES if kind == each.transformer), None)
        fits = (
            each for each in FAMILIES if kind.startswith(each.pipeline.removesuffix("Pipeline"))
        )
        return next(fits, None)
    if path.suffix != ".safetensors" or not path.is_file():
        return None
    kind = kinds.of(files.stored(path))
    return next((each for each in FAMILIES if kind is not None and kind.name == each.name), None)


def read(path: Path, reader: Read) -> Checkpoint:
    """The checkpoint at a path of which family_of knows the family."""
    family = family_of(path)
    try:
        return _folder(path, family, reader) if path.is_dir() else _file(path, family, reader)
    except UserError:
        raise
    except layouts.DAMAGED as error:
        raise layouts._damaged(path, error) from error


# One network.


def transformer(state: State, where: str, settings: Mapping = NONE) -> Part:
    """settings: config.json. The number of heads and the axes leave no trace in tensors."""
    try:
        state = names_flow.read(state, names_flow.layout_of(state))
        config = names_flow.config(state)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    config["heads"] = settings.get("num_attention_heads", config["heads"])
    if config["axes"] is not None:
        config["axes"] = tuple(settings.get("axes_dims_rope", config["axes"]))
    return Part(state, config, where)


def vae(state: State, where: str, family: Family, settings: Mapping = NONE) -> Part:
    part = layouts._compvis_vae(state, where)
    part.config["groups"] = settings.get("norm_num_groups", 32)
    scale, shift = family.latent
    scale, shift = settings.get("scaling_factor", scale), settings.get("shift_factor", shift)
    part.config["latent_shift"] = float(shift or 0)
    return part._replace(latent_scale=float(scale))


def clip(state: State, where: str, name: str, family: Family, settings: Mapping = NONE) -> Part:
    """Text encoders as transformers names them. CLIP-G has gelu, and pads with 0."""
    part = parts.text(state, where, names.CLIP_TRANSFORMERS, projection=family is SD3)
    if name == "clip_g":
        part.config.update(activation="gelu", pad=0)
    part.config["activation"] = settings.get("hidden_act", part.config["activation"])
    part.config["heads"] = settings.get("num_attention_heads", part.config["heads"])
    part.config["penultimate"] = family is SD3
    return part


def t5(state: State, where: str, settings: Mapping = NONE) -> Part:
    kind = settings.get("feed_forward_proj", "gated-gelu")
    if kind != "gated-gelu":
        raise UserError(f"{where}: feed_forward_proj is {kind!r}; T5 v1.1 has gated-gelu.")
    if "shared.weight" not in state and "encoder.embed_tokens.weight" in state:
        state = state | {"shared.weight": state["encoder.embed_tokens.weight"]}
    state = names.to_ours(state, names.T5)
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    vocabulary, width = sizes._shape(shapes, "token_embedding.weight", 2)
    buckets, heads = sizes._shape(shapes, "distance_bias.weight", 2)
    config = dict(
        width=width,
        layers=sizes._count(shapes, "blocks"),
        heads=heads,
        head_dim=sizes._shape(shapes, "blocks.0.q.weight", 2)[0] // heads,
        hidden=sizes._shape(shapes, "blocks.0.up.weight", 2)[0],
        vocabulary=vocabulary,
        buckets=buckets,
        farthest=settings.get("relative_attention_max_distance", 128),
    )
    return Part(state, config, where)


def _add_text(checkpoint: Checkpoint, encoders: dict[str, Part]) -> None:
    """The text encoders as one part, with T5 only where its vocabulary is at hand."""
    family, where = checkpoint.family, next((part.where for part in encoders.values()), "")
    if "t5" in encoders and not checkpoint.vocabulary:
        place = f"tokenizer{family.encoders['t5']}/tokenizer.json"
        why = f"{place} is missing: T5's vocabulary, which comes with no library"
        if family is FLUX:
            raise UserError(f"{where}: {why}. Copy the folder that it is in from the Hub.")
        checkpoint.notes.append(f"{why}. T5 is left out, and {MISSING}")
        del encoders["t5"]
    absent = [name for name in family.encoders if name not in encoders and name != "t5"]
    if not encoders or absent or (family is FLUX and "t5" not in encoders):
        return
    if "t5" not in encoders and not checkpoint.notes:
        checkpoint.notes.append(f"no T5 in it; {MISSING}")
    network = checkpoint.parts.get("unet")
    dim = encoders["t5"].config["width"] if "t5" in encoders else 4096
    config = dict.fromkeys(("clip_l", "clip_g", "t5"))
    config |= {name: part.config for name, part in encoders.items()}
    is_schnell = family is FLUX and network is not None and not checkpoint.guided
    config |= dict(
        length=256 if is_schnell else family.length,
        dim=network.config["context_dim"] if network else dim,
    )
    state = {
        f"{n}.{key}": value for n, part in encoders.items() for key, value in part.state.items()
    }
    checkpoint.parts["text"] = Part(state, config, where)


# A folder of diffusers.


def _folder(folder: Path, family: Family, reader: Read) -> Checkpoint:
    if not (folder / "model_index.json").is_file():
        checkpoint = Checkpoint(family, "diffusers, one part")
        checkpoint.parts["unet"] = _transformer_of(folder, reader)
        return checkpoint
    checkpoint = Checkpoint(family, "diffusers")
    checkpoint.scheduler = layouts._settings(folder / "scheduler", "scheduler_config.json", True)
    if (folder / "transformer").is_dir():
        checkpoint.parts["unet"] = _transformer_of(folder / "transformer", reader)
    if (folder / "vae").is_dir():
        state, file = layouts._weights(folder / "vae", "diffusion_pytorch_model", reader)
        settings = layouts._settings(folder / "vae")
        checkpoint.parts["vae"] = vae(state, str(file), family, settings)
        factor = 2 ** (len(checkpoint.parts["vae"].config["channels"]) - 1)
        sample = layouts._settings(folder / "transformer", optional=True).get("sample_size") or 128
        checkpoint.size = int(sample) * factor
    encoders = {}
    for name, number in family.encoders.items():
        if (place := folder / f"text_encoder{number}").is_dir():
            tokenizer = folder / f"tokenizer{number}"
            encoders[name] = _encoder(place, tokenizer, name, family, reader)
            if name == "t5":
                checkpoint.vocabulary = _vocabulary(tokenizer, checkpoint.notes)
    _add_text(checkpoint, encoders)
    return checkpoint


def _transformer_of(folder: Path, reader: Read) -> Part:
    state, file = layouts._weights(folder, "diffusion_pytorch_model", reader)
    return transformer(state, str(file), layouts._settings(folder))


def _encoder(folder: Path, tokenizer: Path, name: str, family: Family, reader: Read) -> Part:
    state, file = layouts._weights(folder, "model", reader)
    settings = layouts._settings(folder)
    if name == "t5":
        return t5(state, str(file), settings)
    part = clip(state, str(file), name, family, settings)
    if (pad := layouts._padding(tokenizer)) is not None:
        part.config["pad"] = pad
    return part


def _vocabulary(folder: Path, notes: list[str]) -> str:
    """The text of a tokenizer.json in this folder; where there is none, what to do is a note."""
    file = folder / "tokenizer.json"
    if file.is_file():
        files.read_json(files.inside(folder.parent, file))
        return file.read_text(encoding="utf-8")
    if (folder / "spiece.model").is_file():
        make = f'AutoTokenizer.from_pretrained("{folder}").save_pretrained("{folder}")'
        notes.append(
            f"{folder}/spiece.model is not read here; transformers makes the other: {make}"
        )
    return ""


# A single file.


def _file(file: Path, family: Family, reader: Read) -> Checkpoint:
    state, notes = reader(file), []
    if (why := unreadable(state)) is not None:
        raise UserError(f"{file}: {why}.")
    places = (file.parent / f"tokenizer{family.encoders['t5']}", file.parent)
    vocabulary = next(filter(None, (_vocabulary(place, notes) for place in places)), "")
    checkpoint = of_names(state, str(file), family, vocabulary)
    checkpoint.notes = notes + checkpoint.notes
    size = re.fullmatch(r"(\d{2,4})x\d{2,4}", str(files.metadata(file).get("modelspec.resolution")))
    checkpoint.size = int(size[1]) if size else checkpoint.size
    return checkpoint


def of_names(state: State, where: str, family: Family, vocabulary: str) -> Checkpoint:
    """What the tensors of a single file are, by their names and shapes alone."""
    checkpoint = Checkpoint(family, "single file", vocabulary=vocabulary)
    groups: dict[str, State] = {}
    rest = dict(state)
    for name, prefixes in PREFIXES.items():
        for prefix in prefixes:
            group = {n.removeprefix(prefix): v for n, v in rest.items() if n.startswith(prefix)}
            if name not in groups and group:
                groups[name] = group
                rest = parts.without(rest, (prefix,))
    if "unet" not in groups:  # a transformer alone
        groups, rest = {"unet": rest}, {}
    checkpoint.unknown = sorted(names.to_ours(rest, names.COMPVIS_DROPPED))
    checkpoint.parts["unet"] = transformer(groups["unet"], where)
    if "vae" in groups:
        checkpoint.parts["vae"] = vae(groups["vae"], where, family)
    encoders = {
        name: clip(groups[name], where, name, family)
        for name in ("clip_l", "clip_g")
        if name in groups
    }
    if "t5" in groups:
        encoders["t5"] = t5(groups["t5"], where)
    _add_text(checkpoint, encoders)
    return checkpoint


def unreadable(state: State) -> str | None:
    """Why the numbers of a file are not weights as they stand, in one line; None: they are."""
    what = None
    if any(name.endswith(("scaled_fp8", ".scale_weight", ".weight_scale")) for name in state):
        what = "its weights are of 8 bits, with scales of their own"
    if any(".quant_state." in name or name.endswith(".absmax") for name in state):
        what = "its weights are of 4 bits (NF4)"
    return what and f"{what}, for other programs; fetch one in bf16 or fp16"
