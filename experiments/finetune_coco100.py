"""A hundred photographs: the model in the box, which has seen circles, squares and triangles, learns COCO's pictures at 64x64, on a CPU.

    minidiff data coco --annotations captions_val2017.json --images DIR --out coco100
    python experiments/finetune_coco100.py --data coco100

Two acts. The VAE of flat shapes learns photographs; then the U-Net and the text tower learn to draw them, with the flight recorder on. A tenth of
the pictures is held out: their loss says when learning turns into memorising, which a hundred pictures cannot avoid. Writes before_after.png,
losses.png, memorised.png, results.json, and finetune/ with the model (for `minidiff generate --model`) and report.html. Ctrl-C saves; --resume
goes on, bit for bit.

[1] Yoon, Choi, Kwon, Ryu. Diffusion Probabilistic Models Generalize when They Fail to Memorize. 2023. ICML workshop SPIGM
"""

import json
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from pathlib import Path

import matplotlib.figure
import torch
from jaxtyping import Float
from torch import Tensor

import minidiff
from minidiff import pipeline
from minidiff.cli.script import run
from minidiff.data.folder import CaptionedFolder, load_all, to_model
from minidiff.data.latents import Example
from minidiff.errors import UserError
from minidiff.evaluation import metrics
from minidiff.evaluation.features import pixels
from minidiff.figures import curves, plots
from minidiff.finetuning.groups import Group, split
from minidiff.finetuning.loop import finetune
from minidiff.finetuning.recorder.recorder import Recorder
from minidiff.options.finetuning import FineTuneConfig, RecorderConfig
from minidiff.options.sampling import SampleConfig, check_size
from minidiff.train import Loss, TrainConfig, train
from minidiff.training.device import pick_device
from minidiff.training.progress import follow, last_loss, peak_memory_gb, write_results
from minidiff.training.resume import read_log
from minidiff.training.seeds import generator_of
from minidiff.vae import VAE

PROMPTS = (
    "A large white bowl of many green apples.",
    "Apples in a blue bowl sitting on a brown counter.",
)
UNRELATED = "a small blue circle above a large red square"


def windows(
    images: Float[Tensor, "N 3 S S"], batch: int, seed: int, start: int
) -> Iterator[Float[Tensor, "B 3 s s"]]:
    """Batches start, start + 1, ... of windows of half the side, mirrored every other time: a network of convolutions learns from them as from
    whole pictures, and a hundred pictures have thousands of them."""
    side = images.shape[-1] // 2
    for k in count(start):
        generator = generator_of(seed, -1 - k)
        chosen = images[torch.randint(len(images), (batch,), generator=generator)]
        top, left, mirrored = torch.randint(side + 1, (3,), generator=generator).tolist()
        window = chosen[:, :, top : top + side, left : left + side]
        yield (window.flip(3) if mirrored % 2 else window).contiguous(
            memory_format=torch.channels_last
        )


@torch.no_grad()
def psnr(vae: VAE, images: Float[Tensor, "N 3 S S"]) -> float:
    """Peak signal-to-noise ratio in dB of pictures through the VAE, mean over pictures."""
    rebuilt = torch.cat(
        [
            vae.decode(vae.encode(part.to(vae.latent_scale.device))).clamp(-1, 1).cpu()
            for part in images.split(16)
        ]
    )
    return round(
        (-10 * ((rebuilt - images) / 2).pow(2).flatten(1).mean(1).log10()).mean().item(), 2
    )


def adapt_vae(
    vae: VAE,
    images: Float[Tensor, "N 3 S S"],
    folder: Path,
    steps: int,
    batch: int,
    lr: float,
    seed: int,
    resume: bool,
) -> None:
    """Act one: to photographs and back. The scale follows, so that latents are of unit variance again."""
    place, vae = vae.latent_scale.device, vae.float().requires_grad_(True)

    def loss(pictures: Float[Tensor, "B 3 s s"]) -> Loss:
        return {"loss": vae.loss(pictures.to(place))}

    config = TrainConfig(steps, lr, seed=seed)
    follow(
        train(
            loss, vae, partial(windows, images, batch, seed), config, folder=folder, resume=resume
        ),
        "1/2 VAE",
        steps,
        batch,
    )
    vae.requires_grad_(False).eval()
    vae.measure_scale(images[:256].to(place))


def losses(records: list[dict], path: Path) -> Path:
    """Train and validation loss at the same fixed t and noise, from the flight recorder, by the step; and by the tenth of t at both ends."""
    with curves.style():
        sheet = matplotlib.figure.Figure((7.5, 2.8), layout="constrained")
        by_step, by_tenth = sheet.subplots(1, 2)
        for name, colour in (("train", curves.COLOURS[0]), ("validation", curves.COLOURS[1])):
            mean = [sum(record[name]) / len(record[name]) for record in records]
            by_step.plot(
                [record["step"] for record in records], mean, ".-", color=colour, label=name
            )
            for record, style in ((records[0], ":"), (records[-1], "-")):
                by_tenth.plot(
                    [0.05 + k / 10 for k in range(10)],
                    record[name],
                    style,
                    color=colour,
                    label=f"{name}, step {record['step']}",
                )
        by_step.set(
            xlabel="step",
            ylabel="squared error of x0",
            title="at fixed t and noise",
            ylim=(0, None),
        )
        by_tenth.set(xlabel="t / T", title="by noise level", ylim=(0, None))
        for axis in (by_step, by_tenth):
            axis.legend()
        return curves.save(sheet, path)


def memorised(
    draw: Callable[[list[str]], Float[Tensor, "B 3 S S"]],
    captions: dict[str, list[str]],
    images: Float[Tensor, "N 3 S S"],
    path: Path,
) -> dict[str, float]:
    """How many drawings of each kind of caption are copies of training pictures, by the ratio test of metrics.memorised ([1]); and a figure,
    drawings above the training pictures nearest to them."""
    known, figures, rows = pixels(images), {}, {}
    for kind, some in captions.items():
        drawn = draw(some)
        distance, which = metrics.nearest(pixels(drawn), known)
        figures[f"copies_{kind}"] = round(metrics.memorised(pixels(drawn), known).mean().item(), 3)
        figures[f"nearest_{kind}"] = round(
            (distance[:, 0] / metrics.radii(known, 1).median()).mean().item(), 3
        )
        rows |= {
            f"{kind} captions": drawn[:8],
            "nearest in training" + " " * len(rows): images[which[:8, 0]],
        }
    plots.strip(rows, [""] * min(8, *map(len, captions.values())), path)
    return figures


OUTPUTS = ("before_after.png", "losses.png", "memorised.png")  # beside results.json


def main(
    data: Path,
    out: Path = Path("out/finetune_coco100"),
    model: str = "box",
    size: int = 64,
    caption_column: str = "text",
    vae_steps: int = 1500,
    vae_batch: int = 16,
    vae_lr: float = 1e-3,
    steps: int = 2500,
    batch: int = 16,
    lr: float = 1.5e-3,
    validation: float = 0.1,
    every: int = 500,
    sampling_steps: int = 25,
    device: str = "auto",
    seed: int = 0,
    resume: bool = False,
) -> None:
    """Fine-tune the model in the box on a captioned folder of photographs, and show what it learnt, and what it copied.

    Args:
        data: the captioned folder.
        out: folder for everything written.
        model: what to begin with; its VAE is trained too, so it should be a small one.
        size: side of the pictures in pixels.
        caption_column: the column of metadata.jsonl that holds the caption.
        vae_steps: training steps of the VAE.
        vae_batch: its windows a step.
        vae_lr: its peak learning rate.
        steps: training steps of the U-Net and the text tower.
        batch: their pictures a step.
        lr: their peak learning rate.
        validation: the share of the pictures to hold out.
        every: steps between two measurements.
        sampling_steps: steps from noise to picture, with the model's own sampler.
        device: auto, cpu, cuda or mps.
        seed: everything random follows from it.
        resume: go on where an interrupted run stopped.
    """
    if (out / "vae").exists() and not resume:
        raise UserError(
            f"{out} holds a run already; pass --resume to go on with it, or another --out."
        )
    base = minidiff.load(model, pick_device(device)).to(memory_format=torch.channels_last)
    check_size(size, base.vae.factor * base.unet.multiple)
    folder = CaptionedFolder(data, size, caption_column)
    pictures, captions = load_all(folder, size)
    images, (kept, held) = to_model(pictures), split(folder.paths, validation, seed)
    if not held:
        raise UserError(
            f"{data}: none of {len(captions)} pictures is held out at --validation {validation:g}; take a larger share."
        )
    base.size = size

    def drawn(wanted: list[str]) -> Float[Tensor, "B 3 S S"]:
        return pipeline.generate(base, wanted, SampleConfig(sampling_steps, seed=seed)).cpu()

    # What it draws before: what it makes of words it does not know.
    shown = [*PROMPTS, *(captions[i] for i in kept[:4]), *(captions[i] for i in held[:2])]
    before, figures = drawn(shown), {"psnr_before": psnr(base.vae, images[held])}

    adapt_vae(base.vae, images[kept], out / "vae", vae_steps, vae_batch, vae_lr, seed, resume)
    figures |= {
        "psnr_train": psnr(base.vae, images[kept]),
        "psnr_validation": psnr(base.vae, images[held]),
    }

    # Act two: what fine-tunes is the library's.
    with torch.no_grad():
        latents = torch.cat(
            [base.vae.encode(part.to(base.device)).cpu() for part in images.split(16)]
        )
    examples = [Example(z, caption) for z, caption in zip(latents, captions, strict=True)]
    prompts = {
        "caption": shown[2],
        "apples": PROMPTS[0],
        "held out": captions[held[0]],
        "unrelated": UNRELATED,
    }
    training, validating = [examples[i] for i in kept], [examples[i] for i in held]
    measured = Recorder(
        base,
        out / "finetune",
        prompts,
        images[kept],
        validating,
        training,
        RecorderConfig(every=every, steps=sampling_steps, seed=seed),
    )
    config = FineTuneConfig(
        steps=steps,
        lr=lr,
        batch=batch,
        warmup=min(100, steps // 10),
        text=True,
        ema=0.995,
        every=every,
        seed=seed,
    )
    groups = [Group("pictures", training)]
    base = finetune(base, groups, out / "finetune", config, measured, resume)

    # Before and after, under the same seeds; then the losses, and what is copied.
    after, names = (
        drawn(shown),
        [
            *PROMPTS,
            *(f"trained on: {captions[i]}" for i in kept[:4]),
            *(f"held out: {captions[i]}" for i in held[:2]),
        ],
    )
    pairs = torch.stack([before, after], 1).flatten(0, 1)
    print(
        plots.grid(
            pairs,
            [f"{when}. {name}" for name in names for when in ("before", "after")],
            out / "before_after.png",
            columns=4,
        )
    )
    records = [
        json.loads(line)
        for line in (out / "finetune" / "record.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    print(losses(records, out / "losses.png"))
    kinds = {"training": [captions[i] for i in kept[:32]], "held-out": [captions[i] for i in held]}
    figures |= memorised(drawn, kinds, images[kept], out / "memorised.png")
    print(out / "memorised.png")
    log = read_log(out / "finetune" / "training")
    ends = {
        f"{name}_{when}": round(sum(records[k][name]) / 10, 4)
        for name in ("train", "validation")
        for when, k in (("first", 0), ("last", -1))
    }
    best = min(records, key=lambda record: sum(record["validation"]))["step"]
    said = dict(
        best_validation_step=best,
        loss=last_loss(log),
        advice=measured.advice(),
        memory_gb=peak_memory_gb(),
    )
    made = dict(
        pictures=len(kept),
        held_out=len(held),
        size=size,
        vae_steps=vae_steps,
        steps=steps,
        batch=batch,
        lr=lr,
        seed=seed,
    )
    print(write_results(out, **made, **figures, **ends, **said))
    print(", ".join(f"{name} {value:g}" for name, value in (figures | ends).items()))
    print(said["advice"])


if __name__ == "__main__":
    run(main, OUTPUTS)
