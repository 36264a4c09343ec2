"""The optimizers by name. AdamW is PyTorch's; the one of 8-bit moments is bitsandbytes', which is imported only where it is asked for.

[1] Loshchilov, Hutter. Decoupled Weight Decay Regularization. 2019. arXiv:1711.05101
[2] Dettmers, Lewis, Shleifer, Zettlemoyer. 8-bit Optimizers via Block-wise Quantization. 2022. arXiv:2110.02861
"""
import torch
from torch import nn

from minidiff.errors import UserError

OPTIMIZERS = ("adamw", "adamw8bit")


def grouped(parameters: list[nn.Parameter], weight_decay: float) -> list[dict]:
    """Matrices decay, biases and norms do not."""
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]


def named(name: str, groups: list[dict], lr: float, betas: tuple[float, float], device: torch.device) -> torch.optim.Optimizer:
    """adamw ([1], fused: one kernel for all tensors), or adamw8bit ([2]: two bytes of moments a weight in place of eight; on a GPU)."""
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=lr, betas=betas, fused=device.type in ("cpu", "cuda"))
    if name != "adamw8bit":
        raise UserError(f'no optimizer "{name}"; there is {", ".join(OPTIMIZERS)}.')
    if device.type != "cuda":
        raise UserError(f"adamw8bit computes on a GPU, and this is {device.type}; leave it out, or choose the device cuda.")
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise UserError("adamw8bit is of bitsandbytes, which is not installed; pip install bitsandbytes, or leave it out.") from error
    return AdamW8bit(groups, lr=lr, betas=betas)
