"""KID on halves: each kernel is computed once, and summed over all halves by products with 0 and 1."""

from collections.abc import Sequence
from concurrent.futures import Executor
from functools import reduce

import torch
from torch import Tensor

from diffusion.evaluation.bootstrap.halves import SPLITS, Replicates, halves
from diffusion.evaluation.kid import kernel
from diffusion.lanes import lanes
from diffusion.progress import Progress, silent

BLOCK = 128
"""Rows of the kernel that a lane holds: with 60,000 columns about 100 MB."""


def kid(
    sets: Sequence[Tensor], reference: Tensor, splits: int = SPLITS, progress: Progress = silent
) -> list[Replicates]:
    """Squared maximum mean discrepancy under (x·y/D + 1)³, unbiased, over all pairs (arXiv 1801.01401).

    Of each of the ``sets``, features (N, D), to the ``reference``, (M, D); N and M at least 4.
    """
    of_reference = halves(len(reference), "reference", splits)
    found = []
    with lanes() as pool:
        within_reference = _within(reference, of_reference, pool, progress)
        for samples in sets:
            of_samples = halves(len(samples), "samples", splits)
            pairs = of_samples.sum(1, dtype=torch.float64) * of_reference.sum(1)
            across = _sums(samples, reference, of_samples, of_reference, pool, progress) / pairs
            values = _within(samples, of_samples, pool, progress) + within_reference - 2 * across
            found.append(Replicates.of("kid", values, len(samples), len(reference)))
    return found


def _within(x: Tensor, members: Tensor, pool: Executor, progress: Progress) -> Tensor:
    """Mean of the kernel over pairs of two different features of a half, for each half: (H,) float64."""
    counts = members.sum(1, dtype=torch.float64)
    itself = (x.double().square().sum(1) / x.shape[1] + 1) ** 3
    return (_sums(x, x, members, members, pool, progress) - members.double() @ itself) / (counts * (counts - 1))


def _sums(x: Tensor, y: Tensor, of_x: Tensor, of_y: Tensor, pool: Executor, progress: Progress) -> Tensor:
    """Sum of the kernel over x in a half of its set and y in the same half of its, for each half: (H,) float64."""
    columns = of_y.double().T

    def of_block(start: int) -> Tensor:
        rows = slice(start, start + BLOCK)
        # Thousands of millions of single-precision kernels would leave no digit of a small distance: sums are double.
        return (of_x[:, rows].T * (kernel(x[rows], y).double() @ columns)).sum(0)

    def added(total: Tensor, block: tuple[int, Tensor]) -> Tensor:
        progress("KID of halves", min((block[0] + 1) * BLOCK, len(x)), len(x))
        return total + block[1]

    # In the order of the blocks, whichever is done first.
    blocks = enumerate(pool.map(of_block, range(0, len(x), BLOCK)))
    return reduce(added, blocks, torch.zeros(columns.shape[1], dtype=torch.float64))
