"""Buckets: the few shapes, of about equal area, in which images that are not square are stored."""

import math
from collections import Counter
from collections.abc import Sequence
from itertools import product

import numpy as np

from diffusion.common.shapes import Shape

MAX_BUCKETS = 8
"""Maximum number of buckets that are chosen from the data."""
MAX_ASPECT = 4
"""Largest aspect ratio of a chosen bucket."""
MIN_GAIN = 0.01
"""Smallest share of all pixels that a chosen bucket saves from being cropped."""
MAX_DEVIATION = 0.125
"""Largest deviation of a chosen bucket's area from the square's."""


def kept_share(width: int, height: int, shape: Shape) -> float:
    """Return the share of an image's pixels that cropping it to the aspect ratio of ``shape`` keeps."""
    # Both are integers, so that equal ratios compare as equal.
    one, other = width * shape[0], height * shape[1]
    return min(one, other) / max(one, other)


def nearest_shape(width: int, height: int, shapes: Sequence[Shape]) -> Shape:
    """Return the one of ``shapes`` whose aspect ratio is nearest: the first of those that keep most of the image."""
    return max(shapes, key=lambda shape: kept_share(width, height, shape))


def possible_shapes(size: int) -> list[Shape]:
    """Return the shapes (H, W) of about ``size``² pixels, the narrowest first.

    Sides are multiples of 8, of ``size`` / 16 for large images, or of as large a power of two as ``size`` is: networks
    halve them several times.
    """
    step = math.gcd(size, max(8, 1 << max((size // 16).bit_length() - 1, 0)))
    sides = [side for side in range(step, 2 * size + 1, step) if side >= 8]
    shapes = [
        (height, width)
        for height, width in product(sides, sides)
        if max(height, width) <= MAX_ASPECT * min(height, width)
        and abs(height * width - size**2) <= MAX_DEVIATION * size**2
    ]
    return sorted(shapes, key=lambda shape: (shape[1] / shape[0], abs(shape[0] * shape[1] - size**2)))


def choose_shapes(sizes: Sequence[tuple[int, int]], size: int) -> list[Shape]:
    """Choose at most MAX_BUCKETS shapes for images of ``sizes`` (width, height), in any order: the narrowest first.

    Of all possible ones, those are left out in turn without which the least is cropped.
    """
    shapes = possible_shapes(size)
    counts = sorted(Counter(sizes).items())
    weights = np.array([count for _, count in counts], np.float64)
    shares = np.array([[kept_share(*sides, shape) for shape in shapes] for sides, _ in counts]).reshape(-1, len(shapes))
    # Without the most extreme ones first, where nothing else decides.
    numbers = sorted(range(len(shapes)), key=lambda number: kept_share(1, 1, shapes[number]))
    while len(numbers) > 1:
        best = shares[:, numbers].max(1)
        losses = [
            round(float(weights @ (best - shares[:, [other for other in numbers if other != number]].max(1))), 6)
            for number in numbers
        ]
        if min(losses) >= MIN_GAIN * weights.sum() > 0 and len(numbers) <= MAX_BUCKETS:
            break
        numbers.pop(losses.index(min(losses)))
    return [shapes[number] for number in sorted(numbers)]
