"""What gpu.py and bench.py measure with: a row of the table, calls in turns, the device's limits, a
model of Stable Diffusion's shapes.

Not a study: nothing runs here.
"""

import gc
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from minidiff import schedules
from minidiff.denoiser import Denoiser
from minidiff.latent_diffusion import LatentDiffusion
from minidiff.text import CLIPText, TextConfig, clip_vit_l14
from minidiff.training.device import held_bytes, peak_bytes, wait
from minidiff.unet import UNet, UNetConfig, unet_sd1
from minidiff.vae import VAE, VAEConfig, vae_sd


@dataclass(frozen=True)
class Setup:
    """What every part is told. deadline: in time.time()'s seconds."""

    device: str
    tiny: bool
    out: Path
    data: Path | None
    seed: int
    deadline: float

    @property
    def left(self) -> float:
        return self.deadline - time.time()

    @property
    def batches(self) -> tuple[int, int]:
        return (1, 2) if self.tiny else (1, 8)


@dataclass(frozen=True)
class Row:
    """One measurement. floor: the least seconds that the device's two limits allow; share: floor /
    seconds, in training the MFU. ratio: how many times faster than diffusers."""

    what: str
    batch: int | None = None
    dtype: str | None = None
    seconds: float | None = None  # the median
    spread: float | None = None  # between the quartiles
    peak_gb: float | None = None
    estimated_gb: float | None = None
    floor: float | None = None
    share: float | None = None
    ratio: float | None = None
    per_second: float | None = None  # images
    note: str = ""
    error: str = ""  # why it was not measured


class Limits(NamedTuple):
    flops: float  # a second, of a bf16 matrix product
    bandwidth: float  # bytes a second that a copy reads and writes


class Timing(NamedTuple):
    seconds: list[float]
    growth: int | None  # bytes that the first call took beyond what was there


# Measuring.


def row(what: str, seconds: list[float], batch: int, floor: float | None = None) -> Row:
    low, median, high = statistics.quantiles(seconds, n=4) if seconds[1:] else [*seconds] * 3
    share = floor / median if floor else None
    speed = batch / median
    return Row(what, batch, "bf16", median, high - low, None, None, floor, share, None, speed)


def turns(
    calls: dict[str, Callable[[], object]], setup: Setup, limit: float, least: int = 3
) -> dict[str, Timing]:
    """Times of these calls, in turns, so that what else the machine does meets all of them. The
    first two calls are not counted. limit: seconds; least: so many turns are made all the same."""
    growth: dict[str, int | None] = {}
    for name, call in calls.items():
        before = held_bytes(setup.device)
        peak_bytes(setup.device, anew=True)
        call()
        peak = peak_bytes(setup.device)
        growth[name] = None if peak is None else peak - before
        call()
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    end = time.time() + min(limit, setup.left / 2)
    for k in range(2 if setup.tiny else 30):
        if k >= least and time.time() > end:
            break
        for name in list(calls)[:: 1 if k % 2 else -1]:
            wait(setup.device)
            start = time.perf_counter()
            calls[name]()
            wait(setup.device)
            seconds[name].append(time.perf_counter() - start)
    return {name: Timing(seconds[name], growth[name]) for name in calls}


def compared(
    what: str,
    timings: dict[str, Timing],
    batch: int,
    floor: float | None,
    weights: int = 0,
) -> Iterator[Row]:
    """A row for each; those of minidiff with the ratio of the turns. weights: of either, bytes."""
    theirs = timings.get("diffusers")
    for name, (seconds, growth) in timings.items():
        made = row(f"{what}, {name}", seconds, batch, floor)
        if theirs and name != "diffusers":
            pairs = zip(theirs.seconds, seconds, strict=True)
            made = replace(made, ratio=statistics.median(a / b for a, b in pairs))
        peak = None if growth is None else (weights + growth) / 1e9
        yield replace(made, peak_gb=peak)


def tried(what: str, rows: Iterator[Row], device: str) -> Iterator[Row]:
    """These rows, or why they cannot be measured; the next ones are tried all the same."""
    try:
        yield from rows
    except Exception as error:  # out of memory among them: reported, in the table and whole here
        traceback.print_exc()
        yield Row(what, error=one_line(error))
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.empty_cache()


def one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:400]


def limits_of(setup: Setup) -> tuple[Limits, list[float], list[float]]:
    """The two limits, with the times of a matrix product and of a copy."""
    side, size = (256, 2**20) if setup.tiny else (8192, 2**30)
    a, b = torch.randn(2, side, side, device=setup.device).to(torch.bfloat16)
    source = torch.ones(size, dtype=torch.uint8, device=setup.device)
    target = torch.empty_like(source)
    calls = {"product": lambda: a @ b, "copy": lambda: target.copy_(source)}
    timings = turns(calls, setup, 2)
    product, copy = (timings[name].seconds for name in calls)
    limits = Limits(2 * side**3 / statistics.median(product), 2 * size / statistics.median(copy))
    return limits, product, copy


def stable_diffusion(setup: Setup, dtype: torch.dtype, size: int = 512) -> LatentDiffusion:
    """SD 1.5's shapes with random weights, none of them zero: a product of zeros is faster."""
    torch.manual_seed(setup.seed)
    with torch.device(setup.device):
        if setup.tiny:
            text = CLIPText(TextConfig(64, 1, 1))
            unet = UNet(UNetConfig(4, 4, (32, 64), 1, (1, 0), (8, 8), 64))
            vae = VAE(VAEConfig(3, 4, (32, 32), 1), latent_scale=0.18215)
        else:
            text, unet, vae = clip_vit_l14(), unet_sd1(), vae_sd()
        for p in (p for part in (text, unet, vae) for p in part.parameters() if p.ndim > 1):
            nn.init.normal_(p, std=p[0].numel() ** -0.5)
    denoiser = Denoiser(unet, schedules.scaled_linear())
    size = 32 if setup.tiny else size
    return LatentDiffusion(vae, text, denoiser, size, guidance=7.5).to(dtype).eval()


def weights_of(module: nn.Module) -> int:
    return sum(p.nbytes for p in module.parameters())
