"""A small residual classifier of 32x32 pictures. What it is for is not its verdict but what it makes of a picture before: features (features.py).

[1] He et al. Deep Residual Learning for Image Recognition. 2016. arXiv:1512.03385
"""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from minidiff.layers import ResBlock

GROUPS = 8  # of the normalizations: no statistics of a batch, so a picture's features are its own


class Classifier(nn.Module):
    """A residual block ([1]) at each of 16x16, 8x8 and 4x4; then the mean over places, which are the features, and one linear layer."""

    def __init__(self, classes: int, channels: tuple[int, ...] = (32, 64, 128)):
        super().__init__()
        widths = zip((3, *channels), channels, strict=False)
        self.stages = nn.ModuleList(
            nn.Sequential(nn.Conv2d(a, b, 3, stride=2, padding=1), ResBlock(b, b, groups=GROUPS))
            for a, b in widths
        )
        self.norm = nn.GroupNorm(GROUPS, channels[-1])
        self.out = nn.Linear(channels[-1], classes)

    def features(self, pictures: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B D"]:
        h = pictures
        for stage in self.stages:
            h = stage(h)
        return F.silu(self.norm(h)).mean((2, 3))

    def forward(self, pictures: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B K"]:
        """The logit of each class."""
        return self.out(self.features(pictures))
