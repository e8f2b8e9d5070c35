"""Batches of training pictures, made ready ahead of the step that wants them."""

import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor

from diffusion.data.dataset import Dataset, Rows
from diffusion.data.order import Order
from diffusion.errors import UserError
from diffusion.random import uniform


@dataclass(frozen=True)
class Batch:
    """What one rank trains on in one step; B is the batch size divided by the number of ranks."""

    indices: range
    """The global sample indices, B of them: all that is random about a picture is drawn by its own."""
    rows: np.ndarray
    """The data set's rows, (B,) int64."""
    pictures: Tensor
    """(B, C, H, W) uint8, in memory channels last, as networks want them."""


class Loader:
    """Gives for a position in the order of training one rank's share of the batch that begins there.

    A pure function of dataset, order, position and what else it is made with: neither the number of workers
    nor where one began to read changes a bit. All ranks get equally large shares, which make up the batch
    that one rank alone would get. Batches asked for one after the other were made ready in the background.

    ``rows``: the data set's rows that ``order`` orders. ``flip_seed``: every second picture is mirrored, chosen
    by this seed and the picture's global index; None: none is. ``prefetch``: batches made ready ahead, by
    ``workers`` threads. Raises UserError if ``ranks`` does not divide ``batch_size``.
    """

    def __init__(
        self,
        dataset: Dataset,
        rows: Rows,
        order: Order,
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
        self.order = order
        self.batch_size = batch_size
        self.rank = rank
        self.share = batch_size // ranks
        self.flip_seed = flip_seed
        self.prefetch = prefetch
        self.waited = 0.0
        """Seconds that callers of ``batch`` have waited so far."""
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="loader")
        self._ready: dict[int, Future[Batch]] = {}
        self._shards: tuple[int, ...] | None = ()

    def batch(self, position: int, end: int | None = None) -> Batch:
        """This rank's share of the batch that begins at ``position``; nothing is made ready beyond ``end``."""
        began = time.perf_counter()
        self.ahead(position, end)
        try:
            return self._ready.pop(position).result()
        finally:
            self.waited += time.perf_counter() - began

    def ahead(self, position: int, end: int | None = None) -> None:
        """Begin to make ready the batch at ``position`` and those that follow it, and forget all others."""
        self._announce(position)
        following = range(position, position + (self.prefetch + 1) * self.batch_size, self.batch_size)
        wanted = [at for at in following if end is None or at < end or at == position]
        for at in self._ready.keys() - wanted:
            self._ready.pop(at).cancel()
        for at in wanted:
            if at not in self._ready:
                self._ready[at] = self._pool.submit(self._make, at)

    def close(self) -> None:
        """Stop working ahead."""
        self._pool.shutdown(cancel_futures=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _announce(self, position: int) -> None:
        """Tell the data set which shards come next, whenever that changes."""
        coming = self.order.coming(position)
        if coming != self._shards:
            self.dataset.ahead(coming)
            self._shards = coming

    def _make(self, position: int) -> Batch:
        start = position + self.rank * self.share
        indices = range(start, start + self.share)
        rows = self.rows[self.order.rows(start, self.share)]
        pixels = self.dataset.pixels(rows)
        if self.flip_seed is not None:
            flipped = (uniform(self.flip_seed, "flip", indices) < 0.5).numpy()
            pixels[flipped] = pixels[flipped, :, ::-1]
        return Batch(indices, rows, torch.from_numpy(pixels).permute(0, 3, 1, 2))
