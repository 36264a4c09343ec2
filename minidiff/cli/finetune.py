"""The verb that goes on training a model, on a captioned folder."""

import shlex
from pathlib import Path
from typing import Annotated

import tyro

from minidiff.cli import options
from minidiff.cli.options import EXAMPLE, MODEL, Device, Integer, Listed, Number
from minidiff.errors import UserError
from minidiff.options.sampling import check_size

Data = Annotated[Path, tyro.conf.arg(metavar="DIR")]
Method = Annotated[str, tyro.conf.arg(metavar="full|lora")]
Precision = Annotated[str, tyro.conf.arg(metavar="fp32|bf16")]
Optimizer = Annotated[str, tyro.conf.arg(metavar="adamw|adamw8bit")]
RATES = {"full": 1e-5, "lora": 1e-4}  # what is usual for Stable Diffusion
SMALL, FASTER = (
    50_000_000,
    20,
)  # a U-Net of fewer weights, such as the box's, learns in steps that many times as long
THUMBNAIL = 128  # pixels: what the report compares samples with


def finetune(
    data: Data,
    model: Path = MODEL,
    method: Method = "full",
    steps: int = 400,
    lr: Number = None,
    batch: int = 4,
    accumulate: int = 1,
    warmup: int = 10,
    rank: int = 8,
    alpha: Number = None,
    layers: Listed = "",
    text: bool = False,
    dropout: Number = None,
    min_snr: bool = False,
    ema: Number = None,
    dtype: Precision = "fp32",
    checkpointing: bool = False,
    optimizer: Optimizer = "adamw",
    size: Integer = None,
    buckets: bool = False,
    flip: bool = False,
    caption_column: str = "text",
    validation: float = 0.1,
    unrelated: str = EXAMPLE,
    every: int = 100,
    resume: bool = False,
    seed: int = 0,
    device: Device = "auto",
    out: Path = Path("out/finetune"),
) -> None:
    """Go on training a model, on your captioned pictures: every weight of it, or a LoRA beside them.

    Args:
        data: a captioned folder (metadata.jsonl and pictures); `minidiff data check` says whether it is fit.
        model: box, the small model that ships with minidiff; our folder, a diffusers folder, one .safetensors or .ckpt file of Stable Diffusion,
            or a name on the Hugging Face Hub.
        method: full moves every weight of the U-Net and writes a model; lora trains a few numbers and writes a small file.
        steps: optimizer steps.
        lr: the peak learning rate; after a warm-up it falls to 0 as half a cosine. Left out, 1e-5 for full and 1e-4 for lora;
            for a small U-Net such as the box's, 20 times that.
        batch: pictures in a batch.
        accumulate: batches in a step: a larger step in the same memory.
        warmup: steps in which the rate rises.
        rank: of the LoRA: how much it can learn, and how large its file is.
        alpha: of the LoRA; its change is weighed by alpha / rank. Left out, it is the rank.
        layers: ends of the names of the U-Net's layers that get a LoRA, as in q,k,v,out. Left out, those by which it hears words.
        text: train the text tower too.
        dropout: how often a caption is hidden, so that guidance goes on working. Left out, it is the model's own.
        min_snr: weigh noise levels by min(SNR, 5): steadier, for Stable Diffusion.
        ema: write an average of the weights, of this decay, as in 0.999.
        dtype: the precision to compute in; what is trained stays in fp32.
        checkpointing: compute activations a second time on the way back: far less memory, a third more time.
        optimizer: adamw8bit takes a quarter of AdamW's memory, and needs bitsandbytes.
        size: side of the pictures in pixels. Left out, it is the size the model was trained at.
        buckets: keep the pictures' shapes, nearly, each with the same area; otherwise the middle square is cut out.
        flip: show mirrored pictures too; not where captions say left and right.
        caption_column: where metadata.jsonl has the captions.
        validation: the share of the pictures to hold out: never trained on.
        unrelated: a prompt that the pictures say nothing about; the report shows what becomes of it.
        every: steps between two checkpoints, and between two rows of the report.
        resume: go on where an interrupted run stopped, bit for bit.
        seed: everything random follows from it.
        device: where to compute; auto takes a GPU if there is one.
        out: folder for the result, report.html, and the training's checkpoint and log.
    """
    options.check_out(out)
    options.check_seed(seed)
    if not 0 <= validation < 1:
        raise UserError(f"--validation is {validation:g}; it must be a share from 0 to below 1.")
    device = options.pick_device(device)
    from minidiff import load
    from minidiff.data.folder import CaptionedFolder
    from minidiff.finetuning import estimate
    from minidiff.finetuning import loop as tuning
    from minidiff.finetuning.groups import split
    from minidiff.finetuning.identity import check_free
    from minidiff.methods import lora

    numbers = dict(
        steps=steps,
        lr=1.0 if lr is None else lr,
        batch=batch,
        accumulate=accumulate,
        every=every,
        warmup=warmup,
    )
    numbers |= dict(rank=rank, ema=ema, dropout=dropout)
    tuning.check(method, optimizer, dtype, **numbers)
    check_free(out, resume)
    folder = CaptionedFolder(data, caption_column=caption_column)
    diffusion = load(model, device)
    if lr is None:
        small = sum(p.numel() for p in diffusion.unet.parameters()) < SMALL
        numbers["lr"] = RATES[method] * (FASTER if small else 1)
    targets, side = tuple(options.words(layers)), size or diffusion.size
    if method == "lora":
        lora.chosen(
            diffusion.unet, targets or tuning.hearing(diffusion.unet)
        )  # complains of names before anything slow
    check_size(side, diffusion.vae.factor * diffusion.unet.multiple)
    examples = tuning.encoded(diffusion, folder, side, out / "cache", flip, buckets)
    kept, held_out = split(len(folder), validation, seed)
    training = [examples[mirror * len(folder) + i] for mirror in range(1 + flip) for i in kept]
    print(f"{len(kept)} pictures to train on, {len(held_out)} held out, {side}x{side} pixels")
    ways = (
        dict(rank=rank, targets=targets or tuning.hearing(diffusion.unet))
        if method == "lora"
        else {}
    )
    ways |= dict(
        accumulate=accumulate,
        text=text,
        checkpointing=checkpointing,
        bf16=dtype == "bf16",
        optimizer=optimizer,
        ema=ema is not None,
    )
    print(estimate.forecast(diffusion, estimate.Settings(batch, (side, side), **ways), steps))
    eye = (
        {"network": "critic-attributes"} if model == MODEL else {}
    )  # the box draws the built-in world, which this network sees best
    pictures = [folder.paths[i] for i in kept]
    recorder = recorded(
        diffusion,
        out,
        pictures,
        training,
        [examples[i] for i in held_out],
        unrelated,
        every=every,
        seed=seed,
        **eye,
    )
    how = dict(
        method=method,
        alpha=alpha,
        layers=targets,
        text=text,
        min_snr=min_snr,
        dtype=dtype,
        checkpointing=checkpointing,
    )
    how |= dict(optimizer=optimizer, seed=seed, resume=resume, recorder=recorder)
    tuning.finetune(diffusion, [tuning.Group("data", training)], out, **numbers, **how)
    print(recorder.advice(), recorder.report(), sep="\n")
    print(*use(diffusion, method, model, out, training[0].caption, recorder.best()), sep="\n")


def use(
    diffusion, method: str, model: Path, out: Path, caption: str, best: int | None
) -> list[str]:
    """What was written, and the commands that use it. best: the step that the recorder would go back to."""
    from minidiff.checkpoints import write
    from minidiff.finetuning.outcome import kept

    try:
        write.check(diffusion)
        layout = "diffusers"
    except UserError:  # the model in the box, and others that only minidiff draws with
        layout = "minidiff"
    parts = {
        "full": ["model"],
        "lora": ["lora.safetensors", "embedding.safetensors"],
        "inversion": ["embedding.safetensors"],
    }[method]

    def found(folder: Path) -> tuple[list[Path], str]:
        written = [folder / part for part in parts if (folder / part).exists()]
        return written, f"{model} " + " ".join(
            f"--{path.stem} {path}" for path in written
        ) if method != "full" else str(written[0])

    written, how = found(out)
    lines = [
        *map(str, written),
        f"draw with it:      minidiff generate {shlex.quote(caption)} --model {how}",
    ]
    if best is not None and kept(out, best).exists():
        lines.append(
            f"as of step {best}: ".ljust(19)
            + f"minidiff generate {shlex.quote(caption)} --model {found(kept(out, best))[1]}"
        )
    if method != "full":
        source, _, added = how.partition(" ")
        lines.append(
            f"one model of both: minidiff convert {source} {out / 'merged'} --to {layout} {added}"
        )
    elif layout == "diffusers":
        lines.append(
            f"for other tools:   minidiff convert {written[0]} {out / 'diffusers'} --to diffusers"
        )
    return lines


def recorded(
    diffusion,
    out: Path,
    pictures: list[Path],
    training: list,
    held_out: list,
    unrelated: str,
    **how,
):
    """The flight recorder of a fine-tune: a caption that is trained on, one that is not, and a prompt that should stay as it is."""
    import torch

    from minidiff.data.folder import load_picture, to_model
    from minidiff.finetuning.recorder.recorder import Recorder

    prompts = (
        {"training caption": training[0].caption}
        | ({"held-out caption": held_out[0].caption} if held_out else {})
        | {"unrelated": unrelated}
    )
    shown = torch.stack(
        [to_model(load_picture(path, min(diffusion.size, THUMBNAIL))) for path in pictures]
    )
    return Recorder(diffusion, out, prompts, shown, held_out, training, **how)
