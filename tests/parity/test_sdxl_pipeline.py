"""SDXL whole, at its true layout and little weight: pictures as diffusers' pipeline draws them, files in both published layouts, and what
goes wrong in silence."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from minidiff.checkpoints import layouts, write
from minidiff.checkpoints.inspect import inspect
from minidiff.checkpoints.load import load
from minidiff.errors import UserError
from minidiff.latent_diffusion import LatentDiffusion
from minidiff.options.sampling import Corner, SampleConfig, Size

from .test_networks import randomized

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
PROMPT, NEGATIVE = "a small blue circle above a large red square", "blurry"


@pytest.fixture(scope="module")
def xl(tmp_path_factory):
    """A StableDiffusionXLPipeline with the published scheduler settings, and its folder."""
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64, 64),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=[1, 1, 2],
        cross_attention_dim=128,
        attention_head_dim=[1, 1, 1],
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=64 + 6 * 256,
    )
    vae = diffusers.AutoencoderKL(
        block_out_channels=(32, 32, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=4,
        sample_size=64,
        scaling_factor=0.13025,
    )
    shape = dict(
        vocab_size=49408,
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=1,
        projection_dim=64,
        bos_token_id=49406,
        eos_token_id=49407,
    )
    clip_l = transformers.CLIPTextModel(
        transformers.CLIPTextConfig(hidden_act="quick_gelu", **shape)
    )
    clip_g = transformers.CLIPTextModelWithProjection(
        transformers.CLIPTextConfig(hidden_act="gelu", **shape)
    )
    folder = tmp_path_factory.mktemp("xl")
    tokenizers = []
    for pad in (49407, 0):
        (folder / str(pad)).mkdir()
        for name, content in write.tokenizer_files(pad, 77).items():
            (folder / str(pad) / name).write_text(content, encoding="utf-8")
        tokenizers.append(transformers.CLIPTokenizer.from_pretrained(folder / str(pad)))
    theirs = diffusers.StableDiffusionXLPipeline(
        vae=randomized(vae, torch.float32),
        text_encoder=randomized(clip_l, torch.float32),
        text_encoder_2=randomized(clip_g, torch.float32),
        tokenizer=tokenizers[0],
        tokenizer_2=tokenizers[1],
        unet=randomized(unet, torch.float32),
        scheduler=diffusers.EulerDiscreteScheduler(
            beta_schedule="scaled_linear",
            beta_start=0.00085,
            beta_end=0.012,
            steps_offset=1,
            timestep_spacing="leading",
        ),
        add_watermarker=False,
    )
    theirs.set_progress_bar_config(disable=True)
    theirs.save_pretrained(folder / "model")
    return theirs, folder / "model"


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def ours(xl):
    return load(xl[1])


def theirs_drawn(pipeline, noise, steps=20, **options):
    """Latents after the last step, from this noise of unit variance."""
    drawn = pipeline(
        prompt=options.pop("prompt", PROMPT),
        latents=noise,
        num_inference_steps=steps,
        output_type="latent",
        height=64,
        width=options.pop("width", 64),
        **options,
    )
    return drawn.images


def ours_drawn(model, noise, steps=20, prompt=PROMPT, **options):
    config = SampleConfig(steps, size=Size(64, 8 * noise.shape[3]), **options)
    *_, last = model.sample([prompt], config=config, x_T=model_start(model, noise, config))
    return last.x0


def model_start(model, noise, config):
    """x_T of unit noise, as the sampler starts."""
    drawn = LatentDiffusion.start
    from minidiff.samplers import by_name, times_of

    step = by_name(config.sampler or model.sampler)
    times = times_of(model.schedule, config.steps, model.spacing_of(step, config), step)
    return drawn(model, 1, config, lambda like: noise, times[0])


def gap(ours, theirs):
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


CASES = {
    "guidance 1": (dict(guidance_scale=1.0), dict(guidance=1.0)),
    "guidance 5, no negative prompt": (dict(guidance_scale=5.0), dict(guidance=5.0)),
    "negative": (
        dict(guidance_scale=5.0, negative_prompt=NEGATIVE),
        dict(guidance=5.0, negative=NEGATIVE),
    ),
    "the empty prompt encoded": (
        dict(guidance_scale=5.0, negative_prompt=""),
        dict(guidance=5.0, empty="encoded"),
    ),
    "sizes": (
        dict(
            guidance_scale=5.0,
            original_size=(700, 900),
            crops_coords_top_left=(3, 50),
            target_size=(600, 800),
        ),
        dict(
            guidance=5.0,
            original_size=Size(700, 900),
            crop=Corner(3, 50),
            target_size=Size(600, 800),
        ),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_pictures_equal_diffusers(xl, ours, case):
    theirs, _ = xl
    their_options, our_options = CASES[case]
    noise = torch.randn(1, 4, 8, 12, generator=torch.Generator().manual_seed(1))
    expected = theirs_drawn(theirs, noise.clone(), width=96, **their_options)
    drawn = ours_drawn(ours, noise, **our_options)
    assert gap(drawn, expected) < 1e-4
    pixels = theirs.vae.decode(expected / 0.13025).sample
    assert gap(ours.decode(drawn), pixels) < 1e-4


def test_what_the_folder_says(ours):
    assert (ours.sampler, ours.spacing, ours.guidance, ours.size) == ("euler", "leading", 5.0, 64)
    assert (ours.text.config.empty, ours.denoiser.target) == ("zeros", "eps")
    assert ours.vae.latent_scale.item() == pytest.approx(0.13025)
    l, g = ours.text.config.clip_l, ours.text.config.clip_g
    assert (l.activation, l.pad, l.projection) == ("quick_gelu", 49407, None)
    assert (g.activation, g.pad, g.projection) == ("gelu", 0, 64)


def states(folder):
    places = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model"}
    places |= {"text_encoder": "model", "text_encoder_2": "model"}
    return {part: load_file(folder / part / f"{stem}.safetensors") for part, stem in places.items()}


def with_text_prefix(state):
    """A library's newest files leave the prefix out; published ones have it."""
    return {
        name if name.startswith(("text_model.", "text_projection")) else f"text_model.{name}": value
        for name, value in state.items()
        if "position_ids" not in name
    }


@pytest.fixture(scope="module")
def single(ours, tmp_path_factory):
    return write.save_compvis(ours, tmp_path_factory.mktemp("single") / "xl.safetensors")


def test_every_tensor_goes_through_both_layouts(xl, ours, single, tmp_path):
    """diffusers -> ours -> single file -> our folder -> diffusers: the same bits."""
    again = load(single, target="eps")
    again.size = ours.size
    folder = write.save_diffusers(load(again.save(tmp_path / "ours")), tmp_path / "again")
    before, after = states(xl[1]), states(folder)
    for part, state in before.items():
        back = after[part]
        if part.startswith("text"):
            state, back = with_text_prefix(state), with_text_prefix(back)
        assert back.keys() == state.keys()
        assert all(torch.equal(back[name], value) for name, value in state.items())
    names = load_file(single)
    theirs = before["text_encoder_2"]["text_projection.weight"]
    assert torch.equal(names["conditioner.embedders.1.model.text_projection"], theirs.T)
    for name in (
        "conditioner.embedders.0.transformer.text_model.final_layer_norm.weight",
        "conditioner.embedders.1.model.transformer.resblocks.2.attn.in_proj_weight",
        "conditioner.embedders.1.model.text_projection",
        "model.diffusion_model.label_emb.0.2.bias",
        "model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn1.to_q.weight",
        "model.diffusion_model.middle_block.1.transformer_blocks.1.ff.net.2.weight",
        "first_stage_model.decoder.mid.attn_1.q.weight",
    ):
        assert name in names


def test_diffusers_opens_what_is_written(xl, ours, tmp_path):
    folder = write.save_diffusers(ours, tmp_path / "again")
    theirs = diffusers.StableDiffusionXLPipeline.from_pretrained(folder, add_watermarker=False)
    theirs.set_progress_bar_config(disable=True)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    options = dict(steps=3, guidance_scale=5.0)
    again = theirs_drawn(theirs, noise.clone(), **options)
    assert gap(again, theirs_drawn(xl[0], noise.clone(), **options)) < 1e-4


def test_a_single_file_draws_the_same(ours, single):
    again = load(single)
    assert (again.size, again.guidance, again.sampler, again.spacing) == (
        64,
        5.0,
        "euler",
        "leading",
    )
    assert again.vae.latent_scale.item() == pytest.approx(0.13025)
    noise = torch.randn(1, 4, 8, 8)
    assert gap(ours_drawn(again, noise, 3), ours_drawn(ours, noise, 3)) < 1e-4


def without_metadata(single, tmp_path, **more):
    file = tmp_path / "bare.safetensors"
    save_file(load_file(single) | more, file)
    return file


def test_eps_is_not_inferred_from_being_sdxl(single, tmp_path):
    """Metadata, marks or the user say what it predicts; else a warning names the assumption."""
    file = without_metadata(single, tmp_path)
    with pytest.warns(UserWarning, match=r"eps \(as most\) or v; eps is assumed"):
        assert load(file).denoiser.target == "eps"
    model = load(file, target="v", zero_terminal_snr=True)
    assert model.denoiser.target == "v" and model.schedule.zero_terminal_snr
    assert model.spacing == "trailing"
    marked = without_metadata(single, tmp_path, v_pred=torch.empty(0), ztsnr=torch.empty(0))
    model = load(marked)
    assert model.denoiser.target == "v" and model.schedule.zero_terminal_snr
    again = load(write.save_compvis(model, tmp_path / "again.safetensors"))
    assert again.denoiser.target == "v" and again.schedule.zero_terminal_snr
    assert dict(inspect(marked))["predicts"] == "v, zero terminal SNR"
    edm = without_metadata(single, tmp_path, edm_mean=torch.ones(4))
    with pytest.raises(UserError, match="predicts as EDM does"):
        load(edm)


def test_a_scheduler_says_v_and_zero_terminal_snr(xl, ours, tmp_path):
    folder = write.save_diffusers(ours, tmp_path / "v")
    file = folder / "scheduler/scheduler_config.json"
    more = dict(
        prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing"
    )
    file.write_text(json.dumps(json.loads(file.read_text()) | more))
    model = load(folder)
    assert model.denoiser.target == "v" and model.schedule.zero_terminal_snr


def test_inspect_names_it(xl, single, tmp_path):
    for path in (xl[1], single):
        rows = dict(inspect(path))
        assert rows["version"] == "Stable Diffusion XL, of other sizes (pruned or small)"
        assert (
            "quick_gelu" in rows["text encoder"]
            and "gelu, 77 tokens padded with 0" in rows["text encoder"]
        )
        assert all(rows[f"{kind}, missing keys"] == "none" for kind in layouts.KINDS.values())
        assert rows["keys of no part"] == "none"
    alone = {k: v for k, v in load_file(single).items() if k.startswith("model.diffusion_model.")}
    save_file(alone, tmp_path / "unet.safetensors")
    assert "Stable Diffusion XL" in dict(inspect(tmp_path / "unet.safetensors"))["version"]
    assert "nothing in it says" in dict(inspect(tmp_path / "unet.safetensors"))["predicts"]


# Traps.


def test_the_latent_scale_of_a_vae_that_does_not_say(single, tmp_path):
    """A VAE's own file takes the scale of the family: 0.18215 would draw too much contrast."""
    vae = {k: v for k, v in load_file(single).items() if k.startswith("first_stage_model.")}
    save_file(vae, tmp_path / "vae.safetensors")
    model = load(single, vae=tmp_path / "vae.safetensors")
    assert model.vae.latent_scale.item() == pytest.approx(0.13025)
    folder = model.save(tmp_path / "ours")
    model = load(folder, vae=tmp_path / "vae.safetensors")
    assert model.vae.latent_scale.item() == pytest.approx(0.13025)


def test_the_vae_stays_in_fp32(xl, single):
    for path in (xl[1], single):
        model = load(path, dtype="fp16", target="eps")
        assert {p.dtype for p in model.unet.parameters()} == {torch.float16}
        assert {p.dtype for p in model.vae.parameters()} == {torch.float32}


def test_traps_of_the_text_encoders(xl, ours):
    """With the final LayerNorm, or as OpenAI's, the second encoder loads, and gives something else."""
    c = ours.text.encode([PROMPT])
    parts = {name: getattr(ours.text.config, name) for name in ("clip_l", "clip_g")}
    for name, changes in (
        ("clip_l", dict(penultimate=False)),
        ("clip_g", dict(penultimate=False)),
        ("clip_g", dict(activation="quick_gelu")),
        ("clip_g", dict(pad=49407)),
    ):
        config = replace(ours.text.config, **{name: replace(parts[name], **changes)})
        trapped = type(ours.text)(config).eval()
        trapped.load_state_dict(ours.text.state_dict())
        assert gap(trapped.encode([PROMPT]).context, c.context) > 1e-3
