"""Data set versions on S3: put there once, found, verified and brought back from there."""

import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml
from dvc.repo import Repo

from diffusion.common.errors import UserError
from diffusion.common.files import sha256_bytes
from diffusion.data.dataset import Dataset
from diffusion.data.ingest.chunks import Chunk
from diffusion.data.ingest.config import IngestConfig
from diffusion.data.ingest.ingest import encodings_folder, ingest
from diffusion.data.manifest import FileEntry, read_manifest, work_folder
from diffusion.data.shards import ShardCache
from diffusion.data.versions.takedown import remove
from diffusion.data.versions.takedown_records import Selection
from diffusion.data.versions.versions import history
from flows.datasets.catalog import mark_push
from flows.datasets.checkout import checkout
from flows.datasets.dvc import data_version, record_data, restore_data
from flows.datasets.remote_shards import RemoteShards
from flows.datasets.sync import publish
from flows.storage.s3 import Store
from tests.builders.catalogs import FOLDER, Place
from tests.builders.ingested import files_of
from tests.builders.shapes import blob
from tests.builders.waiting import wait_for


def unreachable() -> str:
    raise UserError("no S3 server: run `darkroom up`")


def test_versions_are_published_once_and_dvc_can_pull_them(place: Place) -> None:
    version = place.version()
    assert place.catalog.versions() == {version.digest: version}
    expected = files_of(FOLDER)
    store = Store()
    before = list(store.list_objects(place.bucket, "datasets/"))
    assert [listed.key for listed in before] == [
        f"datasets/blobs/{version.digest}/manifest.json",
        f"datasets/blobs/{version.digest}/pointer.dvc",
    ]
    place.catalog.publish(version, record_data(FOLDER, place.source).digest)
    assert list(store.list_objects(place.bucket, "datasets/")) == before

    place.forget()
    FOLDER.with_suffix(".dvc").write_bytes(store.get(place.bucket, before[1].key))
    assert yaml.safe_load(FOLDER.with_suffix(".dvc").read_text())["outs"][0]["path"] == "blobs"
    with Repo(config={"core": {"remote": "r"}, "remote": {"r": {"url": place.source}}}) as repo:
        repo.pull()
    assert files_of(FOLDER) == expected


@pytest.mark.slow
def test_foreign_files_in_the_folder_do_not_prevent_publication(place: Place) -> None:
    place.version()
    pointer = place.catalog.pointer(read_manifest(FOLDER).digest)
    (FOLDER / "notes.txt").write_text("foreign")
    place.publish()
    assert place.catalog.pointer(read_manifest(FOLDER).digest) == pointer


def test_no_version_is_published_while_another_ingest_is_at_work(place: Place) -> None:
    config = IngestConfig(source=str(place.images), size=8, held_out=0.33)
    first = ingest(FOLDER, config)
    with ThreadPoolExecutor(1) as pool:

        def fan_out(prepare: Callable[[Chunk], Path], chunks: Iterable[Chunk]) -> Iterator[Path]:
            published = pool.submit(publish, FOLDER, place.source)
            yield from map(prepare, chunks)
            with pytest.raises(TimeoutError):
                published.result(timeout=1)

        blob(100).save(place.images / "odd" / "100.png")
        second = ingest(FOLDER, config, fan_out=fan_out)
    assert set(place.catalog.versions()) == {second.digest} != {first.digest}


def test_pages_of_versions_are_written_once_and_can_be_deleted(place: Place, tmp_path: Path) -> None:
    version = place.version()
    (tmp_path / "page.html").write_text("first")
    uri = place.catalog.publish_page(version.digest, (tmp_path / "page.html").read_bytes())
    assert uri == f"s3://{place.bucket}/datasets/blobs/{version.digest}/report.html"
    (tmp_path / "page.html").write_text("second")
    assert place.catalog.publish_page(version.digest, (tmp_path / "page.html").read_bytes()) == uri
    store = Store()
    key = uri.removeprefix(f"s3://{place.bucket}/")
    assert store.get(place.bucket, key) == b"first"
    place.catalog.delete_pages([version.digest, "0" * 64])
    assert not store.exists(place.bucket, key)
    assert place.catalog.versions() == {version.digest: version}


def test_changed_manifests_on_s3_are_named_and_hide_no_other(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    version, other = place.version(), place.version(100)
    key = f"datasets/blobs/{version.digest}/manifest.json"
    store = Store()
    data = store.get(place.bucket, key)
    store.client.put_object(Bucket=place.bucket, Key=key, Body=data.replace(b"ingest", b"jngest"))
    assert place.catalog.versions() == {other.digest: other}
    assert f"{key} is damaged" in caplog.text
    assert list(place.catalog.read().damaged) == [version.digest]


def test_older_versions_come_back_from_s3_alone(place: Place) -> None:
    first = place.version()
    old = files_of(FOLDER)
    pointer = FOLDER.with_suffix(".dvc").read_text()
    second = place.version(100, 101)
    new = files_of(FOLDER)

    place.forget()
    result = checkout(FOLDER, first.digest[:12], place.reach)
    assert files_of(FOLDER) == old
    assert (result.digest, result.kept, len(result.restored)) == (first.digest, 48, 2)
    assert FOLDER.with_suffix(".dvc").read_text() == pointer
    place.forget()
    checkout(FOLDER, second.content_digest[:12], place.reach)
    assert files_of(FOLDER) == new


def test_versions_come_and_go_without_a_server(place: Place) -> None:
    first = place.version()
    old = files_of(FOLDER)
    second = place.version(100, 101)
    new = files_of(FOLDER)
    encodings_folder(FOLDER).mkdir()
    checkout(FOLDER, first.digest, unreachable)
    assert files_of(FOLDER) == old
    assert not encodings_folder(FOLDER).exists()
    assert {each.digest: each.current for each in history(FOLDER)} == {second.digest: False, first.digest: True}
    checkout(FOLDER, second.digest[:8], unreachable)
    assert files_of(FOLDER) == new

    checkout(FOLDER, first.digest, unreachable)
    third = place.version(102)
    assert third.parent == first.digest
    assert third.kept == 51
    assert {each.digest for each in history(FOLDER)} == {first.digest, second.digest, third.digest}
    assert set(place.catalog.versions()) == {first.digest, second.digest, third.digest}


def test_checkouts_lose_no_unrecorded_version(place: Place) -> None:
    first = place.version()
    blob(100).save(place.images / "odd" / "100.png")
    ingest(FOLDER, IngestConfig(source=str(place.images), size=8, held_out=0.33))
    unrecorded, digest = files_of(FOLDER), read_manifest(FOLDER).digest
    checkout(FOLDER, first.digest, unreachable)
    checkout(FOLDER, digest, unreachable)
    assert files_of(FOLDER) == unrecorded


def test_unknown_versions_are_errors_that_name_the_known(place: Place) -> None:
    versions = [place.version(), place.version(100)]
    for reach in (place.reach, unreachable):
        with pytest.raises(UserError, match=r"f{12} is not a version of data set blobs") as error:
            checkout(FOLDER, "f" * 12, reach)
        assert all(version.digest[:12] in str(error.value) for version in versions)
    place.forget()
    with pytest.raises(UserError, match="run `darkroom up`"):
        checkout(FOLDER, versions[0].digest, unreachable)


@pytest.mark.slow
def test_damaged_remote_files_are_named_and_the_version_stays(place: Place) -> None:
    first = place.version()
    second = place.version(100)
    shard = second.shards[-1]
    checkout(FOLDER, first.digest, unreachable)
    there = files_of(FOLDER)
    shutil.rmtree(".dvc/cache")
    store = Store()
    for key in store.list_keys(place.bucket, "dvc/files/"):
        if len(data := store.get(place.bucket, key)) == shard.bytes:
            store.client.put_object(Bucket=place.bucket, Key=key, Body=data[:-1])
    message = rf"{shard.name} of data set blobs is damaged on the remote .* delete s3://{place.bucket}/dvc/files/md5/"
    with pytest.raises(UserError, match=message):
        checkout(FOLDER, second.digest, place.reach)
    assert read_manifest(FOLDER) == first
    assert there.items() <= files_of(FOLDER).items()


def test_missing_remote_files_are_pushed_again_on_publish(place: Place) -> None:
    shard = place.version().shards[0]
    store = Store()
    before = {key: store.get(place.bucket, key) for key in store.list_keys(place.bucket, "dvc/files/")}
    keys_of_shard = [key for key, data in before.items() if sha256_bytes(data) == shard.sha256]
    store.delete_many(place.bucket, keys_of_shard)
    place.publish()
    assert {key: store.get(place.bucket, key) for key in store.list_keys(place.bucket, "dvc/files/")} == before


def test_version_with_removed_images_needs_with_removed_on_checkout(place: Place) -> None:
    before = place.version()
    old = files_of(FOLDER)
    removal = remove(FOLDER, Selection(sources=["odd/01.png"]), "consent withdrawn")
    place.publish()
    place.catalog.publish_removal(removal)
    with pytest.raises(UserError, match=r"taken down since \(consent withdrawn\)"):
        checkout(FOLDER, before.digest, unreachable)
    place.forget()
    with pytest.raises(UserError, match="--with-removed"):
        checkout(FOLDER, before.digest, place.reach)
    checkout(FOLDER, removal.version, place.reach)
    checkout(FOLDER, before.digest, place.reach, with_removed=True)
    assert files_of(FOLDER) == old


@pytest.mark.slow
def test_removed_images_in_other_storage_settings_block_checkout_too(place: Place) -> None:
    before = place.version()
    config = IngestConfig(source=str(place.images), size=9, held_out=0.33)
    ingest(FOLDER, config, rebuild="if_different")
    removal = remove(FOLDER, Selection(sources=["odd/01.png"]), "consent withdrawn")
    place.publish()
    place.catalog.publish_removal(removal)
    place.forget()
    with pytest.raises(UserError, match="consent withdrawn"):
        checkout(FOLDER, before.digest, place.reach)
    assert not [path for path in FOLDER.rglob("*") if path.is_file()]


@pytest.mark.slow
def test_other_machine_learns_of_takedowns_of_images_it_holds(place: Place) -> None:
    before = place.version()
    assert place.catalog.find_held_removals(FOLDER) == []
    removal = remove(FOLDER, Selection(sources=["odd/01.png"]), "consent withdrawn")
    place.publish()
    place.catalog.publish_removal(removal)
    assert place.catalog.find_held_removals(FOLDER) == []
    checkout(FOLDER, before.digest, place.reach, with_removed=True)
    shutil.rmtree(work_folder(FOLDER))
    for _ in range(2):
        assert place.catalog.find_held_removals(FOLDER) == [removal]
    checkout(FOLDER, removal.version, place.reach)
    assert place.catalog.find_held_removals(FOLDER) == []
    again = remove(FOLDER, Selection(sources=["odd/01.png"]), "consent withdrawn")
    assert again == removal.model_copy(update={"already": True})


@pytest.mark.parametrize("request_digest", ["../../../outside", "0" * 15, "0" * 16 + "\n"])
def test_removal_record_with_an_unsafe_path_is_named_and_rejected(place: Place, request_digest: str) -> None:
    place.version()
    removal = remove(FOLDER, Selection(sources=["odd/01.png"]), "consent withdrawn")
    record = removal.model_dump(mode="json") | {"request_digest": request_digest, "digests": ["0" * 64]}
    place.catalog.store.put_once(place.bucket, "datasets/blobs/removals/x.json", json.dumps(record).encode())
    before = files_of(Path())
    with pytest.raises(UserError, match=r"datasets/blobs/removals/x\.json is not a removal .*request_digest: "):
        place.catalog.fetch_removals(FOLDER)
    with pytest.raises(UserError, match=r"x\.json is not a removal"):
        list(place.catalog.removals())
    assert files_of(Path()) == before


def test_training_streams_versions_without_local_shards(place: Place, tmp_path: Path) -> None:
    version = place.version()
    expected = Dataset.open(FOLDER).images(range(48))
    recorded = data_version(FOLDER)
    place.version(100)
    place.forget()
    checkout(FOLDER, version.digest, place.reach, without_shards=True)
    assert not list(FOLDER.glob("shards/*"))
    shards = ShardCache(tmp_path / "cache", RemoteShards(FOLDER, place.source), max_bytes=2**20)
    dataset = Dataset.open(FOLDER, shards)
    assert (dataset.images(range(48)) == expected).all()
    dataset.close()
    local_version = data_version(FOLDER)
    assert local_version is not None
    assert recorded is not None
    assert local_version.digest == recorded.digest


@pytest.mark.slow
def test_a_shard_that_is_not_on_the_remote_is_named(place: Place, tmp_path: Path) -> None:
    place.version()
    stranger = FileEntry(name="shards/00009-0123456789abcdef.tar", sha256="0" * 64, bytes=1)
    with pytest.raises(UserError, match=r"0123456789abcdef\.tar of data set blobs is not on s3://"):
        RemoteShards(FOLDER, place.source).fetch(stranger, tmp_path / "shard")
    ingest(FOLDER.with_name("other"), IngestConfig(source=str(place.images), size=8))
    with pytest.raises(UserError, match="was never pushed"):
        RemoteShards(FOLDER.with_name("other"), place.source).fetch(stranger, tmp_path / "shard")


@pytest.mark.parametrize("from_cache", [True, False])
def test_damaged_or_missing_files_are_restored_and_named(place: Place, from_cache: bool) -> None:
    place.version()
    version = place.version(*range(100, 104))
    whole = files_of(FOLDER)
    assert restore_data(FOLDER, place.source) == []
    shards = [entry.name for entry in version.shards]
    (FOLDER / shards[0]).write_bytes(whole[shards[0]][:1000])
    (FOLDER / shards[1]).write_bytes(whole[shards[1]][:-1] + b"x")
    table, (before,) = version.parts[0].records.name, (FOLDER / "versions").iterdir()
    (FOLDER / table).unlink()
    before.unlink()
    if not from_cache:
        shutil.rmtree(".dvc/cache")
    mended = restore_data(FOLDER, place.source)
    assert sorted(mended) == sorted([*shards, table, f"versions/{before.name}"])
    assert files_of(FOLDER) == whole


def test_unrestorable_files_are_reported_by_ingest(place: Place) -> None:
    config = IngestConfig(source=str(place.images), size=8, held_out=0.33)
    assert restore_data(FOLDER, place.source) == []
    ingest(FOLDER, config)
    (FOLDER / read_manifest(FOLDER).shards[0].name).unlink()
    assert restore_data(FOLDER, place.source) == []
    with pytest.raises(UserError, match="is missing"):
        ingest(FOLDER, config)


def test_another_versions_record_is_not_taken_for_the_current_one(place: Place) -> None:
    place.version()
    assert data_version(FOLDER) is not None
    blob(100).save(place.images / "odd" / "100.png")
    ingest(FOLDER, IngestConfig(source=str(place.images), size=8, held_out=0.33))
    assert data_version(FOLDER) is None


def test_the_mark_of_a_push_is_renewed_and_goes_with_it(place: Place) -> None:
    def marks() -> list[str]:
        return list(place.catalog.store.list_keys(place.bucket, "pushing/"))

    def push() -> None:
        with mark_push("blobs", place.source, renewal=0.05):
            (first,) = marks()
            wait_for(lambda: marks() and first not in marks(), 30)
            raise UserError("too many images are quarantined")

    with pytest.raises(UserError):
        push()
    assert not marks()
