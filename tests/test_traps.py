"""The traps of the family, as the bug museum's bugs: every switch sets its trap in the library and
takes it out again, changes the picture, and makes the named test fail; the page says what the table
says; and the models learn, go on where they were stopped, and are kept."""

import signal
import sys

import pytest
import torch
from jaxtyping import install_import_hook
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from minidiff.errors import UserError
from minidiff.training.seeds import generator_of

from .test_docs import ROOT
from .test_museum import failing, is_undone, says_what_the_table_says

sys.path.insert(0, str(ROOT / "experiments"))
with install_import_hook(
    ["traps", "trap_models", "switches", "controlnet"],
    "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))",
):
    import switches
    import trap_models
    import traps

SHARE = 0.006  # of the training


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    """Barely trained, and then disturbed: what they draw is no picture, but a trap changes it."""
    toys, generator = trap_models.Toys(tmp_path_factory.mktemp("toys"), SHARE), generator_of(0, 0)
    for name in trap_models.TRAININGS:
        state = load_file(file := toys.file(name))
        noise = {k: torch.randn(v.shape, generator=generator) for k, v in state.items()}
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata()
        state = {k: v if k.endswith("pos_embed") else v + 0.1 * noise[k] for k, v in state.items()}
        save_file(state, file, metadata)
    return toys


@pytest.mark.parametrize("name", traps.TRAPS)
def test_a_switch_is_the_one_change_and_is_undone(name):
    is_undone(traps.TRAPS[name])


@pytest.fixture(scope="module")
def right(toys):
    """What each draws without a trap."""
    return {bug.picture: bug.picture() for bug in traps.table_of(toys).values()}


@pytest.mark.parametrize("name", traps.TRAPS)
def test_the_trap_shows(toys, right, name):
    bug = traps.table_of(toys)[name]
    before, wrong = switches.pair(bug, right[bug.picture])
    assert (before - wrong).abs().max() > 1e-3
    assert torch.equal(bug.picture(), before)  # the trap is gone, and what is drawn is seeded


def test_the_named_test_catches_the_trap():
    """In a process of its own, where it runs with the trap; no two traps have one test."""
    nodes, failed, output = failing(traps.TRAPS.values())
    assert failed == nodes, output
    assert len(nodes) == len(traps.TRAPS)


def test_a_training_goes_on_where_it_was_stopped(tmp_path, monkeypatch):
    """And ends with the same weights to the bit; a finished model is not trained again."""
    whole = load_file(trap_models.Toys(tmp_path / "whole", SHARE).file("transformer"))
    own = trap_models.follow

    def stopped(training, *rest):
        for step in training:
            if step.step == 3:
                signal.raise_signal(signal.SIGINT)

    again = trap_models.Toys(tmp_path / "again", SHARE)
    monkeypatch.setattr(trap_models, "follow", stopped)
    with pytest.raises(KeyboardInterrupt):
        again.file("transformer")
    told = {name: SHARE * plan.minutes for name, plan in trap_models.TRAININGS.items()}
    assert again.minutes() == pytest.approx(sum(told.values()))  # nothing is there yet
    monkeypatch.setattr(trap_models, "follow", own)
    state = load_file(again.file("transformer"))
    assert all(torch.equal(state[name], value) for name, value in whole.items())
    monkeypatch.setattr(trap_models, "train", None)
    assert again.file("transformer").exists() and again.minutes() == pytest.approx(
        told["controlnet"]
    )


def test_main(toys, capsys):
    traps.main("time, last_norm", toys.out, share=SHARE)
    for name in ("time.png", "last_norm.png", "traps.png", "results.json"):
        assert (toys.out / name).stat().st_size > 0
    assert capsys.readouterr().out.startswith("about 0.")
    with pytest.raises(UserError, match='no bug "cyan"'):
        traps.main("time,cyan", toys.out)
    with pytest.raises(UserError, match=r"absent\.safetensors"):
        traps.main("hint", toys.out, controlnet=toys.out / "absent.safetensors")


def test_the_page_says_what_the_table_says():
    says_what_the_table_says(ROOT / "docs" / "traps.md", traps.TRAPS, "traps")


def test_the_figure_is_small():
    assert (ROOT / "docs" / "figures" / "traps.png").stat().st_size < 600_000
