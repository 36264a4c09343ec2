"""Fine-tuning: a trained model goes on learning, from pictures of yours. What is trained, and with what, is all in this file;
what it learns from is in groups.py, the loop in train.py, what it writes in outcome.py.

Full training moves every weight of the U-Net, and of the text tower if asked; LoRA (lora.py) trains a few numbers beside them; textual inversion
(inversion.py) one word's vector, alone or beside either. OUT/run.json keeps what a run was made of, so that a resumed run is the same run, or is
refused.

[1] Hang et al. Efficient Diffusion Training via Min-SNR Weighting Strategy. 2023. arXiv:2303.09556
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from minidiff.data import latents as cache
from minidiff.data.buckets import bucket
from minidiff.data.folder import Pictures, load_picture
from minidiff.data.latents import Example
from minidiff.denoiser import Denoiser
from minidiff.errors import UserError
from minidiff.finetuning.groups import Batch, Group, batches, loss
from minidiff.finetuning.identity import identity, same_run
from minidiff.finetuning.outcome import keep, write
from minidiff.finetuning.recorder.recorder import Recorder
from minidiff.latent_diffusion import LatentDiffusion
from minidiff.losses import LEVELS, LR_MULTIPLIER
from minidiff.methods import inversion, lora
from minidiff.train import EMA, LossFn, train
from minidiff.training.optimizers import OPTIMIZERS

METHODS = ("full", "lora", "inversion")
DTYPES = {"fp32": None, "bf16": torch.bfloat16}
SHARED = 50_000_000  # trained numbers below which a CPU's cores share a batch by pictures; above, a second set of gradients would cost too much


def encoded(
    model: LatentDiffusion,
    data: Pictures,
    size: int,
    folder: Path | None,
    flip: bool = False,
    shapes: bool = False,
) -> list[Example]:
    """The pictures of a captioned folder as examples: squares of this side, or with shapes each of the shape nearest its own, and the same area.
    With flip each is there a second time, mirrored. folder: where the latents are kept."""
    sizes = [(size, size)] * len(data)
    if shapes:
        seen = (load_picture(path).shape for path in data.paths)
        sizes = [
            bucket(width, height, size**2, model.vae.factor * model.unet.multiple)
            for _, height, width in seen
        ]
    latents = cache.encoded(model.vae, data.paths, sizes, folder, flip)
    return [
        Example(z, caption) for z, caption in zip(latents, data.captions * (1 + flip), strict=True)
    ]


def hearing(unet: nn.Module) -> tuple[str, ...]:
    """The layers a LoRA should adapt unless told otherwise: attention, and in a U-Net whose residual blocks hear the text too, these."""
    return (
        (*lora.ATTENTION, "pool", "conv1", "conv2")
        if getattr(unet, "pool", None) is not None
        else lora.ATTENTION
    )


def to_train(
    model: LatentDiffusion,
    denoiser: Denoiser,
    method: str,
    rank: int,
    alpha: float | None,
    layers: tuple[str, ...],
    text: bool,
    word: inversion.Word | None = None,
) -> nn.ModuleList:
    """What is trained, in float32, and nothing else: so a checkpoint holds no frozen weights. All else in the model is frozen."""
    model.requires_grad_(False)
    words = [] if word is None else [word]
    if method == "inversion":
        return nn.ModuleList(words)
    if method == "full":
        parts = [denoiser, *([model.text] if text else [])]
        return nn.ModuleList([*(part.float().requires_grad_(True) for part in parts), *words])
    lora.add(model.unet, rank, alpha, layers or hearing(model.unet))
    if text:
        lora.add(model.text, rank, alpha)
    found = nn.ModuleList([*(layer.lora for layer in lora.adapted(model).values()), *words])
    if denoiser.log_error is not None:
        found.append(nn.ParameterList([denoiser.log_error.requires_grad_(True)]))
    return found


def finetune(
    model: LatentDiffusion,
    groups: list[Group],
    out: Path,
    *,
    method: str = "full",
    steps: int,
    lr: float,
    batch: int = 4,
    accumulate: int = 1,
    warmup: int = 10,
    rank: int = 8,
    alpha: float | None = None,
    layers: tuple[str, ...] = (),
    text: bool = False,
    word: str | None = None,
    word_lr: float | None = None,
    like: str | None = None,
    dropout: float | None = None,
    levels: tuple[float, float] | None = None,
    min_snr: bool = False,
    ema: float | None = None,
    dtype: str = "fp32",
    checkpointing: bool = False,
    optimizer: str = "adamw",
    every: int = 100,
    seed: int = 0,
    recorder: Recorder | None = None,
    resume: bool = False,
) -> LatentDiffusion:
    """Train `method` of the model on groups of examples; returns the model, trained. Writes OUT/model, OUT/lora.safetensors or
    OUT/embedding.safetensors.

    batch: examples of every group in a batch, accumulate: batches in a step. rank, alpha, layers: of LoRA (lora.add); layers of the U-Net, by
    default those it hears by. text: train the text tower too. word: train this word's vector too, at the rate word_lr (None: lr), from that of
    the word `like` (None: from its own); the method "inversion" trains nothing else. dropout: how often a caption is hidden; None is the model's
    own. levels: mean and spread of logit(t / T) of the t that are trained on; None draws t as the schedule does. min_snr: weigh noise levels as
    [1]. ema: the decay of an average of the weights, which is then what is recorded and written. every: steps between two checkpoints and two
    measurements of the recorder.
    """
    numbers = dict(
        steps=steps, lr=lr, batch=batch, accumulate=accumulate, warmup=warmup, every=every
    )
    check(method, optimizer, dtype, word, **numbers, rank=rank, ema=ema, dropout=dropout)
    for group in groups:
        if not group.examples:
            raise UserError(f'nothing to learn from: the group "{group.name}" has no pictures.')
    if levels and not hasattr(model.schedule, "mean"):
        raise UserError(
            f"levels cannot be chosen for a schedule of the kind {type(model.schedule).__name__}; it draws t its own way."
        )
    dropout = model.dropout if dropout is None else dropout
    settings = {"method": method} | numbers
    settings |= dict(
        text=text,
        dropout=dropout,
        min_snr=min_snr,
        ema=ema,
        dtype=dtype,
        optimizer=optimizer,
        seed=seed,
    )
    settings |= dict(rank=rank, alpha=alpha, layers=",".join(layers)) if method == "lora" else {}
    settings |= {"levels": list(levels)} if levels else {}
    settings |= dict(word=word, word_lr=word_lr, like=like) if word else {}
    same_run(out, identity(model, groups, settings), resume)

    torch.manual_seed(seed)  # LoRA's A
    denoiser = (
        Denoiser(model.unet, model.schedule, model.denoiser.target, "min-snr")
        if min_snr
        else model.denoiser
    )
    named = (
        inversion.Word(model.text, word, like, (word_lr or lr) / lr).to(model.device)
        if word
        else None
    )
    trained = to_train(model, denoiser, method, rank, alpha, layers, text, named)
    hook = named.hang(model.text) if named else None
    for part in (model.unet, model.text):
        part.checkpointing = checkpointing
    captions = [example.caption for group in groups for example in group.examples]
    contexts = (
        None
        if text or word or model.text.dim is None
        else cache.contexts(model.text, captions, out / "cache")
    )
    average, seen = None if ema is None else EMA(trained, ema), {}
    pieces, loss_fn = shares(model, trained, batch), loss(model, contexts, denoiser, seen)
    times = replace(model.schedule, mean=levels[0], std=levels[1]) if levels else model.schedule

    def data(start: int) -> Iterator[Batch]:
        return batches(groups, times, batch // pieces, dropout, seed, start)

    if denoiser.log_error is not None:
        settle(denoiser, loss_fn, data(0))
        seen.clear()
    loop = train(
        loss_fn,
        trained,
        data,
        steps,
        lr,
        warmup=warmup,
        accumulate=accumulate * pieces,
        threads=min(pieces, torch.get_num_threads()),
        ema=average,
        autocast=DTYPES[dtype],
        optimizer=optimizer,
        seed=seed,
        folder=out / "training",
        resume=resume,
        save_every=every,
    )

    since: list[dict[str, float]] = []  # the groups' losses at every step since the last record

    def record(step: int, rate: float | None) -> None:
        if recorder is not None:
            with averaged(average):
                recorder.measure(step, mean(since), rate)
                if step and recorder.best() == step:
                    keep(model, method, out, named, step, steps)
        since.clear()

    if not (out / "training" / "checkpoint.pt").exists():
        record(0, None)
    with tqdm(desc=f"fine-tuning ({method})", total=steps, unit="step") as bar:
        for step in loop:
            if not bar.n:
                bar.initial = bar.n = step.step - 1  # a resumed loop starts further on
            since.append(
                mean(
                    [{name: value.item() for name, value in seen[k].items()} for k in sorted(seen)]
                )
            )
            seen.clear()
            bar.set_postfix_str(
                ", ".join(f"{name} {value:.3f}" for name, value in mean(since[-20:]).items()),
                refresh=False,
            )
            bar.update()
            if step.step % every == 0 or step.step == steps:
                record(step.step, step.lr)
    if average is not None:
        with torch.no_grad():
            torch._foreach_copy_(average.weights, average.averages)
    if named:
        hook.remove()
    write(model, method, out, named)
    return model.eval()


@torch.no_grad()
def settle(denoiser: Denoiser, loss_fn: LossFn, data: Iterator[Batch], count: int = 320) -> None:
    """Begin the learned weighting at its optimum, u = log E[error | t], measured on some examples: no file keeps it, and from 0 it would take a
    fine-tune's length to get there."""
    errors, places = [], []
    denoiser.log_error.zero_()
    for batch in data:
        for part in batch.parts:  # each alone is a batch whose loss is known for each example
            each, where = loss_fn(Batch(batch.number, [part._replace(weight=1.0)]))
            errors.append(each.cpu())
            places.append(where)
        if sum(map(len, errors)) >= count:
            break
    level = (torch.cat(places) * LEVELS).long().clamp(max=LEVELS - 1)
    for place in level.unique():
        denoiser.log_error[place] = torch.cat(errors)[level == place].mean().log() / LR_MULTIPLIER


def shares(model: LatentDiffusion, trained: nn.Module, batch: int) -> int:
    """Into how many pieces a batch is cut, so that two cores work on pictures and not on one operation: 2 where that is possible, else 1.
    It follows from the run and not from how many cores there are today: the sum of two halves has other last bits than the whole."""
    few = sum(p.numel() for p in trained.parameters()) < SHARED
    random_inside = (
        getattr(model.unet.config, "dropout", 0) > 0
    )  # threads that draw from one generator draw in any order
    return 2 if model.device.type == "cpu" and batch % 2 == 0 and few and not random_inside else 1


def mean(losses: list[dict[str, float]]) -> dict[str, float]:
    """Of each group, over some batches or steps."""
    return {
        name: sum(each[name] for each in losses) / len(losses)
        for name in (losses[0] if losses else ())
    }


@contextmanager
def averaged(ema: EMA | None) -> Iterator[None]:
    """The averages in the weights' place, for as long as one looks."""
    if ema is None:
        yield
        return
    kept = [weight.detach().clone() for weight in ema.weights]
    with torch.no_grad():
        torch._foreach_copy_(ema.weights, ema.averages)
    try:
        yield
    finally:
        with torch.no_grad():
            torch._foreach_copy_(ema.weights, kept)


def check(
    method: str, optimizer: str, dtype: str, word: str | None = None, **numbers: float | None
) -> None:
    """Every number that cannot be, before anything slow."""
    if method not in METHODS:
        raise UserError(f'no method "{method}"; there is {", ".join(METHODS)}.')
    if method == "inversion" and not word:
        raise UserError(
            'the method "inversion" learns one word\'s vector, and none is named; minidiff dreambooth finds it in its prompt.'
        )
    if optimizer not in OPTIMIZERS:
        raise UserError(f'no optimizer "{optimizer}"; there is {", ".join(OPTIMIZERS)}.')
    if dtype not in DTYPES:
        raise UserError(
            f'no dtype "{dtype}" to train in; there is {", ".join(DTYPES)} (in fp16 gradients vanish).'
        )
    if not math.isfinite(numbers["lr"]) or numbers["lr"] <= 0:
        raise UserError(f"lr is {numbers['lr']:g}; it must be above 0, as in 1e-4.")
    for name, least in (
        ("steps", 1),
        ("batch", 1),
        ("accumulate", 1),
        ("every", 1),
        ("rank", 1),
        ("warmup", 0),
    ):
        if numbers[name] < least:
            raise UserError(f"{name} is {numbers[name]}; it must be at least {least}.")
    if numbers["ema"] is not None and not 0 < numbers["ema"] < 1:
        raise UserError(f"ema is {numbers['ema']:g}; it must be between 0 and 1, as in 0.999.")
    if numbers["dropout"] is not None and not 0 <= numbers["dropout"] < 1:
        raise UserError(
            f"dropout is {numbers['dropout']:g}; it must be from 0 to below 1, as in 0.1."
        )
