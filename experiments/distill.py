"""Few steps: what the model in the box draws in 50 evaluations of its U-Net, a student of it draws
in one, two or four.

    python experiments/distill.py

One CPU core. Act one: the teacher walks, guided and deterministic, from noise to latents, and the
walks are kept. Act two: the student learns to guess, from any point of a walk, where it ends; then,
besides, that its guess from pure noise be what its guess from half the way would be. Act three:
LCM-LoRA, consistency distillation in which only low-rank weights are trained. Act four: another
student learns what the guided teacher says, in one evaluation a step in place of two: first
anywhere, then where its own walks lead. Act five: the critic counts. Writes student/ and guided/
(for `minidiff generate --model`), lcm_lora.safetensors (for `--lora`), distill.png, loss.png,
lora_loss.png and results.json. Ctrl-C saves; --resume goes on.

[1] Luhman, Luhman. Knowledge Distillation in Iterative Generative Models for Improved Sampling
    Speed. 2021. arXiv:2101.02388
[2] Luo et al. LCM-LoRA: A Universal Stable-Diffusion Acceleration Module. 2023. arXiv:2311.05556
[3] Sauer, Lorenz, Blattmann, Rombach. Adversarial Diffusion Distillation. 2023. arXiv:2311.17042
[4] Meng et al. On Distillation of Guided Diffusion Models. 2022. arXiv:2210.03142
[5] Ross, Gordon, Bagnell. A Reduction of Imitation Learning and Structured Prediction to No-Regret
    Online Learning. 2011. arXiv:1011.0686
"""

import copy
import random
from collections.abc import Iterator
from functools import partial
from itertools import count
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor
from tqdm import tqdm

import minidiff
from minidiff import pipeline
from minidiff.checkpoints import lora as lora_files
from minidiff.cli.script import run
from minidiff.data import critic
from minidiff.data.world import World
from minidiff.denoiser import Denoiser
from minidiff.evaluation import bench as evaluate
from minidiff.figures import curves, plots
from minidiff.guidance import guide
from minidiff.latent_diffusion import LatentDiffusion
from minidiff.methods import lora
from minidiff.methods.distill import (
    consistency_loss,
    endpoint_loss,
    guided_loss,
    matching_loss,
    pseudo_huber,
    renoised_loss,
)
from minidiff.options.sampling import Interval, SampleConfig
from minidiff.recipes.quickstart import COLOURS, SHAPES
from minidiff.train import EMA, Loss, TrainConfig, train
from minidiff.training import atomic
from minidiff.training.progress import follow, last_loss, write_results
from minidiff.training.resume import read_log
from minidiff.training.seeds import generator_of

TWO_OBJECTS = 0.8  # the share of pictures that show two
WALK = 8  # steps of dpmpp_2m
GUIDED = {
    "scale": 3.0,
    "interval": Interval(0.7, 1.0),
}  # whose colour is whose is decided above t = 840 (docs/box.md): guide there, and hard
CHUNK = 250  # walks in a file
RENOISED = (
    400,
    751,
)  # from where to where a guess is noised: what is where shows through, which shape it is does not
LAYERS = (
    *lora.ATTENTION,
    "pool",
    "conv1",
    "conv2",
)  # this U-Net hears words by "pool" more than by attention (docs/lora.md)
BEST = ("ddpm", 25, 2.0)  # how the teacher is used
TEACHER = (BEST, ("ddpm", 8, 2.0), ("ddpm", 4, 2.0), ("ddpm", 2, 2.0))
TAKEN_IN = {
    "scale": 2.0,
    "interval": Interval(0.6, 1.0),
}  # the guidance of the guided student; below t = 600 it decides nothing (docs/distillation.md)
GUIDELESS = tuple(
    ("dpmpp_2m_sde", steps, 1.0) for steps in (8, 6, 4)
)  # how it is used, on the grid "shifted"
FLOOR, MIDDLE, CEILING = (
    250,
    600,
    1001,
)  # its t: three in four from 600 up, where there is guidance to take in; the others from 250 up
STUDENT = tuple(("lcm", steps, 1.0) for steps in (4, 2, 1))  # steps, and evaluations


class Walks(NamedTuple):
    """Where a model went from pure noise, and what it was told."""

    x: Float[Tensor, "N steps1 Z h w"]  # float16
    context: Float[Tensor, "N L D"]


@torch.no_grad()
def walked(
    model: LatentDiffusion, world: World, k: int, size: int, seed: int, sampler: str, how: dict
) -> dict:
    """Chunk k of a model's walks: captions of training scenes, half of them in full, and the points
    on the way."""
    rng, generator = (
        random.Random(f"walks {seed} {k}"),
        generator_of(seed, -1 - k),
    )
    scenes = [world.scene(rng, two_objects=TWO_OBJECTS) for _ in range(size)]
    captions = [world.caption(scene, rng, full=rng.random() < 0.5) for scene in scenes]
    side = model.size // model.vae.factor
    noise, x = torch.randn(size, model.vae.latent_channels, side, side, generator=generator), []
    config = SampleConfig(sampler=sampler, **how)
    for i in range(0, size, 50):
        frames = model.sample(
            captions[i : i + 50],
            WALK,
            generator=generator,
            x_T=noise[i : i + 50],
            config=config,
        )
        x.append(torch.stack([frame.x for frame in frames], dim=1))
    return {"captions": captions, "x": torch.cat(x).half()}


@torch.no_grad()
def all_walks(
    model: LatentDiffusion,
    world: World,
    n: int,
    folder: Path,
    seed: int,
    resume: bool,
    title: str,
    sampler: str,
    **how,
) -> Walks:
    """Act one, [1], and again in act four; how: more of `sample`'s arguments. To resume, files that
    are there are not made again."""
    folder.mkdir(parents=True, exist_ok=True)
    x, contexts = [], []
    for k in tqdm(range(-(-n // CHUNK)), desc=title, unit=f" x {CHUNK}"):
        file = folder / f"{k:03d}.pt"
        atomic.check(file, atomic.unsigned)
        if not (resume and file.exists()):
            walk = walked(model, world, k, min(CHUNK, n - k * CHUNK), seed, sampler, how)
            with atomic.write(file, atomic.unsigned) as new:
                torch.save(walk | {"about": atomic.SIGNATURE}, new)
        kept = torch.load(file, weights_only=True)
        contexts.append(model.text.encode(kept["captions"]))
        x.append(kept["x"])
    return Walks(torch.cat(x), torch.cat(contexts))


class Points(NamedTuple):
    """A batch of points on walks, when they were passed, and where the walks ended."""

    x: Float[Tensor, "B Z h w"]
    t: Shaped[Tensor, "B"]
    end: Float[Tensor, "B Z h w"]
    context: Float[Tensor, "B L D"]


def points(
    walks: Walks, times: Shaped[Tensor, "steps1"], batch: int, far: float, seed: int, start: int
) -> Iterator[Points]:
    """Batches start, start + 1, ...; a share `far` of the points, and some more by chance, is pure
    noise, from which the way is longest."""
    for k in count(start):
        generator = generator_of(seed, k)
        i = torch.randint(0, len(walks.x), (batch,), generator=generator)
        n = torch.randint(0, len(times) - 1, (batch,), generator=generator) * (
            torch.rand(batch, generator=generator) < 1 - far
        )
        x, end = (
            walks.x[i, m].float().contiguous(memory_format=torch.channels_last)
            for m in (n, torch.full_like(n, -1))
        )
        yield Points(x, times[n], end, walks.context[i])


def train_student(
    start: LatentDiffusion,
    far: float,
    sharpen: bool,
    walks: Walks,
    folder: Path,
    steps: int,
    batch: int,
    lr: float,
    seed: int,
    resume: bool,
) -> LatentDiffusion:
    """A round of act two: all weights learn where walks end, [1]; and to sharpen, what `start`
    makes of their guess given new noise, [3]. far: the share of walks' points that are pure noise.
    Returns the average of the weights, as a model that needs no guidance."""
    torch.manual_seed(seed)
    student, schedule = copy.deepcopy(start.denoiser).requires_grad_(True), start.schedule
    ema, times = EMA(student.network, decay=0.998), schedule.timesteps(WALK)

    def loss(points: Points) -> Loss:
        ours, theirs = (
            guide(denoiser, points.context, None, 1) for denoiser in (student, start.denoiser)
        )
        each, place = (
            endpoint_loss(ours, schedule, points.x, points.t, points.end, pseudo_huber),
            schedule.progress(points.t),
        )
        if not sharpen:
            return {"loss": each, "progress": place}
        noise, s = torch.randn_like(points.x), torch.randint(*RENOISED, points.t.shape)
        more = renoised_loss(
            ours, theirs, schedule, noise, times[:1].expand(len(noise)), s, pseudo_huber
        )
        return {
            "loss": torch.cat([each, more]),
            "progress": torch.cat([place, torch.ones_like(place)]),
        }

    data = partial(points, walks, times, batch, far, seed)
    training = train(
        loss, student.network, data, TrainConfig(steps, lr, seed=seed), ema, folder, resume
    )
    follow(training, f"2/5 student, {folder.name}", steps, batch)
    denoiser = Denoiser(ema.average, schedule, start.denoiser.target)
    return LatentDiffusion(
        start.vae, start.text, denoiser, start.size, start.dropout, guidance=1.0, sampler="lcm"
    )


def train_lora(
    teacher: LatentDiffusion,
    walks: Walks,
    folder: Path,
    steps: int,
    batch: int,
    lr: float,
    rank: int,
    seed: int,
    resume: bool,
) -> LatentDiffusion:
    """Act three, [2]: neighbouring times are to agree, the data being what the teacher drew.
    Returns the teacher with its LoRA beside it."""
    torch.manual_seed(seed)
    student, schedule = copy.deepcopy(teacher), teacher.schedule
    lora.add(student.unet, rank, targets=LAYERS)
    times = schedule.timesteps(WALK)

    def loss(points: Points) -> Loss:
        ours = guide(student.denoiser, points.context, None, 1)
        taught = guide(
            teacher.denoiser, points.context, teacher.text.null(len(points.end)), **GUIDED
        )
        return {
            "loss": consistency_loss(ours, ours, schedule, points.end, times, taught, pseudo_huber)
        }

    data = partial(points, walks, times, batch, 0.0, seed)
    follow(
        train(
            loss,
            student.unet,
            data,
            TrainConfig(steps, lr, seed=seed),
            folder=folder,
            resume=resume,
        ),
        "3/5 LCM-LoRA",
        steps,
        batch,
    )
    return student.eval()


def train_guided(
    start: LatentDiffusion,
    teacher: LatentDiffusion,
    own: bool,
    walks: Walks,
    folder: Path,
    steps: int,
    batch: int,
    lr: float,
    seed: int,
    resume: bool,
) -> LatentDiffusion:
    """A round of act four, the first stage of [4] at one scale: what the teacher says with
    guidance, said in one evaluation. The data are where the teacher's walks ended, noised; or own
    walks of the student as they stand: where it goes wrong, it hears what would have been right
    [5]."""
    torch.manual_seed(seed)
    student, schedule, null = (
        copy.deepcopy(start.denoiser).requires_grad_(True),
        teacher.schedule,
        teacher.text.null(batch),
    )
    ema = EMA(student.network, decay=0.998)

    def loss(points: Points) -> Loss:
        ours, theirs = (
            guide(student, points.context, None, 1),
            guide(teacher.denoiser, points.context, null, **TAKEN_IN),
        )
        if own:
            return {
                "loss": matching_loss(ours, theirs, schedule, points.x, points.t),
                "progress": schedule.progress(points.t),
            }
        high = torch.rand(points.t.shape) < 0.75
        t = torch.where(
            high,
            torch.randint(MIDDLE, CEILING, points.t.shape),
            torch.randint(FLOOR, CEILING, points.t.shape),
        )
        return {
            "loss": guided_loss(ours, theirs, schedule, points.end, t),
            "progress": schedule.progress(t),
        }

    data = partial(
        points, walks, schedule.timesteps(WALK, "shifted" if own else "trailing"), batch, 0.0, seed
    )
    training = train(
        loss, student.network, data, TrainConfig(steps, lr, seed=seed), ema, folder, resume
    )
    follow(training, f"4/5 student, {folder.name}", steps, batch)
    denoiser = Denoiser(ema.average, schedule, teacher.denoiser.target)
    how = dict(guidance=1.0, sampler=GUIDELESS[0][0], spacing="shifted")
    return LatentDiffusion(
        teacher.vae, teacher.text, denoiser, teacher.size, teacher.dropout, **how
    )


def measured(
    model: LatentDiffusion, name: str, ways: tuple, captions: dict[int, list[str]], seed: int
) -> Iterator[tuple[dict, Tensor]]:
    """One line of the table for each way to sample, and its first three pictures of each kind."""
    for sampler, steps, guidance in ways:
        row = {
            "model": name,
            "sampler": sampler,
            "steps": steps,
            "guidance": guidance,
            "evaluations": steps * (1 if guidance == 1 else 2),
        }
        shown = []
        for objects, kind in ((1, "one_object"), (2, "two_objects")):
            config = SampleConfig(steps, guidance, sampler, seed=seed)
            pictures = pipeline.generate(model, captions[objects], config)
            row[kind] = critic.accuracy(pictures, captions[objects])
            shown.append(pictures[:3])
        row["mean"] = (row["one_object"] + row["two_objects"]) / 2
        print(", ".join(f"{key} {value}" for key, value in row.items()), flush=True)
        yield row, torch.cat(shown)


def plot(rows: list[dict], shown: dict[str, Float[Tensor, "B 3 H W"]], path: Path) -> Path:
    """Left, accuracy against evaluations, a line for each model and sampler; right, the same
    captions and noise in many and few steps."""
    import matplotlib.figure

    with curves.style():
        sheet = matplotlib.figure.Figure((8.0, 3.6), layout="constrained")
        axis, *strips = sheet.subplot_mosaic(
            [["plot", str(k)] for k in range(len(shown))], width_ratios=(1, 1)
        ).values()
        lines = dict.fromkeys((row["model"], row["sampler"]) for row in rows)
        for line, colour, mark in zip(lines, curves.COLOURS, "osD^v", strict=False):
            some = sorted(
                (row["evaluations"], row["mean"])
                for row in rows
                if (row["model"], row["sampler"]) == line
            )
            axis.plot(
                *zip(*some, strict=True),
                f"{mark}-",
                color=colour,
                markersize=4,
                label=", ".join(line),
            )
        best = rows[0]["mean"]
        for share, line in ((0.95, "--"), (0.90, ":")):
            label = f"{share:.0%} of the teacher's best"
            axis.axhline(share * best, color="black", linestyle=line, linewidth=1, label=label)
        ticks = sorted({row["evaluations"] for row in rows})
        axis.set(
            xscale="log",
            xlabel="evaluations of the U-Net for a picture",
            ylabel="captions drawn right",
            ylim=(-0.03, 1.03),
        )
        axis.set_xticks(ticks, [str(tick) for tick in ticks])
        axis.minorticks_off()
        sheet.legend(loc="outside lower left", ncols=3)  # below: it covers no line
        for strip, (name, pictures) in zip(strips, shown.items(), strict=True):
            parted = F.pad((pictures + 1) / 2, (1, 1), value=1.0)
            strip.imshow(parted.permute(2, 0, 3, 1).flatten(1, 2).numpy(), interpolation="nearest")
            strip.spines[:].set_visible(False)
            strip.set_ylabel(name, rotation=0, ha="right", va="center")
            strip.set(xticks=[], yticks=[])
        return curves.save(sheet, path)


# beside results.json
OUTPUTS = ("distill.png", "loss.png", "lora_loss.png", "lcm_lora.safetensors", "student", "guided")


def main(
    model: str = "box",
    out: Path = Path("out/distill"),
    walks: int = 4000,
    steps: int = 3200,
    lr: float = 1e-3,
    sharp_steps: int = 1200,
    sharp_lr: float = 5e-4,
    last_steps: int = 600,
    last_lr: float = 5e-4,
    batch: int = 16,
    lora_steps: int = 150,
    lora_lr: float = 1e-3,
    rank: int = 16,
    guided_steps: int = 6000,
    guided_lr: float = 5e-4,
    own_steps: int = 3000,
    own_lr: float = 3e-4,
    captions: int = 250,
    seed: int = 0,
    resume: bool = False,
) -> None:
    """Distill the model in the box to a few steps on one CPU core, and let the critic judge teacher
    and students.

    Args:
        model: the teacher: box, or a model folder of the quickstart's world.
        out: folder for everything written.
        walks: of the teacher, made once.
        steps: training steps of the student on them.
        lr: its peak learning rate.
        sharp_steps: training steps in which its guesses are sharpened too.
        sharp_lr: the peak learning rate of these.
        last_steps: the same, with few walks from pure noise, which are known by heart by then.
        last_lr: the peak learning rate of these.
        batch: points in a step, of the students and the LoRA.
        lora_steps: training steps of the LoRA.
        lora_lr: its peak learning rate.
        rank: of the LoRA.
        guided_steps: training steps of the student that takes guidance in.
        guided_lr: its peak learning rate.
        own_steps: training steps of it on walks of its own, as many as the teacher's.
        own_lr: the peak learning rate of these.
        captions: held-out captions of one thing, and as many of two, behind each accuracy.
        seed: everything random follows from it.
        resume: go on where an interrupted run stopped.
    """
    torch.set_num_threads(
        1
    )  # the recipe is one core's: on networks this small a second thread would mostly wait
    teacher = minidiff.load(model).to(memory_format=torch.channels_last).requires_grad_(False)
    world, training = World(teacher.size, SHAPES, COLOURS), out / "training"
    guidance = {"guidance": GUIDED["scale"], "interval": GUIDED["interval"]}
    kept = all_walks(
        teacher, world, walks, training / "walks", seed, resume, "1/5 walks", "dpmpp_2m", **guidance
    )
    student = train_student(
        teacher, 2 / 3, False, kept, training / "walked", steps, batch, lr, seed, resume
    )
    student = train_student(
        student,
        1 / 3,
        True,
        kept,
        training / "sharpened",
        sharp_steps,
        batch,
        sharp_lr,
        seed + 1,
        resume,
    )
    student = train_student(
        student, 0.0, True, kept, training / "settled", last_steps, batch, last_lr, seed + 3, resume
    )
    adapted = train_lora(
        teacher, kept, training / "lora", lora_steps, batch, lora_lr, rank, seed + 2, resume
    )
    guided = train_guided(
        teacher,
        teacher,
        False,
        kept,
        training / "guided",
        guided_steps,
        batch,
        guided_lr,
        seed + 4,
        resume,
    )
    own = all_walks(
        guided,
        world,
        walks,
        training / "own_walks",
        seed + 5,
        resume,
        "4/5 its walks",
        guided.sampler,
    )
    guided = train_guided(
        guided,
        teacher,
        True,
        own,
        training / "guided_own",
        own_steps,
        batch,
        own_lr,
        seed + 5,
        resume,
    )

    # What is judged is what is written: half precision, read back.
    folder, other = (
        copy.deepcopy(student).half().save(out / "student"),
        copy.deepcopy(guided).half().save(out / "guided"),
    )
    file = out / "lcm_lora.safetensors"
    with atomic.write(file, atomic.unsigned) as new:  # there may be one of an interrupted run
        lora_files.save(adapted, new)
    quick, low = minidiff.load(folder), minidiff.load(model)
    loaded = lora_files.load(low, file)
    told = {objects: evaluate.held_out(world, captions, objects, seed) for objects in (1, 2)}
    found = [
        *measured(teacher, "teacher", TEACHER, told, seed),
        *measured(quick, "student", STUDENT, told, seed),
        *measured(minidiff.load(other), "guided student", GUIDELESS, told, seed),
        *measured(low, "LCM-LoRA", STUDENT, told, seed),
        *measured(teacher, "teacher", STUDENT, told, seed),  # what the sampler alone makes of it
    ]
    rows = [row for row, _ in found]
    names = {
        ("teacher", *BEST): "teacher, 25 steps",
        **{("student", *way): f"student, {way[1]}" for way in STUDENT},
    }
    keys = [(row["model"], row["sampler"], row["steps"], row["guidance"]) for row in rows]
    shown = {
        names[key]: pictures for key, (_, pictures) in zip(keys, found, strict=True) if key in names
    }
    print(plot(rows, shown, out / "distill.png"))
    print(plots.loss(read_log(training / "sharpened"), out / "loss.png"))
    print(plots.loss(read_log(training / "lora"), out / "lora_loss.png"))

    best = rows[0]["mean"]
    students = [row for row in rows if "student" in row["model"]]
    shares = {
        f"{row['model']}_{row['steps']}_of_teacher".replace(" ", "_"): round(row["mean"] / best, 4)
        if best
        else None
        for row in students
    }
    made = dict(
        walks=walks,
        steps=steps,
        lr=lr,
        sharp_steps=sharp_steps,
        sharp_lr=sharp_lr,
        last_steps=last_steps,
        last_lr=last_lr,
        batch=batch,
    )
    made |= dict(
        lora_steps=lora_steps,
        lora_lr=lora_lr,
        rank=rank,
        guided_steps=guided_steps,
        guided_lr=guided_lr,
    )
    made |= dict(own_steps=own_steps, own_lr=own_lr, seed=seed)
    losses = {
        f"{name}_loss": last_loss(read_log(training / name))
        for name in ("walked", "sharpened", "settled", "lora", "guided", "guided_own")
    }
    print(folder, other, file, sep="\n")
    print(
        write_results(
            out,
            **made,
            **losses,
            **shares,
            captions_each=captions,
            lora_moved=loaded.moved,
            rows=rows,
        )
    )
    print(", ".join(f"{name} {share}" for name, share in shares.items()))


if __name__ == "__main__":
    run(main, OUTPUTS)
