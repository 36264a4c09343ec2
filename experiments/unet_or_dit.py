"""A transformer or a U-Net? Both learn the built-in world, for equal operations and for equal time.

    minidiff quickstart --out out/quickstart
    python experiments/unet_or_dit.py --model out/quickstart/model

The VAE and the text encoder are those of a finished quickstart, frozen; what denoises starts from
nothing: the quickstart's U-Net, or a small multimodal transformer (mmdit.py). Each learns with the
quickstart's own target and with flow matching, and is judged by the critic. Writes table.csv row by
row, and goes on where it stopped; samples.png and results.json.

[1] Esser et al. Scaling Rectified Flow Transformers for High-Resolution Image Synthesis. 2024.
    arXiv:2403.03206
[2] Peebles, Xie. Scalable Diffusion Models with Transformers. 2023. arXiv:2212.09748
"""

from collections.abc import Iterator
from functools import partial
from itertools import product
from pathlib import Path

import torch
from cifar_board import Row, Table
from torch import nn

from minidiff import pipeline, schedules
from minidiff.cli.script import run
from minidiff.data.world import World
from minidiff.denoiser import Denoiser
from minidiff.errors import UserError
from minidiff.evaluation import bench
from minidiff.figures import plots
from minidiff.latent_diffusion import LatentDiffusion
from minidiff.mmdit import MMDiT, MMDiTConfig
from minidiff.options.sampling import SampleConfig
from minidiff.recipes import quickstart
from minidiff.recipes.plan import Act, cost
from minidiff.recipes.quickstart import LatentBatch, Pool
from minidiff.train import EMA, train
from minidiff.training.progress import follow, last_loss, write_results
from minidiff.training.resume import read_log


def transformer() -> MMDiT:
    """Four joint blocks on 64 places and 32 words: about the U-Net's operations a picture."""
    config = MMDiTConfig(
        width=96,
        joint=4,
        heads=4,
        context_dim=64,
        pooled_dim=64,
        in_channels=4,
        out_channels=4,
        patch=1,
        qk_norm=True,
        table=8,
    )
    return MMDiT(config)


NETWORKS = {"U-Net": quickstart.unet_quickstart, "transformer": transformer}
TARGETS = ("x0", "flow")  # x0: the quickstart's own, with its learned weighting


def denoiser(network: nn.Module, target: str) -> Denoiser:
    if target == "flow":
        return Denoiser(network, schedules.Flow(), "flow")
    return Denoiser(network, schedules.cosine(), "x0", weighting="learned")


class Data:
    """The quickstart's batches; flow matching has times from 0 to 1."""

    def __init__(self, world: World, model: LatentDiffusion, pool: int, seed: int):
        self.world, self.seed, self.dropout = world, seed, model.dropout
        pools = ((pool // 2, 1), (pool, 2))
        key = f"model {seed}"
        self.pools = [Pool(world, model.vae, size, key, objects, "cpu") for size, objects in pools]

    def batches(self, target: str, start: int) -> Iterator[LatentBatch]:
        stream = quickstart.latent_batches(self.world, *self.pools, self.seed, self.dropout, start)
        for batch in stream:
            yield batch._replace(t=batch.t / 1000) if target == "flow" else batch


def act_of(name: str, target: str, base: LatentDiffusion, data: Data, steps: int) -> Act:
    """The training of a network from nothing."""
    torch.manual_seed(data.seed + 1)
    new = denoiser(NETWORKS[name](), target)
    model = LatentDiffusion(
        base.vae,
        base.text,
        new,
        base.size,
        guidance=base.guidance,
        sampler="ddim" if target == "flow" else "ddpm",
    )
    model.to(memory_format=torch.channels_last)
    loss = partial(quickstart.model_loss, model)
    config = quickstart.parallel(steps, quickstart.LR, data.seed)
    stream = partial(data.batches, target)
    return Act(f"{name}, {target}", model, loss, stream, config, EMA(model, decay=0.998))


class Study:
    """What all trainings share."""

    def __init__(self, base: LatentDiffusion, data: Data, out: Path, captions: int):
        self.base, self.data, self.out, self.captions = base, data, out, captions
        self.costs = {
            (name, target): cost(act_of(name, target, base, data, 100))
            for name, target in product(NETWORKS, TARGETS)
        }

    def steps(self, name: str, target: str, equal: str, of_unet: int) -> int:
        """As many as cost what the U-Net's cost."""
        own, unet = self.costs[name, target], self.costs["U-Net", target]
        ratio = unet.flops / own.flops if equal == "operations" else unet.seconds / own.seconds
        return max(1, round(of_unet * ratio))

    def learn(self, name: str, target: str, equal: str, steps: int) -> Row:
        """Train, save, and count what the critic accepts."""
        act, step = act_of(name, target, self.base, self.data, steps), self.costs[name, target]
        folder = self.out / "training" / f"{name} {target} {equal}"
        resume = (folder / "log.jsonl").exists()
        training = train(act.loss, act.module, act.batches, act.config, act.ema, folder, resume)
        follow(training, act.title, steps, quickstart.BATCH * quickstart.PARTS)
        act.ema.average.save(self.out / f"{name}_{target}_{equal}")
        row: Row = {"steps": steps, "tflop": round(steps * step.flops / 1e12, 2)}
        row |= {"minutes": round(steps * step.seconds / 60, 2)}
        row |= {"loss": last_loss(read_log(folder))}
        for objects, kind in ((1, "one_object"), (2, "two_objects")):
            asked = bench.held_out(self.data.world, self.captions, objects, self.data.seed)
            share, _, _ = bench.caption_accuracy(act.ema.average, asked, seed=self.data.seed)
            row[kind] = round(share, 4)
        return row

    def samples(self, table: Table, path: Path) -> Path:
        """The quickstart's prompts, drawn by each."""
        rows, config = {}, SampleConfig(25, seed=self.data.seed)
        for row in table.rows:
            folder = self.out / f"{row['network']}_{row['target']}_{row['equal']}"
            title = f"{row['network']}, {row['target']}, equal {row['equal']}"
            model = LatentDiffusion.load(folder)
            rows[title] = pipeline.generate(model, quickstart.PROMPTS, config)
        return plots.strip(rows, quickstart.PROMPTS, path)


OUTPUTS = ("samples.png",)  # beside results.json


def main(
    model: Path = Path("out/quickstart/model"),
    out: Path = Path("out/unet_or_dit"),
    steps: int = quickstart.STEPS,
    captions: int = quickstart.CAPTIONS,
    pool: int = quickstart.POOL,
    seed: int = 0,
) -> None:
    """Train four networks for equal operations; and the transformer again for the U-Net's time.

    Args:
        model: a finished quickstart, whose VAE and text encoder are used.
        out: folder for everything written.
        steps: of the U-Net; the others take as many as cost the same.
        captions: held-out captions behind each accuracy.
        pool: images of two objects to learn from; half as many of one.
        seed: everything random follows from it.
    """
    torch.set_num_threads(1)
    base = LatentDiffusion.load(model)
    if base.vae.factor != 4 or base.text.dim != 64:
        raise UserError(f"{model} is no model of the quickstart; make one: `minidiff quickstart`.")
    base.vae.requires_grad_(False)
    base.text.requires_grad_(False)
    world = World(quickstart.SIZE, quickstart.SHAPES, quickstart.COLOURS)
    data, table = Data(world, base, pool, seed), Table(out / "table.csv", ("network", "target"))
    study = Study(base, data, out, captions)
    for equal, name, target in product(("operations", "time"), NETWORKS, TARGETS):
        if equal == "time" and name == "U-Net":
            continue  # the same run
        count = study.steps(name, target, equal, steps)
        key = {"equal": equal, "network": name, "target": target, "seed": seed}
        table.row(key, partial(study.learn, name, target, equal, count))
    print(study.samples(table, out / "samples.png"))
    print(write_results(out, seed=seed, rows=table.rows))


if __name__ == "__main__":
    run(main, OUTPUTS)
