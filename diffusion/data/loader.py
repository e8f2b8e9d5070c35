"""Loader of training batches in their order, prepared ahead of the step."""

import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Self

import numpy as np
import torch
from torch import Tensor

from diffusion.common.errors import UserError
from diffusion.common.random import permutation, uniform
from diffusion.data.dataset import Dataset, Rows


class TrainingOrder:
    """An endless sequence of sample indices, in which each epoch shows every sample once, in a fresh permutation.

    A pure function of (content digest, seed). A position is the number of images seen so far, so resuming is free.
    """

    def __init__(self, content_digest: str, seed: int, length: int) -> None:
        self.length = length
        self._permutation = lru_cache(maxsize=2)(
            lambda epoch: permutation(seed, f"order/{content_digest}", epoch, length)
        )

    def rows(self, start: int, count: int) -> np.ndarray:
        """Return which of the ``length`` samples are at positions start … start+count−1, as (count,) int64."""
        pieces = []
        while count > 0:
            samples, offset = self._at(start)
            pieces.append(samples[offset : offset + count])
            start, count = start + len(pieces[-1]), count - len(pieces[-1])
        return np.concatenate(pieces)

    def coming(self, start: int) -> tuple[int, ...] | None:
        """Return the shards needed from ``start`` on, soonest first; None: any of them at any time."""
        return None

    def _at(self, position: int) -> tuple[np.ndarray, int]:
        """Return a piece of the sequence that contains ``position``, and the place of ``position`` in it."""
        epoch, offset = divmod(position, self.length)
        return self._permutation(epoch), offset


class WindowedOrder(TrainingOrder):
    """Shards in a fresh order each epoch, and samples permuted within windows of ``window`` consecutive shards.

    For data sets larger than the shard cache: at any position only the shards of one window are needed, and the next
    ones are known. A pure function of (layout digest, seed, window).

    ``shards``: the number of the shard that each sample lies in, (N,) integers.
    """

    def __init__(self, layout_digest: str, seed: int, window: int, shards: np.ndarray) -> None:
        super().__init__(layout_digest, seed, len(shards))
        self._layout_digest, self._seed, self._shards_each = layout_digest, seed, window
        self._numbers, counts = np.unique(shards, return_counts=True)
        self._by_shard = np.split(np.argsort(shards, kind="stable"), np.cumsum(counts)[:-1])
        self._epoch = lru_cache(maxsize=2)(self._shards_and_ends)
        self._window = lru_cache(maxsize=4)(self._permuted)

    def coming(self, start: int) -> tuple[int, ...]:
        """Return the shards of the window at position ``start``, then those of the next window."""
        epoch, window, offset = self._find(start)
        behind = start - offset + len(self._window(epoch, window))
        shards = np.concatenate([self._shards_of(epoch, window), self._shards_of(*self._find(behind)[:2])])
        return tuple(dict.fromkeys(self._numbers[shards].tolist()))

    def _find(self, position: int) -> tuple[int, int, int]:
        """Return epoch and window of ``position``, and its place in the window."""
        epoch, offset = divmod(position, self.length)
        ends = self._epoch(epoch)[1]
        window = int(np.searchsorted(ends, offset, side="right"))
        return epoch, window, offset - (int(ends[window - 1]) if window else 0)

    def _at(self, position: int) -> tuple[np.ndarray, int]:
        epoch, window, offset = self._find(position)
        return self._window(epoch, window), offset

    def _shards_and_ends(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the epoch's order of shards, and the cumulative number of samples at the end of each window."""
        shards = permutation(self._seed, f"shards/{self._layout_digest}", epoch, len(self._by_shard))
        counts = np.array([len(self._by_shard[shard]) for shard in shards])
        return shards, np.cumsum(np.add.reduceat(counts, np.arange(0, len(counts), self._shards_each)))

    def _shards_of(self, epoch: int, window: int) -> np.ndarray:
        shards: np.ndarray = self._epoch(epoch)[0][window * self._shards_each : (window + 1) * self._shards_each]
        return shards

    def _permuted(self, epoch: int, window: int) -> np.ndarray:
        samples = np.concatenate([self._by_shard[shard] for shard in self._shards_of(epoch, window)])
        return np.take(samples, permutation(self._seed, f"window/{self._layout_digest}/{epoch}", window, len(samples)))


@dataclass(frozen=True)
class Batch:
    """The images of one rank in one step; B is the batch size divided by the number of ranks."""

    indices: range
    """Global sample indices, B of them, which seed the random numbers of each image."""
    rows: np.ndarray
    """The data set's rows, (B,) int64."""
    images: Tensor
    """(B, C, H, W) uint8, channels last in memory."""


class Loader:
    """Loader of one rank's share of the batch that begins at a position in the order of training.

    Batches are a pure function of the arguments and the position, independent of the number of workers. The equal
    shares of all ranks make up the batch of a single rank. Consecutive batches are prepared in the background.

    ``rows``: the data set's rows that ``order`` orders. ``flip_seed``: half of the images are mirrored, chosen by this
    seed and the image's global index; None: none is. ``prefetch``: batches prepared ahead, by ``workers`` threads.
    Raises UserError if ``ranks`` does not divide ``batch_size``.
    """

    def __init__(
        self,
        dataset: Dataset,
        rows: Rows,
        order: TrainingOrder,
        batch_size: int,
        *,
        rank: int = 0,
        ranks: int = 1,
        flip_seed: int | None = None,
        prefetch: int = 4,
        workers: int = 2,
    ) -> None:
        if batch_size % ranks:
            raise UserError(
                f"training.batch_size = {batch_size} cannot be shared equally by {ranks} ranks: "
                f"make it a multiple of {ranks}"
            )
        self.dataset = dataset
        self.rows = np.asarray(rows)
        self.order, self.batch_size, self.rank = order, batch_size, rank
        self.share = batch_size // ranks
        self.flip_seed, self._prefetch = flip_seed, prefetch
        self.waited = 0.0
        """Seconds that callers of ``batch`` have waited so far."""
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="loader")
        self._ready: dict[int, Future[Batch]] = {}
        self._shards: tuple[int, ...] | None = ()

    def batch(self, position: int, end: int | None = None) -> Batch:
        """Return this rank's share of the batch at ``position``; nothing is prepared beyond ``end``."""
        began = time.perf_counter()
        self.prefetch(position, end)
        try:
            return self._ready.pop(position).result()
        finally:
            self.waited += time.perf_counter() - began

    def prefetch(self, position: int, end: int | None = None) -> None:
        """Start to prepare the batch at ``position`` and those that follow it, and drop all others."""
        if (coming := self.order.coming(position)) != self._shards:
            self.dataset.prefetch(coming)
            self._shards = coming
        following = range(position, position + (self._prefetch + 1) * self.batch_size, self.batch_size)
        positions = [at for at in following if end is None or at < end or at == position]
        for at in self._ready.keys() - positions:
            self._ready.pop(at).cancel()
        for at in positions:
            if at not in self._ready:
                self._ready[at] = self._pool.submit(self._make, at)

    def close(self) -> None:
        """Stop preparing batches."""
        self._pool.shutdown(cancel_futures=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _make(self, position: int) -> Batch:
        start = position + self.rank * self.share
        indices = range(start, start + self.share)
        rows = self.rows[self.order.rows(start, self.share)]
        pixels = self.dataset.pixels(rows)
        if self.flip_seed is not None:
            flipped = (uniform(self.flip_seed, "flip", indices) < 0.5).numpy()
            pixels[flipped] = pixels[flipped, :, ::-1]
        return Batch(indices, rows, torch.from_numpy(pixels).permute(0, 3, 1, 2))
