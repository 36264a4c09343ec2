"""Each trap makes exactly its finding appear, a clean folder gives none, doctor and loader agree on
every folder, and no folder is too broken.
"""

import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import unicodedata
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance

from minidiff.cli.main import main
from minidiff.data.doctor import examine as doctor
from minidiff.data.doctor.traps import TRAPS, near_duplicates
from minidiff.data.folder import CaptionedFolder, ClassFolder, load_image
from minidiff.errors import UserError
from minidiff.figures.contact import contact_sheet
from tests.data.test_folder import swapped_profile

META = "metadata.jsonl"


def image(seed, size=(64, 64)):
    coarse = np.random.default_rng(seed).integers(40, 256, (6, 6, 3), np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


def lines(folder):
    return [json.loads(line) for line in (folder / META).read_text(encoding="utf-8").splitlines()]


def rewrite(folder, rows):
    (folder / META).write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows),
        encoding="utf-8",
    )


@pytest.fixture
def clean(tmp_path):
    """Six pictures that no two of look alike, one caption each."""
    folder = tmp_path / "pets"
    folder.mkdir()
    for k in range(6):
        image(k).save(folder / f"{k}.png")
    rewrite(folder, [{"file_name": f"{k}.png", "text": f"caption number {k}"} for k in range(6)])
    return folder


def traps(folder, level=None, **how):
    report = doctor.examine(folder, **{"size": 64} | how)
    return {finding.trap for finding in report.findings if level in (None, finding.level)}


def test_a_clean_folder_gives_no_finding(clean):
    report = doctor.examine(clean, size=64)
    assert report.findings == [] and doctor.as_text(report).endswith(f"{clean}: can be trained on")
    assert report.summary == {
        "pictures": 6,
        "pictures that no line names": 0,
        "captions": 6,
        "different captions": 6,
        "shorter side in pixels": {"least": 64, "median": 64, "most": 64},
        "tokens of a caption": {"least": 3, "median": 3, "most": 3},
        "captions over 75 tokens": 0,
        "the same picture twice": 0,
        "near-duplicate": 0,
    }


# One trap at a time: what is done to the clean folder.


def replaced(**options):
    """Picture 3, saved in another way."""

    def change(folder):
        name, how = (
            options.get("name", "3.png"),
            {k: v for k, v in options.items() if k not in ("name", "change")},
        )
        options.get("change", lambda picture: picture)(image(3)).save(folder / name, **how)
        if name != "3.png":
            row(3, file_name=name)(folder)
            (folder / "3.png").unlink()

    return change


def row(k, **changes):
    def change(folder):
        rows = lines(folder)
        rows[k] = {name: value for name, value in (rows[k] | changes).items() if value is not ...}
        rewrite(folder, rows)

    return change


def added(*new):
    return lambda folder: rewrite(folder, [*lines(folder), *new])


def content(name, change):
    return lambda folder: (folder / name).write_bytes(
        change((folder / name).read_bytes() if (folder / name).is_file() else b"")
    )


def file(name, data=b"x"):
    def change(folder):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)

    return change


def both(*changes):
    def change(folder):
        for one in changes:
            one(folder)

    return change


def orientation(picture):
    exif = picture.getexif()
    exif[0x0112] = 6
    return exif


def png16(folder):
    """16-bit RGB, which Pillow reads and cannot write."""
    pixels = np.asarray(image(3)).astype(">u2") * 257

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    body = zlib.compress(b"".join(b"\0" + line.tobytes() for line in pixels))
    header = struct.pack(">IIBBBBB", 64, 64, 16, 2, 0, 0, 0)
    (folder / "3.png").write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")
    )


def link(name, to):
    return lambda folder: (folder / name).symlink_to(to)


def outside(folder):
    image(99).save(folder.parent / "outside.png")


def bars(picture):
    black = Image.new("RGB", (64, 64))
    black.paste(picture.resize((64, 48)), (0, 8))
    return black


LONG = " ".join(["word"] * 80 + ["the", "end"])
ERRORS = {
    "no metadata.jsonl": [
        lambda folder: (folder / META).unlink(),
        content(META, lambda _: b"\n \n"),
        both(file("train/metadata.jsonl"), lambda folder: (folder / META).unlink()),
    ],
    "not UTF-8": [
        content(META, lambda whole: whole + b'{"file_name": "caf\xe9"}'),
        content(META, lambda whole: whole.decode().encode("utf-16")),
    ],
    "not JSON": [
        added("{'file_name': '3.png'}"),
        added("[1]"),
        added("[" * 100_000),
        added('{"n": ' + "9" * 5000 + "}"),
    ],
    "no caption column": [row(3, text=..., caption="x"), row(3, text=...)],
    "not a caption": [
        row(3, text=None),
        row(3, text=[]),
        row(3, text={"a": {}}),
        row(3, text=[[1]]),
        row(3, text="half \ud800"),
    ],
    "missing picture": [
        added({"file_name": "7.png", "text": "x"}),
        added({"file_name": "a\0", "text": "x"}),
        added({"file_name": "n" * 999, "text": "x"}),
        both(lambda folder: os.mkfifo(folder / "pipe"), added({"file_name": "pipe", "text": "x"})),
        both(link("dead.jpg", "nowhere"), added({"file_name": "dead.jpg", "text": "x"})),
        both(link("circle", "circle"), added({"file_name": "circle", "text": "x"})),
    ],
    "outside the folder": [
        both(outside, added({"file_name": "../outside.png", "text": "x"})),
        added({"file_name": "/etc/passwd", "text": "x"}),
        both(
            outside, link("out.png", "../outside.png"), added({"file_name": "out.png", "text": "x"})
        ),
    ],
    "empty file": [content("3.png", lambda _: b"")],
    "unreadable picture": [
        content("3.png", lambda whole: whole[: len(whole) // 2]),
        content("3.png", lambda _: b"text"),
        both(file("3.heic"), added({"file_name": "3.heic", "text": "x"})),
    ],
}
OTHERS = {
    "picture without a caption": [lambda folder: image(50).save(folder / "more.png")],
    "picture in another format": [file("a.jxl"), file("deep/a.PSD")],
    "empty caption": [row(3, text=""), row(3, text=" \n"), row(3, text=["", "x"])],
    "caption too long": [row(3, text=LONG)],
    "the same line twice": [lambda folder: rewrite(folder, [*lines(folder), lines(folder)[3]])],
    "the same picture twice": [
        both(
            lambda folder: image(3).save(folder / "twin.bmp"),
            added({"file_name": "twin.bmp", "text": "x"}),
        )
    ],
    "near-duplicate": [
        both(
            lambda folder: image(3).save(folder / "like.jpg", quality=80),
            added({"file_name": "like.jpg", "text": "x"}),
        ),
        both(
            lambda folder: ImageEnhance.Brightness(image(3)).enhance(0.9).save(folder / "like.png"),
            added({"file_name": "like.png", "text": "x"}),
        ),
    ],
    "smaller than the training size": [replaced(change=lambda picture: picture.resize((64, 48)))],
    "long and narrow": [replaced(change=lambda picture: picture.resize((192, 64)))],
    "black bars": [
        replaced(change=bars),
        replaced(change=lambda picture: Image.new("RGB", (64, 64))),
    ],
    "link out of the folder": [
        both(outside, link("more.txt", "../outside.png")),
        link("elsewhere", ".."),
    ],
    "names that differ in case alone": [
        both(file("Notes.txt"), file("notes.TXT")),
        both(file("é"), file(unicodedata.normalize("NFD", "é"))),
    ],
    "one picture in several lines": [added({"file_name": "./3.png", "text": "another"})],
    "byte-order mark": [content(META, lambda whole: b"\xef\xbb\xbf" + whole)],
    "turned by EXIF": [lambda folder: image(3).save(folder / "3.png", exif=orientation(image(3)))],
    "grey": [
        replaced(change=lambda picture: picture.convert("L")),
        replaced(change=lambda picture: picture.convert("1")),
    ],
    "transparent": [replaced(change=lambda picture: picture.convert("RGBA"))],
    "palette": [replaced(change=lambda picture: picture.quantize(200))],
    "CMYK": [replaced(name="c.jpg", change=lambda picture: picture.convert("CMYK"))],
    "colour profile": [replaced(icc_profile=swapped_profile())],
    "16-bit": [
        lambda folder: Image.fromarray(np.asarray(image(3))[..., 0].astype(np.uint16) * 257).save(
            folder / "3.png"
        ),
        png16,
    ],
    "animated": [replaced(name="a.webp", save_all=True, append_images=[image(60)])],
    "sides not divisible by 64": [
        replaced(change=lambda picture: picture.resize((72, 64))),
        replaced(change=lambda picture: picture.resize((64, 65))),
    ],
    "junk": [
        file(".DS_Store"),
        file("Thumbs.db"),
        file("._3.png"),
        file(".ipynb_checkpoints/a.png"),
        file("deep/desktop.ini"),
        file("__MACOSX/._a.png"),
    ],
}
CASES = [
    (trap, k, change)
    for table in (ERRORS, OTHERS)
    for trap, changes in table.items()
    for k, change in enumerate(changes)
]


def test_every_row_of_the_table_has_a_case():
    assert TRAPS.keys() == OTHERS.keys() | {"training size not divisible by 64"}


@pytest.mark.parametrize("trap, k, change", CASES, ids=[f"{trap}-{k}" for trap, k, _ in CASES])
def test_each_trap_makes_exactly_its_finding_appear(clean, tmp_path, trap, k, change):
    change(clean)
    report = doctor.examine(clean, size=64)
    assert {finding.trap for finding in report.findings} == {trap}
    assert len(report.findings) == 1, report.findings
    assert report.findings[0].level == ("error" if trap in ERRORS else TRAPS[trap].level)
    agree(clean, report)
    doctor.write(report, tmp_path / "out")
    written = json.loads((tmp_path / "out/report.json").read_text())
    assert written["trainable"] == (trap in OTHERS) and [
        group["trap"] for group in written["findings"]
    ] == [trap]
    assert trap in doctor.as_text(report)


def agree(folder, report):
    """The loader takes exactly the folders in which the doctor found no error, and says the first
    of them.
    """
    try:
        data = CaptionedFolder(folder)
        said = None
        for path in dict.fromkeys(data.paths):
            load_image(path)
    except UserError as error:
        said = str(error)
    assert said == (report.errors[0].what if report.errors else None)


# What is said of it.


@pytest.mark.parametrize(
    "change, said",
    [
        (
            row(3, text=..., caption="x"),
            'line 4: no column "text"; found "file_name", "caption". Rename it, or '
            "pass `caption_column=caption`.",
        ),
        (
            row(3, file_name="4.pgn"),
            'metadata.jsonl, line 4: picture "4.pgn" is missing; did you mean "4.png"?',
        ),
        (
            both(file("train/metadata.jsonl"), lambda folder: (folder / META).unlink()),
            "train/metadata.jsonl; pass the folder it lies in",
        ),
        (row(3, text=LONG), '82 tokens; cut off: "word word word word word the end"'),
        (
            replaced(change=lambda picture: picture.resize((100, 70))),
            "100 x 70; nearest by 8 96 x 72, by 64 128 x 64",
        ),
        (replaced(change=lambda picture: picture.resize((320, 64))), "320 x 64: 80% is cut off"),
        (replaced(change=lambda picture: picture.resize((64, 32))), "64 x 32: enlarged 2 times"),
        (
            lambda folder: image(3).save(folder / "3.png", exif=orientation(image(3))),
            "3.png  orientation 6",
        ),
        (replaced(change=bars), "25% of it"),
        (lambda folder: image(3).save(folder / "5.png"), "5.png  as 3.png"),
        (added({"file_name": "3.png", "text": "caption number 3"}), "line 7  as line 4"),
        (
            content("3.png", lambda _: b""),
            "3.png: not a readable picture (the file is empty); replace it",
        ),
        (lambda folder: (folder / META).unlink(), "`layout=classes`"),
    ],
)
def test_what_is_said(clean, change, said):
    change(clean)
    assert said in doctor.as_text(doctor.examine(clean, size=64))


def test_training_sizes(clean):
    report = doctor.examine(clean, size=56)
    assert [(finding.trap, finding.where, finding.what) for finding in report.findings] == [
        ("training size not divisible by 64", "`size=56`", "the nearest that are: 64")
    ]
    with pytest.raises(
        UserError, match="size 60 is not divisible by 8; the nearest valid sizes are 56 and 64"
    ):
        doctor.examine(clean, size=60)


def test_pictures_that_no_line_names_stop_nothing(clean):
    file("broken.png")(clean)
    file("empty.png", b"")(clean)
    report = doctor.examine(clean, size=64)
    assert {(finding.level, finding.trap) for finding in report.findings} == {
        ("warning", "picture without a caption"),
        ("warning", "unreadable picture"),
        ("warning", "empty file"),
    }
    agree(clean, report)


def test_a_line_has_both_its_faults_named_and_the_first_bad_line_comes_first(clean):
    row(2, file_name="x.png", text=None)(clean)
    row(4, text=None)(clean)
    report = doctor.examine(clean, size=64)
    assert [(finding.trap, finding.where.rpartition(" ")[2]) for finding in report.errors] == [
        ("missing picture", "3"),
        ("not a caption", "3"),
        ("not a caption", "5"),
    ]
    assert doctor.verdict(report).startswith(
        "cannot be trained on (missing picture: 1, not a caption: 2): "
        f"{clean / META}, line 3: picture"
    )


def test_another_caption_column(clean):
    rewrite(
        clean, [{"file_name": one["file_name"], "caption": one["text"]} for one in lines(clean)]
    )
    assert traps(clean) == {"no caption column"} and traps(clean, caption_column="caption") == set()


def test_near_duplicates_and_what_is_none(clean):
    """Edits that nobody would take for another picture are found; no two of fifty pictures are
    taken for one another, nor are plain colours.
    """
    for k in range(6, 50):
        image(k).save(clean / f"{k}.png")
    for name in ("red", "blue"):
        Image.new("RGB", (64, 64), name).save(clean / f"{name}.png")
    names = [path.name for path in clean.glob("*.png")]
    rewrite(clean, [{"file_name": name, "text": name} for name in names])
    assert traps(clean) == set()
    image(3, (128, 128)).save(clean / "large.png")
    image(4).convert("L").convert("RGB").crop((1, 1, 63, 63)).resize((64, 64)).save(
        clean / "cut.png"
    )
    image(5).crop((1, 1, 63, 63)).resize((64, 64)).save(clean / "near.png")
    rewrite(
        clean,
        [
            {"file_name": name, "text": name}
            for name in [*names, "large.png", "cut.png", "near.png"]
        ],
    )
    report = doctor.examine(clean, size=64)
    found = {
        finding.where: finding.what.split()[1]
        for finding in report.findings
        if finding.trap == "near-duplicate"
    }
    assert found == {
        "large.png": "3.png",
        "near.png": "5.png",
    }  # a grey copy shares the shape, not the look
    assert list(near_duplicates(report.data, chunk=7)) == list(near_duplicates(report.data))


def test_an_animated_gif_has_a_palette_too(clean):
    replaced(name="a.gif", save_all=True, append_images=[image(60)])(clean)
    assert traps(clean) == {"animated", "palette"}


def test_a_metadata_file_that_cannot_be_read(clean, monkeypatch):
    def refuse(self):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(
        Path, "read_bytes", refuse
    )  # the tests may run as root, who may read anything
    report = doctor.examine(clean, size=64)
    assert [finding.what for finding in report.findings] == [
        f"{clean / META}: Permission denied; check its permissions"
    ]
    agree(clean, report)


# Other layouts.


def test_class_folders(tmp_path):
    for k in range(4):
        (tmp_path / "pets" / ("cat", "dog")[k % 2]).mkdir(parents=True, exist_ok=True)
        image(k).save(tmp_path / "pets" / ("cat", "dog")[k % 2] / f"{k}.png")
    report = doctor.examine(tmp_path / "pets", "classes", size=64)
    assert (
        report.findings == []
        and report.summary["captions"] == 4
        and report.summary["different captions"] == 2
    )
    assert (
        traps(tmp_path / "pets") == {"no metadata.jsonl"}
        and traps(tmp_path / "pets", layout="pictures") == set()
    )
    (tmp_path / "pets/cat/0.png").write_bytes(b"broken")
    assert (
        traps(tmp_path / "pets", layout="classes")
        == {"unreadable picture"}
        == traps(tmp_path / "pets", layout="pictures")
    )
    for layout, trap in (("classes", "no class folders"), ("pictures", "no pictures")):
        shutil.rmtree(tmp_path / "pets/cat", ignore_errors=True)
        shutil.rmtree(tmp_path / "pets/dog", ignore_errors=True)
        (tmp_path / "pets/a.txt").touch()
        assert traps(tmp_path / "pets", "error", layout=layout) == {trap}
    with pytest.raises(UserError):
        ClassFolder(tmp_path / "pets")


def test_folders_that_are_none(tmp_path):
    for folder, said in (
        (tmp_path / "nowhere", "no such folder"),
        (tmp_path, "the folder is empty"),
    ):
        with pytest.raises(UserError, match=said):
            doctor.examine(folder)
    with pytest.raises(UserError, match='no layout "x"; there is captions, classes, pictures'):
        doctor.examine(tmp_path, "x")


# The command.


@pytest.fixture
def check(tmp_path, capsys):
    def run(folder, *options):
        code = 0
        try:
            main(
                [
                    str(o)
                    for o in [
                        "data",
                        "check",
                        folder,
                        "--size",
                        64,
                        "--out",
                        tmp_path / "out",
                        *options,
                    ]
                ]
            )
        except SystemExit as end:
            code = end.code
        out, err = capsys.readouterr()
        return (
            code,
            out,
            "".join(
                line
                for line in err.replace("\r", "\n").splitlines()
                if not line.startswith("reading pictures")
            ).strip(),
        )

    return run


def test_check_says_what_it_found_and_writes_it(check, clean, tmp_path):
    both(row(3, text=""), file(".DS_Store"))(clean)
    code, out, err = check(clean)
    assert code == 0 and err == "" and f"{clean}: can be trained on" in out
    assert (
        out.index("warnings")
        < out.index("empty caption: 1 (write one")
        < out.index("notes")
        < out.index("junk: 1")
    )
    assert out.endswith(f"{tmp_path / 'out/report.json'}\n{tmp_path / 'out/contact.png'}\n")
    with Image.open(tmp_path / "out/contact.png") as sheet:
        assert sheet.width > 500


def test_check_of_a_folder_that_cannot_be_trained_on_reports_first_and_ends_with_one_line(
    check, clean, tmp_path
):
    rewrite(
        clean,
        [{"file_name": f"{k}.png", "text": None} for k in range(3)]
        + [{"file_name": f"new {k}.png", "text": "x"} for k in range(40)],
    )
    code, out, err = check(clean)
    assert (
        code == 2
        and "not a caption: 3" in out
        and "missing picture: 40" in out
        and "and 37 more" in out
        and "report.json" in out
    )
    assert err.startswith(
        "minidiff: cannot be trained on (not a caption: 3, missing picture: "
        f"40): {clean / META}, line 1: "
    )
    assert err.endswith(f"(all in {tmp_path / 'out/report.json'})")
    groups = json.loads((tmp_path / "out/report.json").read_text())["findings"]
    assert [len(group["places"]) for group in groups if group["level"] == "error"] == [3, 40]


def test_check_writes_nothing_where_it_must_not(check, clean):
    before = sorted(clean.rglob("*"))
    for options in (
        ["--out", clean],
        ["--out", clean / "deep"],
        ["--size", "60"],
        ["--layout", "x"],
        ["--seed", "-1"],
    ):
        code, out, err = check(clean, *options)
        assert code == 2 and out == "" and err.startswith("minidiff: ")
    assert sorted(clean.rglob("*")) == before


def test_the_seed_chooses_the_sheet(check, clean, tmp_path):
    for k in range(60):
        image(k).save(clean / f"{k}.png")
    rewrite(clean, [{"file_name": f"{k}.png", "text": str(k)} for k in range(60)])
    sheets = []
    for seed in (0, 0, 1):
        check(clean, "--seed", seed)
        sheets.append((tmp_path / "out/contact.png").read_bytes())
    assert sheets[0] == sheets[1] != sheets[2]


def test_strange_names_are_printed_as_escapes(clean):
    os.rename(clean / "0.png", clean / "0é.png")
    os.rename(clean / "3.png", os.fsencode(clean) + b"/0\xff\x1b[31m.png")
    command = [
        "data",
        "check",
        str(clean),
        "--layout",
        "pictures",
        "--out",
        str(clean.parent / "out"),
        "--size",
        "128",
    ]
    ran = subprocess.run(
        [sys.executable, "-m", "minidiff.cli.main", *command],
        capture_output=True,
        env=os.environ | {"PYTHONIOENCODING": "utf-8"},
    )
    assert ran.returncode == 0 and b"\xc3\xa9.png" in ran.stdout
    assert (
        rb"0\udcff\x1b[31m.png  64 x 64: enlarged 2 times" in ran.stdout
        and b"\x1b" not in ran.stdout
    )
    ran = subprocess.run(
        [sys.executable, "-m", "minidiff.cli.main", *command],
        capture_output=True,
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
    )
    assert ran.returncode == 0 and rb"0\xe9.png" in ran.stdout


# No folder is too broken.

NAMES = st.sampled_from(
    [
        "0.png",
        "1.png",
        "A.PNG",
        "a.png",
        "sub/b.jpg",
        "x.gif",
        "c.tif",
        "d.webp",
        ".DS_Store",
        "._0.png",
        "e.heic",
        "f.txt",
        META,
        "metadata.csv",
        "sub/metadata.jsonl",
        "__MACOSX/0.png",
    ]
)
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.floats()
    | st.integers()
    | st.text(st.characters(), max_size=20),  # also halves of characters
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["file_name", "text", "a"]), inner, max_size=3)
    ),
    max_leaves=4,
)
FILE_NAMES = JSON | st.sampled_from(
    [
        "0.png",
        "1.png",
        "sub/b.jpg",
        "../0.png",
        "link",
        "loop/0.png",
        ".",
        "",
        "/",
        "sub",
        "x.gif",
        "a\0b",
        "0.PNG",
        "pipe",
    ]
)
ROWS = st.lists(
    st.builds(
        lambda name, text: json.dumps({"file_name": name, "text": text}).encode(), FILE_NAMES, JSON
    )
    | st.builds(lambda value: json.dumps(value).encode(), JSON)
    | st.binary(max_size=30),
    max_size=6,
)
BYTES = st.binary(max_size=40) | st.builds(
    lambda seed, form, cut, places: damaged(seed, form, cut, places),
    st.integers(0, 3),
    st.sampled_from(["PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP"]),
    st.floats(0.2, 1),
    st.lists(st.tuples(st.floats(0, 0.999), st.integers(0, 255)), max_size=4),
)
WHOLE = {
    (seed, form): (
        lambda file: (image(seed, (16, 12)).save(file, form), file.seek(0), file.read())[2]
    )(tempfile.TemporaryFile())
    for seed in range(4)
    for form in ("PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP")
}


def damaged(seed, form, cut, places):
    whole = bytearray(WHOLE[seed, form])
    for where, byte in places:
        whole[int(where * len(whole))] = byte
    return bytes(whole[: max(1, int(cut * len(whole)))])


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::PIL.Image.DecompressionBombWarning")
@settings(max_examples=150, deadline=None)
@given(
    files=st.dictionaries(NAMES, BYTES, max_size=8),
    rows=ROWS,
    separator=st.sampled_from([b"\n", b"\r\n", b"\r"]),
    start=st.sampled_from([b"", b"\xef\xbb\xbf", b"\xff\xfe"]),
    links=st.dictionaries(
        st.sampled_from(["link", "loop", "dead.png", "up.png"]),
        st.sampled_from(["..", ".", "0.png", "nowhere", "link", "../x"]),
    ),
    layout=st.sampled_from(doctor.LAYOUTS),
)
def test_the_doctor_survives_every_folder_and_agrees_with_the_loader(
    files, rows, separator, start, links, layout
):
    with tempfile.TemporaryDirectory() as place, pytest.MonkeyPatch.context() as patch:
        patch.setattr(Image, "MAX_IMAGE_PIXELS", 100_000)  # a broken header may claim gigabytes
        folder = Path(place, "data")
        folder.mkdir()
        (folder / META).write_bytes(start + separator.join(rows))
        for name, data in files.items():
            file(name, data)(folder)
        for name, to in links.items():
            (folder / name).symlink_to(to)
        os.mkfifo(folder / "pipe")
        report = doctor.examine(folder, layout, size=16)
        if layout == "captions":
            agree(folder, report)
        out = Path(place, "out")
        for path in (doctor.write(report, out), *contact_sheet(report.data, out / "contact.png")):
            assert path.is_file()
        json.loads(Path(place, "out/report.json").read_text())
        text = doctor.as_text(report)
        assert text.encode() and text.endswith("cannot be trained on") == bool(report.errors)
        assert not report.errors or "\n" not in doctor.verdict(report)


def test_every_trap_is_in_the_book():
    book = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    assert [
        trap
        for trap in [*ERRORS, *TRAPS, "no file_name column", "no class folders", "no pictures"]
        if f"| {trap} |" not in book
    ] == []


# The real pictures.


@pytest.mark.slow
def test_near_duplicates_of_real_pictures(real_data, tmp_path):
    """What docs/data.md says of 111 pictures of COCO: which edits are still recognised, and that no
    two pictures are taken for one another.

    The bounds leave room for another Pillow's JPEG."""
    edits = {
        "jpeg": lambda picture: picture,  # saved at quality 30
        "half": lambda picture: picture.resize((picture.width // 2, picture.height // 2)),
        "bright": lambda picture: ImageEnhance.Brightness(picture).enhance(1.2),
        "cropped": lambda picture: picture.crop(
            [int(side * share) for share in (0.015, 0.985) for side in picture.size]
        ),
    }
    (tmp_path / "all").mkdir()
    for path in sorted((real_data / "coco/images").iterdir()):
        with Image.open(path) as whole:
            whole = whole.convert("RGB")
            whole.save(tmp_path / "all" / f"{path.stem} a.png", compress_level=0)
            for name, edit in edits.items():
                edit(whole).save(
                    tmp_path / "all" / f"{path.stem} {name}.jpg",
                    quality=30 if name == "jpeg" else 95,
                )
    report = doctor.examine(tmp_path / "all", "pictures", size=64)
    found = [finding.where for finding in report.findings if finding.trap == "near-duplicate"]
    assert all(
        finding.what.split()[1][:12] == finding.where[:12]
        for finding in report.findings
        if finding.trap == "near-duplicate"
    )
    shares = {name: sum(name in where for where in found) / 111 for name in edits}
    print({name: round(share, 3) for name, share in shares.items()})
    assert (
        shares["jpeg"] > 0.95
        and shares["half"] == 1
        and shares["bright"] > 0.9
        and shares["cropped"] > 0.8
    )


def test_real_pictures(real_data, tmp_path):
    report = doctor.examine(real_data / "coco", "pictures", size=64)
    assert (
        not report.errors
        and report.summary["pictures"] == 111
        and report.summary["near-duplicate"] == 0
    )
    (grey,) = [finding.where for finding in report.findings if finding.trap == "grey"]
    with Image.open(real_data / "coco" / grey) as picture:
        assert picture.mode == "L"
    subject = doctor.examine(real_data / "dreambooth" / "cat2", "pictures")
    assert {finding.where for finding in subject.findings if finding.trap == "black bars"} == {
        "00.jpg",
        "01.jpg",
        "04.jpg",
    }


def test_real_emoji(real_data):
    report = doctor.examine(real_data / "emoji", size=64)
    levels = {finding.trap: finding.level for finding in report.findings}
    assert not report.errors and levels.keys() == {
        "transparent",
        "grey",
        "palette",
        "near-duplicate",
        "the same picture twice",
    }
    assert (
        report.summary["pictures"]
        == 1911
        == sum(finding.trap == "transparent" for finding in report.findings)
    )


def test_the_size_is_that_of_the_model(clean, tmp_path, ran):
    """The tutorial's own pictures, of 64 pixels for the model in the box, were called too small."""
    out = ("--out", tmp_path / "out")
    said = ran("data", "check", clean, *out).out
    assert "checked for box, at 32x32 pixels" in said and "smaller than" not in said
    assert "not divisible by 64" not in said
    said = ran("data", "check", clean, "--size", 512, *out).out
    assert "at 512x512 pixels" in said and "smaller than the training size: 6" in said


def test_a_full_disk_is_one_line_that_names_the_folder(clean, tmp_path, capsys, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("minidiff.data.doctor.examine.write", full)
    with pytest.raises(SystemExit) as end:
        main(["data", "check", str(clean), "--out", str(tmp_path / "out")])
    said = capsys.readouterr().err
    reason = "cannot be written (No space left on device); make room, or name another folder."
    assert end.value.code == 2 and said.endswith(f"{tmp_path / 'out'}: {reason}\n")
