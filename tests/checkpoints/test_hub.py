"""Names on the Hugging Face Hub: what is asked of it, and what is said without it. The Hub itself is played by a folder."""

import shutil
import socket
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub.errors import RepositoryNotFoundError

import minidiff
from minidiff.checkpoints import hub, write
from minidiff.errors import UserError

SETTINGS = [
    "model_index.json",
    "unet/config.json",
    "vae/config.json",
    "text_encoder/config.json",
    "README.md",
]
BOTH = [
    f"{folder}/{stem}{variant}.{suffix}"
    for folder, stem in hub.PARTS.items()
    if folder != "text_encoder_2"
    for variant in ("", ".fp16")
    for suffix in ("safetensors", "bin")
]


def test_one_spelling_of_each_part():
    whole = [
        "unet/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors",
    ]
    assert hub.needed([*SETTINGS, *BOTH, "v1-5-pruned.ckpt"]) == whole
    half = [name for name in BOTH if ".fp16" in name]
    assert hub.needed(half) == [name.replace(".safetensors", ".fp16.safetensors") for name in whole]
    old = [
        "unet/diffusion_pytorch_model.bin",
        "vae/diffusion_pytorch_model.bin",
        "text_encoder/pytorch_model.bin",
    ]
    assert hub.needed(old) == old
    pieces = [f"unet/diffusion_pytorch_model-0000{k}-of-00002.safetensors" for k in (1, 2)]
    index = "unet/diffusion_pytorch_model.safetensors.index.json"
    assert hub.needed([*pieces, index, *whole[1:]]) == [*pieces, index, *whole[1:]]


def test_sdxl_has_a_second_text_encoder():
    second = [f"text_encoder_2/model{variant}.safetensors" for variant in ("", ".fp16")]
    chosen = hub.needed([*SETTINGS, *BOTH, *second, "sd_xl_base_1.0.safetensors"])
    assert chosen[-1] == "text_encoder_2/model.safetensors" and len(chosen) == 4


@pytest.fixture
def served(sd, tmp_path, monkeypatch):
    """A repository "owner/sd" that a Hub serves into a cache; returns what was asked for."""
    source, asked = write.save_diffusers(sd(), tmp_path / "source"), []

    class Api:
        def model_info(self, name):
            if name != "owner/sd":
                raise RepositoryNotFoundError(
                    "404", response=SimpleNamespace(headers={}, request=None)
                )
            files = [str(path.relative_to(source)) for path in source.rglob("*") if path.is_file()]
            return SimpleNamespace(siblings=[SimpleNamespace(rfilename=file) for file in files])

    def download(name, allow_patterns=None, local_files_only=False):
        asked.append(allow_patterns)
        target = tmp_path / "cache" / "models--owner--sd" / "snapshots" / "abc"
        return shutil.copytree(source, target, dirs_exist_ok=True)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return asked


def test_a_name_is_fetched(served):
    model = minidiff.load("owner/sd")
    assert model.size == 16
    assert "unet/diffusion_pytorch_model.safetensors" in served[0] and "*/config.json" in served[0]
    with pytest.raises(UserError, match='"owner/nothing" is neither a path here nor a repository'):
        minidiff.load("owner/nothing")


def test_paths_are_not_names(served, tmp_path, monkeypatch):
    """What is here, and what is meant to be, is never looked up."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    for path in ("models/mine", "/nowhere/at/all", "owner/model.safetensors", "../x/y", "a/b/c"):
        assert str(hub.resolve(path)) == path
    assert hub.resolve("./runs/tuned") == Path("runs/tuned")
    (tmp_path / "out").mkdir()
    message = (
        r'no "ot/quickstart" here; perhaps you meant out/quickstart; .*huggingface.co/ot/quick'
    )
    with pytest.raises(UserError, match=message):
        minidiff.load("ot/quickstart")
    assert not served


def test_mistyped_paths_of_the_command_line_are_not_names(served, refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for verb in (["inspect", "./runs/tuned"], ["generate", "x", "--model", "./runs/tuned"]):
        assert f'"{tmp_path}/runs/tuned"' in refused(*verb)
    assert not served


def test_a_whole_address_is_a_name(served, ran, tmp_path, monkeypatch):
    """Also where a folder of a similar name is here."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owners").mkdir()
    assert minidiff.load("https://huggingface.co/owner/sd").size == 16
    assert "Stable Diffusion 1.x" in ran("inspect", "https://huggingface.co/owner/sd").out
    assert len(served) == 2


@pytest.fixture
def asked(monkeypatch):
    """What is asked of the network; hf's own switch is set back afterwards."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    asked = []
    monkeypatch.setattr(socket.socket, "connect", lambda *place: asked.append(place))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *place, **_: asked.append(place))
    return asked


@pytest.mark.parametrize(
    "command",
    [
        ["inspect", "owner/sd", "--offline"],
        ["generate", "x", "--model", "owner/sd", "--offline"],
        ["generate", "x", "--vae", "owner/sd", "--offline"],
        ["convert", "owner/sd", "x", "--to", "minidiff", "--offline"],
    ],
)
@pytest.mark.parametrize("by", ["flag", "variable"])
def test_offline_nothing_is_asked(refused, asked, tmp_path, monkeypatch, command, by):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    if by == "variable":
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        command = command[:-1]
    assert "the Hub cannot be reached (offline, as asked for)" in refused(*command)
    assert not asked


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """No network; a cache in a folder."""
    cache = tmp_path / "cache"

    class Api:
        def model_info(self, name):
            raise OSError("Network is\nunreachable")

    def cached(name, local_files_only):
        from huggingface_hub.errors import LocalEntryNotFoundError

        folder = cache / name.replace("/", "--")
        if not folder.is_dir():
            raise LocalEntryNotFoundError("not there")
        return folder

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", cached)
    monkeypatch.setattr(
        huggingface_hub,
        "scan_cache_dir",
        lambda: SimpleNamespace(repos=[SimpleNamespace(repo_id="other/one", repo_type="model")]),
    )
    return cache


def test_without_a_network(sd, offline):
    with pytest.raises(
        UserError,
        match=r"the Hub cannot be reached \(Network is unreachable\); the cache has other/one",
    ):
        minidiff.load("owner/sd")
    folder = write.save_diffusers(sd(), offline / "owner--sd")
    assert minidiff.load("owner/sd").size == 16
    (folder / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(UserError, match=r'"owner/sd" is only partly cached \(vae missing\)'):
        minidiff.load("owner/sd")
