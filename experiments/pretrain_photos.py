"""A text-to-image model of 64x64 photographs, trained in stretches that add up over days and
machines.

    python experiments/pretrain_photos.py --data photos --minutes 60 --out out/photos
    python experiments/pretrain_photos.py --data photos --minutes 60 --out out/more \\
        --model minidiff/photos                              # the next stretch
    python experiments/pretrain_photos.py --data photos --stage vae --out out/photos    # this far

Three acts: a VAE learns to compress photographs, a text encoder to tell from a caption what it
names, a U-Net to denoise latents with both frozen. The first stretch has all three, a later one
the third alone: it takes the weights of a model folder as they stand (float16) and warms up, so
nothing but that folder has to travel. Data: shards with labels, or a folder with captions.
Writes model/ (float16), curve.csv (quality against operations: the rows of all stretches),
samples.png, loss.png and results.json. Ctrl-C saves; --resume goes on.

[1] Rombach et al. High-Resolution Image Synthesis with Latent Diffusion Models. arXiv:2112.10752
[2] Esser et al. Scaling Rectified Flow Transformers for High-Resolution Image Synthesis. 2024.
    arXiv:2403.03206
"""

import copy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from photo_latents import (
    T_CENTRE,
    Curve,
    ModelLoss,
    Samples,
    Stored,
    held_out_loss,
    judged,
    read_curve,
    stored,
)
from photo_parts import (
    LATENT_CHANNELS,
    SIZE,
    Photos,
    config_of,
    photos,
    text_act,
    through,
    vae_act,
)
from tqdm import tqdm

from minidiff import schedules
from minidiff.checkpoints.folder import DTYPES
from minidiff.cli.script import run
from minidiff.data.folder import to_model
from minidiff.denoiser import Denoiser
from minidiff.errors import UserError
from minidiff.figures import plots
from minidiff.latent_diffusion import LatentDiffusion
from minidiff.options.finetuning import Precision
from minidiff.recipes import plan as plans
from minidiff.recipes.plan import Act, Plan, cost
from minidiff.recipes.stages import observed
from minidiff.train import EMA, train
from minidiff.training.device import pick_device, plain_attention
from minidiff.training.progress import duration, follow, last_loss, write_results
from minidiff.training.resume import read_log
from minidiff.training.seeds import seed_of
from minidiff.unet import UNet, UNetConfig

Stage = Literal["vae", "text", "unet"]

GUIDANCE = 3.0
POINTS = 6  # rows of the curve in a stretch


def unet_photos() -> UNet:
    """Three levels, 16x16 to 4x4; attention at 4x4 alone, for a CPU's hours go further without that at
    8x8."""
    levels = {"channels": (48, 96, 144), "depth": (0, 0, 1), "heads": (1, 2, 3)}
    z, text = LATENT_CHANNELS, {"context_dim": 64, "pooled": True, "scale_shift": True}
    return UNet(UNetConfig(z, z, blocks=1, ff_mult=2, groups=16, **levels, **text))


@dataclass(frozen=True)
class Options:
    """What the acts are told."""

    stage: Stage
    minutes: float
    steps: int | None
    vae_steps: int
    text_steps: int
    batch: int
    lr: float
    each: int
    autocast: torch.dtype | None
    device: str
    seed: int
    resume: bool


# The acts.


def first_parts(
    train_set: Photos, out: Path, options: Options, held_out: Photos
) -> tuple[LatentDiffusion | None, dict[str, float]]:
    """A VAE, a text encoder and a U-Net that has learnt nothing; None if the run ends before. And
    the operations that they cost, and what the VAE gives back."""
    dtype, device = options.autocast, options.device
    act = vae_act(train_set, options.vae_steps, options.seed, dtype, device)
    figures = {"vae_tflop": trained(act, out / "training" / "vae", options.resume)}
    vae = act.module.requires_grad_(False).eval()
    vae.measure_scale(to_model(train_set.pixels[:512]).to(device))
    figures |= through(vae, held_out)
    print(f"VAE, on held-out pictures: {figures}", flush=True)
    if options.stage == "vae":
        return None, figures

    things = sorted(set(train_set.labels or [""]))
    act = text_act(things, options.text_steps, options.seed, device)
    figures["text_tflop"] = 0.0
    if train_set.labels is not None:  # else its words keep random vectors, a bag of words
        figures["text_tflop"] = trained(act, out / "training" / "text", options.resume)
    if options.stage == "text":
        return None, figures

    torch.manual_seed(options.seed + 1)
    denoiser = Denoiser(unet_photos(), schedules.Flow(mean=T_CENTRE), target="flow")
    text = act.module.requires_grad_(False).eval()
    model = LatentDiffusion(vae, text, denoiser, SIZE, guidance=GUIDANCE, sampler="ddim")
    return model.to(device), figures


def trained(act: Act, folder: Path, resume: bool) -> float:
    """Run an act, and return the TFLOP it took."""
    weights = copy.deepcopy(act.module.state_dict())
    step = cost(act)
    act.module.load_state_dict(weights)
    steps = act.config.steps
    print(f"{act.title}: about {duration(steps * step.seconds)} for {steps} steps", flush=True)
    follow(
        train(act.loss, act.module, act.batches, act.config, act.ema, folder, resume),
        act.title,
        steps,
    )
    return round(steps * step.flops / 1e12, 3)


class Watch:
    """Measures the average of the weights a few times in a stretch, and writes the model folder;
    called after every step."""

    def __init__(
        self,
        average: LatentDiffusion,
        held_out: Stored,
        curve: Curve,
        options: Options,
        steps: int,
        flops: int,
    ):
        self.average, self.held_out, self.curve, self.options = average, held_out, curve, options
        self.steps, self.flops = steps, flops
        self.samples: Samples | None = None

    def __call__(self, step: int) -> None:
        if step % -(-self.steps // POINTS) and step != self.steps:
            return
        options, average = self.options, self.average
        each = options.each if step == self.steps else min(1, options.each)
        kind, dtype = average.device.type, options.autocast
        with torch.autocast(kind, dtype, enabled=dtype is not None):
            self.samples = judged(average, self.held_out, each, options.seed)
        verdicts = self.samples.verdicts if self.samples else []
        row = self.curve.add(
            step,
            options.batch,
            self.flops,
            held_out_loss(average, self.held_out),
            verdicts,
        )
        copy.deepcopy(average).half().save(self.curve.file.parent / "model")
        tqdm.write(f"step {step}: {row}")


def stretch(
    model: LatentDiffusion, train_set: Stored, held_out: Stored, curve: Curve, options: Options
) -> tuple[dict[str, object], Samples | None]:
    """The U-Net learns for some minutes: a short warm-up, then half a cosine to 0. The average of
    its weights is measured and saved."""
    folder, seed = curve.file.parent / "training", seed_of(options.seed, curve.stretch)
    model.vae.requires_grad_(False)
    model.text.requires_grad_(False)
    model.denoiser.requires_grad_(True)
    data = partial(train_set.batches, options.batch, model.dropout, seed)
    config = config_of(options.steps or 1000, options.lr, seed, options.autocast, warmup=200)
    act = Act("U-Net", model, ModelLoss(model), data, config)
    weights = copy.deepcopy(model.state_dict())
    step_cost = cost(act)
    model.load_state_dict(weights)
    file = folder / "steps.json"
    if options.resume and file.exists():
        steps = plans.read(file, 1).steps[0]
    else:
        rest = POINTS * 20 if options.each else 0  # seconds of judging
        fit = max(1, round(max(0, 60 * options.minutes - rest) / step_cost.seconds))
        steps = options.steps or fit
        folder.mkdir(parents=True, exist_ok=True)
        Plan([steps], options.minutes).write(file)
    told = duration(steps * step_cost.seconds)
    print(f"U-Net, stretch {curve.stretch}: about {told} for {steps} steps", flush=True)

    ema = EMA(model, decay=min(0.999, 1 - 10 / (steps + 10)))
    config = replace(config, steps=steps, warmup=min(200, steps // 10))
    watch = Watch(ema.average, held_out, curve, options, steps, step_cost.flops)
    training = train(act.loss, model, data, config, ema, folder / "unet", options.resume)
    speed = follow(observed(training, watch), "U-Net", steps, options.batch)
    results = {"steps": steps, "gflop_a_step": round(step_cost.flops / 1e9, 2), **speed}
    return results, watch.samples


def work(data: Path, out: Path, model: Path | None, pictures: int | None, options: Options) -> None:
    """All acts, and what they leave."""
    train_set, held_out = (photos(data, part, pictures) for part in ("train", "held_out"))
    before = read_curve(model / "curve.csv") if model else []
    if model is None:
        network, figures = first_parts(train_set, out, options, held_out)
        if network is None:
            print(write_results(out, stage=options.stage, seed=options.seed, **figures))
            return
    else:
        if options.stage != "unet":
            raise UserError(f"{model} has its VAE and text encoder; leave `stage` out.")
        network, figures = LatentDiffusion.load(model, options.device), {}
    both = [
        stored(network, of, out / "training" / f"latents_{name}.safetensors", options.autocast)
        for name, of in (("train", train_set), ("held_out", held_out))
    ]
    tflop = sum(value for name, value in figures.items() if name.endswith("tflop"))
    curve = Curve(before, out / "curve.csv", tflop)
    results, drawn = stretch(network, *both, curve, options)

    if drawn is not None:
        chosen = list(range(min(24, len(drawn.captions))))
        marks = [drawn.verdicts[k] for k in chosen]
        captions = [drawn.captions[k] for k in chosen]
        print(plots.grid(drawn.images[chosen], captions, out / "samples.png", 6, marks=marks))
    log = read_log(out / "training" / "unet")
    print(out / "model", curve.file, plots.loss(log, out / "loss.png"), sep="\n")
    settings = {name: getattr(options, name) for name in ("batch", "lr", "autocast", "seed")}
    settings["stretch"] = curve.stretch
    last = {k: v for k, v in curve.rows[-1].items() if k not in ("stretch", "step")}
    megabytes = sum(file.stat().st_size for file in (out / "model").iterdir()) / 1e6
    results = {**settings, **figures, **results, **last, "megabytes": round(megabytes, 2)}
    print(write_results(out, **results, loss=last_loss(log)))
    print(f"after {last['tflop']:.1f} TFLOP: held-out loss {last['held_out_loss']:.4f}, ", end="")
    print(f"the judge takes {last['accuracy']} of {last['n']} samples for what was asked for")


OUTPUTS = ("model", "curve.csv", "samples.png", "loss.png")  # beside results.json


def main(
    data: Path,
    out: Path = Path("out/photos"),
    model: Path | None = None,
    stage: Stage = "unet",
    minutes: float = 60.0,
    steps: int | None = None,
    vae_steps: int = 3500,
    text_steps: int = 800,
    batch: int = 32,
    lr: float = 2e-3,
    each: int = 4,
    pictures: int | None = None,
    dtype: Precision = "fp32",
    device: str = "cpu",
    seed: int = 0,
    resume: bool = False,
) -> None:
    """Train a model of photographs, or train it on.

    Args:
        data: train-*.tar and held_out-*.tar, or a folder with captions.
        out: folder for everything written.
        model: go on from this model folder, and from curve.csv in it. Default: from nothing.
        stage: the last act to run: vae, text or unet.
        minutes: how long the U-Net learns here; as many steps are planned as fit.
        steps: training steps of the U-Net. Default: those that fit.
        vae_steps: training steps of the VAE.
        text_steps: training steps of the text encoder.
        batch: pictures in a step of the U-Net.
        lr: peak learning rate of its optimizer, Muon.
        each: samples of each thing that the judge sees at the end.
        pictures: use only so many, of training and of held-out ones.
        dtype: precision to compute in; bf16 is faster where the processor has it.
        device: auto, cpu or cuda.
        seed: everything random follows from it, and from the number of the stretch.
        resume: go on where an interrupted run stopped.
    """
    if device == "cpu":
        torch.set_num_threads(1)
    autocast = None if dtype == "fp32" else DTYPES[dtype]
    options = Options(
        stage,
        minutes,
        steps,
        vae_steps,
        text_steps,
        batch,
        lr,
        each,
        autocast,
        pick_device(device),
        seed,
        resume,
    )
    with plain_attention(options.device, autocast):
        work(data, out, model, pictures, options)


if __name__ == "__main__":
    run(main, OUTPUTS)
