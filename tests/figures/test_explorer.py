"""The explorer's file: it holds what the run gave, nothing from elsewhere, and no prompt can break it."""

import base64
import inspect
import io
import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import minidiff
from minidiff import pipeline, schedules
from minidiff.checkpoints import lora as lora_files
from minidiff.conditioners import ClassLabels, LabelsConfig, NoCondition, Unconditional
from minidiff.data.folder import to_uint8
from minidiff.denoiser import Denoiser
from minidiff.errors import UserError
from minidiff.figures import explorer
from minidiff.figures.explored import Other, Request, collect, first_step
from minidiff.figures.walk import walk
from minidiff.latent_diffusion import LatentDiffusion
from minidiff.layers import ResBlock
from minidiff.methods import lora
from minidiff.methods.attention_maps import attention_maps
from minidiff.options.sampling import SampleConfig
from minidiff.unet import UNet, UNetConfig
from minidiff.vae import Pixels

PROMPT = "a red circle"


@pytest.fixture(scope="module")
def model(sd):
    model = sd()
    for weight in model.unet.parameters():
        if not weight.any():  # the ends of residual branches
            torch.nn.init.normal_(weight, std=0.1)
    return model


def explored(model, path, prompt=PROMPT, scales=(0, 3), other=None, **options):
    """The page's data, and its text."""
    request = Request(
        model, prompt, SampleConfig(**{"steps": 4, "seed": 3, **options}), scales, other
    )
    rows, seconds = first_step(request)
    assert seconds > 0
    text = explorer.write(collect(request, rows), path / "explore.html").read_text()
    return json.loads(re.search(r'id="data">(.*?)</script>', text, re.DOTALL)[1]), text, rows


def pixels(uri):
    assert uri.startswith("data:image/png;base64,")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))))


def tile(strip, row, column=0):
    image, (w, h) = pixels(strip["src"]), (strip["width"], strip["height"])
    return image[row * h : (row + 1) * h, column * w : (column + 1) * w]


def drawn(model, prompt=PROMPT, **options):
    image = pipeline.generate(model, [prompt], SampleConfig(**{"steps": 4, "seed": 3, **options}))[
        0
    ]
    return to_uint8(image).movedim(0, -1).numpy()


@pytest.mark.parametrize("sampler", ["ddim", "heun", "dpmpp_2m"])
def test_the_images_are_generates(model, tmp_path, sampler):
    page, _, _ = explored(model, tmp_path, sampler=sampler, guidance=2.0)
    assert np.array_equal(pixels(page["image"]), drawn(model, sampler=sampler, guidance=2.0))
    assert [run["label"] for run in page["scales"]] == ["0", "2", "3"]
    for run in page["scales"]:
        expected = drawn(model, sampler=sampler, guidance=float(run["label"]))
        assert np.array_equal(pixels(run["image"]), expected)
    assert [moment["step"] for moment in page["moments"]] == [1, 2, 3, 4]
    assert len(page["levels"][0]["shares"]) == 5  # and their mean


def test_the_numbers_of_the_steps(model, tmp_path):
    page, _, _ = explored(model, tmp_path, sampler="ddim", guidance=1.0)
    walked = list(walk(model, PROMPT, SampleConfig(steps=4, seed=3, sampler="ddim", guidance=1.0)))
    for k, (moment, step) in enumerate(zip(page["moments"], walked, strict=True)):
        alpha, sigma = (s.item() for s in model.schedule.alpha_sigma(torch.tensor(step.t)))
        assert (moment["t"], moment["s"]) == (step.t, step.s)
        assert (moment["alpha"], moment["sigma"]) == (alpha, sigma)
        assert moment["log_snr"] == pytest.approx(2 * np.log(alpha / sigma))
        assert moment["told"] == step.t - 1  # Discrete's c_noise
        for name, value in {"x_t": step.x, "x0": step.x0, "eps": step.eps}.items():
            expected = value.mean().item(), value.std(correction=0).item()
            assert moment["values"][name] == pytest.approx(expected, abs=1e-6)
        images = model.decode(torch.cat([step.x, step.x0])).clamp(-1, 1)
        for panel, image in zip(page["panels"], images, strict=False):
            same = np.abs(
                tile(panel["strip"], k).astype(int) - to_uint8(image).movedim(0, -1).numpy()
            )
            assert same.max() <= 1, panel["name"]  # decoded in another batch
    lines = {source["name"]: source for source in page["codes"][0]}
    assert "x_s = alpha_s.item() * x0" in lines["DDIM.__call__"]["text"]
    # the forward chain starts from the same noise, at the first step of a schedule that ends in noise
    assert [panel["name"] for panel in page["panels"]][2:] == [
        "forward chain", "latents of x_t", "latents of x0", "latents of eps",
    ]  # fmt: skip


def test_the_map_is_that_of_the_run(model, tmp_path):
    page, _, rows = explored(model, tmp_path, guidance=1.0)
    by_name = {row.name: row for row in rows}
    for place in page["places"]:
        layers = place["layers"].split(" + ") if place["layers"] else []
        row = by_name[f"{place['name']}.{layers[-1]}" if layers else place["name"]]
        assert tuple(place["shape"]) == row.shape[1:]
        assert place["values"][0] == pytest.approx((row.mean, row.std), rel=1e-4, abs=1e-6)
        image = pixels(place["maps"]["src"])
        height, width = place["shape"][1:]
        assert image.shape == (4 * height, len(place["channels"]) * width)
    skips = [place["row"] for place in page["places"] if place["skip"]]
    takers = [place["row"] for place in page["places"] if place["side"] == "up"]
    assert set(skips) <= set(takers)
    of = page["sources"]["ResBlock"]
    lines, line = inspect.getsourcelines(ResBlock)
    assert (of["file"], of["line"], of["text"]) == ("minidiff/layers.py", line, "".join(lines))
    assert page["sources"]["UNet.forward"]["file"] == "minidiff/unet.py"  # of torch's layers


def test_the_words_are_those_of_the_attention(model, tmp_path):
    config = SampleConfig(steps=4, seed=3, sampler="ddim")
    page, _, _ = explored(model, tmp_path, sampler="ddim")
    maps = attention_maps(model, PROMPT, config)
    assert page["words"] == list(maps.words)
    assert page["levels"][0]["name"] == "all levels"
    for level, size in zip(page["levels"][1:], maps.sizes, strict=True):
        assert level["name"] == f"{size[0]} x {size[1]}"
        for k, t in enumerate(maps.times):
            weights = torch.stack(
                [m.weights for m in maps.maps if m.t == t and m.weights.shape[1:] == size]
            )
            weights = weights.mean(0)
            assert level["shares"][k] == pytest.approx(weights.mean((1, 2)).tolist(), abs=1e-4)
            assert sum(level["shares"][k]) == pytest.approx(1, abs=1e-3)
            for word, (row, column) in enumerate(level["peaks"][k]):
                assert weights[word, row, column] == pytest.approx(weights[word].max().item())
                levels = pixels_of_palette(level["strip"], k, word)
                assert levels[row, column] == levels.max()


def pixels_of_palette(strip, row, column):
    image = Image.open(io.BytesIO(base64.b64decode(strip["src"].partition(",")[2])))
    assert image.mode == "P"
    w, h = strip["width"], strip["height"]
    return np.asarray(image)[row * h : (row + 1) * h, column * w : (column + 1) * w]


def test_a_second_run(model, tmp_path):
    config = SampleConfig(steps=4, seed=3, sampler="ddim", guidance=2.0)
    other = Other("seed 3", "seed 4", PROMPT, replace(config, seed=4))
    page, _, _ = explored(model, tmp_path, other=other, sampler="ddim", guidance=2.0)
    first, second = page["pair"]["first"], page["pair"]["second"]
    assert (first["label"], second["label"]) == ("seed 3", "seed 4")
    a, b = (drawn(model, guidance=2.0, sampler="ddim", seed=seed) for seed in (3, 4))
    assert np.array_equal(pixels(first["image"]), a) and np.array_equal(pixels(second["image"]), b)
    apart = np.abs(a.astype(float) - b).mean()
    assert page["pair"]["differences"][-1] == pytest.approx(apart, abs=0.5)  # of rounded bytes
    assert len(page["pair"]["differences"]) == 5


def test_before_and_after_a_lora(model, tmp_path):
    lora.add(model.unet, rank=2)
    for layer in lora.adapted(model.unet).values():
        torch.nn.init.normal_(layer.lora.B, std=0.5)
    file = lora_files.save(model, tmp_path / "style.safetensors")
    lora.remove(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config = SampleConfig(steps=4, seed=3, guidance=2.0)
    other = Other("without", "with", PROMPT, config, file, 0.5)
    page, _, _ = explored(model, tmp_path, other=other, guidance=2.0)
    without = drawn(model, guidance=2.0)
    lora_files.load(model, file, 0.5)
    with_it = drawn(model, guidance=2.0)
    lora.remove(model)
    assert not np.array_equal(without, with_it)
    assert np.array_equal(pixels(page["pair"]["first"]["image"]), without)
    assert np.array_equal(pixels(page["pair"]["second"]["image"]), with_it)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


HOSTILE = [
    "</script><img src=x onerror=alert(1)>",
    "{{data}} {{policy}} \\1 \\g<0>",
    "<!--<script>",
    "line\u2028separators\u2029, 苹果, \u202ereversed, \x00, &lt;b&gt;",
]


@pytest.mark.parametrize("prompt", HOSTILE)
def test_prompts_are_text(model, tmp_path, prompt):
    other = Other("one", prompt, prompt, SampleConfig(steps=1), None)
    page, text, _ = explored(
        model, tmp_path, prompt, scales=(), other=other, steps=1, negative=prompt
    )
    assert page["prompt"] == prompt == page["settings"]["negative"]
    template = explorer.TEMPLATE.read_text()
    for piece in ("<script", "</script", "<img", "<!--", "<b>"):
        assert text.count(piece) == template.count(piece), piece
    assert not re.search("{{", re.sub(r'id="data">.*?</script>', "", text, flags=re.DOTALL).replace(
        "{{data}} {{policy}}", ""))  # fmt: skip


def test_nothing_comes_from_elsewhere(model, tmp_path):
    _, text, _ = explored(model, tmp_path)
    outside = re.sub(r'id="data">.*?</script>', "", text, flags=re.DOTALL)
    assert not re.search(
        r"https?:|//[a-z]+\.|@import|url\(|\bfetch\b|XMLHttp|import\(|WebSocket", outside
    )
    assert re.findall(r'(?:src|href)="([^"]*)"', outside) == ["data:,"]
    assert "default-src 'none'; img-src data:;" in text and "script-src 'sha256-" in text
    assert len(text.encode()) < explorer.LIMIT == 15_000_000


def test_a_page_that_is_too_large_shows_fewer_steps(model, tmp_path, monkeypatch):
    _, text, _ = explored(model, tmp_path, steps=8)
    monkeypatch.setattr(explorer, "LIMIT", len(text) - 1)
    page, smaller, _ = explored(model, tmp_path, steps=8)
    assert [moment["step"] for moment in page["moments"]] == [2, 4, 6, 8] and page["steps"] == 8
    assert len(smaller) < len(text) and pixels(page["image"]).shape == (16, 16, 3)
    assert len(page["levels"][0]["shares"]) == 5 and len(page["places"][0]["values"]) == 4
    monkeypatch.setattr(explorer, "LIMIT", 1000)
    with pytest.raises(UserError, match="the page would have 0 MB"):
        explored(model, tmp_path, steps=8)
    assert (tmp_path / "explore.html").read_text() == smaller


def test_long_runs_show_some_steps(model, tmp_path):
    page, _, _ = explored(model, tmp_path, steps=42, sampler="ddpm", scales=())
    steps = [moment["step"] for moment in page["moments"]]
    assert (steps[0], steps[-1], len(steps)) == (1, 42, 40) and steps == sorted(set(steps))


def small(text, schedule, vae=None):
    """A model of pixels."""
    width = getattr(text, "dim", None)
    unet = UNet(UNetConfig(3, 3, (32, 32), 1, (1, 0), (1, 1), context_dim=width))
    torch.nn.init.normal_(unet.conv_out.weight, std=0.1)
    return LatentDiffusion(vae or Pixels(), text, Denoiser(unet, schedule, "v"), 8, guidance=1.0)


@pytest.mark.parametrize("schedule", [schedules.Flow(), schedules.Karras(), schedules.cosine()])
def test_other_models(schedule, tmp_path):
    classes = small(ClassLabels(LabelsConfig(("cat", "dog"), 8)), schedule)
    page, _, _ = explored(classes, tmp_path, "dog", sampler="euler")
    assert page["words"] == ["dog"] and [run["label"] for run in page["scales"]] == ["0", "1", "3"]
    assert [panel["name"] for panel in page["panels"]] == [
        "x_t",
        "guess of x0",
        "forward chain",
        "eps",
    ]
    assert np.array_equal(pixels(page["image"]), drawn(classes, "dog", sampler="euler"))
    infinite = [value is None for value in page["curves"]["log_snr"]]
    assert infinite[0] and (infinite[-1] == isinstance(schedule, schedules.Flow))
    nothing = small(Unconditional(NoCondition()), schedule)
    page, _, _ = explored(nothing, tmp_path, "")
    assert page["words"] == [] and [run["label"] for run in page["scales"]] == ["1"]
    assert (page["pair"], page["levels"]) == (None, [])


def test_without_guidance_words_do_nothing(model, tmp_path):
    page, _, _ = explored(model, tmp_path, guidance=0.0, steps=1)
    assert page["words"] == []


def test_the_box_in_a_page(tmp_path):
    page, text, _ = explored(minidiff.load(), tmp_path, "a small blue circle", sampler="ddpm")
    assert len(text) < 1_000_000 and len(page["places"]) == 19


def test_numbers_that_are_not_finite(model, tmp_path):
    weight = model.vae.decoder.conv_out.bias
    kept = weight.data.clone()
    weight.data[0] = torch.nan
    try:
        with pytest.raises(UserError, match="not finite"):
            explored(model, tmp_path, steps=1)
    finally:
        weight.data = kept
    assert not (tmp_path / "explore.html").exists()
