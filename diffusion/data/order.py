"""In which order training sees the pictures."""

from functools import lru_cache

import numpy as np

from diffusion.random import permutation


class TrainingOrder:
    """A fresh permutation each epoch, strung together into one endless sequence of sample indices.

    The order is a pure function of (content digest, seed); a position in it is a single integer, the
    number of pictures seen so far, so going on from anywhere costs nothing.
    """

    def __init__(self, content_digest: str, seed: int, length: int) -> None:
        self.length = length
        self._epoch = lru_cache(maxsize=2)(lambda epoch: permutation(seed, f"order/{content_digest}", epoch, length))

    def rows(self, start: int, count: int) -> np.ndarray:
        """Which of the ``length`` rows stand at positions start … start+count−1, as (count,) int64."""
        positions = np.arange(start, start + count)
        epochs, offsets = np.divmod(positions, self.length)
        return np.concatenate([self._epoch(int(e))[offsets[epochs == e]] for e in np.unique(epochs)])
