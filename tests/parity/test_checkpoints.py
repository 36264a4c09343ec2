"""Whole checkpoints, tiny and random, in the true layouts: saved by diffusers and read here, written here and opened by diffusers.

The tiny models keep what single files do not say (8 heads in SD 1.x's U-Net, heads of 64 in SD 2.x's and in the text towers), so that
every layout determines them.
"""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import minidiff
from minidiff.checkpoints import write
from minidiff.checkpoints.load import load
from minidiff.errors import UserError

from .test_networks import gap

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
STEMS = {
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
}


@torch.no_grad()
def agrees(model, pipeline):
    """U-Net, VAE both ways and text tower, within fp32's rounding."""
    x, t, context = torch.randn(2, 4, 8, 8), torch.tensor([7, 830]), torch.randn(2, 9, 64)
    assert gap(model.unet(x, t, context), pipeline.unet(x, t, context).sample) < 1e-5
    pictures = torch.randn(1, 3, 64, 64)
    scale = model.vae.latent_scale
    assert (
        gap(model.vae.encode(pictures), pipeline.vae.encode(pictures).latent_dist.mean * scale)
        < 1e-5
    )
    assert gap(model.vae.decode(x), pipeline.vae.decode(x / scale).sample) < 1e-5
    prompts = ["a small blue circle above a large red square", ""]
    tokens = pipeline.tokenizer(
        prompts, padding="max_length", max_length=77, return_tensors="pt"
    ).input_ids
    assert torch.equal(model.text.tokens(prompts), tokens)
    assert gap(model.text.encode(prompts), pipeline.text_encoder(tokens).last_hidden_state) < 1e-5


def weights(model):
    """Every tensor of the model, by the module it is in."""
    return {
        f"{part}.{name}": value
        for part in ("vae", "text", "unet")
        for name, value in getattr(model, part).state_dict().items()
    }


def equal(a, b):
    return a.keys() == b.keys() and all(
        torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a
    )


def test_a_diffusers_folder(pipeline):
    theirs, folder = pipeline
    model = minidiff.load(folder)
    agrees(model, theirs)
    second, v = (
        theirs.unet.config.use_linear_projection,
        theirs.scheduler.config.prediction_type == "v_prediction",
    )
    assert (model.denoiser.target, model.text.pad) == ("v" if v else "eps", 0 if second else 49407)
    assert (model.size, model.spacing, model.schedule.final) == (64, "leading", 1)
    assert torch.allclose(
        model.schedule.alpha_bar[1:].float(), theirs.scheduler.alphas_cumprod, rtol=2e-6
    )
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    "kind",
    "safetensors,bin,pieces,fp16,old attention,hub cache,local dir,linked parts".split(","),
)
def test_spellings_of_a_diffusers_folder(pipeline, tmp_path, kind):
    """The same model comes out of each."""
    theirs, folder = pipeline
    copy, expected = tmp_path / "copy", weights(minidiff.load(folder))
    if kind == "bin":
        theirs.save_pretrained(copy, safe_serialization=False)
    elif kind == "pieces":
        theirs.save_pretrained(copy, max_shard_size="300KB")
        assert (copy / "unet" / "diffusion_pytorch_model.safetensors.index.json").is_file()
    else:
        shutil.copytree(folder, copy)
    if kind == "fp16":
        for part, stem in STEMS.items():
            file = copy / part / f"{stem}.safetensors"
            save_file(
                {
                    name: v.half() if v.is_floating_point() else v
                    for name, v in load_file(file).items()
                },
                file.with_suffix(".fp16.safetensors"),
            )
            file.unlink()
        expected = {
            name: value if name == "vae.latent_scale" else value.half().float()
            for name, value in expected.items()
        }
    elif kind == "old attention":
        file = copy / "vae" / "diffusion_pytorch_model.safetensors"
        state = load_file(file)
        for ours, old in (
            ("to_q", "query"),
            ("to_k", "key"),
            ("to_v", "value"),
            ("to_out.0", "proj_attn"),
        ):
            state = {name.replace(f".{ours}.", f".{old}."): value for name, value in state.items()}
        assert "encoder.mid_block.attentions.0.proj_attn.weight" in state
        save_file(state, file)
    elif (
        kind == "local dir"
    ):  # as `huggingface-cli download --local-dir` made it: large files are links
        blobs = tmp_path / "hub" / "models--owner--name" / "blobs"
        blobs.mkdir(parents=True)
        for k, file in enumerate(sorted(copy.rglob("*.safetensors"))):
            shutil.move(file, blobs / str(k))
            file.symlink_to(blobs / str(k))
    elif kind == "linked parts":
        snapshot = tmp_path / "hub" / "models--owner--name" / "snapshots" / "abc"
        shutil.move(copy, snapshot)
        copy.mkdir()
        for entry in snapshot.iterdir():
            (copy / entry.name).symlink_to(entry)
    elif kind == "hub cache":  # files there are links to blobs beside the snapshots
        cache = tmp_path / "models--owner--name"
        (cache / "snapshots").mkdir(parents=True)
        (cache / "blobs").mkdir()
        shutil.move(copy, cache / "snapshots" / "abc")
        copy = cache / "snapshots" / "abc"
        for k, file in enumerate([file for file in copy.rglob("*") if file.is_file()]):
            shutil.move(file, cache / "blobs" / str(k))
            file.symlink_to(cache / "blobs" / str(k))
    assert equal(weights(minidiff.load(copy)), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_round_trips(pipeline, tmp_path, dtype):
    """diffusers -> CompVis -> ours -> diffusers: the same bits under each name, in the same precision."""
    _, folder = pipeline
    model = load(folder, dtype=dtype)
    model.spacing = None  # a single file cannot say another
    for parameter in model.vae.parameters():
        parameter.data = parameter.data.to(dtype)  # loading keeps it in float32
    first = write.save_diffusers(model, tmp_path / "a")
    single = write.save_compvis(load(first, dtype=None), tmp_path / "b.safetensors")
    ours = load(single, dtype=None).save(tmp_path / "c")
    last = write.save_diffusers(load(ours, dtype=None), tmp_path / "d")
    assert equal(weights(load(single, dtype=None)), weights(load(first, dtype=None)))
    for part, stem in STEMS.items():
        a, d = (load_file(place / part / f"{stem}.safetensors") for place in (first, last))
        assert equal(a, d) and {value.dtype for value in a.values()} <= {dtype, torch.int64}
        theirs = load_file(folder / part / f"{stem}.safetensors")
        assert {name.removeprefix("text_model.") for name in a} - {"embeddings.position_ids"} == {
            name.removeprefix("text_model.") for name in theirs
        }
        assert (first / part / "config.json").read_text() == (
            last / part / "config.json"
        ).read_text()
    assert (first / "scheduler" / "scheduler_config.json").read_text() == (
        last / "scheduler" / "scheduler_config.json"
    ).read_text()
    write.save_compvis(load(last, dtype=None), tmp_path / "e.safetensors")
    assert equal(load_file(single), load_file(tmp_path / "e.safetensors"))


def test_diffusers_opens_what_is_written(pipeline, tmp_path):
    """from_pretrained and from_single_file, offline, hold the same bits as what was read, and so give the same picture."""
    theirs, folder = pipeline
    written = write.save_diffusers(minidiff.load(folder), tmp_path / "a")
    single = write.save_compvis(minidiff.load(folder), tmp_path / "b.safetensors")
    latents = torch.randn(1, 4, 8, 8)

    def same(pipe):
        """The same weights at other addresses are added up in another order, and guidance makes 7.5 times as much of it: hence not 0."""
        assert all(
            equal(getattr(pipe, part).state_dict(), getattr(theirs, part).state_dict())
            for part in STEMS
        )
        assert abs(picture(pipe) - expected).max() < 1e-4

    def picture(pipe):
        pipe.set_progress_bar_config(disable=True)
        return pipe(
            "a red apple", latents=latents.clone(), num_inference_steps=3, output_type="np"
        ).images

    expected = picture(theirs)
    same(diffusers.StableDiffusionPipeline.from_pretrained(written, local_files_only=True))
    same(
        diffusers.StableDiffusionPipeline.from_single_file(
            single, config=str(written), local_files_only=True
        )
    )


def test_a_single_file(pipeline, tmp_path):
    theirs, folder = pipeline
    path = write.save_compvis(minidiff.load(folder), tmp_path / "model.safetensors")
    model = minidiff.load(path)  # what it predicts stands in the metadata
    agrees(model, theirs)
    assert (model.denoiser.target, model.size, model.guidance) == (
        minidiff.load(folder).denoiser.target,
        64,
        7.5,
    )

    whole, second = load_file(path), theirs.unet.config.use_linear_projection
    save_file(whole, path)  # without metadata
    if second:
        with pytest.warns(UserWarning, match=r"v is assumed"):
            model = minidiff.load(path)
        assert (model.denoiser.target, model.size) == ("v", 768)
        model = minidiff.load(path, target="eps")
    else:
        model = minidiff.load(path)
    assert (model.denoiser.target, model.size) == ("eps", 512)
    agrees(model, theirs)

    unet = {
        name.removeprefix("model.diffusion_model."): value
        for name, value in whole.items()
        if name.startswith("model.diffusion_model.")
    }
    averaged = {
        "model_ema.diffusion_model" + name.replace(".", ""): value + 1
        for name, value in unet.items()
    }
    beside = {
        "alphas_cumprod": torch.ones(1000),
        "model_ema.decay": torch.ones(()),
        "logvar": torch.zeros(1000),
    }
    if second:
        beside |= {
            "cond_stage_model.model.text_projection": torch.ones(64, 64),
            "cond_stage_model.model.logit_scale": torch.ones(()),
        }
        name = "cond_stage_model.model.transformer.resblocks."
        beside |= {
            key.replace(f"{name}1.", f"{name}2."): v + torch.nan
            for key, v in whole.items()
            if key.startswith(f"{name}1.")
        }
        whole = {key: v for key, v in whole.items() if not key.startswith(f"{name}2.")}
    torch.save(
        {"state_dict": {**whole, **averaged, **beside}, "global_step": 1}, tmp_path / "model.ckpt"
    )
    with pytest.warns(UserWarning, match=r"the averaged are taken"):
        model = minidiff.load(tmp_path / "model.ckpt", target="eps")
    assert torch.equal(model.unet.conv_in.bias, unet["input_blocks.0.0.bias"] + 1)


def test_parts(pipeline, tmp_path):
    """One network from a file of its own, or from another checkpoint."""
    theirs, folder = pipeline
    path = write.save_compvis(minidiff.load(folder), tmp_path / "model.safetensors")
    whole = load_file(path)
    halves = {"unet": "model.diffusion_model.", "vae": "first_stage_model."}
    for part, prefix in halves.items():
        state = {
            name.removeprefix(prefix): value
            for name, value in whole.items()
            if name.startswith(prefix)
        }
        torch.save(
            {"state_dict": state | {"loss.logvar": torch.zeros(())}}, tmp_path / f"{part}.ckpt"
        )
    how = {"vae": tmp_path / "vae.ckpt", "text": folder / "text_encoder"}
    if theirs.text_encoder.config.hidden_act == "gelu":
        how["text"] = folder
    model = minidiff.load(
        tmp_path / "unet.ckpt", target=minidiff.load(folder).denoiser.target, **how
    )
    agrees(model, theirs)
    with pytest.raises(UserError, match=r"unet.ckpt has no VAE and no text encoder; .*vae=PATH"):
        minidiff.load(tmp_path / "unet.ckpt")
    with pytest.raises(UserError, match=r"vae.ckpt has no text encoder"):
        minidiff.load(folder, text=tmp_path / "vae.ckpt")
    ours = minidiff.load(
        minidiff.load(folder).save(tmp_path / "ours"),
        vae=folder / "vae" / "diffusion_pytorch_model.safetensors",
    )
    agrees(ours, theirs)


def test_a_folder_that_is_refused(pipeline, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(pipeline[1], folder)
    config = folder / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps({"prediction_type": "noise"}))
    with pytest.raises(UserError, match=r"prediction_type is 'noise'; there is eps"):
        minidiff.load(folder)
    config.write_text("{")
    with pytest.raises(UserError, match=r"scheduler_config.json is damaged \(not JSON"):
        minidiff.load(folder)
    config.unlink()
    with pytest.raises(UserError, match=r"scheduler_config.json is missing"):
        minidiff.load(folder)
    config.symlink_to(pipeline[1] / "scheduler" / "scheduler_config.json")
    with pytest.raises(UserError, match=r"scheduler_config.json is a link out of its folder"):
        minidiff.load(folder)
