"""The networks by themselves: sizes, shapes, starts, gradients, and the layers against their formulas. Against other people's code: parity/."""

import pytest
import torch
import torch.nn.functional as F

from minidiff.exercises import checks
from minidiff.exercises.models import randomize
from minidiff.layers import (
    Attention,
    ResBlock,
    SpatialTransformer,
    TransformerBlock,
)
from minidiff.text import clip_bigg14, clip_vit_l14, openclip_vit_h14
from minidiff.unet import (
    UNet,
    UNetConfig,
    unet_cifar10,
    unet_sd1,
    unet_sd2,
    unet_sdxl,
    unet_sdxl_refiner,
)
from minidiff.vae import VAE, Pixels, PixelsConfig, VAEConfig, vae_sd


def tiny_unet(**numbers):
    """Three levels, attention at two of them; groups of two channels, so that a group norm does not cancel the bias before it."""
    shape = dict(
        in_channels=4,
        out_channels=3,
        channels=(8, 16, 24),
        blocks=2,
        depth=(0, 2, 1),
        heads=(1, 2, 3),
        context_dim=6,
        groups=4,
    )
    return UNet(UNetConfig(**shape | numbers))


def tiny_vae(latent_scale=1.0, **numbers):
    shape = dict(in_channels=3, latent_channels=4, channels=(8, 16, 16), blocks=1, groups=4)
    return VAE(VAEConfig(**shape | numbers), latent_scale)


def count(build):
    with torch.device("meta"):  # shapes without numbers: no memory, no time
        return sum(p.numel() for p in build().parameters())


@pytest.mark.parametrize(
    "build, parameters",
    [
        (unet_sd1, 859_520_964),
        (
            lambda: unet_sd1(in_channels=9),
            859_520_964 + 5 * 9 * 320,
        ),  # inpainting: five more input channels of the first 3x3 convolution
        (unet_sd2, 865_910_724),
        (unet_sdxl, 2_567_463_684),
        (unet_sdxl_refiner, 2_259_526_660),
        (clip_bigg14, 694_659_840),
        (vae_sd, 83_653_863),
        (clip_vit_l14, 123_060_480),
        (openclip_vit_h14, 340_387_840),
        (unet_cifar10, 36_534_275),
    ],
    ids=[
        "sd1",
        "sd1-inpainting",
        "sd2",
        "sdxl",
        "sdxl-refiner",
        "bigg-14",
        "vae",
        "vit-l-14",
        "vit-h-14",
        "cifar10",
    ],
)
def test_parameter_counts(build, parameters):
    """The published checkpoints' counts. The latent scale is a buffer: it is not trained, and not counted."""
    assert count(build) == parameters


def test_cifar10_network_is_the_papers_but_for_its_attention():
    """DDPM says 35.7 M. Our attention is a transformer block (two projections and a LayerNorm more, q, k, v without bias); with DDPM's
    six blocks of GroupNorm and four 256 x 256 layers with bias in its place, the count is the paper's to the last parameter."""
    with torch.device("meta"):
        blocks = [m for m in unet_cifar10().modules() if isinstance(m, SpatialTransformer)]
        ours = sum(p.numel() for m in blocks for p in m.parameters())
    theirs = len(blocks) * (2 * 256 + 4 * (256 * 256 + 256))
    assert len(blocks) == 6 and count(unet_cifar10) - ours + theirs == 35_746_307


@torch.no_grad()
def test_shapes_through_stable_diffusions_unet():
    """Every level at 64 x 64 latents: what comes out of it, and what each decoder block takes in with its skip."""
    shapes = {}
    with torch.device("meta"):
        net = unet_sd1()
        for name, module in net.named_modules():
            module.register_forward_hook(
                lambda m, x, y, name=name: shapes.update({name: (x[0].shape[1:], y.shape[1:])})
            )
        out = net(torch.empty(2, 4, 64, 64), torch.empty(2), torch.empty(2, 77, 768))
    assert out.shape == (2, 4, 64, 64)
    assert [shapes[f"encoder.{i}.residual.1"][1] for i in range(4)] == [
        (320, 64, 64),
        (640, 32, 32),
        (1280, 16, 16),
        (1280, 8, 8),
    ]
    assert [shapes[f"encoder.{i}.resample"][1] for i in range(3)] == [
        (320, 32, 32),
        (640, 16, 16),
        (1280, 8, 8),
    ]
    assert shapes["middle.residual.1"][1] == (1280, 8, 8)
    taken = [[shapes[f"decoder.{i}.residual.{k}"][0] for k in range(3)] for i in range(4)]
    assert taken == [
        [(2560, 8, 8), (2560, 8, 8), (2560, 8, 8)],
        [(2560, 16, 16), (2560, 16, 16), (1920, 16, 16)],
        [(1920, 32, 32), (1280, 32, 32), (960, 32, 32)],
        [(960, 64, 64), (640, 64, 64), (640, 64, 64)],
    ]
    assert [shapes[f"decoder.{i}.resample"][1] for i in range(3)] == [
        (1280, 16, 16),
        (1280, 32, 32),
        (640, 64, 64),
    ]


@pytest.mark.parametrize("size", [(8, 8), (4, 12), (32, 16), (5, 7), (9, 6), (1, 3)])
def test_unet_keeps_the_size(size):
    net = randomize(tiny_unet())
    assert net.multiple == 4
    assert net(torch.randn(2, 4, *size), torch.tensor([1, 900]), torch.randn(2, 5, 6)).shape == (
        2,
        3,
        *size,
    )


def test_levels_must_agree():
    with pytest.raises(ValueError, match="3, 2 and 3 levels"):
        tiny_unet(depth=(0, 1))


def test_fresh_unet_answers_exactly_zero():
    assert (
        tiny_unet()(torch.randn(2, 4, 8, 8), torch.tensor([1, 900]), torch.randn(2, 5, 6)) == 0
    ).all()


def test_fresh_residual_branches_are_zero():
    """A fresh U-Net is its skips: residual blocks and transformers in it change nothing but the number of channels."""
    net = tiny_unet()
    for level in (*net.encoder, net.middle, *net.decoder):
        for module in (*level.residual, *level.attention):
            channels = (
                module.conv1.in_channels
                if isinstance(module, ResBlock)
                else module.norm.num_channels
            )
            x = torch.randn(1, channels, 4, 4)
            if isinstance(module, ResBlock):
                assert torch.equal(module(x, torch.randn(1, 32)), module.skip(x))
            else:
                assert torch.equal(module(x, torch.randn(1, 5, 6)), x)


@pytest.mark.parametrize(
    "numbers",
    [
        {},
        dict(linear_projection=True),
        dict(context_dim=None, ff_mult=0),
        dict(pooled=True),
        dict(groups=0),
    ],
    ids=["sd1", "sd2", "ddpm", "pooled", "no norms"],
)
def test_gradients_reach_every_unet_parameter(numbers):
    net = randomize(tiny_unet(**numbers)).double()
    context = torch.randn(2, 5, 6, dtype=torch.float64) if net.context_dim else None
    net(
        torch.randn(2, 4, 8, 8, dtype=torch.float64),
        torch.tensor([1.0, 900.0], dtype=torch.float64),
        context,
    ).pow(2).sum().backward()
    unreached = [
        name
        for name, p in net.named_parameters()
        if p.grad is None or not p.grad.abs().max() > 1e-9
    ]
    assert not unreached


def test_gradients_reach_every_vae_parameter():
    vae = randomize(tiny_vae()).double()
    vae.loss(torch.randn(2, 3, 8, 8, dtype=torch.float64)).sum().backward()
    unreached = [
        name
        for name, p in vae.named_parameters()
        if p.grad is None or not p.grad.abs().max() > 1e-9
    ]
    # one number added to every key adds the same to all of a query's scores, and softmax does not see it
    assert unreached == ["encoder.middle.attention.k.bias", "decoder.middle.attention.k.bias"]


def test_context_and_time_matter_to_the_unet():
    net, x, t, context = (
        randomize(tiny_unet()),
        torch.randn(1, 4, 8, 8),
        torch.tensor([500]),
        torch.randn(1, 5, 6),
    )
    out = net(x, t, context)
    assert (
        (net(x, t, context.flip(1)) - out).abs().max() < 1e-4 * out.abs().max()
    )  # without positions, the order of the vectors says nothing
    assert (net(x, t, torch.randn(1, 5, 6)) - out).abs().max() > 1e-2 * out.abs().max()
    assert (net(x, t + 1, context) - out).abs().max() > 1e-4 * out.abs().max()


def test_scale_shift_needs_a_time():
    with pytest.raises(ValueError, match="scale_shift needs a time_dim"):
        ResBlock(4, 4, groups=2, scale_shift=True)


@pytest.mark.parametrize("scale_shift", [False, True])
def test_pooled_context_joins_the_time_embedding(scale_shift):
    """The sum of the vectors is added: with attention's share of it gone, vectors of the same sum are the same context."""
    net = randomize(tiny_unet(pooled=True, scale_shift=scale_shift))
    x, t, context = torch.randn(1, 4, 8, 8), torch.tensor([500]), torch.randn(1, 5, 6)
    for level in (*net.encoder, net.middle, *net.decoder):
        for transformer in level.attention:
            torch.nn.init.zeros_(transformer.proj_out.weight)
    out, total = net(x, t, context), context.sum(1, keepdim=True)
    assert (net(x, t, total) - out).abs().max() < 1e-4 * out.abs().max()  # fp32
    assert (net(x, t, total + 1) - out).abs().max() > 1e-2 * out.abs().max()


def test_dropout_works_in_training_only():
    net, args = (
        randomize(tiny_unet(dropout=0.5)),
        (torch.randn(1, 4, 8, 8), torch.tensor([500]), torch.randn(1, 5, 6)),
    )
    assert not torch.equal(net(*args), net(*args))
    net.eval()
    assert torch.equal(net(*args), net(*args))


@torch.no_grad()
def test_channels_last_gives_the_same():
    net, vae = randomize(tiny_unet()).double(), randomize(tiny_vae()).double()
    x, t, context = (
        torch.randn(2, 4, 8, 8, dtype=torch.float64),
        torch.tensor([1, 900]),
        torch.randn(2, 5, 6, dtype=torch.float64),
    )
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    expected, latents, pictures = net(x, t, context), vae.encode(images), vae.decode(x)
    net, vae = net.to(memory_format=torch.channels_last), vae.to(memory_format=torch.channels_last)
    x, images = (
        x.to(memory_format=torch.channels_last),
        images.to(memory_format=torch.channels_last),
    )
    for found, before in (
        (net(x, t, context), expected),
        (vae.encode(images), latents),
        (vae.decode(x), pictures),
    ):
        torch.testing.assert_close(found, before, rtol=0, atol=1e-11 * before.abs().max().item())


test_vae_shapes_and_latent_scale = checks.vae_shapes_and_latent_scale
test_vae_loss_equals_its_formula = checks.vae_loss_equals_its_formula


@torch.no_grad()
def test_measured_scale_gives_latents_of_unit_variance():
    vae, images = randomize(tiny_vae()), torch.rand(4, 3, 16, 16) * 2 - 1
    assert abs(vae.encode(images).std() - 1) > 0.1
    scale = vae.measure_scale(images)
    assert abs(vae.encode(images).std() - 1) < 1e-5  # fp32
    assert vae.latent_scale.item() == scale == vae.state_dict()["latent_scale"].item()


@torch.no_grad()
def test_kl_of_the_standard_normal_is_zero():
    vaes = [randomize(tiny_vae(kl_weight=w)) for w in (0.0, 1e6)]
    vaes[1].load_state_dict(vaes[0].state_dict())
    losses = []
    for vae in vaes:
        vae.quant.weight.zero_()  # mean 0 and log-variance 0, whatever the picture
        vae.quant.bias.zero_()
        torch.manual_seed(1)
        losses.append(vae.loss(torch.ones(2, 3, 8, 8)))
    assert torch.equal(*losses)


def test_pixels_are_left_alone():
    pixels, images = Pixels(PixelsConfig(1)), torch.randn(2, 1, 5, 7)
    assert pixels.encode(images) is images and pixels.decode(images) is images
    assert (pixels.latent_channels, pixels.factor, list(pixels.parameters())) == (1, 1, [])


test_timestep_embedding_formula = checks.timestep_embedding_formula
test_geglu_formula = checks.geglu_formula


@pytest.mark.parametrize(
    "heads, causal, cross",
    [(1, False, False), (3, False, False), (3, True, False), (3, False, True)],
)
def test_attention_equals_its_formula(heads, causal, cross):
    checks.attention_equals_its_formula(heads, causal, cross)


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match="5 heads do not divide a width of 12"):
        Attention(12, 5)


def test_scale_shift_formula():
    """AdaGN, Dhariwal & Nichol section 3: GroupNorm(h) (1 + scale) + shift, both from time, which
    gives scale first; so time that says nothing changes nothing."""
    block = ResBlock(4, 6, time_dim=5, groups=2, scale_shift=True).double()
    x, emb = torch.randn(2, 4, 8, 8).double(), torch.randn(2, 5).double()
    scale, shift = block.time(F.silu(emb))[:, :, None, None].split(6, dim=1)
    h = block.norm2(block.conv1(F.silu(block.norm1(x)))) * (1 + scale) + shift
    expected = block.skip(x) + block.conv2(F.silu(h))
    torch.testing.assert_close(block(x, emb), expected, rtol=0, atol=1e-12)


def test_published_small_numbers():
    """Stable Diffusion's: GroupNorm's eps is 1e-5 in residual blocks and 1e-6 in transformers, of 32
    groups, and latents are scaled by 0.18215."""
    block, transformer = ResBlock(32, 32), SpatialTransformer(32, 2, None)
    assert [norm.eps for norm in (block.norm1, block.norm2, transformer.norm)] == [1e-5, 1e-5, 1e-6]
    assert [norm.num_groups for norm in (block.norm1, block.norm2, transformer.norm)] == [32] * 3
    assert vae_sd().latent_scale.item() == pytest.approx(0.18215, rel=1e-6)  # float32


def test_transformer_block_without_its_optional_parts():
    names = {
        name.split(".")[0]
        for name, _ in TransformerBlock(8, 2, context_dim=None, ff_mult=0).named_parameters()
    }
    assert names == {"norm1", "self_attention"}


@pytest.mark.parametrize("build", [tiny_unet, tiny_vae])
def test_group_norms_can_be_left_out(build):
    """groups = 0, in every part of a network; nothing but the norms is gone."""
    without, with_norms = (
        {
            name
            for name, m in build(groups=groups).named_modules()
            if isinstance(m, torch.nn.GroupNorm)
        }
        for groups in (0, 4)
    )
    assert not without and with_norms
    assert {
        name.rsplit(".", 1)[0]
        for name in build().state_dict().keys() - build(groups=0).state_dict().keys()
    } == with_norms


def test_unet_refuses_what_it_cannot_do():
    numbers = dict(channels=(8, 8), blocks=1, depth=(0, 1), heads=(1, 1), groups=4)
    with_text, without = (
        UNet(UNetConfig(3, 3, context_dim=8, **numbers)),
        UNet(UNetConfig(3, 3, **numbers)),
    )
    x, t, context = torch.zeros(1, 3, 8, 8), torch.zeros(1), torch.zeros(1, 2, 8)
    with pytest.raises(ValueError, match="needs a context"):
        with_text(x, t)
    with pytest.raises(ValueError, match="takes no context"):
        without(x, t, context)
    with pytest.raises(ValueError, match="pooled"):
        UNet(UNetConfig(3, 3, pooled=True, **numbers))


def test_pooled_context_reaches_blocks_without_attention():
    unet = UNet(
        UNetConfig(
            3,
            3,
            channels=(8, 8),
            blocks=1,
            depth=(0, 0),
            heads=(1, 1),
            context_dim=8,
            groups=4,
            pooled=True,
        )
    )
    for p in unet.parameters():  # the branches that start at zero would hide it
        torch.nn.init.normal_(p, std=0.2)
    for p in unet.middle.attention.parameters():
        torch.nn.init.zeros_(p)
    x, t = torch.randn(1, 3, 8, 8), torch.ones(1)
    assert not torch.allclose(unet(x, t, torch.zeros(1, 2, 8)), unet(x, t, torch.ones(1, 2, 8)))
