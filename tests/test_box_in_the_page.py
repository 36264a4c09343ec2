"""The page that draws: its graphs are the networks, and its pictures are those of Python.

Needs the extra `onnx`, Chromium with playwright, and the npm package as a file, since the tests have
no network. MINIDIFF_ONNXRUNTIME_WEB names that file (`npm pack onnxruntime-web@1.30.0`) and
MINIDIFF_BROWSER the browser; where one is named, what is missing is a failure. Else these tests skip.
"""

import base64
import gzip
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from jaxtyping import install_import_hook

import minidiff
from minidiff import pipeline
from minidiff.data.folder import to_uint8
from minidiff.denoiser import Denoiser
from minidiff.errors import UserError
from minidiff.guidance import guide
from minidiff.options.sampling import SampleConfig
from minidiff.schedules import cosine
from minidiff.training.seeds import generator_of

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
sys.path.insert(0, str(EXPERIMENTS))
with install_import_hook(
    ["box_in_the_page"], "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))"
):
    import box_in_the_page

RUNTIME = os.environ.get("MINIDIFF_ONNXRUNTIME_WEB")
PIXELS = """() => { const c = document.getElementById("picture");
  return [...c.getContext("2d").getImageData(0, 0, c.width, c.height).data]; }"""
NAMELESS = """() => [...document.querySelectorAll("input, select, button, canvas")].map(e =>
  e.ariaLabel || e.labels?.[0]?.textContent || e.textContent).filter(name => !name.trim()).length"""


@pytest.fixture(scope="module")
def box():
    return minidiff.load("box").eval()


# Without any of it.


def test_models_that_the_page_cannot_draw_with(box, monkeypatch):
    monkeypatch.setattr(box, "sampler", "unipc")
    with pytest.raises(UserError, match="samplers ddpm, ddim, not unipc"):
        box_in_the_page.check(box)
    monkeypatch.setattr(box.denoiser, "target", "edm")
    with pytest.raises(UserError, match='targets "eps", "x0", "v"'):
        box_in_the_page.check(box)
    monkeypatch.setattr(box_in_the_page, "MOST_PARAMETERS", 1_000_000)
    with pytest.raises(UserError, match="this model has 6 M parameters; a page holds at most 1 M"):
        box_in_the_page.check(box)
    monkeypatch.setattr(box_in_the_page, "CLIPText", minidiff.UNet)
    with pytest.raises(UserError, match="a text encoder and a VAE"):
        box_in_the_page.check(box)


def test_times_are_the_samplers_own(box, monkeypatch):
    times = box_in_the_page.settings(box, Path("box"))["times"]
    assert [len(row) for row in times] == [*range(2, 102)]
    assert times[15] == box.schedule.timesteps(16, "trailing").tolist()
    monkeypatch.setattr(box, "spacing", "log-snr")
    with pytest.raises(UserError, match='"log-snr" has others'):
        box_in_the_page.settings(box, Path("box"))


def test_what_is_missing_is_said(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"pip install 'minidiff\[onnx\]'"):
        box_in_the_page.require("no_such_package")
    (tmp_path / "other.tgz").write_bytes(b"another package")
    with pytest.raises(UserError, match="is not onnxruntime-web@"):
        box_in_the_page.runtime_files(tmp_path / "other.tgz")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(UserError, match="npm is not installed"):
        box_in_the_page.fetched(tmp_path)


def test_npm_that_fails_is_one_line(tmp_path, monkeypatch):
    npm = tmp_path / "bin" / "npm"
    npm.parent.mkdir()
    npm.write_text("#!/bin/sh\necho 'npm error network is down' >&2\nexit 1\n")
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", f"{npm.parent}{os.pathsep}{os.environ['PATH']}")
    with pytest.raises(UserError, match=r"did not fetch .*network is down"):
        box_in_the_page.fetched(tmp_path)


def test_weights_are_halved_where_nothing_is_lost():
    onnx = pytest.importorskip("onnx", reason="needs the extra onnx")
    exact, inexact = np.full((8, 8), 0.5, np.float32), np.full((8, 8), 1 / 3, np.float32)
    huge = np.full((8, 8), 1e6, np.float32)  # beyond float16
    weights = {"exact": exact, "inexact": inexact, "huge": huge}
    arrays = [onnx.numpy_helper.from_array(array, name) for name, array in weights.items()]
    node = onnx.helper.make_node("Sum", list(weights), ["y"])
    y = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, (8, 8))
    model = onnx.helper.make_model(onnx.helper.make_graph([node], "g", [], [y], arrays))
    box_in_the_page.halve(model)
    types = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    assert types == {
        "exact_half": onnx.TensorProto.FLOAT16,
        "inexact": onnx.TensorProto.FLOAT,
        "huge": onnx.TensorProto.FLOAT,
    }
    onnx.checker.check_model(model)
    from onnx.reference import ReferenceEvaluator

    (out,) = ReferenceEvaluator(model).run(None, {})
    assert np.array_equal(out, exact + inexact + huge)


# The page, made by its command.


def need(there: bool, what: str, named: str | None) -> None:
    if not there:
        (pytest.fail if named else pytest.skip)(f"needs {what}")


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    need(RUNTIME is not None, "MINIDIFF_ONNXRUNTIME_WEB, the npm package as a file", None)
    for package in ("onnx", "onnxscript", "onnxruntime"):
        need(
            importlib.util.find_spec(package) is not None, f"{package}, of the extra onnx", RUNTIME
        )
    out = tmp_path_factory.mktemp("page")
    command = [EXPERIMENTS / "box_in_the_page.py", "--runtime", RUNTIME, "--out", out]
    subprocess.run([sys.executable, *map(str, command)], check=True)
    return out / "box_in_the_page.html"


def wait(tab) -> None:
    from playwright.sync_api import expect

    expect(tab.locator("#status")).to_have_text(re.compile(r"^Drawn in"), timeout=120_000)


@pytest.fixture(scope="module")
def tab(browser, file):
    """The page after its first picture. In the end: nothing on the console, nothing asked for."""
    context = browser.new_context(viewport={"width": 390, "height": 844})
    context.set_offline(True)
    tab, complaints, requests = context.new_page(), [], []
    for event in ("pageerror", "dialog", "requestfailed"):
        tab.on(event, lambda message: complaints.append(str(message)))
    tab.on("console", lambda message: complaints.append(message.text))
    tab.on("request", lambda request: requests.append(request.url))
    tab.goto(file.as_uri())
    wait(tab)
    yield tab
    context.close()
    # the tests themselves read pixels back
    assert [text for text in complaints if "willReadFrequently" not in text] == []
    assert requests[0] == file.as_uri()
    assert all(url.startswith("blob:") for url in requests[1:]), requests  # out of the page itself


@pytest.mark.slow
def test_graphs_are_the_networks(file, box):
    onnxruntime = pytest.importorskip("onnxruntime")
    assert file.stat().st_size < 40e6
    text = file.read_text(encoding="utf-8")
    assert str(Path(torch.__file__).parents[1]) not in text
    with torch.no_grad():
        inputs = box_in_the_page.graphs(box)
    for name, (network, example) in inputs.items():
        part = re.search(rf'id="{name}">(.*?)</script>', text)[1]
        graph = gzip.decompress(base64.b64decode(part))
        assert b"site-packages" not in graph and str(Path.home()).encode() not in graph
        session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
        for rows in ([0], [1, 0], [0, 1, 1]):
            some = {key: value[rows] for key, value in example.items()}
            (theirs,) = session.run(None, {key: value.numpy() for key, value in some.items()})
            with torch.no_grad():
                ours = network(*some.values())
            assert (torch.from_numpy(theirs) - ours).abs().max() < 1e-4, name


def fill(tab, config: SampleConfig, prompt: str) -> None:
    tab.fill("#prompt", prompt)
    for name in ("seed", "steps", "guidance"):
        tab.fill(f"#{name}", str(getattr(config, name)))
    tab.select_option("#sampler", config.sampler)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("prompt", "seed", "steps", "guidance", "sampler"),
    [
        ("a small blue circle above a large red square", 0, 25, 2.0, "ddpm"),
        ("a tiny green triangle", 7, 16, 4.0, "ddim"),
        ("", 2**53 - 1, 3, 0.0, "ddpm"),
        ("Café “quoted” d'été &amp; 日本 a cat's 123", 2**40 + 3, 1, 1.0, "ddim"),
    ],
)
def test_the_picture_is_that_of_python(tab, box, prompt, seed, steps, guidance, sampler):
    config = SampleConfig(steps=steps, guidance=guidance, sampler=sampler, seed=seed)
    fill(tab, config, prompt)
    tab.evaluate("document.getElementById('status').textContent = ''")
    tab.press("#prompt", "Enter")
    wait(tab)
    picture = np.array(tab.evaluate(PIXELS)).reshape(32, 32, 4)
    ours = to_uint8(pipeline.generate(box, [prompt], config)[0]).permute(1, 2, 0).numpy()
    assert np.abs(picture[..., :3] - ours.astype(int)).max() <= 1 and (picture[..., 3] == 255).all()
    assert tab.locator("#guesses li").count() == steps + 1
    assert f"--seed {seed} --steps {steps}" in tab.inner_text("#command")


@pytest.mark.slow
def test_tokens_are_those_of_python(tab, box):
    prompts = [
        "",
        "  A   small RED circle, left of it a 12 don't we'll <b>bold</b> ...!?",
        "naïve Ünïcödé 日本語 🙂 x\n\ty &lt;br&gt; &amp;amp;",
        "<|endoftext|> a <|STARTOFTEXT|>b <end_of_text>",
        "antidisestablishmentarianism " * 20,
        "it’s “curly” ‘quotes’",
        "snake_case 3d-printing 1,000.5 #tag @you ___ \u00ad",
    ]
    row = "prompt => minidiff.model.tokenizer.row(prompt, minidiff.model.settings.tokens)"
    with pytest.warns(UserWarning, match="prompt cut"):
        ours = box.text.tokens(prompts).tolist()
    for prompt, tokens in zip(prompts, ours, strict=True):
        assert tab.evaluate(row, prompt) == tokens, prompt


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**53 - 1])
def test_noise_is_that_of_torch(tab, seed):
    numbers = f"() => {{ const n = new minidiff.Normal({seed}n); n.numbers(48); return [...n.numbers(1024)]; }}"
    generator = generator_of(seed, 0)
    torch.randn(48, generator=generator)
    theirs, ours = torch.tensor(tab.evaluate(numbers)), torch.randn(1024, generator=generator)
    assert (theirs - ours).abs().max() < 1e-5


class Constant(torch.nn.Module):
    def __init__(self, F):
        super().__init__()
        self.F = F

    def forward(self, *_):
        return self.F


@pytest.mark.slow
@pytest.mark.parametrize("target", ["eps", "x0", "v"])
def test_guided_predictions_are_those_of_python(tab, target):
    x, F = torch.randn(1, 4, 16, 16), torch.randn(2, 4, 16, 16)
    script = """([target, x, F]) => {
        const { model } = minidiff, fake = Object.create(model);
        fake.settings = { ...model.settings, target };
        fake.unet = { run: async () => ({ output: { data: Float32Array.from(F) } }) };
        return fake.denoise(Float32Array.from(x), 700, null, 3);
    }"""
    theirs = tab.evaluate(script, [target, x.flatten().tolist(), F.flatten().tolist()])
    denoiser = Denoiser(Constant(F), cosine(), target)
    ours = guide(denoiser, torch.ones(1, 1, 1), torch.zeros(1, 1, 1), 3)(x, torch.tensor([700]))
    for name in ("x0", "eps"):
        value = getattr(ours, name).flatten()
        assert torch.allclose(torch.tensor(theirs[name]), value, atol=1e-4, rtol=1e-4), name


@pytest.mark.slow
def test_the_page_says_what_the_model_does_not_read(tab):
    tab.fill("#prompt", "a red cat")
    assert tab.inner_text("#complaints").startswith(
        "The model does not know cat. All that it knows: a,"
    )
    tab.fill("#prompt", "red " * 31)
    assert (
        tab.inner_text("#complaints")
        == "The prompt is too long: the model reads the first 30 tokens."
    )
    tab.fill("#prompt", "a red circle")
    assert tab.inner_text("#complaints") == ""


@pytest.mark.slow
def test_by_keyboard_on_a_small_screen(tab):
    assert tab.evaluate("document.documentElement.scrollWidth") == 390
    assert tab.evaluate(NAMELESS) == 0
    tab.fill("#steps", "0")  # the browser refuses it
    tab.press("#steps", "Enter")
    assert tab.evaluate("document.querySelector(':invalid:not(form)').id") == "steps"
    assert tab.inner_text("#status").startswith("Drawn")
    tab.fill("#steps", "2")
    tab.focus("#prompt")
    for name in ("seed", "steps", "guidance", "sampler", "draw"):
        tab.keyboard.press("Tab")
        assert tab.evaluate("document.activeElement.id") == name
    tab.evaluate("document.getElementById('status').textContent = ''")
    tab.keyboard.press("Enter")
    wait(tab)
    assert tab.locator("#guesses li").count() == 3
    assert tab.get_attribute("#picture", "aria-label").endswith("; done")
