"""What a stranger's file is, by the names of its tensors and its metadata, and what takes
it. Without torch."""

import json
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from minidiff.checkpoints import names
from minidiff.errors import UserError

State = Mapping[str, Any]  # Tensor or Stored, by name
Rows = list[tuple[str, str]]


class Kind(NamedTuple):
    name: str
    use: str
    pattern: str = ""  # of the beginning of a tensor's name


NOT_READ = "it is not read here; Stable Diffusion 1.x, 2.x and XL are"
AS_SAFE = "it is read from a .safetensors file"  # see flow_models
LORA = Kind("a LoRA", "add it to a model with `lora={}`")
EMBEDDING = Kind("a textual inversion", "give it to a model with `embedding={}`")
CONTROLNET = Kind(
    "a ControlNet",
    "draw with it, and an image for it: `controlnet={}`",
    r"control_model\.|zero_middle\.|(.*\.)?(zero_convs|controlnet_cond_embedding)\.",
)
OTHERS = (  # the first that fits
    CONTROLNET,
    Kind("a relative of LoRA (LoHa, LoKr)", "only LoRA is read", r".*\.(hada_w1|lokr_w1)"),
    Kind("FLUX.1", AS_SAFE, r"(.*\.)?(double_blocks|single_blocks|single_transformer_blocks)\.\d"),
    Kind("Stable Diffusion 3", AS_SAFE, r"(.*\.)?(joint_blocks\.\d|.*\.attn\.add_q_proj\.)"),
    Kind("a motion module (AnimateDiff)", NOT_READ, r".*motion_modules\."),
    Kind("an IP-Adapter", NOT_READ, r"(image_proj|ip_adapter)\."),
)
VERSIONS = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x", 2048: "Stable Diffusion XL"}
VERSIONS[1280] = "the refiner of Stable Diffusion XL"
FLOWS = {  # marks of a LoRA's names; diffusers' of joint blocks do not tell the two apart
    "FLUX.1": r"(double_blocks|single_blocks|single_transformer_blocks)[._]\d",
    "Stable Diffusion 3": r"joint_blocks[._]\d",
}
READING = r"attn2[._](processor\.)?to_k"  # the layers that read the context
WIDTHS = (768, 1024, 1280)  # of the text encoders, and so of textual inversions
METADATA = {  # of LoRA files: kohya's, and Stability's ModelSpec
    "title": ("modelspec.title", "ss_output_name"),
    "trained on": ("ss_sd_model_name", "ss_base_model_version", "modelspec.architecture"),
    "trained by": ("ss_network_module", "modelspec.author"),
    "alpha": ("ss_network_alpha",),
    "steps": ("ss_steps",),
    "trigger words": ("modelspec.trigger_phrase",),
}


def of(state: State) -> Kind | None:
    """The kind of a file that is no model, and no part of one; None for any other."""
    if any((match := names.LORA.fullmatch(name)) and match["half"] for name in state):
        return LORA
    fits = (kind for kind in OTHERS if any(re.match(kind.pattern, name) for name in state))
    return next(fits, EMBEDDING if is_embedding(state) else None)


def check(file: Path, state: State) -> None:
    """Raise a UserError for a file that is no model, and no part of one."""
    if (kind := of(state)) is not None:
        raise UserError(f"{file} is {kind.name}; {kind.use.format(file)}.")


def is_embedding(state: State) -> bool:
    """Whether the tensors are vectors of words."""
    flat = all(len(value.shape) in (1, 2) and value.shape[-1] in WIDTHS for value in state.values())
    return 0 < len(state) <= 2 and flat


def lora_rows(state: State, metadata: Mapping[str, str]) -> Rows:
    """A LoRA: which naming, of what rank, for how many layers of which model; trigger words."""
    matches = ((names.LORA.fullmatch(name), value) for name, value in state.items())
    layers = {m["layer"]: value for m, value in matches if m and m["half"] in ("A", "down")}
    kohya = any(name.startswith("lora_") for name in layers)
    ranks = Counter(value.shape[0] for value in layers.values() if value.shape)
    text = sum("text_encoder" in name or name.startswith("lora_te") for name in layers)
    plural = "s" if any(re.match(r"text_encoder_[23]|lora_te[23]", name) for name in layers) else ""
    flow = any(re.match(r"(lora_)?transformer[._]", name) for name in layers) or _flows(layers)
    network = "transformer" if flow else "U-Net"
    rows = [
        ("layout", f"LoRA, {'kohya' if kohya else 'diffusers or PEFT'} names"),
        ("rank", ", ".join(f"{rank} ({count} layers)" for rank, count in sorted(ranks.items()))),
        ("layers", f"{len(layers) - text} of the {network}, {text} of the text encoder{plural}"),
        ("dtype", ", ".join(Counter(value.dtype for value in state.values()))),
    ]
    rows += [("for", version) for version in lora_versions(layers)]
    for title, keys in METADATA.items():
        if values := [metadata[key] for key in keys if metadata.get(key)]:
            rows.append((title, "; ".join(dict.fromkeys(values))[:200]))
    if tags := _tags(metadata.get("ss_tag_frequency", "")):
        rows.append(("captions had", tags))
    return [*rows, ("cannot", "draw by itself: it changes a model that it was trained for")]


def lora_versions(layers: State) -> list[str]:
    """Of the models that a LoRA is for, by names, or the width of the context that its layers read.
    layers: A of each."""
    if flows := _flows(layers):
        return flows
    reading = (v.shape for name, v in layers.items() if re.search(READING, name))
    widths = sorted({shape[1] for shape in reading if len(shape) > 1})
    return [VERSIONS.get(width, f"a text encoder of width {width}") for width in widths]


def _flows(layers: State) -> list[str]:
    return [flow for flow, mark in FLOWS.items() if any(re.search(mark, name) for name in layers)]


def controlnet_rows(state: State) -> Rows:
    """A ControlNet: for which model, by the width of what its cross-attention reads."""
    reading = re.compile(r"(attn2\.to_k|cross_attention\.k)\.weight")
    keys = (value.shape for name, value in state.items() if reading.search(name))
    widths = dict.fromkeys(shape[1] for shape in keys if len(shape) == 2)
    rows = [("for", VERSIONS.get(width, f"a text encoder of width {width}")) for width in widths]
    whole = any(name.startswith("model.diffusion_model.") for name in state)
    return rows + [("note", "a whole model stands beside it; the ControlNet alone is read")] * whole


def _tags(text: str) -> str:
    """kohya's {folder: {tag: count}}: the folders, whose names hold the trigger words, and the most
    frequent tags."""
    try:
        counts: Counter[str] = Counter()
        folders = json.loads(text or "{}")
        for tags in folders.values():
            counts.update({tag.strip(): int(count) for tag, count in tags.items()})
    except (ValueError, TypeError, AttributeError, RecursionError):
        return text[:200]
    tags = ", ".join(f"{tag} ({count})" for tag, count in counts.most_common(10))
    return f"{tags}; folders {', '.join(folders)}"[:400] if counts else ""
