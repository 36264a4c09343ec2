"""Text to image from nothing, on your own pictures: a VAE, then latent diffusion with a text tower,
until it can draw its training captions.

    python experiments/text_to_image.py --data FOLDER [--prompts "A large white bowl of many green
apples."]

FOLDER holds pictures and a metadata.jsonl (minidiff data coco makes one of COCO's files). With a
hundred pictures this is memorisation, on purpose: every part of Stable Diffusion at work on a CPU,
with an answer that can be checked. Writes model/, generated.png, real_vs_generated.png, reverse.png
and .gif, the losses and results.json. Ctrl-C saves; --resume goes on, bit for bit.
"""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from pathlib import Path

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from minidiff import pipeline, samplers, schedules
from minidiff.cli.script import run
from minidiff.data.folder import CaptionedFolder, load_all, to_model
from minidiff.denoiser import Denoiser
from minidiff.errors import UserError
from minidiff.figures import chains, plots
from minidiff.latent_diffusion import LatentDiffusion
from minidiff.options.sampling import SampleConfig, check_size
from minidiff.text import CLIPText, TextConfig
from minidiff.train import EMA, Loss, TrainConfig, train
from minidiff.training.device import pick_device
from minidiff.training.progress import follow, last_loss, write_results
from minidiff.training.resume import read_log
from minidiff.training.seeds import generator_of
from minidiff.unet import UNet, UNetConfig
from minidiff.vae import VAE, VAEConfig


def rows(n: int, batch: int, seed: int, start: int) -> Iterator[Int[Tensor, "B"]]:
    """Which of n pictures make batch start, start + 1, ...; batch k follows from (seed, k)
    alone."""
    for k in count(
        start
    ):  # training seeds its noise with the steps from 0 up; the data takes the others
        yield torch.randint(n, (batch,), generator=generator_of(seed, -1 - k))


Half = tuple[Int[Tensor, "B"], Int[Tensor, "B"], Float[Tensor, "B Z h w"], Bool[Tensor, "B"]]


def halves(
    model: LatentDiffusion, latents: Float[Tensor, "N Z h w"], batch: int, seed: int, start: int
) -> Iterator[Half]:
    """Half batches start, start + 1, ... with all that is random about them, so that two can be
    learnt from at once: which of the pictures, t, the noise, and whose caption is hidden."""
    for k, chosen in enumerate(rows(len(latents), -(-batch // 2), seed, start), start):
        generator = generator_of(seed, k)
        t = model.schedule.sample_t(len(chosen), generator)
        eps = torch.randn(len(chosen), *latents.shape[1:], generator=generator)
        yield chosen, t, eps, torch.rand(len(chosen), generator=generator) < model.dropout


@torch.no_grad()
def in_parts(
    f: Callable[[Tensor], Tensor], x: Float[Tensor, "N _ _ _"]
) -> Float[Tensor, "N _ _ _"]:
    """f of a few at a time: a VAE needs much memory for each picture."""
    return torch.cat([f(part) for part in x.split(32)])


def distances(x: Float[Tensor, "N 3 H W"], y: Float[Tensor, "M 3 H W"]) -> Float[Tensor, "N M"]:
    """Root mean square difference of each x and each y, in grey levels 0 to 255."""
    return torch.cdist(x.flatten(1), y.flatten(1)) * 127.5 / x[0].numel() ** 0.5


def compare(
    drawn: Float[Tensor, "K 3 H W"],
    where: list[int],
    images: Float[Tensor, "N 3 H W"],
    decoded: Float[Tensor, "N 3 H W"],
) -> dict[str, float]:
    """How close pictures drawn from captions come to the training pictures `where`, and how close
    the VAE lets them come."""
    apart, between = distances(drawn, images), distances(images, images).fill_diagonal_(torch.inf)
    figures = {
        "vae_psnr_db": (-10 * ((decoded - images) / 2).pow(2).flatten(1).mean(1).log10())
        .mean()
        .item(),
        "nearest_training_picture_rms": apart.min(1).values.mean().item(),
        "two_training_pictures_rms": between.min(1)
        .values.mean()
        .item(),  # of a picture and the nearest other
        "nearest_is_the_captioned_one": (apart.argmin(1) == torch.tensor(where))
        .double()
        .mean()
        .item(),
    }
    return {name: round(value, 3) for name, value in figures.items()}


# beside results.json
OUTPUTS = ("generated.png", "real_vs_generated.png", "vae_loss.png", "loss.png", "model")


def main(
    data: Path,
    prompts: tuple[str, ...] = (),
    out: Path = Path("out/text_to_image"),
    size: int = 64,
    caption_column: str = "text",
    vae_width: int = 16,
    vae_steps: int = 2500,
    vae_batch: int = 8,
    vae_lr: float = 1.5e-3,
    width: int = 64,
    steps: int = 5000,
    batch: int = 16,
    lr: float = 1.5e-3,
    sampling_steps: int = 50,
    guidance: float = 2.0,
    judged: int = 48,
    device: str = "auto",
    bf16: bool | None = None,
    seed: int = 0,
    resume: bool = False,
) -> None:
    """Train a VAE and a text-to-image model on a captioned folder, then draw its captions.

    Args:
        data: the captioned folder.
        prompts: captions of the folder to show first; others are drawn too, but there is no picture
            to compare them with.
        out: folder for everything written.
        size: side of the pictures in pixels, a multiple of 32.
        caption_column: the column of metadata.jsonl that holds the caption.
        vae_width: channels of the VAE at full size; two and four times that below.
        vae_steps: its training steps.
        vae_batch: its pictures a step.
        vae_lr: its peak learning rate.
        width: channels of the U-Net at the latents' size, a multiple of 32; twice that at the two
            coarsest levels.
        steps: training steps of the text tower and the U-Net.
        batch: their pictures a step.
        lr: their peak learning rate.
        sampling_steps: DDIM steps.
        guidance: how strongly the text steers; 1 is off.
        judged: captions of the folder that are drawn and compared with its pictures.
        device: auto, cpu, cuda or mps.
        bf16: compute in bfloat16; left out, on CUDA only.
        seed: everything random follows from it.
        resume: go on where an interrupted run stopped.
    """
    if judged < 1:
        raise UserError(f"--judged is {judged}; it must be at least 1.")
    device = pick_device(device)
    how = dict(
        autocast=torch.bfloat16 if (device == "cuda" if bf16 is None else bf16) else None, seed=seed
    )
    place = dict(device=device, memory_format=torch.channels_last)

    # Build everything first, so that what does not fit is refused before the first step.
    torch.manual_seed(seed)
    vae = VAE(
        VAEConfig(3, 4, channels=(vae_width, 2 * vae_width, 4 * vae_width), blocks=1, groups=0)
    )  # 64x64x3 pictures to 16x16x4 latents
    text = CLIPText(TextConfig(width=128, layers=2, heads=4, context_length=48, words_only=True))
    heads = width // 32
    unet = UNet(
        UNetConfig(
            4,
            4,
            channels=(width, width, 2 * width, 2 * width),
            blocks=1,
            depth=(0, 1, 1, 1),
            heads=(heads, heads, 2 * heads, 2 * heads),
            context_dim=128,
            pooled=True,
            scale_shift=True,
        )
    )
    model = LatentDiffusion(
        vae,
        text,
        Denoiser(unet, schedules.cosine(), target="x0", weighting="learned"),
        size,
        guidance=guidance,
    ).to(**place)
    check_size(size, vae.factor * unet.multiple)
    pictures, captions = load_all(CaptionedFolder(data, size, caption_column), size)
    images = to_model(pictures)

    # Act one: the VAE learns to squeeze pictures.
    def vae_loss(chosen: Int[Tensor, "B"]) -> Loss:
        return {"loss": vae.loss(images[chosen].to(**place))}

    data, config = (
        partial(rows, len(images), vae_batch, seed + 1),
        TrainConfig(vae_steps, vae_lr, **how),
    )
    training = train(vae_loss, vae, data, config, folder=out / "training" / "vae", resume=resume)
    vae_speed = follow(training, "1/2 VAE", vae_steps, vae_batch)
    vae.requires_grad_(False).eval()
    vae.measure_scale(images[:256].to(**place))

    # Act two: the text tower and the U-Net learn to denoise its latents, which are made once.
    latents = in_parts(lambda part: vae.encode(part.to(**place)).cpu(), images)
    ema = EMA(model, decay=0.995)

    def loss(half: Half) -> Loss:
        chosen, t, eps, hidden = half
        context = model.text.encode(
            ["" if h else captions[i] for i, h in zip(chosen.tolist(), hidden, strict=True)]
        )
        each = model.denoiser.loss(latents[chosen].to(**place), context, t, eps.to(**place))
        return {"loss": each, "progress": model.schedule.progress(t)}

    both = dict(
        accumulate=2, threads=2 if device == "cpu" and torch.get_num_threads() > 1 else 1
    )  # two halves of a batch, on two cores
    data, config = (
        partial(halves, model, latents, batch, seed),
        TrainConfig(steps, lr, **both, **how),
    )
    training = train(loss, model, data, config, ema, out / "training" / "model", resume)
    speed = follow(training, "2/2 text to image", steps, batch)
    model = ema.average
    print(model.save(out / "model"))

    # Draw what was asked for, and captions of the folder, spread evenly.
    config, judged = SampleConfig(sampling_steps, seed=seed), min(judged, len(captions))
    wanted = list(
        dict.fromkeys([*prompts, *(captions[i * len(captions) // judged] for i in range(judged))])
    )
    drawn = pipeline.generate(model, wanted, config, progress=True).cpu()
    print(
        plots.grid(
            drawn[: max(8, len(prompts))],
            wanted[: max(8, len(prompts))],
            out / "generated.png",
            columns=4,
        )
    )
    frames = list(
        model.sample(wanted[:4], generator=samplers.Normal.seeded(seed, range(4)), config=config)
    )
    for path in chains.plot_reverse(model, frames, wanted[:4], out):
        print(path)

    # Set them beside the pictures whose captions they are.
    decoded = in_parts(lambda part: vae.decode(part.to(device)).clamp(-1, 1).cpu(), latents)
    known = [k for k, caption in enumerate(wanted) if caption in captions]
    where = [captions.index(wanted[k]) for k in known]
    sides = {
        "real": images[where[:8]],
        "through the VAE": decoded[where[:8]],
        "generated": drawn[known[:8]],
    }
    print(plots.strip(sides, [wanted[k] for k in known[:8]], out / "real_vs_generated.png"))
    figures = compare(drawn[known], where, images, decoded)

    logs = {name: read_log(out / "training" / name) for name in ("vae", "model")}
    print(plots.loss(logs["vae"], out / "vae_loss.png"))
    print(plots.loss(logs["model"], out / "loss.png"))
    made = dict(
        pictures=len(images),
        size=size,
        vae_steps=vae_steps,
        steps=steps,
        batch=batch,
        lr=lr,
        guidance=guidance,
        seed=seed,
        device=device,
    )
    speeds = {
        "vae_seconds": vae_speed["seconds"],
        "vae_images_per_second": vae_speed["images_per_second"],
        **speed,
    }
    losses = {"vae_loss": last_loss(logs["vae"]), "loss": last_loss(logs["model"])}
    print(write_results(out, **made, judged=len(known), **figures, **losses, **speeds))
    print(", ".join(f"{name} {value:g}" for name, value in figures.items()))


if __name__ == "__main__":
    run(main, OUTPUTS)
