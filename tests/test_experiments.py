"""Every experiment at its smallest size: it writes what it says, resumes bit for bit, and complains in one line."""
import importlib
import json
import random
import signal
import sys
from pathlib import Path

import pytest
import torch
from jaxtyping import install_import_hook
from PIL import Image
from safetensors.torch import load_file

from minidiff import schedules, script
from minidiff.data.world import INVERSE, Scene, World
from minidiff.errors import UserError

NAMES = ("toy_2d", "forward_chain", "cifar_ddpm", "text_to_image", "pretrain_box", "coco_metadata")
sys.path.insert(0, str(Path(__file__).parents[1] / "experiments"))
with install_import_hook(NAMES, "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))"):
    toy_2d, forward_chain, cifar_ddpm, text_to_image, pretrain_box, coco_metadata = (importlib.import_module(name) for name in NAMES)


def written(out, *names):
    for name in names:
        assert (out / name).stat().st_size > 0, name
    return json.loads((out / "results.json").read_text())


def stop_at(step):
    """In place of the progress bar: Ctrl-C while that step is looked at, so that training stops after the next, saved."""

    def follow(training, *_):
        for done in training:
            if done.step == step:
                signal.raise_signal(signal.SIGINT)

    return follow


def same(a, b, model="model"):
    for part in ("unet", "text", "vae"):
        ours, theirs = load_file(a / model / f"{part}.safetensors"), load_file(b / model / f"{part}.safetensors")
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)
    for name in ("log.jsonl",):
        for path in (a / "training").rglob(name):
            assert path.read_text() == (b / path.relative_to(a)).read_text()


def picture(path, seed, size=32):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = torch.randint(0, 256, (size, size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    Image.fromarray(pixels.numpy()).save(path)


# The plane.


@pytest.mark.parametrize("density", ["moons", "ring"])
def test_toy_exact_score_is_the_gradient_of_the_log_density(density):
    """-eps / sigma_t against autograd through log p_t(x) = log sum_k N(x; alpha c_k, alpha^2 std^2 + sigma^2)."""
    mixture, schedule = toy_2d.Mixture(density), schedules.cosine()
    x, t = torch.randn(20, 2, dtype=torch.float64, requires_grad=True), torch.full((20,), 300)
    alpha, sigma = (scale[0].item() for scale in schedule.alpha_sigma(t))
    spread = alpha**2 * mixture.std**2 + sigma**2
    log_density = torch.logsumexp(-(x[:, None] - alpha * mixture.centres).pow(2).sum(-1) / (2 * spread), dim=1)
    score = torch.autograd.grad(log_density.sum(), x)[0]
    found = mixture.denoiser(schedule)(x.detach(), t)
    assert torch.allclose(-found.eps / sigma, score, rtol=1e-10, atol=1e-10)
    assert torch.allclose(alpha * found.x0 + sigma * found.eps, x, rtol=1e-12, atol=1e-12)


def test_toy_density_has_unit_variance_and_no_strays():
    mixture = toy_2d.Mixture("moons")
    draws = mixture.draw(20_000, torch.Generator().manual_seed(0))
    assert draws.mean(0).abs().max() < 0.03 and abs(draws.pow(2).mean() - 1) < 0.03  # four standard errors
    assert mixture.strays(draws) < 0.001 and mixture.strays(torch.full((4, 2), 9.0)) == 1


def test_toy_energy_distance():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(500, 2, generator=generator), torch.randn(500, 2, generator=generator)
    assert abs(toy_2d.energy_distance(x, x)) < 1e-6
    assert toy_2d.energy_distance(x, y) < 0.02 < 0.5 < toy_2d.energy_distance(x, y + 1)


def test_toy_2d(tmp_path):
    toy_2d.main(out=tmp_path, steps=4, batch=16, width=16, n=50, sampling_steps=3)
    results = written(tmp_path, "toy_2d.png", "loss.png")
    assert {"distance_floor", "distance_exact", "distance_learnt", "score_error_t250", "strays_learnt", "loss", "seed"} <= results.keys()


# The forward chain.


def test_forward_chain(tmp_path, capsys):
    picture(tmp_path / "own.png", seed=0, size=40)
    forward_chain.main(image=tmp_path / "own.png", schedules=("linear", "flow"), size=32, columns=3, out=tmp_path)
    results = written(tmp_path, "forward_chain.png", "schedules.png")
    assert results["schedules"]["flow"]["alpha_is_sigma_at"] == 0.5 and results["schedules"]["flow"]["snr"]["0.5"] == 1
    assert results["schedules"]["linear"]["snr"]["0.9"] < 1e-3
    assert "alpha = sigma at t = 0.5" in capsys.readouterr().out


# CIFAR-10.


@pytest.fixture
def classes(tmp_path):
    for k in range(8):
        picture(tmp_path / "data" / "train" / ("cat", "dog")[k % 2] / f"{k}.png", seed=k)
    return tmp_path / "data"


def test_cifar_ddpm(classes, tmp_path, monkeypatch, capsys):
    settings = dict(data=classes / "train", preset="tiny", each=2)
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    cifar_ddpm.main(**settings, out=whole)
    results = written(whole, "samples.png", "forward.png", "reverse.png", "reverse.gif", "loss.png", "model/model.json")
    assert {"images_per_second", "steps", "loss", "seconds", "seed"} <= results.keys()

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(cifar_ddpm, "follow", stop_at(1))
        cifar_ddpm.main(**settings, out=halves)
    assert len((halves / "training" / "log.jsonl").read_text().splitlines()) == 2
    cifar_ddpm.main(**settings, out=halves, resume=True)
    same(whole, halves)

    before = (whole / "samples.png").read_bytes()
    assert before == (halves / "samples.png").read_bytes()
    (whole / "samples.png").unlink()
    cifar_ddpm.main(**settings, out=whole, sample_only=True)
    assert before == (whole / "samples.png").read_bytes()


def test_cifar_ddpm_unconditional(classes, tmp_path):
    cifar_ddpm.main(data=classes / "train", preset="tiny", out=tmp_path / "out", conditional=False, steps=1, each=1, pictures=4)
    assert written(tmp_path / "out", "samples.png")["conditional"] is False


def test_cifar_batches_see_every_picture_once_an_epoch():
    pictures = torch.arange(6, dtype=torch.uint8).view(6, 1, 1, 1).expand(6, 3, 32, 32).contiguous()
    labels = [str(k) for k in range(6)]
    stream = cifar_ddpm.batches(pictures, labels, 2, seed=0, start=0)
    three = [next(stream) for _ in range(6)]
    assert sorted(label for _, names in three[:3] for label in names) == labels == sorted(label for _, names in three[3:] for label in names)
    again, names = next(cifar_ddpm.batches(pictures, labels, 2, seed=0, start=4))
    assert names == three[4][1] and torch.equal(again, three[4][0])
    with pytest.raises(UserError, match="only 6 pictures"):
        next(cifar_ddpm.batches(pictures, labels, 7, seed=0, start=0))


def test_cifar_paper_preset_is_the_paper():
    paper = cifar_ddpm.PRESETS["paper"]
    unet = paper.unet(None)
    assert sum(p.numel() for p in unet.parameters()) == pytest.approx(35.7e6, rel=0.03)  # [1] appendix B; ours has projections around its attention
    assert (paper.target, paper.steps, paper.batch, paper.lr, paper.ema, unet.numbers["dropout"]) == ("eps", 800_000, 128, 2e-4, 0.9999, 0.1)
    assert paper.schedule == schedules.linear()


# Text to image.


@pytest.fixture
def captioned(tmp_path):
    captions = ["a cat", "a dog", "a bowl of apples", "two birds"]
    for k in range(4):
        picture(tmp_path / "data" / f"{k}.png", seed=k)
    lines = [json.dumps({"file_name": f"{k}.png", "caption": caption}) for k, caption in enumerate(captions)]
    (tmp_path / "data" / "metadata.jsonl").write_text("\n".join(lines))
    return tmp_path / "data"


def test_text_to_image(captioned, tmp_path, monkeypatch):
    settings = dict(data=captioned, prompts=("two birds", "a red car"), size=32, caption_column="caption", width=32, vae_width=8)
    settings |= dict(vae_steps=3, vae_batch=2, steps=4, batch=2, sampling_steps=2, judged=3)
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    text_to_image.main(**settings, out=whole)
    results = written(whole, "generated.png", "real_vs_generated.png", "reverse.png", "reverse.gif", "loss.png", "vae_loss.png", "model/model.json")
    assert {"vae_psnr_db", "nearest_training_picture_rms", "nearest_is_the_captioned_one", "images_per_second", "seed"} <= results.keys()

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


# The model in the box.


def test_pretrain_box(tmp_path, monkeypatch):
    settings = dict(vae_steps=3, text_steps=3, text_batch=4, steps=4, batch=2, pool=8, captions=2)
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    pretrain_box.main(**settings, out=whole)
    results = written(whole, "samples.png", "loss.png", "text_loss.png", "box/model.json")
    assert {"accuracy_one_object", "accuracy_two_objects_vae_alone", "megabytes", "images_per_second", "seed"} <= results.keys()
    assert results["megabytes"] <= 12

    for step in (1, 2, 3):  # Ctrl-C in every act
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(pretrain_box, "follow", stop_at(1))
            pretrain_box.main(**settings, out=halves, resume=step > 1)
    pretrain_box.main(**settings, out=halves, resume=True)
    same(whole, halves, "box")


def test_a_scene_is_the_same_whichever_thing_is_named_first():
    """ "A above B" and "B below A" are one picture, and one lesson; every lesson has a code."""
    world, rng = World(32, pretrain_box.SHAPES, pretrain_box.COLOURS), random.Random(0)
    for _ in range(50):
        scene = world.scene(rng, objects=2)
        turned = Scene(scene.things[::-1], scene.background, INVERSE[scene.relation])
        assert sorted(pretrain_box.pairs(scene)) == sorted(pretrain_box.pairs(turned)) and len(set(pretrain_box.pairs(scene))) == 7
        assert set(pretrain_box.pairs(scene)) <= set(pretrain_box.all_pairs(world))
    swapped = Scene(scene.things[::-1], scene.background, scene.relation)
    assert sorted(pretrain_box.pairs(scene)) != sorted(pretrain_box.pairs(swapped))


# COCO.


def test_coco_metadata(tmp_path, capsys):
    for name in ("1.jpg", "2.jpg", "3.jpg"):
        picture(tmp_path / "images" / name, seed=1)
    images = [{"id": k, "file_name": f"{k}.jpg", "license": 4} for k in (1, 2, 9)]
    captions = [(1, "A cat. "), (2, "A bowl of apples."), (1, "A cat\non a bed."), (9, "A dog.")]
    annotations = [{"image_id": k, "caption": caption} for k, caption in captions]
    whole = {"images": images, "annotations": annotations, "licenses": [{"id": 4, "url": "by"}]}
    (tmp_path / "captions.json").write_text(json.dumps(whole))
    coco_metadata.main((tmp_path / "captions.json",), tmp_path / "images", tmp_path / "out")
    lines = [json.loads(line) for line in (tmp_path / "out" / "metadata.jsonl").read_text().splitlines()]
    assert [line["text"] for line in lines] == ["A cat.", "A bowl of apples."] and lines[0]["captions"] == ["A cat.", "A cat on a bed."]
    assert lines[0]["license"] == "by" and all((tmp_path / "out" / line["file_name"]).is_file() for line in lines)
    assert "2 pictures; left out: 1 pictures without captions, 1 captioned pictures" in capsys.readouterr().out

    coco_metadata.main((tmp_path / "captions.json",), tmp_path / "images", tmp_path / "few", contains=("apples",))
    assert len((tmp_path / "few" / "metadata.jsonl").read_text().splitlines()) == 1
    (tmp_path / "captions.json").write_text("{}")
    with pytest.raises(UserError, match="not a COCO caption file"):
        coco_metadata.main((tmp_path / "captions.json",), tmp_path / "images", tmp_path / "out")


def test_coco_metadata_on_real_annotations(real_data, tmp_path):
    annotations = tuple(real_data / "coco" / name for name in ("captions_val2017.json", "captions_train2017_subset.json"))
    coco_metadata.main(annotations, real_data / "coco" / "images", tmp_path)
    texts = {json.loads(line)["file_name"]: json.loads(line)["text"] for line in (tmp_path / "metadata.jsonl").read_text().splitlines()}
    assert len(texts) == 111 and texts["images/000000002149.jpg"] == "A large white bowl of many green apples."


# As commands.


@pytest.mark.parametrize("arguments", [["--image", "nowhere.png"], ["--columns", "1"]])
def test_bad_input_is_one_line_and_exit_code_2(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["forward_chain.py", "--out", str(tmp_path), *arguments])
    with pytest.raises(SystemExit) as exit_code:
        script.run(forward_chain.main)
    assert exit_code.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_ctrl_c_is_exit_code_130(monkeypatch, capsys):
    def main() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "argv", ["main.py"])
    with pytest.raises(SystemExit) as exit_code:
        script.run(main)
    assert exit_code.value.code == 130 and "--resume" in capsys.readouterr().err


def test_a_device_that_is_not_there():
    with pytest.raises(UserError, match="--device is one of auto"):
        script.pick_device("tpu")
    assert script.pick_device("auto") in ("cpu", "cuda", "mps")
