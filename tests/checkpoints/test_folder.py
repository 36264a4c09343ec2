"""Model folders of earlier versions, and the doors of LatentDiffusion to them."""

import json

import pytest
import torch
from safetensors.torch import save_file

import minidiff
from minidiff.checkpoints.folder import DTYPES
from minidiff.conditioners import ClassLabels, LabelsConfig, Unconditional
from minidiff.latent_diffusion import LatentDiffusion
from minidiff.text import CLIPText, TextConfig
from minidiff.unet import UNet, UNetConfig
from minidiff.vae import VAE, Pixels, PixelsConfig, VAEConfig

# model.json as version 0.1 wrote it: whole, and by the first form without the keys that came later.
UNET = """{"kind": "UNet", "in_channels": 4, "out_channels": 4, "channels": [8, 16], "blocks": 1,
 "depth": [1, 0], "heads": [2, 2], "context_dim": 8, "ff_mult": 4, "linear_projection": false,
 "dropout": 0.0, "groups": 4, "pooled": false, "scale_shift": false%s}"""
VAE_JSON = """{"kind": "VAE", "in_channels": 3, "latent_channels": 4, "channels": [4, 8],
 "blocks": 1, "groups": 2, "kl_weight": 1e-06}"""
TEXT = """{"kind": "CLIPText", "width": 8, "layers": 1, "heads": 2, "activation": "gelu", "pad": 0,
 "context_length": 10, "vocabulary": 49408, "words_only": false}"""
LABELS = '{"kind": "ClassLabels", "classes": ["cat", "dog"], "dim": 8}'
SCHEDULE = """{"kind": "discrete", "betas": "scaled_linear", "T": 1000, "beta_1": 0.00085,
 "beta_T": 0.012, "zero_terminal_snr": false%s}"""
WHOLE = """{"format": "minidiff 1", "size": 16, "dropout": 0.2, "guidance": 3.0%s,
 "denoiser": {"target": "eps", "weighting": "eps", "schedule": %s},
 "vae": %s, "text": %s, "unet": %s}"""
NEWER = (', "sampler": "ddpm", "spacing": "leading"', SCHEDULE % ', "final": 1')


def network(**changed):
    config = dict(in_channels=4, out_channels=4, channels=(8, 16), blocks=1, depth=(1, 0))
    config |= dict(heads=(2, 2), context_dim=8, groups=4)
    return UNet(UNetConfig(**config | changed))


@pytest.mark.parametrize(
    "written, vae, text, unet",
    [
        (
            WHOLE % (*NEWER, VAE_JSON, TEXT, UNET % ', "middle": true'),
            VAE(VAEConfig(3, 4, (4, 8), 1, 2)),
            CLIPText(TextConfig(8, 1, 2, "gelu", 0, 10)),
            network(),
        ),
        (
            WHOLE
            % (*NEWER, '{"kind": "Pixels", "channels": 4}', LABELS, UNET % ', "middle": false'),
            Pixels(PixelsConfig(4)),
            ClassLabels(LabelsConfig(("cat", "dog"), 8)),
            network(middle=False),
        ),
        (
            WHOLE
            % (
                "",
                SCHEDULE % "",
                '{"kind": "Pixels", "channels": 4}',
                '{"kind": "Unconditional"}',
                (UNET % "").replace('"context_dim": 8', '"context_dim": null'),
            ),
            Pixels(PixelsConfig(4)),
            Unconditional(),
            network(context_dim=None),
        ),
    ],
    ids=["words", "classes", "first form"],
)
def test_a_folder_of_the_last_version_loads(tmp_path, written, vae, text, unet):
    for name, part in (("vae", vae), ("text", text), ("unet", unet)):
        save_file(part.state_dict(), tmp_path / f"{name}.safetensors")
    (tmp_path / "model.json").write_text(written)
    model = LatentDiffusion.load(tmp_path)
    for name, part in (("vae", vae), ("text", text), ("unet", unet)):
        state = getattr(model, name).state_dict()
        assert state.keys() == part.state_dict().keys()
        assert all(torch.equal(state[key], value) for key, value in part.state_dict().items())
        assert getattr(model, name).config == part.config
    newer = "sampler" in written
    assert (model.sampler, model.spacing) == (
        ("ddpm", "leading") if newer else ("ddim", "trailing")
    )
    assert (model.size, model.dropout, model.guidance) == (16, 0.2, 3.0)
    assert model.schedule.final == (1 if newer else 0)
    again = json.loads((model.save(tmp_path / "again") / "model.json").read_text())
    was = json.loads(written)
    for described, before in ((again[name], was[name]) for name in ("vae", "text", "unet")):
        assert {key: described[key] for key in before} == before


def test_the_doors_are_the_library_s_own(sd, tmp_path):
    """from_pretrained opens anything that minidiff.load opens; save_pretrained is save."""
    from minidiff.checkpoints import write

    model = sd()
    ours = model.save_pretrained(tmp_path / "ours")
    theirs = write.save_diffusers(model, tmp_path / "theirs")
    for place in (ours, theirs, str(theirs)):
        loaded = LatentDiffusion.from_pretrained(
            place, device=torch.device("cpu"), dtype=torch.float16
        )
        assert loaded.unet.conv_in.weight.dtype == torch.float16
        assert torch.equal(loaded.unet.conv_in.weight, model.unet.conv_in.weight.half())


@pytest.mark.parametrize("dtype", [*DTYPES.items(), (None, torch.float32)])
def test_devices_and_dtypes_are_torch_s_own_or_named(sd, tmp_path, dtype):
    ours = sd().save(tmp_path / "ours")
    short, whole = dtype
    for load in (minidiff.load, LatentDiffusion.load, LatentDiffusion.from_pretrained):
        for same in (short, whole):
            model = load(ours, device=torch.device("cpu"), dtype=same)
            assert model.unet.conv_in.weight.dtype == whole
