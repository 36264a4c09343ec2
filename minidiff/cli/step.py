"""The verb that walks through the reverse chain in the terminal, one step a key press."""

import contextlib
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from minidiff.cli import options, picture
from minidiff.cli.generate import check_sides, warn_of_words
from minidiff.cli.options import EXAMPLE, MODEL, SAMPLE, Device
from minidiff.errors import UserError
from minidiff.options.sampling import SampleConfig, Size

if TYPE_CHECKING:
    from torch import Tensor

    from minidiff.figures.walk import Ran, Walked
    from minidiff.latent_diffusion import LatentDiffusion

Prompt = tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="PROMPT")]]
KEYS = "[Enter: next step; a number, then Enter: so many; b: back; q: quit]"
COLUMNS = 48  # of the picture, at most
BACK, QUIT = "b", "q"


def step(
    prompt: Prompt = EXAMPLE,
    model: Path = MODEL,
    config: SampleConfig = SAMPLE,
    device: Device = "auto",
    out: Path = Path("out/step"),
) -> None:
    """The reverse chain in the terminal, one step a key press: lines that ran, numbers in and out.

    Example: minidiff step "a small blue circle" --steps 10 --sampler euler --seed 7

    Without a terminal to type in, all steps are printed at once.

    Args:
        prompt: what to show, in quotes.
        model: box, the small model that ships with minidiff; or our folder, a diffusers folder, one
            .safetensors or .ckpt file of Stable Diffusion.
        device: where to compute; auto takes a GPU if there is one.
        out: folder for step.png, the image at the end.
    """
    options.check_out(out, "step.png")
    if model == MODEL:
        warn_of_words((prompt,))
    device = options.pick_device(device)
    from minidiff import load, pipeline
    from minidiff.figures import plots
    from minidiff.figures.walk import walk

    loaded = load(model, device)
    config = options.completed(config, loaded)
    check_sides(config.size or Size(loaded.size, loaded.size), loaded)
    if loaded.unet.config.in_channels != loaded.vae.latent_channels:
        raise UserError("this model fills masks; it needs generate with an --image and a --mask.")
    session = Session(loaded, config, walk(loaded, prompt, config))
    if session.run():
        image = pipeline.decode(loaded, session.steps[-1].x_s, config.tile).clamp(-1, 1)[0]
        print(plots.save_png(image, out / "step.png", {"prompt": prompt, "seed": str(config.seed)}))


@dataclass
class Session:
    """The steps so far, and the pages that show them."""

    model: "LatentDiffusion"
    config: SampleConfig
    chain: Iterator["Walked"]
    steps: list["Walked"] = field(default_factory=list)

    def run(self) -> bool:
        """Show step after step, as the keys say; False if the user quits before the end."""
        asks = sys.stdin.isatty() and sys.stdout.isatty()
        with single_keys() if asks else contextlib.nullcontext():
            return self.walk(asks)

    def walk(self, asks: bool) -> bool:
        k, ahead = 0, 1
        while k < self.config.steps:
            if k == len(self.steps):
                self.steps.append(next(self.chain))
            self.show(k)
            k, ahead = k + 1, ahead - 1
            if not asks or ahead > 0:
                continue
            print(cut(KEYS), flush=True)
            answer = command()
            if answer == QUIT:
                return False
            k, ahead = (max(0, k - 2), 1) if answer == BACK else (k, answer)
        return True

    def show(self, k: int) -> None:
        """Print the page of the k-th step."""
        walked = self.steps[k]
        first = next(n for n, each in enumerate(self.steps) if each.source == walked.source)
        for line in self.lines(k, walked):
            print(cut(line))
        if first < k:
            print(cut(f"the same lines ran as in step {first + 1}"))
        else:
            print(*map(cut, code(walked.source)), sep="\n")
        image = self.model.decode(walked.x0)[0]
        has_colour, width = picture.has_colour(), shutil.get_terminal_size().columns
        print(cut("x0, the estimate, decoded:"), flush=True)
        text = picture.as_text(image, max(8, min(COLUMNS, width - 1)), has_colour)
        raw = getattr(sys.stdout, "stream", sys.stdout)  # escape sequences of our own
        raw.write(f"{text}\n\n")
        raw.flush()

    def lines(self, k: int, walked: "Walked") -> Iterator[str]:
        """The times and the numbers of a step."""
        import torch

        schedule, times = self.model.schedule, (walked.t, walked.s)
        sampler, total = self.config.sampler, self.config.steps
        yield f"step {k + 1} of {total}, {sampler}: from t = {times[0]:g} to s = {times[1]:g}"
        yield f"{'':10}{'alpha':>10}{'sigma':>10}{'log SNR':>10}"
        for name, time in zip("ts", times, strict=True):
            at = torch.tensor(time, dtype=torch.float64)
            alpha, sigma = schedule.alpha_sigma(at)
            log_snr = schedule.snr(at).log()
            yield f"{f'{name} = {time:g}':10}{alpha:10.4f}{sigma:10.4f}{log_snr:10.3f}"
        yield f"{'':28}{'shape':16}{'mean':>9}{'deviation':>11}"
        yield values("in: x_t", walked.x)
        for evaluation in walked.evaluations:
            yield f"network, told the time {evaluation.c_noise:.4g}:"
            names = ["F"] if len(evaluation.F) == 1 else ["F, empty prompt", "F, prompt"]
            for name, F in zip(names, evaluation.F.split(1), strict=True):
                yield values(f"  {name}", F)
        yield values("x0, estimate", walked.x0)
        yield values("eps that follows", walked.eps)
        yield values("F that follows", walked.F)
        yield values("out: x_s", walked.x_s)


def values(name: str, x: "Tensor") -> str:
    shape = " x ".join(map(str, x.shape))
    return f"{name:28}{shape:16}{x.mean():9.4f}{x.std(correction=0):11.4f}"


def code(source: tuple["Ran", ...]) -> Iterator[str]:
    """The lines that ran, under the names of their functions."""
    yield "the lines that ran:"
    for ran in source:
        yield f"{ran.file.as_posix()}  {ran.function}"
        yield from (f"{number:5}  {line}" for number, line in ran.lines.items())


def cut(line: str) -> str:
    """A line that fits into the terminal; elsewhere it is whole."""
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else 1000
    return line if len(line) < width else f"{line[: max(0, width - 2)]}~"


def command() -> int | str:
    """What the keys say: how many steps to go, BACK or QUIT."""
    digits = ""
    while True:
        key = os.read(sys.stdin.fileno(), 1).decode(errors="replace")
        if key in ("", QUIT, "\x04"):  # Ctrl-D
            return QUIT
        if key == BACK:
            return BACK
        if key in "\r\n ":
            return max(1, int(digits or 1))
        digits += key if key in "0123456789" and len(digits) < 6 else ""


@contextlib.contextmanager
def single_keys() -> Iterator[None]:
    """A key is read when it is pressed, where the system can: without waiting for Enter."""
    try:
        import termios
        import tty
    except ImportError:  # Windows
        yield
        return
    terminal = sys.stdin.fileno()
    before = termios.tcgetattr(terminal)
    try:
        tty.setcbreak(terminal)
        yield
    finally:
        termios.tcsetattr(terminal, termios.TCSADRAIN, before)
