"""What a text-to-image model is worth: how well it does what captions say, how near its pictures are to real ones, how unlike each other, how fast.

A Bench holds all that a model is measured against: prompts, and real pictures for every comparison, those in the model's own place included.
So each figure comes with its floor: what as many real pictures score against the same others. A figure as good as its floor is as good as
can be told with so few pictures.
"""
import random
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from minidiff import features, metrics
from minidiff.data import critic
from minidiff.data.folder import CaptionedFolder, load_all, to_model
from minidiff.data.world import World
from minidiff.errors import UserError
from minidiff.latent_diffusion import LatentDiffusion
from minidiff.metrics import Score
from minidiff.samplers import by_name

EACH = 5  # pictures of one prompt, behind its diversity


def held_out(world: World, n: int, objects: int, seed: int) -> list[str]:
    """n captions of scenes whose combination of attributes training never saw, every attribute stated."""
    rng = random.Random(f"{seed} {objects}")
    return [world.caption(world.scene(rng, objects, "held-out"), rng, full=True) for _ in range(n)]


def caption_accuracy(
    model: LatentDiffusion, captions: list[str], steps: int = 25, guidance: float | None = None, seed: int = 0
) -> tuple[float, Float[Tensor, "B 3 H W"], list[bool]]:
    """The share of captions whose picture the critic accepts in every attribute; the pictures; the verdict on each."""
    pictures = model.generate(captions, steps=steps, guidance=guidance, generator=torch.Generator().manual_seed(seed), progress=True).cpu()
    verdicts = [critic.holds(picture, caption) for picture, caption in zip(pictures, captions, strict=True)]
    return sum(verdicts) / len(verdicts), pictures, verdicts


def mistakes(pictures: Float[Tensor, "B 3 H W"], captions: list[str]) -> dict[str, float]:
    """How often each attribute is wrong, among the captions that state it."""
    wrong, stated = Counter(), Counter()
    for picture, caption in zip(pictures, captions, strict=True):
        for attribute, right in critic.judge(picture, caption).items():
            stated[attribute] += 1
            wrong[attribute] += not right
    return {attribute: round(wrong[attribute] / stated[attribute], 4) for attribute in stated}


def shuffled(captions: list[str]) -> list[str]:
    """Every caption given to its neighbour's picture: what a model that ignores its text would score."""
    return captions[1:] + captions[:1]


class Bench(NamedTuple):
    """What a model is measured against. `instead` are n real pictures in the place of its own n: they give the floors."""

    prompts: list[str]
    real: Float[Tensor, "n 3 H W"]
    instead: Float[Tensor, "n 3 H W"]
    captions_instead: list[str]
    repeated: list[str]  # each of P prompts EACH times, one after the other
    repeated_instead: Float[Tensor, "PR 3 H W"] | None  # real pictures of those; of a folder there are none
    training: UInt8[Tensor, "N 3 H W"] | None  # what the model may have learnt by heart
    judged: bool  # the critic understands it


def of_world(world: World, n: int, seed: int) -> Bench:
    """Held-out captions and fresh pictures of held-out scenes; the first half shows one thing, the second two."""

    def fresh(key: str) -> tuple[Tensor, list[str]]:
        halves = [world.batch(count, (key, seed), objects, "held-out", full=True) for count, objects in ((n // 2, 1), (n - n // 2, 2)) if count]
        return torch.cat([pictures for pictures, _, _ in halves]), [caption for _, captions, _ in halves for caption in captions]

    (real, _), (instead, captions) = fresh("real"), fresh("instead")
    rng = random.Random(f"repeated {seed}")
    scenes = [world.scene(rng, split="held-out") for _ in range(max(2, n // 20))]
    repeated = [caption for scene in scenes for caption in [world.caption(scene, rng, full=True)] * EACH]
    alike = world.draw([scene for scene in scenes for _ in range(EACH)], rng)
    prompts = held_out(world, n // 2, 1, seed) + held_out(world, n - n // 2, 2, seed)
    return Bench(prompts, real, instead, captions, repeated, alike, None, True)


def of_folder(folder: Path, size: int, n: int, seed: int, column: str = "text") -> Bench:
    """A captioned folder, halved at random: n pictures to compare with, and n others, whose captions are the prompts, in the model's place."""
    data = CaptionedFolder(folder, size, column)
    if len(data) < 2 * n:
        raise UserError(f"{folder} holds {len(data)} pictures; a floor at the same n needs twice n: pass --n {len(data) // 2} or less.")
    pictures, captions = load_all(data, size)
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))
    real, other = order[:n], order[n : 2 * n].tolist()
    prompts = [captions[i] for i in other]
    repeated = [prompt for prompt in prompts[: max(2, n // 20)] for _ in range(EACH)]
    return Bench(prompts, to_model(pictures[real]), to_model(pictures[other]), prompts, repeated, None, pictures, False)


class Figure(NamedTuple):
    """One line of the table. floor: what as many real pictures score in the generated ones' place."""

    metric: str
    features: str
    value: float
    low: float | None
    high: float | None
    floor: float | None
    n: int


class Drawn(NamedTuple):
    """A model's pictures for a bench, and what one cost."""

    pictures: Float[Tensor, "n 3 H W"]
    repeated: Float[Tensor, "PR 3 H W"]
    seconds: float
    evaluations: float  # of the U-Net, for one picture; guidance takes two a step


@contextmanager
def counted(network: nn.Module) -> Iterator[list[int]]:
    """The sizes of the batches that went through a network, as they come."""
    sizes: list[int] = []
    handle = network.register_forward_hook(lambda _, __, output: sizes.append(len(output)))
    try:
        yield sizes
    finally:
        handle.remove()


def draw(model: LatentDiffusion, bench: Bench, sampler: str | None = None, seed: int = 0, **how) -> Drawn:
    """A picture for every prompt, the repeated ones included; how: steps, guidance, and more of model.draw's arguments."""
    generator = torch.Generator().manual_seed(seed)
    prompts, start = bench.prompts + bench.repeated, time.perf_counter()
    with counted(model.unet) as sizes:
        pictures = model.generate(prompts, step=by_name(sampler or model.sampler, generator), generator=generator, **how).cpu()
    seconds = time.perf_counter() - start
    n = len(bench.prompts)
    return Drawn(pictures[:n], pictures[n:], seconds / len(prompts), sum(sizes) / len(prompts))


def figures(bench: Bench, drawn: Drawn, networks: list[str], seed: int = 0) -> list[Figure]:
    """Every figure of a model's pictures, each with its floor."""
    generator, n = torch.Generator().manual_seed(seed), len(drawn.pictures)
    rows = accuracies(bench, drawn, generator) if bench.judged else []
    for name in networks:
        fake, real, instead = (features.features(name, pictures) for pictures in (drawn.pictures, bench.real, bench.instead))
        found, floors = compared(name, fake, real, generator), compared(name, instead, real, generator)
        rows += [Figure(metric, name, *score, floors[metric].value, n) for metric, score in found.items()]
        rows.append(varied(name, bench, drawn, generator))
        if bench.training is not None:
            training = torch.cat([features.features(name, to_model(some)) for some in bench.training.split(256)])
            floor = metrics.memorised_floor(training).mean().item()
            rows.append(Figure("memorised", name, *metrics.bootstrap(metrics.memorised(fake, training), generator), floor, n))
    return [
        *rows,
        Figure("evaluations per picture", "", drawn.evaluations, None, None, None, n),
        Figure("seconds per picture", "", drawn.seconds, None, None, None, n),
    ]


def accuracies(bench: Bench, drawn: Drawn, generator: torch.Generator) -> list[Figure]:
    """The share of pictures the critic accepts in every attribute: all, and those of one thing and of two."""

    def verdicts(pictures: Tensor, captions: list[str]) -> Float[Tensor, "n"]:
        return torch.tensor([float(critic.holds(picture, caption)) for picture, caption in zip(pictures, captions, strict=True)])

    ours, theirs = verdicts(drawn.pictures, bench.prompts), verdicts(bench.instead, bench.captions_instead)
    half, rows = len(ours) // 2, []
    for name, part in (("accuracy", slice(None)), ("accuracy, one object", slice(half)), ("accuracy, two objects", slice(half, None))):
        if len(ours[part]):
            rows.append(Figure(name, "critic", *metrics.bootstrap(ours[part], generator), theirs[part].mean().item(), len(ours[part])))
    return rows


def compared(name: str, fake: Float[Tensor, "n D"], real: Float[Tensor, "m D"], generator: torch.Generator) -> dict[str, Score]:
    """Distances and shares between two sets of features. Resampling pictures would only push the Fréchet distance up: it has no interval."""
    distance = metrics.frechet(metrics.Moments().add(fake), metrics.Moments().add(real))
    found = {"FID" if name == features.INCEPTION else "frechet": Score(distance), "kid": metrics.kid(fake, real, generator)}
    for metric in (metrics.precision, metrics.recall, metrics.density, metrics.coverage):
        found[metric.__name__] = metrics.bootstrap(metric(real, fake), generator)
    return found


def varied(name: str, bench: Bench, drawn: Drawn, generator: torch.Generator) -> Figure:
    """How far apart pictures of one prompt are, in units of two real pictures of different prompts."""

    def each(pictures: Tensor) -> Float[Tensor, "P"]:
        return metrics.diversity(features.features(name, pictures).unflatten(0, (-1, EACH)))

    real = features.features(name, bench.real[:1000])
    unit = metrics.diversity(real[None]).item()
    floor = None if bench.repeated_instead is None else each(bench.repeated_instead).mean().item() / unit
    return Figure("diversity per prompt", name, *metrics.bootstrap(each(drawn.repeated) / unit, generator), floor, len(drawn.repeated) // EACH)


def clip_score(bench: Bench, drawn: Drawn) -> Figure:
    """The mean cosine between a picture and its prompt in CLIP's space."""
    ours = features.clip_similarity(drawn.pictures, bench.prompts)
    theirs = features.clip_similarity(bench.instead, bench.captions_instead)
    return Figure("CLIP score", "clip ViT-B-32 openai", *metrics.bootstrap(ours), theirs.mean().item(), len(ours))
