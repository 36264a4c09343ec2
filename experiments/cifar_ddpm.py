"""DDPM on CIFAR-10: the paper's recipe, or one that shows the same thing on two CPU cores in half an hour.

    python experiments/cifar_ddpm.py                                      # downloads CIFAR-10; small preset, 10 classes
    python experiments/cifar_ddpm.py --data cifar10/train                 # or pictures as cifar10/train/<class>/<name>.png
    python experiments/cifar_ddpm.py --preset paper --device cuda         # Ho et al. 2020: 800,000 steps, unconditional

Ctrl-C saves; --resume goes on, bit for bit. Writes model/ (the averaged weights), samples.png, forward.png, reverse.png and .gif, loss.png and
results.json. --sample-only draws again from model/.

[1] Ho, Jain, Abbeel. Denoising Diffusion Probabilistic Models. 2020. arXiv:2006.11239
"""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from minidiff import pipeline, samplers, schedules
from minidiff.cli.script import follow, last_loss, pick_device, read_log, run, write_results
from minidiff.data.cifar10 import cifar10
from minidiff.data.folder import ClassFolder, load_all, to_model
from minidiff.denoiser import Denoiser
from minidiff.errors import UserError
from minidiff.figures import chains, plots
from minidiff.latent_diffusion import LatentDiffusion
from minidiff.options.sampling import SampleConfig
from minidiff.text import ClassLabels, LabelsConfig, Unconditional
from minidiff.train import EMA, seed_of, train
from minidiff.unet import UNet, UNetConfig, unet_cifar10
from minidiff.vae import Pixels

CLASS_DIM = 128  # width of a class as a vector


def unet_small(context_dim: int | None) -> UNet:
    """Narrow where maps are large and dear, wide where they are small; every residual block is told the class."""
    numbers = dict(
        channels=(32, 64, 128, 256), blocks=1, depth=(0, 1, 1, 1), heads=(1, 2, 4, 8), ff_mult=0
    )
    return UNet(
        UNetConfig(3, 3, **numbers, context_dim=context_dim, pooled=context_dim is not None)
    )


def unet_tiny(context_dim: int | None) -> UNet:
    """For tests."""
    return UNet(
        UNetConfig(
            3,
            3,
            channels=(8, 16),
            blocks=1,
            depth=(0, 1),
            heads=(1, 2),
            context_dim=context_dim,
            ff_mult=0,
            groups=4,
        )
    )


class Preset(NamedTuple):
    unet: Callable[[int | None], UNet]
    schedule: schedules.NoiseSchedule
    target: str
    conditional: bool
    steps: int
    batch: int
    lr: float
    warmup: int
    betas: tuple[float, float]
    ema: float
    sampler: str
    sampling_steps: int
    guidance: float


PRESETS = {
    # [1] section 4 and appendix B. One departure: the training loop lets the learning rate fall along half a cosine, the paper holds it.
    "paper": Preset(
        unet_cifar10,
        schedules.linear(),
        "eps",
        False,
        800_000,
        128,
        2e-4,
        5000,
        (0.9, 0.999),
        0.9999,
        "ddpm",
        1000,
        1.0,
    ),
    "small": Preset(
        unet_small,
        schedules.cosine(),
        "v",
        True,
        3500,
        32,
        1e-3,
        100,
        (0.9, 0.99),
        0.999,
        "ddim",
        50,
        2.0,
    ),
    "tiny": Preset(
        unet_tiny, schedules.cosine(), "v", True, 4, 4, 1e-3, 1, (0.9, 0.99), 0.9, "ddim", 2, 2.0
    ),
}


def batches(
    pictures: UInt8[Tensor, "N 3 32 32"], labels: list[str], batch: int, seed: int, start: int
) -> Iterator[tuple[Float[Tensor, "B 3 32 32"], list[str]]]:
    """Batch k follows from (seed, k) alone: an order for each epoch, and a coin for each picture's flip."""
    if batch > len(pictures):
        raise UserError(
            f"--batch is {batch}, but there are only {len(pictures)} pictures; lower it."
        )
    for k in count(start):
        epoch, place = divmod(k, len(pictures) // batch)
        if place == 0 or k == start:
            order = torch.randperm(
                len(pictures), generator=torch.Generator().manual_seed(seed_of(seed, -1 - epoch))
            )
        rows = order[place * batch : (place + 1) * batch]
        flipped = (
            torch.rand(batch, generator=torch.Generator().manual_seed(seed_of(seed + 1, -1 - k)))
            < 0.5
        )
        images = to_model(pictures[rows])
        images[flipped] = images[flipped].flip(-1)
        yield images, [labels[row] for row in rows.tolist()]


def draw(
    model: LatentDiffusion, preset: Preset, each: int, steps: int, seed: int, out: Path
) -> None:
    """samples.png, with a row for each class where there are classes, and the reverse chain of a few."""
    classes = [name for name in getattr(model.text, "index", {}) if name]
    config = SampleConfig(steps, sampler=preset.sampler, seed=seed)
    conditions = [name for name in classes or [""] * 10 for _ in range(each)]
    pictures = pipeline.generate(model, conditions, config, progress=True)
    rows = {name: pictures[k * each : (k + 1) * each] for k, name in enumerate(classes)}
    print(
        plots.strip(rows, [], out / "samples.png")
        if classes
        else plots.grid(pictures, None, out / "samples.png", columns=each)
    )
    shown = classes[:8] or [""] * 8
    noise = samplers.Normal.seeded(seed, range(len(shown)))
    frames = list(model.sample(shown, generator=noise, config=config))
    for path in chains.plot_reverse(
        model, frames, shown, out, title=f"reverse chain: {shown[0] or 'unconditional'}"
    ):
        print(path)


def main(
    data: Path | None = None,
    preset: Literal["paper", "small", "tiny"] = "small",
    out: Path = Path("out/cifar_ddpm"),
    steps: int | None = None,
    batch: int | None = None,
    lr: float | None = None,
    conditional: bool | None = None,
    pictures: int | None = None,
    each: int = 8,
    sampling_steps: int | None = None,
    device: str = "auto",
    bf16: bool | None = None,
    compile: bool = False,
    seed: int = 0,
    resume: bool = False,
    sample_only: bool = False,
) -> None:
    """Train a DDPM on 32x32 pictures. Arguments that default to None take the preset's number.

    Args:
        data: a folder of class folders; left out, CIFAR-10 is downloaded into ./data.
        preset: paper, small (two CPU cores, half an hour) or tiny (for tests).
        out: folder for everything written.
        steps: training steps.
        batch: pictures a step.
        lr: peak learning rate.
        conditional: whether it is told the class.
        pictures: use only so many, spread evenly over the classes.
        each: samples of each class, or in each of ten rows.
        sampling_steps: steps from noise to a picture.
        device: auto, cpu, cuda or mps.
        bf16: compute in bfloat16; left out, on CUDA only.
        compile: compile the U-Net first: minutes, repaid on long runs on a GPU.
        seed: everything random follows from it.
        resume: go on where an interrupted run stopped.
        sample_only: train nothing, draw from out/model.
    """
    device, recipe = pick_device(device), PRESETS[preset]
    steps, batch, lr, sampling_steps = (
        steps or recipe.steps,
        batch or recipe.batch,
        lr or recipe.lr,
        sampling_steps or recipe.sampling_steps,
    )
    if sample_only:
        return draw(
            LatentDiffusion.load(out / "model", device), recipe, each, sampling_steps, seed, out
        )

    # Hold all pictures in memory, as bytes.
    images, labels = load_all(ClassFolder(data), 32, pictures) if data else cifar10("data")
    classes = sorted(set(labels))

    torch.manual_seed(seed)
    conditional = recipe.conditional if conditional is None else conditional
    text = ClassLabels(LabelsConfig(classes, CLASS_DIM)) if conditional else Unconditional()
    denoiser = Denoiser(recipe.unet(text.dim), recipe.schedule, recipe.target)
    model = LatentDiffusion(Pixels(), text, denoiser, size=32, guidance=recipe.guidance).to(
        device, memory_format=torch.channels_last
    )
    ema = EMA(model, recipe.ema)
    if compile:
        model.unet.compile()

    def loss(batch: tuple[Tensor, list[str]]) -> tuple[Tensor, Tensor]:
        x0 = batch[0].to(device, memory_format=torch.channels_last)
        t = model.schedule.sample_t(len(x0))
        return model.loss(x0, batch[1], t), model.schedule.progress(t)

    autocast = torch.bfloat16 if (device == "cuda" if bf16 is None else bf16) else None
    how = dict(
        warmup=recipe.warmup,
        betas=recipe.betas,
        ema=ema,
        autocast=autocast,
        seed=seed,
        folder=out / "training",
        resume=resume,
    )
    training = train(loss, model, partial(batches, images, labels, batch, seed), steps, lr, **how)
    speed = follow(training, "training", steps, batch)
    log = read_log(out / "training")

    print(ema.average.save(out / "model"))
    for path in chains.plot_forward(
        to_model(images[:1]),
        recipe.schedule,
        out,
        torch.Generator().manual_seed(seed),
        f"forward chain: {labels[0]}",
    ):
        print(path)
    draw(ema.average, recipe, each, sampling_steps, seed, out)
    print(plots.loss(log, out / "loss.png"))
    size = round(sum(p.numel() for p in model.unet.parameters()) / 1e6, 2)
    made = dict(
        preset=preset,
        conditional=conditional,
        steps=steps,
        batch=batch,
        lr=lr,
        seed=seed,
        device=device,
        bf16=autocast is not None,
    )
    print(
        write_results(
            out,
            **made,
            pictures=len(images),
            unet_million_parameters=size,
            loss=last_loss(log),
            **speed,
        )
    )
    print(
        f"{size} M parameters, {steps} steps of {batch}, {speed['images_per_second']} images/s, loss {last_loss(log)}"
    )


if __name__ == "__main__":
    run(main)
