"""Sets of Gaussian points, and the true distances between the distributions that they are drawn from."""

import numpy as np
import torch
from torch import Tensor


def sample_gaussian(count: int, dimensions: int, seed: int, shift: float = 0.0, scale: float = 1.0) -> Tensor:
    """Points from N(shift, scale² I): (count, dimensions) float32."""
    points = torch.randn(count, dimensions, generator=torch.Generator().manual_seed(seed))
    return points * scale + shift


def true_frechet(dimensions: int, shift: float, scale: float) -> float:
    """Of N(shift, scale² I) to N(0, I)."""
    return dimensions * (shift**2 + (scale - 1) ** 2)


def true_kid(dimensions: int, shift: float, scale: float) -> float:
    """Of N(shift, scale² I) to N(0, I), under the kernel (x·y/D + 1)³."""
    model, real = (np.full(dimensions, shift), scale**2), (np.zeros(dimensions), 1.0)
    return _mean_kernel(*model, *model) + _mean_kernel(*real, *real) - 2 * _mean_kernel(*model, *real)


def _mean_kernel(m: np.ndarray, v: float, n: np.ndarray, w: float) -> float:
    """E (x·y/D + 1)³ for independent x ~ N(m, v I) and y ~ N(n, w I), from the moments of x·y given y."""
    dimensions = len(m)
    first = m @ n
    second = first**2 + w * m @ m + v * n @ n + v * w * dimensions
    # x·y given y is N(m·y, v |y|²): E (m·y)³ + 3 E (m·y) v |y|².
    cube = first**3 + 3 * first * w * m @ m
    mixed = first * (n @ n + w * dimensions) + 2 * w * first
    third = cube + 3 * v * mixed
    return float(third / dimensions**3 + 3 * second / dimensions**2 + 3 * first / dimensions + 1)
