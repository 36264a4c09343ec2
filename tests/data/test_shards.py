"""Shards give every sample once an epoch, to any number of processes, from any step on; what cannot
be trained on is named, and nothing in them is run.
"""

import io
import json
import tarfile
from itertools import chain, islice, pairwise

import numpy as np
import pytest
import torch
from PIL import Image

from minidiff.data import shards as shards_module
from minidiff.data.shards import Shards
from minidiff.errors import UserError


def jpeg(grey):
    Image.new("L", (12, 10), grey).save(content := io.BytesIO(), "PNG")
    return content.getvalue()


def write(path, files):
    """A tar of (name, bytes), as WebDataset's own writer lays it out."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, content in files:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def sample(k, **row):
    caption = json.dumps({"text": f"grey {k}"} | row).encode()
    return [(f"{k:06d}.png", jpeg(k)), (f"{k:06d}.json", caption)]


@pytest.fixture
def folder(tmp_path):
    """23 samples in three shards of other lengths; sample k is grey k, and so says its caption."""
    for name, numbers in (("a", range(0, 10)), ("b", range(10, 15)), ("c", range(15, 23))):
        write(tmp_path / f"{name}.tar", [file for k in numbers for file in sample(k)])
    return tmp_path


def numbers(batches, count):
    """What the first batches hold, with image and caption compared."""
    rows = []
    for images, captions in islice(batches, count):
        assert images.dtype == torch.uint8 and images[:, 0, 0, 0].tolist() == [
            int(caption.split()[1]) for caption in captions
        ]
        rows.append(images[:, 0, 0, 0].tolist())
    return rows


def test_samples(folder):
    data = Shards(folder, size=8)
    assert len(data) == 23
    for k in (0, 9, 10, 22):
        image, caption = data[k]
        assert (image == k).all() and image.shape == (3, 8, 8) and caption == f"grey {k}"
    assert [caption for _, caption in data] == [f"grey {k}" for k in range(23)]
    assert len(Shards(folder / "b.tar")) == 5 and len(Shards([folder / "c.tar"])) == 8


def test_every_epoch_has_every_sample_once_in_an_order_of_its_own(folder, monkeypatch):
    for window in (4, 10_000):
        monkeypatch.setattr(shards_module, "WINDOW", window)
        stream = numbers(Shards(folder, 8).batches(1, seed=3), 3 * 23)
        epochs = [[row[0] for row in stream[i : i + 23]] for i in (0, 23, 46)]
        assert all(sorted(epoch) == list(range(23)) for epoch in epochs)
        assert epochs[0] != epochs[1] != epochs[2]
        assert epochs[0] != [row[0] for row in numbers(Shards(folder, 8).batches(1, seed=4), 23)]


def test_a_window_keeps_reads_local(folder, monkeypatch):
    monkeypatch.setattr(shards_module, "WINDOW", 5)
    order = [row[0] for row in numbers(Shards(folder, 8).batches(1, seed=0), 23)]
    shards = [0 if k < 10 else 1 if k < 15 else 2 for k in order]
    assert sum(a != b for a, b in pairwise(shards)) < 12


def test_a_stream_goes_on_from_any_step(folder):
    """Into the second and third epoch too; as train.train asks for it."""
    data = Shards(folder, 8)
    whole = numbers(data.batches(4, 1), 20)
    for start in (1, 5, 6, 13):
        assert numbers(Shards(folder, 8).batches(4, 1, start), 5) == whole[start : start + 5]


@pytest.mark.parametrize("world", [2, 3, 4])
def test_processes_share_the_stream_without_overlap_or_loss(folder, world):
    """Together they have the batches of one process with as many times the batch."""
    one = numbers(Shards(folder, 8).batches(2 * world, 1, 3), 9)
    ranks = [numbers(Shards(folder, 8).batches(2, 1, 3, rank, world), 9) for rank in range(world)]
    assert one == [list(chain(*rows)) for rows in zip(*ranks, strict=True)]


def test_training_resumes_on_shards(folder, tmp_path):
    """The very same weights after 3 + 4 steps as after 7."""
    from functools import partial

    from minidiff.data.folder import to_model
    from minidiff.train import TrainConfig, train

    def loss(batch):
        return {"loss": (network(to_model(batch[0]).flatten(1)) - len(batch[1][0])).square()[:, 0]}

    ends = []
    for stops in ([7], [3, 7]):
        torch.manual_seed(0)
        network = torch.nn.Linear(3 * 64, 1)
        for stop in stops:
            batches = partial(Shards(folder, 8).batches, 4, 5)
            steps = train(
                loss, network, batches, TrainConfig(steps=7, lr=1e-2, save_every=1),
                folder=tmp_path / f"run{len(stops)}", resume=stop != stops[0],
            )  # fmt: skip
            for step in steps:
                if step.step == stop:
                    steps.close()
                    break
        ends.append(network.weight.detach().clone())
    assert torch.equal(*ends)


@pytest.mark.parametrize("suffix, content, caption", [
    ("txt", b"\xef\xbb\xbfa cat\nanother\n", "a cat"),
    ("caption", "жук".encode(), "жук"),
    ("json", b'{"text": ["a cat", "a pet"], "label": "cat"}', "a cat"),
])  # fmt: skip
def test_captions_and_what_else_lies_beside_them(tmp_path, suffix, content, caption):
    files = [("d/x.1.png", jpeg(1)), (f"d/x.{suffix}", content), ("d/x.cls", b"3")]
    files[0] = ("d/x.png", jpeg(1))
    data = Shards(write(tmp_path / "a.tar", [*files, ("d/._x.png", b"junk"), *sample(2)]))
    assert len(data) == 2 and data[0][1] == caption and data[1][1] == "grey 2"


def test_another_caption_column(tmp_path):
    write(tmp_path / "a.tar", sample(1, label="cat"))
    assert Shards(tmp_path, caption_column="label")[0][1] == "cat"
    with pytest.raises(UserError, match=r'a.tar, 000001: no column "caption"; found "text", "la'):
        Shards(tmp_path, caption_column="caption")[0]


def link(name):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
    return info


@pytest.mark.parametrize("files, answer", [
    ([("x.png", jpeg(1))], "a.tar, x: no caption; add x.json or .txt"),
    ([("x.json", b"{}")], "a.tar, x: no image; add x.jpg"),
    ([*sample(1), *sample(1)], "a.tar, 000001: several images or captions"),
    ([("x.png", jpeg(1)), ("x.jpg", jpeg(1)), ("x.txt", b"a")], "a.tar, x: several images"),
    ([("x.png", b""), ("x.txt", b"a")], "a.tar, x.png: not a readable picture (the file is empty)"),
    ([("x.png", b"no"), ("x.txt", b"a")], "a.tar, x.png: not a readable picture"),
    ([("x.png", jpeg(1)), ("x.txt", b"caf\xe9")], "a.tar, x: column \"text\" holds half a char"),
    ([("x.png", jpeg(1)), ("x.json", b"{")], "a.tar, x: not JSON"),
    ([("x.png", jpeg(1)), ("x.json", b" " * (2**20 + 1))], "x.json has 1,048,577 bytes; at most"),
    ([("x.png", jpeg(1)), ("x.pyd", b"cos\nsystem\n")], "a.tar, x.pyd: a pickle can run programs"),
    ([("x.png", jpeg(1)), ("x.emb.PTH", b"")], "a.tar, x.emb.pth: a pickle can run programs"),
])  # fmt: skip
def test_what_cannot_be_trained_on_is_named(tmp_path, files, answer):
    """Or left out, with a count, where that is asked for."""
    write(tmp_path / "a.tar", [*files, *sample(7)])
    with pytest.raises(UserError) as error:
        Shards(tmp_path, 8)[0]
    assert answer in str(error.value) and "\n" not in str(error.value)
    with pytest.warns(UserWarning, match=r"\(left out; 1 so far\)") as told:
        data = Shards(tmp_path, 8, skip_damaged=True)
        assert numbers(data.batches(1, 0), 6) == [[7]] * 6
    assert len(told) == len(data.skipped) == 1 and answer in next(iter(data.skipped.values()))


def test_the_next_sample_stands_in_for_one_that_cannot_be_decoded(tmp_path):
    """All along the stream; where there is none, that is said."""
    damaged = [("000002.png", b"no picture"), sample(2)[1]]
    write(tmp_path / "a.tar", [*sample(1), *damaged, *sample(3)])
    with pytest.warns(UserWarning, match=r"a.tar, 000002.png: not a readable picture .*1 so far"):
        data = Shards(tmp_path, 8, skip_damaged=True)
        assert [caption for _, caption in data] == ["grey 1", "grey 3", "grey 3"]
    write(tmp_path / "a.tar", damaged)
    with pytest.warns(UserWarning), pytest.raises(UserError, match="none of 1 samples can be read"):
        Shards(tmp_path, 8, skip_damaged=True)[0]


def test_links_are_not_followed(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.addfile(link("x.png"))
    with pytest.raises(UserError, match=r"a.tar, x.png: a link or a device"):
        Shards(tmp_path)


@pytest.mark.parametrize("damage", ["cut", "at a header", "no end", "joined", "a header", "gzip"])
def test_a_damaged_shard_is_named_not_cut_short(folder, damage):
    """tarfile takes some of these for the end, and the samples behind them would be lost."""
    path = folder / "b.tar"
    whole = path.read_bytes()
    with tarfile.open(path) as tar:
        fourth, end = tar.getmembers()[4].offset, tar.offset
    import gzip

    path.write_bytes({
        "cut": whole[: fourth + 700],
        "at a header": whole[:fourth],
        "no end": whole[:end],
        "joined": whole + (folder / "a.tar").read_bytes(),
        "a header": whole[: fourth + 9] + b"\xff" + whole[fourth + 10 :],
        "gzip": gzip.compress(whole),
    }[damage])  # fmt: skip
    with pytest.raises(UserError, match=r"b.tar: (damaged|not a whole tar)"):
        Shards(folder)
    with pytest.warns(UserWarning, match="left out; 1 so far"):
        assert len(Shards(folder, skip_damaged=True)) >= 18


def test_no_shards(tmp_path):
    with pytest.raises(UserError, match=r"no shards there; pass a folder of \*.tar"):
        Shards(tmp_path)
    with pytest.raises(UserError, match=r"gone.tar: No such file"):
        Shards([tmp_path / "gone.tar"])
    with pytest.raises(UserError, match="no images with captions"):
        Shards(write(tmp_path / "a.tar", []))
    with pytest.raises(ValueError, match="batches need a size, and a rank below 2"):
        next(Shards(write(tmp_path / "a.tar", sample(1)), 8).batches(1, 0, rank=2, world=2))


def test_threads_end_with_the_stream(folder):
    import threading

    before = threading.active_count()
    batches = Shards(folder, 8).batches(2, 0)
    next(batches)
    assert threading.active_count() > before
    batches.close()
    assert threading.active_count() == before


def test_real_photographs(real_data):
    """The shards of 32,160 photographs, as published; the first batch looked at by its captions."""
    data = Shards(real_data / "photos" / "held_out-000000.tar", 64)
    assert len(data) == 1340 and data[0][1] == "a photo of a picket fence"
    images, captions = next(data.batches(16, 0))
    assert images.shape == (16, 3, 64, 64) and all(c.startswith("a photo of") for c in captions)
    assert np.unique(images.numpy()).size > 200
