"""On a CUDA device: the same images as on the CPU, from a generator on either. Run with `pytest -m gpu tests/gpu`."""

import copy
import sys
from pathlib import Path

import pytest
import torch

from minidiff import pipeline, schedules
from minidiff.data.folder import load_picture
from minidiff.denoiser import Denoiser
from minidiff.latent_diffusion import LatentDiffusion
from minidiff.options.sampling import SampleConfig
from minidiff.samplers import SAMPLERS, Normal, by_name, sample
from minidiff.text import Unconditional
from minidiff.vae import Pixels, PixelsConfig

from ..test_latent_diffusion import PROMPTS, model

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
TOLERANCE = 1e-3  # of the largest value: fp32 sums in another order, through a few steps


@pytest.fixture(autouse=True)
def precise():
    """Convolutions in fp32, as matrix products are by default, not in TF32's 10 bits."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_with_a_generator_there(sampler):
    """Against the CPU's float64, with the same noise."""
    small = model(target="v")
    exact = copy.deepcopy(small).double()
    small.to(DEVICE)

    def generator():
        return torch.Generator(DEVICE).manual_seed(0)

    noise = Normal.split(generator(), 2)
    x_T = noise(torch.empty(2, 4, 8, 8)).double()
    denoise = exact.guided(PROMPTS, SampleConfig())
    chain = sample(
        denoise,
        exact.schedule,
        x_T,
        4,
        by_name(sampler),
        noise=lambda x: noise(x.float()).double(),
    )
    *_, found = small.sample(PROMPTS, 4, generator=generator(), step=by_name(sampler))
    *_, expected = chain
    assert found.x.device.type == DEVICE and found.x.isfinite().all()
    assert (found.x.cpu() - expected.x).abs().max() < TOLERANCE * expected.x.abs().max()


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_seed_is_an_image_on_every_device(sampler):
    small, config = model(target="v"), SampleConfig(4, sampler=sampler, seed=3)
    expected = pipeline.generate(small, PROMPTS, config)
    found = pipeline.generate(small.to(DEVICE), PROMPTS, config)
    assert (found.cpu() - expected).abs().max() < 2 / 255


def test_cifar_ddpm_draws(monkeypatch, tmp_path):
    """The experiment's own call, with the sampler of the paper: ancestral steps, each with new noise."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "experiments")
    sys.modules.pop("cifar_ddpm", None)
    import cifar_ddpm

    preset = cifar_ddpm.PRESETS["paper"]
    unet = cifar_ddpm.unet_tiny(None)
    torch.nn.init.normal_(unet.conv_out.weight, std=0.1)
    tiny = LatentDiffusion(
        Pixels(PixelsConfig(3)),
        Unconditional(),
        Denoiser(unet, preset.schedule, preset.target),
        size=32,
        guidance=preset.guidance,
        sampler=preset.sampler,
    ).eval()
    for device in ("cpu", DEVICE):
        (tmp_path / device).mkdir(exist_ok=True)
        cifar_ddpm.draw(tiny.to(device), preset, 2, 5, 0, tmp_path / device)
    expected, found = (load_picture(tmp_path / d / "samples.png").int() for d in ("cpu", DEVICE))
    assert expected.float().std() > 10 and (found - expected).abs().max() <= 2


@pytest.mark.parametrize(
    "schedule", [schedules.cosine(), schedules.Flow(), schedules.Karras()], ids=["d", "f", "k"]
)
def test_times_may_be_there(schedule):
    """Scales come back on the CPU, in float64; what the network is shown stays where the times are."""
    t = schedule.sample_t(5, torch.Generator(DEVICE).manual_seed(0))
    assert t.device.type == "cpu"
    there = t.to(DEVICE)
    pairs = [
        (schedule.snr(there), schedule.snr(t)),
        (schedule.progress(there), schedule.progress(t)),
        *zip(schedule.alpha_sigma(there), schedule.alpha_sigma(t), strict=True),
    ]
    for found, expected in pairs:
        assert found.device.type == "cpu" and torch.equal(found, expected)
    assert schedule.c_noise(there).device.type == DEVICE
    x = torch.randn(5, 3, device=DEVICE)
    torch.testing.assert_close(
        schedule.mix(x, x, there).cpu(), schedule.mix(x.cpu(), x.cpu(), t), rtol=1e-6, atol=1e-6
    )
