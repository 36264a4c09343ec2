"""The parts of gpu.py that run only where they are named: cifar and photos, minutes of training."""

import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from measuring import Row, Setup, row

from minidiff import pipeline
from minidiff.data.folder import load_image, to_model
from minidiff.errors import UserError
from minidiff.evaluation import features, metrics
from minidiff.figures import plots
from minidiff.options.sampling import SampleConfig
from minidiff.train import EMA, TrainConfig, train

ROOT = Path(__file__).parents[1]
STARTING = 90  # seconds in which photographs are read and encoded, and samples drawn
PHOTOS = {"batch": 256, "lr": 3e-3, "dtype": "bf16", "each": 20}
PHOTOS_TINY = {"batch": 2, "steps": 2, "vae-steps": 1, "text-steps": 1, "each": 0, "pictures": 4}


def cifar(setup: Setup) -> Iterator[Row]:
    """The paper's network and a fast one from nothing in half of the time each; DDIM samples."""
    import cifar_ddpm
    import cifar_recipes

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
        recipe = cifar_recipes.PRESETS["tiny" if setup.tiny else preset]
        torch.manual_seed(setup.seed)
        model = cifar_recipes.new_model(recipe, [], setup.device)
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
    """pretrain_photos.py for the minutes there are, on from minidiff/photos where that is; what it
    leaves comes to out/photos. setup.data: the shards (packed by gzip they are half as large, as a
    tar is half headers and padding)."""
    if setup.data is None:
        raise UserError("the part photos needs shards of photographs; pass --data.")
    with tempfile.TemporaryDirectory() as place:
        out, package = Path(place) / "photos", ROOT / "minidiff" / "photos"
        script = str(ROOT / "experiments" / "pretrain_photos.py")
        options = {"data": setup.data, "out": out, "device": setup.device, "seed": setup.seed}
        options |= PHOTOS_TINY if setup.tiny else PHOTOS
        options["minutes"] = f"{max(0.1, (setup.left - STARTING) / 60):.2f}"
        if (package / "model.json").exists():
            options["model"] = package
        words = [str(x) for name, value in options.items() for x in (f"--{name}", value)]
        begun = time.perf_counter()
        ran = subprocess.run([sys.executable, script, *words], timeout=max(1, setup.left - 2))
        seconds = time.perf_counter() - begun
        if ran.returncode:
            raise RuntimeError(f"pretrain_photos.py ended with {ran.returncode}")
        results = json.loads((out / "results.json").read_text(encoding="utf-8"))
        shutil.rmtree(out / "training")
        shutil.copytree(out, setup.out / "photos", dirs_exist_ok=True)
    note = f"{results['steps']} steps, {results['images_per_second']} images/s in training, "
    note += f"held-out loss {results['held_out_loss']}, accuracy {results['accuracy']}"
    yield Row("photos", batch=results["batch"], seconds=seconds, note=note)
