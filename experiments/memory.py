"""What fills memory while training, by switch, and whether the estimate before the first step is true.

    python experiments/memory.py                      Stable Diffusion 1.5's true shapes, which take no memory here; then estimated beside measured
    python experiments/memory.py --batch 4 --size 768

Measured is the growth of a new process's peak memory over three steps of training, from before the networks are built. Linux only. There the
C library keeps much of what is freed for later; so that what is measured is what is needed, it is told to give pieces above 64 kB back at once,
unless --no-exact is passed.
"""

import gc
import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor
from itertools import repeat
from pathlib import Path

import torch

from minidiff import schedules
from minidiff.cli.flags import in_flags
from minidiff.cli.script import run
from minidiff.denoiser import Denoiser
from minidiff.finetuning.estimate import Settings, alternatives, estimate, human
from minidiff.latent_diffusion import LatentDiffusion
from minidiff.methods import lora
from minidiff.text import CLIPText, TextConfig
from minidiff.train import EMA, TrainConfig, train
from minidiff.training.progress import write_results
from minidiff.unet import UNet, UNetConfig
from minidiff.vae import VAE, VAEConfig

SD1 = {  # the numbers of unet_sd1, vae_sd and clip_vit_l14
    "unet": dict(
        channels=(320, 640, 1280, 1280),
        blocks=2,
        depth=(1, 1, 1, 0),
        heads=(8, 8, 8, 8),
        context_dim=768,
    ),
    "vae": dict(channels=(128, 256, 512, 512), blocks=2),
    "text": dict(width=768, layers=12, heads=12),
}
BOX = {  # of the model that ships
    "unet": dict(
        channels=(64, 64, 64, 64),
        blocks=1,
        depth=(0, 0, 1, 0),
        heads=(2, 2, 2, 2),
        context_dim=64,
        ff_mult=2,
        groups=16,
        pooled=True,
        scale_shift=True,
    ),
    "vae": dict(channels=(16, 32), blocks=1, groups=0),
    "text": dict(width=64, layers=2, heads=2, context_length=32, words_only=True),
}
MIDDLE = {  # Stable Diffusion at 0.4 of its width
    "unet": dict(
        channels=(128, 256, 512, 512),
        blocks=1,
        depth=(1, 1, 1, 0),
        heads=(8, 8, 8, 8),
        context_dim=256,
    ),
    "vae": dict(channels=(32, 64, 64, 64), blocks=1),
    "text": dict(width=256, layers=4, heads=4),
}
TINY = {
    "unet": dict(channels=(32, 32), blocks=1, depth=(0, 1), heads=(2, 2), context_dim=16),
    "vae": dict(channels=(8, 8), blocks=1, groups=0),
    "text": dict(width=16, layers=1, heads=2),
}


def main(
    batch: int = 1,
    size: int = 512,
    small: bool = False,
    exact: bool = True,
    seed: int = 0,
    out: Path = Path("out/memory"),
) -> None:
    """Print both tables.

    Args:
        batch: pictures at once, of the table of Stable Diffusion.
        size: their side in pixels.
        small: a few small networks only, to try this file out.
        exact: freed memory is given back at once while measuring.
        seed: of the networks that are measured.
        out: folder for results.json.
    """
    torch.manual_seed(seed)
    table = by_switch(TINY if small else SD1, Settings(batch, (size, size)))
    for name, found in table.items():
        print(f"{name:40} {found['line']}")
    if exact:
        os.environ["MALLOC_MMAP_THRESHOLD_"] = (
            "65536"  # of glibc, for the processes that are started from here
        )
    cases = {"box": (BOX, Settings(16, (32, 32))), "middle": (MIDDLE, Settings(4, (256, 256)))}
    if small:
        cases = {"tiny": (TINY, Settings(2, (32, 32)))}
    measurements = {}
    for name, (numbers, how) in cases.items():
        ways = {
            "full": how,
            "checkpointing": how._replace(checkpointing=True),
            "lora": how._replace(rank=8),
            "bf16": how._replace(bf16=True),
        }
        ways["ema, two batches a step"] = how._replace(ema=True, accumulate=2)
        for way, settings in list(ways.items())[: 2 if small else None]:
            said = estimate(composed(numbers), settings)
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as apart:
                grown, seconds = apart.submit(measured, numbers, settings).result()
            entry = {
                "estimated": said.total,
                "measured": grown,
                "ratio": round(said.total / grown, 3),
                "gflop": said.flops / 1e9,
                "seconds": seconds,
            }
            measurements[f"{name}, {way}"] = entry
            print(
                f"{name + ', ' + way:40} estimated {human(said.total)}, measured {human(grown)}, ratio {entry['ratio']}"
            )
    print(
        write_results(
            out,
            batch=batch,
            size=size,
            exact=exact,
            seed=seed,
            torch=torch.__version__,
            by_switch=table,
            measured=measurements,
        )
    )


def composed(numbers: dict) -> LatentDiffusion:
    """On the meta device, where tensors have no memory, if that is the default device."""
    unet, vae, text = (
        UNet(UNetConfig(4, 4, **numbers["unet"])),
        VAE(VAEConfig(**numbers["vae"])),
        CLIPText(TextConfig(**numbers["text"])),
    )
    return LatentDiffusion(vae, text, Denoiser(unet, schedules.scaled_linear()), 512)


def by_switch(numbers: dict, settings: Settings) -> dict:
    """The estimate of full fine-tuning, of each switch by itself, and of some together."""
    with torch.device("meta"):
        model = composed(numbers)
    ways = {
        "full": settings,
        "full, latents not cached": settings._replace(cached=False),
    } | {in_flags(name): changed for name, changed in alternatives(settings).items()}
    ways["lora, checkpointing"] = settings._replace(rank=8, checkpointing=True)
    for name, frozen in (("fp32", None), ("bf16", torch.bfloat16)):
        way = settings._replace(rank=8, bf16=True, frozen=frozen)
        ways[f"lora, bf16, weights in {name}"] = way
        ways[f"lora, bf16, weights in {name}, checkpointing"] = way._replace(checkpointing=True)
    ways["full, text encoder too"] = settings._replace(text=True)
    ways["full, checkpointing, adamw8bit"] = settings._replace(
        checkpointing=True, optimizer="adamw8bit"
    )
    ways["full, EMA"] = settings._replace(ema=True)
    table = {}
    for name, way in ways.items():
        begun, need = time.process_time(), estimate(model, way)
        table[name] = need._asdict() | {
            "total": need.total,
            "line": f"{human(need.total)} = {need.parts}; {need.flops / 1e12:.2f} TFLOP",
            "took": time.process_time() - begun,
        }
    return table


def measured(numbers: dict, settings: Settings) -> tuple[int, float]:
    """Bytes by which this process's peak grows from building and training, and seconds of the third step."""
    torch.set_num_threads(1)
    trained(
        TINY, Settings(1, (32, 32))
    )  # what libraries take when they are first used is not the networks'
    gc.collect()
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    seconds = trained(numbers, settings)
    return memory("VmHWM") - before, seconds


def trained(numbers: dict, settings: Settings) -> float:
    """Three steps on noise; seconds of the last."""
    model = composed(numbers).requires_grad_(False)
    unet, side = model.unet, settings.size[0] // model.vae.factor
    if settings.rank:
        lora.add(unet, settings.rank)
    else:
        unet.requires_grad_(True)
    unet.checkpointing = settings.checkpointing
    latents = torch.randn(settings.batch, 4, side, side)
    with torch.no_grad():
        context = model.text.encode([""] * settings.batch)
    steps = train(
        lambda batch: {"loss": model.denoiser.loss(*batch)},
        unet,
        lambda _: repeat((latents, context)),
        TrainConfig(
            3,
            1e-6,
            accumulate=settings.accumulate,
            autocast=torch.bfloat16 if settings.bf16 else None,
        ),
        EMA(unet, 0.99) if settings.ema else None,
    )
    seconds, begun = 0.0, time.perf_counter()
    for _ in steps:
        seconds, begun = time.perf_counter() - begun, time.perf_counter()
    return seconds


def memory(what: str) -> int:
    """Of this process, in bytes; the peak that getrusage tells counts its parent's too."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(what)) * 1024


if __name__ == "__main__":
    run(main)
