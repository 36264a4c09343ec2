"""Stable Diffusion 1.5 at its true size, with random weights: every tensor of every layout, and the U-Net's numbers. Minutes and gigabytes."""

import json
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file, save_file

from minidiff.checkpoints import write
from minidiff.checkpoints.folder import empty, fill
from minidiff.checkpoints.load import load
from minidiff.checkpoints.names import UNET_DIFFUSERS, to_ours
from minidiff.layers import timestep_embedding
from minidiff.unet import UNet, unet_sd1

from .test_networks import gap, randomized

sys.path.insert(0, str(Path(__file__).parents[2] / "experiments"))
import bench_files

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.slow
COUNTS = {"unet": 686, "vae": 248, "text_encoder": 196 + 1}  # and the position ids
LEVELS = (320, 640, 1280, 1280)


@pytest.fixture(autouse=True)
def one_at_a_time(tmp_path_factory):
    """Of all workers: two of these at once would not fit 24 GB."""
    with FileLock(tmp_path_factory.getbasetemp().parent / "full-size.lock"):
        yield


def published():
    """The networks of SD 1.5 as diffusers and transformers build them, without memory."""
    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel(
            sample_size=64, block_out_channels=LEVELS, cross_attention_dim=768, attention_head_dim=8
        )
        vae = diffusers.AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
            latent_channels=4,
            sample_size=512,
        )
        text = transformers.CLIPTextModel(
            transformers.CLIPTextConfig(
                hidden_size=768,
                intermediate_size=3072,
                num_hidden_layers=12,
                num_attention_heads=12,
                projection_dim=768,
            )
        )
    return {"unet": unet, "vae": vae, "text_encoder": text}


def test_every_tensor_is_consumed_and_reproduced(sd, tmp_path):
    """Half-precision files of the true names and shapes, made without our tables, through all three layouts: the same bits come back."""
    generator = torch.Generator().manual_seed(0)
    folder, stems = (
        tmp_path / "sd",
        {
            "unet": "diffusion_pytorch_model",
            "vae": "diffusion_pytorch_model",
            "text_encoder": "model",
        },
    )
    write.save_diffusers(
        sd(), folder
    )  # for its tokenizer and noise levels; the rest of its settings is replaced
    states = {}
    for part, network in published().items():
        state = {
            name: torch.randn(value.shape, generator=generator).half()
            for name, value in network.state_dict().items()
        }
        if part == "text_encoder":
            state = {
                f"text_model.{name.removeprefix('text_model.')}": value
                for name, value in state.items()
                if "position_ids" not in name
            }
            state["text_model.embeddings.position_ids"] = torch.arange(77)[None]
        assert len(state) == COUNTS[part]
        states[part] = state
        save_file(state, folder / part / f"{stems[part]}.safetensors")
        config = network.config if part != "text_encoder" else network.config.to_dict()
        (folder / part / "config.json").write_text(json.dumps(dict(config), default=str))
    model = load(folder, dtype=None)
    assert sum(p.numel() for p in model.unet.parameters()) == 859_520_964
    single = write.save_compvis(model, tmp_path / "sd.safetensors")
    whole = load_file(single)
    assert len(whole) == sum(COUNTS.values()) == 1131
    assert (
        "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.attn2.to_out.0.weight"
        in whole
    )
    assert "first_stage_model.decoder.up.3.block.0.nin_shortcut.weight" not in whole
    assert "first_stage_model.decoder.up.1.block.0.nin_shortcut.weight" in whole
    assert whole["first_stage_model.encoder.mid.attn_1.q.weight"].shape == (512, 512, 1, 1)
    del model, whole
    again = write.save_diffusers(
        load(load(single, dtype=None).save(tmp_path / "ours"), dtype=None), tmp_path / "again"
    )
    for part, state in states.items():
        back = load_file(again / part / f"{stems[part]}.safetensors")
        assert back.keys() == state.keys()
        assert all(
            torch.equal(back[name], value) and back[name].dtype == value.dtype
            for name, value in state.items()
        )
    if Path("/proc/self/status").is_file():  # where memory can be told
        for path, dtype in ((again, "fp16"), (again, "fp32"), (single, "bf16")):
            assert bench_files.opened("minidiff", path, dtype)["peak_by_weights"] < 1.3


@torch.no_grad()
@pytest.mark.parametrize(
    "dtype, side, tolerance", [(torch.float32, 64, 1e-5), (torch.float64, 16, 1e-12)]
)
def test_the_unet_equals_diffusers(dtype, side, tolerance):
    """One network's weights in both; the same tolerances as with the small ones, of the output's size."""
    how = {
        "sample_size": 64,
        "block_out_channels": LEVELS,
        "cross_attention_dim": 768,
        "attention_head_dim": 8,
    }
    theirs = randomized(diffusers.UNet2DConditionModel(**how), dtype)
    with torch.device("meta"):
        numbers = asdict(unet_sd1().config)
    ours = fill(empty(UNet, numbers), to_ours(theirs.state_dict(), UNET_DIFFUSERS), "theirs")
    if (
        dtype == torch.float64
    ):  # diffusers computes the sines of the time embedding in fp32 whatever the dtype; the fp32 case compares them
        theirs.time_proj.forward = lambda t: timestep_embedding(t.double(), 320)
    x, t, context = (
        torch.randn(1, 4, side, side, dtype=dtype),
        torch.tensor([321]),
        torch.randn(1, 77, 768, dtype=dtype),
    )
    expected = theirs(x, t, context).sample
    assert expected.std() > 0.1
    assert gap(ours(x, t.to(dtype), context), expected) < tolerance
