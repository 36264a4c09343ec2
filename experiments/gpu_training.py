"""The parts of gpu.py that fine-tune: train (steps), stalls (the real loop), capped (smaller cards)."""

import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path

import diffusers_side
import torch
from gpu_sampling import CAPTIONS
from measuring import Row, Setup, compared, limits_of, row, stable_diffusion, tried, turns

from minidiff.data.latents import Example
from minidiff.finetuning import estimate as estimates
from minidiff.finetuning import groups, loop
from minidiff.latent_diffusion import LatentDiffusion
from minidiff.methods import lora
from minidiff.options.finetuning import FineTuneConfig, LoRAConfig
from minidiff.train import EMA, TrainStep, train
from minidiff.training import waits
from minidiff.training.device import peak_bytes

CONTEXT_BYTES = 5e8  # what CUDA itself takes of a card, beside all tensors


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
    """Steps of fine-tuning from cached latents; the share of the floor is the MFU. Computing again
    under checkpointing is no use: the floor is that of the step without."""
    limits, model = limits_of(setup)[0], stable_diffusion(setup, torch.float32)
    for method in ("full", "lora"):
        for batch in (2,) if setup.tiny else (8, 32):
            useful = estimated(model, tuning(method, batch, False))
            for checkpointing in (False, True):
                config, said = tuning(method, batch, checkpointing), useful
                if checkpointing:
                    said = estimated(model, config)
                beside, floor = batch in (2, 8), useful.flops / limits.flops
                rows = trained_steps(setup, floor, model, config, said.total, beside)
                yield from tried(f"{title(config)}, batch {batch}", rows, setup.device)
                forget(model)


def estimated(model: LatentDiffusion, config: FineTuneConfig) -> estimates.Estimate:
    size = (model.size, model.size)
    return estimates.estimate(model, estimates.settings(config, model, size))


def title(config: FineTuneConfig) -> str:
    return f"train {config.method}{', checkpointing' if config.checkpointing else ''}"


def trained_steps(
    setup: Setup,
    floor: float,
    model: LatentDiffusion,
    config: FineTuneConfig,
    said: float,
    beside: bool,
) -> Iterator[Row]:
    """Ours alone, with its peak of memory and what was said of it, in bytes; then, where both have
    room, in turns with diffusers."""
    what = title(config)
    peak_bytes(setup.device, anew=True)
    with closing(fine_tuning(model, config)) as steps:
        timing = turns({"minidiff": partial(next, steps)}, setup, 2)["minidiff"]
        peak = peak_bytes(setup.device)
        made = row(f"{what}, minidiff alone", timing.seconds, config.batch, floor)
        peak_gb = None if peak is None else peak / 1e9
        yield replace(made, peak_gb=peak_gb, estimated_gb=said / 1e9)
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
