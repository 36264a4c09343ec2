"""The composition: what it refuses, what its seeds and scales mean, and model folders, whole and damaged."""

import inspect
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import minidiff
from minidiff import pipeline, schedules
from minidiff.checkpoints import folder as model_folder
from minidiff.conditioners import ClassLabels, LabelsConfig, Unconditional
from minidiff.denoiser import Denoiser
from minidiff.errors import UserError
from minidiff.latent_diffusion import LatentDiffusion
from minidiff.options.sampling import SampleConfig, Size
from minidiff.samplers import Normal, ddpm
from minidiff.text import CLIPText, TextConfig
from minidiff.unet import UNet, UNetConfig
from minidiff.vae import VAE, Pixels, PixelsConfig, VAEConfig

PROMPTS = ["a small blue circle", "a large red square"]


def model(vae=None, text=None, schedule=None, target="eps", weighting=None, **how):
    """A model of a few thousand random weights, none of them zero."""
    torch.manual_seed(1)
    vae = vae or VAE(VAEConfig(3, 4, channels=(4, 8), blocks=1, groups=2))
    text = text or CLIPText(
        TextConfig(width=8, layers=1, heads=2, context_length=10, pad=0, activation="gelu")
    )
    unet = UNet(
        UNetConfig(
            vae.latent_channels,
            vae.latent_channels,
            (8, 8),
            blocks=1,
            depth=(0, 1),
            heads=(1, 2),
            context_dim=text.dim,
            groups=2,
        )
    )
    for p in (*vae.parameters(), *text.parameters(), *unet.parameters()):
        torch.nn.init.normal_(p, std=1 / math.sqrt(max(p[0].numel(), 4)))
    return LatentDiffusion(
        vae,
        text,
        Denoiser(unet, schedule or schedules.scaled_linear(), target, weighting),
        size=16,
        **how,
    ).eval()


def pictures(diffusion, seed=0, prompts=PROMPTS, batch=64, **how):
    config = SampleConfig(steps=3, seed=seed, **how)
    return pipeline.generate(diffusion, prompts, config, batch)


def test_text_and_unet_must_have_one_width():
    text, unet = (
        CLIPText(TextConfig(width=16, layers=1, heads=2)),
        UNet(UNetConfig(4, 4, (8,), 1, (1,), (1,), context_dim=24, groups=2)),
    )
    with pytest.raises(UserError, match="vectors of width 16, the U-Net expects 24"):
        LatentDiffusion(Pixels(PixelsConfig(4)), text, Denoiser(unet, schedules.linear()), size=8)
    with pytest.raises(UserError, match="vectors of width None, the U-Net expects 24"):
        LatentDiffusion(
            Pixels(PixelsConfig(4)), Unconditional(), Denoiser(unet, schedules.linear()), size=8
        )


@pytest.mark.parametrize(
    "schedule, target, weighting",
    [
        (schedules.scaled_linear(), "eps", "min-snr"),
        (schedules.Discrete("linear", T=50, zero_terminal_snr=True), "v", None),
        (schedules.Flow(mean=0.5, shift=3.0), "flow", None),
        (schedules.Karras(sigma_max=40.0), "edm", "p2"),
    ],
    ids=["eps", "v", "flow", "edm"],
)
def test_save_and_load_bit_for_bit(tmp_path, schedule, target, weighting):
    saved = model(
        schedule=schedule,
        target=target,
        weighting=weighting,
        dropout=0.2,
        guidance=3.5,
        sampler="ddpm",
    )
    saved.vae.measure_scale(torch.rand(2, 3, 16, 16))
    assert saved.save(tmp_path / "m") == tmp_path / "m"
    loaded = minidiff.load(tmp_path / "m")
    assert {p.name for p in (tmp_path / "m").iterdir()} == {
        "model.json",
        "vae.safetensors",
        "text.safetensors",
        "unet.safetensors",
    }
    before, after = saved.state_dict(), loaded.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    assert loaded.vae.latent_scale == saved.vae.latent_scale != 1
    assert (loaded.schedule, loaded.denoiser.target, loaded.denoiser.weighting) == (
        schedule,
        target,
        weighting or target,
    )
    assert (loaded.size, loaded.dropout, loaded.guidance, loaded.sampler, loaded.training) == (
        16,
        0.2,
        3.5,
        "ddpm",
        False,
    )
    assert (loaded.text.config, loaded.text.pad) == (saved.text.config, 0)
    assert torch.equal(pictures(loaded), pictures(saved))


def test_saving_again_replaces(tmp_path):
    first = model()
    first.save(tmp_path / "m")
    model(guidance=7.0).save(tmp_path / "m")
    assert minidiff.load(tmp_path / "m").guidance == 7.0
    (tmp_path / "m" / "stray").write_text("")
    with pytest.raises(
        UserError, match="stray was not written by minidiff"
    ):  # nobody else's file goes with the old folder
        model().save(tmp_path / "m")
    assert minidiff.load(tmp_path / "m").guidance == 7.0
    assert [p.name for p in tmp_path.iterdir()] == ["m"] and (tmp_path / "m" / "stray").exists()


@pytest.mark.parametrize("failing", ["vae", "text", "unet"])
def test_an_interrupted_save_leaves_the_old_folder_loadable(tmp_path, monkeypatch, failing):
    old = model()
    old.save(tmp_path / "m")

    def interrupted(state, file):
        if failing in file.name:
            raise KeyboardInterrupt
        file.write_bytes(b"half")

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(model_folder, "save_file", interrupted)
        model(guidance=7.0).save(tmp_path / "m")
    assert torch.equal(pictures(minidiff.load(tmp_path / "m")), pictures(old))
    model(guidance=7.0).save(tmp_path / "m")
    assert minidiff.load(tmp_path / "m").guidance == 7.0 and [
        p.name for p in tmp_path.iterdir()
    ] == ["m"]


def edit(change):
    """Spoil model.json through its parsed form."""

    def spoil(folder):
        whole = json.loads((folder / "model.json").read_text())
        change(whole)
        (folder / "model.json").write_text(json.dumps(whole))

    return spoil


def truncate(folder):
    data = (folder / "unet.safetensors").read_bytes()
    (folder / "unet.safetensors").write_bytes(data[: len(data) // 2])


@pytest.mark.parametrize(
    "spoil, file, complaint",
    [
        (
            lambda folder: (folder / "model.json").unlink(),
            "",
            "is no checkpoint: neither model.json",
        ),
        (
            lambda folder: (folder / "model.json").write_text('{"size": 16,'),
            "model.json",
            "is damaged",
        ),
        (
            lambda folder: (folder / "model.json").write_bytes(b"\xff\xfe"),
            "model.json",
            "is damaged",
        ),
        (lambda folder: (folder / "model.json").write_text("[]"), "model.json", "is damaged"),
        (edit(lambda whole: whole.pop("vae")), "model.json", "is damaged"),
        (edit(lambda whole: whole["text"].update(kind="T5")), "model.json", "T5"),
        (edit(lambda whole: whole["unet"].update(wings=2)), "model.json", "wings"),
        (
            edit(lambda whole: whole["denoiser"].update(target="noise")),
            "model.json",
            "is damaged .*no target",
        ),
        (
            edit(lambda whole: whole["unet"].update(heads=[3, 3])),
            "model.json",
            "is damaged .*3 heads do not divide",
        ),
        (edit(lambda whole: whole["unet"].update(channels=[-8, 8])), "model.json", "is damaged"),
        (edit(lambda whole: whole.update(size="big")), "model.json", "is damaged .*big"),
        (edit(lambda whole: whole.update(sampler="xxx")), "model.json", "is damaged .*no sampler"),
        (lambda folder: (folder / "text.safetensors").unlink(), "text.safetensors", "is missing"),
        (truncate, "unet.safetensors", "is damaged"),
        (
            lambda folder: (folder / "vae.safetensors").write_bytes(b""),
            "vae.safetensors",
            "is damaged",
        ),
        (
            edit(lambda whole: whole["unet"].update(channels=[8, 16])),
            "unet.safetensors",
            "does not fit model.json",
        ),
        (
            edit(lambda whole: whole["text"].update(layers=2)),
            "text.safetensors",
            "does not fit model.json",
        ),
    ],
    ids=[
        "no model.json",
        "half a model.json",
        "no text",
        "a list",
        "no vae",
        "unknown kind",
        "unknown number",
        "unknown target",
        "heads",
        "negative",
        "size",
        "unknown sampler",
        "no weights",
        "truncated",
        "empty",
        "another width",
        "another depth",
    ],
)
def test_every_load_error_is_one_line_that_names_the_file(tmp_path, spoil, file, complaint):
    folder = model().save(tmp_path / "m")
    spoil(folder)
    with pytest.raises(UserError, match=complaint) as refused:
        minidiff.load(folder)
    assert (
        "\n" not in str(refused.value)
        and str(folder) in str(refused.value)
        and file in str(refused.value)
    )


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(UserError, match=r'no model folder ".*nowhere"'):
        minidiff.load(tmp_path / "nowhere")


def test_a_seed_is_a_picture():
    diffusion = model()
    assert torch.equal(pictures(diffusion), pictures(diffusion))
    assert (pictures(diffusion) - pictures(diffusion, seed=1)).abs().max() > 0.01
    assert pictures(diffusion).shape == (2, 3, 16, 16) and pictures(diffusion).abs().max() <= 1
    noise = Normal.seeded(0, [0, 1])(torch.empty(2, 4, 8, 8))
    *_, last = diffusion.sample(PROMPTS, 3, x_T=noise)
    assert torch.equal(diffusion.decode(last.x0).clamp(-1, 1), pictures(diffusion))


def test_a_model_samples_with_its_own_sampler_unless_told():
    how = dict(prompts=["a circle"], guidance=1)
    ancestral, plain = model(sampler="ddpm"), model()
    noise = Normal.seeded(0, [0])  # for x_T and for the noise on the way
    *_, last = plain.sample(["a circle"], 3, 1, noise, ddpm())
    told = plain.decode(last.x0).clamp(-1, 1)
    assert not torch.equal(pictures(ancestral, **how), pictures(plain, **how))
    assert torch.equal(pictures(ancestral, **how), pictures(ancestral, **how))
    assert torch.equal(pictures(ancestral, **how), told)
    assert torch.equal(pictures(plain, sampler="ddpm", **how), told)
    with pytest.raises(UserError, match='no sampler "xxx"'):
        model(sampler="xxx")


def test_many_prompts_go_in_batches():
    diffusion = model()
    sizes = []
    diffusion.unet.register_forward_hook(lambda m, x, y: sizes.append(len(x[0])))
    assert pictures(diffusion, prompts=["a circle"] * 5, batch=2, guidance=1).shape == (
        5,
        3,
        16,
        16,
    )
    assert sizes == [2, 2, 2, 2, 2, 2, 1, 1, 1]


@pytest.mark.parametrize(
    "schedule, target, spread",
    [
        (schedules.scaled_linear(), "eps", 1),
        (schedules.Flow(), "flow", 1),
        (schedules.Karras(), "edm", math.sqrt(6401)),
    ],
    ids=["discrete", "flow", "karras"],
)
def test_sampling_is_lazy_and_starts_at_the_schedules_noise(schedule, target, spread):
    diffusion, calls = model(schedule=schedule, target=target), []
    diffusion.unet.register_forward_hook(lambda *_: calls.append(1))
    frames = diffusion.sample(PROMPTS, steps=4, generator=torch.Generator().manual_seed(0))
    assert inspect.isgenerator(frames) and not calls
    first = next(frames)
    assert len(calls) == 1 and torch.is_grad_enabled() and first.t == schedule.timesteps(1)[0]
    torch.testing.assert_close(
        first.x,
        spread * Normal.split(torch.Generator().manual_seed(0), 2)(torch.empty(2, 4, 8, 8)),
        rtol=1e-6,
        atol=0,
    )  # fp32
    rest = list(frames)
    assert (
        len(rest) == 4
        and len(calls) == 4
        and rest[-1].t == 0
        and torch.equal(rest[-1].x, rest[-1].x0)
    )


def first_guess(diffusion, prompts=PROMPTS, **how):
    return next(
        diffusion.sample(prompts, steps=3, generator=torch.Generator().manual_seed(0), **how)
    ).x0


def test_guidance():
    """null + scale (context - null) on the first guess of x0; 0 ignores the text, 1 is the plain conditional model."""
    diffusion = model(guidance=4.0)
    none, plain, strong = (first_guess(diffusion, guidance=scale) for scale in (0, 1, 4))
    assert torch.equal(none, first_guess(diffusion, prompts=["a green ring", ""], guidance=0))
    # encoded one by one or as a batch, the empty prompt is the same up to the order of fp32 additions
    torch.testing.assert_close(
        none, first_guess(diffusion, prompts=["", ""], guidance=1), rtol=1e-4, atol=1e-4
    )
    assert (plain - first_guess(diffusion, prompts=PROMPTS[::-1], guidance=1)).abs().max() > 1e-3
    torch.testing.assert_close(
        strong, none + 4 * (plain - none), rtol=0, atol=1e-5 * strong.abs().max().item()
    )  # fp32
    assert (strong - plain).abs().max() > 1e-3
    assert torch.equal(first_guess(diffusion), strong)  # left out, it is the model's own


def loss(diffusion, prompts):
    torch.manual_seed(0)
    return diffusion.loss(torch.ones(4, 3, 16, 16), prompts)


def test_condition_dropout():
    some, others = [*PROMPTS, *PROMPTS], ["a green ring"] * 4
    always, never, half = (model(dropout=share) for share in (1.0, 0.0, 0.5))
    assert torch.equal(loss(always, some), loss(always, others)) and torch.equal(
        loss(always, some), loss(always, [""] * 4)
    )
    assert (loss(never, some) != loss(never, others)).all()
    torch.manual_seed(0)
    hidden = torch.rand(4) < 0.5  # the first thing drawn
    assert 0 < hidden.sum() < 4
    assert torch.equal(loss(half, some) == loss(half, others), hidden)


def test_loss_is_the_denoisers_loss_on_latents():
    diffusion, images, t = model(dropout=0.0), torch.rand(2, 3, 16, 16), torch.tensor([10, 900])
    latents, context = diffusion.vae.encode(images), diffusion.text.encode(PROMPTS)
    torch.manual_seed(0)
    found = diffusion.loss(images, PROMPTS, t)
    torch.manual_seed(0)
    torch.rand(2)  # which conditions to hide
    expected = diffusion.denoiser.loss(latents, context, t)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    found.sum().backward()
    assert all(p.grad is None for p in diffusion.vae.parameters())  # the VAE is not trained by it
    assert all(
        p.grad is not None for part in (diffusion.text, diffusion.unet) for p in part.parameters()
    )


@pytest.mark.parametrize("size, nearest", [(17, "sizes are 16 and 18"), (1, "size is 2")])
def test_other_sizes(size, nearest):
    diffusion = model()
    assert pictures(diffusion, size=Size(24, 18)).shape == (2, 3, 24, 18)
    with pytest.raises(
        UserError, match=f"size {size} is not divisible by 2; the nearest valid {nearest}"
    ):
        pictures(diffusion, size=Size(size, size))


@pytest.mark.parametrize(
    "text, conditions",
    [
        (Unconditional(), ["", ""]),
        (ClassLabels(LabelsConfig(["cat", "dog"], dim=8)), ["dog", "cat"]),
    ],
    ids=["unconditional", "classes"],
)
def test_pixels_without_text(tmp_path, text, conditions):
    """Pixel diffusion, unconditional or by class, is the same composition with smaller parts."""
    diffusion = model(vae=Pixels(PixelsConfig(3)), text=text)
    diffusion.loss(torch.rand(2, 3, 16, 16), conditions).sum().backward()
    assert all(p.grad is not None for p in diffusion.parameters())
    found = pictures(diffusion, prompts=conditions)
    assert found.shape == (2, 3, 16, 16)
    loaded = minidiff.load(diffusion.save(tmp_path / "m"))
    assert torch.equal(pictures(loaded, prompts=conditions), found)
    swapped = pictures(diffusion, prompts=conditions[::-1])
    assert torch.equal(swapped, found) == isinstance(text, Unconditional)


def test_a_save_killed_between_its_renames_is_put_right(tmp_path):
    folder = model().save(tmp_path / "m")
    code = f"""
import os, signal
import minidiff
model, replace = minidiff.load({str(folder)!r}), os.replace
def killing(source, target):
    replace(source, target)
    os.kill(os.getpid(), signal.SIGKILL)
os.replace = killing
model.save({str(folder)!r})
"""
    here = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    assert (
        subprocess.run([sys.executable, "-c", code], env=here).returncode == -signal.SIGKILL
        and not folder.exists()
    )
    minidiff.load(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_a_folder_of_another_format_is_refused(tmp_path):
    folder = model().save(tmp_path / "m")
    edit(lambda whole: whole.update(format="minidiff 99"))(folder)
    with pytest.raises(UserError, match=r'model\.json.*format "minidiff 99"'):
        minidiff.load(folder)


def test_nothing_to_generate_is_said():
    with pytest.raises(UserError, match="no prompts"):
        pipeline.generate(model(), [])
