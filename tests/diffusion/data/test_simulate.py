"""The simulator of streaming against real runs of the cache and the loader, and against arithmetic."""

import shutil
import time
from contextlib import closing
from itertools import pairwise
from pathlib import Path
from threading import Lock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusion.common.errors import UserError
from diffusion.data.dataset import Dataset
from diffusion.data.loader import Loader, WindowedOrder
from diffusion.data.manifest import FileEntry, Manifest
from diffusion.data.shards import ShardCache
from diffusion.data.simulate import (
    Machines,
    Shards,
    Simulation,
    Streaming,
    compare_windows,
    find_smallest,
    seconds_per_step,
    simulate,
    smallest_window,
)
from tests.builders.small_datasets import random_images, write_dataset

IMAGES, EACH, BATCH = 240, 10, 5


class Throttled:
    """A remote of shards with a latency, whose link takes one fetch at a time; it measures how long that took."""

    def __init__(self, folder: Path, latency: float = 0.0, transfer: float = 0.0) -> None:
        self.folder, self.latency, self.transfer = folder, latency, transfer
        self.link, self.fetched = Lock(), list[FileEntry]()
        self.late, self.busy = 0.0, 0.0

    def fetch(self, entry: FileEntry, path: Path) -> None:
        start = time.perf_counter()
        time.sleep(self.latency)
        self.late += time.perf_counter() - start
        with self.link:
            start = time.perf_counter()
            time.sleep(self.transfer)
            shutil.copyfile(self.folder / entry.name, path)
            self.fetched.append(entry)
            self.busy += time.perf_counter() - start


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    """240 training images in 24 shards."""
    return write_dataset(tmp_path / "set", random_images(IMAGES), per_shard=EACH, held_out_every=0)


def streaming(manifest: Manifest, window: int, room: int, prefetch: int = 2) -> Streaming:
    """With room for so many shards."""
    most = room * max(shard.bytes for shard in manifest.shards)
    return Streaming(batch_size=BATCH, window=window, stream_bytes=most, prefetch=prefetch, workers=1, seed=3)


class Run:
    """A real run of the loader over some epochs; without ``step`` no step begins before what is wanted is there."""

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        settings: Streaming,
        store: Throttled,
        epochs: int,
        step: float | None = None,
    ) -> None:
        cache = ShardCache(folder / "cache", store, settings.stream_bytes)
        self.stepping = 0.0
        with closing(Dataset.open(folder / "set", cache, cache_bytes=0)) as data:
            order = WindowedOrder(manifest.layout_digest, settings.seed, settings.window, data.by_shard())
            options = {"prefetch": settings.prefetch, "workers": settings.workers}
            with Loader(data, range(IMAGES), order, settings.batch_size, **options) as loader:
                for position in range(0, epochs * IMAGES, settings.batch_size):
                    rows = loader.batch(position).rows
                    if position == 0:
                        self.first = loader.waited
                    start = time.perf_counter()
                    shards = [
                        folder / "cache" / f"{manifest.shards[n].sha256}.tar"
                        for n in order.list_upcoming_shards(position)
                    ]
                    while step is None and not all(path.is_file() for path in shards):
                        time.sleep(0.002)
                    time.sleep(step or 0)
                    self.stepping += time.perf_counter() - start
                self.waited = loader.waited - self.first
                fetched = -1
                while fetched < len(store.fetched):  # those of the next window
                    fetched = len(store.fetched)
                    time.sleep(0.1 + 3 * store.transfer + 2 * store.latency)
                start = time.perf_counter()
                for _ in range(20):
                    data.pixels(rows)
                self.decoding = (time.perf_counter() - start) / 20


def totals(simulation: Simulation) -> tuple[int, int, int]:
    """Bytes, fetched shards and hits of all epochs."""
    epochs = simulation.epochs
    return sum(e.fetched_bytes for e in epochs), sum(e.fetched for e in epochs), sum(e.hits for e in epochs)


@pytest.mark.parametrize(("window", "room"), [(4, 8), (4, 13), (6, 12), (8, 20), (12, 24)])
def test_bytes_and_hits_are_those_of_a_real_run(tmp_path: Path, manifest: Manifest, window: int, room: int) -> None:
    settings, store = streaming(manifest, window, room), Throttled(tmp_path / "set")
    Run(tmp_path, manifest, settings, store, epochs=3)
    simulation = simulate(Shards.from_manifest(manifest), Machines(), settings, epochs=3)
    size, fetched, hits = totals(simulation)
    assert (size, fetched) == (sum(entry.bytes for entry in store.fetched), len(store.fetched))
    order = WindowedOrder(manifest.layout_digest, settings.seed, window, Shards.from_manifest(manifest).by_shard())
    shard_sets = [set(order.list_upcoming_shards(at)) for at in range(0, 3 * IMAGES, window * EACH)]
    new = len(shard_sets[0]) + sum(len(now - before) for before, now in pairwise(shard_sets))
    assert hits == new - fetched
    if room == 24:
        assert (fetched, hits) == (24, new - 24)


@pytest.mark.slow
@pytest.mark.long  # its sleeps and threads are compared by their real times, which other processes disturb
@pytest.mark.parametrize(("transfer", "step"), [(0.03, 0.006), (0.004, 0.012)])
def test_waiting_is_that_of_a_real_run(tmp_path: Path, manifest: Manifest, transfer: float, step: float) -> None:
    """The simulated machine is as fast as the real one was meanwhile: so the tolerance does not depend on its speed."""
    settings, store = streaming(manifest, 4, 8), Throttled(tmp_path / "set", 0.005, transfer)
    run = Run(tmp_path, manifest, settings, store, epochs=2, step=step)
    count = len(store.fetched)
    machines = Machines(
        latency=store.late / count,
        bandwidth=sum(entry.bytes for entry in store.fetched) / store.busy,
        decode_rate=BATCH / run.decoding,
        step_seconds=run.stepping / (2 * IMAGES / BATCH),
    )
    simulation = simulate(Shards.from_manifest(manifest), machines, settings, epochs=2)
    waited = sum(epoch.waited for epoch in simulation.epochs)
    assert abs(run.waited - waited) < 0.2 * (run.waited + run.stepping)
    assert abs(run.first - simulation.first_batch) < 0.2 * (run.waited + run.stepping)
    assert (simulation.waiting > 0.25) == (transfer == 0.03)


FAST = Machines(bandwidth=1e12, latency=0, disk_bandwidth=1e12, decode_rate=1e9, step_seconds=0.1)
BILLION = Shards.make_equal(10**9, 20_000, 64 * 2**20)
SETTINGS = Streaming(batch_size=4096, window=64, stream_bytes=10**10, prefetch=4, workers=2, seed=0)


@pytest.mark.parametrize(
    ("slow", "limit"),
    [
        ({"bandwidth": 4096 * 20_000 / 0.2}, "network"),
        ({"disk_bandwidth": 4096 * 20_000 / 0.2}, "disk"),
        ({"decode_rate": 4096 / 2 / 0.2}, "decoding"),
        ({"latency": 0.2 / 4096 * 3355 * 2}, "network"),
    ],
)
def test_loading_twice_as_slow_as_steps_waits_half_the_time(slow: dict[str, float], limit: str) -> None:
    machines = FAST.model_copy(update=slow)
    seconds = seconds_per_step(BILLION, machines, SETTINGS)
    assert seconds[limit] == max(seconds.values()) == pytest.approx(0.2, rel=1e-3)
    assert simulate(BILLION, machines, SETTINGS, batches=2000).waiting == pytest.approx(0.5, abs=0.03)
    assert find_smallest(BILLION, machines, SETTINGS) is None


def test_every_node_fetches_each_shard_of_a_billion_images_once() -> None:
    shards = Shards.make_equal(10**9, 20_000, 2**30)
    settings = SETTINGS.model_copy(update={"batch_size": 2**16, "window": 64, "stream_bytes": 40 * 2**30})
    (epoch,) = simulate(shards, FAST.model_copy(update={"nodes": 64, "ranks": 8}), settings).epochs
    ahead = shards.bytes[:64].sum()  # of the next epoch
    assert epoch.fetched_bytes == pytest.approx(10**9 * 20_000 + ahead, rel=1e-3)
    assert epoch.waited == 0
    assert epoch.seconds == pytest.approx(0.1 * 10**9 / 2**16, rel=1e-3)


@given(
    steps=st.tuples(*[st.sampled_from([0.7, 1.1, 10.0])] * 3),
    latency=st.sampled_from([0.0, 0.05]),
    workers=st.integers(1, 4),
    ahead=st.integers(0, 5),
    window=st.sampled_from([8, 30]),
    batches=st.sampled_from([None, 777]),
    uneven=st.booleans(),
)
@settings(max_examples=30, deadline=None)
def test_repeated_steps_count_as_if_simulated_one_by_one(
    steps: tuple[float, float, float],
    latency: float,
    workers: int,
    ahead: int,
    window: int,
    batches: int | None,
    uneven: bool,
) -> None:
    images = np.random.default_rng(0).integers(40_000, 80_000, 94) if uneven else np.full(94, 53_687)
    shards = Shards("", images * 20_000, images)
    network, disk, decoding = (1000 / 0.1 * factor for factor in steps)
    machines = Machines(
        bandwidth=network * 20_000,
        latency=latency,
        disk_bandwidth=disk * 20_000,
        decode_rate=decoding / workers,
        step_seconds=0.1,
    )
    stream_bytes = shards.two_windows(window)
    streaming = Streaming(
        batch_size=1000, window=window, stream_bytes=stream_bytes, prefetch=workers + ahead, workers=workers, seed=1
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("diffusion.data.simulate.REPEATED", 0)
        singly = simulate(shards, machines, streaming, 2, batches)
    simulation = simulate(shards, machines, streaming, 2, batches)
    assert simulation.first_batch == singly.first_batch
    for epoch, expected in zip(simulation.epochs, singly.epochs, strict=True):
        assert epoch.model_dump() == pytest.approx(expected.model_dump(), rel=1e-9, abs=1e-6)


def test_better_machines_and_larger_windows_never_wait_longer() -> None:
    slow = FAST.model_copy(update={"decode_rate": 4096 / 8 / 0.1, "bandwidth": 1.2 * 4096 * 20_000 / 0.1})
    waiting = [
        simulate(BILLION, slow.model_copy(update={"ranks": ranks}), SETTINGS, batches=1000).waiting
        for ranks in (1, 2, 4)
    ]
    assert waiting == sorted(waiting, reverse=True)
    assert waiting[-1] < 0.01
    rows = compare_windows(BILLION, slow.model_copy(update={"ranks": 8}), SETTINGS)
    assert [row.window for row in rows] == [7 * 2**n for n in range(7)]
    for row in rows:
        shares = list(row.waiting.values())
        assert shares == sorted(shares, reverse=True)
    simulation = find_smallest(BILLION, slow.model_copy(update={"ranks": 8}), SETTINGS)
    assert simulation is not None
    assert simulation.stream_bytes == BILLION.two_windows(simulation.window)
    assert simulation.waiting <= 0.01


def test_settings_that_thrash_are_rejected_with_the_least_that_works() -> None:
    assert smallest_window(BILLION, 4096, 4) == 7
    for name, value, least in (("window", 6, "set it to 7 or more"), ("stream_bytes", 10**9, "raise training.stream")):
        with pytest.raises(UserError, match=least):
            simulate(BILLION, FAST, SETTINGS.model_copy(update={name: value}))
