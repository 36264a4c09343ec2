"""CIFAR-10 (Krizhevsky 2009): 50,000 training and 10,000 test pictures of 32 x 32 in ten classes, as one tensor."""

from http.client import HTTPException
from pathlib import Path

import torch
from jaxtyping import UInt8
from torch import Tensor

from minidiff.errors import UserError


def cifar10(
    root: str | Path, download: bool = True, train: bool = True
) -> tuple[UInt8[Tensor, "N 3 32 32"], list[str]]:
    """The pictures in CIFAR-10's own order, and the name of the class of each.

    The published files are Python pickles; torchvision opens them only after their md5 agrees with the published one.
    """
    from torchvision.datasets import CIFAR10  # a second of import, needed only here

    try:
        data = CIFAR10(root, train=train, download=download)
    except (
        OSError,
        HTTPException,
        RuntimeError,
    ) as error:  # no network; download broken off; nothing there, or the wrong md5
        reason = " ".join(str(error).split())
        what = "could not download CIFAR-10" if download else "no intact CIFAR-10"
        advice = "place the archive cifar-10-python.tar.gz there and keep download on, or use a folder of class folders instead"
        raise UserError(f"{root}: {what} ({reason}); {advice}") from None
    pictures = torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous()
    return pictures, [data.classes[label] for label in data.targets]
