"""Checkpoints of Stable Diffusion 1.x and 2.x, whatever their layout, as the same three parts under our names. Without torch.

A layout is read the same way from tensors and from headers alone (`Stored`): loading does the one, inspecting the other.

    diffusers      a folder with model_index.json, and one folder each for U-Net, VAE, text tower, tokenizer and scheduler
    CompVis        a single file; its three networks stand behind prefixes. Files of one network alone have none
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from minidiff.checkpoints import files, names, sizes
from minidiff.errors import UserError

State = dict  # by name: Tensor or Stored
Read = Callable[[Path], State]
KINDS = {"unet": "U-Net", "vae": "VAE", "text": "text tower"}
PREDICTIONS = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}
STABLE_DIFFUSION = {
    "betas": "scaled_linear",
    "T": 1000,
    "beta_1": 0.00085,
    "beta_T": 0.012,
    "final": 1,
}
UNET, AVERAGE, VAE = (
    ("model.diffusion_model.", "diffusion_model."),
    "model_ema.diffusion_model",
    "first_stage_model.",
)
TEXT_1, TEXT_2 = "cond_stage_model.transformer.", "cond_stage_model.model."


class Part(NamedTuple):
    """One network, before it is built."""

    state: State  # by our names
    numbers: dict  # the arguments of UNet, VAE or CLIPText
    where: str  # the file, for messages


@dataclass
class Checkpoint:
    """What a folder or file holds. None stands for what it does not say."""

    layout: str
    parts: dict[str, Part] = field(default_factory=dict)  # by a key of KINDS
    schedule: dict | None = None  # the numbers of schedules.Discrete
    target: str | None = None
    spacing: str = "leading"
    size: int | None = None  # side of the training pictures in pixels
    notes: list[str] = field(default_factory=list)  # what was decided on the way
    unknown: list[str] = field(default_factory=list)  # names of tensors that belong to no part


def read(path: Path, reader: Read) -> Checkpoint:
    """The checkpoint at a path: `reader` opens a file of tensors, as files.tensors does."""
    if path.is_dir():
        if not (path / "model_index.json").is_file():
            raise UserError(
                f'"{path}" is no checkpoint: neither model.json (ours) nor model_index.json (diffusers) is in it.'
            )
        return _diffusers(path, reader)
    return _single_file(path, reader)


def _shapes(state: State) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in state.items()}


def unet(state: State, where: str, table: names.Table, **known) -> Part:
    """`known`: numbers that a configuration tells, which tensors do not."""
    state = names.to_ours(state, table)
    return Part(state, _numbers(sizes.unet_numbers, state, where) | known, where)


def vae(state: State, where: str, table: names.Table, **known) -> Part:
    """CompVis's attention, and diffusers' of old, are convolutions of size 1: the same numbers with two axes more."""
    state = names.to_ours(state, table)
    state = {
        name: value.flatten(1) if ".attention." in name and value.ndim == 4 else value
        for name, value in state.items()
    }
    return Part(state, _numbers(sizes.vae_numbers, state, where) | known, where)


def text(state: State, where: str, table: names.Table, penultimate: bool = False, **known) -> Part:
    """penultimate: leave out the last block, whose output SD 2.x does not use."""
    state = names.to_ours(
        {name.removeprefix("text_model."): value for name, value in state.items()}, table
    )
    for name in [name for name in state if ".qkv." in name]:
        for piece, part in zip("qkv", state.pop(name).chunk(3), strict=True):
            state[name.replace(".qkv.", f".{piece}.")] = part
    numbers = _numbers(sizes.text_numbers, state, where) | known
    if penultimate:
        numbers["layers"] -= 1
        state = {
            name: value
            for name, value in state.items()
            if not name.startswith(f"blocks.{numbers['layers']}.")
        }
    return Part(state, numbers, where)


def _numbers(count: Callable[[sizes.Shapes], dict], state: State, where: str) -> dict:
    try:
        return count(_shapes(state))
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


# A folder of diffusers.


def _piece(folder: Path, stem: str, reader: Read) -> tuple[State, Path]:
    """The tensors of one part: one file or the pieces an index lists; safetensors first, full precision first."""
    for variant in ("", ".fp16"):
        for suffix in (".safetensors", ".bin"):
            base = stem if suffix == ".safetensors" or "diffusion" in stem else "pytorch_model"
            file, index = (
                folder / f"{base}{variant}{suffix}",
                folder / f"{base}{suffix}.index{variant}.json",
            )
            if file.is_file():
                return reader(files.inside(folder.parent, file)), file
            if index.is_file():
                mapped = files.read_json(files.inside(folder.parent, index)).get("weight_map")
                pieces = (
                    sorted({str(piece) for piece in mapped.values()})
                    if isinstance(mapped, dict)
                    else []
                )
                if not pieces or any(Path(piece).name != piece for piece in pieces):
                    raise UserError(
                        f'{index} should have a "weight_map" that names files of its own folder.'
                    )
                state = {
                    name: value
                    for piece in pieces
                    for name, value in reader(files.inside(folder.parent, folder / piece)).items()
                }
                return state, index
    raise UserError(
        f"{folder} has no weights: no {stem}.safetensors, nor any other spelling of it."
    )


def _diffusers(folder: Path, reader: Read) -> Checkpoint:
    """Its configurations tell what tensors do not: heads, groups, activation, padding, scale, target, spacing."""

    def config(*piece: str) -> dict:
        return files.read_json(files.inside(folder, folder.joinpath(*piece)))

    kind = config("model_index.json").get("_class_name", "StableDiffusionPipeline")
    if not str(kind).startswith("StableDiffusion") or "XL" in str(kind) or "3" in str(kind):
        raise UserError(f"{folder} is a {kind}; Stable Diffusion 1.x and 2.x are read here.")
    found = Checkpoint("diffusers")
    of = {part: config(part, "config.json") for part in ("unet", "vae", "text_encoder")}
    try:
        found.schedule, found.target, found.spacing = schedule_of(
            config("scheduler", "scheduler_config.json"), found.notes
        )

        state, file = _piece(folder / "unet", "diffusion_pytorch_model", reader)
        heads = of["unet"].get("num_attention_heads") or of["unet"].get(
            "attention_head_dim", 8
        )  # by the second name, too, their number is meant
        levels = len(of["unet"].get("block_out_channels", (320, 640, 1280, 1280)))
        known = {
            "heads": tuple(heads) if isinstance(heads, list) else (heads,) * levels,
            "groups": of["unet"].get("norm_num_groups", 32),
        }
        found.parts["unet"] = unet(state, str(file), names.UNET_DIFFUSERS, **known)

        state, file = _piece(folder / "vae", "diffusion_pytorch_model", reader)
        known = {
            "groups": of["vae"].get("norm_num_groups", 32),
            "latent_scale": float(of["vae"].get("scaling_factor", 0.18215)),
        }
        found.parts["vae"] = vae(
            names.to_ours(state, names.VAE_OLD_ATTENTION), str(file), names.VAE_DIFFUSERS, **known
        )

        found.parts["text"] = transformers_tower(
            folder / "text_encoder", folder / "tokenizer", reader
        )
        found.size = int(of["unet"].get("sample_size", 64)) * 2 ** (
            len(found.parts["vae"].numbers["channels"]) - 1
        )
    except (
        TypeError,
        AttributeError,
        KeyError,
    ) as error:  # a number where a list should be, and the like
        raise UserError(
            f"{folder}: a configuration is damaged ({type(error).__name__}: {error}); {files.AGAIN}."
        ) from error
    return found


def transformers_tower(folder: Path, tokenizer: Path, reader: Read) -> Part:
    """CLIPTextModel as transformers saves it; a whole CLIPModel's picture tower is left aside."""
    config = files.read_json(files.inside(folder.parent, folder / "config.json"))
    config = config.get("text_config") or config
    state, file = _piece(folder, "model", reader)
    state = {
        name: value
        for name, value in state.items()
        if not name.startswith(("vision_model.", "visual_projection."))
    }
    known = {
        "heads": config.get("num_attention_heads", 12),
        "activation": config.get("hidden_act", "quick_gelu"),
    }
    if known["activation"] not in ("quick_gelu", "gelu"):
        raise UserError(
            f'{folder / "config.json"}: hidden_act "{known["activation"]}"; CLIP\'s towers have quick_gelu or gelu.'
        )
    if (tokenizer / "tokenizer_config.json").is_file():
        known["pad"] = _padding(tokenizer / "tokenizer_config.json")
    return text(state, str(file), names.CLIP_TRANSFORMERS, **known)


def _padding(file: Path) -> int:
    """The token that fills prompts up: SD 1.x repeats the end, SD 2.x writes "!", which is token 0."""
    token = files.read_json(files.inside(file.parents[1], file)).get("pad_token")
    token = token.get("content") if isinstance(token, dict) else token
    known = {"<|endoftext|>": 49407, "!": 0}
    if token not in known:
        raise UserError(f"{file}: pad_token is {token!r}; one of {', '.join(known)} is expected.")
    return known[token]


def schedule_of(config: dict, notes: list[str]) -> tuple[dict, str, str]:
    """The noise levels, the target and the spacing of times that a scheduler_config.json names."""
    prediction, betas = (
        config.get("prediction_type", "epsilon"),
        config.get("beta_schedule", "linear"),
    )
    if prediction not in PREDICTIONS or betas not in ("linear", "scaled_linear"):
        raise UserError(
            f'scheduler_config.json: prediction_type "{prediction}" with beta_schedule "{betas}" is not known here.'
        )
    numbers = {
        "betas": betas,
        "T": int(config.get("num_train_timesteps", 1000)),
        "beta_1": float(config.get("beta_start", 1e-4)),
        "beta_T": float(config.get("beta_end", 0.02)),
        "zero_terminal_snr": bool(config.get("rescale_betas_zero_snr", False)),
        "final": 0 if config.get("set_alpha_to_one", True) else 1,
    }
    spacing = config.get("timestep_spacing", "leading")
    if spacing == "leading" and config.get("steps_offset", 0) != 1:
        notes.append(
            f"steps_offset is {config.get('steps_offset', 0)} there and 1 here, as Stable Diffusion's is"
        )
    return numbers, PREDICTIONS[prediction], spacing


# A single file.


def _under(state: State, *prefixes: str) -> State:
    """What stands behind the first of the prefixes that occurs."""
    for prefix in prefixes:
        if found := {
            name.removeprefix(prefix): value
            for name, value in state.items()
            if name.startswith(prefix)
        }:
            return found
    return {}


def _unet_table(state: State) -> names.Table:
    """The table for this U-Net: how many levels and blocks it has, and which levels have transformers, is told by its numbering."""
    if any(name.startswith("down_blocks.") for name in state):
        return names.UNET_DIFFUSERS
    numbered = [name.split(".") for name in state if name.startswith("input_blocks.")]
    total = 1 + max((int(name[1]) for name in numbered if name[1].isdecimal()), default=0)
    levels = 1 + sum(name.endswith(".0.op.weight") for name in state)
    blocks = total // levels - 1
    return names.unet_compvis(
        [
            f"input_blocks.{1 + level * (blocks + 1)}.1.norm.weight" in state
            for level in range(levels)
        ],
        blocks,
    )


def _single_file(file: Path, reader: Read) -> Checkpoint:
    """Where averaged weights stand beside live ones, the average is taken. A file may hold fewer than three networks, or a bare one."""
    state, found = reader(file), Checkpoint("CompVis")
    others = [name for name in state if not name.startswith((*UNET, VAE, TEXT_1, TEXT_2))]
    bare = len(others) == len(state)
    found.unknown = (
        [] if bare else sorted(names.to_ours(dict.fromkeys(others), names.COMPVIS_DROPPED))
    )

    def network(prefixes: tuple[str, ...], starts: tuple[str, ...]) -> State:
        part = (
            state
            if bare and any(name.startswith(starts) for name in state)
            else _under(state, *prefixes)
        )
        return names.to_ours(part, names.COMPVIS_DROPPED)

    if live := network(UNET, ("input_blocks.", "down_blocks.")):
        averages = {
            name: state.get(AVERAGE + name.replace(".", "")) for name in live
        }  # their names lost their dots
        if not bare and all(value is not None for value in averages.values()):
            found.notes.append(
                "live and averaged (EMA) weights of the U-Net are in it; the averaged are taken"
            )
            live = averages
        found.parts["unet"] = unet(live, str(file), _unet_table(live))
        found.schedule = dict(STABLE_DIFFUSION)
        if not found.parts["unet"].numbers[
            "linear_projection"
        ]:  # SD 2.x has; it predicts v at 768 pixels and eps at 512: no tensor says which
            found.target, found.size = "eps", 512
        _said(files.metadata(file), found)
    if autoencoder := network((VAE,), ("encoder.down", "decoder.up")):
        levels = len(
            {name.split(".")[2] for name in autoencoder if name.startswith("encoder.down.")}
        )
        old = names.to_ours(autoencoder, names.VAE_OLD_ATTENTION)
        found.parts["vae"] = (
            vae(autoencoder, str(file), names.vae_compvis(levels))
            if levels
            else vae(old, str(file), names.VAE_DIFFUSERS)
        )
    if tower := network((TEXT_2,), ("transformer.resblocks.",)):
        words = {name: value for name, value in tower.items() if not name.startswith("visual.")}
        second = (
            not bare or tower["token_embedding.weight"].shape[-1] == 1024
        )  # else a file of another tower than SD 2.x's
        known = {"penultimate": True, "activation": "gelu", "pad": 0} if second else {}
        found.parts["text"] = text(words, str(file), names.CLIP_OPEN, **known)
    elif tower := network((TEXT_1,), ("text_model.", "encoder.layers.")):
        words = {
            name: value
            for name, value in tower.items()
            if not name.startswith(("vision_model.", "visual_projection."))
        }
        found.parts["text"] = text(words, str(file), names.CLIP_TRANSFORMERS)
    if not found.parts:
        raise UserError(
            f'{file} holds no part of Stable Diffusion; its first tensor is "{min(state, default="none")}".'
        )
    return found


def _said(metadata: dict[str, str], found: Checkpoint) -> None:
    """Stability's ModelSpec, where a file carries it."""
    target = {"epsilon": "eps", "v": "v", "v_prediction": "v"}.get(
        metadata.get("modelspec.prediction_type", "")
    )
    size = re.fullmatch(r"(\d{2,4})x\d{2,4}", str(metadata.get("modelspec.resolution")))
    found.target, found.size = target or found.target, int(size[1]) if size else found.size
