"""Pictures of every kind come out as upright RGB on white, and every fault of a data folder is one
line that says where and what to do.
"""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import EpsImagePlugin, Image, ImageCms, ImageOps

from minidiff.data import cifar10 as cifar10_module
from minidiff.data import folder as folder_module
from minidiff.data.folder import (
    CaptionedFolder,
    ClassFolder,
    images_in,
    load_all,
    load_image,
    to_model,
    to_uint8,
    upright_size,
)
from minidiff.errors import UserError
from minidiff.options.sampling import check_size


def picture(path, colour=(255, 0, 0), size=(8, 6), mode="RGB", **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path, **options)
    return path


def captioned(folder, lines, names=("a.png",)):
    for name in names:
        picture(folder / name)
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    (folder / "metadata.jsonl").write_text(text, encoding="utf-8")
    return folder


def complaint(make, *args, **kwargs):
    with pytest.raises(UserError) as caught:
        make(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Bytes and floats.


def test_every_byte_survives_the_round_trip():
    every = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(to_model(every)), every)
    assert to_model(every).min() == -1 and to_model(every).max() == 1


def test_to_uint8_rounds_to_the_nearest_and_clamps():
    values = torch.tensor([-5.0, -1, 1, 5, 100.6 / 127.5 - 1, 100.4 / 127.5 - 1])
    assert to_uint8(values).tolist() == [0, 0, 255, 255, 101, 100]
    assert to_uint8(torch.tensor([0.3]).bfloat16()).item() == round(
        (torch.tensor(0.3).bfloat16().item() + 1) * 127.5
    )


@pytest.mark.parametrize(
    "size, multiple, answer",
    [
        (65, 8, "size 65 is not divisible by 8; the nearest valid sizes are 64 and 72"),
        (3, 8, "size 3 is not divisible by 8; the nearest valid size is 8"),
        (0, 8, "size 0 is not divisible by 8; the nearest valid size is 8"),
        (-9, 8, "size -9 is not divisible by 8; the nearest valid size is 8"),
    ],
)
def test_check_size(size, multiple, answer):
    assert complaint(check_size, size, multiple) == answer
    check_size(64, multiple)


# One picture.


@pytest.mark.parametrize(
    "mode, colour, expected",
    [
        ("RGB", (10, 20, 30), (10, 20, 30)),
        ("L", 77, (77, 77, 77)),
        ("1", 1, (255, 255, 255)),
        ("RGBA", (255, 0, 0, 255), (255, 0, 0)),
        ("RGBA", (255, 0, 0, 0), (255, 255, 255)),
        ("RGBA", (0, 0, 0, 51), (204, 204, 204)),
        ("LA", (0, 0), (255, 255, 255)),
        ("LA", (100, 255), (100, 100, 100)),
        ("I;16", 0, (0, 0, 0)),
        ("I;16", 65535, (255, 255, 255)),
        ("I;16", 100 * 257 + 100, (100, 100, 100)),  # 100.4: to the nearest
    ],
)
def test_modes(tmp_path, mode, colour, expected):
    loaded = load_image(picture(tmp_path / "a.png", colour, mode=mode))
    assert loaded.shape == (3, 6, 8) and loaded.dtype == torch.uint8
    assert (loaded == torch.tensor(expected, dtype=torch.uint8).view(3, 1, 1)).all()


def test_16_bit_tiff(tmp_path):
    Image.fromarray(np.linspace(0, 65535, 256).astype(np.uint16)[None]).save(tmp_path / "a.tif")
    assert torch.equal(load_image(tmp_path / "a.tif")[0, 0], torch.arange(256, dtype=torch.uint8))


def test_palette_with_transparency(tmp_path):
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 255, 0])
    image.putpixel((1, 0), 1)
    image.save(tmp_path / "opaque.png")
    image.save(tmp_path / "clear.png", transparency=0)
    assert load_image(tmp_path / "opaque.png")[:, 0].T.tolist() == [[255, 0, 0], [0, 255, 0]]
    assert load_image(tmp_path / "clear.png")[:, 0].T.tolist() == [[255, 255, 255], [0, 255, 0]]


def test_rgb_with_one_transparent_colour(tmp_path):
    assert (load_image(picture(tmp_path / "a.png", (9, 9, 9), transparency=(9, 9, 9))) == 255).all()


def test_cmyk(tmp_path):
    loaded = load_image(picture(tmp_path / "a.jpg", (0, 255, 255, 0), mode="CMYK")).float()
    assert (
        loaded.mean((1, 2)) - torch.tensor([255.0, 0, 0])
    ).abs().max() < 5  # JPEG loses a little


def swapped_profile():
    """A colour profile in which the first number is green and the second is red."""
    content = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    content = content.replace(b"rXYZ", b"????").replace(b"gXYZ", b"rXYZ").replace(b"????", b"gXYZ")
    return content.replace("sRGB built-in".encode("utf-16-be"), "rg is swapped".encode("utf-16-be"))


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_a_colour_profile_says_what_the_numbers_mean(tmp_path, mode):
    """As in Adobe RGB and Display P3, which were read as if they were sRGB."""
    image = Image.new("RGB", (8, 6), (200, 40, 60))
    image = image.quantize() if mode == "P" else image.convert(mode)
    image.save(tmp_path / "a.png", icc_profile=swapped_profile())
    expected = torch.tensor([40, 200, 60])
    assert (load_image(tmp_path / "a.png")[:, 0, 0] - expected).abs().max() <= 1


def test_a_profile_of_srgb_a_wrong_one_and_a_damaged_one_change_nothing(tmp_path):
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for mode, profile in (("RGB", srgb), ("L", swapped_profile()), ("RGB", swapped_profile()[:99])):
        colour = (200, 40, 60) if mode == "RGB" else 7
        loaded = load_image(picture(tmp_path / "a.png", colour, mode=mode, icc_profile=profile))
        assert (loaded[:, 0, 0] == torch.tensor(colour)).all()


@pytest.mark.parametrize("suffix, format", [("jfif", "JPEG"), ("avif", "AVIF"), ("heic", "PNG")])
def test_more_formats_are_read(tmp_path, suffix, format):
    """They were skipped without a word."""
    path = picture(tmp_path / f"a.{suffix}", format=format)
    assert images_in(tmp_path) == [path] and load_image(path)[0].float().mean() > 250


def test_a_heic_that_cannot_be_read_says_what_to_install(tmp_path):
    (tmp_path / "a.heic").write_bytes(b"no picture")
    assert "save it as JPEG, or install pillow-heif" in complaint(load_image, tmp_path / "a.heic")


CORNERS = {1: (0, 0), 2: (0, -1), 3: (-1, -1), 4: (-1, 0)}
CORNERS |= {5: (0, 0), 6: (0, -1), 7: (-1, -1), 8: (-1, 0)}


@pytest.mark.parametrize("orientation, corner", CORNERS.items())
def test_exif_rotation(tmp_path, orientation, corner):
    image = Image.new("RGB", (8, 4), "black")
    image.putpixel((0, 0), (255, 255, 255))
    exif = Image.Exif()
    exif[274] = orientation
    image.save(tmp_path / "a.png", exif=exif)
    loaded = load_image(tmp_path / "a.png")
    assert loaded.shape == ((3, 4, 8) if orientation in (1, 2, 3, 4) else (3, 8, 4))
    assert loaded[0, *corner] == 255 and loaded[0].sum() == 255


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tif", "avif"])
@pytest.mark.parametrize("orientation", [None, 1, 3, 5, 6, 8])
def test_the_upright_size_is_that_of_the_pixels(tmp_path, suffix, orientation):
    exif = Image.Exif()
    if orientation:
        exif[274] = orientation
    Image.new("RGB", (80, 48)).save(path := tmp_path / f"a.{suffix}", exif=exif)
    assert upright_size(path) == load_image(path).shape[1:]


def test_a_jpeg_header_says_the_size_without_its_pixels(tmp_path, monkeypatch):
    path = picture(tmp_path / "a.jpg")
    monkeypatch.setattr(Image.Image, "load", None)
    assert upright_size(path) == (6, 8)
    path.write_bytes(b"no picture")
    assert "not a readable picture" in complaint(upright_size, path)


def photograph(path, size, orientation=1, **options):
    """A smooth image with fine detail and a marked corner, as JPEG."""
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), np.uint8))
    pixels = np.asarray(coarse.resize(size, Image.Resampling.BICUBIC)).astype(int)
    pixels = (pixels + rng.integers(-8, 9, pixels.shape)).clip(0, 255).astype(np.uint8)
    exif = Image.Exif()
    exif[274] = orientation
    Image.fromarray(pixels).save(path, exif=exif, **options)
    return path


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(
    "target, divisors", [((64, 64), (4, 4)), ((64, 80), (4, 2)), (128, (2, 2)), (250, (1, 1))]
)
def test_a_large_jpeg_is_decoded_smaller_but_twice_the_size(
    tmp_path, monkeypatch, orientation, target, divisors
):
    """What the decoder made, of images that stand and that lie; and that the result is that of the
    whole image: 44 dB. Its sides are no multiples of 8, so a whole number of small pixels is more
    than the image: scaled from them it would be shifted, and 10 dB off.
    """
    path = photograph(tmp_path / "a.jpg", (645, 513), orientation)
    resize, decoded = Image.Image.resize, []

    def note(image, size, method, box):
        decoded.append(image.size)
        return resize(image, size, method, box)

    monkeypatch.setattr(Image.Image, "resize", note)
    drafted = load_image(path, target).double()
    monkeypatch.setattr(folder_module, "DRAFT", 10**6)
    whole = load_image(path, target).double()
    divisor = divisors[orientation > 4]
    assert decoded[0] == tuple(-(-side // divisor) for side in decoded[1])
    assert torch.equal(drafted, whole) == (divisor == 1)
    assert (drafted - whole).square().mean() < 255**2 / 10**4.4


@pytest.mark.parametrize("size", [32, 64, 128])
def test_drafts_of_real_photographs(real_data, monkeypatch, size):
    """Within 42 dB, as docs/data.md says with more of them; some decode to an eighth."""
    paths = [*images_in(real_data / "coco" / "images")[:8]]
    paths += images_in(real_data / "dreambooth" / "dog6")[:4]
    drafted = torch.stack([load_image(path, size) for path in paths]).double()
    monkeypatch.setattr(folder_module, "DRAFT", 10**6)
    whole = torch.stack([load_image(path, size) for path in paths]).double()
    assert (drafted - whole).square().mean((1, 2, 3)).max() < 255**2 / 10**4.2


@pytest.mark.parametrize("size", [(40, 20), (33, 61), (7, 500), (300, 300), (101, 99)])
def test_the_cut_is_that_of_pillow(tmp_path, size):
    """Bit for bit, where nothing is drafted."""
    path = photograph(tmp_path / "a.png", size)
    for height, width in ((16, 16), (24, 16), (17, 31), (64, 64)):
        with Image.open(path) as image:
            want = np.array(ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS))
        assert np.array_equal(load_image(path, (height, width)).permute(1, 2, 0).numpy(), want)


@pytest.mark.parametrize("mode", ["L", "CMYK", "RGB"])
def test_a_draft_keeps_the_mode_and_the_profile(tmp_path, mode):
    options = {"icc_profile": swapped_profile()} if mode == "RGB" else {}
    colour = {"L": 77, "CMYK": (0, 255, 255, 0), "RGB": (200, 40, 60)}[mode]
    expected = {"L": (77, 77, 77), "CMYK": (255, 0, 0), "RGB": (40, 200, 60)}[mode]
    path = picture(tmp_path / "a.jpg", colour, (640, 640), mode, **options)
    loaded = load_image(path, 64).float()
    assert (loaded.mean((1, 2)) - torch.tensor(expected)).abs().max() < 5  # JPEG loses a little


def test_resize_scales_the_shorter_side_and_cuts_the_centre(tmp_path):
    image = Image.new("RGB", (40, 20), "black")
    image.paste("white", (10, 0, 30, 20))  # the centre square is white
    image.save(tmp_path / "wide.png")
    image.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "tall.png")
    for name in ("wide.png", "tall.png"):
        loaded = load_image(tmp_path / name, 10)
        assert (
            loaded.shape == (3, 10, 10) and loaded[:, 2:-2, 2:-2].min() >= 254
        )  # Lanczos reaches a little way out of the square
    assert load_image(tmp_path / "wide.png", 64).shape == (3, 64, 64)  # smaller ones are enlarged


def test_shrinking_is_antialiased(tmp_path):
    stripes = np.zeros((64, 64), np.uint8)
    stripes[:, ::2] = 255
    Image.fromarray(stripes).save(tmp_path / "a.png")
    inside = load_image(tmp_path / "a.png", 16)[:, :, 2:-2].float()
    assert (
        inside - 127.5
    ).abs().max() < 8  # without it every pixel would be 0 or 255; Lanczos leaves a ripple


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, about the TIFFs
@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "gif", "bmp", "tif"])
def test_every_truncation_is_a_user_error_that_names_the_file(tmp_path, suffix):
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / f"whole.{suffix}")
    whole, path = (tmp_path / f"whole.{suffix}").read_bytes(), tmp_path / f"broken.{suffix}"
    failed = 0
    for length in range(0, len(whole), max(1, len(whole) // 50)):
        path.write_bytes(whole[:length])
        try:
            load_image(path)
        except UserError as error:
            failed += 1
            assert str(error).startswith(f"{path}: not a readable picture") and "\n" not in str(
                error
            )
    assert failed > 40 or suffix in ("gif", "tif")  # those two keep their pixels before the end


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::PIL.Image.DecompressionBombWarning")
def test_flipped_bytes_never_end_in_another_exception(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)  # a broken header may claim gigabytes
    random, path = np.random.default_rng(0), tmp_path / "a"
    for suffix in ("png", "jpg", "webp", "gif", "bmp", "tif"):
        whole = np.frombuffer(picture(tmp_path / f"a.{suffix}").read_bytes(), np.uint8)
        for _ in range(100):
            broken = whole.copy()
            broken[random.integers(0, len(broken), 3)] = random.integers(0, 256, 3)
            path.write_bytes(broken.tobytes())
            try:
                load_image(path)
            except UserError:
                pass


def test_pictures_that_are_none(tmp_path):
    (tmp_path / "a.png").write_text("not a picture")
    assert "not a readable picture" in complaint(load_image, tmp_path / "a.png")
    assert complaint(load_image, tmp_path / "b.png") == f"{tmp_path / 'b.png'}: no such picture"
    assert "floating-point" in complaint(load_image, picture(tmp_path / "f.tif", 0.5, mode="F"))


# Captioned folders.


def test_captions(tmp_path):
    rows = [
        {"file_name": "a.png", "text": "an apple"},
        "",
        {"file_name": "sub/b.jpg", "text": ["a bowl", "another caption"], "id": 3},
        "  ",
        "",
    ]
    data = CaptionedFolder(captioned(tmp_path, rows, ["a.png", "sub/b.jpg"]))
    assert (
        len(data) == 2
        and data.captions == ["an apple", "a bowl"]
        and data.paths == [tmp_path / "a.png", tmp_path / "sub/b.jpg"]
    )
    image, caption = data[1]
    assert image.shape == (3, 6, 8) and caption == "a bowl"
    assert CaptionedFolder(tmp_path, size=4)[0][0].shape == (3, 4, 4)


def test_another_caption_column_and_a_byte_order_mark(tmp_path):
    captioned(tmp_path, [])
    (tmp_path / "metadata.jsonl").write_text(
        '\ufeff{"file_name": "a.png", "caption": "жук\u2028 🪲"}\r\n', encoding="utf-8"
    )
    assert CaptionedFolder(tmp_path, caption_column="caption").captions == ["жук\u2028 🪲"]


GOOD = {"file_name": "a.png", "text": "x"}


@pytest.mark.parametrize(
    "line, answer",
    [
        (
            {"file_name": "a.png", "caption": "x"},
            'no column "text"; found "file_name", "caption". Rename it, or pass '
            "`caption_column=caption`.",
        ),
        (
            {"url": "u", "caption": "x", "file_name": "a.png"},
            'found "url", "caption", "file_name". Rename it, or pass `caption_column=caption`.',
        ),
        (
            {"file_name": "a.png", "Text": "x"},
            'no column "text"; found "file_name", "Text". Rename it, or pass '
            "`caption_column=Text`.",
        ),
        ({"file_name": "a.png", "id": 3}, 'no column "text"; found "file_name", "id". Add it.'),
        (
            {},
            'no column "file_name"; found nothing. Add it, with the picture\'s '
            "path inside the folder.",
        ),
        (
            {"filename": "a.png", "text": "x"},
            'no column "file_name"; found "filename", "text". Rename "filename".',
        ),
        (
            {"file_name": "a.png", "text": None},
            'column "text" holds null, not a caption; write a string, or a list of strings',
        ),
        (
            {"file_name": "a.png", "text": []},
            'column "text" holds [], not a caption; write a string, or a list of strings',
        ),
        (
            {"file_name": 7, "text": "x"},
            '"file_name" holds 7; write the path of a picture inside the folder',
        ),
        (
            "{'file_name': 'a.png'}",
            "not JSON (Expecting property name enclosed in double quotes at column "
            "2); write one object a line, ",
        ),
        ('["a.png", "x"]', "not a JSON object; write one object a line, "),
        ({"file_name": "A.png", "text": "x"}, 'picture "A.png" is missing; did you mean "a.png"?'),
        (
            {"file_name": "zebra.webp", "text": "x"},
            'picture "zebra.webp" is missing; add the picture, or take the line out',
        ),
        ({"file_name": "a\0.png", "text": "x"}, "is missing"),
        ({"file_name": "long " * 100, "text": "x"}, "is missing"),
        (
            {"file_name": "../a.png", "text": "x"},
            '"file_name" "../a.png" points outside the folder; copy the picture into ',
        ),
        (
            {"file_name": "/etc/passwd", "text": "x"},
            '"file_name" "/etc/passwd" points outside the folder',
        ),
        (
            {"file_name": "link.png", "text": "x"},
            '"file_name" "link.png" points outside the folder',
        ),
        ({"file_name": "circle.png", "text": "x"}, 'picture "circle.png" is missing'),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, answer):
    outside = picture(tmp_path / "a.png")
    folder = captioned(tmp_path / "coco100", [GOOD, "", line])
    (folder / "link.png").symlink_to(outside)
    (folder / "circle.png").symlink_to(folder / "circle.png")
    message = complaint(CaptionedFolder, folder)
    assert message.startswith(f"{folder / 'metadata.jsonl'}, line 3: ") and answer in message


def test_links_inside_the_folder_are_fine(tmp_path):
    captioned(tmp_path / "real", [{"file_name": "link.png", "text": "x"}])
    (tmp_path / "real/link.png").symlink_to(tmp_path / "real/a.png")
    (tmp_path / "folder").symlink_to(tmp_path / "real")
    assert len(CaptionedFolder(tmp_path / "folder")) == 1


def test_not_utf8(tmp_path):
    captioned(tmp_path, [])
    (tmp_path / "metadata.jsonl").write_bytes(
        json.dumps(GOOD).encode() + b'\n{"file_name": "a.png", "text": "caf\xe9"}'
    )
    assert complaint(CaptionedFolder, tmp_path).endswith(
        "line 2: not UTF-8 (byte 0xe9 at column 36); save the file as UTF-8"
    )


def test_folders_that_are_none(tmp_path):
    assert complaint(CaptionedFolder, tmp_path / "none") == f"{tmp_path / 'none'}: no such folder"
    assert "the folder is empty" in complaint(CaptionedFolder, tmp_path)
    assert "the folder is empty" in complaint(ClassFolder, tmp_path)
    file = picture(tmp_path / "a.png")
    assert complaint(CaptionedFolder, file) == f"{file}: this is a file; pass the folder it lies in"
    assert re.search(
        r"metadata.jsonl: not found; write one line a picture there",
        complaint(CaptionedFolder, tmp_path),
    )
    (tmp_path / "metadata.csv").touch()
    assert "metadata.csv: empty; write the columns" in complaint(CaptionedFolder, tmp_path)
    (tmp_path / "metadata.csv").unlink()
    (tmp_path / "metadata.jsonl").write_text("\n \n")
    assert "metadata.jsonl: empty; write one object a line" in complaint(CaptionedFolder, tmp_path)


def test_captions_for_class_folders_are_suggested(tmp_path):
    """It said "load it as class folders", which no verb that trains on captions can."""
    for name in ("ship", "cat", "dog", "frog"):
        picture(tmp_path / name / "0.png")
    assert (
        "there are folders of pictures (cat, dog, frog, ...): put NAME.txt with the caption"
        in complaint(CaptionedFolder, tmp_path)
    )


# Class folders.


def test_class_folder_skips_junk(tmp_path):
    for name in (
        "ship/1.png",
        "ship/0.PNG",
        "cat/x.jpeg",
        "cat/deep/y.png",
        ".hidden/a.png",
        "__MACOSX/ship/1.png",
        ".ipynb_checkpoints/a.png",
    ):
        picture(tmp_path / name, **({"format": "PNG"} if name.endswith("PNG") else {}))
    for name in ("ship/._1.png", "ship/.DS_Store", "ship/Thumbs.db", "ship/notes.txt", "a.txt"):
        (tmp_path / name).write_text("junk")
    (tmp_path / "empty").mkdir()
    picture(tmp_path / "cat/.ipynb_checkpoints/x.png")
    data = ClassFolder(tmp_path, size=4)
    assert (
        data.classes == ["cat", "ship"]
        and data.labels == [0, 0, 1, 1]
        and data.captions == ["cat", "cat", "ship", "ship"]
    )
    assert data[3][1] == "ship" and data[3][0].shape == (3, 4, 4)
    assert len(images_in(tmp_path)) == 4


def test_class_folder_without_classes(tmp_path):
    (tmp_path / "empty").mkdir()
    assert "no class folders (DIR/<class>/<name>.png); there are no pictures below it" in complaint(
        ClassFolder, tmp_path
    )
    picture(tmp_path / "a.png")
    assert "put the pictures of each class into a folder of its own" in complaint(
        ClassFolder, tmp_path
    )


def test_load_all_keeps_order_and_spreads_a_limit(tmp_path):
    for k in range(20):
        picture(tmp_path / f"class{k // 10}" / f"{k:02d}.png", (k, 0, 0))
    data = ClassFolder(tmp_path)
    pictures, captions = load_all(data, 4)
    assert (
        pictures.shape == (20, 3, 4, 4)
        and pictures[:, 0, 0, 0].tolist() == list(range(20))
        and captions == data.captions
    )
    pictures, captions = load_all(data, 4, limit=4)
    assert pictures[:, 0, 0, 0].tolist() == [0, 5, 10, 15] and captions == [
        "class0",
        "class0",
        "class1",
        "class1",
    ]
    assert len(load_all(data, 4, limit=99)[1]) == 20
    (tmp_path / "class0/05.png").write_text("broken")
    assert "05.png: not a readable picture" in complaint(load_all, data, 4)


# CIFAR-10 and real pictures.


def test_cifar10_without_network_says_what_to_do(tmp_path, monkeypatch):
    from urllib.error import URLError

    import torchvision.datasets.cifar as published

    def refuse(*args, **kwargs):
        raise URLError("no route to host")

    monkeypatch.setattr(published, "download_and_extract_archive", refuse)
    message = complaint(cifar10_module.cifar10, tmp_path)
    assert (
        "no route to host" in message
        and "place the archive cifar-10-python.tar.gz there" in message
    )
    assert "no intact CIFAR-10" in complaint(cifar10_module.cifar10, tmp_path, download=False)


def test_cifar10_reads_the_published_layout(tmp_path, monkeypatch):
    import hashlib
    import pickle

    from torchvision.datasets import CIFAR10

    pixels = np.random.default_rng(0).integers(0, 256, (4, 3, 32, 32), np.uint8)
    names = ["airplane", "automobile", "bird", "cat"]
    files = {
        "test_batch": {"data": pixels.reshape(4, -1), "labels": [3, 0, 1, 1]},
        "batches.meta": {"label_names": names},
    }
    (tmp_path / "cifar-10-batches-py").mkdir()
    md5 = {}
    for name, content in files.items():
        (tmp_path / "cifar-10-batches-py" / name).write_bytes(data := pickle.dumps(content))
        md5[name] = hashlib.md5(data).hexdigest()
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", md5["test_batch"]]])
    monkeypatch.setattr(CIFAR10, "train_list", [])
    monkeypatch.setattr(CIFAR10, "meta", CIFAR10.meta | {"md5": md5["batches.meta"]})
    pictures, captions = cifar10_module.cifar10(tmp_path, download=False, train=False)
    assert torch.equal(pictures, torch.from_numpy(pixels)) and captions == [
        "cat",
        "airplane",
        "automobile",
        "automobile",
    ]


def test_real_emoji(real_data):
    data = CaptionedFolder(real_data / "emoji")
    assert len(data) == 1911 and all(data.captions) and data.captions[0] == "hash key"
    pictures, _ = load_all(data, 64, limit=200)
    assert (pictures[:, :, 0, 0] == 255).all(
        1
    ).float().mean() > 0.9  # what was transparent is white


def test_real_cifar10(real_data, tmp_path):
    subprocess.run(
        [
            sys.executable,
            real_data / "cifar10" / "unpack.py",
            tmp_path,
            "--train",
            "200",
            "--test",
            "1",
        ],
        check=True,
        capture_output=True,
    )
    data = ClassFolder(tmp_path / "train")
    pictures, _ = load_all(data, 32)
    assert pictures.shape == (200, 3, 32, 32) and len(data.classes) == 10
    published = torch.tensor(
        [0.4914, 0.4822, 0.4465]
    )  # the mean of all 50,000; 200 of them lie within a few hundredths
    assert (pictures.float().mean((0, 2, 3)) / 255 - published).abs().max() < 0.05


def test_real_coco_pictures(real_data):
    files = images_in(real_data / "coco" / "images")
    assert len(files) == 111 and load_image(files[0], 100).shape == (3, 100, 100)


@pytest.mark.parametrize("mode, pixels", [("RGB", 10_000), ("RGBA", 7_500), ("I;16", 7_500)])
def test_pictures_of_many_pixels_are_refused_by_their_header(tmp_path, monkeypatch, mode, pixels):
    """Pillow only warns up to twice its limit, and 2 MB unpacked to 3 GB."""
    path = tmp_path / "a.png"
    Image.new(mode, (100, pixels // 100)).save(path)
    Image.new(mode, (100, pixels // 100 + 1)).save(tmp_path / "b.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
    assert load_image(path).shape == (3, pixels // 100, 100)
    monkeypatch.setattr(Image.Image, "load", None)
    assert f"at most {pixels:,} are read" in complaint(load_image, tmp_path / "b.png")


def test_no_program_is_run_for_a_file_that_calls_itself_a_picture(tmp_path, monkeypatch):
    """Pillow gives an EPS file to Ghostscript, by its content."""

    def fail(*_, **__):
        raise SystemExit("a program ran")

    monkeypatch.setattr(subprocess, "check_call", fail)
    monkeypatch.setattr(EpsImagePlugin, "has_ghostscript", lambda: True)
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", "gs")
    picture(tmp_path / "a.eps").rename(tmp_path / "a.png")
    assert "not a readable picture" in complaint(load_image, tmp_path / "a.png")
