"""On a CUDA device: the same images, losses and gradients as on the CPU in float64.

Run with `pytest -m gpu tests/gpu`. MINIDIFF_TEST_DEVICE=cpu tries this file out without a GPU.
"""

import copy
import dataclasses
import os
import sys
from pathlib import Path

import pytest
import torch

from minidiff import pipeline, schedules
from minidiff.conditioners import Unconditional
from minidiff.data.folder import load_image
from minidiff.data.latents import Example
from minidiff.ddpm import DDPM
from minidiff.denoiser import Denoiser
from minidiff.finetuning.estimate import Settings, estimate
from minidiff.finetuning.groups import Group, GroupLoss, Part
from minidiff.finetuning.loop import finetune
from minidiff.latent_diffusion import LatentDiffusion
from minidiff.methods import lora
from minidiff.options.finetuning import FineTuneConfig
from minidiff.options.sampling import SampleConfig
from minidiff.samplers import SAMPLERS, Normal, by_name, sample
from minidiff.train import EMA, TrainConfig, train
from minidiff.training.waits import synchronisations
from minidiff.vae import Pixels, PixelsConfig

from ..test_latent_diffusion import PROMPTS, model

pytestmark = pytest.mark.gpu
DEVICE = os.environ.get("MINIDIFF_TEST_DEVICE", "cuda")
TOLERANCE = 1e-3  # of the largest value: fp32 sums in another order, through a few steps


def there() -> str:
    return torch.device(DEVICE).type


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
    assert found.x.device.type == there() and found.x.isfinite().all()
    assert (found.x.cpu() - expected.x).abs().max() < TOLERANCE * expected.x.abs().max()


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_seed_is_an_image_on_every_device(sampler):
    small, config = model(target="v"), SampleConfig(4, sampler=sampler, seed=3)
    expected = pipeline.generate(small, PROMPTS, config)
    found = pipeline.generate(small.to(DEVICE), PROMPTS, config)
    assert (found.cpu() - expected).abs().max() < 2 / 255


def test_cifar_ddpm_draws(monkeypatch, tmp_path):
    """The experiment's own call, with the paper's own chain, each step with new noise; of 5 steps."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "experiments")
    sys.modules.pop("cifar_ddpm", None)
    import cifar_ddpm
    import cifar_recipes

    short = schedules.Discrete("linear", T=5, beta_1=0.1, beta_T=0.5)
    paper = cifar_recipes.PRESETS["paper"]
    preset = dataclasses.replace(paper, chain=DDPM(5, 0.1, 0.5), schedule=short)
    unet = cifar_recipes.unet_tiny(None)
    torch.nn.init.normal_(unet.conv_out.weight, std=0.1)
    tiny = LatentDiffusion(
        Pixels(PixelsConfig(3)),
        Unconditional(),
        Denoiser(unet, preset.schedule, preset.target),
        size=32,
    ).eval()
    for device in ("cpu", DEVICE):
        (tmp_path / device).mkdir(exist_ok=True)
        cifar_ddpm.draw(tiny.to(device), preset, 2, 5, 0, tmp_path / device)
        x0 = torch.rand(2, 3, 32, 32) * 2 - 1
        assert cifar_ddpm.loss(tiny, preset.chain, (x0, ["", ""]))["loss"].isfinite().all()
    expected, found = (load_image(tmp_path / d / "samples.png").int() for d in ("cpu", DEVICE))
    assert expected.float().std() > 10 and (found - expected).abs().max() <= 2


@pytest.mark.parametrize(
    "schedule", [schedules.cosine(), schedules.Flow(), schedules.Karras()], ids=["d", "f", "k"]
)
def test_times_may_be_there(schedule):
    """Scales come back on the CPU, in float64; what the network is shown stays where the times are."""
    t = schedule.sample_t(5, torch.Generator(DEVICE).manual_seed(0))
    assert t.device.type == "cpu"
    moved = t.to(DEVICE)
    pairs = [
        (schedule.snr(moved), schedule.snr(t)),
        (schedule.progress(moved), schedule.progress(t)),
        *zip(schedule.alpha_sigma(moved), schedule.alpha_sigma(t), strict=True),
    ]
    for found, expected in pairs:
        assert found.device.type == "cpu" and torch.equal(found, expected)
    assert schedule.c_noise(moved).device.type == there()
    x = torch.randn(5, 3, device=DEVICE)
    torch.testing.assert_close(
        schedule.mix(x, x, moved).cpu(), schedule.mix(x.cpu(), x.cpu(), t), rtol=1e-6, atol=1e-6
    )


def part(batch=4, seed=0, dtype=torch.float32):
    """Latents on the CPU with everything random about them."""
    generator = torch.Generator().manual_seed(seed)
    latents, eps = torch.randn(2, batch, 4, 8, 8, generator=generator).to(dtype)
    t = torch.randint(1, 1001, (batch,), generator=generator)
    return [Part("training", 1.0, latents, (PROMPTS * batch)[:batch], t, eps)]


def close(found, expected, tolerance=TOLERANCE):
    """Relative to the largest number."""
    error = (found.detach().cpu().double() - expected.detach()).abs().max()
    assert error <= tolerance * expected.abs().max(), (error, expected.abs().max())


def both(small):
    """The model in float64 on the CPU, and itself on the device."""
    exact = copy.deepcopy(small).double()
    return exact, small.to(DEVICE)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("text", [False, True])
def test_a_training_step(text, checkpointing):
    """Its loss, and the gradient of every weight."""
    exact, small = both(model())
    for each, dtype in ((exact, torch.float64), (small, torch.float32)):
        each.vae.requires_grad_(False)
        each.text.requires_grad_(text)
        each.unet.checkpointing = each.text.checkpointing = checkpointing
        each.losses = GroupLoss(each)(part(dtype=dtype))["loss"]
        each.losses.mean().backward()
    close(small.losses, exact.losses)
    pairs = list(zip(small.named_parameters(), exact.parameters(), strict=True))
    assert any(name.startswith("text") and p.grad is not None for (name, p), _ in pairs) == text
    largest = max(p.grad.abs().max() for _, p in pairs if p.grad is not None)
    for (name, found), expected in pairs:
        assert (found.grad is None) == (expected.grad is None), name
        if found.grad is not None:
            error = (found.grad.cpu().double() - expected.grad).abs().max()
            assert error <= TOLERANCE * max(expected.grad.abs().max(), 1e-2 * largest), name


def trained(small, folder=None, steps=4, resume=False, autocast=None, stop=None):
    """Steps of the loop on batches that follow from their number."""
    small.vae.requires_grad_(False)
    small.text.requires_grad_(False)
    average = EMA(small.denoiser, 0.9)
    config = TrainConfig(steps, 1e-2, warmup=1, autocast=autocast, save_every=1)
    loss = GroupLoss(small)

    def batches(start):
        return (part(seed=k) for k in range(start, 100))

    done = []
    running = train(loss, small.denoiser, batches, config, average, folder, resume)
    for step in running:
        done.append(step)
        if step.step == stop:
            break
    running.close()
    return done, average


def test_the_loop_and_its_average():
    small = model().to(DEVICE)
    ours, average = trained(small)
    done, _ = trained(model())  # the same in float32, on the CPU
    for step, expected in zip(ours, done, strict=True):
        assert step.loss == pytest.approx(expected.loss, rel=1e-2)
    assert next(average.average.parameters()).device.type == there()
    assert all(p.isfinite().all() for p in average.average.parameters())


def test_a_step_waits_once():
    """The loop reads its numbers together; sampling reads nothing before the image."""
    small = model().to(DEVICE)
    trained(small, steps=1)
    with synchronisations(DEVICE) as places:
        trained(small, steps=4)
    assert places.total() <= 4, places
    frames = small.sample(PROMPTS, 3, generator=Normal.seeded(0, range(len(PROMPTS))))
    with synchronisations(DEVICE) as places:
        list(frames)
    assert not places


def test_a_resumed_run_ends_where_an_uninterrupted_one_does(tmp_path):
    """Without kernels that add in any order, bit for bit."""
    kernels = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
    deterministic = torch.backends.cudnn.flags(deterministic=True, allow_tf32=False)
    with kernels, deterministic:
        whole, halves = model().to(DEVICE), model().to(DEVICE)
        _, average = trained(whole, tmp_path / "whole")
        trained(halves, tmp_path / "halves", stop=2)
        again = model().to(DEVICE)
        done, resumed = trained(again, tmp_path / "halves", resume=True)
    assert [step.step for step in done] == [2, 3, 4]
    for pair in ((whole.unet, again.unet), (average.average, resumed.average)):
        for a, b in zip(*(each.parameters() for each in pair), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    """The weights stay in float32; the loss is that of the dtype's few digits."""
    exact, small = both(model())
    (step,), _ = trained(small, steps=1, autocast=dtype)
    expected = GroupLoss(exact)(part(dtype=torch.float64))["loss"].mean().item()
    assert step.loss == pytest.approx(expected, rel=3e-2)
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in small.parameters())


def test_lora():
    """Beside the weights, merged into them, and trained."""
    small = model()
    lora.add(small.unet, 2)
    for layer in lora.adapted(small).values():
        torch.nn.init.normal_(layer.lora.B, std=0.3)
    exact, small = both(small)
    x, t, context = torch.randn(2, 4, 8, 8), torch.tensor([3.0, 500.0]), torch.randn(2, 10, 8)
    expected = exact.unet(x.double(), t.double(), context.double())
    inputs = [each.to(DEVICE) for each in (x, t, context)]
    close(small.unet(*inputs), expected)
    lora.merge(small.unet)
    close(small.unet(*inputs), expected)
    lora.unmerge(small.unet)
    lora.remove(small.unet)
    lora.add(small.unet, 2)
    new = next(iter(lora.adapted(small).values())).lora
    assert new.A.device.type == new.B.device.type == there()


@pytest.mark.parametrize(
    "method, dtype, loaded",
    [
        ("full", "fp32", torch.float32),
        ("lora", "bf16", torch.float32),
        ("lora", "bf16", torch.bfloat16),
        ("lora", "fp16", torch.float16),
    ],
)
def test_a_fine_tune_with_its_folder(method, dtype, loaded, tmp_path):
    small = model().to(DEVICE, loaded)
    latents = part(6)[0].latents
    examples = [Example(z, PROMPTS[k % 2]) for k, z in enumerate(latents)]
    config = FineTuneConfig(method=method, steps=2, batch=2, dtype=dtype, every=1, ema=0.9)
    finetune(small, [Group("training", examples)], tmp_path, config)
    name = {"full": "model/model.json", "lora": "lora.safetensors"}[method]
    assert (tmp_path / name).exists()
    assert all(p.isfinite().all() for p in small.parameters())


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 0.2), (torch.float16, 0.03)])
def test_models_of_few_digits(dtype, tolerance):
    """A whole chain of DDIM, and the decoded images, finite and near float64's."""
    exact, small = both(model(target="v"))
    small.to(dtype)
    config = SampleConfig(4, seed=3)
    (*_, expected), (*_, found) = (each.sample(PROMPTS, config=config) for each in (exact, small))
    close(found.x0, expected.x0.double(), tolerance)
    assert small.decode(found.x0).isfinite().all()


def test_vae_and_text():
    exact, small = both(model())
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    latents = exact.vae.encode(images.double())
    close(small.vae.encode(images.to(DEVICE)), latents)
    close(small.vae.decode(latents.float().to(DEVICE)), exact.vae.decode(latents))
    close(small.text.encode(PROMPTS), exact.text.encode(PROMPTS))


def test_generators_give_one_noise_on_every_device():
    like = torch.empty(3, 4, device=DEVICE)
    expected = Normal.seeded(5, range(3))(torch.empty(3, 4))
    assert torch.equal(Normal.seeded(5, range(3))(like).cpu(), expected)
    half = Normal.seeded(5, range(3))(like.bfloat16())
    assert half.dtype == torch.bfloat16 and half.device.type == there()
    assert torch.equal(half.cpu(), expected.bfloat16())
    ones = [Normal.split(torch.Generator(DEVICE).manual_seed(1), 2)(like[:2]) for _ in range(2)]
    assert torch.equal(*ones)


def test_the_estimate_of_a_model_there():
    small = model().to(DEVICE)
    settings = Settings(2, (16, 16), bf16=True, ema=True)
    found = estimate(small, settings)
    assert found.flops > 0 and found.weights == sum(p.nbytes for p in small.parameters()) + sum(
        b.nbytes for b in small.buffers()
    )
    assert next(small.parameters()).device.type == there()
