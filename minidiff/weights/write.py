"""A LatentDiffusion in the layouts that diffusers and the single-file tools open: the same tensors, in the same precision.

What only minidiff has (pooled text, GroupNorm left out, ...) those layouts cannot say, and is refused by name.
"""
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from minidiff import atomic
from minidiff.clip import END, CLIPText, tokenizer
from minidiff.errors import UserError
from minidiff.latent_diffusion import LatentDiffusion
from minidiff.lora import merged_state
from minidiff.schedules import Discrete
from minidiff.unet import UNet
from minidiff.vae import VAE
from minidiff.weights import names

State = dict[str, Tensor]
PREDICTIONS = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}
PADDING = {END: "<|endoftext|>", 0: "!"}


def check(model: LatentDiffusion) -> None:
    """That the model is a Stable Diffusion: everything in it has a place in the published layouts."""
    unet, vae, text, schedule = model.unet, model.vae, model.text, model.schedule
    kinds = isinstance(unet, UNet) and isinstance(vae, VAE) and isinstance(text, CLIPText)
    strange = [] if kinds else [f"{type(part).__name__}" for part in (unet, vae, text) if not isinstance(part, UNet | VAE | CLIPText)]
    if kinds:
        expected = {"pooled": False, "scale_shift": False, "ff_mult": 4}
        strange += [f"{name}={unet.numbers[name]} in the U-Net" for name, value in expected.items() if unet.numbers[name] != value]
        strange += ["words_only in the text tower"] if text.numbers["words_only"] else []
        strange += [f"padding with token {text.pad}"] if text.pad not in PADDING else []
        strange += [f"a vocabulary of {text.numbers['vocabulary']}"] if text.numbers["vocabulary"] != END + 1 else []
        strange += [f"{name} without GroupNorm" for name, part in (("a U-Net", unet), ("a VAE", vae)) if not part.numbers["groups"]]
    if not isinstance(schedule, Discrete) or schedule.betas not in ("linear", "scaled_linear"):
        strange.append(f"the schedule {getattr(schedule, 'betas', type(schedule).__name__)}")
    if model.denoiser.target not in PREDICTIONS:
        strange.append(f"the target {model.denoiser.target}")
    if strange:
        raise UserError(f"this model cannot be written for other tools; what they have no word for: {', '.join(strange)}. Use --to minidiff.")


# diffusers


def unet_config(model: LatentDiffusion) -> dict:
    """config.json of UNet2DConditionModel."""
    n = model.unet.numbers
    cross = ["CrossAttn" if depth else "" for depth in n["depth"]]
    heads = list(n["heads"])
    config = {
        "_class_name": "UNet2DConditionModel",
        "sample_size": model.size // model.vae.factor,
        "in_channels": n["in_channels"],
        "out_channels": n["out_channels"],
        "block_out_channels": list(n["channels"]),
        "layers_per_block": n["blocks"],
        "down_block_types": [f"{kind}DownBlock2D" for kind in cross],
        "mid_block_type": "UNetMidBlock2DCrossAttn" if n["middle"] else None,
        "up_block_types": [f"{kind}UpBlock2D" for kind in reversed(cross)],
        "cross_attention_dim": n["context_dim"],
        "attention_head_dim": heads[0] if len(set(heads)) == 1 else heads,  # their name for the number of heads
        "norm_num_groups": n["groups"],
        "use_linear_projection": n["linear_projection"],
        "act_fn": "silu",
        "flip_sin_to_cos": True,
        "freq_shift": 0,
    }
    if any(depth > 1 for depth in n["depth"]):
        config["transformer_layers_per_block"] = [max(depth, 1) for depth in n["depth"]]
    return config


def vae_config(model: LatentDiffusion) -> dict:
    """config.json of AutoencoderKL."""
    n, levels = model.vae.numbers, len(model.vae.numbers["channels"])
    return {
        "_class_name": "AutoencoderKL",
        "in_channels": n["in_channels"],
        "out_channels": n["in_channels"],
        "latent_channels": n["latent_channels"],
        "block_out_channels": list(n["channels"]),
        "layers_per_block": n["blocks"],
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "norm_num_groups": n["groups"],
        "sample_size": model.size,
        "scaling_factor": float(f"{model.vae.latent_scale.item():.7g}"),  # the digits that a float32 has
        "act_fn": "silu",
    }


def text_config(model: LatentDiffusion) -> dict:
    """config.json of CLIPTextModel."""
    n = model.text.numbers
    return {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        "hidden_size": n["width"],
        "intermediate_size": 4 * n["width"],
        "num_hidden_layers": n["layers"],
        "num_attention_heads": n["heads"],
        "hidden_act": n["activation"],
        "max_position_embeddings": n["context_length"],
        "vocab_size": n["vocabulary"],
        "layer_norm_eps": 1e-05,
        "bos_token_id": END - 1,
        "eos_token_id": END,
        "pad_token_id": 1,
        "projection_dim": n["width"],
    }


def scheduler_config(model: LatentDiffusion) -> dict:
    """scheduler_config.json of DDIMScheduler."""
    schedule = model.schedule
    return {
        "_class_name": "DDIMScheduler",
        "num_train_timesteps": schedule.T,
        "beta_schedule": schedule.betas,
        "beta_start": schedule.beta_1,
        "beta_end": schedule.beta_T,
        "prediction_type": PREDICTIONS[model.denoiser.target],
        "timestep_spacing": model.spacing,
        "steps_offset": 1,
        "set_alpha_to_one": schedule.final == 0,
        "rescale_betas_zero_snr": schedule.zero_terminal_snr,
        "clip_sample": False,
    }


def tokenizer_files(pad: int, length: int) -> dict[str, str]:
    """CLIP's byte-pair vocabulary as transformers' CLIPTokenizer reads it, from the one that open_clip carries."""
    ours = tokenizer()
    vocabulary = {word: index for word, index in ours.encoder.items() if index < END - 1}
    vocabulary |= {"<|startoftext|>": END - 1, "<|endoftext|>": END}
    ranked = sorted(ours.bpe_ranks, key=ours.bpe_ranks.get)
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>", "pad_token": PADDING[pad]}
    how = {"tokenizer_class": "CLIPTokenizer", "model_max_length": length, "do_lower_case": True, "add_prefix_space": False, "errors": "replace"}
    return {
        "vocab.json": json.dumps(vocabulary, ensure_ascii=False),
        "merges.txt": "\n".join(["#version: 0.2", *(" ".join(pair) for pair in ranked)]) + "\n",
        "special_tokens_map.json": json.dumps(special),
        "tokenizer_config.json": json.dumps(special | how, indent=2),
    }


def save_diffusers(model: LatentDiffusion, folder: str | Path) -> Path:
    """A folder that StableDiffusionPipeline.from_pretrained opens. Written beside its place, then renamed; it must not exist."""
    check(model)
    parts = {"unet": ("diffusers", "UNet2DConditionModel"), "vae": ("diffusers", "AutoencoderKL"), "text_encoder": ("transformers", "CLIPTextModel")}
    whole = parts | {"tokenizer": ("transformers", "CLIPTokenizer"), "scheduler": ("diffusers", "DDIMScheduler")}
    kind = "StableDiffusionInpaintPipeline" if model.unet.numbers["in_channels"] == 9 else "StableDiffusionPipeline"
    absent = {part: (None, None) for part in ("safety_checker", "feature_extractor", "image_encoder")}
    index = {"_class_name": kind, "_diffusers_version": "0.30.0", "requires_safety_checker": False, **whole, **absent}
    atomic.check_new(folder)
    with atomic.write(folder) as new:
        for part in whole:
            (new / part).mkdir(parents=True)
        for part, config in (("unet", unet_config(model)), ("vae", vae_config(model)), ("text_encoder", text_config(model))):
            _write_json(new / part / "config.json", config)
        _write_json(new / "scheduler" / "scheduler_config.json", scheduler_config(model))
        for name, content in tokenizer_files(model.text.pad, model.text.context_length).items():
            (new / "tokenizer" / name).write_text(content, encoding="utf-8")
        _save(names.to_published(merged_state(model.unet), names.UNET_DIFFUSERS), new / "unet" / "diffusion_pytorch_model.safetensors")
        _save(names.to_published(_vae_state(model), names.VAE_DIFFUSERS), new / "vae" / "diffusion_pytorch_model.safetensors")
        _save(_transformers_text(model), new / "text_encoder" / "model.safetensors")
        _write_json(new / "model_index.json", index)
    return Path(folder)


def _vae_state(model: LatentDiffusion) -> State:
    return {name: value for name, value in merged_state(model.vae).items() if name != "latent_scale"}


def _transformers_text(model: LatentDiffusion) -> State:
    state = names.to_published(merged_state(model.text), names.CLIP_TRANSFORMERS)
    state["embeddings.position_ids"] = torch.arange(model.text.context_length)[None]  # published files list them
    return {f"text_model.{name}": value for name, value in state.items()}


# CompVis


def save_compvis(model: LatentDiffusion, file: str | Path) -> Path:
    """One file with CompVis's names, as the single-file tools open it. Written beside its place, then renamed; it must not exist."""
    check(model)
    file = Path(file)
    if file.suffix != ".safetensors":
        raise UserError(f"{file} should end in .safetensors; pickles are not written.")
    n = model.unet.numbers
    unet = names.to_published(merged_state(model.unet), names.unet_compvis([d > 0 for d in n["depth"]], n["blocks"]))
    vae = names.to_published(_vae_state(model), names.vae_compvis(len(model.vae.numbers["channels"])))
    vae = {name: value[..., None, None] if ".attn_1." in name and value.ndim == 2 else value for name, value in vae.items()}
    if model.text.numbers["activation"] == "gelu":  # SD 2.x
        text = {f"cond_stage_model.model.{name}": value for name, value in _openclip_text(model).items()}
    else:
        text = {f"cond_stage_model.transformer.{name}": value for name, value in _transformers_text(model).items()}
    whole = {f"model.diffusion_model.{name}": value for name, value in unet.items()}
    whole |= {f"first_stage_model.{name}": value for name, value in vae.items()} | text
    said = {"prediction_type": {"eps": "epsilon"}.get(model.denoiser.target, model.denoiser.target), "resolution": f"{model.size}x{model.size}"}
    atomic.check_new(file)
    with atomic.write(file) as new:
        _save(whole, new, {f"modelspec.{name}": value for name, value in said.items()})  # no tensor tells eps from v
    return file


def _openclip_text(model: LatentDiffusion) -> State:
    """q, k and v in one matrix. The last block, which SD 2.x does not run, was dropped when it was read: zeros stand in its place."""
    state, last = merged_state(model.text), model.text.numbers["layers"]
    state |= {name.replace("blocks.0.", f"blocks.{last}."): torch.zeros_like(value) for name, value in state.items() if "blocks.0." in name}
    for block in range(last + 1):
        for kind in ("weight", "bias"):
            place = f"blocks.{block}.attention."
            state[f"{place}qkv.{kind}"] = torch.cat([state.pop(f"{place}{piece}.{kind}") for piece in "qkv"])
    return names.to_published(state, names.CLIP_OPEN)


def _write_json(file: Path, content: dict) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _save(state: State, file: Path, metadata: dict[str, str] | None = None) -> None:
    save_file({name: value.contiguous() for name, value in state.items()}, file, {"format": "pt", **(metadata or {})})
