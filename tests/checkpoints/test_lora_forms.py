"""LoRA files in the forms in which they are shared."""

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from minidiff.checkpoints import lora
from minidiff.errors import UserError
from minidiff.methods.lora import Layer

QUERY = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
COMPVIS = "input_blocks.1.1.transformer_blocks.0.attn1.to_q"
CONVOLUTION = "down_blocks_0_resnets_0_conv1"
pytestmark = pytest.mark.filterwarnings("ignore:.* changes nothing")  # this U-Net gives zeros


def halves(layer, down="lora_down", up="lora_up"):
    torch.manual_seed(0)
    return {
        f"{layer}.{down}.weight": torch.randn(4, 32),
        f"{layer}.{up}.weight": torch.randn(32, 4),
    }


def query(model) -> Layer:
    return model.unet.encoder[0].attention[0].blocks[0].self_attention.q


@pytest.mark.parametrize(
    "state",
    [
        halves(f"lora_unet_{QUERY}".replace(".", "_")),
        halves(f"lora_unet_{COMPVIS}".replace(".", "_")),
        halves(f"diffusion_model.{COMPVIS}", "lora_A", "lora_B"),
        halves(f"model.diffusion_model.{COMPVIS}", "lora_down", "lora_up"),
    ],
    ids=["kohya", "CompVis, kohya", "CompVis, ComfyUI", "CompVis, whole"],
)
def test_names_of_compvis_mean_the_same_layers(sd, tmp_path, state):
    save_file(state, tmp_path / "l.safetensors")
    model = sd()
    loaded = lora.load(model, tmp_path / "l.safetensors")
    assert loaded.layers == ["unet.encoder.0.attention.0.blocks.0.self_attention.q"]
    down, up = halves("x").values()
    assert torch.equal(query(model).lora.A, down) and torch.equal(query(model).lora.B, up)


def test_a_third_matrix_of_a_convolution(sd, tmp_path):
    """LyCORIS's lora_mid: up, mid and down are three convolutions, one after the other."""
    down, mid, up = torch.randn(4, 32, 1, 1), torch.randn(4, 4, 3, 3), torch.randn(32, 4, 1, 1)
    name = f"lora_unet_{CONVOLUTION}"
    state = {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
    state |= {f"{name}.lora_mid.weight": mid, f"{name}.alpha": torch.tensor(2.0)}
    save_file(state, tmp_path / "l.safetensors")
    model, x = sd(), torch.randn(1, 32, 8, 8)
    layer = model.unet.encoder[0].residual[0].conv1
    before = layer(x)
    lora.load(model, tmp_path / "l.safetensors")
    change = F.conv2d(F.conv2d(F.conv2d(x, down), mid, padding=1), up) * 2 / 4
    torch.testing.assert_close(layer(x) - before, change, rtol=1e-4, atol=1e-4)
    save_file(state | {f"{name}.lora_mid.weight": mid[:, :3].clone()}, tmp_path / "l.safetensors")
    with pytest.raises(UserError, match=r"lora_mid and lora_down are .* do not fit"):
        lora.load(sd(), tmp_path / "l.safetensors")


def test_textual_inversions_in_a_lora(sd, tmp_path):
    vectors = torch.randn(2, 64)
    state = halves(f"unet.{QUERY}") | {"bundle_emb.my-word.string_to_param.*": vectors}
    save_file(state, tmp_path / "l.safetensors")
    model = sd()
    assert lora.load(model, tmp_path / "l.safetensors").words == ["my-word"]
    ids = model.text.ids("My-Word")
    assert torch.equal(model.text.token_embedding.weight[list(ids)], vectors)
    save_file(state | {"bundle_emb.b.emb_params": torch.ones(1, 768)}, tmp_path / "l.safetensors")
    with pytest.raises(UserError, match=r"width 768; .* takes 64. It is for Stable Diffusion 1.x"):
        lora.load(sd(), tmp_path / "l.safetensors")


@pytest.mark.parametrize("stem", ["adapter_model", "pytorch_lora_weights"])
def test_a_folder_of_peft_or_diffusers(sd, ran, tmp_path, stem):
    folder = tmp_path / "adapter"
    folder.mkdir()
    save_file(
        halves(f"base_model.model.{QUERY}", "lora_A", "lora_B"), folder / f"{stem}.safetensors"
    )
    (folder / "adapter_config.json").write_text(json.dumps({"lora_alpha": 8, "r": 4}))
    model = sd()
    lora.load(model, folder)
    assert query(model).lora.alpha == (8 if stem == "adapter_model" else 4)
    ours = sd().save(tmp_path / "ours")
    out = ran("convert", ours, tmp_path / "merged", "--to", "minidiff", "--lora", folder).out
    assert f"{folder}: 1 layers" in out
