"""KID on halves: each kernel is computed once, and summed over all halves by products with 0 and 1."""

from collections.abc import Callable, Sequence
from concurrent.futures import Executor

import torch
from torch import Tensor

from diffusion.evaluation.bootstrap.halves import SPLITS, halves
from diffusion.evaluation.kid import kernel
from diffusion.lanes import lanes
from diffusion.progress import Progress, silent

ROWS = 128
"""Rows of the kernel that a lane holds: with 60,000 columns about 100 MB."""


def kid(sets: Sequence[Tensor], reference: Tensor, splits: int = SPLITS, progress: Progress = silent) -> list[Tensor]:
    """KID (``diffusion.evaluation.kid``) of the halves of each of the ``sets`` to those of the ``reference``.

    Of features (N, D) to (M, D); N and M at least 4. Returns for each set (splits, 2) float64.
    """
    of_reference = halves(len(reference), "reference", splits)
    found = []
    with lanes() as pool:
        within_reference = _within(reference, of_reference, pool, progress)
        for samples in sets:
            of_samples = halves(len(samples), "samples", splits)
            across = _across(samples, reference, of_samples, of_reference, pool, progress)
            values = _within(samples, of_samples, pool, progress) + within_reference - 2 * across
            found.append(values.view(-1, 2))
    return found


def _within(x: Tensor, members: Tensor, pool: Executor, progress: Progress) -> Tensor:
    """Mean of the kernel over pairs of two different features of a half, for each half: (H,) float64."""
    counts = members.sum(1, dtype=torch.float64)
    itself = torch.cat([(rows.double().square().sum(1) / x.shape[1] + 1) ** 3 for rows in torch.split(x, ROWS)])
    columns = members.double().T

    def of_block(start: int) -> Tensor:
        block = kernel(x[start : start + ROWS], x[start:]).double()
        # Every pair of two blocks is here once.
        block[:, ROWS:] *= 2
        return (members[:, start : start + ROWS].T * (block @ columns[start:])).sum(0)

    sums = _added(of_block, len(x), pool, progress)
    return (sums - members.double() @ itself) / (counts * (counts - 1))


def _across(x: Tensor, y: Tensor, of_x: Tensor, of_y: Tensor, pool: Executor, progress: Progress) -> Tensor:
    """Mean of the kernel over x in a half of its set and y in the same half of its, for each half: (H,) float64."""
    columns = of_y.double().T

    def of_block(start: int) -> Tensor:
        rows = slice(start, start + ROWS)
        return (of_x[:, rows].T * (kernel(x[rows], y).double() @ columns)).sum(0)

    return _added(of_block, len(x), pool, progress) / (of_x.sum(1, dtype=torch.float64) * of_y.sum(1))


def _added(of_block: Callable[[int], Tensor], count: int, pool: Executor, progress: Progress) -> Tensor:
    """The sum over blocks of ROWS of ``count``, in their order, whichever is done first.

    Thousands of millions of single-precision kernels would leave no digit of a small distance: sums are double.
    """
    starts = range(0, count, ROWS)
    total = torch.zeros((), dtype=torch.float64)
    for start, found in zip(starts, pool.map(of_block, starts), strict=True):
        total = total + found
        progress("KID of halves", min(start + ROWS, count), count)
    return total
