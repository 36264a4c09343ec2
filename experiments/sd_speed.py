"""Stable Diffusion at full size beside diffusers: the same random weights, the same precision, the
same process, taking turns.

    python experiments/sd_speed.py                                          SD 1.5 at 512x512 on the
    CPU
    python experiments/sd_speed.py --device cuda --dtype bf16 --batch 8 --compile

Writes random weights of SD 1.5's true shapes in both layouts, and measures: how long opening takes
and at what peak of memory (each in a process of its own), and seconds for a step of the U-Net under
guidance, ours and theirs in turns, so that what else the machine does meets both. The ratio is the
median of the turns' ratios. diffusers must be installed (the test extra has it).
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Literal

import torch

from minidiff import schedules
from minidiff.checkpoints.folder import DTYPES, empty
from minidiff.checkpoints.layouts import STABLE_DIFFUSION
from minidiff.checkpoints.write import save_compvis, save_diffusers
from minidiff.cli.script import run
from minidiff.denoiser import Denoiser
from minidiff.figures.trace import trace_unet
from minidiff.latent_diffusion import LatentDiffusion
from minidiff.text import CLIPText, TextConfig, clip_vit_l14
from minidiff.training.device import pick_device
from minidiff.training.progress import write_results
from minidiff.unet import UNet, UNetConfig, unet_sd1
from minidiff.vae import VAE, VAEConfig, vae_sd

OPENING = """
import json, time
import torch
{library}


def memory(what):  # of this process, in bytes; the peak of getrusage counts its parent's too
    lines = open("/proc/self/status")
    return next(int(line.split()[1]) for line in lines if line.startswith(what)) * 1024


before, start = memory("VmRSS"), time.perf_counter()
model = {call}
parameters = [p for part in ({parts}) for p in part.parameters()]
weights = sum(p.numel() * p.element_size() + 0 * p.sum().item() for p in parameters)  # reads all
seconds, peak = time.perf_counter() - start, memory("VmHWM") - before
found = {{"seconds": seconds, "weights_gb": weights / 1e9, "peak_gb": peak / 1e9}}
print(json.dumps(found | {{"peak_by_weights": peak / weights}}))
"""
WAYS = ("minidiff", "minidiff, single file", "diffusers")


def main(
    steps: int = 3,
    batch: int = 1,
    size: int = 512,
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32",
    device: str = "cpu",
    compile: bool = False,
    channels_last: bool = False,
    small: bool = False,
    peak_tflops: float | None = None,
    seed: int = 0,
    out: Path = Path("out/sd_speed"),
) -> None:
    """Measure opening, memory and speed beside diffusers.

    Args:
        steps: turns of each; the first is not counted.
        batch: pictures at once; guidance doubles it.
        size: side in pixels.
        dtype: the precision of both.
        device: where to compute.
        compile: torch.compile both.
        channels_last: both with channels last in memory.
        small: a network of the same kind with few weights, to try this file out.
        peak_tflops: of the device in this precision; the share that is reached is printed.
        seed: of the weights.
        out: folder for results.json; the weights are written beside and removed.
    """
    from diffusers import UNet2DConditionModel

    device, precision = pick_device(device), DTYPES[dtype]
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    with tempfile.TemporaryDirectory(dir=out) as folder:
        folder, file = Path(folder) / "sd", Path(folder) / "sd.safetensors"
        numbers = written(small, folder, file)
        rounds = [
            [opened(what, folder, file, dtype) for what in WAYS] for _ in range(3)
        ]  # in turns: files get into the cache, disks get busy
        figures = {
            what: {key: statistics.median(r[k][key] for r in rounds) for key in rounds[0][k]}
            for k, what in enumerate(WAYS)
        }
        from minidiff.checkpoints.load import part

        ours = part(folder, "unet").to(device, precision).eval()
        theirs = (
            UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=precision)
            .to(device)
            .eval()
        )
    side, width = size // 8, numbers["context_dim"]
    x, context = (
        torch.randn(2 * batch, *shape, device=device, dtype=precision)
        for shape in ((4, side, side), (77, width))
    )
    t = torch.full((2 * batch,), 500.0, device=device)
    if channels_last:
        x, ours, theirs = (
            thing.to(memory_format=torch.channels_last) for thing in (x, ours, theirs)
        )
    if compile:
        ours, theirs = torch.compile(ours), torch.compile(theirs)
    calls = {
        "minidiff": lambda: ours(x, t, context),
        "diffusers": lambda: theirs(x, t, context).sample,
    }
    turns, gap = taken_in_turns(calls, steps, device)
    ratio = statistics.median(
        a / b for a, b in zip(turns["minidiff"], turns["diffusers"], strict=True)
    )
    seconds = {name: round(statistics.median(times), 4) for name, times in turns.items()}
    macs = sum(row.multiply_adds for row in trace_unet(empty(UNet, numbers), side))
    tflops = {
        name: round(2 * macs * 2 * batch / value / 1e12, 3) for name, value in seconds.items()
    }
    how = {
        "batch": batch,
        "size": size,
        "dtype": dtype,
        "device": device,
        "compile": compile,
        "channels_last": channels_last,
        "seed": seed,
    }
    share = {"share_of_peak": round(tflops["minidiff"] / peak_tflops, 3)} if peak_tflops else {}
    found = {
        "opening": figures,
        "seconds_per_step": seconds,
        "ratio": round(ratio, 3),
        "tflops": tflops,
        **share,
        "largest_difference": gap,
    }
    print(json.dumps(found, indent=2))
    print(
        write_results(
            out,
            **how,
            torch=torch.__version__,
            threads=torch.get_num_threads(),
            turns=turns,
            **found,
        )
    )


def written(small: bool, folder: Path, file: Path) -> dict:
    """Random weights in both layouts; the U-Net's numbers."""
    if small:
        unet = UNet(UNetConfig(4, 4, (32, 64, 64, 64), 2, (1, 1, 1, 0), (8, 8, 8, 8), 64))
        vae, text = (
            VAE(VAEConfig(3, 4, (32, 32, 32, 32), 1), latent_scale=0.18215),
            CLIPText(TextConfig(64, 1, 1)),
        )
    else:
        unet, vae, text = unet_sd1(), vae_sd(), clip_vit_l14()
    for part in (unet, vae):
        for p in part.parameters():
            if (
                p.ndim > 1
            ):  # else whole branches are zero, and say nothing of how alike two networks are
                torch.nn.init.normal_(p, std=p[0].numel() ** -0.5)
    model = LatentDiffusion(
        vae,
        text,
        Denoiser(unet, schedules.Discrete(**STABLE_DIFFUSION)),
        512,
        guidance=7.5,
        spacing="leading",
    )
    save_diffusers(model, folder)
    save_compvis(model, file)
    return asdict(unet.config)


def opened(what: str, folder: Path, file: Path, dtype: str) -> dict[str, float]:
    """Seconds and peak memory of opening a whole model and reading all of it in a new process,
    beyond those of the imports. Linux only."""
    if what == "diffusers":
        library, parts = (
            "from diffusers import StableDiffusionPipeline",
            "model.unet, model.vae, model.text_encoder",
        )
        call = (
            f"StableDiffusionPipeline.from_pretrained({str(folder)!r}, torch_dtype={DTYPES[dtype]})"
        )
    else:
        library, parts = "import minidiff.checkpoints.load", "model,"
        call = f"minidiff.load({str(file if 'single' in what else folder)!r}, dtype={dtype!r})"
    code = OPENING.format(library=library, call=call, parts=parts)
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return {
        name: round(value, 3) for name, value in json.loads(ran.stdout.splitlines()[-1]).items()
    }


@torch.no_grad()
def taken_in_turns(calls: dict, steps: int, device: str) -> tuple[dict[str, list[float]], float]:
    """Seconds of each call in turns, and the largest difference of what they give, relative to its
    size."""
    outputs = {
        name: call() for name, call in calls.items()
    }  # not counted: memory is found, kernels are chosen or compiled
    a, b = (output.float() for output in outputs.values())
    gap = ((a - b).abs().max() / b.abs().max()).item()
    turns: dict[str, list[float]] = {name: [] for name in calls}
    for k in range(steps):
        for name in list(calls)[:: 1 if k % 2 else -1]:  # neither is always the first
            if device == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            calls[name]()
            if device == "cuda":
                torch.cuda.synchronize()
            turns[name].append(time.perf_counter() - start)
    return turns, gap


if __name__ == "__main__":
    run(main)
