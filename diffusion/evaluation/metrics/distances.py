"""Distances between two sets of images in a feature space: Fréchet distance, KID, and all scores of a set.

They equal torch-fidelity's where it has them; its KID is a mean over random subsets, equal if one has all images. Every
score carries the name of its features (``fd_efflite0``), as "FID" alone means Inception-v3.

The Fréchet distance is biased upwards by about 1/n, while KID is unbiased at any n. So under 5,120 images KID decides,
and every score is shown beside its real baseline: the score of as many training images against the same reference.
"""

import math
from dataclasses import dataclass
from functools import reduce

import torch
from pydantic import Field
from torch import Tensor

from diffusion.common.config import Config, is_unset
from diffusion.common.progress import Progress, ignore_progress
from diffusion.common.random import permutation
from diffusion.common.threads import worker_threads
from diffusion.evaluation.metrics.neighbours import compute_overlap, map_blocks, nearest_distances

ROWS = 4096
"""Rows converted to double precision at a time."""
PER_FEATURE = 4
"""Images per feature from which the distance is close enough to linear in 1/n to be extrapolated."""


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


KERNEL_BLOCK = 2048
"""Rows and columns of the kernel held at a time per worker thread."""


def compute_kid(samples: Tensor, reference: Tensor, sums: Tensor | None = None) -> tuple[float, float]:
    """Compute KID of features (N, D) and (M, D), N and M at least 3; ``sums``: kernel sums of the latter, if known.

    Returns the unbiased estimate, which may be slightly negative, and its standard error over new samples of both sets.
    """
    value, sample_deviations, reference_deviations = kid_deviations(samples, reference, sums)
    return value, math.sqrt(jackknife(sample_deviations) + jackknife(reference_deviations))


def kid_deviations(samples: Tensor, reference: Tensor, sums: Tensor | None = None) -> tuple[float, Tensor, Tensor]:
    """Compute KID as ``compute_kid``, and its deviations without each member of either set: (N,), (M,) float64."""
    sample_sums = kernel_sums(samples)
    reference_sums = kernel_sums(reference) if sums is None else sums
    sample_cross_sums, reference_cross_sums = _cross_sums(samples, reference)
    within_mean = sum(float(sums.sum()) / (len(sums) * (len(sums) - 1)) for sums in (sample_sums, reference_sums))
    value = within_mean - 2 * float(sample_cross_sums.sum()) / (len(samples) * len(reference))

    def compute_deviations(kernel: Tensor, cross: Tensor, others: int) -> Tensor:
        """From sums of the kernel of each member with the rest of its set, and with the ``others`` of the other set."""
        n = len(kernel)
        kids = (kernel.sum() - 2 * kernel) / ((n - 1) * (n - 2)) - 2 * (cross.sum() - cross) / ((n - 1) * others)
        return kids - kids.mean()

    return (
        value,
        compute_deviations(sample_sums, sample_cross_sums, len(reference)),
        compute_deviations(reference_sums, reference_cross_sums, len(samples)),
    )


def jackknife(deviations: Tensor) -> float:
    """Compute the variance due to one set, from the ``deviations`` of a metric without each of its n members, (n,).

    It is not too small on average (Efron and Stein, Ann. Statist. 9, 1981).
    """
    n = len(deviations)
    return float(deviations.square().sum()) * (n - 1) / n


def kernel_sums(features: Tensor, progress: Progress = ignore_progress) -> Tensor:
    """Compute the sum of the kernel of each of the features (N, D) with all others: (N,) float64."""
    count = len(features)

    def compute_block(start: int) -> Tensor:
        sums = torch.zeros(count, dtype=torch.float64)
        rows = features[start : start + KERNEL_BLOCK]
        for column in range(start, count, KERNEL_BLOCK):
            kernel = kid_kernel(rows, features[column : column + KERNEL_BLOCK])
            if column == start:
                kernel.fill_diagonal_(0)
            else:
                sums[column : column + KERNEL_BLOCK] += kernel.sum(0, dtype=torch.float64)
            sums[start : start + KERNEL_BLOCK] += kernel.sum(1, dtype=torch.float64)
        return sums

    blocks = map_blocks(compute_block, count, KERNEL_BLOCK, "kernels of real images", progress)
    return sum(blocks, torch.zeros(count, dtype=torch.float64))


def kid_kernel(x: Tensor, y: Tensor) -> Tensor:
    """Compute (x·y/D + 1)³ of all pairs of features (n, D) and (m, D): (n, m)."""
    return (x @ y.T).div_(x.shape[1]).add_(1).pow_(3)


def kids_of_splits(pairs: Tensor, first: Tensor) -> Tensor:
    """Compute the KID between the two sides of N images for each of P splits of equal numbers, (P,).

    ``pairs``: kernel of all pairs, (N, N) float64, with zeros on the diagonal. ``first``: 1 for the images of one side
    and 0 for the others, (N, P) float64; at least two on each side.
    """
    n = float(first[:, 0].sum())
    m = len(pairs) - n
    within = (first * (pairs @ first)).sum(0)
    cross = pairs.sum(0) @ first - within
    return within / (n * (n - 1)) + (pairs.sum() - within - 2 * cross) / (m * (m - 1)) - 2 * cross / (n * m)


def _cross_sums(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Compute sums of the kernel of each of x with all y, (N,), and of each of y with all x, (M,); float64."""

    def compute_block(start: int) -> tuple[Tensor, Tensor]:
        columns = y[start : start + KERNEL_BLOCK]
        blocks = [kid_kernel(rows, columns) for rows in torch.split(x, KERNEL_BLOCK)]
        x_sums = torch.cat([block.sum(1, dtype=torch.float64) for block in blocks])
        return x_sums, reduce(torch.add, (block.sum(0, dtype=torch.float64) for block in blocks))

    x_sums, y_sums = zip(*map_blocks(compute_block, len(y), KERNEL_BLOCK), strict=True)
    return reduce(torch.add, x_sums), torch.cat(y_sums)


FIGURES = ("fd", "fd_infinity", "kid", "kid_se", "precision", "recall", "density", "coverage")
"""Names of the metrics in the order in which they are shown."""


@dataclass(frozen=True)
class Reference:
    """Real images as a reference for scores: features with everything precomputed from them."""

    features: Tensor
    """(M, D) float32."""
    moments: Moments
    """Moments of the features."""
    nearest: Tensor
    """(M, 5) float32: squared distances of each to its nearest others, ascending."""
    kernel_sums: Tensor
    """(M,) float64: sums of KID's kernel of each with all others."""

    @classmethod
    def from_features(cls, features: Tensor, progress: Progress = ignore_progress) -> "Reference":
        """Build from features (M, D), M at least 6."""
        nearest = nearest_distances(features, progress)
        return cls(features, compute_moments(features), nearest, kernel_sums(features, progress))


class Scores(Config):
    """Distances and shares of one set of images against a reference set."""

    extractor: str
    """Name of the features."""
    samples: int
    reference: int
    """Numbers of images evaluated, and of real images that they were compared with."""
    fd: float
    """Fréchet distance of two Gaussians fitted to the features (arXiv 1706.08500); 0 is best."""
    kid: float
    """Squared maximum mean discrepancy under the kernel (x·y/D + 1)³ (arXiv 1801.01401), unbiased, over all
    pairs: 0 is best, and it may be slightly negative."""
    kid_se: float
    """Standard error of ``kid``, over new samples of both sets."""
    precision: float
    """Share of the evaluated images that lie among the reference (fidelity), 0 to 1 (arXiv 1904.06991, k = 3)."""
    recall: float
    """Share of the reference that lies among the evaluated images (variety), 0 to 1 (arXiv 1904.06991, k = 3)."""
    density: float
    """Mean number of reference neighbourhoods that an evaluated image lies in, over k (fidelity, robust to outliers),
    at least 0, about 1 for real images (arXiv 2002.09797, k = 5)."""
    coverage: float
    """Share of the reference with an evaluated image in its neighbourhood (variety), 0 to 1 (arXiv 2002.09797, k =
    5)."""
    fd_infinity: float | None = Field(None, exclude_if=is_unset)
    """``fd`` extrapolated to infinitely many images (arXiv 1911.07023); None if there are too few."""

    def get_metric(self, figure: str) -> float:
        """Return the metric of that name, one that every set of images has."""
        return float(getattr(self, figure))

    def metrics(self) -> dict[str, float]:
        """Return the available metrics by name, such as ``kid_efflite0``."""
        figures = {f"{name}_{self.extractor}": getattr(self, name) for name in FIGURES}
        counts = {"samples": self.samples, "reference": self.reference}
        return {name: value for name, value in figures.items() if value is not None} | counts


def compute_scores(samples: Tensor, reference: Tensor | Reference, extractor: str) -> Scores:
    """Compare features (N, D) of evaluated images with those (M, D) of real ones; N and M at least 10.

    Pass a ``Reference`` if it is used again: most of the time is spent on it.
    """
    real = Reference.from_features(reference) if isinstance(reference, Tensor) else reference
    kid, kid_se = compute_kid(samples, real.features, real.kernel_sums)
    return Scores(
        extractor=extractor,
        samples=len(samples),
        reference=len(real.features),
        fd=frechet_distance(compute_moments(samples), real.moments),
        kid=kid,
        kid_se=kid_se,
        fd_infinity=distance_at_infinity(samples, real.moments),
        **compute_overlap(samples, real.features, nearest_distances(samples), real.nearest),
    )
