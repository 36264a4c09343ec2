"""The text tower: token ids against written-down ones and against transformers' tokenizer, the padding rules, causality; and the other conditions."""

import gzip
import warnings
from dataclasses import asdict

import pytest
import torch

from minidiff.conditioners import ClassLabels, LabelsConfig, Unconditional
from minidiff.errors import UserError
from minidiff.exercises import checks
from minidiff.text import (
    END,
    START,
    CLIPText,
    TextConfig,
    clip_vit_l14,
    openclip_vit_h14,
    quick_gelu,
    token_ids,
)

GOLDEN = {  # ids between start and end, written down once
    "": (),
    "a photo of a cat": (320, 1125, 539, 320, 2368),
    "A Photo Of A CAT": (320, 1125, 539, 320, 2368),
    "  a  photo\tof\na cat ": (320, 1125, 539, 320, 2368),
    "a photo of an astronaut riding a horse on mars": (
        320,
        1125,
        539,
        550,
        18376,
        6765,
        320,
        4558,
        525,
        7496,
    ),
    "sks dog": (48136, 1929),
    "a cat, a dog.": (320, 2368, 267, 320, 1929, 269),
    "!": (256,),
    "!!!": (995,),
    "hello world!": (3306, 1002, 256),
    "it's the dog's bone, isn't it?": (585, 568, 518, 1929, 568, 6195, 267, 2923, 713, 585, 286),
    "state-of-the-art": (1295, 268, 539, 268, 518, 268, 794),
    "123 apples for $4.50": (272, 273, 274, 14032, 556, 259, 275, 269, 276, 271),
    "antidisestablishmentarianism": (3120, 4262, 7726, 12658, 1585, 44351),
    "crème brûlée in a café": (1075, 12138, 614, 711, 127, 119, 75, 13489, 530, 320, 15304),
    "cafe\u0301": (15304,),  # e and a combining accent are one letter
    "ñandú": (6445, 672, 36019),
    "日本の猫": (39121, 44353, 21575, 163, 234, 360),
    "кот в сапогах": (
        27152,
        13506,
        141,
        480,
        140,
        366,
        23669,
        16912,
        26302,
        20978,
        111,
        16912,
        141,
        483,
    ),
    "🐱": (22979,),
    "a 🐱 and a 🐶!": (320, 22979, 537, 320, 14466, 256),
    "e-mail@example.com #hash 100%": (
        324,
        268,
        2614,
        287,
        6228,
        269,
        2464,
        258,
        19199,
        272,
        271,
        271,
        260,
    ),
}


def tower(**numbers):
    text = CLIPText(TextConfig(**dict(width=16, layers=2, heads=2) | numbers))
    for block in text.blocks:  # as if trained: what starts at zero would hide everything
        for linear in (block.attention.out, block.down):
            torch.nn.init.normal_(linear.weight, std=0.2)
    return text


@pytest.fixture(scope="module")
def published():
    """transformers' CLIP tokenizer, its vocabulary built from the merges that open_clip ships."""
    transformers, open_clip = (
        pytest.importorskip("transformers"),
        pytest.importorskip("open_clip.tokenizer"),
    )
    merges = gzip.open(open_clip.default_bpe()).read().decode().split("\n")[1 : 49152 - 256 - 2 + 1]
    letters = list(open_clip.bytes_to_unicode().values())
    words = [
        *letters,
        *(letter + "</w>" for letter in letters),
        *("".join(m.split()) for m in merges),
        "<|startoftext|>",
        "<|endoftext|>",
    ]
    return transformers.CLIPTokenizer(
        vocab={word: i for i, word in enumerate(words)}, merges=[tuple(m.split()) for m in merges]
    )


@pytest.mark.parametrize("prompt", GOLDEN)
def test_golden_token_ids(prompt, published):
    assert token_ids(prompt) == GOLDEN[prompt]
    assert published(prompt)["input_ids"] == [START, *GOLDEN[prompt], END]


def test_special_tokens_in_a_prompt_are_tokens(published):
    """As in OpenAI's tokenizer and transformers'."""
    prompt = "a <|endoftext|> b <|startoftext|>"
    assert token_ids(prompt) == (320, END, 321, START)
    assert published(prompt)["input_ids"] == [START, *token_ids(prompt), END]


@pytest.mark.parametrize(
    "prompt, plain",
    [("“a cat”", '"a cat"'), ("salt &amp; pepper", "salt & pepper"), ("ﬁne", "fine")],
)
def test_typography_is_made_plain(prompt, plain):
    """As OpenAI's code does; transformers' tokenizer keeps curly quotes, HTML entities and ligatures, and gets other ids."""
    assert token_ids(prompt) == token_ids(plain)


@pytest.mark.parametrize(
    "build, pad, activation",
    [(clip_vit_l14, 49407, "quick_gelu"), (openclip_vit_h14, 0, "gelu")],
    ids=["sd1", "sd2"],
)
def test_padding(build, pad, activation):
    """SD 1.x repeats the end token, SD 2.x writes zeros. The shapes are the same either way, the pictures are not."""
    with torch.device("meta"):
        numbers = asdict(build().config)
    assert (numbers["pad"], numbers["activation"]) == (pad, activation)
    rows = tower(pad=numbers["pad"]).tokens(["a photo of a cat", ""]).tolist()
    assert rows == [
        [49406, 320, 1125, 539, 320, 2368, 49407] + [pad] * 70,
        [49406, 49407] + [pad] * 75,
    ]


def test_zero_padding_equals_open_clip():
    open_clip = pytest.importorskip("open_clip")
    assert torch.equal(tower(pad=0).tokens(list(GOLDEN)), open_clip.tokenize(list(GOLDEN)))


def test_padding_is_seen_by_those_who_read_all_vectors_only():
    """The causal mask keeps the padding away from the words, but a U-Net reads all 77 vectors."""
    sd1, sd2 = tower(), tower(pad=0)
    sd2.load_state_dict(sd1.state_dict())
    a, b = sd1.encode(["a cat"]), sd2.encode(["a cat"])
    assert (a - b)[:, :4].abs().max() < 1e-6 < 1e-2 < (a - b)[:, 4:].abs().max()


def test_long_prompts_are_cut_and_the_warning_names_what_fell_off():
    fits = " ".join(["apple"] * 75)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        whole = tower().tokens([fits])
    with pytest.warns(
        UserWarning, match='cut after 75 tokens; the model does not see: "red square"'
    ):
        cut = tower().tokens([fits + " red square"])
    assert (
        torch.equal(cut, whole)
        and cut.shape == (1, 77)
        and cut[0, 0] == START
        and cut[0, -1] == END
    )
    with pytest.warns(UserWarning, match="cut after 6 tokens"):  # in the middle of a character
        assert tower(context_length=8).tokens(["日本の猫 日本の猫"]).shape == (1, 8)


test_a_later_word_never_changes_an_earlier_vector = (
    checks.a_later_word_never_changes_an_earlier_vector
)


def test_null_is_the_empty_prompt():
    text = tower()
    assert torch.equal(text.null(3), text.encode(["", "", ""])) and text.null(3).shape == (
        3,
        77,
        16,
    )


def test_a_fresh_tower_is_a_bag_of_words():
    """Its blocks add nothing but constants yet: a vector depends on its own word and place only."""
    fresh = CLIPText(TextConfig(width=16, layers=2, heads=2, context_length=8)).double()
    a, b = fresh.encode(["red cat square", "dog cat ring"])
    assert torch.equal(a[2], b[2]) and (a - b)[[1, 3]].abs().amax(1).min() > 0.1


def test_words_only():
    """Words keep their vectors; start, end and padding are zero, and so is the null prompt."""
    text, words = tower(), tower(words_only=True)
    words.load_state_dict(text.state_dict())
    expected = text.encode(["a cat"])
    expected[:, 0], expected[:, 3:] = 0, 0
    assert torch.equal(words.encode(["a cat"]), expected)
    assert not words.null(1).any()


def test_gradients_reach_every_parameter():
    text = tower(context_length=8).double()
    text.encode(["a cat", "red square"]).pow(3).sum().backward()
    unreached = [
        name
        for name, p in text.named_parameters()
        if p.grad is None or not p.grad.abs().max() > 1e-9
    ]
    assert unreached == [
        f"blocks.{i}.attention.k.bias" for i in range(2)
    ]  # adds the same to all of a query's scores: softmax does not see it


def test_quick_gelu_formula():
    x = torch.linspace(-5, 5, 11, dtype=torch.float64)
    torch.testing.assert_close(quick_gelu(x), x / (1 + torch.exp(-1.702 * x)), rtol=1e-14, atol=0)


def test_class_labels():
    labels = ClassLabels(LabelsConfig(["cat", "dog"], dim=5))
    context = labels.encode(["dog", "cat", "dog", ""])
    assert context.shape == (4, 1, 5) and torch.equal(context[0], context[2])
    assert torch.equal(context[:, 0], labels.embedding.weight[[1, 0, 1, 2]])
    assert torch.equal(labels.null(2), labels.encode(["", ""]))
    with pytest.raises(UserError, match='no class "bird"; it knows cat, dog'):
        labels.encode(["cat", "bird"])


def test_unconditional():
    nothing = Unconditional()
    assert nothing.encode(["", ""]) is None and nothing.null(2) is None and nothing.dim is None
