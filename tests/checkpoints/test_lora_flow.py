"""LoRA files of SD 3 and FLUX.1 in kohya's names, whose fused layers are several of ours."""

import copy
import re

import pytest
import tokenizers
import torch
from safetensors.torch import load_file, save_file

from minidiff import schedules
from minidiff.checkpoints import lora as lora_files
from minidiff.checkpoints import names_flow
from minidiff.checkpoints.inspect import inspect
from minidiff.conditioners import FluxText, SD3Text, T5TextConfig
from minidiff.denoiser import Denoiser
from minidiff.errors import UserError
from minidiff.latent_diffusion import LatentDiffusion
from minidiff.methods import lora
from minidiff.mmdit import MMDiT, MMDiTConfig
from minidiff.t5 import T5Config
from minidiff.text import TextConfig
from minidiff.vae import VAE, VAEConfig

F64, RANK, ALPHA = torch.float64, 3, 2.0
CONFIGS = {
    "sd3": MMDiTConfig(32, 2, 4, 24, 24, 4, 4, table=8, qk_norm=True, dual=1),
    "flux": MMDiTConfig(32, 1, 2, 24, 12, 4, 4, single=2, qk_norm=True, axes=(4, 6, 6)),
}
# As kohya's tools name every layer that they train in a block of each kind.
NAMES = {
    "sd3": """joint_blocks_0_x_block_attn_qkv joint_blocks_0_x_block_attn_proj
        joint_blocks_0_x_block_attn2_qkv joint_blocks_0_x_block_attn2_proj
        joint_blocks_0_x_block_mlp_fc1 joint_blocks_0_x_block_mlp_fc2
        joint_blocks_0_x_block_adaLN_modulation_1 joint_blocks_0_context_block_attn_qkv
        joint_blocks_0_context_block_attn_proj joint_blocks_0_context_block_mlp_fc1
        joint_blocks_0_context_block_mlp_fc2 joint_blocks_0_context_block_adaLN_modulation_1
        joint_blocks_1_context_block_attn_qkv joint_blocks_1_context_block_adaLN_modulation_1
        final_layer_adaLN_modulation_1 context_embedder t_embedder_mlp_0 y_embedder_mlp_2""",
    "flux": """double_blocks_0_img_attn_qkv double_blocks_0_img_attn_proj double_blocks_0_img_mlp_0
        double_blocks_0_img_mlp_2 double_blocks_0_img_mod_lin double_blocks_0_txt_attn_qkv
        double_blocks_0_txt_attn_proj double_blocks_0_txt_mlp_0 double_blocks_0_txt_mlp_2
        double_blocks_0_txt_mod_lin single_blocks_0_linear1 single_blocks_0_linear2
        single_blocks_0_modulation_lin single_blocks_1_linear1 txt_in time_in_in_layer
        final_layer_linear final_layer_adaLN_modulation_1""",
}
T5_LAYERS = {  # by their names in transformers
    "layer.0.SelfAttention.q": "q",
    "layer.0.SelfAttention.k": "k",
    "layer.0.SelfAttention.v": "v",
    "layer.0.SelfAttention.o": "out",
    "layer.1.DenseReluDense.wi_0": "gate",
    "layer.1.DenseReluDense.wi_1": "up",
    "layer.1.DenseReluDense.wo": "down",
}
TEXT = {"sd3": ("te1", "te2"), "flux": ("te1",)}
FUSED = re.compile("qkv|linear1")


def sized(kind: str, t5: T5Config | None = None) -> LatentDiffusion:
    """Random, in float64."""
    clip, flow = TextConfig(12, 2, 2), Denoiser(MMDiT(CONFIGS[kind]), schedules.Flow(), "flow")
    text = SD3Text if kind == "sd3" else FluxText
    text = text(T5TextConfig(clip, clip if kind == "sd3" else None, t5, 4, dim=24))
    if t5:
        words = {word: k for k, word in enumerate("<pad> </s> <unk> a cat red dog".split())}
        tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, "<unk>"))
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
        text.t5.vocabulary = tokenizer.to_str()
    vae = VAE(VAEConfig(3, 4, (32, 32), 1, quant=False), 0.5)
    model = LatentDiffusion(vae, text, flow, 16).double()
    for p in model.parameters():
        p.data = torch.randn_like(p) / p[0].numel() ** 0.5
    return model


def published(network: MMDiT) -> tuple[dict[str, torch.Tensor], names_flow.Layout]:
    layout = names_flow.FLUX if network.config.axes else names_flow.SD3
    return names_flow.write(network.state_dict(), layout), layout


def kohya_file(model: LatentDiffusion, kind: str, file) -> dict[str, torch.Tensor]:
    """A LoRA of random numbers for each layer named above, and for one of each CLIP; its tensors."""
    weights, _ = published(model.unet)
    flat = {k.removesuffix(".weight").replace(".", "_"): v for k, v in weights.items()}
    shapes = {f"lora_unet_{name}": flat[name].shape for name in NAMES[kind].split()}
    layer = "text_model_encoder_layers_0_self_attn_q_proj"
    shapes |= {f"lora_{prefix}_{layer}": (12, 12) for prefix in TEXT[kind]}
    state = {}
    for name, (out, inner) in shapes.items():
        state[f"{name}.lora_down.weight"] = torch.randn(RANK, inner, dtype=F64)
        state[f"{name}.lora_up.weight"] = torch.randn(out, RANK, dtype=F64) / 8
        state[f"{name}.alpha"] = torch.tensor(ALPHA)
    save_file(state, file)
    return state


@torch.no_grad()
def output(model: LatentDiffusion) -> torch.Tensor:
    draw = torch.Generator().manual_seed(1)
    condition = model.text.encode(["a cat", "a red dog"])
    x = torch.randn(2, 4, 8, 8, dtype=F64, generator=draw)
    return model.unet(x, torch.tensor([20.0, 900.0], dtype=F64), condition)


@pytest.mark.parametrize("kind", CONFIGS)
def test_it_changes_the_published_weights(tmp_path, kind):
    """As B A alpha / rank, added to the weights of Stability and Black Forest Labs, does."""
    model, file = sized(kind), tmp_path / "l.safetensors"
    state, before = kohya_file(model, kind, file), output(model)
    expected = copy.deepcopy(model)
    weights, layout = published(expected.unet)
    for name, weight in weights.items():
        stem = f"lora_unet_{name.removesuffix('.weight').replace('.', '_')}"
        if f"{stem}.alpha" in state:
            change = state[f"{stem}.lora_up.weight"] @ state[f"{stem}.lora_down.weight"]
            weights[name] = weight + change * ALPHA / RANK
    expected.unet.load_state_dict(names_flow.read(weights, layout))
    for prefix, clip in zip(TEXT[kind], (expected.text.clip_l, expected.text.clip_g), strict=False):
        stem = f"lora_{prefix}_text_model_encoder_layers_0_self_attn_q_proj"
        change = state[f"{stem}.lora_up.weight"] @ state[f"{stem}.lora_down.weight"]
        clip.blocks[0].attention.q.weight.data += change * ALPHA / RANK
    loaded = lora_files.load(model, file)
    count = sum(4 if "linear1" in n else 3 if "qkv" in n else 1 for n in NAMES[kind].split())
    assert len(loaded.layers) == count + len(TEXT[kind]) and loaded.moved > 0.01
    assert (output(model) - before).abs().max() > 0.1
    torch.testing.assert_close(output(model), output(expected), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_file_comes_back_as_it_was(tmp_path, kind):
    """q, k and v of a fused layer have one A, so they are written as one layer again."""
    model, file = sized(kind), tmp_path / "l.safetensors"
    state = kohya_file(model, kind, file)
    lora_files.load(model, file)
    again = load_file(lora_files.save(model, tmp_path / "again.safetensors", "kohya"))
    assert again.keys() == state.keys()
    assert all(torch.equal(again[name], state[name]) for name in state)


@pytest.mark.parametrize("targets", [lora.ATTENTION, ("up", "modulation", "k")])
@pytest.mark.parametrize("kind", CONFIGS)
def test_ours_there_and_back(tmp_path, kind, targets):
    """Each A of its own: the fused layer's B is block-diagonal. A layer without a LoRA has zeros."""
    model, file = sized(kind), tmp_path / "l.safetensors"
    bare = copy.deepcopy(model)
    lora.add(model.unet, RANK, ALPHA, targets)
    for each in lora.adapted(model).values():
        torch.nn.init.normal_(each.lora.B, std=0.1)
    for factors in ("one", "several"):
        written = load_file(lora_files.save(model, file.with_stem(factors), "kohya"))
        other = copy.deepcopy(bare)
        lora_files.load(other, file.with_stem(factors))
        assert (output(model) - output(bare)).abs().max() > 0.01
        torch.testing.assert_close(output(other), output(model), rtol=0, atol=1e-6)  # alpha: fp32
        fused = {n: v for n, v in written.items() if FUSED.search(n) and n.endswith("down.weight")}
        present = sum(letter in targets for letter in "qkv")
        linear1 = present + ("up" in targets)
        assert all(
            len(v) == RANK * (linear1 if "linear1" in n else present) for n, v in fused.items()
        )
        model.unet.joint[0].image.attention.k.lora.alpha = 5.0


@pytest.mark.parametrize(
    "kind, prefix",
    [("sd3", "lora_te3_"), ("flux", "lora_te3_"), ("sd3", "text_encoder_3."), ("flux", "text_encoder_2.")],
)  # fmt: skip
def test_t5_is_changed_as_the_weights_are(tmp_path, kind, prefix):
    """In kohya's names, and in diffusers'; and a file comes back as it was."""
    model, file = sized(kind, T5Config(24, 2, 2, 12, 16, 40)), tmp_path / "l.safetensors"
    expected, before, state = copy.deepcopy(model), output(model), {}
    layout = "kohya" if prefix.startswith("lora") else "diffusers"
    for theirs, ours in T5_LAYERS.items():
        name, weight = f"encoder.block.1.{theirs}", expected.text.t5.blocks[1].get_parameter(f"{ours}.weight")  # fmt: skip
        name = prefix + (name.replace(".", "_") if layout == "kohya" else name)
        A, B = torch.randn(RANK, weight.shape[1], dtype=F64), torch.randn(len(weight), RANK, dtype=F64)  # fmt: skip
        state |= dict(zip([name + half for half in lora_files.HALVES[layout]], (A, B), strict=True))
        if layout == "kohya":
            state[f"{name}.alpha"] = torch.tensor(ALPHA)
        weight.data += B @ A * (ALPHA / RANK if layout == "kohya" else 1)
    save_file(state, file)
    loaded = lora_files.load(model, file)
    assert sorted(loaded.layers) == sorted(f"text.t5.blocks.1.{o}" for o in T5_LAYERS.values())
    assert loaded.moved > 0 and (output(model) - before).abs().max() > 1e-3
    torch.testing.assert_close(output(model), output(expected), rtol=0, atol=1e-12)
    assert dict(inspect(file))["layers"].endswith("7 of the text encoders")
    again = load_file(lora_files.save(model, tmp_path / "again.safetensors", layout))
    if (kind, layout) != ("flux", "diffusers"):  # SD 3's name, which is read there too
        assert again.keys() == state.keys()


def test_one_clear_line(tmp_path):
    file = tmp_path / "l.safetensors"
    state = kohya_file(sized("flux"), "flux", file)
    rows = dict(inspect(file))
    assert rows["kind"] == "a LoRA" and rows["for"] == "FLUX.1"
    assert rows["layout"] == "LoRA, kohya names"
    assert rows["layers"] == "18 of the transformer, 1 of the text encoder"
    with pytest.raises(UserError, match=r"17 of its 19 layers .* another model \(FLUX\.1\)"):
        lora_files.load(sized("sd3"), file)
    name = "lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight"
    save_file(state | {name: state[name][:-1].contiguous()}, file)
    with pytest.raises(UserError, match=r'img_attn_qkv": B is \(95, 3\); .* takes 96 rows'):
        lora_files.load(sized("flux"), file)
    kohya_file(sized("sd3"), "sd3", file)
    assert dict(inspect(file))["for"] == "Stable Diffusion 3"
    with pytest.raises(UserError, match=r"another model \(Stable Diffusion 3\)"):
        lora_files.load(sized("flux"), file)


@pytest.mark.parametrize("kind", CONFIGS)
def test_layers_whose_numbers_stand_in_another_order(tmp_path, kind):
    """The last modulations have kohya's names alone; the first or the last layer has none."""
    model, file = sized(kind), tmp_path / "l.safetensors"
    lora.add(model.unet, 1, targets=["modulation_out"])
    with pytest.raises(UserError, match="0 of the model's 1 LoRAs can be"):
        lora_files.save(model, file)
    lora_files.save(model, file, "kohya")
    lora.remove(model)
    lora.add(model.unet, 1, targets=["patch_in" if kind == "flux" else "patch_out"])
    with pytest.raises(UserError, match="0 of the model's 1 LoRAs can be"):
        lora_files.save(model, tmp_path / "other.safetensors", "kohya")
