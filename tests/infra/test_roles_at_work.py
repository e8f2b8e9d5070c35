"""Each role does its work through the policies of role and bucket, and a stolen key of it changes nothing that is old.

``tests/builders/policy_evaluator.py`` judges the requests, SeaweedFS does what they ask.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

import pytest
from botocore.exceptions import ClientError
from dvc.repo import Repo

from flows.config import RetentionConfig
from flows.datasets import catalog
from flows.retention.dataset_items import DataSets
from flows.retention.sweeps import SamplingBatches
from flows.sampling.batch_format import SamplingBatch
from flows.sampling.lookup import find
from flows.storage.s3 import Location, Store
from tests.builders.catalogs import FOLDER, Place
from tests.builders.gc_batches import BATCHES, generate
from tests.builders.installation import INFRA
from tests.builders.policy_evaluator import Statement, is_allowed
from tests.builders.s3_clients import with_key
from tests.builders.s3_proxy import Request, proxied
from tests.builders.small_models import write_model
from tests.flows.conftest import bucket, no_servers, s3_environment, s3_server, store

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

__all__ = ["bucket", "no_servers", "s3_environment", "s3_server", "store"]

ROLES = ("worker", "sampler", "reader", "keeper", "mlflow")
ONCE = ("datasets", "dvc", "ledger", "samples", "pushing", "resumed", "retrained", "starts")
OLD = datetime(2000, 1, 1, tzinfo=UTC)


def statements(name: str, bucket: str) -> list[Statement]:
    text = Template((INFRA / "policies" / f"{name}.json").read_text()).substitute(bucket=bucket)
    return list(json.loads(text)["Statement"])


@pytest.fixture
def enforcing(s3_environment: dict[str, str], bucket: str) -> Iterator[str]:
    """The address of a server that knows each role by its name as access key, and enforces the policies."""
    of_bucket, of_roles = statements("bucket", bucket), {role: statements(role, bucket) for role in ROLES}

    def intercept(request: Request) -> str | None:
        allowed = is_allowed(request, bucket, [of_roles[request.access_key], of_bucket])
        return None if allowed else "AccessDenied"

    with proxied(s3_environment, intercept) as url:
        yield url


@pytest.fixture
def role(enforcing: str, bucket: str) -> Callable[[str], Any]:
    """Inside ``role(NAME)`` this process has the keys of that role."""

    @contextmanager
    def role(name: str) -> Iterator[Store]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("AWS_ENDPOINT_URL_S3", enforcing)
            patch.setenv("AWS_ACCESS_KEY_ID", name)
            patch.setenv("DARKROOM_BUCKET", bucket)
            yield Store()

    return role


def stolen(url: str, role: str) -> "S3Client":
    """Stock boto3 with the key of a role."""
    return with_key(url, role, "x")


def is_denied(act: Callable[[], object]) -> bool:
    """Whether the server did not do it, as it must not, or as something is there."""
    try:
        act()
    except ClientError as error:
        if error.response["ResponseMetadata"]["HTTPStatusCode"] not in {403, 412}:
            raise
        return True
    return False


def modification_attempts(s3: "S3Client", bucket: str, key: str) -> Iterator[tuple[str, Callable[[], object]]]:
    """What somebody with a key could try to do to an object."""
    at: dict[str, Any] = {"Bucket": bucket, "Key": key}

    def in_parts(**condition: str) -> None:
        upload = s3.create_multipart_upload(**at)["UploadId"]
        etag = s3.upload_part(**at, UploadId=upload, PartNumber=1, Body=b"x")["ETag"]
        parts = {"Parts": [{"PartNumber": 1, "ETag": etag}]}
        s3.complete_multipart_upload(**at, UploadId=upload, MultipartUpload=parts, **condition)  # type: ignore[arg-type]

    yield "overwrite", lambda: s3.put_object(**at, Body=b"x")
    yield "overwrite by its ETag", lambda: s3.put_object(**at, Body=b"x", IfMatch=s3.head_object(**at)["ETag"])
    yield "overwrite under the condition", lambda: s3.put_object(**at, Body=b"x", IfNoneMatch="*")
    yield "copy over it", lambda: s3.copy_object(**at, CopySource={"Bucket": bucket, "Key": "dvc/old"})
    yield "overwrite in parts", in_parts
    yield "overwrite in parts under the condition", lambda: in_parts(IfNoneMatch="*")
    yield "delete", lambda: s3.delete_object(**at)
    yield "delete among others", lambda: s3.delete_objects(Bucket=bucket, Delete={"Objects": [{"Key": key}]})


@pytest.mark.slow
@pytest.mark.parametrize("name", ["worker", "sampler", "reader", "mlflow"])
def test_a_stolen_key_changes_nothing_that_is_there(store: Store, bucket: str, enforcing: str, name: str) -> None:
    prefixes = (*ONCE, "deleted", "retired", "images")
    for prefix in prefixes:
        store.put_once(bucket, f"{prefix}/old", b"old")
    s3 = stolen(enforcing, name)
    for prefix in prefixes:
        for method, act in modification_attempts(s3, bucket, f"{prefix}/old"):
            # Who pushes takes its own mark away, and an empty one stands for nothing that is old.
            if (name, prefix, method.partition(" ")[0]) != ("worker", "pushing", "delete"):
                assert is_denied(act), (prefix, method)
    prefixes_left = [prefix for prefix in prefixes if (name, prefix) != ("worker", "pushing")]
    assert all(store.get(bucket, f"{prefix}/old") == b"old" for prefix in prefixes_left)
    # Nor does gc delete for a thief what a mark names.
    assert is_denied(lambda: s3.put_object(Bucket=bucket, Key="deleted/samples/a/1/b", Body=b"", IfNoneMatch="*"))


def test_no_role_overwrites_or_deletes_ledger_entries(store: Store, bucket: str, enforcing: str) -> None:
    store.put_once(bucket, "ledger/old", b"old")
    for name in ROLES:
        for method, act in modification_attempts(stolen(enforcing, name), bucket, "ledger/old"):
            assert is_denied(act), (name, method)
    assert store.get(bucket, "ledger/old") == b"old"


@pytest.mark.slow
def test_each_role_does_its_work(
    role: Callable[[str], Any], bucket: str, images: Path, tmp_path: Path, store: Store
) -> None:
    weights = write_model(tmp_path / "weights.safetensors", 1, 0, classes={"even": 3, "odd": 1})
    policy = RetentionConfig(data_versions=1, data_days=0, batch_days=0, unfinished_days=0, grace_hours=0)
    later = datetime.now(UTC) + timedelta(days=1)
    with role("worker") as worker:
        Repo.init(no_scm=True).close()
        place = Place(bucket, images)
        with catalog.mark_push("blobs", place.source):
            first, second = place.version(), place.version(*range(100, 104))
        # A shard that was lost comes back by the same key.
        lost = next(key for key in store.list_keys(bucket, "dvc/files/md5/") if not key.endswith(".dir"))
        store.delete_many(bucket, [lost])
        place.publish()
        assert store.exists(bucket, lost)
        for prefix in ("ledger", "starts", "retrained"):
            worker.require_conditional_puts(bucket, prefix)
            worker.put_once(bucket, f"{prefix}/blobs/00000001.json", b"{}")
        generate(worker, BATCHES[1], bucket, weights)
    with role("sampler") as sampler:
        batches: list[Location] = [
            generate(sampler, batch.model_copy(update={"seed": 8}), bucket, weights) for batch in BATCHES
        ]
        assert batches == [
            generate(sampler, batch.model_copy(update={"seed": 8}), bucket, weights) for batch in BATCHES
        ]
    with role("reader") as reader:
        address = f"{batches[0]}/00000001.png"
        assert isinstance(find(address, reader, bucket).batch, SamplingBatch)
        assert set(catalog.Catalog.of("blobs", place.source, reader).versions()) == {first.digest, second.digest}
    with role("keeper") as keeper:
        SamplingBatches(keeper, bucket, policy, later).sweep().act()
        assert not [key for key in keeper.list_keys(bucket, "samples/") if key.startswith("samples/blobs/")]
        DataSets(keeper, place.source, {}, None, policy, later).sweep().act()
        DataSets(keeper, place.source, {}, None, policy, later).sweep().act()
        assert set(place.catalog.versions()) == {second.digest}
    assert FOLDER.is_dir()
