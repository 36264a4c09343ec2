"""Fine-tuning: a trained model learns on, from your images.

This file says what is trained: every weight of the U-Net, and of the text encoder if asked; a LoRA
(methods/lora.py) beside them; a word's vector (methods/inversion.py), alone or beside either. What
it learns from is in groups.py, the folder it writes in run.py, the loop itself in train.py.

[1] Hang et al. Efficient Diffusion Training via Min-SNR Weighting Strategy. 2023. arXiv:2303.09556
"""

import copy
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from torch import nn
from tqdm import tqdm

from minidiff.data.latents import encode_captions
from minidiff.denoiser import Denoiser
from minidiff.errors import UserError
from minidiff.finetuning import run
from minidiff.finetuning.groups import Batch, Group, GroupLoss, batches, pieces
from minidiff.latent_diffusion import LatentDiffusion
from minidiff.losses import LEVELS, LR_MULTIPLIER
from minidiff.methods import inversion, lora
from minidiff.options.finetuning import FineTuneConfig
from minidiff.schedules import NoiseSchedule
from minidiff.train import EMA, LossFn, TrainConfig, train
from minidiff.training import distributed, optimizers, ranks, tensorboard
from minidiff.training.resume import checkpoints, read_log

LR = {"full": 1e-5, "lora": 1e-4, "inversion": 5e-4}  # what is usual for Stable Diffusion
SMALL, SMALL_LR = 50_000_000, 20  # a U-Net of fewer weights learns at a rate that many times higher
DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
SHARED = 50_000_000  # with more trained weights a second set of gradients costs too much memory


@runtime_checkable
class Observer(Protocol):
    """Measures the model at the steps that are due, and names the best so far: the flight
    recorder. Steps that are due are multiples of config.every."""

    def measure(self, step: int, losses: dict[str, float], lr: float | None = None) -> object: ...

    def due(self, step: int) -> bool: ...

    def last(self) -> int | None: ...

    def best(self) -> int | None: ...


def finetune(
    model: LatentDiffusion,
    groups: list[Group],
    out: Path,
    config: FineTuneConfig,
    recorder: Observer | None = None,
    resume: bool = False,
) -> LatentDiffusion:
    """Train the model on groups of examples; returns it, trained. Writes OUT/run.json, which a
    resumed run must match, and the results (run.py); with config.ema those of the averages."""
    config = completed(config, model)
    check(groups, config, model.schedule)
    with distributed.main_first():
        if ranks.is_main():
            run.start(out, run.identity(model, groups, config), resume)

    # The parts: what is trained, its average, its loss, its batches.
    torch.manual_seed(config.seed)  # LoRA's A
    whole_model, shard = model, config.shard and ranks.size() > 1
    if shard:  # a copy learns, and is brought back whole for the recorder and the results
        model = copy.deepcopy(model)
        whole_model.to(model.device if ranks.is_main() else "cpu")
    denoiser = denoiser_of(model, config)
    word = trained_word(model, config)
    trained = to_train(model, denoiser, config, word)
    attached = word.attach(model.text) if word else []
    for network in (model.unet, *inversion.encoders(model.text)):
        network.checkpointing = config.checkpointing
    average = None if config.ema is None else EMA(trained, config.ema)
    with distributed.main_first():
        contexts = fixed_contexts(model, groups, config, out)
    loss_fn = GroupLoss(model, contexts, denoiser)
    schedule = model.schedule
    if config.t_mean is not None:
        schedule = replace(schedule, mean=config.t_mean, std=config.t_std)
    whole = partial(batches, groups, schedule, config.batch, config.dropout, config.seed)
    if denoiser.log_error is not None:
        settle(denoiser, loss_fn, whole(0))
    training = train_config(config, shares(model, trained, config.batch))
    run.check_disk(out, *sizes(model, trained, config), recorder is not None)

    # The loop.
    keep = partial(run.write_best, whole_model, config, out, word)
    observe = partial(measure, recorder, None if shard else average, keep)
    learnt = trained if average is None else average.average
    result = to_train(whole_model, denoiser_of(whole_model, config), config) if shard else None
    if recorder and not checkpoints(out / "training"):
        observe(0, {}, None)
    cut = partial(in_pieces, whole, training.pieces)
    steps = train(loss_fn, trained, cut, training, average, out / "training", resume)
    steps = tensorboard.logged(steps, out / "training", config.tensorboard)
    recent: deque[dict[str, float]] = deque(maxlen=20)
    title = f"fine-tuning ({config.method})"
    with closing(steps), tqdm(desc=title, total=config.steps, unit="step") as bar:
        for step in steps:
            if not bar.n:
                bar.initial = bar.n = step.step - 1  # a resumed run starts further on
            recent.append(step.parts)
            losses = (f"{name} {value:.3f}" for name, value in mean(list(recent)).items())
            bar.set_postfix_str(", ".join(losses), refresh=False)
            bar.update()
            if shard and (step.step % config.every == 0 or step.step == config.steps):
                result.load_state_dict(distributed.whole(learnt.state_dict()))
            if recorder and (recorder.due(step.step) or step.step == config.steps):
                observe(step.step, since_last(out, step.step, recorder.due), step.lr)

    # The results.
    if average is not None and not shard:
        put(average.averages, average)
    for hook in attached:
        hook.remove()
    if ranks.is_main():
        run.write(whole_model, config.method, out, word)
    return whole_model.eval()


def completed(config: FineTuneConfig, model: LatentDiffusion) -> FineTuneConfig:
    """The config with the learning rate and the dropout that suit this model filled in."""
    dropout = model.dropout if config.dropout is None else config.dropout
    lr = config.lr
    if lr is None:
        small = sum(p.numel() for p in model.unet.parameters()) < SMALL
        lr = LR[config.method] * (SMALL_LR if small else 1)
    return replace(config, lr=lr, dropout=dropout)


def check(groups: list[Group], config: FineTuneConfig, schedule: NoiseSchedule) -> None:
    for group in groups:
        if not group.examples:
            raise UserError(f'nothing to learn from: the group "{group.name}" has no images.')
        sizes = Counter(tuple(e.latents.shape[1:]) for e in group.examples)
        few = {size: n for size, n in sizes.items() if len(sizes) > 1 and 2 * n <= config.batch}
        for (height, width), n in few.items():
            warnings.warn(
                f"the bucket of {width}x{height} latents has {n} of the {len(group.examples)} "
                f"images, and a batch takes {config.batch}: each is seen {config.batch / n:.3g} "
                "times as often as others; take a smaller batch, or more images of that shape",
                stacklevel=3,
            )
    if config.t_mean is not None and not hasattr(schedule, "mean"):
        raise UserError(
            "t_mean and t_std cannot be chosen for a schedule of the kind "
            f"{type(schedule).__name__}; it has its own distribution of t."
        )


def denoiser_of(model: LatentDiffusion, config: FineTuneConfig) -> Denoiser:
    """The model's own, or one with another weighting."""
    own = model.denoiser
    return Denoiser(model.unet, own.schedule, own.target, "min-snr") if config.min_snr else own


def trained_word(model: LatentDiffusion, config: FineTuneConfig) -> inversion.Word | None:
    """The word whose vector is trained, if any."""
    if not config.word:
        return None
    multiplier = (config.word_lr or config.lr) / config.lr
    return inversion.Word(model.text, config.word, config.like, multiplier).to(model.device)


def to_train(
    model: LatentDiffusion,
    denoiser: Denoiser,
    config: FineTuneConfig,
    word: inversion.Word | None = None,
) -> nn.ModuleList:
    """What is trained, in float32, and all that a checkpoint holds; the rest is frozen."""
    model.requires_grad_(False)
    trained = nn.ModuleList()
    if config.method == "full":
        parts = [denoiser, model.text] if config.text else [denoiser]
        trained.extend(part.float().requires_grad_(True) for part in parts)
    if config.method == "lora":
        rank, alpha = config.lora.rank, config.lora.alpha
        lora.add(model.unet, rank, alpha, targets(model.unet, config))
        if config.text:
            lora.add(model.text, rank, alpha)
        trained.extend(layer.lora for layer in lora.adapted(model).values())
    if config.text_lr is not None:
        for parameter in model.text.parameters():
            parameter.lr_multiplier = config.text_lr / config.lr
    if word is not None:
        trained.append(word)
    if config.method == "lora" and denoiser.log_error is not None:
        trained.append(nn.ParameterList([denoiser.log_error.requires_grad_(True)]))
    return trained


def targets(unet: nn.Module, config: FineTuneConfig) -> tuple[str, ...]:
    """The names of the layers that get a LoRA. Default: all that read the text: attention, and in
    some U-Nets the residual blocks."""
    if config.lora.targets:
        return config.lora.targets
    pooled = getattr(unet, "pool", None) is not None
    return (*lora.ATTENTION, "pool", "conv1", "conv2") if pooled else lora.ATTENTION


def fixed_contexts(
    model: LatentDiffusion, groups: list[Group], config: FineTuneConfig, out: Path
) -> dict[str, torch.Tensor] | None:
    """The contexts of all captions, cached, unless the text encoder learns (or has no width)."""
    if config.text or config.word or model.text.dim is None:
        return None
    examples = [example for group in groups for example in group.examples]
    captions = [caption for e in examples for caption in (e.caption, *e.others)]
    return encode_captions(model.text, captions, out / "cache")


def train_config(config: FineTuneConfig, pieces: int) -> TrainConfig:
    return TrainConfig(
        steps=config.steps,
        lr=config.lr,
        lr_schedule=config.lr_schedule,
        warmup=config.warmup,
        accumulate=config.accumulate,
        pieces=config.pieces or pieces,
        threads=1 if config.pieces else min(pieces, torch.get_num_threads()),
        autocast=DTYPES[config.dtype],
        shard=config.shard,
        optimizer=config.optimizer,
        seed=config.seed,
        save_every=config.save_every or config.every,
        background=config.background,
    )


def sizes(model: LatentDiffusion, trained: nn.Module, config: FineTuneConfig) -> tuple[int, int]:
    """Bytes of a checkpoint, and of the result."""
    weights = [p for p in trained.parameters() if p.requires_grad]
    moments = sum(optimizers.moments(p, config.optimizer) for p in weights)
    own = sum(p.nbytes for p in weights)
    whole = sum(p.nbytes for p in model.parameters()) if config.method == "full" else own
    return moments + own * (2 if config.ema else 1), whole


def in_pieces(whole: Callable[[int], Iterator[Batch]], count: int, start: int) -> Iterator[Batch]:
    """The pieces of batches start, start + 1, ..."""
    for batch in whole(start):
        yield from pieces(batch, count)


def measure(
    recorder: Observer,
    average: EMA | None,
    keep: Callable[[int], None],
    step: int,
    losses: dict[str, float],
    lr: float | None,
) -> None:
    """Have the recorder measure the (averaged) weights, unless it did so before a resume; write
    those of the best step so far."""
    with averaged(average):
        if not step or recorder.last() != step:
            recorder.measure(step, losses, lr)
        if step and recorder.best() == step:
            keep(step)


def since_last(out: Path, step: int, due: Callable[[int], bool]) -> dict[str, float]:
    """The mean losses of the steps since the measurement before this one, from the log."""
    before = next((k for k in range(step - 1, 0, -1) if due(k)), 0)
    log = read_log(out / "training")[before:step]
    return mean([line["parts"] for line in log if line.get("parts")])


def mean(losses: list[dict[str, float]]) -> dict[str, float]:
    """Of each group, over some steps."""
    names = losses[0] if losses else ()
    return {name: sum(each[name] for each in losses) / len(losses) for name in names}


@torch.no_grad()
def settle(denoiser: Denoiser, loss_fn: LossFn, data: Iterator[Batch], count: int = 320) -> None:
    """Start the learned weighting, which no file has, at its optimum on some examples, u = log
    E[error | t]."""
    errors, progress = [], []
    denoiser.log_error.zero_()
    for batch in data:
        for part in batch:  # alone, so that there is a loss for each example
            loss = loss_fn([part._replace(weight=1.0)])
            errors.append(loss["loss"].cpu())
            progress.append(loss["progress"])
        if sum(map(len, errors)) >= count:
            break
    level = (torch.cat(progress) * LEVELS).long().clamp(max=LEVELS - 1)
    for k in level.unique():
        denoiser.log_error[k] = torch.cat(errors)[level == k].mean().log() / LR_MULTIPLIER


def shares(model: LatentDiffusion, trained: nn.Module, batch: int) -> int:
    """Into how many pieces a batch is cut for two cores: 2 where that is possible, else 1. The
    number of cores must not matter: the sum of two halves has other last bits than the whole."""
    if ranks.size() > 1:  # they cut it
        return 1
    few = sum(p.numel() for p in trained.parameters()) < SHARED
    # threads share a generator in any order
    random_inside = getattr(model.unet.config, "dropout", 0) > 0
    return 2 if model.device.type == "cpu" and batch % 2 == 0 and few and not random_inside else 1


@contextmanager
def averaged(ema: EMA | None) -> Iterator[None]:
    """The averages in the place of the weights, inside a with block."""
    if ema is None:
        yield
        return
    weights = [weight.detach().clone() for weight in ema.weights]
    put(ema.averages, ema)
    try:
        yield
    finally:
        put(weights, ema)


@torch.no_grad()
def put(weights: list[torch.Tensor], ema: EMA) -> None:
    """Put these weights in the place of those that are trained."""
    torch._foreach_copy_(ema.weights, weights)
