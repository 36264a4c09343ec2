"""One step without a teacher: the model in the box learns average velocities from images alone.

    python experiments/meanflow.py

One CPU core. Act one: images of the built-in world, encoded. Act two: MeanFlow, from the weights of
the box; guidance goes in, so that the model needs none later. Act three: the critic counts what it
draws in 1, 2, 4 and 8 steps, beside the same weights untrained and the distilled students of
docs/distillation.md. Writes meanflow.png and results.json. Ctrl-C saves; --resume goes on.

[1] Geng, Deng, Bai, Kolter, He. Mean Flows for One-step Generative Modeling. 2025.
    arXiv:2505.13447
[2] Geng, Lu, Wu, Shechtman, Kolter, He. Improved Mean Flows: On the Challenges of Fastforward
    Generative Models. 2025. arXiv:2512.02012
"""

import copy
import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from distill_figure import plot
from jaxtyping import Float, Shaped
from pretrain_box import latent_batches, pool_of
from torch import Tensor, nn

import minidiff
from minidiff.cli.script import run
from minidiff.data import critic
from minidiff.data.world import World
from minidiff.denoiser import Denoiser
from minidiff.evaluation import bench as evaluate
from minidiff.latent_diffusion import LatentDiffusion
from minidiff.methods.meanflow import (
    MeanFlow,
    adaptive,
    guided_velocity,
    meanflow,
    meanflow_target,
    two_times,
)
from minidiff.recipes.quickstart import COLOURS, SHAPES, LatentBatch
from minidiff.samplers import Normal, sample
from minidiff.schedules import Flow, per_example
from minidiff.train import EMA, Loss, TrainConfig, train
from minidiff.training.progress import follow, last_loss, write_results
from minidiff.training.resume import read_log

# of the lower and higher of two draws; whose colour is whose is decided above t = 0.8
TIMES = Flow(mean=0.4, std=1.4)
STEPS = (1, 2, 4, 8)
# model, sampler, evaluations, and one and two objects right: as measured in docs/distillation.md
DISTILLED = (
    ("teacher", "ddpm", 50, 0.992, 0.980),
    ("teacher", "ddpm", 16, 0.968, 0.960),
    ("teacher", "ddpm", 8, 0.860, 0.856),
    ("teacher", "ddpm", 4, 0.264, 0.324),
    ("student", "lcm", 4, 0.980, 0.936),
    ("student", "lcm", 2, 0.972, 0.940),
    ("student", "lcm", 1, 0.920, 0.928),
    ("LCM-LoRA", "lcm", 4, 0.848, 0.868),
    ("LCM-LoRA", "lcm", 2, 0.400, 0.612),
    ("LCM-LoRA", "lcm", 1, 0.104, 0.012),
)


class OnFlow(nn.Module):
    """A network of the cosine schedule, as one of Flow: x_t is the same but for its scale, and both
    times follow from sigma / alpha."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network, self.context_dim = network, network.context_dim

    def forward(
        self,
        x: Float[Tensor, "B C H W"],
        c_noise: Shaped[Tensor, "B"],
        context: Float[Tensor, "B L D"] | None = None,
    ) -> Float[Tensor, "B C H W"]:
        t = c_noise / 1000
        unit = (t**2 + (1 - t) ** 2).sqrt()
        angle = torch.atan2(t, 1 - t) / (math.pi / 2)  # the cosine schedule's, from 0.008 / 1.008
        theirs = (1000 * (1.008 * angle - 0.008) - 1).clamp(min=0)
        return self.network(x / per_example(unit, x), theirs, context)


def model_of(box: LatentDiffusion) -> MeanFlow:
    """The box's weights, to be trained; its target stays x0, so that u = (x_t - x0) / t."""
    network = OnFlow(copy.deepcopy(box.unet).requires_grad_(True))
    return MeanFlow(Denoiser(network, TIMES, box.denoiser.target))


def loss(
    model: MeanFlow,
    box: LatentDiffusion,
    scale: float,
    kappa: float,
    equal: float,
    improved: bool,
    batch: LatentBatch,
) -> Loss:
    """[1] with guidance inside; improved: along the network's own velocity, [2]."""
    B, (r, t) = len(batch.latents), two_times(model.schedule, len(batch.latents), equal)
    x, v = model.schedule.mix(batch.latents, batch.eps, t), batch.eps - batch.latents
    with torch.no_grad():
        context = box.text.encode(batch.captions)
        both = torch.cat([context, box.text.null(B)])
        own, null = model.velocity(*(torch.cat([z, z]) for z in (x, t, t)), both).chunk(2)
    v = guided_velocity(v, own, null, scale, kappa)
    tangent = own if improved else v
    target = meanflow_target(model.velocity, x, r, t, v, context, tangent)
    squared = (model.velocity(x, r, t, context) - target).pow(2).flatten(1).sum(1)
    return {"loss": adaptive(squared), "error": squared.detach() / v[0].numel(), "progress": t}


def measured(
    model: MeanFlow,
    box: LatentDiffusion,
    name: str,
    ways: tuple[int, ...],
    captions: dict[int, list[str]],
    seed: int,
) -> Iterator[tuple[dict, Tensor]]:
    """One line of the table for each number of steps, and its first three images of each kind."""
    for steps in ways:
        row = {"model": name, "sampler": "meanflow", "steps": steps, "evaluations": steps}
        images = {n: drawn(model, box, captions[n], steps, seed) for n in captions}
        row["one_object"], row["two_objects"] = (
            critic.accuracy(images[n], captions[n]) for n in (1, 2)
        )
        row["mean"] = (row["one_object"] + row["two_objects"]) / 2
        print(", ".join(f"{key} {value}" for key, value in row.items()), flush=True)
        yield row, torch.cat([images[n][:3] for n in (1, 2)])


@torch.no_grad()
def drawn(
    model: MeanFlow, box: LatentDiffusion, captions: list[str], steps: int, seed: int
) -> Float[Tensor, "N 3 H W"]:
    images, side = [], box.size // box.vae.factor
    for i in range(0, len(captions), 50):
        some = captions[i : i + 50]
        noise = Normal.seeded(seed, range(i, i + len(some)))
        x_T = noise(torch.zeros(len(some), box.vae.latent_channels, side, side))
        denoise = partial(model, context=box.text.encode(some))
        *_, last = sample(denoise, model.schedule, x_T, steps, meanflow(), noise=noise)
        images.append(box.decode(last.x0).clamp(-1, 1))
    return torch.cat(images)


OUTPUTS = ("meanflow.png",)  # beside results.json


def main(
    model: str = "box",
    out: Path = Path("out/meanflow"),
    steps: int = 1200,
    batch: int = 16,
    lr: float = 5e-4,
    pool: int = 8000,
    guidance: float = 2.0,
    kappa: float = 0.5,
    equal: float = 0.5,
    improved: bool = True,
    captions: int = 250,
    seed: int = 0,
    resume: bool = False,
) -> None:
    """Train MeanFlow from the weights of the model in the box, and let the critic judge it.

    Args:
        model: the weights to start from: box, or a model folder of the quickstart's world.
        out: folder for everything written.
        steps: training steps.
        batch: images in a step.
        lr: peak learning rate.
        pool: images of two objects that are drawn and encoded once; a quarter as many of one.
        guidance: how strongly the text steers; it is trained in.
        kappa: how much of the guided velocity is the network's own word.
        equal: the share of examples with r = t, which learn the velocity itself.
        improved: differentiate along the network's own velocity.
        captions: held-out captions of one thing, and as many of two, behind each accuracy.
        seed: everything random follows from it.
        resume: go on where an interrupted run stopped.
    """
    torch.set_num_threads(1)  # on networks this small a second thread would mostly wait
    torch.manual_seed(seed)
    box = minidiff.load(model).to(memory_format=torch.channels_last).requires_grad_(False)
    world, learner = World(box.size, SHAPES, COLOURS), model_of(box)
    told = {n: evaluate.held_out(world, captions, n, seed) for n in (1, 2)}
    before = list(measured(learner, box, "before", STEPS, told, seed))

    one, two = (pool_of(world, box.vae, n, k, seed) for k, n in ((1, -(-pool // 4)), (2, pool)))
    data = partial(latent_batches, world, one, two, batch, 0, seed, box.dropout)
    ema = EMA(learner, decay=0.998)
    config = TrainConfig(steps, lr, seed=seed)
    lesson = partial(loss, learner, box, guidance, kappa, equal, improved)
    training = train(lesson, learner, data, config, ema, out / "training", resume)
    speed = follow(training, "MeanFlow", steps, batch)
    after = list(measured(ema.average, box, "MeanFlow", STEPS, told, seed))

    keys = ("model", "sampler", "evaluations", "one_object", "two_objects", "mean")
    quoted = [dict(zip(keys, (*line, sum(line[3:]) / 2), strict=True)) for line in DISTILLED]
    rows = [row for row, _ in after + before]
    shown = {f"{row['model']}, {row['steps']}": images for row, images in before[:1] + after}
    # the loss is 1 or a little less whatever is learnt: each error is divided by itself
    errors = [{"loss": record["parts"]["error"]} for record in read_log(out / "training")]
    print(plot(quoted + rows, shown, out / "meanflow.png"))
    made = dict(steps=steps, batch=batch, lr=lr, pool=pool, guidance=guidance, kappa=kappa)
    made |= dict(equal=equal, improved=improved, seed=seed, captions_each=captions)
    print(write_results(out, **made, error=last_loss(errors), **speed, rows=rows))


if __name__ == "__main__":
    run(main, OUTPUTS)
