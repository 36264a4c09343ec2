"""A hundred photographs: the model of photographs in the box learns COCO's pictures, on a CPU.

    minidiff data coco --annotations captions_val2017.json --images DIR --size 111 --out coco100
    python experiments/finetune_coco100.py --data coco100

Twice from the same weights: all of the U-Net and the text encoder; and a LoRA. A tenth of the
pictures is held out, and of every other picture one caption, which tells memory of a sentence from
memory of a picture. Copies with other colours and other words (recolour.py) say what a colour's
word means, and captions with words left out what the others mean. Writes asked.png, training.png, held_out.png, losses.png, results.json, and full/ and
lora/ with what was trained (for `minidiff generate --model` and `--lora`) and report.html of the
flight recorder. Ctrl-C saves; --resume goes on, bit for bit.

[1] Yoon, Choi, Kwon, Ryu. Diffusion Probabilistic Models Generalize when They Fail to Memorize.
    2023. ICML workshop SPIGM
"""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import matplotlib.figure
import torch
from photo_tuning import (
    Chosen,
    Images,
    computing,
    drawn,
    nearest,
    precision,
    share_own,
    sheet,
    squeezed,
    tell,
)
from recolour import common_words, copies, fewer_words

import minidiff
from minidiff.cli.script import run
from minidiff.data.folder import CaptionedFolder
from minidiff.data.latents import Example
from minidiff.errors import UserError
from minidiff.evaluation import features, metrics
from minidiff.figures import curves
from minidiff.finetuning.groups import Group, split
from minidiff.finetuning.loop import finetune
from minidiff.finetuning.recorder.recorder import Recorder
from minidiff.latent_diffusion import LatentDiffusion
from minidiff.options.finetuning import FineTuneConfig, LoRAConfig, Precision, RecorderConfig
from minidiff.text import token_ids
from minidiff.training.device import device_name, pick_device
from minidiff.training.progress import last_loss, peak_memory_gb, write_results
from minidiff.training.resume import read_log

PROMPTS = (
    "A large white bowl of many green apples.",
    "Apples in a blue bowl sitting on a brown counter.",
)
UNRELATED = "a photo of a school bus"
EACH = 4  # samples of each prompt
TEN = 10  # captions of each kind in a figure
UNSEEN = 40  # captions that were not learnt
OFTEN = 3  # a picture is learnt so many times as often as one of its copies
NETWORKS = ("pixels-8x8", "photos-resnet")  # in which the nearest picture is looked for
WAYS = ("full", "lora")


class Pictures(NamedTuple):
    """The hundred, and what is asked of each."""

    images: Images
    captions: list[list[str]]  # of each picture, those that are learnt
    unseen: dict[int, str]  # by picture, a caption that is not learnt
    trained: list[int]
    held_out: list[int]


def pictures(data: Path, column: str, size: int, room: int, share: float, seed: int) -> Pictures:
    """Those of a captioned folder. room: captions of more tokens are left out, where a picture has
    shorter ones. A picture that a prompt was made of is not held out."""
    folder = CaptionedFolder(data, size, column, several=True)
    images = torch.stack([squeezed(path, size) for path in folder.paths])
    captions = []
    for own in folder.alternatives:
        short = [text for text in own if len(token_ids(text)) <= room]
        captions.append(sorted(short or [own[0]], key=lambda text: text not in PROMPTS))
    free = [k for k, own in enumerate(captions) if not set(own) & set(PROMPTS)]
    _, held = split(free, share, seed)
    held_out = [free[k] for k in held]
    if not held_out:
        few = f"none of {len(captions)} pictures is held out"
        raise UserError(f"{data}: {few} at --validation {share:g}; take a larger share.")
    trained = [k for k in range(len(captions)) if k not in set(held_out)]
    unseen = {k: captions[k].pop() for k in trained if len(captions[k]) > 1}
    return Pictures(images, captions, unseen, trained, held_out)


@torch.no_grad()
def examples(model: LatentDiffusion, images: Images, captions: list[list[str]]) -> list[Example]:
    """Latents with their captions."""
    latents = torch.cat(
        [model.vae.encode(some.to(model.device)).cpu() for some in images.split(16)]
    )
    pairs = zip(latents, captions, strict=True)
    return [Example(z, own[0], tuple(own[1:])) for z, own in pairs]


@torch.no_grad()
def psnr(model: LatentDiffusion, images: Images) -> float:
    """Decibels of pictures through the VAE and back: no sample can be better."""
    again = torch.cat(
        [model.decode(model.vae.encode(x.to(model.device))) for x in images.split(16)]
    )
    errors = (again.clamp(-1, 1).cpu() - images).square().flatten(1).mean(1)
    return round((-10 * (errors / 4).log10()).mean().item(), 2)


@dataclass(frozen=True)
class Options:
    """What both ways are told."""

    batch: int
    every: int
    sampling_steps: int
    dtype: Precision
    seed: int
    resume: bool


def taught(
    way: str,
    model: LatentDiffusion,
    groups: list[Group],
    of: Pictures,
    out: Path,
    config: FineTuneConfig,
    options: Options,
) -> Recorder:
    """Fine-tune the model in place, with the flight recorder on."""
    validation = examples(model, of.images[of.held_out], [of.captions[k] for k in of.held_out])
    prompts = {"caption": of.captions[of.trained[0]][0], "apples": PROMPTS[0]}
    prompts |= {"held out": of.captions[of.held_out[0]][0], "unrelated": UNRELATED}
    recorder = Recorder(
        model,
        out / way,
        prompts,
        of.images[of.trained],
        validation,
        groups[0].examples,
        RecorderConfig(every=options.every, steps=options.sampling_steps, seed=options.seed),
    )
    finetune(model, groups, out / way, config, recorder, options.resume)
    return recorder


class Samples(NamedTuple):
    """What a model draws, all from the same noise."""

    asked: Images  # EACH of each prompt
    trained: Images  # of the first caption of each training picture
    held_out: Images
    unseen: Images | None  # of the caption that was not learnt


def samples(model: LatentDiffusion, of: Pictures, options: Options, all_of_them: bool) -> Samples:
    """all_of_them: of every caption. Else: of those in the figures."""
    asked = [prompt for prompt in PROMPTS for _ in range(EACH)]
    count, few = (None, UNSEEN) if all_of_them else (TEN, 0)
    learnt, new = ([of.captions[k][0] for k in rows[:count]] for rows in (of.trained, of.held_out))
    unseen = list(of.unseen.values())[:few]
    how = (options.dtype, options.sampling_steps, options.seed)
    images = drawn(model, [*asked, *learnt, *new, *unseen], *how)
    parts = images.split([len(asked), len(learnt), len(new), len(unseen)])
    return Samples(*parts[:3], parts[3] if unseen else None)


def measured(of: Pictures, drawings: Samples) -> dict[str, float]:
    """The share of samples that are nearest to their own picture: of captions that were learnt, of
    other words for the same pictures, and of pictures never seen. The first two among the training
    pictures, the last among the held-out ones. And the share of copies of a training picture, by
    the ratio test of [1], by kind of caption."""
    place = {k: row for row, k in enumerate(of.trained)}
    known, others = of.images[of.trained], of.images[of.held_out]
    figures = {}
    for network in NETWORKS:
        rows = list(range(len(of.trained)))
        figures[f"own_training_{network}"] = share_own(drawings.trained, rows, known, network)
        if drawings.unseen is not None:
            rows = [place[k] for k in of.unseen][: len(drawings.unseen)]
            share = share_own(drawings.unseen, rows, known, network)
            figures[f"own_other_words_{network}"] = share
        rows = list(range(len(of.held_out)))
        figures[f"own_held_out_{network}"] = share_own(drawings.held_out, rows, others, network)
    for kind in ("trained", "held_out", "asked"):
        fake = features.pixels(getattr(drawings, kind))
        copied = metrics.memorised(fake, features.pixels(known))
        figures[f"copies_{kind}"] = round(copied.mean().item(), 3)
    return figures


def sheets(of: Pictures, drawings: dict[str, Samples], out: Path) -> None:
    """asked.png, training.png and held_out.png: before, and after each way, with the training
    picture nearest to it below. A green frame: it is the picture's own."""
    known = of.images[of.trained]
    columns = {
        "asked": (None, [p for p in PROMPTS for _ in range(EACH)]),
        "trained": (of.images[of.trained], [of.captions[k][0] for k in of.trained]),
        "held_out": (of.images[of.held_out], [of.captions[k][0] for k in of.held_out]),
    }
    names = {"asked": "asked.png", "trained": "training.png", "held_out": "held_out.png"}
    for kind, (own, captions) in columns.items():
        shown = len(captions) if own is None else min(TEN, len(captions))
        first = "its picture" if kind == "trained" else "its picture, never seen"
        rows, marks = {} if own is None else {first: own[:shown]}, {}
        for way, every in drawings.items():
            images = getattr(every, kind)[:shown]
            rows[way] = images
            if way != "before":
                which = nearest(images, known)
                rows[f"nearest to {way}"] = known[which]
                if kind == "trained":
                    marks[f"nearest to {way}"] = [a == b for b, a in enumerate(which)]
        print(sheet(rows, captions[:shown], out / names[kind], marks))


def losses(records: dict[str, list[dict]], path: Path) -> Path:
    """Error of training and of held-out pictures at the same fixed t and noise, from the flight
    recorders."""
    with curves.style():
        figure = matplotlib.figure.Figure((6.4, 2.4), layout="constrained")
        for axis, (way, lines) in zip(
            figure.subplots(1, 2, sharey=True), records.items(), strict=True
        ):
            for name, label in (("train", "training"), ("validation", "held out")):
                means = [sum(line[name]) / len(line[name]) for line in lines]
                axis.plot([line["step"] for line in lines], means, ".-", label=label)
            axis.set(xlabel="step", title=way, ylim=(0, None))
            axis.legend()
        figure.axes[0].set_ylabel("error")
        return curves.save(figure, path)


def ends(lines: list[dict]) -> dict[str, float]:
    """Both errors before and after, and where that of the held-out pictures was least."""
    means = [{name: sum(line[name]) / 10 for name in ("train", "validation")} for line in lines]
    best = min(range(len(lines)), key=lambda k: means[k]["validation"])
    figures = {
        f"{name}_{when}": round(means[k][name], 4)
        for name in ("train", "validation")
        for when, k in (("first", 0), ("last", -1))
    }
    return figures | {"best_validation_step": lines[best]["step"]}


OUTPUTS = ("asked.png", "training.png", "held_out.png", "losses.png")  # beside results.json


def main(
    data: Path,
    out: Path = Path("out/finetune_coco100"),
    model: str = "photos",
    caption_column: str = "captions",
    steps: int = 1300,
    lora_steps: int = 600,
    batch: int = 32,
    lr: float = 2.5e-3,
    lora_lr: float = 6e-3,
    rank: int = 32,
    copies_of_each: int = 6,
    fewer: int = 6,
    validation: float = 0.1,
    every: int = 300,
    sampling_steps: int = 25,
    dtype: Chosen = "auto",
    device: str = "auto",
    threads: int = 2,
    seed: int = 0,
    resume: bool = False,
) -> None:
    """Fine-tune the model of photographs on a captioned folder, and show what it learnt, and what
    it copied.

    Args:
        data: the captioned folder.
        out: folder for everything written.
        model: what to begin with.
        caption_column: the column of metadata.jsonl that holds the caption, or a list of several.
        steps: training steps of all weights.
        lora_steps: training steps of the LoRA.
        batch: pictures a step.
        lr: peak learning rate of all weights.
        lora_lr: peak learning rate of the LoRA.
        rank: of the LoRA.
        copies_of_each: at most so many recoloured copies of a picture whose captions name a colour.
        fewer: captions of each picture with half of the words left out, and common ones put in.
        validation: the share of the pictures to hold out.
        every: steps between two measurements.
        sampling_steps: steps from noise to picture.
        dtype: precision to compute in; auto: bf16 where the processor has it.
        device: auto, cpu, cuda or mps.
        threads: cores to compute on.
        seed: everything random follows from it.
        resume: go on where an interrupted run stopped.
    """
    if any((out / way).exists() for way in WAYS) and not resume:
        held = f"{out} holds a run already"
        raise UserError(f"{held}; pass --resume to go on with it, or another --out.")
    torch.set_num_threads(threads)
    device, numbers = pick_device(device), precision(dtype)
    options = Options(batch, every, sampling_steps, numbers, seed, resume)
    base = minidiff.load(model, device)
    room = getattr(base.text, "context_length", 77) - 2
    of = pictures(data, caption_column, base.size, room, validation, seed)
    common = common_words([of.captions[k] for k in of.trained])
    learnt = [fewer_words(of.captions[k], fewer, k, common) for k in of.trained]
    own = examples(base, of.images[of.trained], learnt)
    made = [c for k in of.trained for c in copies(of.images[k], of.captions[k], copies_of_each, k)]
    if made:
        images = torch.stack([image for image, _ in made])
        captions = [fewer_words(own, fewer, k, common) for k, (_, own) in enumerate(made)]
        own = own * OFTEN + examples(base, images, captions)
    groups = [Group("pictures", own)]
    common = dict(
        batch=batch, optimizer="muon", text=True, ema=0.99, dtype=numbers, every=every, seed=seed
    )
    configs = {
        "full": FineTuneConfig(steps=steps, lr=lr, warmup=steps // 20, **common),
        "lora": FineTuneConfig(
            method="lora",
            steps=lora_steps,
            lr=lora_lr,
            warmup=lora_steps // 20,
            lora=LoRAConfig(rank),
            **common,
        ),
    }
    figures = {
        "pictures": len(of.trained),
        "held_out": len(of.held_out),
        "other_words": len(of.unseen),
        "recoloured": len(made),
        "psnr": psnr(base, of.images[of.held_out]),
    }
    print(", ".join(f"{name} {value:g}" for name, value in figures.items()), flush=True)

    with computing(device, numbers):
        for way, config in configs.items():
            tell(way, base, groups, config)
        drawings, ways = {"before": samples(base, of, options, False)}, {}
        records = {}
        for way, config in configs.items():
            start, tuned = time.perf_counter(), minidiff.load(model, device)
            recorder = taught(way, tuned, groups, of, out, config, options)
            seconds = round(time.perf_counter() - start)
            drawings[way] = samples(tuned, of, options, True)
            lines = (out / way / "record.jsonl").read_text(encoding="utf-8").splitlines()
            records[way] = [json.loads(line) for line in lines]
            ways[way] = measured(of, drawings[way]) | ends(records[way])
            ways[way] |= {"seconds": seconds, "loss": last_loss(read_log(out / way / "training"))}
            ways[way] |= {"steps": config.steps, "lr": config.lr, "advice": recorder.advice()}
            print(way, ways[way], sep=": ", flush=True)
    sheets(of, drawings, out)
    print(losses(records, out / "losses.png"))
    settings = dict(batch=batch, rank=rank, dtype=numbers, device=device_name(device), seed=seed)
    settings |= dict(sampling_steps=sampling_steps, memory_gb=peak_memory_gb())
    print(write_results(out, **figures, **settings, ways=ways))


if __name__ == "__main__":
    run(main, OUTPUTS)
