"""How far generated pictures are from real ones, as numbers made of features: every distance, share and interval is in this file.

A feature is a row of numbers that some network (features.py) makes of a picture; nothing here has seen a picture. Everything is float64.
Moments are running, and distances are taken a block of rows at a time, so memory holds the features and no matrix of n times n.
Every one of these numbers depends on n and on the features: compare only what has both in common, and read it beside its floor, the same
number of real pictures against other real pictures.

[1] Heusel et al. GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash Equilibrium. 2017. arXiv:1706.08500
[2] Binkowski, Sutherland, Arbel, Gretton. Demystifying MMD GANs. 2018. arXiv:1801.01401
[3] Kynkäänniemi et al. Improved Precision and Recall Metric for Assessing Generative Models. 2019. arXiv:1904.06991
[4] Naeem et al. Reliable Fidelity and Diversity Metrics for Generative Models. 2020. arXiv:2002.09797
[5] Yoon, Choi, Kwon, Ryu. Diffusion Probabilistic Models Generalize when They Fail to Memorize. 2023. ICML workshop SPIGM
[6] Chan, Golub, LeVeque. Algorithms for Computing the Sample Variance. 1983. The American Statistician 37
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
ENTRIES = (
    5 * 2**20
)  # of a block of distances: 40 MB. Freed blocks of up to 32 MB glibc may keep, and then the peak grew with n


class Score(NamedTuple):
    """A number, and where it would lie in 95 of 100 repetitions with other pictures; None where no honest interval is known."""

    value: float
    low: float | None = None
    high: float | None = None


class Moments:
    """Running mean and covariance of features that come a batch at a time: memory D^2, whatever n."""

    def __init__(self) -> None:
        self.n, self._mean, self._scatter = 0, torch.zeros(()), torch.zeros(())

    def add(self, features: Features) -> "Moments":
        """Merge a batch into what is known ([6] eq. 2.1, for vectors); returns itself."""
        batch = features.detach().double().cpu()
        mean = batch.mean(0)
        about, gap = batch - mean, mean - self._mean
        n = self.n + len(batch)
        self._scatter = (
            self._scatter + about.T @ about + torch.outer(gap, gap) * (self.n * len(batch) / n)
        )
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
            raise UserError(f"a covariance needs at least 2 pictures; there are {self.n}.")
        return self._scatter / (self.n - 1)


def _root(covariance: Float[Tensor, "D D"]) -> Float[Tensor, "D D"]:
    """The symmetric square root; eigenvalues that rounding made negative are 0."""
    values, vectors = torch.linalg.eigh(covariance)
    return vectors * values.clamp(min=0).sqrt() @ vectors.T


def frechet(a: Moments, b: Moments) -> float:
    """|mean_a - mean_b|^2 + tr(A + B - 2 (A B)^(1/2)), [1] eq. 6: the squared Fréchet distance of two Gaussians with these moments.

    tr (A B)^(1/2) is the sum of the singular values of A^(1/2) B^(1/2), which exists and is accurate however singular A and B are: with
    fewer pictures than features they always are. It is called FID only if the features are Inception's.
    """
    A, B = a.covariance, b.covariance
    return (
        (a.mean - b.mean).square().sum()
        + A.trace()
        + B.trace()
        - 2 * torch.linalg.svdvals(_root(A) @ _root(B)).sum()
    ).item()


def _blocks(x: Features, columns: int) -> Iterator[Features]:
    """Rows of x, as many at once as a block of distances to that many columns holds."""
    yield from x.split(max(1, ENTRIES // max(1, columns)))


def bootstrap(
    terms: Float[Tensor, "n"], generator: torch.Generator | None = None, rounds: int = 1000
) -> Score:
    """The mean, and the middle 95 % of the means of as many terms drawn again with replacement: the percentile interval, [7] chapter 13.
    Where all terms are alike it has no width, and proves little: 0 of n still leaves room for a share of 3 / n."""
    means = _resampled(terms.double(), generator, rounds)
    low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Score(terms.double().mean().item(), low, high)


def _resampled(
    terms: Float[Tensor, "n"], generator: torch.Generator | None, rounds: int
) -> Float[Tensor, "rounds"]:
    n = len(terms)
    sizes = [min(k, rounds - i) for k in [max(1, ENTRIES // n)] for i in range(0, rounds, k)]
    return torch.cat(
        [terms[torch.randint(n, (size, n), generator=generator)].mean(1) for size in sizes]
    )


def kid(x: Features, y: Others, generator: torch.Generator | None = None) -> Score:
    """Squared maximum mean discrepancy with the kernel k(x, y) = (x . y / D + 1)^3, unbiased ([2] section 3.1 and eq. 4). Below 0 is noise about 0.

    Over all pairs at once, not the mean over subsets that torch-fidelity prints; both estimate the same number. The interval bootstraps
    its first-order terms, each picture's mean kernel to its own set less that to the other, because resampled pictures would meet themselves.
    It is too narrow where one feature with long tails decides everything.
    """
    x, y = x.double().cpu(), y.double().cpu()
    (to_x, _), (within_y, _), (to_y, from_y) = (
        _kernel_sums(x, x),
        _kernel_sums(y, y),
        _kernel_sums(x, y),
    )
    to_x, within_y, to_y, from_y = (
        _to_others(to_x, x),
        _to_others(within_y, y),
        to_y / len(y),
        from_y / len(x),
    )
    value = to_x.mean() + within_y.mean() - to_y.mean() - from_y.mean()
    rounds = [
        _resampled(terms - terms.mean(), generator, 1000)
        for terms in (to_x - to_y, within_y - from_y)
    ]
    low, high = (
        (value + 2 * (rounds[0] + rounds[1]))
        .quantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
        .tolist()
    )
    return Score(value.item(), low, high)


def _kernel(dot: Tensor, dims: int) -> Tensor:
    base = dot.div_(dims).add_(1)
    return base.square().mul_(base)  # ten times faster than a power


def _kernel_sums(a: Features, b: Others) -> tuple[Float[Tensor, "n"], Float[Tensor, "m"]]:
    """For each row of a, its kernel to all of b, summed; and for each of b, to all of a."""
    to_b, to_a = [], torch.zeros(len(b), dtype=torch.float64)
    for rows in _blocks(a, len(b)):
        kernel = _kernel(rows @ b.T, a.shape[1])
        to_b.append(kernel.sum(1))
        to_a += kernel.sum(0)
    return torch.cat(to_b), to_a


def _to_others(sums: Float[Tensor, "n"], x: Features) -> Float[Tensor, "n"]:
    """Sums over the whole set, to means over all but the picture itself."""
    if len(x) < 2:
        raise UserError("the unbiased estimate needs at least 2 pictures of each kind.")
    return (sums - _kernel(x.square().sum(1), x.shape[1])) / (len(x) - 1)


def nearest(
    x: Features, among: Others, k: int = 1
) -> tuple[Float[Tensor, "n k"], Int[Tensor, "n k"]]:
    """Distances to the k nearest of `among`, nearest first, and which they are."""
    if k > len(among):
        raise UserError(
            f"no {k} nearest neighbours among {len(among)} pictures; take more pictures."
        )
    x, among = x.double().cpu(), among.double().cpu()
    distances, places = [], []
    for rows in _blocks(x, max(len(among), k * x.shape[1])):
        places.append(torch.cdist(rows, among).topk(k, largest=False).indices)
        distances.append(
            (rows[:, None] - among[places[-1]]).norm(dim=-1)
        )  # anew: cdist rounds the distance of a copy up from 0
    return torch.cat(distances), torch.cat(places)


def radii(x: Features, k: int) -> Float[Tensor, "n"]:
    """The distance from each to its k-th nearest other one; the nearest of all is itself."""
    return nearest(x, x, k + 1)[0][:, k]


def _balls(x: Features, centres: Others, radius: Float[Tensor, "m"]) -> Float[Tensor, "n"]:
    """In how many balls each x lies. A ball holds its own rim, as in [3]; [4] leaves the rim out, which only copies of a picture could tell."""
    x, centres = x.double().cpu(), centres.double().cpu()
    return torch.cat(
        [(torch.cdist(rows, centres) <= radius).sum(1) for rows in _blocks(x, len(centres))]
    ).double()


def precision(real: Others, fake: Features, k: int = 3) -> Float[Tensor, "n"]:
    """[3] eq. 2: for each generated picture, 1 if it lies within a real picture's distance to its k-th real neighbour. The mean is the precision."""
    return _balls(fake, real, radii(real, k)).clamp(max=1)


def recall(real: Others, fake: Features, k: int = 3) -> Float[Tensor, "m"]:
    """[3] eq. 2, the other way round: for each real picture, 1 if generated ones surround it."""
    return precision(fake, real, k)


def density(real: Others, fake: Features, k: int = 5) -> Float[Tensor, "n"]:
    """[4] eq. 3: in how many real balls each generated picture lies, over k. May pass 1; one far-off real picture does not decide it."""
    return _balls(fake, real, radii(real, k)) / k


def coverage(real: Others, fake: Features, k: int = 5) -> Float[Tensor, "m"]:
    """[4] eq. 4: for each real picture, 1 if its ball holds a generated one. Real against real has 1 - 2^-k, about."""
    return (nearest(real, fake)[0][:, 0] <= radii(real, k)).double()


def diversity(features: Float[Tensor, "P R D"]) -> Float[Tensor, "P"]:
    """For each of P prompts, the mean distance between two of its R pictures."""
    if features.shape[1] < 2:
        raise UserError("diversity needs at least 2 pictures of each prompt.")
    R = features.shape[1]
    return torch.cdist(features.double(), features.double()).sum((1, 2)) / (R * (R - 1))


def memorised(fake: Features, training: Others) -> Float[Tensor, "n"]:
    """[5] section 3: 1 for each generated picture whose nearest training picture is three times nearer than the second nearest. A copy of a
    picture that is there twice goes unseen, unless it is exact."""
    return _lonely(nearest(fake, training, 2)[0])


def memorised_floor(training: Others) -> Float[Tensor, "m"]:
    """The same for training pictures among the others: what looks like a copy without being one, or is there twice."""
    return _lonely(nearest(training, training, 3)[0][:, 1:])


def _lonely(distance: Float[Tensor, "n 2"]) -> Float[Tensor, "n"]:
    return ((3 * distance[:, 0] < distance[:, 1]) | (distance[:, 0] == 0)).double()
