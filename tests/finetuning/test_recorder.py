"""The flight recorder: nothing of the run it watches moves, its numbers are what they are called, a resumed run keeps its past; and its one page."""

import importlib
import json
import math
import re
import sys
from html.parser import HTMLParser
from itertools import repeat
from pathlib import Path

import pytest
import torch
from jaxtyping import install_import_hook
from PIL import Image

from minidiff import schedules
from minidiff.conditioners import ClassLabels, LabelsConfig
from minidiff.denoiser import Denoiser
from minidiff.errors import UserError
from minidiff.evaluation.features import pixels, random_conv
from minidiff.figures.plots import save_png
from minidiff.finetuning.recorder.advice import Record, advise, best, relative
from minidiff.finetuning.recorder.recorder import Recorder, Thumbnails
from minidiff.finetuning.recorder.report import SHOWN, page, steps_shown
from minidiff.latent_diffusion import LatentDiffusion
from minidiff.options.finetuning import RecorderConfig
from minidiff.train import TrainConfig, seed_of, train
from minidiff.unet import UNet, UNetConfig
from minidiff.vae import Pixels, PixelsConfig

sys.path.insert(0, str(Path(__file__).parents[2] / "experiments"))
with install_import_hook(
    "flight_recorder", "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))"
):
    flight_recorder = importlib.import_module("flight_recorder")

PROMPTS = {"caption": "cat", "class animal": "", "unrelated": "dog"}
SIDE = 8


def tiny(schedule=None, target="eps", weighting=None):
    """Pixel diffusion of a few thousand random weights; dropout, so that train mode would show."""
    torch.manual_seed(1)
    text = ClassLabels(LabelsConfig(["cat", "dog"], dim=8))
    unet = UNet(
        UNetConfig(
            3, 3, (8, 8), blocks=1, depth=(0, 1), heads=(1, 2), context_dim=8, groups=2, dropout=0.3
        )
    )
    for p in unet.parameters():
        torch.nn.init.normal_(p, std=1 / math.sqrt(max(p[0].numel(), 4)))
    model = LatentDiffusion(
        Pixels(PixelsConfig(3)),
        text,
        Denoiser(unet, schedule or schedules.linear(), target, weighting),
        SIDE,
        sampler="ddpm",
    )
    return model.requires_grad_(False)


def data(n=6):
    pictures = torch.rand(n, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(5)) * 2 - 1
    return pictures, [(picture, ("cat", "dog")[k % 2]) for k, picture in enumerate(pictures)]


def recorder(folder, model=None, **how):
    pictures, examples = data()
    how = dict(every=2, n=2, steps=1, probe=2, noises=1) | how
    settings = how.pop("settings", None)
    return Recorder(
        model or tiny(),
        folder,
        PROMPTS,
        pictures,
        examples[3:],
        examples[:3],
        RecorderConfig(**how),
        settings,
    )


def run(folder=None, steps=4, **how):
    """Weights after a short training, watched where there is a folder."""
    model = tiny()
    model.unet.requires_grad_(True)
    watching = recorder(folder, model, **how) if folder else None
    pictures, _ = data()
    if watching:
        watching.measure(0, {})
    for step in train(
        lambda x: {"loss": model.latent_loss(x, ["cat"] * len(x))},
        model.unet,
        lambda k: repeat(pictures),
        TrainConfig(steps, 1e-2),
    ):
        torch.rand(1)
        if watching and watching.due(step.step):
            watching.measure(step.step, {"subject": step.loss, "class": 0.5}, step.lr)
    return watching, torch.cat([p.detach().flatten() for p in model.parameters()])


# What is measured.


def test_a_watched_run_ends_where_an_unwatched_one_does(tmp_path):
    watching, weights = run(tmp_path)
    assert torch.equal(run()[1], weights)
    assert [r.step for r in watching.records] == [0, 2, 4]


def test_modes_and_random_states_are_left_as_they_were(tmp_path):
    model = tiny()
    model.unet.train()
    model.text.eval()
    modes, state = [m.training for m in model.modules()], torch.get_rng_state()
    recorder(tmp_path, model).measure(0, {})
    assert [m.training for m in model.modules()] == modes and True in modes and False in modes
    assert torch.equal(torch.get_rng_state(), state)


def test_the_same_model_measures_the_same_to_the_bit(tmp_path):
    """A curve can move only because the model did."""
    watching = recorder(tmp_path)
    first, second = watching.measure(0, {}), watching.measure(2, {})
    assert (second.validation, second.train, second.nearest) == (
        first.validation,
        first.train,
        first.nearest,
    )
    assert set(second.moved.values()) == {0.0} and relative(watching.records, "validation") == [
        1.0,
        1.0,
    ]
    again = recorder(tmp_path / "again").measure(0, {})
    assert again.validation == first.validation and again.nearest == first.nearest


@pytest.mark.parametrize(
    "schedule, target",
    [(schedules.linear(), "eps"), (schedules.Flow(), "flow"), (schedules.Karras(), "edm")],
)
def test_losses_are_the_denoisers_at_times_spread_over_the_tenths(tmp_path, schedule, target):
    """Counted again, one example and one time after the other."""
    model = tiny(schedule, target, weighting="min-snr").eval()
    watching = recorder(tmp_path, model, noises=2)
    assert (
        sorted(set(watching.bin.tolist())) == list(range(10)) or target == "edm"
    )  # EDM hardly ever trains at the ends
    assert watching.bin.bincount().max() == 2
    assert torch.equal((schedule.progress(watching.t) * 10).long().clamp(max=9), watching.bin)
    record = watching.measure(0, {})
    plain, each = Denoiser(model.unet, schedule, target), [[] for _ in range(10)]
    for k, (latents, label) in enumerate(data()[1][3:5]):
        eps = torch.randn(
            len(watching.t),
            *latents.shape,
            generator=torch.Generator().manual_seed(seed_of(0, k + 1)),
        )
        for t, b, e in zip(watching.t, watching.bin.tolist(), eps, strict=True):
            with torch.no_grad():
                each[b].append(
                    plain.loss(latents[None], model.text.encode([label]), t[None], e[None]).item()
                )
    for found, values in zip(record.validation, each, strict=True):
        assert (
            found is None if not values else abs(found - sum(values) / len(values)) < 1e-5 * found
        )  # fp32, other batches


def test_a_learned_weighting_does_not_move_the_curve(tmp_path):
    model = tiny(weighting="learned")
    watching = recorder(tmp_path, model)
    first = watching.measure(0, {}).validation
    model.denoiser.log_error.data.fill_(0.1)
    assert watching.measure(2, {}).validation == first and min(first) > 0


def test_pictures_moved_in_units_of_another_seed(tmp_path):
    model = tiny()
    watching = recorder(tmp_path, model, n=3)
    watching.measure(0, {})
    before = watching.first["unrelated"].float() / 127.5 - 1
    model.text.embedding.weight.data[1] += 3.0  # the dog
    record = watching.measure(2, {})
    after = watching.pictures(2)["unrelated"].float() / 127.5 - 1
    a, b = random_conv(before).double(), random_conv(after).double()
    between = sum((a[i] - a[j]).norm() for i in range(3) for j in range(3) if i != j) / 6
    assert (
        abs(record.moved["unrelated"] - ((a - b).norm(dim=1).mean() / between).item()) < 1e-6
        and record.moved["unrelated"] > 0.01
    )
    assert record.moved["caption"] == record.moved["class animal"] == 0.0


def test_copies_are_found_and_named(tmp_path):
    """Training pictures among which are the very samples: each is its own nearest, at distance 0."""
    model = tiny()
    drawn = recorder(tmp_path / "draw", model, steps=2)
    drawn.measure(0, {})
    samples = drawn.first["caption"].float() / 127.5 - 1
    training = torch.cat([data()[0], samples])
    watching = Recorder(model, tmp_path, PROMPTS, training, config=RecorderConfig(n=2, steps=2))
    record = watching.measure(0, {})
    assert record.nearest == {"caption": [(0.0, 6), (0.0, 7)]} and record.copies == 1.0
    apart = (
        torch.cdist(pixels(training).double(), pixels(training).double())
        .fill_diagonal_(math.inf)
        .min(1)
        .values
    )
    assert abs(watching.floor - apart.median().item()) < 1e-6
    watching.measure(2, {})
    assert watching.advice().startswith("Stop") and "100% of them copies" in watching.advice()


def test_a_single_training_picture_has_no_copies_that_could_be_told(tmp_path):
    watching = Recorder(
        tiny(), tmp_path, PROMPTS, data()[0][:1], config=RecorderConfig(n=2, steps=1)
    )
    assert [watching.measure(step, {}).copies for step in (0, 2)] == [None, None]
    assert watching.advice().startswith("Look at the pictures of step 2")


def test_numbers_that_are_not_finite_are_recorded_not_fatal(tmp_path):
    model = tiny()
    watching = recorder(tmp_path, model)
    watching.measure(0, {})
    model.unet.conv_out.weight.data.fill_(math.nan)
    record = watching.measure(2, {"loss": math.nan})
    assert math.isnan(record.moved["caption"]) and math.isnan(record.validation[0])
    assert watching.advice().startswith("Lower the learning rate")
    assert (
        len(
            Recorder(
                model, tmp_path, PROMPTS, data()[0], config=RecorderConfig(n=2, steps=2)
            ).records
        )
        == 2
    )  # NaN can be read back


def test_image_files_are_read_when_they_are_compared(tmp_path):
    """Not all at once and kept: the same numbers, and only one chunk in memory."""
    images, _ = data(5)
    paths = [tmp_path / f"{k}.png" for k in range(5)]
    for image, path in zip(images, paths, strict=True):
        save_png(image, path)
    thumbnails = Thumbnails(paths, SIDE)
    config = RecorderConfig(n=2, steps=1)
    lazy = Recorder(tiny(), tmp_path / "a", PROMPTS, thumbnails, config=config)
    eager = Recorder(tiny(), tmp_path / "b", PROMPTS, torch.stack(list(thumbnails)), config=config)
    assert torch.equal(lazy.rows, eager.rows)
    assert lazy.measure(0, {}).nearest == eager.measure(0, {}).nearest


# What is kept.


def keeps(folder):
    """The records without the clock, and the pictures."""
    lines = [json.loads(line) for line in (folder / "record.jsonl").read_text().splitlines()]
    grids = {path.name: path.read_bytes() for path in sorted((folder / "grids").iterdir())}
    return [
        {k: v for k, v in line.items() if not k.startswith(("seconds", "memory"))} for line in lines
    ], grids


def test_a_resumed_run_keeps_the_measures_before_it_and_drops_those_after(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    model = tiny()

    def go(watching, steps):
        for step in steps:
            torch.manual_seed(step)
            before = [p.clone() for p in model.parameters()]
            for p in model.unet.parameters():
                p.data += 0.02 * step * torch.randn(p.shape)
            watching.measure(step, {"loss": float(step)})
            for p, old in zip(model.parameters(), before, strict=True):
                p.data.copy_(old)

    go(recorder(whole, model), (0, 2, 4, 6))
    go(recorder(parts, model), (0, 2, 4))
    go(
        recorder(parts, model), (4, 6)
    )  # killed after step 4 was measured, resumed from a checkpoint of step 3
    assert keeps(parts) == keeps(whole) and [line["step"] for line in keeps(whole)[0]] == [
        0,
        2,
        4,
        6,
    ]
    assert not list(parts.glob("*.new"))
    go(recorder(parts, model), (0,))  # a fresh run in an old folder
    lines, grids = keeps(parts)
    assert [line["step"] for line in lines] == [0] and list(grids) == ["step_000000.png"]


def test_a_resumed_run_must_draw_as_before(tmp_path):
    recorder(tmp_path).measure(0, {})
    with pytest.raises(
        UserError, match=r"step_000000\.png was drawn with other prompts or settings"
    ):
        recorder(tmp_path, seed=1).measure(2, {})
    with Image.open(tmp_path / "grids" / "step_000000.png") as image:
        assert image.size == (2 * SIDE, 3 * SIDE) and image.text["prompt caption"] == "cat"
    (tmp_path / "grids" / "step_000000.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match="cannot be read"):
        recorder(tmp_path).measure(2, {})
    (tmp_path / "record.jsonl").write_text('{"step": 0}\n')
    with pytest.raises(UserError, match=r"record\.jsonl is damaged"):
        recorder(tmp_path)


@pytest.mark.parametrize(
    "how, words",
    [
        ({"n": 1}, "at least 2"),
        ({"every": 0}, "at least 1"),
        ({"network": "eyes"}, 'no features "eyes"'),
    ],
)
def test_what_cannot_be_measured_is_refused(tmp_path, how, words):
    with pytest.raises(UserError, match=words):
        recorder(tmp_path, **how)
    with pytest.raises(UserError, match="at least one prompt"):
        Recorder(tiny(), tmp_path, {}, data()[0])
    with pytest.raises(UserError, match="at least one"):
        Recorder(tiny(), tmp_path, PROMPTS, data()[0][:0])
    with pytest.raises(UserError, match="nothing was measured yet"):
        recorder(tmp_path).report()


# Advice: every rule, from a made-up record list.


def flight(validation=(), train=(), unrelated=(), caption=(), near=(), copies=(), losses=()):
    """Records at steps 0, 100, 200, ... whose curves are these numbers; what is not given is as at the start."""
    n = max(map(len, (validation, train, unrelated, caption, near, copies, losses)))

    def at(values, k, start):
        return values[k] if values else start

    return [
        Record(
            step=100 * k, losses={"loss": at(losses, k, 1.0)}, lr=1e-3,
            validation=[at(validation, k, 1.0), 2 * at(validation, k, 1.0)] if validation else [],
            train=[at(train, k, 1.0)] if train else [], moved={"caption": at(caption, k, 0.5), "unrelated": at(unrelated, k, 0.0)},
            nearest={"caption": [(at(near, k, 1.0), 0)]}, copies=at(copies, k, 0.0), copies_floor=0.4,
            seconds_per_step=None, seconds=1.0, memory_gb=1.0,
        )
        for k in range(n)
    ]  # fmt: skip


@pytest.mark.parametrize("records, says", [
    ([], "Nothing was measured yet"),
    (flight(validation=[1.0]), "Keep going: step 0 is the only measure yet"),
    (flight(losses=[1.0, math.nan]), "Lower the learning rate to a tenth: at step 100 loss is not a finite number"),
    (flight(validation=[1.0, math.inf]), "Lower the learning rate to a tenth: at step 100 validation loss in tenth 1 of t is not"),
    (flight(validation=[1.0, 1.3], train=[1.0, 1.5]), "Lower the learning rate: at step 100 the loss of the training examples themselves is 1.50"),
    (flight(validation=[1.0, 0.8, 0.7], unrelated=[0, 4.0, 3.5]), 'Lower the learning rate: "unrelated", which nobody trains, had by step 100'),
    (flight(validation=[1.0, 0.8, 0.7], copies=[0, 0.25, 0.75]), "Stop, and use step 100: samples of step 200 lie 1.00 times as far"),
    (flight(train=[1.0, 0.8, 0.7], copies=[0, 0.25, 0.75]), "Stop, and use step 100: samples of step 200 lie 1.00 times as far"),
    (flight(validation=[1.0, 2.0, 3.0], copies=[0, 0.25, 0.75]), "Stop: samples of step 200 lie 1.00 times as far"),
    (flight(train=[1.0, 0.8, 0.7], near=[1.0, 0.2, 0.1]), "Stop: samples of step 200 lie 0.10 times as far"),
    (flight(validation=[1.0, 0.7, 0.75, 0.8], train=[1.0, 0.7, 0.6, 0.5]), "Stop, and use step 100: the validation loss rose from 0.70 to 0.80"),
    (flight(validation=[1.0, 1.2, 1.4], train=[1.0, 0.7, 0.5]), "Stop: the validation loss rose from 1.00 to 1.40"),
    (flight(validation=[1.0, 0.8, 0.7, 0.6], unrelated=[0, 1.0, 2.0, 3.5]), 'Stop, and use step 200: at step 300 "unrelated" moved 3.5 times'),
    (flight(train=[1.0, 0.995], validation=[1.0, 0.99], caption=[0.0, 0.05]), "Nothing learnt yet: at step 100 the loss of the training"),
    (flight(validation=[1.0, 0.7, 0.6], train=[1.0, 0.7, 0.6]), "Keep going: the validation loss still falls, from 0.700 to 0.600 of what it was"),
    (flight(train=[1.0, 0.7], unrelated=[0, 1.5]), "Keep going while the pictures get better: the loss of the training examples is 0.70"),
    (flight(validation=[1.0, 0.7, 0.75], train=[1.0, 0.7, 0.6]), "Keep going while the pictures get better: the validation loss is level"),
    (flight(train=[1.0, 0.7]), "Keep going while the pictures get better: the loss of the training examples is 0.70"),
    (flight(caption=[0.0, 0.4]), "Look at the pictures of step 100"),
])  # fmt: skip
def test_advice(records, says):
    said = advise(records)
    assert said.startswith(says) and said.endswith(".") and "\n" not in said


@pytest.mark.parametrize("records, step", [
    ([], None),
    (flight(validation=[1.0]), None),
    (flight(validation=[1.0, 0.7, 0.75, 0.8]), 100),
    (flight(validation=[1.0, 1.2, 1.4]), None),
    (flight(validation=[1.0, 0.8, 0.7], copies=[0, 0.25, 0.75]), 100),
    (flight(validation=[1.0, 0.8, 0.7], unrelated=[0, 1.0, 3.5]), 100),
    (flight(validation=[1.0, 0.8, math.nan]), 100),
    (flight(train=[1.0, 0.8, 0.7]), 200),
])  # fmt: skip
def test_the_step_to_use(records, step):
    assert best(records) == step


def test_copies_count_only_above_what_the_training_pictures_are_to_each_other():
    records = flight(train=[1.0, 0.8, 0.7], copies=[0, 0.25, 0.75])
    assert advise(records).startswith("Stop")
    assert advise([record._replace(copies_floor=0.8) for record in records]).startswith(
        "Keep going"
    )


def test_advice_warns_of_what_moved_beside():
    records = [flight(validation=[1.0, 0.7], unrelated=[0, far]) for far in (0.9, 1.5)]
    assert advise(records[0]).endswith("at first.")
    assert advise(records[1]).startswith(
        advise(records[0])[:-1]
        + '; but "unrelated" moved 1.5 times as far as another seed would take it'
    )


# The page.


class Seen(HTMLParser):
    """Every tag with its attributes; complains of tags that are not closed."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.words = [], [], ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        self.words += text


def test_the_page_is_one_file_that_a_phone_and_a_desktop_can_read(tmp_path):
    watching, _ = run(tmp_path, settings={"method": "<full>", "rate": 1e-2})
    text = watching.report().read_text()
    seen = Seen(text)
    tags = [tag for tag, _ in seen.tags]
    assert not {"script", "link", "iframe", "base"} & set(tags)
    for tag, attrs in seen.tags:  # nothing is fetched; what begins with # is inside the file
        for name in ("src", "href", "xlink:href", "srcset", "poster", "data"):
            assert attrs.get(name, "#").startswith(("#", "data:image/png;base64,")), (tag, attrs)
    assert not re.search(r"@import|url\((?!#)", text)
    pictures = [attrs for tag, attrs in seen.tags if tag == "img"]
    # each by itself: 2 of 3 prompts at 3 steps, and 2 samples with their nearest training picture
    assert len(pictures) == 3 * 3 * 2 + 2 * 2 and all(attrs["alt"] for attrs in pictures)
    # in columns, as many as fit, and one on a phone
    columns = [attrs["class"] for tag, attrs in seen.tags if tag == "div"]
    assert {"curves", "steps", "pairs", "row"} == {*columns} and "84rem" in text
    figures = [attrs for tag, attrs in seen.tags if tag == "svg"]
    assert len(figures) == 6 and all(
        attrs["aria-label"] and attrs["role"] == "img" for attrs in figures
    )
    assert (
        "meta",
        {"name": "viewport", "content": "width=device-width, initial-scale=1"},
    ) in seen.tags
    for words in (
        watching.advice(),
        "<full>",
        "subject",
        "unrelated: dog",
        "Command",
        "Learning rate",
        "s/step",
    ):
        assert words in seen.words


def test_the_page_escapes_what_others_wrote():
    text = page("<b>", flight(train=[1.0]), {"<script>": "<img>"}, {}, [], {"<i>": "<u>"})
    assert not {"script", "b", "img", "i", "u"} & {tag for tag, _ in Seen(text).tags}


def test_a_long_run_shows_the_first_the_best_and_the_last():
    validation = [1 + abs(k - 13) for k in range(40)]
    steps = steps_shown(flight(validation=validation))
    assert len(steps) <= SHOWN + 1 and {0, 1300, 3900} <= set(steps) and steps == sorted(steps)
    assert steps_shown(flight(train=[1.0] * 3)) == [0, 100, 200] and steps_shown(
        flight(validation=[1.0])
    ) == [0]


# The study.


def test_three_flights_at_their_smallest(tmp_path):
    flight_recorder.main(steps=1, every=1, sampling_steps=1, flights=("by heart",), out=tmp_path)
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["by heart"]["advice"] and results["seed"] == 0
    assert (tmp_path / "flights.png").stat().st_size and (
        tmp_path / "by_heart" / "report.html"
    ).stat().st_size
    assert [line["step"] for line in keeps(tmp_path / "by_heart")[0]] == [0, 1]
    with pytest.raises(UserError, match='no flight "low"; there is sensible, too fast, by heart'):
        flight_recorder.main(flights=("low",))
