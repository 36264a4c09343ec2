"""A sampling run step by step, with what went in, what came out, and the lines that ran."""

import ast
import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from types import CodeType, FrameType

import torch
from jaxtyping import Float
from torch import Tensor, nn

from minidiff import denoiser, guidance, steps
from minidiff.denoiser import Prediction
from minidiff.latent_diffusion import LatentDiffusion
from minidiff.options.sampling import SampleConfig
from minidiff.samplers import Normal, by_name

FILES = {module.__file__ for module in (steps, guidance, denoiser)}
HIDDEN = ("<genexpr>", "<listcomp>", "<dictcomp>", "<setcomp>")  # inside of a function that shows


@dataclass(frozen=True)
class Ran:
    """The lines of one function that ran, by their number, as they stand in the file."""

    file: Path
    function: str
    lines: dict[int, str]


@dataclass(frozen=True)
class Evaluation:
    """One call of the network. Under guidance its batch has the empty prompt, then the prompt."""

    x: Float[Tensor, "B C H W"]
    c_noise: float  # the time, as the network takes it
    F: Float[Tensor, "B C H W"]


@dataclass(frozen=True)
class Walked:
    """One step from t to s. x0 is the sampler's estimate; eps and F follow from x and it."""

    t: float
    s: float
    x: Float[Tensor, "1 C H W"]
    x0: Float[Tensor, "1 C H W"]
    eps: Float[Tensor, "1 C H W"]
    F: Float[Tensor, "1 C H W"]
    x_s: Float[Tensor, "1 C H W"]
    evaluations: tuple[Evaluation, ...]
    source: tuple[Ran, ...]  # functions in the order of their first call


@torch.no_grad()
def walk(model: LatentDiffusion, prompt: str, config: SampleConfig) -> Iterator[Walked]:
    """Sample one image; the last x_s are its latents, those that pipeline.generate decodes."""
    step = by_name(config.sampler or model.sampler)
    times = model.times(step, config)
    noise, memory = Normal.seeded(config.seed, [0]), None
    x = model.start(1, config, noise, times[0]).to(model.device)
    denoise = model.guided([prompt], config)
    for t, s in pairwise(times):
        with _watched(model) as seen:
            x_s, x0, memory = step(denoise, model.schedule, x, t, s, noise, memory)
        alpha, sigma = model.schedule.alpha_sigma(t)
        eps = (x - alpha.item() * x0) / sigma.item()
        F = model.denoiser.unsolve(Prediction(x0, eps), t.expand(1))
        evaluations, source = tuple(seen.evaluations), tuple(map(_ran, seen.lines.items()))
        yield Walked(t.item(), s.item(), x, x0, eps, F, x_s, evaluations, source)
        x = x_s


@dataclass
class _Seen:
    """What happens while a step runs."""

    evaluations: list[Evaluation] = field(default_factory=list)
    lines: dict[CodeType, set[int]] = field(default_factory=dict)

    def evaluated(self, _network: nn.Module, args: tuple, output: Tensor) -> None:
        x, c_noise = args[:2]
        self.evaluations.append(Evaluation(x, c_noise[0].item(), output))

    def line(self, frame: FrameType, event: str, _arg: object):
        """For sys.settrace: notes lines of FILES."""
        code = frame.f_code
        if code.co_filename not in FILES or code.co_name in HIDDEN:
            return None
        ran = self.lines.setdefault(code, set())
        if event == "line":
            ran.add(frame.f_lineno)
        return self.line


@contextlib.contextmanager
def _watched(model: LatentDiffusion) -> Iterator[_Seen]:
    seen, before = _Seen(), sys.gettrace()
    handle = model.unet.register_forward_hook(seen.evaluated)
    sys.settrace(seen.line)
    try:
        yield seen
    finally:
        sys.settrace(before)
        handle.remove()


def _ran(item: tuple[CodeType, set[int]]) -> Ran:
    """The source of what ran: a statement of several lines is whole."""
    code, numbers = item
    lines = Path(code.co_filename).read_text(encoding="utf-8").splitlines()
    for node in ast.walk(ast.parse("\n".join(lines))):
        is_simple = isinstance(node, ast.stmt) and not hasattr(node, "body")
        span = range(node.lineno, node.end_lineno + 1) if is_simple else range(0)
        if numbers.intersection(span) and code.co_name != "<lambda>":  # which is a part of one
            numbers = numbers.union(span)
    package = Path(steps.__file__).parent.parent
    file = Path(code.co_filename).relative_to(package)
    return Ran(file, code.co_qualname, {n: lines[n - 1] for n in sorted(numbers)})
