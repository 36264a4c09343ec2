"""Training from scratch on a folder of images: in pixels, or in the latents of a VAE that is
trained first; told what is in an image by its caption, by its class, or not at all.

What is written to the folder: model/, samples-STEP.png as it learns, the losses, results.json, and
what a run needs to be resumed: run.json, training/ and cache/. The networks are in presets.py, the
reading of the images in images.py, the loops in stages.py.
"""

import hashlib
import json
import logging
import time
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from minidiff import pipeline
from minidiff.checkpoints import files
from minidiff.checkpoints.folder import foreign
from minidiff.checkpoints.load import part
from minidiff.conditioners import CLIPPair, FluxText, Unconditional
from minidiff.data.folder import to_model
from minidiff.data.latents import encode_captions, fingerprint
from minidiff.data.latents import foreign as foreign_latents
from minidiff.errors import UserError
from minidiff.figures import plots
from minidiff.latent_diffusion import LatentDiffusion
from minidiff.options.sampling import SampleConfig
from minidiff.options.training import TrainingConfig
from minidiff.recipes import images as folders
from minidiff.recipes import presets
from minidiff.recipes.images import Images
from minidiff.recipes.stages import Examples, model_stage, vae_stage
from minidiff.train import EMA
from minidiff.training import atomic
from minidiff.training.json_types import fits
from minidiff.training.progress import last_loss, write_results
from minidiff.training.resume import read_log
from minidiff.training.seeds import generator_of
from minidiff.vae import Pixels

GUIDANCE, SAMPLING_STEPS = 2.0, 25
VAE_SHARE = 0.25  # of the time, where the minutes are given
GRIDS = 10  # of samples at most, unless `every` is given
JUDGED = 64  # images on which errors are measured
WRITTEN = ("vae.png", "vae_loss.png", "loss.png", "results.json", "run.json")
SETTINGS = ("size", "space", "preset", "steps", "vae_steps", "batch", "lr", "ema", "flip")
SETTINGS += ("dropout", "dtype", "seed")
logger = logging.getLogger(__name__)


def train_from_scratch(
    data: Path,
    out: Path,
    config: TrainingConfig | None = None,
    device: str = "cpu",
    resume: bool = False,
) -> dict[str, Any]:
    """Train on the images of a folder, and write everything to `out`; returns what results.json
    says. resume: go on where an interrupted run stopped, with the same config, bit for bit.

    Nothing is written before all images are read; what is wrong with them is a UserError.
    """
    started = time.perf_counter()
    asked = config or TrainingConfig()
    check_folder(out, resume)
    folder = folders.opened(data, asked.layout, asked.caption_column)
    config = presets.completed(asked, len(folder.files), folder.side, device)
    model = model_of(config, folder, device)
    images = folders.read(folder, data, config.size, config.validation, config.seed)
    run = identity(asked, images, model)
    steps = steps_before(out, run) if resume else None
    describe(folder, images, config, model)
    if steps is None:
        steps = planned(model, images, config, started)
        write_run(out, run, steps)
    config = with_steps(config, *steps)

    # The VAE learns to compress images, and is frozen; latents are made once.
    speeds = {}
    if config.vae_steps:
        speed = vae_stage(model, images, config).run(out, resume)
        speeds = {f"vae_{name}": value for name, value in speed.items()}
        model.vae.measure_scale(of_model(images, images.training[:256], device))
        seen = of_model(images, (images.held_out or images.training)[:8], device)
        sides = {"image": seen, "through the VAE": model.decode(model.vae.encode(seen))}
        plots.strip(sides, [], out / "vae.png")
        plots.loss(read_log(out / "training" / "vae"), out / "vae_loss.png")
    model.vae.requires_grad_(False).eval()
    examples, contexts = encoded(model, images, config, out)

    # The denoiser learns, and the text encoder with it.
    stage = model_stage(model, examples, config, contexts)
    ema = EMA(stage.module, config.ema)
    text = ema.average["text"] if "text" in ema.average else model.text
    average = assembled(model.vae, text, ema.average["denoiser"], config)
    speeds |= stage.run(out, resume, ema, partial(show, average, images, config, out))
    log = read_log(out / "training" / "model")
    plots.loss(log, out / "loss.png")
    results = {
        "minutes": round((time.perf_counter() - started) / 60, 2),
        "resumed": resume,
        "images": len(images.training),
        "held_out": len(images.held_out),
        "layout": folder.layout,
        "device": device,
        **{name: getattr(config, name) for name in SETTINGS},
        "unet_million_parameters": millions(model.unet),
        "prompts": images.prompts(),
        "loss": last_loss(log),
        **errors(average, images, config.seed),
        **speeds,
    }
    write_results(out, **results)
    return results


def check_folder(out: Path, resume: bool) -> None:
    """Raise a UserError rather than continue by mistake or overwrite other files."""
    atomic.clean(out)
    trained, drawn = (out / "training").exists(), (out / "model").exists()
    if (trained or drawn) and not resume:
        raise UserError(f"{out} holds a training already; `resume` it, or choose another `out`.")
    if drawn and not trained:
        raise UserError(f"{out / 'model'} has no training to go on with; choose another `out`.")
    for path in (*(out / name for name in WRITTEN), *out.glob("samples-*.png")):
        atomic.check(path, atomic.unsigned)
    atomic.check(out / "model", foreign)


def model_of(config: TrainingConfig, folder: folders.Folder, device: str) -> LatentDiffusion:
    """The parts put together: given ones frozen, others with random weights."""
    torch.manual_seed(config.seed)
    if config.space == "pixels":
        vae = Pixels()
    elif config.vae:
        vae = part(config.vae, "vae", torch.float32)
    else:
        vae = presets.vae_of(config)
    if folder.layout == "pictures":
        text = Unconditional()
    elif config.text:
        text = part(config.text, "text", torch.float32).requires_grad_(False)
    else:
        text = presets.text_of(config, getattr(folder.files, "alternatives", []))
    if config.text and text.dim is None:
        raise UserError(f"{config.text} has no text encoder; name a model that reads prompts.")
    if isinstance(text, CLIPPair | FluxText):
        what = "text encoders give more than vectors of words, which a network trained here reads"
        raise UserError(f"{config.text}: its {what}; name a model of Stable Diffusion 1 or 2.")
    denoiser = presets.denoiser_of(config, vae.latent_channels, vae.factor, text.dim)
    model = assembled(vae, text, denoiser, config)
    return model.to(device, memory_format=torch.channels_last)


def assembled(
    vae: nn.Module, text: nn.Module, denoiser: nn.Module, config: TrainingConfig
) -> LatentDiffusion:
    return LatentDiffusion(vae, text, denoiser, config.size, config.dropout, GUIDANCE)


def describe(
    folder: folders.Folder, images: Images, config: TrainingConfig, model: LatentDiffusion
) -> None:
    """Say what is trained, and on what."""
    kind = "with captions"
    if folder.layout == "pictures":
        kind = "without captions: no prompt will steer the model"
    elif folder.layout == "classes":
        kind = f'in {len(folder.files.classes)} classes, as "{images.prompts()[0]}"'
    side = config.size // model.vae.factor
    shape = f"{config.size}x{config.size}"
    shape += "" if side == config.size else f", latents {side}x{side}x{model.vae.latent_channels}"
    count = f"{len(images.training)} images to train on, {len(images.held_out)} held out"
    networks = f"U-Net {millions(model.unet)} M weights, text encoder {millions(model.text)} M"
    logger.info("%s, %s; %s", count, kind, shape)
    logger.info("preset %s: %s; %s a step", config.preset, networks, config.batch)


def millions(network: nn.Module) -> float:
    return round(sum(p.numel() for p in network.parameters()) / 1e6, 2)


def identity(asked: TrainingConfig, images: Images, model: LatentDiffusion) -> dict[str, Any]:
    """What a run is resumed with, or not at all: the settings, the images, and given weights."""
    given = {name: getattr(model, name) for name in ("vae", "text") if getattr(asked, name)}
    weights = {f"weights of `{name}`": fingerprint(network) for name, network in given.items()}
    return {**asked.identity(), "images": images.fingerprint(), **weights}


def steps_before(out: Path, run: dict[str, Any]) -> tuple[int, int] | None:
    """The steps of the model and of the VAE that a run was started with; None where none was."""
    file = out / "run.json"
    if not file.exists() and not (out / "training").exists():
        return None
    content = files.read_json(file)
    before, steps = content.get("run"), content.get("steps")
    if not (isinstance(before, dict) and fits(steps, tuple[int, int])):
        raise UserError(f"{file} is not of a training from scratch; choose another `out`.")
    for name in {**run, **before}:
        if (old := before.get(name)) != (new := run.get(name)):
            raise UserError(
                f"{file}: the run was started with {name} {old}, not {new}; resume it with the "
                "same, or choose another `out`."
            )
    return steps[0], steps[1]


def write_run(out: Path, run: dict[str, Any], steps: tuple[int, int]) -> None:
    whole = {"about": atomic.SIGNATURE, "run": run, "steps": steps}
    with atomic.write(out / "run.json", atomic.unsigned) as new:
        new.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")


def planned(
    model: LatentDiffusion, images: Images, config: TrainingConfig, started: float
) -> tuple[int, int]:
    """The steps of the model and of the VAE. Measures a few of each, and says how long all take."""
    n, f = 2 * config.batch, model.vae.factor
    noise = torch.randn(n, model.vae.latent_channels, config.size // f, config.size // f)
    stage = model_stage(model, Examples(noise, (images.captions * n)[:n], False), config)
    step, vae_step = stage.seconds(), 0.0
    if trains_vae(config):
        vae_step = vae_stage(model, images, config).seconds()
    if config.minutes is not None:
        left = 60 * config.minutes - (time.perf_counter() - started)
        share = VAE_SHARE if vae_step else 0.0
        steps = max(10, int(left * (1 - share) / (1.1 * step)))
        vae_steps = max(10, int(left * share / vae_step)) if vae_step else 0
    else:
        steps = config.steps or presets.default_steps(config, len(images.training))
        vae_steps = (config.vae_steps or max(1, steps // 2)) if vae_step else 0
    grids = -(-steps // (config.every or every_default(config, steps)))
    seconds = (steps + grids * grid_steps(config)) * step + vae_steps * vae_step
    of_vae = f"{vae_steps} of the VAE, " if vae_steps else ""
    seen = f"each image seen {steps * config.batch / len(images.training):.3g} times"
    logger.info("about %.2g minutes: %s%s steps; %s", seconds / 60, of_vae, steps, seen)
    return steps, vae_steps


def grid_steps(config: TrainingConfig) -> float:
    """What a grid of samples takes, in training steps: with guidance a sampling step is two passes
    forward, a third of a step each."""
    return folders.PROMPTS * SAMPLING_STEPS * 2 / 3 / config.batch


def every_default(config: TrainingConfig, steps: int) -> int:
    """A tenth of all steps; more where samples would take longer than a tenth of the time."""
    return max(1, steps // GRIDS, int(10 * grid_steps(config)))


def trains_vae(config: TrainingConfig) -> bool:
    return config.space == "latents" and config.vae is None


def with_steps(config: TrainingConfig, steps: int, vae_steps: int) -> TrainingConfig:
    """The config with the steps, and what depends on them, filled in."""
    every = config.every or every_default(config, steps)
    ema = config.ema or min(max(0.5, 1 - 10 / steps), 0.9999)
    filled = {"steps": steps, "vae_steps": vae_steps or None, "minutes": None}
    return replace(config, every=every, ema=ema, **filled)


def of_model(
    images: Images, chosen: list[int], device: str | torch.device
) -> Float[Tensor, "B 3 S S"]:
    """These images in [-1, 1]."""
    return to_model(images.pixels[chosen]).to(device)


def encoded(
    model: LatentDiffusion, images: Images, config: TrainingConfig, out: Path
) -> tuple[Examples, dict[str, Tensor] | None]:
    """What is denoised; and the contexts of all captions, where the text encoder is given."""
    captions, contexts = [images.captions[i] for i in images.training], None
    if config.text:
        contexts = encode_captions(model.text, list(chain(*captions)), out / "cache")
    if config.space == "pixels":
        return Examples(images.pixels[images.training], captions, config.flip), contexts
    latents = latents_of(model, images, config.flip, out / "cache" / "latents.safetensors")
    return Examples(latents, captions * (2 if config.flip else 1), False), contexts


@torch.no_grad()
def latents_of(
    model: LatentDiffusion, images: Images, flip: bool, file: Path
) -> Float[Tensor, "M Z h w"]:
    """Those of all images to train on, then of their mirror images; stored in the file, and read
    from it where images and VAE are the same."""
    key = f"{fingerprint(model.vae)}, {images.fingerprint()}, {images.training}, {flip}"
    key = hashlib.sha256(key.encode()).hexdigest()
    if file.exists() and files.metadata(file).get("checksum") == key:
        return files.tensors(file)["latents"]
    latents, pixels = [], images.pixels[images.training]
    for mirrored in (False, True) if flip else (False,):
        for some in tqdm(pixels.split(32), "encoding images", unit="batch", leave=False):
            x = to_model(some.flip(-1) if mirrored else some)
            latents.append(model.vae.encode(x.to(model.device)).cpu())
    latents = torch.cat(latents).contiguous()
    if not latents.isfinite().all():
        raise UserError("latents are not finite; train the VAE in fp32, or give another `vae`.")
    with atomic.write(file, foreign_latents) as new:
        save_file({"latents": latents}, new, {"checksum": key})
    return latents


def show(
    average: LatentDiffusion, images: Images, config: TrainingConfig, out: Path, step: int
) -> None:
    """At the steps that are due, save the averaged model, and draw the same prompts with the same
    noise."""
    if step % config.every and step != config.steps:
        return
    average.save(out / "model")
    prompts = images.prompts()
    samples = pipeline.generate(average, prompts, SampleConfig(SAMPLING_STEPS, seed=config.seed))
    captions = prompts if any(prompts) else None
    path = out / f"samples-{step:06d}.png"
    plots.grid(samples, captions, path, columns=4, title=f"step {step} of {config.steps}")


@torch.no_grad()
def errors(model: LatentDiffusion, images: Images, seed: int) -> dict[str, float | None]:
    """The mean squared error of the estimate of x0 at the same times and noise, on images trained
    on and on held-out ones: far apart where a model learns by heart. And the VAE's own error."""
    found: dict[str, float | None] = {}
    for name, indices in (("training", images.training), ("held_out", images.held_out)):
        chosen = indices[:JUDGED]
        if not chosen:
            continue
        pixels = of_model(images, chosen, model.device)
        x0, generator = model.vae.encode(pixels), generator_of(seed, 0)
        eps = torch.randn(x0.shape, generator=generator).to(x0)
        t = model.schedule.sample_t(len(x0), generator)
        context = model.text.encode([images.captions[i][0] for i in chosen])
        estimate = model.denoiser(model.schedule.mix(x0, eps, t), t, context).x0
        found[f"error_{name}"] = round((estimate - x0).square().mean().item(), 5)
        if model.vae.factor > 1:
            rebuilt = model.decode(x0).clamp(-1, 1)
            psnr = -10 * ((rebuilt - pixels) / 2).square().mean().log10()
            found[f"vae_psnr_db_{name}"] = round(psnr.item(), 2)
    return found
