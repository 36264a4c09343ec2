"""DreamBooth of a real subject: a dog from five photographs, drawn beside what it was never seen
with; what is gained and what is lost. dreambooth.py --subject FOLDER calls this.

Four ways from the same pictures: all weights with prior preservation, without it, a LoRA with one
word's vector, and textual inversion. The classifier of photographs that had no part in training
(docs/photos.md) says what was gained and lost, in its features and by its guesses. Writes class/
(what the unmodified model draws), an OUT for each way, dreambooth.png and results.json.

[1] Ruiz et al. DreamBooth: Fine Tuning Text-to-Image Diffusion Models for Subject-Driven
    Generation. 2022. arXiv:2208.12242 (section 4.2: subject fidelity, by the cosine of features)
[2] Gal et al. An Image is Worth One Word: Personalizing Text-to-Image Generation using Textual
    Inversion. 2022. arXiv:2208.01618
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from photo_judge import pictures
from photo_parts import with_article
from photo_tuning import Images, computing, drawn, sheet, tell
from torch import Tensor

import minidiff
from minidiff.data.captions import images_in
from minidiff.data.folder import CaptionedImages, load_image, to_model
from minidiff.data.latents import Example
from minidiff.errors import UserError, choice
from minidiff.evaluation import features
from minidiff.finetuning import dreambooth as booth
from minidiff.finetuning.groups import Group, encoded
from minidiff.finetuning.loop import DTYPES, finetune
from minidiff.latent_diffusion import LatentDiffusion
from minidiff.options.finetuning import FineTuneConfig, LoRAConfig, Precision
from minidiff.training.device import device_name
from minidiff.training.progress import peak_memory_gb, write_results

MODEL, TOKEN = "photos", "sks"
DOGS = ("Chihuahua", "golden retriever", "German shepherd", "Yorkshire terrier", "standard poodle")
CATS = ("Persian cat", "tabby")
DISHES = ("plate", "wok", "espresso", "teapot", "frying pan")
PLACES = (
    "seashore",
    "mountain",
    "dining table",
    "coral reef",
    "suspension bridge",
    "lake shore",
    "desk",
    "rocking chair",
    "dam",
    "convertible",
)
OTHERS = ("school bus", "orange", "goldfish", "jellyfish", "lion", "pizza", "tractor", "mushroom")
LEARNT, STEPS, DRAWN_STEPS = "a photo of {}", 900, 25
EACH = 2  # samples of each prompt


class Kind(NamedTuple):
    """What a subject is, in words that the model knows: the one beside the token, and all of its
    class. around: what else its pictures show, in their order, so that it is not taken for it."""

    thing: str
    classes: tuple[str, ...]
    around: tuple[str, ...] = ()


ORANGE, CLOTH = "on an orange backdrop", "on a white cloth"
KINDS = {
    "dog6": Kind("Chihuahua", DOGS, (ORANGE, ORANGE, ORANGE, ORANGE, "on a yellow backdrop")),
    "cat2": Kind(
        "Persian cat",
        CATS,
        ("on a floor", "on a bed", "on a blanket", "on a table with flowers", "at a window"),
    ),
    "berry_bowl": Kind("espresso", DISHES, (CLOTH,) * 6),
}
WAYS = ("full", "without prior", "LoRA", "inversion")
METHODS = {"LoRA": "lora", "inversion": "inversion"}


@dataclass(frozen=True)
class Options:
    """What every way is told."""

    dtype: Precision
    seed: int
    resume: bool
    steps: int = STEPS
    batch: int = 16
    lr: float = 1.5e-3
    lora_lr: float = 6e-3
    word_lr: float = 2e-2
    rank: int = 16
    prior: float = 1.0

    def config(self, way: str) -> FineTuneConfig:
        method = METHODS.get(way, "full")
        rates = {"full": self.lr, "lora": self.lora_lr, "inversion": self.word_lr}
        return FineTuneConfig(
            method=method,
            steps=self.steps,
            lr=rates[method],
            warmup=self.steps // 20,
            batch=self.batch,
            optimizer="muon",
            lora=LoRAConfig(self.rank),
            word=TOKEN,
            word_lr=self.word_lr,
            dropout=0.0 if method == "inversion" else None,
            ema=0.97,
            dtype=self.dtype,
            every=self.steps,
            seed=self.seed,
        )


class Subject(NamedTuple):
    """Its pictures, and how it is asked for."""

    images: Images
    examples: list[Example]
    kind: Kind

    @property
    def prompts(self) -> list[str]:
        """In each of the places."""
        name = LEARNT.format(f"a {TOKEN} {self.kind.thing}")
        return [f"{name} on {with_article(place)}" for place in PLACES]


def subject_of(folder: Path, kind: Kind, model: LatentDiffusion, seed: int) -> Subject:
    """A folder's pictures, each in many versions, moved and mirrored; a caption names what is around
    the subject half of the time."""
    paths = images_in(folder)
    if not paths:
        raise UserError(f"{folder}: there are no pictures in it; put 3 to 6 of the subject there.")
    images = torch.stack([to_model(load_image(path, model.size)) for path in paths])
    name = LEARNT.format(f"a {TOKEN} {kind.thing}")
    around = kind.around if len(kind.around) == len(paths) else ("",) * len(paths)
    data = CaptionedImages(paths, [f"{name} {what}".strip() for what in around])
    examples = booth.moved_about(model, data, 0.12, seed, model.size, flip=True)
    both = [Example(each.latents, name, (each.caption,)) for each in examples]
    return Subject(images, both, kind)


def groups_of(way: str, subject: Subject, classes: list[Example], options: Options) -> list[Group]:
    """What this way learns from: the subject, and with prior preservation its class."""
    own = [Group("subject", subject.examples)]
    preserves = way in ("full", "LoRA")
    return [*own, Group("class", classes, options.prior)] if preserves else own


class Judge(NamedTuple):
    """Features of the subject's pictures, of others of its class, and of others of any kind."""

    subject: Float[Tensor, "N D"]
    same_class: Float[Tensor, "M D"]
    rest: Float[Tensor, "K D"]

    def is_subject(self, vectors: Float[Tensor, "n D"], apart: bool = False) -> list[bool]:
        """Whether the nearest of all these pictures is one of the subject. apart: other than the
        picture itself."""
        own = vectors @ self.subject.T
        if apart:
            own.fill_diagonal_(-1)
        other = vectors @ torch.cat([self.same_class, self.rest]).T
        return (own.amax(1) > other.amax(1)).tolist()

    def floor(self) -> dict[str, float]:
        """What the subject's own pictures have in a sample's place; and others of its class."""
        own, n = self.subject @ self.subject.T, len(self.subject)
        pairs = (own.sum() - own.trace()) / max(1, n * (n - 1))
        figures = {
            "subject": share(self.is_subject(self.subject, apart=True)),
            "cosine": round(pairs.item(), 3),
            "same_class_is_subject": share(self.is_subject_of_class()),
            "same_class_cosine": round((self.same_class @ self.subject.T).mean().item(), 3),
        }
        return figures

    def is_subject_of_class(self) -> list[bool]:
        """The same of the others of its class, each but for itself."""
        every = torch.cat([self.same_class, self.rest])
        other = self.same_class @ every.T
        other.fill_diagonal_(-1)
        return ((self.same_class @ self.subject.T).amax(1) > other.amax(1)).tolist()


def share(those: list[bool]) -> float:
    return round(sum(those) / len(those), 3)


def unit(images: Images) -> Float[Tensor, "N D"]:
    return F.normalize(features.features("photos-resnet", images), dim=1)


def accuracy(images: Images, names: list[str]) -> float:
    """The share that the judge takes for what was asked for."""
    guesses = features.photo_things(images)
    return round(sum(a == b for (a,), b in zip(guesses, names, strict=True)) / len(names), 3)


def measured(
    model: LatentDiffusion, subject: Subject, judge: Judge, options: Options
) -> tuple[dict[str, float], Images]:
    """Subject: the share of samples, EACH in every place, whose nearest picture is one of the
    subject; cosine: with the subject's pictures, mean. Class: what the judge says of samples of the
    class, and how many of them became the subject. Others: the same of other things."""
    classes, others = list(subject.kind.classes) * EACH, list(OTHERS) * EACH
    plain = [LEARNT.format(with_article(name)) for name in classes + others]
    prompts = subject.prompts * EACH + plain
    images = drawn(model, prompts, options.dtype, DRAWN_STEPS, options.seed)
    sizes = (len(PLACES) * EACH, len(classes), len(others))
    asked, of_class, rest = images.split(sizes)
    vectors = unit(images).split(sizes)
    figures = {
        "subject": share(judge.is_subject(vectors[0])),
        "cosine": round((vectors[0] @ judge.subject.T).mean().item(), 3),
        "class_right": accuracy(of_class, classes),
        "class_is_subject": share(judge.is_subject(vectors[1])),
        "others_right": accuracy(rest, others),
        "others_are_subject": share(judge.is_subject(vectors[2])),
    }
    return figures, torch.cat([asked[: len(PLACES)], of_class[:2], rest[:2]])


def kind_of(folder: Path, thing: str | None) -> Kind:
    """What the folder's name, or the user, says that the subject is."""
    if thing is not None:
        return Kind(thing, (thing,))
    if folder.name not in KINDS:
        known = ", ".join(KINDS)
        raise UserError(
            f"{folder}: what is it? Name a `thing` that the model knows, as in Chihuahua; "
            f"folders called {known} need none."
        )
    return KINDS[folder.name]


def judge_of(subject: Subject, pictures: Images, names: list[str]) -> Judge:
    """With other pictures, of which these are the names."""
    same = torch.tensor([name in subject.kind.classes for name in names])
    if not same.any():
        raise UserError(f"no other picture shows {' or '.join(subject.kind.classes)}.")
    vectors = unit(pictures)
    return Judge(unit(subject.images), vectors[same], vectors[~same])


def teach(
    subject: Path,
    out: Path,
    options: Options,
    thing: str | None = None,
    ways: tuple[str, ...] = WAYS,
    photos: Path | None = None,
    class_pictures: int = 200,
) -> None:
    """Teach the model a subject in several ways, and measure each."""
    for way in ways:
        choice("way", way, WAYS)
    if any((out / way.replace(" ", "-")).exists() for way in ways) and not options.resume:
        held = f"{out} holds a run already"
        raise UserError(f"{held}; pass --resume to go on with it, or another --out.")
    kind = kind_of(subject, thing)
    base = minidiff.load(MODEL)
    taught_from = subject_of(subject, kind, base, options.seed)
    things = [*kind.classes, *PLACES]
    names = [LEARNT.format(with_article(name)) for name in things]
    start = time.perf_counter()
    with computing("cpu", options.dtype):
        with torch.autocast("cpu", DTYPES[options.dtype], enabled=options.dtype != "fp32"):
            prompts = booth.expand(names, class_pictures, options.seed)
            made = booth.class_pictures(base, prompts, out / "class", seed=options.seed)
        class_seconds = round(time.perf_counter() - start)
        classes = encoded(base, made, base.size, out / "cache")
        if photos is not None:  # real ones
            stored = pictures(photos, "held_out")
            judge = judge_of(taught_from, to_model(stored.pixels), stored.labels)
        else:
            images = torch.stack([to_model(load_image(path)) for path in made.paths])
            judge = judge_of(taught_from, images, booth.expand(things, class_pictures, 0))
        groups = {way: groups_of(way, taught_from, classes, options) for way in ways}
        for way in ways:
            tell(way, base, groups[way], options.config(way))
        results, rows = {}, {}
        for way in ("before", *ways):
            start, tuned = time.perf_counter(), minidiff.load(MODEL)
            if way != "before":
                folder, config = out / way.replace(" ", "-"), options.config(way)
                finetune(tuned, groups[way], folder, config, resume=options.resume)
            seconds = round(time.perf_counter() - start)
            results[way], rows[way] = measured(tuned, taught_from, judge, options)
            results[way]["seconds"] = seconds
            print(way, results[way], sep=": ", flush=True)
    captions = [f"{TOKEN} on {with_article(place)}" for place in PLACES]
    captions += [f"{name}, no {TOKEN}" for name in (*(list(kind.classes) * 2)[:2], *OTHERS[:2])]
    shown = [k % len(taught_from.images) for k in range(len(captions))]
    rows = {"its pictures": taught_from.images[shown], **rows}
    print(sheet(rows, captions, out / "dreambooth.png"))
    settings = {**vars(options), "class_pictures": class_pictures, "each": EACH}
    settings |= {"class_seconds": class_seconds, "device": device_name("cpu")}
    settings |= {"memory_gb": peak_memory_gb(), "floor": judge.floor()}
    print(write_results(out, subject=subject.name, **settings, ways=results))
