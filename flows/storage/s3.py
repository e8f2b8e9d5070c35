"""Client for any S3 server: objects are written once and verified by SHA-256; errors of boto3 become one line."""

import base64
import hashlib
import io
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from datetime import datetime
from functools import cache, cached_property, partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar

import boto3
import tenacity
from botocore.config import Config as ClientConfig
from botocore.exceptions import BotoCoreError, ClientError

from diffusion.common.errors import ConflictError, DarkroomError, UserError
from diffusion.common.files import write_atomically
from diffusion.data.sources.base import StoredObject
from flows.storage.s3_errors import (
    BROKEN_READ,
    LargeObjectError,
    MissingObjectError,
    explain_errors,
    get_status,
    is_conflict,
)

if TYPE_CHECKING:
    from botocore.response import StreamingBody
    from mypy_boto3_s3 import S3Client
    from mypy_boto3_s3.type_defs import ObjectIdentifierTypeDef

T = TypeVar("T")
Put = Literal["written", "already there"]
"""Outcome of a write: by this call, or with the same bytes by an earlier one."""

PROBE = ".darkroom-conditional-put"  # name of the object that ``require_conditional_puts`` probes the server with
PROBE_BODY = b"Kept by Darkroom: a second write of this key must fail.\n"
MAX_PUT_BYTES = 5 * 2**30  # maximum size in bytes of an object that is written by one request
MAX_DELETED = 1000  # maximum number of objects in one delete request


@dataclass(frozen=True)
class Location:
    """Place on S3: a bucket and a prefix without slashes at its ends (empty for the whole bucket)."""

    bucket: str
    prefix: str = ""

    @classmethod
    def parse(cls, uri: str) -> "Location":
        """Parse s3://BUCKET or s3://BUCKET/PREFIX; raises UserError for anything else."""
        scheme, separator, path = uri.partition("://")
        if scheme != "s3" or not separator:
            raise UserError(f"{uri!r} is not an S3 URI: write it as s3://BUCKET/PREFIX")
        bucket, _, prefix = path.partition("/")
        if not re.fullmatch(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]", bucket):
            raise UserError(
                f"{uri!r}: {bucket!r} is not a bucket name: 3 to 63 lower-case letters, digits, dots and dashes"
            )
        prefix = prefix.rstrip("/")
        # Servers and clients disagree on what such names mean: some fold them, some keep them.
        if prefix and any(part in {"", ".", ".."} for part in prefix.split("/")):
            raise UserError(f"{uri!r}: a prefix must not hold empty parts, '.' or '..'")
        if not prefix.isprintable() or len(prefix.encode()) > 900:
            raise UserError(f"{uri!r}: a prefix must be printable and at most 900 bytes long")
        return cls(bucket, prefix)

    def key(self, name: str) -> str:
        """Full key of the object ``name`` under this place."""
        return f"{self.prefix}/{name}" if self.prefix else name

    def __truediv__(self, name: str) -> "Location":
        return Location(self.bucket, self.key(name.strip("/")))

    def __str__(self) -> str:
        return f"s3://{self.bucket}/{self.prefix}" if self.prefix else f"s3://{self.bucket}"


class ListedObject(NamedTuple):
    """Stored object: key, size in bytes, ETag, which differs when the bytes do, and time of writing."""

    key: str
    size: int
    etag: str
    written: datetime


@dataclass(frozen=True)
class Object:
    """Object to be written under ``key``."""

    key: str
    data: bytes
    content_type: str = "application/octet-stream"
    metadata: Mapping[str, str] = field(default_factory=dict)


Variables = tuple[tuple[str, str], ...]


def client(attempts: int = 5, read_timeout: float = 60, variables: Mapping[str, str] = os.environ) -> "S3Client":
    """Create a thread-safe client from the standard ``AWS_*`` ``variables`` and files; raises UserError for bad ones.

    ``attempts`` is the total number of tries per request, over about 8 s for the default; ``read_timeout`` in seconds.
    A process makes one client of the same settings, as boto3 takes a third of a second for each.
    """
    own_variables, process_variables = (
        tuple((name, value) for name, value in sorted(environment.items()) if name.startswith("AWS_"))
        for environment in (variables, os.environ)
    )
    file = Path(os.environ.get("AWS_SHARED_CREDENTIALS_FILE", "~/.aws/credentials")).expanduser()
    keys_changed = file.stat().st_mtime_ns if file.is_file() else 0
    return _client(attempts, read_timeout, own_variables, process_variables, (os.getpid(), keys_changed))


@cache
def _client(
    attempts: int, read_timeout: float, own_variables: Variables, process_variables: Variables, _: tuple[int, int]
) -> "S3Client":
    """Create the client; it depends on files and ``process_variables`` that boto3 reads, and a fork needs another."""
    variables = dict(own_variables)
    pair = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
    access_key, secret_key = (variables.get(name) or None for name in pair)
    if (access_key is None) != (secret_key is None):
        raise UserError(f"of {pair[0]} and {pair[1]} only one is set: set both, or neither")
    endpoint = variables.get("AWS_ENDPOINT_URL_S3") or variables.get("AWS_ENDPOINT_URL")
    config = ClientConfig(
        # BUCKET.host resolves at Amazon and few other places.
        s3={"addressing_style": "path"} if endpoint else None,
        retries={"mode": "standard", "total_max_attempts": attempts},
        connect_timeout=5,
        read_timeout=read_timeout,
        max_pool_connections=32,
        tcp_keepalive=True,
        # Every write here brings its SHA-256; boto3's own CRC trailers break older servers.
        request_checksum_calculation="when_required",
    )
    try:
        session = boto3.session.Session(
            aws_access_key_id=access_key,
            aws_secret_access_key=secret_key,
            aws_session_token=variables.get("AWS_SESSION_TOKEN") or None,
            region_name=variables.get("AWS_DEFAULT_REGION") or None,
        )
        return session.client("s3", endpoint_url=endpoint, config=config)
    except (BotoCoreError, ValueError) as error:
        raise UserError(f"the AWS_* settings make no S3 client: {error}") from error


@dataclass(frozen=True)
class Store:
    """S3 operations of Darkroom. Every method raises UserError, with one line, for errors that the user can fix."""

    client: "S3Client" = field(default_factory=client)

    def put_once(
        self,
        bucket: str,
        key: str,
        data: bytes | io.BufferedReader | io.BufferedRandom,
        metadata: Mapping[str, str] | None = None,
        content_type: str = "application/octet-stream",
    ) -> Put:
        """Write ``data``, or a file from its start, unless the key is taken.

        The same bytes there count as success; raises ConflictError if other bytes lie there, and UserError for over 5
        GiB. The SHA-256 is checked by the server and stored as metadata.
        """
        file = io.BytesIO(data) if isinstance(data, bytes) else data
        if (size := file.seek(0, os.SEEK_END)) > MAX_PUT_BYTES:
            raise UserError(
                f"s3://{bucket}/{key} would have {size:,} bytes, and S3 takes at most {MAX_PUT_BYTES:,} in one object: "
                "split it, tars of images with a smaller sampling_batch.chunk"
            )
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256").hexdigest()

        def put() -> Put:
            file.seek(0)
            try:
                self.client.put_object(
                    Bucket=bucket,
                    Key=key,
                    Body=file,
                    IfNoneMatch="*",
                    ChecksumSHA256=base64.b64encode(bytes.fromhex(digest)).decode(),
                    ContentType=content_type,
                    Metadata={"sha256": digest, **(metadata or {})},
                )
            except ClientError as error:
                if get_status(error) != 412:
                    raise
                if (other_digest := self._sha256(bucket, key)) != digest:
                    raise ConflictError(
                        f"s3://{bucket}/{key} is taken by other bytes (sha256 {other_digest[:12]}… there, "
                        f"{digest[:12]}… here): write under another prefix, or remove what is there"
                    ) from error
                return "already there"
            return "written"

        return self._retry(bucket, key, put, tenacity.retry_if_exception(is_conflict))

    def put_many(self, bucket: str, objects: Sequence[Object], workers: int = 8) -> list[Put]:
        """Write each of ``objects`` as ``put_once`` does, ``workers`` at a time; the first failure stops the rest."""
        with ThreadPoolExecutor(workers) as pool:
            return list(pool.map(lambda o: self.put_once(bucket, o.key, o.data, o.metadata, o.content_type), objects))

    def copy_once(self, bucket: str, key: str, target: str, sha256: str, md5: str) -> Put:
        """Copy an object within ``bucket`` to the key ``target``, by the server, unless it is there.

        Raises MissingObjectError, and ConflictError if the object at ``target`` has other digests.
        """

        def verify(etag: str) -> None:
            # The ETag of an object that was not written in one piece is not its MD5.
            if etag.strip('"') == md5 or (other_digest := self._sha256(bucket, target)) == sha256:
                return
            raise ConflictError(
                f"s3://{bucket}/{target} has other bytes than its name says (sha256 {other_digest[:12]}… there, "
                f"{sha256[:12]}… expected): delete it, and give the same command again"
            )

        def copy() -> Put:
            if (found := self.stat(bucket, target)) is not None:
                verify(found.etag)
                return "already there"
            try:
                # A server that does not know the condition copies the same bytes again.
                answer = self.client.copy_object(
                    Bucket=bucket, Key=target, CopySource={"Bucket": bucket, "Key": key}, IfNoneMatch="*"
                )
            except ClientError as error:
                if get_status(error) != 412:
                    raise
                verify("")
                return "already there"
            verify(answer["CopyObjectResult"]["ETag"])
            return "written"

        return self._retry(bucket, key, copy)

    def get(self, bucket: str, key: str, max_bytes: int | None = None) -> bytes:
        """Read an object, verified by its checksum.

        Raises MissingObjectError, and UserError if it is over ``max_bytes``.
        """
        return self._retry(bucket, key, lambda: self._body(bucket, key, max_bytes).read())

    def get_span(self, bucket: str, key: str, offset: int, size: int) -> bytes:
        """Read ``size`` bytes of an object from ``offset`` on, without a checksum; raises MissingObjectError."""
        span = f"bytes={offset}-{offset + size - 1}"
        return self._retry(
            bucket, key, lambda: self.client.get_object(Bucket=bucket, Key=key, Range=span)["Body"].read()
        )

    def sha256(self, bucket: str, key: str) -> str:
        """Hex SHA-256 of an object, from the server's checksum or else from its bytes; raises MissingObjectError."""
        return self._retry(bucket, key, lambda: self._sha256(bucket, key))

    def fetch(self, bucket: str, key: str, path: Path, max_bytes: int | None = None) -> None:
        """Fetch an object to ``path`` as ``get`` does, a megabyte at a time; no partial file is left after an error."""

        def fetch() -> None:
            body = self._body(bucket, key, max_bytes)
            with path.open("wb") as file:
                shutil.copyfileobj(body, file, 2**20)

        try:
            self._retry(bucket, key, fetch)
        except BaseException:
            path.unlink(missing_ok=True)
            raise

    def _body(self, bucket: str, key: str, max_bytes: int | None) -> "StreamingBody":
        answer = self.client.get_object(Bucket=bucket, Key=key)
        if max_bytes is not None and (size := answer["ContentLength"]) > max_bytes:
            raise LargeObjectError(
                f"s3://{bucket}/{key} has {size} bytes, and none of its kind over {max_bytes}: delete it"
            )
        return answer["Body"]

    def download(self, bucket: str, key: str, path: Path) -> str:
        """Fetch an object to ``path`` atomically; returns the SHA-256 of its bytes."""
        return write_atomically(path, partial(self.fetch, bucket, key))

    def exists(self, bucket: str, key: str) -> bool:
        """Whether the object exists."""
        return self.stat(bucket, key) is not None

    def stat(self, bucket: str, key: str) -> ListedObject | None:
        """Size, ETag and time of an object; None if it does not exist."""
        try:
            with self.explain_errors(bucket, key):
                head = self.client.head_object(Bucket=bucket, Key=key)
        except MissingObjectError:
            return None
        return ListedObject(key, head["ContentLength"], head["ETag"].strip('"'), head["LastModified"])

    def list_keys(self, bucket: str, prefix: str = "", after: str = "") -> Iterator[str]:
        """Yield all keys that begin with ``prefix`` and sort after ``after``, in order."""
        return (entry.key for entry in self.list_objects(bucket, prefix, after))

    def list_objects(self, bucket: str, prefix: str = "", after: str = "") -> Iterator[ListedObject]:
        """Yield the objects of ``list_keys`` with size, ETag and time; one page is held in memory at a time."""
        # No delimiter: some servers go on listing a "folder" for minutes after it was emptied.
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix, StartAfter=after)
        with self.explain_errors(bucket, prefix):
            for page in pages:
                for entry in page.get("Contents", ()):
                    yield ListedObject(entry["Key"], entry["Size"], entry["ETag"].strip('"'), entry["LastModified"])

    def delete_many(self, bucket: str, keys: Iterable[str]) -> None:
        """Delete the objects of these names, if they exist."""
        key_iterator = iter(keys)
        while batch := list(islice(key_iterator, MAX_DELETED)):
            with self.explain_errors(bucket, batch[0]):
                objects: list[ObjectIdentifierTypeDef] = [{"Key": key} for key in batch]
                answer = self.client.delete_objects(Bucket=bucket, Delete={"Objects": objects, "Quiet": True})
            for error in answer.get("Errors", ()):
                place = f"s3://{bucket}/{error.get('Key')}"
                raise DarkroomError(f"{place} was not deleted: {error.get('Code')}: {error.get('Message')}")

    def ensure_bucket(self, bucket: str) -> None:
        """Create ``bucket`` if it does not exist."""
        with suppress(MissingObjectError), self.explain_errors(bucket):
            self.client.head_bucket(Bucket=bucket)
            return
        region, options = self.client.meta.region_name, dict[str, Any]()
        if region not in {None, "us-east-1", "aws-global"}:
            options["CreateBucketConfiguration"] = {"LocationConstraint": region}
        with self.explain_errors(bucket):
            try:
                self.client.create_bucket(Bucket=bucket, **options)
            except ClientError as error:
                # Another process created it at the same moment.
                if error.response["Error"]["Code"] not in {"BucketAlreadyOwnedByYou", "BucketAlreadyExists"}:
                    raise
                self.client.head_bucket(Bucket=bucket)

    def require_conditional_puts(self, bucket: str, prefix: str = "") -> None:
        """Raise UserError unless the server honours If-None-Match, which all write-once objects rely on.

        Leaves a small object under ``prefix`` for the next probe, so that no right to delete is needed.
        """
        place = Location(bucket, prefix)
        key = place.key(PROBE)
        refusal = (
            f"{self.client.meta.endpoint_url} {{}} the condition If-None-Match on writes to {place}, so that "
            "two jobs could overwrite each other, and ingest, train, promote and sample refuse to write there: use a "
            "server that honours it, such as Amazon's, SeaweedFS or Ceph's"
        )
        for body in (PROBE_BODY, b"This must never be seen.\n"):
            try:
                with self.explain_errors(bucket, key):
                    self.client.put_object(Bucket=bucket, Key=key, Body=body, IfNoneMatch="*")
            except DarkroomError as error:
                cause = error.__cause__
                if not isinstance(cause, ClientError) or get_status(cause) not in {409, 412, 501}:
                    raise
                if get_status(cause) == 501:
                    raise UserError(refusal.format("does not know")) from error
                return
        raise UserError(refusal.format("ignores"))

    def _sha256(self, bucket: str, key: str) -> str:
        head = self.client.head_object(Bucket=bucket, Key=key, ChecksumMode="ENABLED")
        checksum = head.get("ChecksumSHA256", "")
        if checksum and "-" not in checksum and head.get("ChecksumType", "FULL_OBJECT") == "FULL_OBJECT":
            return base64.b64decode(checksum).hex()
        digest = hashlib.sha256()
        for piece in self.client.get_object(Bucket=bucket, Key=key)["Body"].iter_chunks(2**20):
            digest.update(piece)
        return digest.hexdigest()

    def _retry(self, bucket: str, key: str, request: Callable[[], T], retry: tenacity.retry_base = BROKEN_READ) -> T:
        """Answer of a request, retried after errors that botocore does not retry."""
        wait, stop = tenacity.wait_random_exponential(0.1, 5), tenacity.stop_after_attempt(6)
        with self.explain_errors(bucket, key):
            return tenacity.Retrying(retry=retry, stop=stop, wait=wait, reraise=True)(request)

    def explain_errors(self, bucket: str, key: str = "") -> AbstractContextManager[None]:
        """Context that turns exceptions of boto3 into errors with a one-line message, with the original as cause."""
        return explain_errors(self.client.meta.endpoint_url, bucket, key)


@dataclass(frozen=True)
class S3Objects:
    """S3 objects by URI (an ``ObjectStore``); after pickling it uses the environment of the process it was sent to."""

    @cached_property
    def _store(self) -> Store:
        return Store()

    def __getstate__(self) -> None:
        """Leave the client out, as it cannot be pickled."""

    def find(self, uri: str) -> Iterator[StoredObject]:
        """Yield all objects whose URI begins with ``uri``, in the server's order, a page at a time."""
        bucket, prefix = _split(uri)
        for entry in self._store.list_objects(bucket, prefix):
            yield StoredObject(f"s3://{bucket}/{entry.key}", entry.size, entry.etag)

    def read(self, uri: str) -> bytes:
        """Read the bytes of one object; raises FileNotFoundError if there is none."""
        try:
            return self._store.get(*_split(uri))
        except MissingObjectError as error:
            raise FileNotFoundError(str(error)) from error

    def download(self, uri: str, path: Path) -> None:
        """Download one object to ``path`` atomically; raises FileNotFoundError if there is none."""
        try:
            self._store.download(*_split(uri), path)
        except MissingObjectError as error:
            raise FileNotFoundError(str(error)) from error


def _split(uri: str) -> tuple[str, str]:
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    return Location.parse(f"s3://{bucket}").bucket, key


DELETED = "deleted"
"""Prefix of the marks of deleted sampling batches, apart from where sampling may write."""
USUAL = re.compile(r"samples/[^/]+/[0-9]{1,10}/[^/]+")
"""Prefix of a sampling batch at its usual place, ``samples/MODEL/VERSION/BATCH``."""


def batch_places(store: Store, bucket: str) -> Iterator[Location]:
    """Yield the usual places of sampling batches in ``bucket``; those that ``darkroom gc`` deletes are left out."""
    deleted_prefixes = {key.removeprefix(f"{DELETED}/") for key in store.list_keys(bucket, f"{DELETED}/samples/")}
    after = ""
    # One listing per batch, from where the one before ends: it may have a million images.
    while (key := next(store.list_keys(bucket, "samples/", after), None)) is not None:
        prefix = match[0] if (match := USUAL.match(key)) else key.rpartition("/")[0]
        # "PREFIX0" sorts just after "PREFIX/"; objects of others may lie beside the folders of the models.
        after = key if prefix == "samples" else f"{prefix}0"
        if match and prefix not in deleted_prefixes:
            yield Location(bucket, prefix)
