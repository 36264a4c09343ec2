"""How much memory and time a training will take, told before its first step, and which switch would save most. All in this file.

Nothing is guessed from formulas of networks: one step, forward and backward, runs on tensors that have shapes and no memory (PyTorch's fake
tensors), while a ledger notes every storage that comes to life and dies, and the multiplications and additions of every operation. To the
peak of that come the optimizer's moments and the average of the weights. What a device needs for itself (libraries, a GPU's context, what the
allocator holds in reserve) is not in it; docs/memory.md has estimates beside measurements.

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
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from minidiff.denoiser import Denoiser
from minidiff.latent_diffusion import LatentDiffusion
from minidiff.methods import lora


class Settings(NamedTuple):
    """What memory and time depend on besides the model."""

    batch: int
    size: tuple[int, int]  # height and width of the pictures, in pixels
    accumulate: int = 1  # batches to a step
    rank: int | None = None  # of LoRAs; None: every weight is trained
    targets: tuple[str, ...] = lora.ATTENTION
    text: bool = False  # the text tower is trained too
    checkpointing: bool = False
    bf16: bool = False  # compute in it; the weights stay as they are
    optimizer: str = "adamw"
    ema: bool = False
    cached: bool = (
        True  # latents, and contexts where the text tower is not trained, are computed beforehand
    )


class Estimate(NamedTuple):
    """Bytes, and operations."""

    weights: int  # of all parts, trained or not
    step: int  # the most that gradients and activations take together at any moment
    moments: int  # the optimizer's two numbers for each trained weight
    average: int  # the EMA's copy
    trained: int  # how many numbers are trained
    flops: (
        int  # multiplications and additions of one step, all its batches and the way back included
    )

    @property
    def total(self) -> int:
        return self.weights + self.step + self.moments + self.average

    def __str__(self) -> str:
        parts = {
            "weights": self.weights,
            "gradients and activations": self.step,
            "optimizer": self.moments,
            "average of the weights": self.average,
        }
        return f"{human(self.total)} = " + " + ".join(
            f"{name} {human(count)}" for name, count in parts.items() if count
        )


class Ledger(TorchDispatchMode):
    """Notes while it is entered: bytes alive now and at most, every storage once; and FLOPs."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = self.flops = 0
        self.known: set[int] = set()

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        result = operation(*args, **(kwargs or {}))
        if operation.overloadpacket in flop_registry:
            self.flops += flop_registry[operation.overloadpacket](
                *args, **(kwargs or {}), out_val=result
            )
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                self.note(value.untyped_storage())
        return result

    def note(self, storage: torch.UntypedStorage) -> None:
        place, size = storage._cdata, storage.nbytes()
        if place not in self.known:
            self.known.add(place)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.forget, place, size)

    def forget(self, place: int, size: int) -> None:
        self.known.discard(place)
        self.now -= size


def estimate(model: LatentDiffusion, how: Settings) -> Estimate:
    """Of training the model in this way; the model itself is only asked for its numbers and precision."""
    weights, step, flops, trained = _simulated(model, how)
    moments = sum(_moments(numbers, size, how.optimizer) for numbers, size in trained)
    average = sum(size for _, size in trained) if how.ema else 0
    return Estimate(weights, step, moments, average, sum(numbers for numbers, _ in trained), flops)


def _simulated(
    model: LatentDiffusion, how: Settings
) -> tuple[int, int, int, list[tuple[int, int]]]:
    """Bytes of the weights, most bytes beyond them in a step, FLOPs of a step, and (numbers, bytes) of each trained tensor."""
    device = (
        "cuda" if model.device.type == "cuda" else "cpu"
    )  # which kernels there are decides what is kept
    ledger, schedule = (
        Ledger(),
        copy.deepcopy(model.schedule),
    )  # whatever it keeps of what it computes must not be fake in the model
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device(device), ledger:
        vae, text, unet = (_twin(part) for part in (model.vae, model.text, model.unet))
        denoiser = Denoiser(unet, schedule, model.denoiser.target, model.denoiser.weighting)
        for network in (unet, text):
            network.checkpointing = how.checkpointing
        trained = _to_train(unet, text, how)
        weights = ledger.now
        kept = text.encode([""] * how.batch) if how.cached and not how.text else None
        ledger.peak = ledger.now
        for _ in range(
            min(how.accumulate, 2)
        ):  # from the second on, the gradients of the first are there
            ledger.flops = 0
            with torch.autocast(device, torch.bfloat16, enabled=how.bf16):
                loss = _loss(vae, text, denoiser, how, kept)
            (loss.mean() / how.accumulate).backward()
            del loss
    return (
        weights,
        ledger.peak - weights,
        how.accumulate * ledger.flops,
        [(p.numel(), p.nbytes) for p in trained],
    )


def _twin(part: nn.Module) -> nn.Module:
    """A network of the same numbers and precision, frozen; of fake tensors, so that it has no memory."""
    twin, dtype = type(part)(part.config), next((p.dtype for p in part.parameters()), None)
    for module in twin.modules():
        for name, p in module.named_parameters(recurse=False):
            setattr(
                module, name, nn.Parameter(p.to(dtype), requires_grad=False)
            )  # module.to() does not work on fake tensors
    return twin


def _to_train(unet: nn.Module, text: nn.Module, how: Settings) -> list[nn.Parameter]:
    for network in (unet, text) if how.text else (unet,):
        if how.rank:
            lora.add(network, how.rank, targets=how.targets if network is unet else lora.ATTENTION)
        else:
            network.requires_grad_(True)
    return [p for network in (unet, text) for p in network.parameters() if p.requires_grad]


def _loss(
    vae: nn.Module, text: nn.Module, denoiser: Denoiser, how: Settings, context: Tensor | None
) -> Tensor:
    """That of one batch, as fine-tuning computes it; the context is given where it was computed beforehand."""
    height, width = how.size
    latents = torch.randn(how.batch, vae.latent_channels, height // vae.factor, width // vae.factor)
    if not how.cached:
        with torch.no_grad():
            latents = vae.encode(
                torch.randn(
                    how.batch,
                    getattr(vae.config, "in_channels", vae.latent_channels),
                    height,
                    width,
                )
            )
    if context is None:
        with torch.set_grad_enabled(how.text):
            context = text.encode([""] * how.batch)
    return denoiser.loss(latents, context, t=torch.ones(how.batch, dtype=torch.long, device="cpu"))


def _moments(numbers: int, size: int, optimizer: str) -> int:
    """Bytes of Adam's two moments. In 8 bits there is a scale to each block of 256, and tensors below 4,096 numbers are left in 32: bitsandbytes'
    own numbers."""
    if optimizer == "adamw8bit" and numbers >= 4096:
        return 2 * (numbers + 4 * -(-numbers // 256))
    return 2 * size


def alternatives(how: Settings) -> dict[str, Settings]:
    """The switches of the command line that save memory, each turned on by itself."""
    ways = {
        "--checkpointing": how._replace(checkpointing=True),
        "--method lora": how._replace(rank=how.rank or 8),
        f"--batch 1 --accumulate {how.batch * how.accumulate}": how._replace(
            batch=1, accumulate=how.batch * how.accumulate
        ),
        "--dtype bf16": how._replace(bf16=True),
        "--optimizer adamw8bit": how._replace(optimizer="adamw8bit"),
        "caching latents": how._replace(cached=True),
    }
    return {name: way for name, way in ways.items() if way != how}


def advice(model: LatentDiffusion, how: Settings, total: int, without: Iterable[str] = ()) -> str:
    """The switch that would save most of this total, and how much; `without` are switches that cannot be had, as adamw8bit without a GPU."""
    saved = {
        name: total - estimate(model, way).total
        for name, way in alternatives(how).items()
        if name not in without
    }
    best = max(saved, key=lambda name: saved[name], default=None)
    if best is None or saved[best] < 0.05 * total:
        return "no switch would save more than a twentieth of it"
    return f"{best} would save {human(saved[best])} of {human(total)}"


def forecast(model: LatentDiffusion, how: Settings, steps: int) -> str:
    """What to print before the first step. Warns where the device has less memory than that."""
    said, device = estimate(model, how), model.device
    hint = advice(
        model, how, said.total, without=() if device.type == "cuda" else ("--optimizer adamw8bit",)
    )
    have = room(device) + (
        said.weights if device.type == "cuda" else 0
    )  # the model is on the device already
    if said.total > have:
        warnings.warn(
            f"this needs about {human(said.total)}, and the device has {human(have)}: {hint}",
            stacklevel=2,
        )
    each = said.flops / speed(device, how.bf16)
    needs = f"memory: about {human(said.total)} ({str(said).split(' = ')[1]}); {hint}."
    return f"{needs}\ntime: about {duration(each)} a step, {duration(steps * each)} in all, estimated from {said.flops / 1e9:,.0f} GFLOP a step."


def room(device: torch.device) -> int:
    """Bytes that are free on a GPU, or all the memory of this machine."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def speed(device: torch.device, bf16: bool = False) -> float:
    """FLOP/s of this device, forward and backward through a 3x3 convolution and a linear layer of 256 channels at 32x32, the median of several."""
    dtype = torch.bfloat16 if bf16 else torch.float32
    maps = torch.randn(2, 256, 32, 32, device=device, dtype=dtype, requires_grad=True)
    kernel, matrix = (
        torch.randn(256, 256, *k, device=device, dtype=dtype, requires_grad=True)
        for k in ((3, 3), ())
    )

    def once() -> float:
        begun = time.perf_counter()
        F.linear(F.conv2d(maps, kernel, padding=1).flatten(2).mT, matrix).sum().backward()
        maps.grad.flatten()[0].item()  # waits until the device is done
        return time.perf_counter() - begun

    taken = sorted(once() for _ in range(8))[4]
    return 3 * 2 * 2 * 32 * 32 * 256 * 256 * (9 + 1) / taken


def human(count: float) -> str:
    """Bytes, as 14.9 GB, 95 MB, 3.2 MB."""
    return (
        f"{count / 1e9:.1f} GB"
        if count >= 1e9
        else f"{count / 1e6:.{0 if count >= 1e7 else 1}f} MB"
    )


def duration(seconds: float) -> str:
    """As 40 ms, 1.3 s, 12 min, 3.5 h."""
    for limit, unit, name in ((1, 1e-3, "ms"), (100, 1, "s"), (6000, 60, "min")):
        if seconds < limit:
            return f"{seconds / unit:.{0 if seconds / unit >= 10 else 1}f} {name}"
    return f"{seconds / 3600:.1f} h"
