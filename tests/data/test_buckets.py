"""Aspect-ratio buckets: sizes, what is cut away, and batches of one size that follow from their
number.
"""

from collections import Counter
from itertools import chain, islice

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as some

from minidiff.data.buckets import batches, bucket, cut, shapes
from minidiff.data.folder import load_image


def test_the_sizes_of_stable_diffusion():
    """512x512 in steps of 64, by hand: beside each side from 4 to 16 (times 64) the longest other
    one, and the same on their sides.
    """
    beside = {
        4: 16,
        5: 12,
        6: 10,
        7: 9,
        8: 8,
        9: 7,
        10: 6,
        11: 5,
        12: 5,
        13: 4,
        14: 4,
        15: 4,
        16: 4,
    }
    want = {(a, b) for a, b in beside.items()} | {(b, a) for a, b in beside.items()}
    assert {(h // 64, w // 64) for h, w in shapes(512 * 512, 64)} == want


@given(some.integers(1, 40), some.integers(1, 16), some.integers(1, 5000), some.integers(1, 5000))
def test_a_bucket_fits(units, multiple, width, height):
    """Multiples, of at most the square's area and more than half of it, no side beyond twice the
    square's; and the picture lying down goes alike.
    """
    side = units * multiple
    h, w = bucket(width, height, side * side, multiple)
    assert (
        h % multiple == w % multiple == 0
        and side * side / 2 <= h * w <= side * side
        and max(h, w) <= 2 * side
    )
    assert bucket(height, width, side * side, multiple) in ((w, h), (h, w))
    assert cut(width, height, (h, w)) <= cut(width, height, (side, side)) + 1e-9


def test_the_nearest_shape():
    assert bucket(640, 480, 512 * 512, 64) == (448, 576)  # 4 : 3, COCO's most frequent
    assert bucket(480, 640, 512 * 512, 64) == (576, 448)
    assert bucket(100, 100, 512 * 512, 64) == (512, 512)
    assert bucket(9000, 100, 512 * 512, 64) == (256, 1024)  # what is longer than all of them
    assert bucket(640, 480, 32 * 32, 16) == (32, 32)  # the model in the box has no shape in between
    with pytest.raises(ValueError, match="no room"):
        bucket(10, 10, 64, 16)


def test_what_is_cut_away(tmp_path):
    """By the picture that is loaded: columns of 256 greys, of which as many are gone as said."""
    from PIL import Image

    assert cut(640, 480, (512, 512)) == pytest.approx(0.25)
    assert (
        cut(640, 480, (448, 576))
        == pytest.approx(1 - (9 / 7) / (4 / 3))
        == pytest.approx(0.0357, abs=1e-4)
    )
    picture = Image.new("L", (256, 192))
    picture.putdata([x for _ in range(192) for x in range(256)])
    picture.save(tmp_path / "a.png")
    loaded = load_image(tmp_path / "a.png", (192, 192))
    assert 1 - (loaded.max() - loaded.min() + 1).item() / 256 == pytest.approx(
        cut(256, 192, (192, 192)), abs=1 / 256
    )


SIZES = [(32, 32)] * 7 + [(64, 16)] * 4 + [(16, 64)]


def test_batches_of_one_size_meet_everything():
    """Seven by three, four by three, and one alone: 3 + 2 + 1 batches an epoch; each is met, and at
    most what fills up is met again.
    """
    run = list(islice(batches(SIZES, 3, 5, 0), 60))
    assert all(len(batch) == 3 and len({SIZES[i] for i in batch}) == 1 for batch in run)
    for epoch in range(10):
        met = Counter(i for batch in run[6 * epoch : 6 * epoch + 6] for i in batch)
        assert set(met) == set(range(12)) and met.pop(11) == 3
        assert (
            sum(met[i] for i in range(7)) == 9
            and sum(met[i] for i in range(7, 11)) == 6
            and max(met.values()) <= 2
        )
    assert len({str(run[6 * epoch : 6 * epoch + 6]) for epoch in range(10)}) == 10
    assert run != list(islice(batches(SIZES, 3, 6, 0), 60))


@pytest.mark.parametrize("start", [1, 5, 6, 41])
def test_batch_k_follows_from_k(start):
    """Begun anywhere, whatever the generators of torch stand at."""
    torch.manual_seed(start)
    assert list(islice(batches(SIZES, 3, 5, start), 20)) == list(
        islice(batches(SIZES, 3, 5, 0), start, start + 20)
    )


def test_one_size_is_met_exactly_once_where_it_divides():
    run = list(islice(batches([(8, 8)] * 12, 4, 0, 0), 6))
    assert (
        sorted(chain(*run[:3])) == sorted(chain(*run[3:])) == list(range(12)) and run[:3] != run[3:]
    )


def test_fewer_pictures_than_a_batch():
    """Five pictures of a subject, sixteen to a batch: other noise, the same picture."""
    assert sorted(Counter(next(batches([(8, 8)] * 5, 16, 0, 0))).values()) == [3, 3, 3, 3, 4]
