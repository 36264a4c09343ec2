"""DreamBooth: from a handful of images a model learns a subject that it can then draw anywhere.

This file makes what it learns from; loop.py trains. A rare token names the subject, "a photo of sks
dog". The model also learns from images of the class, "a photo of a dog", which it drew itself, so
that it forgets no other dog. This is prior preservation, [1] eq. 2, the sum of two groups' losses:

    E || x0_hat(x_t, "a photo of sks dog") - x0 ||^2
      + lambda E || x0_hat(x'_t', "a photo of a dog") - x'0 ||^2

[1] Ruiz et al. DreamBooth: Fine Tuning Text-to-Image Diffusion Models for Subject-Driven
    Generation. 2022. arXiv:2208.12242
"""

import hashlib
import json
import random
import re
import warnings
from dataclasses import fields, replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from minidiff import pipeline
from minidiff.data.captions import OTHER_FORMATS, captions_file, check_folder, images_in
from minidiff.data.folder import (
    CaptionedFolder,
    CaptionedImages,
    load_image,
    to_model,
    upright_size,
)
from minidiff.data.latents import Example, fingerprint
from minidiff.errors import UserError
from minidiff.figures import plots
from minidiff.finetuning.estimate import images_at_once
from minidiff.finetuning.fit import Choice, applied
from minidiff.finetuning.groups import encoded, numbers_of
from minidiff.latent_diffusion import LatentDiffusion
from minidiff.methods import inversion
from minidiff.options.finetuning import (
    DreamBoothConfig,
    FineTuneConfig,
    LoRAConfig,
    Method,
    TrainText,
)
from minidiff.options.sampling import SampleConfig
from minidiff.text import token_ids
from minidiff.training import atomic

SMALL = 64  # pixels
COPIES = 24  # of every image, each moved differently
MANY = 30  # with more images, plain fine-tuning with a caption each is likely better
BATCH = 8  # class images drawn at once: all of a batch are drawn anew if one is missing


class Recipe(NamedTuple):
    """Options that suit a model and a method. The names are those of DreamBoothConfig."""

    steps: int
    lr: float
    batch: int
    text: TrainText
    ema: float | None = None
    shift: float = 0.0
    class_pictures: int = 200
    prior: float = 1.0
    rank: int = 4
    word_lr: float = 5e-4  # of the rare token's vector
    t_mean: float | None = None  # see FineTuneConfig
    t_std: float | None = None


# for images of up to SMALL pixels, as measured with the model in the box (docs/dreambooth.md)
BOX = Recipe(steps=800, lr=4e-4, batch=16, text="word", ema=0.97, shift=0.15)
BOX = BOX._replace(class_pictures=800, prior=3.0, word_lr=2e-2, t_mean=1.3, t_std=1.4)
BOX_RECIPES = {
    "full": BOX,
    "lora": BOX._replace(steps=1000, lr=2e-3, rank=2),
    "inversion": Recipe(steps=300, lr=2e-2, batch=16, text="word", shift=0.15, word_lr=2e-2),
}
RECIPES = {  # for Stable Diffusion: [1]'s, and what became usual
    "full": Recipe(steps=1000, lr=5e-6, batch=1, text="no"),
    "lora": Recipe(steps=500, lr=1e-4, batch=1, text="no"),
    "inversion": Recipe(steps=3000, lr=5e-4, batch=1, text="word"),
}


def recipe(model: LatentDiffusion, method: Method) -> Recipe:
    """The recipe for this model."""
    if model.size > SMALL:
        return RECIPES[method]
    if hasattr(model.schedule, "mean"):
        return BOX_RECIPES[method]
    return BOX_RECIPES[method]._replace(t_mean=None, t_std=None)


def completed(config: DreamBoothConfig, recipe: Recipe) -> DreamBoothConfig:
    """The config with the recipe's values where it has none."""
    values = recipe._asdict().items()
    unset = {name: value for name, value in values if getattr(config, name, 0) is None}
    if config.text == "auto" or config.method == "inversion":
        unset["text"] = recipe.text
    return replace(config, **unset)


def finetune_config(config: DreamBoothConfig, recipe: Recipe, word: str | None) -> FineTuneConfig:
    """How to fine-tune, for a completed config. word: whose vector is trained, if any."""
    common = {field.name for field in fields(FineTuneConfig)} & vars(config).keys() - {"text"}
    alone = config.method == "inversion"
    return FineTuneConfig(
        **{name: getattr(config, name) for name in common},
        lora=LoRAConfig(config.rank, config.alpha),
        text=config.text == "yes",
        word=word,
        word_lr=config.lr if alone else recipe.word_lr,
        dropout=0.0 if alone else None,
        t_mean=recipe.t_mean,
        t_std=recipe.t_std,
    )


def tuned(
    model: LatentDiffusion, config: DreamBoothConfig, words: list[str], choice: Choice
) -> FineTuneConfig:
    """How to fine-tune with these options; see fit.Case."""
    config = applied(config, choice)
    suited = recipe(model, config.method)
    config = completed(config, suited)
    word = word_to_train(words, config.prompt) if config.text == "word" else None
    return finetune_config(config, suited, word)


def subject_pictures(folder: Path, prompt: str, caption_column: str = "text") -> CaptionedImages:
    """The images of the subject: each with the prompt, or with its own captions where the folder
    has some."""
    folder = check_folder(folder)
    if table := captions_file(folder):
        data = CaptionedFolder(folder, caption_column=caption_column)
        if prompt.strip():
            kind = table.name if table.stem == "metadata" else "text files"
            warn(f"{folder}: the captions of its {kind} are used instead of the prompt")
    else:
        paths = readable(folder)
        data = CaptionedImages(paths, [prompt] * len(paths))
    count = len(set(data.paths))
    if not count:
        raise UserError(f"{folder}: there are no pictures in it; put 3 to 6 of the subject there.")
    if count == 1:
        warn(f"{folder}: one picture; its background is learnt too. Take 3 to 6 elsewhere")
    if count > MANY:
        warn(f"{folder}: {count} pictures; a subject needs 3 to 6. For more, see minidiff finetune")
    return data


def readable(folder: Path) -> list[Path]:
    """The images in a folder. Warns of those in formats that are not read."""
    if others := images_in(folder, OTHER_FORMATS):
        warn(f"{folder}: {len(others)} pictures ({others[0].name}) are not read; save them as PNG")
    return images_in(folder)


def warn(message: str) -> None:
    warnings.warn(message, stacklevel=3)


def expand(templates: list[str], n: int, seed: int) -> list[str]:
    """n prompts: the templates in turn, with one of every {one|or another}, chosen at random."""
    rng = random.Random(f"class {seed}")
    turns = (templates[k % len(templates)] for k in range(n))
    return [re.sub(r"\{([^{}]*)\}", lambda m: rng.choice(m[1].split("|")), each) for each in turns]


def rare_words(prompt: str, class_prompts: list[str]) -> list[str]:
    """The words of the prompt that are in no class prompt: what the subject is called."""
    common = {word for template in class_prompts for word in _words(template)}
    return [word for word in dict.fromkeys(_words(prompt)) if word not in common]


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def check_prompts(captions: list[str], class_prompts: list[str]) -> list[str]:
    """Warn of prompts that teach something else than a subject; returns the words that call it: in
    all captions, and in no class prompt."""
    common = set.intersection(*(set(_words(caption)) for caption in captions))
    words = [word for word in rare_words(captions[0], class_prompts) if word in common]
    if class_prompts and not words:
        warn(
            f'"{captions[0]}" has no word that the class prompt lacks, so the whole class becomes '
            'the subject; add a rare token, as "sks"'
        )
    rare = [
        word
        for word in words
        if len(token_ids(word)) > 1 or token_ids(word)[0] >= inversion.EVERYDAY
    ]
    if words and class_prompts and not rare:
        warn(
            f'"{" ".join(words)}" is an everyday word, whose meaning will mix with the subject; '
            'take a rare token, as "sks"'
        )
    return rare or words


def word_to_train(words: list[str], prompt: str) -> str:
    """The word whose vector is trained: a placeholder of the prompt, as in "a <sks> dog", or else
    the rarest of the words that call the subject."""
    placeholder = re.search(r"<([^<>]+)>|\[([^][]+)\]", prompt)
    names = placeholder and (placeholder[1] or placeholder[2])
    word = names or inversion.word_of(words, prompt)
    inversion.check_rare(word)
    return word


def class_images(
    model: LatentDiffusion, config: DreamBoothConfig, folder: Path, own: Path | None = None
) -> CaptionedImages:
    """The images of the class with their prompts: drawn by the model into a folder, or your own."""
    if own is None:
        prompts = expand(list(config.class_prompt), config.class_pictures, config.seed)
        return class_pictures(model, prompts, folder, seed=config.seed)
    paths = readable(check_folder(own))
    if not paths:
        raise UserError(f"{own}: there are no pictures in it; put some of the class there.")
    return CaptionedImages(paths, expand(list(config.class_prompt), len(paths), config.seed))


def class_pictures(
    model: LatentDiffusion,
    prompts: list[str],
    folder: Path,
    steps: int = 25,
    guidance: float | None = None,
    seed: int = 0,
) -> CaptionedImages:
    """Draw an image for each prompt with the model as it is now, as folder/0000.png and so on.

    Every file carries a key of all that it follows from: weights, prompts of its batch, sampler,
    steps, guidance, seed. A batch with the right keys is not drawn again; a file of such a name
    without a key is refused.
    """
    if not prompts:
        raise UserError("no class pictures, so there is nothing to preserve; ask for some.")
    guidance = model.guidance if guidance is None else guidance
    weights = [fingerprint(part) for part in (model.vae, model.text, model.unet)]
    paths = [folder / f"{k:04d}.png" for k in range(len(prompts))]
    make_room(folder, paths)
    at_once = images_at_once((model.size, model.size), model.vae.factor)
    with tqdm(desc="drawing class pictures", total=len(prompts), unit="", delay=0.5) as bar:
        for start in range(0, len(prompts), BATCH):
            batch, files = prompts[start : start + BATCH], paths[start : start + BATCH]
            settings = [steps, guidance, model.sampler, model.spacing, model.size, seed, start]
            content = json.dumps([weights, batch, settings])
            key = hashlib.sha256(content.encode()).hexdigest()
            if not all(key_of(path) == key for path in files):
                config = SampleConfig(steps, guidance, seed=seed)
                images = pipeline.generate(model, batch, config, at_once, first=start)
                images = images.float().cpu()
                for path, image, prompt in zip(files, images, batch, strict=True):
                    plots.save_png(image, path, {"prompt": prompt, "key": key}, foreign)
            bar.update(len(batch))
    return CaptionedImages(paths, prompts)


def make_room(folder: Path, paths: list[Path]) -> None:
    """Refuse strangers' files at these paths, and warn of others; remove ours from an earlier run
    that drew more."""
    atomic.clean(folder)
    for path in paths:
        atomic.check(path, foreign)
    for path in set(folder.glob("[0-9]*.png")) - set(paths):
        if path.stem.isdecimal() and foreign(path) is None:
            path.unlink()
    others = [path for path in (images_in(folder) if folder.is_dir() else []) if foreign(path)]
    if others:
        warn(f"{folder}: {len(others)} pictures are not ours ({others[0].name}), and not used")


def foreign(path: Path) -> Path | None:
    """path, unless it has a key, or is damaged with our signature; see atomic.Stranger."""
    try:
        load_image(path)
    except UserError:
        return atomic.unsigned(path)
    return None if key_of(path) else path


def key_of(path: Path) -> str | None:
    """The key that a whole picture carries."""
    if not path.exists():
        return None
    try:
        load_image(path)
    except UserError:
        return None
    with Image.open(path) as image:
        return image.info.get("key")


def subject_examples(
    model: LatentDiffusion,
    data: CaptionedImages,
    config: DreamBoothConfig,
    folder: Path,
    size: int | None = None,
    flip: bool = False,
) -> list[Example]:
    """The subject as examples, moved about with a shift. folder: where latents are cached."""
    size = size or model.size
    if config.shift:
        return moved_about(model, data, config.shift, config.seed, size, flip)
    return encoded(model, data, size, folder, flip)


@torch.no_grad()
def moved_about(
    model: LatentDiffusion,
    data: CaptionedImages,
    shift: float,
    seed: int,
    size: int,
    flip: bool = False,
) -> list[Example]:
    """COPIES of every image as examples, each moved by up to `shift` of the side in each direction:
    a subject in five places is drawn in these places only."""
    generator, examples, reach = torch.Generator().manual_seed(seed), [], round(shift * size)
    for path, caption in zip(data.paths, data.captions, strict=True):
        image = to_model(load_image(path, size))
        copies = torch.stack([moved(image, reach, generator) for _ in range(COPIES)])
        if flip:
            copies[::2] = copies[::2].flip(-1)
        latents = model.vae.encode(copies.to(model.device)).cpu()
        numbers = numbers_of(model, *upright_size(path), (size, size))
        examples += [Example(z, caption, numbers=numbers) for z in latents]
    return examples


def moved(
    image: Float[Tensor, "3 H W"], reach: int, generator: torch.Generator
) -> Float[Tensor, "3 H W"]:
    """The image, moved by up to `reach` pixels each way."""
    _, height, width = image.shape
    top, left = torch.randint(2 * reach + 1, (2,), generator=generator).tolist()
    padded = F.pad(image[None], (reach,) * 4, mode="replicate")
    return padded[0, :, top : top + height, left : left + width]
