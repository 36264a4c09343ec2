"""The estimate of memory beside what PyTorch's allocator gave out while a fine-tune ran: from its first line to its last, the flight recorder and
a checkpoint that is being written included."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from minidiff import load, schedules
from minidiff.data.latents import Example
from minidiff.denoiser import Denoiser
from minidiff.finetuning.estimate import estimate, settings
from minidiff.finetuning.groups import Group
from minidiff.finetuning.loop import finetune
from minidiff.finetuning.recorder.recorder import Recorder
from minidiff.latent_diffusion import LatentDiffusion
from minidiff.options.finetuning import FineTuneConfig, LoRAConfig, RecorderConfig
from minidiff.text import CLIPText, TextConfig
from minidiff.training import resume
from minidiff.unet import UNet, UNetConfig
from minidiff.vae import VAE, VAEConfig

SIDE = 32


def narrow():
    """Stable Diffusion's kinds of layers, a tenth of its width."""
    unet = UNet(UNetConfig(4, 4, (64, 128, 128), 1, (1, 1, 0), (4, 4, 4), 64))
    vae = VAE(VAEConfig(3, 4, (8, 16), 1, groups=0))
    return LatentDiffusion(
        vae, CLIPText(TextConfig(64, 2, 2)), Denoiser(unet, schedules.scaled_linear()), SIDE
    )


def allocated(call):
    """The bytes that were there at most, beyond those at the start."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        call()
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def data(model, batch):
    side = SIDE // model.vae.factor
    return [Example(torch.randn(4, side, side), "a cat") for _ in range(2 * batch)]


CASES = {
    "full": {},
    "batch 8": {"batch": 8},
    "checkpointing": {"checkpointing": True, "batch": 8},
    "two pieces": {"batch": 8, "pieces": 2},
    "eight pieces, checkpointing": {"batch": 8, "pieces": 8, "checkpointing": True},
    "two batches a step": {"accumulate": 2},
    "bf16": {"dtype": "bf16"},
    "averages": {"ema": 0.9},
    "text encoder": {"text": True},
    "a lora": {"method": "lora", "batch": 8},
    "a lora, checkpointing, bf16": {
        "method": "lora",
        "checkpointing": True,
        "dtype": "bf16",
        "batch": 8,
    },
    "a lora, loaded in bf16": {"method": "lora", "dtype": "bf16", "batch": 8, "loaded": "bf16"},
    "a lora, text encoder too, checkpointing, loaded in bf16": {
        "method": "lora",
        "text": True,
        "checkpointing": True,
        "dtype": "bf16",
        "batch": 8,
        "loaded": "bf16",
    },
    "a word": {"method": "inversion", "word": "sks"},
    "a word, loaded in bf16": {
        "method": "inversion",
        "word": "sks",
        "dtype": "bf16",
        "loaded": "bf16",
    },
    "a copy": {"background": True},
    "averages, copy, recorder": {"ema": 0.9, "background": True, "recorder": True, "pieces": 4},
}


QUICK = {"full", "a lora, loaded in bf16", "averages, copy, recorder"}


@pytest.mark.parametrize(
    "name",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in CASES],
)
def test_the_peak_is_estimated_to_a_twentieth(tmp_path, monkeypatch, name):
    how = {"batch": 4, "background": False, "pieces": 1} | CASES[name]
    recorded, loaded = how.pop("recorder", False), how.pop("loaded", None)
    config = FineTuneConfig(steps=4, lr=1e-5, every=2, lora=LoRAConfig(8), **how)
    # the copy of step 2 stays: the profiler does not see what the writer's thread frees
    monkeypatch.setattr(resume.Progress, "due", lambda _, step: step == 2)
    model, examples = narrow(), None
    if loaded:
        model = load(model.save(tmp_path / "base"), dtype=loaded)
    examples = data(model, config.batch)
    planned = RecorderConfig(every=2, n=2, steps=2, probe=2, noises=1, network="pixels-8x8")
    recorder = None
    if recorded:
        images = torch.zeros(2, 3, SIDE, SIDE)
        recorder = Recorder(model, tmp_path, {"a": "a cat"}, images, [], examples, planned)
    asked = settings(config, model, (SIDE, SIDE), 1, planned if recorded else None)
    said = estimate(model, asked)
    weights = sum(p.nbytes for p in model.parameters())
    groups = [Group("data", examples)]
    peak = weights + allocated(lambda: finetune(model, groups, tmp_path, config, recorder))
    print(
        f"{name}: {said.total / 1e6:.1f} MB, {peak / 1e6:.1f} MB, {said.total / peak:.3f}; {said.parts}"
    )
    assert said.total == pytest.approx(peak, rel=0.05)
