"""Measures a text-to-image model: fit of images to captions, distance to real images, diversity,
speed.

A Bench holds the prompts and the measures of real images. Images pass a batch at a time, and only
their measures stay in memory. Each figure has a floor: the score of as many real images.
"""

import random
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from minidiff import pipeline
from minidiff.data import critic
from minidiff.data.folder import CaptionedFolder, CaptionedImages, load_all, to_model
from minidiff.data.world import Scene, World
from minidiff.errors import UserError
from minidiff.evaluation import features, metrics
from minidiff.evaluation.metrics import Score
from minidiff.latent_diffusion import LatentDiffusion
from minidiff.options.sampling import SampleConfig

Images = Float[Tensor, "B 3 H W"]
Batches = Iterable[tuple[Images, list[str]]]  # images and their captions, a few at a time
# Features under their network's name; a number for each image under "accuracy" and "CLIP score".
Measures = dict[str, Float[Tensor, "_n ..."]]

EACH = 5  # images of one prompt, behind its diversity
AT_ONCE = 500  # real images in memory


def held_out(world: World, n: int, objects: int, seed: int) -> list[str]:
    """n captions of held-out scenes, every attribute stated."""
    rng = random.Random(f"{seed} {objects}")
    return [world.caption(world.scene(rng, objects, "held-out"), rng, full=True) for _ in range(n)]


def caption_accuracy(
    model: LatentDiffusion,
    captions: list[str],
    steps: int = 25,
    guidance: float | None = None,
    seed: int = 0,
) -> tuple[float, Images, list[bool]]:
    """The share of images in which the critic accepts every attribute; the images; the verdicts."""
    config = SampleConfig(steps, guidance, seed=seed)
    images = pipeline.generate(model, captions, config, progress=True).cpu()
    verdicts = [critic.holds(*pair) for pair in zip(images, captions, strict=True)]
    return sum(verdicts) / len(verdicts), images, verdicts


def mistakes(images: Images, captions: list[str]) -> dict[str, float]:
    """How often each attribute is wrong, among the captions that state it."""
    wrong, stated = Counter(), Counter()
    for image, caption in zip(images, captions, strict=True):
        for attribute, right in critic.judge(image, caption).items():
            stated[attribute] += 1
            wrong[attribute] += not right
    return {attribute: round(wrong[attribute] / stated[attribute], 4) for attribute in stated}


def shuffled(captions: list[str]) -> list[str]:
    """Each caption with its neighbour's image, as a model that ignores its text would do."""
    return captions[1:] + captions[:1]


def measure(batches: Batches, networks: list[str], judged: bool, clip: bool = False) -> Measures:
    """Features in these networks; with judged the critic's verdicts, with clip the CLIP score."""
    parts: dict[str, list[Tensor]] = defaultdict(list)
    for images, captions in batches:
        for name in networks:
            parts[name].append(features.features(name, images))
        if judged:
            verdicts = [critic.holds(*pair) for pair in zip(images, captions, strict=True)]
            parts["accuracy"].append(torch.tensor(verdicts, dtype=torch.float32))
        if clip:
            parts["CLIP score"].append(features.clip_similarity(images, captions))
    return {name: torch.cat(values) for name, values in parts.items()}


def rows_of(measures: Measures, rows: slice | Int[Tensor, "n"]) -> Measures:
    return {name: values[rows] for name, values in measures.items()}


class Bench(NamedTuple):
    """What a model is measured against; `real` and `floor` are of n real images each."""

    measure: Callable[[Batches], Measures]  # the same for all images
    networks: list[str]
    prompts: list[str]
    real: Measures
    floor: Measures  # real images in the model's place
    repeated: list[str]  # each of P prompts EACH times, one after the other
    repeated_floor: Measures | None  # real images of those; of a folder there are none
    training: Measures | None  # what the model may have memorised


def of_world(world: World, n: int, seed: int, networks: list[str], clip: bool = False) -> Bench:
    """Held-out captions and new images of held-out scenes, half with one object, half with two."""
    of = partial(measure, networks=networks, judged=True, clip=clip)
    rng = random.Random(f"repeated {seed}")
    scenes = [world.scene(rng, split="held-out") for _ in range(max(2, n // 20))]
    captions = [world.caption(scene, rng, full=True) for scene in scenes]
    repeated = [caption for caption in captions for _ in range(EACH)]
    several = [scene for scene in scenes for _ in range(EACH)]
    repeated_floor = of(images_of(world, several, repeated, rng))
    prompts = held_out(world, n // 2, 1, seed) + held_out(world, n - n // 2, 2, seed)
    real, floor = (of(held_out_images(world, n, str((key, seed)))) for key in ("real", "instead"))
    return Bench(of, networks, prompts, real, floor, repeated, repeated_floor, None)


def held_out_images(world: World, n: int, seed: str) -> Batches:
    """n images of held-out scenes with their captions, half of them of one object."""
    for count, objects in ((n // 2, 1), (n - n // 2, 2)):
        rng = random.Random(seed)
        scenes = [world.scene(rng, objects, "held-out") for _ in range(count)]
        captions = [world.caption(scene, rng, full=True) for scene in scenes]
        yield from images_of(world, scenes, captions, rng)


def images_of(
    world: World, scenes: list[Scene], captions: list[str], rng: random.Random
) -> Batches:
    for i in range(0, len(scenes), AT_ONCE):
        yield world.draw(scenes[i : i + AT_ONCE], rng), captions[i : i + AT_ONCE]


def of_folder(
    folder: Path,
    size: int,
    n: int,
    seed: int,
    networks: list[str],
    clip: bool = False,
    column: str = "text",
) -> Bench:
    """n images of a folder to compare with, and n others for the floor and for the prompts."""
    data = CaptionedFolder(folder, size, column)
    if len(data) < 2 * n:
        raise UserError(
            f"{folder} holds {len(data)} pictures; a floor at the same n needs twice n: "
            f"pass `n={len(data) // 2}` or less."
        )
    of = partial(measure, networks=networks, judged=False, clip=clip)
    training = of(folder_images(data, size))
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))
    rest = order[n : 2 * n]
    prompts = [data.captions[i] for i in rest.tolist()]
    repeated = [prompt for prompt in prompts[: max(2, n // 20)] for _ in range(EACH)]
    real, floor = rows_of(training, order[:n]), rows_of(training, rest)
    return Bench(of, networks, prompts, real, floor, repeated, None, training)


def folder_images(data: CaptionedFolder, size: int) -> Batches:
    for i in range(0, len(data), AT_ONCE):
        some = CaptionedImages(data.paths[i : i + AT_ONCE], data.captions[i : i + AT_ONCE])
        images, captions = load_all(some, size)
        yield to_model(images), captions


class Figure(NamedTuple):
    """One line of the table. floor: what as many real images score in the model's place."""

    metric: str
    features: str
    value: float
    low: float | None
    high: float | None
    floor: float | None
    n: int


class Generated(NamedTuple):
    """The measures of a model's images for a bench, and what one of them cost."""

    images: Measures
    repeated: Measures
    seconds: float
    evaluations: float  # of the U-Net, for one image; guidance takes two a step


def timed(drawing: Iterator[Images], prompts: list[str], seconds: list[float]) -> Batches:
    """Images with their prompts; adds to `seconds` the time that sampling each batch took."""
    start, done = time.perf_counter(), 0
    for images in (some.cpu() for some in drawing):
        seconds.append(time.perf_counter() - start)
        yield images, prompts[done : done + len(images)]
        start, done = time.perf_counter(), done + len(images)


def draw(
    model: LatentDiffusion, bench: Bench, config: SampleConfig, progress: bool = False
) -> Generated:
    """An image for every prompt, the repeated ones included."""
    prompts, n, seconds, sizes = bench.prompts + bench.repeated, len(bench.prompts), [], []
    drawing = pipeline.draw(model, prompts, config, progress=progress)
    hook = model.unet.register_forward_hook(lambda _, __, output: sizes.append(len(output)))
    try:
        measures = bench.measure(timed(drawing, prompts, seconds))
    finally:
        hook.remove()
    images, repeated = rows_of(measures, slice(n)), rows_of(measures, slice(n, None))
    return Generated(images, repeated, sum(seconds) / len(prompts), sum(sizes) / len(prompts))


def figures(bench: Bench, generated: Generated, seed: int = 0) -> list[Figure]:
    """Every figure of a model's images, each with its floor."""
    generator, n = torch.Generator().manual_seed(seed), len(bench.prompts)
    rows = accuracies(bench, generated, generator) if "accuracy" in bench.real else []
    for name in bench.networks:
        real = bench.real[name]
        scores = compared(name, generated.images[name], real, generator)
        floors = compared(name, bench.floor[name], real, generator)
        for metric, score in scores.items():
            rows.append(Figure(metric, name, *score, floors[metric].value, n))
        rows.append(diversity(name, bench, generated, generator))
        if bench.training is not None:
            training = bench.training[name]
            floor = metrics.memorised_floor(training).mean().item()
            each = metrics.memorised(generated.images[name], training)
            rows.append(Figure("memorised", name, *metrics.bootstrap(each, generator), floor, n))
    if "CLIP score" in bench.real:
        score = metrics.bootstrap(generated.images["CLIP score"], generator)
        floor = bench.floor["CLIP score"].mean().item()
        rows.append(Figure("CLIP score", "clip ViT-B-32 openai", *score, floor, n))
    for name in ("evaluations", "seconds"):
        value = getattr(generated, name)
        rows.append(Figure(f"{name} per picture", "", value, None, None, None, n))
    return rows


def accuracies(bench: Bench, generated: Generated, generator: torch.Generator) -> list[Figure]:
    """The share of images the critic accepts in every attribute: all, one object, two objects."""
    accepted, floor, rows = generated.images["accuracy"], bench.floor["accuracy"], []
    one, two = slice(len(accepted) // 2), slice(len(accepted) // 2, None)
    parts = {"accuracy": slice(None), "accuracy, one object": one, "accuracy, two objects": two}
    for name, part in parts.items():
        if n := len(accepted[part]):
            score = metrics.bootstrap(accepted[part], generator)
            rows.append(Figure(name, "critic", *score, floor[part].mean().item(), n))
    return rows


def compared(
    name: str, fake: Float[Tensor, "n D"], real: Float[Tensor, "m D"], generator: torch.Generator
) -> dict[str, Score]:
    """Distances and shares between two sets of features. The Fréchet distance has no interval:
    resampling images would only push it up."""
    distance = metrics.frechet(metrics.Moments().add(fake), metrics.Moments().add(real))
    scores = {
        "FID" if name == features.INCEPTION else "frechet": Score(distance),
        "kid": metrics.kid(fake, real, generator),
    }
    for metric in (metrics.precision, metrics.recall, metrics.density, metrics.coverage):
        scores[metric.__name__] = metrics.bootstrap(metric(real, fake), generator)
    return scores


def diversity(name: str, bench: Bench, generated: Generated, generator: torch.Generator) -> Figure:
    """How far apart images of one prompt are, in units of two real images of different prompts."""
    unit, real = metrics.diversity(bench.real[name][None, :1000]).item(), bench.repeated_floor
    floor = None if real is None else by_prompt(real[name]).mean().item() / unit
    each = by_prompt(generated.repeated[name]) / unit
    score = metrics.bootstrap(each, generator)
    return Figure("diversity per prompt", name, *score, floor, len(each))


def by_prompt(repeated: Float[Tensor, "n D"]) -> Float[Tensor, "P"]:
    """How far apart the EACH images of each prompt are."""
    return metrics.diversity(repeated.unflatten(0, (-1, EACH)))
