"""What the built-in world's critic says of a model: shares of held-out captions, and examples.

docs/world.md has the critic's rules.
"""

import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from minidiff import pipeline
from minidiff.data import critic
from minidiff.data.world import World
from minidiff.evaluation import bench
from minidiff.figures import plots
from minidiff.latent_diffusion import LatentDiffusion
from minidiff.options.sampling import SampleConfig
from minidiff.recipes.live import Drawing
from minidiff.recipes.plan import Cost

STEPS = 25  # of sampling


class Examples(NamedTuple):
    """Images of held-out captions, and whether the critic accepts each."""

    images: list[Tensor]
    captions: list[str]
    verdicts: list[bool]


def judge(
    model: LatentDiffusion, world: World, seed: int, count: int
) -> tuple[dict[str, Any], Examples]:
    """Figures of `count` held-out captions of one object and of two, and the first twelve images of
    each kind."""
    figures, examples = {}, Examples([], [], [])
    for objects, kind in ((1, "one_object"), (2, "two_objects")):
        captions = bench.held_out(world, count, objects, seed)
        accuracy, images, verdicts = bench.caption_accuracy(model, captions, STEPS, seed=seed)
        figures[f"accuracy_{kind}"] = accuracy
        figures[f"mistakes_{kind}"] = bench.mistakes(images, captions)
        shuffled = bench.shuffled(captions)
        figures[f"accuracy_{kind}_shuffled_captions"] = critic.accuracy(images, shuffled)
        for some, values in zip(examples, (images, captions, verdicts), strict=True):
            some.extend(values[:12])
        truth = world.batch(count, f"truth {seed}", objects=objects, split="held-out", full=True)
        with torch.no_grad():
            rebuilt = model.vae.decode(model.vae.encode(truth[0].to(model.device)))
        alone = critic.accuracy(rebuilt.clamp(-1, 1).cpu(), truth[1])
        figures[f"accuracy_{kind}_vae_alone"] = alone  # no model can beat its VAE
    return figures, examples


def cost(model: LatentDiffusion, world: World, seed: int) -> Cost:
    """Of judging one caption, measured on a few."""
    captions, steps = bench.held_out(world, 16, 2, seed), 3
    start = time.perf_counter()
    with FlopCounterMode(display=False) as counter:
        bench.caption_accuracy(model, captions, steps)
    scale = STEPS / steps / len(captions)
    seconds, flops = time.perf_counter() - start, counter.get_total_flops()
    return Cost(scale * seconds, round(scale * flops))


def drawing(model: LatentDiffusion, prompts: list[str], steps: int, seed: int) -> Drawing:
    """What the model draws by now, in so many steps."""
    images = pipeline.generate(model, prompts, SampleConfig(steps, seed=seed)).cpu()
    verdicts = [critic.holds(*pair) for pair in zip(images, prompts, strict=True)]
    return Drawing(list(images), prompts, verdicts)


def notes(figures: dict[str, Any]) -> dict[str, str]:
    """The accuracies, as lines of the page."""
    lines = {
        "one object, all attributes right": "accuracy_one_object",
        "two objects, all attributes right": "accuracy_two_objects",
        "one object, captions shuffled": "accuracy_one_object_shuffled_captions",
    }
    return {line: f"{figures[name]:.3f}" for line, name in lines.items()}


def judged_grid(examples: Examples, path: Path) -> Path:
    title, images = "held-out captions, judged by the critic", torch.stack(examples.images)
    return plots.grid(images, examples.captions, path, 8, title, examples.verdicts)
