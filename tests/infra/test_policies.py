"""What each role's S3 keys open and what they do not, asked of a real server that enforces the policies."""

import json
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import pytest
from botocore.exceptions import ClientError

from tests.builders.installation import INFRA, new_environment
from tests.builders.s3_clients import seaweed, with_key

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

BUCKET = "images-of-a-team"
PREFIXES = (
    *("images", "dvc", "datasets", "ledger", "samples", "pushing", "resumed", "deleted", "retired", "retrained"),
    *("starts", "staging", "claims", "mlflow", "elsewhere"),
)
WORK = {"dvc", "datasets", "ledger", "samples", "pushing", "retrained", "starts", "staging", "claims"}
READS: dict[str, set[str]] = {
    "worker": {*WORK, "images", "deleted"},
    "sampler": {"ledger", "samples", "deleted"},
    "reader": {"dvc", "datasets", "ledger", "samples", "deleted"},
    "keeper": {"images", "dvc", "datasets", "ledger", "samples", "retired", "deleted"},
    "mlflow": {"mlflow"},
}
WRITES: dict[str, set[str]] = {
    "worker": {*WORK, "resumed"},
    "sampler": {"samples", "resumed"},
    "reader": set(),
    "keeper": {"images", "dvc", "datasets", "samples", "pushing", "retired", "deleted"},
    "mlflow": {"mlflow"},
}
DELETES: dict[str, set[str]] = {
    "worker": {"pushing", "staging"},
    "sampler": set(),
    "reader": set(),
    "keeper": {"images", "dvc", "datasets", "samples", "pushing", "retired", "deleted", "resumed", "staging"},
    "mlflow": {"mlflow"},
}


@pytest.fixture(scope="module")
def clients(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, "S3Client"]]:
    """A client for each role, of a server that knows what ``infra/credentials.py`` made; some objects are there."""
    folder = tmp_path_factory.mktemp("s3")
    names = new_environment(folder / ".env", "--bucket", BUCKET)

    def clients_at(url: str) -> dict[str, "S3Client"]:
        keys = ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY")
        return {role: with_key(url, *(names[f"{role.upper()}_{key}"] for key in keys)) for role in READS}

    def ready(url: str) -> None:
        clients_at(url)["reader"].list_objects_v2(Bucket=BUCKET)

    with seaweed(folder, names["S3_CONFIG"], ready, f"-bucket={BUCKET}") as url:
        yield clients_at(url)


def may(act: Callable[[], object]) -> bool:
    """Whether the server did it; False only for its word that it must not."""
    try:
        act()
    except ClientError as error:
        if error.response["Error"]["Code"] in ("NoSuchKey", "404"):
            return True
        if error.response["ResponseMetadata"]["HTTPStatusCode"] == 403:
            return False
        raise
    return True


@pytest.mark.parametrize("role", READS)
def test_a_role_may_do_only_what_its_work_needs(clients: dict[str, "S3Client"], role: str) -> None:
    s3 = clients[role]
    for prefix in PREFIXES:
        place = {"Bucket": BUCKET, "Key": f"{prefix}/{role}"}
        assert may(lambda: s3.put_object(**place, Body=b"x")) is (prefix in WRITES[role]), (role, "writes", prefix)  # noqa: B023
        assert may(lambda: s3.get_object(**place)) is (prefix in READS[role]), (role, "reads", prefix)  # noqa: B023
        assert may(lambda: s3.delete_object(**place)) is (prefix in DELETES[role]), (role, "deletes", prefix)  # noqa: B023


@pytest.mark.parametrize("role", READS)
def test_no_role_may_manage_buckets_or_permissions(clients: dict[str, "S3Client"], role: str) -> None:
    s3 = clients[role]
    everybody = {"Effect": "Allow", "Principal": "*", "Action": "s3:*", "Resource": f"arn:aws:s3:::{BUCKET}/*"}
    open_policy = json.dumps({"Version": "2012-10-17", "Statement": [everybody]})
    assert not may(lambda: s3.create_bucket(Bucket="another-bucket"))
    assert not may(lambda: s3.delete_bucket(Bucket=BUCKET))
    assert not may(lambda: s3.put_bucket_policy(Bucket=BUCKET, Policy=open_policy))


def test_roles_may_upload_in_parts_and_abort_abandoned_uploads(clients: dict[str, "S3Client"]) -> None:
    for role in ("worker", "sampler"):
        s3, place = clients[role], {"Bucket": BUCKET, "Key": f"samples/large-{role}"}
        upload = s3.create_multipart_upload(**place)["UploadId"]
        etag = s3.upload_part(**place, UploadId=upload, PartNumber=1, Body=b"x")["ETag"]
        parts = {"Parts": [{"PartNumber": 1, "ETag": etag}]}
        s3.complete_multipart_upload(**place, UploadId=upload, MultipartUpload=parts)  # type: ignore[arg-type]
        given_up = s3.create_multipart_upload(**place)["UploadId"]
        s3.abort_multipart_upload(**place, UploadId=given_up)
    assert not may(lambda: clients["sampler"].create_multipart_upload(Bucket=BUCKET, Key="ledger/large"))


def test_unknown_access_key_has_no_permission(clients: dict[str, "S3Client"]) -> None:
    stranger = with_key(clients["reader"].meta.endpoint_url, "a" * 20, "b" * 40)
    assert not may(lambda: stranger.list_objects_v2(Bucket=BUCKET))


def test_every_policy_names_only_the_given_bucket() -> None:
    roles = {path.stem: path for path in (INFRA / "policies").glob("*.json") if path.stem != "bucket"}
    assert roles.keys() == READS.keys()
    for path in roles.values():
        for statement in json.loads(path.read_text())["Statement"]:
            assert statement["Effect"] == "Allow"
            assert all(resource.startswith("arn:aws:s3:::${bucket}") for resource in statement["Resource"])
            assert not any("*" in action for action in statement["Action"])
