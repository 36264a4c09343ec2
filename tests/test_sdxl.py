"""SDXL's two text encoders as one, and what the network is told of sizes: by the prompts' model, wherever it draws or learns."""

import pytest
import torch

from minidiff import pipeline
from minidiff.condition import SINES, Condition
from minidiff.conditioners import CLIPPair, PairConfig
from minidiff.denoiser import Denoiser
from minidiff.errors import UserError
from minidiff.latent_diffusion import LatentDiffusion
from minidiff.methods.attention_maps import attention_maps
from minidiff.methods.editing import Edit
from minidiff.options.sampling import Corner, SampleConfig, Size
from minidiff.schedules import Discrete
from minidiff.text import END, CLIPText, TextConfig
from minidiff.unet import UNet, UNetConfig
from minidiff.vae import VAE, VAEConfig

CLIP_L = TextConfig(8, 2, 2, penultimate=True)
CLIP_G = TextConfig(16, 2, 2, "gelu", 0, penultimate=True, projection=16)
PROMPTS = ["a photo of a cat", ""]


def sdxl(is_refiner=False, empty="zeros", channels=4):
    torch.manual_seed(0)
    text = CLIPPair(PairConfig(None if is_refiner else CLIP_L, CLIP_G, 16, empty))
    added = 16 + SINES * len(text.numbers)
    unet = UNet(UNetConfig(channels, 4, (8, 8), 1, (0, 1), (1, 1), text.dim, added=added, groups=4))
    vae = VAE(VAEConfig(3, 4, (4, 4), 1, groups=4))
    for p in (*unet.parameters(), *text.parameters()):
        p.data += 0.1 * torch.randn_like(p)
    schedule = Discrete("scaled_linear", 1000, 0.00085, 0.012, final=1)
    return LatentDiffusion(vae, text, Denoiser(unet, schedule), 16).eval()


def recorded(model):
    """The Conditions that the U-Net gets, of a batch of two: away first, then towards."""
    conditions = []
    model.unet.register_forward_pre_hook(lambda _, inputs: conditions.append(inputs[2]))
    return conditions


@torch.no_grad()
def test_both_encoders_side_by_side_and_the_seconds_pooled_vector():
    text = sdxl(empty="encoded").text
    for prompts in (PROMPTS, ["a dog"]):
        c = text.encode(prompts)
        assert torch.equal(c.context[..., :8], text.clip_l.encode(prompts))
        assert torch.equal(c.context[..., 8:], text.clip_g.encode(prompts))
        assert torch.equal(c.pooled, text.clip_g.both(text.clip_g.tokens(prompts))[1])
        assert c.numbers.tolist() == [[16, 16, 0, 0, 16, 16]] * len(prompts)
    assert (text.clip_l.pad, text.clip_g.pad) == (END, 0)


@torch.no_grad()
def test_an_empty_prompt_is_zeros_or_encoded():
    zeros, encoded = sdxl().text, sdxl(empty="encoded").text
    a, b = zeros.encode(PROMPTS), encoded.encode(PROMPTS)
    assert torch.equal(a.context[0], b.context[0]) and torch.equal(a.pooled[0], b.pooled[0])
    assert not a.context[1].any() and not a.pooled[1].any()
    assert b.context[1].any() and b.pooled[1].any()
    assert torch.equal(zeros.null(2).pooled, torch.zeros(2, 16))
    assert torch.equal(zeros.null(2, "encoded").context[0], b.context[1])
    assert not encoded.null(1, "zeros").context.any()


def test_sampling_tells_the_size_that_is_drawn():
    model = sdxl()
    conditions = recorded(model)
    for config, expected in (
        (SampleConfig(1), [16, 16, 0, 0, 16, 16]),
        (SampleConfig(1, size=Size(24, 8)), [24, 8, 0, 0, 24, 8]),
        (
            SampleConfig(
                1, original_size=Size(64, 32), crop=Corner(3, 5), target_size=Size(20, 30)
            ),
            [64, 32, 3, 5, 20, 30],
        ),
    ):
        list(model.sample(["a cat"], config=config))
        assert conditions.pop().numbers.tolist() == [expected] * 2
    list(model.sample(["a cat"], 1, x_T=torch.randn(1, 4, 4, 12)))
    assert conditions.pop().numbers.tolist() == [[8, 24, 0, 0, 8, 24]] * 2


def test_the_refiner_is_told_a_score():
    model = sdxl(is_refiner=True)
    conditions = recorded(model)
    list(model.sample(["a cat"], config=SampleConfig(1, aesthetic=7.0)))
    assert conditions[0].numbers.tolist() == [[16, 16, 0, 0, 2.5], [16, 16, 0, 0, 7]]


def test_the_choice_for_an_empty_prompt_when_sampling():
    model = sdxl()
    conditions = recorded(model)
    for config, expected in (
        (SampleConfig(1), torch.zeros(77, 24)),
        (SampleConfig(1, empty="encoded"), model.text.encode([""], "encoded").context[0]),
        (SampleConfig(1, negative="a dog"), model.text.encode(["a dog"]).context[0]),
    ):
        list(model.sample(["a cat"], config=config))
        assert torch.equal(conditions.pop().context[0], expected)


def test_options_of_sdxl_are_refused_by_other_models():
    model = sdxl()
    model.text = CLIPText(CLIP_G)
    for option in ({"empty": "zeros"}, {"crop": Corner(0, 1)}, {"original_size": Size(8, 8)}):
        with pytest.raises(UserError, match=f"{next(iter(option))} is for SDXL"):
            model.guided(["a cat"], SampleConfig(**option))


def test_training_tells_the_size_of_the_latents_and_drops_captions_as_sampling_does():
    model = sdxl()
    conditions = recorded(model)
    model.dropout = 1.0
    model.loss(torch.randn(2, 3, 8, 24), ["a cat", "a dog"])
    told = conditions.pop()
    assert told.numbers.tolist() == [[8, 24, 0, 0, 8, 24]] * 2
    assert not told.context.any() and not told.pooled.any()


def test_other_parts_are_refused():
    model = sdxl()
    with pytest.raises(UserError, match="the text encoder gives vectors of width 16"):
        LatentDiffusion(model.vae, CLIPText(CLIP_G), model.denoiser, 16)
    assert isinstance(model.text.null(1), Condition)


def test_a_model_folder_keeps_it(tmp_path):
    model = sdxl()
    again = LatentDiffusion.load(model.save(tmp_path / "model"))
    assert again.text.config == model.text.config and again.unet.config == model.unet.config
    draw = lambda m: list(m.sample(["a cat"], config=SampleConfig(3, guidance=5)))[-1].x0  # noqa: E731
    torch.testing.assert_close(draw(again), draw(model), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("channels", [4, 9], ids=["plain", "inpainting"])
def test_from_an_image_and_within_a_mask(channels):
    model = sdxl(channels=channels)
    conditions = recorded(model)
    mask = torch.zeros(1, 1, 8, 24)
    mask[..., 12:] = 1
    edits = [Edit(torch.rand(1, 3, 8, 24), 0.6, mask)]
    edits += [Edit(edits[0].image, 0.6)] if channels == 4 else []
    for edit in edits:
        images = pipeline.generate(model, ["a cat", "a dog"], SampleConfig(3), edit=edit)
        assert images.shape == (2, 3, 8, 24)
        assert conditions.pop().numbers.tolist() == [[8, 24, 0, 0, 8, 24]] * 4


def test_maps_of_attention():
    maps = attention_maps(sdxl(), "a cat", SampleConfig(2))
    assert maps.words == ("<begin>", "a", "cat", "<end>", "<padding>")
    assert maps.mean().shape == (5, 16, 16)
