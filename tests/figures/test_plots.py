"""Every figure opens, has the size it should have, shows what it was given, and survives bad labels; nothing here judges beauty."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

from minidiff.errors import UserError
from minidiff.figures import plots

LONG = (
    "a label much too long for its place with anunbreakablewordinitthatgoesonandonandonandon $5 and $10 \\frac{ 苹果 "
    * 20
)


def opened(path):
    """The figure as an array; not blank, and nothing else is left in its folder."""
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    pixels = np.asarray(Image.open(path).convert("RGB"))
    assert pixels.std() > 1
    return pixels


def noise(*shape):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_save_png_is_exact(tmp_path):
    image = noise(3, 5, 7)
    assert plots.save_png(image, tmp_path / "a.png") == tmp_path / "a.png"
    pixels = opened(tmp_path / "a.png")
    expected = ((image + 1) * 127.5).round().permute(1, 2, 0).numpy()
    assert np.array_equal(pixels, expected)


def test_pictures_are_enlarged_by_whole_numbers_not_blurred(tmp_path):
    image = noise(1, 3, 16, 16)
    plots.grid(image, None, tmp_path / "a.png")
    pixels, gap, factor = (
        opened(tmp_path / "a.png"),
        10,
        13,
    )  # 13 x 16 is the first multiple past 200
    inside = pixels[gap : gap + 16 * factor, gap : gap + 16 * factor]
    expected = ((image[0] + 1) * 127.5).round().permute(1, 2, 0).numpy().astype(np.uint8)
    assert np.array_equal(inside, expected.repeat(factor, 0).repeat(factor, 1))


@pytest.mark.parametrize(
    "count, columns, shape",
    [(1, None, (1, 1)), (5, None, (2, 3)), (5, 5, (1, 5)), (3, 8, (1, 3)), (12, None, (3, 4))],
)
def test_grid_layout(tmp_path, count, columns, shape):
    plots.grid(noise(count, 3, 100, 100), None, tmp_path / "a.png", columns)
    assert opened(tmp_path / "a.png").shape == (shape[0] * 210 + 10, shape[1] * 210 + 10, 3)


def test_grid_with_captions_marks_and_title(tmp_path):
    plots.grid(
        noise(3, 1, 16, 16),
        ["apple", LONG, ""],
        tmp_path / "a.png",
        title=LONG,
        marks=[True, False, True],
    )
    pixels = opened(tmp_path / "a.png")
    for _, colour in (plots.RIGHT, plots.WRONG):
        rgb = [int(colour[k : k + 2], 16) for k in (1, 3, 5)]
        assert (pixels == rgb).all(-1).any()


@pytest.mark.parametrize("words", ["", "   ", "x", "two words", "a" * 500, LONG, "line\nbreak"])
@pytest.mark.parametrize("lines", [1, 3])
def test_wrapped_text_fits_and_loses_nothing_it_has_room_for(words, lines):
    wrapped = plots._wrapped(words, 150, 18, lines)
    assert len(wrapped) <= lines and all(plots._font(18).getlength(line) <= 150 for line in wrapped)
    if not (wrapped and wrapped[-1].endswith("…")):
        assert "".join(wrapped).replace(" ", "") == "".join(words.split())


def test_strip_takes_rows_of_every_kind(tmp_path):
    rows = {
        "x_t": noise(4, 3, 32, 32),
        "guess of x0": noise(4, 1, 32, 32),
        "latent x_t": noise(4, 4, 8, 8).bfloat16(),
        LONG: noise(4, 3, 32, 24),
    }
    plots.strip(rows, ["t = 0", "t = 500", LONG, ""], tmp_path / "a.png", title="a title")
    height, width, _ = opened(tmp_path / "a.png").shape
    assert height > 4 * 128 and width > 4 * 128


def test_animate_has_every_frame_holds_the_last_and_loops(tmp_path):
    frames = [
        {"x_t": noise(3, 3, 16, 16) * (1 - k / 10), "latent": noise(3, 4, 4, 4)} for k in range(10)
    ]
    plots.animate(
        frames,
        [f"t = {10 - k}" for k in range(9)] + [LONG],
        tmp_path / "a.gif",
        seconds=2.0,
        hold=3.0,
    )
    with Image.open(tmp_path / "a.gif") as gif:
        assert gif.n_frames == 10 and gif.info["loop"] == 0 and gif.info["duration"] == 200
        gif.seek(9)
        assert gif.info["duration"] == 3000
    opened(tmp_path / "a.gif")


def test_animate_thins_a_film_that_is_too_large_and_keeps_its_last_frame(tmp_path):
    frames = [{"x_t": torch.full((1, 3, 16, 16), k / 8 - 1)} for k in range(16)]
    plots.animate(frames, [str(k) for k in range(16)], tmp_path / "all.gif")
    plots.animate(
        frames,
        [str(k) for k in range(16)],
        tmp_path / "some.gif",
        max_bytes=(tmp_path / "all.gif").stat().st_size * 2 // 3,
    )
    films = [Image.open(tmp_path / name) for name in ("all.gif", "some.gif")]
    assert [film.n_frames for film in films] == [16, 8]
    for film in films:
        film.seek(film.n_frames - 1)
    assert np.array_equal(*(np.asarray(film.convert("RGB")) for film in films))


def test_latents_to_rgb_finds_the_directions_of_most_variance():
    generator = torch.Generator().manual_seed(0)
    source = torch.randn(2, 3, 8, 8, generator=generator)
    source = source * torch.tensor([5.0, 3, 1]).view(1, 3, 1, 1)
    mixing = torch.linalg.qr(torch.randn(6, 6, generator=generator)).Q[:, :3]
    shown = plots.latents_to_rgb(torch.einsum("dc,bchw->bdhw", mixing, source) + 7)
    assert shown.shape == (2, 3, 8, 8) and shown.abs().max() <= 1
    for k in range(
        3
    ):  # each colour follows one source, up to sign; sample correlations between the sources and clamping cost the rest
        assert (
            abs(torch.corrcoef(torch.stack([shown[:, k].flatten(), source[:, k].flatten()]))[0, 1])
            > 0.9
        )


@pytest.mark.parametrize("channels", [1, 2, 4, 16])
def test_latents_to_rgb_of_anything(channels):
    for latents in (torch.randn(2, channels, 4, 6), torch.zeros(1, channels, 1, 1)):
        shown = plots.latents_to_rgb(latents)
        assert shown.shape == (len(latents), 3, *latents.shape[2:]) and shown.isfinite().all()


def test_schedules_with_infinite_log_snr(tmp_path):
    t = torch.linspace(0, 1, 50)
    curves = {
        "flow": (t, 1 - t, t),
        "cosine": (t, (t * math.pi / 2).cos(), (t * math.pi / 2).sin()),
        "EDM $": (t, torch.ones(50), 80 * t**7),
    }
    plots.schedules(curves, tmp_path / "a.png")
    assert opened(tmp_path / "a.png").shape == (520, 1800, 3)


def test_loss(tmp_path):
    log = [
        {
            "step": k,
            "loss": math.exp(-k / 50),
            "lr": 1e-4,
            "bins": [1 / (b + 1 + k) if b else None for b in range(10)],
        }
        for k in range(100)
    ]
    log[3] |= {"loss": math.nan, "bins": None}
    plots.loss(log, tmp_path / "a.png")
    assert opened(tmp_path / "a.png").shape == (520, 1440, 3)
    plots.loss(
        [{"step": k, "loss": -1.0 - k} for k in range(3)], tmp_path / "a.png"
    )  # not every loss is positive
    assert opened(tmp_path / "a.png").shape == (520, 720, 3)
    plots.loss([{"step": 0, "loss": math.nan, "bins": None}], tmp_path / "a.png")
    with pytest.raises(UserError, match="log is empty"):
        plots.loss([], tmp_path / "b.png")


def test_points(tmp_path):
    xy, paths = torch.randn(200, 2), torch.randn(10, 5, 2)
    panels = [
        {"title": LONG[:60], "points": xy},
        {"title": "score", "arrows": (xy, -xy)},
        {"paths": paths, "points": xy.double()},
    ]
    plots.points(panels, tmp_path / "a.png")
    assert opened(tmp_path / "a.png").shape[1] == 560 * 3


def test_curves_also_as_vector_graphics(tmp_path):
    plots.points([{"points": torch.randn(20, 2)}], tmp_path / "deep" / "a.pdf")
    assert (tmp_path / "deep" / "a.pdf").read_bytes().startswith(b"%PDF")


@pytest.mark.parametrize(
    "write, right",
    [
        (lambda path: plots.grid(noise(1, 3, 8, 8), None, path), ".png"),
        (lambda path: plots.animate([{"x": noise(1, 3, 8, 8)}], ["t"], path), ".gif"),
        (lambda path: plots.loss([{"step": 0, "loss": 1.0}], path), ".pdf or .png or .svg"),
    ],
)
def test_wrong_suffix_is_the_readers_to_fix(tmp_path, write, right):
    with pytest.raises(UserError, match=f"a.doc: this figure is written as {right}"):
        write(tmp_path / "a.doc")
    assert not list(tmp_path.iterdir())


def test_importing_plots_does_not_import_matplotlib():
    import subprocess
    import sys

    subprocess.run(
        [
            sys.executable,
            "-c",
            "import minidiff.figures.plots, sys; assert 'matplotlib' not in sys.modules",
        ],
        check=True,
    )
