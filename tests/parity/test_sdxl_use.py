"""SDXL between diffusers and us, of tiny random weights: LoRA files, textual inversions, base and refiner; pictures of whole pipelines, to the tolerance of test_pipeline."""

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file

from minidiff import samplers
from minidiff.checkpoints import embedding, names
from minidiff.checkpoints import inspect as inspection
from minidiff.checkpoints import lora as lora_files
from minidiff.checkpoints.layouts import STABLE_DIFFUSION
from minidiff.condition import SINES
from minidiff.conditioners import CLIPPair, PairConfig
from minidiff.denoiser import Denoiser
from minidiff.errors import UserError
from minidiff.latent_diffusion import LatentDiffusion
from minidiff.methods import lora
from minidiff.methods.refiner import Refined
from minidiff.schedules import Discrete
from minidiff.text import TextConfig
from minidiff.unet import UNet, UNetConfig
from minidiff.vae import VAE, VAEConfig

from .test_networks import randomized

diffusers, transformers = pytest.importorskip("diffusers"), pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
from minidiff.checkpoints import write  # noqa: E402

PROMPTS, TOLERANCE = ["a small blue circle above a large red square", "a photo of sks dog"], 1e-4
LATENTS = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(5))
WIDTH, SIDE, BLOCKS = 32, 64, 2


def encoder(folder, name, is_g):
    """Theirs, with its tokenizer."""
    config = transformers.CLIPTextConfig(
        vocab_size=49408,
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=3,
        num_attention_heads=2,
        projection_dim=WIDTH,
        hidden_act="gelu" if is_g else "quick_gelu",
        bos_token_id=49406,
        eos_token_id=49407,
    )
    place = folder / name
    place.mkdir()
    for file, content in write.tokenizer_files(0 if is_g else 49407, 77).items():
        (place / file).write_text(content, encoding="utf-8")
    kind = transformers.CLIPTextModelWithProjection if is_g else transformers.CLIPTextModel
    tokenizer = transformers.CLIPTokenizer.from_pretrained(place)
    return randomized(kind(config), torch.float32), tokenizer


def networks(is_refiner):
    """Their U-Net and VAE."""
    context, numbers = (WIDTH, 5) if is_refiner else (2 * WIDTH, 6)
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=[1, BLOCKS],
        attention_head_dim=[1, 2],
        cross_attention_dim=context,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=SINES,
        projection_class_embeddings_input_dim=WIDTH + numbers * SINES,
    )
    vae = diffusers.AutoencoderKL(
        block_out_channels=(32, 32, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=4,
        sample_size=SIDE,
        scaling_factor=0.13025,
    )
    return randomized(unet, torch.float32), randomized(vae, torch.float32)


def ours_of(pipe):
    """Our model of their weights."""
    is_refiner = pipe.text_encoder is None
    unet = UNet(
        UNetConfig(
            4,
            4,
            (32, 64),
            1,
            (0, BLOCKS),
            (1, 2),
            pipe.unet.config.cross_attention_dim,
            linear_projection=True,
            added=pipe.unet.config.projection_class_embeddings_input_dim,
        )
    )
    unet.load_state_dict(names.to_ours(pipe.unet.state_dict(), names.UNET_DIFFUSERS))
    clip_l = TextConfig(WIDTH, 3, 2, penultimate=True)
    clip_g = TextConfig(WIDTH, 3, 2, "gelu", 0, penultimate=True, projection=WIDTH)
    text = CLIPPair(PairConfig(None if is_refiner else clip_l, clip_g, SIDE))
    for mine, theirs in ((text.clip_l, pipe.text_encoder), (text.clip_g, pipe.text_encoder_2)):
        if mine is not None:
            state = {n.removeprefix("text_model."): v for n, v in theirs.state_dict().items()}
            mine.load_state_dict(names.to_ours(state, names.CLIP_TRANSFORMERS))
    vae = VAE(VAEConfig(3, 4, (32, 32, 64, 64), 1), latent_scale=0.13025)
    state = names.to_ours(pipe.vae.state_dict(), names.VAE_DIFFUSERS)
    vae.load_state_dict(state | {"latent_scale": vae.latent_scale})
    denoiser = Denoiser(unet, Discrete(**STABLE_DIFFUSION))
    return LatentDiffusion(vae, text, denoiser, SIDE, sampler="euler", spacing="leading").eval()


SCHEDULER = dict(
    beta_schedule="scaled_linear",
    beta_start=0.00085,
    beta_end=0.012,
    steps_offset=1,
    timestep_spacing="leading",
)


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("sdxl")
    (one, words), (two, words_2) = encoder(folder, "l", False), encoder(folder, "g", True)
    unet, vae = networks(is_refiner=False)
    made = diffusers.StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=one,
        text_encoder_2=two,
        tokenizer=words,
        tokenizer_2=words_2,
        unet=unet,
        scheduler=diffusers.EulerDiscreteScheduler(**SCHEDULER),
        add_watermarker=False,
    )
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture
def both(pipe):
    yield pipe, ours_of(pipe)
    pipe.unload_lora_weights()


def sigma_max(pipe, steps):
    """Their pipelines multiply the latents by the first noise level."""
    pipe.scheduler.set_timesteps(steps)
    return pipe.scheduler.init_noise_sigma


def theirs(pipe, prompts=PROMPTS, steps=3, **how):
    pipe.scheduler = diffusers.EulerDiscreteScheduler(**SCHEDULER)
    latents, sides = LATENTS[: len(prompts)].clone(), {"height": SIDE, "width": SIDE}
    sides |= {"num_inference_steps": steps, "guidance_scale": 1.0, "output_type": "np"}
    return pipe(prompts, latents=latents, **(sides | how)).images


def ours(model, prompts=PROMPTS, steps=3):
    x_T, euler = LATENTS[: len(prompts)], samplers.by_name("euler")
    times = samplers.times_of(model.schedule, steps, "leading", euler)
    alpha, sigma = model.schedule.alpha_sigma(times[0])
    x_T = x_T * (alpha**2 + sigma**2).sqrt().item()
    *_, last = model.sample(prompts, times, guidance=1.0, step=euler, x_T=x_T)
    return (model.decode(last.x0).clamp(-1, 1) / 2 + 0.5).permute(0, 2, 3, 1).numpy()


def with_lora(model):
    """LoRAs in all three networks that show in the picture."""
    lora.add(model.unet, 4, 2.0, (*lora.ATTENTION, "ff.up", "conv1", "proj_in", "resample.conv"))
    lora.add(model.text, 4, 2.0)
    for layer in lora.adapted(model).values():
        torch.nn.init.normal_(layer.lora.B, std=0.1)
    return model


def test_one_pipeline(both):
    pipe, model = both
    assert abs(theirs(pipe) - ours(model)).max() < TOLERANCE


@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
def test_a_lora_of_ours_draws_there(both, tmp_path, layout):
    pipe, model = both
    bare = ours(model)
    expected = ours(with_lora(model))
    assert abs(expected - bare).max() > 0.02
    pipe.load_lora_weights(lora_files.save(model, tmp_path / "l.safetensors", layout))
    assert abs(theirs(pipe) - expected).max() < TOLERANCE


def test_ours_to_diffusers_to_kohya_to_ours(both, tmp_path):
    """Through the files of all; those of kohya have the names that its own tools write for SDXL."""
    model = both[1]
    expected = ours(with_lora(model))
    for k, layout in enumerate(("diffusers", "kohya", "diffusers")):
        file = lora_files.save(model, tmp_path / f"{k}.safetensors", layout)
        lora.remove(model)
        assert len(lora_files.load(model, file).layers) == len(lora.adapted(model))
        assert abs(ours(model) - expected).max() < TOLERANCE
    written = load_file(tmp_path / "1.safetensors")
    for name in (
        "lora_unet_input_blocks_3_1_transformer_blocks_1_attn1_to_q.lora_down.weight",
        "lora_unet_middle_block_1_transformer_blocks_0_attn2_to_k.lora_up.weight",
        "lora_te1_text_model_encoder_layers_0_self_attn_q_proj.alpha",
        "lora_te2_text_model_encoder_layers_2_self_attn_out_proj.lora_down.weight",
    ):
        assert name in written
    prefixes = {name.split(".")[0] for name in load_file(tmp_path / "2.safetensors")}
    assert prefixes == {"unet", "text_encoder", "text_encoder_2"}


def test_kohya_with_diffusers_names(both, tmp_path):
    """As kohya's tools wrote it before they took Stability's names for the U-Net."""
    model = both[1]
    expected = ours(with_lora(model))
    state = load_file(lora_files.save(model, tmp_path / "l.safetensors"))
    flat = {}
    for name, value in state.items():
        layer, half = name.removesuffix(".weight").rsplit(".", 1)
        layer = layer.replace("text_encoder_2.", "te2.").replace("text_encoder.", "te1.")
        half = {"lora_A": "lora_down", "lora_B": "lora_up"}[half]
        flat[f"lora_{layer.replace('.', '_')}.{half}.weight"] = value
    assert sum(name.startswith("lora_unet_down_blocks_1_attentions") for name in flat)
    save_file(flat, tmp_path / "k.safetensors")
    lora.remove(model)
    lora_files.load(model, tmp_path / "k.safetensors")
    assert abs(ours(model) - expected).max() < TOLERANCE


def test_a_lora_of_theirs_draws_here(both, tmp_path):
    """As diffusers' SDXL scripts write it, with alpha in the metadata."""
    pipe, model = both
    config = {"r": 4, "lora_alpha": 8, "init_lora_weights": False}
    attention = peft.LoraConfig(target_modules=["to_q", "to_k", "to_v", "to_out.0"], **config)
    pipe.unet.add_adapter(attention)
    words = peft.LoraConfig(target_modules=["q_proj", "k_proj", "v_proj", "out_proj"], **config)
    parts = {"unet": pipe.unet, "text_encoder": pipe.text_encoder}
    parts["text_encoder_2"] = pipe.text_encoder_2
    for name, part in parts.items():
        if name != "unet":
            part.add_adapter(copy.deepcopy(words))
        for key, p in part.named_parameters():
            if ".lora_" in key:
                torch.nn.init.normal_(p, std=0.1)
    layers = {f"{name}_lora_layers": peft.get_peft_model_state_dict(p) for name, p in parts.items()}
    metadata = {f"{name}_lora_adapter_metadata": p.peft_config["default"].to_dict() for name, p in parts.items()}  # fmt: skip
    diffusers.StableDiffusionXLPipeline.save_lora_weights(tmp_path, **layers, **metadata)
    expected = theirs(pipe)
    bare = ours(model)
    lora_files.load(model, tmp_path / "pytorch_lora_weights.safetensors")
    assert abs(expected - bare).max() > 0.02
    assert abs(ours(model) - expected).max() < TOLERANCE


def test_textual_inversions_of_ours_draw_there(both, tmp_path):
    pipe, model = both
    before = ours(model)
    vector = torch.randn(2 * WIDTH)
    file = embedding.save("sks", vector, tmp_path / "embedding.safetensors", [WIDTH, WIDTH])
    assert embedding.load(model.text, file) == "sks"
    drawn = ours(model)
    assert abs(drawn - before)[1].max() > 1e-3 and abs(drawn - before)[0].max() == 0
    state = load_file(file)
    parts = (("clip_l", pipe.text_encoder, pipe.tokenizer),)
    parts += (("clip_g", pipe.text_encoder_2, pipe.tokenizer_2),)
    for name, encoder, words in parts:
        pipe.load_textual_inversion(state[name], "<sks>", text_encoder=encoder, tokenizer=words)
    prompts = [PROMPTS[0], "a photo of <sks> dog"]
    assert abs(theirs(pipe, prompts) - drawn).max() < TOLERANCE
    for _, encoder, words in parts:
        pipe.unload_textual_inversion("<sks>", tokenizer=words, text_encoder=encoder)


def test_base_and_refiner(both, tmp_path_factory):
    """Twenty steps, the last fifth by the refiner, as denoising_end and denoising_start cut them."""
    pipe, model = both
    folder = tmp_path_factory.mktemp("refiner")
    text, words = encoder(folder, "g", True)
    unet, _ = networks(is_refiner=True)
    second = diffusers.StableDiffusionXLImg2ImgPipeline(
        vae=pipe.vae,
        text_encoder=None,
        text_encoder_2=text,
        tokenizer=None,
        tokenizer_2=words,
        unet=unet,
        scheduler=diffusers.EulerDiscreteScheduler(**SCHEDULER),
        requires_aesthetics_score=True,
        add_watermarker=False,
    )
    second.set_progress_bar_config(disable=True)
    latents = theirs(pipe, steps=20, denoising_end=0.8, output_type="latent")
    expected = second(
        PROMPTS,
        image=latents,
        denoising_start=0.8,
        num_inference_steps=20,
        guidance_scale=1.0,
        output_type="np",
    ).images
    refined = Refined(model, ours_of(second), 0.8)
    assert abs(expected - ours(refined, steps=20)).max() < TOLERANCE
    assert abs(expected - ours(model, steps=20)).max() > 0.01


def test_a_lora_of_another_family(both, sd, tmp_path):
    """Each way one line; and inspect names both."""
    model, other = both[1], sd()
    for each in (model, other):
        lora.add(each.unet, 2)
        lora.add(each.text, 2)
    file = lora_files.save(model, tmp_path / "xl.safetensors", "kohya")
    lora.remove(model)
    old = lora_files.save(other, tmp_path / "old.safetensors", "kohya")
    lora.remove(other)
    for target, source in ((other, file), (model, old)):
        before = copy.deepcopy(target.state_dict())
        with pytest.raises(
            UserError, match=r"layers are not in this model.* It is for another mod"
        ):
            lora_files.load(target, source)
        assert before.keys() == target.state_dict().keys()
    rows = dict(inspection.inspect(file))
    assert rows["layers"].endswith("24 of the text encoders")
