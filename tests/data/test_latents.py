"""Caches of latents and captions: the key forgets nothing, nothing is computed twice, and a file
that is damaged or cannot be written is survived.
"""

import math
import resource
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from minidiff.data import latents
from minidiff.data.folder import Fault, load_image, to_model
from minidiff.data.latents import encode_captions, encode_images
from minidiff.errors import UserError
from minidiff.methods import lora
from minidiff.text import CLIPText, TextConfig
from minidiff.vae import VAE, Pixels, PixelsConfig, VAEConfig

SIZE = (16, 24)


@pytest.fixture
def vae():
    """Counts in `vae.seen` the images it encodes: not the black ones that fill up a batch."""
    network = VAE(VAEConfig(3, 4, (8, 16), 1, groups=0), latent_scale=0.5).eval()
    network.seen = 0

    def count(_, inputs, __):
        network.seen += (inputs[0] != -1).flatten(1).any(1).sum().item()

    network.encoder.register_forward_hook(count)
    return network


@pytest.fixture
def text():
    return tower()


def tower(**how):
    torch.manual_seed(1)
    return CLIPText(
        TextConfig(**dict(width=16, layers=1, heads=2, context_length=12, vocabulary=49408) | how)
    )


@pytest.fixture
def paths(tmp_path):
    """Three pictures of other sizes than they are encoded at."""
    noise = np.random.default_rng(0)
    made = [tmp_path / f"{i}.png" for i in range(3)]
    for path in made:
        Image.fromarray(noise.integers(0, 256, (30, 20, 3), dtype=np.uint8)).save(path)
    return made


def key_of(vae, path, folder, size=SIZE):
    """The one key that a cache of this picture holds."""
    encode_images(vae, [path], [size], folder)
    (key,) = latents._read(folder / "latents.safetensors")
    return key


def test_latents_are_those_of_the_picture_and_of_its_mirror(vae, paths, tmp_path):
    """With and without a folder, encoded and read back: the same bits, on their own and among
    others; those of the image in a batch of black ones.
    """
    size = latents.PIXELS_CPU // math.prod(SIZE)

    def alone(image):
        batch = torch.full((size, *image.shape), -1.0)
        batch[0] = image
        return vae.encode(batch)[0]

    images = [to_model(load_image(path, SIZE)) for path in paths]
    want = [alone(image) for image in images + [image.flip(-1) for image in images]]
    for folder in (None, tmp_path / "c", tmp_path / "c"):
        got = encode_images(vae, paths, [SIZE] * 3, folder, flip=True)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
        assert all(
            z.shape == (4, 8, 12) and not z.requires_grad and z.device.type == "cpu" for z in got
        )
    single = [vae.encode(image[None])[0] for image in images]
    for a, b in zip(got, single, strict=False):  # a smaller batch: another order of sums in float32
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_neighbours_order_and_interruptions_change_no_bit(vae, paths, tmp_path, monkeypatch):
    """Batches of two sizes, of 4 and 6 images: any subset, in any order, has the same bits."""
    monkeypatch.setattr(latents, "PIXELS_CPU", 4 * math.prod(SIZE))
    sizes = [SIZE, (16, 16), SIZE]
    want = encode_images(vae, paths * 2, [*sizes, (16, 16), SIZE, (16, 16)], None, flip=True)
    for order in ([2, 0, 1], [1], [0, 2]):
        got = encode_images(vae, [paths[i] for i in order], [sizes[i] for i in order], None)
        assert all(torch.equal(z, want[i]) for z, i in zip(got, order, strict=True))
    assert vae.seen == 12 + 3 + 1 + 2


def test_a_picture_is_decoded_once_for_itself_and_its_mirror(vae, paths, monkeypatch):
    decoded = []
    monkeypatch.setattr(
        latents, "load_image", lambda *args: decoded.append(args) or load_image(*args)
    )
    encode_images(vae, paths, [SIZE] * 3, None, flip=True)
    assert sorted(decoded) == [(path, SIZE) for path in paths] and vae.seen == 6


def test_only_what_is_missing_is_encoded_and_what_is_unused_goes(vae, paths, tmp_path):
    def added(which, **how):
        before = vae.seen
        encode_images(vae, which, [SIZE] * len(which), tmp_path / "c", **how)
        return vae.seen - before, len(latents._read(tmp_path / "c" / "latents.safetensors"))

    assert added(paths[:2]) == (2, 2)
    assert added(paths[:2]) == (0, 2)
    assert added(paths) == (1, 3)
    assert added(paths, flip=True) == (3, 6)
    assert added(paths[1:]) == (0, 2)
    assert added([paths[1], paths[1]]) == (0, 1)
    assert added(paths[:1]) == (1, 1)


def test_a_picture_under_another_name_is_known(vae, paths, tmp_path):
    key = key_of(vae, paths[0], tmp_path / "c")
    paths[0].rename(tmp_path / "other.png")
    assert key_of(vae, tmp_path / "other.png", tmp_path / "c") == key and vae.seen == 1


def test_a_changed_byte_of_the_picture_is_another_key(vae, paths, tmp_path):
    """A byte after the picture's end, which no decoder looks at, is enough; dates are not asked."""
    key = key_of(vae, paths[0], tmp_path / "c")
    with open(paths[0], "ab") as file:
        file.write(b"\0")
    assert key_of(vae, paths[0], tmp_path / "c") != key


def test_another_size_is_another_key(vae, paths, tmp_path):
    assert key_of(vae, paths[0], tmp_path / "c") != key_of(vae, paths[0], tmp_path / "c", (24, 16))


def test_the_mirror_is_another_key(vae, paths, tmp_path):
    encode_images(vae, paths[:1], [SIZE], tmp_path / "c", flip=True)
    assert len(latents._read(tmp_path / "c" / "latents.safetensors")) == 2


def test_a_changed_weight_of_the_vae_is_another_key(vae, paths, tmp_path):
    """The smallest change of one number, in the last tensor or in the latent scale."""
    keys = {key_of(vae, paths[0], tmp_path / "c")}
    for value in (vae.quant.bias.data, vae.latent_scale):
        value.view(-1)[-1:].copy_(torch.nextafter(value.view(-1)[-1:], torch.tensor([9.0])))
        keys.add(key_of(vae, paths[0], tmp_path / "c"))
    assert len(keys) == 3


def test_another_precision_of_the_same_weights_is_another_key(vae, text, tmp_path):
    """Numbers that bfloat16 holds exactly: only the precision they are computed in differs."""
    for network in (vae, text):
        kept = [
            latents.fingerprint(network.to(dtype))
            for dtype in (torch.bfloat16, torch.float32, torch.bfloat16)
        ]
        assert kept[0] == kept[2] != kept[1]


def test_another_format_version_is_another_key(vae, paths, tmp_path, monkeypatch):
    key = key_of(vae, paths[0], tmp_path / "c")
    monkeypatch.setattr(latents, "VERSION", "another")
    assert key_of(vae, paths[0], tmp_path / "c") != key


def test_numbers_that_no_weight_shows_are_in_the_key():
    """Padding, activation and what is blanked draw other pictures from the same weights; so does a
    network of another kind.
    """
    ways = [{}, {"pad": 0}, {"activation": "gelu"}, {"words_only": True}, {"heads": 4}]
    assert len({latents.fingerprint(tower(**how)) for how in ways}) == len(ways)
    three, four = (latents.fingerprint(Pixels(PixelsConfig(n))) for n in (3, 4))
    assert three != four


def test_a_lora_is_in_the_key(text):
    """What it does, that is: one that begins at zero changes nothing, and neither does merging."""
    bare = latents.fingerprint(text)
    lora.add(text, rank=2)
    assert latents.fingerprint(text) == bare
    nn.init.ones_(text.blocks[0].attention.q.lora.B)
    changed = latents.fingerprint(text)
    lora.merge(text)
    assert latents.fingerprint(text) == changed != bare
    lora.scale(text, 0.5)
    assert latents.fingerprint(text) not in (changed, bare)


def test_contexts(text, tmp_path):
    """The empty caption is always among them; each caption once; another tower or caption is
    another key.
    """
    for folder in (None, tmp_path, tmp_path):
        got = encode_captions(text, ["a cat", "a dog", "a cat"], folder)
        assert list(got) == ["", "a cat", "a dog"]
        for caption, context in got.items():
            assert torch.equal(context, text.encode([caption])[0]) and not context.requires_grad
    keys = set(latents._read(tmp_path / "contexts.safetensors"))
    assert len(keys) == 3
    encode_captions(text, ["a cat", "a dog "], tmp_path)
    assert len(keys & set(latents._read(tmp_path / "contexts.safetensors"))) == 2
    text.norm_out.bias.data[0] += 1
    got = encode_captions(text, ["a cat"], tmp_path)
    assert torch.equal(got["a cat"], text.encode(["a cat"])[0])
    assert not keys & set(latents._read(tmp_path / "contexts.safetensors"))


def test_pixels_need_no_weights(paths):
    assert encode_images(Pixels(), paths[:1], [SIZE], None)[0].shape == (3, *SIZE)


@pytest.mark.parametrize("how", ["shorter", "a byte"])
def test_a_damaged_file_is_made_anew(vae, paths, tmp_path, how):
    want = encode_images(vae, paths, [SIZE] * 3, tmp_path)
    file = tmp_path / "latents.safetensors"
    whole = file.read_bytes()
    one = bytes([whole[-100] ^ 1])
    file.write_bytes({"shorter": whole[:-7], "a byte": whole[:-100] + one + whole[-99:]}[how])
    with pytest.warns(UserWarning, match=r"latents.safetensors is made anew: ") as said:
        got = encode_images(vae, paths, [SIZE] * 3, tmp_path)
    assert len(said) == 1 and all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert file.read_bytes() == whole and vae.seen == 6
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encode_images(vae, paths, [SIZE] * 3, tmp_path)
    assert vae.seen == 6


@pytest.mark.parametrize("text", [b"", b"what is this? " * 99])
def test_a_file_that_is_no_cache_is_not_written_over(vae, paths, tmp_path, text):
    file = tmp_path / "latents.safetensors"
    file.write_bytes(text)
    with pytest.raises(UserError, match=r"latents.safetensors was not written by minidiff"):
        encode_images(vae, paths, [SIZE] * 3, tmp_path)
    assert file.read_bytes() == text and vae.seen == 0


def test_a_full_disk(vae, paths, tmp_path):
    """One clear line, no half file, and the cache of before whole.

    Files of this process may not grow beyond 4 kB for a moment.
    """
    encode_images(vae, paths[:1], [SIZE], tmp_path)
    before = (tmp_path / "latents.safetensors").read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(
            UserError,
            match=r"latents.safetensors: 0.0 MB cannot be written \(.*large.*\); free some space",
        ) as error:
            encode_images(vae, paths, [SIZE] * 3, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(error.value)
    assert sorted(p.name for p in tmp_path.iterdir() if p.suffix != ".png") == [
        "latents.safetensors"
    ]
    assert (tmp_path / "latents.safetensors").read_bytes() == before


def test_what_was_ready_is_kept(vae, paths, tmp_path):
    """A damaged picture ends it; the next try begins there."""
    whole = paths[2].read_bytes()
    paths[2].write_bytes(b"no picture")
    with pytest.raises(Fault, match=r"2.png: not a readable picture"):
        encode_images(vae, paths, [SIZE] * 3, tmp_path)
    paths[2].write_bytes(whole)
    encode_images(vae, paths, [SIZE] * 3, tmp_path)
    assert vae.seen == 3


def test_latents_that_are_not_finite_are_refused(vae, paths, tmp_path):
    vae.quant.bias.data[0] = float("nan")
    with pytest.raises(UserError, match=r"0.png: its latents are not finite"):
        encode_images(vae, paths[:1], [SIZE], tmp_path / "c")
    assert not (tmp_path / "c").exists()
