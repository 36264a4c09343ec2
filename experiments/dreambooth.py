"""DreamBooth in the box: a large red ring, which the model has never drawn, taught from five pictures; what is gained and what is lost.

    python experiments/dreambooth.py --out out/dreambooth

Four ways from the same pictures: all weights with prior preservation, without it, a LoRA with it, and textual inversion. The critic counts
rings in 100 new contexts, and judges captions that have nothing to do with them. Writes subject/, an OUT for each way, dreambooth.png and
results.json. The numbers of the recipe stand in minidiff/dreambooth.py.

[1] Ruiz et al. DreamBooth: Fine Tuning Text-to-Image Diffusion Models for Subject-Driven Generation. 2022. arXiv:2208.12242
[2] Gal et al. An Image is Worth One Word: Personalizing Text-to-Image Generation using Textual Inversion. 2022. arXiv:2208.01618
"""
import json
import random
import re
import time
from dataclasses import replace
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from minidiff import dreambooth as booth
from minidiff import evaluate, inversion, load, plots
from minidiff.data import critic
from minidiff.data.world import BACKGROUNDS, RELATIONS, SIZES, Scene, Thing, World
from minidiff.finetune import encoded, finetune
from minidiff.groups import Group
from minidiff.latent_diffusion import LatentDiffusion
from minidiff.quickstart import COLOURS, SHAPES, SIZE
from minidiff.script import run, write_results

WORD = "panna"  # what the ring is called: a rare token (docs/dreambooth.md says why not "sks")
RING = Thing("ring", "red", "large")
FIVE = [
    Scene((RING,), "black"),
    Scene((RING, Thing("square", "blue", "small")), "gray", "above"),
    Scene((RING, Thing("triangle", "green", "large")), "black", "below"),
    Scene((RING, Thing("triangle", "yellow", "large")), "white", "left of"),
    Scene((RING, Thing("square", "green", "small")), "gray", "right of"),
]
ONE = "a {small|large} {red|yellow|green|blue} {circle|square|triangle}"
GROUND = " on a {white|gray|black|pink} background"
CLASS = [ONE + GROUND] + [f"{ONE} {{above|below|to the left of|to the right of}} {ONE}{GROUND}"] * 3
WAYS = ("full", "without prior", "LoRA", "inversion")


def named(scene: Scene, word: str = WORD) -> Scene:
    """The scene as captions have it, in which rings are called by the word."""
    return replace(scene, things=tuple(replace(thing, shape=word) if thing.shape == RING.shape else thing for thing in scene.things))


def said(scene: Scene, word: str = WORD) -> str:
    """A scene's caption, everything stated."""
    things = [f"a {thing.size} {thing.colour} {thing.shape}" for thing in named(scene, word).things]
    beside = {"left of": " to the left of ", "right of": " to the right of "}.get(scene.relation, f" {scene.relation} ")
    return beside.join(things) + f" on a {scene.background} background"


def new_contexts(n: int, seed: int) -> list[Scene]:
    """The ring alone and beside another thing in turn, in scenes that are none of the five."""
    rng, scenes = random.Random(f"new {seed}"), []
    while len(scenes) < n:
        other = Thing(rng.choice(SHAPES), rng.choice(COLOURS), rng.choice(SIZES))
        background, relation, alone = rng.choice(list(BACKGROUNDS)), rng.choice(RELATIONS), len(scenes) % 2 == 0
        scene = Scene((RING,), background) if alone else Scene((RING, other), background, relation)
        scenes += [scene] if scene not in FIVE else []
    return scenes


def subject_folder(folder: Path, seed: int) -> Path:
    """The five pictures, each with several captions: what it shows in the world's many ways of saying so."""
    world, rng = World(SIZE), random.Random(f"five {seed}")
    for k, picture in enumerate(world.draw(FIVE, rng)):
        plots.save_png(picture, folder / f"{k}.png")
    texts = [(k, text) for k, scene in enumerate(FIVE) for text in [said(scene)] + [world.caption(named(scene), rng) for _ in range(7)]]
    lines = [json.dumps({"file_name": f"{k}.png", "text": text}) for k, text in texts]
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def taught(
    way: str, subject: Path, classes: Path, out: Path, steps: int | None, class_pictures: int | None, seed: int
) -> tuple[LatentDiffusion, float]:
    """The box after this way of teaching it, and the minutes that took, class pictures included."""
    start, model = time.perf_counter(), load()
    method = {"LoRA": "lora", "inversion": "inversion"}.get(way, "full")
    recipe = booth.recipe(model, method)
    steps = steps or recipe.steps
    examples = booth.subject_examples(model, booth.subject_pictures(subject, ""), recipe.shift, out / "cache", seed)
    groups = [Group("subject", examples)]
    if way == "inversion":
        inversion.invert(model, WORD, groups, out, steps=steps, lr=recipe.lr, batch=recipe.batch, seed=seed)
        return model, (time.perf_counter() - start) / 60
    if way != "without prior":
        drawn = booth.class_pictures(model, booth.expand(CLASS, class_pictures or recipe.class_pictures, seed), classes, seed=seed)
        groups.append(Group("class", encoded(model, drawn, model.size, out / "cache" / "class"), recipe.prior))
    how = dict(method=method, lr=recipe.lr, batch=recipe.batch, rank=recipe.rank, layers=recipe.layers, text=recipe.text, ema=recipe.ema)
    finetune(model, groups, out, steps=steps, every=steps, seed=seed, **how)
    return model, (time.perf_counter() - start) / 60


def judged(model: LatentDiffusion, scenes: list[Scene], captions: list[str], seed: int) -> tuple[dict[str, float], Float[Tensor, "N 3 H W"]]:
    """How many of the scenes show a red ring, how many show all that was asked for, and how many of the other captions come out right."""
    pictures = model.generate([said(scene) for scene in scenes], generator=torch.Generator().manual_seed(seed), progress=True).cpu()
    seen = [critic.read(picture).things for picture in pictures]
    there = [any((thing.shape, thing.colour) == (RING.shape, RING.colour) for thing in things) for things in seen]
    right = critic.accuracy(pictures, [said(scene, "ring") for scene in scenes])
    other, others, _ = evaluate.caption_accuracy(model, captions, seed=seed)
    return {"subject": sum(there) / len(there), "all right": right, "others": other}, torch.cat([pictures[:6], others[:2], others[-2:]])


def figure(rows: dict[str, Float[Tensor, "10 3 H W"]], results: dict[str, dict[str, float]], labels: list[str], path: Path) -> Path:
    """Pictures of the same prompts and seeds, a row for each way, and bars beside them."""
    from matplotlib.figure import Figure  # the object API: no window, no global state

    sheet = Figure((15, 1.35 * len(rows) + 1.2), layout="constrained")
    left, right = sheet.subfigures(1, 2, width_ratios=(3, 1))
    grid = left.subplots(len(rows), len(labels), squeeze=False)
    for axes, (name, pictures) in zip(grid, rows.items(), strict=True):
        for one, picture in zip(axes, pictures, strict=True):
            one.imshow((picture.permute(1, 2, 0) + 1) / 2)
            one.set(xticks=[], yticks=[])
        axes[0].set_ylabel(name, fontsize=9)
    for one, label in zip(grid[0], labels, strict=True):
        one.set_title(re.sub(" (?=on a|to the|above|below)", "\n", label), fontsize=5)
    bars, names = right.subplots(), list(results)
    for k, key in enumerate(("subject", "others")):
        drawn = bars.barh([i + 0.2 - 0.4 * k for i in range(len(names))], [results[name][key] for name in names], 0.38)
        bars.bar_label(drawn, fmt="%.2f", fontsize=8)
        drawn.set_label(("a red ring, in 100 new contexts", "other captions right")[k])
    bars.set(yticks=range(len(names)), yticklabels=names, xlim=(0, 1.15))
    bars.invert_yaxis()
    right.legend(loc="outside upper center", fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.savefig(path, dpi=110)
    return path


def main(
    out: Path = Path("out/dreambooth"),
    contexts: int = 100,
    others: int = 200,
    steps: int | None = None,
    class_pictures: int | None = None,
    threads: int = 1,
    seed: int = 0,
) -> None:
    """Teach the box a ring in four ways, and measure each.

    Args:
        out: folder for everything written.
        contexts: new contexts in which the ring is asked for.
        others: held-out captions without it, half of them of one thing.
        steps: training steps of each way; left out, the recipe's.
        class_pictures: pictures that the unmodified model draws of what it knows; left out, the recipe's.
        threads: cores to compute on.
        seed: everything random follows from it.
    """
    torch.set_num_threads(threads)
    world, subject = World(SIZE, SHAPES, COLOURS), subject_folder(out / "subject", seed)
    captions = [caption for objects in (1, 2) for caption in evaluate.held_out(world, others // 2, objects, seed)]
    scenes = new_contexts(contexts, seed)
    found, rows = {}, {}
    for way in ("before", *WAYS):
        made = (load(), 0.0) if way == "before" else taught(way, subject, out / "class", out / way.replace(" ", "-"), steps, class_pictures, seed)
        figures, rows[way] = judged(made[0], scenes, captions, seed)
        found[way] = figures | {"minutes": round(made[1], 2)}
        print(way, ", ".join(f"{name} {value:.3f}" for name, value in found[way].items()))
    labels = [said(scene) for scene in scenes[:6]] + captions[:2] + captions[-2:]
    print(figure(rows, found, labels, out / "dreambooth.png"))
    print(write_results(out, contexts=contexts, others=len(captions), class_pictures=class_pictures, seed=seed, threads=threads, ways=found))


if __name__ == "__main__":
    run(main)
