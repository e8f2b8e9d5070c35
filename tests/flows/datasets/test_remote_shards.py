"""Data sets whose shards lie on DVC's remote alone: chunks staged by workers, published by a driver without shards."""

import os
import time
import tracemalloc
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from diffusion.api import engine
from diffusion.api.config import ExperimentConfig
from diffusion.common.errors import ConflictError, TransientError
from diffusion.data.dataset import Dataset
from diffusion.data.fan_out import FanOut
from diffusion.data.ingest.chunks import prepare_chunk
from diffusion.data.ingest.config import IngestConfig
from diffusion.data.ingest.ingest import ingest
from diffusion.data.ingest.staging import Digests, ShardPublisher, StagedShard, rewrite_shard
from diffusion.data.manifest import read_manifest
from diffusion.data.shards import open_missing_shards
from flows.datasets.dvc import Remote, record_data, restore_data
from flows.datasets.purge import purge_staged
from flows.datasets.remote_shards import RemoteShards
from flows.storage.s3 import Store
from flows.storage.s3_errors import UnreachableError
from tests.builders.catalogs import FOLDER, Place
from tests.builders.ingested import files_of
from tests.builders.masked import write_masked
from tests.builders.shapes import blob


def run(work: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
    """A fan-out without workers."""
    return map(work, items)


def in_the_middle(work: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
    """A fan-out that breaks off after the first item."""
    yield work(next(iter(items)))
    raise KeyboardInterrupt


def add(images: Path, numbers: Iterable[int], **fields: Any) -> None:
    for number in numbers:
        blob(number, **fields).save(images / f"{number}.png")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Images for two chunks, the second with duplicates of images of the first."""
    folder = tmp_path / "source"
    folder.mkdir()
    add(folder, range(1000, 1600))
    add(folder, range(1600, 1610))
    for number in range(1000, 1010):
        blob(number).save(folder / f"9{number}.png")
    return folder


def remote_ingest(place: Place, config: IngestConfig, fan_out: FanOut = run) -> Any:
    return ingest(FOLDER, config, fan_out=fan_out, remote=RemoteShards(FOLDER, place.source))


def staged(place: Place) -> list[str]:
    return list(Store().list_keys(place.bucket, "staging/blobs/"))


def test_published_version_equals_that_of_threads(place: Place, source: Path, tmp_path: Path) -> None:
    config = IngestConfig(source=str(source), size=8, held_out=0.33)
    other = tmp_path / "threads" / "blobs"
    ingest(other, config)
    expected = files_of(other)
    result = remote_ingest(place, config)
    assert (result.added, result.duplicates) == (610, 10)
    without_shards = {name: data for name, data in expected.items() if not name.startswith("shards/")}
    assert files_of(FOLDER) == without_shards
    assert staged(place) == []
    version = record_data(FOLDER, place.source)
    assert version.digest == record_data(other, None).digest
    place.catalog.publish(read_manifest(FOLDER), version.digest)
    assert len(restore_data(FOLDER, place.source, without_shards=True)) == 0
    assert restore_data(FOLDER, place.source) == [entry.name for entry in read_manifest(FOLDER).shards]
    assert files_of(FOLDER) == expected


@pytest.mark.parametrize("stage", ["prepare_chunk", "rewrite_shard"])
def test_a_driver_that_was_killed_goes_on_with_staged_chunks(place: Place, source: Path, stage: str) -> None:
    config = IngestConfig(source=str(source), size=8)
    done: list[str] = []

    def fan_out(work: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
        return (in_the_middle if work.__name__ == stage else run)(work, items)

    with pytest.raises(KeyboardInterrupt):
        remote_ingest(place, config, fan_out)
    before = {entry.key: entry.written for entry in Store().list_objects(place.bucket, "staging/blobs/")}
    assert before

    def noting(work: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
        for result in map(work, items):
            if work is prepare_chunk:
                done.append(result)
                now = {e.key: e.written for e in Store().list_objects(place.bucket, "staging/blobs/")}
                assert before.items() <= now.items(), "a staged chunk is not prepared again"
            yield result

    remote_ingest(place, config, noting)
    assert len(done) == 2
    assert staged(place) == []


def test_later_ingests_record_shards_of_earlier_ones(place: Place, source: Path, tmp_path: Path) -> None:
    config = IngestConfig(source=str(source), size=8)
    other = tmp_path / "threads" / "blobs"
    ingest(other, config)
    remote_ingest(place, config)
    record_data(FOLDER, place.source)
    # As of a process that was killed before it recorded the version.
    add(source, range(2000, 2010))
    ingest(other, config)
    remote_ingest(place, config)
    assert not remote_ingest(place, config).changed
    assert record_data(FOLDER, place.source).digest == record_data(other, None).digest
    shards = RemoteShards(FOLDER, place.source)
    with (
        open_missing_shards(FOLDER, read_manifest(FOLDER), shards) as cache,
        closing(Dataset.open(FOLDER, cache)) as here,
        closing(Dataset.open(other)) as there,
    ):
        assert torch.equal(here.images(range(len(here))), there.images(range(len(there))))


def test_stored_pixels_are_read_from_the_remote(place: Place, source: Path, tmp_path: Path) -> None:
    sections = {"ingest": {"source": str(source), "size": 8}, "training": {"dataset": "blobs", "images": 1}}
    rules = {"curation": {"max_brightness": 135, "near_duplicates": "largest", "max_dropped": 1}}
    plain = IngestConfig.model_validate(sections["ingest"])
    other = tmp_path / "threads" / "data" / "blobs"
    ingest(other, plain)
    remote_ingest(place, plain)
    record_data(FOLDER, place.source)
    # Hashes of images that were ingested without them, and measures.
    near = {"ingest": sections["ingest"] | {"near_duplicates": 8}}
    config = ExperimentConfig.model_validate(sections | rules | near)
    result = engine.ingest(config, remote=RemoteShards(FOLDER, place.source))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(other.parents[1])
        assert engine.ingest(config).digest == result.digest
    assert not list(FOLDER.glob("shards/*"))


def test_new_masks_are_put_into_shards_of_the_remote(place: Place, tmp_path: Path) -> None:
    source = write_masked(tmp_path / "masked", 5)
    config = IngestConfig.model_validate({"source": str(source), "size": 24, "masks": "files"})
    other = tmp_path / "threads" / "blobs"
    ingest(other, config)
    remote_ingest(place, config)
    record_data(FOLDER, place.source)
    names = sorted(path.name for path in source.glob("*.mask.png"))
    (source / names[0]).write_bytes((source / names[1]).read_bytes())
    assert ingest(other, config).remasked == 1
    assert remote_ingest(place, config).remasked == 1
    assert record_data(FOLDER, place.source).digest == record_data(other, None).digest


def test_a_chunk_that_is_gone_is_a_transient_error(place: Place, source: Path) -> None:
    def forgetful(work: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
        for result in map(work, items):
            Store().delete_many(place.bucket, staged(place))
            yield result

    with pytest.raises(TransientError, match="same command again"):
        remote_ingest(place, IngestConfig(source=str(source), size=8), forgetful)


def test_a_copy_is_verified(bucket: str, store: Store) -> None:
    store.put_once(bucket, "one", b"1")
    store.put_once(bucket, "taken", b"other")
    sha256, md5 = store.sha256(bucket, "one"), "c4ca4238a0b923820dcc509a6f75849b"
    copy = partial(store.copy_once, bucket, "one", sha256=sha256)
    assert [copy(target="copy", md5=md5), copy(target="copy", md5=md5)] == ["written", "already there"]
    assert store.get(bucket, "copy") == b"1"
    # An ETag that is not the MD5 of the bytes.
    assert copy(target="parts", md5="0" * 32) == "written"
    with pytest.raises(ConflictError):
        copy(target="taken", md5=md5)


def test_incomplete_and_damaged_chunks_are_prepared_again(place: Place, source: Path) -> None:
    config = IngestConfig(source=str(source), size=8)
    with pytest.raises(KeyboardInterrupt):
        remote_ingest(place, config, in_the_middle)
    shard, table = (next(key for key in staged(place) if key.endswith(end)) for end in (".tar", ".parquet"))
    Store().delete_many(place.bucket, [shard])
    with pytest.raises(KeyboardInterrupt):
        remote_ingest(place, config, in_the_middle)
    assert shard in staged(place)
    Store().client.put_object(Bucket=place.bucket, Key=table, Body=b"not a table")
    assert remote_ingest(place, config).added == 610


def test_other_bytes_on_the_second_attempt_are_no_conflict(place: Place, source: Path) -> None:
    config = IngestConfig(source=str(source), size=8)
    with pytest.raises(KeyboardInterrupt):
        remote_ingest(place, config, in_the_middle)
    # As of a worker that was killed before it wrote the table.
    Store().delete_many(place.bucket, [key for key in staged(place) if key.endswith(".parquet")])
    target = source / "1000.png"
    stat, image = target.stat(), bytearray(target.read_bytes())
    image[-20] ^= 1  # its copy in the other chunk is not a duplicate any more
    target.write_bytes(image)
    os.utime(target, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    result = remote_ingest(place, config)
    assert result.added + result.quarantined_count == 611
    assert staged(place) == []


def test_ingests_of_other_sources_keep_their_chunks(place: Place, source: Path, tmp_path: Path) -> None:
    small, folder = tmp_path / "small", tmp_path / "other_machine" / "data" / FOLDER.name
    small.mkdir()
    add(small, range(3000, 3010))
    counts = []

    def with_another(work: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
        for result in map(work, items):
            if work is prepare_chunk and not counts:
                counts.append(len(staged(place)))
                time.sleep(1.1)  # S3 counts whole seconds
                ingest(folder, IngestConfig(source=str(small), size=8), remote=RemoteShards(folder, place.source))
                counts.append(len(staged(place)))
            yield result

    assert remote_ingest(place, IngestConfig(source=str(source), size=8), with_another).added == 610
    assert counts == [2, 2]


def test_staged_chunks_outlive_an_error_that_may_pass(
    place: Place, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(work: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
        items = iter(items)
        yield work(next(items))
        raise UnreachableError("as of a server that does not answer")

    with pytest.raises(UnreachableError):
        remote_ingest(place, IngestConfig(source=str(source), size=8), offline)
    assert len(staged(place)) == 2
    assert issubclass(UnreachableError, TransientError)


def killed_before_manifest(place: Place, config: IngestConfig) -> None:
    """An ingest that was killed after it published its shards."""

    def fan_out(work: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
        yield from map(work, items)
        if work is rewrite_shard:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        remote_ingest(place, config, fan_out)


def objects(place: Place) -> set[str]:
    return {name for name in Remote.from_url(place.source).names() if not name.endswith(".dir")}


def test_published_shards_without_a_version_stay_known_until_a_purge(place: Place, source: Path) -> None:
    config = IngestConfig(source=str(source), size=8)
    killed_before_manifest(place, config)
    assert (strays := objects(place))
    (source / "1605.png").unlink()  # the second chunk, which loses images, gets other bytes
    remote_ingest(place, config)
    version = record_data(FOLDER, place.source)
    assert strays < objects(place)
    purge_staged(FOLDER, place.source)
    assert objects(place) == set(Remote.from_url(place.source).listing(version.digest).values())


def test_purge_deletes_what_a_killed_ingest_left(place: Place, source: Path) -> None:
    killed_before_manifest(place, IngestConfig(source=str(source), size=8))
    assert staged(place)
    assert len(purge_staged(FOLDER, place.source)) == 5
    assert (staged(place), objects(place)) == ([], set())


def test_shards_of_an_unrecorded_version_are_restored(place: Place, source: Path) -> None:
    config = IngestConfig(source=str(source), size=8)
    remote_ingest(place, config)
    assert restore_data(FOLDER, place.source) == [entry.name for entry in read_manifest(FOLDER).shards]
    assert not ingest(FOLDER, config).changed


def test_publisher_holds_little_per_image(place: Place) -> None:
    publisher = ShardPublisher(RemoteShards(FOLDER, place.source), run)
    offsets = [512 + 10_240 * number for number in range(4000)]
    shard = StagedShard("shard", Digests("0" * 64, 1), offsets, 512 + 10_240 * 4000)
    tracemalloc.start()
    for number in range(20):
        # Half of the shards lose an image.
        rows = [{"offset": offset, "size": 8000} for offset in offsets[number % 2 :]]
        publisher.add(number, replace(shard, offsets=[*offsets]), rows)
        del rows
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < 12 * 20 * 4000
