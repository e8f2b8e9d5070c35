"""Small images that tests draw: blobs and discs."""

import numpy as np
from PIL import Image


def blob(seed: int, size: int = 12, mode: str = "L") -> Image.Image:
    """An image unlike all others: smooth noise, by seed."""
    random = np.random.default_rng(seed)
    small = random.integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((size, size), Image.Resampling.BICUBIC).convert(mode)


def disc(seed: int, size: int = 12) -> Image.Image:
    """A white disc somewhere on black: nothing that noise could be taken for."""
    x, y, radius = np.random.default_rng(seed).uniform([3, 3, 2], [size - 3, size - 3, 4])
    rows, columns = np.mgrid[:size, :size]
    inside = np.clip(radius + 0.5 - np.hypot(rows - y, columns - x), 0, 1)
    return Image.fromarray((inside * 255).astype(np.uint8))
