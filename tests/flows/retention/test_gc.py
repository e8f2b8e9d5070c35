"""Housekeeping: what nothing needs goes in two steps, what anything needs stays, and a kill changes neither."""

import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from hashlib import md5
from pathlib import Path

import pytest
from dvc.repo import Repo
from mlflow.client import MlflowClient

from diffusion.common.errors import UserError
from diffusion.data.manifest import Manifest, manifest_bytes
from flows.config import RetentionConfig
from flows.datasets import catalog
from flows.datasets.catalog import Heads
from flows.datasets.checkout import checkout
from flows.datasets.dvc import Remote
from flows.datasets.purge import UnreferencedObjects
from flows.gc import GcResult, collect
from flows.registry.champion import promote
from flows.registry.ledger import NEWEST, NewestEntry
from flows.retention.sweeps import CONTENT, SamplingBatches, format_items, group_for_deletion
from flows.sampling.generate_batch import begin
from flows.storage.s3 import Location, Store
from flows.tracking.runs import TRAIN_KEY
from tests.builders.catalogs import FOLDER, Place
from tests.builders.model_versions import add_version
from tests.builders.sampling_batches import batch
from tests.flows.conftest import copied_store

STRICT = RetentionConfig(data_versions=1, data_days=30, run_days=30, batch_days=60)


@pytest.fixture
def mlflow(
    s3_environment: dict[str, str], mlflow_template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> MlflowClient:
    """An MLflow of the test's own."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", copied_store(mlflow_template, tmp_path))
    return MlflowClient()


@pytest.fixture
def place(bucket: str, images: Path, mlflow: MlflowClient) -> Place:
    Repo.init(no_scm=True).close()
    return Place(bucket, images)


def after(days: float) -> datetime:
    return datetime.now(UTC) + timedelta(days=days)


def collected(days: float, policy: RetentionConfig = STRICT) -> GcResult:
    return collect(policy, after(days))


def actions(done: GcResult) -> dict[str, str]:
    return {item.name: item.action for item in done.items}


def training(mlflow: MlflowClient, key: str, version: Manifest | None = None) -> str:
    """A run that has ended, with an artifact."""
    mlflow_experiment = mlflow.get_experiment_by_name("blobs")
    experiment = mlflow_experiment.experiment_id if mlflow_experiment else mlflow.create_experiment("blobs")
    tags = {TRAIN_KEY: key} | ({CONTENT: version.content_digest} if version else {})
    run_id = str(mlflow.create_run(experiment, tags=tags).info.run_id)
    mlflow.log_text(run_id, key, "history/losses.csv")
    mlflow.set_terminated(run_id)
    return run_id


def restorable(place: Place, version: Manifest) -> bool:
    """Whether another machine gets the version back."""
    place.forget()
    try:
        checkout(FOLDER, version.digest, place.reach)
    except UserError:
        return False
    return True


def test_gc_deletes_files_of_old_versions_except_shared_ones(place: Place) -> None:
    first, second = place.version(), place.version(*range(100, 104))
    shards = {shard.name for shard in first.shards}
    assert shards & {shard.name for shard in second.shards}, "the newer version stands on the older one's shards"
    before = set(place.catalog.store.list_keys(place.bucket, "dvc/"))

    assert actions(collected(1)) == {f"blobs {each.digest[:12]}": "keep" for each in (first, second)}
    listed = list(place.catalog.store.list_objects(place.bucket))
    dry_run = collect(STRICT, after(100), dry_run=True)
    assert list(place.catalog.store.list_objects(place.bucket)) == listed
    lines = list(format_items(dry_run.items))
    assert any("set aside" in line and first.digest[:12] in line for line in lines)
    assert any(line.startswith("keep") and "current in data/blobs" in line for line in lines)
    aside = collected(100)
    assert actions(aside) == actions(dry_run)
    assert actions(aside) == {f"blobs {first.digest[:12]}": "set aside", f"blobs {second.digest[:12]}": "keep"}
    assert set(place.catalog.versions()) == {second.digest}
    assert set(place.catalog.versions(retired=True)) == {first.digest}, "a takedown looks there, too"
    assert set(place.catalog.store.list_keys(place.bucket, "dvc/")) == before
    assert actions(collected(0.5))[f"blobs {first.digest[:12]}"] == "set aside"
    assert actions(collected(100))[f"blobs {first.digest[:12]}"] == "delete"
    keys = set(place.catalog.store.list_keys(place.bucket, "dvc/"))
    assert keys < before
    assert f"blobs {first.digest[:12]}" not in actions(collected(100))
    assert list(place.catalog.store.list_keys(place.bucket, "retired/")) == []
    assert restorable(place, second)


def test_heads_tell_the_newest_versions_after_a_restore(place: Place, bucket: str, store: Store) -> None:
    first, second, third = (place.version(number) for number in (100, 101, 102))
    heads = Heads(place.catalog)
    for version, onto in ((first, ()), (second, (first.digest,)), (third, (second.digest,))):
        assert heads.advance(version.digest, onto) is None
    key = place.catalog.place.key(f"{first.digest}/manifest.json")
    data, written = store.get(bucket, key), place.catalog.find_publication_time(third.digest)
    assert written is not None
    while (again := place.catalog.find_publication_time(first.digest)) is None or again <= written:
        store.delete_many(bucket, [key])
        time.sleep(0.2)
        store.put_once(bucket, key, data)

    two = STRICT.model_copy(update={"data_versions": 2})
    assert actions(collected(100, two)) == {
        f"blobs {first.digest[:12]}": "set aside",
        f"blobs {second.digest[:12]}": "keep",
        f"blobs {third.digest[:12]}": "keep",
    }


@pytest.mark.slow
def test_version_restored_within_the_grace_period_loses_nothing(place: Place) -> None:
    first = place.version()
    place.version(*range(100, 104))
    collected(100)
    assert first.digest not in place.catalog.versions()
    place.catalog.publish(first, place_digest(place, first))
    collected(1)
    assert (
        actions(collected(50, STRICT.model_copy(update={"data_versions": 2})))[f"blobs {first.digest[:12]}"] == "keep"
    )
    assert restorable(place, first)


def test_gc_restores_a_version_trained_on_in_the_meantime(place: Place, mlflow: MlflowClient, tmp_path: Path) -> None:
    first, _ = place.version(), place.version(*range(100, 104))
    collected(100)
    assert set(place.catalog.versions(retired=True)) == {first.digest}
    run_id = training(mlflow, "a", first)
    add_version(mlflow, tmp_path, "blobs", run_id=run_id, **{CONTENT: first.content_digest})

    assert actions(collected(200))[f"blobs {first.digest[:12]}"] == "keep"
    assert first.digest in place.catalog.versions()
    assert not place.catalog.versions(retired=True)
    assert restorable(place, first)


def place_digest(place: Place, version: Manifest) -> str:
    """DVC's digest of a version whose listing lies on the remote."""
    digest = md5(manifest_bytes(version)).hexdigest()
    listings = Remote.from_url(place.source).listings()
    return next(name for name, listing in listings if listing["manifest.json"] == digest)


@pytest.mark.slow
def test_gc_deletes_no_file_during_a_push(place: Place) -> None:
    first = place.version()
    place.version(*range(100, 104))
    collected(100)
    before = set(place.catalog.store.list_keys(place.bucket, "dvc/"))
    with catalog.mark_push("blobs", place.source):
        collected(100)
        assert set(place.catalog.store.list_keys(place.bucket, "dvc/")) == before
    collected(100)
    assert set(place.catalog.store.list_keys(place.bucket, "dvc/")) < before
    assert not restorable(place, first)


@pytest.mark.drill
@pytest.mark.parametrize("life", [2, *(pytest.param(life, marks=pytest.mark.slow) for life in (1, 5, 6))])
def test_a_gc_killed_between_two_requests_can_be_repeated(
    place: Place, life: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = place.version(), place.version(*range(100, 104))
    at_once = STRICT.model_copy(update={"grace_hours": 0})
    deaths = iter(range(life, -1, -1))
    original = Store.delete_many

    def crash_before_deleting(self: Store, bucket: str, keys: Iterator[str]) -> None:
        if next(deaths, None) == 0:
            raise KeyboardInterrupt
        original(self, bucket, keys)

    # Nothing else is to be killed at exactly one request.
    monkeypatch.setattr(Store, "delete_many", crash_before_deleting)
    try:
        collected(100, at_once)
    except KeyboardInterrupt:
        for version in place.catalog.versions().values():
            assert place.catalog.pointer(version.digest) is not None
    monkeypatch.setattr(Store, "delete_many", original)
    collected(100, at_once)
    assert actions(collected(100, at_once)) == {f"blobs {second.digest[:12]}": "keep"}
    assert list(place.catalog.store.list_keys(place.bucket, "retired/")) == []
    assert not any(first.digest in key for key in place.catalog.store.list_keys(place.bucket))
    assert restorable(place, second)


def test_gc_keeps_runs_with_versions_ledger_entries_or_samples(
    place: Place, mlflow: MlflowClient, tmp_path: Path
) -> None:
    versions = [place.version(*numbers) for numbers in ((), range(100, 104), range(104, 108), range(108, 112))]
    lost, registered, sampled = (training(mlflow, key, version) for key, version in zip("abc", versions, strict=False))
    version = add_version(mlflow, tmp_path, "blobs", run_id=registered, **{CONTENT: versions[1].content_digest})
    promote("blobs", version.number)
    place.catalog.store.put_once(place.bucket, *batch_of("blobs", 7, sampled, versions[2]))

    not_generated = STRICT.model_copy(update={"batch_days": None, "unfinished_days": 1e4})
    first = actions(collected(100, not_generated))
    assert first[f"runs:/{lost}"] == "set aside"
    assert {first[f"runs:/{each}"] for each in (registered, sampled)} == {"keep"}
    assert mlflow.get_run(lost).info.lifecycle_stage == "deleted"
    assert mlflow.list_artifacts(lost)
    assert first[f"blobs {versions[0].digest[:12]}"] == "keep", "the run may yet be brought back"

    assert actions(collected(100, not_generated))[f"runs:/{lost}"] == "delete"
    assert not mlflow.list_artifacts(lost)
    third = actions(collected(100, not_generated))
    assert f"runs:/{lost}" not in third
    assert set(place.catalog.versions()) == {each.digest for each in versions[1:]}


def test_gc_restores_a_run_registered_in_the_meantime(mlflow: MlflowClient, place: Place, tmp_path: Path) -> None:
    run_id = training(mlflow, "a")
    assert actions(collected(100)) == {f"runs:/{run_id}": "set aside"}
    add_version(mlflow, tmp_path, "blobs", run_id=run_id)
    assert actions(collected(100)) == {f"runs:/{run_id}": "keep"}
    assert mlflow.get_run(run_id).info.lifecycle_stage == "active"


def test_a_version_that_only_the_ledger_names_keeps_its_run(mlflow: MlflowClient, place: Place, tmp_path: Path) -> None:
    run_id = training(mlflow, "a")
    version = add_version(mlflow, tmp_path, "blobs", run_id=run_id)
    promote("blobs", version.number)
    experiment = mlflow.get_run(run_id).info.experiment_id
    mlflow.create_logged_model(experiment, "m", run_id, {"darkroom.weights_sha256": version.weights_sha256})
    mlflow.delete_registered_model_alias("blobs", "champion")
    mlflow.delete_model_version("blobs", str(version.number))
    assert actions(collected(100))[f"runs:/{run_id}"] == "keep"


def test_gc_ignores_foreign_and_manually_deleted_runs(mlflow: MlflowClient, place: Place) -> None:
    foreign = str(mlflow.create_run(mlflow.create_experiment("other")).info.run_id)
    mine = training(mlflow, "a")
    mlflow.delete_run(mine)
    for _ in range(2):
        assert actions(collected(1000)) == {f"runs:/{mine}": "keep"}
    assert mlflow.get_run(foreign).info.lifecycle_stage == "active"
    assert mlflow.list_artifacts(mine)


def batch_of(model: str, seed: int, run_id: str, version: Manifest) -> tuple[str, bytes]:
    """Key and bytes of the ``batch.json`` of samples of version 1."""
    about = batch(2, model=model, version=1, run_id=run_id, content_digest=version.content_digest, seed=seed)
    return f"samples/{model}/1/{about.name}/batch.json", about.json_bytes()


def test_gc_deletes_old_batches_and_a_kill_leaves_unfinished_ones(place: Place) -> None:
    version = place.version()
    key, about = batch_of("blobs", 1, "1" * 32, version)
    folder, store = key.removesuffix("/batch.json"), place.catalog.store
    names = ["_SUCCESS", "manifest.parquet", "manifest/part-00000.jsonl", "00000000.png", "00000001.png", "batch.json"]
    for name in names:
        store.put_once(place.bucket, f"{folder}/{name}", about if name == "batch.json" else name.encode())
    store.put_once(place.bucket, "samples/blobs/1/half/batch.json", about)
    store.put_once(place.bucket, "elsewhere/00000000.png", b"")

    dry_run = actions(collect(STRICT, after(8), dry_run=True))
    assert (dry_run[f"s3://{place.bucket}/{folder}"], dry_run[f"s3://{place.bucket}/samples/blobs/1/half"]) == (
        "keep",
        "set aside",
    )
    [stored] = [each for each in SamplingBatches(store, place.bucket, STRICT, after(100)).batches if each.finished]
    keys = list(store.list_keys(place.bucket, f"{folder}/"))
    order = [key.removeprefix(f"{folder}/") for keys in group_for_deletion(stored.place, keys) for key in keys]
    assert order == names
    before = set(store.list_keys(place.bucket, "samples/"))
    marks = {f"deleted/{folder}", "deleted/samples/blobs/1/half"}
    assert actions(collected(100))[f"s3://{place.bucket}/{folder}"] == "set aside"
    assert set(store.list_keys(place.bucket, "samples/")) == before
    assert set(store.list_keys(place.bucket, "deleted/")) == marks
    assert actions(collected(0.5))[f"s3://{place.bucket}/{folder}"] == "set aside"
    assert actions(collected(1.1))[f"s3://{place.bucket}/{folder}"] == "delete"
    assert list(store.list_keys(place.bucket, "samples/")) == []
    assert f"s3://{place.bucket}/{folder}" not in actions(collected(29))
    assert set(store.list_keys(place.bucket, "deleted/")) == marks
    collected(31)
    assert list(store.list_keys(place.bucket, "deleted/")) == []
    assert list(store.list_keys(place.bucket, "elsewhere/")) == ["elsewhere/00000000.png"]


def test_uploads_without_an_end_are_aborted_when_they_are_old(place: Place) -> None:
    client = place.catalog.store.client
    client.create_multipart_upload(Bucket=place.bucket, Key="samples/blobs/1/x/big.tar")
    assert actions(collected(1)) == {f"s3://{place.bucket}/samples/blobs/1/x/big.tar": "keep"}
    assert actions(collected(8)) == {f"s3://{place.bucket}/samples/blobs/1/x/big.tar": "delete"}
    assert "Uploads" not in client.list_multipart_uploads(Bucket=place.bucket)


def test_chunks_of_an_ingest_without_an_end_go_when_they_are_old(place: Place) -> None:
    place.version()
    store, key = place.catalog.store, "staging/blobs/0123.parquet"
    store.put_once(place.bucket, key, b"rows")
    assert actions(collected(1))["blobs"] == "keep"
    assert store.exists(place.bucket, key)
    assert actions(collected(8))["blobs"] == "delete"
    assert not store.exists(place.bucket, key)


def test_gc_skips_or_names_objects_changed_by_others(bucket: str, store: Store) -> None:
    begun = store.client.create_multipart_upload(Bucket=bucket, Key="samples/blobs/1/x/big.tar")
    sweep = SamplingBatches(store, bucket, STRICT, after(8)).sweep()
    store.client.abort_multipart_upload(Bucket=bucket, Key=begun["Key"], UploadId=begun["UploadId"])
    sweep.act()
    with pytest.raises(UserError, match="there is no bucket nowhere"):
        SamplingBatches(store, "nowhere", STRICT, after(8))
    store.put_once(bucket, "samples/blobs/1/x/batch.json", b'{"of": "somebody else"}')
    batches, unread = SamplingBatches(store, bucket, STRICT, after(1)).read_remaining_batches()
    assert (batches, list(unread)) == ([], [("blobs", 1)])
    assert "samples/blobs/1/x/batch.json is damaged, or of a newer Darkroom" in unread["blobs", 1]


def test_a_damaged_manifest_keeps_only_its_data_set(
    place: Place, mlflow: MlflowClient, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = place.version(), place.version(*range(100, 104))
    collected(100)
    store, junk = place.catalog.store, [f"datasets/blobs/{'0' * 64}/manifest.json", f"retired/blobs/{'1' * 64}.json"]
    # Under another name than its own digest: a mark that leads to the files of a version that stays.
    for key, data in zip(junk, (b"junk", manifest_bytes(second)), strict=True):
        store.put_once(place.bucket, key, data)
    store.put_once(place.bucket, f"datasets/.:/{'0' * 64}/manifest.json", b"junk")
    run_id = training(mlflow, "a")
    before = set(store.list_keys(place.bucket, "dvc/"))

    result = collected(200)
    why = {item.name: item.why for item in result.items}
    for digest, key in zip("01", junk, strict=True):
        assert (actions(result)[f"blobs {digest * 12}"], f"{key} is damaged" in why[f"blobs {digest * 12}"]) == (
            "keep",
            True,
        )
    assert actions(result)[f"blobs {first.digest[:12]}"] == "set aside", "which would have gone"
    assert actions(result)[f"runs:/{run_id}"] == "set aside"
    assert set(store.list_keys(place.bucket, "dvc/")) == before
    assert set(place.catalog.versions()) == {second.digest}
    assert junk[0] in caplog.text

    store.delete_many(place.bucket, junk)
    assert actions(collected(300))[f"blobs {first.digest[:12]}"] == "delete"
    assert restorable(place, second)


def test_gc_keeps_everything_an_unreadable_batch_may_need(place: Place, mlflow: MlflowClient) -> None:
    old, _ = place.version(), place.version(*range(100, 104))
    run_id = training(mlflow, "a", old)
    store, key = place.catalog.store, "samples/gone/7/x/batch.json"
    store.put_once(place.bucket, key, b"junk")
    store.put_once(place.bucket, "samples/gone/7/x/_SUCCESS", b"")
    policy = STRICT.model_copy(update={"batch_days": None})

    result = collected(100, policy)
    (run,) = (item for item in result.items if item.name == f"runs:/{run_id}")
    assert (run.action, key in run.why) == ("keep", True)
    assert actions(result)[f"blobs {old.digest[:12]}"] == "keep"
    store.delete_many(place.bucket, [key])
    assert actions(collected(100, policy))[f"runs:/{run_id}"] == "set aside"


def test_gc_keeps_a_batch_that_a_job_just_resumed(bucket: str, store: Store) -> None:
    about = batch(2, version=1)
    place = Location(bucket, "samples/blobs/1/half")
    begin(store, about, place, None)
    for name in ("manifest/part-00000.jsonl", "00000000.png", "00000001.png"):
        store.put_once(bucket, place.key(name), name.encode())
    time.sleep(1.1)  # servers tell ages by the second
    before = set(store.list_keys(bucket, place.key("")))
    sampling_batches = SamplingBatches(store, bucket, STRICT, after(8))
    [stored] = sampling_batches.batches
    assert stored.action == "set aside"
    begin(store, about, place, None)
    sampling_batches.sweep().act()
    assert set(store.list_keys(bucket, place.key(""))) == before
    assert SamplingBatches(store, bucket, STRICT, after(0)).batches[0].newest > stored.newest


def test_gc_deletes_unused_cached_shards_and_weights(place: Place, mlflow: MlflowClient, tmp_path: Path) -> None:
    version = add_version(mlflow, tmp_path, "blobs", run_id=training(mlflow, "a"))
    models = Path(".darkroom/models")
    files = [Path("data/.shards/aa.tar"), models / "bb.safetensors", models / f"{version.weights_sha256}.safetensors"]
    for path in files:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    collected(1)
    assert all(path.exists() for path in files)
    collected(100)
    assert [path.exists() for path in files] == [False, False, True]


def test_gc_deletes_leftovers_unless_recently_modified(place: Place) -> None:
    leftovers = [
        Path("runs/blobs/checkpoints", f".0000000008.safetensors.{'a' * 32}.partial"),
        Path("data/.blobs/chunks", f".{'c' * 64}.{'b' * 32}.partial"),
        Path(".darkroom/requests", f".{'c' * 32}.partial").resolve(),
    ]
    others = [Path("runs/blobs/.mine.partial"), Path("data/images", f".x.{'a' * 32}.partial")]
    for path in [*leftovers, *others]:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"begun")
    assert not actions(collected(0.9))
    assert actions(collected(1.1)) == {str(path): "delete" for path in leftovers}
    assert [path.exists() for path in [*leftovers, *others]] == [False] * 3 + [True] * 2


def test_broken_ledger_stops_gc_before_any_deletion(place: Place) -> None:
    place.version()
    place.version(*range(100, 104))
    client, newest = MlflowClient(), NewestEntry(1, "a" * 64, f"s3://{place.bucket}/ledger/blobs")
    client.create_registered_model("blobs")
    client.set_registered_model_tag("blobs", NEWEST, str(newest))
    place.catalog.store.put_once(place.bucket, "ledger/blobs/00000001.json", b"{}")
    before = list(place.catalog.store.list_objects(place.bucket))
    with pytest.raises(UserError, match="ledger of blobs is broken"):
        collected(100)
    assert list(place.catalog.store.list_objects(place.bucket)) == before


def test_purge_stops_when_its_permission_is_lost() -> None:
    deleted: list[str] = []

    class Recording:
        def listings(self) -> Iterator[tuple[str, dict[str, str]]]:
            return iter(())

        def delete(self, names: Iterator[str]) -> None:
            deleted.extend(names)

    answers = iter([True, False])
    doomed = UnreferencedObjects([Recording()], [f"{number:032x}" for number in range(1500)], ["f" * 32 + ".dir"])
    assert not doomed.delete(still=lambda: next(answers))
    assert len(deleted) == 1000
