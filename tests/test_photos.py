"""The model of photographs as it stands: small, in half precision, where its curve says it is."""

import csv
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import minidiff

FOLDER = Path(minidiff.__file__).parent / "photos"
EXPERIMENTS = Path(__file__).parents[1] / "experiments"


def rows():
    with (FOLDER / "curve.csv").open(encoding="utf-8", newline="") as text:
        return list(csv.DictReader(text))


def test_it_is_small_and_in_half_precision():
    files = list(FOLDER.glob("*.safetensors"))
    assert {file.stem for file in files} == {"vae", "text", "unet"}
    assert sum(file.stat().st_size for file in files) <= 20e6
    assert all(
        tensor.dtype == torch.float16 for file in files for tensor in load_file(file).values()
    )


def test_it_comes_with_its_card_terms_and_curve():
    assert "ImageNet" in (FOLDER / "LICENSE").read_text(encoding="utf-8")
    assert "Tiny ImageNet" in (FOLDER / "README.md").read_text(encoding="utf-8")
    operations = [float(row["tflop"]) for row in rows()]
    assert operations == sorted(set(operations))


def test_a_caption_steers_it():
    """Two things give other pictures from the same noise, and a phrasing hardly does."""
    model = minidiff.load("photos")  # by its name, whatever else is called so here
    prompts = ["a photo of a school bus", "there is a school bus", "a photo of a koala"]
    x = torch.randn(1, 8, 16, 16, generator=torch.Generator().manual_seed(0)).expand(3, -1, -1, -1)
    with torch.no_grad():
        bus, same, koala = model.denoiser(x, torch.full((3,), 0.9), model.text.encode(prompts)).x0
    assert (bus - same).norm() < 0.5 * (bus - koala).norm()


@pytest.mark.slow
def test_the_next_stretch_begins_where_the_curve_ends(real_data, tmp_path, monkeypatch):
    """The held-out loss of the weights in half precision, against the last row, which was measured
    before they were rounded; latents there came from bf16."""
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    import photo_latents
    import photo_parts

    model = minidiff.load(FOLDER)
    held_out = photo_parts.photos(real_data / "photos", "held_out")
    latents = photo_latents.stored(model, held_out, tmp_path / "latents.safetensors", None)
    loss = photo_latents.held_out_loss(model, latents)
    assert loss == pytest.approx(float(rows()[-1]["held_out_loss"]), rel=5e-3)
