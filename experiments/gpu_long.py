"""The parts of gpu.py that run only where they are named: cifar and photos, minutes of training."""

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from measuring import Row, Setup, row

from minidiff import pipeline, schedules
from minidiff.data.folder import load_image, to_model
from minidiff.denoiser import Denoiser
from minidiff.errors import UserError
from minidiff.evaluation import features, metrics
from minidiff.figures import plots
from minidiff.latent_diffusion import LatentDiffusion
from minidiff.options.sampling import SampleConfig
from minidiff.text import Unconditional
from minidiff.train import EMA, TrainConfig, train
from minidiff.vae import Pixels

ROOT = Path(__file__).parents[1]


def cifar(setup: Setup) -> Iterator[Row]:
    """The paper's network and a fast one from nothing in half of the time each; DDIM samples."""
    import cifar_ddpm

    if setup.data is None:
        raise UserError("the part cifar needs CIFAR-10's mosaics; pass --data.")
    n = 20 if setup.tiny else 5000
    images = torch.cat([mosaic(path) for path in sorted(setup.data.glob("train_*.webp"))])
    real = images[torch.randperm(len(images), generator=torch.Generator().manual_seed(0))]
    moments = [
        metrics.Moments().add(features.features(features.CIFAR10, to_model(some)))
        for some in (real[:n], real[n : 2 * n])
    ]
    networks = {"paper's": "paper", "fast": "small"}
    for k, (name, preset) in enumerate(networks.items()):
        recipe = cifar_ddpm.PRESETS["tiny" if setup.tiny else preset]
        torch.manual_seed(setup.seed)
        denoiser = Denoiser(recipe.unet(None), schedules.cosine(), "v")
        model = LatentDiffusion(Pixels(), Unconditional(), denoiser, size=32)
        model.to(setup.device, memory_format=torch.channels_last)
        batch, end = 4 if setup.tiny else 128, setup.left / (len(networks) - k) * 0.7 + time.time()
        config = TrainConfig(10**6, 2e-4, 2, "constant", autocast=torch.bfloat16, seed=setup.seed)
        stream = partial(cifar_ddpm.batches, images, [""] * len(images), batch, setup.seed)
        average, seconds = EMA(model, 0.999), []
        loss = partial(cifar_ddpm.loss, model, None)
        with closing(train(loss, model, stream, config, average)) as steps:
            start = time.perf_counter()
            for step in steps:
                seconds.append(time.perf_counter() - start)
                start = time.perf_counter()
                if time.time() > end or (setup.tiny and step.step == 3):
                    break
        sampling = SampleConfig(2 if setup.tiny else 25, sampler="dpmpp_2m", seed=setup.seed)
        drawn = pipeline.generate(average.average, [""] * n, sampling, batch=500).cpu()
        plots.grid(drawn[:64], None, setup.out / f"cifar_{preset}.png", columns=8)
        fake = metrics.Moments().add(features.features(features.CIFAR10, drawn))
        distance, floor = metrics.frechet(fake, moments[0]), metrics.frechet(moments[1], moments[0])
        note = f"{step.step} steps, loss {step.loss:.4f}; Fréchet distance {distance:.3f}"
        note += f" in {features.CIFAR10} of {n} pictures, floor {floor:.3f}"
        yield replace(row(f"CIFAR-10, {name} network", seconds[1:], batch), note=note)


def mosaic(path: Path) -> torch.Tensor:
    """The 32x32 tiles of a mosaic, row by row."""
    tiles = load_image(path).unfold(1, 32, 32).unfold(2, 32, 32)
    return tiles.permute(1, 2, 0, 3, 4).flatten(0, 1).contiguous()


def photos(setup: Setup) -> Iterator[Row]:
    """pretrain_photos.py, where it exists, goes on from its checkpoint for the minutes there are."""
    script = ROOT / "experiments" / "pretrain_photos.py"
    if not script.exists():
        yield Row("photos", error="there is no experiments/pretrain_photos.py")
        return
    minutes = max(0.1, (setup.left - 30) / 60)
    command = [sys.executable, str(script), "--out", str(setup.out / "photos"), "--resume"]
    ran = subprocess.run([*command, "--minutes", f"{minutes:.2f}"], timeout=max(1, setup.left - 2))
    note = f"{minutes:.1f} minutes"
    yield Row("photos", note=note, error=f"exit code {ran.returncode}" if ran.returncode else "")
