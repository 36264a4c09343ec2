"""What a GPU does with minidiff, in one command: is it right, how fast, does memory fit?

    python experiments/gpu.py --out OUT --minutes 6
    python experiments/gpu.py --parts ceiling,train
    python experiments/gpu.py --parts cifar --data cifar10 --minutes 5
    python experiments/gpu.py --tiny --device cpu              # everything at its smallest

A part is a function that yields rows. It runs in a process of its own, in a share of the minutes
(what one leaves, the next ones get), and is ended when its time is up. Every row is written to
results.json at once, so a run that is killed keeps what it has. Weights are random.
"""

import gc
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import xml.etree.ElementTree as xml
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parent))  # the files beside this one
import gpu_diffusers as diffusers_side

from minidiff import pipeline, schedules
from minidiff.cli.script import run
from minidiff.data.folder import load_image, to_model
from minidiff.data.latents import Example
from minidiff.denoiser import Denoiser
from minidiff.errors import UserError
from minidiff.evaluation import features, metrics
from minidiff.figures import plots
from minidiff.finetuning import estimate as estimates
from minidiff.finetuning import groups, loop
from minidiff.latent_diffusion import LatentDiffusion
from minidiff.methods import lora
from minidiff.options.finetuning import FineTuneConfig, LoRAConfig
from minidiff.options.sampling import SampleConfig
from minidiff.text import CLIPText, TextConfig, Unconditional, clip_vit_l14
from minidiff.train import EMA, TrainConfig, TrainStep, train
from minidiff.training import atomic, waits
from minidiff.training.device import device_name, held_bytes, peak_bytes, pick_device, wait
from minidiff.training.progress import write_results
from minidiff.unet import UNet, UNetConfig, unet_sd1
from minidiff.vae import VAE, Pixels, VAEConfig, vae_sd

ROOT = Path(__file__).parents[1]
CONTEXT_BYTES = 5e8  # what CUDA itself takes of a card, beside all tensors
CAPTIONS = [f"photograph number {k}" for k in range(16)]
METHODS = multiprocessing.get_all_start_methods()
PROCESSES = multiprocessing.get_context("forkserver" if "forkserver" in METHODS else "spawn")


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


def turns(calls: dict[str, Callable[[], object]], setup: Setup, limit: float) -> dict[str, Timing]:
    """Times of these calls, in turns, so that what else the machine does meets all of them. The
    first two calls are not counted. limit: seconds; at least three turns are made."""
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
        if k >= 3 and time.time() > end:
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


def stable_diffusion(setup: Setup, dtype: torch.dtype) -> LatentDiffusion:
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
    size = 32 if setup.tiny else 512
    return LatentDiffusion(vae, text, denoiser, size, guidance=7.5).to(dtype).eval()


def weights_of(module: nn.Module) -> int:
    return sum(p.nbytes for p in module.parameters())


# The parts.


def correct(setup: Setup) -> Iterator[Row]:
    """The tests marked gpu, here against the CPU's float64; their output is in correct.txt."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "tests/gpu", "-q", "--tb=short"]
    command += ["-p", "no:cacheprovider", *(["-k", "times"] if setup.tiny else [])]
    begun, cases = time.perf_counter(), []
    text = open(setup.out / "correct.txt", "w", encoding="utf-8")
    with tempfile.TemporaryDirectory() as folder, text:
        report = Path(folder) / "report.xml"
        text.write(f"{atomic.SIGNATURE}: pytest -m gpu\n")
        text.flush()  # before pytest's own lines
        ran = subprocess.run(
            [*command, f"--junitxml={report}"],
            cwd=ROOT,
            env=os.environ | {"MINIDIFF_TEST_DEVICE": setup.device},
            stdout=text,
            stderr=subprocess.STDOUT,
            timeout=max(1.0, setup.left - 2),
        )
        if report.exists():
            cases = list(xml.parse(report).iter("testcase"))
    seconds = time.perf_counter() - begun
    if not cases:
        raise RuntimeError(f"pytest ended with {ran.returncode} and no report; see correct.txt")
    bad = [
        case for case in cases if case.find("failure") is not None or case.find("error") is not None
    ]
    skipped = sum(case.find("skipped") is not None for case in cases)
    passed = len(cases) - len(bad) - skipped
    note = f"{passed} passed, {len(bad)} failed, {skipped} skipped"
    yield Row("tests", dtype="float64 on the CPU beside it", seconds=seconds, note=note)
    for case in bad:
        yield Row(f"test {case.get('name')}", error="failed; see correct.txt")


def ceiling(setup: Setup) -> Iterator[Row]:
    """The two limits of the device."""
    limits, product, copy = limits_of(setup)
    made = row("matrix product", product, 1)
    yield replace(made, per_second=None, note=f"{limits.flops / 1e12:.1f} TFLOP/s")
    made = row("copy", copy, 1)
    yield replace(made, per_second=None, note=f"{limits.bandwidth / 1e9:.0f} GB/s")


class Replayed(nn.Module):
    """A network's forward pass, recorded once as a CUDA graph for one shape."""

    def __init__(self, network: nn.Module, inputs: tuple[torch.Tensor, ...]):
        super().__init__()
        self.config, self.multiple = network.config, network.multiple
        self.inputs, self.graph = [each.clone() for each in inputs], torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        # the default device: a table made on the CPU would have to be copied, which waits
        with torch.cuda.stream(stream), torch.device(inputs[0].device):
            for _ in range(3):
                network(*self.inputs)
        torch.cuda.current_stream().wait_stream(stream)
        with torch.device(inputs[0].device), torch.cuda.graph(self.graph):
            self.output = network(*self.inputs)

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        for own, given in zip(self.inputs, inputs, strict=True):
            own.copy_(given)
        self.graph.replay()
        return self.output.clone()


@torch.no_grad()
def sample(setup: Setup) -> Iterator[Row]:
    """The U-Net under guidance, and whole pictures, in bf16: eager, CUDA graphs, then compiled."""
    limits, device = limits_of(setup)[0], setup.device
    model = stable_diffusion(setup, torch.bfloat16)
    pipe, missing = diffusers_side.pipeline_of(setup.tiny, device)
    if missing:
        yield Row("diffusers", error=missing)
    for way in ("eager", "compiled"):
        if way == "compiled":
            backend = "eager" if setup.tiny else "inductor"
            for unet in [model.unet, *([pipe.unet] if pipe else [])]:
                unet.compile(backend=backend, dynamic=False)
        for batch in setup.batches:
            rows = sampled(setup, limits, model, pipe, batch, way)
            yield from tried(f"{way}, batch {batch}", rows, device)
        if way == "compiled":
            continue  # to record that, it would have to be compiled once more
        for batch in setup.batches:
            what = f"CUDA graphs, batch {batch}"
            if device.startswith("cuda"):
                yield from tried(what, replayed(setup, limits, model, batch), device)
            else:
                yield Row(what, error="needs a GPU")


def inputs_of(model: LatentDiffusion, batch: int) -> tuple[torch.Tensor, ...]:
    """The U-Net's, for so many pictures under guidance, as the sampler gives them."""
    side, like = model.size // model.vae.factor, {"device": model.device}
    x, t = torch.randn(2 * batch, 4, side, side, **like), torch.full((2 * batch,), 500.0, **like)
    return x, t, model.text.encode([""] * (2 * batch))


def sampled(
    setup: Setup, limits: Limits, model: LatentDiffusion, pipe: object, batch: int, way: str
) -> Iterator[Row]:
    inputs, half = inputs_of(model, batch), torch.bfloat16
    steps = 2 if setup.tiny else 25
    draw = partial(pipeline.generate, model, CAPTIONS[:batch], SampleConfig(steps, sampler="ddim"))
    unet, picture = {"minidiff": lambda: model.unet(*inputs)}, {"minidiff": draw}
    if pipe:
        x, t, context = inputs[0].to(half), inputs[1], inputs[2]
        unet["diffusers"] = lambda: pipe.unet(x, t, context).sample
        picture["diffusers"] = partial(diffusers_side.draw, pipe, batch, steps, model.size)
    unet_floor, picture_floor = floors(limits, model, batch, steps)
    begun = time.perf_counter()
    timings = turns(unet, setup, 3)
    note = f"first calls {time.perf_counter() - begun - sum(sum(t[0]) for t in timings.values()):.0f} s"
    for made in compared(f"U-Net, {way}", timings, batch, unet_floor, weights_of(model.unet)):
        yield replace(made, note=note)
    timings = turns(picture, setup, 8)
    what = f"picture of {steps} steps, {way}"
    yield from compared(what, timings, batch, picture_floor, weights_of(model))


def replayed(setup: Setup, limits: Limits, model: LatentDiffusion, batch: int) -> Iterator[Row]:
    """The same from CUDA graphs."""
    inputs, steps, own = inputs_of(model, batch), 2 if setup.tiny else 25, model.unet
    floor, picture_floor = floors(limits, model, batch, steps)
    graph = Replayed(own, inputs)
    made = {"minidiff": lambda: graph(*inputs)}
    what = "U-Net, CUDA graphs"
    yield from compared(what, turns(made, setup, 2), batch, floor, weights_of(own))
    model.denoiser.network = graph
    try:
        config = SampleConfig(steps, sampler="ddim")
        draw = {"minidiff": partial(pipeline.generate, model, CAPTIONS[:batch], config)}
        what, timings = f"picture of {steps} steps, CUDA graphs", turns(draw, setup, 4)
    finally:
        model.denoiser.network = own
    yield from compared(what, timings, batch, picture_floor, weights_of(model))


def floors(limits: Limits, model: LatentDiffusion, batch: int, steps: int) -> tuple[float, float]:
    """The least seconds of a pass of the U-Net, and of a picture: its multiplications at the speed
    of the matrix product, or reading its weights, whichever takes longer."""
    with torch.device("meta"):
        parts = UNet(model.unet.config), VAE(model.vae.config)
        side = model.size // model.vae.factor
        x, t = torch.empty(2 * batch, 4, side, side), torch.empty(2 * batch)
        context = torch.empty(2 * batch, 77, model.unet.context_dim)
        with FlopCounterMode(display=False) as unet:
            parts[0](x, t, context)
        with FlopCounterMode(display=False) as vae:
            parts[1].decoder(x[:batch])
    reading = weights_of(model.unet) / limits.bandwidth
    step = max(unet.get_total_flops() / limits.flops, reading)
    return step, steps * step + vae.get_total_flops() / limits.flops


def tuning(method: str, batch: int, checkpointing: bool) -> FineTuneConfig:
    return FineTuneConfig(
        method=method,
        steps=1_000_000,
        lr=1e-5,
        batch=batch,
        lora=LoRAConfig(rank=16),
        ema=0.999 if method == "full" else None,
        dtype="bf16",
        checkpointing=checkpointing,
        dropout=0.1,
    )


def examples(model: LatentDiffusion) -> list[groups.Group]:
    """Cached latents of nothing, on the CPU."""
    side = model.size // model.vae.factor
    latents = torch.randn(64, 4, side, side)
    pairs = [Example(z, CAPTIONS[k % len(CAPTIONS)]) for k, z in enumerate(latents)]
    return [groups.Group("training", pairs)]


def fine_tuning(model: LatentDiffusion, config: FineTuneConfig) -> Iterator[TrainStep]:
    """The steps that finetuning.loop takes, without its folder."""
    forget(model)
    trained = loop.to_train(model, model.denoiser, config)
    model.unet.checkpointing = config.checkpointing
    average = None if config.ema is None else EMA(trained, config.ema)
    length, width = model.text.context_length, model.text.dim
    contexts = {caption: torch.randn(length, width) for caption in ["", *CAPTIONS]}
    loss = groups.GroupLoss(model, contexts)
    stream = partial(
        groups.batches, examples(model), model.schedule, config.batch, config.dropout, config.seed
    )
    return train(loss, trained, stream, loop.train_config(config, 1), average)


def forget(model: LatentDiffusion) -> None:
    """What an earlier fine-tuning left: LoRAs and gradients."""
    lora.remove(model)
    model.requires_grad_(False)
    for p in model.parameters():
        p.grad = None


def training(setup: Setup) -> Iterator[Row]:
    """Steps of fine-tuning from cached latents; the share of the floor is the MFU."""
    limits, model = limits_of(setup)[0], stable_diffusion(setup, torch.float32)
    for method in ("full", "lora"):
        for checkpointing in (False, True):
            for batch in (2, 4) if setup.tiny else (8, 32):
                config = tuning(method, batch, checkpointing)
                beside = batch in (2, 8)
                what = f"train {method}{', checkpointing' if checkpointing else ''}"
                rows = trained_steps(setup, limits, model, config, what, beside)
                yield from tried(f"{what}, batch {batch}", rows, setup.device)
                forget(model)


def trained_steps(
    setup: Setup,
    limits: Limits,
    model: LatentDiffusion,
    config: FineTuneConfig,
    what: str,
    beside: bool,
) -> Iterator[Row]:
    """Ours alone, with its peak of memory; then, where both have room, in turns with diffusers."""
    settings = estimates.settings(config, model, (model.size, model.size))
    said = estimates.estimate(model, settings)
    useful = said.flops
    if config.checkpointing:  # computing again is no use
        useful = estimates.estimate(model, settings._replace(checkpointing=False)).flops
    floor = useful / limits.flops
    peak_bytes(setup.device, anew=True)
    with closing(fine_tuning(model, config)) as steps:
        timing = turns({"minidiff": partial(next, steps)}, setup, 2)["minidiff"]
        peak = peak_bytes(setup.device)
        made = row(f"{what}, minidiff alone", timing.seconds, config.batch, floor)
        peak_gb = None if peak is None else peak / 1e9
        yield replace(made, peak_gb=peak_gb, estimated_gb=said.total / 1e9)
        if not beside:
            return
        theirs, missing = diffusers_side.training_of(setup.tiny, setup.device, config)
        if missing:
            yield Row(f"{what}, diffusers", error=missing)
            return
        calls = {"minidiff": partial(next, steps), "diffusers": theirs}
        for made in compared(what, turns(calls, setup, 4), config.batch, floor):
            yield replace(made, peak_gb=None, note="in turns")


def stalls(setup: Setup) -> Iterator[Row]:
    """The real loop, its folder and checkpoints included: where does the GPU wait for Python?"""
    model, every = stable_diffusion(setup, torch.float32), 2 if setup.tiny else 25
    config = replace(tuning("lora", 2 if setup.tiny else 8, False), every=every)
    # half of the time for the loop as it is; the rest for counting and profiling, which are slow
    until = 0.0 if setup.tiny else time.time() + setup.left / 2
    watch = waits.Watch(setup.device, every, until)
    with tempfile.TemporaryDirectory() as folder:
        try:
            loop.finetune(model, examples(model), Path(folder) / "run", config, watch)
        except waits.Enough:
            pass  # it watched what it wanted
    note = f"a step with a checkpoint every {every}"
    yield replace(row("fine-tune loop, LoRA", watch.seconds, config.batch), note=note)
    if setup.device.startswith("cuda"):
        each = ", ".join(f"{n / every:.2g} at {place}" for place, n in watch.waits.most_common(12))
        note = f"{sum(watch.waits.values()) / every:.2f} synchronisations a step: {each}"
        yield Row("synchronisations", config.batch, "bf16", note=note)
    busy = watch.busy
    if not busy.events:
        yield Row("waiting", error="the profiler saw no work on the device")
        return
    note = (
        f"waits {1 - busy.share:.1%} of the time, {busy.gaps_above_a_millisecond} times above 1 ms"
    )
    note += f", at most {1000 * busy.longest:.1f} ms; runtime: {busy.synchronising}"
    yield Row("waiting", config.batch, "bf16", share=busy.share, note=note)


def capped(setup: Setup) -> Iterator[Row]:
    """The largest batch that the estimate says fits a smaller card, and one more: is it so?"""
    model = stable_diffusion(setup, torch.float32)
    for method, checkpointing in (("lora", False), ("full", True)):
        config = tuning(method, 1, checkpointing)
        settings = estimates.settings(config, model, (model.size, model.size))
        totals = [estimates.estimate(model, settings._replace(batch=k)).total for k in (1, 2)]
        for card in (8, 12, 16, 24):
            budget = card * 2**30 - CONTEXT_BYTES
            each = totals[1] - totals[0]
            batch = 1 + int((budget - totals[0]) // each) if budget >= totals[0] else 0
            batch = min(batch, 2) if setup.tiny else batch
            for size in filter(None, (batch, batch + 1)):
                told = (totals[0] + (size - 1) * each) / 1e9
                rows = fits(setup, model, replace(config, batch=size), budget, told)
                yield from tried(f"{card} GB card, {method}, batch {size}", rows, setup.device)
            if not batch:
                yield Row(
                    f"{card} GB card, {method}", estimated_gb=totals[0] / 1e9, note="does not fit"
                )


def fits(
    setup: Setup, model: LatentDiffusion, config: FineTuneConfig, budget: float, told: float
) -> Iterator[Row]:
    """Three steps in so many bytes."""
    if setup.device.startswith("cuda"):
        whole = torch.cuda.get_device_properties(setup.device).total_memory
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(min(1.0, budget / whole))
    peak_bytes(setup.device, anew=True)
    found = "fits"
    try:
        with closing(fine_tuning(model, config)) as steps:
            for _ in range(3):
                next(steps)
    except torch.OutOfMemoryError:
        found = "out of memory"
    forget(model)
    peak = peak_bytes(setup.device)
    said = "said to fit" if told * 1e9 <= budget else "said not to fit"
    what = f"{(budget + CONTEXT_BYTES) / 2**30:.0f} GB card, {config.method}"
    peak_gb = None if peak is None else peak / 1e9
    note = f"{said}: {found}"
    yield Row(what, config.batch, "bf16", peak_gb=peak_gb, estimated_gb=told, note=note)


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


class Part(NamedTuple):
    rows: Callable[[Setup], Iterator[Row]]
    weight: int  # seconds of six minutes


PARTS = {
    "correct": Part(correct, 45),
    "ceiling": Part(ceiling, 15),
    "sample": Part(sample, 130),
    "train": Part(training, 75),
    "stalls": Part(stalls, 60),
    "capped": Part(capped, 35),
    "cifar": Part(cifar, 300),
    "photos": Part(photos, 300),
}


# Processes.


def play(name: str, part: Callable[[Setup], Iterator[Row]], setup: Setup, rows: Connection) -> None:
    """Run a part in this process and send its rows."""
    try:
        torch.manual_seed(setup.seed)
        setup = replace(setup, device=pick_device(setup.device))
        about = {"device": device_name(setup.device), "torch": torch.__version__}
        for made in part(setup):
            rows.send({"part": name} | asdict(made) | about)
    except Exception as error:  # the parent writes it into the table, and goes on
        traceback.print_exc()
        rows.send({"part": name} | asdict(Row(name, error=one_line(error))))
    rows.close()


def apart(name: str, part: Callable[[Setup], Iterator[Row]], setup: Setup) -> Iterator[dict]:
    """The rows of a part in a process of its own: what it breaks, it breaks alone, all its memory
    is free afterwards, and it ends at its deadline whatever it does."""
    ours, theirs = PROCESSES.Pipe(duplex=False)
    process = PROCESSES.Process(target=play, args=(name, part, setup, theirs))
    error = "its time was up"
    try:
        process.start()
        theirs.close()
        while ours.poll(max(0.0, setup.left)):
            yield ours.recv()
    except (EOFError, OSError):  # it is done, or dead
        process.join(10)
        error = "" if process.exitcode == 0 else f"the process ended with {process.exitcode}"
    finally:
        process.kill()
        process.join()
        ours.close()
    if error:
        yield {"part": name} | asdict(Row(name, error=error))


def line(made: dict) -> str:
    """A row for the terminal."""
    texts = [f"{made['part']:8} {made['what']}"]
    units = {
        "batch": "batch {}",
        "seconds": "{:.4g} s",
        "spread": "+- {:.2g}",
        "per_second": "{:.4g} images/s",
        "share": "{:.0%} of the floor",
        "ratio": "{:.2f} times diffusers",
        "peak_gb": "peak {:.2f} GB",
        "estimated_gb": "estimated {:.2f} GB",
    }
    texts += [text.format(made[key]) for key, text in units.items() if made[key] is not None]
    texts += [made["note"]] if made["note"] else []
    return ", ".join(texts + ([f"NOT MEASURED: {made['error']}"] if made["error"] else []))


OUTPUTS = ("correct.txt",)  # beside results.json


def main(
    parts: str = "correct,ceiling,sample,train,stalls,capped",
    minutes: float = 6.0,
    tiny: bool = False,
    device: str = "auto",
    data: Path | None = None,
    seed: int = 0,
    out: Path = Path("out/gpu"),
) -> None:
    """Measure part after part.

    Args:
        parts: names with commas; cifar and photos run only where they are named.
        minutes: for all parts together.
        tiny: everything at its smallest, to try this file out.
        device: auto, cuda or cpu.
        data: a folder with CIFAR-10 as mosaics, train_0.webp and so on; for the part cifar.
        seed: of the random weights.
        out: folder for results.json and what parts write.
    """
    names = [name for part in parts.split(",") if (name := part.strip())]
    unknown = next((name for name in names if name not in PARTS), None)
    if unknown is not None or not names:
        raise UserError(f'no part "{unknown or ""}"; there is {", ".join(PARTS)}.')
    out.mkdir(parents=True, exist_ok=True)
    PROCESSES.set_forkserver_preload(
        ["torch", "minidiff.finetuning.loop", "minidiff.figures.plots"]
    )
    settings = {"parts": parts, "minutes": minutes, "tiny": tiny, "seed": seed}
    rows, end = [], time.time() + 60 * minutes
    for k, name in enumerate(names):
        share = PARTS[name].weight / sum(PARTS[other].weight for other in names[k:])
        deadline = time.time() + share * (end - time.time())
        begun = time.perf_counter()
        setup = Setup(device, tiny, out, data, seed, deadline)
        for made in apart(name, PARTS[name].rows, setup):
            rows.append(made)
            print(line(made), flush=True)
            written = write_results(out, **settings, rows=rows)
        print(f"{name:8} took {time.perf_counter() - begun:.0f} s", flush=True)
    print(written)


if __name__ == "__main__":
    os.environ["TQDM_DISABLE"] = "1"  # of the processes that are started: rows alone are printed
    run(main, OUTPUTS)
