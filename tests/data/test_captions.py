"""Captions in every form they come in: tables, text files beside the images, lists; and names of
files in every spelling.
"""

import json
import sys
import unicodedata

import numpy as np
import pytest

from minidiff.cli.main import main
from minidiff.data.captions import Fault
from minidiff.data.doctor import examine as doctor
from minidiff.data.folder import CaptionedFolder
from minidiff.errors import UserError
from tests.data.test_folder import captioned, complaint, picture

NAMES = ["a.png", "sub/b.jpg"]
ROWS = [{"file_name": "a.png", "text": "an apple"}, {"file_name": "sub/b.jpg", "text": "a bowl"}]


@pytest.fixture
def folder(tmp_path):
    for name in NAMES:
        picture(tmp_path / name)
    return tmp_path


def read(folder, **options):
    data = CaptionedFolder(folder, **options)
    names = [path.relative_to(folder).as_posix() for path in data.paths]
    assert doctor.examine(folder, size=64).errors == []  # the doctor reads what the loader reads
    return dict(zip(names, data.captions, strict=True))


BOTH = {"a.png": "an apple", "sub/b.jpg": "a bowl"}


@pytest.mark.parametrize("suffix", [".txt", ".caption"])
def test_text_files_beside_the_images(folder, suffix):
    """As kohya's tools and img2dataset write them. They were refused: "metadata.jsonl: not found"."""
    (folder / "a.png").with_suffix(suffix).write_text("an apple\n")
    (folder / "sub/b.jpg").with_suffix(suffix).write_text("\ufeffa bowl", encoding="utf-8")
    assert read(folder) == BOTH


def test_lines_of_a_text_file_are_captions_and_the_first_is_taken(folder):
    (folder / "a.txt").write_text("an apple\n\n  a fruit \n")
    (folder / "sub/b.txt").write_text("")
    assert read(folder) == {"a.png": "an apple", "sub/b.jpg": ""}
    several = CaptionedFolder(folder, several=True).alternatives
    assert several == [["an apple", "a fruit"], [""]]


def test_images_without_a_text_file_are_named(folder):
    (folder / "a.txt").write_text("an apple")
    with pytest.warns(UserWarning, match=r"1 pictures have no text file beside them \(b.jpg\)"):
        assert len(CaptionedFolder(folder)) == 1
    with pytest.warns(UserWarning):
        traps = {finding.trap for finding in doctor.examine(folder, size=64).findings}
    assert "picture without a caption" in traps


def test_a_text_file_that_is_not_utf8_is_named(folder):
    (folder / "a.txt").write_bytes("caf\xe9".encode("latin-1"))
    assert complaint(CaptionedFolder, folder).startswith(
        f"{folder / 'a.txt'}: not UTF-8 (byte 0xe9"
    )


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_a_csv(folder, separator):
    lines = [
        ["file_name", "text", "id"],
        ["a.png", '"an apple"', "1"],
        ["sub/b.jpg", "a bowl", "2"],
    ]
    text = "\ufeff" + "\r\n".join(separator.join(line) for line in lines)
    (folder / "metadata.csv").write_text(text, encoding="utf-8", newline="")
    assert read(folder) == BOTH


@pytest.mark.parametrize(
    "text, answer",
    [
        ("file_name,text\na.png,x\nb.png", "metadata.csv, line 3: picture"),
        ("file_name,text\na.png", 'line 2: column "text" holds null, not a caption'),
        ("file_name,caption\na.png,x", "pass `caption_column=caption`"),
        ("a.png,x\n", "metadata.csv: empty; write the columns file_name,text"),
        ('file_name,text\na.png,"x', "after line 1: not CSV (unexpected end of data)"),
        (f"file_name,text\na.png,{'x' * 200_000}", "after line 1: not CSV (field larger"),
    ],
)
def test_a_csv_that_is_none(folder, text, answer):
    (folder / "metadata.csv").write_text(text)
    assert answer in complaint(CaptionedFolder, folder)
    assert doctor.examine(folder, size=64).errors


def test_a_parquet_table(folder, monkeypatch):
    pytest.importorskip("pyarrow")
    import pyarrow
    from pyarrow import parquet

    columns = {name: [row[name] for row in ROWS] for name in ("file_name", "text")}
    table = pyarrow.table(columns | {"image": [b"bytes", b"bytes"], "all": [["x", "y"], ["z"]]})
    parquet.write_table(table, folder / "metadata.parquet")
    assert read(folder) == BOTH
    assert CaptionedFolder(folder, caption_column="all").captions == ["x", "z"]
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert complaint(CaptionedFolder, folder).endswith(
        "metadata.parquet: reading it needs pyarrow; pip install pyarrow, or write metadata.jsonl"
    )
    monkeypatch.undo()
    (folder / "metadata.parquet").write_bytes(b"PAR1 damaged PAR1")
    assert "metadata.parquet: not a Parquet file (" in complaint(CaptionedFolder, folder)


def test_of_two_tables_the_first_is_read_and_the_other_named(folder):
    captioned(folder, ROWS, NAMES)
    (folder / "metadata.csv").write_text("file_name,text\n")
    with pytest.warns(UserWarning, match="metadata.jsonl has the captions; metadata.csv is not"):
        assert read(folder) == BOTH


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_accents_in_another_spelling_are_the_same_name(tmp_path, form):
    """macOS: 'picture "café.png" is missing; did you mean "café.png"?'"""
    other = "NFD" if form == "NFC" else "NFC"
    captioned(
        tmp_path,
        [{"file_name": unicodedata.normalize(form, "café.png"), "text": "x"}],
        [unicodedata.normalize(other, "café.png")],
    )
    assert len(CaptionedFolder(tmp_path)) == 1
    assert doctor.examine(tmp_path, size=64).summary["pictures that no line names"] == 0


def test_a_list_of_captions_is_read_whole_where_all_are_wanted(folder):
    captioned(folder, [{"file_name": "a.png", "text": ["x", None]}], [])
    assert CaptionedFolder(folder).captions == ["x"]
    assert "holds null, not a caption" in complaint(CaptionedFolder, folder, several=True)


@pytest.mark.parametrize(
    "row",
    [
        '{"file_name": "a.png", "text": ' + "9" * 400 + "}",
        '{"file_name": "a.png", "text": ' + "9" * 5000 + "}",
        '{"file_name": "a.png", "text": 1e999}',
        r'{"file_name": "a\ud800.png", "text": "x"}',
        r'{"file_name": "a.png", "text": "x\udfff"}',
        r'{"\ud800": 1, "file_name": "a.png"}',
        '{"file_name": {"a": ["b"]}, "text": "x"}',
        '{"file_name": "a.png", "text": [["x"]]}',
        '{"file_name": null, "text": null}',
        '{"file_name": "a.png", "text": ' + "[" * 3000 + "]" * 3000 + "}",
        r'{"file_name": "\u001b[2J.png", "text": "x"}',
        json.dumps({"file_name": "a.png"} | {f"column {k}": k for k in range(10_000)}),
    ],
)
@pytest.mark.parametrize("verb", [("finetune", "--data"), ("data", "check")])
def test_hostile_lines_are_one_line(folder, capsys, row, verb):
    captioned(folder, [row], [])
    with pytest.raises(Fault):
        CaptionedFolder(folder)
    with pytest.raises(SystemExit) as end:
        main([*verb, str(folder), "--out", str(folder.parent / f"{folder.name}-out")])
    error = capsys.readouterr().err
    assert end.value.code == 2 and "\x1b" not in error
    line = error.replace("\r", "\n").strip().splitlines()[-1]
    assert "metadata.jsonl, line 1: " in line and len(line) < 1000


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_damaged_tables_are_read_or_are_one_line(folder):
    """Of a Parquet file with one byte changed it was "UnicodeDecodeError: invalid byte"."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    table = pyarrow.table({name: [row[name] for row in ROWS] for name in ROWS[0]})
    parquet.write_table(table, folder / "metadata.parquet", compression="none")
    whole = (folder / "metadata.parquet").read_bytes()
    (folder / "metadata.parquet").write_bytes(whole.replace(b"an apple", b"an ap\xd0le"))
    assert "not a Parquet file ('utf-8' codec" in complaint(CaptionedFolder, folder)
    files = {"metadata.parquet": whole, "a.txt": b"an apple\na fruit"}
    files["metadata.csv"] = b'file_name,text\na.png,"an apple, red"\nsub/b.jpg,a bowl\n'
    random = np.random.default_rng(0)
    for name, content in files.items():
        for other in files:
            (folder / other).unlink(missing_ok=True)
        for _ in range(40):
            broken = np.frombuffer(content, np.uint8).copy()
            broken[random.integers(0, len(broken), 2)] = random.integers(0, 256, 2)
            (folder / name).write_bytes(broken.tobytes())
            try:
                CaptionedFolder(folder)
            except UserError as error:
                assert "\n" not in str(error) and str(error).startswith(str(folder))
