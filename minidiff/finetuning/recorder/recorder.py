"""The flight recorder of a fine-tune: what is measured every few steps, and how it is kept.

    prompts = {"caption": "a red heart", "unrelated": "a blue square"}
    recorder = Recorder(model, folder, prompts, images, validation, examples, RecorderConfig())
    recorder.measure(0, {})                 # before the first step: what later ones compare with
    for step in train(...):
        if recorder.due(step.step):
            recorder.measure(step.step, {"loss": step.loss}, step.lr)
    print(recorder.advice(), recorder.report())

Examples, t and noise are the same at every measurement, so a curve moves only because the model
did. A run with a recorder ends at the weights of a run without one.

A label that begins with "unrelated" is a prompt that should stay as it is, one that begins with
"class" may change with the subject, and any other is a prompt that is being taught.

[1] Yoon, Choi, Kwon, Ryu. Diffusion Probabilistic Models Generalize when They Fail to Memorize.
    2023. ICML workshop SPIGM
"""

import json
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from minidiff.condition import repeat
from minidiff.data.folder import load_image, to_model, to_uint8
from minidiff.denoiser import Denoiser
from minidiff.errors import UserError
from minidiff.evaluation import features, metrics
from minidiff.figures import plots
from minidiff.finetuning.groups import with_numbers
from minidiff.finetuning.recorder.advice import Record, advise, are_whole, best
from minidiff.finetuning.recorder.report import Pair, page, steps_shown
from minidiff.latent_diffusion import LatentDiffusion
from minidiff.options.finetuning import RecorderConfig
from minidiff.samplers import Normal
from minidiff.train import BINS
from minidiff.training import atomic
from minidiff.training.progress import peak_memory_gb
from minidiff.training.seeds import generator_of

# latents, their context (a caption in its place is encoded at every measurement), their numbers
Pairing = tuple[Float[Tensor, "Z _ _"], Float[Tensor, "L D"] | str, tuple[float, ...]]
PIXELS = 2**14  # of latents that are measured at once; a fourth of them are decoded at once
Grid = dict[str, UInt8[Tensor, "n 3 H W"]]  # images by label
CHUNK = 64  # images whose features are computed at once
THUMBNAIL = 128  # pixels: the largest side that samples are compared at


class Thumbnails(Sequence):
    """Small copies of image files in [-1, 1], read when asked for: no data set is too large."""

    def __init__(self, paths: list[Path], size: int):
        self.paths, self.size = paths, min(size, THUMBNAIL)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> Float[Tensor, "3 H W"]:
        return to_model(load_image(self.paths[i], self.size))


def pairing(example: tuple) -> Pairing:
    return *example[:2], getattr(example, "numbers", ())


def rows_at_once(sides: Sequence[int]) -> int:
    """How many latents with these sides are measured at once."""
    return max(1, PIXELS // math.prod(sides))


class Recorder:
    """Measures a LatentDiffusion while something else trains it, and writes folder/record.jsonl,
    folder/grids and folder/report.html."""

    def __init__(
        self,
        model: LatentDiffusion,
        folder: Path,
        prompts: dict[str, str],
        training: Sequence | Float[Tensor, "N 3 H W"],
        validation: Sequence[tuple] = (),
        examples: Sequence[tuple] = (),
        config: RecorderConfig = RecorderConfig(),  # noqa: B008 (it is frozen)
        settings: dict[str, object] | None = None,
    ):
        """prompts: by label. training: the images trained on, (3, H, W) in [-1, 1]. validation,
        examples: latents and caption of what is held out, and of what is trained on (an Example's
        other captions are left out); the first config.probe of each are measured. settings: more
        rows for the report's table."""
        if not prompts:
            raise UserError("nothing to draw: the recorder needs at least one prompt.")
        if len(training) < 1:
            raise UserError("no training images to compare with; the recorder needs at least one.")
        self.model, self.folder, self.prompts, self.config = model, Path(folder), prompts, config
        self.validation = [pairing(example) for example in validation[: config.probe]]
        count = len(self.validation) or config.probe
        self.examples = [pairing(example) for example in examples[:count]]
        self.training, self.settings = training, settings or {}
        count = min(len(training), config.compared)
        self.compared = [i * len(training) // count for i in range(count)]
        self.far = features.by_name(config.network)
        self.t, self.bin = self._times()
        self.records = self._read()
        atomic.check(self.folder / "report.html", atomic.unsigned)
        self.clock: tuple[int, float] | None = None  # the step and the time of the last measurement
        self.first: Grid = {}

    @cached_property
    def rows(self) -> Float[Tensor, "N D"]:
        """The features by which the nearest training image is found; read a chunk at a time."""
        chunks = range(0, len(self.compared), CHUNK)
        bar = tqdm(chunks, "reading training pictures", unit="", leave=False, delay=0.5)
        return torch.cat([features.pixels(self._chunk(start)) for start in bar])

    def _chunk(self, start: int) -> Float[Tensor, "N 3 H W"]:
        return torch.stack([self.training[i] for i in self.compared[start : start + CHUNK]])

    @cached_property
    def floor(self) -> float | None:
        """The median distance of a training image to its nearest other one."""
        many = len(self.rows) > 1
        return metrics.radii(self.rows, 1).median().item() if many else None

    @cached_property
    def copies_floor(self) -> float:
        """The share of copies among the training images themselves."""
        many = len(self.rows) > 2
        return metrics.memorised_floor(self.rows).mean().item() if many else 0.0

    def due(self, step: int) -> bool:
        return step % self.config.every == 0

    def last(self) -> int | None:
        """The last step that was measured."""
        return self.records[-1].step if self.records else None

    # Measuring.

    def measure(self, step: int, losses: dict[str, float], lr: float | None = None) -> Record:
        """Draw the grid, measure everything, add a line to record.jsonl, write the report anew.
        Lines of this step and above, from before a resume, are dropped."""
        start = time.perf_counter()
        per_step = None
        if self.clock and step > self.clock[0]:
            per_step = (start - self.clock[1]) / (step - self.clock[0])
        while self.records and self.records[-1].step >= step:
            grid = self._grid_file(self.records.pop().step)
            if grid.exists() and atomic.unsigned(grid) is None:
                grid.unlink()
        passes = len(self.validation) + len(self.examples) + len(self.prompts) * self.config.steps
        title = f"measuring step {step}"
        with _evaluating(self.model), tqdm(desc=title, total=passes, unit="", leave=False) as bar:
            validation = self._losses(self.validation, bar)
            train = self._losses(self.examples, bar)
            images, broken = self._draw(bar)
        if not self.records:
            self.first = images
        self.first = self.first or self.pictures(self.records[0].step)  # read back after a resume
        moved = {label: self._moved(images[label], self.first[label]) for label in images}
        moved |= dict.fromkeys(broken, math.nan)
        nearest, copies = self._nearest(images)
        self._save_grid(step, images)
        if self.model.device.type == "cuda":
            memory = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        else:
            memory = peak_memory_gb()
        costs = per_step, round(time.perf_counter() - start, 2), memory
        floor = self.copies_floor
        record = Record(step, losses, lr, validation, train, moved, nearest, copies, floor, *costs)
        self.records.append(record)
        lines = "".join(json.dumps(record._asdict()) + "\n" for record in self.records)
        _write(self.folder / "record.jsonl", lines)
        self.report()
        self.clock = step, time.perf_counter()
        return record

    def advice(self) -> str:
        """One plain sentence about the run so far; the rules are in advice.py."""
        return advise(self.records)

    def best(self) -> int | None:
        """The step whose weights to use, of those measured; None for the untrained model's."""
        return best(self.records)

    def report(self) -> Path:
        """Write folder/report.html: one file that needs no other."""
        if not self.records:
            raise UserError(f"{self.folder}: nothing was measured yet, so there is no report.")
        last = self.records[-1]
        grids = {step: self.pictures(step) for step in steps_shown(self.records)}
        pairs = [
            Pair(label, grids[last.step][label][k], to_uint8(self.training[which].cpu()), distance)
            for label, near in last.nearest.items()
            for k, (distance, which) in enumerate(near)
        ]
        settings = self._settings()
        html = page(self.advice(), self.records, self.prompts, grids, pairs, settings)
        return _write(self.folder / "report.html", html)

    # What is measured.

    def _times(self) -> tuple[Tensor, Tensor]:
        """Fixed times, config.noises in each tenth of progress(t) that training visits, and the
        tenth of each."""
        t = self.model.schedule.sample_t(2**14, generator_of(self.config.seed, 0))
        tenth = (self.model.schedule.progress(t) * BINS).long().clamp(0, BINS - 1)
        noises = self.config.noises
        chosen = torch.cat([(tenth == b).nonzero()[:noises, 0] for b in range(BINS)])
        return t[chosen], tenth[chosen]

    @torch.no_grad()
    def _losses(self, examples: list[Pairing], bar: tqdm) -> list[float | None]:
        """Mean squared error of the network's output in each tenth, without the training's
        weighting. Example k has the same noise at every measurement, and in both sets."""
        if not examples:
            return []
        model, device = self.model, self.model.device
        plain = Denoiser(model.unet, model.schedule, model.denoiser.target)
        count, losses = len(self.t), []
        for k, (latents, context, numbers) in enumerate(examples):
            is_text = isinstance(context, str)
            context = model.text.encode([context]) if is_text else context[None].to(device)
            context = with_numbers(context, torch.tensor([numbers], dtype=torch.float32))
            generator = generator_of(self.config.seed, k + 1)
            eps = torch.randn(count, *latents.shape, generator=generator)
            x0 = latents.to(device).expand(count, *latents.shape)
            rows = rows_at_once(latents.shape[1:])
            parts = zip(*(each.split(rows) for each in (x0, self.t, eps)), strict=True)
            each = [plain.loss(x, repeat(context, len(x)), t, e.to(x)) for x, t, e in parts]
            losses.append(torch.cat(each).float().cpu())
            bar.update()
        mean = torch.stack(losses).mean(0)
        tenths = (mean[self.bin == b] for b in range(BINS))
        return [each.mean().item() if len(each) else None for each in tenths]

    @torch.no_grad()
    def _draw(self, bar: tqdm) -> tuple[Grid, set[str]]:
        """The images of each prompt as bytes, and the labels whose images are not finite."""
        config, grid, broken = self.config, {}, set()
        for label, prompt in self.prompts.items():
            noise = Normal.seeded(config.seed, range(config.n))
            prompts = [prompt] * config.n
            sampling = self.model.sample(prompts, config.steps, config.guidance, generator=noise)
            for frame in sampling:
                bar.update(frame.t > 0)
            latents = frame.x0.split(max(1, rows_at_once(frame.x0.shape[2:]) // 4))
            images = torch.cat([self.model.decode(z).float().cpu() for z in latents])
            if not images.isfinite().all():
                broken.add(label)
            grid[label] = to_uint8(images.nan_to_num(0.0).expand(-1, 3, -1, -1))
        return grid, broken

    def _moved(self, now: UInt8[Tensor, "n 3 H W"], before: UInt8[Tensor, "n 3 H W"]) -> float:
        """Mean distance between images of one seed, now and before, over that of two seeds."""
        now, before = self.far(to_model(now)), self.far(to_model(before))
        distance = (now - before).norm(dim=1).mean().item()
        return distance / max(metrics.diversity(before[None]).item(), 1e-12)

    def _nearest(self, images: Grid) -> tuple[dict[str, list[tuple[float, int]]], float | None]:
        """For each image of a taught prompt its distance to the nearest training image, over the
        floor where there is one, and which that is; and the share of copies, [1]."""
        taught = {
            label: features.pixels(to_model(grid))
            for label, grid in images.items()
            if not label.startswith(("unrelated", "class"))
        }
        near = {}
        for label, rows in taught.items():
            distance, which = metrics.nearest(rows, self.rows)
            relative = [d / (self.floor or 1.0) for d in distance[:, 0].tolist()]
            places = [self.compared[k] for k in which[:, 0].tolist()]
            near[label] = list(zip(relative, places, strict=True))
        if not taught or not self.floor:
            return near, None
        return near, metrics.memorised(torch.cat(list(taught.values())), self.rows).mean().item()

    # What is kept.

    def _drawn_with(self) -> dict[str, str]:
        """The text in a grid's PNG: a grid of other settings cannot be compared with."""
        names = ("n", "steps", "guidance", "seed", "network")
        return {f"prompt {label}": prompt for label, prompt in self.prompts.items()} | {
            name: str(getattr(self.config, name)) for name in names
        }

    def _grid_file(self, step: int) -> Path:
        return self.folder / "grids" / f"step_{step:06d}.png"

    def _save_grid(self, step: int, images: Grid) -> None:
        """A row for each prompt, a column for each seed, pixel by pixel: pictures() cuts it up."""
        sheet = torch.cat([torch.cat(list(row), dim=2) for row in images.values()], dim=1)
        plots.save_png(to_model(sheet), self._grid_file(step), self._drawn_with())

    def pictures(self, step: int) -> Grid:
        """The images of a measurement, read back."""
        path = self._grid_file(step)
        side, again = self.model.size, "start afresh in another folder"
        try:
            sheet = load_image(path)
        except UserError as error:
            raise UserError(f"{path} cannot be read; {again}.") from error
        with Image.open(path) as image:
            text = getattr(image, "text", {})
        if text != self._drawn_with():
            raise UserError(
                f"{path} was drawn with other prompts or settings; resume with those, or {again}."
            )
        if sheet.shape[1:] != (side * len(self.prompts), side * self.config.n):
            raise UserError(f"{path} is damaged: it has other sides; {again}.")
        rows = sheet.chunk(len(self.prompts), dim=1)
        images = [torch.stack(row.chunk(self.config.n, dim=2)) for row in rows]
        return dict(zip(self.prompts, images, strict=True))

    def _read(self) -> list[Record]:
        file = self.folder / "record.jsonl"
        if not file.exists():
            return []
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
            records = [Record(**json.loads(line)) for line in lines]
        except (ValueError, TypeError, RecursionError):
            records = []
        if not are_whole(records, self.prompts, len(self.training)):
            raise UserError(f"{file} is damaged, or of another version; start afresh elsewhere.")
        return records

    def _settings(self) -> dict[str, object]:
        config = self.config
        guidance = self.model.guidance if config.guidance is None else config.guidance
        return self.settings | {
            "training pictures": len(self.training),
            "training pictures compared with": len(self.compared),
            "copies among the training pictures themselves": f"{self.copies_floor:.0%}",
            "validation examples measured": len(self.validation),
            "training examples measured": len(self.examples),
            "pictures of a prompt": f"{config.n}, {config.steps} steps, guidance {guidance}, "
            f"seed {config.seed}",
            "features": f"{config.network} for how far pictures moved, pixels-8x8 for the nearest "
            "training picture",
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


def _write(path: Path, text: str) -> Path:
    """Written whole or not at all."""
    with atomic.write(path) as new:
        new.write_text(text, encoding="utf-8")
    return path
