"""Stability's and Black Forest Labs' files: what they compute, in their own names and order, is what ours computes; and each trap of
them, set, is seen."""

import re

import pytest
import torch

from minidiff import mmdit
from minidiff.checkpoints import folder, names_flow
from minidiff.mmdit import MMDiT

from . import published_flow
from .test_mmdit import F64, OURS, inputs, output_of, shapes, theirs_of
from .test_networks import gap, randomized

T = torch.tensor([0.25, 0.8], dtype=F64)


def published(kind):
    """Random tensors under the published names."""
    ours = randomized(MMDiT(OURS[kind]), F64)
    if ours.config.table:
        ours.table.data = torch.randn_like(ours.table)
    return names_flow.write(ours.state_dict(), layout_of(kind))


def layout_of(kind):
    return names_flow.SD3 if kind.startswith("sd3") else names_flow.FLUX


def expected(kind, state, x, condition):
    config = OURS[kind]
    if kind.startswith("sd3"):
        return published_flow.sd3(state, x, T, condition.context, condition.pooled, config.heads)
    guidance = condition.numbers[:, 0]
    parts = (condition.context, condition.pooled, config.heads, config.axes, guidance)
    return published_flow.flux(state, x, T, *parts)


def ours_of(kind, state, layout=None):
    ours = MMDiT(OURS[kind]).double().eval()
    ours.load_state_dict(names_flow.read(state, layout or names_flow.layout_of(state)))
    return ours


@torch.no_grad()
@pytest.mark.parametrize("kind", OURS)
def test_published_equals_ours_in_both_layouts(kind):
    state = published(kind)
    for sides in ((12, 8), (6, 24)):
        x, condition = inputs(*sides)
        theirs = expected(kind, state, x, condition)
        ours = ours_of(kind, state)
        assert theirs.std() > 0.1
        assert gap(ours(x, 1000 * T, condition), theirs) < 1e-12
    second = names_flow.SD3_DIFFUSERS if kind.startswith("sd3") else names_flow.FLUX_DIFFUSERS
    there = names_flow.write(ours.state_dict(), second)
    again = ours_of(kind, there)
    assert torch.equal(again(x, 1000 * T, condition), ours(x, 1000 * T, condition))
    back = names_flow.write(again.state_dict(), layout_of(kind))
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)


@pytest.mark.parametrize("kind", ["sd3", "sd35"])
def test_diffusers_own_conversion_gives_the_same(kind):
    utils = pytest.importorskip("diffusers.loaders.single_file_utils")
    state = published(kind)
    ours = ours_of(kind, state).state_dict()
    theirs = utils.convert_sd3_transformer_checkpoint_to_diffusers(dict(state))
    written = names_flow.write(ours, names_flow.SD3_DIFFUSERS)
    assert written.keys() == theirs.keys()
    assert all(torch.equal(written[name], theirs[name]) for name in theirs)


def test_diffusers_own_conversion_of_flux_gives_the_same():
    """Theirs knows one width: of shapes alone."""
    utils = pytest.importorskip("diffusers.loaders.single_file_utils")
    with torch.device("meta"), folder.Uninitialized():
        ours = mmdit.flux_dev().state_dict()
    theirs = utils.convert_flux_transformer_checkpoint_to_diffusers(
        names_flow.write(ours, names_flow.FLUX)
    )
    assert shapes(theirs) == shapes(names_flow.write(ours, names_flow.FLUX_DIFFUSERS))


def no_halves(monkeypatch):
    """(scale, shift) taken for (shift, scale)."""
    monkeypatch.setattr(names_flow, "ENDS", re.compile("$^"))


def no_patches(monkeypatch):
    """The numbers of a patch taken as they lie in SD3's file."""
    monkeypatch.setattr(names_flow, "PATCH", 1)


def top_left(monkeypatch):
    """The table of positions cut at its corner."""

    def cropped(self, height, width):
        side = self.config.table
        return self.table.unflatten(1, (side, side))[:, :height, :width].flatten(1, 2)

    monkeypatch.setattr(MMDiT, "cropped", cropped)


def halves_turned(monkeypatch):
    """Rotary positions on (x_i, x_{i + d/2}), as in most language models, not on neighbours."""

    def rotate(x, rotary):
        (cos, sin), (a, b) = rotary, x.chunk(2, dim=-1)
        return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)

    monkeypatch.setattr(mmdit, "rotate", rotate)


def text_has_places(monkeypatch):
    """Text at 1, 2, ... in place of 0."""
    own = MMDiT.rotary

    def rotary(self, length, height, width):
        return own(self, 0, length + height * width, 1)

    monkeypatch.setattr(MMDiT, "rotary", rotary)


@torch.no_grad()
@pytest.mark.parametrize(
    "kind, trap",
    [
        ("sd3", no_halves),
        ("flux", no_halves),
        ("sd3", no_patches),
        ("sd35", top_left),
        ("flux", halves_turned),
        ("flux", text_has_places),
    ],
)
def test_a_trap_of_diffusers_files_is_seen(kind, trap, monkeypatch):
    theirs, (x, condition) = theirs_of(kind), inputs()
    truth = output_of(theirs, x, T, condition)
    assert gap(ours_of(kind, theirs.state_dict())(x, 1000 * T, condition), truth) < 1e-5
    trap(monkeypatch)
    assert gap(ours_of(kind, theirs.state_dict())(x, 1000 * T, condition), truth) > 0.01


@torch.no_grad()
@pytest.mark.parametrize("kind", ["sd3", "flux"])
def test_patches_in_the_other_models_order_are_seen(kind):
    state, (x, condition) = published(kind), inputs()
    layout, swapped = layout_of(kind), names_flow.read(state, layout_of(kind))
    ends = {name: value for name, value in state.items() if name.startswith("final_layer.linear")}
    ends["txt_in.bias" if layout.flux else "context_embedder.bias"] = swapped["text_in.bias"]
    swapped |= names_flow.read(ends, layout._replace(flux=not layout.flux))
    ours = MMDiT(OURS[kind]).double()
    ours.load_state_dict(swapped)
    assert gap(ours(x, 1000 * T, condition), expected(kind, state, x, condition)) > 0.1


@torch.no_grad()
def test_guidance_is_shown_a_thousandfold():
    state, (x, condition) = published("flux-guided"), inputs()
    ours, truth = ours_of("flux-guided", state), expected("flux-guided", state, x, condition)
    thousandth = type(condition)(condition.context, condition.pooled, condition.numbers / 1000)
    assert gap(ours(x, 1000 * T, thousandth), truth) > 0.01
