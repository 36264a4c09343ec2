"""Pictures of whole pipelines of diffusers and ours, from the same weights, prompts and initial latents.

Pictures in [0, 1] differ by at most 1e-4: the networks agree to 1e-6 of their size in fp32, and guidance and twenty steps make more of it.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import minidiff
from minidiff import pipeline as ourselves
from minidiff.errors import UserError
from minidiff.methods.editing import Edit, edited
from minidiff.options.sampling import SampleConfig

LEVELS = 2  # of the U-Net: what is compared here does not depend on them
diffusers = pytest.importorskip("diffusers")
PROMPTS, TOLERANCE = ["a small blue circle above a large red square", "苹果"], 1e-4
SCHEDULERS = {
    "ddim": "DDIMScheduler",
    "euler": "EulerDiscreteScheduler",
    "dpmpp_2m": "DPMSolverMultistepScheduler",
}


@pytest.fixture(scope="module")
def model(pipeline):
    return minidiff.load(pipeline[1])


def array(pictures):
    return (pictures.clamp(-1, 1) / 2 + 0.5).permute(0, 2, 3, 1).numpy()


def ours(model, steps, noise, edit=None, **how):
    """steps: how many, or the times themselves. how: more of SampleConfig's fields."""
    config = SampleConfig(**({"sampler": "ddim"} | how))
    if edit is None:
        frames = model.sample(PROMPTS, steps, x_T=noise, config=config)
    else:
        frames = edited(model, PROMPTS, edit, replace(config, steps=steps), lambda x: noise)
    *_, last = frames
    return array(model.decode(last.x0))


@pytest.mark.parametrize("sampler", SCHEDULERS)
def test_text_to_image(pipeline, model, sampler):
    """Under SD's published settings: scaled-linear, leading, offset 1, and for DDIM the last level instead of clean data."""
    theirs = pipeline[0]
    theirs.scheduler = getattr(diffusers, SCHEDULERS[sampler]).from_config(
        theirs.scheduler.config, timestep_spacing="leading"
    )
    latents = torch.randn(2, 4, 8, 8)
    expected = theirs(
        PROMPTS,
        latents=latents.clone(),
        num_inference_steps=20,
        guidance_scale=7.5,
        output_type="np",
    ).images
    found = ours(model, 20, latents, sampler=sampler, spacing="leading", guidance=7.5)
    assert expected.std() > 0.02 and abs(expected[0] - expected[1]).max() > 0.02
    assert abs(found - expected).max() < TOLERANCE


def test_negative_prompts_and_rescaled_guidance(pipeline, model):
    theirs, latents = pipeline[0], torch.randn(2, 4, 8, 8)
    theirs.scheduler = diffusers.DDIMScheduler.from_config(
        theirs.scheduler.config, timestep_spacing="leading"
    )
    how = {"num_inference_steps": 5, "guidance_scale": 4.0, "output_type": "np"}
    expected = theirs(
        PROMPTS, negative_prompt=["red"] * 2, guidance_rescale=0.7, latents=latents.clone(), **how
    ).images
    found = ours(model, 5, latents, guidance=4.0, negative="red", rescale=0.7)
    assert abs(found - expected).max() < TOLERANCE
    for other in ({"negative": "blue"}, {"rescale": 0.0}):
        changed = ours(
            model,
            5,
            latents,
            guidance=4.0,
            **({"negative": "red", "rescale": 0.7} | other),
        )
        assert abs(changed - expected).max() > 10 * TOLERANCE


def picture_and_mask():
    pixels = torch.rand(1, 3, 64, 64)
    mask = torch.zeros(1, 1, 64, 64)
    mask[..., 16:48, 8:40] = 1
    return pixels, mask


def images(pixels, mask):
    picture = Image.fromarray((pixels[0].permute(1, 2, 0) * 255).round().byte().numpy())
    return (
        picture,
        Image.fromarray((mask[0, 0] * 255).byte().numpy()),
        torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None] / 127.5 - 1,
    )


@pytest.mark.parametrize("strength", [0.3, 0.8, 1.0])
def test_image_to_image(pipeline, model, strength, monkeypatch):
    """diffusers draws latents from the VAE's posterior; the mean, which is ours, is set in its place."""
    theirs = pipeline[0]
    monkeypatch.setattr(
        diffusers.models.autoencoders.vae.DiagonalGaussianDistribution,
        "sample",
        lambda self, *_: self.mean,
    )
    again = diffusers.StableDiffusionImg2ImgPipeline(
        **theirs.components, requires_safety_checker=False
    )
    again.scheduler = diffusers.DDIMScheduler.from_config(
        theirs.scheduler.config, timestep_spacing="leading"
    )
    again.set_progress_bar_config(disable=True)
    picture, _, given = images(*picture_and_mask())
    how = {
        "num_inference_steps": 10,
        "strength": strength,
        "guidance_scale": 4.0,
        "output_type": "np",
    }
    expected = again(
        PROMPTS, image=[picture] * 2, generator=torch.Generator().manual_seed(3), **how
    ).images
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    found = ours(model, 10, noise, Edit(given, strength), guidance=4.0)
    assert abs(found - expected).max() < TOLERANCE


@pytest.mark.parametrize("trained", [False, True], ids=["any model", "inpainting model"])
def test_inpainting(pipeline, model, trained, monkeypatch, tmp_path):
    """With any U-Net by noising what is kept; with one of 9 input channels by showing it the mask."""
    from .test_networks import randomized

    theirs = pipeline[0]
    monkeypatch.setattr(
        diffusers.models.autoencoders.vae.DiagonalGaussianDistribution,
        "sample",
        lambda self, *_: self.mean,
    )
    parts = dict(theirs.components)
    if trained:
        parts["unet"] = randomized(
            diffusers.UNet2DConditionModel.from_config(theirs.unet.config, in_channels=9),
            torch.float32,
        )
    again = diffusers.StableDiffusionInpaintPipeline(**parts, requires_safety_checker=False)
    again.scheduler = diffusers.DDIMScheduler.from_config(
        theirs.scheduler.config, timestep_spacing="leading"
    )
    again.set_progress_bar_config(disable=True)
    if trained:
        again.save_pretrained(tmp_path / "model")
        model = minidiff.load(tmp_path / "model")
        with pytest.raises(
            UserError, match="this model is for inpainting; it needs an image and a mask"
        ):
            ourselves.generate(model, PROMPTS)
    pixels, mask = picture_and_mask()
    picture, hole, given = images(pixels, mask)
    how = {
        "num_inference_steps": 10,
        "strength": 1.0,
        "guidance_scale": 4.0,
        "output_type": "np",
        "height": 64,
        "width": 64,
    }
    expected = again(
        PROMPTS, image=picture, mask_image=hole, generator=torch.Generator().manual_seed(3), **how
    ).images
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    found = ours(model, 10, noise, Edit(given, mask=mask), guidance=4.0)
    assert abs(found - expected).max() < TOLERANCE
