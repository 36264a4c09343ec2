"""SDXL learns: what its network is told of each picture, full fine-tunes, LoRAs of both text encoders, words with a vector in each, all through the command line."""

import json
import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from minidiff import load
from minidiff.checkpoints import embedding
from minidiff.condition import Condition
from minidiff.data import buckets, latents
from minidiff.data.folder import CaptionedFolder
from minidiff.errors import UserError
from minidiff.finetuning import dreambooth, estimate, groups
from minidiff.finetuning.groups import Group, GroupLoss, batches, encoded
from minidiff.finetuning.recorder.recorder import Recorder
from minidiff.finetuning.run import fingerprint
from minidiff.methods import inversion
from minidiff.options.finetuning import FineTuneConfig, RecorderConfig
from tests.test_sdxl import recorded, sdxl

SIZES = [(40, 20), (16, 48), (32, 32)]  # width and height; width first is another set


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Captioned pictures, wide and tall, and a model of 16 pixels."""
    place = tmp_path_factory.mktemp("data")
    for k, size in enumerate(SIZES):
        Image.effect_noise(size, 50 + k).convert("RGB").save(place / f"{k}.png")
    rows = [json.dumps({"file_name": f"{k}.png", "text": f"a picture of {k}"}) for k in range(3)]
    (place / "metadata.jsonl").write_text("\n".join(rows), encoding="utf-8")
    sdxl().save(place / "model")
    return place


def told(model, examples):
    """The numbers that the network gets of these examples."""
    conditions = recorded(model)
    batch = next(batches([Group("data", examples)], model.schedule, len(examples), 0.5, 0, 0))
    GroupLoss(model)(batch)
    return sorted(conditions[-1].numbers.tolist())


SQUARES = [[20, 40, 0, 8, 16, 16], [32, 32, 0, 0, 16, 16], [48, 16, 16, 0, 16, 16]]


def test_each_picture_s_true_size_and_cut_reach_the_network(folder, tmp_path):
    model, data = load(folder / "model"), CaptionedFolder(folder)
    for _ in range(2):  # computed, then from the cache, mirrored or not
        examples = encoded(model, data, 16, tmp_path, flip=True)
        assert told(model, examples[:3]) == told(model, examples[3:]) == SQUARES
    shapes = encoded(model, data, 16, None, shapes=True)
    for example, (width, height) in zip(shapes, SIZES, strict=True):
        cut = tuple(2 * side for side in example.latents.shape[1:])
        assert example.numbers == (height, width, *buckets.corner(width, height, cut), *cut)
    assert len({example.numbers[4:] for example in shapes}) == 3


def widths_first(config, names, size, is_null=False):
    (height, width), (top, left) = config.original_size or size, config.crop or (0, 0)
    return [float(side) for side in (width, height, left, top, size.width, size.height)]


def forgotten(context, numbers):
    return context


@pytest.mark.parametrize(
    "place, trap", [(groups.SampleConfig, ("numbers", widths_first)), (groups, ("with_numbers", forgotten))]
)  # fmt: skip
def test_the_traps(folder, monkeypatch, place, trap):
    """Width first, and numbers that are forgotten, load and train without complaint."""
    model = load(folder / "model")
    monkeypatch.setattr(place, *trap)
    assert told(model, encoded(model, CaptionedFolder(folder), 16, None)) != SQUARES


def test_a_cache_from_before_is_used(folder, tmp_path):
    """Sizes and cuts follow from the pictures, so that a cache has and needs none of them."""
    model, data = load(folder / "model"), CaptionedFolder(folder)
    latents.encode_images(model.vae, data.paths, [(16, 16)] * 3, tmp_path)
    before = (tmp_path / "latents.safetensors").stat().st_mtime_ns
    assert told(model, encoded(model, data, 16, tmp_path)) == SQUARES
    assert (tmp_path / "latents.safetensors").stat().st_mtime_ns == before


def test_a_condition_is_cached_whole(tmp_path):
    text = sdxl().text
    computed = latents.encode_captions(text, ["a cat"], tmp_path)
    stored = (tmp_path / "contexts.safetensors").stat().st_mtime_ns
    again = latents.encode_captions(text, ["a cat"], tmp_path)
    assert (tmp_path / "contexts.safetensors").stat().st_mtime_ns == stored
    expected = text.encode(["a cat"])
    for each in (computed["a cat"], again["a cat"]):
        assert isinstance(each, Condition)
        for name in ("context", "pooled", "numbers"):
            assert torch.equal(getattr(each, name), getattr(expected, name)[0])
    assert not again[""].pooled.any()


def test_other_numbers_are_other_data(folder):
    example, *_ = encoded(load(folder / "model"), CaptionedFolder(folder), 16, None)
    other = example._replace(numbers=(1.0, *example.numbers[1:]))
    assert fingerprint(example) != fingerprint(other)
    assert fingerprint(example._replace(numbers=())) != fingerprint(example)


def test_the_recorder_tells_the_numbers(folder, tmp_path):
    model = load(folder / "model")
    examples = encoded(model, CaptionedFolder(folder), 16, None)
    images, config = torch.zeros(2, 3, 16, 16), RecorderConfig(n=2, steps=1, noises=1)
    recorder = Recorder(model, tmp_path, {"a": "a cat"}, images, examples[:1], examples, config)
    conditions = recorded(model)
    recorder.measure(0, {})
    rows = {tuple(row) for c in conditions for row in c.numbers.tolist()}
    assert rows == {examples[0].numbers, (16.0, 16.0, 0.0, 0.0, 16.0, 16.0)}


def test_pictures_moved_about_keep_their_size(folder):
    model, data = load(folder / "model"), CaptionedFolder(folder)
    examples = dreambooth.moved_about(model, data, 0.1, 0, 16)
    assert sorted({e.numbers for e in examples}) == [tuple(row) for row in SQUARES]


# Words.


@torch.no_grad()
def test_a_word_has_a_vector_in_each_encoder(tmp_path):
    text = sdxl(empty="encoded").text
    before, word = text.encode(["a sks", "a dog"]), inversion.Word(text, "sks", like="cat")
    start = [each.token_embedding.weight[inversion.token_of("cat")] for each in (text.clip_l, text.clip_g)]  # fmt: skip
    assert torch.equal(word.vector, torch.cat(start))
    hooks = word.attach(text)
    word.change += torch.randn_like(word.change)
    attached = text.encode(["a sks", "a dog"])
    for hook in hooks:
        hook.remove()
    assert torch.equal(text.encode(["a sks"]).context[0], before.context[0])
    for part in (slice(0, 8), slice(8, 24)):
        assert not torch.allclose(attached.context[0, :, part], before.context[0, :, part])
    assert torch.equal(attached.context[1], before.context[1])
    assert not torch.allclose(attached.pooled[0], before.pooled[0])

    file = embedding.save("sks", word.vector, tmp_path / "any.safetensors", word.widths)
    state = load_file(file)
    assert {n: tuple(v.shape) for n, v in state.items()} == {"clip_l": (1, 8), "clip_g": (1, 16)}
    assert embedding.load(text, file) == "sks"
    assert torch.equal(text.encode(["a sks"]).context[0], attached.context[0])


@torch.no_grad()
def test_new_words_of_several_vectors_and_their_model(tmp_path):
    """A file of another program: its word is its name. The model is saved with the words."""
    from safetensors.torch import save_file

    vectors = {"clip_g": torch.randn(2, 16), "clip_l": torch.randn(2, 8)}
    save_file(vectors, tmp_path / "my-style.safetensors")
    model = sdxl()
    assert embedding.load(model.text, tmp_path / "my-style.safetensors") == "my-style"
    for each, name in ((model.text.clip_l, "clip_l"), (model.text.clip_g, "clip_g")):
        assert torch.equal(each.token_embedding.weight[-2:], vectors[name])
        assert each.ids("my-style") == (49408, 49409)
    again = load(model.save(tmp_path / "model"))
    drawn, kept = (each.text.encode(["in my-style"]) for each in (model, again))
    for name in ("context", "pooled"):  # of maps of a file, which may have other last bits
        torch.testing.assert_close(getattr(drawn, name), getattr(kept, name))
    save_file({"clip_g": torch.ones(2, 16), "clip_l": torch.ones(1, 8)}, tmp_path / "b.safetensors")
    save_file({"<sks>": torch.ones(1, 768)}, tmp_path / "sd1.safetensors")
    for name, complaint in (
        ("b", "1 and 2 vectors of one word"),
        ("sd1", "width 768; .* takes 8 and 16. It is for Stable Diffusion 1.x"),
    ):
        with pytest.raises(UserError, match=complaint):
            embedding.load(model.text, tmp_path / f"{name}.safetensors")


# The command line.


FEW = ("--steps", 2, "--every", 2, "--batch", 2, "--validation", 0, "--no-recorder")


def finetuned(ran, folder, out, *options):
    data = ("--model", folder / "model", "--data", folder, "--out", out)
    return ran("finetune", *data, *FEW, *options).out


def drawn(ran, folder, out, *options):
    ran("generate", "a sks 1", "--steps", 2, "--seed", 3, "--out", out, *options)
    return Image.open(next(out.glob("000-*.png"))).tobytes()


def test_full(folder, tmp_path, ran):
    said = finetuned(ran, folder, tmp_path / "out", "--text", "--buckets", "--lr", 1e-2)
    assert "memory: about" in said
    before, after = load(folder / "model"), load(tmp_path / "out" / "model")
    for part in ("unet.add.0", "unet.encoder.1.attention.0", "text.clip_l.blocks.0", "text.clip_g"):
        weights = zip(*(m.get_submodule(part.replace("unet", "denoiser.network")).parameters() for m in (before, after)), strict=True)  # fmt: skip
        assert any(not torch.equal(a, b) for a, b in weights), part
    assert not torch.equal(  # the pooled vector's own, which SD 1 and 2 lack
        before.text.clip_g.projection.weight, after.text.clip_g.projection.weight
    )


def test_lora_of_all_three_networks(folder, tmp_path, ran):
    options = ("--method", "lora", "--rank", 2, "--lr", 0.1, "--text")
    said = finetuned(ran, folder, tmp_path / "out", *options)
    file = tmp_path / "out" / "lora.safetensors"
    prefixes = {".".join(name.split(".")[:2]) for name in load_file(file)}
    assert prefixes >= {"text_encoder.text_model", "text_encoder_2.text_model", "unet.mid_block"}
    assert f"--lora {file}" in said
    model = ("--model", folder / "model")
    with_it = drawn(ran, folder, tmp_path / "a", *model, "--lora", file)
    assert with_it != drawn(ran, folder, tmp_path / "b", *model)
    ran("convert", folder / "model", tmp_path / "one", "--to", "minidiff", "--lora", file)
    assert with_it == drawn(ran, folder, tmp_path / "c", "--model", tmp_path / "one")


def test_inversion(folder, tmp_path, ran):
    options = ("--method", "inversion", "--word", "sks", "--like", "dog", "--lr", 1.0)
    finetuned(ran, folder, tmp_path / "out", *options)  # no caption has the word: nothing moves
    data = tmp_path / "data"
    shutil.copytree(folder, data)
    rows = (data / "metadata.jsonl").read_text(encoding="utf-8").replace("a picture", "a sks")
    (data / "metadata.jsonl").write_text(rows, encoding="utf-8")
    said = finetuned(ran, data, tmp_path / "out2", *options, "--dropout", 0)
    state = load_file(tmp_path / "out2" / "embedding.safetensors")
    unmoved = load_file(tmp_path / "out" / "embedding.safetensors")
    assert state.keys() == {"clip_l", "clip_g"}
    assert all((state[name] - unmoved[name]).abs().max() > 0.01 for name in state)
    assert 'the word whose vector is trained: "sks"' in said
    model = ("--model", folder / "model")
    file = ("--embedding", tmp_path / "out2" / "embedding.safetensors")
    assert drawn(ran, folder, tmp_path / "a", *model, *file) != drawn(ran, folder, tmp_path / "b", *model)  # fmt: skip


def test_dreambooth_with_prior_preservation(folder, tmp_path, ran):
    """A LoRA of the U-Net with the word's vectors, recorded; then everything, with the class."""
    words = ("--prompt", "a photo of sks dog", "--class-prompt", "a photo of a dog")
    subject = tmp_path / "subject"
    subject.mkdir()
    for k, _ in enumerate(SIZES):
        shutil.copy(folder / f"{k}.png", subject)
    few = ("--class-pictures", 2, "--steps", 2, "--batch", 2, "--shift", 0)
    verb = ("dreambooth", "--model", folder / "model", "--subject", subject, *words, *few)
    out = tmp_path / "lora"
    said = ran(*verb, "--method", "lora", "--rank", 1, "--text", "word", "--out", out).out
    assert "3 of the subject, 2 of the class to learn from" in said
    assert load_file(out / "embedding.safetensors").keys() == {"clip_l", "clip_g"}
    log = [json.loads(line) for line in (out / "record.jsonl").read_text().splitlines()]
    assert set(log[-1]["losses"]) == {"subject", "class"}
    out = tmp_path / "full"
    ran(*verb, "--text", "yes", "--no-recorder", "--out", out)
    assert (out / "model" / "model.json").exists() and (out / "class" / "0001.png").exists()


def test_the_estimate_is_of_everything(folder):
    """Also with the text encoders; and their checkpointing is theirs."""
    model = load(folder / "model")
    config = FineTuneConfig(method="lora", text=True, batch=2)
    asked = estimate.settings(config, model, (16, 16))
    both = estimate.estimate(model, asked)
    assert both.trained > estimate.estimate(model, asked._replace(text=False)).trained
    word = estimate.estimate(model, asked._replace(text=False, rank=0, word=True))
    assert word.trained == 24
    less = estimate.estimate(model, asked._replace(checkpointing=True))
    assert less.step < both.step


def test_buckets_and_corner_agree_with_what_is_cut(tmp_path):
    """By the picture that is loaded: columns of greys, which begin at the corner's left."""
    picture = Image.new("L", (200, 100))
    picture.putdata([x for _ in range(100) for x in range(200)])
    picture.save(tmp_path / "a.png")
    from minidiff.data.folder import load_image

    assert buckets.corner(200, 100, (100, 100)) == (0, 50)
    assert load_image(tmp_path / "a.png", (100, 100))[0, 0, 0] == 50
    assert buckets.corner(100, 200, (50, 50)) == (25, 0)
    assert buckets.corner(100, 200, (50, 25)) == (0, 0)


def test_inspect_names_a_word_of_sdxl(ran, tmp_path):
    word = embedding.save("sks", torch.ones(2048), tmp_path / "a.safetensors", [768, 1280])
    said = ran("inspect", word).out
    assert all(each in said for each in ("a textual inversion", "1 x 768", "1 x 1280"))
    assert "Stable Diffusion XL" in said
