"""Whole checkpoints, tiny and random, saved by diffusers and read here: every part says what diffusers' says of the same input.

The single file is made of the same weights under CompVis's names, which diffusers' own converter must read back as what it was.
"""
import json
import os
import pickle
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

import minidiff
from minidiff.errors import UserError
from minidiff.weights import layouts, names

from .test_networks import gap, randomized

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module", params=["sd1", "sd2"])
def pipeline(request, tmp_path_factory):
    """A Stable Diffusion of the true layout and a few thousand weights; returns its parts and its folder."""
    second = request.param == "sd2"
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(32, 64, 64, 64), layers_per_block=2, cross_attention_dim=64,
        attention_head_dim=(1, 2, 2, 2) if second else 2, use_linear_projection=second,
    )
    vae = diffusers.AutoencoderKL(
        block_out_channels=(32, 32, 64, 64), down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2, latent_channels=4, sample_size=64,
    )
    config = transformers.CLIPTextConfig(
        vocab_size=49408, hidden_size=64, intermediate_size=256, num_hidden_layers=2, num_attention_heads=2, projection_dim=64,
        hidden_act="gelu" if second else "quick_gelu",
    )
    parts = {"unet": unet, "vae": vae, "text_encoder": transformers.CLIPTextModel(config)}
    parts = {name: randomized(part, torch.float32) for name, part in parts.items()}
    folder = tmp_path_factory.mktemp(request.param)
    for name, part in parts.items():
        part.save_pretrained(folder / name)
    diffusers.DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, prediction_type="v_prediction" if second else "epsilon", clip_sample=False
    ).save_pretrained(folder / "scheduler")
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "tokenizer_config.json").write_text(json.dumps({"pad_token": "!" if second else "<|endoftext|>"}))
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    return parts, folder, second


@torch.no_grad()
def agrees(model, parts):
    """U-Net, VAE both ways and text tower, within fp32's rounding."""
    x, t, context = torch.randn(2, 4, 8, 8), torch.tensor([7, 830]), torch.randn(2, 9, 64)
    assert gap(model.unet(x, t, context), parts["unet"](x, t, context).sample) < 1e-5
    pictures = torch.randn(1, 3, 64, 64)
    scale = model.vae.latent_scale
    assert gap(model.vae.encode(pictures), parts["vae"].encode(pictures).latent_dist.mean * scale) < 1e-5
    assert gap(model.vae.decode(x), parts["vae"].decode(x / scale).sample) < 1e-5
    tokens = model.text.tokens(["a small blue circle above a large red square", ""])
    assert gap(model.text(tokens), parts["text_encoder"](tokens).last_hidden_state) < 1e-5


def test_a_diffusers_folder(pipeline):
    parts, folder, second = pipeline
    model = layouts.from_diffusers(folder)
    agrees(model, parts)
    assert (model.denoiser.target, model.text.pad, model.size) == (("v", 0) if second else ("eps", 49407)) + (64,)
    expected = diffusers.DDIMScheduler.from_pretrained(folder / "scheduler").alphas_cumprod
    assert torch.allclose(model.schedule.alpha_bar[1:].float(), expected, rtol=2e-6)
    pictures = model.generate(["a small blue circle"], steps=2, generator=torch.Generator().manual_seed(0))
    assert pictures.shape == (1, 3, 64, 64) and pictures.std() > 0.01
    assert torch.equal(minidiff.load(folder).unet.conv_in.weight, model.unet.conv_in.weight)


def single_file(parts, second, path):
    """The same weights in CompVis's layout."""
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint

    unet = names.to_published(names.to_ours(parts["unet"].state_dict(), names.UNET_DIFFUSERS), names.unet_compvis())
    vae = names.to_published(names.to_ours(parts["vae"].state_dict(), names.VAE_DIFFUSERS), names.vae_compvis())
    vae = {name: value[..., None, None] if ".attn_1." in name and value.ndim == 2 else value for name, value in vae.items()}
    whole = {f"model.diffusion_model.{name}": value for name, value in unet.items()} | {f"first_stage_model.{name}": v for name, v in vae.items()}

    back = convert_ldm_unet_checkpoint(dict(whole), {"layers_per_block": 2, "class_embed_type": None, "addition_embed_type": None})
    assert back.keys() == parts["unet"].state_dict().keys()
    back = convert_ldm_vae_checkpoint(dict(whole), {"down_block_types": [0] * 4, "up_block_types": [0] * 4, "layers_per_block": 2})
    assert back.keys() == parts["vae"].state_dict().keys()

    text = {name.removeprefix("text_model."): value for name, value in parts["text_encoder"].state_dict().items()}
    if second:  # open_clip keeps q, k and v together, and the block that SD 2.x does not run
        ours = names.to_ours({name: value for name, value in text.items() if "position_ids" not in name}, names.CLIP_TRANSFORMERS)
        for kind in ("weight", "bias"):
            for block in (0, 1):
                ours[f"blocks.{block}.attention.qkv.{kind}"] = torch.cat([ours.pop(f"blocks.{block}.attention.{p}.{kind}") for p in "qkv"])
        ours |= {name.replace("blocks.1", "blocks.2"): torch.full_like(value, torch.nan) for name, value in ours.items() if "blocks.1" in name}
        text = names.to_published(ours, names.CLIP_OPEN) | {"logit_scale": torch.ones(()), "text_projection": torch.ones(64, 64)}
    prefix = "cond_stage_model.model." if second else "cond_stage_model.transformer.text_model."
    whole |= {prefix + name: value for name, value in text.items()}
    whole["alphas_cumprod"] = torch.ones(1000)
    save_file({name: value.contiguous() for name, value in whole.items()}, path)
    return whole


def under(whole, prefix):
    return {name.removeprefix(prefix): value for name, value in whole.items() if name.startswith(prefix)}


def test_parts_of_a_single_file(pipeline, tmp_path):
    """Heads and activation leave no trace in tensors; those of these tiny parts are told."""
    parts, _, second = pipeline
    whole = single_file(parts, second, tmp_path / "model.safetensors")
    state = under(whole, layouts.UNET)
    unet = layouts.unet(state, "file", layouts._compvis_table(state), heads=(1, 2, 2, 2) if second else (2, 2, 2, 2))
    vae = layouts.vae(under(whole, layouts.FIRST_STAGE), "file", names.vae_compvis())
    prefix, table = (layouts.TEXT_2, names.CLIP_OPEN) if second else (layouts.TEXT_1, names.CLIP_TRANSFORMERS)
    told = {"heads": 2, "activation": "gelu" if second else "quick_gelu", "pad": 0 if second else 49407}
    agrees(SimpleNamespace(unet=unet, vae=vae, text=layouts.text(under(whole, prefix), "file", table, **told)), parts)


def test_a_single_file(pipeline, tmp_path):
    parts, _, second = pipeline
    path = tmp_path / "model.safetensors"
    whole = single_file(parts, second, path)
    if second:
        with pytest.warns(UserWarning, match=r"v is assumed"):
            model = layouts.from_single_file(path)
        assert layouts.from_single_file(path, "eps").size == 512
    else:
        model = layouts.from_single_file(path)
    assert (model.denoiser.target, model.size) == (("v", 768) if second else ("eps", 512))
    state = names.to_published(model.unet.state_dict(), names.unet_compvis())
    assert all(torch.equal(value, whole[layouts.UNET + name]) for name, value in state.items())

    averaged = {"model_ema.diffusion_model" + name.replace(".", ""): value + 1 for name, value in under(whole, layouts.UNET).items()}
    save_file({**whole, **averaged}, path)
    with pytest.warns(UserWarning, match=r"the averaged are taken"):
        model = layouts.from_single_file(path, "eps")
    assert torch.equal(model.unet.conv_in.bias, whole[layouts.UNET + "input_blocks.0.0.bias"] + 1)


def test_a_pickle_with_a_state_dict(pipeline, tmp_path):
    parts, _, second = pipeline
    whole = single_file(parts, second, tmp_path / "model.safetensors")
    torch.save({"state_dict": whole, "global_step": 1}, tmp_path / "model.ckpt")
    model = layouts.from_single_file(tmp_path / "model.ckpt", "eps")
    assert torch.equal(model.unet.conv_in.weight, whole[layouts.UNET + "input_blocks.0.0.weight"])


class Code:
    """A pickle that would run a command when it is opened."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return (os.system, (f"touch {self.marker}",))


def test_files_that_are_refused(pipeline, tmp_path):
    parts, _, second = pipeline
    path = tmp_path / "model.safetensors"
    whole = single_file(parts, second, path)
    with pytest.raises(UserError, match=r'no file ".*nowhere.ckpt"'):
        layouts.from_single_file(tmp_path / "nowhere.ckpt")
    (tmp_path / "notes.txt").write_text("no model")
    with pytest.raises(UserError, match=r"no checkpoint by its name"):
        minidiff.load(tmp_path / "notes.txt")
    with open(tmp_path / "code.ckpt", "wb") as file:
        pickle.dump({"state_dict": Code(tmp_path / "ran")}, file, protocol=2)
    with pytest.raises(UserError, match=r"code.ckpt is no plain file of tensors"):
        layouts.from_single_file(tmp_path / "code.ckpt")
    assert not (tmp_path / "ran").exists()
    (tmp_path / "short.safetensors").write_bytes(path.read_bytes()[:100_000])
    with pytest.raises(UserError, match=r"short.safetensors is damaged"):
        layouts.from_single_file(tmp_path / "short.safetensors")
    save_file({name: v.contiguous() for name, v in whole.items() if not name.startswith(layouts.FIRST_STAGE)}, path)
    with pytest.raises(UserError, match=r"has no VAE; a whole model is needed"):
        layouts.from_single_file(path)
    save_file({name: v.contiguous() for name, v in whole.items() if not name.endswith("input_blocks.1.0.in_layers.0.bias")}, path)
    with pytest.raises(UserError, match=r'1 tensors are missing and 0 left over; the first missing is "encoder.0.residual.0.norm1.bias"'):
        layouts.from_single_file(path, "eps")


def test_a_folder_that_is_refused(pipeline, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(pipeline[1], folder)
    config = folder / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps({"prediction_type": "noise"}))
    with pytest.raises(UserError, match=r'prediction_type "noise"'):
        layouts.from_diffusers(folder)
    config.write_text("{")
    with pytest.raises(UserError, match=r"scheduler_config.json is not JSON"):
        layouts.from_diffusers(folder)
    config.unlink()
    with pytest.raises(UserError, match=r"scheduler_config.json is missing"):
        layouts.from_diffusers(folder)
