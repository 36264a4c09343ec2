"""DreamBooth: from a handful of pictures a model learns a subject that it can then draw anywhere. What it learns from is all in this file; the
training itself is finetune.py's.

The subject is called by a rare token, "a photo of sks dog". Were that all, the model would forget every other dog: so it also goes on
learning from pictures of the class, "a photo of a dog", that it drew itself before training. Prior preservation, [1] eq. 2, is two
groups of examples and the sum of their losses:

    E || x0_hat(x_t, "a photo of sks dog") - x0 ||^2  +  lambda E || x0_hat(x'_t', "a photo of a dog") - x'0 ||^2

[1] Ruiz et al. DreamBooth: Fine Tuning Text-to-Image Diffusion Models for Subject-Driven Generation. 2022. arXiv:2208.12242
"""

import hashlib
import json
import random
import re
import warnings
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from minidiff import pipeline
from minidiff.data import latents as cache
from minidiff.data.folder import (
    CaptionedFolder,
    Pictures,
    existing,
    load_picture,
    pictures_in,
    to_model,
)
from minidiff.data.latents import Example
from minidiff.errors import UserError
from minidiff.figures import plots
from minidiff.finetuning.loop import encoded
from minidiff.latent_diffusion import LatentDiffusion
from minidiff.options.sampling import SampleConfig
from minidiff.text import token_ids

SMALL = 64  # pixels
COPIES = 24  # of every picture, each moved otherwise
MANY = 30  # pictures of a subject, above which plain fine-tuning with a caption each is likely the better way
EVERYDAY = 40_000  # CLIP's vocabulary is sorted by how often a token was met: a word below this has a meaning that training would have to undo
BATCH = 8  # class pictures drawn at once: a part of what they are, since a sampler's noise is drawn for all of a batch


class Recipe(NamedTuple):
    """Numbers that suit a model and a method, where the user names none."""

    steps: int
    lr: float
    batch: int
    text: str  # "yes": train the text tower too, "word": of it the vector of the rare token alone
    ema: float | None
    shift: float  # how far a picture is moved at most, as a share of its side
    class_pictures: int = 200
    prior: float = 1.0
    rank: int = 4
    word_lr: float = 5e-4  # of that vector
    levels: tuple[float, float] | None = (
        None  # mean and spread of logit(t / T), where training draws t otherwise than the schedule
    )


TOY = {
    "full": Recipe(800, 4e-4, 16, "word", 0.97, 0.15, 800, 3.0, word_lr=2e-2, levels=(1.3, 1.4)),
    "lora": Recipe(1000, 2e-3, 16, "word", 0.97, 0.15, 800, 3.0, 2, 2e-2, (1.3, 1.4)),
    "inversion": Recipe(300, 2e-2, 16, "word", None, 0.15, 0, word_lr=2e-2),
}  # for pictures of up to SMALL pixels, as measured with the model in the box (docs/dreambooth.md)


def recipe(model: LatentDiffusion, method: str) -> Recipe:
    """The box's, or for Stable Diffusion [1]'s 1,000 steps at 5e-6; for a LoRA and a word's vector what became usual."""
    if model.size <= SMALL:
        return TOY[method] if hasattr(model.schedule, "mean") else TOY[method]._replace(levels=None)
    return {
        "full": Recipe(1000, 5e-6, 1, "no", None, 0.0),
        "lora": Recipe(500, 1e-4, 1, "no", None, 0.0),
        "inversion": Recipe(3000, 5e-4, 1, "word", None, 0.0),
    }[method]


def subject_pictures(folder: Path, prompt: str, caption_column: str = "text") -> Pictures:
    """The pictures of the subject: each with the prompt, or with its own captions where the folder has a metadata.jsonl."""
    folder = existing(folder)
    if (folder / "metadata.jsonl").exists():
        data = CaptionedFolder(folder, caption_column=caption_column)
    else:
        paths = pictures_in(folder)
        data = Pictures(paths, [prompt] * len(paths))
    count = len(set(data.paths))
    if not count:
        raise UserError(f"{folder}: there are no pictures in it; put 3 to 6 of the subject there.")
    if count == 1:
        said = f"{folder}: one picture; its background and pose will be learnt with the subject. Take 3 to 6, each in another place"
        warnings.warn(said, stacklevel=2)
    if count > MANY:
        said = f"{folder}: {count} pictures; a subject needs 3 to 6. For many, caption each and use minidiff finetune"
        warnings.warn(said, stacklevel=2)
    return data


def expand(templates: list[str], n: int, seed: int) -> list[str]:
    """n prompts: the templates in turn, and of every {one|or another} in them one, chosen at random."""
    rng = random.Random(f"class {seed}")
    return [
        re.sub(
            r"\{([^{}]*)\}",
            lambda choice: rng.choice(choice[1].split("|")),
            templates[k % len(templates)],
        )
        for k in range(n)
    ]


def rare_words(prompt: str, class_prompts: list[str]) -> list[str]:
    """The words that the prompt has and no class prompt does: what the subject is called."""
    known = {word for template in class_prompts for word in re.findall(r"\w+", template.lower())}
    return [word for word in dict.fromkeys(re.findall(r"\w+", prompt.lower())) if word not in known]


def check_prompts(captions: list[str], class_prompts: list[str]) -> list[str]:
    """Warn of prompts that will teach something else than a subject; returns the words that call it: of all captions and of no class prompt."""
    spoken = [set(re.findall(r"\w+", caption.lower())) for caption in captions]
    words = [
        word
        for word in rare_words(captions[0], class_prompts)
        if all(word in caption for caption in spoken)
    ]
    if class_prompts and not words:
        said = f'"{captions[0]}" has no word that the class prompt lacks, so the whole class becomes the subject; add a rare token, as "sks"'
        warnings.warn(said, stacklevel=2)
    rare = [word for word in words if len(token_ids(word)) > 1 or token_ids(word)[0] >= EVERYDAY]
    if words and class_prompts and not rare:
        said = f'"{" ".join(words)}" is an everyday word, whose meaning for the model will mix with the subject; a rare token, as "sks", has none'
        warnings.warn(said, stacklevel=2)
    return rare or words


def class_pictures(
    model: LatentDiffusion,
    prompts: list[str],
    folder: Path,
    steps: int = 25,
    guidance: float | None = None,
    seed: int = 0,
) -> Pictures:
    """A picture for each prompt, drawn by the model as it is now, into folder/0000.png and so on.

    Every file carries the key of all that it follows from: the weights, the prompts of its batch, sampler, steps, guidance, seed. One that is
    there under the key wanted is not drawn again; any other is, and so is one that cannot be read.
    """
    if not prompts:
        raise UserError(
            "no class pictures: prior preservation has nothing to preserve. Ask for some, or go without it."
        )
    folder.mkdir(parents=True, exist_ok=True)
    guidance = model.guidance if guidance is None else guidance
    weights = [cache.fingerprint(part) for part in (model.vae, model.text, model.unet)]
    paths = [folder / f"{k:04d}.png" for k in range(len(prompts))]
    for path in set(pictures_in(folder)) - set(paths):  # of an earlier run that drew more
        path.unlink()
    starts = range(0, len(prompts), BATCH)
    with tqdm(desc="drawing class pictures", total=len(prompts), unit="", delay=0.5) as bar:
        for start in starts:
            some, places = prompts[start : start + BATCH], paths[start : start + BATCH]
            how = [steps, guidance, model.sampler, model.spacing, model.size, seed, start]
            key = hashlib.sha256(json.dumps([weights, some, how]).encode()).hexdigest()
            if not all(carries(path, key) for path in places):
                config = SampleConfig(steps, guidance, seed=seed)
                drawn = pipeline.generate(model, some, config, first=start)
                for path, picture, prompt in zip(places, drawn.float().cpu(), some, strict=True):
                    plots.save_png(picture, path, {"prompt": prompt, "key": key})
            bar.update(len(some))
    return Pictures(paths, prompts)


def carries(path: Path, key: str) -> bool:
    """Whether a whole picture lies there that carries this key."""
    if not path.exists():
        return False
    try:
        load_picture(path)
    except UserError:
        return False
    with Image.open(path) as picture:
        return picture.info.get("key") == key


def subject_examples(
    model: LatentDiffusion, data: Pictures, shift: float, folder: Path, seed: int
) -> list[Example]:
    """The subject as training sees it: every picture as it is or, with a shift, moved about."""
    return (
        moved_about(model, data, shift, seed) if shift else encoded(model, data, model.size, folder)
    )


@torch.no_grad()
def moved_about(model: LatentDiffusion, data: Pictures, shift: float, seed: int) -> list[Example]:
    """COPIES of every picture as examples, each moved by up to `shift` of the side in each direction, its edge repeated where it leaves: a subject
    that was always seen in the same five places is drawn in these only."""
    generator, examples = torch.Generator().manual_seed(seed), []
    reach = round(shift * model.size)
    for path, caption in zip(data.paths, data.captions, strict=True):
        picture = to_model(load_picture(path, model.size))
        copies = torch.stack([moved(picture, reach, generator) for _ in range(COPIES)])
        examples += [
            Example(latents, caption) for latents in model.vae.encode(copies.to(model.device)).cpu()
        ]
    return examples


def moved(
    picture: Float[Tensor, "3 H W"], reach: int, generator: torch.Generator
) -> Float[Tensor, "3 H W"]:
    """The picture, moved by up to `reach` pixels each way."""
    _, height, width = picture.shape
    top, left = torch.randint(2 * reach + 1, (2,), generator=generator).tolist()
    return F.pad(picture[None], (reach,) * 4, mode="replicate")[
        0, :, top : top + height, left : left + width
    ]
