"""inspect and convert as commands, on a Stable Diffusion of the true layout and little weight."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

import minidiff
from minidiff import schedules
from minidiff.checkpoints import layouts, names, write
from minidiff.denoiser import Denoiser
from minidiff.latent_diffusion import LatentDiffusion
from minidiff.text import CLIPText, TextConfig
from minidiff.unet import UNet, UNetConfig, unet_sd1
from minidiff.vae import VAE, VAEConfig


@pytest.fixture(scope="module")
def single(sd, tmp_path_factory):
    return write.save_compvis(sd(), tmp_path_factory.mktemp("sd") / "model.safetensors")


def rows(out):
    return {
        line[: line.index("  ")]: line[line.index("  ") :].strip()
        for line in out.splitlines()
        if "  " in line
    }


def test_inspect_a_single_file(sd, ran, single, tmp_path):
    said = rows(ran("inspect", single).out)
    assert said["layout"] == "CompVis single file"
    assert said["version"] == "Stable Diffusion 1.x, of other sizes (pruned or small)"
    assert said["predicts"] == "eps, the noise" and said["resolution"] == "16 pixels"
    model = sd()
    count = sum(p.numel() for p in model.unet.parameters())
    assert said["U-Net"].startswith(
        f"{count / 1e3:.3g} k parameters in {len(model.unet.state_dict())} tensors, F32; "
        "widths 32, 64;"
    )
    assert (
        all(how == "none" for what, how in said.items() if "keys" in what) and "cannot" not in said
    )
    ran("inspect", single, "--out", tmp_path / "o")
    assert {"what": "layout", "how": "CompVis single file"} in json.loads(
        (tmp_path / "o" / "inspect.json").read_text()
    )


@pytest.mark.parametrize("second", [False, True])
def test_inspect_says_the_same_of_every_layout(sd, ran, tmp_path, second):
    model = sd(second)
    folder, ours = write.save_diffusers(model, tmp_path / "folder"), model.save(tmp_path / "ours")
    torch.save(
        load_file(write.save_compvis(model, tmp_path / "m.safetensors")), tmp_path / "m.ckpt"
    )
    said = [
        rows(ran("inspect", path).out)
        for path in (tmp_path / "m.safetensors", folder, tmp_path / "m.ckpt")
    ]
    for part in ("U-Net", "VAE", "text encoder", "version"):
        assert said[0][part] == said[1][part] == said[2][part]
    assert ("2.x" if second else "1.x") in said[0]["version"]
    assert said[1]["layout"] == "diffusers" and ("either" not in said[0]["predicts"])
    assert said[2]["predicts"] == (
        "eps (base, 512) or v (768): no tensor says which; name the target when it is loaded"
        if second
        else "eps, the noise"
    )
    assert rows(ran("inspect", ours).out)["U-Net, missing keys"] == "none"


def test_inspect_names_what_is_wrong(ran, single, tmp_path):
    whole = load_file(single)
    changed = {
        name: value
        for name, value in whole.items()
        if not name.endswith("input_blocks.1.0.in_layers.0.bias")
    }
    save_file(
        changed
        | {"model.diffusion_model.other.bias": torch.ones(2), "what.is_this": torch.ones(1)},
        tmp_path / "b.safetensors",
    )
    said = ran("inspect", tmp_path / "b.safetensors").out
    assert rows(said)["U-Net, missing keys"] == "1: encoder.0.residual.0.norm1.bias"
    assert rows(said)["U-Net, extra keys"] == "1: other.bias"
    assert rows(said)["keys of no part"] == "1: what.is_this"
    assert "be loaded: 1 keys of the U-Net are missing" in said


def test_inspect_of_parts_and_versions(sd, ran, single, tmp_path):
    unet = {
        name: value for name, value in load_file(single).items() if name.startswith(layouts.UNET[0])
    }
    save_file(unet, tmp_path / "unet.safetensors")
    assert (
        "draw by itself: no VAE and no text encoder in it"
        in ran("inspect", tmp_path / "unet.safetensors").out
    )
    inpainting = write.save_diffusers(sd(channels=9), tmp_path / "inpainting")
    said = ran("inspect", inpainting).out
    assert (
        "1.x, inpainting" in said
        and "draw from words alone: an inpainting U-Net needs an image and a mask" in said
    )
    averaged = {
        "model_ema.diffusion_model" + name.removeprefix(layouts.UNET[0]).replace(".", ""): value + 1
        for name, value in unet.items()
    }
    save_file(unet | averaged, tmp_path / "ema.safetensors")
    assert (
        "the averaged are taken"
        in rows(ran("inspect", tmp_path / "ema.safetensors").out)["averaged (EMA)"]
    )
    save_file(
        load_file(single) | {"conditioner.embedders.0.x": torch.ones(1)},
        tmp_path / "more.safetensors",
    )
    more = rows(ran("inspect", tmp_path / "more.safetensors").out)
    assert more["keys of no part"] == "1: conditioner.embedders.0.x"


@pytest.mark.parametrize(
    "name, kind",
    [
        ("lora_unet_down_blocks_0_attentions_0_to_q.lora_down.weight", "kohya"),
        ("unet.down_blocks.0.attentions.0.to_q.lora_A.weight", "diffusers or PEFT"),
        ("unet.down_blocks.0.attentions.0.processor.to_q_lora.down.weight", "diffusers or PEFT"),
    ],
)
def test_inspect_a_lora(ran, tmp_path, name, kind):
    save_file({name: torch.ones(4, 32)}, tmp_path / "lora.safetensors")
    said = rows(ran("inspect", tmp_path / "lora.safetensors").out)
    assert said["layout"] == f"LoRA, {kind} names" and said["rank"] == "4 (1 layers)"


def test_inspect_reads_only_the_header(tmp_path):
    """A file of SD 1.5's true size and names; on this disk it is mostly a hole. Another process:
    without torch it takes a fraction of a second."""
    with torch.device("meta"):
        state = names.to_published(unet_sd1().state_dict(), names.unet_compvis())
    said, at = {}, 0
    for name, value in state.items():
        size = 4 * value.numel()
        said[f"model.diffusion_model.{name}"] = {
            "dtype": "F32",
            "shape": list(value.shape),
            "data_offsets": [at, at + size],
        }
        at += size
    header = json.dumps(said).encode()
    file = tmp_path / "big.safetensors"
    with open(file, "wb") as opened:
        opened.write(len(header).to_bytes(8, "little") + header)
        opened.truncate(8 + len(header) + at)
    code = f"from minidiff.cli.main import main; import sys; main(['inspect', {str(file)!r}]); "
    code += "sys.exit('torch' in sys.modules)"
    before = os.times()
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.returncode == 0 and "860 M parameters in 686 tensors" in ran.stdout
    after = os.times()  # of work, whatever else the machine does
    assert after.children_user + after.children_system - sum(before[2:4]) < 2


def test_convert_there_and_back(ran, single, tmp_path):
    assert ran("convert", single, tmp_path / "folder", "--to", "diffusers").out.strip() == str(
        tmp_path / "folder"
    )
    ran("convert", tmp_path / "folder", "ours", "--to", "minidiff", "--out", tmp_path)
    ran("convert", tmp_path / "ours", tmp_path / "back.safetensors", "--to", "compvis")
    first, last = load_file(single), load_file(tmp_path / "back.safetensors")
    assert first.keys() == last.keys() and all(
        torch.equal(first[name], last[name]) for name in first
    )
    ran("convert", single, tmp_path / "half.safetensors", "--to", "compvis", "--dtype", "bf16")
    assert {str(v.dtype) for v in load_file(tmp_path / "half.safetensors").values()} == {
        "torch.bfloat16",
        "torch.int64",
    }
    assert minidiff.load(tmp_path / "half.safetensors").unet.conv_in.weight.dtype == torch.float32


def test_what_cannot_be_converted(sd, refused, single, tmp_path):
    (tmp_path / "there").mkdir()
    assert "exists and is not overwritten" in refused(
        "convert", single, tmp_path / "there", "--to", "diffusers"
    )
    assert "should end in .safetensors" in refused(
        "convert", single, tmp_path / "m.ckpt", "--to", "compvis"
    )
    assert 'no file "' in refused("inspect", tmp_path / "nowhere.safetensors").replace(
        "no file or folder", "no file"
    )
    said = refused("convert", single, tmp_path / "x", "--to", "onx")
    assert said == 'no layout "onx"; there is minidiff, diffusers, compvis.'
    assert 'no dtype "fp8"; there is fp32, bf16, fp16' in refused(
        "convert", single, tmp_path / "x", "--to", "minidiff", "--dtype", "fp8"
    )
    ours = sd(pooled=True, scale_shift=True).save(tmp_path / "ours")
    said = refused("convert", ours, tmp_path / "x", "--to", "diffusers")
    assert (
        "cannot be written for other tools" in said
        and "pooled=True in the U-Net, scale_shift=True in the U-Net" in said
    )
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    "changed, words",
    [
        ({"heads": (4, 4)}, r"heads=(4, 4) in the UNet (tensors imply (8, 8))"),
        ({"groups": 16}, r"groups=16 in the UNet (tensors imply 32)"),
    ],
)
def test_what_a_single_file_cannot_say_is_refused(refused, tmp_path, changed, words):
    """No tensor tells how many heads and groups there are: version 1.x implies 8 and 32."""
    unet = UNetConfig(
        **dict(
            in_channels=4,
            out_channels=4,
            channels=(32, 64),
            blocks=1,
            depth=(1, 0),
            heads=(8, 8),
            context_dim=64,
        )
        | changed
    )
    text, vae = CLIPText(TextConfig(64, 1, 1)), VAE(VAEConfig(3, 4, (32, 32), 1), 0.18215)
    schedule = schedules.Discrete(**layouts.STABLE_DIFFUSION)
    model = LatentDiffusion(vae, text, Denoiser(UNet(unet), schedule), 16, spacing="leading")
    ours = model.save(tmp_path / "ours")
    answer = refused("convert", ours, tmp_path / "x.safetensors", "--to", "compvis")
    assert f"a single file cannot say that this model has {words}. Write it for diffus" in answer
    folder = write.save_diffusers(model, tmp_path / "folder")
    assert minidiff.load(folder).unet.config == unet


def test_a_disk_that_fills_up_leaves_nothing(refused, single, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device", "somewhere")

    monkeypatch.setattr(write, "save_file", full)
    assert "No space left" in refused(
        "convert", single, tmp_path / "x.safetensors", "--to", "compvis"
    )
    assert "No space left" in refused("convert", single, tmp_path / "y", "--to", "diffusers")
    assert not list(tmp_path.iterdir())


def test_a_hub_name_without_a_network(refused, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    os.environ.pop("HF_TOKEN", None)
    said = refused("inspect", "owner/name")
    assert (
        said.startswith('"owner/name" is no path here, and the Hub cannot be reached')
        and "cache" in said
    )


def test_names_in_a_file_cannot_move_the_cursor(sd, tmp_path, ran, refused):
    """A terminal obeys escape sequences: a tensor's name could rename its window, or hide a line."""
    whole, strange = tmp_path / "sd.safetensors", {"\x1b]0;title\7x": torch.ones(1)}
    save_file(load_file(write.save_compvis(sd(), whole)) | strange, whole)
    save_file(strange, tmp_path / "a.safetensors")
    assert "\\x1b]0;title\\x07x" in refused("inspect", tmp_path / "a.safetensors")
    printed = ran("inspect", whole).out
    assert "\x1b" not in printed and "\\x1b]0;title\\x07x" in printed
