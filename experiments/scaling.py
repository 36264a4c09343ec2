"""Memory, operations and bytes sent by number of devices, for U-Nets as large as SD 1.5's and SDXL's.

    python experiments/scaling.py                              # a minute of one core, 2 GB
    python experiments/scaling.py --batch 4 --rate 300 --link 50

Nothing here is measured on a GPU. Memory and FLOPs are counted on tensors that have a shape and no memory
(minidiff.finetuning.estimate), for every weight of the U-Net trained in bf16 autocast by AdamW.
What several processes add follows from how DDP [1] and FSDP2 [2] work. Seconds need two rates of
your machines; the defaults are assumed.

[1] Li et al. PyTorch Distributed: Experiences on Accelerating Data Parallel Training. 2020.
    arXiv:2006.15704
[2] Zhao et al. PyTorch FSDP: Experiences on Scaling Fully Sharded Data Parallel. 2023.
    arXiv:2304.11277
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from memory import SD1, TINY, composed
from torch import nn

from minidiff.cli.script import run
from minidiff.errors import UserError
from minidiff.finetuning.estimate import Estimate, Settings, estimate
from minidiff.training import atomic
from minidiff.training.joint import blocks
from minidiff.training.progress import write_results

# SDXL's U-Net without what its time embedding adds: the pooled text and the sizes (5.2 M weights).
# One text encoder of 0.81 billion weights takes the place of the two, which have 0.82.
SDXL = {
    "unet": dict(
        channels=(320, 640, 1280),
        blocks=2,
        depth=(0, 2, 10),
        heads=(5, 10, 20),
        context_dim=2048,
        linear_projection=True,
    ),
    "vae": SD1["vae"],
    "text": dict(width=2048, layers=14, heads=32),
}
CASES = {"SD 1.5": (SD1, 512), "SDXL": (SDXL, 1024)}  # with the side of the images in pixels
OUTPUTS = ("table.md",)  # beside results.json


@dataclass(frozen=True)
class Row:
    """One model, in one way, on so many devices; all figures are of one device."""

    model: str
    checkpointing: bool
    way: str  # "DDP" or "FSDP2"
    devices: int
    first_gb: float  # memory of the first process's device, at the step's peak; of 10^9 bytes
    others_gb: float  # of every other
    start_gb: float  # of each, before the first step, when nothing is in shards
    tflop: float  # a step
    sent_gb: float  # a step
    compute_s: float  # tflop / rate
    link_s: float  # sent_gb / link


class Pieces(NamedTuple):
    """What is counted of one model, in bytes."""

    alone: Estimate  # of a step on one device
    activations: int  # the most at any moment, with the gradient that is just made
    unet: int  # its weights, in float32; so are its gradients
    gathered: int  # weights and gradients that FSDP2 has whole at a time


def main(
    batch: int = 4,
    rate: float = 100.0,
    link: float = 1.25,
    small: bool = False,
    out: Path = Path("out/scaling"),
) -> None:
    """Print and write the table.

    Args:
        batch: images of one device; a step has this many of each.
        rate: TFLOP a second that a device reaches in training; assumed, put in your own.
        link: GB a second that a device sends; assumed: 10 Gbit Ethernet. Put in your own.
        small: a tiny network only, to try this file out.
        out: folder for table.md and results.json.
    """
    if min(batch, rate, link) <= 0:
        raise UserError("batch, rate and link must be above 0.")
    rows, pieces = [], {}
    for model, (config, side) in ({"tiny": (TINY, 32)} if small else CASES).items():
        for checkpointing in (False, True):
            settings = Settings(batch, (side, side), checkpointing=checkpointing, bf16=True)
            counted = count(config, settings)
            pieces[f"{model}, checkpointing={checkpointing}"] = counted._asdict() | {
                "alone": counted.alone._asdict()
            }
            print(f"{model}, checkpointing={checkpointing}: {counted.alone.parts}", flush=True)
            tflop = counted.alone.flops / 1e12
            for way, devices in WAYS:
                sent, *held = (n / 1e9 for n in WAY[way](counted, devices))
                times = tflop / rate, sent / link
                rows.append(Row(model, checkpointing, way, devices, *held, tflop, sent, *times))
    assumed = f"{batch} images a device, {rate:g} TFLOP/s and {link:g} GB/s (assumed)"
    print(text := f"{assumed}:\n\n{table(rows)}")
    with atomic.write(out / "table.md", atomic.unsigned) as new:
        new.write_text(f"{text}\n<!-- {atomic.SIGNATURE} -->\n", encoding="utf-8")
    figures = {"rows": list(map(asdict, rows)), "pieces": pieces, "torch": torch.__version__}
    results = write_results(out, batch=batch, rate=rate, link=link, **figures)
    print(out / "table.md", results, sep="\n")


def count(config: dict, settings: Settings) -> Pieces:
    """From the second of two batches on, all gradients are there, and activations come on top."""
    with torch.device("meta"):
        model = composed(config)
    alone, twice = (estimate(model, settings._replace(accumulate=k)) for k in (1, 2))
    unet = 4 * alone.trained
    return Pieces(alone, twice.step - unet, unet, gathered(model.unet))


def gathered(unet: nn.Module) -> int:
    """Of the root's weights, which stay; of the largest block, its gradients, and the next block's
    weights, which come while it computes. A block's weights are those of no block inside it."""
    sizes, taken = [], set()
    for part in (*blocks(unet), unet):
        own = [p for p in part.parameters() if p not in taken]
        taken.update(own)
        sizes.append(sum(p.nbytes for p in own))
    return 3 * max(sizes[:-1]) + sizes[-1]


def ddp(counted: Pieces, devices: int) -> tuple[float, ...]:
    """Bytes sent, of the first device, of the others, at the start. A ring's all-reduce sends
    every gradient but 1/N twice. The gradients lie in DDP's buckets, which are always there."""
    alone = counted.alone
    held = alone.weights + alone.moments + counted.unet + counted.activations
    memory = alone.total if devices == 1 else held
    sent = 2 * (devices - 1) / devices * counted.unet
    return sent, memory, memory, counted.alone.weights


def fsdp2(counted: Pieces, devices: int) -> tuple[float, ...]:
    """As ddp. Weights are gathered for the forward and the backward pass, and gradients are scattered: of each, all but 1/N. The first process has the whole model
    besides; at the start every process has it twice."""
    alone, unet = counted.alone, counted.unet
    shards = (2 * unet + alone.moments) / devices
    others = alone.weights - unet + shards + counted.activations + counted.gathered
    sent = 3 * (devices - 1) / devices * unet
    return sent, others + alone.weights, others, 2 * alone.weights


WAY = {"DDP": ddp, "FSDP2": fsdp2}
# on one device there is neither
WAYS = [(way, devices) for way in WAY for devices in (1, 2, 4, 8) if way == "DDP" or devices > 1]


def table(rows: list[Row]) -> str:
    """In Markdown. A step takes the longer of its two times if sending hides behind computing, and
    their sum if it does not."""
    head = "model | checkpointing | | devices | first, GB | others, GB | at the start, GB"
    head += " | TFLOP a step | sent, GB | computing, s | sending, s"
    lines = [f"| {head} |", "| --- " * 11 + "|"]
    for row in rows:
        names = row.model, "yes" if row.checkpointing else "no", row.way, str(row.devices)
        numbers = (row.first_gb, row.others_gb, row.start_gb, row.tflop, row.sent_gb)
        cells = [f"{number:.1f}" for number in numbers]
        cells += [f"{row.compute_s:.2f}", f"{row.link_s:.2f}"]
        lines.append(f"| {' | '.join((*names, *cells))} |")
    return "\n".join(lines)


if __name__ == "__main__":
    run(main, OUTPUTS)
