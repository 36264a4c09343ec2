"""The optimizers by name: PyTorch's AdamW, bitsandbytes' with 8-bit moments, and Muon (muon.py).

[1] Loshchilov, Hutter. Decoupled Weight Decay Regularization. 2019. arXiv:1711.05101
[2] Dettmers, Lewis, Shleifer, Zettlemoyer. 8-bit Optimizers via Block-wise Quantization. 2022.
    arXiv:2110.02861
"""

from typing import get_args

import torch
from torch import Tensor, nn

from minidiff.errors import UserError
from minidiff.options.finetuning import OptimizerName
from minidiff.training.muon import Muon

OPTIMIZERS = get_args(OptimizerName)


def grouped(parameters: list[nn.Parameter], weight_decay: float) -> list[dict]:
    """Matrices decay, biases and norms do not. A parameter's lr_multiplier, if it has one, is its
    group's."""
    groups = []
    for multiplier in sorted({1.0, *map(multiplier_of, parameters)}, key=lambda m: (m != 1, m)):
        alike = [p for p in parameters if multiplier_of(p) == multiplier]
        for decay, is_matrix in ((weight_decay, True), (0.0, False)):
            params = [p for p in alike if (p.ndim > 1) == is_matrix]
            groups.append({"params": params, "weight_decay": decay, "lr_multiplier": multiplier})
    return groups


def multiplier_of(parameter: nn.Parameter) -> float:
    return getattr(parameter, "lr_multiplier", 1.0)


def moments(weight: Tensor, optimizer: str) -> int:
    """Bytes of Adam's two moments; Muon has one of a matrix. In 8 bits, as bitsandbytes has them,
    each block of 256 has a scale, and tensors below 4,096 numbers stay in 32 bits."""
    if optimizer == "adamw8bit" and weight.numel() >= 4096:
        return 2 * (weight.numel() + 4 * -(-weight.numel() // 256))
    return (1 if optimizer == "muon" and weight.ndim > 1 else 2) * weight.nbytes


def named(
    name: str, groups: list[dict], lr: float, betas: tuple[float, float], device: torch.device
) -> torch.optim.Optimizer:
    """adamw ([1], fused: one kernel for all tensors), muon, or, on a GPU, adamw8bit ([2])."""
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=lr, betas=betas, fused=device.type in ("cpu", "cuda"))
    if name == "muon":
        return Muon(groups, lr, betas)
    if name != "adamw8bit":
        raise UserError(f'no optimizer "{name}"; there is {", ".join(OPTIMIZERS)}.')
    if device.type != "cuda":
        remedy = "leave it out, or choose the device cuda"
        raise UserError(f"adamw8bit computes on a GPU, and this is {device.type}; {remedy}.")
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        problem = "needs bitsandbytes, which is not installed; pip install it, or leave it out"
        raise UserError(f"adamw8bit {problem}.") from error
    return AdamW8bit(groups, lr=lr, betas=betas)
