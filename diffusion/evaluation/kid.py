"""KID: the squared maximum mean discrepancy under the kernel (x·y/D + 1)³ (arXiv 1801.01401), over all pairs.

Without bias, as pairs of one with itself do not count. torch-fidelity gives the mean over random subsets instead, which
is this figure with an error of its own: that of drawing them.
"""

import math
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from diffusion.lanes import lanes
from diffusion.progress import Progress, silent

BLOCK = 2048
"""Rows and columns of the kernel held at a time in each lane."""


@dataclass(frozen=True)
class Kid:
    """The figure of two sets."""

    value: float
    """0 is best, and it may come out slightly negative."""
    error: float
    """Its standard error, over new draws of both sets: see ``jackknife``."""


def kid(samples: Tensor, reference: Tensor, sums: Tensor | None = None) -> Kid:
    """Of features (N, D) and (M, D), N and M at least 3; ``sums``: those of the kernel of the latter, if known."""
    of_samples = kernel_sums(samples)
    of_reference = kernel_sums(reference) if sums is None else sums
    from_samples, from_reference = _sums_across(samples, reference)
    within = _mean_of_pairs(of_samples) + _mean_of_pairs(of_reference)
    value = within - 2 * float(from_samples.sum()) / (len(samples) * len(reference))
    variance = jackknife(of_samples, from_samples, len(reference))
    variance += jackknife(of_reference, from_reference, len(samples))
    return Kid(value, math.sqrt(variance))


def jackknife(within: Tensor, across: Tensor, others: int) -> float:
    """What one of the two sets brings to the variance: from the figure without each of its n members in turn.

    ``within``, ``across``: (n,) each, sums of the kernel of each member with the rest of its set and with the other
    set, of as many as ``others``. The jackknife is not too small in the mean (Efron and Stein, Ann. Statist. 9, 1981);
    of sets that cannot be told apart the error is too large by √2, as the one from halves is.
    """
    n = len(within)
    left = (within.sum() - 2 * within) / ((n - 1) * (n - 2)) - 2 * (across.sum() - across) / ((n - 1) * others)
    return float((left - left.mean()).square().sum()) * (n - 1) / n


def kernel_sums(features: Tensor, progress: Progress = silent) -> Tensor:
    """Of each of the features (N, D) the sum of the kernel with all others: (N,) float64."""
    count = len(features)

    def of_block(start: int) -> Tensor:
        sums = torch.zeros(count, dtype=torch.float64)
        rows = features[start : start + BLOCK]
        for at in range(start, count, BLOCK):
            found = kernel(rows, features[at : at + BLOCK])
            if at == start:
                found.fill_diagonal_(0)
            else:
                sums[at : at + BLOCK] += found.sum(0, dtype=torch.float64)
            sums[start : start + BLOCK] += found.sum(1, dtype=torch.float64)
        return sums

    total = torch.zeros(count, dtype=torch.float64)
    with lanes() as pool:
        for start, sums in zip(range(0, count, BLOCK), pool.map(of_block, range(0, count, BLOCK)), strict=True):
            total += sums
            progress("kernels of real pictures", min(start + BLOCK, count), count)
    return total


def kernel(x: Tensor, y: Tensor) -> Tensor:
    """(x·y/D + 1)³ of all pairs of features (n, D) and (m, D): (n, m)."""
    return (x @ y.T).div_(x.shape[1]).add_(1).pow_(3)


def _sums_across(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of the kernel of each of x with all of y, (N,), and of each of y with all of x, (M,); float64."""

    def of_block(start: int) -> tuple[Tensor, Tensor]:
        columns = y[start : start + BLOCK]
        blocks = [kernel(rows, columns) for rows in torch.split(x, BLOCK)]
        of_x = torch.cat([block.sum(1, dtype=torch.float64) for block in blocks])
        return of_x, reduce(torch.add, (block.sum(0, dtype=torch.float64) for block in blocks))

    with lanes() as pool:
        of_x, of_y = zip(*pool.map(of_block, range(0, len(y), BLOCK)), strict=True)
    return reduce(torch.add, of_x), torch.cat(of_y)


def _mean_of_pairs(sums: Tensor) -> float:
    return float(sums.sum()) / (len(sums) * (len(sums) - 1))
