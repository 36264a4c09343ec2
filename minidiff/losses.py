"""How much an error counts at each noise level: every published weighting is one row of a table.

A weighting is a function w(SNR): the loss is w(SNR_t) || x0 - x0_hat ||^2, whatever the target is.

[1] Ho, Jain, Abbeel. Denoising Diffusion Probabilistic Models. 2020. arXiv:2006.11239
[2] Salimans, Ho. Progressive Distillation for Fast Sampling of Diffusion Models. arXiv:2202.00512
[3] Karras et al. Elucidating the Design Space of Diffusion-Based Generative Models. 2022.
    arXiv:2206.00364
[4] Hang et al. Efficient Diffusion Training via Min-SNR Weighting Strategy. 2023. arXiv:2303.09556
[5] Choi et al. Perception Prioritized Training of Diffusion Models. 2022. arXiv:2204.00227
[6] Karras et al. Analyzing and Improving the Training Dynamics of Diffusion Models. 2023.
    arXiv:2312.02696
[7] Kendall, Gal, Cipolla. Multi-Task Learning Using Uncertainty to Weigh Losses. arXiv:1705.07115
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from minidiff.training.device import to_device

SIGMA_DATA = 0.5  # s_d, the standard deviation EDM assumes of its data, [3] table 1

WEIGHTINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "eps": lambda snr: snr,  # the "simple" loss, [1] eq. 14
    "x0": lambda snr: torch.ones_like(snr),
    "v": lambda snr: snr + 1,  # [2] section 4
    "flow": lambda snr: (1 + snr.sqrt()) ** 2,  # 1 / sigma^2 where alpha + sigma = 1
    "edm": lambda snr: snr + SIGMA_DATA**-2,  # [3] table 1, lambda(sigma)
    "min-snr": lambda snr: snr.clamp(max=5),  # [4] section 3.4, gamma = 5  # eq: minsnr-weight
    "p2": lambda snr: snr / (1 + snr),  # [5] eq. 8, gamma = k = 1
    "learned": lambda snr: torch.ones_like(snr),  # balanced() then divides by the mean error
}

LEVELS = 20  # intervals of progress(t), in each of which the learned weighting has one value u
LR_MULTIPLIER = 20.0  # u learns this many times faster than the network's weights


def log_error() -> nn.Parameter:
    """The parameter of the learned weighting, u / LR_MULTIPLIER at each level; used in training."""
    return nn.Parameter(torch.zeros(LEVELS))


def balanced(
    error: Float[Tensor, "B"], progress: Float[Tensor, "B"], log_error: Float[Tensor, "levels"]
) -> Float[Tensor, "B"]:
    """The learned weighting ([6], after [7]): error / e^u + u, which is least at u = log of
    the mean error of the level.

    So every noise level contributes equally, however large its error, and the network's optimum
    does not change. The loss can be negative. progress: schedule.progress(t) of each example.
    """
    level = (LEVELS * progress).long().clamp(max=LEVELS - 1)
    u = LR_MULTIPLIER * log_error[to_device(level, log_error.device)]
    return error / u.exp() + u
