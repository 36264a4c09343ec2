"""ControlNets as files: every layout gives the same bits back, and inspect names them."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import minidiff
from minidiff.checkpoints import controlnet as files
from minidiff.checkpoints.folder import empty
from minidiff.checkpoints.inspect import inspect
from minidiff.errors import UserError
from minidiff.methods.controlnet import ControlNet, ControlNetConfig, copy_of
from minidiff.unet import unet_sd1, unet_sd2, unet_sdxl

SD1 = dict(channels=(32, 64, 64, 64), blocks=2, depth=(1, 1, 1, 0), heads=(8,) * 4, context_dim=768)
SD2 = dict(
    channels=(64, 64, 64, 64), blocks=2, depth=(1, 1, 1, 0), heads=(1,) * 4, context_dim=1024
)
XL = dict(channels=(64, 64, 64), blocks=2, depth=(0, 1, 2), heads=(1,) * 3, context_dim=2048)
SD2 |= dict(linear_projection=True)
XL |= dict(linear_projection=True, added=2816)
VERSIONS = {"Stable Diffusion 1.x": SD1, "Stable Diffusion 2.x": SD2, "Stable Diffusion XL": XL}
PLACES = {"minidiff": "c.safetensors", "diffusers": "c", "compvis": "c.safetensors"}


def made(config):
    torch.manual_seed(0)
    network = ControlNet(ControlNetConfig(4, 4, **config)).eval()
    for p in network.parameters():
        p.data.normal_()
    return network


@pytest.mark.parametrize("layout", PLACES)
@pytest.mark.parametrize("version", VERSIONS)
def test_a_layout_gives_the_same_bits_back(ran, tmp_path, version, layout):
    network = made(VERSIONS[version])
    path = files.save(network, tmp_path / PLACES[layout], layout)
    loaded = files.load(path)
    state, expected = loaded.state_dict(), network.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in state)
    if layout == "minidiff":
        assert loaded.config == network.config
    rows = dict(inspect(path))
    assert rows["kind"] == "a ControlNet" and rows["for"] == version
    assert f"--controlnet {path}" in ran("inspect", path).out


def test_diffusers_opens_what_we_write(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    network = made(SD1)
    theirs = diffusers.ControlNetModel.from_pretrained(
        files.save(network, tmp_path / "c", "diffusers")
    )
    x, t, context = torch.randn(1, 4, 8, 8), torch.tensor([500]), torch.randn(1, 5, 768)
    hint = torch.rand(1, 3, 64, 64)
    down, middle = theirs(x, t, context, hint, return_dict=False)
    for ours, other in zip(network(x, t, context, hint), [*down, middle], strict=True):
        assert torch.allclose(ours, other, atol=1e-4 * other.abs().max().item())


def test_the_box_goes_into_our_layout_alone(tmp_path):
    network = copy_of(minidiff.load().unet, 2)
    loaded = files.load(files.save(network, tmp_path / "c.safetensors"))
    assert loaded.config == network.config
    for layout in ("diffusers", "compvis"):
        with pytest.raises(UserError, match=r"pooled=True|ff_mult=2"):
            files.save(network, tmp_path / f"{layout}.safetensors", layout)
    with pytest.raises(UserError, match=r"end in \.safetensors"):
        files.save(network, tmp_path / "c.ckpt")


@pytest.mark.parametrize(
    "unet, count, millions", [(unet_sd1, 340, 361.28), (unet_sd2, 340, 364.23)]
)
def test_true_shapes(unet, count, millions):
    """As diffusers' ControlNetModel and the authors' single file have them; nothing is computed."""
    with torch.device("meta"):
        config = unet().config
    network = empty(ControlNet, {**vars(config), "hint": (16, 32, 96, 256)})
    state = network.state_dict()
    assert len(state) == count
    assert round(sum(p.numel() for p in network.parameters()) / 1e6, 2) == millions
    diffusers = pytest.importorskip("diffusers")
    with torch.device("meta"):
        theirs = diffusers.ControlNetModel.from_config(files._settings(vars(network.config)))
    renamed = files.names.to_published(state, files.controlnet_diffusers(4))
    shapes = {name: value.shape for name, value in theirs.state_dict().items()}
    assert {name: value.shape for name, value in renamed.items()} == shapes
    table = files.controlnet_compvis(files.names.unet_compvis())
    published = files.names.to_published(state, table)
    assert {
        "input_hint_block.14.weight",
        "zero_convs.11.0.bias",
        "middle_block_out.0.weight",
    } <= published.keys()
    assert "time_embed.0.weight" in published and "input_blocks.11.0.out_layers.3.bias" in published
    assert files.names.to_ours(published, table).keys() == state.keys()


def test_xl_true_shapes():
    with torch.device("meta"):
        config = unet_sdxl().config
    network = empty(ControlNet, {**vars(config), "hint": (16, 32, 96, 256)})
    diffusers = pytest.importorskip("diffusers")
    with torch.device("meta"):
        theirs = diffusers.ControlNetModel.from_config(files._settings(vars(network.config)))
    renamed = files.names.to_published(network.state_dict(), files.controlnet_diffusers(4))
    shapes = {name: value.shape for name, value in theirs.state_dict().items()}
    assert {name: value.shape for name, value in renamed.items()} == shapes


def test_a_file_with_the_model_beside_it(tmp_path):
    """The authors' first files hold the whole of Stable Diffusion, too."""
    file = files.save(made(SD1), tmp_path / "c.safetensors", "compvis")
    state = load_file(file) | {"model.diffusion_model.out.0.bias": torch.zeros(4)}
    save_file(state, file)
    assert "alone is read" in dict(inspect(file))["note"]
    files.load(file)
    with pytest.raises(UserError, match="`controlnet="):
        minidiff.load(file)
    bare = {
        name.removeprefix("control_model."): v for name, v in state.items() if "control" in name
    }
    save_file(bare, tmp_path / "bare.safetensors")
    assert files.load(tmp_path / "bare.safetensors").config.channels == SD1["channels"]


def test_damage_is_one_line(tmp_path):
    file = files.save(made(SD1), tmp_path / "c.safetensors")
    state = load_file(file)
    for metadata in ({}, {files.KEY: "{"}, {files.KEY: "[1]"}, {files.KEY: json.dumps({"x": 1})}):
        save_file(state, tmp_path / "d.safetensors", metadata)
        with pytest.raises(UserError, match=r"d\.safetensors"):
            files.load(tmp_path / "d.safetensors")
    folder = files.save(made(SD1), tmp_path / "c", "diffusers")
    (folder / "config.json").write_text(
        '{"_class_name": "ControlNetModel", "attention_head_dim": []}'
    )
    with pytest.raises(UserError, match="c/"):
        files.load(folder)
    with pytest.raises(UserError, match="no file"):
        files.load(tmp_path / "absent.safetensors")
    with pytest.raises(UserError, match="is a ControlNet"):
        minidiff.load(folder)
