"""A ControlNet for the model in the box: outlines decide where things are, the prompt what they are.

    python experiments/controlnet.py --out out/controlnet

Pictures of the built-in world, each with its outlines, teach it on one CPU core. Held-out captions
are drawn with and without the outlines of a picture that fits; the critic says whether the caption
is fulfilled, and the overlap of the outlines whether they are kept. Writes controlnet.safetensors,
controlnet.png and results.json. With --data and --hints it learns from pairs of yours.

[1] Zhang, Rao, Agrawala. Adding Conditional Control to Text-to-Image Diffusion Models. 2023.
    arXiv:2302.05543
"""

import time
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

import minidiff
from minidiff import pipeline
from minidiff.checkpoints import controlnet as files
from minidiff.cli.script import run
from minidiff.data import critic
from minidiff.data.folder import CaptionedFolder
from minidiff.data.world import World
from minidiff.errors import UserError
from minidiff.evaluation import metrics
from minidiff.figures import curves
from minidiff.finetuning.controlnet import Pairs, pairs_of, train_controlnet
from minidiff.latent_diffusion import LatentDiffusion
from minidiff.methods.controlnet import Control, ControlNet, controlled, copy_of, outlines
from minidiff.options.sampling import SampleConfig
from minidiff.recipes.quickstart import COLOURS, SHAPES
from minidiff.train import TrainConfig
from minidiff.training.progress import peak_memory_gb, write_results

Images, Strips = Float[Tensor, "N 3 H W"], Float[Tensor, "rows N 3 H W"]
AT_ONCE = 50
TWO_OBJECTS = 0.8


@torch.no_grad()
def pairs_of_world(model: LatentDiffusion, world: World, count: int, seed: int) -> Pairs:
    """Images of the world with their outlines."""
    latents, captions, hints = [], [], []
    for k in tqdm(range(-(-count // AT_ONCE)), "1/2 pictures"):
        images, texts, _ = world.batch(AT_ONCE, f"control {seed} {k}", two_objects=TWO_OBJECTS)
        latents.append(model.vae.encode(images))
        hints.append((255 * outlines(images)).to(torch.uint8))
        captions += texts
    return Pairs(torch.cat(latents), captions, torch.cat(hints))


def overlap(images: Images, hints: Images) -> Float[Tensor, "N"]:
    """Of the outlines: intersection over union."""
    a, b = outlines(images)[:, 0].flatten(1) > 0, hints[:, 0].flatten(1) > 0
    return (a & b).sum(1) / (a | b).sum(1).clamp(min=1)


def drawn(
    model: LatentDiffusion, captions: list[str], control: Control | None, config: SampleConfig
) -> Images:
    """An image for each caption, with its own hint where there is a control."""
    images, count = [], len(captions)
    for k in range(0, count, AT_ONCE):
        own = model
        if control is not None:
            some = Control(control.network, control.hint[k : k + AT_ONCE], control.scale)
            own = controlled(model, some)
        images.append(pipeline.generate(own, captions[k : k + AT_ONCE], config, first=k))
    return torch.cat(images)


@torch.no_grad()
def judged(
    model: LatentDiffusion, network: ControlNet, world: World, count: int, seed: int
) -> tuple[list[dict], Strips]:
    """A row for each kind of caption, with and without control; and strips of examples: outlines,
    without, with, with another seed."""
    rows, strips = [], []
    for objects, kind in ((1, "one object"), (2, "two objects")):
        truth, captions, _ = world.batch(count, f"judged {seed}", objects, "held-out", full=True)
        hints = outlines(truth)
        control, config = Control(network, hints), SampleConfig(seed=seed)
        rebuilt = model.vae.decode(model.vae.encode(truth)).clamp(-1, 1)
        sets = {
            "without": drawn(model, captions, None, config),
            "with": drawn(model, captions, control, config),
            "half": drawn(model, captions, Control(network, hints, 0.5), config),
            "true pictures through the VAE": rebuilt,
        }
        for name, images in sets.items():
            rows.append(
                {"captions": kind, "control": name, **scores(images, captions, hints, seed)}
            )
        again = drawn(model, captions[:5], Control(network, hints[:5]), SampleConfig(seed=seed + 1))
        parts = (2 * hints - 1, sets["without"], sets["with"], again)
        strips.append(torch.stack([part[:5] for part in parts]))
    return rows, torch.cat(strips, dim=1)


def scores(images: Images, captions: list[str], hints: Images, seed: int) -> dict:
    """What the critic accepts, and the overlap of the outlines, each with its interval."""
    accepted = [critic.holds(*pair) for pair in zip(images, captions, strict=True)]
    generator, row = torch.Generator().manual_seed(seed), {"n": len(captions)}
    for name, each in (("accuracy", torch.tensor(accepted)), ("overlap", overlap(images, hints))):
        score = metrics.bootstrap(each.double(), generator)
        row[name] = [round(value, 4) for value in score]
    return row


def taught(
    model: LatentDiffusion, pairs: Pairs, config: TrainConfig, batch: int, hidden: float, watch: int
) -> tuple[ControlNet, list[tuple[int, float]]]:
    """A trained ControlNet; and the overlap on eight pairs at `watch` steps on the way, drawn
    without a prompt."""
    torch.manual_seed(config.seed)
    network, curve = copy_of(model.unet, model.vae.factor), []
    hints = pairs.hints[:8].float() / 255
    every = max(1, config.steps // watch) if watch else config.steps + 1
    quick = SampleConfig(steps=10, guidance=1.0, seed=config.seed)
    training = train_controlnet(model, network, pairs, config, batch, hidden)
    for done in (bar := tqdm(training, "2/2 ControlNet", config.steps)):
        if watch and (done.step == 1 or done.step % every == 0):
            images = drawn(model, [""] * len(hints), Control(network, hints), quick)
            curve.append((done.step, overlap(images, hints).mean().item()))
            bar.set_postfix(overlap=f"{curve[-1][1]:.2f}")
    return network.eval().requires_grad_(False), curve


def plot(strips: Strips, curve: list[tuple[int, float]], path: Path) -> Path:
    """Rows of examples, and the overlap while it learns."""
    names = ("outlines", "without", "with", "another seed")
    with curves.style():
        figure, (examples, line) = curves.new_figure(2, 4.2, 2.4)
        side = strips.shape[-1]
        sheet = ((strips + 1) / 2).clamp(0, 1).permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)
        examples.imshow(sheet.numpy())
        examples.set_yticks([side * (k + 0.5) for k in range(len(names))], names)
        examples.set_xticks([])
        examples.grid(visible=False)
        line.plot(*zip(*curve, strict=True), marker="o", markersize=3)
        line.set(xlabel="training step", title="overlap of outlines, without a prompt")
        line.set_ylim(0, 1)
        return curves.save(figure, path)


OUTPUTS = ("controlnet.safetensors", "controlnet.png")  # beside results.json


def main(
    out: Path = Path("out/controlnet"),
    model: str = "box",
    data: Path | None = None,
    hints: Path | None = None,
    pairs: int = 6_000,
    steps: int = 1200,
    batch: int = 16,
    lr: float = 1e-3,
    hidden: float = 0.5,
    captions: int = 150,
    watch: int = 12,
    seed: int = 0,
) -> None:
    """Train a ControlNet on one CPU core, and see what it keeps and what it costs.

    Args:
        out: folder for everything written.
        model: the model that is controlled.
        data: a folder of captioned images to learn from, in place of the built-in world.
        hints: their hints, RGB images of the same names in another folder.
        pairs: images of the world to learn from, with their outlines.
        steps: training steps.
        batch: pairs in a step.
        lr: the peak learning rate.
        hidden: the share of captions that are hidden, so that the hint must be read.
        captions: held-out captions of one thing, and as many of two, behind each figure.
        watch: how often the overlap is measured while it learns.
        seed: everything random follows from it.
    """
    torch.set_num_threads(1)  # on networks this small a second thread would mostly wait
    if (data is None) != (hints is None):
        raise UserError("data and hints belong together; name both folders, or neither.")
    base = minidiff.load(model)
    world = World(base.size, SHAPES, COLOURS)
    if data is None:
        learnt = pairs_of_world(base, world, pairs, seed)
    else:
        learnt = pairs_of(base, CaptionedFolder(data, base.size), hints, base.size)
    start, config = time.process_time(), TrainConfig(steps, lr, seed=seed)
    network, curve = taught(base, learnt, config, batch, hidden, watch if data is None else 0)
    minutes = round((time.process_time() - start) / 60, 2)
    print(files.save(network, out / "controlnet.safetensors"))
    settings = dict(pairs=pairs, steps=steps, batch=batch, lr=lr, hidden=hidden, seed=seed)
    figures = {"training_processor_minutes": minutes}
    if data is None:
        rows, strips = judged(base, network, world, captions, seed)
        print(plot(strips, curve, out / "controlnet.png"))
        figures |= {"rows": rows, "curve": curve}
        for row in rows:
            print(*row.values(), sep="\t")
    print(write_results(out, **settings, **figures, peak_memory_gb=peak_memory_gb()))


if __name__ == "__main__":
    run(main, OUTPUTS)
