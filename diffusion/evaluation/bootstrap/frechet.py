"""Fréchet distances of halves: exact, from the moments of each half."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from diffusion.evaluation.bootstrap.halves import SPLITS, halves
from diffusion.lanes import lanes
from diffusion.progress import Progress, silent

CHUNK = 4096
"""Features made double at a time."""
COLUMNS = 256
"""Features whose products with those before them are summed at a time."""
"""Pictures of each set per feature from which on the bias is near enough to c/n: of independent Gaussian features less
than a tenth of it is left."""


@dataclass(frozen=True)
class Sums:
    """Sums over some features x: their number, of x, (D,), and of x·xᵀ, (D, D); float64."""

    count: int
    first: Tensor
    second: Tensor

    def without(self, others: "Sums") -> "Sums":
        """Over those that are not among ``others``."""
        return Sums(self.count - others.count, self.first - others.first, self.second - others.second)


@dataclass(frozen=True)
class Gaussian:
    """Fitted to ``rows`` (n,) of ``features``, (N, D)."""

    features: Tensor
    rows: Tensor
    sums: Sums | None
    """Over these rows; None: they are few."""

    @cached_property
    def mean(self) -> Tensor:
        """(D,)."""
        if self.sums is None:
            return self.features[self.rows].double().mean(0)
        mean: Tensor = self.sums.first / self.sums.count
        return mean

    @cached_property
    def covariance(self) -> Tensor:
        """(D, D)."""
        assert self.sums is not None, "of few rows the root says all"
        n = self.sums.count
        covariance: Tensor = (self.sums.second - n * torch.outer(self.mean, self.mean)) / (n - 1)
        return covariance

    @property
    def few(self) -> bool:
        """Whether there are no more rows than dimensions, so that all is done by the rows and faster."""
        return self.sums is None

    @cached_property
    def trace(self) -> Tensor:
        """Of the covariance."""
        trace: Tensor = self.root.square().sum() if self.few else self.covariance.trace()
        return trace

    @cached_property
    def root(self) -> Tensor:
        """R with RᵀR the covariance: (min(n, D), D)."""
        if self.sums is None:
            centred = self.features[self.rows].double() - self.mean
            return centred.div_(math.sqrt(len(self.rows) - 1))
        lower, failed = torch.linalg.cholesky_ex(self.covariance)
        if not failed:
            upper: Tensor = lower.T
            return upper
        # Features that say the same leave nothing to divide by. Eigenvectors are always there, and take longer.
        values, vectors = torch.linalg.eigh(self.covariance)
        root: Tensor = (vectors * values.clamp(min=0).sqrt()).T
        return root


def frechet(
    sets: Sequence[Tensor], reference: Tensor, splits: int = SPLITS, progress: Progress = silent
) -> list[Tensor]:
    """Fréchet distance of Gaussians (arXiv 1706.08500) of the halves of each of the ``sets`` to those of ``reference``.

    Of features (N, D) to (M, D); N and M at least 4. Returns for each set (splits, 2) float64. The sums of a second
    half are those of both less those of the first, and moments of the reference are computed once for all sets.
    """
    # Distances do not move with the origin, and near it less is lost to rounding.
    centre = reference.double().mean(0).to(reference.dtype)
    real, drawn = (
        _Halved(reference - centre, "reference", splits),
        [_Halved(x - centre, "samples", splits) for x in sets],
    )

    def of_split(split: int) -> list[list[Tensor]]:
        theirs = real.at(split)
        return [[distance(x, y) for x, y in zip(each.at(split), theirs, strict=True)] for each in drawn]

    values: list[list[Tensor]] = [[] for _ in sets]
    with lanes() as pool:
        for done, found in enumerate(pool.map(of_split, range(splits)), start=1):
            for so_far, pair in zip(values, found, strict=True):
                so_far.extend(pair)
            progress("Fréchet distances of halves", done, splits)
    return [torch.stack(each).view(-1, 2) for each in values]


def distance(x: Gaussian, y: Gaussian) -> Tensor:
    """|μ_x − μ_y|² + tr Σ_x + tr Σ_y − 2 tr (Σ_x Σ_y)^½, where with a root R of Σ_x the last is tr (R Σ_y Rᵀ)^½.

    With one of Σ_y, too, that is the sum of the singular values of the product of the roots.
    """
    first, second = (x, y) if x.few else (y, x)
    if second.few:
        shared = torch.linalg.svdvals(first.root @ second.root.T).sum()
    else:
        shared = torch.linalg.eigvalsh(first.root @ second.covariance @ first.root.T).clamp(min=0).sqrt().sum()
    apart = (x.mean - y.mean).square().sum()
    squared: Tensor = apart + x.trace + y.trace - 2 * shared
    return squared


class _Halved:
    """A set of features (n, D) and its halves."""

    def __init__(self, features: Tensor, stream: Literal["samples", "reference"], splits: int) -> None:
        self.features = features
        self.members = halves(len(features), stream, splits)
        half = len(features) // 2
        self.both = None if half <= features.shape[1] else _sums(features, torch.arange(2 * half))

    def at(self, split: int) -> tuple[Gaussian, Gaussian]:
        """The Gaussians of both halves of a cut."""
        first, second = (self.members[2 * split + half].nonzero()[:, 0] for half in (0, 1))
        of_first = self._of(first)
        if of_first.sums is None or self.both is None:
            return of_first, self._of(second)
        return of_first, Gaussian(self.features, second, self.both.without(of_first.sums))

    def _of(self, rows: Tensor) -> Gaussian:
        few = len(rows) <= self.features.shape[1]
        return Gaussian(self.features, rows, None if few else _sums(self.features, rows))


def _sums(features: Tensor, rows: Tensor) -> Sums:
    width = features.shape[1]
    first, second = torch.zeros(width, dtype=torch.float64), torch.zeros(width, width, dtype=torch.float64)
    for chunk in torch.split(rows, CHUNK):
        x = features[chunk].double()
        first += x.sum(0)
        # xᵀx is symmetric: of what lies below the diagonal only some is computed.
        for start in range(0, width, COLUMNS):
            columns = x[:, start : start + COLUMNS]
            second[: start + COLUMNS, start : start + COLUMNS].addmm_(x[:, : start + COLUMNS].T, columns)
    return Sums(len(rows), first, second.triu() + second.triu(1).T)
