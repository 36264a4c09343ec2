"""Frozen weights of the command line's fine-tunes: loaded in the precision that is computed in, and what has to keep its digits keeps them."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import minidiff
from minidiff import load
from minidiff.checkpoints import lora as lora_files
from minidiff.finetuning import estimate as estimates
from minidiff.finetuning import fit as module
from minidiff.finetuning import loop
from minidiff.finetuning.estimate import Settings, alternatives
from minidiff.finetuning.fit import Case, Choice, applied, measured_in
from minidiff.methods import lora
from minidiff.options.finetuning import FineTuneConfig, TuningConfig
from tests.finetuning.test_estimate import model  # noqa: F401 (a fixture)
from tests.finetuning.test_loop import (
    folder,  # noqa: F401 (a fixture)
    forecasts,  # noqa: F401 (a fixture)
    run,
    tiny,
)

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
FEW = ("--steps", 4, "--every", 2, "--batch", 2, "--lr", 1e-2)
PLAIN = Choice.of(FineTuneConfig())
LORA = ("--method", "lora", "--rank", 2)


def dtypes(part):
    """Of what a file of the base would hold."""
    loras = lora.state(part)
    return {p.dtype for name, p in part.named_parameters() if name not in loras}


@pytest.fixture
def trained(monkeypatch):
    """The models that fine-tunes ended with."""
    models, real = [], loop.finetune
    monkeypatch.setattr(loop, "finetune", lambda *a: models.append(real(*a)) or models[-1])
    return models


def finetuned(ran, place, out, *options):
    return ran(
        "finetune", "--model", place / "model", "--data", place, "--out", out, *FEW, *options
    )


def test_what_is_frozen_is_in_the_precision_computed_in(folder, tmp_path, ran, trained, forecasts):  # noqa: F811
    """The recorder's pictures and losses too; A and B are float32, as is the latent scale. Merged, no digit of the base is lost."""
    finetuned(ran, folder, tmp_path / "out", *LORA, "--text", "--dtype", "bf16", "--ema", 0.9)
    (ended,) = trained
    assert dtypes(ended) == {BF16} and ended.vae.latent_scale.dtype == FP32
    assert {value.dtype for value in lora.state(ended).values()} == {FP32}
    file = tmp_path / "out" / "lora.safetensors"
    assert {value.dtype for value in load_file(file).values()} == {FP32}
    rows = [json.loads(row) for row in (tmp_path / "out" / "record.jsonl").read_text().splitlines()]
    assert rows[-1]["moved"]["training caption"] > 0 and None not in rows[-1]["train"]
    ran("convert", folder / "model", tmp_path / "one", "--to", "minidiff", "--lora", file)
    base = load(folder / "model")
    lora_files.load(base, file)
    state = lora.merged_state(base)
    assert all(torch.equal(value, state[name]) for name, value in load(tmp_path / "one").state_dict().items())  # fmt: skip


@pytest.mark.parametrize(
    "options, unet, vae",
    [
        (("--method", "inversion", "--word", "sks", "--dtype", "bf16"), BF16, BF16),
        ((*LORA, "--dtype", "fp16"), FP16, FP32),  # whose VAE overflows
        (LORA, FP32, FP32),
    ],
)
def test_each_method_and_precision(folder, tmp_path, ran, monkeypatch, forecasts, options, unet, vae):  # noqa: F811  # fmt: skip
    models = []
    monkeypatch.setattr(loop, "finetune", lambda each, *_: models.append(each))
    finetuned(ran, folder, tmp_path, *options, "--no-recorder")
    (loaded,) = models
    parts = loaded.unet, loaded.text, loaded.vae
    assert [dtypes(part) for part in parts] == [{unet}, {unet}, {vae}]
    assert loaded.vae.latent_scale.dtype == FP32


def test_a_model_folder_keeps_its_digits(folder, tmp_path, ran, forecasts):  # noqa: F811
    """full writes what it did not train, too."""
    finetuned(ran, folder, tmp_path, "--dtype", "bf16", "--no-recorder")
    before, after = (load(place / "model", dtype=None) for place in (folder, tmp_path))
    assert dtypes(after) == {FP32}
    for part in ("vae", "text"):
        was, now = (getattr(each, part).state_dict() for each in (before, after))
        assert all(torch.equal(was[name], now[name]) for name in was)
    assert "frozen" not in json.loads((tmp_path / "run.json").read_text())["settings"]


def test_the_loss_is_that_of_autocast(tmp_path):
    tiny().save(tmp_path / "model")
    losses, files = [], []
    for dtype in ("fp32", "bf16"):
        out = tmp_path / dtype
        how = dict(steps=4, method="lora", rank=2, dtype="bf16")
        run(out, load(tmp_path / "model", dtype=dtype), **how)
        rows = (out / "training" / "log.jsonl").read_text().splitlines()
        losses.append([json.loads(row)["loss"] for row in rows])
        files.append(load_file(out / "lora.safetensors"))
    assert losses[0] == pytest.approx(losses[1], rel=2e-2)
    kinds = [{name: (v.dtype, v.shape) for name, v in file.items()} for file in files]
    assert kinds[0] == kinds[1]


def stopped(steps, *_):
    for step in steps:
        yield step
        if step.step == 2:
            raise InterruptedError


@pytest.mark.parametrize("began", ["bf16", "fp32"])
def test_a_resumed_run_is_uninterrupted_bit_for_bit(folder, tmp_path, ran, forecasts, began):  # noqa: F811
    """Also one that an earlier version began, which had all weights in float32."""
    options = (*LORA, "--text", "--dtype", "bf16", "--no-recorder")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TuningConfig, "frozen", property(lambda _: began))
        finetuned(ran, folder, tmp_path / "whole", *options)
        patch.setattr(loop.tensorboard, "logged", stopped)
        with pytest.raises((InterruptedError, SystemExit)):
            finetuned(ran, folder, tmp_path / "parts", *options)
    settings = json.loads((tmp_path / "parts" / "run.json").read_text())["settings"]
    assert settings.get("frozen", "fp32") == began
    finetuned(ran, folder, tmp_path / "parts", *options, "--resume")
    whole, parts = (tmp_path / name / "lora.safetensors" for name in ("whole", "parts"))
    assert whole.read_bytes() == parts.read_bytes()


# Options that fit.


@pytest.mark.parametrize(
    "config, there, precision",
    [
        (dict(), True, "bf16"),
        (dict(), False, "fp32"),
        (dict(keep=("method",)), True, "fp32"),  # full
        (dict(keep=("method",), dtype="bf16"), True, "fp32"),
        (dict(dtype="fp16"), True, "fp16"),  # as a LoRA, if not all weights fit
        (dict(method="lora"), True, "bf16"),
        (dict(method="lora", keep=("dtype",)), True, "fp32"),
    ],
)
def test_options_are_chosen_for_the_smallest_model(monkeypatch, config, there, precision):
    monkeypatch.setattr(module, "computes_bf16", lambda device: there and device == "cuda")
    assert measured_in(FineTuneConfig(**config), "cuda:0") == precision


def test_the_estimate_of_a_model_that_is_loaded_anew(model, tmp_path):  # noqa: F811
    """Whatever it is loaded in now."""
    model.save(tmp_path)
    low, config = load(tmp_path, dtype="bf16"), FineTuneConfig(method="lora", dtype="bf16")
    asked = Case(model, lambda _: config, (32, 32), reloads=True).settings(PLAIN)
    alone = estimates.settings(config, model, (32, 32))
    assert asked == alone._replace(frozen=BF16)
    expected = estimates.estimate(low, alone)
    assert estimates.estimate(model, asked) == expected
    assert expected.weights < 0.6 * estimates.estimate(model, alone).weights
    full = Case(low, lambda _: replace(config, method="full"), (32, 32), reloads=True)
    assert full.settings(PLAIN).frozen == FP32


def test_advice_knows_what_is_loaded():
    def advised(**how):
        ways = alternatives(Settings(1, (32, 32), **how))
        return {
            name: ways[name].frozen for name in ("`method=lora`", "`dtype=bf16`") if name in ways
        }

    assert advised() == {"`method=lora`": None, "`dtype=bf16`": None}
    assert advised(bf16=True) == {"`method=lora`": BF16}
    assert advised(rank=8) == {"`dtype=bf16`": BF16} and advised(rank=8, bf16=True) == {}


@pytest.mark.parametrize("room, times", [(10**9, [BF16, FP32]), (10**4, [BF16])])
def test_fp32_is_timed_in_fp32_where_there_is_room(monkeypatch, model, tmp_path, room, times):  # noqa: F811
    """With weights that have the same bits afterwards."""
    model.save(tmp_path)
    low, timed = load(tmp_path, dtype="bf16"), []
    before = {name: value.clone() for name, value in low.state_dict().items()}
    monkeypatch.setattr(module, "computes_bf16", lambda _: True)
    monkeypatch.setattr(module, "forward_seconds", lambda m, _: timed.extend(dtypes(m.unet)) or 1.0)
    case = Case(low, lambda choice: applied(FineTuneConfig(), choice), (32, 32), reloads=True)
    seconds = module._seconds(case, PLAIN, set(), room)
    assert timed == times and seconds == {"bf16": 1.0, "fp32": 1.0 if len(times) > 1 else 2.0}
    assert dtypes(low) == {BF16}
    assert all(torch.equal(value, before[name]) for name, value in low.state_dict().items())


@pytest.mark.parametrize("method, loaded", [("full", ["bf16", "fp32"]), ("lora", ["bf16"])])
def test_the_model_is_loaded_as_was_chosen(folder, tmp_path, ran, monkeypatch, forecasts, method, loaded):  # noqa: F811  # fmt: skip
    precisions = []
    monkeypatch.setattr(minidiff, "load", lambda path, device, dtype: precisions.append(dtype) or load(path, device, dtype))  # fmt: skip
    monkeypatch.setattr(module, "computes_bf16", lambda _: True)
    chosen = SimpleNamespace(choice=Choice(method, "bf16", "adamw", False, None, True))
    monkeypatch.setattr(module, "fit", lambda case, *_: case.reloads and chosen)
    finetuned(ran, folder, tmp_path / "a", "--fit", "1GB", "--no-recorder")
    assert precisions == loaded
    precisions.clear()
    words = ("--prompt", "a photo of sks dog", "--fit", "1GB", "--prior", 0, "--text", "no")
    verb = ("dreambooth", "--model", folder / "model", "--subject", folder, *words)
    ran(*verb, "--steps", 2, "--batch", 2, "--no-recorder", "--out", tmp_path / "b")
    assert precisions == loaded
