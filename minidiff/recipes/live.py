"""A recipe's run as it is seen while it goes on: bars in the terminal, and OUT/index.html with the
loss, the time left and what the model draws by now."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from minidiff.figures.page import Page
from minidiff.recipes.plan import Act
from minidiff.train import train
from minidiff.training.resume import read_log
from minidiff.vae import VAE

WRITE, DRAW = 5.0, 20.0  # seconds between two states of the page, and between two drawings


class Drawing(NamedTuple):
    """Images in [-1, 1], what they should show, and whether the critic agrees (None: no matter)."""

    images: list[Tensor]
    captions: list[str]
    verdicts: list[bool | None]


def rebuilt(vae: VAE, images: Float[Tensor, "B 3 H W"]) -> Drawing:
    """Images, and what the VAE makes of them by now."""
    with torch.no_grad():
        again = vae.decode(vae.encode(images.to(vae.latent_scale.device))).clamp(-1, 1).cpu()
    both = [image for pair in zip(images, again, strict=True) for image in pair]
    return Drawing(both, ["an image", "through the VAE"] * len(images), [None] * len(both))


class Live:
    """The page of a run of several parts, and the seconds that each is expected to take."""

    def __init__(self, path: Path, title: str, parts: dict[str, float]):
        """parts: seconds by title, in order."""
        self.path, self.title, self.expected = path, title, dict(parts)
        self.notes: dict[str, str] = {}  # lines for the page
        self.started = time.perf_counter()
        self.losses: dict[str, list[float]] = {}
        self.drawing = Drawing([], [], [])
        self.written = self.drawn = -float("inf")

    def follow(
        self,
        act: Act,
        folder: Path,
        resume: bool,
        draw: Callable[[], Drawing] | None = None,
    ) -> None:
        """Train the act to the end, showing how it goes."""
        losses = self.losses[act.title] = []
        training = train(act.loss, act.module, act.batches, act.config, act.ema, folder, resume)
        total, start, first = act.config.steps, 0.0, 0
        planned = self.expected[act.title]
        with closing(training), tqdm(desc=act.title, total=total, unit=" steps") as bar:
            for step in training:
                if not losses:  # a resumed run has the earlier steps behind it
                    losses += [line["loss"] for line in read_log(folder)[: step.step - 1]]
                    bar.initial = bar.n = first = step.step - 1
                    start = time.perf_counter()
                losses.append(step.loss)
                bar.set_postfix(loss=f"{step.loss:.4f}", refresh=False)
                bar.update()
                self.expected[act.title] = self._left(start, first, step.step, total, planned)
                if draw and time.perf_counter() - self.drawn > DRAW:
                    self.drawing, self.drawn = draw(), time.perf_counter()
                if time.perf_counter() - self.written > WRITE:
                    self.write(f"{act.title}: step {step.step} of {total}")
        self.expected[act.title] = 0.0

    def _left(self, start: float, first: int, step: int, total: int, planned: float) -> float:
        """Seconds left of a part: as measured after its first seconds, before that as planned."""
        spent, done = time.perf_counter() - start, step - first - 1
        each = planned / total if spent < WRITE or not done else spent / done
        return each * (total - step)

    def write(self, state: str, command: str = "", done: bool = False) -> None:
        left = sum(self.expected.values())
        spent = time.perf_counter() - self.started
        fraction = 1.0 if done else spent / max(spent + left, 1e-9)
        page = Page(
            self.title,
            state,
            fraction,
            None if done else left,
            self.losses,
            self.drawing.images,
            self.drawing.captions,
            self.drawing.verdicts,
            self.notes,
            command,
            done,
        )
        page.write(self.path)
        self.written = time.perf_counter()

    @contextmanager
    def running(self, command: str) -> Iterator[None]:
        """While the run goes on. Should it end early, the page says so, and how to go on."""
        self.write("begun")
        try:
            yield
        except BaseException:
            self.write("stopped before the end; to go on:", command, done=True)
            raise

    def say(self, part: str) -> None:
        """A part that is no training begins."""
        tqdm.write(part, file=sys.stderr)
        self.write(part)
