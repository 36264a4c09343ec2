"""Textual inversions between diffusers and us: pictures of whole pipelines, as in test_pipeline and to its tolerance."""

import copy

import pytest
import torch
from safetensors.torch import save_file

import minidiff
from minidiff import samplers
from minidiff.checkpoints import embedding, write

LEVELS = 2  # of the U-Net: what is compared here does not depend on them
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


@pytest.mark.parametrize("form", ["diffusers", "emb_params", "A1111", "InvokeAI"])
def test_several_vectors_draw_as_there(pipeline, tmp_path, form):
    """Each in the form in which it is shared; diffusers reads all but the oldest, of 2022."""
    pipe, model = copy.deepcopy(pipeline[0]), minidiff.load(pipeline[1])
    vectors = torch.randn(4, 64)
    place = torch.nn.Parameter(vectors)
    place = torch.nn.ParameterDict({"*": place}) if form == "InvokeAI" else {"*": place}
    pickled = {"string_to_token": {"*": 265}, "string_to_param": place}
    pickled |= {"name": "other", "step": 2500, "sd_checkpoint": "8176", "sd_checkpoint_name": "v1"}
    save_file({"my-style": vectors}, tmp_path / "theirs.safetensors")
    pipe.load_textual_inversion(str(tmp_path / "theirs.safetensors"))
    file = tmp_path / f"my-style.{'pt' if form in ('A1111', 'InvokeAI') else 'safetensors'}"
    if file.suffix == ".pt":
        torch.save(pickled, file)
    else:
        save_file({"my-style" if form == "diffusers" else "emb_params": vectors}, file)
    assert embedding.load(model.text, file) == "my-style"
    pictures = ours(model, "a dog, My-Style")
    assert abs(theirs(pipe, "a dog, my-style") - pictures).max() < 1e-4
    assert len(model.text.ids("my-styles")) == 3 and len(model.text.ids("my-style")) == 4
    for folder in (model.save(tmp_path / "m"), write.save_diffusers(model, tmp_path / "d")):
        text = minidiff.load(folder).text
        assert text.config == model.text.config
        assert torch.equal(text.token_embedding.weight, model.text.token_embedding.weight)
    again = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "d", safety_checker=None)
    assert abs(theirs(again, "a dog, my-style") - pictures).max() < 1e-4


def test_a_folder_with_words_of_its_own(pipeline, tmp_path):
    """As textual_inversion.py --save_as_full_pipeline writes it."""
    pipe = copy.deepcopy(pipeline[0])
    pipe.tokenizer.add_tokens(["<cat-toy>", "<hat>", "<hat>_1"])
    pipe.text_encoder.resize_token_embeddings(len(pipe.tokenizer))
    with torch.no_grad():
        pipe.text_encoder.get_input_embeddings().weight[-3:] = torch.randn(3, 64)
    pipe.save_pretrained(tmp_path / "sd")
    model = minidiff.load(tmp_path / "sd")
    assert model.text.config.added == {"<cat-toy>": (49408,), "<hat>": (49409, 49410)}
    for prompt in ("a photo of a <cat-toy> backpack", "a <Cat-Toy>, red", "a <hat>", "a dog"):
        assert abs(theirs(pipe, prompt) - ours(model, prompt)).max() < 1e-4
