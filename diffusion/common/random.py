"""Counter-based random numbers: pure functions of (seed, stream, index), by Philox (Salmon et al., SC 2011).

The index counts images, in training or in a sampling batch, so workers, ranks, chunks and restarts do not change them.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from diffusion.common.files import sha256_bytes

WHOLE = 2**24
"""Length up to which a ``Permutation`` is sampled whole, in 8 bytes per element."""
ROUNDS = 8
"""Rounds of the Feistel network of longer ones."""


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


class Permutation:
    """A permutation of 0 … length−1 of which any elements can be looked up: ``permutation`` up to WHOLE elements.

    Longer ones take constant memory: a Feistel network on pairs of digits in base ``side`` = ⌈√length⌉ permutes the
    numbers below side², and one that leaves the range goes through it again (Black and Rogaway, CT-RSA 2002).
    """

    def __init__(self, seed: int, stream: str, index: int, length: int) -> None:
        self.length = length
        self.whole = permutation(seed, stream, index, length) if length <= WHOLE else None
        self.side = math.isqrt(max(length - 1, 0)) + 1
        self.keys = generator(seed, stream, index).integers(2**64, size=ROUNDS, dtype=np.uint64)

    def __getitem__(self, places: np.ndarray) -> np.ndarray:
        """Return the elements at ``places``, integers in [0, length) of any shape, as int64."""
        if self.whole is not None:
            return np.take(self.whole, places)
        values = self._network(np.asarray(places, np.uint64))
        # Fewer than 2 √length of side² numbers are out of range.
        while (is_outside := values >= self.length).any():
            values[is_outside] = self._network(values[is_outside])
        return values.astype(np.int64)

    def _network(self, values: np.ndarray) -> np.ndarray:
        left, right = np.divmod(values, np.uint64(self.side))
        for key in self.keys:
            left, right = right, (left + _mix(right ^ key) % np.uint64(self.side)) % np.uint64(self.side)
        output: np.ndarray = left * np.uint64(self.side) + right
        return output


def _mix(values: np.ndarray) -> np.ndarray:
    """Mix the bits of uint64 numbers: the finalizer of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    bits: np.ndarray = values ^ (values >> np.uint64(31))
    return bits


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
        noise = [rng.standard_normal(self.shape, dtype=np.float32) for rng in self.generators]
        return torch.from_numpy(np.stack(noise))
