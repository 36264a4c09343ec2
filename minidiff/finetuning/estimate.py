"""How much memory and time a training takes, told before its first step, and what would save most.

One step, forward and backward, runs on tensors with shapes and no memory (PyTorch's fake tensors),
while a ledger notes every storage that is made and freed, and the FLOPs of every operation. The
optimizer's moments and the average of the weights are added to the peak; what a device needs for
itself is not. docs/memory.md has estimates beside measurements.

[1] Chen et al. Training Deep Nets with Sublinear Memory Cost. 2016. arXiv:1604.06174
[2] Dettmers et al. 8-bit Optimizers via Block-wise Quantization. 2022. arXiv:2110.02861
"""

import copy
import os
import time
import warnings
import weakref
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from minidiff.denoiser import Denoiser
from minidiff.finetuning.loop import targets
from minidiff.latent_diffusion import LatentDiffusion
from minidiff.methods import lora
from minidiff.options.finetuning import FineTuneConfig


class Settings(NamedTuple):
    """What memory and time depend on besides the model."""

    batch: int
    size: tuple[int, int]  # height and width of the images, in pixels
    accumulate: int = 1  # batches in a step
    rank: int | None = None  # of LoRAs; None trains every weight
    targets: tuple[str, ...] = lora.ATTENTION
    text: bool = False  # train the text encoder too
    checkpointing: bool = False
    bf16: bool = False  # compute in it; the weights stay as they are
    optimizer: str = "adamw"
    ema: bool = False
    cached: bool = True  # latents, and contexts unless the text encoder is trained, computed before


def settings(config: FineTuneConfig, unet: nn.Module, size: tuple[int, int]) -> Settings:
    """Those of a fine-tune."""
    by_lora = config.method == "lora"
    return Settings(
        config.batch,
        size,
        config.accumulate,
        config.lora.rank if by_lora else None,
        targets(unet, config) if by_lora else lora.ATTENTION,
        config.text,
        config.checkpointing,
        config.dtype != "fp32",
        config.optimizer,
        config.ema is not None,
    )


class Estimate(NamedTuple):
    """Four parts of the memory in bytes, and three counts."""

    weights: int  # of all parts, trained or not
    step: int  # the most that gradients and activations take together
    moments: int  # the optimizer's two numbers for each trained weight
    average: int  # the EMA's copy
    trained: int  # how many weights are trained
    flops: int  # multiplications and additions of one step, forward and backward, all batches
    forward: int  # those of the U-Net's pass over one batch

    @property
    def total(self) -> int:
        return sum(self[:4])

    @property
    def parts(self) -> str:
        """The total as a sum."""
        names = ("weights", "gradients and activations", "optimizer", "average of the weights")
        parts = zip(names, self, strict=False)
        return " + ".join(f"{name} {human(count)}" for name, count in parts if count)


class Ledger(TorchDispatchMode):
    """Counts inside a with block: bytes now and at most, every storage once; and FLOPs."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = self.flops = 0
        self.storages: set[int] = set()

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = operation(*args, **kwargs)
        if count := flop_registry.get(operation.overloadpacket):
            self.flops += count(*args, **kwargs, out_val=result)
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                self.note(value.untyped_storage())
        return result

    def note(self, storage: torch.UntypedStorage) -> None:
        place, size = storage._cdata, storage.nbytes()
        if place not in self.storages:
            self.storages.add(place)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.forget, place, size)

    def forget(self, place: int, size: int) -> None:
        self.storages.discard(place)
        self.now -= size


def estimate(model: LatentDiffusion, settings: Settings) -> Estimate:
    """Of training the model so; only the model's configs and precision matter."""
    # which kernels exist decides what is saved for the backward pass
    device = "cuda" if model.device.type == "cuda" else "cpu"
    ledger = Ledger()
    schedule = copy.deepcopy(model.schedule)  # what it caches must not be fake in the model
    schedule.alpha_sigma(torch.ones(1, dtype=torch.long))  # its tables: real ones, on the CPU
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device(device), ledger:
        vae, text, unet = (_twin(part) for part in (model.vae, model.text, model.unet))
        denoiser = Denoiser(unet, schedule, model.denoiser.target, model.denoiser.weighting)
        for network in (unet, text):
            network.checkpointing = settings.checkpointing
        trained = _to_train(unet, text, settings)
        weights = ledger.now
        cached = settings.cached and not settings.text
        context = text.encode([""] * settings.batch) if cached else None
        ledger.peak = ledger.now
        # from the second batch on, the gradients of the first are there
        for _ in range(min(settings.accumulate, 2)):
            ledger.flops = 0
            with torch.autocast(device, torch.bfloat16, enabled=settings.bf16):
                inputs = _inputs(vae, text, settings, context)
                before = ledger.flops
                loss = denoiser.loss(*inputs)
                forward = ledger.flops - before
                del inputs
            (loss.mean() / settings.accumulate).backward()
            del loss
    return Estimate(
        weights,
        step=ledger.peak - weights,
        moments=sum(_moments(p, settings.optimizer) for p in trained),
        average=sum(p.nbytes for p in trained) if settings.ema else 0,
        trained=sum(p.numel() for p in trained),
        flops=settings.accumulate * ledger.flops,
        forward=forward,
    )


def _twin(part: nn.Module) -> nn.Module:
    """A frozen network with the same config and precision, of fake tensors."""
    twin, dtype = type(part)(part.config), next((p.dtype for p in part.parameters()), None)
    for module in twin.modules():
        for name, p in module.named_parameters(recurse=False):
            # module.to() does not work on fake tensors
            setattr(module, name, nn.Parameter(p.to(dtype), requires_grad=False))
    return twin


def _to_train(unet: nn.Module, text: nn.Module, settings: Settings) -> list[nn.Parameter]:
    for network in (unet, text) if settings.text else (unet,):
        if settings.rank:
            names = settings.targets if network is unet else lora.ATTENTION
            lora.add(network, settings.rank, targets=names)
        else:
            network.requires_grad_(True)
    return [p for network in (unet, text) for p in network.parameters() if p.requires_grad]


def _inputs(
    vae: nn.Module, text: nn.Module, settings: Settings, context: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Latents, context and t of one batch. context: where it is cached."""
    (height, width), batch = settings.size, settings.batch
    latents = torch.randn(batch, vae.latent_channels, height // vae.factor, width // vae.factor)
    if not settings.cached:
        channels = getattr(vae.config, "in_channels", vae.latent_channels)
        with torch.no_grad():
            latents = vae.encode(torch.randn(batch, channels, height, width))
    if context is None:
        with torch.set_grad_enabled(settings.text):
            context = text.encode([""] * batch)
    return latents, context, torch.ones(batch, dtype=torch.long, device="cpu")


def _moments(weight: Tensor, optimizer: str) -> int:
    """Bytes of Adam's two moments. In 8 bits, as bitsandbytes has them, each block of 256 has a
    scale, and tensors below 4,096 numbers stay in 32 bits."""
    if optimizer == "adamw8bit" and weight.numel() >= 4096:
        return 2 * (weight.numel() + 4 * -(-weight.numel() // 256))
    return 2 * weight.nbytes


def alternatives(settings: Settings) -> dict[str, Settings]:
    """The options that save memory, each turned on by itself."""
    batches = settings.batch * settings.accumulate
    options = {
        "`checkpointing`": settings._replace(checkpointing=True),
        "`method=lora`": settings._replace(rank=settings.rank or 8),
        f"`batch=1` `accumulate={batches}`": settings._replace(batch=1, accumulate=batches),
        "`dtype=bf16`": settings._replace(bf16=True),
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
    # on a GPU the model takes its part of the memory already
    available = room(device) + (need.weights if device.type == "cuda" else 0)
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
    """Bytes that are free on a GPU, or all the memory of this machine."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@torch.no_grad()
def forward_seconds(model: LatentDiffusion, settings: Settings) -> float:
    """What the U-Net's pass over one batch takes here: the best of three, or of fewer where that
    takes a second."""
    (height, width), batch, f = settings.size, settings.batch, model.vae.factor
    x = torch.zeros(batch, model.vae.latent_channels, height // f, width // f)
    x = x.to(next(model.unet.parameters()))
    context = model.text.encode([""]).to(x).expand(batch, -1, -1)
    t = model.schedule.timesteps(1)[:1].expand(batch)
    seconds = []
    while len(seconds) < 3 and sum(seconds) < 1:
        start = time.perf_counter()
        with torch.autocast(model.device.type, torch.bfloat16, enabled=settings.bf16):
            model.denoiser.output(x, t, context).flatten()[0].item()  # waits until it is done
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def human(count: float) -> str:
    """Bytes, as 14.9 GB, 95 MB, 3.2 MB."""
    if count >= 1e9:
        return f"{count / 1e9:.1f} GB"
    return f"{count / 1e6:.{0 if count >= 1e7 else 1}f} MB"


def duration(seconds: float) -> str:
    """As 40 ms, 1.3 s, 12 min, 3.5 h."""
    for limit, unit, name in ((1, 1e-3, "ms"), (100, 1, "s"), (6000, 60, "min")):
        if seconds < limit:
            return f"{seconds / unit:.{0 if seconds / unit >= 10 else 1}f} {name}"
    return f"{seconds / 3600:.1f} h"
