"""Strangers' files: whatever is wrong with them is said in one line, nothing in them runs, and none costs much time or memory."""

import json
import multiprocessing
import os
import pickle
import random
import resource
import shutil
import struct
import time
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import minidiff
from minidiff import schedules
from minidiff.checkpoints import files, layouts, write
from minidiff.checkpoints.inspect import inspect
from minidiff.denoiser import Denoiser
from minidiff.errors import UserError
from minidiff.latent_diffusion import LatentDiffusion
from minidiff.text import CLIPText, TextConfig
from minidiff.unet import UNet, UNetConfig
from minidiff.vae import VAE, VAEConfig


def tiny(width=64):
    """A Stable Diffusion 1.x that fits in a megabyte: its text tower knows 64 tokens."""
    text = CLIPText(TextConfig(width, 1, 1, context_length=8, vocabulary=64, pad=49407))
    unet = UNet(UNetConfig(4, 4, (32, 64), 1, (1, 0), (8, 8), width))
    return LatentDiffusion(
        VAE(VAEConfig(3, 4, (32, 32), 1), latent_scale=0.18215),
        text,
        Denoiser(unet, schedules.Discrete(**layouts.STABLE_DIFFUSION)),
        16,
    )


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The same model as a single file, a pickle and a diffusers folder."""
    place = tmp_path_factory.mktemp("hostile")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(write, "check", lambda model: None)
        patch.setattr(write, "check_single_file", lambda model: None)
        single = write.save_compvis(tiny(), place / "model.safetensors")
        folder = write.save_diffusers(tiny(), place / "folder")
    torch.save({"state_dict": load_file(single)}, place / "model.ckpt")
    return single, place / "model.ckpt", folder


@pytest.fixture
def edited(written, tmp_path):
    """The single file with some tensors replaced."""

    def edit(**changed):
        state = load_file(written[0])
        state.update(
            {
                next(name for name in state if name.endswith(ending.replace("__", "."))): value
                for ending, value in changed.items()
            }
        )
        save_file(state, tmp_path / "edited.safetensors")
        return tmp_path / "edited.safetensors"

    return edit


def refused(path, match, **how):
    with pytest.raises(UserError, match=match) as said:
        minidiff.load(path, **how)
    assert "\n" not in str(said.value)


class Code:
    """A pickle that would make a file when it is opened."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return (os.system, (f"touch {self.marker}",))


def test_pickles_with_code(tmp_path):
    bad = {"state_dict": {"model.diffusion_model.x": Code(tmp_path / "ran")}}
    torch.save(bad, tmp_path / "zip.ckpt")
    refused(tmp_path / "zip.ckpt", r"zip.ckpt holds more than tensors: code that would run")
    with open(tmp_path / "raw.ckpt", "wb") as file:
        pickle.dump(bad, file)
    refused(tmp_path / "raw.ckpt", r"raw.ckpt is no archive of tensors: .* a program in disguise")
    torch.save(bad, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    refused(tmp_path / "old.bin", r"old.bin is no archive of tensors")
    assert not (tmp_path / "ran").exists()


def test_archives_that_unpack_to_more_than_they_hold(written, tmp_path):
    with (
        zipfile.ZipFile(written[1]) as whole,
        zipfile.ZipFile(tmp_path / "bomb.ckpt", "w", zipfile.ZIP_DEFLATED) as bomb,
    ):
        for entry in whole.infolist():
            bomb.writestr(entry.filename, whole.read(entry))
        bomb.writestr("archive/data/999", bytes(10**8))
    refused(tmp_path / "bomb.ckpt", r"unpacks to more than it holds")


@pytest.mark.parametrize("content, match", [
    (b"", r"its header should have 0 bytes, the file has 0"),
    (b"{}", r"damaged"),
    (struct.pack("<Q", 2**63) + b"{}", r"its header should have 9223372036854775808 bytes"),
    (struct.pack("<Q", 5) + b"{nope", r"its header is not JSON"),
    (struct.pack("<Q", 4) + b"[[]]", r"its header is no list of tensors"),
    (b"[" * 10**5, r"damaged"),
])  # fmt: skip
def test_headers_that_are_none(tmp_path, content, match):
    (tmp_path / "m.safetensors").write_bytes(content)
    refused(tmp_path / "m.safetensors", match)


@pytest.mark.parametrize("claim, match", [
    ({"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}, r'"a", F32 of shape \[2\], does not fit the bytes 0 to 4 of 16'),
    ({"dtype": "F32", "shape": [2, -1], "data_offsets": [0, 8]}, r"does not fit"),
    ({"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 16]}, r"does not fit"),
    ({"dtype": "F32", "shape": [4], "data_offsets": [8, 24]}, r"does not fit"),
    ({"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}, r"does not fit"),
    ({"dtype": "F4", "shape": [16], "data_offsets": [0, 16]}, r'"a" is of type \'F4\'; known here are F64, F32'),
    ({"dtype": [], "shape": [16], "data_offsets": [0, 16]}, r'"a" is of type \[\]; known here are F64, F32'),
    ({"dtype": "F32"}, r'its header does not describe "a"'),
    (None, r'its header does not describe "a"'),
])  # fmt: skip
def test_headers_that_lie(tmp_path, claim, match):
    header = json.dumps({"a": claim}).encode()
    (tmp_path / "m.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(16))
    refused(tmp_path / "m.safetensors", match)


@pytest.mark.parametrize(
    "header, match",
    [
        (b'{"\\ud800": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}', "surrogates"),
        (b'{"__metadata__": {"modelspec.prediction_type": ["v"]}}', "no list of tensors"),
        (b'{"a": {"dtype": "F32", "shape": [1e400], "data_offsets": [0, 8]}}', "no finite number"),
        (b'{"a": {"shape": [%s]}}' % (b"9" * 400), "no finite number"),
    ],
)
def test_headers_of_strange_text(tmp_path, header, match):
    (tmp_path / "m.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    refused(tmp_path / "m.safetensors", rf"m.safetensors is damaged \(.*{match}")


@pytest.mark.parametrize(
    "strange",
    [
        torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
        torch.ones(2, 3).to_sparse(),
        torch.empty(64, device="meta"),
        torch.quantize_per_tensor(torch.ones(64), 0.1, 0, torch.quint8),
    ],
    ids=["nested", "sparse", "without numbers", "quantized"],
)
def test_tensors_that_are_no_arrays(written, tmp_path, strange):
    state = load_file(written[0]) | {"model.diffusion_model.out.0.bias": strange}
    torch.save(state, tmp_path / "m.ckpt")
    refused(tmp_path / "m.ckpt", r'1 tensors are missing .* "norm_out.bias"|cannot be|is damaged')


def test_a_tensor_of_one_number_and_many_places(written, tmp_path):
    name = "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"
    state = load_file(written[0])
    assert name in state
    torch.save(state | {name: torch.zeros(1, 1).expand(10**9, 64)}, tmp_path / "m.ckpt")
    refused(tmp_path / "m.ckpt", "m.ckpt unpacks to more than it holds")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
@pytest.mark.parametrize("suffix", ["safetensors", "ckpt"])
def test_floats_of_8_bits_are_read(written, tmp_path, dtype, suffix):
    state = load_file(written[0])
    short = {name: v.to(dtype) for name, v in state.items() if v.is_floating_point()}
    file = tmp_path / f"m.{suffix}"
    save_file(short, file) if suffix == "safetensors" else torch.save(short, file)
    with pytest.warns(
        UserWarning, match=rf"{len(short)} of its tensors are floats of 8 bits; .* bf16"
    ):
        model = minidiff.load(file)
    weight = state["model.diffusion_model.input_blocks.0.0.weight"]
    assert torch.equal(model.unet.conv_in.weight, weight.to(dtype).float())
    assert set(dtype for dtype, _ in files.stored(file).values()) == {
        "F8_E4M3" if dtype == torch.float8_e4m3fn else "F8_E5M2"
    }


BILLION = 10**9


@pytest.mark.parametrize(
    "where, value, match",
    [
        ("text layers", BILLION, r"a network of 1000000000 blocks"),
        ("unet blocks", BILLION, r"a network of 4000000000 blocks"),
        ("unet depth", [BILLION, 0], r"a network of 2000000002 blocks"),
        ("vae blocks", BILLION, r"a network of 2000000000 blocks"),
        ("vae channels", [32] * 10**4, r"a network of 10000 blocks"),
        ("denoiser schedule T", BILLION, r"T is 1000000000; it must be"),
        ("size", 10**400, r"no finite number"),
        ("guidance", 10**400, r"no finite number"),
        ("guidance", float("nan"), r"no finite number"),
        ("unet in_channels", 10**30, r"Error"),
        ("unet channels", [], r"Error"),
        ("text width", 10**18, r"Error"),
        ("sampler", "\ud800", r"surrogates"),
    ],
)
def test_model_folders_that_never_end(tmp_path, where, value, match):
    """`inspect` says so too; both within a second."""
    folder = tiny().save(tmp_path / "m")
    whole = json.loads((folder / "model.json").read_text())
    *path, last = where.split()
    place = whole
    for key in path:
        place = place[key]
    place[last] = value
    (folder / "model.json").write_text(json.dumps(whole))
    start = time.process_time()
    refused(folder, rf"model.json.* is damaged .*{match}")
    with pytest.raises(UserError, match=match):
        inspect(folder)
    assert time.process_time() - start < 5


def test_tensors_that_share_bytes(tmp_path):
    claim = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    header = json.dumps({"a": claim, "b": {**claim, "data_offsets": [4, 12]}}).encode()
    (tmp_path / "m.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(12))
    refused(tmp_path / "m.safetensors", r"two of its tensors share bytes")


def test_truncated(written, tmp_path):
    for share in (0.001, 0.1, 0.9):
        (tmp_path / "m.safetensors").write_bytes(
            written[0].read_bytes()[: int(share * written[0].stat().st_size)]
        )
        refused(tmp_path / "m.safetensors", r"m.safetensors is damaged")
        (tmp_path / "m.ckpt").write_bytes(
            written[1].read_bytes()[: int(share * written[1].stat().st_size)]
        )
        refused(tmp_path / "m.ckpt", r"m.ckpt is no archive of tensors: damaged")


def test_weights_that_are_no_numbers(edited):
    refused(
        edited(input_blocks__0__0__bias=torch.full((32,), torch.nan)),
        r'"conv_in.bias" holds numbers that are not finite',
    )
    refused(edited(input_blocks__0__0__bias=torch.full((32,), -torch.inf)), r"not finite")
    refused(
        edited(input_blocks__0__0__bias=torch.ones(32, dtype=torch.int32)),
        r'"conv_in.bias" is made of int32; weights are floating-point',
    )
    refused(
        edited(input_blocks__0__0__bias=torch.ones(33)),
        r'"conv_in.bias" is \(33,\), where \(32,\) would fit',
    )


def test_parts_of_two_versions(written, tmp_path):
    """Widths are named."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(write, "check", lambda model: None)
        patch.setattr(write, "check_single_file", lambda model: None)
        other = write.save_compvis(tiny(128), tmp_path / "other.safetensors")
    refused(
        written[0], r"the text encoder gives vectors of width 128, the U-Net expects 64", text=other
    )


def test_settings_of_a_gigabyte(written, tmp_path):
    """A hole on this disk, but a gigabyte to whoever reads it."""
    big = tmp_path / "folder" / "model_index.json"
    big.parent.mkdir()
    with open(big, "wb") as file:
        file.truncate(2**30)
    refused(big.parent, r"model_index.json has 1024 MB; a file of settings has a few kilobytes")
    with open(tmp_path / "m.safetensors", "wb") as file:
        file.write(struct.pack("<Q", 2**30))
        file.truncate(2**30 + 8)
    refused(tmp_path / "m.safetensors", r"its header has 1024 MB")


def test_links_out_of_the_folder(written, tmp_path):
    secret = tmp_path / "secret.json"
    secret.write_text("{}")
    for name in (
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "unet",
        "scheduler/scheduler_config.json",
    ):
        folder = tmp_path / name.replace("/", "-")
        os.system(f"cp -r {written[2]} {folder}")
        os.rename(folder / name, tmp_path / "moved")
        (folder / name).symlink_to(tmp_path / "moved")
        refused(folder, r"is a link out of its folder")
        os.system(f"rm -r {tmp_path / 'moved'}")


def mutated(content: bytes, draw: random.Random) -> bytes:
    """Bytes changed, cut out, repeated, put in, or numbers in the text changed; mostly where a file describes itself, at its two ends."""
    content = bytearray(content)
    for _ in range(draw.choice((1, 1, 2, 5, 20))):
        end = draw.choice((min(len(content), 40), min(len(content), 30_000), len(content)))
        at = (
            draw.randrange(max(end, 1))
            if draw.random() < 0.7
            else len(content) - 1 - draw.randrange(max(min(len(content), 2000), 1))
        )
        kind = draw.randrange(6)
        if kind == 0 and content:
            content[at] = draw.randrange(256)
        elif kind == 1:
            del content[at : at + draw.choice((1, 8, 1000))]
        elif kind == 2:
            content[at:at] = draw.randbytes(draw.choice((1, 8, 100)))
        elif kind == 3:
            content[at:at] = content[at : at + 200]
        elif kind == 4:
            content[at : at + 1] = draw.choice(
                (
                    b"9999999999",
                    b"-1",
                    b"null",
                    b"{",
                    b"]",
                    b'"',
                    b"1e999",
                    b"true",
                    b"\xff\xff\xff\xff",
                )
            )
        elif content:
            content = content[: max(at, 1)] if draw.random() < 0.2 else content
    return bytes(content)


def throw(count: int, written: tuple[Path, Path, Path], place: Path) -> None:
    """The loader at mutated files, in a process of its own: one that crashed or hung would be seen by its exit code."""
    draw, slowest = random.Random(0), 0.0
    settings = [
        file
        for file in written[2].rglob("*.json")
        if file.name in ("config.json", "scheduler_config.json", "model_index.json")
    ]
    loaded = 0
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(count):
        source = draw.choice((written[0], written[1], draw.choice(settings)))
        original = source.read_bytes()
        target = source if source in settings else place / f"m{source.suffix}"
        target.write_bytes(mutated(original, draw))
        start = time.process_time()
        try:
            with warnings.catch_warnings(action="ignore"):
                minidiff.load(written[2] if source in settings else target)
            loaded += 1
        except UserError as error:
            assert "\n" not in str(error) and len(str(error)) < 1000, error
        finally:
            source.write_bytes(original)
        slowest = max(slowest, time.process_time() - start)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20  # GB
    assert grown < 1, f"{grown} GB"
    assert slowest < 10, f"{slowest} seconds"
    assert loaded < count / 2, f"{loaded} of {count} loaded: the mutations are too tame"


@pytest.mark.parametrize("count", [100, pytest.param(1000, marks=pytest.mark.slow)])
def test_mutated_files(written, tmp_path, count):
    child = multiprocessing.get_context("spawn").Process(
        target=throw, args=(count, written, tmp_path)
    )
    child.start()
    child.join(timeout=240)
    assert child.exitcode == 0


@pytest.mark.parametrize(
    "name, key", [("unet/config", "sample_size"), ("vae/config", "scaling_factor")]
)
def test_words_in_place_of_numbers(written, tmp_path, name, key):
    folder = shutil.copytree(written[2], tmp_path / "folder")
    file = folder / f"{name}.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: "silu"}))
    refused(folder, r"folder: a configuration is damaged \(ValueError: .*silu")
