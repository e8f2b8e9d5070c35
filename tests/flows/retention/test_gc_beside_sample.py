"""``gc`` beside ``sample``: one stands still before any request while the other runs, or is killed there."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

from diffusion.generation.config import UNCONDITIONAL
from flows.config import RetentionConfig
from flows.retention.sweeps import SamplingBatches
from flows.sampling import generate_batch
from flows.sampling.batch_format import SamplingBatch
from flows.sampling.generate_batch import ImageGroup
from flows.storage.s3 import Location, Store
from tests.builders.gc_batches import BATCHES, generate
from tests.builders.sampling_batches import rows_of, stored_files

AT_ONCE = RetentionConfig(unfinished_days=0, batch_days=0, grace_hours=0)
"""Everything is old, whoever is at work on it, and goes without a grace."""
WAYS = [pytest.param(BATCHES[0], False, id="png-paused"), pytest.param(BATCHES[1], True, id="tar-killed")]


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No model: what is generated is no matter here, and takes no time."""

    def generated(sampling_batch: SamplingBatch, _: Path, indices: range, *__: object) -> Iterator[ImageGroup]:
        images = torch.arange(len(indices) * 64, dtype=torch.uint8).reshape(-1, 1, 8, 8)
        yield [(index, image, None, UNCONDITIONAL) for index, image in zip(indices, images, strict=True)]

    monkeypatch.setattr(generate_batch, "_generate", generated)
    return tmp_path / "weights.safetensors"


def collect(store: Store, bucket: str) -> None:
    """What ``gc`` does about batches, a minute from now."""
    SamplingBatches(store, bucket, AT_ONCE, datetime.now(UTC) + timedelta(minutes=1)).sweep().act()


@contextmanager
def before_request(store: Store, number: int, act: Callable[[], None]) -> Iterator[list[str]]:
    """Inside, ``act`` is called before request ``number`` of ``store``; gives the names of all requests so far."""
    requests: list[str] = []

    def count(model: Any, **_: Any) -> None:
        requests.append(model.name)
        if len(requests) == number:
            act()

    store.client.meta.events.register("before-call.s3", count)
    try:
        yield requests
    finally:
        store.client.meta.events.unregister("before-call.s3", count)


def finished(store: Store, bucket: str) -> list[Location]:
    keys = list(store.list_keys(bucket, "samples/"))
    return [Location(bucket, key.removesuffix("/_SUCCESS")) for key in keys if key.endswith("/_SUCCESS")]


def is_whole(store: Store, sampling_batch: SamplingBatch, place: Location) -> bool:
    files = stored_files(store, place)
    if "manifest.parquet" not in files:
        return False
    names = {row["tar"] if sampling_batch.format == "tar" else row["key"] for row in rows_of(files)}
    return names <= set(files) and not generate_batch.list_unfinished_chunks(store, sampling_batch, place)


def half(store: Store, sampling_batch: SamplingBatch, bucket: str, weights: Path) -> None:
    """What a killed job left: the first chunk, and nothing else."""
    store.delete_many(bucket, [*store.list_keys(bucket, "samples/"), *store.list_keys(bucket, "deleted/")])
    place = generate_batch.find_default_place(store, sampling_batch, bucket)
    generate_batch.begin(store, sampling_batch, place, None)
    generate_batch.generate_chunk(store, sampling_batch, place, weights, 0, None, 1)


def requests_of(act: Callable[[Store], object]) -> int:
    """How many requests ``act`` makes."""
    store = Store()
    with before_request(store, 0, lambda: None) as requests:
        act(store)
    return len(requests)


@pytest.mark.drill
@pytest.mark.slow
@pytest.mark.parametrize(("sampling_batch", "is_killed"), WAYS)
def test_a_job_ends_whole_whenever_gc_runs(
    store: Store, bucket: str, weights: Path, sampling_batch: SamplingBatch, is_killed: bool
) -> None:
    half(store, sampling_batch, bucket, weights)
    last = requests_of(lambda counted: generate(counted, sampling_batch, bucket, weights))
    assert last > 15

    def stop() -> None:
        collect(store, bucket)
        if is_killed:
            raise KeyboardInterrupt

    for number in range(1, last + 1):
        half(store, sampling_batch, bucket, weights)
        job = Store()
        with before_request(job, number, stop):
            try:
                place = generate(job, sampling_batch, bucket, weights)
            except KeyboardInterrupt:
                assert is_killed
                place = generate(store, sampling_batch, bucket, weights)
        assert is_whole(store, sampling_batch, place), number
        assert all(is_whole(store, sampling_batch, each) for each in finished(store, bucket)), number


@pytest.mark.drill
@pytest.mark.slow
@pytest.mark.parametrize(("sampling_batch", "is_killed"), WAYS)
def test_gc_keeps_what_a_job_finishes_meanwhile(
    store: Store, bucket: str, weights: Path, sampling_batch: SamplingBatch, is_killed: bool
) -> None:
    half(store, sampling_batch, bucket, weights)
    last = requests_of(lambda counted: collect(counted, bucket))
    assert last > 10
    places: list[Location] = []

    def stop() -> None:
        places.append(generate(store, sampling_batch, bucket, weights))
        if is_killed:
            raise KeyboardInterrupt

    for number in range(1, last + 1):
        half(store, sampling_batch, bucket, weights)
        gc = Store()
        with before_request(gc, number, stop):
            try:
                collect(gc, bucket)
            except KeyboardInterrupt:
                assert is_killed
        for place in finished(store, bucket):
            assert is_whole(store, sampling_batch, place), number
        # Where everything is old, also what was just finished; but never a part of it.
        assert places[-1] in finished(store, bucket) or generate_batch.is_deleted(store, places[-1]), number
    assert len(places) == last


@pytest.mark.parametrize("sampling_batch", BATCHES, ids=lambda sampling_batch: sampling_batch.format)
def test_late_deletion_does_not_touch_a_repeated_batch(
    store: Store, bucket: str, weights: Path, sampling_batch: SamplingBatch
) -> None:
    first = generate(store, sampling_batch, bucket, weights)
    before = stored_files(store, first)
    late = list(store.list_keys(bucket, first.key("")))
    collect(store, bucket)
    assert finished(store, bucket) == []
    second = generate(store, sampling_batch, bucket, weights)
    assert second.prefix == f"{first.prefix}.2"
    assert stored_files(store, second) == before
    store.delete_many(bucket, late)
    assert is_whole(store, sampling_batch, second)
    assert generate(store, sampling_batch, bucket, weights) == second


@pytest.mark.parametrize("sampling_batch", BATCHES, ids=lambda sampling_batch: sampling_batch.format)
def test_late_success_marker_is_deleted_by_the_next_gc(
    store: Store, bucket: str, weights: Path, sampling_batch: SamplingBatch
) -> None:
    place = generate(store, sampling_batch, bucket, weights)
    collect(store, bucket)
    store.put_once(bucket, place.key("_SUCCESS"), b"")
    collect(store, bucket)
    assert finished(store, bucket) == []
