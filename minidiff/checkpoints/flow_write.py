"""Stable Diffusion 3, 3.5 and FLUX.1 in the layouts that diffusers and the single-file tools open:
the same tensors, in the same precision."""

import json
import warnings
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from minidiff.checkpoints import flow_models, names, names_flow, write
from minidiff.checkpoints.flow_models import FLUX, PREFIXES, SD3, Family
from minidiff.conditioners import FluxText, SD3Text
from minidiff.errors import UserError
from minidiff.latent_diffusion import LatentDiffusion
from minidiff.methods.lora import merged_state
from minidiff.mmdit import MMDiT, MMDiTConfig
from minidiff.schedules import Flow
from minidiff.t5 import T5
from minidiff.text import CLIPText
from minidiff.training import atomic
from minidiff.vae import VAE

State = dict[str, Tensor]
T5_TOKENIZER = dict(tokenizer_class="T5Tokenizer", model_max_length=512, extra_ids=0)
T5_TOKENIZER |= dict(eos_token="</s>", pad_token="<pad>", unk_token="<unk>")


def family(model: LatentDiffusion) -> Family:
    """That of a model which the published layouts can hold."""
    parts = (model.unet, model.vae, model.text)
    for kind, each in ((SD3Text, SD3), (FluxText, FLUX)):
        fits = tuple(type(part) for part in parts) == (MMDiT, VAE, kind)
        if fits and isinstance(model.schedule, Flow):
            return each
    kinds = ", ".join(type(part).__name__ for part in parts)
    raise UserError(f"{kinds} together are no published model; save it as a folder of minidiff.")


def transformer_config(config: MMDiTConfig, sample_size: int) -> dict:
    """config.json of SD3Transformer2DModel or FluxTransformer2DModel."""
    own = dict(num_layers=config.joint, num_attention_heads=config.heads)
    own |= dict(attention_head_dim=config.width // config.heads)
    own |= dict(joint_attention_dim=config.context_dim, pooled_projection_dim=config.pooled_dim)
    if config.axes:  # their patches are made before the network
        own |= dict(_class_name=FLUX.transformer, num_single_layers=config.single, patch_size=1)
        own |= dict(in_channels=config.in_channels * config.patch**2)
        return own | dict(guidance_embeds=config.guidance, axes_dims_rope=list(config.axes))
    own |= dict(_class_name=SD3.transformer, caption_projection_dim=config.width)
    own |= dict(in_channels=config.in_channels, out_channels=config.out_channels)
    own |= dict(patch_size=config.patch, pos_embed_max_size=config.table, sample_size=sample_size)
    own |= dict(dual_attention_layers=list(range(config.dual)))
    return own | dict(qk_norm="rms_norm" if config.qk_norm else None)


def scheduler_config(schedule: Flow) -> dict:
    """scheduler_config.json of FlowMatchEulerDiscreteScheduler."""
    own = dict(_class_name="FlowMatchEulerDiscreteScheduler", num_train_timesteps=1000)
    if schedule.mu is None:
        return own | dict(shift=schedule.shift, use_dynamic_shifting=False)
    first, last = schedule.mu
    own |= dict(shift=3.0, use_dynamic_shifting=True, base_shift=first, max_shift=last)
    return own | dict(base_image_seq_len=256, max_image_seq_len=4096)


def t5_config(t5: T5) -> dict:
    """config.json of T5EncoderModel."""
    config = t5.config
    own = dict(architectures=["T5EncoderModel"], model_type="t5", feed_forward_proj="gated-gelu")
    own |= dict(d_model=config.width, d_kv=config.head_dim, d_ff=config.hidden)
    own |= dict(num_layers=config.layers, num_heads=config.heads, vocab_size=config.vocabulary)
    own |= dict(relative_attention_num_buckets=config.buckets, is_encoder_decoder=False)
    own |= dict(relative_attention_max_distance=config.farthest, tie_word_embeddings=False)
    return own | dict(pad_token_id=0, eos_token_id=1, layer_norm_epsilon=1e-6)


def clip_state(clip: CLIPText, projected: bool) -> State:
    """As CLIPTextModel, or CLIPTextModelWithProjection, which has one in any case."""
    state = write._transformers_text(clip)
    if projected and clip.projection is None:
        like = clip.norm_out.weight
        state["text_projection.weight"] = torch.eye(clip.dim, dtype=like.dtype, device=like.device)
    return state


def save_diffusers(model: LatentDiffusion, folder: str | Path) -> Path:
    """A folder that StableDiffusion3Pipeline or FluxPipeline opens. Written beside its place, then
    renamed; it must not exist."""
    of, text = family(model), model.text
    layout = names_flow.SD3_DIFFUSERS if of is SD3 else names_flow.FLUX_DIFFUSERS
    kind = "CLIPTextModelWithProjection" if of is SD3 else "CLIPTextModel"
    vae = names.to_published(write._vae_state(model), names.VAE_DIFFUSERS)
    states = {"vae/diffusion_pytorch_model": vae}
    transformer = names_flow.write(merged_state(model.unet), layout)
    states["transformer/diffusion_pytorch_model"] = transformer
    index: dict = dict(_class_name=of.pipeline, _diffusers_version="0.30.0")
    index |= dict.fromkeys(("feature_extractor", "image_encoder"), (None, None))
    index |= dict(transformer=("diffusers", of.transformer), vae=("diffusers", "AutoencoderKL"))
    index["scheduler"] = ("diffusers", "FlowMatchEulerDiscreteScheduler")
    config = transformer_config(model.unet.config, model.size // model.vae.factor)
    configs = {
        "vae/config": write.vae_config(model),
        "transformer/config": config,
        "scheduler/scheduler_config": scheduler_config(model.schedule),
    }
    texts = {}
    for name, number in of.encoders.items():
        encoder, place, words = getattr(text, name), f"text_encoder{number}", f"tokenizer{number}"
        index |= {place: (None, None), words: (None, None)}
        if name == "t5" and encoder is not None:
            index |= {place: ("transformers", "T5EncoderModel")}
            index |= {words: ("transformers", "T5TokenizerFast")}
            states[f"{place}/model"] = names.to_published(merged_state(encoder), names.T5)
            configs |= {f"{place}/config": t5_config(encoder)}
            configs |= {f"{words}/tokenizer_config": T5_TOKENIZER}
            texts[f"{words}/tokenizer.json"] = encoder.vocabulary
        elif encoder is not None:
            index |= {place: ("transformers", kind), words: ("transformers", "CLIPTokenizer")}
            states[f"{place}/model"] = clip_state(encoder, projected=of is SD3)
            own = dict(
                architectures=[kind], projection_dim=encoder.config.projection or encoder.dim
            )
            configs[f"{place}/config"] = write.text_config(encoder) | own
            for file, content in write.tokenizer_files(encoder.pad, encoder.context_length).items():
                texts[f"{words}/{file}"] = content
    configs["model_index"] = index
    texts |= {f"{name}.json": json.dumps(c, indent=2) + "\n" for name, c in configs.items()}
    atomic.check_new(folder)
    with atomic.write(folder) as new:
        for name, content in texts.items():
            (new / name).parent.mkdir(parents=True, exist_ok=True)
            (new / name).write_text(content, encoding="utf-8")
        for name, state in states.items():
            write._save(state, new / f"{name}.safetensors")
    return Path(folder)


def check_names(model: LatentDiffusion, whole: State, of: Family) -> None:
    """That a reader of the names and shapes alone would build the same networks."""
    vocabulary = model.text.t5.vocabulary if model.text.t5 else ""
    for name, part in flow_models.of_names(whole, "it", of, vocabulary).parts.items():
        network, strange = getattr(model, name), []
        implied, own = asdict(type(network.config)(**part.config)), asdict(network.config)
        own |= dict(latent_scale=round(model.vae.latent_scale.item(), 5)) if name == "vae" else {}
        implied |= dict(latent_scale=part.latent_scale) if name == "vae" else {}
        strange += [key for key in own if own[key] != implied[key] and key != "kl_weight"]
        if strange:
            kind = type(network).__name__
            what = f"{strange[0]}={own[strange[0]]!r:.60} of the {kind}"
            raise UserError(f"a single file cannot say {what}; write it for diffusers.")


def save_single_file(model: LatentDiffusion, file: str | Path) -> Path:
    """One file in Stability's or Black Forest Labs' names; of FLUX.1 the transformer alone. Written
    beside its place, then renamed; it must not exist."""
    of, file = family(model), Path(file)
    transformer = merged_state(model.unet)
    if of is FLUX:
        whole = names_flow.write(transformer, names_flow.FLUX)
        what = "the transformer alone, as the tools expect; VAE and text encoders are not in it"
        warnings.warn(f"{file.name}: {what}", stacklevel=3)
    else:
        vae = write._compvis_vae(model)
        groups = {"unet": names_flow.write(transformer, names_flow.SD3), "vae": vae}
        groups["clip_l"] = clip_state(model.text.clip_l, model.text.clip_l.projection is not None)
        groups["clip_g"] = clip_state(model.text.clip_g, projected=True)
        if model.text.t5 is not None:
            groups["t5"] = names.to_published(merged_state(model.text.t5), names.T5)
            what = "T5's vocabulary is not in it; keep tokenizer_3/tokenizer.json beside it"
            warnings.warn(f"{file.name}: {what}", stacklevel=3)
        whole = {PREFIXES[n][0] + key: v for n, group in groups.items() for key, v in group.items()}
    check_names(model, whole, of)
    atomic.check_new(file)
    with atomic.write(file) as new:
        write._save(whole, new, {"modelspec.resolution": f"{model.size}x{model.size}"})
    return file
