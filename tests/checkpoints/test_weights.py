"""Checkpoint names and sizes: every tensor of the true layouts has its place, in both directions. On the meta device, which holds no numbers."""

from dataclasses import asdict

import pytest
import torch

import minidiff
from minidiff.checkpoints import names, sizes
from minidiff.checkpoints.inspect import COMPLETE, _differences, _hash
from minidiff.checkpoints.layouts import Part
from minidiff.conditioners import clip_sdxl
from minidiff.errors import UserError
from minidiff.text import clip_bigg14, clip_vit_l14, openclip_vit_h14
from minidiff.unet import UNet, UNetConfig, unet_sd1, unet_sd2, unet_sdxl, unet_sdxl_refiner
from minidiff.vae import vae_sd


def state(build):
    with torch.device("meta"):
        return {
            name: value for name, value in build().state_dict().items() if name != "latent_scale"
        }


def shapes(build):
    return {name: tuple(value.shape) for name, value in state(build).items()}


def pruned():
    """As BK-SDM-Tiny: three levels, one residual block each, no middle."""
    return UNet(UNetConfig(4, 4, (32, 64, 64), 1, (1, 1, 1), (8, 8, 8), 16, middle=False))


@pytest.mark.parametrize(
    "build, table, count",
    [
        (unet_sd1, names.UNET_DIFFUSERS, 686),
        (unet_sd1, names.unet_compvis(), 686),
        (unet_sd2, names.unet_compvis(), 686),
        (unet_sdxl, names.UNET_DIFFUSERS, 1680),
        (unet_sdxl, names.unet_compvis((False, True, True)), 1680),
        (unet_sdxl_refiner, names.UNET_DIFFUSERS, 1220),
        (unet_sdxl_refiner, names.unet_compvis((False, True, True, False)), 1220),
        (clip_bigg14, names.CLIP_TRANSFORMERS, 517),
        (vae_sd, names.VAE_DIFFUSERS, 248),
        (vae_sd, names.vae_compvis(), 248),
        (clip_vit_l14, names.CLIP_TRANSFORMERS, 196),
    ],
)
def test_tables_read_both_ways(build, table, count):
    ours = state(build)
    published = names.to_published(ours, table)
    assert len(published) == len(ours) == count
    back = names.to_ours(published, table)
    assert list(back) == list(ours) and all(back[name] is ours[name] for name in ours)


@pytest.mark.parametrize(
    "build",
    [
        *(unet_sd1, unet_sd2, unet_sdxl, unet_sdxl_refiner, vae_sd),
        *(clip_vit_l14, openclip_vit_h14, clip_sdxl),
    ],
)
def test_published_networks_are_known_to_be_complete_by_their_names(build):
    whole = state(build)
    assert _hash(whole) in COMPLETE.values()
    assert _hash(list(whole)[1:]) not in COMPLETE.values()


@pytest.mark.parametrize(
    "build, name", [(pruned, "unet"), (unet_sd2, "unet"), (vae_sd, "vae"), (clip_vit_l14, "text")]
)
def test_missing_and_extra_tensors_are_named(build, name):
    read = {"unet": sizes.unet_config, "vae": sizes.vae_config, "text": sizes.text_config}[name]
    whole = state(build)
    assert _differences(name, Part(whole, read(shapes(build)), "file")) == ([], [])
    lost = next(key for key in whole if key.endswith("bias"))
    changed = {key: value for key, value in whole.items() if key != lost} | {"more.bias": None}
    assert _differences(name, Part(changed, read(shapes(build)), "file")) == ([lost], ["more.bias"])


def test_two_tensors_with_one_name_are_named():
    with pytest.raises(
        UserError,
        match=r'"mid_block.resnets.0.skip" and "mid_block.resnets.0.conv_shortcut" both mean "middle.residual.0.skip"',
    ):
        names.to_ours(
            {"mid_block.resnets.0.conv_shortcut": 1, "mid_block.resnets.0.skip": 2},
            names.UNET_DIFFUSERS,
        )


@pytest.mark.parametrize(
    "build", [unet_sd1, lambda: unet_sd1(9), unet_sd2, pruned, unet_sdxl, unet_sdxl_refiner]
)
def test_unet_configs_come_back_from_shapes(build):
    with torch.device("meta"):
        expected = asdict(build().config)
    found = sizes.unet_config(shapes(build))
    assert found == {
        name: tuple(v) if isinstance(v, list) else v
        for name, v in expected.items()
        if name in found
    }


def test_vae_and_text_configs_come_back_from_shapes():
    for build, read in (
        (vae_sd, sizes.vae_config),
        (clip_vit_l14, sizes.text_config),
        (openclip_vit_h14, sizes.text_config),
        (clip_bigg14, sizes.text_config),
    ):
        with torch.device("meta"):
            expected = asdict(build().config)
        found = read(shapes(build))
        assert found == {name: value for name, value in expected.items() if name in found}


def test_what_cannot_be_read_is_named():
    some = shapes(lambda: UNet(UNetConfig(4, 4, (8, 8), 1, (1, 1), (1, 1), 8, groups=4)))
    sizes.unet_config(some)
    with pytest.raises(UserError, match=r'tensor "conv_in.weight" is missing'):
        sizes.unet_config({k: v for k, v in some.items() if k != "conv_in.weight"})
    with pytest.raises(UserError, match=r'"conv_in.weight" has shape \[8\]; it should have 4 axes'):
        sizes.unet_config({**some, "conv_in.weight": (8,)})
    with pytest.raises(UserError, match=r'"encoder" is numbered \[1\]'):
        sizes.unet_config({k: v for k, v in some.items() if not k.startswith("encoder.0")})


def test_a_scale_that_is_stored_in_half_precision_can_be_measured_anew():
    vae = minidiff.load().vae  # its weights are stored in float16
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    exact = 1 / vae.posterior(images)[0].std().item()
    assert vae.measure_scale(images) == pytest.approx(exact, rel=1e-6)
