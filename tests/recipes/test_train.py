"""Training from scratch: what is in a folder, what is written, that a stopped run resumes bit for
bit, and that what is wrong is one line."""

import json
import signal
import tarfile

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from minidiff import load
from minidiff.data.world import World
from minidiff.errors import UserError
from minidiff.figures.plots import save_png
from minidiff.options.training import TrainingConfig
from minidiff.recipes import images as folders
from minidiff.recipes import presets, stages
from minidiff.recipes.train import train_from_scratch
from tests.test_sdxl import sdxl

TINY = {"preset": "tiny", "steps": 4, "every": 2}


@pytest.fixture(scope="module")
def scenes():
    world = World(32)
    return world.batch(30, "train", objects=1)[:2]


@pytest.fixture(scope="module")
def captioned(scenes, tmp_path_factory):
    folder = tmp_path_factory.mktemp("captioned")
    lines = []
    for k, (image, caption) in enumerate(zip(*scenes, strict=True)):
        save_png(image, folder / f"{k}.png")
        lines.append(json.dumps({"file_name": f"{k}.png", "text": [caption, f"{caption}, again"]}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def classes(scenes, tmp_path_factory):
    folder = tmp_path_factory.mktemp("classes")
    for k, image in enumerate(scenes[0]):
        (folder / ("small_dog", "cat")[k % 2]).mkdir(exist_ok=True)
        save_png(image, folder / ("small_dog", "cat")[k % 2] / f"{k}.png")
    return folder


def stop_at(step, monkeypatch):
    """Ctrl-C while that step is looked at, in whichever stage comes first."""

    def follow(training, *_):
        for done in training:
            if done.step == step:
                signal.raise_signal(signal.SIGINT)
        return {"seconds": 0.0}

    monkeypatch.setattr(stages, "follow", follow)


def same(a, b):
    for part in ("unet", "text", "vae"):
        ours, theirs = (load_file(out / "model" / f"{part}.safetensors") for out in (a, b))
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)
    names = [path.relative_to(a) for path in [*a.glob("samples-*"), *a.rglob("log.jsonl")]]
    assert len(names) > 2
    for name in names:
        assert (a / name).read_bytes() == (b / name).read_bytes(), name


@pytest.mark.parametrize("space, kind", [("pixels", "captioned"), ("latents", "classes")])
def test_a_resumed_run_ends_where_an_uninterrupted_one_does(
    space, kind, request, tmp_path, monkeypatch
):
    data, config = request.getfixturevalue(kind), TrainingConfig(space=space, **TINY, flip=True)
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    results = train_from_scratch(data, whole, config)
    for step in (1, 3):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            stop_at(step, patch)
            train_from_scratch(data, halves, config, resume=step > 1)
    train_from_scratch(data, halves, config, resume=True)
    same(whole, halves)
    assert {path.name for path in whole.glob("samples-*")} == {
        "samples-000002.png",
        "samples-000004.png",
    }
    written = json.loads((whole / "results.json").read_text())
    assert written == {"about": "made with minidiff", **results}
    assert results["images"], results["held_out"] == (27, 3)
    assert results["error_training"] > 0 and results["error_held_out"] > 0
    assert results["vae_steps"] == (2 if space == "latents" else None)
    assert (whole / "vae.png").exists() == (space == "latents")
    load(whole / "model").sample(results["prompts"][:1], steps=1)
    with pytest.raises(UserError, match="`resume` it"):
        train_from_scratch(data, whole, config)


def test_the_command_and_what_opens_its_model(captioned, classes, ran, tmp_path, capsys):
    small = ["--preset", "tiny", "--device", "cpu"]
    said = ran("train", captioned, *small, "--minutes", "0.01", "--out", tmp_path)
    assert "27 images to train on, 3 held out, with captions; 32x32" in said.err
    assert "about " in said.err and "minutes: " in said.err
    model = tmp_path / "model"
    assert f"--model {model}" in said.out and f"{tmp_path / 'samples-0000'}" in said.out
    assert "Pixels" in ran("inspect", model, "--out", tmp_path / "i").out
    ran("generate", "a red circle", "--model", model, "--steps", 1, "--out", tmp_path / "g")
    tune = ["--model", model, "--steps", 1, "--batch", 2, "--no-recorder", "--out", tmp_path / "f"]
    ran("finetune", "--data", captioned, *tune)
    # the same command resumes with the steps that were chosen; another one is refused
    again = [*small, "--out", tmp_path, "--resume"]
    ran("train", captioned, *again, "--minutes", "0.01")
    for data, options, said in (
        (captioned, [], "started with minutes 0.01, not None; resume it with the same"),
        (classes, ["--minutes", "0.01"], "started with images 30 images"),
    ):
        with pytest.raises(SystemExit) as end:
            ran("train", "--data", data, *again, *options)
        assert end.value.code == 2 and said in capsys.readouterr().err.splitlines()[-1]


def test_given_parts_stay_as_they_are(captioned, classes, tmp_path):
    config = TrainingConfig(space="latents", **TINY)
    train_from_scratch(captioned, tmp_path / "first", config)
    model = tmp_path / "first" / "model"
    config = TrainingConfig(vae=model, text=model, **TINY)
    results = train_from_scratch(classes, tmp_path / "second", config)
    assert results["space"] == "latents" and results["vae_steps"] is None
    for name in ("vae", "text"):
        before, after = (
            load_file(tmp_path / run / "model" / f"{name}.safetensors")
            for run in ("first", "second")
        )
        assert all(torch.equal(before[key], after[key]) for key in before)
    assert (tmp_path / "second" / "cache" / "contexts.safetensors").exists()
    with pytest.raises(UserError, match="has no text encoder"):
        for k in range(10):
            (tmp_path / "bare").mkdir(exist_ok=True)
            Image.new("RGB", (32, 32), (k, 0, 0)).save(tmp_path / "bare" / f"{k}.png")
        train_from_scratch(tmp_path / "bare", tmp_path / "third", TrainingConfig(**TINY))
        config = TrainingConfig(text=tmp_path / "third" / "model", **TINY)
        train_from_scratch(captioned, tmp_path / "fourth", config)


def test_the_text_encoders_of_sdxl_are_refused_before_anything_slow(captioned, tmp_path):
    sdxl().save(tmp_path / "xl")
    config = TrainingConfig(text=tmp_path / "xl", **TINY)
    with pytest.raises(UserError, match=r"more than vectors of words, .* name a model of Stable"):
        train_from_scratch(captioned, tmp_path / "out", config)
    assert not (tmp_path / "out" / "cache").exists()


def test_what_is_in_a_folder(captioned, classes, tmp_path):
    folder = folders.opened(captioned, None, "text")
    assert folder.layout == "captions" and len(folder.files.alternatives[0]) == 2
    folder = folders.opened(classes, None, "text")
    assert folder.layout == "classes" and folder.side == 32 and folder.cut == 0
    assert set(map(tuple, folder.files.alternatives)) == {
        ("a photo of a small dog",),
        ("a photo of a cat",),
    }
    images = folders.read(folder, classes, 32, 0.1, seed=0)
    assert (len(images.training), len(images.held_out)) == (27, 3)
    assert not set(images.training) & set(images.held_out)
    assert set(images.prompts()) == {"a photo of a small dog", "a photo of a cat"}
    for k in range(10):
        Image.new("RGB", (48, 24), (k, 0, 0)).save(tmp_path / f"{k}.png")
    folder = folders.opened(tmp_path, None, "text")
    assert (folder.layout, folder.side, folder.cut) == ("pictures", 24, 0.5)
    with pytest.warns(UserWarning, match="lose 50% on average"):
        images = folders.read(folder, tmp_path, 32, 0.1, seed=0)
    assert images.prompts() == [""] * 8


def test_all_that_can_be_wrong_is_one_line(captioned, refused, tmp_path):
    def said(data, *options):
        line = refused("train", data, "--preset", "tiny", "--out", tmp_path / "out", *options)
        assert not (tmp_path / "out").exists()
        return line

    few = tmp_path / "few"
    for k in range(9):
        few.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8)).save(few / f"{k}.png")
    assert "9 images; training from scratch needs 10" in said(few)
    Image.new("RGB", (8, 8)).save(few / "9.png")
    assert "images of 8 pixels; at least 16" in said(few)
    (few / "5.png").write_bytes(b"no image")
    assert "5.png: not a readable picture" in said(few)
    assert "most 32 pixels; choose a --size of about 32" in said(captioned, "--size", 128)
    assert "size 36 is not divisible by 8" in said(captioned, "--space", "pixels", "--size", 36)
    latents = ["--size", 48, "--space", "latents"]
    assert "nearest valid sizes are 32 and 64" in said(captioned, *latents)
    assert "no column" in said(captioned, "--caption-column", "x")
    assert "no class folders" in said(captioned, "--layout", "classes")
    assert "0 folders are given" in refused("train")
    assert "no such folder" in said(tmp_path / "nowhere")
    assert "minutes chooses the number of steps" in said(captioned, "--minutes", 1, "--steps", 2)
    assert "--minutes is 0; it must be above 0" in said(captioned, "--minutes", 0)
    assert "pixels need no VAE" in said(captioned, "--space", "pixels", "--vae", captioned)
    assert "--vae-steps does nothing" in said(captioned, "--vae", captioned, "--vae-steps", 3)
    assert 'no preset "smal"' in refused("train", captioned, "--preset", "smal")


def test_shards_of_captioned_images(captioned, tmp_path, ran, refused):
    """The same images in tar files are read, and resumed, as from a folder."""
    for part in range(2):
        (tmp_path / "shards").mkdir(exist_ok=True)
        with tarfile.open(tmp_path / "shards" / f"{part}.tar", "w") as tar:
            for k in range(part, 30, 2):
                tar.add(captioned / f"{k}.png", f"{k}.png")
                (tmp_path / "caption").write_text(f"scene {k % 3}")
                tar.add(tmp_path / "caption", f"{k}.txt")
    small = ["--preset", "tiny", "--steps", 2, "--space", "latents", "--out", tmp_path / "out"]
    said = ran("train", tmp_path / "shards", *small)
    assert "27 images to train on, 3 held out, with captions; 32x32" in said.err
    assert json.loads((tmp_path / "out" / "results.json").read_text())["layout"] == "shards"
    ran("train", tmp_path / "shards", *small, "--resume")
    line = refused("train", tmp_path / "shards", "--layout", "classes", "--out", tmp_path / "no")
    assert "no class folders" in line


def test_what_suits_the_images():
    def suits(count, side, device="cpu", **given):
        return presets.completed(TrainingConfig(**given), count, side, device)

    small = suits(100, 40)
    assert (small.size, small.space, small.preset, small.batch) == (32, "pixels", "small", 16)
    assert presets.default_steps(small, 50) == 3125  # a thousand times each
    large = suits(50_000, 200, "cuda")
    assert (large.size, large.space, large.preset) == (64, "latents", "base")
    assert presets.default_steps(large, 50_000) == 50_000
    factors = {size: presets.vae_of(suits(9, 600, size=size, space="latents")).factor
               for size in (32, 64, 128, 256)}  # fmt: skip
    assert factors == {32: 2, 64: 4, 128: 4, 256: 8}
    unet = presets.denoiser_of(suits(9, 64, size=64, space="pixels"), 3, 1, None).network
    assert unet.config.depth == (0, 0, 1, 1)


def test_every_image_once_an_epoch_and_batches_follow_from_their_number(captioned):
    folder = folders.opened(captioned, None, "text")
    config = presets.completed(TrainingConfig(batch=9), 30, 32, "cpu")
    images = folders.read(folder, captioned, 32, 0.1, seed=0)
    examples = stages.Examples(
        images.pixels[images.training], [images.captions[i] for i in images.training], True
    )

    schedule = presets.denoiser_of(config, 3, 1, None).schedule
    first = stages.batches(schedule, examples, config, 1, 0)
    batches = [next(first) for _ in range(4)]
    again = next(stages.batches(schedule, examples, config, 1, 2))
    assert torch.equal(again.x0, batches[2].x0) and again.captions == batches[2].captions
    epoch = torch.cat([batch.x0 for batch in batches[:3]])
    ours = {tuple(x.flatten()[:99].tolist()) for x in torch.cat([epoch, epoch.flip(-1)])}
    theirs = {tuple((x / 127.5 - 1).flatten()[:99].tolist()) for x in examples.x0}
    assert theirs <= ours
    whole = next(stages.batches(schedule, examples, config, 1, 0))
    halves = stages.batches(schedule, examples, config, 2, 0)
    assert torch.equal(torch.cat([next(halves).x0, next(halves).x0]), whole.x0)
