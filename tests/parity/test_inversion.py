"""Textual inversions between diffusers and us: pictures of whole pipelines, as in test_pipeline and to its tolerance."""

import pytest
import torch
from safetensors.torch import save_file

import minidiff
from minidiff import samplers
from minidiff.checkpoints import embedding

diffusers = pytest.importorskip("diffusers")
LATENTS = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5))
pytestmark = pytest.mark.parametrize("pipeline", ["sd1", "sd2"], indirect=True)


def theirs(pipe, prompt):
    return pipe(
        prompt, latents=LATENTS.clone(), num_inference_steps=3, guidance_scale=4.0, output_type="np"
    ).images


def ours(model, prompt):
    *_, last = model.sample([prompt], 3, guidance=4.0, step=samplers.by_name("ddim"), x_T=LATENTS)
    return (model.decode(last.x0).clamp(-1, 1) / 2 + 0.5).permute(0, 2, 3, 1).numpy()


def test_what_is_learnt_here_draws_there(pipeline, tmp_path):
    pipe, model = pipeline[0], minidiff.load(pipeline[1])
    before = ours(model, "a photo of sks dog")
    file = embedding.save("sks", torch.randn(64), tmp_path / "embedding.safetensors")
    embedding.load(model.text, file)
    pipe.load_textual_inversion(str(file))
    pictures = ours(model, "a photo of sks dog")
    assert abs(pictures - before).max() > 1e-3  # it does something
    assert abs(theirs(pipe, "a photo of <sks> dog") - pictures).max() < 1e-4
    pipe.unload_textual_inversion("<sks>")


def test_what_is_learnt_there_draws_here(pipeline, tmp_path):
    pipe, model = pipeline[0], minidiff.load(pipeline[1])
    save_file(
        {"<cat-toy>": torch.randn(1, 64)}, tmp_path / "learned_embeds.safetensors"
    )  # the name and shape that its training script writes
    pipe.load_textual_inversion(str(tmp_path / "learned_embeds.safetensors"))
    embedding.load(model.text, tmp_path / "learned_embeds.safetensors", "sks")
    assert abs(theirs(pipe, "a <cat-toy> in a box") - ours(model, "a sks in a box")).max() < 1e-4
    pipe.unload_textual_inversion("<cat-toy>")
