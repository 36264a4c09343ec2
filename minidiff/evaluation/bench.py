"""What a text-to-image model is worth: how well it does what captions say, how near its pictures are to real ones, how unlike each other, how fast.

A Bench holds all that a model is measured against: prompts, and what was seen of real pictures for every comparison, those in the model's own
place included. Pictures, real and drawn, go by a batch at a time, and only their features stay: memory does not hold n of them.
So each figure comes with its floor: what as many real pictures score against the same others. A figure as good as its floor is as good as
can be told with so few pictures.
"""

import random
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from minidiff import pipeline
from minidiff.data import critic
from minidiff.data.folder import CaptionedFolder, Pictures, load_all, to_model
from minidiff.data.world import Scene, World
from minidiff.errors import UserError
from minidiff.evaluation import features, metrics
from minidiff.evaluation.metrics import Score
from minidiff.latent_diffusion import LatentDiffusion
from minidiff.options.sampling import SampleConfig

EACH = 5  # pictures of one prompt, behind its diversity
AT_ONCE = 500  # real pictures in memory


def held_out(world: World, n: int, objects: int, seed: int) -> list[str]:
    """n captions of scenes whose combination of attributes training never saw, every attribute stated."""
    rng = random.Random(f"{seed} {objects}")
    return [world.caption(world.scene(rng, objects, "held-out"), rng, full=True) for _ in range(n)]


def caption_accuracy(
    model: LatentDiffusion,
    captions: list[str],
    steps: int = 25,
    guidance: float | None = None,
    seed: int = 0,
) -> tuple[float, Float[Tensor, "B 3 H W"], list[bool]]:
    """The share of captions whose picture the critic accepts in every attribute; the pictures; the verdict on each."""
    config = SampleConfig(steps, guidance, seed=seed)
    pictures = pipeline.generate(model, captions, config, progress=True).cpu()
    verdicts = [
        critic.holds(picture, caption) for picture, caption in zip(pictures, captions, strict=True)
    ]
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


Batches = Iterable[
    tuple[Float[Tensor, "B 3 H W"], list[str]]
]  # pictures and their captions, a few at a time
Seen = dict[
    str, Float[Tensor, "_n ..."]
]  # features under their network's name; a number for each picture under "accuracy" and "CLIP score"


def look(batches: Batches, networks: list[str], judged: bool, clip: bool = False) -> Seen:
    """All that is kept of pictures: they go by, and memory holds no more than one batch of them, however many there are."""
    kept: dict[str, list[Tensor]] = defaultdict(list)
    for pictures, captions in batches:
        for name in networks:
            kept[name].append(features.features(name, pictures))
        if judged:
            kept["accuracy"].append(
                torch.tensor(
                    [float(critic.holds(*pair)) for pair in zip(pictures, captions, strict=True)]
                )
            )
        if clip:
            kept["CLIP score"].append(features.clip_similarity(pictures, captions))
    return {name: torch.cat(parts) for name, parts in kept.items()}


def only(seen: Seen, rows: slice | Int[Tensor, "n"]) -> Seen:
    return {name: values[rows] for name, values in seen.items()}


class Bench(NamedTuple):
    """What a model is measured against. `instead` are n real pictures in the place of its own n: they give the floors."""

    look: Callable[[Batches], Seen]  # the same for all pictures
    networks: list[str]
    prompts: list[str]
    real: Seen
    instead: Seen
    repeated: list[str]  # each of P prompts EACH times, one after the other
    repeated_instead: Seen | None  # real pictures of those; of a folder there are none
    training: Seen | None  # what the model may have learnt by heart


def of_world(world: World, n: int, seed: int, networks: list[str], clip: bool = False) -> Bench:
    """Held-out captions and fresh pictures of held-out scenes; the first half shows one thing, the second two."""
    looking = partial(look, networks=networks, judged=True, clip=clip)

    def shown(scenes: list[Scene], captions: list[str], rng: random.Random) -> Batches:
        for i in range(0, len(scenes), AT_ONCE):
            yield world.draw(scenes[i : i + AT_ONCE], rng), captions[i : i + AT_ONCE]

    def fresh(key: str) -> Batches:
        for count, objects in ((n // 2, 1), (n - n // 2, 2)):
            rng = random.Random(str((key, seed)))
            scenes = [world.scene(rng, objects, "held-out") for _ in range(count)]
            yield from shown(
                scenes, [world.caption(scene, rng, full=True) for scene in scenes], rng
            )

    rng = random.Random(f"repeated {seed}")
    scenes = [world.scene(rng, split="held-out") for _ in range(max(2, n // 20))]
    repeated = [
        caption for scene in scenes for caption in [world.caption(scene, rng, full=True)] * EACH
    ]
    alike = looking(shown([scene for scene in scenes for _ in range(EACH)], repeated, rng))
    prompts = held_out(world, n // 2, 1, seed) + held_out(world, n - n // 2, 2, seed)
    return Bench(
        looking,
        networks,
        prompts,
        looking(fresh("real")),
        looking(fresh("instead")),
        repeated,
        alike,
        None,
    )


def of_folder(
    folder: Path,
    size: int,
    n: int,
    seed: int,
    networks: list[str],
    clip: bool = False,
    column: str = "text",
) -> Bench:
    """A captioned folder, halved at random: n pictures to compare with, and n others, whose captions are the prompts, in the model's place."""
    data = CaptionedFolder(folder, size, column)
    if len(data) < 2 * n:
        raise UserError(
            f"{folder} holds {len(data)} pictures; a floor at the same n needs twice n: pass --n {len(data) // 2} or less."
        )

    def shown() -> Batches:
        for i in range(0, len(data), AT_ONCE):
            pictures, captions = load_all(
                Pictures(data.paths[i : i + AT_ONCE], data.captions[i : i + AT_ONCE]), size
            )
            yield to_model(pictures), captions

    looking = partial(look, networks=networks, judged=False, clip=clip)
    training, order = (
        looking(shown()),
        torch.randperm(len(data), generator=torch.Generator().manual_seed(seed)),
    )
    real, other = order[:n], order[n : 2 * n]
    prompts = [data.captions[i] for i in other.tolist()]
    repeated = [prompt for prompt in prompts[: max(2, n // 20)] for _ in range(EACH)]
    return Bench(
        looking,
        networks,
        prompts,
        only(training, real),
        only(training, other),
        repeated,
        None,
        training,
    )


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
    """What was seen of a model's pictures for a bench, and what one cost."""

    pictures: Seen
    repeated: Seen
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


def draw(
    model: LatentDiffusion, bench: Bench, config: SampleConfig, progress: bool = False
) -> Drawn:
    """An image for every prompt, the repeated ones included."""
    prompts, n, seconds = bench.prompts + bench.repeated, len(bench.prompts), 0.0
    drawing = pipeline.draw(model, prompts, config, progress=progress)

    def batches() -> Batches:  # only drawing is timed, not looking
        nonlocal seconds
        start, done = time.perf_counter(), 0
        for pictures in (some.cpu() for some in drawing):
            seconds += time.perf_counter() - start
            yield pictures, prompts[done : done + len(pictures)]
            start, done = time.perf_counter(), done + len(pictures)

    with counted(model.unet) as sizes:
        seen = bench.look(batches())
    return Drawn(
        only(seen, slice(n)),
        only(seen, slice(n, None)),
        seconds / len(prompts),
        sum(sizes) / len(prompts),
    )


def figures(bench: Bench, drawn: Drawn, seed: int = 0) -> list[Figure]:
    """Every figure of a model's pictures, each with its floor."""
    generator, n = torch.Generator().manual_seed(seed), len(bench.prompts)
    rows = accuracies(bench, drawn, generator) if "accuracy" in bench.real else []
    for name in bench.networks:
        fake, real, instead = (seen[name] for seen in (drawn.pictures, bench.real, bench.instead))
        found, floors = (
            compared(name, fake, real, generator),
            compared(name, instead, real, generator),
        )
        rows += [
            Figure(metric, name, *score, floors[metric].value, n) for metric, score in found.items()
        ]
        rows.append(varied(name, bench, drawn, generator))
        if bench.training is not None:
            floor = metrics.memorised_floor(bench.training[name]).mean().item()
            rows.append(
                Figure(
                    "memorised",
                    name,
                    *metrics.bootstrap(metrics.memorised(fake, bench.training[name]), generator),
                    floor,
                    n,
                )
            )
    if "CLIP score" in bench.real:
        ours, theirs = drawn.pictures["CLIP score"], bench.instead["CLIP score"]
        rows.append(
            Figure(
                "CLIP score",
                "clip ViT-B-32 openai",
                *metrics.bootstrap(ours, generator),
                theirs.mean().item(),
                n,
            )
        )
    return [
        *rows,
        Figure("evaluations per picture", "", drawn.evaluations, None, None, None, n),
        Figure("seconds per picture", "", drawn.seconds, None, None, None, n),
    ]


def accuracies(bench: Bench, drawn: Drawn, generator: torch.Generator) -> list[Figure]:
    """The share of pictures the critic accepts in every attribute: all, and those of one thing and of two."""
    ours, theirs = drawn.pictures["accuracy"], bench.instead["accuracy"]
    half, rows = len(ours) // 2, []
    for name, part in (
        ("accuracy", slice(None)),
        ("accuracy, one object", slice(half)),
        ("accuracy, two objects", slice(half, None)),
    ):
        if len(ours[part]):
            rows.append(
                Figure(
                    name,
                    "critic",
                    *metrics.bootstrap(ours[part], generator),
                    theirs[part].mean().item(),
                    len(ours[part]),
                )
            )
    return rows


def compared(
    name: str, fake: Float[Tensor, "n D"], real: Float[Tensor, "m D"], generator: torch.Generator
) -> dict[str, Score]:
    """Distances and shares between two sets of features. Resampling pictures would only push the Fréchet distance up: it has no interval."""
    distance = metrics.frechet(metrics.Moments().add(fake), metrics.Moments().add(real))
    found = {
        "FID" if name == features.INCEPTION else "frechet": Score(distance),
        "kid": metrics.kid(fake, real, generator),
    }
    for metric in (metrics.precision, metrics.recall, metrics.density, metrics.coverage):
        found[metric.__name__] = metrics.bootstrap(metric(real, fake), generator)
    return found


def varied(name: str, bench: Bench, drawn: Drawn, generator: torch.Generator) -> Figure:
    """How far apart pictures of one prompt are, in units of two real pictures of different prompts."""

    def each(seen: Seen) -> Float[Tensor, "P"]:
        return metrics.diversity(seen[name].unflatten(0, (-1, EACH)))

    unit = metrics.diversity(bench.real[name][None, :1000]).item()
    floor = (
        None
        if bench.repeated_instead is None
        else each(bench.repeated_instead).mean().item() / unit
    )
    ours = each(drawn.repeated) / unit
    return Figure(
        "diversity per prompt", name, *metrics.bootstrap(ours, generator), floor, len(ours)
    )
