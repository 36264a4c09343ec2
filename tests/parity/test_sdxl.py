"""SDXL's networks against diffusers', transformers' and open_clip's, built tiny and with random weights; and at their true shapes."""

from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from minidiff.checkpoints import files, layouts, names, write
from minidiff.checkpoints.folder import empty, fill
from minidiff.checkpoints.load import outline
from minidiff.checkpoints.names import CLIP_OPEN, CLIP_TRANSFORMERS, UNET_DIFFUSERS, to_ours
from minidiff.condition import Condition
from minidiff.errors import UserError
from minidiff.layers import timestep_embedding
from minidiff.text import CLIPText, TextConfig, clip_bigg14
from minidiff.unet import UNet, UNetConfig, unet_sdxl, unet_sdxl_refiner
from minidiff.vae import vae_sd

from .test_networks import gap, randomized

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
open_clip = pytest.importorskip("open_clip")

SIZES = {  # of base and refiner: number of sizes, blocks by level, blocks in the middle
    "base": (6, (0, 1, 3), None),
    "refiner": (5, (0, 2, 2, 0), 2),
}
TALL = torch.tensor([[1024.0, 768, 0, 8, 1536, 640], [512, 515, 16, 0, 768, 1344]])


def unets(kind, dtype=torch.float64):
    """Theirs, and ours with its weights."""
    count, depth, middle = SIZES[kind]
    levels = len(depth)
    widths, heads = (32, 64, 64, 64)[:levels], (1, 2, 2, 2)[:levels]
    cross = ["CrossAttn" if d else "" for d in depth]
    theirs = diffusers.UNet2DConditionModel(
        sample_size=16,
        block_out_channels=widths,
        layers_per_block=2,
        down_block_types=[f"{c}DownBlock2D" for c in cross],
        up_block_types=[f"{c}UpBlock2D" for c in reversed(cross)],
        transformer_layers_per_block=[max(d, 1) for d in depth] if middle is None else middle,
        cross_attention_dim=24,
        attention_head_dim=heads,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=16 + 256 * count,
    )
    theirs = randomized(theirs, dtype)
    if dtype == torch.float64:  # they compute sines in fp32 whatever the dtype
        theirs.time_proj.forward = lambda t: timestep_embedding(t.double(), 32)
        theirs.add_time_proj.forward = lambda t: timestep_embedding(t.double(), 256)
    config = UNetConfig(
        4, 4, widths, 2, depth, heads, 24, linear_projection=True, middle_depth=middle, added=16 + 256 * count
    )  # fmt: skip
    ours = UNet(config).to(dtype).eval()
    ours.load_state_dict(to_ours(theirs.state_dict(), UNET_DIFFUSERS))
    return theirs, ours


def inputs(kind, dtype=torch.float64):
    torch.manual_seed(1)
    x, t = torch.randn(2, 4, 16, 12, dtype=dtype), torch.tensor([7, 830])
    context, pooled = torch.randn(2, 9, 24, dtype=dtype), torch.randn(2, 16, dtype=dtype)
    numbers = (
        TALL if kind == "base" else torch.cat([TALL[:, :4], TALL.new_tensor([[6.0], [2.5]])], 1)
    )
    return x, t, Condition(context, pooled, numbers.to(dtype))


def their_output(theirs, x, t, c):
    added = {"text_embeds": c.pooled, "time_ids": c.numbers}
    return theirs(x, t, c.context, added_cond_kwargs=added).sample


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("kind", SIZES)
@torch.no_grad()
def test_the_unet_equals_diffusers(kind, dtype, tolerance):
    theirs, ours = unets(kind, dtype)
    x, t, c = inputs(kind, dtype)
    expected = their_output(theirs, x, t, c)
    assert expected.std() > 0.1
    assert gap(ours(x, t.to(dtype), c), expected) < tolerance


@torch.no_grad()
def test_traps_of_the_unet():
    """Width before height, and a forgotten add_embedding: both run, and give something else."""
    theirs, ours = unets("base")
    x, t, c = inputs("base")
    expected = their_output(theirs, x, t, c)
    width_first = Condition(c.context, c.pooled, c.numbers[:, [1, 0, 3, 2, 5, 4]])
    assert gap(ours(x, t.double(), width_first), expected) > 1e-3
    for p in ours.add.parameters():
        p.zero_()
    assert gap(ours(x, t.double(), c), expected) > 1e-3


@torch.no_grad()
def test_numbers_keep_their_digits_in_bf16():
    """1,023 is no number of bf16's: the sines of numbers that were cast are others."""
    _, ours = unets("base", torch.float32)
    x, t, c = inputs("base", torch.float32)
    seen = []
    ours.add.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    ours.to(torch.bfloat16)(x, t, Condition(c.context, c.pooled, c.numbers - 1))
    expected = timestep_embedding((c.numbers - 1).flatten(), 256).view(2, -1)
    assert (seen[0][:, 16:] - expected).abs().max() < 0.005


@torch.no_grad()
def test_a_condition_and_the_unet_must_fit_each_other():
    _, xl = unets("base", torch.float32)
    x, t, c = inputs("base", torch.float32)
    plain = UNet(UNetConfig(4, 4, (32, 32), 1, (1, 1), (1, 1), 24))
    for network, context in ((xl, c.context), (plain, c)):
        with pytest.raises(UserError, match="takes a Condition"):
            network(x, t, context)


def text_config(**more):
    return (
        dict(
            vocab_size=49410,
            hidden_size=32,
            intermediate_size=128,
            num_hidden_layers=3,
            num_attention_heads=4,
            projection_dim=32,
            bos_token_id=49406,
            eos_token_id=49407,
        )
        | more
    )


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@torch.no_grad()
def test_clip_g_equals_transformers(dtype, tolerance):
    """Context and pooled vector; a word beyond the vocabulary, whose number is larger than the end token's, is no end."""
    theirs = transformers.CLIPTextModelWithProjection(
        transformers.CLIPTextConfig(**text_config(hidden_act="gelu"))
    )
    theirs = randomized(theirs, dtype)
    config = TextConfig(
        32, 3, 4, "gelu", 0, penultimate=True, projection=32, vocabulary=49410, added={"sks": [49408]}
    )  # fmt: skip
    ours = CLIPText(config).to(dtype).eval()
    named = {k.removeprefix("text_model."): v for k, v in theirs.state_dict().items()}
    ours.load_state_dict(to_ours(named, CLIP_TRANSFORMERS))
    tokens = ours.tokens(["a small blue circle above a large red square", "", "a photo of sks"])
    expected = theirs(tokens, output_hidden_states=True)
    context, pooled = ours.both(tokens)
    assert gap(context, expected.hidden_states[-2]) < tolerance
    assert gap(pooled, expected.text_embeds) < tolerance
    assert gap(ours.norm_out(context), expected.hidden_states[-2]) > 0.01  # the trap
    turned = pooled @ torch.linalg.inv(ours.projection.weight.T) @ ours.projection.weight
    assert gap(turned, expected.text_embeds) > 0.01  # the other one: square, so both load


@torch.no_grad()
def test_clip_g_equals_open_clip():
    theirs = open_clip.transformer.TextTransformer(
        context_length=77, vocab_size=49408, width=32, heads=4, layers=3, output_dim=32
    )
    theirs = randomized(theirs, torch.float64)
    config = TextConfig(32, 3, 4, "gelu", 0, penultimate=True, projection=32)
    ours = CLIPText(config).double().eval()
    state = to_ours(theirs.state_dict(), CLIP_OPEN)
    for name in [name for name in state if ".qkv." in name]:
        for letter, value in zip("qkv", state.pop(name).chunk(3), strict=True):
            state[name.replace(".qkv.", f".{letter}.")] = value
    state["projection.weight"] = state["projection.weight"].T
    ours.load_state_dict(state)
    tokens = ours.tokens(["a photo of an astronaut", ""])
    h = theirs.token_embedding(tokens) + theirs.positional_embedding
    for block in theirs.transformer.resblocks[:2]:
        h = block(h, attn_mask=theirs.attn_mask.to(h.dtype))
    context, pooled = ours.both(tokens)
    assert gap(context, h) < 1e-12
    assert gap(pooled, theirs(tokens)) < 1e-12
    ours.projection.weight.data = ours.projection.weight.data.T.contiguous()
    assert gap(ours.both(tokens)[1], theirs(tokens)) > 0.01  # a square matrix loads both ways


PUBLISHED = dict(
    addition_embed_type="text_time", addition_time_embed_dim=256, use_linear_projection=True
)
BASE = PUBLISHED | dict(
    block_out_channels=(320, 640, 1280),
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    transformer_layers_per_block=[1, 2, 10],
    attention_head_dim=[5, 10, 20],
    cross_attention_dim=2048,
    projection_class_embeddings_input_dim=2816,
)
REFINER = PUBLISHED | dict(
    block_out_channels=(384, 768, 1536, 1536),
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    transformer_layers_per_block=4,
    attention_head_dim=[6, 12, 24, 24],
    cross_attention_dim=1280,
    projection_class_embeddings_input_dim=2560,
)


@pytest.mark.parametrize(
    "build, config, count", [(unet_sdxl, BASE, 1680), (unet_sdxl_refiner, REFINER, 1220)]
)
def test_true_shapes(build, config, count):
    with torch.device("meta"):
        theirs = diffusers.UNet2DConditionModel(**config).state_dict()
        ours = build().state_dict()
    assert len(theirs) == count
    shapes = {name: value.shape for name, value in to_ours(theirs, UNET_DIFFUSERS).items()}
    assert shapes == {name: value.shape for name, value in ours.items()}


def test_true_shapes_of_clip_g():
    config = transformers.CLIPTextConfig(
        hidden_size=1280,
        intermediate_size=5120,
        num_hidden_layers=32,
        num_attention_heads=20,
        projection_dim=1280,
        hidden_act="gelu",
    )
    with torch.device("meta"):
        theirs = transformers.CLIPTextModelWithProjection(config).state_dict()
        ours = clip_bigg14().state_dict()
    theirs = {name.removeprefix("text_model."): value for name, value in theirs.items()}
    shapes = {name: value.shape for name, value in to_ours(theirs, CLIP_TRANSFORMERS).items()}
    assert len(shapes) == 517
    assert shapes == {name: value.shape for name, value in ours.items()}


def shapes(state):
    return {name: tuple(value.shape) for name, value in state.items()}


@pytest.mark.parametrize("is_refiner", [False, True], ids=["base", "refiner"])
def test_true_shapes_of_a_single_file(monkeypatch, is_refiner):
    """Every tensor of a whole file finds its place and is written back; names of the text encoders are the libraries' own."""
    monkeypatch.setattr(files, "metadata", lambda file: {})
    words = transformers.CLIPTextConfig(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12
    )
    with torch.device("meta"):
        unet = (unet_sdxl_refiner if is_refiner else unet_sdxl)().state_dict()
        g = open_clip.transformer.TextTransformer(
            context_length=77, vocab_size=49408, width=1280, heads=20, layers=32, output_dim=1280
        ).state_dict()
        l = transformers.CLIPTextModel(words).state_dict()
        vae = vae_sd().state_dict()
    levels = (False, True, True, False)[: 4 if is_refiner else 3]
    prefix = "conditioner.embedders"
    text = {f"{prefix}.{int(not is_refiner)}.model.{name}": value for name, value in g.items()}
    if not is_refiner:
        l = {name.removeprefix("text_model."): value for name, value in l.items()}
        l["embeddings.position_ids"] = torch.arange(77)[None]
        text |= {f"{prefix}.0.transformer.text_model.{name}": value for name, value in l.items()}
    del vae["latent_scale"]
    whole = text | {
        f"model.diffusion_model.{name}": value
        for name, value in names.to_published(unet, names.unet_compvis(levels)).items()
    }
    whole |= {
        f"first_stage_model.{name}": value
        for name, value in names.to_published(vae, names.vae_compvis()).items()
    }
    checkpoint = layouts.read(Path("xl.safetensors"), lambda file: dict(whole))
    assert not checkpoint.unknown and checkpoint.target is None and checkpoint.size == 1024
    for name, part in checkpoint.parts.items():
        expected = shapes(outline(name, part).state_dict())
        expected.pop("latent_scale", None)
        assert shapes(part.state) == expected
    assert len(checkpoint.parts["unet"].state) == (1220 if is_refiner else 1680)
    pair = outline("text", checkpoint.parts["text"])
    assert pair.dim == (1280 if is_refiner else 2048) and pair.clip_g.pad == 0
    assert pair.clip_g.config.activation == "gelu" and pair.clip_g.config.penultimate
    back = write._compvis_text(pair)
    lost = {f"{prefix}.{int(not is_refiner)}.model.attn_mask"}
    assert shapes(back) == {k: v for k, v in shapes(text).items() if k not in lost}


@pytest.mark.nightly
@torch.no_grad()
def test_the_full_unet_equals_diffusers():
    """2,567 M random weights in fp32, 10.3 GB: theirs, then ours on the same tensors."""
    with torch.device("meta"):
        theirs = diffusers.UNet2DConditionModel(**BASE)
    theirs = theirs.to_empty(device="cpu").eval()
    generator = torch.Generator().manual_seed(0)
    for name, p in theirs.named_parameters():
        p.normal_(generator=generator).mul_(0.1 if p.ndim == 1 else p[0].numel() ** -0.5)
        if p.ndim == 1 and "norm" in name and name.endswith("weight"):
            p.add_(1)
    x, t = torch.randn(1, 4, 32, 32, generator=generator), torch.tensor([321])
    context, pooled = torch.randn(1, 77, 2048), torch.randn(1, 1280)
    c = Condition(context, pooled, TALL[:1])
    expected = their_output(theirs, x, t, c)
    with torch.device("meta"):
        config = asdict(unet_sdxl().config)
    ours = fill(empty(UNet, config), to_ours(theirs.state_dict(), UNET_DIFFUSERS), "theirs")
    assert gap(ours(x, t.float(), c), expected) < 1e-5
