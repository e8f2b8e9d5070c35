"""KID: the squared maximum mean discrepancy under a polynomial kernel (arXiv 1801.01401), over random subsets."""

import numpy as np
import torch
from torch import Tensor

from diffusion.lanes import lanes

SUBSETS_SEED = 2020
"""Of the subsets: torch-fidelity's own default, part of what its figures mean."""


def kid(samples: Tensor, reference: Tensor, subsets: int, size: int) -> tuple[float, float]:
    """Mean and standard deviation of ``discrepancy`` over random subsets of ``size`` features of either side.

    The subsets of features (N, D) and (M, D) are torch-fidelity's. So are the figures, from products that do not wait
    for each other where other work keeps the cores busy.
    """
    random = np.random.RandomState(SUBSETS_SEED)
    counts = len(samples), len(reference)
    chosen = [[random.choice(count, size, replace=False) for count in counts] for _ in range(subsets)]

    def of_subset(rows: list[np.ndarray]) -> float:
        first, second = (torch.from_numpy(each) for each in rows)
        return discrepancy(samples[first], reference[second])

    with lanes() as pool:
        found = np.array(list(pool.map(of_subset, chosen)))
    return float(found.mean()), float(found.std())


def discrepancy(x: Tensor, y: Tensor) -> float:
    """Of features (n, D) and (m, D), without bias: pairs of one with itself do not count."""
    within = sum(
        (float(each.sum(dtype=torch.float64)) - float(each.diagonal().sum(dtype=torch.float64)))
        / (len(each) * (len(each) - 1))
        for each in (kernel(x, x), kernel(y, y))
    )
    return within - 2 * float(kernel(x, y).mean(dtype=torch.float64))


def kernel(x: Tensor, y: Tensor) -> Tensor:
    """(x·y/D + 1)³ of all pairs of features (n, D) and (m, D): (n, m)."""
    base = (x @ y.T).div_(x.shape[1]).add_(1)
    return base.square().mul_(base)
