"""Attention maps: against diffusers' processor and by hand; nothing that is drawn changes."""

from dataclasses import replace

import pytest
import torch

from minidiff import pipeline
from minidiff.errors import UserError
from minidiff.layers import Attention
from minidiff.methods.attention_maps import attention_maps, attention_weights, words_of
from minidiff.options.sampling import SampleConfig, Size
from minidiff.text import CLIPText, TextConfig

PROMPT = "a photograph of an extraterrestrialish cat, red"
CONFIG = SampleConfig(steps=3, seed=4, size=Size(32, 16))


@pytest.fixture
def model(sd):
    model = sd()
    torch.nn.init.normal_(model.unet.conv_out.weight, std=0.1)
    return model


@pytest.mark.parametrize("sampler", ["ddim", "heun", "ddpm"])
@pytest.mark.parametrize("guidance", [1.0, 7.5])
def test_the_image_is_the_same_and_maps_sum_to_one(model, sampler, guidance):
    config = replace(CONFIG, sampler=sampler, guidance=guidance)
    maps = attention_maps(model, PROMPT, config)
    assert torch.equal(maps.image, pipeline.generate(model, [PROMPT], config)[0])
    assert len(maps.maps) % 2 == 0 and len(maps.times) >= 3
    assert all(m.weights.shape == (len(maps.words), 16, 8) for m in maps.maps[:1])
    for m in maps.maps:
        assert torch.allclose(m.weights.sum(0), torch.ones(()), atol=1e-5)  # fp32, 77 terms
    for mean in (maps.mean(), maps.mean(maps.sizes[0]), maps.mean(t=maps.times[-1])):
        assert mean.shape == (len(maps.words), 32, 16)
        assert torch.allclose(mean.sum(0), torch.ones(()), atol=1e-5)
    for module in model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks


def test_maps_are_the_weights_by_hand(model):
    """From q and k of the first layer at the first step, head by head and token by token."""
    config, taken = replace(CONFIG, guidance=7.5), []
    layer = model.unet.encoder[0].attention[0].blocks[0].cross_attention
    handle = layer.register_forward_hook(lambda _, args, output: taken.append(args))
    maps = attention_maps(model, PROMPT, config)
    handle.remove()
    x, context = taken[0]
    assert len(x) == 2  # the empty prompt, then the prompt
    q, k, d = layer.q(x[1]), layer.k(context[1]), 32 // layer.heads
    expected = torch.zeros(128, 77)
    for h in range(layer.heads):
        part = slice(h * d, (h + 1) * d)
        expected += (q[:, part] @ k[:, part].T / d**0.5).exp() / (
            (q[:, part] @ k[:, part].T / d**0.5).exp().sum(1, keepdim=True) * layer.heads
        )
    first, start = maps.maps[0], 0
    assert first.layer == "encoder.0.attention.0.blocks.0.cross_attention"
    assert first.t == maps.times[0]
    for (word, count), weights in zip(words_of(model.text, PROMPT), first.weights, strict=True):
        by_hand = expected[:, start : start + count].sum(1).view(16, 8)
        assert torch.allclose(weights, by_hand, atol=1e-5), word
        start += count
    assert start == 77


def test_weights_are_those_of_diffusers():
    diffusers = pytest.importorskip("diffusers.models.attention_processor")
    ours = Attention(32, 4, 16)
    theirs = diffusers.Attention(32, 16, heads=4, dim_head=8)
    theirs.to_q.weight, theirs.to_k.weight = ours.q.weight, ours.k.weight
    x, context = torch.randn(2, 9, 32), torch.randn(2, 7, 16)
    query, key = (theirs.head_to_batch_dim(p) for p in (theirs.to_q(x), theirs.to_k(context)))
    expected = theirs.get_attention_scores(query, key).view(2, 4, 9, 7)
    assert torch.allclose(attention_weights(ours, x, context), expected, atol=1e-6)  # fp32


def test_words_of_several_tokens_are_one_and_others_have_names(model):
    words = words_of(model.text, PROMPT)
    assert [word for word, _ in words] == [
        "<begin>", "a", "photograph", "of", "an", "extraterrestrialish", "cat", ",", "red", "<end>",
        "<padding>",
    ]  # fmt: skip
    assert dict(words)["extraterrestrialish"] > 1 and sum(count for _, count in words) == 77
    added = {"<my-cat>": (49408, 49409), "sks": (49410,)}
    config = TextConfig(8, 1, 1, vocabulary=49411, context_length=9, added=added)
    words = words_of(CLIPText(config), "a <my-cat> sks red circle and more")
    assert words == [
        ("<begin>", 1), ("a", 1), ("<my-cat>", 2), ("sks", 1), ("red", 1), ("circle", 1),
        ("and", 1), ("<end>", 1),
    ]  # fmt: skip
    assert words_of(model.text, "") == [("<begin>", 1), ("<end>", 1), ("<padding>", 75)]


def test_what_has_no_maps(model):
    with pytest.raises(UserError, match="guidance is 0, which ignores the prompt"):
        attention_maps(model, PROMPT, replace(CONFIG, guidance=0.0))
    maps = attention_maps(model, PROMPT, CONFIG)
    with pytest.raises(
        UserError, match=r"no maps of size \(3, 3\) at t = None; sizes: \[\(16, 8\)"
    ):
        maps.mean((3, 3))
