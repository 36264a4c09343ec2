"""Every experiment at its smallest size: it writes what it says, resumes bit for bit, and complains
in one line."""

import json
import random
import shutil
import signal
import sys
import tarfile
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from jaxtyping import install_import_hook
from PIL import Image
from safetensors.torch import load_file

import minidiff
from minidiff import pipeline, schedules
from minidiff.cli import script
from minidiff.conditioners import Unconditional
from minidiff.data import critic
from minidiff.data.folder import load_image, to_model, to_uint8
from minidiff.data.world import World
from minidiff.ddpm import DDPM
from minidiff.denoiser import Denoiser
from minidiff.errors import Terminated, UserError
from minidiff.evaluation import features, sweep
from minidiff.figures import curves
from minidiff.finetuning import loop
from minidiff.latent_diffusion import LatentDiffusion
from minidiff.options.sampling import SampleConfig
from minidiff.recipes import quickstart
from minidiff.training import device, progress, waits
from minidiff.vae import Pixels

simple_loss = DDPM.simple_loss
EXPERIMENTS = Path(__file__).parents[1] / "experiments"
sys.path.insert(0, str(EXPERIMENTS))
with install_import_hook(
    [path.stem for path in EXPERIMENTS.glob("*.py")],
    "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))",
):
    import bench
    import bench_files
    import cifar_board
    import cifar_ddpm
    import cifar_distance
    import cifar_features
    import cifar_recipes
    import controlnet
    import distill
    import distill_students
    import dreambooth
    import dreambooth_photos
    import finetune_coco100
    import forward_chain
    import gpu
    import gpu_long
    import gpu_sampling
    import gpu_training
    import meanflow
    import measuring
    import memory
    import photo_judge
    import photo_latents
    import photo_parts
    import photo_report
    import photo_tuning
    import pretrain_box
    import pretrain_photos
    import recolour
    import sampler_order
    import scaling
    import sd_generate
    import text_to_image
    import toy_2d
    import trilemma
    import unet_or_dit


def written(out, *names):
    for name in names:
        assert (out / name).stat().st_size > 0, name
    return json.loads((out / "results.json").read_text())


def stop_at(step):
    """In place of the progress bar: Ctrl-C while that step is looked at, so that training stops
    there, saved."""

    def follow(training, *_):
        for done in training:
            if done.step == step:
                signal.raise_signal(signal.SIGINT)

    return follow


def same(a, b, model="model"):
    for part in ("unet", "text", "vae"):
        ours, theirs = (
            load_file(a / model / f"{part}.safetensors"),
            load_file(b / model / f"{part}.safetensors"),
        )
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)
    for name in ("log.jsonl",):
        for path in (a / "training").rglob(name):
            assert path.read_text() == (b / path.relative_to(a)).read_text()


def picture(path, seed, size=32):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = torch.randint(
        0, 256, (size, size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )
    Image.fromarray(pixels.numpy()).save(path)


# The plane.


def test_toy_density_has_unit_variance_and_no_strays():
    mixture = toy_2d.Curve("moons")
    draws = mixture.draw(20_000, torch.Generator().manual_seed(0))
    assert (
        draws.mean(0).abs().max() < 0.03 and abs(draws.pow(2).mean() - 1) < 0.03
    )  # four standard errors
    assert mixture.strays(draws) < 0.001 and mixture.strays(torch.full((4, 2), 9.0)) == 1


def test_toy_energy_distance():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(500, 2, generator=generator), torch.randn(500, 2, generator=generator)
    assert abs(toy_2d.energy_distance(x, x)) < 1e-6
    assert toy_2d.energy_distance(x, y) < 0.02 < 0.5 < toy_2d.energy_distance(x, y + 1)


def test_toy_2d(tmp_path):
    toy_2d.main(out=tmp_path, steps=4, batch=16, width=16, n=50, sampling_steps=3)
    results = written(tmp_path, "toy_2d.png", "loss.png")
    assert {
        "distance_floor",
        "distance_exact",
        "distance_learnt",
        "score_error_t250",
        "strays_learnt",
        "loss",
        "seed",
    } <= results.keys()


# The order of samplers.


@pytest.mark.parametrize("schedule", ["cosine", "flow", "karras"])
def test_sampler_order(schedule, tmp_path):
    sampler_order.main(schedule, steps=(64, 128), points=8, out=tmp_path)
    results = written(tmp_path, "sampler_order.png")
    for name, order in {
        "euler": 1,
        "heun": 2,
        "dpmpp_2m": 2,
        "unipc": 3,
        "ddpm": 1,
        "dpmpp_2m_sde": 2,
    }.items():
        assert results[name]["order"] == pytest.approx(
            order, rel=0.15
        )  # two step numbers, and not yet very many
        assert results[name]["evaluations"] == ([128, 256] if name == "heun" else [64, 128])
    with pytest.raises(UserError, match="at least two numbers"):
        sampler_order.main(schedule, steps=(16,), out=tmp_path)


# The forward chain.


def test_forward_chain(tmp_path, capsys):
    picture(tmp_path / "own.png", seed=0, size=40)
    forward_chain.main(
        image=tmp_path / "own.png", schedules=("linear", "flow"), size=32, columns=3, out=tmp_path
    )
    results = written(tmp_path, "forward_chain.png", "schedules.png")
    assert (
        results["schedules"]["flow"]["alpha_is_sigma_at"] == 0.5
        and results["schedules"]["flow"]["snr"]["0.5"] == 1
    )
    assert results["schedules"]["linear"]["snr"]["0.9"] < 1e-3
    assert "alpha = sigma at t = 0.5" in capsys.readouterr().out


# CIFAR-10.


@pytest.fixture
def classes(tmp_path):
    for k in range(8):
        picture(tmp_path / "data" / "train" / ("cat", "dog")[k % 2] / f"{k}.png", seed=k)
    return tmp_path / "data"


def test_cifar_ddpm(classes, tmp_path, monkeypatch, capsys):
    settings = dict(data=classes / "train", preset="tiny", each=2, n=3)
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    cifar_ddpm.main(**settings, out=whole)
    results = written(
        whole,
        "samples.png",
        "forward.png",
        "reverse.png",
        "reverse.gif",
        "loss.png",
        "model/model.json",
    )
    assert {"images_per_second", "steps", "loss", "seconds", "seed"} <= results.keys()
    assert results["n"] == 3 and results["frechet"] > 0 and results["floor"] > 0

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(cifar_ddpm, "follow", stop_at(1))
        cifar_ddpm.main(**settings, out=halves)
    assert len((halves / "training" / "log.jsonl").read_text().splitlines()) == 1
    cifar_ddpm.main(**settings, out=halves, resume=True)
    same(whole, halves)

    before = (whole / "samples.png").read_bytes()
    assert before == (halves / "samples.png").read_bytes()
    (whole / "samples.png").unlink()
    cifar_ddpm.main(**settings, out=whole, sample_only=True)
    assert before == (whole / "samples.png").read_bytes()


def test_cifar_ddpm_unconditional(classes, tmp_path):
    cifar_ddpm.main(
        data=classes / "train",
        preset="tiny",
        out=tmp_path / "out",
        conditional=False,
        steps=1,
        each=1,
        n=2,
        pictures=4,
    )
    assert written(tmp_path / "out", "samples.png")["conditional"] is False


def test_cifar_distance():
    noise = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (40, 3, 32, 32), generator=noise, dtype=torch.uint8)
    distance = cifar_distance.Distance(pixels, 10)
    aside = to_model(distance.aside)
    assert distance.of(aside) == pytest.approx(distance.floor, rel=1e-6)
    assert len({tuple(p.flatten()[:9].tolist()) for p in (*distance.real, *distance.aside)}) == 40
    assert distance.of(torch.zeros(10, 3, 32, 32)) > 3 * distance.floor
    with pytest.raises(UserError, match="n is 39; it must be from 2 to 38"):
        cifar_distance.Distance(pixels, 39)
    with pytest.raises(UserError, match="9 samples"):
        distance.of(aside[:9])


def test_cifar_board(classes, tmp_path, monkeypatch, capsys):
    settings = dict(data=classes / "train", preset="tiny", n=2, steps=2, batch=2, counts=(2, 3))
    labels, save = [], curves.save

    def saved(figure, path):
        figure.canvas.draw()
        for axis in (axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)):
            labels.extend(label.get_text() for label in axis.get_ticklabels(which="both"))
        return save(figure, path)

    monkeypatch.setattr(curves, "save", saved)
    clipped, clip = [], cifar_board.clip
    tell = lambda model: (clipped.append(model.denoiser.target), clip(model))  # noqa: E731
    monkeypatch.setattr(cifar_board, "clip", tell)
    cifar_board.main(**settings, out=tmp_path)
    assert clipped == ["eps"]
    results = written(tmp_path, "targets.png", "targets.csv", "v/model.json")
    assert [row["target"] for row in results["rows"]] == ["eps", "x0", "v", "flow"]
    first = (tmp_path / "targets.csv").read_bytes()
    monkeypatch.setattr(cifar_board, "learn", lambda *_: {}["every row is there"])
    cifar_board.main(**settings, out=tmp_path)
    assert (tmp_path / "targets.csv").read_bytes() == first
    cifar_board.main(**settings, study="steps", model=tmp_path / "v", out=tmp_path)
    rows = written(tmp_path, "steps.png", "steps.csv")["rows"]
    assert [(r["sampler"], r["steps"]) for r in rows] == [
        ("ddpm", "2"), ("ddim", "2"), ("ddpm", "3"), ("ddim", "3")
    ]  # fmt: skip
    assert {"2", "3", "eps", "flow"} <= set(labels) and not any("$" in each for each in labels)
    with pytest.raises(UserError, match="--model"):
        cifar_board.main(**settings, study="steps", out=tmp_path)
    (tmp_path / "other").mkdir()
    for foreign in ("a,b\n1,2\n", "a,b\n", ""):
        (tmp_path / "other" / "targets.csv").write_text(foreign)
        with pytest.raises(UserError, match="another table"):
            cifar_board.main(**settings, out=tmp_path / "other")


def test_eps_is_clipped_as_it_is_drawn():
    torch.manual_seed(0)
    recipe = replace(cifar_board.PRESETS["tiny"], target="eps", schedule=schedules.cosine())
    model = cifar_board.new_model(recipe, ["car", "dog"], "cpu")

    def largest():
        frames = model.sample(["dog"], 3, generator=torch.Generator().manual_seed(0))
        return max(frame.x0.abs().max().item() for frame in frames if frame.x0 is not None)

    assert largest() > 100  # the first estimate is divided by an alpha of 5e-5
    cifar_board.clip(model)
    assert largest() <= 1


def test_cifar_batches_see_every_picture_once_an_epoch():
    pictures = torch.arange(6, dtype=torch.uint8).view(6, 1, 1, 1).expand(6, 3, 32, 32).contiguous()
    labels = [str(k) for k in range(6)]
    stream = cifar_ddpm.batches(pictures, labels, 2, seed=0, start=0)
    three = [next(stream) for _ in range(6)]
    assert (
        sorted(label for _, names in three[:3] for label in names)
        == labels
        == sorted(label for _, names in three[3:] for label in names)
    )
    again, names = next(cifar_ddpm.batches(pictures, labels, 2, seed=0, start=4))
    assert names == three[4][1] and torch.equal(again, three[4][0])
    with pytest.raises(UserError, match="only 6 pictures"):
        next(cifar_ddpm.batches(pictures, labels, 7, seed=0, start=0))


def test_cifar_features(classes, tmp_path, monkeypatch):
    for k in range(8):
        picture(classes / "test" / ("cat", "dog")[k % 2] / f"{k}.png", seed=10 + k)
    settings = dict(data=classes, epochs=2, batch=4, n=4)
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    cifar_features.main(**settings, out=whole)
    results = written(whole, "distances.png", "loss.png")
    assert {"test_accuracy", "training_accuracy", "images_per_second"} <= results.keys() and len(
        results["frechet"]
    ) == 14
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(cifar_features, "follow", stop_at(1))
        cifar_features.main(**settings, out=halves)
    cifar_features.main(**settings, out=halves, resume=True)
    ours, theirs = (load_file(out / "cifar10_resnet.safetensors") for out in (whole, halves))
    assert all(
        weight.dtype == torch.float16 and torch.equal(weight, theirs[name])
        for name, weight in ours.items()
    )
    with pytest.raises(
        UserError, match="--n is 5, but there are 8 training pictures; pass --n 4 or less"
    ):
        cifar_features.main(**settings | {"n": 5}, out=whole)


def test_the_feature_network_that_ships_sees_distortions(real_data):
    """The stronger noise, blur or tint, the farther; real pictures are nearest. Of 500 pictures on
    each side: the table in docs has 10,000."""
    tiles = {}
    for part in ("train", "test"):
        mosaic = load_image(real_data / "cifar10" / f"{part}_0.webp")[:, :320]
        tiles[part] = (
            mosaic.unflatten(1, (10, 32))
            .unflatten(3, (100, 32))
            .permute(1, 3, 0, 2, 4)
            .flatten(0, 1)
        )
    found = cifar_features.distances(
        features.cifar10_classifier(), tiles["train"], tiles["test"], 500
    )
    for name, (_, levels) in cifar_features.DISTORTIONS.items():
        along = [found["floor"], *(found[f"{name} {level}"] for level in levels)]
        assert along == sorted(along), name
    assert found["test"] < found["tint 0.4"] / 2


def test_cifar_paper_trains_and_draws_with_the_papers_chain(classes, tmp_path, monkeypatch):
    """The loss is DDPM's equation 14, the images come out of DDPM's loop, and main uses both."""
    chain = DDPM(6, 0.05, 0.4)
    preset = replace(
        cifar_recipes.PRESETS["paper"],
        unet=cifar_recipes.unet_tiny,
        chain=chain,
        schedule=schedules.Discrete("linear", T=6, beta_1=0.05, beta_T=0.4),
        steps=2,
        batch=2,
        sampling_steps=6,
    )
    torch.nn.init.normal_((unet := cifar_recipes.unet_tiny(None)).conv_out.weight, std=0.1)
    model = LatentDiffusion(Pixels(), Unconditional(), Denoiser(unet, preset.schedule, "eps"), 32)

    def network(x, t):
        return unet(x, t - 1.0)

    x0 = (torch.rand(4, 3, 32, 32) * 2 - 1).contiguous(memory_format=torch.channels_last)
    with torch.random.fork_rng():
        found = cifar_ddpm.loss(model, chain, (x0, [""] * 4))["loss"]
    t, eps = preset.schedule.sample_t(4), torch.randn_like(x0)
    torch.testing.assert_close(found, chain.simple_loss(network, x0, t, eps))

    generator = torch.Generator().manual_seed(cifar_ddpm.seed_of(3, 0))
    x_T = torch.randn(2, 3, 32, 32, generator=generator)
    *_, expected = chain.p_sample_loop(network, x_T, generator)
    found = cifar_ddpm.chain_images(model, chain, 2, seed=3)
    torch.testing.assert_close(found, expected.clamp(-1, 1))

    calls = []
    monkeypatch.setattr(
        DDPM, "simple_loss", lambda self, *a: calls.append(1) or simple_loss(self, *a)
    )
    monkeypatch.setitem(cifar_recipes.PRESETS, "paper", preset)
    cifar_ddpm.main(data=classes / "train", preset="paper", each=1, n=2, out=tmp_path / "out")
    written(tmp_path / "out", "samples.png", "reverse.gif", "loss.png", "model/model.json")
    assert len(calls) == 2
    for wrong, message in (
        ({"conditional": True}, "unconditional"),
        ({"sampling_steps": 3}, "all 6"),
    ):
        with pytest.raises(UserError, match=message):
            cifar_ddpm.main(data=classes / "train", preset="paper", out=tmp_path / "no", **wrong)


def test_cifar_paper_preset_is_the_paper():
    paper = cifar_recipes.PRESETS["paper"]
    assert torch.equal(paper.chain.alpha_bar, DDPM().alpha_bar)
    unet = paper.unet(None)
    assert sum(p.numel() for p in unet.parameters()) == pytest.approx(
        35.7e6, rel=0.03
    )  # [1] appendix B; ours has projections around its attention
    assert (
        paper.target,
        paper.steps,
        paper.batch,
        paper.lr,
        paper.ema,
        unet.config.dropout,
    ) == ("eps", 800_000, 128, 2e-4, 0.9999, 0.1)
    assert paper.schedule == schedules.linear()


# The trilemma.


def test_trilemma(tmp_path, monkeypatch):
    settings = dict(
        samplers=("ddim",), steps=(1, 2), guidance=(1.0, 2.0), n=10, more=False, out=tmp_path
    )
    trilemma.main(**settings)
    results = written(tmp_path, "trilemma.csv", "trilemma.png")
    assert results["settings"] == 4 and results["enough"].endswith((" at 1", " at 2", " at 4"))
    monkeypatch.setattr(sweep, "draw", None)  # all is measured: nothing is drawn again
    trilemma.main(**settings)


# Text to image.


@pytest.fixture
def captioned(tmp_path):
    captions = ["a cat", "a dog", "a bowl of apples", "two birds"]
    for k in range(4):
        picture(tmp_path / "data" / f"{k}.png", seed=k)
    lines = [
        json.dumps({"file_name": f"{k}.png", "caption": caption})
        for k, caption in enumerate(captions)
    ]
    (tmp_path / "data" / "metadata.jsonl").write_text("\n".join(lines))
    return tmp_path / "data"


def test_text_to_image(captioned, tmp_path, monkeypatch):
    settings = dict(
        data=captioned,
        prompts=("two birds", "a red car"),
        size=32,
        caption_column="caption",
        width=32,
        vae_width=8,
    )
    settings |= dict(vae_steps=3, vae_batch=2, steps=4, batch=2, sampling_steps=2, judged=3)
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    text_to_image.main(**settings, out=whole)
    results = written(
        whole,
        "generated.png",
        "real_vs_generated.png",
        "reverse.png",
        "reverse.gif",
        "loss.png",
        "vae_loss.png",
        "model/model.json",
    )
    assert {
        "vae_psnr_db",
        "nearest_training_picture_rms",
        "nearest_is_the_captioned_one",
        "images_per_second",
        "seed",
    } <= results.keys()

    for step in (1, 2):  # Ctrl-C in the first act, then in the second
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(text_to_image, "follow", stop_at(step))
            text_to_image.main(**settings, out=halves, resume=step > 1)
    text_to_image.main(**settings, out=halves, resume=True)
    same(whole, halves)


def test_text_to_image_refuses_a_size_before_it_trains(captioned, tmp_path):
    with pytest.raises(UserError, match="32 and 64"):
        text_to_image.main(data=captioned, size=40, caption_column="caption", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_finetune_coco100(captioned, tmp_path, monkeypatch):
    settings = dict(data=captioned, caption_column="caption", validation=0.5, every=1, rank=2)
    settings |= dict(steps=2, lora_steps=2, batch=2, sampling_steps=2, dtype="fp32", threads=1)
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    finetune_coco100.main(**settings, out=whole)
    trained = ("full/report.html", "full/model/model.json", "lora/lora.safetensors")
    results = written(whole, *finetune_coco100.OUTPUTS, *trained)
    assert list(results["ways"]) == list(finetune_coco100.WAYS)
    full = results["ways"]["full"]
    assert {"own_training_pixels-8x8", "own_held_out_photos-resnet", "copies_asked"} <= full.keys()
    assert {"validation_first", "validation_last", "advice", "seconds"} <= full.keys()
    assert results["pictures"] == results["held_out"] == 2 and results["recoloured"] == 0

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(finetune_coco100, "finetune", stopped)
        finetune_coco100.main(**settings, out=halves)
    with pytest.raises(UserError, match="--resume"):
        finetune_coco100.main(**settings, out=halves)
    finetune_coco100.main(**settings, out=halves, resume=True)
    same(whole, halves, "full/model")
    ours, theirs = (load_file(out / "lora" / "lora.safetensors") for out in (whole, halves))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    with pytest.raises(UserError, match="held out"):
        finetune_coco100.main(**settings | {"validation": 0.1}, out=tmp_path / "none")


def stopped(*arguments):
    """Fine-tuning in which Ctrl-C comes after the first step."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "tqdm", Interrupting)
        return loop.finetune(*arguments)


class Interrupting(loop.tqdm):
    def update(self, n=1):
        signal.raise_signal(signal.SIGINT)
        return super().update(n)


def test_pictures_that_a_prompt_was_made_of_are_learnt_and_a_caption_is_kept_back(tmp_path):
    rows = [{"file_name": f"{k}.png", "captions": ["a cat", "the cat"]} for k in range(4)]
    rows[2]["captions"] = ["a bowl", "very " * 40 + "green", finetune_coco100.PROMPTS[0]]
    for k in range(4):
        picture(tmp_path / f"{k}.png", seed=k)
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for seed in range(4):
        of = finetune_coco100.pictures(tmp_path, "captions", 32, 30, 0.7, seed)
        assert len(of.held_out) == 2 and 2 in of.trained and set(of.unseen) == set(of.trained)
        assert of.captions[2] == [finetune_coco100.PROMPTS[0]] and of.unseen[2] == "a bowl"


def test_a_picture_is_squeezed_not_cut(tmp_path):
    pixels = torch.zeros(3, 40, 60, dtype=torch.uint8)
    pixels[:, :, :6] = 255  # a stripe that cutting out the square would lose
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(tmp_path / "wide.png")
    square = photo_tuning.squeezed(tmp_path / "wide.png", 16)
    assert square.shape == (3, 16, 16) and square[:, :, 0].min() > 0.8


def test_a_copy_has_another_colour_and_another_word():
    image = torch.full((3, 32, 32), -0.9)
    image[:, 8:16, 8:24] = torch.tensor([0.6, -0.6, -0.6])[:, None, None]  # red
    captions = ["a red box", "a box", "a box, red and red"]
    made = list(recolour.copies(image, captions, 3, 0))
    assert len(made) == 3 and len({texts[0] for _, texts in made}) == 3
    for copy, texts in made:
        (text,) = texts
        colour = text.split()[1]
        assert colour in recolour.PAINTS and colour != "red"
        hsv = recolour.hsv_of(recolour.to_uint8(copy))
        where = torch.from_numpy(recolour.named_by(colour, hsv))
        assert where[8:16, 8:24].all() and where.sum() == 8 * 16
        assert torch.allclose(copy[:, :8], image[:, :8], atol=0.01)  # the rest stays
    assert not list(recolour.copies(image, ["a blue box", "a box"], 3, 0))  # nothing there is blue


def test_captions_with_words_left_out_have_no_others():
    captions = ["a white bowl of green apples.", "a cat"]
    every = recolour.fewer_words(captions, 40, 0)
    assert every[:2] == captions and len(set(every)) > 10
    assert all(
        set(text.split()) <= set("a white bowl of green apples cat".split()) for text in every[2:]
    )
    of_first = [text for text in every[2:] if not set(text.split()) <= {"a", "cat"}]
    assert all("white" in text and "green" in text for text in of_first)
    first = [text.split().index("white") < text.split().index("green") for text in of_first]
    assert any(first) and not all(first)  # in any order
    assert recolour.fewer_words(captions, 0, 0) == captions
    others = [["A cat on a red mat."], ["a dog on it", "a dog"], ["a bird on a wire"]]
    common = recolour.common_words(others)
    assert common == ["a", "on"]
    more = recolour.fewer_words(["green apples"], 40, 0, common)[1:]
    added = [[word for word in text.split() if word in common] for text in more]
    assert {len(words) for words in added} == {0, 1, 2}  # of two common words


# The model in the box.


def test_pretrain_box(tmp_path, monkeypatch):
    settings = dict(vae_steps=3, text_steps=3, text_batch=4, steps=4, batch=2, pool=8, captions=2)
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    pretrain_box.main(**settings, out=whole)
    results = written(whole, "samples.png", "loss.png", "text_loss.png", "box/model.json")
    assert {
        "accuracy_one_object",
        "accuracy_two_objects_vae_alone",
        "megabytes",
        "images_per_second",
        "seed",
    } <= results.keys()
    assert results["megabytes"] <= 12

    for step in (1, 2, 3):  # Ctrl-C in every act
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(pretrain_box, "follow", stop_at(1))
            pretrain_box.main(**settings, out=halves, resume=step > 1)
    pretrain_box.main(**settings, out=halves, resume=True)
    same(whole, halves, "box")


# Photographs.


THINGS = ("lemon", "orange", "Persian cat")


@pytest.fixture
def photo_shards(tmp_path):
    """Shards as of photographs: three things, twelve pictures to train on and six held out."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for part, n in (("train", 12), ("held_out", 6)):
        with tarfile.open(folder / f"{part}-000000.tar", "w") as shard:
            for k in range(n):
                picture(tmp_path / "one.png", seed=n * 100 + k, size=64)
                text = {"text": f"a photo of a {THINGS[k % 3]}", "label": THINGS[k % 3]}
                (tmp_path / "one.json").write_text(json.dumps(text))
                for suffix in ("png", "json"):
                    shard.add(tmp_path / f"one.{suffix}", f"{k:06d}.{suffix}")
    return folder


def test_photo_judge(photo_shards, tmp_path, monkeypatch):
    settings = dict(data=photo_shards, steps=3, batch=4)
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    photo_judge.main(**settings, out=whole)
    results = written(whole, "photos_resnet.safetensors", "loss.png")
    assert results["n"] == 6 and results["pictures"] == 12 and results["classes"] == 3
    assert 0 <= results["top_1"] <= results["top_5"] == 1  # of three things
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(photo_judge, "follow", stop_at(1))
        photo_judge.main(**settings, out=halves)
    photo_judge.main(**settings, out=halves, resume=True)
    ours, theirs = (load_file(out / "photos_resnet.safetensors") for out in (whole, halves))
    assert all(torch.equal(weight, theirs[name]) for name, weight in ours.items())

    # the file is all that its features and verdicts need
    monkeypatch.setattr(features, "FOLDER", whole)
    features._photos.cache_clear()
    images = World(32).batch(2, "photos", objects=2)[0]
    assert features.features(features.PHOTOS, images).shape == (2, 256)
    assert all(set(guesses) == set(THINGS) for guesses in features.photo_things(images, best=3))
    features._photos.cache_clear()


def test_photographs_come_in_the_order_of_their_shards(photo_shards, tmp_path):
    pictures, again = (photo_judge.pictures(photo_shards, "train") for _ in range(2))
    assert torch.equal(pictures.pixels, again.pixels)
    assert pictures.labels == again.labels == list(THINGS) * 4
    stream = photo_judge.batches(pictures, 4, 2, seed=0, start=0)
    first = [next(stream) for _ in range(4)]
    assert [batch.images.shape[-1] for batch in first] == [48, 48, 64, 64]
    third = next(photo_judge.batches(pictures, 4, 2, seed=0, start=2))
    assert torch.equal(third.images, first[2].images) and third.labels == first[2].labels
    with pytest.raises(UserError, match=r"no test-\*.tar there"):
        photo_judge.pictures(photo_shards, "test")


def test_pretrain_photos(photo_shards, tmp_path, monkeypatch):
    settings = dict(data=photo_shards, steps=4, vae_steps=3, text_steps=3, batch=4, each=1)
    monkeypatch.setattr(photo_latents, "DRAWN_STEPS", 2)
    judge_of(THINGS, tmp_path / "judge", monkeypatch)
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    pretrain_photos.main(**settings, out=whole)
    results = written(whole, "model/model.json", "samples.png", "loss.png", "curve.csv")
    assert results["megabytes"] <= 20 and results["n"] == 3 and results["stretch"] == 1

    pretrain_photos.main(**settings, stage="vae", out=halves)  # stage by stage, with a Ctrl-C
    pretrain_photos.main(**settings, stage="text", out=halves, resume=True)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pretrain_photos, "follow", stop_at(1))
        pretrain_photos.main(**settings, out=halves, resume=True)
    pretrain_photos.main(**settings, out=halves, resume=True)
    same(whole, halves)
    assert (whole / "curve.csv").read_text() == (halves / "curve.csv").read_text()

    # The next stretch begins where this one ended, but for what half precision rounds.
    package = tmp_path / "package"
    shutil.copytree(whole / "model", package)
    shutil.copy(whole / "curve.csv", package)
    before = [load_file(package / f"{part}.safetensors") for part in ("vae", "text")]
    again = settings | {"steps": 2, "lr": 1e-9}
    pretrain_photos.main(**again, model=package, out=tmp_path / "more")
    rows = photo_latents.read_curve(tmp_path / "more" / "curve.csv")
    assert rows[: len(rows) - 2] == photo_latents.read_curve(package / "curve.csv")
    last, new = rows[-3], rows[-1]
    assert (last["stretch"], new["stretch"]) == ("1", "2")
    assert int(new["images"]) == int(last["images"]) + 8
    assert float(new["tflop"]) > float(last["tflop"])
    assert float(new["held_out_loss"]) == pytest.approx(float(last["held_out_loss"]), rel=1e-3)
    after = [load_file(tmp_path / "more/model" / f"{part}.safetensors") for part in ("vae", "text")]
    for one, other in zip(before, after, strict=True):
        assert all(torch.equal(weight, other[name]) for name, weight in one.items())
    with pytest.raises(UserError, match="has its VAE and text encoder"):
        pretrain_photos.main(**settings, stage="vae", model=package, out=tmp_path / "other")


def test_photo_report(photo_shards, tmp_path, monkeypatch):
    judge_of(THINGS, tmp_path, monkeypatch)
    settings = dict(steps=1, vae_steps=1, text_steps=1, batch=2, each=0)
    pretrain_photos.main(photo_shards, tmp_path / "made", **settings)
    photo_report.main(photo_shards, tmp_path / "made" / "model", tmp_path, each=2, steps=2)
    results = written(tmp_path, "samples.png", "nearest.png")
    assert results["n"] == 6 and results["model"].keys() == results["training_pictures"].keys()
    for measured in (results["model"], results["training_pictures"]):
        share, low, high = measured["copies"]
        assert 0 <= low <= share <= high <= 1 and measured["frechet"] > 0


def judge_of(things, folder, monkeypatch):
    """A judge of these things that has learnt nothing, in place of the one that ships."""
    network = features.Classifier(len(things), features.PHOTOS_WIDTHS).eval()
    monkeypatch.setattr(features, "_photos", lambda: (network, list(things)))


def test_pretrain_photos_takes_a_captioned_folder(tmp_path):
    for k in range(20):
        picture(tmp_path / "mine" / f"{k}.png", seed=k, size=64)
        (tmp_path / "mine" / f"{k}.txt").write_text(f"picture {k}")
    train_set, held_out = (photo_parts.photos(tmp_path / "mine", p) for p in ("train", "held_out"))
    assert len(train_set.pixels) == 19 and held_out.captions == [["picture 9"]]  # 0, 1, 10, 11, ...
    settings = dict(steps=1, vae_steps=1, text_steps=1, batch=2, pictures=4)
    pretrain_photos.main(tmp_path / "mine", tmp_path / "out", **settings)
    assert written(tmp_path / "out", "model/model.json")["n"] == 0


def test_photo_codes_and_phrasings():
    codes = photo_parts.codes([str(k) for k in range(67)], 64)
    vectors = torch.stack(list(codes.values()))
    torch.testing.assert_close(vectors.norm(dim=1), torch.full((67,), 8.0))
    cosines = vectors @ vectors.T / 64 - torch.eye(67)
    assert cosines.abs().max() < 0.5 and cosines.square().mean().sqrt() < 0.05
    assert "a photo of an orange" in photo_parts.phrasings("orange")
    a = torch.rand(2, 3, 16, 16)
    assert photo_parts.difference(a, a).tolist() == [0, 0]
    brighter = photo_parts.difference(a + 0.1, a)  # pixels differ, edges do not
    torch.testing.assert_close(brighter, torch.full((2,), 0.1))


def test_dreambooth(tmp_path):
    dreambooth.main(
        tmp_path, contexts=6, others=4, steps=1, class_pictures=2, drawings=2, threads=1
    )
    files = (
        "without-prior/model/unet.safetensors",
        "LoRA/lora.safetensors",
        "second-round/lora.safetensors",
        "inversion/embedding.safetensors",
    )
    ways = written(tmp_path, "dreambooth.png", *files)["ways"]
    assert list(ways) == ["before", *dreambooth.WAYS]
    assert all(
        0 <= figures[name] <= 1
        for figures in ways.values()
        for name in ("subject", "all right", "others")
    )
    assert ways["before"]["subject"] == 0  # the box has never drawn a ring


def test_dreambooth_of_photographs(tmp_path):
    for k in range(3):
        picture(tmp_path / "dog6" / f"{k}.png", seed=k, size=64)
    settings = dict(subject=tmp_path / "dog6", steps=2, class_pictures=15, dtype="fp32", threads=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dreambooth_photos, "DRAWN_STEPS", 2)
        patch.setattr(dreambooth_photos, "EACH", 1)
        dreambooth.main(tmp_path / "out", **settings)
        files = (
            "full/model/unet.safetensors",
            "LoRA/lora.safetensors",
            "inversion/embedding.safetensors",
        )
        results = written(tmp_path / "out", "dreambooth.png", *files)
        with pytest.raises(UserError, match="--resume"):
            dreambooth.main(tmp_path / "out", **settings)
        dreambooth.main(tmp_path / "out", **settings, resume=True)
    again = written(tmp_path / "out")
    assert list(results["ways"]) == ["before", *dreambooth_photos.WAYS]
    for way, figures in results["ways"].items():
        shares = {name: value for name, value in figures.items() if name != "seconds"}
        assert shares == {name: again["ways"][way][name] for name in shares}
        assert all(0 <= value <= 1 for name, value in shares.items() if name != "cosine")
    assert results["floor"].keys() == {
        "subject",
        "cosine",
        "same_class_is_subject",
        "same_class_cosine",
    }


def test_what_a_subject_is_must_be_known():
    with pytest.raises(UserError, match="Chihuahua; folders called dog6, cat2, berry_bowl"):
        dreambooth_photos.kind_of(Path("my dog"), None)
    assert dreambooth_photos.kind_of(Path("my dog"), "lion").classes == ("lion",)
    assert dreambooth_photos.kind_of(Path("data/cat2"), None).thing == "Persian cat"


def test_new_contexts_are_new_and_the_critic_can_read_the_captions():
    scenes = dreambooth.new_contexts(100, 0)
    assert not set(scenes) & set(dreambooth.FIVE) and dreambooth.new_contexts(100, 0) == scenes
    pictures = World(32).draw(scenes, random.Random(0))
    assert (
        sum(map(critic.holds, pictures, [dreambooth.said(scene, "ring") for scene in scenes])) >= 98
    )
    assert all(dreambooth.WORD in dreambooth.said(scene) for scene in scenes)


def test_the_second_round_learns_from_what_is_right_of_the_first(tmp_path, monkeypatch):
    """Of drawings half of which show the ring asked for, that half is kept, with its captions, in
    none of the contexts judged later."""
    contexts, model, rng, shown = (
        dreambooth.new_contexts(100, 0),
        minidiff.load(),
        random.Random("second 0"),
        [],
    )
    while len(shown) < 12:
        scene = dreambooth.beside(rng)
        shown += [scene] if scene not in [*dreambooth.FIVE, *contexts] else []
    wrong = [
        replace(scene, things=scene.things[::-1]) if k % 2 else scene
        for k, scene in enumerate(shown)
    ]
    monkeypatch.setattr(
        dreambooth.pipeline, "generate", lambda *_, **__: World(32).draw(wrong, random.Random(0))
    )
    folder = dreambooth.second_folder(model, tmp_path, 12, contexts, 0)
    told = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    assert [line["text"] for line in told if int(line["file_name"].split(".")[0]) >= 5] == [
        dreambooth.said(scene) for scene in shown[::2]
    ]
    assert (
        not set(shown) & {*contexts, *dreambooth.FIVE} and len(list(folder.glob("*.png"))) == 5 + 6
    )


# Few steps.


def test_distill(tmp_path, monkeypatch):
    settings = dict(
        walks=3,
        steps=3,
        sharp_steps=3,
        last_steps=3,
        batch=2,
        lora_steps=3,
        rank=2,
        guided_steps=3,
        own_steps=3,
        captions=2,
    )
    monkeypatch.setattr(distill, "STUDENT", tuple(SampleConfig(n, 1.0, "lcm") for n in (2, 1)))
    monkeypatch.setattr(distill, "TEACHER", (SampleConfig(6, 2.0, "ddpm"),))
    monkeypatch.setattr(distill, "GUIDELESS", (SampleConfig(3, 1.0, "ddpm"),))
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    distill.main(**settings, out=whole)
    results = written(
        whole,
        "distill.png",
        "loss.png",
        "lora_loss.png",
        "student/model.json",
        "guided/model.json",
        "lcm_lora.safetensors",
    )
    assert [row["evaluations"] for row in results["rows"]] == [12, 2, 1, 3, 2, 1, 2, 1]
    assert {
        "student_1_of_teacher",
        "student_2_of_teacher",
        "guided_student_3_of_teacher",
        "settled_loss",
        "lora_moved",
        "seed",
    } <= results.keys()
    student = minidiff.load(whole / "student")
    assert (student.sampler, student.spacing, student.guidance) == ("lcm", "trailing", 1)
    guided = minidiff.load(whole / "guided")
    assert (guided.sampler, guided.spacing, guided.guidance) == ("ddpm", "shifted", 1)

    for act in (1, 2, 3, 4, 5, 6):  # Ctrl-C in every round of both students, and in the LoRA
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(distill_students, "follow", stop_at(1))
            distill.main(**settings, out=halves, resume=act > 1)
    for _ in range(2):  # the second finds everything done, and writes the same again
        distill.main(**settings, out=halves, resume=True)
    same(whole, halves, "student")
    same(whole, halves, "guided")
    ours, theirs = (load_file(folder / "lcm_lora.safetensors") for folder in (whole, halves))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


def test_meanflow(tmp_path, monkeypatch):
    settings = dict(steps=3, batch=4, pool=4, captions=2)
    monkeypatch.setattr(meanflow, "STEPS", (1, 2))
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    meanflow.main(**settings, out=whole)
    results = written(whole, "meanflow.png")
    assert [row["evaluations"] for row in results["rows"]] == [1, 2, 1, 2]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(meanflow, "follow", stop_at(1))
        meanflow.main(**settings, out=halves)
    meanflow.main(**settings, out=halves, resume=True)
    timeless = [json.loads((f / "results.json").read_text()) for f in (whole, halves)]
    assert timeless[0]["rows"] == timeless[1]["rows"] and timeless[0]["error"] > 0
    assert timeless[0]["error"] == timeless[1]["error"]
    meanflow.main(**settings, improved=False, out=tmp_path / "plain")


def test_the_box_on_a_flow_is_the_box():
    """The same prediction at the same noise level; the schedules differ by 1e-4 at most."""
    box = minidiff.load()
    model, g = meanflow.model_of(box), torch.Generator().manual_seed(0)
    context = box.text.encode(["a red circle"] * 3).detach()
    t = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)
    x0, eps = torch.randn(2, 3, 4, 16, 16, generator=g)
    theirs = box.schedule.at_log_snr(2 * ((1 - t) / t).log())
    with torch.no_grad():
        ours = model.denoiser(model.schedule.mix(x0, eps, t), t, context).x0
        expected = box.denoiser(box.schedule.mix(x0, eps, theirs), theirs, context).x0
    torch.testing.assert_close(ours, expected, rtol=0, atol=2e-3)


# As commands.


@pytest.mark.parametrize("arguments", [["--image", "nowhere.png"], ["--columns", "1"]])
def test_bad_input_is_one_line_and_exit_code_2(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["forward_chain.py", "--out", str(tmp_path), *arguments])
    with pytest.raises(SystemExit) as exit_code:
        script.run(forward_chain.main)
    assert exit_code.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize("kind, code", [(KeyboardInterrupt, 130), (Terminated, 143)])
def test_ctrl_c_is_exit_code_130_and_sigterm_143(kind, code, monkeypatch, capsys):
    def main(resume: bool = False) -> None:
        raise kind

    monkeypatch.setattr(sys, "argv", ["main.py"])
    with pytest.raises(SystemExit) as exit_code:
        script.run(main)
    assert exit_code.value.code == code and "--resume" in capsys.readouterr().err


def test_a_device_that_is_not_there():
    with pytest.raises(UserError, match='no device "tpu"; there is auto, cpu, cuda, mps'):
        device.pick_device("tpu")
    assert device.pick_device("auto") in ("cpu", "cuda", "mps")
    assert device.pick_device(torch.device("cpu")) == "cpu"


def test_peak_memory_is_this_process_and_windows_does_not_say(monkeypatch):
    assert 0.1 < progress.peak_memory_gb() < 100  # torch alone takes more than the one
    monkeypatch.setattr("sys.platform", "win32")
    assert progress.peak_memory_gb() is None


def test_stable_diffusion_line_by_line(sd, tmp_path, capsys):
    """Its own loop draws what the library draws."""
    made = sd()
    torch.nn.init.normal_(made.unet.conv_out.weight, std=0.1)
    folder = made.save(tmp_path / "model")
    sd_generate.main(
        str(folder), "an apple", "a bowl", steps=7, sampler="ddim", seed=3, out=tmp_path / "out"
    )
    written(tmp_path / "out", "trace.txt", "picture.png", "chain.png", "results.json")
    config = SampleConfig(steps=7, guidance=7.5, negative="a bowl", seed=3)
    expected = pipeline.generate(minidiff.load(folder), ["an apple"], config)[0]
    assert torch.equal(load_image(tmp_path / "out" / "picture.png"), to_uint8(expected))
    sd_generate.main(out=tmp_path / "trace")
    assert (
        "859.52 M" in capsys.readouterr().out and not (tmp_path / "trace" / "picture.png").exists()
    )


def test_bench(tmp_path, monkeypatch, capsys):
    """A case of every part at its smallest, and all that is written; a library that is not
    installed is said to be so."""
    pytest.importorskip("diffusers")
    for name, place in (("step", 1), ("sample", 0), ("start", 1)):
        monkeypatch.setitem(bench.PARTS, name, [bench.PARTS[name][place]])
    monkeypatch.setitem(sys.modules, "denoising_diffusion_pytorch", None)
    with monkeypatch.context() as patch, pytest.raises(UserError, match='no part "speed"; there'):
        patch.setitem(bench.PARTS, "forward", [])
        bench.main("forward,speed", out=tmp_path)
    bench.main(seconds=0.1, tiny=True, out=tmp_path)
    figures = written(tmp_path, "bench.csv", "bench.png", "table.md")["figures"]
    errors = {figure["error"] for figure in figures if figure["library"] == bench.THIRD}
    assert errors == {"not installed: denoising_diffusion_pytorch"} and len(errors) == 1
    measured = [figure for figure in figures if not figure["error"]]
    assert {figure["part"] for figure in measured} == set(bench.PARTS)
    ours = [figure for figure in measured if figure["library"] == bench.OURS]
    assert len(measured) == 2 * len(ours) - 1  # --help is ours alone
    assert all(figure["ratio"] == 1 and figure["seconds"] > 0 for figure in ours)
    with_floor = {figure["part"] for figure in ours if figure["share"]}
    assert with_floor == {"forward", "step", "sample"}
    table = (tmp_path / "table.md").read_text().splitlines()
    assert len([line for line in table if line.startswith("| ")]) == 2 + len(ours)
    assert len((tmp_path / "bench.csv").read_text().splitlines()) == 2 + len(figures)
    assert "NOT MEASURED: not installed" in capsys.readouterr().out
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


def test_the_floor_is_every_convolution_and_linear_layer(tmp_path):
    """Counted: the same FLOPs as the network's, attention's own products aside."""
    from torch.utils.flop_counter import FlopCounterMode

    side = bench.sides.sd_step("lora", gpu_setup(tmp_path), False)
    floor, aten = bench.Layers(side, True), torch.ops.aten
    counts = []
    for call in (side.call, floor):
        with FlopCounterMode(display=False) as counter:
            call()
        counts.append(counter.get_flop_counts()["Global"])
    layers = [aten.convolution, aten.convolution_backward, aten.addmm, aten.mm]
    step, alone = (sum(each.get(op, 0) for op in layers) for each in counts)
    assert 1 <= alone / step < 1.2  # the first layers' inputs need no gradient in the step
    assert len(floor.passes) > 50 and counts[1].keys() <= set(layers)


@pytest.mark.slow
def test_bench_in_processes_of_their_own(tmp_path):
    """Peaks of memory, and a whole model opened; both layouts hold the same weights."""
    pytest.importorskip("diffusers")
    setup = replace(gpu_setup(tmp_path), data=tmp_path)
    seconds, peak = bench.alone(bench.sides.cifar_forward, setup)
    assert seconds > 0 and 0.1 < peak < 10
    ours, theirs = (
        bench_files.opening(name, setup, False).call() for name in ("minidiff", "diffusers")
    )
    assert ours["weights_gb"] == pytest.approx(theirs["weights_gb"], rel=1e-3)


@pytest.mark.slow
def test_memory(tmp_path, capsys):
    """What is estimated for a tiny network is within a factor of what its training takes; the rest
    is what libraries take."""
    memory.main(small=True, out=tmp_path)
    found = written(tmp_path)
    assert {"full", "--checkpointing", "--method lora", "--optimizer adamw8bit"} <= set(
        found["by_switch"]
    )
    assert (
        all(0.05 < case["ratio"] < 1.2 for case in found["measured"].values())
        and "full" in capsys.readouterr().out
    )


def test_scaling(tmp_path, capsys):
    """A tiny network: what grows and what shrinks with devices; one device sends nothing."""
    scaling.main(batch=2, rate=1e-3, link=1e-3, small=True, out=tmp_path)
    rows = written(tmp_path, "table.md")["rows"]
    assert len(rows) == 2 * (4 + 3) and "| FSDP2 | 8 |" in capsys.readouterr().out
    by = {(row["way"], row["devices"]): row for row in rows if not row["checkpointing"]}
    alone, copies, shards = by["DDP", 1], by["DDP", 8], by["FSDP2", 8]
    assert (
        alone["sent_gb"] == 0 and alone["first_gb"] < copies["first_gb"] == by["DDP", 2]["first_gb"]
    )
    assert (
        shards["others_gb"] < by["FSDP2", 2]["others_gb"] and shards["start_gb"] > alone["start_gb"]
    )
    assert shards["sent_gb"] / copies["sent_gb"] == pytest.approx(3 / 2)
    assert copies["link_s"] == pytest.approx(copies["sent_gb"] / 1e-3)
    with pytest.raises(UserError, match="above 0"):
        scaling.main(rate=0.0, small=True, out=tmp_path)
    assert rows[0]["tflop"] < rows[7]["tflop"] and rows[0]["compute_s"] == rows[0]["tflop"] / 1e-3


def test_scaling_counts_one_device():
    """On one device FSDP2's parts make up what the estimate of one device says, but for what is
    there only with several; the gathered weights are the root's and a few blocks'."""
    counted = scaling.count(scaling.TINY, scaling.Settings(2, (32, 32), bf16=True))
    unet, alone = counted.unet, counted.alone
    assert alone.moments == 2 * unet and unet < alone.weights
    assert counted.gathered < 2 * unet
    assert alone.step <= unet + counted.activations < 2 * alone.step
    whole = scaling.fsdp2(counted, 1)[2] - counted.gathered
    assert whole == alone.weights + unet + counted.activations + alone.moments


# A GPU.


def test_gpu(tmp_path, monkeypatch, capsys):
    """Every part at its smallest, in processes of their own; a part that is at fault, one that dies
    and one that does not end are said to be so, and the next ones run."""
    (tmp_path / "faulty_parts.py").write_text(
        "import os, time\n"
        "def raises(setup):\n    raise ValueError('two\\nlines')\n    yield\n"
        "def dies(setup):\n    os._exit(3)\n    yield\n"
        "def lasts(setup):\n    time.sleep(600)\n    yield\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    import faulty_parts

    for name in ("raises", "dies", "lasts"):
        part = gpu.Part(getattr(faulty_parts, name), 1 if name == "lasts" else 30)
        monkeypatch.setitem(gpu.PARTS, name, part)
    gpu.main("lasts,raises,dies,ceiling", 1.0, tiny=True, device="cpu", out=tmp_path / "out")
    rows = written(tmp_path / "out")["rows"]
    errors = {row["part"]: row["error"] for row in rows if row["error"]}
    assert errors == {
        "raises": "ValueError: two lines",
        "dies": "the process ended with 3",
        "lasts": "its time was up",
    }
    product = next(row for row in rows if row["what"] == "matrix product")
    assert product["seconds"] > 0 and product["torch"] == torch.__version__ and product["device"]
    assert "NOT MEASURED: its time was up" in capsys.readouterr().out
    with pytest.raises(UserError, match='no part "speed"; there is correct, ceiling'):
        gpu.main("ceiling,speed", out=tmp_path / "other")


def gpu_setup(tmp_path, **how):
    settings = dict(device="cpu", tiny=True, out=tmp_path, data=None, seed=0, deadline=2e9 * 2)
    return measuring.Setup(**settings | how)


def test_gpu_training_and_the_real_loop(tmp_path):
    """Beside diffusers; and the loop's own folder, checkpoints included."""
    pytest.importorskip("diffusers")
    rows = list(gpu_training.training(gpu_setup(tmp_path)))
    assert not [row.error for row in rows if row.error]
    assert len(rows) == 2 * 2 * 3 and all(row.share > 0 for row in rows)
    assert {row.ratio is None for row in rows if "in turns" in row.note} == {True, False}
    step, waiting = gpu_training.stalls(gpu_setup(tmp_path))
    assert step.seconds > 0 and 0 < waiting.share <= 1 and waiting.note.startswith("waits ")


def test_gpu_sampling(tmp_path, monkeypatch):
    """Eager and compiled; what diffusers lacks is said, and the rest is measured."""
    monkeypatch.setattr(torch.nn.Module, "compile", lambda *_, **__: None)
    monkeypatch.setitem(sys.modules, "diffusers", None)
    rows = list(gpu_sampling.sample(gpu_setup(tmp_path)))
    errors = {row.what: row.error for row in rows if row.error}
    assert errors.pop("diffusers").startswith("ModuleNotFoundError")
    assert set(errors.values()) == {"needs a GPU"} and len(errors) == 2
    measured = [row for row in rows if row.seconds]
    assert len(measured) == 8 and all(row.floor and row.share for row in measured)


def test_gpu_out_of_memory_is_a_row(tmp_path, monkeypatch):
    def rows():
        yield measuring.Row("first")
        raise torch.OutOfMemoryError("CUDA out of memory")

    first, second = measuring.tried("second", rows(), "cpu")
    assert first.error == "" and second.error == "OutOfMemoryError: CUDA out of memory"
    model = measuring.stable_diffusion(gpu_setup(tmp_path), torch.float32)
    full = (gpu_setup(tmp_path), model, gpu_training.tuning("lora", 1, False), 2e9, 1.0)
    monkeypatch.setattr(
        gpu_training, "fine_tuning", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError)
    )
    assert [row.note for row in gpu_training.fits(*full)] == ["said to fit: out of memory"]


def test_gpu_smaller_cards(tmp_path):
    notes = [row.note for row in gpu_training.capped(gpu_setup(tmp_path))]
    assert len(notes) == 16 and set(notes) == {"said to fit: fits"}


def test_gpu_cifar(tmp_path):
    for k in range(2):
        picture(tmp_path / f"train_{k}.webp", seed=k, size=160)
    paper, fast = gpu_long.cifar(gpu_setup(tmp_path, data=tmp_path))
    assert (
        "paper" in paper.what and "floor" in fast.note and (tmp_path / "cifar_small.png").exists()
    )


def test_gpu_photos(photo_shards, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="needs shards"):
        next(gpu_long.photos(gpu_setup(tmp_path)))
    monkeypatch.setenv("PYTHONPATH", str(EXPERIMENTS.parent))
    (row,) = gpu_long.photos(gpu_setup(tmp_path, data=photo_shards))
    assert "2 steps" in row.note and row.batch == 2
    assert minidiff.load(tmp_path / "photos" / "model").size == 64
    assert not (tmp_path / "photos" / "training").exists()


def test_synchronisations_by_place_and_a_trace(tmp_path):
    with pytest.warns(UserWarning, match="another"), waits.synchronisations("cpu") as places:
        for _ in range(3):
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        warnings.warn("another", stacklevel=1)
    assert list(places.values()) == [3] and next(iter(places)).startswith("tests/test_experiments")
    events = [{"cat": "kernel", "ts": ts, "dur": dur} for ts, dur in ((0, 10), (5, 5), (3010, 990))]
    events += [
        {"cat": "cuda_runtime", "name": "cudaStreamSynchronize", "ts": 1, "dur": 1},
        {"ph": "M"},
    ]
    (tmp_path / "trace.json").write_text(json.dumps({"traceEvents": events}))
    busy = waits.busy_in(tmp_path / "trace.json")
    assert (busy.events, busy.share, busy.longest) == (3, 0.25, 0.003)
    assert (busy.gaps_above_a_millisecond, busy.synchronising) == (1, {"cudaStreamSynchronize": 1})


def test_unet_or_dit(tmp_path, monkeypatch):
    torch.manual_seed(0)
    parts = quickstart.vae_quickstart(), quickstart.text_quickstart()
    unet = Denoiser(quickstart.unet_quickstart(), schedules.cosine(), "x0")
    LatentDiffusion(*parts, unet, 32, guidance=2.0).save(tmp_path / "model")
    settings = dict(model=tmp_path / "model", steps=2, captions=1, pool=64)
    monkeypatch.setattr(quickstart, "BATCH", 4)
    unet_or_dit.main(**settings, out=tmp_path / "out")
    results = written(tmp_path / "out", "samples.png", "table.csv")
    runs = [(row["equal"], row["network"], row["target"]) for row in results["rows"]]
    networks = [("U-Net", "x0"), ("U-Net", "flow"), ("transformer", "x0"), ("transformer", "flow")]
    expected = [("operations", *each) for each in networks]
    assert runs == [*expected, ("time", "transformer", "x0"), ("time", "transformer", "flow")]
    tflop = [float(row["tflop"]) for row in results["rows"][:4]]
    assert max(tflop) <= 1.3 * min(tflop) + 0.02  # whole steps, and there are two
    first = (tmp_path / "out" / "table.csv").read_bytes()
    monkeypatch.setattr(unet_or_dit, "follow", lambda *_: {}["every row is there"])
    unet_or_dit.main(**settings, out=tmp_path / "out")
    assert (tmp_path / "out" / "table.csv").read_bytes() == first
    with pytest.raises(UserError, match="no model of the quickstart"):
        unet_or_dit.main(Path("box"), out=tmp_path / "other")


# The ControlNet.


def test_controlnet_writes_what_it_says(tmp_path):
    controlnet.main(tmp_path, pairs=50, steps=2, batch=2, captions=2, watch=1)
    results = written(tmp_path, "controlnet.safetensors", "controlnet.png")
    assert [row["control"] for row in results["rows"][:4]] == [
        "without",
        "with",
        "half",
        "true pictures through the VAE",
    ]
    vae = results["rows"][3]
    assert vae["accuracy"][0] == 1 and vae["overlap"][0] > 0.7
    assert [step for step, _ in results["curve"]] == [1, 2]


def test_controlnet_learns_from_pairs_of_yours(tmp_path):
    images, captions, _ = World(32).batch(3, seed=0)
    for name in ("data", "hints"):
        (tmp_path / name).mkdir()
        for k, image in enumerate(images):
            pixels = to_uint8(image).permute(1, 2, 0).numpy()
            Image.fromarray(pixels).save(tmp_path / name / f"{k}.png")
            (tmp_path / "data" / f"{k}.txt").write_text(captions[k])
    folders = {"data": tmp_path / "data", "hints": tmp_path / "hints"}
    controlnet.main(tmp_path / "out", **folders, steps=1, batch=2)
    assert "rows" not in written(tmp_path / "out", "controlnet.safetensors")
    with pytest.raises(UserError, match="data and hints belong together"):
        controlnet.main(tmp_path / "out", data=tmp_path / "data")
