"""COCO's files become a captioned folder: the right pictures, the caption with the words, the same
bytes for the same seed, nothing half-written.
"""

import http.server
import json
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from minidiff.cli.main import main
from minidiff.data import coco
from minidiff.data.coco_config import CocoConfig
from minidiff.data.folder import CaptionedFolder
from minidiff.errors import UserError

CAPTIONS = {
    1: ["A red apple in a Bowl. ", "A fruit.", "An apple\nand a bowl of soup."],
    2: ["Pineapples, and a bowl.", "A bowl of green apples"],
    3: ["An apple.", "A bowl.", "An apple."],  # both words, in no one caption
    4: ["A cat on a bed.", "", "Half \ud800 a character."],
    9: ["A dog."],  # no picture of it
}
LICENSES = [
    {"id": 4, "name": "Attribution License", "url": "http://by"},
    {"id": 5, "name": "ShareAlike", "url": "http://sa"},
]


def picture(path, seed, size=(40, 30)):
    path.parent.mkdir(parents=True, exist_ok=True)
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(path)
    return path


@pytest.fixture
def files(tmp_path):
    """Annotations, instances and a folder of images, of which 9 is missing and 7 has no caption."""
    images = [
        {
            "id": i,
            "file_name": f"{i:03d}.jpg",
            "license": 4,
            "flickr_url": f"http://f/{i}",
            "coco_url": f"http://c/{i}",
        }
        for i in CAPTIONS
    ]
    images[1] |= {"license": 5}
    images[2] |= {"license": 77}
    pairs = [
        (i, caption) for k in range(3) for i, own in CAPTIONS.items() for caption in own[k : k + 1]
    ]  # in turn, as in COCO's own files
    captions = [
        {"id": k, "image_id": i, "caption": caption}
        for k, (i, caption) in enumerate([*pairs, (55, "lost")])
    ]
    (tmp_path / "captions.json").write_text(
        json.dumps({"images": images, "annotations": captions, "licenses": LICENSES})
    )
    categories = [{"id": 11, "name": "apple"}, {"id": 12, "name": "bowl"}]
    boxes = [
        {"id": k, "image_id": i, "category_id": c}
        for k, (i, c) in enumerate([(1, 11), (1, 12), (2, 12), (3, 11), (3, 12), (4, 12), (4, 12)])
    ]
    (tmp_path / "instances.json").write_text(
        json.dumps({"images": images, "annotations": boxes, "categories": categories})
    )
    for i in (1, 2, 3, 4, 7):
        picture(tmp_path / "images" / f"{i:03d}.jpg", i)
    return tmp_path


@pytest.fixture
def make(files, capsys):
    """Run the verb; give the lines of metadata.jsonl, selection.json, and what was said."""

    def run(*options, out="out", images=("--images", files / "images")):
        main(
            [
                str(o)
                for o in [
                    "data",
                    "coco",
                    "--annotations",
                    files / "captions.json",
                    *images,
                    "--out",
                    files / out,
                    *options,
                ]
            ]
        )
        rows = [
            json.loads(line)
            for line in (files / out / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
        ]
        return rows, json.loads((files / out / "selection.json").read_text()), capsys.readouterr()

    return run


@pytest.fixture
def refused(files, capsys):
    def run(*options, images=("--images", files / "images"), annotations=None):
        annotations = annotations or files / "captions.json"
        with pytest.raises(SystemExit) as end:
            main(
                [
                    str(o)
                    for o in [
                        "data",
                        "coco",
                        "--annotations",
                        annotations,
                        *images,
                        "--out",
                        files / "new",
                        *options,
                    ]
                ]
            )
        out, err = capsys.readouterr()
        assert end.value.code == 2 and out == ""
        *_, err = err.replace("\r", "\n").strip().split("\n")
        assert (
            err.startswith("minidiff: ")
            and not list(files.glob("*new*"))
            and not list(files.glob(".*"))
        )
        return err

    return run


# What is written.


def test_a_line_has_all_that_coco_says(make, files):
    rows, selection, said = make()
    assert [row["coco_id"] for row in rows] == [1, 2, 3, 4]
    assert rows[0] | {"text": "", "text_index": 0} == {
        "file_name": "images/001.jpg",
        "text": "",
        "text_index": 0,
        "coco_id": 1,
        "captions": ["A red apple in a Bowl.", "A fruit.", "An apple and a bowl of soup."],
        "license": "Attribution License",
        "license_url": "http://by",
        "source_url": "http://f/1",
        "coco_url": "http://c/1",
    }
    assert [row["license_url"] for row in rows] == [
        "http://by",
        "http://sa",
        "unknown",
        "http://by",
    ]
    for row in rows:
        assert row["text"] == row["captions"][row["text_index"]]
        assert (files / "out" / row["file_name"]).read_bytes() == (
            files / "images" / Path(row["file_name"]).name
        ).read_bytes()
    data = CaptionedFolder(files / "out")
    assert rows[3]["captions"] == ["A cat on a bed.", "Half ? a character."]
    assert data.captions == [row["text"] for row in rows] and data[0][0].shape == (3, 30, 40)
    assert selection["pictures"] == 4 and selection["captions"] == 9
    assert selection["licenses"] == {"Attribution License": 2, "ShareAlike": 1, "unknown": 1}
    assert selection["left out"] == {
        "captions seen before": 1,
        "empty captions": 1,
        "captions without a picture": 1,
        "captioned pictures that are not in the folder of images": 1,
        "pictures without captions": 1,
    }
    assert said.out.splitlines()[:3] == [
        str(files / "out/metadata.jsonl"),
        str(files / "out/selection.json"),
        "pictures: 4 of 100 asked for",
    ]
    assert (
        "left out: 1 captions seen before, 1 empty captions, " in said.out
        and "licences: 2 Attribution License, 1 ShareAlike" in said.out
    )


@pytest.mark.parametrize(
    "words, found",
    [
        # 2's first caption has pineapples; 3's words stand in two captions
        ("apple,bowl", {1: {0, 2}, 2: {1}}),
        (" APPLE , bowls ", {}),
        ("apples", {2: {1}}),
        ("a", {1: {0, 1, 2}, 2: {0, 1}, 3: {1}, 4: {0, 1}, 9: {0}}),  # not "as", not inside a word
        ("green apple", {2: {1}}),
        ("a.ple", {}),
    ],
)
def test_all_words_in_one_caption_as_whole_words(files, words, found):
    from minidiff.cli.options import words as split

    config = CocoConfig((files / "captions.json",), files / "images", contains=tuple(split(words)))
    if not found:
        with pytest.raises(UserError, match="no caption has all of the words"):
            coco.read(config)
        return
    source = coco.read(config)
    assert source.matches == sorted(found)
    for (
        i,
        indices,
    ) in (
        found.items()
    ):  # the text is chosen among those captions, and every one of them by some seed
        assert {coco.row(source, i, seed)["text_index"] for seed in range(30)} == indices


def test_words_that_no_caption_has_get_a_better_suggestion(refused):
    assert (
        '"aple" in those of 0 pictures, "bowl" in those of 3 pictures; perhaps you meant apple.'
        in refused("--contains", "aple,bowl")
    )
    assert (
        '"cat" in those of 1 pictures, "dog" in those of 1 pictures; ask for fewer at once.'
        in refused("--contains", "cat,dog")
    )


def test_the_seed_chooses_and_the_same_seed_gives_the_same_bytes(make, files):
    chosen = {}
    for seed in range(12):
        rows, selection, _ = make("--size", 2, "--seed", seed, out=f"out{seed}")
        assert len(rows) == 2 == selection["pictures"] and selection["seed"] == seed
        chosen[seed] = tuple(row["coco_id"] for row in rows)
    assert len(set(chosen.values())) > 3
    make("--size", 2, "--seed", 3, out="again")
    for path in (files / "out3").rglob("*.*"):
        assert (
            path.read_bytes() == (files / "again" / path.relative_to(files / "out3")).read_bytes()
        )
    alone, among = make("--size", 1, "--seed", 5, out="one")[0], make("--seed", 5, out="all")[0]
    assert alone[0] in among  # a picture's text does not depend on how many are taken


def test_several_annotation_files_are_joined(make, files):
    extra = {
        "images": [{"id": 7, "file_name": "007.jpg"}],
        "annotations": [{"image_id": 7, "caption": "A boat."}],
    }
    (files / "more.json").write_text(json.dumps(extra))  # neither licences nor annotation ids
    rows, selection, _ = make("--annotations", files / "captions.json", files / "more.json")
    assert (
        [row["coco_id"] for row in rows] == [1, 2, 3, 4, 7]
        and rows[4]["text"] == "A boat."
        and rows[4]["license"] == "unknown"
    )
    assert selection["annotations"] == ["captions.json", "more.json"]


def coco_file(path, entries, **more):
    """A file of images (id, name) with a caption each, numbered as Roboflow does, from 1."""
    images = [{"id": i, "file_name": name} for i, name, _ in entries]
    captions = [{"id": k, "image_id": i, "caption": text} for k, (i, _, text) in enumerate(entries)]
    path.write_text(json.dumps({"images": images, "annotations": captions} | more))
    return path


def joined(tmp_path, images, *annotations, **options):
    out = tmp_path / "joined"
    selection = coco.write(coco.read(CocoConfig(annotations, images, **options)), out)
    lines = (out / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    files = [(out / row["file_name"]).read_bytes() for row in rows]
    return rows, files, selection["left out"]


def test_files_that_number_their_pictures_alike_keep_their_captions(tmp_path):
    """The dog's picture got the cat's caption, and the cat was dropped."""
    pictures = [picture(tmp_path / f"{a}/{a}.jpg", k) for k, a in enumerate(("cat", "dog"))]
    files = [coco_file(tmp_path / f"{a}.json", [(1, f"{a}.jpg", f"a {a}")]) for a in ("cat", "dog")]
    boxes = {"annotations": [{"id": 1, "image_id": 1, "category_id": 2, "iscrowd": 0}]}
    boxes |= {"images": [{"id": 1, "file_name": "dog.jpg"}], "categories": [{"id": 2, "name": "a"}]}
    (tmp_path / "boxes.json").write_text(json.dumps(boxes))
    rows, contents, left_out = joined(tmp_path, tmp_path, *files)
    assert [(row["coco_id"], row["captions"]) for row in rows] == [(1, ["a cat"]), (1, ["a dog"])]
    assert contents == [path.read_bytes() for path in pictures] and left_out == {}
    source = coco.read(
        CocoConfig(tuple(files), tmp_path, category=("a",), instances=tmp_path / "boxes.json")
    )
    assert [source.names[i] for i in source.matches] == ["dog.jpg"]


def test_pictures_of_one_name_in_two_folders_keep_their_captions(tmp_path):
    pictures = [picture(tmp_path / f"images/{a}/1.jpg", k) for k, a in enumerate(("cat", "dog"))]
    files = [
        coco_file(tmp_path / f"{a}.json", [(1, f"{a}/1.jpg", f"a {a}")]) for a in ("cat", "dog")
    ]
    rows, contents, _ = joined(tmp_path, tmp_path / "images", *files)
    texts = {row["text"]: content for row, content in zip(rows, contents, strict=True)}
    assert texts == {f"a {path.parent.name}": path.read_bytes() for path in pictures}
    assert {row["file_name"] for row in rows} == {"images/1-1.jpg", "images/1.jpg"}


@pytest.mark.parametrize("names", [("1.jpg", "1.jpg"), ("cat/1.jpg", "dog/1.jpg")])
def test_a_file_that_fits_two_names_is_given_to_neither(tmp_path, names):
    picture(tmp_path / "images/1.jpg", 1)
    picture(tmp_path / "images/2.jpg", 2)
    entries = [(i, name, f"caption {i}") for i, name in enumerate((*names, "2.jpg"))]
    rows, _, left_out = joined(
        tmp_path, tmp_path / "images", coco_file(tmp_path / "c.json", entries)
    )
    assert [row["text"] for row in rows] == ["caption 2"]
    assert left_out["pictures whose name fits several files or images"] == 2


def test_a_name_that_fits_two_files_is_left_out(tmp_path):
    for k, split in enumerate(("train", "valid")):
        picture(tmp_path / f"images/{split}/1.jpg", k)
    file = coco_file(tmp_path / "c.json", [(1, "1.jpg", "whose?")])
    with pytest.raises(UserError, match="1 pictures whose name fits several files or images: name"):
        joined(tmp_path, tmp_path / "images", file)


def test_words_and_a_category_that_no_picture_has_together(refused, files):
    """It said that the names must be those in the annotations."""
    said = refused(
        "--instances", files / "instances.json", "--category", "apple", "--contains", "cat"
    )
    assert 'no picture has both: 1 have "cat", and 2 of those in the annotations show apple' in said


def test_a_null_caption_and_a_bare_licence_do_not_refuse_the_file(make, files):
    """It said "AttributeError: 'NoneType' object has no attribute 'split'", and "KeyError: 'url'"."""
    whole = json.loads((files / "captions.json").read_text())
    whole["licenses"] = [{"id": 4}, {"id": 5, "name": None, "url": 3}]
    nothings = (None, 7, 10**400, ["a"], {"a": []})
    whole["annotations"] += [{"image_id": 1, "caption": nothing} for nothing in nothings]
    whole["images"][2]["coco_url"] = "http://\ud800"
    (files / "captions.json").write_text(json.dumps(whole))
    rows, selection, _ = make()
    assert len(rows) == 4 and rows[0]["license"] == "unknown" and rows[1]["license_url"] == "3"
    assert selection["left out"]["captions that are no text"] == 5


@pytest.mark.parametrize(
    "name", ["a\ud800.jpg", "\x1b[2J.jpg", "a.exe", "", "x" * 300 + ".jpg", "a\0"]
)
def test_no_name_of_the_annotations_is_a_danger(tmp_path, name, monkeypatch):
    url = "http://c/1"
    index = coco_file(tmp_path / "c.json", [(1, name, "x")])
    whole = json.loads(index.read_text())
    whole["images"][0]["coco_url"] = url
    index.write_text(json.dumps(whole))
    monkeypatch.setattr(coco, "fetch", lambda _, to: picture(to.with_suffix(".png"), 1))
    rows, _, _ = joined(tmp_path, None, index, download=True, pixels=8)
    assert rows[0]["file_name"] in ("images/1.jpg", "images/a?.jpg")


def test_by_category(make, refused, files):
    instances = ("--instances", files / "instances.json")
    assert [
        row["coco_id"] for row in make(*instances, "--category", "apple,bowl", out="both")[0]
    ] == [1, 3]
    assert [
        row["coco_id"]
        for row in make(*instances, "--category", "bowl", "--contains", "cat", out="cat")[0]
    ] == [4]
    assert 'no category "aple"; perhaps you meant apple.' in refused(
        *instances, "--category", "aple"
    )
    assert 'no category "x"; there is apple, bowl.' in refused(*instances, "--category", "x")
    assert "category needs instances" in refused("--category", "bowl")
    assert "captions.json: not a COCO file such as instances_val2017.json" in refused(
        "--instances", files / "captions.json", "--category", "bowl"
    )


@pytest.mark.parametrize(
    "options, size",
    [
        (["--crop", "centre"], (30, 30)),
        (["--pixels", 15], (20, 15)),
        (["--pixels", 60], (80, 60)),
        (["--crop", "centre", "--pixels", 16], (16, 16)),
    ],
)
def test_crop_and_pixels(make, files, options, size):
    said = make(*options)[2]
    assert ("enlarged: 4 to 60 pixels" in said.out) == (size == (80, 60))
    with (
        Image.open(files / "out/images/001.jpg") as ours,
        Image.open(files / "images/001.jpg") as source,
    ):
        assert ours.size == size
        square = (5, 0, 35, 30) if "centre" in options else (0, 0, 40, 30)
        expected = np.asarray(
            source.convert("RGB").crop(square).resize(size, Image.Resampling.LANCZOS), float
        )
        assert (
            np.abs(np.asarray(ours, float) - expected).mean() < 2
        )  # JPEG at quality 95 loses a level or so


def test_damaged_files_doubles_and_twins_are_counted_never_fatal(make, files):
    whole = (files / "images/001.jpg").read_bytes()
    (files / "images/001.jpg").write_bytes(whole[: len(whole) // 2])
    (files / "images/003.jpg").write_bytes(b"")
    (files / "images/004.jpg").write_bytes((files / "images/002.jpg").read_bytes())
    picture(files / "images/more/002.jpg", 5)
    rows, selection, said = make()
    assert len(rows) == 1 and rows[0]["coco_id"] in (2, 4)
    assert (
        selection["left out"]
        | {"damaged pictures": 2, "pictures seen before": 1, "pictures of the same name": 1}
        == selection["left out"]
    )
    assert (
        f"left out: {files / 'images/003.jpg'}: not a readable picture (the file is empty)"
        in said.err
    )


def test_a_size_is_filled_past_damaged_pictures(make, files):
    (files / "images/001.jpg").write_bytes(b"broken")
    for seed in range(5):
        assert len(make("--size", 3, "--seed", seed, out=f"out{seed}")[0]) == 3


def test_names_in_the_annotations_do_not_say_where_to_write(make, files):
    whole = json.loads((files / "captions.json").read_text())
    whole["images"][0]["file_name"] = "../../001.jpg"
    whole["images"][1]["file_name"] = "train2017/002.jpg"
    (files / "captions.json").write_text(json.dumps(whole))
    assert {row["file_name"] for row in make()[0]} == {f"images/00{i}.jpg" for i in (1, 2, 3, 4)}


# What is refused: one line, and nothing left behind.


def test_a_folder_that_is_there_is_left_alone(files, make, capsys):
    make()
    before = sorted((path, path.read_bytes()) for path in (files / "out").rglob("*.*"))
    (files / "empty").mkdir()
    for out in ("out", "empty"):
        with pytest.raises(SystemExit) as end:
            make(out=out)
        assert (
            end.value.code == 2
            and f"--out {files / out} is there already; name a new folder"
            in capsys.readouterr().err
        )
    assert before == sorted((path, path.read_bytes()) for path in (files / "out").rglob("*.*"))


@pytest.mark.parametrize(
    "content, said",
    [
        ("{", "not a COCO file such as captions_val2017.json (JSONDecodeError"),
        ("[]", "not a COCO file"),
        ("{}", "(KeyError: 'annotations'); it needs images, and annotations with captions."),
        ('{"images": [], "annotations": [3]}', "not a COCO file"),
        (
            '{"images": [], "annotations": []}',
            "the annotations hold no captions; name a captions_*.json of COCO.",
        ),
        ('{"images": [{"id": 1}], "annotations": []}', "(KeyError: 'file_name')"),
        ("[" * 100_000, "(RecursionError"),
        ("\xff\xfe", "not a COCO file"),
    ],
)
def test_annotations_that_are_none(refused, files, content, said):
    (files / "bad.json").write_bytes(content.encode("latin-1"))
    assert said in refused(annotations=files / "bad.json")


def test_what_cannot_be(refused, files):
    assert "no-such.json: No such file or directory" in refused(annotations=files / "no-such.json")
    assert (
        "instances.json: not a COCO file such as captions_val2017.json (KeyError: 'caption')"
        in refused(annotations=files / "instances.json")
    )
    assert "no images; name the folder" in refused(images=())
    assert "no such folder" in refused(images=("--images", files / "nowhere"))
    assert "none of the 5 pictures that were asked for is in" in refused(
        images=("--images", picture(files / "other/a.jpg", 0).parent)
    )
    assert 'no crop "center"; there is centre, none; perhaps you meant centre.' in refused(
        "--crop", "center"
    )
    assert "--pixels is 0; it must be at least 1." in refused("--pixels", 0)
    assert "--size is 0; it must be at least 1." in refused("--size", 0)
    for i in (1, 2, 3, 4):
        (files / f"images/00{i}.jpg").write_bytes(b"broken")
    assert (
        "nothing to write: all of the 4 pictures that were asked for are left "
        "out: 4 damaged pictures." in refused()
    )


def test_nothing_is_left_when_it_ends_in_the_middle(files, make, monkeypatch, capsys):
    saved = []

    def save(*args):
        saved.append(args)
        if len(saved) == 3:
            raise KeyboardInterrupt
        args[2].write_bytes(b"half")

    monkeypatch.setattr(coco, "save_image", save)
    with pytest.raises(SystemExit) as end:
        make()
    assert end.value.code == 130 and len(saved) == 3
    assert sorted(path.name for path in files.iterdir()) == [
        "captions.json",
        "images",
        "instances.json",
    ]


# Downloads, from a server on this machine.


@pytest.fixture
def server(files, monkeypatch):
    """Serves the folder of pictures; the annotations' addresses lead there."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(files / "images"))

        def log_message(self, *_):
            pass

    served = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(
        target=served.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
    ).start()
    monkeypatch.setattr(coco, "PAUSES", (0, 0))
    whole = json.loads((files / "captions.json").read_text())
    for image in whole["images"]:
        image["coco_url"] = f"http://127.0.0.1:{served.server_port}/{image['file_name']}"
    (files / "captions.json").write_text(json.dumps(whole))
    yield served
    served.shutdown()
    served.server_close()


def test_download(make, files, server):
    (files / "images/003.jpg").write_bytes(b"broken on the way")
    rows, selection, _ = make("--download", images=())
    assert [row["coco_id"] for row in rows] == [1, 2, 4]
    assert (files / "out/images/001.jpg").read_bytes() == (files / "images/001.jpg").read_bytes()
    assert sorted(path.name for path in (files / "out").iterdir()) == [
        "images",
        "metadata.jsonl",
        "selection.json",
    ]
    assert (
        selection["left out"] | {"damaged pictures": 1, "pictures that are not at their address": 1}
        == selection["left out"]
    )


def test_download_fetches_only_what_is_not_there(make, files, server):
    picture(files / "some/001.jpg", 77)
    rows, _, _ = make("--download", images=("--images", files / "some"))
    assert (files / "out/images/001.jpg").read_bytes() == (
        files / "some/001.jpg"
    ).read_bytes() and len(rows) == 4
    assert sorted(path.name for path in (files / "some").iterdir()) == ["001.jpg"]


def test_download_without_a_network_is_one_line(refused, server):
    server.shutdown()
    server.server_close()
    assert (
        "cannot be fetched ([Errno 111] Connection refused); downloading needs "
        "the network: without it," in refused("--download", images=())
    )


def test_only_the_web_is_fetched_from(files, tmp_path):
    secret = picture(tmp_path / "secret.jpg", 1)
    assert (
        coco.fetch(secret.as_uri(), tmp_path / "fetched") is None
        and not (tmp_path / "fetched").exists()
    )


# The real files.


def test_real_annotations(real_data, tmp_path):
    folder = real_data / "coco"
    files = folder / "captions_val2017.json", folder / "captions_train2017_subset.json"
    source = coco.read(CocoConfig(files, folder / "images", size=200))
    assert len(source.captions) == 5026 and source.counts == {"captions seen before": 7}
    selection = coco.write(source, tmp_path / "all")
    assert (
        selection["pictures"] == 111
        and selection["left out"]["captioned pictures that are not in the folder of images"] == 4915
    )
    published = {
        Path(row["file_name"]).name: row
        for row in map(json.loads, (folder / "licenses.jsonl").read_text().splitlines())
    }
    rows = [json.loads(line) for line in (tmp_path / "all/metadata.jsonl").read_text().splitlines()]
    for row in rows:
        known = published[Path(row["file_name"]).name]
        assert (row["coco_id"], row["license"], row["source_url"]) == (
            known["coco_id"],
            known["license"],
            known["flickr_url"],
        )
    assert len(CaptionedFolder(tmp_path / "all")) == 111


def test_real_apples_in_a_bowl(real_data, tmp_path):
    files, images = (real_data / "coco/captions_val2017.json",), real_data / "coco/images"
    config = CocoConfig(files, images, contains=("apple", "bowl"), crop="centre", pixels=64)
    coco.write(coco.read(config), tmp_path / "apples")
    data = CaptionedFolder(tmp_path / "apples")
    assert (
        len(data) == 1
        and data.paths[0].name == "000000002149.jpg"
        and data[0][0].shape == (3, 64, 64)
    )
    assert "apples" in data.captions[0] and "bowl" in data.captions[0]


def test_hugging_faces_loader_reads_the_folder_as_it_is(make, files, monkeypatch):
    datasets = pytest.importorskip("datasets")
    rows, _, _ = make()
    theirs = datasets.load_dataset(
        "imagefolder", data_dir=str(files / "out"), split="train", cache_dir=str(files / "cache")
    )
    assert len(theirs) == len(rows) and set(theirs.column_names) == {"image", *rows[0]} - {
        "file_name"
    }
    for one, ours in zip(theirs, rows, strict=True):
        assert {name: one[name] for name in one if name != "image"} == {
            name: ours[name] for name in ours if name != "file_name"
        }
        with Image.open(files / "out" / ours["file_name"]) as picture:
            assert np.array_equal(np.asarray(one["image"]), np.asarray(picture))


def test_a_full_disk_and_too_many_pixels(refused, files, monkeypatch):
    """The disk said "images/001.jpg: No space left", of the file that is read."""

    def full(_, source, to):
        raise OSError(28, "No space left on device", str(source), None, str(to))

    monkeypatch.setattr(coco, "save_image", full)
    said = refused()
    assert f"--out {files / 'new'}: cannot be written (No space left on device); make room" in said
    assert "--pixels is 65536; it must be from 1 to 8192." in refused("--pixels", 65536)
