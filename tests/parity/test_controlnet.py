"""ControlNet beside diffusers' ControlNetModel, at random weights, in fp64 to 1e-12."""

import pytest
import torch

from minidiff.checkpoints.controlnet import controlnet_diffusers
from minidiff.checkpoints.names import UNET_DIFFUSERS, to_ours
from minidiff.condition import Condition
from minidiff.layers import timestep_embedding
from minidiff.methods.controlnet import Control, Controlled, ControlNet, ControlNetConfig
from minidiff.unet import UNet, UNetConfig

from .test_networks import gap, randomized

diffusers = pytest.importorskip("diffusers")
WIDTHS = (32, 64, 128, 128)
SD = dict(block_out_channels=WIDTHS, layers_per_block=2, cross_attention_dim=24)
XL = dict(block_out_channels=WIDTHS[:3], layers_per_block=2, cross_attention_dim=24)
XL |= dict(transformer_layers_per_block=(1, 2, 3), use_linear_projection=True)
XL |= dict(addition_embed_type="text_time", addition_time_embed_dim=256)
XL |= dict(projection_class_embeddings_input_dim=8 + 6 * 256, attention_head_dim=(1, 2, 4))
XL |= dict(down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"))
UP = dict(up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"))
OURS = dict(channels=WIDTHS, blocks=2, depth=(1, 1, 1, 0), context_dim=24)
CASES = {  # diffusers' arguments, those of its U-Net alone, ours
    "sd1": (SD | dict(attention_head_dim=4), {}, OURS | dict(heads=(4,) * 4)),
    "sd2": (
        SD | dict(attention_head_dim=(1, 2, 4, 4), use_linear_projection=True),
        {},
        OURS | dict(heads=(1, 2, 4, 4), linear_projection=True),
    ),
    "sdxl": (
        XL,
        UP,
        dict(channels=WIDTHS[:3], blocks=2, depth=(0, 2, 3), heads=(1, 2, 4), context_dim=24)
        | dict(linear_projection=True, added=8 + 6 * 256),
    ),
}


@pytest.mark.parametrize("scale", [1.0, 0.6])
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_controlled_unet_equals_diffusers(case, scale):
    theirs, up, config = CASES[case]
    unet = randomized(diffusers.UNet2DConditionModel(**theirs, **up), torch.float64)
    controlnet = diffusers.ControlNetModel(**theirs)
    controlnet = randomized(controlnet, torch.float64)
    for network in (unet, controlnet):  # their sines are fp32's
        network.time_proj.forward = lambda t: timestep_embedding(t.double(), WIDTHS[0])
        if case == "sdxl":
            network.add_time_proj.forward = lambda t: timestep_embedding(t.double(), 256)

    ours = UNet(UNetConfig(4, 4, **config)).double().eval()
    ours.load_state_dict(to_ours(unet.state_dict(), UNET_DIFFUSERS))
    net = ControlNet(ControlNetConfig(4, 4, **config)).double().eval()
    net.load_state_dict(to_ours(controlnet.state_dict(), controlnet_diffusers(4)))

    x, t = torch.randn(2, 4, 16, 16).double(), torch.tensor([7, 830])
    context, hint = torch.randn(2, 9, 24).double(), torch.rand(2, 3, 128, 128).double()
    added, given = None, context
    if case == "sdxl":
        pooled, sizes = torch.randn(2, 8).double(), torch.tensor([[64.0, 48, 0, 8, 64, 64]] * 2)
        added = {"text_embeds": pooled, "time_ids": sizes}
        given = Condition(context, pooled, sizes.double())
    down, middle = controlnet(
        x, t, context, hint, scale, added_cond_kwargs=added, return_dict=False
    )
    residuals = net(x, t.double(), given, hint)
    for a, b in zip(residuals, [*down, middle], strict=True):
        assert b.std() > 0.01 and gap(scale * a, b) < 1e-12
    expected = unet(
        x,
        t,
        context,
        added_cond_kwargs=added,
        down_block_additional_residuals=down,
        mid_block_additional_residual=middle,
    ).sample
    got = Controlled(ours, Control(net, hint, scale))(x, t.double(), given)
    assert gap(got, expected) < 1e-12
    assert gap(ours(x, t.double(), given), expected) > 0.01  # without control
