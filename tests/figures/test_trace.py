"""What a trace records, against what is computed without hooks and counted by hand."""

import json

import pytest
import torch
from torch import nn

import minidiff
from minidiff.errors import UserError
from minidiff.figures.trace import trace
from minidiff.figures.unet_map import boxes_of
from minidiff.unet import UNet, UNetConfig, unet_sd1
from minidiff.vae import vae_sd


class Twice(nn.Module):
    """One layer called twice, and one that is called by keyword."""

    def __init__(self):
        super().__init__()
        self.conv, self.linear = nn.Conv2d(3, 3, 3, padding=1), nn.Linear(8, 5, bias=False)

    def forward(self, x):
        return self.linear(input=self.conv(self.conv(x)))


def small_unet(device="cpu"):
    with torch.device(device):
        unet = UNet(UNetConfig(4, 4, (32, 64), 1, (0, 1), (1, 1), context_dim=16, groups=8))
    for parameter in unet.parameters():
        if device == "cpu" and not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return unet


def inputs(device="cpu"):
    generator = torch.Generator().manual_seed(1)
    x, context = (torch.randn(*s, generator=generator) for s in ((1, 4, 8, 8), (1, 5, 16)))
    return x.to(device), torch.tensor([3.0], device=device), context.to(device)


def test_values_of_every_call_are_those_without_hooks():
    model, x = Twice(), torch.randn(2, 3, 8, 8)
    with torch.no_grad(), minidiff.trace(model) as rows:
        output = model(x)
    with torch.no_grad():
        first = model.conv(x)
        second = model.conv(first)
        expected = [model.linear(second), first, second, model.linear(second)]
    assert torch.equal(output, expected[0])
    assert [row.name for row in rows] == ["", "conv", "conv", "linear"]
    assert [row.parent for row in rows] == [None, 0, 0, 0]
    conv, linear = 2 * 64 * 3 * 3 * 9, 2 * 3 * 8 * 8 * 5
    assert [row.multiply_adds for row in rows] == [2 * conv + linear, conv, conv, linear]
    assert [row.parameters for row in rows] == [124, 84, 84, 40]
    for row, tensor in zip(rows, expected, strict=True):
        assert (row.shape, row.dtype) == (tuple(tensor.shape), "float32")
        assert row.mean == pytest.approx(tensor.mean().item(), abs=1e-7)
        assert row.std == pytest.approx(tensor.std(correction=0).item(), abs=1e-7)
        assert row.seconds > 0
    assert rows[0].seconds == pytest.approx(sum(row.seconds for row in rows[1:]))
    # bytes: the output of a call is new; of the whole, the first map is gone before the last is made
    assert rows[1].bytes == rows[2].bytes == first.nbytes
    assert 2 * first.nbytes <= rows[0].bytes <= 2 * first.nbytes + output.nbytes


@pytest.mark.parametrize("grad", [True, False])
def test_nothing_changes_and_the_skips_are_those_of_the_run(grad, tmp_path):
    unet, arguments = small_unet(), inputs()
    with torch.set_grad_enabled(grad):
        plain = unet(*arguments)
        with trace(unet) as rows:
            traced = unet(*arguments)
    assert torch.equal(plain, traced)
    skips = [(rows[join.sources[1]].name, rows[join.target].name) for join in rows.joins]
    assert skips == [
        ("encoder.1.attention.0", "decoder.0.residual.0"),
        ("encoder.0.resample", "decoder.0.residual.1"),
        ("encoder.0.residual.0", "decoder.1.residual.0"),
        ("conv_in", "decoder.1.residual.1"),
    ]
    boxes = boxes_of(rows)
    assert (
        sum(box.takes_skip for box in boxes) == sum(box.skip_to is not None for box in boxes) == 4
    )
    drawing = rows.draw(tmp_path / "unet.svg").read_text()
    assert rows.draw(tmp_path / "unet.png").stat().st_size > 10_000
    assert "<svg" in drawing


def test_hooks_are_gone_after_an_exception_and_the_table_says_where_it_stopped():
    model = Twice()
    with pytest.raises(RuntimeError), trace(model) as rows:
        model(torch.randn(1, 3, 8, 9))
    assert [row.shape for row in rows] == [None, (1, 3, 8, 9), (1, 3, 8, 9), None]
    for module in model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks
    count = len(rows)
    model(torch.randn(1, 3, 8, 8))
    assert len(rows) == count and "linear" in str(rows)


def test_what_cannot_be_traced_or_drawn(tmp_path):
    with pytest.raises(UserError, match="trace takes a torch module, not str; minidiff"):
        minidiff.trace("box").__enter__()
    model = Twice()
    with trace(model) as rows:
        model(torch.randn(1, 3, 8, 8))
    with pytest.raises(UserError, match="no skips to draw; trace a whole U-Net of ours"):
        rows.draw(tmp_path / "none.svg")
    unet = small_unet()
    with trace(unet) as rows:
        unet(*inputs())
    with pytest.raises(UserError, match=r"written as \.pdf or \.png or \.svg"):
        rows.draw(tmp_path / "unet.txt")


def test_tables_and_json():
    unet = small_unet()
    with trace(unet) as rows, torch.no_grad():
        unet(*inputs())
    table = str(rows).splitlines()
    assert (
        table[0].split()
        == "module kind shape dtype mean std parameters multiply-adds ms memory".split()
    )
    lines = rows.outline(1)
    assert [row.name for row in lines] == (
        ["", "time", "conv_in", "encoder", "middle", "decoder", "norm_out", "conv_out"]
    )
    assert sum(row.multiply_adds for row in lines[1:]) == rows[0].multiply_adds
    assert sum(row.parameters for row in lines[1:]) == rows[0].parameters
    assert len(rows.table(1).splitlines()) == 9 and "    residual" not in rows.table(1)
    back = json.loads(rows.json())
    assert len(back["rows"]) == len(rows) and len(back["joins"]) == 4
    assert back["rows"][0]["kind"] == "UNet" and back["rows"][0]["shape"] == [1, 4, 8, 8]


def test_nan_is_null_in_json():
    model = nn.Linear(2, 2)
    with trace(model) as rows:
        model(torch.full((1, 2), torch.nan))
    assert json.loads(rows.json())["rows"][0]["mean"] is None


def test_a_whole_model_that_samples(sd):
    model = sd()
    with trace(model) as rows:
        *_, last = model.sample(["a cat"], steps=2, generator=torch.Generator().manual_seed(0))
        model.decode(last.x0)
    names = [row.name for row in rows if row.parent is None]
    assert names[:4] == ["text", "text", "denoiser", "denoiser"] and names[-1] == "vae.decoder"
    total = sum(row.multiply_adds for row in rows if row.parent is None)
    assert str(rows).splitlines()[-1].startswith("sum") and total > 0
    boxes = boxes_of(rows)
    assert sum(box.takes_skip for box in boxes) == 4
    assert (boxes[1].home, boxes[1].names) == ("encoder.0", ("residual.0", "attention.0"))


def test_a_small_unet_by_hand():
    """On the meta device, where the fused attention of the CPU is two products."""
    counts = {}
    for device in ("meta", "cpu"):
        unet = small_unet(device)
        with trace(unet) as rows, torch.no_grad():
            unet(*inputs(device))
        counts[device] = {row.name: row.multiply_adds for row in rows.outline(2)}
    assert counts["meta"] == counts["cpu"]
    by_name = {row.name: row for row in rows.outline(2)}
    conv_in = by_name["conv_in"]
    assert (conv_in.shape, conv_in.parameters) == ((1, 32, 8, 8), 4 * 32 * 9 + 32)
    assert conv_in.multiply_adds == 4 * 32 * 9 * 64
    block = 2 * 32 * 32 * 9 * 64 + 128 * 32  # two convolutions at 8x8, and time
    down = 32 * 32 * 9 * 16
    assert by_name["encoder.0"].shape == (1, 32, 4, 4)
    assert by_name["encoder.0"].multiply_adds == block + down
    block = (32 * 64 * 9 + 64 * 64 * 9 + 32 * 64) * 16 + 128 * 64
    n, words = 16, 5  # positions of the map, words
    itself = 4 * 64 * 64 * n + 2 * 64 * n * n
    cross = 2 * 64 * 64 * n + 2 * 16 * 64 * words + 2 * 64 * n * words
    feed = 64 * 512 * n + 256 * 64 * n
    assert by_name["encoder.1"].multiply_adds == block + 2 * 64 * 64 * n + itself + cross + feed
    assert rows[0].parameters == sum(p.numel() for p in unet.parameters())


def test_stable_diffusion_from_pixels_to_the_bottom_and_back():
    with torch.device("meta"):
        unet, vae = unet_sd1(), vae_sd()
        unet_inputs = torch.empty(1, 4, 64, 64), torch.empty(1), torch.empty(1, 77, 768)
        images, latents = torch.empty(1, 3, 512, 512), torch.empty(1, 4, 64, 64)
    traced = []
    for network, arguments in (
        (unet, unet_inputs),
        (vae.encoder, [images]),
        (vae.decoder, [latents]),
    ):
        with trace(network) as rows, torch.no_grad():
            network(*arguments)
        traced.append(rows)
    rows = traced[0]
    levels = [row for row in rows.outline(2) if row.kind == "Level"]
    assert [row.shape[2] for row in levels] == [32, 16, 8, 8, 8, 16, 32, 64, 64]
    assert rows[0].parameters == 859_520_964 and rows[0].multiply_adds == 401_636_720_640
    assert rows[0].mean is None and rows[0].seconds is None and rows[0].bytes is None
    assert [rows[-1].shape for rows in traced[1:]] == [(1, 8, 64, 64), (1, 3, 512, 512)]
    assert "859.52 M" in rows.table(2).splitlines()[1]


def test_the_skips_of_diffusers_are_found():
    diffusers = pytest.importorskip("diffusers")
    unet = diffusers.UNet2DConditionModel(
        sample_size=16, block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=16,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), norm_num_groups=8,
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), attention_head_dim=4,
    )  # fmt: skip
    with torch.no_grad(), trace(unet) as rows:
        unet(torch.randn(1, 4, 16, 16), torch.tensor([3]), torch.randn(1, 5, 16))
    assert [(rows[join.sources[1]].name, rows[join.target].name) for join in rows.joins] == [
        ("down_blocks.1", "up_blocks.0.resnets.0"),
        ("down_blocks.0", "up_blocks.0.resnets.1"),
        ("down_blocks.0.attentions.0", "up_blocks.1.resnets.0"),
        ("conv_in", "up_blocks.1.resnets.1"),
    ]
    with pytest.raises(UserError, match="no skips to draw"):
        boxes_of(rows)
