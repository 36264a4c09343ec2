"""DreamBooth and textual inversion: class pictures that are never stale, prompts that are wondered at, one vector trained, bad input."""

import json
import shutil
import warnings
from dataclasses import replace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from minidiff import load
from minidiff.checkpoints import embedding
from minidiff.checkpoints import lora as lora_files
from minidiff.data.folder import CaptionedImages, load_image
from minidiff.data.latents import fingerprint
from minidiff.data.world import World
from minidiff.errors import UserError
from minidiff.exercises import checks
from minidiff.figures.plots import save_png
from minidiff.finetuning import dreambooth
from minidiff.finetuning.groups import Group
from minidiff.finetuning.loop import finetune
from minidiff.finetuning.recorder.recorder import Recorder
from minidiff.methods import inversion
from minidiff.options.finetuning import DreamBoothConfig, FineTuneConfig, LoRAConfig
from minidiff.text import CLIPText, TextConfig

UNMOVED = DreamBoothConfig(prompt="a sks circle", prior=0.0, shift=0.0)
WORDS = ("--prompt", "a sks circle", "--class-prompt", "a {red|blue} circle")


@pytest.fixture(scope="module")
def box():
    return load()


@pytest.fixture
def subject(tmp_path):
    """Three pictures of a ring."""
    folder = tmp_path / "subject"
    pictures, _, _ = World(32, shapes=("ring",), colours=("purple",)).batch(3, 0, objects=1)
    for k, picture in enumerate(pictures):
        save_png(picture, folder / f"{k}.png")
    return folder


def test_templates_are_filled_by_the_seed():
    templates = ["a {red|blue} dog", "a cat{| in the {snow}"]
    prompts = dreambooth.expand(["a {red|blue} dog", "a cat"], 40, 0)
    assert set(prompts[::2]) == {"a red dog", "a blue dog"} and set(prompts[1::2]) == {"a cat"}
    assert (
        prompts
        == dreambooth.expand(["a {red|blue} dog", "a cat"], 40, 0)
        != dreambooth.expand(["a {red|blue} dog", "a cat"], 40, 1)
    )
    assert dreambooth.expand(templates, 2, 0)[1] == "a cat{| in the {snow}".replace(
        "{snow}", "snow"
    )


def test_class_pictures_are_drawn_once_and_never_served_stale(box, tmp_path):
    drawn = []
    handle = box.unet.register_forward_hook(lambda *_: drawn.append(1))

    def ask(prompts=("a red circle",) * 9, **how):
        drawn.clear()
        found = dreambooth.class_pictures(box, list(prompts), tmp_path, **({"steps": 1} | how))
        return found, sum(drawn)  # one step with guidance is one call of the U-Net for each batch

    try:
        found, calls = ask()
        assert calls == 2 and len(found) == 9 and found.captions == ["a red circle"] * 9
        before = {path: path.read_bytes() for path in found.paths}
        assert ask()[1] == 0
        assert ask(seed=1)[1] == 2 and found.paths[0].read_bytes() != before[found.paths[0]]
        assert ask(guidance=3.0)[1] == 2 and ask(steps=2)[1] == 4
        assert (
            ask()[1] == 2 and {path: path.read_bytes() for path in found.paths} == before
        )  # the same bytes from the same settings
        found.paths[8].write_bytes(
            found.paths[8].read_bytes()[:100]
        )  # damaged: its batch of one is drawn again
        assert ask()[1] == 1 and found.paths[8].read_bytes() == before[found.paths[8]]
        shutil.copy(found.paths[8], found.paths[0])  # another picture of ours in its place
        assert ask()[1] == 1 and found.paths[0].read_bytes() == before[found.paths[0]]
        assert ask(("a red circle",) * 8 + ("a blue circle",))[1] == 1
        weight = box.unet.conv_out.bias
        kept = weight.data.clone()
        weight.data += 1e-3
        assert ask()[1] == 2  # another model
        weight.data = kept
        assert len(ask(("a red circle",) * 3)[0]) == 3 and len(list(tmp_path.glob("*.png"))) == 3
    finally:
        handle.remove()


def test_class_pictures_carry_their_prompt_and_none_is_refused(box, tmp_path):
    found = dreambooth.class_pictures(box, ["a red circle"], tmp_path, steps=1)
    assert Image.open(found.paths[0]).info["prompt"] == "a red circle"
    with pytest.raises(UserError, match="no class pictures"):
        dreambooth.class_pictures(box, [], tmp_path)


@pytest.mark.parametrize(
    "prompt, class_prompt, words, warned",
    [
        ("a photo of sks dog", "a photo of a dog", ["sks"], None),
        ("a sks circle", "a {red|blue} circle on {white|black}", ["sks"], None),
        ("a photo of a dog", "a photo of a dog", [], "add a rare token"),
        ("a photo of happy dog", "a photo of a dog", ["happy"], "an everyday word"),
    ],
)
def test_prompts_are_wondered_at(prompt, class_prompt, words, warned):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert dreambooth.check_prompts([prompt], [class_prompt]) == words
    assert [warned in str(each.message) for each in caught] == ([True] if warned else [])


@pytest.mark.parametrize(
    "prompt, complaint",
    [
        ("a <cat-toy> on a table", '"cat-toy" is 3 tokens'),
        ("a photo of [V] dog", 'the word "V" is an everyday one'),
        ("a photo of happy dog", 'the word "happy" is an everyday one'),
        ("a photo of zwx dog", "is 2 tokens"),
    ],
)
def test_a_word_that_others_need_is_not_trained(prompt, complaint):
    """Not a part of a placeholder, nor a word with a meaning of its own."""
    with pytest.raises(UserError, match=complaint):
        words = dreambooth.rare_words(prompt, ["a photo of a dog on a table"])
        dreambooth.word_to_train(words, prompt)


def test_a_placeholder_is_the_word_that_is_trained():
    for prompt in ("a <sks> dog", "a photo of [sks] dog", "a sks dog"):
        assert dreambooth.word_to_train(["sks"], prompt) == "sks"


def test_captions_of_the_folder_are_taken(subject):
    lines = [{"file_name": f"{k}.png", "text": f"a sks circle, {k}"} for k in range(3)]
    (subject / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.warns(UserWarning, match="instead of the prompt"):
        data = dreambooth.subject_pictures(subject, "a sks")
    assert data.captions == [line["text"] for line in lines]


def test_pictures_move_by_no_more_than_they_may_and_keep_their_edge():
    picture = torch.arange(36.0).view(1, 6, 6).expand(3, -1, -1)
    seen = {
        tuple(dreambooth.moved(picture, 1, torch.Generator().manual_seed(seed))[0, 2].tolist())
        for seed in range(60)
    }
    rows = {6 * row + shift for row in (1, 2, 3) for shift in (-1, 0, 1)}
    assert len(seen) == 9 and {row[2] - 2 for row in seen} == rows
    assert all(row[1] - row[0] in (0, 1) and row[5] - row[4] in (0, 1) for row in seen)


def test_one_vector_is_trained_and_nothing_else(box, subject, tmp_path):
    model = load()
    paths = sorted(subject.glob("*.png"))
    examples = dreambooth.subject_examples(
        model, CaptionedImages(paths, ["a sks circle"] * 3), UNMOVED, tmp_path / "cache"
    )
    before, token = fingerprint(model.unet), inversion.token_of("sks")
    how = dict(method="inversion", word="sks", steps=3, lr=1e-2, batch=2, dropout=0.0)
    finetune(model, [Group("subject", examples)], tmp_path / "out", FineTuneConfig(**how))
    file = tmp_path / "out" / "embedding.safetensors"
    tensors = load_file(file)
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {"<sks>": (1, 64)}
    changed = (
        (model.text.token_embedding.weight != box.text.token_embedding.weight)
        .any(1)
        .nonzero()
        .flatten()
        .tolist()
    )
    assert changed == [token] and fingerprint(model.unet) == before
    assert torch.equal(model.text.token_embedding.weight[token], tensors["<sks>"][0])

    fresh = load()
    assert embedding.load(fresh.text, file) == "sks"
    assert torch.equal(fresh.text.encode(["a sks circle"]), model.text.encode(["a sks circle"]))
    assert embedding.load(fresh.text, file, "ohwx") == "ohwx"
    assert torch.equal(
        fresh.text.token_embedding.weight[inversion.token_of("ohwx")], tensors["<sks>"][0]
    )


test_the_trained_vector_is_what_the_text_encoder_reads = pytest.mark.equation("textual-2")(
    checks.the_trained_vector_is_what_the_text_encoder_reads
)


@pytest.mark.parametrize(
    "method, written",
    [("full", ["model"]), ("lora", ["lora.safetensors", "embedding.safetensors"])],
)
def test_a_word_is_learnt_beside_the_network_and_its_files_draw_the_same(
    method, written, box, subject, tmp_path
):
    """What is written, loaded into the model as it was, is the model that was trained; and of the text encoder only the word has changed."""
    model, paths, token = load(), sorted(subject.glob("*.png")), inversion.token_of("sks")
    examples = dreambooth.subject_examples(
        model, CaptionedImages(paths, ["a sks circle"] * 3), UNMOVED, tmp_path / "cache"
    )
    out = tmp_path / "out"
    finetune(
        model,
        [Group("subject", examples)],
        out,
        FineTuneConfig(
            method=method,
            word="sks",
            word_lr=1e-2,
            steps=3,
            lr=1e-4,
            batch=2,
            lora=LoRAConfig(rank=1),
            ema=0.9,
        ),
    )
    assert all((out / name).exists() for name in written) and len(
        list(out.glob("*.safetensors"))
    ) == len(written) - (method == "full")
    rows = (
        (model.text.token_embedding.weight != box.text.token_embedding.weight)
        .any(1)
        .nonzero()
        .flatten()
        .tolist()
    )
    assert rows == [token]
    before = box.text.state_dict()
    assert all(
        torch.equal(value, before[name])
        for name, value in model.text.state_dict().items()
        if "token_embedding" not in name
    )
    if method == "full":
        fresh = load(out / "model")
    else:
        fresh = load()
        lora_files.load(fresh, out / "lora.safetensors")
        embedding.load(fresh.text, out / "embedding.safetensors")
    x, t = torch.randn(1, 4, 16, 16), torch.tensor([500])
    said = [each.denoiser(x, t, each.text.encode(["a sks circle"])).x0 for each in (fresh, model)]
    assert torch.allclose(*said, atol=1e-6) and not torch.allclose(
        said[0], box.denoiser(x, t, box.text.encode(["a sks circle"])).x0, atol=1e-4
    )


@pytest.mark.parametrize("method", ["lora", "inversion"])
def test_a_word_is_resumed_bit_for_bit(method, subject, tmp_path):
    def run(out, steps_before_death=None):
        model = load()
        examples = dreambooth.subject_examples(
            model,
            CaptionedImages(sorted(subject.glob("*.png")), ["a sks circle"] * 3),
            UNMOVED,
            tmp_path / "cache",
        )
        config = FineTuneConfig(
            method=method,
            word="sks",
            steps=6,
            lr=1e-3,
            word_lr=1e-2,
            batch=2,
            lora=LoRAConfig(rank=1),
            every=2,
        )
        resume = (out / "training").exists()
        if steps_before_death is None:
            return finetune(model, [Group("subject", examples)], out, config, resume=resume)
        with pytest.raises(KeyError, match="died"):
            finetune(
                model,
                [Group("subject", examples)],
                out,
                config,
                Dying(steps_before_death),
                resume,
            )

    class Dying(Recorder):
        def __init__(self, at):  # it records nothing
            self.at, self.records = at, []

        def due(self, step):
            return step % 2 == 0

        def measure(self, step, losses, lr=None):
            if step == self.at:
                raise KeyError("died")

    run(tmp_path / "once")
    run(tmp_path / "twice", 4)
    run(tmp_path / "twice")
    for file in sorted((tmp_path / "once").glob("*.safetensors")):
        again = load_file(tmp_path / "twice" / file.name)
        assert all(torch.equal(value, again[name]) for name, value in load_file(file).items())


def test_files_that_are_no_word_are_refused(tmp_path):
    text = CLIPText(TextConfig(8, 1, 1))
    for tensors, said in (
        ({"<sks>": torch.zeros(1, 9)}, "vectors of width 9; this text encoder takes 8"),
        ({"<sks>": torch.zeros(2, 768)}, "takes 8. It is for Stable Diffusion 1.x"),
        ({"<sks>": torch.zeros(2, 3, 8)}, "and no vectors"),
        ({"<sks>": torch.full((1, 8), torch.nan)}, "not finite"),
        ({"clip_l": torch.zeros(1, 8), "clip_g": torch.zeros(1, 8)}, "for Stable Diffusion XL"),
        ({"<>": torch.zeros(1, 8)}, "names no word"),
        ({"<sks>": torch.zeros(1, 8), "b": torch.zeros(1)}, "a textual inversion has one"),
    ):
        save_file(tensors, tmp_path / "a.safetensors")
        with pytest.raises(UserError, match=said):
            embedding.load(text, tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    "method, written",
    [("full", "model"), ("lora", "embedding.safetensors"), ("inversion", "embedding.safetensors")],
)
def test_the_verb(method, written, subject, tmp_path, ran):
    out = tmp_path / "out"
    few = ("--class-pictures", 2, "--steps", 2, "--batch", 2, "--rank", 1)
    said = ran(
        "dreambooth", "--subject", subject, *WORDS, *few, "--method", method, "--out", out
    ).out
    assert (out / written).exists() and (out / "report.html").exists() and "draw with it" in said
    log = [json.loads(line) for line in (out / "record.jsonl").read_text().splitlines()]
    assert set(log[-1]["losses"]) == (
        {"subject"} if method == "inversion" else {"subject", "class"}
    )  # both losses are shown
    if method == "inversion":
        drawn = ran(
            "generate",
            "a sks circle",
            "--embedding",
            out / written,
            "--steps",
            1,
            "--out",
            tmp_path / "drawn",
        ).out
        assert 'the word is "sks"' in drawn


def test_options_that_fit(subject, tmp_path, ran):
    """Two groups and the word count; the method that is given stays."""
    few = ("--class-pictures", 2, "--steps", 1, "--batch", 2, "--rank", 1, "--no-recorder")
    verb = ("dreambooth", "--subject", subject, *WORDS, *few, "--method", "lora", "--dtype", "fp32")
    said = ran(*verb, "--fit", "auto", "--out", tmp_path / "out").out
    assert "fit: " in said and "peak: about" in said and "method" not in said.split("peak:")[0]
    settings = json.loads((tmp_path / "out" / "run.json").read_text())["settings"]
    assert settings["fit"] == {"checkpointing": False, "pieces": None, "background": True}


def test_your_own_class_images_mirrored_at_another_size(subject, tmp_path, ran):
    classes = tmp_path / "classes"
    shutil.copytree(subject, classes)
    few = ("--steps", 1, "--batch", 2, "--rank", 1, "--alpha", 2, "--accumulate", 2, "--min-snr")
    sizes = ("--size", 16, "--flip", "--shift", 0, "--no-recorder")
    said = ran(
        *("dreambooth", "--subject", subject, *WORDS, *few, *sizes, "--method", "lora"),
        *("--class-dir", classes, "--out", tmp_path / "out"),
    ).out
    assert "6 of the subject, 3 of the class to learn from" in said
    assert 'the word whose vector is trained: "sks"' in said
    settings = json.loads((tmp_path / "out" / "run.json").read_text())["settings"]
    assert (settings["alpha"], settings["accumulate"], settings["min_snr"]) == (2.0, 2, True)


def test_recipes_are_filled_in_where_nothing_is_chosen(box):
    config = DreamBoothConfig(prompt="a sks dog", class_prompt=("a dog",), steps=7)
    recipe = dreambooth.recipe(box, "full")
    config = dreambooth.completed(config, recipe)
    assert (config.steps, config.lr, config.text) == (7, recipe.lr, "word")
    tuning = dreambooth.finetune_config(config, recipe, "sks")
    assert (tuning.steps, tuning.word_lr, tuning.t_mean) == (7, recipe.word_lr, recipe.t_mean)
    chosen = dreambooth.completed(replace(UNMOVED, text="no"), recipe)
    assert (chosen.text, chosen.prior, chosen.shift) == ("no", 0.0, 0.0)


def test_pictures_of_a_real_subject_are_read(real_data, tmp_path, ran):
    for name, n in (("cat2", 5), ("berry_bowl", 6)):
        data = dreambooth.subject_pictures(real_data / "dreambooth" / name, "a photo of sks thing")
        assert len(data) == n and dreambooth.subject_examples(
            load(), data, replace(UNMOVED, shift=0.1), tmp_path
        )[0].latents.shape == (4, 16, 16)
    few = (
        "--class-pictures",
        2,
        "--steps",
        2,
        "--batch",
        1,
        "--prompt",
        "a photo of sks dog",
        "--class-prompt",
        "a photo of a dog",
    )
    assert (
        "report.html"
        in ran(
            "dreambooth",
            "--subject",
            real_data / "dreambooth" / "dog6",
            *few,
            "--out",
            tmp_path / "dog6",
        ).out
    )


def test_bad_input_is_one_line(subject, tmp_path, refused):
    def refuse(*more, words=WORDS, folder=subject):
        return refused("dreambooth", "--subject", folder, *words, *more, "--out", tmp_path / "out")

    empty = tmp_path / "empty"
    empty.mkdir()
    assert "the folder is empty" in refuse(folder=empty)
    (empty / "notes.txt").write_text("nothing")
    assert "no pictures in it" in refuse(folder=empty)
    assert "this is a file" in refuse(folder=subject / "0.png")
    assert "prior preservation needs" in refuse(words=WORDS[:2])
    assert "preserves nothing" in refuse("--class-pictures", 0)
    assert "--prior is -1" in refuse("--prior", -1)
    assert 'no method "dora"' in refuse("--method", "dora")
    assert "--shift is 2" in refuse("--shift", 2)
    assert 'no text "maybe"; there is auto, yes, no, word' in refuse("--text", "maybe")
    assert "--prompt is empty" in refuse(words=("--prompt", " ", "--class-prompt", "a dog"))
    assert "is 2 tokens" in refuse(
        "--method", "inversion", words=("--prompt", "zwx", "--class-prompt", "a dog")
    )
    assert not (tmp_path / "out").exists()


def test_folders_that_are_odd_are_warned_of(subject, tmp_path):
    with pytest.warns(UserWarning, match="one picture"):
        one = tmp_path / "one"
        one.mkdir()
        shutil.copy(subject / "0.png", one)
        dreambooth.subject_pictures(one, "a sks")
    for k in range(31):
        shutil.copy(subject / "0.png", one / f"{k}.png")
    with pytest.warns(UserWarning, match="a subject needs 3 to 6"):
        assert load_image(dreambooth.subject_pictures(one, "a sks").paths[0]).shape == (3, 32, 32)


def test_text_files_of_the_subject_are_its_captions(subject):
    """They were passed over without a word."""
    for k in range(3):
        (subject / f"{k}.txt").write_text(f"a sks circle, {k}")
    with pytest.warns(UserWarning, match="the captions of its text files are used instead of the"):
        data = dreambooth.subject_pictures(subject, "a sks")
    assert data.captions == [f"a sks circle, {k}" for k in range(3)]


def test_pictures_that_are_not_read_are_named(subject):
    (subject / "a.psd").write_bytes(b"x")
    shutil.copy(subject / "0.png", subject / "3.jfif")
    with pytest.warns(UserWarning, match=r"1 pictures \(a.psd\) are not read; save them as PNG"):
        assert len(dreambooth.subject_pictures(subject, "a sks")) == 4
