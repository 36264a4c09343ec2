"""The verb that teaches a model one subject, from a handful of images."""

from functools import partial
from pathlib import Path

import tyro

from minidiff.cli import options
from minidiff.cli.finetune import commands, fitted, going_on, own_prompts, recorder_of, report
from minidiff.cli.flags import Flat
from minidiff.cli.options import EXAMPLE, MODEL, Device
from minidiff.options.finetuning import DreamBoothConfig, SubjectConfig
from minidiff.options.sampling import check_size


@options.alone
def dreambooth(
    images: Flat[SubjectConfig],
    config: tyro.conf.UseAppendAction[Flat[DreamBoothConfig]],
    model: Path = MODEL,
    unrelated: str = EXAMPLE,
    recorder: bool = True,
    resume: bool = False,
    device: Device = "auto",
    out: Path = Path("out/dreambooth"),
) -> None:
    """Teach a model one subject from 3 to 6 images, so that it can be drawn anywhere.

    Example: minidiff dreambooth --subject mydog --prompt "a photo of sks dog" --class-prompt "a
    photo of a dog" --out out/mydog

    Args:
        images: what to learn from.
        config: how to learn.
        model: box (the small model that ships with minidiff), our folder, a diffusers folder, a
            .safetensors or .ckpt file of Stable Diffusion, or a name on the Hugging Face Hub.
        unrelated: a prompt about something else; the report shows what becomes of it.
        recorder: measure the model every few steps, and write report.html.
        resume: continue an interrupted run where it stopped, bit for bit.
        device: where to compute; auto takes a GPU if there is one.
        out: folder for the result, report.html, the class images, and the training's checkpoint
            and log.
    """
    device = options.pick_device(device)
    from minidiff import load
    from minidiff.finetuning import dreambooth as booth
    from minidiff.finetuning import fit, loop, run
    from minidiff.finetuning.groups import Group, encoded
    from minidiff.finetuning.recorder.budget import Counts, planned
    from minidiff.training import distributed, ranks

    # All that can be wrong, before anything slow.
    data = booth.subject_pictures(images.subject, config.prompt, images.caption_column)
    words = booth.check_prompts(data.captions, list(config.class_prompt))
    with distributed.main_first():
        if ranks.is_main():
            run.check_free(out, resume)
    precision = fit.measured_in(config, device) if config.fit else run.frozen(config, out)
    diffusion = load(model, device, precision)
    side = images.size or diffusion.size
    check_size(side, diffusion.vae.factor * diffusion.unet.multiple)
    if config.fit:
        tuned, texts = partial(booth.tuned, diffusion, config, words), 3 + len(own_prompts(config))
        groups = 2 if config.preserves else 1
        counts = Counts(groups, texts, 0, len(data))
        plan = planned(diffusion, tuned(fit.Choice.of(config)), counts, out) if recorder else None
        recording = plan.config if plan else None
        case = fit.Case(diffusion, tuned, (side, side), groups, recording, reloads=True)
        config = fitted(case, config, out)
        if run.frozen(config, out) != precision:
            del diffusion, tuned, case  # before the other needs their memory
            diffusion = load(model, device, run.frozen(config, out))
    recipe = booth.recipe(diffusion, config.method)
    config = booth.completed(config, recipe)
    word = booth.word_to_train(words, config.prompt) if config.text == "word" else None
    tuning = booth.finetune_config(config, recipe, word)

    # The groups.
    with distributed.main_first():
        examples = booth.subject_examples(diffusion, data, config, out / "cache", side, images.flip)
        groups = [Group("subject", examples)]
        if config.preserves:
            drawn = booth.class_images(diffusion, config, out / "class", images.class_dir)
            folder = out / "cache" / "class"
            groups.append(Group("class", encoded(diffusion, drawn, side, folder), config.prior))
    counts = ", ".join(f"{len(group.examples)} of the {group.name}" for group in groups)
    print(f"{counts} to learn from; {config.steps} steps")
    if word:
        print(f'the word whose vector is trained: "{word}"')

    # Training, recorded.
    observer = None
    if recorder and ranks.is_main():
        prompts = {"subject": data.captions[0]}
        templates = list(config.class_prompt)
        prompts |= {"class": booth.expand(templates, 1, config.seed)[0]} if templates else {}
        prompts |= {"unrelated": unrelated} | own_prompts(config)
        plan = planned(diffusion, tuning, Counts(len(groups), len(prompts), 0, len(data)), out)
        print(f"{plan}; --no-recorder leaves it out.")
        observer = recorder_of(diffusion, out, prompts, data.paths, [], examples, plan.config)
    with going_on(diffusion, config.method, model, out):
        loop.finetune(diffusion, groups, out, tuning, observer, resume)
    if not ranks.is_main():
        return
    report(observer)
    best = observer.best() if observer else None
    print(*commands(diffusion, config.method, model, out, data.captions[0], best), sep="\n")
