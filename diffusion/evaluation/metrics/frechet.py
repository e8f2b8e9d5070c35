"""Fréchet distance of features: between two Gaussians fitted to them. FID is its name with Inception-v3's features.

It is biased upwards by about 1/n, so it means something only beside the real-vs-real baseline of as many images.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, partial
from typing import Literal

import torch
from torch import Tensor

from diffusion.common.progress import Progress, ignore_progress
from diffusion.common.random import permutation
from diffusion.common.threads import worker_threads
from diffusion.evaluation.metrics.metric import SPLITS, Figure, ImageSet, Metric, Reference, draw_halves
from diffusion.evaluation.metrics.neighbours import map_blocks

ROWS = 4096
"""Rows converted to double precision at a time."""
PER_FEATURE = 4
"""Images per feature from which the distance is close enough to linear in 1/n to be extrapolated."""
COLUMNS = 256
"""Features whose products with those before them are summed at a time."""


class FrechetDistance(Metric):
    """Fréchet distance, as measured and extrapolated to infinitely many images."""

    name = "fd"
    figures = (
        Figure(
            "fd",
            "Fréchet distance",
            "Fréchet distance of two Gaussians fitted to the features (arXiv 1706.08500); 0 is best.",
            "Grows as images get fewer: means something only beside its real-vs-real baseline.",
            interval="distance",
            is_biased=True,
        ),
        Figure(
            "fd_infinity",
            "Fréchet distance at infinity",
            "`fd` extrapolated to infinitely many images (arXiv 1911.07023); None if there are too few.",
            "The same as it would be of endlessly many images.",
        ),
    )

    def prepare(self, features: Tensor, progress: Progress) -> dict[str, Tensor]:
        """Fit a Gaussian to the real images."""
        return dict(vars(compute_moments(features)))

    def compute(self, samples: ImageSet, reference: Reference) -> Mapping[str, float]:
        """Compute the distance, and extrapolate it if there are images enough."""
        real = Moments(**reference.statistics)
        figures = {"fd": frechet_distance(compute_moments(samples.features), real)}
        if (distance := distance_at_infinity(samples.features, real)) is not None:
            figures["fd_infinity"] = distance
        return figures

    def compute_halves(
        self, sets: Sequence[ImageSet], reference: Reference, splits: int, progress: Progress = ignore_progress
    ) -> list[dict[str, Tensor]]:
        """Compute the distance of all halves from sums that they share."""
        distances = frechet_of_halves([samples.features for samples in sets], reference.features, splits, progress)
        return [{"fd": halves} for halves in distances]


@dataclass(frozen=True)
class Moments:
    """The Gaussian fitted to some features."""

    mean: Tensor
    """(D,) float64."""
    root: Tensor
    """(min(n, D), D) float64: rootᵀ·root is the covariance, divided by n − 1."""


def compute_moments(features: Tensor) -> Moments:
    """Fit to features (N, D), N at least 2; bit-identical for any number of cores."""
    pieces = torch.split(features, ROWS)
    with worker_threads(1):
        mean = sum((piece.double().sum(0) for piece in pieces), torch.zeros(features.shape[1], dtype=torch.float64))
        mean = mean / len(features)
        root = torch.empty(0, features.shape[1], dtype=torch.float64)
        for piece in pieces:
            # The R of QR is a root of XᵀX without XᵀX itself, whose small eigenvalues would be lost in rounding.
            root = torch.linalg.qr(torch.cat([root, piece.double() - mean]), mode="r").R
        # Contiguous, as LAPACK returns column-major data and cached moments must be bit-identical to computed ones.
        root = root.contiguous() / (len(features) - 1) ** 0.5
    return Moments(mean, root)


def frechet_distance(first: Moments, second: Moments) -> float:
    """Compute the Fréchet distance |μ₁ − μ₂|² + tr(Σ₁ + Σ₂ − 2(Σ₁Σ₂)^½) of two Gaussians (arXiv 1706.08500)."""
    with worker_threads(1):
        # With Σ = RᵀR the eigenvalues of Σ₁Σ₂ are the squares of the singular values of R₁R₂ᵀ.
        cross_trace = torch.linalg.svdvals(first.root @ second.root.T).sum()
        mean_distance = (first.mean - second.mean).square().sum()
        return float(mean_distance + first.root.square().sum() + second.root.square().sum() - 2 * cross_trace)


def distance_at_infinity(samples: Tensor, reference: Moments) -> float | None:
    """Extrapolate ``frechet_distance`` of features (N, D) to ``reference`` to infinite N; None if N is too small.

    The distance is biased by nearly a/N (arXiv 1911.07023, section 3). It is measured at N and at N/2, the mean over
    two random halves, and extrapolated linearly to 1/N = 0. The bias from a finite reference remains.
    """
    if (count := len(samples)) < PER_FEATURE * samples.shape[1]:
        return None
    order = torch.from_numpy(permutation(0, "evaluation/halves", 0, count))
    half = count // 2
    half_distances = [
        frechet_distance(compute_moments(samples[rows]), reference) for rows in (order[:half], order[half : 2 * half])
    ]
    full_distance = frechet_distance(compute_moments(samples), reference)
    return (count * full_distance - half * sum(half_distances) / 2) / (count - half)


@dataclass(frozen=True)
class Gaussian:
    """Gaussian fitted to n features of D dimensions, in float64."""

    mean: Tensor
    """(D,)."""
    trace: Tensor
    """Trace of the covariance."""
    few: Tensor | None
    """A root of the covariance, (n, D), if n is at most D: working on it is faster then."""
    covariance: Tensor | None
    """(D, D), if n is larger."""

    @cached_property
    def root(self) -> Tensor:
        """Return R, (min(n, D), D), with RᵀR the covariance."""
        if self.few is not None:
            return self.few
        lower, info = torch.linalg.cholesky_ex(self.covariance)
        root: Tensor = lower.T
        if info:  # for collinear features; the eigendecomposition always exists but is slower
            values, vectors = torch.linalg.eigh(self.covariance)
            root = (vectors * values.clamp(min=0).sqrt()).T
        return root


def frechet_of_halves(
    sets: Sequence[Tensor], reference: Tensor, splits: int = SPLITS, progress: Progress = ignore_progress
) -> list[Tensor]:
    """Compute the Fréchet distance (arXiv 1706.08500) of the halves of each of ``sets`` to halves of ``reference``.

    Of features (N, D) to (M, D); N and M at least 4. Returns for each set (splits, 2) float64.
    """
    # Distances are translation-invariant, and centred features lose less to rounding.
    centre = reference.double().mean(0).to(reference.dtype)
    real = _HalvedSet(reference - centre, "reference", splits)
    generated = [_HalvedSet(x - centre, "samples", splits) for x in sets]

    products = [_Products(halves, real) if halves.sums is None and real.sums is None else None for halves in generated]

    def compute_split(split: int) -> list[Tensor]:
        real_halves = cache(partial(real.fit_halves, split))
        return [
            inner_products.distances(split)
            if inner_products is not None
            else torch.stack(
                [gaussian_distance(x, y) for x, y in zip(halves.fit_halves(split), real_halves(), strict=True)]
            )
            for halves, inner_products in zip(generated, products, strict=True)
        ]

    values = map_blocks(compute_split, splits, 1, "Fréchet distances of halves", progress)
    return [torch.stack(distances) for distances in zip(*values, strict=True)]


def gaussian_distance(x: Gaussian, y: Gaussian) -> Tensor:
    """Compute |μ_x − μ_y|² + tr Σ_x + tr Σ_y − 2 tr (Σ_x Σ_y)^½.

    With a root R of Σ_x the last trace is tr (R Σ_y Rᵀ)^½.
    """
    first, second = (y, x) if x.few is None else (x, y)
    if second.covariance is None:
        product = first.root @ second.root.T
        squares = product @ product.T
    else:
        squares = first.root @ second.covariance @ first.root.T
    # Half the time of the singular values of a product of roots, to ten digits of the sum.
    cross_term = torch.linalg.eigvalsh(squares).clamp(min=0).sqrt().sum()
    distance: Tensor = (x.mean - y.mean).square().sum() + x.trace + y.trace - 2 * cross_term
    return distance


class _HalvedSet:
    """A set of features (n, D) and its halves."""

    def __init__(self, features: Tensor, stream: Literal["samples", "reference"], splits: int) -> None:
        self.features = features
        self.members = draw_halves(len(features), stream, splits)
        self.half = len(features) // 2
        self.sums = None if self.half <= features.shape[1] else _sums(features, torch.arange(2 * self.half))

    def fit_halves(self, split: int) -> tuple[Gaussian, Gaussian]:
        """Return the Gaussians of both halves of a cut."""
        rows, other_rows = (self.members[2 * split + half].nonzero()[:, 0] for half in (0, 1))
        if self.sums is None:
            return self._fit_few(rows), self._fit_few(other_rows)
        (first, second), (all_first, all_second) = _sums(self.features, rows), self.sums
        return self._fit_sums(first, second), self._fit_sums(all_first - first, all_second - second)

    def _fit_few(self, rows: Tensor) -> Gaussian:
        x = self.features[rows].double()
        mean = x.mean(0)
        root = (x - mean).div_(math.sqrt(self.half - 1))
        return Gaussian(mean, root.square().sum(), root, None)

    def _fit_sums(self, first: Tensor, second: Tensor) -> Gaussian:
        mean = first / self.half
        covariance = (second - self.half * torch.outer(mean, mean)) / (self.half - 1)
        return Gaussian(mean, covariance.trace(), None, covariance)


class _Products:
    """Inner products of two small sets of features, from which come the distances of their halves."""

    def __init__(self, x: _HalvedSet, y: _HalvedSet) -> None:
        first, second = x.features.double(), y.features.double()
        self.sets, self.grams, self.cross_products = (x, y), (first @ first.T, second @ second.T), first @ second.T

    def distances(self, split: int) -> Tensor:
        """Compute the Fréchet distance of both halves of a cut, (2,) float64."""
        return torch.stack([self._distance(2 * split + half) for half in (0, 1)])

    def _distance(self, half: int) -> Tensor:
        x, y = (halved_set.members[half].nonzero()[:, 0] for halved_set in self.sets)
        products = self.cross_products[x[:, None], y]
        distance: Tensor = -2 * products.mean()
        for rows, gram in zip((x, y), self.grams, strict=True):
            mean = gram[rows[:, None], rows].mean()
            distance += mean + (gram.diagonal()[rows].mean() - mean) * len(rows) / (len(rows) - 1)
        deviations = products - products.mean(0) - products.mean(1, keepdim=True) + products.mean()
        squares = deviations @ deviations.T / ((len(x) - 1) * (len(y) - 1))
        distance -= 2 * torch.linalg.eigvalsh(squares).clamp(min=0).sqrt().sum()
        return distance


def _sums(features: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the sums over features x, in ``rows``, of x, (D,), and of x·xᵀ, (D, D); float64."""
    width = features.shape[1]
    first, second = torch.zeros(width, dtype=torch.float64), torch.zeros(width, width, dtype=torch.float64)
    for chunk in torch.split(rows, ROWS):
        x = features[chunk].double()
        first += x.sum(0)
        # xᵀx is symmetric: of what lies below the diagonal only some is computed.
        for start in range(0, width, COLUMNS):
            columns = x[:, start : start + COLUMNS]
            second[: start + COLUMNS, start : start + COLUMNS].addmm_(x[:, : start + COLUMNS].T, columns)
    return first, second.triu() + second.triu(1).T
