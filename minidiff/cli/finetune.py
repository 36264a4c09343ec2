"""The verb that fine-tunes a model on a captioned folder."""

import contextlib
import shlex
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import tyro

from minidiff.cli import options
from minidiff.cli.flags import Flat, in_flags
from minidiff.cli.options import EXAMPLE, MODEL, Device
from minidiff.errors import UserError
from minidiff.options.finetuning import DataConfig, FineTuneConfig, RecorderConfig, TuningConfig
from minidiff.options.sampling import check_size


@options.alone
def finetune(
    images: Flat[DataConfig],
    config: tyro.conf.UseAppendAction[Flat[FineTuneConfig]],
    model: Path = MODEL,
    unrelated: str = EXAMPLE,
    recorder: bool = True,
    resume: bool = False,
    device: Device = "auto",
    out: Path = Path("out/finetune"),
) -> None:
    """Train a model further, on your captioned images: all its weights, or a LoRA beside them.

    Example: minidiff finetune --data coco100 --method lora --steps 800 --out out/coco

    Args:
        images: what to learn from.
        config: how to learn.
        model: box (the small model that ships with minidiff), our folder, a diffusers folder, a
            .safetensors or .ckpt file of Stable Diffusion, or a name on the Hugging Face Hub.
        unrelated: a prompt about something else; the report shows what becomes of it.
        recorder: measure the model every few steps, and write report.html.
        resume: continue an interrupted run where it stopped, bit for bit.
        device: where to compute; auto takes a GPU if there is one.
        out: folder for the result, report.html, and the training's checkpoint and log.
    """
    device = options.pick_device(device)
    from minidiff import load
    from minidiff.data.folder import CaptionedFolder
    from minidiff.finetuning import estimate, fit, loop, run
    from minidiff.finetuning.groups import Group, encoded, split
    from minidiff.finetuning.recorder.budget import Counts, planned
    from minidiff.methods import inversion, lora
    from minidiff.training import distributed, ranks

    # All that can be wrong, before anything slow.
    with distributed.main_first():
        if ranks.is_main():
            run.check_free(out, resume)
    several = images.captions == "random"
    folder = CaptionedFolder(images.data, caption_column=images.caption_column, several=several)
    precision = fit.measured_in(config, device) if config.fit else run.frozen(config, out)
    diffusion = load(model, device, precision)
    side = images.size or diffusion.size
    check_size(side, diffusion.vae.factor * diffusion.unet.multiple)
    chosen, held_out = split(folder.paths, images.validation, config.seed)
    plan = None
    if recorder and ranks.is_main():
        texts = 2 + bool(held_out) + len(config.validation_prompt)
        plan = planned(diffusion, config, Counts(1, texts, len(held_out), len(chosen)), out)
    recording = plan.config if plan else None
    if config.fit:
        if ranks.size() > 1:
            remedy = "choose with one process, and name the options it chose"
            raise UserError(f"`fit` measures one process, and this is one of several; {remedy}.")
        tuned = partial(fit.applied, config)
        case = fit.Case(diffusion, tuned, (side, side), 1, recording, reloads=True)
        config = fitted(case, config, out)
        if run.frozen(config, out) != precision:
            del diffusion, case  # before the other needs their memory
            diffusion = load(model, device, run.frozen(config, out))
    config = loop.completed(config, diffusion)
    if config.method == "lora":
        lora.chosen(diffusion.unet, loop.targets(diffusion.unet, config))
    if config.word:
        inversion.check_rare(config.word)
        print(f'the word whose vector is trained: "{config.word}"')

    # The examples.
    with distributed.main_first():
        examples = encoded(diffusion, folder, side, out / "cache", images.flip, images.buckets)
    copies = 2 if images.flip else 1
    training = [examples[copy * len(folder) + i] for copy in range(copies) for i in chosen]
    print(f"{len(chosen)} pictures to train on, {len(held_out)} held out, {side}x{side} pixels")

    # What it will cost, and what is recorded.
    prompts = {"training caption": training[0].caption}
    prompts |= {"held-out caption": examples[held_out[0]].caption} if held_out else {}
    prompts |= {"unrelated": unrelated} | own_prompts(config)
    settings = estimate.settings(config, diffusion, (side, side), 1, recording)
    more = plan.evaluations if plan else 0
    print(in_flags(estimate.forecast(diffusion, settings, config.steps, more)))
    observer = None
    if plan:
        print(f"{plan}; --no-recorder leaves it out.")
        # the model in the box draws the built-in world, which the critic's network sees best
        network = "critic-attributes" if model == MODEL else plan.config.network
        recording = replace(recording, network=network)
        paths, validation = [folder.paths[i] for i in chosen], [examples[i] for i in held_out]
        observer = recorder_of(diffusion, out, prompts, paths, validation, training, recording)

    # Training, recorded.
    with going_on(diffusion, config.method, model, out):
        loop.finetune(diffusion, [Group("data", training)], out, config, observer, resume)
    if not ranks.is_main():
        return
    report(observer)
    best = observer.best() if observer else None
    print(*commands(diffusion, config.method, model, out, training[0].caption, best), sep="\n")


def fitted(case, config: TuningConfig, out: Path) -> TuningConfig:
    """The config with what was chosen to fit, now or by the run that is resumed; prints it."""
    from minidiff.finetuning import fit

    made = fit.fit(case, config, fit.earlier(out))
    print(in_flags(str(made)))
    return fit.applied(config, made.choice)


def recorder_of(
    diffusion,
    out: Path,
    prompts: dict[str, str],
    paths: list[Path],
    validation: list,
    examples: list,
    config: RecorderConfig,
):
    """The flight recorder of a fine-tune. paths: of the training images."""
    from minidiff.finetuning.recorder.recorder import Recorder, Thumbnails

    images = Thumbnails(list(dict.fromkeys(paths)), diffusion.size)
    return Recorder(diffusion, out, prompts, images, validation, examples, config)


def own_prompts(config: TuningConfig) -> dict[str, str]:
    """The prompts that the report is to show, by their names there."""
    return {f"prompt {k}": text for k, text in enumerate(config.validation_prompt, 1)}


@contextlib.contextmanager
def going_on(diffusion, method: str, model: Path, out: Path) -> Iterator[None]:
    """Where a run cannot be resumed with other settings, say how its result is trained further."""
    from minidiff.finetuning.run import Changed

    try:
        yield
    except Changed as error:
        if not (files := results(out, method)):
            raise
        source, advice = files[0], ""
        if method != "full":
            source, advice = out / "merged", f"{merging(diffusion, method, model, out)}, then "
        command = f"{advice}--model {source} --out {out}-2 (without --resume)"
        raise UserError(f"{error} To train its result further: {command}.") from error


def merging(diffusion, method: str, model: Path, out: Path) -> str:
    """The command that makes one model of a model and a small file beside it."""
    base, _, added = source_of(results(out, method), method, model).partition(" ")
    return f"minidiff convert {base} {out / 'merged'} --to {layout_of(diffusion)} {added}"


def report(observer) -> None:
    if observer is not None:
        print(observer.advice(), observer.report(), sep="\n")


def commands(
    diffusion, method: str, model: Path, out: Path, caption: str, best: int | None
) -> list[str]:
    """The files written, and the commands that use them. best: the recorder's best step."""
    from minidiff.finetuning.run import best_folder

    layout = layout_of(diffusion)
    files = results(out, method)
    source = source_of(files, method, model)
    generate = f"minidiff generate {shlex.quote(caption)} --model"
    lines = [*map(str, files), f"draw with it:      {generate} {source}"]
    if best is not None and best_folder(out, best).exists():
        earlier = source_of(results(best_folder(out, best), method), method, model)
        lines.append(f"as of step {best}: ".ljust(19) + f"{generate} {earlier}")
    if method != "full":
        lines.append(f"one model of both: {merging(diffusion, method, model, out)}")
    elif layout == "diffusers":
        convert = f"{files[0]} {out / 'diffusers'} --to diffusers"
        lines.append(f"for other tools:   minidiff convert {convert}")
    return lines


def layout_of(diffusion) -> str:
    """The layout to convert to: diffusers, unless only minidiff can hold the model, as the box."""
    from minidiff.checkpoints import write

    try:
        write.check(diffusion)
    except UserError:
        return "minidiff"
    return "diffusers"


def results(folder: Path, method: str) -> list[Path]:
    """The result files of a method that are in a folder."""
    from minidiff.finetuning.run import EMBEDDING, LORA, MODEL

    names = {"full": [MODEL], "lora": [LORA, EMBEDDING], "inversion": [EMBEDDING]}[method]
    return [folder / name for name in names if (folder / name).exists()]


def source_of(files: list[Path], method: str, model: Path) -> str:
    """What --model takes for these results, with the options that go with it."""
    if method == "full":
        return str(files[0])
    return f"{model} " + " ".join(f"--{file.stem} {file}" for file in files)
