"""Kernel inception distance (KID): the squared maximum mean discrepancy of features, unbiased at any number of images.

It equals torch-fidelity's, which is a mean over random subsets, if one subset has all images.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import reduce

import torch
from torch import Tensor

from diffusion.common.progress import Progress, ignore_progress
from diffusion.common.threads import worker_threads
from diffusion.evaluation.metrics.metric import SPLITS, Figure, ImageSet, Metric, Reference, draw_halves
from diffusion.evaluation.metrics.neighbours import map_blocks

KERNEL_BLOCK = 2048
"""Rows and columns of the kernel held at a time per worker thread."""
HALVES_BLOCK = 128
"""Rows of the kernel per worker thread when all halves are summed: with 60,000 columns about 100 MB."""


class KernelInceptionDistance(Metric):
    """KID with its standard error."""

    name = "kid"
    figures = (
        Figure(
            "kid",
            "KID",
            "Squared maximum mean discrepancy under the kernel (x·y/D + 1)³ (arXiv 1801.01401), unbiased, over all "
            "pairs: 0 is best, and it may be slightly negative.",
            "Unbiased at any number of images: the one to go by.",
            interval="distance",
        ),
        Figure("kid_se", "error of KID", "Standard error of `kid`, over new samples of both sets."),
    )

    def prepare(self, features: Tensor, progress: Progress) -> dict[str, Tensor]:
        """Sum the kernel of each real image with all others."""
        return {"kernel_sums": kernel_sums(features, progress)}

    def compute(self, samples: ImageSet, reference: Reference) -> Mapping[str, float]:
        """Compute KID over all pairs, and its error by the jackknife."""
        kid, error = compute_kid(samples.features, reference.features, reference.statistics["kernel_sums"])
        return {"kid": kid, "kid_se": error}

    def compute_halves(
        self, sets: Sequence[ImageSet], reference: Reference, splits: int, progress: Progress = ignore_progress
    ) -> list[dict[str, Tensor]]:
        """Compute KID of all halves in one pass over the kernel."""
        kids = kid_of_halves([samples.features for samples in sets], reference.features, splits, progress)
        return [{"kid": halves} for halves in kids]


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


def kid_of_halves(
    sets: Sequence[Tensor], reference: Tensor, splits: int = SPLITS, progress: Progress = ignore_progress
) -> list[Tensor]:
    """Compute KID of the halves of each of ``sets`` to halves of ``reference``.

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
    self_kernels = torch.cat(
        [(rows.double().square().sum(1) / x.shape[1] + 1) ** 3 for rows in torch.split(x, HALVES_BLOCK)]
    )
    columns = members.double().T

    def compute_block(start: int) -> Tensor:
        block = kid_kernel(x[start : start + HALVES_BLOCK], x[start:]).double()
        # Each pair of blocks once.
        block[:, HALVES_BLOCK:] *= 2
        return (members[:, start : start + HALVES_BLOCK].T * (block @ columns[start:])).sum(0)

    return (_sum_blocks(compute_block, len(x), progress) - members.double() @ self_kernels) / (counts * (counts - 1))


def _means_across(x: Tensor, y: Tensor, x_members: Tensor, y_members: Tensor, progress: Progress) -> Tensor:
    """Compute the mean of the kernel over pairs of x and y in the same half, for each half: (H,) float64."""
    columns = y_members.double().T

    def compute_block(start: int) -> Tensor:
        rows = slice(start, start + HALVES_BLOCK)
        return (x_members[:, rows].T * (kid_kernel(x[rows], y).double() @ columns)).sum(0)

    return _sum_blocks(compute_block, len(x), progress) / (x_members.sum(1, dtype=torch.float64) * y_members.sum(1))


def _sum_blocks(work: Callable[[int], Tensor], count: int, progress: Progress) -> Tensor:
    """Sum over blocks in a fixed order, in float64: billions of float32 kernels leave no digit of a small distance."""
    return sum(map_blocks(work, count, HALVES_BLOCK, "KID of halves", progress), torch.zeros((), dtype=torch.float64))
