"""Our networks against diffusers', transformers' and open_clip's, built tiny and with random weights from their own config classes.

fp32 agrees to 1e-5 and fp64 to 1e-12, relative to the output's size: only the order of additions differs.
"""

import pytest
import torch

from minidiff.checkpoints.names import CLIP_TRANSFORMERS, UNET_DIFFUSERS, VAE_DIFFUSERS, to_ours
from minidiff.layers import ResBlock, timestep_embedding
from minidiff.text import CLIPText, TextConfig
from minidiff.unet import UNet, UNetConfig
from minidiff.vae import VAE, VAEConfig

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
diffusers.utils.logging.set_verbosity_error()  # it warns about every cast to another dtype
PRECISIONS = [(torch.float32, 1e-5), (torch.float64, 1e-12)]


def randomized(module: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    """Every weight random, also those that start at zero or one: a branch that is zero would hide anything. Matrices keep the size of
    what they multiply, so that rounding errors do not grow on the way through."""
    generator = torch.Generator().manual_seed(0)
    for name, p in module.named_parameters():
        noise = torch.randn(p.shape, generator=generator, dtype=torch.float64)
        if p.ndim > 1:
            p.data = (
                noise if "embedding" in name and "time" not in name else noise / p[0].numel() ** 0.5
            )
        else:
            p.data = 0.1 * noise + (
                1 if ("norm" in name or "ln_" in name) and name.endswith("weight") else 0
            )
    return module.to(dtype).eval()


def gap(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


@pytest.mark.parametrize("dtype, tolerance", PRECISIONS)
@pytest.mark.parametrize("style", ["sd1", "sd2"])
@torch.no_grad()
def test_unet_equals_diffusers(style, dtype, tolerance):
    heads = {"sd1": (4, 4, 4, 4), "sd2": (1, 2, 4, 4)}[style]
    theirs = diffusers.UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(32, 64, 128, 128),
        layers_per_block=2,
        cross_attention_dim=24,
        attention_head_dim=heads,
        use_linear_projection=style == "sd2",
    )
    theirs = randomized(theirs, dtype)
    ours = UNet(
        UNetConfig(
            4,
            4,
            (32, 64, 128, 128),
            blocks=2,
            depth=(1, 1, 1, 0),
            heads=heads,
            context_dim=24,
            linear_projection=style == "sd2",
        )
    )
    ours = ours.to(dtype).eval()
    ours.load_state_dict(to_ours(theirs.state_dict(), UNET_DIFFUSERS))
    t, context = torch.tensor([7, 830]), torch.randn(2, 9, 24, dtype=dtype)
    if (
        dtype == torch.float64
    ):  # diffusers computes the sines of the time embedding in fp32 whatever the dtype; the fp32 case compares them
        theirs.time_proj.forward = lambda t: timestep_embedding(t.double(), 32)
    for sides in ((16, 16), (9, 15)):  # odd ones are rounded up and cut, at each level
        x = torch.randn(2, 4, *sides, dtype=dtype)
        expected = theirs(x, t, context).sample
        assert expected.std() > 0.1
        assert gap(ours(x, t.to(dtype), context), expected) < tolerance


@pytest.mark.parametrize("dtype, tolerance", PRECISIONS)
@torch.no_grad()
def test_scale_shift_equals_diffusers(dtype, tolerance):
    """The residual block of ADM, where time scales and shifts."""
    how = {
        "in_channels": 32,
        "out_channels": 64,
        "temb_channels": 48,
        "eps": 1e-5,
        "time_embedding_norm": "scale_shift",
    }
    theirs = randomized(diffusers.models.resnet.ResnetBlock2D(**how), dtype)
    ours = ResBlock(32, 64, 48, scale_shift=True).to(dtype).eval()
    names = {"time_emb_proj": "time", "conv_shortcut": "skip"}
    ours.load_state_dict(
        {
            names.get(k.split(".")[0], k.split(".")[0]) + "." + k.split(".")[1]: v
            for k, v in theirs.state_dict().items()
        }
    )
    x, emb = torch.randn(2, 32, 8, 8, dtype=dtype), torch.randn(2, 48, dtype=dtype)
    assert gap(ours(x, emb), theirs(x, emb)) < tolerance


@pytest.mark.parametrize("dtype, tolerance", PRECISIONS)
@torch.no_grad()
def test_vae_equals_diffusers(dtype, tolerance):
    theirs = diffusers.AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 3,
        up_block_types=["UpDecoderBlock2D"] * 3,
        block_out_channels=(32, 64, 64),
        layers_per_block=2,
        latent_channels=4,
    )
    theirs = randomized(theirs, dtype)
    ours = VAE(VAEConfig(3, 4, (32, 64, 64), blocks=2), latent_scale=0.18215).to(dtype).eval()
    ours.load_state_dict(
        {**to_ours(theirs.state_dict(), VAE_DIFFUSERS), "latent_scale": ours.latent_scale}
    )
    x = torch.randn(2, 3, 32, 32, dtype=dtype)
    posterior = theirs.encode(x).latent_dist
    mean, log_variance = ours.posterior(x)
    assert gap(mean, posterior.mean) < tolerance
    assert gap(log_variance, posterior.logvar) < tolerance
    z = torch.randn(2, 4, 8, 8, dtype=dtype)
    assert gap(ours.decode(z * ours.latent_scale), theirs.decode(z).sample) < tolerance


@pytest.mark.parametrize("dtype, tolerance", PRECISIONS)
@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
@torch.no_grad()
def test_clip_equals_transformers(activation, dtype, tolerance):
    config = transformers.CLIPTextConfig(
        vocab_size=49408,
        hidden_size=32,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        hidden_act=activation,
    )
    theirs = randomized(transformers.CLIPTextModel(config), dtype)
    ours = CLIPText(TextConfig(32, layers=3, heads=4, activation=activation)).to(dtype).eval()
    named = {
        name.removeprefix("text_model."): value
        for name, value in theirs.state_dict().items()
        if "position_ids" not in name
    }
    ours.load_state_dict(to_ours(named, CLIP_TRANSFORMERS))
    tokens = ours.tokens(["a small blue circle above a large red square", ""])
    assert gap(ours(tokens), theirs(tokens).last_hidden_state) < tolerance


@torch.no_grad()
def test_clip_equals_open_clip_penultimate():
    """SD 2.x reads open_clip's text tower one block before its end, through the final LayerNorm."""
    open_clip = pytest.importorskip("open_clip")
    theirs = open_clip.transformer.TextTransformer(
        context_length=77, vocab_size=49408, width=32, heads=4, layers=3, output_dim=16
    )
    theirs = randomized(theirs, torch.float64)
    ours = (
        CLIPText(TextConfig(32, layers=2, heads=4, activation="gelu", pad=0))
        .to(torch.float64)
        .eval()
    )
    state = {}
    for name, tensor in theirs.state_dict().items():  # open_clip keeps q, k and v in one matrix
        block = (
            name.replace("transformer.resblocks.", "blocks.")
            .replace("ln_1", "norm1")
            .replace("ln_2", "norm2")
        )
        if "in_proj" in name:
            for which, part in zip("qkv", tensor.chunk(3), strict=True):
                state[block.replace("attn.in_proj_", f"attention.{which}.")] = part
        else:
            for before, after in {
                "attn.out_proj": "attention.out",
                "mlp.c_fc": "up",
                "mlp.c_proj": "down",
                "ln_final": "norm_out",
                "token_embedding.weight": "token_embedding.weight",
                "positional_embedding": "position_embedding.weight",
            }.items():
                block = block.replace(before, after)
            state[block] = tensor
    ours.load_state_dict({k: v for k, v in state.items() if k in ours.state_dict()})
    tokens = ours.tokens(["a photo of an astronaut"])
    assert torch.equal(tokens, open_clip.tokenize(["a photo of an astronaut"]))
    h = theirs.token_embedding(tokens) + theirs.positional_embedding
    for block in theirs.transformer.resblocks[:2]:
        h = block(h, attn_mask=theirs.attn_mask.to(h.dtype))
    assert gap(ours(tokens), theirs.ln_final(h)) < 1e-12
