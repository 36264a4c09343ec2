"""Figures of chains and schedules show what they say: arguments of the plots, and real files."""

import pytest
import torch
from PIL import Image

from minidiff import schedules
from minidiff.denoiser import Denoiser
from minidiff.figures import chains, plots
from minidiff.latent_diffusion import LatentDiffusion
from minidiff.samplers import Frame
from minidiff.text import CLIPText, TextConfig
from minidiff.unet import UNet, UNetConfig
from minidiff.vae import VAE, Pixels, VAEConfig

ALL = [
    schedules.linear(),
    schedules.cosine(),
    schedules.Discrete("linear", T=20),
    schedules.Flow(),
    schedules.Karras(),
]


def name(schedule):
    return f"{type(schedule).__name__}{getattr(schedule, 'T', '')}"


def model(vae, schedule):
    z = vae.latent_channels
    unet = UNet(
        UNetConfig(
            z, z, channels=(32, 32), blocks=1, depth=(0, 0), heads=(1, 1), context_dim=32, groups=8
        )
    )
    return LatentDiffusion(
        vae,
        CLIPText(TextConfig(width=32, layers=1, heads=2, context_length=32)),
        Denoiser(unet, schedule, "v"),
        size=32,
    )


def latent_model(schedule):
    return model(VAE(VAEConfig(3, 4, channels=(8, 16), blocks=1, groups=4)), schedule)


def frames_of(model, batch, steps):
    """Frames as a sampler gives them, made up."""
    side = model.size // model.vae.factor
    drawn = [
        Frame(t.item(), *torch.randn(2, batch, model.vae.latent_channels, side, side))
        for t in model.schedule.timesteps(steps)
    ]
    return [*drawn[:-1], drawn[-1]._replace(x0=drawn[-1].x)]


@pytest.fixture
def drawn(monkeypatch):
    """The arguments of the plots.

    {"strip": (rows, labels, path, title), "animate": (frames, labels, path),
    "schedules": (curves, path)}
    """
    asked = {}

    def catch(figure):
        def draw(*args):
            asked[figure] = args
            return args[1] if figure == "schedules" else args[2]

        monkeypatch.setattr(plots, figure, draw)

    for figure in ("strip", "animate", "schedules"):
        catch(figure)
    return asked


@pytest.mark.parametrize("schedule", ALL, ids=name)
def test_forward_is_the_closed_form_with_one_eps(drawn, tmp_path, schedule):
    picture = torch.rand(1, 3, 8, 8) * 2 - 1
    written = chains.plot_forward(
        picture, schedule, tmp_path, torch.Generator().manual_seed(1), "title"
    )
    assert written == [tmp_path / "forward.png", tmp_path / "forward.gif"]
    rows, labels, _, title = drawn["strip"]
    ((row, chain),) = rows.items()
    times = schedule.timesteps(min(40, getattr(schedule, "T", 40))).flip(0)
    some = [round(k * (len(times) - 1) / 8) for k in range(9)]
    alpha, sigma = (s.view(-1, 1, 1, 1).float() for s in schedule.alpha_sigma(times))
    eps = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    x_t = alpha * picture + sigma * eps
    if isinstance(schedule, schedules.Karras):  # shown at unit scale, and it says so
        x_t = x_t / (alpha**2 + sigma**2).sqrt()
        assert row == "x_t / √(α² + σ²)" and chain.std(dim=(1, 2, 3))[-1] < 1.2
    else:
        assert row == "x_t"
    torch.testing.assert_close(chain, x_t[some])
    assert (
        torch.equal(chain[:1], picture)
        and len(labels) == 9
        and title == "title"
        and labels[0] == "t = 0"
    )
    frames, labels, _ = drawn["animate"]
    torch.testing.assert_close(torch.cat([frame[row] for frame in frames]), x_t)
    assert len(labels) == len(times)


def test_labels_of_equally_spaced_times(drawn, tmp_path):
    for schedule, said in (
        (schedules.cosine(), [f"t = {125 * k}" for k in range(9)]),
        (schedules.Flow(), [f"t = {k / 8:g}" for k in range(9)]),
    ):
        chains.plot_forward(torch.zeros(1, 3, 8, 8), schedule, tmp_path)
        assert drawn["strip"][1] == said
    chains.plot_forward(torch.zeros(1, 3, 8, 8), schedules.Karras(), tmp_path)
    assert drawn["strip"][1][::8] == ["t = 0", "t = 80"]


@pytest.mark.parametrize("steps", [1, 3, 25, 200])
def test_reverse_of_a_latent_model(drawn, tmp_path, steps):
    latent = latent_model(schedules.cosine())
    frames = frames_of(latent, 3, steps)
    assert chains.plot_reverse(latent, frames, ["first", "b", "c"], tmp_path) == [
        tmp_path / "reverse.png",
        tmp_path / "reverse.gif",
    ]
    rows, labels, _, title = drawn["strip"]
    some = [round(k * steps / (min(9, steps + 1) - 1)) for k in range(min(9, steps + 1))]
    with torch.no_grad():
        x, x0 = (torch.cat([getattr(frames[k], which)[:1] for k in some]) for which in ("x", "x0"))
        expected = {
            "latent x_t": x,
            "x_t decoded": latent.vae.decode(x).clamp(-1, 1),
            "guess of x0": latent.vae.decode(x0).clamp(-1, 1),
        }
    assert list(rows) == list(expected) and title == "first"
    for row in rows:
        torch.testing.assert_close(rows[row], expected[row])
    assert (
        labels == [f"t = {frames[k].t}" for k in some]
        and labels[0] == "t = 1000"
        and labels[-1] == "t = 0"
    )
    film, labels, _ = drawn["animate"]
    assert len(film) == len(labels) == min(60, steps + 1) and list(film[0]) == [
        "x_t decoded",
        "guess of x0",
    ]
    assert all(samples.shape == (3, 3, 32, 32) for frame in film for samples in frame.values())
    assert torch.equal(film[-1]["x_t decoded"], film[-1]["guess of x0"]) and labels[-1] == "t = 0"
    assert not rows["x_t decoded"].requires_grad


def test_reverse_of_a_pixel_model_has_no_latent(drawn, tmp_path):
    pixels = model(Pixels(), schedules.Flow())
    frames = frames_of(pixels, 2, 8)
    chains.plot_reverse(pixels, frames, ["a", "b"], tmp_path, title="another title")
    rows, labels, _, title = drawn["strip"]
    assert (
        list(rows) == ["x_t", "guess of x0"]
        and title == "another title"
        and labels[1] == "t = 0.875"
    )
    assert torch.equal(rows["x_t"], torch.cat([frame.x[:1].clamp(-1, 1) for frame in frames]))


def test_reverse_with_the_karras_schedule_is_shown_at_unit_scale(drawn, tmp_path):
    pixels = model(Pixels(), schedules.Karras())
    frames = [
        Frame(80.0, *torch.full((2, 1, 3, 32, 32), 40.0)),
        Frame(0.0, *torch.full((2, 1, 3, 32, 32), 0.5)),
    ]
    chains.plot_reverse(pixels, frames, ["a"], tmp_path)
    shown = drawn["strip"][0]["x_t / √(α² + σ²)"]
    torch.testing.assert_close(shown[:, 0, 0, 0], torch.tensor([40 / (1 + 80**2) ** 0.5, 0.5]))


def test_schedules_run_from_data_to_noise(drawn, tmp_path):
    assert (
        chains.plot_schedules({str(schedule): schedule for schedule in ALL}, tmp_path)
        == tmp_path / "schedules.png"
    )
    curves, _ = drawn["schedules"]
    assert list(curves) == [str(schedule) for schedule in ALL]
    for t, alpha, sigma in curves.values():
        assert len(t) > 20 and t[0] == 0 and t[-1] == pytest.approx(1) and (t.diff() >= 0).all()
        assert (
            alpha[0] == 1
            and sigma[0] == 0
            and (sigma.diff() >= 0).all()
            and (alpha.diff() <= 0).all()
        )


@pytest.mark.parametrize("schedule", [schedules.cosine(), schedules.Karras()], ids=name)
def test_drawn_for_real(tmp_path, schedule):
    latent = latent_model(schedule)
    paths = chains.plot_forward(
        torch.rand(1, 3, 32, 32) * 2 - 1, schedule, tmp_path / "deep", title="forward"
    )
    paths += chains.plot_reverse(latent, frames_of(latent, 2, 5), ["a", "b"], tmp_path / "deep")
    paths += [chains.plot_schedules({"one": schedule}, tmp_path / "deep")]
    assert sorted(path.name for path in (tmp_path / "deep").iterdir()) == sorted(
        path.name for path in paths
    )
    for path, frames in zip(paths, (1, 41, 1, 6, 1), strict=True):
        with Image.open(path) as picture:
            assert getattr(picture, "n_frames", 1) == frames
