"""LoRA, low-rank adaptation: a few trained weights beside many frozen ones.

    y = W x + b + (alpha / r) B A x

W (out, in) is frozen; A (r, in) and B (out, r) are trained, and B starts at zero. So W changes only
by a matrix of rank r ([1] section 4.1). For a convolution A has the layer's kernel and stride, and
B is 1x1.

    lora.add(model.unet, rank=4)                      # now only A and B are trainable
    lora.merge(model), lora.unmerge(model)            # into the weights, and back to the bit
    lora.remove(model)

A LoRA is a submodule of its layer, named "lora", and a forward hook adds its output to the layer's.
So the networks' code knows nothing of it, and their tensors keep their names.

[1] Hu et al. LoRA: Low-Rank Adaptation of Large Language Models. 2021. arXiv:2106.09685
"""

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from minidiff.errors import UserError

Layer = nn.Linear | nn.Conv2d
ATTENTION = ("q", "k", "v", "out")  # what [1] section 4.2 adapts, and most published files do


class LoRA(nn.Module):
    """(alpha / r) B A x for one layer, times `scale`, which may change while sampling. Trained in
    float32, computed in x's precision."""

    def __init__(self, layer: Layer, rank: int, alpha: float):
        super().__init__()
        out, *inner = layer.weight.shape
        dtype, device = torch.promote_types(layer.weight.dtype, torch.float32), layer.weight.device
        kernel = [1] * (len(inner) - 1)
        self.A = nn.Parameter(torch.empty(rank, *inner, dtype=dtype, device=device))
        self.B = nn.Parameter(torch.zeros(out, rank, *kernel, dtype=dtype, device=device))
        # as PyTorch's layers and PEFT begin, so that learning rates carry over; [1] says Gaussian
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        self.alpha, self.scale = float(alpha), 1.0
        names = ("stride", "padding", "dilation") if kernel else ()
        self.convolution = {name: getattr(layer, name) for name in names}
        self.register_buffer("own_weight", None, persistent=False)  # the layer's, while merged

    @property
    def factor(self) -> float:
        return self.scale * self.alpha / len(self.A)

    def forward(self, x: Float[Tensor, "B *dims"]) -> Float[Tensor, "B *dims2"]:
        A, B = self.A.to(x.dtype), self.B.to(x.dtype)
        if self.convolution:
            return self.factor * F.conv2d(F.conv2d(x, A, **self.convolution), B)
        return self.factor * F.linear(F.linear(x, A), B)  # eq: lora-3

    @torch.no_grad()
    def merged(self, weight: Float[Tensor, "out *inner"]) -> Float[Tensor, "out *inner"]:
        """W + (alpha / r) B A, in weight's precision, rounded once."""
        precise = torch.promote_types(weight.dtype, torch.float32)
        change = self.B.to(precise).flatten(1) @ self.A.to(precise).flatten(1)
        return (weight.to(precise) + self.factor * change.view_as(weight)).to(weight.dtype)


def _added(layer: Layer, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    """The forward hook of a layer that has a LoRA."""
    return output if layer.lora.own_weight is not None else output + layer.lora(inputs[0])


def attach(module: nn.Module, pairs: Iterable[tuple[Layer, LoRA]]) -> None:
    """Give each of these layers its LoRA, and freeze the module but for all LoRAs in it."""
    for layer, lora in pairs:
        layer.lora, lora.hook = lora, layer.register_forward_hook(_added)
    module.requires_grad_(False)
    for layer in adapted(module).values():
        layer.lora.requires_grad_(True)


def add(
    module: nn.Module, rank: int, alpha: float | None = None, targets: Iterable[str] = ATTENTION
) -> list[str]:
    """Give a LoRA to every linear layer and convolution whose name ends in a target ("q",
    "cross_attention.k"), and freeze all else. alpha: None is the rank. Returns their names."""
    if rank < 1:
        raise UserError(f"a LoRA of rank {rank}; the rank must be at least 1.")
    layers = chosen(module, tuple(targets))
    check_free(layers)
    alpha = rank if alpha is None else alpha
    attach(module, [(layer, LoRA(layer, rank, alpha)) for layer in layers.values()])
    return list(layers)


def chosen(module: nn.Module, targets: tuple[str, ...]) -> dict[str, Layer]:
    """The layers that the targets name; every target must name one."""
    layers = {name: layer for name, layer in module.named_modules() if isinstance(layer, Layer)}
    idle = [target for target in targets if not any(ends(name, target) for name in layers)]
    if idle or not targets:
        endings = sorted({name.rsplit(".")[-1] for name in layers} - {""})
        names = " or ".join(idle) or "by no target"
        raise UserError(
            f"no layer is named {names}; names of this network end in {', '.join(endings)}."
        )
    return {name: layer for name, layer in layers.items() if any(ends(name, t) for t in targets)}


def ends(name: str, target: str) -> bool:
    return f".{name}".endswith(f".{target}")


def check_free(layers: dict[str, Layer]) -> None:
    taken = next((name for name, layer in layers.items() if hasattr(layer, "lora")), None)
    if taken is not None:
        raise UserError(f"{taken} has a LoRA already; remove it, or merge it and then remove it.")


def adapted(module: nn.Module) -> dict[str, Layer]:
    """The layers that have a LoRA, by name."""
    layers = module.named_modules()
    return {name: each for name, each in layers if isinstance(getattr(each, "lora", None), LoRA)}


def state(module: nn.Module) -> dict[str, Tensor]:
    """A and B of every LoRA by their names in the module's state_dict."""
    loras = {f"{name}.lora": layer.lora for name, layer in adapted(module).items()}
    return {
        f"{name}.{half}": getattr(loras[name], half).detach() for name in loras for half in "AB"
    }


def scale(module: nn.Module, by: float) -> None:
    """Multiply every LoRA's change by this: 0 is the model without it, 1 the LoRA as trained."""
    for layer in adapted(module).values():
        layer.lora.scale = float(by)
        if layer.lora.own_weight is not None:
            layer.weight.data = layer.lora.merged(layer.lora.own_weight)


def merge(module: nn.Module) -> None:
    """Add every LoRA to the weight of its layer, whose own is kept until unmerge or remove."""
    for layer in adapted(module).values():
        if layer.lora.own_weight is None:
            layer.lora.own_weight = layer.weight.data
            layer.weight.data = layer.lora.merged(layer.lora.own_weight)


def unmerge(module: nn.Module) -> None:
    """Give every layer the very weight it had before merge."""
    for layer in adapted(module).values():
        if layer.lora.own_weight is not None:
            layer.weight.data, layer.lora.own_weight = layer.lora.own_weight, None


def remove(module: nn.Module) -> None:
    """Remove every LoRA and make all parameters trainable again. What was merged stays merged."""
    for layer in adapted(module).values():
        layer.lora.hook.remove()
        del layer.lora
    module.requires_grad_(True)


def merged_state(module: nn.Module) -> dict[str, Tensor]:
    """The state_dict of the module with every LoRA merged and removed; changes nothing in it."""
    whole, added = module.state_dict(), state(module)
    whole = {name: tensor for name, tensor in whole.items() if name not in added}
    for name, layer in adapted(module).items():
        if layer.lora.own_weight is None:
            whole[f"{name}.weight"] = layer.lora.merged(layer.weight)
    return whole
