"""Mean and covariance of features, and the Fréchet distance between two such Gaussians."""

from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion.lanes import lanes
from diffusion.random import permutation

PIECE = 4096
"""Rows brought to double precision at a time."""
PER_FEATURE = 4
"""Pictures per feature from which on the distance is near enough to a line in 1/n to be extrapolated: halves then have
two per feature, and of the bias of independent Gaussian features less than a tenth is left."""


@dataclass(frozen=True)
class Moments:
    """The Gaussian fitted to some features."""

    count: int
    """Features that it was fitted to."""
    mean: Tensor
    """(D,) float64."""
    root: Tensor
    """(min(n, D), D) float64: rootᵀ·root is the covariance, divided by n − 1."""


def moments(features: Tensor) -> Moments:
    """Of features (N, D), N at least 2; the same bits however many cores there are."""
    pieces = torch.split(features, PIECE)
    with lanes(1):
        mean = sum((piece.double().sum(0) for piece in pieces), torch.zeros(features.shape[1], dtype=torch.float64))
        mean = mean / len(features)
        root = torch.empty(0, features.shape[1], dtype=torch.float64)
        for piece in pieces:
            # The R of QR is a root of XᵀX without XᵀX itself, whose small eigenvalues would be lost in rounding.
            root = torch.linalg.qr(torch.cat([root, piece.double() - mean]), mode="r").R
        # LAPACK's columns lie the other way, and what is read from a file must give the same bits as what is not.
        root = root.contiguous() / (len(features) - 1) ** 0.5
    return Moments(len(features), mean, root)


def distance(first: Moments, second: Moments) -> float:
    """The Fréchet distance |μ₁ − μ₂|² + tr(Σ₁ + Σ₂ − 2(Σ₁Σ₂)^½) between two Gaussians (arXiv 1706.08500)."""
    with lanes(1):
        # With Σ = RᵀR the eigenvalues of Σ₁Σ₂ are the squares of the singular values of R₁R₂ᵀ.
        shared = torch.linalg.svdvals(first.root @ second.root.T).sum()
        apart = (first.mean - second.mean).square().sum()
        return float(apart + first.root.square().sum() + second.root.square().sum() - 2 * shared)


def distance_at_infinity(samples: Tensor, reference: Moments) -> float | None:
    """What ``distance`` of features (N, D) to ``reference`` tends to as N grows; None if N is too small to say.

    The distance is biased by nearly a/N (arXiv 1911.07023, section 3). So it is measured at N and at N/2, as the mean
    over two halves chosen at random, and continued along a straight line to 1/N = 0: all pictures count alike, and the
    error is a small multiple of that of the distance itself. The bias that a finite reference brings is left: it is the
    same for all that is compared with it.
    """
    count = len(samples)
    if count < PER_FEATURE * samples.shape[1]:
        return None
    order = torch.from_numpy(permutation(0, "evaluation/halves", 0, count))
    half = count // 2
    of_halves = [distance(moments(samples[rows]), reference) for rows in (order[:half], order[half : 2 * half])]
    whole = distance(moments(samples), reference)
    return (count * whole - half * sum(of_halves) / 2) / (count - half)
