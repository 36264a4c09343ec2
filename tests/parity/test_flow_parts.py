"""The VAE of SD3 and FLUX.1, and their schedules, against diffusers'."""

import dataclasses
import math

import pytest
import torch

import minidiff
from minidiff import schedules
from minidiff.checkpoints import folder, layouts, names, write
from minidiff.checkpoints.files import Stored, tensors
from minidiff.conditioners import Unconditional
from minidiff.denoiser import Denoiser
from minidiff.latent_diffusion import LatentDiffusion
from minidiff.options.sampling import SampleConfig, Size
from minidiff.samplers import SAMPLERS
from minidiff.unet import UNet, UNetConfig
from minidiff.vae import VAE, VAEConfig, vae_flow

from .test_mmdit import shapes
from .test_networks import gap, randomized

diffusers = pytest.importorskip("diffusers")
F64 = torch.float64
FLAGS = dict(use_quant_conv=False, use_post_quant_conv=False, latent_channels=16)
SCALES = {"sd3": (1.5305, 0.0609), "flux": (0.3611, 0.1159)}
BLOCKS = dict(
    down_block_types=["DownEncoderBlock2D"] * 4,
    up_block_types=["UpDecoderBlock2D"] * 4,
    layers_per_block=2,
)


def tiny_vae(scale, shift):
    """Diffusers' and ours."""
    theirs = diffusers.AutoencoderKL(
        **FLAGS | BLOCKS,
        block_out_channels=(32, 32, 64, 64),
        scaling_factor=scale,
        shift_factor=shift,
    )
    theirs = randomized(theirs, F64)
    config = VAEConfig(3, 16, (32, 32, 64, 64), quant=False, latent_shift=shift)
    ours = VAE(config, latent_scale=scale).double().eval()
    state = names.to_ours(theirs.state_dict(), names.VAE_DIFFUSERS)
    ours.load_state_dict(state | {"latent_scale": torch.tensor(scale, dtype=F64)})
    return theirs, ours


@torch.no_grad()
@pytest.mark.parametrize("scale, shift", SCALES.values(), ids=SCALES)
def test_vae_equals_diffusers(scale, shift):
    theirs, ours = tiny_vae(scale, shift)
    x, z = torch.randn(2, 3, 32, 32, dtype=F64), torch.randn(2, 16, 4, 4, dtype=F64)
    latents = (theirs.encode(x).latent_dist.mean - shift) * scale
    assert gap(ours.encode(x), latents) < 1e-12
    images = theirs.decode(z / scale + shift).sample
    assert gap(ours.decode(z), images) < 1e-12
    forgotten = VAE(dataclasses.replace(ours.config, latent_shift=0.0)).double()
    forgotten.load_state_dict(ours.state_dict())
    assert gap(forgotten.encode(x), latents) > 0.01
    assert gap(forgotten.decode(z), images) > 1e-3


def test_vae_at_its_true_size_in_both_layouts():
    with torch.device("meta"), folder.Uninitialized():
        ours = vae_flow(*SCALES["sd3"])
        theirs = diffusers.AutoencoderKL(
            **FLAGS | BLOCKS, block_out_channels=(128, 256, 512, 512)
        ).state_dict()
    state = {name: v for name, v in ours.state_dict().items() if name != "latent_scale"}
    assert round(sum(v.numel() for v in state.values()) / 1e6, 2) == 83.82
    assert shapes(names.to_published(state, names.VAE_DIFFUSERS)) == shapes(theirs)
    single = names.to_published(state, names.vae_compvis())
    for published, table in ((theirs, names.VAE_DIFFUSERS), (single, names.vae_compvis())):
        stored = {name: Stored("F16", tuple(value.shape)) for name, value in published.items()}
        part = layouts.vae(stored, "x", table)
        assert shapes(part.state) == shapes(state)
        assert VAEConfig(**part.config) == dataclasses.replace(ours.config, latent_shift=0.0)


@torch.no_grad()
def test_vae_folders_of_diffusers_and_ours_keep_it(tmp_path):
    theirs, ours = tiny_vae(*SCALES["flux"])
    theirs.float().save_pretrained(tmp_path / "vae")
    part = layouts.part_folder(tmp_path / "vae", "vae", tensors)
    assert (part.latent_scale, VAEConfig(**part.config)) == (0.3611, ours.config)
    unet = UNet(UNetConfig(16, 16, (32,), 1, (0,), (1,)))
    schedule = schedules.Flow(mu=(0.5, 1.15))
    model = LatentDiffusion(
        ours.float(), Unconditional(), Denoiser(unet, schedule, "flow"), size=64
    )
    back = minidiff.load(model.save(tmp_path / "ours"))
    x = torch.randn(1, 3, 32, 32)
    assert back.vae.config == ours.config and back.schedule == schedule
    assert torch.equal(back.vae.encode(x), model.vae.encode(x))
    settings = write.vae_config(model)
    assert (settings["shift_factor"], settings["use_quant_conv"]) == (0.1159, False)
    assert diffusers.AutoencoderKL.from_config(settings).config.shift_factor == 0.1159


def times_of_diffusers(steps, mu=None, **settings):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**settings)
    sigmas = None if mu is None else torch.linspace(1, 1 / steps, steps).tolist()
    scheduler.set_timesteps(steps, sigmas=sigmas, mu=mu)
    return scheduler.sigmas.double()


@pytest.mark.parametrize("steps", [1, 4, 10, 28])
def test_sd3_times_equal_diffusers(steps):
    ours = schedules.Flow(shift=3.0).timesteps(steps, "shifted")
    theirs = times_of_diffusers(steps, shift=3.0)
    torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=1e-7)


def test_sd3_times_as_published():
    ours = schedules.Flow(shift=3.0).timesteps(10, "shifted")
    listed = [1, 0.960, 0.913, 0.858, 0.790, 0.707, 0.602, 0.465, 0.278, 0.0089, 0]
    torch.testing.assert_close(ours, torch.tensor(listed, dtype=F64), rtol=0, atol=5e-4)
    # the trap: one shift alone
    assert (schedules.Flow(shift=3.0).timesteps(10) - ours).abs().max() > 0.2


@pytest.mark.parametrize("steps", [4, 20])
@pytest.mark.parametrize("height, width", [(256, 256), (768, 1360), (1024, 1024), (2048, 512)])
def test_flux_times_equal_diffusers(height, width, steps):
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    tokens = (height // 16) * (width // 16)
    theirs = times_of_diffusers(steps, calculate_shift(tokens), use_dynamic_shifting=True)
    ours = schedules.Flow(mu=(0.5, 1.15)).for_tokens(tokens).timesteps(steps)
    torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=1e-7)
    schnell = times_of_diffusers(steps, shift=1.0)
    if steps == 4:  # schnell's four steps; its pipeline gives them as sigmas
        sigmas = torch.linspace(1, 1 / steps, steps)
        torch.testing.assert_close(schedules.Flow().timesteps(steps)[:-1].float(), sigmas)
        assert len(schnell) == 5


def test_the_size_of_the_picture_decides_the_times():
    """Of FLUX.1-dev alone: through LatentDiffusion, by the config's size, or x_T's."""
    unet = UNet(UNetConfig(16, 16, (32, 32), 1, (0, 0), (1, 1)))  # halves once: patches of 2
    vae = VAE(VAEConfig(3, 16, (32, 32, 32, 32), quant=False))
    flow = schedules.Flow(mu=(0.5, 1.15))
    model = LatentDiffusion(vae, Unconditional(), Denoiser(unet, flow, "flow"), size=256)
    step = SAMPLERS["euler"]
    for config, tokens in ((SampleConfig(), 256), (SampleConfig(size=Size(1024, 512)), 2048)):
        shift = math.exp(0.5 + 0.65 * (tokens - 256) / 3840)
        expected = schedules.Flow(shift=shift).timesteps(25)
        assert torch.equal(model.times(step, config), expected)
    first, *_ = model.sample([""], 1, x_T=torch.zeros(1, 16, 128, 64))
    assert first.t == 1
    assert torch.equal(model.times(step, SampleConfig(), sides=(128, 64)), expected)
    model.denoiser.schedule = schedules.Flow(shift=2.0)
    assert torch.equal(model.times(step, config), schedules.Flow(shift=2.0).timesteps(25))


def test_training_times_of_diffusers_sd3_script():
    """Shifting logit-normal times by 3 moves their mean by log 3: logit(shifted t) = logit(t) + log 3."""
    generators = [torch.Generator().manual_seed(0) for _ in range(2)]
    plain = schedules.Flow().sample_t(1000, generators[0])
    moved = schedules.Flow(mean=math.log(3)).sample_t(1000, generators[1])
    torch.testing.assert_close(moved, 3 * plain / (1 + 2 * plain))
