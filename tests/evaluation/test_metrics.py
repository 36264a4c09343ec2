"""Metrics against closed forms, brute force and other people's code on the same features."""

import math

import pytest
import torch

from minidiff.errors import UserError
from minidiff.evaluation import metrics
from minidiff.evaluation.metrics import Moments
from minidiff.exercises import checks
from minidiff.exercises.checks import moments

MIDDLE = torch.tensor([0.025, 0.975], dtype=torch.float64)  # 95 % lie between


def features(n, dims=16, shift=0.0, seed=0):
    """Correlated, of unequal spread, far from 0."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(dims, dims, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    return torch.randn(n, dims, generator=generator, dtype=torch.float64) @ mix + 3 + shift


@pytest.fixture(scope="module")
def pair():
    return features(300), features(260, shift=0.4, seed=1)


@pytest.fixture
def small_blocks(monkeypatch):
    """Several blocks to every matrix of distances, the last one not full."""
    monkeypatch.setattr(metrics, "ENTRIES", 7000)


# Moments and the Fréchet distance.


def test_running_moments_are_those_of_all_at_once():
    x = features(101) + 1e4  # far from 0, where sums of squares would lose nine digits
    running = Moments()
    for batch in x.split(13):
        running.add(batch)
    torch.testing.assert_close(running.mean, x.mean(0), rtol=1e-13, atol=0)
    torch.testing.assert_close(running.covariance, x.T.cov(), rtol=1e-10, atol=1e-10)


def test_a_covariance_needs_two():
    with pytest.raises(UserError, match="at least 2 images; there are 1"):
        _ = Moments().add(features(1)).covariance


def test_a_covariance_of_two_points():
    """sum (x - mean)(x - mean)^T / (n - 1) with n = 2: d d^T / 2, where d is their difference."""
    x = features(2)
    d = x[1] - x[0]
    torch.testing.assert_close(Moments().add(x).covariance, torch.outer(d, d) / 2)


test_frechet_of_gaussians_whose_covariances_commute = pytest.mark.equation("fid-6")(
    checks.frechet_of_gaussians_whose_covariances_commute
)


def test_frechet_of_singular_covariances():
    """Two rank-one Gaussians along u and v, at right angles: nothing is shared, so the traces add;
    along u both: (a - b)^2.
    """
    u, v = torch.eye(4, dtype=torch.float64)[:2]
    zero = torch.zeros(4, dtype=torch.float64)

    def line(direction, length):
        return moments(zero, torch.stack([length * direction, zero, zero, zero], 1))

    assert metrics.frechet(line(u, 2.0), line(v, 3.0)) == pytest.approx(13, rel=1e-12)
    assert metrics.frechet(line(u, 2.0), line(u, 3.0)) == pytest.approx(1, rel=1e-12)
    few = Moments().add(features(4))  # 4 pictures in 16 dims
    assert metrics.frechet(few, few) == pytest.approx(0, abs=1e-9 * few.covariance.trace().item())


def test_frechet_is_torch_fidelitys_and_torchmetrics(pair):
    fid = pytest.importorskip("torch_fidelity.metric_fid")
    other = pytest.importorskip("torchmetrics.image.fid")
    a, b = (Moments().add(x) for x in pair)
    found = metrics.frechet(a, b)
    theirs = fid.fid_statistics_to_metric(
        *(fid.fid_features_to_statistics(x) for x in pair), verbose=False
    )
    assert found == pytest.approx(theirs["frechet_inception_distance"], rel=1e-10)
    assert found == pytest.approx(
        other._compute_fid(a.mean, a.covariance, b.mean, b.covariance).item(), rel=1e-10
    )


# KID.


@pytest.mark.equation("kid-4")
def test_kid_is_torch_fidelitys_and_torchmetrics(small_blocks, pair):
    kid = pytest.importorskip("torch_fidelity.metric_kid")
    other = pytest.importorskip("torchmetrics.image.kid")
    x, y = (a[:250] for a in pair)
    found = metrics.kid(x, y).value
    theirs = kid.kid_features_to_metric(x, y, kid_subsets=1, kid_subset_size=250, verbose=False)
    assert found == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-10)
    assert found == pytest.approx(other.poly_mmd(x, y).item(), rel=1e-10)


def test_kid_is_unbiased_and_its_interval_is_honest():
    """One dimension, N(0, s^2) against N(m, s^2): k = (x y + 1)^3, so MMD^2 = sum_i C(3, i) (E x^i
    - E y^i)^2, in closed form.
    """
    m, s, n = 0.5, 0.5, 200
    mmd = 3 * m**2 + 3 * (m**2) ** 2 + (m**3 + 3 * m * s**2) ** 2
    generator = torch.Generator().manual_seed(5)

    def normal():
        return s * torch.randn(n, 1, generator=generator)

    draws = [metrics.kid(normal(), m + normal(), generator) for _ in range(200)]
    values = torch.tensor([draw.value for draw in draws])
    assert abs(values.mean() - mmd) < 3 * values.std() / math.sqrt(200)
    hit = sum(draw.low <= mmd <= draw.high for draw in draws) / 200
    assert (
        0.90 <= hit <= 0.99
    )  # 0.95 and its own three deviations, cut where 0.95 would no longer be a fair thing to say


def kernels(x, y):
    """(x . y / D + 1)^3 of all pairs."""
    return (x @ y.T / x.shape[1] + 1) ** 3


def mean_over_others(x):
    return (kernels(x, x).sum(1) - kernels(x, x).diagonal()) / (len(x) - 1)


def test_kid_of_two_images_each():
    """[2] eq. 4 with m = n = 2: k(x1, x2) + k(y1, y2) - the mean of the four k(x, y)."""
    x, y = features(2), features(2, seed=1)
    expected = kernels(x, x)[0, 1] + kernels(y, y)[0, 1] - kernels(x, y).mean()
    expected -= kernels(x, y).mean()
    assert metrics.kid(x, y).value == pytest.approx(expected.item(), rel=1e-10)
    with pytest.raises(UserError, match="at least 2 images of each kind"):
        metrics.kid(x, y[:1])


def test_the_interval_of_kid_by_its_definition(small_blocks):
    """Each image's term is its mean kernel to its own set minus that to the other; twice the mean
    of the terms, drawn again 1000 times about its own value, is how KID would have varied.
    """
    x, y = features(40, 3) / 4, features(30, 3, seed=1) / 4 + 0.2
    found = metrics.kid(x, y, torch.Generator().manual_seed(2))
    draw, total = torch.Generator().manual_seed(2), torch.zeros(1000, dtype=torch.float64)
    for own, other in ((x, y), (y, x)):
        term = mean_over_others(own) - kernels(own, other).mean(1)
        rows = torch.randint(len(own), (1000, len(own)), generator=draw)
        total += (term[rows] - term.mean()).mean(1)
    expected = torch.quantile(found.value + 2 * total, MIDDLE)
    assert (found.low, found.high) == pytest.approx(tuple(expected.tolist()), rel=1e-9)


# Neighbours.


def test_a_ball_includes_its_rim():
    """[3] eq. 2 says "at most". k = 1: the ball of 0 reaches to 3, so -3 lies on its rim."""
    real, fake = torch.tensor([[0.0], [3.0], [20.0]]), torch.tensor([[-3.0], [-3.5]])
    assert metrics.precision(real, fake, k=1).tolist() == [1, 0]
    assert metrics.density(real, fake, k=1).tolist() == [1, 0]
    assert metrics.coverage(real, fake[:1], k=1).tolist() == [1, 0, 0]


def test_nearest_of_all():
    """As many neighbours as there are images; one of them, where k is not given."""
    distance, place = metrics.nearest(torch.zeros(1, 1), torch.tensor([[2.0], [-1.0], [3.0]]), 3)
    assert distance.tolist() == [[1, 2, 3]] and place.tolist() == [[1, 0, 2]]
    assert metrics.nearest(features(5), features(4))[0].shape == (5, 1)


def test_a_copy_is_more_than_three_times_nearer():
    """[5] section 3; and a distance of 0 is a copy, even if the training image is there twice."""
    training = torch.tensor([[0.0], [4.0], [50.0], [50.0]])
    fake = torch.tensor([[1.0], [0.9], [-2.0], [50.0], [50.1]])
    assert metrics.memorised(fake, training).tolist() == [0, 1, 0, 1, 0]


def test_no_block_of_distances_is_larger_than_entries(monkeypatch, pair):
    """Rows times columns, and as many rows as fit; one row, where none fits. ENTRIES are 40 MB."""
    assert metrics.ENTRIES * 8 == 40 * 2**20
    monkeypatch.setattr(metrics, "ENTRIES", 12)
    for columns, rows in ((0, 10), (1, 10), (2, 6), (3, 4), (12, 1), (13, 1)):
        sizes = [len(block) for block in metrics._blocks(features(10), columns)]
        assert max(sizes) == rows and sum(sizes) == 10, columns
    monkeypatch.setattr(metrics, "ENTRIES", 700)
    columns, blocks = [], metrics._blocks

    def spy(x, count):
        columns.append(count)
        return blocks(x, count)

    monkeypatch.setattr(metrics, "_blocks", spy)
    metrics.nearest(*pair, k=20)  # 260 distances a row, and differences of 20 neighbours in 16 dims
    metrics.nearest(*pair, k=2)
    assert columns == [320, 260]


@pytest.mark.equation("precision-2")
def test_precision_and_recall_are_torch_fidelitys(small_blocks, pair):
    prc = pytest.importorskip("torch_fidelity.metric_prc")
    real, fake = pair
    theirs = prc.calculate_precision_recall_full(fake, real, neighborhood=3)
    found = metrics.precision(real, fake).mean().item(), metrics.recall(real, fake).mean().item()
    assert found == pytest.approx(theirs, abs=1e-7)  # theirs are float32 means
    assert 0 < found[0] < 1


def test_density_and_coverage_by_their_definitions(small_blocks, pair):
    """[4] eq. 3 and 4, one picture at a time."""
    real, fake = (x[:80] for x in pair)
    radius = [sorted((a - b).norm().item() for b in real)[5] for a in real]
    inside = torch.tensor(
        [[(f - r).norm().item() <= rim for r, rim in zip(real, radius, strict=True)] for f in fake]
    )
    torch.testing.assert_close(metrics.density(real, fake), inside.double().sum(1) / 5)
    torch.testing.assert_close(metrics.coverage(real, fake), inside.any(0).double())


def test_real_against_real_has_the_expectations_of_naeem():
    """[4] section 3.2.1: density 1, and coverage 1 - (N - 1)...(N - k) / ((M + N - 1)...(M + N -
    k)), about 1 - 2^-k for M = N.
    """
    N = 1000
    real, more = features(N, 4), features(N, 4, seed=2)
    expected = 1 - math.prod((N - i) / (2 * N - i) for i in range(1, 6))
    # coverage is a mean of N shares of deviation 0.17, of neighbours that hang together: four times
    # 0.17 / sqrt(N)
    assert metrics.coverage(real, more).mean().item() == pytest.approx(expected, abs=0.022)
    assert metrics.density(real, more).mean().item() == pytest.approx(1, abs=0.1)


def test_modes_that_are_missing_and_junk_that_is_extra():
    """Half of the modes missing: precise, and half recalled. As much junk as pictures: half as
    precise, all recalled.
    """
    near, far = 0.1 * torch.randn(400, 3), 0.1 * torch.randn(400, 3) + 50
    both, junk = torch.cat([near, far]), 0.1 * torch.randn(400, 3) - 50
    missing, extra = (
        0.1 * torch.randn(400, 3),
        torch.cat([0.1 * torch.randn(400, 3), 0.1 * torch.randn(400, 3) + 50, junk, junk + 0.01]),
    )
    shares = {
        name: [f(both, fake).mean().item() for fake in (missing, extra)]
        for name, f in vars(metrics).items()
        if name in WANTED
    }
    assert shares == {name: pytest.approx(values, abs=0.08) for name, values in WANTED.items()}


WANTED = {"precision": [1, 0.5], "recall": [0.5, 1], "coverage": [0.5, 1]}


def test_diversity_is_the_mean_distance_of_pairs():
    points = torch.tensor([[[0.0, 0.0], [3.0, 4.0], [6.0, 8.0]], [[1.0, 1.0]] * 3])
    assert metrics.diversity(points).tolist() == [pytest.approx(20 / 3), 0]
    assert metrics.diversity(points[:, :2]).tolist() == [5, 0]
    with pytest.raises(UserError, match="2 images of each prompt"):
        metrics.diversity(points[:, :1])


def test_copies_are_memorised_and_fresh_pictures_are_not():
    training = torch.randn(200, 20)
    copies = training[:50] + 0.01 * torch.randn(50, 20)
    assert metrics.memorised(copies, training).mean() == 1
    assert (
        metrics.memorised(
            torch.cat([training, training])[:3], torch.cat([training, training])
        ).mean()
        == 1
    )  # exact, and there twice
    assert metrics.memorised(torch.randn(200, 20), training).mean() == 0
    assert metrics.memorised_floor(training).mean() == 0
    assert (
        metrics.memorised_floor(torch.cat([training, training[:20]])).sum() == 40
    )  # both of each pair
    distance, place = metrics.nearest(training[7:8], training, 2)
    assert place[0, 0] == 7 and distance[0, 0] == 0 < distance[0, 1]


def test_too_few_for_neighbours():
    with pytest.raises(UserError, match="no 4 nearest neighbours among 3 images"):
        metrics.precision(features(3), features(10))


# Intervals.


def test_bootstrap_interval_of_a_share(small_blocks):
    """The middle 95 % of means of n = 400 with share 0.3: the normal approximation, to a fifth of
    its half-width (1000 rounds).
    """
    terms = (torch.arange(400) < 120).double()
    value, low, high = metrics.bootstrap(terms, torch.Generator().manual_seed(0))
    half = 1.96 * math.sqrt(0.3 * 0.7 / 400)
    assert value == pytest.approx(0.3)
    assert (0.3 - low, high - 0.3) == pytest.approx((half, half), rel=0.2)


@pytest.mark.parametrize("entries", [7000, 50])
def test_the_bootstrap_by_its_definition(monkeypatch, entries):
    """[7] chapter 13: the 2.5 and 97.5 percentiles of the means of 1000 samples of n terms, drawn
    with replacement. They are drawn in blocks of at most ENTRIES, but at least one sample.
    """
    terms, sizes, draw = features(60, 1)[:, 0] ** 3, [], torch.randint
    rows = draw(60, (1000, 60), generator=torch.Generator().manual_seed(3))
    expected = terms[rows].mean(1).quantile(MIDDLE).tolist()

    def spy(high, size, **options):
        sizes.append(size[0])
        return draw(high, size, **options)

    monkeypatch.setattr(metrics, "ENTRIES", entries)
    monkeypatch.setattr(torch, "randint", spy)
    value, low, high = metrics.bootstrap(terms, torch.Generator().manual_seed(3))
    assert value == pytest.approx(terms.mean().item(), rel=1e-12)
    assert (low, high) == pytest.approx(tuple(expected), rel=1e-12)
    assert max(sizes) == max(1, entries // 60) and sum(sizes) == 1000
