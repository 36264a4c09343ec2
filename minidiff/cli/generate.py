"""The verb that makes images of prompts."""

import re
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from minidiff.cli import options
from minidiff.cli.options import EXAMPLE, MODEL, SAMPLE, Device, Dtype, Parts, Prompts
from minidiff.errors import UserError
from minidiff.options.sampling import SampleConfig, Size, check_size

if TYPE_CHECKING:
    from torch import Tensor

    from minidiff.latent_diffusion import LatentDiffusion
    from minidiff.methods.editing import Edit


@dataclass(frozen=True)
class GenerateOptions:
    """How many images, and what to start from."""

    # images of each prompt
    n: int = 1
    # images at once. Default: a megapixel of them, at most 64
    batch: int | None = None
    # number of the first image: with --first 5, the sixth of a longer run is made alone
    first: int = 0
    # an image to start from
    image: Path | None = None
    # the share of the steps from noise that is walked again from that image. Default: 0.8, or 1
    # with a mask
    strength: float | None = None
    # an image, white where the other is to be drawn anew; transparent counts as black
    mask: Path | None = None
    # SDXL's refiner, a model that draws the last steps
    refiner: Path | None = None
    # how far from noise (0) to image (1) the refiner takes over
    refiner_from: float = 0.8
    # the precision to compute in
    dtype: Dtype = "fp32"

    def __post_init__(self) -> None:
        options.check_least("n", self.n)
        options.check_least("batch", self.batch)
        options.check_least("first", self.first, 0)
        if self.strength is not None and self.image is None:
            raise UserError("strength needs an --image to start from.")
        if self.mask is not None and self.image is None:
            raise UserError("mask needs the --image that it belongs to.")


NO_OPTIONS, NO_PARTS = GenerateOptions(), Parts()


def generate(
    prompts: Prompts,
    model: Path = MODEL,
    config: SampleConfig = SAMPLE,
    request: GenerateOptions = NO_OPTIONS,
    parts: Parts = NO_PARTS,
    device: Device = "auto",
    out: Path = Path("out/generate"),
) -> None:
    """Make images of prompts.

    Example: minidiff generate "a red circle" "a blue square" --n 4 --steps 30 --seed 7

    Args:
        prompts: what to show; each in quotes, before the options.
        model: box, the small model that ships with minidiff; our folder, a diffusers folder, one
            .safetensors or .ckpt file of Stable Diffusion, or a name on the Hugging Face Hub.
        device: where to compute; auto takes a GPU if there is one.
        out: folder for the images; each carries its prompt and its settings inside. If there are
            some already, numbers go on: 004-..., and grid-004.png beside grid.png.
    """
    if not prompts:
        raise UserError(f'no prompt; say what to draw, as in: minidiff generate "{EXAMPLE}".')
    options.check_out(out)
    warn_of_prompts(prompts)
    device = options.pick_device(device)
    options.warn_of_imitation(request.dtype, device)
    if model == MODEL and parts == NO_PARTS:
        warn_of_words(prompts)
    loaded = parts.load(model, device, request.dtype)
    if request.refiner is not None:
        from minidiff import load
        from minidiff.methods.refiner import Refined

        refiner = load(request.refiner, device, request.dtype)
        loaded = Refined(loaded, refiner, request.refiner_from)
    config = options.completed(config, loaded)
    edit = edit_of(request, config.size, loaded)
    height, width = edit.image.shape[2:] if edit else config.size or (loaded.size, loaded.size)
    config = replace(config, size=Size(height, width))
    check_sides(config.size, loaded)
    batch = request.batch or max(1, min(64, 2**20 // (height * width)))
    wanted = [prompt for prompt in prompts for _ in range(request.n)]
    settings = settings_of(config, request, parts, edit) | {"model": model.resolve().name}
    if hasattr(loaded.text, "t5"):  # of SD 3 and FLUX.1
        length = loaded.text.config.length
        settings["t5"] = "zeros" if loaded.text.t5 is None else f"{length} tokens"
    print(*write_images(loaded, wanted, config, request, batch, edit, out, settings), sep="\n")


def write_images(
    model: "LatentDiffusion",
    prompts: list[str],
    config: SampleConfig,
    request: GenerateOptions,
    batch: int,
    edit: "Edit | None",
    out: Path,
    settings: dict[str, object],
) -> list[Path]:
    """One PNG for each prompt, and a grid of all. They are written as they come: an interruption
    loses a batch at most."""
    import torch

    from minidiff import pipeline
    from minidiff.figures import plots

    settings = {name: str(value) for name, value in settings.items() if value or value == 0}
    paths, images, (number, grid) = [], [], free_names(out)
    for drawn in pipeline.draw(model, prompts, config, batch, edit, request.first, progress=True):
        for image in drawn.cpu():
            k, prompt = len(images), prompts[len(images)]
            images.append(image)
            own = {"prompt": prompt, "picture": f"{k + 1} of {len(prompts)}"}
            own |= {"first": str(request.first + k), **settings}
            path = out / f"{number + k:03d}-{slug(prompt)}.png"
            paths.append(plots.save_png(image, path, own))
    columns = min(request.n, 8) if request.n > 1 else None
    return [*paths, plots.grid(torch.stack(images), prompts, out / grid, columns=columns)]


def settings_of(
    config: SampleConfig, request: GenerateOptions, parts: Parts, edit: "Edit | None"
) -> dict[str, object]:
    """What draws an image again, for the text inside of its PNG; what is not in use is None."""
    low, high = config.interval
    return {
        "seed": config.seed,
        "steps": config.steps,
        "guidance": config.guidance,
        "sampler": config.sampler,
        "size": options.size_text(config.size),
        "spacing": config.spacing,
        "dtype": request.dtype,
        "negative": config.negative,
        "rescale": config.rescale or None,
        "interval": f"{low:g},{high:g}" if (low, high) != (0, 1) else None,
        "original_size": options.size_text(config.original_size),
        "crop": config.crop and f"{config.crop.top},{config.crop.left}",
        "target_size": options.size_text(config.target_size),
        "empty": config.empty,
        "strength": edit and edit.strength,
        "image": request.image and request.image.name,
        "mask": request.mask and request.mask.name,
        "refiner": request.refiner and f"{request.refiner.name} from {request.refiner_from:g}",
        "lora": ", ".join(f"{file.name}:{scale:g}" for file, scale in parts.loras()),
        "embedding": ", ".join(parts.embedding),
    }


def warn_of_prompts(prompts: tuple[str, ...]) -> None:
    """Say so where prompts are read in another way than their writer may think."""
    if len(prompts) > 2 and not any(" " in prompt for prompt in prompts):
        warnings.warn(
            f"{len(prompts)} words are {len(prompts)} prompts; put one prompt in quotes, as in "
            f'"{" ".join(prompts)}"',
            stacklevel=2,
        )
    for prompt in prompts:
        if weights := re.search(r"\([^()]*:\s*[\d.]+\s*\)|\bBREAK\b", prompt):
            message = f'"{weights[0]}" is read as it stands: prompts have no weights here'
            warnings.warn(message, stacklevel=2)


def warn_of_words(prompts: tuple[str, ...]) -> None:
    """Name the words that the model in the box never read."""
    from minidiff.data.world import World
    from minidiff.recipes.quickstart import COLOURS, SHAPES

    vocabulary = World(32, SHAPES, COLOURS).vocabulary()
    words = {word for prompt in prompts for word in re.findall(r"\w+", prompt.lower())}
    if unknown := sorted(words - vocabulary):
        warnings.warn(
            f"the model in the box does not know {', '.join(unknown)}; "
            f"all that it knows: {', '.join(sorted(vocabulary))}",
            stacklevel=2,
        )


def check_sides(size: Size, model: "LatentDiffusion") -> None:
    """Raise a UserError for a size the model cannot have; warn of one it was not trained at."""
    for side in size:
        check_size(side, model.multiple)
    if set(size) != {model.size}:
        warnings.warn(
            f"{size.width}x{size.height} pixels, but the model was trained at "
            f"{model.size}x{model.size}: larger, things may repeat; smaller, they may fall apart",
            stacklevel=2,
        )


def edit_of(request: GenerateOptions, size: Size | None, model: "LatentDiffusion") -> "Edit | None":
    """The image to start from, with its mask."""
    if request.image is None:
        return None
    from minidiff.methods.editing import Edit

    image, mask = image_of(request.image, size, model), None
    if request.mask is not None:
        mask = mask_of(request.mask, *image.shape[2:])
    default = 0.8 if mask is None else 1.0
    return Edit(image, default if request.strength is None else request.strength, mask)


def image_of(file: Path, size: Size | None, model: "LatentDiffusion") -> "Tensor":
    """(1, 3, H, W) in [-1, 1]: of this size, or with its shorter side as the model was trained."""
    from minidiff.data.folder import load_image, to_model

    if size is None:
        sides = load_image(file).shape[1:]
        scale, step = model.size / min(sides), model.multiple * model.unet.multiple
        size = [max(step, round(side * scale / step) * step) for side in sides]
    return to_model(load_image(file, tuple(size)))[None]


def mask_of(file: Path, height: int, width: int) -> "Tensor":
    """(1, 1, H, W): 1 where the image is lighter than grey; transparent parts are black."""
    from minidiff.data.folder import load_image

    image = load_image(file, (height, width), background="black")
    mask = (image.float().mean(0) > 127).float()[None, None]
    if not mask.any():
        raise UserError(f"{file}: nothing in it is white; paint white what is to be drawn anew.")
    if mask.all():
        warnings.warn(f"{file}: all of it is white, so nothing of the image stays", stacklevel=2)
    return mask


def free_names(out: Path) -> tuple[int, str]:
    """The number of a run's first image, above all that are there, and the name of its grid:
    grid.png, or else grid- and that number."""
    names = {path.name for path in out.iterdir()} if out.is_dir() else set()
    matches = [re.match(r"(?:grid-)?(\d{3,9})\b", name) for name in names]
    number = max((int(match[1]) for match in matches if match), default=-1) + 1
    return number, "grid.png" if "grid.png" not in names else f"grid-{number:03d}.png"


def slug(prompt: str) -> str:
    """A prompt as a piece of a file name."""
    return re.sub(r"[\W_]+", "-", prompt.lower()).strip("-")[:50] or "empty"
