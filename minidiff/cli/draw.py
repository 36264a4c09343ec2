"""Verbs that draw: quickstart and generate."""

import re
import warnings
from dataclasses import replace
from pathlib import Path

from minidiff.cli import options
from minidiff.cli.options import (
    EXAMPLE,
    MODEL,
    Device,
    Dtype,
    Embeddings,
    File,
    Integer,
    Loras,
    Number,
    Numbers,
    Prompts,
    Sampler,
    Size,
    Spacing,
    Target,
)
from minidiff.errors import UserError
from minidiff.options.sampling import Size as Sides
from minidiff.options.sampling import check_size


def quickstart(
    out: Path = Path("out/quickstart"), seed: int = 0, device: Device = "auto", resume: bool = False
) -> None:
    """Train a small text-to-image model here and now, from nothing, and show how it happened.

    Args:
        out: folder for the model, the pictures and results.json.
        seed: everything random follows from it.
        device: where to compute; auto takes the CPU, which the recipe is made for.
        resume: go on where an interrupted run stopped.
    """
    options.check_out(out)
    options.check_seed(seed)
    device = "cpu" if device == "auto" else options.pick_device(device)
    from minidiff.recipes.quickstart import quickstart as run

    run(out, seed, device, resume)


def generate(
    prompts: Prompts,
    model: Path = MODEL,
    n: int = 1,
    steps: int = 25,
    guidance: Number = None,
    sampler: Sampler = None,
    size: Size = None,
    negative: str = "",
    rescale: float = 0.0,
    interval: Numbers = "0,1",
    spacing: Spacing = None,
    image: File = None,
    strength: Number = None,
    mask: File = None,
    dtype: Dtype = "fp32",
    tile: bool = False,
    batch: Integer = None,
    target: Target = None,
    vae: File = None,
    text: File = None,
    unet: File = None,
    lora: Loras = (),
    embedding: Embeddings = (),
    seed: int = 0,
    device: Device = "auto",
    out: Path = Path("out/generate"),
) -> None:
    """Draw pictures of prompts.

    Args:
        prompts: what to draw; each in quotes, before the options.
        model: box, the small model that ships with minidiff; our folder, a diffusers folder, one .safetensors or .ckpt file of Stable Diffusion,
            or a name on the Hugging Face Hub.
        n: pictures of each prompt.
        steps: sampling steps; more is slower and a little better.
        guidance: how strongly the text steers; 1 is off, 0 ignores the text. Left out, it is the model's own.
        sampler: how to step from noise to picture; dpmpp_2m or unipc where steps are few. Left out, it is the model's own.
        size: side of the pictures in pixels, or width and height as in 768x512. Left out, it is the size the model was trained at.
        negative: what the pictures should not show; guidance steers away from it.
        rescale: from 0 to 1, how much of the contrast that guidance adds is taken back (0.7 where pictures are burnt).
        interval: guide only in this stretch of the way, from 0 (data) to 1 (noise); a step that is not guided costs half.
        spacing: which noise levels the steps visit. Left out, it is the model's own.
        image: a picture to begin from.
        strength: how much of the way from noise to walk again from that picture: 0.8 unless there is a mask, then 1.
        mask: a picture, white where the image is to be drawn anew.
        dtype: the precision to compute in.
        tile: decode in tiles: less memory. Above 1024x1024 it is done anyway.
        batch: pictures drawn at once. Left out, it is a megapixel of them, at most 64.
        target: what the model predicts, where its file does not say: single files of SD 2.x predict v at 768 pixels, eps at 512.
        vae: take the VAE from this checkpoint instead.
        text: take the text tower from this checkpoint instead; or MODEL:TAG of open_clip, as in ViT-L-14:openai.
        unet: take the U-Net from this checkpoint instead.
        lora: low-rank weights to add to the model's, and how much of them, as in style.safetensors:0.8; give it again for more.
        embedding: the vector of a word that textual inversion learnt; with :WORD, the word of the vocabulary that is to mean it.
        seed: everything random follows from it; the same seed gives the same bytes.
        device: where to compute; auto takes a GPU if there is one.
        out: folder for the pictures; each carries its prompt and its settings inside.
    """
    if not prompts:
        raise UserError(f'no prompt; say what to draw, as in: minidiff generate "{EXAMPLE}".')
    options.check_positive("--n", n)
    options.check_positive("--batch", 1 if batch is None else batch)
    shape = parsed_size(size)
    if strength is not None and image is None:
        raise UserError("--strength needs an --image to begin from.")
    if strength is not None and not 0 < strength <= 1:
        raise UserError(
            f"--strength is {strength:g}; it must be above 0 (the picture stays) and at most 1."
        )
    if mask is not None and image is None:
        raise UserError("--mask needs the --image that it belongs to.")
    if not 0 <= rescale <= 1:
        raise UserError(f"--rescale is {rescale:g}; it must be from 0 to 1.")
    between, loras = options.parsed_interval(interval), options.parsed_loras(lora)
    parts = {"dtype": dtype, "target": target, "vae": vae, "text": text, "unet": unet}
    diffusion, config = options.sampling(
        model, steps, guidance, sampler, seed, device, out, spacing, between, **parts
    )
    options.put_in(diffusion, loras)
    options.put_words_in(diffusion, embedding)
    import torch

    from minidiff import pipeline
    from minidiff.figures import plots
    from minidiff.methods.editing import Edit

    height, width = shape or (diffusion.size, diffusion.size)
    edit = None
    if image is not None:
        given = pictured(image, shape, diffusion)
        height, width = given.shape[2:]
        hole = None if mask is None else white(mask, height, width)
        strength = (0.8 if mask is None else 1.0) if strength is None else strength
        edit = Edit(given, strength, hole)
    for side in (height, width):
        check_size(side, diffusion.multiple)
    if (height, width) != (diffusion.size, diffusion.size):
        trained = f"the model was trained at {diffusion.size}x{diffusion.size}"
        warnings.warn(
            f"{width}x{height} pixels, but {trained}: things may repeat when larger, and fall apart when smaller",
            stacklevel=2,
        )
    config = replace(
        config, size=Sides(height, width), negative=negative, rescale=rescale, tile=tile or None
    )
    wanted = [prompt for prompt in prompts for _ in range(n)]
    batch = batch or max(1, min(64, 2**20 // (height * width)))
    settings = {
        "seed": seed,
        "steps": steps,
        "guidance": config.guidance,
        "sampler": config.sampler,
        "size": f"{width}x{height}",
        "spacing": config.spacing,
        "dtype": dtype,
        "model": model.resolve().name,
        "negative": negative,
        "rescale": rescale,
        "strength": edit and edit.strength,
        "interval": interval if config.interval != (0, 1) else None,
        "image": image and image.name,
        "mask": mask and mask.name,
        "lora": ", ".join(f"{file.name}:{scale:g}" for file, scale in loras),
        "embedding": ", ".join(embedding),
    }
    always = ("seed", "guidance")
    settings = {k: str(value) for k, value in settings.items() if value or k in always}
    written, pictures = [], []
    for drawn in pipeline.draw(diffusion, wanted, config, batch, edit, progress=True):
        for picture in drawn.cpu():  # written as they come: an interruption loses a batch at most
            k, prompt = len(pictures), wanted[len(pictures)]
            pictures.append(picture)
            carried = {"prompt": prompt, "picture": f"{k + 1} of {len(wanted)}", **settings}
            written.append(plots.save_png(picture, out / f"{k:03d}-{slug(prompt)}.png", carried))
    written.append(
        plots.grid(
            torch.stack(pictures), wanted, out / "grid.png", columns=min(n, 8) if n > 1 else None
        )
    )
    print(*written, sep="\n")


def parsed_size(size: str | None) -> tuple[int, int] | None:
    """Height and width, from "512" or "768x512", where the width comes first."""
    if size is None:
        return None
    found = re.fullmatch(r"(-?\d+)(?:[xX](-?\d+))?", size)
    if not found:
        raise UserError(
            f'--size takes a side in pixels, or a width and a height as in 768x512; not "{size}".'
        )
    width = int(found[1])
    return (int(found[2]) if found[2] else width), width


def pictured(file: Path, shape: tuple[int, int] | None, diffusion):
    """The picture to begin from, (1, 3, H, W) in [-1, 1]: of the size asked for, or its shorter side as the model was trained at."""
    from minidiff.data.folder import load_picture, to_model

    picture = load_picture(file)
    if shape is None:
        multiple, (height, width) = (
            diffusion.vae.factor * diffusion.unet.multiple,
            picture.shape[1:],
        )
        scale = diffusion.size / min(height, width)
        shape = tuple(
            max(multiple, round(side * scale / multiple) * multiple) for side in (height, width)
        )
    return to_model(load_picture(file, shape))[None]


def white(file: Path, height: int, width: int):
    """The mask, (1, 1, H, W): 1 where the picture is lighter than grey."""
    from minidiff.data.folder import load_picture

    mask = (load_picture(file, (height, width)).float().mean(0) > 127).float()[None, None]
    if not mask.any():
        raise UserError(f"{file}: nothing in it is white; paint white what is to be drawn anew.")
    return mask


def slug(prompt: str) -> str:
    """A prompt as a piece of a file name."""
    return re.sub(r"[\W_]+", "-", prompt.lower()).strip("-")[:50] or "empty"
