"""In which order training sees the pictures."""

from functools import lru_cache
from typing import Protocol

import numpy as np

from diffusion.random import permutation


class Order(Protocol):
    """An endless sequence of sample indices in which each epoch shows every sample once.

    It is a pure function of what it was made with; a position in it is a single integer, the number of
    pictures seen so far, so going on from anywhere costs nothing.
    """

    def rows(self, start: int, count: int) -> np.ndarray:
        """Which samples stand at positions start … start+count−1, as (count,) int64."""

    def coming(self, start: int) -> tuple[int, ...] | None:
        """The shards that are needed from ``start`` on, soonest first; None: any of them at any time."""


class TrainingOrder:
    """A fresh permutation of all samples each epoch: a pure function of (content digest, seed)."""

    def __init__(self, content_digest: str, seed: int, length: int) -> None:
        self.length = length
        self._epoch = lru_cache(maxsize=2)(lambda epoch: permutation(seed, f"order/{content_digest}", epoch, length))

    def rows(self, start: int, count: int) -> np.ndarray:
        """Which of the ``length`` samples stand at positions start … start+count−1, as (count,) int64."""
        epoch, offset = divmod(start, self.length)
        pieces = [self._epoch(epoch)[offset : offset + count]]
        while (missing := count - sum(map(len, pieces))) > 0:
            epoch += 1
            pieces.append(self._epoch(epoch)[:missing])
        return np.concatenate(pieces)

    def coming(self, start: int) -> None:
        """Any shard, at any time."""


class WindowedOrder:
    """Shards in a fresh order each epoch, and samples permuted within windows of ``window`` consecutive shards.

    For sets whose shards do not all fit where they can be read from: at any position only the shards of one
    window are needed, and which ones come next is known. A pure function of (layout digest, seed, window).

    ``shards``: the number of the shard that each sample lies in, (N,) integers.
    """

    def __init__(self, layout_digest: str, seed: int, window: int, shards: np.ndarray) -> None:
        self.length = len(shards)
        self._layout_digest, self._seed, self._window = layout_digest, seed, window
        self._numbers, counts = np.unique(shards, return_counts=True)
        self._by_shard = np.split(np.argsort(shards, kind="stable"), np.cumsum(counts)[:-1])
        self._epoch = lru_cache(maxsize=2)(self._shards_and_ends)
        self._samples = lru_cache(maxsize=4)(self._window_samples)

    def rows(self, start: int, count: int) -> np.ndarray:
        """Which of the samples stand at positions start … start+count−1, as (count,) int64."""
        epoch, number, offset = self._find(start)
        pieces = [self._samples(epoch, number)[offset : offset + count]]
        while (missing := count - sum(map(len, pieces))) > 0:
            epoch, number = self._after(epoch, number)
            pieces.append(self._samples(epoch, number)[:missing])
        return np.concatenate(pieces)

    def coming(self, start: int) -> tuple[int, ...]:
        """The shards of the window that position ``start`` lies in, then those of the next window."""
        epoch, number, _ = self._find(start)
        shards = np.concatenate([self._places(epoch, number), self._places(*self._after(epoch, number))])
        return tuple(dict.fromkeys(self._numbers[shards].tolist()))

    def _find(self, position: int) -> tuple[int, int, int]:
        """The epoch and window that ``position`` lies in, and its place in the window."""
        epoch, offset = divmod(position, self.length)
        ends = self._epoch(epoch)[1]
        number = int(np.searchsorted(ends, offset, side="right"))
        return epoch, number, offset - (int(ends[number - 1]) if number else 0)

    def _after(self, epoch: int, number: int) -> tuple[int, int]:
        return (epoch, number + 1) if number + 1 < len(self._epoch(epoch)[1]) else (epoch + 1, 0)

    def _shards_and_ends(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The epoch's order of shards, and after how many samples each of its windows ends."""
        shards = permutation(self._seed, f"shards/{self._layout_digest}", epoch, len(self._by_shard))
        counts = np.array([len(self._by_shard[shard]) for shard in shards])
        return shards, np.cumsum(np.add.reduceat(counts, np.arange(0, len(counts), self._window)))

    def _places(self, epoch: int, number: int) -> np.ndarray:
        shards: np.ndarray = self._epoch(epoch)[0][number * self._window : (number + 1) * self._window]
        return shards

    def _window_samples(self, epoch: int, number: int) -> np.ndarray:
        samples = np.concatenate([self._by_shard[shard] for shard in self._places(epoch, number)])
        stream = f"window/{self._layout_digest}/{epoch}"
        return np.take(samples, permutation(self._seed, stream, number, len(samples)))
