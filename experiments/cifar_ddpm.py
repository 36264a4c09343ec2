"""DDPM on CIFAR-10: the paper's recipe, or one for two CPU cores and an hour.

    python experiments/cifar_ddpm.py                         # downloads CIFAR-10; small, 10 classes
    python experiments/cifar_ddpm.py --data cifar10/train    # or cifar10/train/<class>/<name>.png
    python experiments/cifar_ddpm.py --preset paper --device cuda    # [1]: 800,000 steps

The preset paper trains and samples with minidiff/ddpm.py itself: equation 14, algorithm 2. Ctrl-C
saves; --resume goes on, bit for bit. Writes model/ (the averaged weights), samples.png,
forward.png, reverse.png and .gif, loss.png and results.json: with the Fréchet distance of --n
samples. --sample-only draws again from model/.

[1] Ho, Jain, Abbeel. Denoising Diffusion Probabilistic Models. 2020. arXiv:2006.11239
"""

import itertools
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from cifar_distance import Distance
from cifar_recipes import PRESETS, Preset, new_model
from jaxtyping import Float, Int, UInt8
from torch import Tensor
from tqdm import tqdm

from minidiff import pipeline, samplers
from minidiff.cli.script import run
from minidiff.data.cifar10 import cifar10
from minidiff.data.folder import ClassFolder, load_all, to_model
from minidiff.ddpm import DDPM
from minidiff.errors import UserError
from minidiff.figures import chains, plots
from minidiff.latent_diffusion import LatentDiffusion
from minidiff.options.sampling import SampleConfig
from minidiff.train import EMA, LossFn, TrainConfig, train
from minidiff.training.device import pick_device, plain_attention, to_device
from minidiff.training.progress import follow, last_loss, write_results
from minidiff.training.resume import read_log
from minidiff.training.seeds import generator_of, seed_of
from minidiff.training.tensorboard import logged

Images = Float[Tensor, "B 3 H W"]


def batches(
    pictures: UInt8[Tensor, "N 3 32 32"], labels: list[str], batch: int, seed: int, start: int
) -> Iterator[tuple[Float[Tensor, "B 3 32 32"], list[str]]]:
    """Batch k follows from (seed, k) alone: an order for each epoch, and a coin for each image's
    flip."""
    if batch > len(pictures):
        raise UserError(
            f"--batch is {batch}, but there are only {len(pictures)} pictures; lower it."
        )
    for k in itertools.count(start):
        epoch, place = divmod(k, len(pictures) // batch)
        if place == 0 or k == start:
            order = torch.randperm(len(pictures), generator=generator_of(seed, -1 - epoch))
        rows = order[place * batch : (place + 1) * batch]
        flipped = torch.rand(batch, generator=generator_of(seed + 1, -1 - k)) < 0.5
        images = to_model(pictures[rows])
        images[flipped] = images[flipped].flip(-1)
        yield images, [labels[row] for row in rows.tolist()]


def eps_model(model: LatentDiffusion, x: Images, t: Int[Tensor, "B"]) -> Images:
    """The network as the paper writes it, eps_theta(x_t, t), without a class."""
    return model.denoiser.output(x, t, model.text.encode([""] * len(x)))


def loss(
    model: LatentDiffusion, chain: DDPM | None, batch: tuple[Images, list[str]]
) -> dict[str, Tensor]:
    """Of each example, and where its t lies; under the paper's chain [1] eq. 14."""
    x0 = to_device(batch[0], model.device).to(memory_format=torch.channels_last)
    t = model.schedule.sample_t(len(x0))
    if chain is None:
        each = model.loss(x0, batch[1], t)
    else:
        each = chain.simple_loss(partial(eps_model, model), x0, t, torch.randn_like(x0))
    return {"loss": each, "progress": model.schedule.progress(t)}


def objective_of(model: LatentDiffusion, recipe: Preset) -> LossFn:
    return partial(loss, model, recipe.chain)


@torch.no_grad()
def chain_frames(
    model: LatentDiffusion, chain: DDPM, batch: int, seed: int, every: int
) -> Iterator[samplers.Frame]:
    """The paper's reverse chain, [1] algorithm 2: the states at every `every`-th t, from T to 0,
    with the estimate of x0 made there."""
    network = partial(eps_model, model)
    generator = torch.Generator().manual_seed(seed)
    x_T = torch.randn(batch, 3, 32, 32, generator=generator).to(model.device)
    states = itertools.chain([x_T], chain.p_sample_loop(network, x_T, generator))
    for t, x in zip(range(chain.T, -1, -1), states, strict=True):
        if t % every == 0:
            times = torch.full((batch,), t)
            x0 = chain.predict_x0(x, times, network(x, times)) if t else x
            yield samplers.Frame(float(t), x, x0)


def chain_images(model: LatentDiffusion, chain: DDPM, count: int, seed: int) -> Images:
    """Images of the paper's chain, 250 at a time."""
    batches = []
    for start in tqdm(range(0, count, 250), "sampling", unit="batch", delay=0.01):
        batch = min(250, count - start)
        *_, last = chain_frames(model, chain, batch, seed_of(seed, start), chain.T)
        batches.append(last.x.clamp(-1, 1))
    return torch.cat(batches)


def images_of(
    model: LatentDiffusion, preset: Preset, conditions: list[str], steps: int, seed: int
) -> Images:
    """An image of each condition, as the preset samples."""
    if preset.chain is not None:
        return chain_images(model, preset.chain, len(conditions), seed)
    config = SampleConfig(steps, sampler=preset.sampler, seed=seed)
    return pipeline.generate(model, conditions, config, batch=250, progress=True)


def spread(model: LatentDiffusion, n: int) -> list[str]:
    """n conditions, of all classes alike."""
    return list(itertools.islice(itertools.cycle(classes_of(model) or [""]), n))


def classes_of(model: LatentDiffusion) -> list[str]:
    return [name for name in getattr(model.text, "index", {}) if name]


def draw(
    model: LatentDiffusion, preset: Preset, each: int, steps: int, seed: int, out: Path
) -> None:
    """samples.png, with a row for each class where there are classes, and the reverse chain of a
    few."""
    classes = classes_of(model)
    conditions = [name for name in classes or [""] * 10 for _ in range(each)]
    few = classes[:8] or [""] * 8
    images = images_of(model, preset, conditions, steps, seed)
    if preset.chain is not None:
        every = max(1, preset.chain.T // 50)
        frames = list(chain_frames(model, preset.chain, len(few), seed, every))
    else:
        config = SampleConfig(steps, sampler=preset.sampler, seed=seed)
        noise = samplers.Normal.seeded(seed, range(len(few)))
        frames = list(model.sample(few, generator=noise, config=config))
    if classes:
        rows = {name: images[k * each : (k + 1) * each] for k, name in enumerate(classes)}
        print(plots.strip(rows, [], out / "samples.png"))
    else:
        print(plots.grid(images, None, out / "samples.png", columns=each))
    title = f"reverse chain: {few[0] or 'unconditional'}"
    print(*chains.plot_reverse(model, frames, few, out, title=title), sep="\n")


def check_chain(preset: Preset, conditional: bool, sampling_steps: int) -> None:
    """Raise a UserError for what the paper's chain does not have."""
    if preset.chain is None:
        return
    if conditional:
        raise UserError("--conditional: the paper's chain is unconditional; choose another preset.")
    if sampling_steps != preset.chain.T:
        raise UserError(
            f"--sampling-steps is {sampling_steps}, but the paper's chain takes all "
            f'{preset.chain.T} steps; draw with fewer by minidiff generate "" --model OUT/model '
            "--steps N."
        )


OUTPUTS = ("samples.png", "reverse.png", "loss.png", "model")  # beside results.json


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
    n: int = 2000,
    device: str = "auto",
    bf16: bool | None = None,
    compile: bool = False,
    seed: int = 0,
    tensorboard: bool = False,
    resume: bool = False,
    sample_only: bool = False,
) -> None:
    """Train a DDPM on 32x32 pictures. Arguments that default to None take the preset's number.

    Args:
        data: a folder of class folders; left out, CIFAR-10 is downloaded into ./data.
        preset: paper, small (two CPU cores, an hour) or tiny (for tests).
        out: folder for everything written.
        steps: training steps.
        batch: pictures a step.
        lr: peak learning rate.
        conditional: whether it is told the class.
        pictures: use only so many, spread evenly over the classes.
        each: samples of each class, or in each of ten rows.
        sampling_steps: steps from noise to a picture.
        n: samples whose distance from the training pictures is measured, at most half as many as
            there are pictures; 0 for none.
        device: auto, cpu, cuda or mps.
        bf16: compute in bfloat16; left out, on CUDA only.
        compile: compile the U-Net first: minutes, repaid on long runs on a GPU.
        seed: everything random follows from it.
        tensorboard: also write the training's numbers for TensorBoard, in out/training.
        resume: go on where an interrupted run stopped.
        sample_only: train nothing, draw from out/model.
    """
    device, recipe = pick_device(device), PRESETS[preset]
    steps, batch, lr = steps or recipe.steps, batch or recipe.batch, lr or recipe.lr
    sampling_steps = sampling_steps or recipe.sampling_steps
    conditional = recipe.conditional if conditional is None else conditional
    check_chain(recipe, conditional, sampling_steps)
    if sample_only:
        model = LatentDiffusion.load(out / "model", device)
        return draw(model, recipe, each, sampling_steps, seed, out)

    # Hold all images in memory, as bytes.
    images, labels = load_all(ClassFolder(data), 32, pictures) if data else cifar10("data")
    torch.manual_seed(seed)
    n = min(n, len(images) // 2)  # the others are what they are compared with
    distance = Distance(images, n) if n else None
    model = new_model(recipe, sorted(set(labels)) if conditional else [], device)
    ema = EMA(model, recipe.ema)
    if compile:
        model.unet.compile()

    autocast = torch.bfloat16 if (device == "cuda" if bf16 is None else bf16) else None
    config = TrainConfig(
        steps,
        lr,
        recipe.warmup,
        betas=recipe.betas,
        optimizer=recipe.optimizer,
        autocast=autocast,
        seed=seed,
    )
    stream = partial(batches, images, labels, batch, seed)
    training = train(
        objective_of(model, recipe), model, stream, config, ema, out / "training", resume
    )
    training = logged(training, out / "training", tensorboard)
    with plain_attention(device, autocast):
        speed = follow(training, "training", steps, batch)
    log = read_log(out / "training")

    print(ema.average.save(out / "model"))
    x0, generator = to_model(images[:1]), torch.Generator().manual_seed(seed)
    title = f"forward chain: {labels[0]}"
    print(*chains.plot_forward(x0, recipe.schedule, out, generator, title), sep="\n")
    draw(ema.average, recipe, each, sampling_steps, seed, out)
    print(plots.loss(log, out / "loss.png"))
    measured = {}
    if distance is not None:
        drawn = images_of(ema.average, recipe, spread(ema.average, n), sampling_steps, seed)
        away, floor = distance.of(drawn.float().cpu()), distance.floor
        measured = {"n": n, "frechet": round(away, 3), "floor": round(floor, 3)}
    size = round(sum(p.numel() for p in model.unet.parameters()) / 1e6, 2)
    results = {
        "preset": preset,
        "conditional": conditional,
        "steps": steps,
        "batch": batch,
        "lr": lr,
        "seed": seed,
        "device": device,
        "bf16": autocast is not None,
        "pictures": len(images),
        "unet_million_parameters": size,
        "loss": last_loss(log),
        **measured,
        **speed,
    }
    print(write_results(out, **results))
    print(
        f"{size} M parameters, {steps} steps of {batch}, {speed['images_per_second']} images/s, "
        f"loss {last_loss(log)}"
    )


if __name__ == "__main__":
    run(main, OUTPUTS)
