"""Files that are no Stable Diffusion 1.x, 2.x or XL: inspect and load name them, and say what takes them.
The names of tensors are those of the published files."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import minidiff
from minidiff.checkpoints import write
from minidiff.checkpoints.inspect import inspect
from minidiff.errors import UserError

ATTENTION = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
PUBLISHED = {
    "a ControlNet": ("control_model.input_blocks.0.0.weight", "control_model.zero_convs.0.0.weight"),
    "a ControlNet ": ("controlnet_cond_embedding.conv_in.weight", "conv_in.weight"),
    "a motion module (AnimateDiff)": ("down_blocks.0.motion_modules.0.temporal_transformer.norm.bias",),
    "an IP-Adapter": ("image_proj.norm.weight", "ip_adapter.1.to_k_ip.weight"),
    "a relative of LoRA (LoHa, LoKr)": ("lora_unet_mid_block_x.hada_w1_a", "lora_unet_mid_block_x.alpha"),
    "a LoRA": (f"unet.{ATTENTION}.to_q.lora_A.weight", f"unet.{ATTENTION}.to_q.lora_B.weight"),
    "a LoRA ": ("transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight",),
    "a textual inversion": ("emb_params",),
    "a textual inversion ": ("<cat-toy>",),
    "a textual inversion  ": ("clip_l", "clip_g"),
}  # fmt: skip
INCOMPLETE = {
    "Stable Diffusion 3": ("model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight",),
    "Stable Diffusion 3 ": ("transformer_blocks.0.attn.add_q_proj.weight",),
    "FLUX.1": ("double_blocks.0.img_attn.qkv.weight", "single_blocks.0.linear1.weight"),
    "FLUX.1 ": ("single_transformer_blocks.0.proj_mlp.bias", "transformer_blocks.0.attn.add_q_proj.bias"),
}  # fmt: skip
TAKEN = {"a LoRA": "lora", "a textual inversion": "embedding"}


@pytest.mark.parametrize("kind", PUBLISHED)
def test_what_is_no_model_is_named(refused, ran, tmp_path, kind):
    file = tmp_path / "m.safetensors"
    save_file({name: torch.ones(4, 768) for name in PUBLISHED[kind]}, file)
    kind = kind.strip()
    rows = dict(inspect(file))
    assert rows["kind"] == kind
    answer = refused("generate", "x", "--model", file)
    assert answer.startswith(f"{file} is {kind}; ")
    option = TAKEN.get(kind)
    words = (
        f"--{option} {file}" if option else "LoRA is read" if "LoHa" in kind else "1.x, 2.x and XL"
    )
    assert words in answer and words in ran("inspect", file).out
    with pytest.raises(UserError, match=f"`{option}=" if option else "read"):
        minidiff.load(file)


@pytest.mark.parametrize("kind", INCOMPLETE)
def test_a_flow_model_that_is_not_whole_is_named(refused, tmp_path, kind):
    file = tmp_path / "m.safetensors"
    save_file({name: torch.ones(4, 768) for name in INCOMPLETE[kind]}, file)
    rows = dict(inspect(file))
    assert rows["version"] == kind.strip() and rows["cannot"].startswith(f"be loaded: {file}: ")
    assert refused("generate", "x", "--model", file).startswith(f"{file}: ")


def test_a_lora_of_kohya_says_its_trigger_words(ran, tmp_path):
    file, name = tmp_path / "style.safetensors", "lora_unet_" + ATTENTION.replace(".", "_")
    tensors = {f"{name.replace('attn1', 'attn2')}_to_k.lora_down.weight": torch.zeros(4, 768)}
    tensors |= {f"{name}_to_q.lora_down.weight": torch.zeros(8, 320)}
    tags = {"10_sks dog": {"sks dog": 20, "a park\x1b[31m": 3}}
    metadata = {"ss_base_model_version": "sd_v1", "ss_network_dim": "4", "ss_network_alpha": "2"}
    metadata |= {
        "ss_sd_model_name": "v1-5-pruned.safetensors",
        "ss_tag_frequency": json.dumps(tags),
    }
    metadata |= {"modelspec.trigger_phrase": "sks"}
    save_file(tensors, file, metadata)
    rows = dict(inspect(file))
    assert rows["layout"] == "LoRA, kohya names" and rows["rank"] == "4 (1 layers), 8 (1 layers)"
    assert rows["for"] == "Stable Diffusion 1.x" and rows["alpha"] == "2"
    assert rows["trained on"] == "v1-5-pruned.safetensors; sd_v1"
    assert rows["trigger words"] == "sks"
    assert (
        rows["captions had"].startswith("sks dog (20), a park") and "10_sks" in rows["captions had"]
    )
    printed = ran("inspect", file).out
    assert "\x1b" not in printed and r"a park\x1b[31m" in printed
    save_file(tensors, file, {"ss_tag_frequency": "[1, 2"})
    assert dict(inspect(file))["captions had"] == "[1, 2"


@pytest.mark.parametrize("part", ["vae", "unet", "text"])
def test_a_part_alone_says_which_option_takes_it(sd, refused, ran, tmp_path, part):
    folder = write.save_diffusers(sd(), tmp_path / "sd")
    folder = folder / ("text_encoder" if part == "text" else part)
    file = next(folder.glob("*.safetensors"))
    for place in (folder, file):
        assert f"a whole model takes it with --{part} {place}" in refused(
            "generate", "x", "--model", place
        )
        assert "draw by itself: no" in ran("inspect", place).out


@pytest.mark.parametrize(
    "config, words",
    [
        ({"_class_name": "ControlNetModel"}, "is a ControlNetModel; it is not read here"),
        ({"architectures": ["T5EncoderModel"]}, "is a T5EncoderModel; it is not read here"),
        ({}, "is no checkpoint: neither model.json"),
    ],
)
def test_other_folders_are_named(refused, tmp_path, config, words):
    (tmp_path / "config.json").write_text(json.dumps(config))
    for verb in (["inspect", tmp_path], ["generate", "x", "--model", tmp_path]):
        assert words in refused(*verb)


def test_a_folder_of_ours_is_a_table(sd, ran, tmp_path):
    printed = ran("inspect", sd().save(tmp_path / "m")).out
    assert "{" not in printed and "[" not in printed
    assert "channels 32 64, blocks 1, depth 1 0, heads 8 8" in printed
    state = load_file(tmp_path / "m" / "unet.safetensors")
    assert f"UNet, {sum(v.numel() for v in state.values()) / 1e3:.3g} k parameters" in printed
