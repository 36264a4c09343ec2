"""How much memory and time a training takes, told before its first step, and what would save most.

One step, forward and backward, runs on tensors with shapes and no memory (PyTorch's fake tensors),
while a ledger notes every storage that is made and freed, and the FLOPs of every operation. So do
the passes of the flight recorder and the encoding of an image. The optimizer's moments, the average
of the weights and the copy of a checkpoint that is being written are added; what a device needs for
itself is not. docs/memory.md has estimates beside measurements.

[1] Chen et al. Training Deep Nets with Sublinear Memory Cost. 2016. arXiv:1604.06174
[2] Dettmers et al. 8-bit Optimizers via Block-wise Quantization. 2022. arXiv:2110.02861
"""

import copy
import time
import warnings
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from minidiff.checkpoints.folder import precision_of
from minidiff.condition import Context, repeat
from minidiff.denoiser import Denoiser
from minidiff.finetuning.loop import shares, targets
from minidiff.finetuning.recorder.recorder import rows_at_once
from minidiff.latent_diffusion import LatentDiffusion
from minidiff.methods import inversion, lora
from minidiff.options.finetuning import FineTuneConfig, RecorderConfig
from minidiff.training import optimizers
from minidiff.training.device import free_bytes
from minidiff.training.ledger import Ledger
from minidiff.training.progress import human


class Settings(NamedTuple):
    """What memory and time depend on besides the model."""

    batch: int  # images of all groups
    size: tuple[int, int]  # height and width of the images, in pixels
    accumulate: int = 1  # batches in a step
    rank: int | None = None  # of LoRAs; None trains every weight, 0 none
    targets: tuple[str, ...] = lora.ATTENTION
    word: bool = False  # train the vector of a word
    text: bool = False  # train the text encoder too
    checkpointing: bool = False
    bf16: bool = False  # compute in it; the weights stay as they are
    optimizer: str = "adamw"
    ema: bool = False
    cached: bool = True  # latents, and contexts unless the text encoder is trained, computed before
    pieces: int = 1  # that each batch is computed in
    threads: int = 1  # pieces that are computed at a time
    background: bool = False  # checkpoints are written while training goes on
    recorder: RecorderConfig | None = None  # of the flight recorder, if there is one
    drawn: int = 0  # images that the model draws at once beforehand, as DreamBooth's of the class
    frozen: torch.dtype | None = None  # in which the model will be loaded; None: as it is


def images_at_once(size: tuple[int, int], factor: int) -> int:
    """How many images DreamBooth draws at once."""
    return max(1, rows_at_once([side // factor for side in size]) // 2)


def settings(
    config: FineTuneConfig,
    model: LatentDiffusion,
    size: tuple[int, int],
    groups: int = 1,
    recorder: RecorderConfig | None = None,
) -> Settings:
    """Those of a fine-tune. groups: of examples, each of which has its share of a batch."""
    unet, by_lora = model.unet, config.method == "lora"
    rank = {"full": None, "lora": config.lora.rank, "inversion": 0}[config.method]
    trained = nn.ModuleList([unet] if rank is None else [])
    if rank is None and config.text:
        trained.append(model.text)
    pieces = config.pieces or shares(model, trained, config.batch)
    return Settings(
        groups * config.batch,
        size,
        config.accumulate,
        rank,
        targets(unet, config) if by_lora else lora.ATTENTION,
        config.word is not None,
        config.text,
        config.checkpointing,
        config.dtype != "fp32",
        config.optimizer,
        config.ema is not None,
        pieces=pieces,
        threads=1 if config.pieces else min(pieces, torch.get_num_threads()),
        background=config.background,
        recorder=recorder,
        drawn=images_at_once(size, model.vae.factor) if groups > 1 else 0,
    )


class Estimate(NamedTuple):
    """Parts of the memory in bytes, and three counts."""

    weights: int  # of all parts, trained or not
    step: int  # the most that gradients and activations take together
    moments: int  # the optimizer's two numbers for each trained weight
    average: int  # the EMA's copy
    copy: int  # of a checkpoint that is being written, where it is in the same memory
    recorder: int  # the most that the flight recorder takes, when there are no gradients
    before: int  # the most that encoding an image, or drawing some, takes beside the weights
    trained: int  # how many weights are trained
    flops: int  # multiplications and additions of one step, forward and backward, all batches
    forward: int  # those of the U-Net's pass over one batch

    @property
    def total(self) -> int:
        return sum(self.terms.values())

    @property
    def terms(self) -> dict[str, int]:
        """What the total is the sum of, at the moment that takes most."""
        state = {"optimizer": self.moments, "average of the weights": self.average}
        state |= {"copy for a checkpoint": self.copy}
        moments = (
            {"weights": self.weights, "gradients and activations": self.step, **state},
            {"weights": self.weights, "flight recorder": self.recorder, **state},
            {"weights": self.weights, "encoding or drawing pictures": self.before},
        )
        return max(moments, key=lambda terms: sum(terms.values()))

    @property
    def checkpoint(self) -> int:
        """Bytes of a checkpoint, and of its copy."""
        return 4 * self.trained + self.moments + self.average

    @property
    def parts(self) -> str:
        """The total as a sum."""
        return " + ".join(f"{name} {human(count)}" for name, count in self.terms.items() if count)


def estimate(model: LatentDiffusion, settings: Settings) -> Estimate:
    """Of training the model so; only the model's configs and precision matter."""
    # which kernels exist decides what is saved for the backward pass
    device = "cuda" if model.device.type == "cuda" else "cpu"
    ledger = Ledger()
    schedule = copy.deepcopy(model.schedule)  # what it caches must not be fake in the model
    schedule.alpha_sigma(torch.ones(1, dtype=torch.long))  # its tables: real ones, on the CPU
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device(device), ledger:
        parts = {"vae": model.vae, "text": model.text, "unet": model.unet}
        vae, text, unet = (
            _twin(part, precision_of(name, settings.frozen, part)) for name, part in parts.items()
        )
        denoiser = Denoiser(unet, schedule, model.denoiser.target, model.denoiser.weighting)
        for network in (unet, *inversion.encoders(text)):
            network.checkpointing = settings.checkpointing
        with torch.no_grad(), ledger.most() as before:
            _encode(vae, settings.size, 1)
            if settings.drawn:
                _draw(denoiser, vae, text.encode([""]), settings.drawn, settings.size, 1)
        trained = _to_train(unet, text, settings)
        weights = ledger.now
        one = settings._replace(batch=settings.batch // settings.pieces)
        context = text.encode([""] * one.batch) if _contexts_cached(settings) else None
        peaks = []
        # from the second piece on, the gradients of the first are there
        for _ in range(min(settings.accumulate * settings.pieces, 2)):
            ledger.flops, ledger.peak = 0, ledger.now
            with torch.autocast(device, _half(unet), enabled=settings.bf16):
                inputs = _inputs(vae, text, one, context)
                start = ledger.flops
                loss = denoiser.loss(*inputs)
                forward = ledger.flops - start
                del inputs
            loss.mean().backward()
            del loss
            peaks.append(ledger.peak - weights)
        flops = ledger.flops
        gradients = sum(p.grad.nbytes for p in trained if p.grad is not None)
        for p in trained:
            p.grad = None
        recorder = _recorder(denoiser, vae, text, settings, ledger) if settings.recorder else 0
    step = max(peaks)
    if settings.threads > 1:  # each has its activations and gradients, beside their sum
        runs = settings.accumulate * settings.pieces
        step = settings.threads * peaks[0] + (gradients if runs > settings.threads else 0)
    moments = sum(optimizers.moments(p, settings.optimizer) for p in trained)
    own, runs = sum(p.nbytes for p in trained), settings.accumulate * settings.pieces
    average = own if settings.ema else 0
    in_place = settings.background and device == "cpu"  # else the copy is in another memory
    return Estimate(
        weights,
        step=step,
        moments=moments,
        average=average,
        copy=own + moments + average if in_place else 0,
        # while it measures the averages, the weights stand aside
        recorder=recorder + (average if settings.recorder else 0),
        before=before[0],
        trained=sum(p.numel() for p in trained),
        flops=runs * flops,
        forward=settings.pieces * forward,
    )


def _half(unet: nn.Module) -> torch.dtype:
    """bf16, which stands for fp16 too; but weights in fp16 do not mix with it."""
    is_fp16 = next(unet.parameters()).dtype == torch.float16
    return torch.float16 if is_fp16 else torch.bfloat16


def _contexts_cached(settings: Settings) -> bool:
    return settings.cached and not (settings.text or settings.word)


def _encode(vae: nn.Module, size: tuple[int, int], batch: int) -> Tensor:
    """Latents of images."""
    channels = getattr(vae.config, "in_channels", vae.latent_channels)
    return vae.encode(torch.randn(batch, channels, *size))


@torch.no_grad()
def _recorder(
    denoiser: Denoiser, vae: nn.Module, text: nn.Module, settings: Settings, ledger: Ledger
) -> int:
    """The most that the flight recorder takes: guided sampling, the losses of an example."""
    config, sides = settings.recorder, [side // vae.factor for side in settings.size]
    with ledger.most() as added:
        context = text.encode([""])
        _draw(denoiser, vae, context, config.n, settings.size, 4)
        _pass(denoiser, vae, context, min(10 * config.noises, rows_at_once(sides)), sides)
    return added[0]


def _draw(
    denoiser: Denoiser,
    vae: nn.Module,
    context: Context,
    count: int,
    size: tuple[int, int],
    share: int,
) -> None:
    """A step of guided sampling of so many images, and the decoding, of fewer at once."""
    sides = [side // vae.factor for side in size]
    _pass(denoiser, vae, context, 2 * count, sides)
    together = min(count, max(1, rows_at_once(sides) // share))
    vae.decode(torch.randn(together, vae.latent_channels, *sides))


def _pass(
    denoiser: Denoiser, vae: nn.Module, context: Context, rows: int, sides: list[int]
) -> None:
    t = torch.ones(rows, dtype=torch.long, device="cpu")
    x = torch.randn(rows, vae.latent_channels, *sides)
    denoiser(x, t, repeat(context, rows))


def _twin(part: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """A frozen network with the same config, of fake tensors. dtype: None is its own."""
    twin, own = type(part)(part.config), next((p.dtype for p in part.parameters()), None)
    dtype = dtype or own
    for module in twin.modules():
        for name, p in module.named_parameters(recurse=False):
            # module.to() does not work on fake tensors
            setattr(module, name, nn.Parameter(p.to(dtype), requires_grad=False))
    if (t5 := getattr(part, "t5", None)) is not None:
        twin.t5.vocabulary = t5.vocabulary
    return twin


def _to_train(unet: nn.Module, text: nn.Module, settings: Settings) -> list[nn.Parameter]:
    for network in (unet, text) if settings.text else (unet,):
        if settings.rank:
            names = settings.targets if network is unet else lora.ATTENTION
            lora.add(network, settings.rank, targets=names)
        elif settings.rank is None:
            network.requires_grad_(True)
    trained = [p for network in (unet, text) for p in network.parameters() if p.requires_grad]
    if settings.word:
        word = inversion.Word(text, "sks")
        word.attach(text)
        trained.append(word.change)
    return trained


def _inputs(
    vae: nn.Module, text: nn.Module, settings: Settings, context: Context | None
) -> tuple[Tensor, Context, Tensor]:
    """Latents, context and t of one batch. context: where it is cached."""
    (height, width), batch = settings.size, settings.batch
    latents = torch.randn(batch, vae.latent_channels, height // vae.factor, width // vae.factor)
    if not settings.cached:
        with torch.no_grad():
            latents = _encode(vae, settings.size, batch)
    if context is None:
        with torch.set_grad_enabled(settings.text or settings.word):
            context = text.encode([""] * batch)
    return latents, context, torch.ones(batch, dtype=torch.long, device="cpu")


def alternatives(settings: Settings) -> dict[str, Settings]:
    """The options that save memory, each turned on by itself."""
    batches, is_full = settings.batch * settings.accumulate, settings.rank is None
    low = settings._replace(frozen=torch.bfloat16)  # what is loaded where not all is trained
    options = {
        "`checkpointing`": settings._replace(checkpointing=True),
        "`method=lora`": (low if is_full and settings.bf16 else settings)._replace(
            rank=settings.rank or 8
        ),
        f"`batch=1` `accumulate={batches}`": settings._replace(batch=1, accumulate=batches),
        "`dtype=bf16`": (settings if is_full or settings.bf16 else low)._replace(bf16=True),
        "`optimizer=adamw8bit`": settings._replace(optimizer="adamw8bit"),
        "caching latents": settings._replace(cached=True),
    }
    return {name: changed for name, changed in options.items() if changed != settings}


def advice(
    model: LatentDiffusion, settings: Settings, total: int, without: Iterable[str] = ()
) -> str:
    """The option that would save most of this total, and how much. without: options that are not
    possible here, as adamw8bit without a GPU."""
    options = alternatives(settings).items()
    totals = {name: estimate(model, each).total for name, each in options if name not in without}
    best = min(totals, key=totals.__getitem__, default=None)
    if best is None or totals[best] > 0.95 * total:
        return "no option would save more than a twentieth of it"
    return f"{best} would save {human(total - totals[best])} of {human(total)}"


def forecast(model: LatentDiffusion, settings: Settings, steps: int, evaluations: int = 0) -> str:
    """What to print before the first step. Warns where the device has less memory than that; an
    option that saves memory is looked for where half of it or more is needed.

    evaluations: of the U-Net, for one image each, that the flight recorder makes in all."""
    need, device = estimate(model, settings), model.device
    available = room(device) + need.weights  # which the model takes already
    hint = f"the device has {human(available)}"
    if need.total > available / 2:
        impossible = () if device.type == "cuda" else ("`optimizer=adamw8bit`",)
        hint += f"; {advice(model, settings, need.total, impossible)}"
    if need.total > available:
        warnings.warn(f"this needs about {human(need.total)}, and {hint}", stacklevel=2)
    forward = forward_seconds(model, settings)
    seconds = forward * need.flops / need.forward
    recorder = evaluations * forward / settings.batch
    share = f", {duration(recorder)} of it for the flight recorder" if recorder else ""
    return (
        f"memory: about {human(need.total)} ({need.parts}); {hint}.\n"
        f"time: about {duration(seconds)} a step, {duration(steps * seconds + recorder)} in all"
        f"{share}, from a pass of the U-Net that took {duration(forward)}."
    )


def room(device: torch.device) -> int:
    """Bytes that are free."""
    return free_bytes(device)


@torch.no_grad()
def forward_seconds(model: LatentDiffusion, settings: Settings) -> float:
    """What the U-Net's pass over one batch takes here: the best of three, or of fewer where that
    takes a second."""
    (height, width), batch, f = settings.size, settings.batch, model.vae.factor
    x = torch.zeros(batch, model.vae.latent_channels, height // f, width // f)
    x = x.to(next(model.unet.parameters()))
    context = repeat(model.text.encode([""]), batch)
    t = model.schedule.timesteps(1)[:1].expand(batch)
    seconds = []
    while len(seconds) < 3 and sum(seconds) < 1:
        start = time.perf_counter()
        with torch.autocast(model.device.type, _half(model.unet), enabled=settings.bf16):
            model.denoiser.output(x, t, context).flatten()[0].item()  # waits until it is done
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def duration(seconds: float) -> str:
    """As 40 ms, 1.3 s, 12 min, 3.5 h."""
    for limit, unit, name in ((1, 1e-3, "ms"), (100, 1, "s"), (6000, 60, "min")):
        if seconds < limit:
            return f"{seconds / unit:.{0 if seconds / unit >= 10 else 1}f} {name}"
    return f"{seconds / 3600:.1f} h"
