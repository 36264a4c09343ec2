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

The papers are named in distill_students.py.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from distill_figure import Images, plot
from distill_students import Round, train_guided, train_lora, train_student
from distill_walks import STEPS, TEACHER_WALK, all_walks

import minidiff
from minidiff import pipeline
from minidiff.checkpoints import lora as lora_files
from minidiff.cli.script import run
from minidiff.data import critic
from minidiff.data.world import World
from minidiff.evaluation import bench as evaluate
from minidiff.figures import plots
from minidiff.latent_diffusion import LatentDiffusion
from minidiff.options.sampling import SampleConfig
from minidiff.recipes.quickstart import COLOURS, SHAPES
from minidiff.train import TrainConfig
from minidiff.training import atomic
from minidiff.training.progress import last_loss, write_results
from minidiff.training.resume import read_log

# How the teacher is used, its best way first.
TEACHER = tuple(SampleConfig(steps, 2.0, "ddpm") for steps in (25, 8, 4, 2))
STUDENT = tuple(SampleConfig(steps, 1.0, "lcm") for steps in (4, 2, 1))
# How the guided student is used, on the grid "shifted".
GUIDELESS = tuple(SampleConfig(steps, 1.0, "dpmpp_2m_sde") for steps in (8, 6, 4))
# Beside results.json.
OUTPUTS = ("distill.png", "loss.png", "lora_loss.png", "lcm_lora.safetensors", "student", "guided")


@dataclass(frozen=True)
class Result:
    """A model, sampled in one way: accuracies, and a few images."""

    model: str
    config: SampleConfig  # its steps, guidance and sampler
    one_object: float
    two_objects: float
    images: Images  # the first three of one object, and of two

    @property
    def mean(self) -> float:
        return (self.one_object + self.two_objects) / 2

    def row(self) -> dict[str, Any]:
        """Of the table in results.json."""
        guidance, steps = self.config.guidance, self.config.steps
        return {
            "model": self.model,
            "sampler": self.config.sampler,
            "steps": steps,
            "guidance": guidance,
            "evaluations": steps * (1 if guidance == 1 else 2),
            "one_object": self.one_object,
            "two_objects": self.two_objects,
            "mean": self.mean,
        }


def save(
    student: LatentDiffusion, guided: LatentDiffusion, adapted: LatentDiffusion, out: Path
) -> tuple[Path, Path, Path]:
    """Both students in half precision, and the LoRA."""
    lora_file = out / "lcm_lora.safetensors"
    student_folder = copy.deepcopy(student).half().save(out / "student")
    guided_folder = copy.deepcopy(guided).half().save(out / "guided")
    with atomic.write(lora_file, atomic.unsigned) as new:  # there may be one of an interrupted run
        lora_files.save(adapted, new)
    return student_folder, guided_folder, lora_file


def judge(
    teacher: LatentDiffusion,
    model: str,
    paths: tuple[Path, Path, Path],
    captions: dict[int, list[str]],
    seed: int,
) -> tuple[list[Result], float]:
    """Act five: the teacher, and what is written, read back. model: the teacher's name. captions:
    by number of objects. Returns also how much the LoRA changes the U-Net's output."""
    student_folder, guided_folder, lora_file = paths
    student, guided, adapted = map(minidiff.load, (student_folder, guided_folder, model))
    moved = lora_files.load(adapted, lora_file).moved
    results = [
        *measured(teacher, "teacher", TEACHER, captions, seed),
        *measured(student, "student", STUDENT, captions, seed),
        *measured(guided, "guided student", GUIDELESS, captions, seed),
        *measured(adapted, "LCM-LoRA", STUDENT, captions, seed),
        # what the sampler alone makes of it
        *measured(teacher, "teacher", STUDENT, captions, seed),
    ]
    return results, moved


def measured(
    model: LatentDiffusion,
    name: str,
    configs: tuple[SampleConfig, ...],
    captions: dict[int, list[str]],
    seed: int,
) -> Iterator[Result]:
    """A result for each way to sample. captions: by number of objects."""
    for config in configs:
        accuracies, images = [], []
        for objects in (1, 2):
            drawn = pipeline.generate(model, captions[objects], replace(config, seed=seed))
            accuracies.append(critic.accuracy(drawn, captions[objects]))
            images.append(drawn[:3])
        result = Result(name, config, *accuracies, torch.cat(images))
        print(", ".join(f"{key} {value}" for key, value in result.row().items()), flush=True)
        yield result


def columns(results: list[Result]) -> dict[str, Images]:
    """The images of the figure: the teacher's at its best, and the student's."""
    images = {f"teacher, {results[0].config.steps} steps": results[0].images}
    of_student = (result for result in results if result.model == "student")
    return images | {f"student, {result.config.steps}": result.images for result in of_student}


def shares_of_best(results: list[Result]) -> dict[str, float | None]:
    """Of the teacher's best accuracy, by student and steps."""
    best, shares = results[0].mean, {}
    for result in results:
        if "student" in result.model:
            name = f"{result.model}_{result.config.steps}_of_teacher".replace(" ", "_")
            shares[name] = round(result.mean / best, 4) if best else None
    return shares


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
    torch.set_num_threads(1)  # on networks this small a second thread would mostly wait
    teacher = minidiff.load(model).to(memory_format=torch.channels_last).requires_grad_(False)
    world, training = World(teacher.size, SHAPES, COLOURS), out / "training"
    configs = {
        "walked": TrainConfig(steps, lr, seed=seed),
        "sharpened": TrainConfig(sharp_steps, sharp_lr, seed=seed + 1),
        "settled": TrainConfig(last_steps, last_lr, seed=seed + 3),
        "lora": TrainConfig(lora_steps, lora_lr, seed=seed + 2),
        "guided": TrainConfig(guided_steps, guided_lr, seed=seed + 4),
        "guided_own": TrainConfig(own_steps, own_lr, seed=seed + 5),
    }
    rounds = {
        name: Round(training / name, config, batch, resume) for name, config in configs.items()
    }

    walk, folder = replace(TEACHER_WALK, seed=seed), training / "walks"
    teacher_walks = all_walks(teacher, world, walk, walks, folder, resume, "1/5 walks")
    student = train_student(teacher, teacher_walks, rounds["walked"], far=2 / 3, sharpen=False)
    student = train_student(student, teacher_walks, rounds["sharpened"], far=1 / 3, sharpen=True)
    student = train_student(student, teacher_walks, rounds["settled"], far=0.0, sharpen=True)
    adapted = train_lora(teacher, teacher_walks, rounds["lora"], rank)

    sampler = GUIDELESS[0].sampler
    guided = train_guided(
        teacher, teacher, teacher_walks, rounds["guided"], own=False, sampler=sampler
    )
    walk, folder = SampleConfig(STEPS, sampler=sampler, seed=seed + 5), training / "own_walks"
    own_walks = all_walks(guided, world, walk, walks, folder, resume, "4/5 its walks")
    guided = train_guided(
        guided, teacher, own_walks, rounds["guided_own"], own=True, sampler=sampler
    )

    paths = save(student, guided, adapted, out)
    held_out = {n: evaluate.held_out(world, captions, n, seed) for n in (1, 2)}
    results, moved = judge(teacher, model, paths, held_out, seed)
    rows = [result.row() for result in results]
    print(plot(rows, columns(results), out / "distill.png"))
    print(plots.loss(read_log(training / "sharpened"), out / "loss.png"))
    print(plots.loss(read_log(training / "lora"), out / "lora_loss.png"))
    print(*paths, sep="\n")

    settings = dict(walks=walks, steps=steps, lr=lr, sharp_steps=sharp_steps, sharp_lr=sharp_lr)
    settings |= dict(last_steps=last_steps, last_lr=last_lr, batch=batch, lora_steps=lora_steps)
    settings |= dict(lora_lr=lora_lr, rank=rank, guided_steps=guided_steps, guided_lr=guided_lr)
    settings |= dict(own_steps=own_steps, own_lr=own_lr, seed=seed)
    losses = {f"{name}_loss": last_loss(read_log(training / name)) for name in rounds}
    shares = shares_of_best(results)
    counts = dict(captions_each=captions, lora_moved=moved)
    print(write_results(out, **settings, **losses, **shares, **counts, rows=rows))
    print(", ".join(f"{name} {share}" for name, share in shares.items()))


if __name__ == "__main__":
    run(main, OUTPUTS)
