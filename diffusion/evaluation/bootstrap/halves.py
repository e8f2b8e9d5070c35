"""Fréchet distance, KID, precision, recall, density and coverage of halves of sets of images."""

import math
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from diffusion.common.progress import Progress, silent
from diffusion.common.random import generator
from diffusion.common.threads import worker_threads
from diffusion.evaluation.metrics.distances import kid_kernel
from diffusion.evaluation.metrics.neighbours import squared_distances

SPLITS = 100
"""Number of cuts: 200 halves. The standard error is then right to 1/√200, 7 %, which Student's t accounts for."""
Figure = Literal["fd", "kid", "precision", "recall", "density", "coverage"]


def draw_halves(count: int, stream: Literal["samples", "reference"], splits: int) -> Tensor:
    """Assign ``count`` images to halves at random: (2·splits, count) bool.

    Rows 2r and 2r+1 are the two halves of cut r. With an odd count, the last image is in no half. Sets of equal size
    get equal halves, so that image numbers stay paired.
    """
    half = count // 2
    members = torch.zeros(2 * splits, count, dtype=torch.bool)
    draws = generator(0, f"bootstrap/{stream}", 0)
    for split in range(splits):
        order = torch.from_numpy(draws.permutation(2 * half))
        members[2 * split, order[:half]] = True
        members[2 * split + 1, order[half:]] = True
    return members


CHUNK = 4096
"""Features converted to double precision at a time."""
COLUMNS = 256
"""Features whose products with those before them are summed at a time."""
"""Images of each set per feature from which on the bias is near enough to c/n: of independent Gaussian features less
than a tenth of it is left."""


@dataclass(frozen=True)
class Sums:
    """Sums over features x: the count, the sum of x, (D,), and of x·xᵀ, (D, D); float64."""

    count: int
    first: Tensor
    second: Tensor

    def without(self, others: "Sums") -> "Sums":
        """Return the sums over the features that are not in ``others``."""
        return Sums(self.count - others.count, self.first - others.first, self.second - others.second)


@dataclass(frozen=True)
class Gaussian:
    """Gaussian fitted to ``rows`` (n,) of ``features``, (N, D)."""

    features: Tensor
    rows: Tensor
    sums: Sums | None
    """Sums over these rows; None if ``few``."""

    @cached_property
    def mean(self) -> Tensor:
        """Return the mean, (D,)."""
        if self.sums is None:
            return self.features[self.rows].double().mean(0)
        mean: Tensor = self.sums.first / self.sums.count
        return mean

    @cached_property
    def covariance(self) -> Tensor:
        """Return the covariance, (D, D)."""
        assert self.sums is not None, "of few rows the root says all"
        n = self.sums.count
        covariance: Tensor = (self.sums.second - n * torch.outer(self.mean, self.mean)) / (n - 1)
        return covariance

    @property
    def few(self) -> bool:
        """Return whether there are at most as many rows as dimensions, where working on rows is faster."""
        return self.sums is None

    @cached_property
    def trace(self) -> Tensor:
        """Return the trace of the covariance."""
        trace: Tensor = self.root.square().sum() if self.few else self.covariance.trace()
        return trace

    @cached_property
    def root(self) -> Tensor:
        """Return R, (min(n, D), D), with RᵀR the covariance."""
        if self.sums is None:
            centred = self.features[self.rows].double() - self.mean
            return centred.div_(math.sqrt(len(self.rows) - 1))
        lower, failed = torch.linalg.cholesky_ex(self.covariance)
        if not failed:
            upper: Tensor = lower.T
            return upper
        # Collinear features make the Cholesky factorization fail. The eigendecomposition always exists but is slower.
        values, vectors = torch.linalg.eigh(self.covariance)
        root: Tensor = (vectors * values.clamp(min=0).sqrt()).T
        return root


def frechet_of_halves(
    sets: Sequence[Tensor], reference: Tensor, splits: int = SPLITS, progress: Progress = silent
) -> list[Tensor]:
    """Compute the Fréchet distance (arXiv 1706.08500) of the halves of each of ``sets`` to those of ``reference``.

    Of features (N, D) to (M, D); N and M at least 4. Returns for each set (splits, 2) float64. The sums of a second
    half are those of both less those of the first, and moments of the reference are computed once for all sets.
    """
    # Distances are translation-invariant, and centred features lose less to rounding.
    centre = reference.double().mean(0).to(reference.dtype)
    real, generated = (
        _Halved(reference - centre, "reference", splits),
        [_Halved(x - centre, "samples", splits) for x in sets],
    )

    def of_split(split: int) -> list[list[Tensor]]:
        theirs = real.at(split)
        return [[gaussian_distance(x, y) for x, y in zip(each.at(split), theirs, strict=True)] for each in generated]

    values: list[list[Tensor]] = [[] for _ in sets]
    with worker_threads() as pool:
        for done, found in enumerate(pool.map(of_split, range(splits)), start=1):
            for so_far, pair in zip(values, found, strict=True):
                so_far.extend(pair)
            progress("Fréchet distances of halves", done, splits)
    return [torch.stack(each).view(-1, 2) for each in values]


def gaussian_distance(x: Gaussian, y: Gaussian) -> Tensor:
    """Compute |μ_x − μ_y|² + tr Σ_x + tr Σ_y − 2 tr (Σ_x Σ_y)^½.

    With a root R of Σ_x the last trace is tr (R Σ_y Rᵀ)^½; with a root of Σ_y, too, it is the sum of the singular
    values of the product of the roots.
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
        self.members = draw_halves(len(features), stream, splits)
        half = len(features) // 2
        self.both = None if half <= features.shape[1] else _sums(features, torch.arange(2 * half))

    def at(self, split: int) -> tuple[Gaussian, Gaussian]:
        """Return the Gaussians of both halves of a cut."""
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


ROWS = 128
"""Rows of the kernel per worker thread: with 60,000 columns about 100 MB."""


def kid_of_halves(
    sets: Sequence[Tensor], reference: Tensor, splits: int = SPLITS, progress: Progress = silent
) -> list[Tensor]:
    """Compute KID (``metrics.distances``) of the halves of each of ``sets`` to those of ``reference``.

    Of features (N, D) to (M, D); N and M at least 4. Returns for each set (splits, 2) float64.
    """
    of_reference = draw_halves(len(reference), "reference", splits)
    found = []
    with worker_threads() as pool:
        within_reference = _within(reference, of_reference, pool, progress)
        for samples in sets:
            of_samples = draw_halves(len(samples), "samples", splits)
            across = _across(samples, reference, of_samples, of_reference, pool, progress)
            values = _within(samples, of_samples, pool, progress) + within_reference - 2 * across
            found.append(values.view(-1, 2))
    return found


def _within(x: Tensor, members: Tensor, pool: Executor, progress: Progress) -> Tensor:
    """Compute the mean of the kernel over pairs of distinct features in each half: (H,) float64."""
    counts = members.sum(1, dtype=torch.float64)
    itself = torch.cat([(rows.double().square().sum(1) / x.shape[1] + 1) ** 3 for rows in torch.split(x, ROWS)])
    columns = members.double().T

    def of_block(start: int) -> Tensor:
        block = kid_kernel(x[start : start + ROWS], x[start:]).double()
        # Each pair of blocks once.
        block[:, ROWS:] *= 2
        return (members[:, start : start + ROWS].T * (block @ columns[start:])).sum(0)

    sums = _added(of_block, len(x), pool, progress)
    return (sums - members.double() @ itself) / (counts * (counts - 1))


def _across(x: Tensor, y: Tensor, of_x: Tensor, of_y: Tensor, pool: Executor, progress: Progress) -> Tensor:
    """Compute the mean of the kernel over pairs of x and y in the same half, for each half: (H,) float64."""
    columns = of_y.double().T

    def of_block(start: int) -> Tensor:
        rows = slice(start, start + ROWS)
        return (of_x[:, rows].T * (kid_kernel(x[rows], y).double() @ columns)).sum(0)

    return _added(of_block, len(x), pool, progress) / (of_x.sum(1, dtype=torch.float64) * of_y.sum(1))


def _added(of_block: Callable[[int], Tensor], count: int, pool: Executor, progress: Progress) -> Tensor:
    """Sum over blocks of ROWS of ``count`` in a fixed order, whichever finishes first.

    In double precision: billions of single-precision kernels would leave no digit of a small distance.
    """
    starts = range(0, count, ROWS)
    total = torch.zeros((), dtype=torch.float64)
    for start, found in zip(starts, pool.map(of_block, starts), strict=True):
        total = total + found
        progress("KID of halves", min(start + ROWS, count), count)
    return total


MANIFOLD, DENSITY = 3, 5
"""k of precision and recall (arXiv 1904.06991), and of density and coverage (arXiv 2002.09797)."""
FEWEST = 2 * (DENSITY + 1)
"""Fewest features of a set for which every half has neighbourhoods."""
TABLE = 64
"""Neighbours stored per feature. That fewer than 5 of them are in its half has probability 10⁻¹³; the neighbourhood
then reaches to the last of them."""
BLOCK = 128
"""Rows of distances per worker thread."""


def shares_of_halves(
    sets: Sequence[Tensor], reference: Tensor, splits: int = SPLITS, progress: Progress = silent
) -> list[dict[Figure, Tensor]]:
    """Compare the halves of ``sets``, features (N, D) each, with those of ``reference``, (M, D); N, M at least 12.

    Precision: share of samples no farther from some reference than its 3rd nearest other; recall: the same the other
    way round; density: how many reference features have a sample nearer than their 5th nearest other, over 5; coverage:
    share of the reference that has any sample so near. Neighbours are those in the same half.
    Returns for each set (splits, 2) float64 by metric.
    """
    centre = reference.mean(0)
    real, of_real = reference - centre, draw_halves(len(reference), "reference", splits)
    found = []
    with worker_threads() as pool:
        near, wide = _radii(real, of_real, (MANIFOLD, DENSITY), pool, progress)
        for features in sets:
            generated, of_generated = features - centre, draw_halves(len(features), "samples", splits)
            (around,) = _radii(generated, of_generated, (MANIFOLD,), pool, progress)
            values = _shares(generated, real, of_generated, of_real, (near, wide, around), pool, progress)
            found.append({name: each.view(-1, 2) for name, each in values.items()})
    return found


def _shares(
    generated: Tensor,
    real: Tensor,
    of_generated: Tensor,
    of_real: Tensor,
    radii: tuple[Tensor, Tensor, Tensor],
    pool: Executor,
    progress: Progress,
) -> dict[Figure, Tensor]:
    """Compute the metrics on each half, (H,) float64; ``radii``: squared, two of the reference, one of the samples."""
    near, wide, around = radii
    wide_at_most, around_at_most = wide.amax(0), around.amax(0)
    precise = torch.zeros_like(of_generated)
    covered, recalled = torch.zeros_like(of_real), torch.zeros_like(of_real)

    def of_block(start: int) -> Tensor:
        rows = slice(start, start + BLOCK)
        distances = squared_distances(generated[rows], real)
        # Few pairs are near each other in any half, and only these are checked in each.
        i, j = (distances <= wide_at_most).nonzero(as_tuple=True)
        p, q = (distances <= around_at_most[rows, None]).nonzero(as_tuple=True)
        apart, asunder = distances[i, j], distances[p, q]
        i, p = i + start, p + start
        pairs = torch.zeros(len(of_generated), dtype=torch.float64)
        # Threads share these arrays but only ever write True.
        for half in range(len(of_generated)):
            here = of_generated[half, i]
            precise[half, i[here & (apart <= near[half, j])]] = True
            within = here & (apart < wide[half, j])
            covered[half, j[within]] = True
            recalled[half, q[of_real[half, q] & (asunder <= around[half, p])]] = True
            pairs[half] = within.sum()
        return pairs

    pairs = torch.zeros(len(of_generated), dtype=torch.float64)
    for number, block in enumerate(pool.map(of_block, range(0, len(generated), BLOCK)), start=1):
        pairs += block
        progress("neighbourhoods of halves", min(number * BLOCK, len(generated)), len(generated))
    samples, references = (members.sum(1, dtype=torch.float64) for members in (of_generated, of_real))
    return {
        "precision": precise.sum(1) / samples,
        "recall": recalled.sum(1) / references,
        "density": pairs / (DENSITY * samples),
        "coverage": covered.sum(1) / references,
    }


def _radii(
    features: Tensor, members: Tensor, counts: Sequence[int], pool: Executor, progress: Progress
) -> list[Tensor]:
    """Compute the squared distance of n features to their k-th neighbour in their half, for k in ``counts``: (H, n).

    −1, nearer than anything, for features that are not in that half.
    """
    distances, neighbours = _nearest(features, pool, progress)
    found = [torch.empty(members.shape, dtype=features.dtype) for _ in counts]

    def of_half(half: int) -> None:
        rank = members[half][neighbours].cumsum(1, dtype=torch.int8)
        for k, radii in zip(counts, found, strict=True):
            at = (rank < k).sum(1).clamp(max=distances.shape[1] - 1)
            radii[half] = distances.gather(1, at[:, None])[:, 0].where(members[half], -1)

    list(pool.map(of_half, range(len(members))))
    return found


def _nearest(features: Tensor, pool: Executor, progress: Progress) -> tuple[Tensor, Tensor]:
    """Find the nearest others of each feature: squared distances and indices, nearest first, (n, TABLE or all)."""

    def of_block(start: int) -> tuple[Tensor, Tensor]:
        distances = squared_distances(features[start : start + BLOCK], features)
        distances.diagonal(start).fill_(math.inf)
        values, at = distances.topk(min(TABLE, len(features) - 1), largest=False)
        return values, at.int()

    pieces = []
    for piece in pool.map(of_block, range(0, len(features), BLOCK)):
        pieces.append(piece)
        progress("neighbours", min(len(pieces) * BLOCK, len(features)), len(features))
    values, at = zip(*pieces, strict=True)
    return torch.cat(values), torch.cat(at)
