"""The models in which traps.py sets its traps, and the pictures that they draw.

Each is made of the box on one CPU core, once: a transformer and a ControlNet learn to draw with its
VAE and text encoder. What they learn is kept in files, and every picture begins with reading them.

[1] Esser et al. Scaling Rectified Flow Transformers for High-Resolution Image Synthesis. 2024.
    arXiv:2403.03206
"""

import copy
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import NamedTuple

import torch
from controlnet import pairs_of_world
from jaxtyping import Float
from museum_pictures import SEED, Picture, box, drawn, samples, tiled
from safetensors.torch import load_file, save_file
from torch import Tensor

from minidiff import pipeline
from minidiff.checkpoints import controlnet as controlnet_files
from minidiff.checkpoints import names, names_flow, parts, write
from minidiff.checkpoints.files import checked
from minidiff.cli.generate import GenerateOptions, controlled_by
from minidiff.conditioners import CLIPPair, PairConfig
from minidiff.data.world import Scene, World
from minidiff.denoiser import Denoiser
from minidiff.figures import plots
from minidiff.finetuning.controlnet import train_controlnet
from minidiff.latent_diffusion import LatentDiffusion
from minidiff.methods.controlnet import copy_of, outlines
from minidiff.mmdit import MMDiT, MMDiTConfig
from minidiff.options.sampling import SampleConfig, Size
from minidiff.recipes.quickstart import COLOURS, MOMENTUM, SHAPES
from minidiff.schedules import Flow
from minidiff.train import EMA, Loss, TrainConfig, train
from minidiff.training import atomic
from minidiff.training.progress import follow
from minidiff.training.seeds import generator_of

Images = Float[Tensor, "N 3 H W"]
SIDE = 32  # of an image, in pixels
DRAWN = 32  # at once
LENGTH = 8  # tokens of a caption, with start and end
TRANSFORMER = MMDiTConfig(
    width=96, joint=3, heads=4, context_dim=64, pooled_dim=64, in_channels=4, out_channels=4,
    qk_norm=True, table=12,
)  # fmt: skip
ASKED = (
    "a large red circle on white",
    "a small blue square on gray",
    "a large yellow triangle on black",
    "a small green circle on pink",
)


def world() -> World:
    return World(SIDE, SHAPES, COLOURS)


def caption_of(scene: Scene) -> str:
    """Always the same few words in the same order."""
    thing = scene.things[0]
    return f"a {thing.size} {thing.colour} {thing.shape} on {scene.background}"


class Batch(NamedTuple):
    """Examples with everything random about them."""

    latents: Float[Tensor, "B Z h w"]
    captions: list[str]  # "" where the caption is hidden
    t: Tensor
    eps: Float[Tensor, "B Z h w"]


class Pool:
    """Captioned latents of images with one thing."""

    def __init__(self, count: int, seed: int):
        self.seed, latents = seed, []
        self.captions: list[str] = []
        for k in range(0, count, DRAWN):
            images, _, scenes = world().batch(DRAWN, f"traps {seed} {k}", objects=1)
            self.captions += [caption_of(scene) for scene in scenes]
            with torch.no_grad():
                latents.append(box().vae.encode(images))
        self.latents = torch.cat(latents)

    def batches(self, model: LatentDiffusion, batch: int, start: int) -> Iterator[Batch]:
        for k in count(start):
            generator = generator_of(self.seed, k)
            rows = torch.randint(len(self.latents), (batch,), generator=generator)
            hide = (torch.rand(batch, generator=generator) < model.dropout).tolist()
            pairs = zip(rows.tolist(), hide, strict=True)
            captions = ["" if hidden else self.captions[i] for i, hidden in pairs]
            t, latents = model.schedule.sample_t(batch, generator), self.latents[rows]
            eps = torch.randn(latents.shape, generator=generator)
            yield Batch(latents, captions, t, eps)


def loss(model: LatentDiffusion, batch: Batch) -> Loss:
    with torch.no_grad():
        condition = model.text.encode(batch.captions)
    each = model.denoiser.loss(batch.latents, condition, batch.t, batch.eps)
    return {"loss": each, "progress": model.schedule.progress(batch.t)}


def text_encoder() -> CLIPPair:
    """The box's in the place of CLIP-G, with a map of the pooled vector that turns it at random:
    the box has none, and no other text encoder is trained here."""
    config = replace(box().text.config, projection=box().text.dim, context_length=LENGTH)
    text = CLIPPair(PairConfig(None, config))
    state = box().text.state_dict()
    state["position_embedding.weight"] = state["position_embedding.weight"][:LENGTH]
    torch.manual_seed(0)
    state["projection.weight"] = torch.nn.init.orthogonal_(torch.empty(text.dim, text.dim))
    text.clip_g.load_state_dict(state)
    return text.requires_grad_(False).eval()


def transformer() -> LatentDiffusion:
    """SD3's parts, small and untrained: [1] with patches of 2x2, flow, and times shifted by 3."""
    torch.manual_seed(1)
    denoiser = Denoiser(MMDiT(TRANSFORMER), Flow(shift=3.0), "flow")
    return LatentDiffusion(
        box().vae, text_encoder(), denoiser, SIDE, guidance=2.0, spacing="shifted"
    )


class Training(NamedTuple):
    title: str
    images: int  # to learn from
    steps: int
    batch: int
    lr: float
    minutes: float  # of one core, as measured


TRAININGS = {
    "transformer": Training("a transformer learns to draw", 4096, 2400, 32, 3e-3, 6),
    "controlnet": Training("a ControlNet learns to read outlines", 6000, 1200, 16, 1e-3, 3),
}


class Toys:
    """The models in a folder, taught where it does not have them yet, and what they draw.

    share: of the images and the steps of training, to try it out. controlnet: a file of
    experiments/controlnet.py, which teaches one in the same way."""

    def __init__(
        self, out: Path, share: float = 1.0, seed: int = 0, controlnet: Path | None = None
    ):
        self.out, self.share, self.seed = out, share, seed
        self.files = {name: out / f"{name}.safetensors" for name in TRAININGS}
        if controlnet is not None:
            self.files["controlnet"] = checked(controlnet)

    def file(self, name: str) -> Path:
        """Of a model, which learns first if need be."""
        path = self.files[name]
        if not path.exists():
            learn: Callable[[Path], None] = getattr(self, f"learn_{name}")
            learn(path)
        return path

    def minutes(self) -> float:
        """How long those that are not there yet will learn."""
        absent = [plan for name, plan in TRAININGS.items() if not self.files[name].exists()]
        return self.share * sum(plan.minutes for plan in absent)

    def plan(self, name: str) -> Training:
        """This share of it."""
        whole = TRAININGS[name]
        images, steps = (max(2, round(self.share * n)) for n in (whole.images, whole.steps))
        return whole._replace(images=images, steps=steps)

    def folder(self, name: str) -> tuple[Path, bool]:
        """Of a training, and whether one was begun there."""
        folder = self.out / "training" / name
        return folder, (folder / "log.jsonl").exists()

    def learn_transformer(self, path: Path) -> None:
        pool = Pool(self.plan("transformer").images, self.seed)
        state = self.average("transformer", transformer(), pool)
        self.save(names_flow.write(state, names_flow.SD3_DIFFUSERS), path)

    def average(self, name: str, model: LatentDiffusion, pool: Pool) -> dict[str, Tensor]:
        """The average of the network's weights during its training."""
        plan = self.plan(name)
        model.requires_grad_(False)
        network = model.unet.requires_grad_(True)
        config = TrainConfig(
            plan.steps,
            plan.lr,
            min(50, plan.steps // 8),
            optimizer="muon",
            betas=MOMENTUM,
            seed=self.seed,
        )
        stream, ema = partial(pool.batches, model, plan.batch), EMA(network, 0.998)
        place, learnt = self.folder(name), partial(loss, model)
        follow(train(learnt, network, stream, config, ema, *place), plan.title, plan.steps)
        return ema.average.state_dict()

    def learn_controlnet(self, path: Path) -> None:
        plan = self.plan("controlnet")
        pairs = pairs_of_world(box(), world(), plan.images, self.seed)
        torch.manual_seed(self.seed)
        network = copy_of(box().unet, box().vae.factor)
        config, place = TrainConfig(plan.steps, plan.lr, seed=self.seed), self.folder("controlnet")
        training = train_controlnet(box(), network, pairs, config, plan.batch, 0.5, *place)
        follow(training, plan.title, plan.steps)
        controlnet_files.save(network, path)

    def save(self, state: dict[str, Tensor], path: Path) -> None:
        state = {name: value.contiguous() for name, value in state.items()}
        with atomic.write(path, atomic.unsigned) as new:
            save_file(state, new, {"format": "pt", "software": atomic.SIGNATURE})

    # Pictures.

    def box(self) -> Picture:
        return samples()

    def asked(self) -> Picture:
        """Of the transformer, read from a file in diffusers' names, and with a text encoder in
        open_clip's; in ten steps."""
        model = transformer()
        state = load_file(self.file("transformer"))
        model.unet.load_state_dict(names_flow.read(state, names_flow.SD3_DIFFUSERS))
        encoder = model.text.clip_g
        published = write.openclip_text(copy.deepcopy(encoder), encoder.config.layers)
        part = parts.text(published, "text", names.CLIP_OPEN, projection=True)
        encoder.load_state_dict(part.state)
        return drawn(model, ASKED, SampleConfig(10, seed=SEED))

    def outlined(self) -> Picture:
        """Outlines of images that fit the prompts, read as `generate --control` reads them."""
        truth, prompts, _ = world().batch(4, "outlined", 2, "held-out", full=True)
        images, network = [], self.file("controlnet")
        with tempfile.TemporaryDirectory() as folder:
            hint = Path(folder) / "hint.png"
            for k, (prompt, lines) in enumerate(zip(prompts, outlines(truth), strict=True)):
                plots.save_png(2 * lines - 1, hint)
                request = GenerateOptions(control=hint, controlnet=network)
                model = controlled_by(request, Size(SIDE, SIDE), box())
                images.append(pipeline.generate(model, [prompt], SampleConfig(seed=SEED), first=k))
        return tiled(torch.cat(images))
