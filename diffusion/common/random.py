"""Counter-based random numbers: pure functions of (seed, stream, index), by Philox (Salmon et al., SC 2011).

The index counts images, in training or in a sampling batch, so workers, ranks, chunks and restarts do not change them.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from diffusion.common.files import sha256_bytes


def generator(seed: int, stream: str, index: int) -> np.random.Generator:
    """Create the generator for ``index`` of a named ``stream``; different arguments never overlap."""
    stream_key = int(sha256_bytes(stream.encode())[:16], 16)
    key = np.array([seed % 2**64, stream_key], dtype=np.uint64)
    # The two low words count the blocks within one index, so 2^128 of them are free of overlap.
    counter = np.array([0, 0, index, 0], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


def permutation(seed: int, stream: str, index: int, length: int) -> np.ndarray:
    """Sample a permutation of 0 … length−1 as (length,) int64."""
    return generator(seed, stream, index).permutation(length)


def uniform(seed: int, stream: str, indices: Sequence[int]) -> Tensor:
    """Sample one number in [0, 1) for each index, as (len(indices),) float64."""
    return torch.tensor([generator(seed, stream, index).random() for index in indices], dtype=torch.float64)


class GaussianNoise:
    """Standard Gaussian noise, an independent sequence for each image: (len(indices), *shape) float32 at each call."""

    def __init__(self, seed: int, stream: str, indices: Sequence[int], shape: tuple[int, ...]) -> None:
        self.generators = [generator(seed, stream, index) for index in indices]
        self.shape = shape

    def __call__(self) -> Tensor:
        """Sample the next noise of every image."""
        noise = [each.standard_normal(self.shape, dtype=np.float32) for each in self.generators]
        return torch.from_numpy(np.stack(noise))
