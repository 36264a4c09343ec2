"""ControlNet: nothing changes before it is trained, and the hint is in [0, 1]."""

import pytest
import torch

import minidiff
from minidiff import pipeline
from minidiff.condition import Condition
from minidiff.errors import UserError
from minidiff.layers import ResBlock
from minidiff.methods.controlnet import (
    Control,
    Controlled,
    controlled,
    controlled_denoiser,
    copy_of,
    outlines,
)
from minidiff.options.sampling import SampleConfig
from minidiff.unet import UNet, UNetConfig

PROMPTS = ["a small red circle", "a large blue square"]
CONFIG = SampleConfig(steps=2, seed=3)


@pytest.fixture(scope="module")
def box():
    return minidiff.load()


def hint(n=1, seed=0):
    return torch.rand(n, 3, 32, 32, generator=torch.Generator().manual_seed(seed)).round()


def disturbed(controlnet, seed=0):
    """As if trained: no convolution is zero."""
    generator = torch.Generator().manual_seed(seed)
    for layer in [controlnet.hint[-1], *controlnet.zero, controlnet.zero_middle]:
        layer.weight.data.normal_(generator=generator)
    return controlnet


def test_before_training_the_pictures_are_the_bases_to_the_bit(box):
    control = Control(copy_of(box.unet, box.vae.factor), hint())
    plain = pipeline.generate(box, PROMPTS, CONFIG)
    assert torch.equal(pipeline.generate(controlled(box, control), PROMPTS, CONFIG), plain)


def test_a_copy_that_is_not_zero_at_first_would_change_them(box):
    """The trap: any one convolution that does not start at zero."""
    plain = pipeline.generate(box, PROMPTS, CONFIG)
    for place in (0, -1):
        controlnet = copy_of(box.unet, box.vae.factor)
        torch.nn.init.normal_([*controlnet.zero, controlnet.zero_middle][place].bias)
        drawn = pipeline.generate(controlled(box, Control(controlnet, hint())), PROMPTS, CONFIG)
        assert not torch.equal(drawn, plain)


def test_the_model_itself_stays_as_it_was(box):
    before = box.denoiser.network
    model = controlled(box, Control(disturbed(copy_of(box.unet, 2)), hint()))
    assert box.denoiser.network is before and model.unet.unet is before
    assert model.vae is box.vae and model.text is box.text
    assert model.denoiser.weighting == box.denoiser.weighting
    assert not torch.equal(*(pipeline.generate(m, PROMPTS, CONFIG) for m in (box, model)))


def test_scale_zero_is_off(box):
    control = Control(disturbed(copy_of(box.unet, 2)), hint(), scale=0.0)
    plain = pipeline.generate(box, PROMPTS, CONFIG)
    assert torch.equal(pipeline.generate(controlled(box, control), PROMPTS, CONFIG), plain)


@torch.no_grad()
def test_each_image_has_its_hint_also_under_guidance(box):
    """Guidance doubles the batch: all without a prompt, then all with one."""
    controlnet, both = disturbed(copy_of(box.unet, 2)), hint(2)
    together = pipeline.generate(controlled(box, Control(controlnet, both)), PROMPTS, CONFIG)
    for k, prompt in enumerate(PROMPTS):
        model = controlled(box, Control(controlnet, both[k : k + 1]))
        alone = pipeline.generate(model, [prompt], CONFIG, first=k)
        assert torch.allclose(together[k : k + 1], alone, atol=1e-4)  # other sizes of batches


@pytest.mark.parametrize("wrong", [2 * hint() - 1, 255 * hint()])
def test_a_hint_must_be_in_0_to_1(box, wrong):
    with pytest.raises(UserError, match=r"the hint's values are .* they must be in \[0, 1\]"):
        Control(copy_of(box.unet, 2), wrong)


@torch.no_grad()
def test_a_hint_in_minus_1_to_1_would_draw_something_else(box):
    """What the check above is for: nothing else notices."""
    controlnet = disturbed(copy_of(box.unet, 2))
    control = Control(controlnet, hint())
    x, t, context = torch.randn(1, 4, 16, 16), torch.tensor([500]), box.text.encode(PROMPTS[:1])
    right = controlnet(x, t, context, control.hint)
    wrong = controlnet(x, t, context, 2 * control.hint - 1)
    gaps = [(a - b).abs().max() / a.abs().max() for a, b in zip(right, wrong, strict=True)]
    assert max(gaps) > 0.1


def test_errors_say_what_does_not_fit(box):
    controlnet = copy_of(box.unet, 2)
    for control, prompts, message in (
        (Control(controlnet, torch.zeros(1, 3, 64, 32)), PROMPTS, "32x64 pixels; .* 32x32"),
        (Control(controlnet, hint(3)), PROMPTS[:1], "3 hints for"),
    ):
        with pytest.raises(UserError, match=message):
            pipeline.generate(controlled(box, control), prompts, CONFIG)
    other = UNet(UNetConfig(4, 4, (32, 32), 1, (0, 1), (2, 2), context_dim=64))
    with pytest.raises(UserError, match="of another model: its channels is"):
        Controlled(other, Control(controlnet, hint()))
    with pytest.raises(UserError, match="a factor of 3"):
        copy_of(box.unet, 3)


def test_only_the_copy_learns_and_first_of_all_its_zero_convolutions(box):
    """Their gradient is not zero though their weights are; what stands before them learns next."""
    box.unet.requires_grad_(False)
    controlnet = copy_of(box.unet, 2)
    denoiser = controlled_denoiser(box.denoiser, Control(controlnet, hint(2)))
    x0, t = torch.randn(2, 4, 16, 16), torch.tensor([400, 900])
    denoiser.loss(x0, box.text.encode(PROMPTS), t).mean().backward()
    assert all(p.grad is None for p in box.unet.parameters())
    assert controlnet.zero_middle.weight.grad.abs().max() > 0
    assert all(layer.weight.grad.abs().max() > 0 for layer in controlnet.zero)
    assert controlnet.hint[0].weight.grad.abs().max() == 0
    assert controlnet.conv_in.weight.grad.abs().max() == 0


@torch.no_grad()
def test_a_unet_that_takes_a_condition():
    """SDXL's: pooled vector and sizes reach the copy as well."""
    sizes = {"channels": (32, 32), "depth": (0, 1), "heads": (1, 1), "context_dim": 8}
    unet = UNet(UNetConfig(4, 4, blocks=1, added=4 + 6 * 256, **sizes))
    for block in (m for m in unet.modules() if isinstance(m, ResBlock)):
        torch.nn.init.normal_(block.conv2.weight)
    controlnet = disturbed(copy_of(unet, 8))
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([1, 2])
    context = Condition(torch.randn(2, 3, 8), torch.randn(2, 4), torch.full((2, 6), 64.0))
    control = Control(controlnet, torch.rand(1, 3, 64, 64))
    first = controlnet(x, t, context, control.hint)
    other = Condition(context.context, context.pooled + 1, context.numbers)
    assert len(first) == 5 and not torch.equal(first[-1], controlnet(x, t, other, control.hint)[-1])
    assert Controlled(unet, control)(x, t, context).shape == x.shape


def test_outlines_are_where_the_colour_changes():
    image = torch.full((1, 3, 8, 8), -1.0)
    image[:, 0, 2:5, 3:6] = 1  # one channel is enough
    lines = outlines(image)
    assert lines.shape == image.shape and set(lines.unique().tolist()) == {0.0, 1.0}
    assert lines[0, 0].nonzero().tolist() == [
        *([1, c] for c in (3, 4, 5)),
        *([r, c] for r in (2, 3) for c in (2, 5)),
        *([4, c] for c in (2, 3, 4, 5)),
    ]
