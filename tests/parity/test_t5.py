"""T5's encoder and its tokenizer beside transformers', with small random weights; T5-XXL's true shapes."""

import pytest
import torch
import torch.nn.functional as F

from minidiff.checkpoints import names
from minidiff.errors import UserError
from minidiff.t5 import T5, T5Config, bucket

from .flow_pipelines import small_vocabulary
from .test_networks import gap, randomized

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")
SMALL = T5Config(
    width=24, layers=3, heads=4, head_dim=8, hidden=40, vocabulary=64, buckets=32, farthest=128
)
PROMPTS = ["a red cat on a mat", "", "cat " * 30, "a dog! and 5 cats"]


def published(config: T5Config) -> transformers.T5Config:
    return transformers.T5Config(
        d_model=config.width,
        d_kv=config.head_dim,
        d_ff=config.hidden,
        num_layers=config.layers,
        num_heads=config.heads,
        vocab_size=config.vocabulary,
        feed_forward_proj="gated-gelu",
        relative_attention_num_buckets=config.buckets,
        relative_attention_max_distance=config.farthest,
    )


def pair(dtype=torch.float64):
    """transformers' encoder, and ours with the same weights."""
    torch.manual_seed(0)
    theirs = randomized(transformers.T5EncoderModel(published(SMALL)), dtype)
    ours = T5(SMALL).to(dtype).eval()
    ours.load_state_dict(names.to_ours(theirs.state_dict(), names.T5))
    return theirs, ours


def exact_norm(self, x):
    """transformers takes the variance in float32, whatever x is; this is the same in x's."""
    return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)


@torch.no_grad()
def test_equals_transformers(monkeypatch):
    theirs, ours = pair()
    tokens = torch.randint(64, (2, 200))  # longer than the farthest distance
    assert gap(ours(tokens), theirs(tokens)[0]) < 1e-5  # as published: float32 variances, thrice
    norm = transformers.models.t5.modeling_t5.T5LayerNorm
    monkeypatch.setattr(norm, "forward", exact_norm)
    assert gap(ours(tokens), theirs(tokens)[0]) < 1e-12


@torch.no_grad()
def test_attention_divided_by_the_root_of_its_width_is_seen(monkeypatch):
    theirs, ours = pair()
    tokens = torch.randint(64, (2, 20))
    expected = theirs(tokens)[0]
    attention = F.scaled_dot_product_attention
    scaled = lambda *inputs, scale: attention(*inputs)  # noqa: E731
    monkeypatch.setattr(F, "scaled_dot_product_attention", scaled)
    assert gap(ours(tokens), expected) > 0.01


def test_every_distance_has_their_bucket():
    theirs = transformers.models.t5.modeling_t5.T5Attention._relative_position_bucket
    for buckets, farthest in ((32, 128), (16, 64), (8, 20)):
        distance = torch.arange(-600, 601)[None]
        expected = theirs(distance, True, buckets, farthest)
        assert torch.equal(bucket(distance, buckets, farthest), expected)


def test_true_shapes():
    with torch.device("meta"):
        theirs, ours = transformers.T5EncoderModel(published(T5Config())), T5(T5Config())
    expected = {name: value.shape for name, value in ours.state_dict().items()}
    state = names.to_ours(theirs.state_dict(), names.T5)
    assert {name: value.shape for name, value in state.items()} == expected
    assert round(sum(value.numel() for value in ours.parameters()) / 1e6, 2) == 4762.31
    assert names.to_published(ours.state_dict(), names.T5).keys() == theirs.state_dict().keys() - {
        "encoder.embed_tokens.weight"
    }


@pytest.mark.parametrize("length", [12, 77])
def test_the_tokenizer_is_theirs(length):
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer.from_str(small_vocabulary()),
        pad_token="<pad>", eos_token="</s>", unk_token="<unk>",
    )  # fmt: skip
    ours = T5(SMALL)
    ours.vocabulary = small_vocabulary()
    settings = dict(padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    if length == 12:
        with pytest.warns(UserWarning, match='cut after 11 tokens; T5 does not see: "cat cat'):
            tokens = ours.tokens(PROMPTS, length)
    else:
        tokens = ours.tokens(PROMPTS, length)
    assert torch.equal(tokens, theirs(PROMPTS, **settings).input_ids)


def test_a_vocabulary_that_is_missing_is_named():
    with pytest.raises(UserError, match=r"T5 has no vocabulary; put its tokenizer\.json"):
        T5(SMALL).tokens(["a cat"], 8)
