"""Options that fit in a given memory: the fastest that does, what is given stays, one line where nothing does, and a resumed run keeps what it chose."""

import json
from functools import partial

import pytest
import torch

from minidiff.errors import UserError
from minidiff.finetuning import estimate as estimates
from minidiff.finetuning import fit as module
from minidiff.finetuning.fit import WITHIN, Case, Choice, applied, earlier, fit
from minidiff.options.finetuning import FineTuneConfig, RecorderConfig, bytes_of
from tests.finetuning.test_estimate import model  # noqa: F401 (a fixture)
from tests.finetuning.test_loop import folder  # noqa: F401 (a fixture)

PLAIN = Choice("full", "fp32", "adamw", False, None, True)


@pytest.fixture(autouse=True)
def without_bf16(monkeypatch):
    """So that the tests are the same on every processor."""
    monkeypatch.setattr(module, "computes_bf16", lambda _: False)


def case(model, config, recorder=None):  # noqa: F811
    return Case(model, partial(applied, config), (32, 32), recorder=recorder)


def need(model, choice, **how):  # noqa: F811
    """Bytes, by the estimate alone."""
    config = applied(FineTuneConfig(**how), choice)
    return estimates.estimate(model, estimates.settings(config, model, (32, 32))).total


def mb(count):
    return f"{count * WITHIN / 1e6 + 0.01:.6f}MB"


@pytest.mark.parametrize(
    "choice",
    [
        PLAIN,
        PLAIN._replace(pieces=2),
        PLAIN._replace(pieces=4, background=False),
    ],
)
def test_the_fastest_that_fits(model, choice):  # noqa: F811
    """With exactly the room that a choice needs: it, or a cheaper one that needs no more."""
    room = need(model, choice)
    config = FineTuneConfig(fit=mb(room))
    made = fit(case(model, config), config)
    one = {"fp32": 1.0}
    assert made.peak.total * WITHIN <= made.budget
    assert made.peak.total == need(model, made.choice)
    assert module._cost(made.choice, one) <= module._cost(choice, one)
    if choice == PLAIN:
        assert made.choice == PLAIN
        text = str(made)
        assert "`checkpointing`" in text and "chosen" not in text and "peak: about" in text
    cheaper = [
        other
        for other in module._candidates(case(model, config), PLAIN, set())
        if other.method == made.choice.method
        and module._cost(other, one) < module._cost(made.choice, one)
    ]
    assert all(need(model, other) * WITHIN > made.budget for other in cheaper)


def test_a_lora_only_where_the_method_is_open(model):  # noqa: F811
    least = min(
        need(model, PLAIN._replace(pieces=4, background=False, checkpointing=c))
        for c in (False, True)
    )
    config = FineTuneConfig(fit=mb(0.95 * least))
    made = fit(case(model, config), config)
    assert made.choice.method == "lora"
    assert "so a LoRA is trained; give `method=full` to insist" in str(made)
    fixed = FineTuneConfig(fit=mb(0.95 * least), keep=("method",))
    with pytest.raises(
        UserError, match=r"nothing fits in .* MB: the least is .* MB, with `method=full`"
    ):
        fit(case(model, fixed), fixed)


def test_what_is_given_stays(model):  # noqa: F811
    room = need(model, PLAIN._replace(pieces=4, background=False))
    config = FineTuneConfig(fit=mb(room), keep=("pieces", "checkpointing", "method"))
    with pytest.raises(UserError, match="nothing fits"):
        fit(case(model, config), config)
    config = FineTuneConfig(fit="100GB", checkpointing=True, pieces=4)
    made = fit(case(model, config), config)
    assert made.choice == PLAIN._replace(checkpointing=True, pieces=4)


def test_the_least_that_is_named_would_do(model):  # noqa: F811
    config = FineTuneConfig(fit="1MB")
    with pytest.raises(UserError) as told:
        fit(case(model, config, RecorderConfig(n=4)), config)
    words = str(told.value)
    assert "leave the flight recorder out" in words and "\n" not in words
    least = float(words.split("the least is ")[1].split(" MB")[0]) + 0.1
    config = FineTuneConfig(fit=f"{least}MB")
    assert fit(case(model, config, RecorderConfig(n=4)), config).budget == int(least * 1e6)


def test_auto_is_what_is_free(model, monkeypatch):  # noqa: F811
    monkeypatch.setattr(module, "free_bytes", lambda _: 10**9)
    config = FineTuneConfig(fit="auto")
    made = fit(case(model, config), config)
    assert made.budget == 10**9 + made.peak.weights and made.choice == PLAIN


def test_eight_bits_need_a_gpu_and_the_library(model, monkeypatch):  # noqa: F811
    here = case(model, FineTuneConfig())
    assert {each.optimizer for each in module._candidates(here, PLAIN, set())} == {"adamw"}
    monkeypatch.setattr(type(model), "device", torch.device("cuda"))
    for there, optimizers in ((None, {"adamw"}), (object(), {"adamw", "adamw8bit"})):
        monkeypatch.setattr(module.importlib.util, "find_spec", lambda _, there=there: there)
        candidates = module._candidates(here, PLAIN, set())
        assert {each.optimizer for each in candidates} == optimizers
        assert all(each.background for each in candidates)  # its copy is in another memory


def test_the_faster_precision_is_timed(model, monkeypatch):  # noqa: F811
    monkeypatch.setattr(module, "computes_bf16", lambda _: True)
    for slow, chosen in ((True, "bf16"), (False, "fp32")):
        times = {slow: 2.0, not slow: 1.0}
        monkeypatch.setattr(module, "forward_seconds", lambda _, how, t=times: t[not how.bf16])
        config = FineTuneConfig(fit="100GB")
        assert fit(case(model, config), config).choice.dtype == chosen


@pytest.mark.parametrize(
    "text, count",
    [("8GB", 8 * 10**9), ("7.5 GiB", 8053063680), ("900M", 9 * 10**8), ("auto", None)],
)
def test_sizes(text, count):
    assert bytes_of(text) == count


@pytest.mark.parametrize("text", ["8", "GB", "0GB", "eight", "8TB", "-8GB", "8GB please"])
def test_what_is_no_size(text):
    with pytest.raises(UserError, match="write a size, as in 8GB, or auto"):
        FineTuneConfig(fit=text)


def test_a_run_that_is_resumed_keeps_what_it_chose(model, tmp_path):  # noqa: F811
    chosen = PLAIN._replace(pieces=2, checkpointing=True)
    config = applied(FineTuneConfig(fit="8GB", lr=1e-5), chosen)
    (tmp_path / "training").mkdir()
    for content, found in (
        ({"settings": config.identity()}, chosen),
        ({"settings": {}}, None),
        ([], None),
    ):
        (tmp_path / "run.json").write_text(json.dumps(content))
        assert earlier(tmp_path) == found
    other = FineTuneConfig(fit="100GB", pieces=4)
    made = fit(case(model, other), other, chosen)
    assert made.choice == chosen._replace(pieces=4)


def test_from_the_command_line(folder, tmp_path, ran, refused):  # noqa: F811
    """Given flags stay, even at their defaults; resumed with more room, the run is the same."""
    verb = ["finetune", "--model", folder / "model", "--data", folder, "--out", tmp_path / "out"]
    verb += ["--steps", 2, "--batch", 2, "--no-recorder"]
    words = refused(*verb, "--fit", "1MB", "--method", "full", "--dtype", "fp32")
    assert words.startswith("nothing fits in 1.0 MB: the least is") and "--method full" in words
    said = ran(*verb, "--fit", "4GB", "--method", "full").out
    assert "fit: 4.0 GB to fit in" in said and "--pieces 2" in said and "--method lora" not in said
    assert json.loads((tmp_path / "out" / "run.json").read_text())["settings"]["fit"]
    said = ran(*verb, "--fit", "auto", "--resume").out
    assert "fit: " in said
