"""The flight recorder of a fine-tune: what is measured every K steps, how it is kept, and where a picture of it comes from, are in this file.

    recorder = Recorder(model, folder, {"caption": "a red heart", "unrelated": "a blue square"}, pictures, validation, examples, every=100)
    recorder.measure(0, {})                          # before the first step: all later ones are compared with it
    for step in train(...):
        if recorder.due(step.step):
            recorder.measure(step.step, {"loss": step.loss}, step.lr)
    print(recorder.advice(), recorder.report())

The losses of training jump about because t, the noise and the examples are new at every step. Here they are the same at every measure, so
a curve moves only because the model did. Nothing is drawn from the random state that training draws from, and every module is put back into
the mode it was in: a run with a recorder ends at the weights of a run without one.

A label that begins with "unrelated" is a prompt that should stay as it is, one that begins with "class" may change with the subject, and
any other is a prompt that is being taught.

[1] Yoon, Choi, Kwon, Ryu. Diffusion Probabilistic Models Generalize when They Fail to Memorize. 2023. ICML workshop SPIGM
"""

import json
import math
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor, nn

from minidiff.cli.script import peak_memory_gb
from minidiff.data.folder import to_model, to_uint8
from minidiff.denoiser import Denoiser
from minidiff.errors import UserError
from minidiff.evaluation import features, metrics
from minidiff.figures import plots
from minidiff.finetuning.recorder.advice import Record, advise, best
from minidiff.finetuning.recorder.report import Pair, page, shown
from minidiff.latent_diffusion import LatentDiffusion
from minidiff.samplers import Normal
from minidiff.train import BINS, seed_of

Example = tuple[
    Float[Tensor, "Z _ _"], Float[Tensor, "L D"] | str
]  # latents, and what the text tower said; a caption is encoded at every measure
Drawn = dict[str, UInt8[Tensor, "n 3 H W"]]  # by label


class Recorder:
    """Measures a LatentDiffusion while something else trains it, and writes folder/record.jsonl, folder/grids and folder/report.html."""

    def __init__(
        self,
        model: LatentDiffusion,
        folder: Path,
        prompts: dict[str, str],
        training: Float[Tensor, "N 3 H W"],
        validation: Sequence[Example] = (),
        examples: Sequence[Example] = (),
        *,
        every: int = 100,
        n: int = 4,
        steps: int = 25,
        guidance: float | None = None,
        seed: int = 0,
        probe: int = 8,
        noises: int = 2,
        network: str = "random-conv-0",
        settings: dict[str, object] | None = None,
    ):
        """prompts: label -> prompt. training: the pictures trained on, in [-1, 1]. validation, examples: what is left out of training, and what
        is not; the first `probe` of each are measured, with `noises` times and noises in each tenth of t. every: of the trainer's steps.
        n, steps, guidance: of the pictures of each prompt. network: whose features (features.py) say how far they moved; of pictures of the
        built-in world "critic-attributes" sees most. settings: what the report's table should say of the run."""
        if n < 2:
            raise UserError(
                f"a grid of {n} picture of each prompt has no second seed to compare with; take at least 2."
            )
        if every < 1:
            raise UserError(f"measuring every {every} steps is not possible; take at least 1.")
        if not prompts:
            raise UserError("nothing to draw: the recorder needs at least one prompt.")
        if len(training) < 1:
            raise UserError(
                "no training pictures to compare with; the recorder needs at least one."
            )
        self.model, self.folder, self.prompts, self.every = model, Path(folder), prompts, every
        self.n, self.steps, self.guidance, self.seed, self.noises = n, steps, guidance, seed, noises
        self.validation = list(validation)[:probe]
        self.examples = list(examples)[: len(self.validation) or probe]
        self.settings = settings or {}
        self.training = training
        self.network, self.near, self.far = network, features.pixels, features.by_name(network)
        self.known = self.near(training)
        self.floor = metrics.radii(self.known, 1).median().item() if len(training) > 1 else None
        self.copies_floor = (
            metrics.memorised_floor(self.known).mean().item() if len(training) > 2 else 0.0
        )
        self.t, self.bin = self._times()
        self.records = self._read()
        self.clock: tuple[int, float] | None = None
        self.first: Drawn = {}

    def due(self, step: int) -> bool:
        return step % self.every == 0

    # Measuring.

    def measure(self, step: int, losses: dict[str, float], lr: float | None = None) -> Record:
        """Draw the grid, measure everything, add a line to record.jsonl, write the report anew. Lines of this step and above, which a run
        that was killed and resumed has left behind, are dropped: they have just happened again."""
        start = time.perf_counter()
        per_step = (
            (start - self.clock[1]) / (step - self.clock[0])
            if self.clock and step > self.clock[0]
            else None
        )
        while self.records and self.records[-1].step >= step:
            self._grid_file(self.records.pop().step).unlink(missing_ok=True)
        with _evaluating(self.model):
            validation, train = self._losses(self.validation), self._losses(self.examples)
            drawn, broken = self._draw()
        first = self._first(drawn)
        moved = {
            label: math.nan if label in broken else self._moved(drawn[label], first[label])
            for label in drawn
        }
        nearest, copies = self._nearest(drawn)
        self._save_grid(step, drawn)
        memory = (
            round(torch.cuda.max_memory_allocated() / 2**30, 2)
            if self.model.device.type == "cuda"
            else peak_memory_gb()
        )
        seconds = round(time.perf_counter() - start, 2)
        record = Record(
            step,
            losses,
            lr,
            validation,
            train,
            moved,
            nearest,
            copies,
            self.copies_floor,
            per_step,
            seconds,
            memory,
        )
        self.records.append(record)
        _replace(
            self.folder / "record.jsonl",
            "".join(json.dumps(r._asdict()) + "\n" for r in self.records),
        )
        self.report()
        self.clock = step, time.perf_counter()
        return record

    def advice(self) -> str:
        """One plain sentence about the run so far: advice.py has the rules."""
        return advise(self.records)

    def best(self) -> int | None:
        """The step whose weights to use, of those measured; None where that is the untrained model's."""
        return best(self.records)

    def report(self) -> Path:
        """Write folder/report.html: one file that needs no other."""
        if not self.records:
            raise UserError(
                f"{self.folder}: nothing was measured yet, so there is nothing to report."
            )
        last, grids = self.records[-1], {step: self.pictures(step) for step in shown(self.records)}
        pairs = [
            Pair(label, grids[last.step][label][k], to_uint8(self.training[which].cpu()), distance)
            for label, near in last.nearest.items()
            for k, (distance, which) in enumerate(near)
        ]
        return _replace(
            self.folder / "report.html",
            page(self.advice(), self.records, self.prompts, grids, pairs, self._settings()),
        )

    # What is measured.

    def _times(self) -> tuple[Tensor, Tensor]:
        """Fixed times, `noises` in each tenth of progress(t) that training visits, and the tenth of each."""
        generator = torch.Generator().manual_seed(seed_of(self.seed, 0))
        t = self.model.schedule.sample_t(2**14, generator)
        tenth = (self.model.schedule.progress(t) * BINS).long().clamp(0, BINS - 1)
        chosen = torch.cat([(tenth == b).nonzero()[: self.noises, 0] for b in range(BINS)])
        return t[chosen], tenth[chosen]

    @torch.no_grad()
    def _losses(self, examples: list[Example]) -> list[float | None]:
        """Mean loss in each tenth: the squared error of the network's output, whatever weighting training uses, so that it is never negative
        and means the same in every run. Example k meets the same noise at every measure, as does the k-th of the other set."""
        if not examples:
            return []
        model, device = self.model, self.model.device
        plain = Denoiser(model.unet, model.schedule, model.denoiser.target)
        each = []
        for k, (latents, context) in enumerate(examples):
            context = model.text.encode([context])[0] if isinstance(context, str) else context
            eps = torch.randn(
                len(self.t),
                *latents.shape,
                generator=torch.Generator().manual_seed(seed_of(self.seed, k + 1)),
            )
            x0, context = (
                part.to(device).expand(len(self.t), *part.shape) for part in (latents, context)
            )
            each.append(plain.loss(x0, context, self.t, eps.to(x0)).float().cpu())
        mean = torch.stack(each).mean(0)
        return [
            mean[self.bin == b].mean().item() if (self.bin == b).any() else None
            for b in range(BINS)
        ]

    @torch.no_grad()
    def _draw(self) -> tuple[Drawn, set[str]]:
        """The pictures of each prompt, the same seeds for all, as bytes; and the labels whose pictures are not finite."""
        drawn, broken = {}, set()
        for label, prompt in self.prompts.items():
            noise = Normal.seeded(self.seed, range(self.n))
            *_, last = self.model.sample(
                [prompt] * self.n, self.steps, self.guidance, generator=noise
            )
            pictures = self.model.decode(last.x0).float().cpu()
            if not pictures.isfinite().all():
                broken.add(label)
            drawn[label] = to_uint8(pictures.nan_to_num(0.0).expand(-1, 3, -1, -1))
        return drawn, broken

    def _first(self, drawn: Drawn) -> Drawn:
        """What was drawn at the first measure: read back, where this is a resumed run."""
        if not self.records:
            self.first = drawn
        self.first = self.first or self.pictures(self.records[0].step)
        return self.first

    def _moved(self, now: UInt8[Tensor, "n 3 H W"], before: UInt8[Tensor, "n 3 H W"]) -> float:
        """Mean distance between the pictures of one seed, now and before, over that between two seeds before."""
        now, before = self.far(to_model(now)), self.far(to_model(before))
        return ((now - before).norm(dim=1).mean().item()) / max(
            metrics.diversity(before[None]).item(), 1e-12
        )

    def _nearest(self, drawn: Drawn) -> tuple[dict[str, list[tuple[float, int]]], float | None]:
        """The training picture nearest to each picture of a taught prompt, its distance in units of the floor (where there is one: a single picture
        has none, nor have twins); and the share of copies, [1]."""
        taught = {
            label: self.near(to_model(pictures))
            for label, pictures in drawn.items()
            if not label.startswith(("unrelated", "class"))
        }
        near = {}
        for label, rows in taught.items():
            distance, which = metrics.nearest(rows, self.known)
            near[label] = [
                (d / (self.floor or 1.0), w)
                for d, w in zip(distance[:, 0].tolist(), which[:, 0].tolist(), strict=True)
            ]
        if not taught or not self.floor:
            return near, None
        return near, metrics.memorised(torch.cat(list(taught.values())), self.known).mean().item()

    # What is kept.

    def _drawn_with(self) -> dict[str, str]:
        how = {
            "n": self.n,
            "steps": self.steps,
            "guidance": self.guidance,
            "seed": self.seed,
            "network": self.network,
        }
        return {f"prompt {label}": prompt for label, prompt in self.prompts.items()} | {
            name: str(value) for name, value in how.items()
        }

    def _grid_file(self, step: int) -> Path:
        return self.folder / "grids" / f"step_{step:06d}.png"

    def _save_grid(self, step: int, drawn: Drawn) -> None:
        """A row for each prompt, a column for each seed, pixel by pixel: it can be cut up again."""
        sheet = torch.cat([torch.cat(list(row), dim=2) for row in drawn.values()], dim=1)
        plots.save_png(to_model(sheet), self._grid_file(step), self._drawn_with())

    def pictures(self, step: int) -> Drawn:
        """The pictures of a measure, read back."""
        path = self._grid_file(step)
        try:
            with Image.open(path) as image:
                text, sheet = (
                    image.text,
                    torch.from_numpy(np.array(image.convert("RGB"))).movedim(-1, 0),
                )
        except OSError as error:
            raise UserError(
                f"{path}: the pictures of an earlier measure cannot be read; start afresh in another folder."
            ) from error
        if text != self._drawn_with():
            raise UserError(
                f"{path} was drawn with other prompts or settings; resume with those, or start afresh in another folder."
            )
        rows = [
            torch.stack(row.chunk(self.n, dim=2)) for row in sheet.chunk(len(self.prompts), dim=1)
        ]
        return dict(zip(self.prompts, rows, strict=True))

    def _read(self) -> list[Record]:
        file = self.folder / "record.jsonl"
        if not file.exists():
            return []
        try:
            return [
                Record(**json.loads(line)) for line in file.read_text(encoding="utf-8").splitlines()
            ]
        except (ValueError, TypeError) as error:
            raise UserError(
                f"{file} is damaged, or of another version; delete it, or start afresh in another folder."
            ) from error

    def _settings(self) -> dict[str, object]:
        guidance = self.model.guidance if self.guidance is None else self.guidance
        return self.settings | {
            "training pictures": len(self.training),
            "copies among the training pictures themselves": f"{self.copies_floor:.0%}",
            "validation examples measured": len(self.validation),
            "training examples measured": len(self.examples),
            "pictures of a prompt": f"{self.n}, {self.steps} steps, guidance {guidance}, seed {self.seed}",
            "features": f"{self.network} for how far pictures moved, pixels-8x8 for the nearest training picture",
        }


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Every module in eval mode, and afterwards as it was."""
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in before:
            module.training = training


def _replace(path: Path, text: str) -> Path:
    """Written beside and renamed: nobody ever sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(path.name + ".new")
    fresh.write_text(text, encoding="utf-8")
    os.replace(fresh, path)
    return path
