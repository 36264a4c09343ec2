"""Pictures from a picture, in tiles, in other precisions, and where NaN began."""

import warnings

import numpy as np
import pytest
import torch
from PIL import Image

import minidiff
from minidiff import pipeline, schedules
from minidiff.checkpoints.folder import DTYPES
from minidiff.cli.generate import mask_of
from minidiff.errors import UserError
from minidiff.methods import editing
from minidiff.methods.editing import Edit, edited
from minidiff.options.sampling import SampleConfig
from minidiff.pipeline import tiled
from minidiff.training.nonfinite import first_bad

PROMPTS = ["a red apple", "a blue bowl"]


@pytest.fixture(scope="module")
def model(sd):
    torch.manual_seed(0)
    made = sd()
    for name, p in made.named_parameters():
        if p.ndim > 1 and "embedding" not in name:
            torch.nn.init.normal_(p, std=p[0].numel() ** -0.5)
    return made.eval()


def test_the_last_steps_are_walked():
    times = schedules.scaled_linear().timesteps(10)
    assert torch.equal(editing.late(times, 0.3), times[-4:])
    assert torch.equal(editing.late(times, 1), times) and len(editing.late(times, 1e-6)) == 2
    for strength in (0, -1, 1.01, float("nan")):
        with pytest.raises(UserError, match="strength is"):
            Edit(torch.zeros(1, 3, 16, 16), strength)


def test_outside_the_mask_nothing_changes(model):
    """At every step what is kept is as noisy as the schedule says, and at the end it is the given latents, to the bit."""
    image, mask = torch.rand(1, 3, 16, 16) * 2 - 1, torch.zeros(1, 1, 16, 16)
    mask[..., :8] = 1
    noise, z0 = torch.randn(2, 4, 8, 8), model.vae.encode(image).detach().expand(2, -1, -1, -1)
    config = SampleConfig(5, sampler="euler")
    frames = list(edited(model, PROMPTS, Edit(image, mask=mask), config, lambda x: noise))
    for frame in frames[1:]:
        kept = model.schedule.mix(z0, noise, torch.tensor(round(frame.t)))
        assert torch.equal(frame.x[..., 4:], kept[..., 4:])
        assert not torch.equal(frame.x[..., :4], kept[..., :4])
    assert torch.equal(frames[-1].x0[..., 4:], z0[..., 4:])


def test_strength(model):
    """The weaker, the nearer to the picture, and the fewer steps."""
    image, noise = torch.rand(1, 3, 16, 16) * 2 - 1, torch.randn(2, 4, 8, 8)
    z0, far = model.vae.encode(image), []
    for strength in (0.1, 0.5, 1.0):
        frames = list(
            edited(model, PROMPTS, Edit(image, strength), SampleConfig(10), lambda x: noise)
        )
        assert len(frames) == 10 * strength + 1
        far.append((frames[-1].x0 - z0).pow(2).mean())
    assert far[0] < far[1] < far[2]


def test_what_inpainting_needs(model, sd):
    with pytest.raises(TypeError, match="image"):
        Edit(mask=torch.ones(1, 1, 16, 16))
    with pytest.raises(
        UserError, match="this U-Net takes 5 channels; known are 4, and 9 for inpainting"
    ):
        pipeline.generate(sd(channels=5), PROMPTS)


@pytest.mark.parametrize(
    "height, width, tile, overlap",
    [(50, 33, 16, 4), (16, 16, 16, 4), (10, 40, 16, 6), (17, 16, 16, 0)],
)
def test_tiles_of_a_local_function_are_the_whole(height, width, tile, overlap):
    """What looks at one pixel only is the same in tiles; where tiles disagree, they fade into each other."""
    x = torch.rand(2, 3, height, width, dtype=torch.float64)

    def double(part):
        return torch.nn.functional.interpolate(part, scale_factor=2).square()

    torch.testing.assert_close(tiled(double, x, tile, overlap, 2), double(x), rtol=1e-12, atol=0)
    torch.testing.assert_close(
        tiled(torch.square, x[..., :16, :16], 16, 4, 1),
        x[..., :16, :16].square(),
        rtol=1e-12,
        atol=0,
    )
    seen = []
    faded = tiled(
        lambda part: seen.append(1) or torch.full_like(part, len(seen)), x, tile, overlap, 1
    )
    if overlap and width > tile:
        assert faded[0, 0, 0].diff().abs().max() < 0.5 * len(
            seen
        )  # no jump from one tile's number to the next's


def test_decoding_in_tiles_is_near_decoding_at_once(model):
    """The VAE's normalization and attention see a tile instead of the picture, so it is not the same; in one tile it is."""
    z = torch.randn(2, 4, 8, 8)
    whole, tiles = pipeline.decode(model, z, tile=False), pipeline.decode(model, z, tile=True)
    assert torch.equal(whole, pipeline.decode(model, z)) and torch.equal(whole, model.decode(z))
    assert torch.equal(whole, model.vae.decode(z).detach())
    torch.testing.assert_close(tiles.detach(), whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_precisions(model, tmp_path, dtype):
    """Weights in the precision asked for, latents in float32; the latent scale is never rounded, and float16 spares the VAE."""
    folder = model.save(tmp_path / "m")
    half = minidiff.load(folder, dtype=dtype)
    assert half.unet.conv_in.weight.dtype == half.text.norm_out.weight.dtype == DTYPES[dtype]
    assert half.vae.quant.weight.dtype == (torch.float32 if dtype == "fp16" else DTYPES[dtype])
    assert torch.equal(half.vae.latent_scale, model.vae.latent_scale)
    config = SampleConfig(3, guidance=2.0)
    expected, found = (pipeline.generate(m, PROMPTS, config) for m in (model, half))
    assert found.dtype == torch.float32
    assert (found - expected).abs().max() < (1e-6 if dtype == "fp32" else 0.2)
    assert (
        minidiff.load(half.save(tmp_path / "h"), dtype=None).unet.conv_in.weight.dtype
        == DTYPES[dtype]
    )


def test_where_nan_began(model, tmp_path):
    broken = minidiff.load(model.save(tmp_path / "m"))
    broken.unet.decoder[0].residual[1].conv1.weight.data[0] = torch.inf
    with pytest.raises(
        UserError,
        match=r'"denoiser.network.decoder.0.residual.1.conv1.weight" is not finite; compute in bf16 or fp32',
    ):
        pipeline.generate(broken, PROMPTS, SampleConfig(2))
    broken = minidiff.load(model.save(tmp_path / "m"))
    broken.vae.decoder.conv_in.bias.data[:] = torch.nan
    with pytest.raises(UserError, match=r'"vae.decoder.conv_in.bias" is not finite'):
        pipeline.generate(broken, PROMPTS, SampleConfig(2))
    small = minidiff.load(model.save(tmp_path / "m"))
    small.unet.conv_in.weight.data.fill_(1e38)  # finite, and what it computes is not
    with pytest.raises(
        UserError,
        match=r'the output of "denoiser.network.conv_in" is the first that is not finite \(in float32\)',
    ):
        pipeline.generate(small, PROMPTS, SampleConfig(2))
    assert not any(part._forward_hooks for part in small.modules())
    # hooks are gone afterwards, and healthy models pass
    assert first_bad(model, lambda: pipeline.generate(model, PROMPTS, SampleConfig(2))) is None
    assert not any(part._forward_hooks for part in model.modules())


def test_a_folder_that_says_its_target_is_believed(model, tmp_path):
    folder = model.save(tmp_path / "m")
    assert minidiff.load(folder, target="eps").denoiser.target == "eps"
    with pytest.raises(UserError, match="says itself what it predicts, eps"):
        minidiff.load(folder, target="v")


def picture(path, size=(20, 20), colour="red"):
    Image.new("RGB", size, colour).save(path)
    return path


def test_generate_from_a_picture(ran, model, tmp_path):
    """Through the command line: the kept half is the given picture to the byte, and every setting is in the file."""
    folder, image = model.save(tmp_path / "m"), picture(tmp_path / "red.png", (16, 32))
    mask = Image.new("L", (16, 32))
    mask.paste(255, (0, 0, 16, 16))
    mask.save(tmp_path / "mask.png")
    options = [
        "--model",
        folder,
        "--steps",
        4,
        "--image",
        image,
        "--negative",
        "blur",
        "--rescale",
        0.5,
        "--spacing",
        "leading",
    ]
    said = ran(
        "generate", "an apple", *options, "--mask", tmp_path / "mask.png", "--out", tmp_path / "o"
    )
    assert "16x32 pixels, but the model was trained at 16x16" in said.err
    with Image.open(tmp_path / "o" / "000-an-apple.png") as drawn:
        pixels, settings = np.asarray(drawn), drawn.text
    assert pixels.shape == (32, 16, 3)
    assert (pixels[16:] == (255, 0, 0)).all() and not (pixels[:16] == (255, 0, 0)).all()
    expected = {
        "negative": "blur",
        "rescale": "0.5",
        "strength": "1.0",
        "image": "red.png",
        "mask": "mask.png",
        "size": "16x32",
    }
    assert settings.items() >= expected.items()
    ran(
        "generate",
        "an apple",
        *options,
        "--out",
        tmp_path / "p",
        "--strength",
        0.5,
        "--dtype",
        "bf16",
        "--tile",
        "--batch",
        1,
        "--n",
        2,
    )
    with Image.open(tmp_path / "p" / "001-an-apple.png") as drawn:
        assert (
            drawn.text["strength"] == "0.5"
            and drawn.text["dtype"] == "bf16"
            and drawn.size == (16, 32)
        )
    ran(
        "generate",
        "an apple",
        "--model",
        folder,
        "--size",
        "32x16",
        "--steps",
        1,
        "--out",
        tmp_path / "q",
    )
    with Image.open(tmp_path / "q" / "000-an-apple.png") as drawn:
        assert drawn.size == (32, 16)


def test_generate_from_parts_of_several_files(ran, refused, model, tmp_path):
    """A U-Net alone, completed by the other parts of a whole model, draws what the whole model draws."""
    from safetensors.torch import load_file, save_file

    from minidiff.checkpoints import write

    whole = write.save_compvis(model, tmp_path / "whole.safetensors")
    unet = {
        name: value
        for name, value in load_file(whole).items()
        if name.startswith("model.diffusion_model.")
    }
    save_file(unet, tmp_path / "unet.safetensors")
    how = ["--steps", 2, "--size", 16]
    assert "has no VAE and no text encoder" in refused(
        "generate",
        "an apple",
        "--model",
        tmp_path / "unet.safetensors",
        "--out",
        tmp_path / "x",
        *how,
    )
    ran("generate", "an apple", "--model", whole, "--out", tmp_path / "a", *how)
    parts = ["--vae", whole, "--text", whole]
    ran(
        "generate",
        "an apple",
        "--model",
        tmp_path / "unet.safetensors",
        "--out",
        tmp_path / "b",
        *parts,
        *how,
    )
    a, b = (np.asarray(Image.open(tmp_path / folder / "000-an-apple.png")) for folder in "ab")
    assert (a == b).all()


@pytest.mark.parametrize("kind", ["grey", "strokes", "LA", "palette", "1"])
def test_masks_on_transparency(tmp_path, kind):
    """White strokes on nothing, as layers are exported: only the strokes are drawn anew."""
    grey = np.zeros((64, 64), np.uint8)
    grey[16:32, 16:32] = 255
    mask = Image.fromarray(grey)
    if kind == "strokes":
        mask = Image.merge("RGBA", [Image.new("L", (64, 64), 255)] * 3 + [mask])
    elif kind == "LA":
        mask = Image.merge("LA", [mask, mask])
    elif kind == "palette":
        mask = mask.point(bool).convert("P")
        mask.putpalette([0, 0, 0, 255, 255, 255])
        mask.info["transparency"] = 0
    elif kind == "1":
        mask = mask.convert("1")
    mask.save(tmp_path / "mask.png")
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        drawn = mask_of(tmp_path / "mask.png", 64, 64)
    assert torch.equal(drawn[0, 0], torch.from_numpy(grey // 255).float())
    words = [str(warning.message) for warning in given]
    transparent = "transparent parts of images are read as black"
    assert words == ([transparent] if kind in ("strokes", "LA", "palette") else [])


def test_a_mask_of_white_alone_is_said(tmp_path):
    picture(tmp_path / "white.png", colour="white")
    with pytest.warns(UserWarning, match="white.png: all of it is white"):
        assert mask_of(tmp_path / "white.png", 8, 8).all()


@pytest.mark.parametrize("options, said", [
    (["--strength", 0.5], "--strength needs an --image"),
    (["--image", "red.png", "--strength", 0], "--strength is 0; it must be above 0"),
    (["--mask", "red.png"], "--mask needs the --image"),
    (["--image", "nowhere.png"], "nowhere.png: no such picture"),
    (["--image", "red.png", "--mask", "black.png"], "black.png: nothing in it is white"),
    (["--rescale", 2], "--rescale is 2; it must be from 0 to 1"),
    (["--interval", "1,0.5"], "--interval is 1,0.5; it must be two numbers"),
    (["--spacing", "wide"], 'no spacing "wide"'),
    (["--dtype", "fp8"], 'no dtype "fp8"'),
    (["--target", "y"], 'no target "y"'),
    (["--size", "16x"], "not \"16x\""),
    (["--size", "17x16"], "size 17 is not divisible by 2"),
])  # fmt: skip
def test_what_generate_refuses(refused, model, tmp_path, monkeypatch, options, said):
    from minidiff.checkpoints import write

    folder = write.save_diffusers(model, tmp_path / "m")
    picture(tmp_path / "red.png")
    picture(tmp_path / "black.png", colour="black")
    monkeypatch.chdir(tmp_path)
    assert said in refused(
        "generate", "an apple", "--model", folder, "--steps", 2, "--out", "out", *options
    )
    assert not (tmp_path / "out").exists()
