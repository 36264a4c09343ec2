"""How far generated images are from real ones: distances, shares and intervals, from features.

A feature is a row of numbers that a network (features.py) makes of an image; this file sees no
image. Everything is float64. Moments are running sums, and distances are computed a block of rows
at a time, so memory holds the features but no n times n matrix.

Each of these numbers depends on n and on the features. Compare only numbers that share both, and
read each beside its floor: the same number of real images against other real images.

[1] Heusel et al. GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash
    Equilibrium. 2017. arXiv:1706.08500
[2] Binkowski, Sutherland, Arbel, Gretton. Demystifying MMD GANs. 2018. arXiv:1801.01401
[3] Kynkäänniemi et al. Improved Precision and Recall Metric for Assessing Generative Models. 2019.
    arXiv:1904.06991
[4] Naeem et al. Reliable Fidelity and Diversity Metrics for Generative Models. 2020.
    arXiv:2002.09797
[5] Yoon, Choi, Kwon, Ryu. Diffusion Probabilistic Models Generalize when They Fail to Memorize.
    2023. ICML workshop SPIGM
[6] Chan, Golub, LeVeque. Algorithms for Computing the Sample Variance. 1983. The American
    Statistician 37
[7] Efron, Tibshirani. An Introduction to the Bootstrap. 1993
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from minidiff.errors import UserError

Features = Float[Tensor, "n D"]
Others = Float[Tensor, "m D"]  # another set, in the same features
# Entries of a block of distances: 40 MB. glibc may keep freed blocks of up to 32 MB, and then the
# peak of memory would grow with n.
ENTRIES = 5 * 2**20


class Score(NamedTuple):
    """A number and its 95 % interval over other images; None where no honest interval is known."""

    value: float
    low: float | None = None
    high: float | None = None


class Moments:
    """Running mean and covariance of features, a batch at a time; memory D^2, whatever n."""

    def __init__(self) -> None:
        self.n, self._mean, self._scatter = 0, torch.zeros(()), torch.zeros(())

    def add(self, features: Features) -> "Moments":
        """Merge a batch into the moments ([6] eq. 2.1, for vectors); returns self."""
        batch = features.detach().double().cpu()
        mean = batch.mean(0)
        centred, gap = batch - mean, mean - self._mean
        n = self.n + len(batch)
        between = torch.outer(gap, gap) * (self.n * len(batch) / n)
        self._scatter = self._scatter + centred.T @ centred + between
        self._mean = self._mean + gap * (len(batch) / n)
        self.n = n
        return self

    @property
    def mean(self) -> Float[Tensor, "D"]:
        return self._mean

    @property
    def covariance(self) -> Float[Tensor, "D D"]:
        """Unbiased: divided by n - 1."""
        if self.n < 2:
            raise UserError(f"a covariance needs at least 2 images; there are {self.n}.")
        return self._scatter / (self.n - 1)


def _root(covariance: Float[Tensor, "D D"]) -> Float[Tensor, "D D"]:
    """The symmetric square root; eigenvalues that rounding made negative count as 0."""
    values, vectors = torch.linalg.eigh(covariance)
    return vectors * values.clamp(min=0).sqrt() @ vectors.T


def frechet(a: Moments, b: Moments) -> float:  # eq: fid-6
    """The squared Fréchet distance of two Gaussians with these moments, [1] eq. 6:

        |mean_a - mean_b|^2 + tr(A + B - 2 (A B)^(1/2))

    tr (A B)^(1/2) is the sum of the singular values of A^(1/2) B^(1/2). That exists and is accurate
    for singular A and B too, as they are with fewer images than features. The distance is called
    FID only if the features are Inception's.
    """
    A, B = a.covariance, b.covariance
    shared = torch.linalg.svdvals(_root(A) @ _root(B)).sum()
    return ((a.mean - b.mean).square().sum() + A.trace() + B.trace() - 2 * shared).item()


def _blocks(x: Features, columns: int) -> Iterator[Features]:
    """Yield rows of x, as many at once as fit a block of distances with so many columns."""
    yield from x.split(max(1, ENTRIES // max(1, columns)))


def bootstrap(
    terms: Float[Tensor, "n"], generator: torch.Generator | None = None, rounds: int = 1000
) -> Score:
    """The mean of terms and its percentile interval, [7] chapter 13.

    The interval holds the middle 95 % of the means of n terms drawn again with replacement. If all
    terms are equal, it has no width and proves little: 0 of n still allows a share of 3 / n.
    """
    low, high = _middle(_resample(terms.double(), generator, rounds))
    return Score(terms.double().mean().item(), low, high)


def _middle(values: Float[Tensor, "rounds"]) -> list[float]:
    """The lower and upper end of the middle 95 %."""
    return values.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()


def _resample(
    terms: Float[Tensor, "n"], generator: torch.Generator | None, rounds: int
) -> Float[Tensor, "rounds"]:
    """Means of the terms drawn again with replacement."""
    n, means = len(terms), []
    for rows in torch.arange(rounds).split(max(1, ENTRIES // n)):
        means.append(terms[torch.randint(n, (len(rows), n), generator=generator)].mean(1))
    return torch.cat(means)


def kid(x: Features, y: Others, generator: torch.Generator | None = None) -> Score:  # eq: kid-4
    """Squared maximum mean discrepancy, unbiased, [2] section 3.1 and eq. 4.

    The kernel is k(x, y) = (x . y / D + 1)^3. Values below 0 are noise about 0. All pairs count,
    where torch-fidelity prints the mean over subsets; both estimate the same number.

    The interval bootstraps first-order terms (each image's mean kernel to its own set minus that to
    the other), because an image drawn twice would be compared with itself. It is too narrow if one
    feature with long tails decides everything.
    """
    x, y = x.double().cpu(), y.double().cpu()
    to_y, to_x = _kernel_sums(x, y)
    x_terms = _mean_over_others(_kernel_sums(x, x)[0], x), to_y / len(y)
    y_terms = _mean_over_others(_kernel_sums(y, y)[0], y), to_x / len(x)
    value = x_terms[0].mean() + y_terms[0].mean() - x_terms[1].mean() - y_terms[1].mean()
    terms = x_terms[0] - x_terms[1], y_terms[0] - y_terms[1]
    deviations = sum(_resample(part - part.mean(), generator, 1000) for part in terms)
    low, high = _middle(value + 2 * deviations)
    return Score(value.item(), low, high)


def _kernel(dot: Tensor, dims: int) -> Tensor:
    base = dot.div_(dims).add_(1)
    return base.square().mul_(base)  # ten times faster than a power


def _kernel_sums(a: Features, b: Others) -> tuple[Float[Tensor, "n"], Float[Tensor, "m"]]:
    """Sums of the kernel: of each row of a over all of b, and of each row of b over all of a."""
    to_b, to_a = [], torch.zeros(len(b), dtype=torch.float64)
    for rows in _blocks(a, len(b)):
        kernel = _kernel(rows @ b.T, a.shape[1])
        to_b.append(kernel.sum(1))
        to_a += kernel.sum(0)
    return torch.cat(to_b), to_a


def _mean_over_others(sums: Float[Tensor, "n"], x: Features) -> Float[Tensor, "n"]:
    """Turn sums of the kernel over all of x into means over all but the image itself."""
    if len(x) < 2:
        raise UserError("the unbiased estimate needs at least 2 images of each kind.")
    return (sums - _kernel(x.square().sum(1), x.shape[1])) / (len(x) - 1)


def nearest(
    x: Features, among: Others, k: int = 1
) -> tuple[Float[Tensor, "n k"], Int[Tensor, "n k"]]:
    """Distances to the k nearest of `among`, nearest first, and their indices."""
    if k > len(among):
        raise UserError(f"no {k} nearest neighbours among {len(among)} images; take more images.")
    x, among = x.double().cpu(), among.double().cpu()
    distances, indices = [], []
    for rows in _blocks(x, max(len(among), k * x.shape[1])):
        indices.append(torch.cdist(rows, among).topk(k, largest=False).indices)
        # Computed again: cdist rounds the distance to a copy up from 0.
        distances.append((rows[:, None] - among[indices[-1]]).norm(dim=-1))
    return torch.cat(distances), torch.cat(indices)


def radii(x: Features, k: int) -> Float[Tensor, "n"]:
    """The distance from each image to its k-th nearest other one (the nearest is itself)."""
    return nearest(x, x, k + 1)[0][:, k]


def _balls(x: Features, centres: Others, radius: Float[Tensor, "m"]) -> Float[Tensor, "n"]:
    """The number of balls in which each x lies. A ball includes its rim, as in [3]; [4] leaves it
    out, which only copies of an image notice."""
    x, centres = x.double().cpu(), centres.double().cpu()
    return torch.cat(
        [(torch.cdist(rows, centres) <= radius).sum(1) for rows in _blocks(x, len(centres))]
    ).double()


def precision(real: Others, fake: Features, k: int = 3) -> Float[Tensor, "n"]:  # eq: precision-2
    """[3] eq. 2: 1 for each generated image in the ball of a real one; their mean is the precision.
    A ball reaches to the real image's k-th nearest real neighbour."""
    return _balls(fake, real, radii(real, k)).clamp(max=1)


def recall(real: Others, fake: Features, k: int = 3) -> Float[Tensor, "m"]:
    """[3] eq. 2 with the sets exchanged: 1 for each real image in the ball of a generated one."""
    return precision(fake, real, k)


def density(real: Others, fake: Features, k: int = 5) -> Float[Tensor, "n"]:
    """[4] eq. 3: the number of real balls in which each generated image lies, over k. It may exceed
    1; a single real outlier does not decide it."""
    return _balls(fake, real, radii(real, k)) / k


def coverage(real: Others, fake: Features, k: int = 5) -> Float[Tensor, "m"]:
    """[4] eq. 4: 1 for each real image whose ball holds a generated one. Real images score about
    1 - 2^-k."""
    return (nearest(real, fake)[0][:, 0] <= radii(real, k)).double()


def diversity(features: Float[Tensor, "P R D"]) -> Float[Tensor, "P"]:
    """For each of P prompts, the mean distance between two of its R images."""
    if features.shape[1] < 2:
        raise UserError("diversity needs at least 2 images of each prompt.")
    R = features.shape[1]
    return torch.cdist(features.double(), features.double()).sum((1, 2)) / (R * (R - 1))


def memorised(fake: Features, training: Others) -> Float[Tensor, "n"]:
    """[5] section 3: 1 for each copy, three times nearer to its nearest training image than to the
    second. A copy of a training image that is there twice is missed, unless it is exact."""
    return _ratio_test(nearest(fake, training, 2)[0])


def memorised_floor(training: Others) -> Float[Tensor, "m"]:
    """`memorised` of each training image among the others: false alarms, and images there twice."""
    return _ratio_test(nearest(training, training, 3)[0][:, 1:])


def _ratio_test(distance: Float[Tensor, "n 2"]) -> Float[Tensor, "n"]:
    return ((3 * distance[:, 0] < distance[:, 1]) | (distance[:, 0] == 0)).double()
