"""Text towers from open_clip and transformers, by name, file and folder; and the tokens of twenty prompts."""

import json

import pytest
import torch

from minidiff.checkpoints import write
from minidiff.checkpoints.load import part
from minidiff.errors import UserError
from minidiff.text import CLIPText, TextConfig

from .test_networks import gap, randomized

open_clip = pytest.importorskip("open_clip")
transformers = pytest.importorskip("transformers")
PROMPTS = ["a photo of a cat", ""]
LONG = "one two three four five six seven eight nine ten " * 9
GOLDEN = {  # without start, end and padding; both tokenizers agree on them below
    "a photo of a cat": [320, 1125, 539, 320, 2368],
    "A PHOTO of a Cat": [320, 1125, 539, 320, 2368],
    "": [],
}
OTHERS = [
    "!", "!!! wow !!!", "a  red   apple\n\ton a table", "a small blue circle above a large red square", "crème brûlée à la française",
    "Ünïcödé ÀÉÎÕÜ ñ ß", "苹果和梨", "日本の桜", "🍎🍏 two apples", "👩‍👩‍👧 a family", "it's the dog's bowl, isn't it?", "1234567890 3.14",
    "sks dog, <lora:x:0.8> (masterpiece:1.2)", "https://example.com/a?b=c&d=e", "don't; can't -- won't...", "émile & zoë's café", LONG,
]  # fmt: skip


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A tiny CLIP under a name of open_clip's, and its file."""
    folder = tmp_path_factory.mktemp("clip")
    vision = {"image_size": 16, "layers": 1, "width": 64, "patch_size": 8}
    words = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 2}
    (folder / "tiny-clip.json").write_text(
        json.dumps({"embed_dim": 32, "quick_gelu": True, "vision_cfg": vision, "text_cfg": words})
    )
    open_clip.add_model_config(folder / "tiny-clip.json")
    model = open_clip.create_model("tiny-clip")
    randomized(model, torch.float32)
    torch.save(model.state_dict(), folder / "tiny.pt")
    return model, folder / "tiny.pt"


@torch.no_grad()
def test_an_open_clip_tower_by_name_and_by_file(clip):
    model, file = clip
    for source in (f"tiny-clip:{file}", file):
        ours = part(source, "text")
        tokens = open_clip.tokenize(PROMPTS)
        ends = tokens.argmax(dim=1)
        pooled = ours(tokens)[torch.arange(2), ends] @ model.text_projection
        assert gap(pooled, model.encode_text(tokens)) < 1e-5


def test_open_clip_names_that_are_none(clip, monkeypatch):
    with pytest.raises(
        UserError, match=r'open_clip knows no model "ViT-Z"; SD 1.x reads ViT-L-14:openai'
    ):
        part("ViT-Z:openai", "text")
    with pytest.raises(
        UserError, match=r'open_clip has no weights "mine" of ViT-L-14; there is openai, '
    ):
        part("ViT-L-14:mine", "text")

    def offline(*_, **__):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(open_clip, "create_model", offline)
    with pytest.raises(
        UserError, match="ViT-L-14:openai cannot be had: ConnectionError: no route to host"
    ):
        part("ViT-L-14:openai", "text")


@torch.no_grad()
@pytest.mark.parametrize("whole", [False, True], ids=["CLIPTextModel", "CLIPModel"])
def test_a_folder_of_transformers(tmp_path, whole):
    how = {
        "hidden_size": 64,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "projection_dim": 32,
    }
    words = transformers.CLIPTextConfig(vocab_size=49408, hidden_act="gelu", **how)
    if whole:
        vision = transformers.CLIPVisionConfig(image_size=16, patch_size=8, **how)
        config = transformers.CLIPConfig(
            text_config=words.to_dict(), vision_config=vision.to_dict(), projection_dim=32
        )
        theirs = randomized(transformers.CLIPModel(config), torch.float32)
    else:
        theirs = randomized(transformers.CLIPTextModel(words), torch.float32)
    theirs.save_pretrained(tmp_path)
    ours = part(tmp_path, "text")
    tokens = ours.tokens(PROMPTS)
    tower = theirs.text_model if whole else theirs
    assert gap(ours(tokens), tower(input_ids=tokens).last_hidden_state) < 1e-5


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """transformers' own, on the vocabulary that we write: padded as SD 1.x and as SD 2.x."""
    found = {}
    for pad in (49407, 0):
        folder = tmp_path_factory.mktemp("tokenizer")
        for name, content in write.tokenizer_files(pad, 77).items():
            (folder / name).write_text(content, encoding="utf-8")
        found[pad] = transformers.CLIPTokenizer.from_pretrained(folder)
    return found


@pytest.mark.parametrize("pad", [49407, 0], ids=["SD 1", "SD 2"])
@pytest.mark.parametrize("prompt", [*GOLDEN, *OTHERS])
@pytest.mark.filterwarnings("ignore:prompt cut")
def test_token_ids(tokenizers, prompt, pad):
    ours = CLIPText(TextConfig(8, 1, 1, pad=pad)).tokens([prompt])[0].tolist()
    theirs = tokenizers[pad](prompt, padding="max_length", max_length=77, truncation=True).input_ids
    if (
        pad == 0 and "!" in prompt
    ):  # transformers takes "!" for padding wherever it stands; SD 2.x was trained with open_clip's tokens, as here
        assert ours != theirs
    else:
        assert ours == theirs
    if prompt in GOLDEN:
        words = GOLDEN[prompt]
        assert ours == [49406, *words, 49407] + [pad] * (75 - len(words))
    if pad == 0 and prompt != LONG:
        assert ours == open_clip.tokenize([prompt])[0].tolist()


def test_the_vocabulary_written_is_the_published_one(tokenizers):
    """49,408 entries in CLIP's order, and as many merges as the paper's vocabulary has beyond its bytes."""
    files = write.tokenizer_files(49407, 77)
    vocabulary = json.loads(files["vocab.json"])
    assert len(vocabulary) == 49408 and sorted(vocabulary.values()) == list(range(49408))
    assert (
        vocabulary["!"] == 0
        and vocabulary["cat</w>"] == 2368
        and vocabulary["<|endoftext|>"] == 49407
    )
    assert len(files["merges.txt"].splitlines()) == 1 + 49408 - 512 - 2
