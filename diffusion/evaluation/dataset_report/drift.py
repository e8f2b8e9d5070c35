"""Whether the pictures that a version of a data set adds look like those that were there."""

import numpy as np
import torch
from torch import Tensor

from diffusion.config import Config
from diffusion.random import generator

RELABELLINGS = 499
"""Of the two-sample test: with it, the chance of a false alarm is 1 % at CHANCE."""
CHANCE = 0.99
"""Share of the relabellings that stay below what is said to be beyond chance."""


class Drift(Config):
    """How far added pictures lie from those of the parent, and how far those lie from one another."""

    extractor: str
    """Name of the features."""
    compared: int
    """Pictures on each side."""
    kid: float
    """Of the added pictures against some of the parent's: squared maximum mean discrepancy under (x·y/D + 1)³ (arXiv
    1801.01401), unbiased, over all pairs; 0 is best, and may come out slightly negative."""
    kid_floor: float
    """The same of other pictures of the parent."""
    kid_chance: float
    """What 99 of 100 random divisions of the pictures compared stay below: the two-sample test of Gretton et al. (JMLR
    13, 2012)."""
    fd: float
    """Fréchet distance (arXiv 1706.08500) of the same pictures: grows as they get fewer, so it needs its floor."""
    fd_floor: float
    told_apart: float
    """Share of the pictures whose nearest other one comes from their own side, 0 to 1: the leave-one-out accuracy of a
    nearest neighbour as two-sample test (arXiv 1610.06545); 0.5 if nothing tells the sides apart."""
    told_apart_floor: float

    @property
    def differs(self) -> bool:
        """Whether the added pictures differ from the parent's by more than chance gives."""
        return self.kid > self.kid_chance


def drift(added: Tensor, parent: Tensor, others: Tensor, extractor: str) -> tuple[Drift, np.ndarray]:
    """Compare features of ``added`` pictures with those of two disjoint samples of the parent's, each (n, D).

    Also returns the KID of every random division of ``added`` and ``parent``: (RELABELLINGS,) float64.
    """
    kernel, floor_kernel = (_kernel(torch.cat([each, parent])) for each in (added, others))
    count = len(added)
    first = torch.zeros(2 * count, RELABELLINGS, dtype=torch.float64)
    for number in range(RELABELLINGS):
        chosen = generator(0, "dataset report/relabelling", number).permutation(2 * count)[:count]
        first[chosen, number] = 1
    as_they_are = (torch.arange(2 * count) < count).double()[:, None]
    chances = _discrepancy(kernel, first)
    found = Drift(
        extractor=extractor,
        compared=count,
        kid=float(_discrepancy(kernel, as_they_are)),
        kid_floor=float(_discrepancy(floor_kernel, as_they_are)),
        kid_chance=float(chances.quantile(CHANCE, interpolation="higher")),
        fd=frechet_distance(added, parent),
        fd_floor=frechet_distance(others, parent),
        told_apart=_told_apart(kernel),
        told_apart_floor=_told_apart(floor_kernel),
    )
    return found, chances.numpy()


def frechet_distance(first: Tensor, second: Tensor) -> float:
    """Fréchet distance of Gaussians fitted to features (n, D) and (m, D).

    With Σ = XᵀX and Σ' = YᵀY of centred features, tr √(ΣΣ') is the sum of the singular values of XYᵀ: exact, and for
    fewer pictures than features some ten times as fast as a root of matrices of D × D.
    """
    means = [each.double().mean(0) for each in (first, second)]
    x, y = ((each.double() - mean) / np.sqrt(len(each) - 1) for each, mean in zip((first, second), means, strict=True))
    cross = np.linalg.norm((x @ y.T).numpy(), "nuc")
    return float((means[0] - means[1]).square().sum() + x.square().sum() + y.square().sum() - 2 * cross)


def _kernel(features: Tensor) -> Tensor:
    """The cubic kernel between all pairs, (n, n), zero between a picture and itself."""
    x = features.double()
    return ((x @ x.T / x.shape[1] + 1) ** 3).fill_diagonal_(0)


def _discrepancy(kernel: Tensor, first: Tensor) -> Tensor:
    """Unbiased squared discrepancy of each division of 2n pictures in halves; ``first``: (2n, divisions) of 0 and 1."""
    half = len(kernel) // 2
    to_first = kernel @ first
    within_first = (first * to_first).sum(0)
    across = ((1 - first) * to_first).sum(0)
    within_second = kernel.sum() - within_first - 2 * across
    return (within_first + within_second) / (half * (half - 1)) - 2 * across / half**2


def _told_apart(kernel: Tensor) -> float:
    # Of features of equal length the nearest have the largest kernel, and nowhere is it below that on the diagonal.
    nearest = kernel.argmax(1)
    side = torch.arange(len(kernel)) < len(kernel) // 2
    return float((side[nearest] == side).double().mean())
