"""The explorer: one run as one HTML file that needs no server and no network.

    request = Request(model, "a small blue circle", SampleConfig(seed=7))
    rows, seconds = first_step(request)
    write(collect(request, rows), "explore.html")

The page is the template explorer.html with one piece of JSON in it, a Page. Its content security
policy lets nothing run but the template's own script, and nothing load but images in the file.
"""

import base64
import hashlib
import html
import json
import math
import re
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from minidiff.data.folder import to_uint8
from minidiff.errors import UserError
from minidiff.figures import plots, strips
from minidiff.figures.curves import write as write_figure
from minidiff.figures.explored import MAP_SIDE, Collected, Run, channels, source_of
from minidiff.figures.strips import Strip
from minidiff.methods.attention_maps import AttentionMap
from minidiff.training import atomic
from minidiff.vae import Pixels

LIMIT = 15_000_000  # bytes; a larger page is made again with every second step
POINTS = 120  # of a curve
TEMPLATE = Path(__file__).with_name("explorer.html")
Weights = Float[Tensor, "words h w"]


@dataclass(frozen=True)
class Moment:
    """The numbers of a step from t to s; values: mean and deviation by the name of a panel."""

    step: int
    t: float
    s: float
    told: float  # the time as the network takes it
    progress: float  # of t, from 0 (data) to 1 (noise)
    alpha: float
    sigma: float
    log_snr: float | None  # None: infinite
    values: dict[str, tuple[float, float]]
    code: int  # which of the page's codes ran


@dataclass(frozen=True)
class Panel:
    """One picture for each step, beside the slider."""

    name: str
    about: str
    values: str  # a key of Moment.values
    strip: Strip


@dataclass(frozen=True)
class Curves:
    """The schedule, at the same points of progress."""

    progress: list[float]
    alpha: list[float]
    sigma: list[float]
    log_snr: list[float | None]


@dataclass(frozen=True)
class Source:
    name: str
    file: str
    line: int
    text: str


@dataclass(frozen=True)
class Place:
    """A box of the U-Net's map; a strip has a row for each step and a column for each channel."""

    name: str
    layers: str
    side: str  # down, middle or up
    row: int  # of the map
    shape: tuple[int, int, int]
    skip: int | None  # channels that go across from here
    parameters: int
    multiply_adds: int
    channels: list[int]
    maps: Strip
    values: list[tuple[float, float]]  # mean and deviation at each step
    sources: list[str]


@dataclass(frozen=True)
class Level:
    """Attention maps of one size: a row for each step and one of their mean; a column for each
    word. Each word has its share of all attention, and the row and column that looks at it most."""

    name: str
    strip: Strip
    shares: list[list[float]]
    peaks: list[list[tuple[int, int]]]


@dataclass(frozen=True)
class Version:
    """A run beside others."""

    label: str
    image: str  # a data URI
    x_t: Strip | None
    x0: Strip
    times: list[float]


@dataclass(frozen=True)
class Pair:
    """Two runs. differences: of the guesses of x0 at each step, and of the finished images at the
    end; the mean over pixels, of 255."""

    first: Version
    second: Version
    differences: list[float]


@dataclass(frozen=True)
class Page:
    """All that explorer.html shows."""

    prompt: str
    settings: dict[str, str]
    steps: int  # of the run; the page may show fewer
    image: str
    size: tuple[int, int]  # height and width
    moments: list[Moment]
    panels: list[Panel]
    codes: list[list[Source]]  # lines that ran in a step
    curves: Curves
    places: list[Place]
    sources: dict[str, Source]
    words: list[str]
    levels: list[Level]
    scales: list[Version]  # runs at other guidance
    pair: Pair | None


def write(collected: Collected, path: str | Path) -> Path:
    """Write the page whole or not at all, over nothing but a page of ours."""
    shown = list(range(len(collected.steps)))
    while True:
        text = text_of(page_of(collected, shown)).encode()
        if len(text) <= LIMIT:
            return write_figure(path, text, {".html"})
        if len(shown) == 1:
            size = f"{len(text) / 1e6:.0f} MB, {LIMIT / 1e6:.0f} are the most"
            raise UserError(f"{path}: the page would have {size}; a smaller `size` takes less.")
        shown = shown[::-2][::-1]


def text_of(page: Page) -> str:
    """The page as HTML. What comes from the user is escaped: no text of it can end the JSON."""
    template = TEMPLATE.read_text(encoding="utf-8")
    script = re.search(r"<script>(.*?)</script>", template, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    data = json.dumps(asdict(page), allow_nan=False, separators=(",", ":"))  # ASCII
    for letter in "<>&":
        data = data.replace(letter, f"\\u{ord(letter):04x}")
    values = {
        "signature": atomic.SIGNATURE,
        "policy": f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
        f"script-src 'sha256-{digest}'",
        "title": html.escape(page.prompt),
        "data": data,
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda name: values[name[1]], template)


def page_of(collected: Collected, shown: list[int]) -> Page:
    """shown: indices of the collected steps."""
    request, run = collected.request, collected.run
    config, model = request.config, request.model
    codes = []
    for step in collected.steps:
        if step.source not in codes:
            codes.append(step.source)
    sources = {}
    places = _places(collected, shown, sources)
    height, width = run.image.shape[1:]
    settings = {
        "sampler": config.sampler,
        "steps": str(config.steps),
        "guidance": f"{config.guidance:g}",
        "seed": str(config.seed),
        "size": f"{width} x {height} pixels",
        "network predicts": model.denoiser.target,
    }
    settings |= {"negative": config.negative} if config.negative else {}
    return Page(
        prompt=request.prompt,
        settings=settings,
        steps=config.steps,
        image=_uri(run.image, lossless=True),
        size=(height, width),
        moments=_moments(collected, shown, codes),
        panels=_panels(collected, shown),
        codes=[[_ran(each) for each in code] for code in codes],
        curves=_curves(collected),
        places=places,
        sources=sources,
        words=collected.words,
        levels=_levels(collected, shown) if collected.words else [],
        scales=[_version(each, shown, False) for each in collected.guided],
        pair=_pair(collected, shown),
    )


def _uri(image: Float[Tensor, "3 H W"], lossless: bool = False) -> str:
    pixels = to_uint8(image).movedim(0, -1).contiguous()
    return strips.uri(Image.fromarray(pixels.numpy()), lossless or max(image.shape) <= 64)


def _moments(collected: Collected, shown: list[int], codes: list) -> list[Moment]:
    schedule, moments = collected.request.model.schedule, []
    for step in (collected.steps[k] for k in shown):
        t = torch.tensor(step.t, dtype=torch.float64)
        alpha, sigma = (scale.item() for scale in schedule.alpha_sigma(t))
        log_snr = schedule.snr(t).log().item()
        values = {"x_t": step.x, "x0": step.x0, "eps": step.eps}
        moments.append(
            Moment(
                step=step.number,
                t=step.t,
                s=step.s,
                told=step.c_noise,
                progress=schedule.progress(t).item(),
                alpha=alpha,
                sigma=sigma,
                log_snr=log_snr if math.isfinite(log_snr) else None,
                values={
                    name: (value.mean().item(), value.std(correction=0).item())
                    for name, value in values.items()
                },
                code=codes.index(step.source),
            )
        )
    return moments


def _panels(collected: Collected, shown: list[int]) -> list[Panel]:
    """Decoded pictures, and latents as colours: the same colour is the same latent in all three."""
    run, steps = collected.run, [collected.steps[k] for k in shown]
    panels = [
        Panel("x_t", "what the step takes", "x_t", strips.colour(run.x_t[shown])),
        Panel("guess of x0", "what the picture would be", "x0", strips.colour(run.x0[shown])),
        Panel(
            "forward chain",
            "the finished picture with the first noise, at the same t",
            "",
            strips.colour(collected.forward[shown]),
        ),
    ]
    eps = torch.cat([step.eps for step in steps])
    if isinstance(collected.request.model.vae, Pixels):
        return [*panels, Panel("eps", "the noise in x_t", "eps", strips.colour(eps / 2.5))]
    x, x0 = torch.cat([step.x for step in steps]), torch.cat([step.x0 for step in steps])
    x = x / x.flatten(1).std(1).clamp(min=1).view(-1, 1, 1, 1)
    colours = strips.shrunk(plots.latents_to_rgb(torch.cat([x, x0, eps])), 2 * MAP_SIDE)
    for name, about, values, part in zip(
        ("latents of x_t", "latents of x0", "latents of eps"),
        ("four numbers at each place, as colours", "the guess, before the decoder", "the noise"),
        ("x_t", "x0", "eps"),
        colours.chunk(3),
        strict=True,
    ):
        panels.append(Panel(name, about, values, strips.colour(part)))
    return panels


def _curves(collected: Collected) -> Curves:
    """From data to noise."""
    schedule = collected.request.model.schedule
    levels = getattr(schedule, "T", POINTS)
    times = schedule.timesteps(min(POINTS, levels)).flip(0)
    snr = schedule.snr(times).log().tolist()
    return Curves(
        schedule.progress(times).tolist(),
        *(scale.tolist() for scale in schedule.alpha_sigma(times)),
        [value if math.isfinite(value) else None for value in snr],
    )


def _ran(ran) -> Source:
    lines = [f"{number:4}  {line}" for number, line in ran.lines.items()]
    return Source(ran.function, ran.file.as_posix(), min(ran.lines, default=0), "\n".join(lines))


def _places(collected: Collected, shown: list[int], sources: dict[str, Source]) -> list[Place]:
    """The boxes of the U-Net, placed as unet_map draws them; fills sources."""
    rows, boxes, model = collected.rows, collected.boxes, collected.request.model
    first = next(k for k, box in enumerate(boxes) if box.takes_skip)
    last = max(k for k, box in enumerate(boxes) if box.skip_to is not None)
    starts = {box.skip_to: k for k, box in enumerate(boxes) if box.skip_to is not None}
    lines, places, line = [], [], first
    for k, box in enumerate(boxes):
        line = k if k < first else starts.get(box.calls[0], line - 1)
        lines.append(line)
    for k, (box, line) in enumerate(zip(boxes, lines, strict=True)):
        names = []
        for call in box.calls:
            name, file, number, text = source_of(model, rows[call].name)
            sources[name] = Source(name, file.as_posix(), number, text)
            names += [name] if name not in names else []
        maps = torch.stack([collected.steps[n].maps[k] for n in shown])
        mean = maps.mean((0, 2, 3), keepdim=True)
        deviation = maps.std((0, 2, 3), keepdim=True, correction=0).clamp(min=1e-12)
        last_row = rows[box.calls[-1]]
        places.append(
            Place(
                name=box.home,
                layers=" + ".join(filter(None, box.names)),
                side="down" if k <= last else "middle" if k < first else "up",
                row=line - min(lines),
                shape=tuple(last_row.shape[1:]),
                skip=last_row.shape[1] if box.skip_to is not None else None,
                parameters=sum(rows[call].parameters for call in box.calls),
                multiply_adds=sum(rows[call].multiply_adds or 0 for call in box.calls),
                channels=channels(last_row.shape[1]),
                maps=strips.grey((maps - mean) / (2.5 * deviation)),
                values=[collected.steps[n].map_values[k] for n in shown],
                sources=names,
            )
        )
    return places


def _levels(collected: Collected, shown: list[int]) -> list[Level]:
    """All levels together, then each."""
    by_time: dict[float, list[AttentionMap]] = defaultdict(list)
    for each in collected.attention:
        by_time[each.t].append(each)
    steps = [by_time[collected.steps[k].t] for k in shown] + [collected.attention]
    sizes = sorted({each.weights.shape[1:] for each in collected.attention}, reverse=True)
    chosen = {"all levels": sizes[0]} | {f"{h} x {w}": torch.Size((h, w)) for h, w in sizes}
    levels = []
    for name, size in chosen.items():
        own = None if name == "all levels" else size
        means = torch.stack([_mean(maps, size, own) for maps in steps])
        means = torch.stack([strips.shrunk(each[None], MAP_SIDE)[0] for each in means])
        shares = means.mean((2, 3))
        places = means.flatten(2).argmax(2)
        width = means.shape[3]
        peaks = [[(place // width, place % width) for place in row] for row in places.tolist()]
        rounded = [[round(share, 4) for share in row] for row in shares.tolist()]
        levels.append(Level(name, strips.heat(means), rounded, peaks))
    return levels


def _mean(maps: list[AttentionMap], size: torch.Size, own: torch.Size | None) -> Weights:
    """The mean of the maps, enlarged to size; of those of this own size, or of all."""
    chosen = [m.weights for m in maps if own in (None, m.weights.shape[1:])]
    return sum(F.interpolate(w[None], size, mode="bilinear")[0] for w in chosen) / len(chosen)


def _version(run: Run, shown: list[int], with_x: bool) -> Version:
    small = strips.shrunk(run.image[None], 2 * 192)[0]
    x_t = strips.colour(run.x_t[shown]) if with_x else None
    times = [run.times[k] for k in shown]
    return Version(run.label, _uri(small), x_t, strips.colour(run.x0[shown]), times)


def _pair(collected: Collected, shown: list[int]) -> Pair | None:
    run, second, other = collected.run, collected.other, collected.request.other
    if second is None:
        return None
    apart = (run.x0[shown] - second.x0[shown]).abs().mean((1, 2, 3)).tolist()
    apart.append((run.image - second.image).abs().mean().item())
    first = _version(run, shown, True)
    first = Version(other.first, first.image, first.x_t, first.x0, first.times)
    return Pair(first, _version(second, shown, True), [127.5 * each for each in apart])
