"""Standard errors of distances and shares, for one set of images and for the difference between two.

Both sets are cut at random into halves A and B, which have no image in common, and the figure T is computed of half of
the samples against half of the reference. Whatever the figure, E[(T(A) − T(B))² / 4] = V(half) / 2, where V is its
variance over new samples of both sets. That is V(all) where V falls as 1/n, as that of nearly every figure does in the
end; for KID and the Fréchet distance of equal distributions, where it falls as 1/n², the error comes out too large by
√2, never too small. Of many such cuts the mean is taken: the bootstrap with weights 0 and 2 (Præstgaard and Wellner,
Ann. Prob. 21, 1993). With replacement, an image would be its own nearest neighbour at distance 0.

The intervals are about other images generated from the same weights and other held-out images of the same kind, so the
reference is resampled as well: held fixed, a model that happens to suit these very images would surely be better. In a
comparison both models have the same image numbers and the same reference in each half, and what they have in common
cancels. Nothing is said of other trainings of the same configuration.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, partial
from typing import Literal

import torch
from torch import Tensor

from diffusion.common.progress import Progress, ignore_progress
from diffusion.common.random import generator
from diffusion.common.threads import worker_threads
from diffusion.evaluation.estimate import Estimate, NonNegative, Share
from diffusion.evaluation.metrics.distances import PER_FEATURE, kid_kernel
from diffusion.evaluation.metrics.neighbours import (
    DENSITY_NEIGHBOURS,
    MANIFOLD_NEIGHBOURS,
    map_blocks,
    squared_distances,
)

SPLITS = 100
"""Number of cuts: 200 halves. The standard error is then right to 1/√200, 7 %, which Student's t accounts for."""
Figure = Literal["fd", "kid", "precision", "recall", "density", "coverage"]
FEWEST_FOR_ERRORS = 2 * (DENSITY_NEIGHBOURS + 1)
"""Fewest features of a set for which every half has neighbourhoods."""


@dataclass(frozen=True)
class Replicates:
    """A metric of one set of samples against a reference, on all images and on halves of both."""

    figure: Figure
    whole: float
    """Value on all images, as in ``Scores``."""
    halves: Tensor
    """Values on the two halves of each cut, (splits, 2) float64."""
    samples: int
    reference: int
    """Numbers of images."""
    dimensions: int
    """Number of features of each."""

    @property
    def value(self) -> float:
        """The figure that the error is about; of the Fréchet distance without its bias, if there are images enough.

        That is nearly c/n on n images of each set (arXiv 1911.07023), so c/n more on halves.
        """
        has_enough_images = min(self.samples, self.reference) >= PER_FEATURE * self.dimensions
        return 2 * self.whole - float(self.halves.mean()) if self.figure == "fd" and has_enough_images else self.whole

    @property
    def estimate(self) -> Estimate:
        """Return the metric with its standard error."""
        estimate = _estimate(self.value, self.halves, self.samples, self.reference)
        if self.figure in ("precision", "recall", "coverage"):
            return Share(**estimate.model_dump(), count=self.samples if self.figure == "precision" else self.reference)
        return NonNegative(**estimate.model_dump()) if self.figure == "density" else estimate


def difference(candidate: Replicates, champion: Replicates) -> Estimate:
    """Estimate candidate minus champion, on the same image numbers and the same reference."""
    ours, theirs = ((side.figure, side.samples, side.reference) for side in (candidate, champion))
    if ours != theirs:
        raise ValueError(f"figures of unlike sets have no paired difference: {ours} and {theirs}")
    differences = candidate.halves - champion.halves
    return _estimate(candidate.value - champion.value, differences, candidate.samples, candidate.reference)


def _estimate(value: float, halves: Tensor, samples: int, reference: int) -> Estimate:
    contrasts = (halves[:, 0] - halves[:, 1]) / 2
    return Estimate(
        value=value,
        error=float(contrasts.square().mean().sqrt()),
        freedom=min(len(contrasts), samples - 1, reference - 1),
    )


def compute_halves(
    sets: Sequence[Tensor], reference: Tensor, splits: int = SPLITS, progress: Progress = ignore_progress
) -> list[dict[Figure, Tensor]]:
    """Compute every metric on the halves of each of ``sets``, features (N, D), and of ``reference``, (M, D).

    N and M at least FEWEST_FOR_ERRORS. Pass all sets at once: most of the work depends on the reference alone.
    Returns for each set (splits, 2) float64 by metric, with equal bits on any number of cores.
    """
    distances = frechet_of_halves(sets, reference, splits, progress)
    kids = kid_of_halves(sets, reference, splits, progress)
    shares = shares_of_halves(sets, reference, splits, progress)
    return [{"fd": fd, "kid": kid, **figures} for fd, kid, figures in zip(distances, kids, shares, strict=True)]


def draw_halves(count: int, stream: Literal["samples", "reference"], splits: int) -> Tensor:
    """Assign ``count`` images to halves at random: (2·splits, count) bool, of which rows 2r and 2r+1 are cut r.

    With an odd count, the last image is in no half. Equal counts get equal halves, so that image numbers stay paired.
    """
    half = count // 2
    members = torch.zeros(2 * splits, count, dtype=torch.bool)
    rng = generator(0, f"bootstrap/{stream}", 0)
    for split in range(splits):
        order = torch.from_numpy(rng.permutation(2 * half))
        members[2 * split, order[:half]] = True
        members[2 * split + 1, order[half:]] = True
    return members


BLOCK = 128
"""Rows of the kernel, or of distances, per worker thread: with 60,000 columns about 100 MB."""
CHUNK = 4096
"""Features converted to double precision at a time."""
COLUMNS = 256
"""Features whose products with those before them are summed at a time."""


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
    """Compute the Fréchet distance (arXiv 1706.08500) of the halves of each of ``sets`` to those of ``reference``.

    Of features (N, D) to (M, D); N and M at least 4. Returns for each set (splits, 2) float64.
    """
    # Distances are translation-invariant, and centred features lose less to rounding.
    centre = reference.double().mean(0).to(reference.dtype)
    real = _HalvedSet(reference - centre, "reference", splits)
    generated = [_HalvedSet(x - centre, "samples", splits) for x in sets]

    products = [_Products(halves, real) if halves.sums is None and real.sums is None else None for halves in generated]

    def compute_split(split: int) -> list[Tensor]:
        theirs = cache(partial(real.fit_halves, split))
        return [
            inner_products.distances(split)
            if inner_products is not None
            else torch.stack([gaussian_distance(x, y) for x, y in zip(halves.fit_halves(split), theirs(), strict=True)])
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
    for chunk in torch.split(rows, CHUNK):
        x = features[chunk].double()
        first += x.sum(0)
        # xᵀx is symmetric: of what lies below the diagonal only some is computed.
        for start in range(0, width, COLUMNS):
            columns = x[:, start : start + COLUMNS]
            second[: start + COLUMNS, start : start + COLUMNS].addmm_(x[:, : start + COLUMNS].T, columns)
    return first, second.triu() + second.triu(1).T


def kid_of_halves(
    sets: Sequence[Tensor], reference: Tensor, splits: int = SPLITS, progress: Progress = ignore_progress
) -> list[Tensor]:
    """Compute KID (``metrics.distances``) of the halves of each of ``sets`` to those of ``reference``.

    Of features (N, D) to (M, D); N and M at least 4. Returns for each set (splits, 2) float64.
    """
    reference_members = draw_halves(len(reference), "reference", splits)
    kids = []
    with worker_threads(1):
        reference_means = _means_within(reference, reference_members, progress)
        for samples in sets:
            sample_members = draw_halves(len(samples), "samples", splits)
            cross_means = _means_across(samples, reference, sample_members, reference_members, progress)
            kids.append(
                (_means_within(samples, sample_members, progress) + reference_means - 2 * cross_means).view(-1, 2)
            )
    return kids


def _means_within(x: Tensor, members: Tensor, progress: Progress) -> Tensor:
    """Compute the mean of the kernel over pairs of distinct features in each half: (H,) float64."""
    counts = members.sum(1, dtype=torch.float64)
    self_kernels = torch.cat([(rows.double().square().sum(1) / x.shape[1] + 1) ** 3 for rows in torch.split(x, BLOCK)])
    columns = members.double().T

    def compute_block(start: int) -> Tensor:
        block = kid_kernel(x[start : start + BLOCK], x[start:]).double()
        # Each pair of blocks once.
        block[:, BLOCK:] *= 2
        return (members[:, start : start + BLOCK].T * (block @ columns[start:])).sum(0)

    return (_sum_blocks(compute_block, len(x), progress) - members.double() @ self_kernels) / (counts * (counts - 1))


def _means_across(x: Tensor, y: Tensor, x_members: Tensor, y_members: Tensor, progress: Progress) -> Tensor:
    """Compute the mean of the kernel over pairs of x and y in the same half, for each half: (H,) float64."""
    columns = y_members.double().T

    def compute_block(start: int) -> Tensor:
        rows = slice(start, start + BLOCK)
        return (x_members[:, rows].T * (kid_kernel(x[rows], y).double() @ columns)).sum(0)

    return _sum_blocks(compute_block, len(x), progress) / (x_members.sum(1, dtype=torch.float64) * y_members.sum(1))


def _sum_blocks(work: Callable[[int], Tensor], count: int, progress: Progress) -> Tensor:
    """Sum over blocks in a fixed order, in float64: billions of float32 kernels leave no digit of a small distance."""
    return sum(map_blocks(work, count, BLOCK, "KID of halves", progress), torch.zeros((), dtype=torch.float64))


TABLE = 64
"""Neighbours stored per feature. That fewer than 5 of them are in its half has probability 10⁻¹³; the neighbourhood
then reaches to the last of them."""


def shares_of_halves(
    sets: Sequence[Tensor], reference: Tensor, splits: int = SPLITS, progress: Progress = ignore_progress
) -> list[dict[Figure, Tensor]]:
    """Compute precision, recall, density and coverage, as in ``Scores``, of the halves of ``sets``.

    Of features (N, D) against the halves of ``reference``, (M, D); N and M at least 12. Neighbours are those in the
    same half. Returns for each set (splits, 2) float64 by metric.
    """
    centre = reference.mean(0)
    real, real_members = reference - centre, draw_halves(len(reference), "reference", splits)
    shares = []
    with worker_threads(1):
        near_radii, wide_radii = _radii(real, real_members, (MANIFOLD_NEIGHBOURS, DENSITY_NEIGHBOURS), progress)
        for features in sets:
            generated, generated_members = features - centre, draw_halves(len(features), "samples", splits)
            (radii,) = _radii(generated, generated_members, (MANIFOLD_NEIGHBOURS,), progress)
            values = _shares(
                generated, real, generated_members, real_members, (near_radii, wide_radii, radii), progress
            )
            shares.append({name: halves.view(-1, 2) for name, halves in values.items()})
    return shares


def _shares(
    generated: Tensor,
    real: Tensor,
    generated_members: Tensor,
    real_members: Tensor,
    radii: tuple[Tensor, Tensor, Tensor],
    progress: Progress,
) -> dict[Figure, Tensor]:
    """Compute the metrics on each half, (H,) float64; ``radii``: squared, two of the reference, one of the samples."""
    near_radii, wide_radii, generated_radii = radii
    max_wide_radii, max_generated_radii = wide_radii.amax(0), generated_radii.amax(0)
    precision_mask = torch.zeros_like(generated_members)
    coverage_mask, recall_mask = torch.zeros_like(real_members), torch.zeros_like(real_members)

    def compute_block(start: int) -> Tensor:
        rows = slice(start, start + BLOCK)
        distances = squared_distances(generated[rows], real)
        # Few pairs are near each other in any half, and only these are checked in each.
        i, j = (distances <= max_wide_radii).nonzero(as_tuple=True)
        p, q = (distances <= max_generated_radii[rows, None]).nonzero(as_tuple=True)
        pair_distances, recall_distances = distances[i, j], distances[p, q]
        i, p = i + start, p + start
        pairs = torch.zeros(len(generated_members), dtype=torch.float64)
        # Threads share these arrays but only ever write True.
        for half in range(len(generated_members)):
            in_half = generated_members[half, i]
            precision_mask[half, i[in_half & (pair_distances <= near_radii[half, j])]] = True
            in_radius = in_half & (pair_distances < wide_radii[half, j])
            coverage_mask[half, j[in_radius]] = True
            recall_mask[half, q[real_members[half, q] & (recall_distances <= generated_radii[half, p])]] = True
            pairs[half] = in_radius.sum()
        return pairs

    pairs = torch.zeros(len(generated_members), dtype=torch.float64)
    for block in map_blocks(compute_block, len(generated), BLOCK, "neighbourhoods of halves", progress):
        pairs += block
    samples, references = (members.sum(1, dtype=torch.float64) for members in (generated_members, real_members))
    return {
        "precision": precision_mask.sum(1) / samples,
        "recall": recall_mask.sum(1) / references,
        "density": pairs / (DENSITY_NEIGHBOURS * samples),
        "coverage": coverage_mask.sum(1) / references,
    }


def _radii(features: Tensor, members: Tensor, counts: Sequence[int], progress: Progress) -> list[Tensor]:
    """Compute squared distances to the k-th neighbour in each half, for k in ``counts``: (H, n), −1 outside it."""
    distances, neighbours = _find_nearest(features, progress)
    radii = [torch.empty(members.shape, dtype=features.dtype) for _ in counts]

    def compute_half(half: int) -> None:
        rank = members[half][neighbours].cumsum(1, dtype=torch.int8)
        for k, kth_radii in zip(counts, radii, strict=True):
            columns = (rank < k).sum(1).clamp(max=distances.shape[1] - 1)
            kth_radii[half] = distances.gather(1, columns[:, None])[:, 0].where(members[half], -1)

    list(map_blocks(compute_half, len(members)))
    return radii


def _find_nearest(features: Tensor, progress: Progress) -> tuple[Tensor, Tensor]:
    """Find the nearest others of each feature: squared distances and indices, nearest first, (n, TABLE or all)."""

    def compute_block(start: int) -> tuple[Tensor, Tensor]:
        distances = squared_distances(features[start : start + BLOCK], features)
        distances.diagonal(start).fill_(math.inf)
        values, indices = distances.topk(min(TABLE, len(features) - 1), largest=False)
        return values, indices.int()

    values, indices = zip(*map_blocks(compute_block, len(features), BLOCK, "neighbours", progress), strict=True)
    return torch.cat(values), torch.cat(indices)
