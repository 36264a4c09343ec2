"""Shapes, parameters and multiply-adds of a network's parts, against what is counted by hand."""

import torch

from minidiff.figures.trace import table, trace_half, trace_unet
from minidiff.unet import UNet, UNetConfig, unet_sd1
from minidiff.vae import vae_sd


def test_a_small_unet_by_hand():
    with torch.device("meta"):
        unet = UNet(UNetConfig(4, 4, (32, 64), 1, (0, 1), (1, 1), context_dim=16, groups=8))
    rows = {row.part: row for row in trace_unet(unet, 8, words=5)}
    assert rows["conv_in"] == ("conv_in", (32, 8, 8), 4 * 32 * 9 + 32, 4 * 32 * 9 * 64)
    block = 2 * 32 * 32 * 9 * 64 + 128 * 32  # two convolutions at 8x8, and time
    down = 32 * 32 * 9 * 16
    assert rows["encoder.0"].shape == (32, 4, 4) and rows["encoder.0"].multiply_adds == block + down
    block = (32 * 64 * 9 + 64 * 64 * 9 + 32 * 64) * 16 + 128 * 64
    n, words = 16, 5  # positions of the map, words
    itself = 4 * 64 * 64 * n + 2 * 64 * n * n
    cross = 2 * 64 * 64 * n + 2 * 16 * 64 * words + 2 * 64 * n * words
    feed = 64 * 512 * n + 256 * 64 * n
    assert rows["encoder.1"].multiply_adds == block + 2 * 64 * 64 * n + itself + cross + feed
    assert sum(row.parameters for row in rows.values()) == sum(p.numel() for p in unet.parameters())


def test_stable_diffusion_from_pixels_to_the_bottom_and_back():
    with torch.device("meta"):
        unet, vae = unet_sd1(), vae_sd()
    rows = trace_unet(unet, 64)
    assert [
        row.shape[1] for row in rows if row.part.startswith(("encoder", "middle", "decoder"))
    ] == [32, 16, 8, 8, 8, 16, 32, 64, 64]
    assert sum(row.parameters for row in rows) == 859_520_964
    assert [row.shape for row in trace_half(vae.encoder, 3, 512)][-1] == (8, 64, 64)
    assert [row.shape for row in trace_half(vae.decoder, 4, 64)][-1] == (3, 512, 512)
    assert table(rows).splitlines()[-1].split()[1] == "859.52"
