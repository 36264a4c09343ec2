"""ControlNets as files: ours, diffusers' folder, and the single file of the paper's authors.

minidiff   one .safetensors file with our names; its config, as JSON, is in the file's metadata
diffusers  a folder with config.json and diffusion_pytorch_model.safetensors
compvis    one .safetensors file; names begin with "control_model.", or with nothing
"""

import json
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from minidiff.checkpoints import files, layouts, names, sizes
from minidiff.checkpoints.folder import dtype_named, empty, fill
from minidiff.errors import UserError, choice
from minidiff.methods.controlnet import ControlNet
from minidiff.methods.lora import merged_state
from minidiff.training import atomic

State = dict[str, Tensor]
KEY = "minidiff.controlnet"  # of the metadata
LAYOUTS = ("minidiff", "diffusers", "compvis")
OURS_ONLY = {"ff_mult": 4, "pooled": False, "scale_shift": False, "middle": True}


def controlnet_diffusers(levels: int) -> names.Table:
    """ControlNetModel, whose hint encoder has so many levels."""
    hint = "controlnet_cond_embedding"
    blocks = [(f"{hint}.blocks.{k}", f"hint.{2 * k + 2}") for k in range(2 * levels - 2)]
    ends = [(f"{hint}.conv_in", "hint.0"), (f"{hint}.conv_out", f"hint.{4 * levels - 2}")]
    zero = [("controlnet_down_blocks", "zero"), ("controlnet_mid_block", "zero_middle")]
    return [*blocks, *ends, *zero, *names.UNET_DIFFUSERS]


def controlnet_compvis(unet: names.Table) -> names.Table:
    """The authors' ControlNet of a U-Net in CompVis's names."""
    rows = [("input_hint_block", "hint"), ("middle_block_out.0", "zero_middle")]
    return [*rows, ("zero_convs.{}.0", "zero.{}"), *unet]


def load(
    path: str | Path,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype | None = "fp32",
) -> ControlNet:
    """The ControlNet at a path, in any layout. dtype: None keeps what is stored."""
    path = Path(path)
    file = layouts.controlnet_file(path) or files.checked(path)
    state, metadata = files.tensors(file), files.metadata(file)
    try:
        if KEY in metadata:
            config = json.loads(metadata[KEY])
        else:
            state, config = _published(path, file, state)
        network = empty(ControlNet, config)
    except layouts.DAMAGED as error:
        if isinstance(error, UserError):
            raise UserError(f"{file}: {error}") from error
        raise files.damaged(file, f"its config: {files.first_line(error)}") from error
    return fill(network, state, str(file), dtype_named(dtype)).to(device).eval()


def _published(path: Path, file: Path, state: State) -> tuple[State, dict]:
    """The tensors under our names, and the arguments of ControlNetConfig."""
    if any(name.startswith("control_model.") for name in state):  # some hold the U-Net as well
        parts = ((name.partition("control_model."), value) for name, value in state.items())
        state = {name: value for (before, _, name), value in parts if name and not before}
    if any(name.startswith("controlnet_down_blocks.") for name in state):
        levels = sum(name.startswith("controlnet_cond_embedding.") for name in state) // 4
        state = names.to_ours(state, controlnet_diffusers(levels))
    elif any(name.startswith("zero_convs.") for name in state):
        state = names.to_ours(state, controlnet_compvis(layouts.unet_table(state)))
    else:
        raise UserError("no ControlNet: it has no zero convolutions.")
    config = sizes.controlnet_config({name: tuple(value.shape) for name, value in state.items()})
    if path.is_dir():
        settings = files.read_json(path / "config.json")
        config["heads"] = layouts.unet_heads(settings)
        config["groups"] = settings.get("norm_num_groups", 32)
    return state, config


def save(controlnet: ControlNet, path: str | Path, layout: str = "minidiff") -> Path:
    """Write a ControlNet in one of LAYOUTS: a folder of diffusers, or a file, which must end in
    .safetensors. A stranger's is not written over; what a layout has no word for is refused."""
    choice("layout", layout, LAYOUTS)
    path, config = Path(path), asdict(controlnet.config)
    strange = [name for name, usual in OURS_ONLY.items() if config[name] != usual]
    if layout != "minidiff" and (strange or not config["groups"]):
        what = f"{(strange or ['groups'])[0]}={config[(strange or ['groups'])[0]]}"
        raise UserError(f"this ControlNet's U-Net has {what}; save it in minidiff's layout.")
    if layout != "diffusers" and path.suffix != ".safetensors":
        raise UserError(f"{path} should end in .safetensors.")
    state, metadata = merged_state(controlnet), {"format": "pt", "software": atomic.SIGNATURE}
    if layout == "diffusers":
        state = names.to_published(state, controlnet_diffusers(len(config["hint"])))
        atomic.check_new(path)
        with atomic.write(path) as new:
            new.mkdir()
            (new / "config.json").write_text(json.dumps(_settings(config), indent=2) + "\n")
            _save(state, new / "diffusion_pytorch_model.safetensors", metadata)
        return path
    if layout == "compvis":
        table = names.unet_compvis([depth > 0 for depth in config["depth"]], config["blocks"])
        state = names.to_published(state, controlnet_compvis(table))
        state = {f"control_model.{name}": value for name, value in state.items()}
    else:
        metadata[KEY] = json.dumps(config)
    with atomic.write(path, atomic.unsigned) as new:
        _save(state, new, metadata)
    return path


def _save(state: State, file: Path, metadata: dict[str, str]) -> None:
    save_file({name: value.contiguous() for name, value in state.items()}, file, metadata)


def _settings(config: dict) -> dict:
    """The config.json of a ControlNetModel."""
    cross, added = [bool(depth) for depth in config["depth"]], config["added"]
    settings = {
        "_class_name": "ControlNetModel",
        "in_channels": config["in_channels"],
        "conditioning_channels": 3,
        "block_out_channels": config["channels"],
        "layers_per_block": config["blocks"],
        "down_block_types": [f"{'CrossAttn' if c else ''}DownBlock2D" for c in cross],
        "transformer_layers_per_block": [max(1, depth) for depth in config["depth"]],
        "attention_head_dim": config["heads"],
        "cross_attention_dim": config["context_dim"],
        "use_linear_projection": config["linear_projection"],
        "norm_num_groups": config["groups"],
        "conditioning_embedding_out_channels": config["hint"],
    }
    if added:
        settings |= {"addition_embed_type": "text_time", "addition_time_embed_dim": 256}
        settings["projection_class_embeddings_input_dim"] = added
    return settings
