"""Features for CIFAR-10: a small classifier, and distances of distorted images in its features.

    python experiments/cifar_features.py                     # downloads CIFAR-10
    python experiments/cifar_features.py --data cifar10     # cifar10/train/<class>/<name>.png, test

Minutes on one core. The features are the mean over places before the last layer. A Fréchet distance
in them is not an FID. Writes cifar10_resnet.safetensors (float16; a copy ships in
minidiff/networks), distances.png, loss.png and results.json. Ctrl-C saves; --resume goes on, bit
for bit.

[1] Heusel et al. GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash
    Equilibrium. 2017. arXiv:1706.08500 (figure 3: distortions)
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from cifar_ddpm import batches
from jaxtyping import Float, UInt8
from safetensors.torch import save_file
from torch import Tensor

from minidiff.cli.script import run
from minidiff.data.cifar10 import cifar10
from minidiff.data.folder import ClassFolder, load_all, to_model
from minidiff.errors import UserError
from minidiff.evaluation.features import Classifier
from minidiff.evaluation.metrics import Moments, frechet
from minidiff.figures import plots
from minidiff.figures.curves import COLOURS, new_figure, save, style
from minidiff.train import Loss, TrainConfig, train
from minidiff.training import atomic
from minidiff.training.progress import follow, last_loss, write_results
from minidiff.training.resume import read_log

Pictures = UInt8[Tensor, "N 3 32 32"]


def noisy(x: Float[Tensor, "B 3 32 32"], level: float) -> Float[Tensor, "B 3 32 32"]:
    """Noise of this standard deviation, where black to white is 2."""
    return (x + level * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))).clamp(
        -1, 1
    )


def blurred(x: Float[Tensor, "B 3 32 32"], level: float) -> Float[Tensor, "B 3 32 32"]:
    """A Gaussian blur of this standard deviation in pixels."""
    from torchvision.transforms.functional import gaussian_blur  # a second of import

    return gaussian_blur(x, 13, level)


def tinted(x: Float[Tensor, "B 3 32 32"], level: float) -> Float[Tensor, "B 3 32 32"]:
    """Red up and blue down by this much."""
    return (x + level * torch.tensor([1.0, 0.0, -1.0]).view(3, 1, 1)).clamp(-1, 1)


DISTORTIONS: dict[str, tuple[Callable, tuple[float, ...]]] = {
    "noise": (noisy, (0.05, 0.1, 0.2, 0.4)),
    "blur": (blurred, (0.4, 0.6, 1.0, 2.0)),
    "tint": (tinted, (0.05, 0.1, 0.2, 0.4)),
}


@torch.no_grad()
def moments(
    network: Classifier, pictures: Pictures, distort: Callable[[Tensor], Tensor] = lambda x: x
) -> Moments:
    """Of the features of pictures, 500 at a time: no more of them are ever held as floats."""
    found = Moments()
    for some in pictures.split(500):
        found.add(network.features(distort(to_model(some))))
    return found


def distances(network: Classifier, train: Pictures, test: Pictures, n: int) -> dict[str, float]:
    """The Fréchet distance of n training pictures to n others, to as many test pictures, and to
    those others distorted.
    """
    real, others = moments(network, train[:n]), train[n : 2 * n]
    found = {
        "floor": frechet(moments(network, others), real),
        "test": frechet(moments(network, test[:n]), real),
    }
    for name, (distort, levels) in DISTORTIONS.items():
        found |= {
            f"{name} {level}": frechet(
                moments(network, others, partial(distort, level=level)), real
            )
            for level in levels
        }
    return {name: round(distance, 4) for name, distance in found.items()}


@torch.no_grad()
def accuracy(
    network: Classifier, pictures: Pictures, names: list[str], index: dict[str, int]
) -> float:
    said = torch.cat([network(to_model(some)).argmax(1) for some in pictures.split(500)])
    return (said == torch.tensor([index[name] for name in names])).double().mean().item()


def plot(found: dict[str, float], path: Path) -> Path:
    """Distance against the strength of each distortion, above the floor."""
    with style():
        figure, (axis,) = new_figure(1, width=4.5, height=3.2)
        for name, colour, mark in zip(DISTORTIONS, COLOURS, "os^", strict=False):
            levels = DISTORTIONS[name][1]
            axis.loglog(
                levels,
                [found[f"{name} {level}"] for level in levels],
                f"{mark}-",
                color=colour,
                markersize=4,
                label=name,
            )
        for name, line in (("test", "--"), ("floor", ":")):
            axis.axhline(found[name], color="black", linestyle=line, linewidth=1, label=name)
        axis.set(xlabel="strength (blur: in pixels)", ylabel="Fréchet, cifar10-resnet")
        axis.xaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_major_formatter("{x:g}")
        axis.legend()
        return save(figure, path)


OUTPUTS = ("cifar10_resnet.safetensors", "distances.png", "loss.png")  # beside results.json


def main(
    data: Path | None = None,
    out: Path = Path("out/cifar_features"),
    epochs: int = 4,
    batch: int = 128,
    lr: float = 3e-3,
    weight_decay: float = 0.05,
    n: int = 10_000,
    pictures: int | None = None,
    seed: int = 0,
    resume: bool = False,
) -> None:
    """Train the classifier, and measure what its features see.

    Args:
        data: a folder with train/<class>/ and test/<class>/. Default: CIFAR-10, in ./data.
        out: folder for everything written.
        epochs: how often every training picture is seen.
        batch: pictures a step.
        lr: peak learning rate.
        weight_decay: of AdamW.
        n: pictures on each side of a distance.
        pictures: use only so many, of training and of test, spread evenly over the classes.
        seed: everything random follows from it.
        resume: go on where an interrupted run stopped.
    """
    torch.set_num_threads(1)
    both = [
        load_all(ClassFolder(data / part), 32, pictures)
        if data
        else cifar10("data", train=part == "train")
        for part in ("train", "test")
    ]
    (images, names), (test, _) = both
    classes = sorted(set(names))
    if 2 * n > len(images):
        raise UserError(
            f"--n is {n}, but there are {len(images)} training pictures; "
            f"pass --n {len(images) // 2} or less."
        )
    index = {name: k for k, name in enumerate(classes)}

    torch.manual_seed(seed)
    network = Classifier(len(classes))

    def loss(batch: tuple[Tensor, list[str]]) -> Loss:
        right = torch.tensor([index[name] for name in batch[1]])
        return {
            "loss": F.cross_entropy(network(batch[0]), right, reduction="none", label_smoothing=0.1)
        }

    steps = epochs * (len(images) // batch)
    data, config = (
        partial(batches, images, names, batch, seed),
        TrainConfig(steps, lr, weight_decay=weight_decay, seed=seed),
    )
    speed = follow(
        train(loss, network, data, config, folder=out / "training", resume=resume),
        "training",
        steps,
        batch,
    )

    # What is measured is what is shipped: half precision.
    network.half().float()
    weights = {name: tensor.half() for name, tensor in network.state_dict().items()}
    with atomic.write(out / "cifar10_resnet.safetensors", atomic.unsigned) as new:
        save_file(weights, new, {"software": atomic.SIGNATURE})
    right = {
        f"{part}_accuracy": round(accuracy(network, *some, index), 4)
        for part, some in zip(("training", "test"), both, strict=True)
    }
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    found = distances(network, images[order], test, n)
    log = read_log(out / "training")
    print(
        out / "cifar10_resnet.safetensors",
        plot(found, out / "distances.png"),
        plots.loss(log, out / "loss.png"),
        sep="\n",
    )
    made = dict(
        epochs=epochs,
        batch=batch,
        lr=lr,
        weight_decay=weight_decay,
        n=n,
        pictures=len(images),
        seed=seed,
    )
    print(write_results(out, **made, **right, frechet=found, loss=last_loss(log), **speed))
    listed = ", ".join(f"{name} {distance:.3g}" for name, distance in found.items())
    print(f"test accuracy {right['test_accuracy']:.3f}; Fréchet distance {listed}")


if __name__ == "__main__":
    run(main, OUTPUTS)
