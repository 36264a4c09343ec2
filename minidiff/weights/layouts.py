"""Checkpoints of Stable Diffusion 1.x and 2.x as a LatentDiffusion: diffusers folders, and CompVis's single files.

Tensors are read into memory once and handed to networks built without any. Files are data: safetensors first, and pickles only
as far as `weights_only` lets them.
"""
import json
import pickle
import warnings
from pathlib import Path
from zipfile import is_zipfile

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from minidiff import schedules
from minidiff.clip import END, CLIPText
from minidiff.denoiser import Denoiser
from minidiff.errors import UserError
from minidiff.latent_diffusion import LatentDiffusion
from minidiff.unet import UNet
from minidiff.vae import VAE
from minidiff.weights import names, sizes

State = dict[str, Tensor]
FILES = (".safetensors", ".ckpt", ".bin", ".pt", ".pth")
PREDICTIONS = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}
UNET, FIRST_STAGE, TEXT_1, TEXT_2 = "model.diffusion_model.", "first_stage_model.", "cond_stage_model.transformer.", "cond_stage_model.model."
PARTS = {"U-Net": (UNET,), "VAE": (FIRST_STAGE,), "text tower": (TEXT_1, TEXT_2)}
NOT_IN_TEXT = ("position_ids", "text_projection", "logit_scale", "attn_mask")  # buffers, and what only the contrastive loss needs


def tensors(file: Path) -> State:
    """All tensors of a file, by the names it gives them."""
    if not file.is_file():
        raise UserError(f'no file "{file}".')
    if file.suffix not in FILES:
        raise UserError(f"{file} is no checkpoint by its name; one ends in {', '.join(FILES)}.")
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=is_zipfile(file))
    except pickle.UnpicklingError as error:
        raise UserError(f"{file} is no plain file of tensors: damaged, or with code that would run; ask for a .safetensors of it.") from error
    except (SafetensorError, OSError, RuntimeError, EOFError, ValueError) as error:
        raise UserError(f"{file} is damaged ({str(error).splitlines()[0]}); fetch it again.") from error
    state = state.get("state_dict", state) if isinstance(state, dict) else None
    if not isinstance(state, dict):
        raise UserError(f"{file} holds no dictionary of tensors.")
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}


def shapes_of(state: State) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in state.items()}


def filled(network: type[nn.Module], numbers: dict, state: State, what: str) -> nn.Module:
    """A network of these numbers that holds these very tensors; any that is missing, left over or of another shape is named."""
    with torch.device("meta"):
        module = network(**numbers)
    expected = module.state_dict()
    missing, extra = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
    if missing or extra:
        kind, found = ("missing", missing) if missing else ("left over", extra)
        raise UserError(f'{what}: {len(missing)} tensors are missing and {len(extra)} left over; the first {kind} is "{found[0]}".')
    for name, value in state.items():
        if value.shape != expected[name].shape:
            raise UserError(f'{what}: "{name}" is {tuple(value.shape)}, where {tuple(expected[name].shape)} would fit the other tensors.')
    module.load_state_dict(state, assign=True)
    return module.requires_grad_(False).eval()


def unet(state: State, what: str, table: names.Table, **known) -> UNet:
    """`known`: numbers that a configuration tells, which tensors do not."""
    state = names.to_ours(state, table)
    return filled(UNet, {**sizes.unet_numbers(shapes_of(state)), **known}, state, what)


def vae(state: State, what: str, table: names.Table, **known) -> VAE:
    """CompVis's attention, and diffusers' of old, are convolutions of size 1: the same numbers with two axes more."""
    state = names.to_ours(state, table)
    state = {name: value.flatten(1) if ".attention." in name and value.ndim == 4 else value for name, value in state.items()}
    numbers = {**sizes.vae_numbers(shapes_of(state)), **known}
    scale = torch.tensor(numbers["latent_scale"])
    return filled(VAE, numbers, {**state, "latent_scale": scale}, what)


def text(state: State, what: str, table: names.Table, **known) -> CLIPText:
    state = {name.removeprefix("text_model."): v for name, v in state.items() if name.rsplit(".", 1)[-1] not in NOT_IN_TEXT}
    state = names.to_ours(state, table)
    for name in [name for name in state if ".qkv." in name]:
        for piece, part in zip("qkv", state.pop(name).chunk(3), strict=True):
            state[name.replace(".qkv.", f".{piece}.")] = part
    numbers = {**sizes.text_numbers(shapes_of(state)), **known}
    if table is names.CLIP_OPEN:  # SD 2.x reads the layer before the last, so the last block is never run
        numbers["layers"] -= 1
        state = {name: value for name, value in state.items() if not name.startswith(f"blocks.{numbers['layers']}.")}
    return filled(CLIPText, numbers, state, what)


def composed(vae: VAE, text: CLIPText, unet: UNet, schedule: schedules.NoiseSchedule, target: str, size: int) -> LatentDiffusion:
    """Stable Diffusion of these parts; size is the side of its training pictures in pixels. Computed in float32."""
    return LatentDiffusion(vae, text, Denoiser(unet, schedule, target), size, guidance=7.5).float().eval()


def _json(file: Path) -> dict:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{file} is missing; a diffusers folder has one.") from None
    except ValueError as error:
        raise UserError(f"{file} is not JSON ({error}).") from error
    if not isinstance(found, dict):
        raise UserError(f"{file} should hold an object.")
    return found


def _part(folder: Path, stem: str) -> tuple[State, Path]:
    """The tensors of one part of a diffusers folder: one file or the pieces an index lists; safetensors first, full precision first."""
    for variant in ("", ".fp16"):
        for suffix in (".safetensors", ".bin"):
            base = stem if suffix == ".safetensors" or "diffusion" in stem else "pytorch_model"
            file, index = folder / f"{base}{variant}{suffix}", folder / f"{base}{suffix}.index{variant}.json"
            if file.is_file():
                return tensors(file), file
            if index.is_file():
                pieces = sorted({str(piece) for piece in _json(index).get("weight_map", {}).values()})
                if not pieces or any(Path(piece).name != piece for piece in pieces):
                    raise UserError(f"{index} should list files of its own folder.")
                return {name: value for piece in pieces for name, value in tensors(folder / piece).items()}, index
    raise UserError(f"{folder} has no weights: no {stem}.safetensors, nor any other spelling of it.")


def schedule_of(config: dict, where: Path) -> tuple[schedules.NoiseSchedule, str]:
    """The noise levels and the target that a scheduler_config.json names."""
    prediction, betas = config.get("prediction_type", "epsilon"), config.get("beta_schedule", "linear")
    if prediction not in PREDICTIONS or betas not in ("linear", "scaled_linear"):
        raise UserError(f'{where}: prediction_type "{prediction}" with beta_schedule "{betas}" is not known here.')
    numbers = config.get("num_train_timesteps", 1000), config.get("beta_start", 1e-4), config.get("beta_end", 0.02)
    return schedules.Discrete(betas, *numbers, bool(config.get("rescale_betas_zero_snr", False))), PREDICTIONS[prediction]


def _padding(tokenizer: Path) -> dict:
    """The token that fills prompts up: SD 1.x repeats the end, SD 2.x writes "!", which is token 0."""
    token = _json(tokenizer / "tokenizer_config.json").get("pad_token")
    token = token.get("content") if isinstance(token, dict) else token
    known = {"<|endoftext|>": END, "!": 0}
    if token not in known:
        raise UserError(f'{tokenizer / "tokenizer_config.json"}: pad_token is {token!r}; one of {", ".join(known)} is expected.')
    return {"pad": known[token]}


def from_diffusers(folder: Path) -> LatentDiffusion:
    """A folder with model_index.json. Its configurations tell what tensors do not: heads, groups, activation, padding, scale, target."""
    configs = {part: _json(folder / part / "config.json") for part in ("unet", "vae", "text_encoder")}
    where = folder / "scheduler" / "scheduler_config.json"
    schedule, target = schedule_of(_json(where), where)

    state, file = _part(folder / "unet", "diffusion_pytorch_model")
    config = configs["unet"]
    heads = config.get("num_attention_heads") or config.get("attention_head_dim", 8)  # by the second name, too, diffusers means their number
    levels = len(config.get("block_out_channels", (320, 640, 1280, 1280)))
    known = {"heads": tuple(heads) if isinstance(heads, list) else (heads,) * levels, "groups": config.get("norm_num_groups", 32)}
    network = unet(state, str(file), names.UNET_DIFFUSERS, **known)

    state, file = _part(folder / "vae", "diffusion_pytorch_model")
    config = configs["vae"]
    known = {"groups": config.get("norm_num_groups", 32), "latent_scale": config.get("scaling_factor", 0.18215)}
    autoencoder = vae(names.to_ours(state, names.VAE_OLD_ATTENTION), str(file), names.VAE_DIFFUSERS, **known)

    state, file = _part(folder / "text_encoder", "model")
    config = configs["text_encoder"]
    known = {"heads": config.get("num_attention_heads", 12), "activation": config.get("hidden_act", "quick_gelu"), **_padding(folder / "tokenizer")}
    tower = text(state, str(file), names.CLIP_TRANSFORMERS, **known)
    return composed(autoencoder, tower, network, schedule, target, configs["unet"].get("sample_size", 64) * autoencoder.factor)


def _under(state: State, prefix: str) -> State:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def _compvis_table(state: State) -> names.Table:
    """The table for this U-Net: how many levels and blocks it has, and which levels have transformers, is told by its numbering."""
    total = 1 + max((int(name.split(".")[1]) for name in state if name.startswith("input_blocks.")), default=0)
    levels = 1 + sum(name.endswith(".0.op.weight") for name in state)
    blocks = total // levels - 1
    return names.unet_compvis([f"input_blocks.{1 + level * (blocks + 1)}.1.norm.weight" in state for level in range(levels)], blocks)


def from_single_file(file: Path, target: str | None = None) -> LatentDiffusion:
    """CompVis's layout. Where averaged weights stand beside live ones, the average is taken."""
    state = tensors(file)
    absent = [what for what, prefixes in PARTS.items() if not any(name.startswith(prefixes) for name in state)]
    if absent:
        raise UserError(f"{file} has no {' and no '.join(absent)}; a whole model is needed here.")
    live = _under(state, UNET)
    averages = {name: state.get("model_ema.diffusion_model" + name.replace(".", "")) for name in live}  # its names lost their dots
    if all(value is not None for value in averages.values()):
        warnings.warn(f"{file.name} holds live and averaged weights of the U-Net; the averaged are taken", stacklevel=2)
        live = averages
    network = unet(live, str(file), _compvis_table(live))
    autoencoder = vae(_under(state, FIRST_STAGE), str(file), names.vae_compvis())
    second = any(name.startswith(TEXT_2) for name in state)
    tower = text(_under(state, TEXT_2), str(file), names.CLIP_OPEN) if second else text(_under(state, TEXT_1), str(file), names.CLIP_TRANSFORMERS)
    if second and target is None:
        warnings.warn(f'{file.name}: nothing in it says whether it predicts v (768 pixels) or eps (base, 512); v is assumed', stacklevel=2)
    target = target or ("v" if second else "eps")
    return composed(autoencoder, tower, network, schedules.scaled_linear(), target, 768 if second and target == "v" else 512)
