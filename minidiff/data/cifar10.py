"""CIFAR-10 (Krizhevsky 2009): 50,000 training and 10,000 test images of 32 x 32 in ten classes."""

from http.client import HTTPException
from pathlib import Path

import torch
from jaxtyping import UInt8
from torch import Tensor

from minidiff.errors import UserError
from minidiff.training import distributed


def cifar10(
    root: str | Path, download: bool = True, train: bool = True
) -> tuple[UInt8[Tensor, "N 3 32 32"], list[str]]:
    """Return all images in CIFAR-10's own order, and the name of the class of each.

    The published files are pickles; torchvision opens them only if their md5 is the published one.
    """
    from torchvision.datasets import CIFAR10  # a second of import, needed only here

    try:
        with distributed.main_first():
            data = CIFAR10(root, train=train, download=download)
    # No network; a download broken off; no file, or the wrong md5.
    except (OSError, HTTPException, RuntimeError) as error:
        reason = " ".join(str(error).split())
        what = "could not download CIFAR-10" if download else "no intact CIFAR-10"
        remedy = "there and keep download on, or use class folders"
        message = f"{root}: {what} ({reason}); place the archive cifar-10-python.tar.gz {remedy}"
        raise UserError(message) from None
    images = torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous()
    return images, [data.classes[label] for label in data.targets]
