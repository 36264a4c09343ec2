"""The verb that teaches a model one subject, from a handful of pictures."""
from pathlib import Path
from typing import Annotated

import tyro

from minidiff.errors import UserError
from minidiff.verbs import options
from minidiff.verbs.finetune import THUMBNAIL, Optimizer, Precision, use
from minidiff.verbs.options import EXAMPLE, MODEL, Device, Integer, Number

Subject = Annotated[Path, tyro.conf.arg(metavar="DIR")]
Method = Annotated[str, tyro.conf.arg(metavar="full|lora|inversion")]
Choice = Annotated[str, tyro.conf.arg(metavar="auto|yes|no|word")]
Texts = Annotated[tuple[str, ...], tyro.conf.arg(metavar="PROMPT"), tyro.conf.UseAppendAction]
Word = Annotated[str | None, tyro.conf.arg(metavar="WORD")]


@options.alone
def dreambooth(
    subject: Subject,
    prompt: Annotated[str, tyro.conf.arg(metavar="PROMPT")],
    class_prompt: Texts = (),
    model: Path = MODEL,
    method: Method = "full",
    prior: Number = None,
    class_pictures: Integer = None,
    steps: Integer = None,
    lr: Number = None,
    batch: Integer = None,
    rank: Integer = None,
    text: Choice = "auto",
    ema: Number = None,
    shift: Number = None,
    like: Word = None,
    unrelated: str = EXAMPLE,
    dtype: Precision = "fp32",
    checkpointing: bool = False,
    optimizer: Optimizer = "adamw",
    every: int = 200,
    resume: bool = False,
    seed: int = 0,
    device: Device = "auto",
    out: Path = Path("out/dreambooth"),
) -> None:
    """Teach a model one subject from 3 to 6 pictures, so that it can be drawn anywhere, and keep what else the model knows.

    Args:
        subject: a folder with the pictures of the subject; captions of their own, in a metadata.jsonl there, are taken instead of the prompt.
        prompt: what the pictures show, with a rare token for the subject, as in "a photo of sks dog".
        class_prompt: the same without the token, as in "a photo of a dog": the model draws this before training, and goes on learning it, so
            that it is not forgotten. Give it again for more; {red|blue} stands for either.
        model: box, the small model that ships with minidiff; our folder, a diffusers folder, one .safetensors or .ckpt file of Stable Diffusion,
            or a name on the Hugging Face Hub.
        method: full moves every weight of the U-Net and writes a model; lora trains a few numbers and writes a small file; inversion trains one
            word's vector alone.
        prior: the weight of the class pictures' loss; 0 does without them, and the model forgets. Left out, this and the next eight are numbers
            that suit the model and the method.
        class_pictures: how many to draw; they are kept, and drawn again only when something they follow from has changed.
        steps: optimizer steps.
        lr: the peak learning rate.
        batch: pictures of the subject in a batch, and as many of the class.
        rank: of the LoRA.
        text: train the text tower too: yes, no, or of it the rare token's vector alone (word), which a LoRA then needs beside it.
        ema: write an average of the weights, of this decay, as in 0.99.
        shift: show the pictures moved about by up to this share of their side.
        like: where the rare token's vector is trained, the word whose vector to begin from, as in dog. Left out, it is the token's own.
        unrelated: a prompt that has nothing to do with the subject; the report shows what becomes of it.
        dtype: the precision to compute in; what is trained stays in fp32.
        checkpointing: compute activations a second time on the way back: far less memory, a third more time.
        optimizer: adamw8bit takes a quarter of AdamW's memory, and needs bitsandbytes.
        every: steps between two checkpoints, and between two rows of the report.
        resume: go on where an interrupted run stopped, bit for bit.
        seed: everything random follows from it.
        device: where to compute; auto takes a GPU if there is one.
        out: folder for the result, report.html, the class pictures, and the training's checkpoint and log.
    """
    options.check_out(out)
    options.check_seed(seed)
    checked(method, prior, class_pictures, class_prompt, prompt, text, shift)
    device = options.pick_device(device)
    from minidiff import dreambooth as booth
    from minidiff import finetune as tuning
    from minidiff import inversion, load
    from minidiff.identity import check_free

    data = booth.subject_pictures(subject, prompt)
    words = booth.check_prompts(data.captions, list(class_prompt))
    check_free(out, resume)
    diffusion = load(model, device)
    usual = booth.recipe(diffusion, method)
    chosen = {"steps": steps, "lr": lr, "batch": batch, "rank": rank, "ema": ema, "shift": shift}
    numbers = {name: getattr(usual, name) if value is None else value for name, value in chosen.items()}
    share, count = numbers.pop("shift"), usual.class_pictures if class_pictures is None else class_pictures
    learns = usual.text if text == "auto" or method == "inversion" else text
    word = inversion.word_of(words, prompt) if learns == "word" else None
    tuning.check(method, optimizer, dtype, word, accumulate=1, every=every, warmup=10, dropout=None, **numbers)

    examples = booth.subject_examples(diffusion, data, share, out / "cache", seed)
    groups = [tuning.Group("subject", examples)]
    weight = usual.prior if prior is None else prior
    if weight and method != "inversion":
        prompts = booth.expand(list(class_prompt), count, seed)
        drawn = booth.class_pictures(diffusion, prompts, out / "class", seed=seed)
        groups.append(tuning.Group("class", tuning.encoded(diffusion, drawn, diffusion.size, out / "cache" / "class"), weight))
    print(", ".join(f"{len(group.examples)} of the {group.name}" for group in groups), f"to learn from; {numbers['steps']} steps")
    recorder = recorded(diffusion, out, data, examples, list(class_prompt), unrelated, every, seed)
    how = dict(method=method, text=learns == "yes", word=word, like=like, dtype=dtype, checkpointing=checkpointing, optimizer=optimizer)
    how |= dict(word_lr=numbers["lr"] if method == "inversion" else usual.word_lr, dropout=0.0 if method == "inversion" else None)
    how |= dict(levels=usual.levels, every=every, seed=seed, resume=resume)
    tuning.finetune(diffusion, groups, out, recorder=recorder, **numbers, **how)
    print(recorder.advice(), recorder.report(), sep="\n")
    print(*use(diffusion, method, model, out, data.captions[0], recorder.best()), sep="\n")


def checked(
    method: str, prior: float | None, class_pictures: int | None, class_prompt: tuple[str, ...], prompt: str, text: str, shift: float | None
) -> None:
    """What can be told before anything is read."""
    if method not in ("full", "lora", "inversion"):
        raise UserError(f'no method "{method}"; there is full, lora, inversion.')
    if text not in ("auto", "yes", "no", "word"):
        raise UserError(f'--text is auto, yes, no or word, not "{text}".')
    if not prompt.strip():
        raise UserError('--prompt is empty; say what the pictures show, with a rare token for the subject, as in "a photo of sks dog".')
    if prior is not None and not 0 <= prior < float("inf"):
        raise UserError(f"--prior is {prior:g}; it must be 0 or above; 1 weighs the class as the subject.")
    if shift is not None and not 0 <= shift <= 0.5:
        raise UserError(f"--shift is {shift:g}; it must be a share from 0 to 0.5 of the side.")
    if method == "inversion" or prior == 0:
        return
    if not class_prompt:
        advice = 'pass --class-prompt, the prompt without its rare token, as in "a photo of a dog"; or --prior 0, and the model forgets'
        raise UserError(f"prior preservation needs to know what class to preserve: {advice}.")
    if class_pictures is not None and class_pictures < 1:
        raise UserError(f"--class-pictures is {class_pictures}: prior preservation with none preserves nothing; draw some (200), or pass --prior 0.")


def recorded(diffusion, out: Path, data, examples: list, class_prompt: list[str], unrelated: str, every: int, seed: int):
    """The flight recorder: the subject, its class, and what has nothing to do with it."""
    import torch

    from minidiff.data.folder import load_picture, to_model
    from minidiff.dreambooth import expand
    from minidiff.recorder import Recorder

    prompts = {"subject": data.captions[0]} | ({"class": expand(class_prompt, 1, seed)[0]} if class_prompt else {}) | {"unrelated": unrelated}
    shown = torch.stack([to_model(load_picture(path, min(diffusion.size, THUMBNAIL))) for path in dict.fromkeys(data.paths)])
    return Recorder(diffusion, out, prompts, shown, examples=examples, every=every, seed=seed)
