"""DreamBooth in the box: a large red ring, which the model has never drawn, taught from five pictures; what is gained and what is lost.

    python experiments/dreambooth.py --out out/dreambooth
    python experiments/dreambooth.py --subject dreambooth/dog6 --out out/dog6   # a dog, in photographs

With --subject the model of photographs learns that instead (dreambooth_photos.py). Else, five ways from the same pictures: all weights with prior preservation, without it, a LoRA with it, that LoRA again from what was right of its
own drawings ([3]), and textual inversion. The critic counts rings in 100 new contexts, and judges captions that have nothing to do with them. Writes
subject/, second/, an OUT for each way, dreambooth.png and results.json. The recipes are in minidiff/finetuning/dreambooth.py.

[1] Ruiz et al. DreamBooth: Fine Tuning Text-to-Image Diffusion Models for Subject-Driven Generation. 2022. arXiv:2208.12242
[2] Gal et al. An Image is Worth One Word: Personalizing Text-to-Image Generation using Textual Inversion. 2022. arXiv:2208.01618
[3] Sohn et al. StyleDrop: Text-to-Image Generation in Any Style. 2023. arXiv:2306.00983 (section 3.3, iterative training with feedback)
"""

import json
import random
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import dreambooth_photos
import torch
from jaxtyping import Float
from photo_tuning import Chosen, precision
from torch import Tensor

from minidiff import load, pipeline
from minidiff.cli.script import run
from minidiff.data import critic
from minidiff.data.folder import CaptionedImages
from minidiff.data.world import BACKGROUNDS, RELATIONS, SIZES, Scene, Thing, World
from minidiff.evaluation import bench as evaluate
from minidiff.figures import curves, plots
from minidiff.finetuning import dreambooth as booth
from minidiff.finetuning.groups import Group, encoded
from minidiff.finetuning.loop import finetune
from minidiff.latent_diffusion import LatentDiffusion
from minidiff.options.finetuning import DreamBoothConfig
from minidiff.options.sampling import SampleConfig
from minidiff.recipes.quickstart import COLOURS, SHAPES, SIZE
from minidiff.training import atomic
from minidiff.training.progress import write_results

TOKEN = "panna"  # rare, and one token
WORD = f"{TOKEN} circle"  # what the ring is called: the token and its class, as in "sks dog"
RING = Thing("ring", "red", "large")
FIVE = [
    Scene((RING,), "black"),
    Scene((RING, Thing("square", "blue", "small")), "gray", "above"),
    Scene((RING, Thing("triangle", "green", "large")), "black", "below"),
    Scene((RING, Thing("triangle", "yellow", "large")), "white", "left of"),
    Scene((RING, Thing("square", "green", "small")), "gray", "right of"),
]
ONE, GROUND = (
    "a {small|large} {red|yellow|green|blue} {circle|square|triangle}",
    " on a {white|gray|black|pink} background",
)
CLASS = [ONE + GROUND] + [f"{ONE} {{above|below|to the left of|to the right of}} {ONE}{GROUND}"] * 3
WAYS = ("full", "without prior", "LoRA", "second round", "inversion")


def named(scene: Scene, word: str = WORD) -> Scene:
    """The scene as captions have it, in which rings are called by the word."""
    return replace(
        scene,
        things=tuple(
            replace(thing, shape=word) if thing.shape == RING.shape else thing
            for thing in scene.things
        ),
    )


def said(scene: Scene, word: str = WORD) -> str:
    """A scene's caption, everything stated."""
    things = [f"a {thing.size} {thing.colour} {thing.shape}" for thing in named(scene, word).things]
    beside = {"left of": " to the left of ", "right of": " to the right of "}.get(
        scene.relation, f" {scene.relation} "
    )
    return beside.join(things) + f" on a {scene.background} background"


def new_contexts(n: int, seed: int) -> list[Scene]:
    """The ring alone and beside another thing in turn, in scenes that are none of the five."""
    rng, scenes = random.Random(f"new {seed}"), []
    while len(scenes) < n:
        scene = beside(rng)
        scene = scene if len(scenes) % 2 else Scene((RING,), scene.background)
        scenes += [scene] if scene not in FIVE else []
    return scenes


def beside(rng: random.Random) -> Scene:
    """The ring and another thing."""
    other = Thing(rng.choice(SHAPES), rng.choice(COLOURS), rng.choice(SIZES))
    return Scene((RING, other), rng.choice(list(BACKGROUNDS)), rng.choice(RELATIONS))


def subject_folder(
    folder: Path, seed: int, more: list[tuple[Float[Tensor, "3 H W"], Scene]] = ()
) -> Path:
    """The five pictures, each with several captions: what it shows in the world's many ways of saying so. And more pictures, with a caption each."""
    world, rng = World(SIZE), random.Random(f"five {seed}")
    texts = [
        (k, text)
        for k, scene in enumerate(FIVE)
        for text in [said(scene)] + [world.caption(named(scene), rng) for _ in range(7)]
    ]
    for k, (_, scene) in enumerate(
        more, len(FIVE)
    ):  # and the ring alone as often, or it would be drawn well in company only
        texts += [(k, said(scene)), (0, said(FIVE[0]))]
    for k, picture in enumerate([*world.draw(FIVE, rng), *(picture for picture, _ in more)]):
        plots.save_png(picture, folder / f"{k}.png")
    about = {"about": atomic.SIGNATURE}
    lines = [json.dumps({"file_name": f"{k}.png", "text": text} | about) for k, text in texts]
    with atomic.write(folder / "metadata.jsonl", atomic.unsigned) as new:
        new.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def second_folder(
    model: LatentDiffusion, folder: Path, drawings: int, contexts: list[Scene], seed: int
) -> Path:
    """The five pictures, and what is right of the model's own drawings of the ring beside other things, in none of the contexts that are judged
    later. The critic sorts them here; with a subject of your own you do."""
    rng, scenes = random.Random(f"second {seed}"), []
    while len(scenes) < drawings:
        scene = beside(rng)
        scenes += [scene] if scene not in [*FIVE, *contexts] else []
    pictures = pipeline.generate(
        model, [said(scene) for scene in scenes], SampleConfig(seed=seed + 1), progress=True
    ).cpu()
    right = [
        pair
        for pair in zip(pictures, scenes, strict=True)
        if critic.holds(pair[0], said(pair[1], "ring"))
    ]
    print(f"{len(right)} of {drawings} drawings are right, and are learnt from")
    return subject_folder(folder, seed, right)


def taught(
    way: str, subject: Path, classes: CaptionedImages, out: Path, steps: int | None, seed: int
) -> LatentDiffusion:
    """The box after this way of teaching it."""
    model, method = (
        load(),
        {"LoRA": "lora", "second round": "lora", "inversion": "inversion"}.get(way, "full"),
    )
    recipe = booth.recipe(model, method)
    config = booth.completed(
        DreamBoothConfig(
            prompt=f"a {WORD}",
            class_prompt=tuple(CLASS),
            method=method,
            prior=0.0 if way == "without prior" else None,
            steps=steps,
            every=steps or recipe.steps,
            seed=seed,
        ),
        recipe,
    )
    examples = booth.subject_examples(
        model, booth.subject_pictures(subject, ""), config, out / "cache"
    )
    groups = [Group("subject", examples)]
    if config.preserves:
        groups.append(
            Group(
                "class", encoded(model, classes, model.size, out / "cache" / "class"), config.prior
            )
        )
    word = TOKEN if config.text == "word" else None
    return finetune(model, groups, out, booth.finetune_config(config, recipe, word))


def judged(
    model: LatentDiffusion, scenes: list[Scene], captions: list[str], seed: int
) -> tuple[dict[str, float], Float[Tensor, "N 3 H W"]]:
    """How many of the scenes show a red ring, how many show all that was asked for, and how many of the other captions come out right."""
    pictures = pipeline.generate(
        model, [said(scene) for scene in scenes], SampleConfig(seed=seed), progress=True
    ).cpu()
    seen = [critic.read(picture).things for picture in pictures]
    there = [
        any((thing.shape, thing.colour) == (RING.shape, RING.colour) for thing in things)
        for things in seen
    ]
    right = critic.accuracy(pictures, [said(scene, "ring") for scene in scenes])
    other, others, _ = evaluate.caption_accuracy(model, captions, seed=seed)
    return {"subject": sum(there) / len(there), "all right": right, "others": other}, torch.cat(
        [pictures[:6], others[:2], others[-2:]]
    )


def figure(
    rows: dict[str, Float[Tensor, "10 3 H W"]],
    results: dict[str, dict[str, float]],
    labels: list[str],
    path: Path,
) -> Path:
    """Images of the same prompts and seeds, a row for each way, and bars beside them."""
    from matplotlib.figure import Figure  # the object API: no window, no global state

    with curves.style():
        sheet = Figure((15, 1.35 * len(rows) + 1.2), layout="constrained")
        left, right = sheet.subfigures(1, 2, width_ratios=(3, 1))
        grid = left.subplots(len(rows), len(labels), squeeze=False)
        for axes, (name, pictures) in zip(grid, rows.items(), strict=True):
            for one, picture in zip(axes, pictures, strict=True):
                one.imshow((picture.permute(1, 2, 0) + 1) / 2)
                one.set(xticks=[], yticks=[], frame_on=False)
            axes[0].set_ylabel(name, fontsize=9)
        for one, label in zip(grid[0], labels, strict=True):
            one.set_title(textwrap.fill(label, 20), fontsize=6)
        bars, names = right.subplots(), list(results)
        for k, key in enumerate(("subject", "others")):
            places = [i - 0.2 + 0.4 * k for i in range(len(names))]
            drawn = bars.barh(places, [results[name][key] for name in names], 0.36, zorder=2)
            bars.bar_label(drawn, fmt="%.2f", padding=3)
            drawn.set_label(("a red ring, in 100 new contexts", "other captions right")[k])
        bars.set(yticks=range(len(names)), yticklabels=names, xlim=(0, 1.15))
        bars.invert_yaxis()
        right.legend(loc="outside upper center", ncols=2)
        return curves.save(sheet, path)


# beside results.json
OUTPUTS = ("dreambooth.png", "subject/metadata.jsonl", "second/metadata.jsonl")


def main(
    out: Path = Path("out/dreambooth"),
    contexts: int = 100,
    others: int = 200,
    steps: int | None = None,
    class_pictures: int | None = None,
    drawings: int = 160,
    threads: int = 2,
    seed: int = 0,
    subject: Path | None = None,
    thing: str | None = None,
    ways: tuple[str, ...] = dreambooth_photos.WAYS,
    photos: Path | None = None,
    dtype: Chosen = "auto",
    resume: bool = False,
) -> None:
    """Teach the box a ring in five ways, or the model of photographs a subject in four, and measure
    each.

    Args:
        out: folder for everything written.
        contexts: new contexts in which the ring is asked for.
        others: held-out captions without it, half of them of one thing.
        steps: training steps of each way; left out, the recipe's.
        class_pictures: pictures that the unmodified model draws of what it knows; left out, the recipe's.
        drawings: what the LoRA draws for its second round.
        threads: cores to compute on.
        seed: everything random follows from it.
        subject: a folder with 3 to 6 photographs of a subject, as dog6; the options from here on are for it alone.
        thing: what it is, in words that the model knows, as in Chihuahua; folders called dog6, cat2 and berry_bowl need none.
        ways: which of full, "without prior", LoRA, inversion.
        photos: shards with labels, whose held-out pictures the subject is compared with; left out, the model's own of its class.
        dtype: precision to compute in; auto: bf16 where the processor has it.
        resume: go on where an interrupted run stopped.
    """
    torch.set_num_threads(threads)
    if subject is not None:
        options = dreambooth_photos.Options(
            steps=steps or dreambooth_photos.STEPS, dtype=precision(dtype), seed=seed, resume=resume
        )
        counts = dict(class_pictures=class_pictures or 200)
        dreambooth_photos.teach(subject, out, options, thing, ways, photos, **counts)
        return
    world, subject = World(SIZE, SHAPES, COLOURS), subject_folder(out / "subject", seed)
    captions = [
        caption
        for objects in (1, 2)
        for caption in evaluate.held_out(world, others // 2, objects, seed)
    ]
    scenes = new_contexts(contexts, seed)
    start, box = time.perf_counter(), load()
    prompts = booth.expand(CLASS, class_pictures or booth.recipe(box, "lora").class_pictures, seed)
    classes = booth.class_pictures(box, prompts, out / "class", seed=seed)
    drawing, found, rows, models = (time.perf_counter() - start) / 60, {}, {}, {"before": box}
    for way in ("before", *WAYS):
        start, folder = time.perf_counter(), subject
        if way == "second round":
            folder = second_folder(models["LoRA"], out / "second", drawings, scenes, seed)
        if way != "before":
            models[way] = taught(way, folder, classes, out / way.replace(" ", "-"), steps, seed)
        minutes = (time.perf_counter() - start) / 60
        figures, rows[way] = judged(models[way], scenes, captions, seed)
        found[way] = figures | {"minutes": round(minutes, 2)}
        print(way, ", ".join(f"{name} {value:.3f}" for name, value in found[way].items()))
    labels = [said(scene) for scene in scenes[:6]] + captions[:2] + captions[-2:]
    print(figure(rows, found, labels, out / "dreambooth.png"))
    made = dict(
        contexts=contexts,
        others=len(captions),
        class_pictures=len(prompts),
        class_minutes=round(drawing, 2),
        drawings=drawings,
    )
    print(write_results(out, **made, seed=seed, threads=threads, ways=found))


if __name__ == "__main__":
    run(main, OUTPUTS)
