"""What the explorer shows of a run, collected while it runs: trace, chain, maps, other runs."""

import inspect
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn
from tqdm import tqdm

from minidiff import pipeline
from minidiff.checkpoints import lora as lora_files
from minidiff.errors import UserError
from minidiff.figures import strips
from minidiff.figures.trace import Trace, trace
from minidiff.figures.unet_map import Box, boxes_of
from minidiff.figures.walk import Ran, walk
from minidiff.latent_diffusion import LatentDiffusion
from minidiff.layers import TransformerBlock
from minidiff.methods import lora
from minidiff.methods.attention_maps import AttentionMap, record, words_of
from minidiff.options.sampling import SampleConfig
from minidiff.samplers import Normal
from minidiff.training.nonfinite import NonFiniteError

SCALES = (0.0, 1.0, 2.0, 3.0, 5.0, 8.0)  # of guidance
MOST_STEPS = 40  # that are shown; of a longer run, so many in equal strides
CHANNELS = 8  # of a feature map that are shown, in equal strides
MAP_SIDE, IMAGE_SIDE = 32, 192  # pixels at most, of maps and of the pictures of each step

Images = Float[Tensor, "steps C H W"]


@dataclass(frozen=True)
class Other:
    """A second run, which differs from the first in one thing."""

    first: str  # what the two are called, as in "seed 0"
    second: str
    prompt: str
    config: SampleConfig
    lora: Path | None = None  # a LoRA file that the second run has
    scale: float = 1.0  # of that LoRA


@dataclass(frozen=True)
class Request:
    """What to explore. other: a second run beside it. scales: of guidance, for further runs."""

    model: LatentDiffusion
    prompt: str
    config: SampleConfig
    scales: Sequence[float] = SCALES
    other: Other | None = None

    def __post_init__(self) -> None:
        model, config = self.model, self.config
        if model.unet.config.in_channels != model.vae.latent_channels:
            raise UserError("this model fills masks; there is no page of such a run yet.")
        own = model.guidance if config.guidance is None else config.guidance
        config = replace(config, guidance=own, sampler=config.sampler or model.sampler)
        object.__setattr__(self, "config", config)
        scales = {own} if model.text.null(1) is None else {own, *self.scales}
        object.__setattr__(self, "scales", tuple(sorted(map(float, scales))))

    @property
    def shown(self) -> list[int]:
        """The steps that are shown, from 0."""
        count = min(self.config.steps, MOST_STEPS)
        return torch.linspace(0, self.config.steps - 1, count).round().long().tolist()

    @property
    def has_words(self) -> bool:
        """Whether the prompt reaches the image by cross-attention."""
        blocks = (b for b in self.model.unet.modules() if isinstance(b, TransformerBlock))
        return self.config.guidance != 0 and any(block.has_context for block in blocks)

    @property
    def runs(self) -> int:
        return len(self.scales) + (self.other is not None)


@dataclass(frozen=True)
class Step:
    """One step of the chain, on the CPU. maps: of each box of the U-Net, a few channels of the
    first evaluation; map_values: mean and deviation of all of them."""

    number: int  # from 1
    t: float
    s: float
    c_noise: float
    x: Float[Tensor, "1 C H W"]
    x0: Float[Tensor, "1 C H W"]
    eps: Float[Tensor, "1 C H W"]
    maps: list[Float[Tensor, "_ _ _"]]
    map_values: list[tuple[float, float]]
    source: tuple[Ran, ...]


@dataclass(frozen=True)
class Run:
    """A whole run in images in [-1, 1]; x_t and x0 are of the steps that are shown."""

    label: str
    image: Float[Tensor, "3 height width"]
    x_t: Images
    x0: Images
    times: list[float]


@dataclass(frozen=True)
class Collected:
    """All that the page can show."""

    request: Request
    rows: Trace
    boxes: list[Box]
    steps: list[Step]
    forward: Images  # the finished image with noise, decoded
    words: list[str]
    attention: list[AttentionMap]
    run: Run
    guided: list[Run]  # one for each scale, the run itself among them
    other: Run | None


def first_step(request: Request) -> tuple[Trace, float]:
    """The trace of the run's first step; and about how many seconds all runs take."""
    with trace(request.model.unet) as rows:
        walked = next(walk(request.model, request.prompt, request.config))
    start = time.perf_counter()
    request.model.decode(walked.x0)
    decoding = time.perf_counter() - start
    step = sum(row.seconds or 0 for row in rows if row.parent is None)
    images = (2 * request.runs + 1) * len(request.shown)
    return rows, request.runs * request.config.steps * step + images * decoding


@torch.no_grad()
def collect(request: Request, rows: Trace, progress: bool = False) -> Collected:
    """Make all runs. The model is as before at the end."""
    model, config, boxes = request.model, request.config, boxes_of(rows)
    total = request.runs * config.steps
    with tqdm(desc="sampling", total=total, unit="step", delay=0.01, disable=not progress) as bar:
        other = _second(request, bar)  # first: a file that does not fit is told at once
        words = words_of(model.text, request.prompt) if request.has_words else []
        steps, attention, latents = _chain(request, rows, boxes, [n for _, n in words], bar)
        image = _finished(model, latents, config)
        run = Run("", image, *_decoded(model, [(s.t, s.x, s.x0) for s in steps]))
        guided = [_guided(request, run, scale, bar) for scale in request.scales]
    eps, times = steps[0].eps, torch.tensor(run.times, dtype=torch.float64)
    noised = [model.schedule.mix(latents.cpu(), eps, t) for t in times]
    _, forward, _ = zip(*_visible(model, times, noised, noised), strict=True)
    spelled = [word for word, _ in words]
    return Collected(
        request, rows, boxes, steps, torch.cat(forward), spelled, attention, run, guided, other
    )


def _chain(
    request: Request, rows: Trace, boxes: list[Box], counts: list[int], bar: tqdm
) -> tuple[list[Step], list[AttentionMap], Tensor]:
    """The steps that are shown, the attention maps of all steps, and the latents at the end."""
    model, shown, steps = request.model, set(request.shown), []
    names = [rows[box.calls[-1]].name for box in boxes]
    with record(model, counts) if counts else _nothing() as attention, _maps(model, names) as maps:
        for k, walked in enumerate(walk(model, request.prompt, request.config)):
            if k in shown:
                x, x0, eps = (v.float().cpu() for v in (walked.x, walked.x0, walked.eps))
                told = walked.evaluations[0].c_noise
                its = [maps[name] for name in names]
                steps.append(
                    Step(k + 1, walked.t, walked.s, told, x, x0, eps,
                         [m for m, _ in its], [v for _, v in its], walked.source)
                )  # fmt: skip
            maps.clear()
            bar.update()
    return steps, attention, walked.x_s


@contextmanager
def _nothing() -> Iterator[list]:
    yield []


@contextmanager
def _maps(model: LatentDiffusion, names: list[str]) -> Iterator[dict]:
    """Of modules of the U-Net: some channels of their first output, and its mean and deviation."""
    maps: dict[str, tuple[Tensor, tuple[float, float]]] = {}
    modules = {name: model.unet.get_submodule(name) for name in names}
    handles = [m.register_forward_hook(partial(_note, maps, n)) for n, m in modules.items()]
    try:
        yield maps
    finally:
        for handle in handles:
            handle.remove()


def _note(maps: dict, name: str, _module: nn.Module, _args: tuple, output: Tensor) -> None:
    if name not in maps:
        values = output[-1:].float()  # under guidance the last one is that of the prompt
        few = strips.shrunk(values[:, channels(values.shape[1])], MAP_SIDE)[0].cpu()
        maps[name] = few, (values.mean().item(), values.std(correction=0).item())


def channels(count: int) -> list[int]:
    """The channels that are shown, of so many."""
    return torch.linspace(0, count - 1, min(count, CHANNELS)).round().long().tolist()


def _guided(request: Request, run: Run, scale: float, bar: tqdm) -> Run:
    """The run at another scale of guidance."""
    if scale == request.config.guidance:
        return replace(run, label=f"{scale:g}")
    config = replace(request.config, guidance=scale)
    return _run(request, f"{scale:g}", request.prompt, config, bar)


def _second(request: Request, bar: tqdm) -> Run | None:
    other, model = request.other, request.model
    if other is None:
        return None
    if other.lora is not None:
        lora_files.load(model, other.lora, other.scale)
    try:
        return _run(request, other.second, other.prompt, other.config, bar)
    finally:
        if other.lora is not None:
            lora.remove(model)


def _run(request: Request, label: str, prompt: str, config: SampleConfig, bar: tqdm) -> Run:
    model, frames = request.model, []
    noise, shown = Normal.seeded(config.seed, [0]), set(request.shown)
    for k, frame in enumerate(model.sample([prompt], generator=noise, config=config)):
        if k in shown and k < config.steps:
            frames.append(frame)
        bar.update(k < config.steps)
    return Run(label, _finished(model, frame.x0, config), *_decoded(model, frames))


def _finished(model: LatentDiffusion, latents: Tensor, config: SampleConfig) -> Tensor:
    """The same image as generate's."""
    image = pipeline.decode(model, latents, config.tile).clamp(-1, 1)[0].float().cpu()
    if not image.isfinite().all():
        raise NonFiniteError("the image holds numbers that are not finite; generate says where.")
    return image


def _decoded(model: LatentDiffusion, frames: list[tuple]) -> tuple[Images, Images, list[float]]:
    """x_t and x0 of frames (t, x, x0) as images, and the times."""
    times, xs, x0s = zip(*frames, strict=True)
    columns = zip(*_visible(model, torch.tensor(times).double(), xs, x0s), strict=True)
    _, x_t, x0 = columns
    return torch.cat(x_t), torch.cat(x0), list(times)


def _visible(model: LatentDiffusion, times: Tensor, xs: Sequence, x0s: Sequence) -> Iterator[tuple]:
    """(t, x_t, x0) as small images; x_t is brought to unit variance where it has more."""
    for t, x, x0 in zip(times, xs, x0s, strict=True):
        alpha, sigma = model.schedule.alpha_sigma(t)
        scale = max(1.0, (alpha**2 + sigma**2).sqrt().item())
        both = model.decode(torch.cat([x / scale, x0]).to(model.device)).clamp(-1, 1).float().cpu()
        yield t, *strips.shrunk(both, IMAGE_SIDE).split(1)


def source_of(model: LatentDiffusion, name: str) -> tuple[str, Path, int, str]:
    """Name, file, line and text of a module's class; where that is torch's, of the U-Net's method
    that calls it."""
    kind, unet = type(model.unet.get_submodule(name)), type(model.unet)
    own = unet.forward if name.endswith("_out") else getattr(unet, "encode", unet.forward)
    thing = kind if kind.__module__.startswith("minidiff.") else own
    thing = inspect.unwrap(thing)
    lines, line = inspect.getsourcelines(thing)
    file = Path(inspect.getsourcefile(thing)).relative_to(Path(pipeline.__file__).parents[1])
    return thing.__qualname__, file, max(1, line), "".join(lines)
