"""A LatentDiffusion in the layouts that diffusers and the single-file tools open: the same tensors,
in the same precision. What only minidiff has is refused by name.
"""

import json
import warnings
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from minidiff.checkpoints import names, schedulers, sizes
from minidiff.checkpoints.layouts import STABLE_DIFFUSION
from minidiff.condition import SINES
from minidiff.conditioners import CLIPPair
from minidiff.errors import UserError
from minidiff.latent_diffusion import LatentDiffusion
from minidiff.methods.lora import merged_state
from minidiff.mmdit import MMDiT
from minidiff.text import END, CLIPText, tokenizer
from minidiff.training import atomic
from minidiff.unet import UNet
from minidiff.vae import VAE

State = dict[str, Tensor]
PADDING = {END: "<|endoftext|>", 0: "!"}
LIBRARIES = {  # the folders of a diffusers pipeline, and the class that opens each
    "unet": ("diffusers", "UNet2DConditionModel"),
    "vae": ("diffusers", "AutoencoderKL"),
    "text_encoder": ("transformers", "CLIPTextModel"),
    "tokenizer": ("transformers", "CLIPTokenizer"),
    "scheduler": ("diffusers", "DDIMScheduler"),
}
SECOND = {  # of SDXL
    "text_encoder_2": ("transformers", "CLIPTextModelWithProjection"),
    "tokenizer_2": ("transformers", "CLIPTokenizer"),
}
SCALES = {CLIPText: 0.18215, CLIPPair: 0.13025}  # of the latents, by the text encoder
SAMPLING = {CLIPText: ("ddim", None), CLIPPair: ("euler", "leading")}


def encoders(text: CLIPText | CLIPPair) -> dict[str, CLIPText]:
    """Those of CLIP by what follows the names of their folders in diffusers' layout."""
    if isinstance(text, CLIPText):
        return {"": text}
    return ({"": text.clip_l} if text.clip_l else {}) | {"_2": text.clip_g}


def check(model: LatentDiffusion) -> None:
    """That the model is a Stable Diffusion: everything in it has a place in the published
    layouts."""
    strange = _strange_networks(model) + schedulers.strange(model)
    if strange:
        why = f"what they have no word for: {', '.join(strange)}"
        fix = "Save it as a model folder of minidiff."
        raise UserError(f"this model cannot be written for other tools; {why}. {fix}")


def check_single_file(model: LatentDiffusion) -> None:
    """That a reader of the tensors alone would build the same model: a single file says no more."""
    kind = type(model.text)
    assumed = STABLE_DIFFUSION | dict(zero_terminal_snr=False, latent_scale=SCALES[kind])
    if kind is CLIPPair:
        del assumed["zero_terminal_snr"]  # a tensor without meaning tells it
    own = asdict(model.schedule) | dict(latent_scale=round(model.vae.latent_scale.item(), 5))
    strange = _not_implied(model) + [
        f"{name} {own[name]!r:.40} (readers assume {value!r})"
        for name, value in assumed.items()
        if own[name] != value and name != "final"  # of the last step alone
    ]
    if strange:
        what = f"a single file cannot say that this model has {', '.join(strange)}"
        raise UserError(f"{what}. Write it for diffusers, or as a model folder of minidiff.")
    usual, dropped = SAMPLING[kind], []
    if kind is CLIPPair and model.schedule.zero_terminal_snr:
        usual = ("euler", "trailing")
    if (model.sampler, model.spacing) != usual:
        spacing = f" with {model.spacing} spacing" if model.spacing else ""
        dropped.append(f"its own sampler, {model.sampler}{spacing}")
    if kind is CLIPPair and (model.text.config.empty == "zeros") != bool(model.text.clip_l):
        dropped.append(f"that an empty prompt is {model.text.config.empty}")
    if dropped:
        what = f"a single file does not say {' nor '.join(dropped)}"
        warnings.warn(f"{what}; name it when you sample", stacklevel=3)


def _strange_networks(model: LatentDiffusion) -> list[str]:
    unet, vae, text = model.unet, model.vae, model.text
    ours = UNet | VAE | CLIPText | CLIPPair
    others = [part for part in (unet, vae, text) if not isinstance(part, ours)]
    if others:
        return [type(part).__name__ for part in others]
    usual = (("pooled", False), ("scale_shift", False), ("ff_mult", 4))
    values = ((name, getattr(unet.config, name), value) for name, value in usual)
    strange = [f"{name}={value} in the U-Net" for name, value, usual in values if value != usual]
    reasons = {}
    for each in encoders(text).values():
        words = END + 1 + len(added_tokens(each))
        reasons |= {
            "words_only in the text encoder": each.config.words_only,
            f"padding with token {each.pad}": each.pad not in PADDING,
            f"a vocabulary of {each.config.vocabulary}": each.config.vocabulary != words,
        }
    reasons |= {
        "a U-Net without GroupNorm": not unet.config.groups,
        "a VAE without GroupNorm": not vae.config.groups,
    }
    return strange + [reason for reason, applies in reasons.items() if applies]


def _not_implied(model: LatentDiffusion) -> list[str]:
    """What of the networks does not follow from their tensors."""
    strange = []
    for network, count in (
        (model.unet, sizes.unet_config),
        (model.vae, sizes.vae_config),
        *((text, sizes.text_config) for text in encoders(model.text).values()),
    ):
        implied = count({name: tuple(v.shape) for name, v in network.state_dict().items()})
        own = asdict(network.config)
        if own.get("activation") == "gelu":  # SD 2.x's text encoder, which its names tell
            implied |= dict(activation="gelu", pad=0)
        if isinstance(model.text, CLIPPair) and network.Config is CLIPText.Config:
            implied |= dict(penultimate=True)
        for name, value in (asdict(network.Config(**implied))).items():
            if name not in ("dropout", "kl_weight") and own[name] != value:
                kind = type(network).__name__
                strange.append(f"{name}={own[name]} in the {kind} (tensors imply {value})")
    return strange


# diffusers


def unet_config(model: LatentDiffusion) -> dict:
    """config.json of UNet2DConditionModel."""
    config, heads = model.unet.config, list(model.unet.config.heads)
    cross = ["CrossAttn" if depth else "" for depth in config.depth]
    settings = (
        dict(_class_name="UNet2DConditionModel", act_fn="silu", flip_sin_to_cos=True, freq_shift=0)
        | dict(in_channels=config.in_channels, out_channels=config.out_channels)
        | dict(block_out_channels=list(config.channels), layers_per_block=config.blocks)
        | dict(down_block_types=[f"{kind}DownBlock2D" for kind in cross])
        | dict(mid_block_type="UNetMidBlock2DCrossAttn" if config.middle else None)
        | dict(up_block_types=[f"{kind}UpBlock2D" for kind in reversed(cross)])
        | dict(cross_attention_dim=config.context_dim, norm_num_groups=config.groups)
        | dict(use_linear_projection=config.linear_projection)
        | dict(sample_size=model.size // model.vae.factor)
        # Their name for the number of heads.
        | dict(attention_head_dim=heads[0] if len(set(heads)) == 1 else heads)
    )
    if any(depth > 1 for depth in config.depth):
        layers = [max(depth, 1) for depth in config.depth]  # the last is the middle's, too
        layers[-1] = config.middle_depth or layers[-1]
        settings["transformer_layers_per_block"] = layers
    if config.added:
        settings |= dict(addition_embed_type="text_time", addition_time_embed_dim=SINES)
        settings["projection_class_embeddings_input_dim"] = config.added
    return settings


def vae_config(model: LatentDiffusion) -> dict:
    """config.json of AutoencoderKL."""
    config, levels = model.vae.config, len(model.vae.config.channels)
    return (
        dict(_class_name="AutoencoderKL", act_fn="silu", sample_size=model.size)
        | dict(in_channels=config.in_channels, out_channels=config.in_channels)
        | dict(latent_channels=config.latent_channels, norm_num_groups=config.groups)
        | dict(block_out_channels=list(config.channels), layers_per_block=config.blocks)
        | dict(down_block_types=["DownEncoderBlock2D"] * levels)
        | dict(up_block_types=["UpDecoderBlock2D"] * levels)
        | dict(scaling_factor=float(f"{model.vae.latent_scale.item():.7g}"))  # a float32's digits
        | dict(shift_factor=config.latent_shift or None)
        | dict(use_quant_conv=config.quant, use_post_quant_conv=config.quant)
    )


def text_config(text: CLIPText) -> dict:
    """config.json of CLIPTextModel, or of CLIPTextModelWithProjection."""
    config, kind = text.config, "WithProjection" if text.config.projection else ""
    return (
        dict(architectures=[f"CLIPTextModel{kind}"], model_type="clip_text_model")
        | dict(layer_norm_eps=1e-05)
        | dict(hidden_size=config.width, intermediate_size=4 * config.width)
        | dict(num_hidden_layers=config.layers, num_attention_heads=config.heads)
        | dict(hidden_act=config.activation, max_position_embeddings=config.context_length)
        | dict(vocab_size=config.vocabulary, projection_dim=config.projection or config.width)
        | dict(bos_token_id=END - 1, eos_token_id=END, pad_token_id=1)
    )


def added_tokens(text: CLIPText) -> dict[str, int]:
    """Words beyond CLIP's vocabulary; of a word with several tokens word, word_1, ..."""
    return {
        f"{word}_{k}" if k else word: token
        for word, tokens in text.config.added.items()
        for k, token in enumerate(tokens)
    }


def tokenizer_files(pad: int, length: int) -> dict[str, str]:
    """CLIP's byte-pair vocabulary as transformers' CLIPTokenizer reads it, from open_clip's."""
    clip = tokenizer()
    vocabulary = {word: index for word, index in clip.encoder.items() if index < END - 1}
    vocabulary |= {"<|startoftext|>": END - 1, "<|endoftext|>": END}
    merges = [" ".join(pair) for pair in sorted(clip.bpe_ranks, key=clip.bpe_ranks.get)]
    end = "<|endoftext|>"
    special = dict(
        bos_token="<|startoftext|>", eos_token=end, unk_token=end, pad_token=PADDING[pad]
    )
    config = special | dict(tokenizer_class="CLIPTokenizer", model_max_length=length)
    config |= dict(do_lower_case=True, add_prefix_space=False, errors="replace")
    return {
        "vocab.json": json.dumps(vocabulary, ensure_ascii=False),
        "merges.txt": "\n".join(["#version: 0.2", *merges]) + "\n",
        "special_tokens_map.json": json.dumps(special),
        "tokenizer_config.json": json.dumps(config, indent=2),
    }


def model_index(model: LatentDiffusion) -> dict:
    """model_index.json: which class opens which folder."""
    kind = "Inpaint" if model.unet.config.in_channels == 9 else ""
    if isinstance(model.text, CLIPPair):
        return _xl_index(model, kind)
    absent = ("safety_checker", "feature_extractor", "image_encoder")
    own = dict(_class_name=f"StableDiffusion{kind}Pipeline", _diffusers_version="0.30.0")
    own |= dict(requires_safety_checker=False)
    own |= LIBRARIES | dict(scheduler=("diffusers", schedulers.kind_of(model.sampler)))
    return own | dict.fromkeys(absent, (None, None))


def _xl_index(model: LatentDiffusion, kind: str) -> dict:
    """That of SDXL; its refiner starts from an image."""
    is_refiner, first = model.text.clip_l is None, ("text_encoder", "tokenizer")
    kind = "Img2Img" if is_refiner else kind
    own = dict(_class_name=f"StableDiffusionXL{kind}Pipeline", _diffusers_version="0.30.0")
    own |= dict(force_zeros_for_empty_prompt=model.text.config.empty == "zeros")
    own |= dict(requires_aesthetics_score=True) if is_refiner else {}
    own |= LIBRARIES | SECOND | dict(scheduler=("diffusers", schedulers.kind_of(model.sampler)))
    own |= dict.fromkeys(first, (None, None)) if is_refiner else {}
    return own | dict.fromkeys(("feature_extractor", "image_encoder"), (None, None))


def save_diffusers(model: LatentDiffusion, folder: str | Path) -> Path:
    """A folder that StableDiffusionPipeline.from_pretrained opens. Written beside its place, then
    renamed; it must not exist."""
    if isinstance(model.unet, MMDiT):
        from minidiff.checkpoints import flow_write

        return flow_write.save_diffusers(model, folder)
    check(model)
    unet = names.to_published(merged_state(model.unet), names.UNET_DIFFUSERS)
    vae = names.to_published(_vae_state(model), names.VAE_DIFFUSERS)
    configs = {
        "unet/config.json": unet_config(model),
        "vae/config.json": vae_config(model),
        "scheduler/scheduler_config.json": schedulers.written(model),
        "model_index.json": model_index(model),
    }
    texts = {name: json.dumps(content, indent=2) + "\n" for name, content in configs.items()}
    for which, text in encoders(model.text).items():
        own = tokenizer_files(text.pad, text.context_length)
        if added := added_tokens(text):
            own["added_tokens.json"] = json.dumps(added)
        texts |= {f"tokenizer{which}/{name}": content for name, content in own.items()}
        own = json.dumps(text_config(text), indent=2) + "\n"
        texts[f"text_encoder{which}/config.json"] = own
    atomic.check_new(folder)
    with atomic.write(folder) as new:
        for name, content in texts.items():
            (new / name).parent.mkdir(parents=True, exist_ok=True)
            (new / name).write_text(content, encoding="utf-8")
        _save(unet, new / "unet/diffusion_pytorch_model.safetensors")
        _save(vae, new / "vae/diffusion_pytorch_model.safetensors")
        for which, text in encoders(model.text).items():
            _save(_transformers_text(text), new / f"text_encoder{which}/model.safetensors")
    return Path(folder)


def _vae_state(model: LatentDiffusion) -> State:
    state = merged_state(model.vae)
    return {name: value for name, value in state.items() if name != "latent_scale"}


def _transformers_text(text: CLIPText) -> State:
    state = names.to_published(merged_state(text), names.CLIP_TRANSFORMERS)
    # Published files list the positions.
    state["embeddings.position_ids"] = torch.arange(text.context_length)[None]
    projection = "text_projection.weight"  # beside the encoder
    beside = {projection: state.pop(projection)} if projection in state else {}
    return _prefixed("text_model", state) | beside


# CompVis


def save_compvis(model: LatentDiffusion, file: str | Path) -> Path:
    """One file with CompVis's names, as the single-file tools open it. Written beside its place,
    then renamed; it must not exist."""
    if isinstance(model.unet, MMDiT):
        from minidiff.checkpoints import flow_write

        return flow_write.save_single_file(model, file)
    check(model)
    check_single_file(model)
    file = Path(file)
    if file.suffix != ".safetensors":
        raise UserError(f"{file} should end in .safetensors; pickles are not written.")
    config, target = model.unet.config, model.denoiser.target
    unet_table = names.unet_compvis([depth > 0 for depth in config.depth], config.blocks)
    vae, unet = _compvis_vae(model), names.to_published(merged_state(model.unet), unet_table)
    whole = _prefixed("model.diffusion_model", unet) | _prefixed("first_stage_model", vae)
    whole |= _compvis_text(model.text)
    metadata = {  # no tensor tells eps from v
        "modelspec.prediction_type": "epsilon" if target == "eps" else target,
        "modelspec.resolution": f"{model.size}x{model.size}",
    }
    if isinstance(model.text, CLIPPair):  # as other programs tell it
        marks = dict(v_pred=target == "v", ztsnr=model.schedule.zero_terminal_snr)
        whole |= {name: torch.empty(0) for name, applies in marks.items() if applies}
        which = "base" if model.text.clip_l else "refiner"
        metadata["modelspec.architecture"] = f"stable-diffusion-xl-v1-{which}"
    atomic.check_new(file)
    with atomic.write(file) as new:
        _save(whole, new, metadata)
    return file


def _compvis_vae(model: LatentDiffusion) -> State:
    """Its attention is made of 1x1 convolutions."""
    vae = names.to_published(_vae_state(model), names.vae_compvis(len(model.vae.config.channels)))
    for name, value in vae.items():
        if ".attn_1." in name and value.ndim == 2:
            vae[name] = value[..., None, None]
    return vae


def _compvis_text(text: CLIPText | CLIPPair) -> State:
    if isinstance(text, CLIPPair):
        place = "conditioner.embedders"
        second = openclip_text(text.clip_g, text.clip_g.config.layers)
        if text.clip_l is None:
            return _prefixed(f"{place}.0.model", second)
        first = _prefixed(f"{place}.0.transformer", _transformers_text(text.clip_l))
        return first | _prefixed(f"{place}.1.model", second)
    if text.config.activation == "gelu":  # SD 2.x
        return _prefixed("cond_stage_model.model", openclip_text(text, text.config.layers + 1))
    return _prefixed("cond_stage_model.transformer", _transformers_text(text))


def _prefixed(prefix: str, state: State) -> State:
    return {f"{prefix}.{name}": value for name, value in state.items()}


def openclip_text(text: CLIPText, blocks: int) -> State:
    """q, k and v in one matrix, and the projection transposed. SD 2.x does not run the last block,
    which loading drops: zeros stand in its place."""
    state = merged_state(text)
    for name in [name for name in state if name.startswith("blocks.0.")]:
        for block in range(text.config.layers, blocks):
            copy = name.replace("blocks.0.", f"blocks.{block}.")
            state[copy] = torch.zeros_like(state[name])
    if "projection.weight" in state:
        state["projection.weight"] = state["projection.weight"].T
    for block in range(blocks):
        for kind in ("weight", "bias"):
            place = f"blocks.{block}.attention"
            qkv = [state.pop(f"{place}.{piece}.{kind}") for piece in "qkv"]
            state[f"{place}.qkv.{kind}"] = torch.cat(qkv)
    return names.to_published(state, names.CLIP_OPEN)


def _save(state: State, file: Path, metadata: dict[str, str] | None = None) -> None:
    state = {name: value.contiguous() for name, value in state.items()}
    save_file(state, file, {"format": "pt", **(metadata or {})})
