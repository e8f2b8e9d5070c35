"""Loader of training batches in their order, prepared ahead of the step."""

import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import translate
from fractions import Fraction
from functools import lru_cache
from itertools import zip_longest
from typing import Self

import numpy as np
import torch
from torch import Tensor

from diffusion.common.errors import UserError
from diffusion.common.random import Permutation, generator, permutation, uniform
from diffusion.common.shapes import shape_name
from diffusion.data.dataset import Dataset, Rows, ShardSamples


class TrainingOrder:
    """An endless sequence of sample indices, in which each epoch shows every sample once, in a fresh permutation.

    A pure function of (content digest, seed). A position is the number of images seen so far, so resuming is free.

    ``samples``: those in this order, (length,) int64; None: 0 … length−1.
    """

    def __init__(self, content_digest: str, seed: int, length: int, samples: np.ndarray | None = None) -> None:
        self.length, self._samples = length, samples
        self._permutation = lru_cache(maxsize=2)(
            lambda epoch: Permutation(seed, f"order/{content_digest}", epoch, length)
        )

    def rows(self, start: int, count: int) -> np.ndarray:
        """Return the samples at positions start … start+count−1, as (count,) int64."""
        pieces = []
        while count > 0:
            pieces.append(self._piece(start, count))
            start, count = start + len(pieces[-1]), count - len(pieces[-1])
        return np.concatenate(pieces)

    def list_upcoming_shards(self, start: int) -> tuple[int, ...] | None:
        """Return the shards needed from ``start`` on, soonest first; None: any of them at any time."""
        return None

    def _piece(self, position: int, max_count: int) -> np.ndarray:
        """Return the next samples from ``position`` on: ``max_count`` of them, or fewer, but one."""
        epoch, offset = divmod(position, self.length)
        numbers = self._permutation(epoch)[np.arange(offset, min(offset + max_count, self.length))]
        return numbers if self._samples is None else np.take(self._samples, numbers)


class WindowedOrder(TrainingOrder):
    """Shards in a fresh order each epoch, and samples permuted within windows of ``window`` consecutive shards.

    For data sets larger than the shard cache: at any position only the shards of one window are needed, and the next
    ones are known. A pure function of (layout digest, seed, window). Memory grows with a window and with the number of
    shards, not of samples.

    ``shards``: numbers of those whose samples are in this order, sorted; None: all.
    """

    def __init__(
        self, layout_digest: str, seed: int, window: int, by_shard: ShardSamples, shards: np.ndarray | None = None
    ) -> None:
        counts = by_shard.counts
        numbers = np.arange(len(counts)) if shards is None else shards
        self._numbers = numbers[counts[numbers] > 0]
        self._counts, self._ends = counts[self._numbers], np.cumsum(counts)[self._numbers]
        super().__init__(layout_digest, seed, int(self._counts.sum()))
        self._by_shard = by_shard
        self._layout_digest, self._seed, self._shards_each = layout_digest, seed, window
        self._epoch = lru_cache(maxsize=2)(self._shards_and_ends)
        self._window = lru_cache(maxsize=4)(self._permute)

    def list_upcoming_shards(self, start: int) -> tuple[int, ...]:
        """Return the shards of the window at position ``start``, then those of the next window."""
        positions, shards = self.window(start)
        return tuple(dict.fromkeys([*shards.tolist(), *self.window(positions.stop)[1].tolist()]))

    def window(self, position: int) -> tuple[range, np.ndarray]:
        """Return the positions of the window around ``position``, and its shards, in their order: (W,) int64."""
        epoch, window, offset = self._find(position)
        shards, first = self._shards_of(epoch, window), position - offset
        return range(first, first + int(self._counts[shards].sum())), self._numbers[shards]

    def _find(self, position: int) -> tuple[int, int, int]:
        """Return epoch and window of ``position``, and its place in the window."""
        epoch, offset = divmod(position, self.length)
        ends = self._epoch(epoch)[1]
        window = int(np.searchsorted(ends, offset, side="right"))
        return epoch, window, offset - (int(ends[window - 1]) if window else 0)

    def _piece(self, position: int, max_count: int) -> np.ndarray:
        epoch, window, offset = self._find(position)
        return self._window(epoch, window)[offset : offset + max_count]

    def _shards_and_ends(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the epoch's order of shards, and the cumulative number of samples at the end of each window."""
        shards = permutation(self._seed, f"shards/{self._layout_digest}", epoch, len(self._counts))
        counts = self._counts[shards]
        return shards, np.cumsum(np.add.reduceat(counts, np.arange(0, len(counts), self._shards_each)))

    def _shards_of(self, epoch: int, window: int) -> np.ndarray:
        shards: np.ndarray = self._epoch(epoch)[0][window * self._shards_each : (window + 1) * self._shards_each]
        return shards

    def _permute(self, epoch: int, window: int) -> np.ndarray:
        shards = self._shards_of(epoch, window)
        ends, counts = self._ends[shards], self._counts[shards]
        samples = np.concatenate([self._by_shard.samples[a:b] for a, b in zip(ends - counts, ends, strict=True)])
        return np.take(samples, permutation(self._seed, f"window/{self._layout_digest}/{epoch}", window, len(samples)))


class BucketedOrder(TrainingOrder):
    """Batches of one bucket each: the buckets take turns in proportion to their samples.

    Each bucket has an order of its own, in which each of its epochs shows every sample once. A pure function of the
    arguments: how many batches of a bucket precede a position is computed and not counted. It is always within as many
    batches of its share as there are other buckets.

    ``orders``: order of the samples of each bucket.
    """

    def __init__(self, seed: int, batch_size: int, orders: Sequence[TrainingOrder]) -> None:
        self.length = sum(order.length for order in orders)
        self._batch_size, self._orders = batch_size, orders
        self._phases, rest = list[int](), self.length
        for bucket, order in enumerate(orders):
            self._phases.append(int(generator(seed, "buckets", bucket).integers(rest)))
            rest -= order.length

    def list_upcoming_shards(self, start: int) -> tuple[int, ...] | None:
        """Return the shards needed by all buckets from ``start`` on, about the soonest first."""
        batches = self._count_batches(start // self._batch_size)
        pairs = zip(self._orders, batches, strict=True)
        sequences = [order.list_upcoming_shards(count * self._batch_size) for order, count in pairs]
        shards = [sequence for sequence in sequences if sequence is not None]
        if not shards:
            return None
        return tuple(dict.fromkeys(shard for group in zip_longest(*shards) for shard in group if shard is not None))

    def _count_batches(self, batch: int) -> list[int]:
        """Return how many of the first ``batch`` batches are of each bucket."""
        counts, rest = list[int](), self.length
        for order, phase in zip(self._orders, self._phases, strict=True):
            # One bucket against all that follow it; these share what is left in the same way.
            counts.append((batch * order.length + phase) // rest)
            batch, rest = batch - counts[-1], rest - order.length
        return counts

    def _piece(self, position: int, max_count: int) -> np.ndarray:
        batch, offset = divmod(position, self._batch_size)
        pairs = zip(self._count_batches(batch), self._count_batches(batch + 1), strict=True)
        bucket, batch_count = next((bucket, one) for bucket, (one, other) in enumerate(pairs) if other > one)
        count = min(max_count, self._batch_size - offset)
        return self._orders[bucket].rows(batch_count * self._batch_size + offset, count)


def count_repeats(dataset: Dataset, weights: Mapping[str, float]) -> np.ndarray:
    """Count how often each training image is in an epoch, (N,) int64: the least whole numbers in ratio of its weight.

    ``weights``: by patterns of names in the source, of which the first that fits counts; without any: 1. A pattern
    fits the whole name, or what follows a slash in it. Raises UserError for a pattern that fits no image.
    """
    # Rounded to a hundredth or a simple fraction.
    fractions = [Fraction(1), *(Fraction(weight).limit_denominator(100) for weight in weights.values())]
    unit = math.lcm(*(fraction.denominator for fraction in fractions))
    patterns = [re.compile(rf"(?:.*/)?{translate(pattern)}", re.DOTALL) for pattern in weights]
    names = dataset.sources(dataset.rows("train"))
    places = np.array(
        [next((place for place, each in enumerate(patterns, start=1) if each.match(name)), 0) for name in names]
    )
    for place, pattern in enumerate(weights, start=1):
        if not (places == place).any():
            raise UserError(
                f"training.weights has {pattern!r}, and no training image of data set {dataset.folder} that no pattern "
                f"before it fits is called so, but {names[0]!r}, for example: mend it, or leave it out"
            )
    repeats: np.ndarray = np.take([int(fraction * unit) for fraction in fractions], places)
    repeats //= np.gcd.reduce(repeats)
    return repeats


def make_order(
    dataset: Dataset,
    seed: int,
    batch_size: int,
    window: int | None = None,
    weights: Mapping[str, float] | None = None,
) -> TrainingOrder:
    """Make the order of the training images; ``window``: number of shards in a window, None: without windows.

    ``weights`` as for ``count_repeats``: images are in an epoch as often; None: once.
    """
    manifest, rows, by_shard = dataset.manifest, dataset.rows("train"), dataset.by_shard()
    repeats = None if weights is None else count_repeats(dataset, weights)
    if repeats is not None:
        shards_of_rows = np.repeat(dataset.shards(rows[by_shard.samples]), repeats[by_shard.samples])
        counts = np.bincount(shards_of_rows, minlength=len(by_shard.counts))
        by_shard = ShardSamples(np.repeat(by_shard.samples, repeats[by_shard.samples]), counts)

    def order_of(name: str = "", shards: np.ndarray | None = None, samples: np.ndarray | None = None) -> TrainingOrder:
        if window is not None:
            return WindowedOrder(manifest.layout_digest + name, seed, window, by_shard, shards)
        if repeats is not None:
            samples = np.arange(len(rows)) if samples is None else samples
            samples = np.repeat(samples, repeats[samples])
        length = len(rows) if samples is None else len(samples)
        return TrainingOrder(manifest.content_digest + name, seed, length, samples)

    if manifest.storage.buckets is None:
        return order_of()
    row_buckets = dataset.buckets(rows) if window is None else None
    orders = []
    for bucket in np.unique(dataset.shard_buckets[by_shard.counts > 0]).tolist():
        shards = np.flatnonzero(dataset.shard_buckets == bucket)
        samples = None if row_buckets is None else np.flatnonzero(row_buckets == bucket)
        orders.append(order_of(f"/{shape_name(dataset.shapes[bucket])}", shards, samples))
    return BucketedOrder(seed, batch_size, orders)


@dataclass(frozen=True)
class Batch:
    """The images of one rank in one step; B is the batch size divided by the number of ranks."""

    indices: range
    """Global sample indices, B of them, which seed the random numbers of each image."""
    rows: np.ndarray
    """The data set's rows, (B,) int64."""
    images: Tensor
    """(B, C, H, W) uint8, all of one bucket, channels last in memory; or their latents, float32."""
    masks: Tensor | None = None
    """(B, H, W) uint8; None: they are not asked for."""


def require_equal_shares(batch_size: int, ranks: int) -> None:
    """Raise UserError if ``ranks`` does not divide ``batch_size``."""
    if batch_size % ranks:
        raise UserError(
            f"training.batch_size = {batch_size} cannot be shared equally by {ranks} ranks: "
            f"make it a multiple of {ranks}"
        )


class Loader:
    """Loader of one rank's share of the batch that begins at a position in the order of training.

    Batches are a pure function of the arguments and the position, independent of the number of workers. The equal
    shares of all ranks make up the batch of a single rank. Consecutive batches are prepared in the background.

    ``rows``: the data set's rows that ``order`` orders. ``flip_seed``: half of the images are mirrored, chosen by this
    seed and the image's global index; None: none is. ``prefetch``: batches prepared ahead, by ``workers`` threads.
    ``latents``: latents of rows, mirrored or not, in place of the images. ``masks``: whether batches have masks.
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
        latents: Callable[[Rows, np.ndarray | None], Tensor] | None = None,
        masks: bool = False,
    ) -> None:
        require_equal_shares(batch_size, ranks)
        self.dataset = dataset
        self.rows = np.asarray(rows)
        self.order, self.batch_size, self.rank = order, batch_size, rank
        self.share = batch_size // ranks
        self.flip_seed, self._prefetch, self._latents, self._masks = flip_seed, prefetch, latents, masks
        self.waited = 0.0
        """Seconds that callers of ``batch`` have waited so far."""
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="loader")
        self._ready: dict[int, Future[Batch]] = {}
        self._shards: tuple[int, ...] | None = ()

    def batch(self, position: int, end: int | None = None) -> Batch:
        """Return this rank's share of the batch at ``position``; nothing is prepared beyond ``end``."""
        start = time.perf_counter()
        self.prefetch(position, end)
        try:
            return self._ready.pop(position).result()
        finally:
            self.waited += time.perf_counter() - start

    def prefetch(self, position: int, end: int | None = None) -> None:
        """Start to prepare the batch at ``position`` and those that follow it, and drop all others."""
        reads_shards = self._latents is None or self._masks
        if reads_shards and (shards := self.order.list_upcoming_shards(position)) != self._shards:
            self.dataset.prefetch(shards)
            self._shards = shards
        next_positions = range(position, position + (self._prefetch + 1) * self.batch_size, self.batch_size)
        positions = [start for start in next_positions if end is None or start < end or start == position]
        for start in self._ready.keys() - positions:
            self._ready.pop(start).cancel()
        for start in positions:
            if start not in self._ready:
                self._ready[start] = self._pool.submit(self._make, start)

    def close(self, wait: bool = True) -> None:
        """Stop preparing batches, and wait for those that have begun, unless ``wait`` is false."""
        self._pool.shutdown(wait, cancel_futures=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # A read may be what hangs.
        self.close(wait=kind is not KeyboardInterrupt)

    def _make(self, position: int) -> Batch:
        start = position + self.rank * self.share
        indices = range(start, start + self.share)
        rows = self.rows[self.order.rows(start, self.share)]
        flips = None if self.flip_seed is None else (uniform(self.flip_seed, "flip", indices) < 0.5).numpy()
        masks = None
        if self._masks:
            masks = torch.from_numpy(mirror(self.dataset.masks(rows), flips))
        if self._latents is not None:
            return Batch(indices, rows, self._latents(rows, flips), masks)
        pixels = mirror(self.dataset.pixels(rows), flips)
        return Batch(indices, rows, torch.from_numpy(pixels).permute(0, 3, 1, 2), masks)


def mirror(images: np.ndarray, flips: np.ndarray | None) -> np.ndarray:
    """Mirror the ``images``, (N, H, W, …), for which ``flips`` is true, in place."""
    if flips is not None:
        images[flips] = images[flips, :, ::-1]
    return images
