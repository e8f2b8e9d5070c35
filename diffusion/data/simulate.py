"""Simulator of streamed training: how long steps wait for data, on machines and data sets that need not exist.

A model of ``ShardCache``, ``WindowedOrder`` and ``Loader``: which shards are fetched, and when, follows from the order
of training and from the rules of the cache; the network, the disk and decoding are rates. Fetches share the network in
their order, two at a time; an image is decoded by one thread. Every node fetches every shard, as each of its ranks
takes a share of each batch. Bytes and hits are exact as long as no window is waited for.
"""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from humanize import naturalsize, precisedelta
from pydantic import Field, FiniteFloat

from diffusion.common.config import Config
from diffusion.common.errors import UserError
from diffusion.common.escaping import pluralize
from diffusion.data.dataset import ShardSamples
from diffusion.data.ingest.chunks import MAX_CHUNK_IMAGES
from diffusion.data.loader import WindowedOrder, require_equal_shares
from diffusion.data.manifest import Manifest

EXACT = 2**22
"""Images up to which it is known which shards each batch needs; beyond, it is taken to need all of its window."""
REPEATED = 1e-6
"""Share of a step by which times that repeat may differ."""
FETCHES = 2
"""Fetches of a shard cache at a time."""
MIN_SIMULATED = 2_000, 6
"""Minimum batches and windows simulated for each setting that is compared."""
DOUBLINGS = 6
"""Windows compared: the smallest one, and so often twice as many shards."""
ACCEPTABLE = 0.01
"""Share of the time that training may wait with the settings that are recommended."""


class Machines(Config):
    """The machines of a training."""

    nodes: int = Field(1, ge=1)
    ranks: int = Field(1, ge=1)
    """Processes on each node, which share its cache of shards."""
    bandwidth: FiniteFloat = Field(1.25e9, gt=0)
    """Bytes per second that a node gets from the remote."""
    latency: FiniteFloat = Field(0.05, ge=0)
    """Seconds from the request of a shard to its first byte."""
    disk_bytes: int = Field(10**12, gt=0)
    """Bytes that the cache may have on each node's disk."""
    disk_bandwidth: FiniteFloat = Field(2e9, gt=0)
    """Bytes per second that each node's disk reads or writes."""
    decode_rate: FiniteFloat = Field(1000.0, gt=0)
    """Images per second that a thread of the loader decodes."""
    step_seconds: FiniteFloat = Field(0.5, gt=0)
    """Seconds of a training step whose batch is ready."""


class Streaming(Config):
    """The fields of the section ``training`` that decide how data is streamed."""

    batch_size: int
    window: int
    stream_bytes: int
    prefetch: int
    workers: int
    seed: int


class Shards(NamedTuple):
    """The training images of a data set."""

    digest: str
    """Layout digest of the data set."""
    bytes: np.ndarray
    """Size of each shard, (S,) int64."""
    images: np.ndarray
    """Number of training images in each shard, (S,) int64."""

    @classmethod
    def from_manifest(cls, manifest: Manifest) -> "Shards":
        """Read the shards of a data set from its manifest; raises UserError if it has several buckets."""
        # Each bucket has windows of its own, so that other settings fit.
        if (buckets := len({part.shape for part in manifest.parts if part.shard is not None})) > 1:
            raise UserError(
                f"data set {manifest.name} has {buckets} buckets, which have windows of their own, and the simulator "
                "knows sets of one shape only: give --images and --bytes-per-image of one bucket"
            )
        parts = [(part.shard.bytes, part.splits.get("train", 0)) for part in manifest.parts if part.shard is not None]
        return cls(manifest.layout_digest, *np.array(parts, np.int64).reshape(-1, 2).T)

    @classmethod
    def make_equal(cls, images: int, bytes_per_image: int, shard_bytes: int) -> "Shards":
        """Make up equal shards of about ``shard_bytes``, with at most as many images as an ingest puts into one."""
        images_per_shard = min(max(1, shard_bytes // bytes_per_image), MAX_CHUNK_IMAGES)
        counts = np.full(-(-images // images_per_shard), images_per_shard)
        counts[-1] = images - images_per_shard * (len(counts) - 1)
        return cls("", counts * bytes_per_image, counts)

    def by_shard(self) -> ShardSamples:
        """Number the images shard by shard, so that each number tells its shard."""
        length = int(self.images.sum())
        # Beyond EXACT nobody looks at them.
        samples = np.arange(length) if length <= EXACT else np.broadcast_to(np.int64(0), length)
        return ShardSamples(samples, self.images)

    def two_windows(self, window: int) -> int:
        """Return the bytes of the two largest windows, which a cache must hold."""
        return int(np.sort(self.bytes)[::-1][: 2 * window].sum())


class Epoch(Config):
    """An epoch as simulated; bytes are of one node."""

    seconds: float
    waited: float
    """Seconds without a ready batch, except for the very first."""
    fetched_bytes: int
    fetched: int
    hits: int
    """Shards fetched, and those that were in the cache when a window first needed them."""

    @property
    def waiting(self) -> float:
        """Return the share of the time that training waits."""
        return self.waited / self.seconds if self.seconds else 0.0


class Simulation(Config):
    """A simulated training."""

    first_batch: float
    """Seconds until the first batch is ready, with an empty cache."""
    epochs: list[Epoch]

    @property
    def waiting(self) -> float:
        """Return the share of the time that training waits."""
        return sum(epoch.waited for epoch in self.epochs) / sum(epoch.seconds for epoch in self.epochs)


class Setting(Config):
    """A window, and how long training would wait with it."""

    window: int
    stream_bytes: int
    """Bytes of the two largest windows."""
    waiting: dict[float, float]
    """Share of the time that training waits, by bandwidth in bytes per second."""


class SmallestSettings(Config):
    """The smallest settings with which training hardly waits."""

    window: int
    stream_bytes: int
    prefetch: int
    waiting: float


class SimulationReport(Config):
    """What ``darkroom data simulate`` says."""

    images: int
    shards: int
    bytes: int
    machines: Machines
    streaming: Streaming
    seconds_per_step: dict[str, float]
    simulation: Simulation
    windows: list[Setting]
    smallest: SmallestSettings | None

    def lines(self) -> Iterator[str]:
        """Describe the training, and how its settings could be chosen."""
        machines, streaming, simulation = self.machines, self.streaming, self.simulation
        yield (
            f"data       {pluralize(self.images, 'training image')} in {pluralize(self.shards, 'shard')}, "
            f"{naturalsize(self.bytes)}, all of which each of {pluralize(machines.nodes, 'node')} fetches"
        )
        yield (
            f"settings   training.window={streaming.window} training.stream_bytes={streaming.stream_bytes} "
            f"training.prefetch={streaming.prefetch} training.workers={streaming.workers} "
            f"training.batch_size={streaming.batch_size}"
        )
        slowest = max(self.seconds_per_step, key=self.seconds_per_step.__getitem__)
        times = ", ".join(f"{name} {seconds:.3g} s" for name, seconds in self.seconds_per_step.items())
        yield f"each step  {times}: the limit is the {slowest}"
        yield f"start      {_duration(simulation.first_batch)} until the first batch, with an empty cache"
        for number, epoch in enumerate(simulation.epochs, 1):
            yield (
                f"epoch {number:<4} {_duration(epoch.seconds)}, {epoch.waiting:.1%} of it waiting "
                f"({_duration(epoch.waited)}); {naturalsize(epoch.fetched_bytes)} a node in "
                f"{pluralize(epoch.fetched, 'shard')}, {pluralize(epoch.hits, 'hit')}"
            )
        if self.smallest is not None:
            best = self.smallest
            yield (
                f"smallest   training.window={best.window} training.stream_bytes={best.stream_bytes} "
                f"training.prefetch={best.prefetch}: {best.waiting:.1%} waiting"
            )
        else:
            factor = self.seconds_per_step[slowest] / machines.step_seconds
            yield (
                f"smallest   none: the {slowest} would have to be {factor:.2g} times as fast"
                if slowest != "step"
                else "smallest   none of these windows"
            )
        if self.windows:
            rates = list(self.windows[0].waiting)
            yield "waiting    window     stream_bytes" + "".join(f"{naturalsize(rate) + '/s':>14}" for rate in rates)
        for row in self.windows:
            shares = "".join(f"{share:>14.1%}" for share in row.waiting.values())
            yield f"           {row.window:>6}{row.stream_bytes:>17,}{shares}"


def simulate_training(
    shards: Shards, machines: Machines, training: Mapping[str, Any], epochs: int = 1
) -> SimulationReport:
    """Simulate a training with the fields ``training`` of its section; a null window or cache is as small as suffices.

    Raises UserError if the settings do not fit each other, the machines, the data set or the disk.
    """
    require_equal_shares(training["batch_size"], machines.nodes * machines.ranks)
    min_window = smallest_window(shards, training["batch_size"], training["prefetch"])
    window = training["window"] or min_window
    window_fields = {"window": window, "stream_bytes": training["stream_bytes"] or shards.two_windows(window)}
    streaming = Streaming.model_validate({name: training[name] for name in Streaming.model_fields} | window_fields)
    if streaming.stream_bytes > machines.disk_bytes:
        raise UserError(
            f"training.stream_bytes is {streaming.stream_bytes}, but the disk has {machines.disk_bytes} bytes: "
            "lower it or training.window, or give --disk-bytes"
        )
    smallest = find_smallest(shards, machines, streaming)
    if smallest is not None and training["window"] is None and training["stream_bytes"] is None:
        streaming = _with_window(shards, streaming, max(smallest.window, min_window))
    return SimulationReport(
        images=int(shards.images.sum()),
        shards=len(shards.bytes),
        bytes=int(shards.bytes.sum()),
        machines=machines,
        streaming=streaming,
        seconds_per_step=seconds_per_step(shards, machines, streaming),
        simulation=simulate(shards, machines, streaming, epochs),
        windows=compare_windows(shards, machines, streaming),
        smallest=smallest,
    )


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    return precisedelta(seconds, minimum_unit="minutes", format="%d")


class _SimulatedCache:
    """A node's shards, and when they arrived or will."""

    def __init__(self, shards: Shards, machines: Machines, max_bytes: int) -> None:
        self._sizes, self._machines, self._max_bytes = shards.bytes.tolist(), machines, max_bytes
        self._shards: set[int] = set()
        self._requested: set[int] = set()
        self._link, self._fetchers = 0.0, [0.0] * FETCHES
        self.arrivals = np.zeros(len(shards.bytes))
        """Time at which each shard was there, (S,)."""
        self.last_use = np.zeros(len(shards.bytes), np.int64)
        """Number of the last batch that needed each shard, (S,)."""

    def request(self, shards: Sequence[int], batch: int, now: float) -> tuple[int, int, int]:
        """Fetch ``shards`` in their order, ``now``, for ``batch``; returns bytes and number fetched, and new hits."""
        fetched_bytes = fetched = hits = 0
        rate = min(self._machines.bandwidth, self._machines.disk_bandwidth)
        victims = iter(sorted(self._shards.difference(shards), key=lambda shard: (self.last_use[shard], shard)))
        used_bytes = sum(self._sizes[shard] for shard in self._shards)
        for shard in shards:
            if shard in self._shards:
                hits += shard not in self._requested
                continue
            size = self._sizes[shard]
            while used_bytes + size > self._max_bytes:
                victim = next(victims)
                self._shards.remove(victim)
                used_bytes -= self._sizes[victim]
            fetcher = self._fetchers.index(min(self._fetchers))
            self._link = max(max(self._fetchers[fetcher], now) + self._machines.latency, self._link) + size / rate
            self._fetchers[fetcher] = self.arrivals[shard] = self._link
            self._shards.add(shard)
            self.last_use[shard], used_bytes = batch, used_bytes + size
            fetched_bytes, fetched = fetched_bytes + size, fetched + 1
        self._requested = set(shards)
        return fetched_bytes, fetched, hits


def simulate(
    shards: Shards, machines: Machines, streaming: Streaming, epochs: int = 1, batches: int | None = None
) -> Simulation:
    """Simulate ``epochs`` of training from an empty cache, or their first ``batches``.

    Raises UserError if the cache does not hold two windows, or a window not the batches that are prefetched.
    """
    order, length, batch = _order(shards, streaming), int(shards.images.sum()), streaming.batch_size
    ends, cache = np.cumsum(shards.images), _SimulatedCache(shards, machines, streaming.stream_bytes)
    seconds = seconds_per_step(shards, machines, streaming)
    # A thread makes the share of one rank, and the disk of a node serves all its ranks.
    decoding, reading = seconds["decoding"] * streaming.workers, seconds["disk"]
    threads, disk = [0.0] * streaming.workers, 0.0
    submissions = deque([0.0] * (streaming.prefetch + 1), streaming.prefetch + 1)
    figures = np.zeros((epochs, 5))
    first_batch, now, number, position = 0.0, 0.0, 0, 0
    positions, window, next_window = range(0), np.empty(0, np.int64), np.empty(0, np.int64)
    steps: deque[tuple[float, float, np.ndarray]] = deque(maxlen=streaming.workers + 1)
    while position < epochs * length and number != batches:
        figure = figures[position // length]
        if position not in positions:
            positions, window = order.window(position)
            next_window = order.window(positions.stop)[1]
            figure[2:] += cache.request(order.list_upcoming_shards(position), number, now)
            steps.clear()
        submissions.append(now)
        if length <= EXACT:
            batch_shards = np.unique(np.searchsorted(ends, order.rows(position, batch), side="right"))
        else:
            batch_shards = window if position + batch <= positions.stop else np.concatenate([window, next_window])
        cache.last_use[batch_shards] = number
        thread = threads.index(min(threads))
        arrival, thread_start = float(cache.arrivals[batch_shards].max()), max(threads[thread], submissions[0])
        disk = max(disk, max(thread_start, arrival)) + reading
        threads[thread] = disk + decoding
        wait = max(0.0, threads[thread] - now)
        if number == 0:
            now, first_batch, wait = wait, wait, 0.0
        figure[:2] += wait + machines.step_seconds, wait
        now += wait + machines.step_seconds
        number, position = number + 1, position + batch
        if length <= EXACT or batch_shards is not window or arrival > thread_start:
            steps.clear()
            continue
        # With all shards there, times alone decide. Once they are, relative to now, what they were when each thread had
        # one batch less to make, they repeat to the window's end.
        steps.append((now, figure[1], np.array([*sorted(threads), disk, *submissions]) - now))
        first_now, first_wait, state = steps[0]
        if len(steps) > streaming.workers and np.abs(steps[-1][2] - state).max() < REPEATED * machines.step_seconds:
            batches_left = (positions.stop - position) // batch
            rounds = (batches_left if batches is None else min(batches_left, batches - number)) // streaming.workers
            skipped_batches, delay = rounds * streaming.workers, rounds * (now - first_now)
            figure[:2] += delay, rounds * (figure[1] - first_wait)
            threads, disk, now = [time + delay for time in threads], disk + delay, now + delay
            submissions.extend([time + delay for time in submissions])
            number, position = number + skipped_batches, position + skipped_batches * batch
            cache.last_use[window] = number - 1
            steps.clear()
    epochs_seen = [Epoch(**dict(zip(Epoch.model_fields, figure, strict=True))) for figure in figures.tolist()]
    return Simulation(first_batch=first_batch, epochs=epochs_seen)


def seconds_per_step(shards: Shards, machines: Machines, streaming: Streaming) -> dict[str, float]:
    """Return the seconds that the network, the disk, decoding and the step itself take for each batch, at best.

    Training cannot be faster than the slowest of them, whatever the settings.
    """
    length, total = int(shards.images.sum()), int(shards.bytes.sum())
    rate = min(machines.bandwidth, machines.disk_bandwidth)
    share = streaming.batch_size / length
    fetch_seconds = len(shards.bytes) * machines.latency + total / rate
    ranks = machines.nodes * machines.ranks
    return {
        "network": share * max(total / rate, fetch_seconds / FETCHES),
        "disk": share * total / (machines.nodes * machines.disk_bandwidth),
        "decoding": streaming.batch_size / (ranks * streaming.workers * machines.decode_rate),
        "step": machines.step_seconds,
    }


def smallest_window(shards: Shards, batch_size: int, prefetch: int) -> int:
    """Return the smallest window of whose successor no batch is prefetched before it is needed."""
    sums = np.cumsum(np.sort(shards.images))
    return min(int(np.searchsorted(sums, (prefetch + 1) * batch_size)) + 1, len(sums))


def compare_windows(shards: Shards, machines: Machines, streaming: Streaming) -> list[Setting]:
    """Simulate windows of increasing size, each with half, all and twice the bandwidth."""
    rates = [factor * machines.bandwidth for factor in (0.5, 1.0, 2.0)]
    return [
        Setting(
            window=window,
            stream_bytes=shards.two_windows(window),
            waiting={
                rate: _waiting_share(shards, machines.model_copy(update={"bandwidth": rate}), setting) for rate in rates
            },
        )
        for window in _windows(shards, machines, streaming)
        if (setting := _with_window(shards, streaming, window))
    ]


def find_smallest(shards: Shards, machines: Machines, streaming: Streaming) -> SmallestSettings | None:
    """Find the smallest window, and for it the smallest ``prefetch``, with which training hardly waits; None: none."""
    if max(seconds_per_step(shards, machines, streaming).values()) * (1 - ACCEPTABLE) > machines.step_seconds:
        return None
    for window in _windows(shards, machines, streaming.model_copy(update={"prefetch": streaming.workers})):
        prefetch = streaming.workers
        while window >= smallest_window(shards, streaming.batch_size, prefetch) and prefetch <= 64:
            setting = _with_window(shards, streaming.model_copy(update={"prefetch": prefetch}), window)
            if (waiting := _waiting_share(shards, machines, setting)) <= ACCEPTABLE:
                return SmallestSettings(
                    window=window, stream_bytes=setting.stream_bytes, prefetch=prefetch, waiting=waiting
                )
            prefetch *= 2
    return None


def _windows(shards: Shards, machines: Machines, streaming: Streaming) -> list[int]:
    min_window = smallest_window(shards, streaming.batch_size, streaming.prefetch)
    sizes = dict.fromkeys(min(min_window << doublings, len(shards.bytes)) for doublings in range(DOUBLINGS + 1))
    return [window for window in sizes if shards.two_windows(window) <= machines.disk_bytes]


def _with_window(shards: Shards, streaming: Streaming, window: int) -> Streaming:
    return streaming.model_copy(update={"window": window, "stream_bytes": shards.two_windows(window)})


def _waiting_share(shards: Shards, machines: Machines, streaming: Streaming) -> float:
    length = int(shards.images.sum())
    windows = -(-streaming.window * length // (len(shards.bytes) * streaming.batch_size))
    batches = max(MIN_SIMULATED[0], MIN_SIMULATED[1] * windows)
    return simulate(shards, machines, streaming, -(-batches * streaming.batch_size // length), batches).waiting


def _order(shards: Shards, streaming: Streaming) -> WindowedOrder:
    window_bytes, window = shards.two_windows(streaming.window), streaming.window
    if window_bytes > streaming.stream_bytes:
        raise UserError(
            f"two windows of training.window = {window} shards have up to {window_bytes} bytes and the cache holds "
            f"{streaming.stream_bytes}: raise training.stream_bytes to {window_bytes}, or lower training.window"
        )
    if window < (min_window := smallest_window(shards, streaming.batch_size, streaming.prefetch)):
        raise UserError(
            f"training.window = {window} shards may have fewer images than the {streaming.prefetch + 1} batches of "
            f"{streaming.batch_size} that the loader has at a time: set it to {min_window} or more, or lower "
            "training.prefetch"
        )
    return WindowedOrder(shards.digest, streaming.seed, window, shards.by_shard())
