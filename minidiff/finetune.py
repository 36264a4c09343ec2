"""Fine-tuning: a trained model goes on learning, from pictures of yours. What is trained, with what, and what is written are all in this file;
what it learns from is in groups.py, the loop in train.py.

Full training moves every weight of the U-Net, and of the text tower if asked; LoRA (lora.py) trains a few numbers beside them. OUT/run.json keeps
what a run was made of, so that a resumed run is the same run, or is refused.

[1] Hang et al. Efficient Diffusion Training via Min-SNR Weighting Strategy. 2023. arXiv:2303.09556
"""
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from torch import Tensor, nn
from tqdm import tqdm

from minidiff import lora
from minidiff.data.folder import Pictures, load_picture, to_model
from minidiff.denoiser import Denoiser
from minidiff.errors import UserError
from minidiff.groups import Example, Group, batches, loss
from minidiff.latent_diffusion import LatentDiffusion
from minidiff.train import EMA, train
from minidiff.weights import files

METHODS = ("full", "lora")
DTYPES = {"fp32": None, "bf16": torch.bfloat16}
SHARED = 50_000_000  # trained numbers below which a CPU's cores share a batch by pictures; above, a second set of gradients would cost too much


def encoded(vae: nn.Module, data: Pictures, size: int, flip: bool = False) -> list[Example]:
    """The pictures of a folder as examples, squares of this side; with flip each is there a second time, mirrored."""
    device, found = next(vae.parameters()).device, []
    for path, caption in zip(tqdm(data.paths, "encoding pictures", unit="", leave=False), data.captions, strict=True):
        picture = to_model(load_picture(path, size))[None].to(device)
        with torch.no_grad():
            found += [Example(vae.encode(x)[0].cpu(), caption) for x in ([picture, picture.flip(3)] if flip else [picture])]
    return found


def contexts_of(text: nn.Module, captions: list[str]) -> dict[str, Float[Tensor, "L D"]]:
    """What a text tower that stays as it is says of each caption, the empty one among them."""
    with torch.no_grad():
        return {caption: text.encode([caption])[0].cpu() for caption in dict.fromkeys(["", *captions])}


def hearing(unet: nn.Module) -> tuple[str, ...]:
    """The layers a LoRA should adapt unless told otherwise: attention, and in a U-Net whose residual blocks hear the text too, these."""
    return (*lora.ATTENTION, "pool", "conv1", "conv2") if getattr(unet, "pool", None) is not None else lora.ATTENTION


def to_train(
    model: LatentDiffusion, denoiser: Denoiser, method: str, rank: int, alpha: float | None, layers: tuple[str, ...], text: bool
) -> nn.ModuleList:
    """What is trained, in float32, and nothing else: so a checkpoint holds no frozen weights. All else in the model is frozen."""
    model.requires_grad_(False)
    if method == "full":
        parts = [denoiser, *([model.text] if text else [])]
        return nn.ModuleList(part.float().requires_grad_(True) for part in parts)
    lora.add(model.unet, rank, alpha, layers or hearing(model.unet))
    if text:
        lora.add(model.text, rank, alpha)
    found = nn.ModuleList(layer.lora for layer in lora.adapted(model).values())
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
    dropout: float | None = None,
    min_snr: bool = False,
    ema: float | None = None,
    dtype: str = "fp32",
    checkpointing: bool = False,
    adam: Callable[..., torch.optim.Optimizer] | None = None,
    every: int = 100,
    seed: int = 0,
    recorder: object | None = None,
    resume: bool = False,
) -> LatentDiffusion:
    """Train `method` of the model on groups of examples, and write OUT/model, or OUT/lora.safetensors; returns the model, trained.

    batch: examples of every group in a batch, accumulate: batches in a step. rank, alpha, layers: of LoRA (lora.add); layers of the U-Net, by
    default those it hears by. text: train the text tower too. dropout: how often a caption is hidden; None is the model's own. min_snr: weigh noise
    levels as [1]. ema: the decay of an average of the weights, which is then what is recorded and written. every: steps between two checkpoints
    and two measurements of the recorder.
    """
    check(method, dtype, steps=steps, lr=lr, batch=batch, accumulate=accumulate, every=every, warmup=warmup, rank=rank, ema=ema, dropout=dropout)
    for group in groups:
        if not group.examples:
            raise UserError(f'nothing to learn from: the group "{group.name}" has no pictures.')
    dropout = model.dropout if dropout is None else dropout
    settings = dict(method=method, steps=steps, lr=lr, batch=batch, accumulate=accumulate, warmup=warmup, text=text, dropout=dropout, min_snr=min_snr)
    settings |= dict(ema=ema, dtype=dtype, optimizer=getattr(adam, "__name__", "adamw"), every=every, seed=seed)
    settings |= dict(rank=rank, alpha=alpha, layers=",".join(layers)) if method == "lora" else {}
    same_run(out, {"settings": settings, "model": digest(*model.state_dict().values()), "data": fingerprints(groups)}, resume)

    torch.manual_seed(seed)  # LoRA's A
    denoiser = Denoiser(model.unet, model.schedule, model.denoiser.target, "min-snr") if min_snr else model.denoiser
    trained = to_train(model, denoiser, method, rank, alpha, layers, text)
    for part in (model.unet, model.text):
        part.checkpointing = checkpointing
    captions = [example.caption for group in groups for example in group.examples]
    contexts = None if text or model.text.dim is None else contexts_of(model.text, captions)
    average, seen = None if ema is None else EMA(trained, ema), {}
    pieces = shares(model, trained, batch)
    loop = train(
        loss(model, contexts, denoiser, seen),
        trained,
        lambda start: batches(groups, model.schedule, batch // pieces, dropout, seed, start),
        steps,
        lr,
        warmup=warmup,
        accumulate=accumulate * pieces,
        threads=min(pieces, torch.get_num_threads()),
        ema=average,
        autocast=DTYPES[dtype],
        adam=adam,
        seed=seed,
        folder=out / "training",
        resume=resume,
        save_every=every,
    )

    since: list[dict[str, float]] = []  # the groups' losses at every step since the last record

    def record(step: int) -> None:
        if recorder is not None:
            trained.eval()
            with averaged(average):
                recorder.measure(step, mean(since))
        since.clear()

    if not (out / "training" / "checkpoint.pt").exists():
        record(0)
    with tqdm(desc=f"fine-tuning ({method})", total=steps, unit="step") as bar:
        for step in loop:
            if not bar.n:
                bar.initial = bar.n = step.step - 1  # a resumed loop starts further on
            since.append(mean([{name: value.item() for name, value in seen[k].items()} for k in sorted(seen)]))
            seen.clear()
            bar.set_postfix_str(", ".join(f"{name} {value:.3f}" for name, value in mean(since[-20:]).items()), refresh=False)
            bar.update()
            if step.step % every == 0 or step.step == steps:
                record(step.step)
    if average is not None:
        torch._foreach_copy_(average.weights, average.averages)
    write(model, method, out)
    return model.eval()


def shares(model: LatentDiffusion, trained: nn.Module, batch: int) -> int:
    """Into how many pieces a batch is cut, so that two cores work on pictures and not on one operation: 2 where that is possible, else 1.
    It follows from the run and not from how many cores there are today: the sum of two halves has other last bits than the whole."""
    few = sum(p.numel() for p in trained.parameters()) < SHARED
    random_inside = model.unet.numbers.get("dropout", 0) > 0  # threads that draw from one generator draw in any order
    return 2 if model.device.type == "cpu" and batch % 2 == 0 and few and not random_inside else 1


def mean(losses: list[dict[str, float]]) -> dict[str, float]:
    """Of each group, over some batches or steps."""
    return {name: sum(each[name] for each in losses) / len(losses) for name in (losses[0] if losses else ())}


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


def check(method: str, dtype: str, **numbers: float | None) -> None:
    """Every number that cannot be, before anything slow."""
    if method not in METHODS:
        raise UserError(f'no method "{method}"; there is {", ".join(METHODS)}.')
    if dtype not in DTYPES:
        raise UserError(f'no dtype "{dtype}" to train in; there is {", ".join(DTYPES)} (in fp16 gradients vanish).')
    if not math.isfinite(numbers["lr"]) or numbers["lr"] <= 0:
        raise UserError(f"lr is {numbers['lr']:g}; it must be above 0, as in 1e-4.")
    for name, least in (("steps", 1), ("batch", 1), ("accumulate", 1), ("every", 1), ("rank", 1), ("warmup", 0)):
        if numbers[name] < least:
            raise UserError(f"{name} is {numbers[name]}; it must be at least {least}.")
    if numbers["ema"] is not None and not 0 < numbers["ema"] < 1:
        raise UserError(f"ema is {numbers['ema']:g}; it must be between 0 and 1, as in 0.999.")
    if numbers["dropout"] is not None and not 0 <= numbers["dropout"] < 1:
        raise UserError(f"dropout is {numbers['dropout']:g}; it must be from 0 to below 1, as in 0.1.")


def digest(*tensors: Tensor) -> str:
    """Sixteen letters that change with any bit of them."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()[:16]


def fingerprints(groups: list[Group]) -> dict[str, list[str]]:
    """Of every group its weight, then of every example the picture and the caption."""
    return {
        group.name: [f"weight {group.weight:g}", *(f"{digest(e.latents)} {e.caption}" for e in group.examples)] for group in groups
    }


def same_run(out: Path, run: dict, resume: bool) -> None:
    """Start OUT/run.json, or compare with it: a run is resumed with what it was started with, or not at all."""
    file = out / "run.json"
    if not file.exists():
        out.mkdir(parents=True, exist_ok=True)
        fresh = out / "run.json.new"
        fresh.write_text(json.dumps(run, indent=1) + "\n", encoding="utf-8")
        os.replace(fresh, file)
        return
    if not resume:
        raise UserError(f"{out} holds a fine-tune already; pass --resume to go on with it, or another --out.")
    before = files.read_json(file)
    if not before.keys() >= run.keys() or not all(isinstance(before[name], dict) for name in ("settings", "data")):
        raise UserError(f"{file} is not of a fine-tune; pass another --out.")
    for name in {**run["settings"], **before["settings"]}:
        then, now = before["settings"].get(name), run["settings"].get(name)
        if then != now:
            raise UserError(f"{file}: this run was started with {name} {then}, not {now}; resume it with that, or pass another --out.")
    if before["model"] != run["model"]:
        raise UserError(f"{file}: this run was started from other weights; resume it with the model it was started from, or pass another --out.")
    for name in {**run["data"], **before["data"]}:
        then, now = before["data"].get(name, []), run["data"].get(name, [])
        if then != now:
            changed = [line.split(" ", 1)[1] for line in [*then, *now] if (line in then) != (line in now)]
            said = f'{len(then) - 1} pictures then, {len(now) - 1} now; the first that differs is of "{changed[0]}"' if changed else "another order"
            raise UserError(f'{file}: the data of "{name}" changed since this run was started ({said}); put it back, or pass another --out.')


def write(model: LatentDiffusion, method: str, out: Path) -> Path:
    """OUT/model, or OUT/lora.safetensors. What cannot be written now can be later: the last checkpoint has it."""
    place = out / ("model" if method == "full" else "lora.safetensors")
    try:
        if method == "full":
            return model.save(place)
        fresh = out / "fresh.safetensors"
        fresh.unlink(missing_ok=True)
        os.replace(lora.save(model, fresh), place)
        return place
    except (OSError, SafetensorError) as error:
        said = str(error).splitlines()[0]
        raise UserError(f"{place} could not be written ({said}). The training is kept: make room, and write it with --resume.") from error
