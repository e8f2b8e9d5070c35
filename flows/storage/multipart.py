"""Multipart uploads of large objects to any S3 server: written once under their final name, atomically.

An upload becomes an object by the call that completes it, with the same If-None-Match condition as a PUT. Until then it
is invisible but takes up space, so a failed upload is aborted, and uploads of killed processes are aborted later.

The condition is not enough: SeaweedFS checks it before it writes, so that of two uploads completed at once the later
may overwrite the other; Ceph's gateway ignores it. So a writer first writes the SHA-256 of its bytes under KEY.sha256
by a conditional PUT, which only one writer wins; a writer that finds another checksum there raises Held. All writers
that complete then have the same bytes, whatever the server does with the condition.

An object that fits in one part is written by a PUT, without a checksum object. Its writer looks for a checksum
afterwards, and a multipart writer looks for the object after writing the checksum: of two writers with different bytes,
at least one sees the other and raises Held.
"""

import base64
import hashlib
import io
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from botocore.exceptions import ClientError

from diffusion.common.errors import DarkroomError
from flows.storage.s3 import PROBE, Location, Missing, Put, Store, same_bytes, status_of

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer
    from mypy_boto3_s3.type_defs import CompletedPartTypeDef, MultipartUploadTypeDef

PART_BYTES = 8 * 2**20
"""Size in bytes of all parts but the last: S3 takes at least 5 MiB per part, and up to 10,000 parts."""
SUM = ".sha256"
"""Suffix of the checksum object beside a large object, in the format of sha256sum."""
ABANDONED = timedelta(days=1)
"""Age from which an unfinished upload counts as abandoned."""


class Upload(io.RawIOBase):
    """Writable file that becomes an object on ``finish``, or is discarded on ``abort``.

    Data smaller than a part is written by a PUT. At most one part and one write are held in memory.
    """

    def __init__(self, store: Store, bucket: str, key: str, content_type: str, part_bytes: int) -> None:
        super().__init__()
        self._store, self._bucket, self._key = store, bucket, key
        self._type, self._part_bytes = content_type, part_bytes
        self._buffer = bytearray()
        self._digest = hashlib.sha256()
        self._id: str | None = None
        self._parts: list[CompletedPartTypeDef] = []
        self._taken_away = False

    def writable(self) -> bool:
        """Return True."""
        return True

    def write(self, data: "ReadableBuffer") -> int:
        """Append ``data``; full parts are sent at once, each checked by the server against its SHA-256."""
        view = memoryview(data).cast("B")
        self._digest.update(view)
        self._buffer += view
        while len(self._buffer) >= self._part_bytes:
            self._send(bytes(self._buffer[: self._part_bytes]))
            del self._buffer[: self._part_bytes]
        return len(view)

    def finish(self) -> Put:
        """Complete the object as ``Store.put_once`` does; raises Held if other bytes lie there or are being written."""
        bucket, key, digest = self._bucket, self._key, self._digest.hexdigest()
        if self._id is None:
            put = self._store.put_once(bucket, key, bytes(self._buffer), content_type=self._type)
            # Another writer may be uploading other bytes to this key.
            with suppress(Missing):
                same_bytes(bucket, key, self._store.get(bucket, key + SUM)[:64].decode(errors="replace"), digest)
            return put
        if self._buffer:
            self._send(bytes(self._buffer))
        if not self._taken_away and not self._store.exists(bucket, key):
            name = key.rpartition("/")[2]
            self._store.put_once(bucket, key + SUM, f"{digest}  {name}\n".encode(), content_type="text/plain")
            if not self._store.exists(bucket, key) and self._completed():
                self._id = None
                return "written"
        try:
            return same_bytes(bucket, key, self._store.sha256(bucket, key), digest)
        except Missing as error:
            raise DarkroomError(
                f"somebody aborted the upload of s3://{bucket}/{key}, and nothing lies there: give the command again"
            ) from error

    def abort(self) -> None:
        """Abort the upload on the server, if one was begun and not finished."""
        if self._id is not None:
            abort_upload(self._store, self._bucket, self._key, self._id)
            self._id = None

    def _send(self, piece: bytes) -> None:
        client, bucket, key = self._store.client, self._bucket, self._key
        # A recent upload is only aborted by a process that found the object: all that is left is to compare.
        if self._taken_away:
            return
        with self._store.in_words(self._bucket, self._key):
            if self._id is None:
                begun = client.create_multipart_upload(
                    Bucket=bucket, Key=key, ContentType=self._type, ChecksumAlgorithm="SHA256"
                )
                self._id = begun["UploadId"]
            number, checksum = len(self._parts) + 1, base64.b64encode(hashlib.sha256(piece).digest()).decode()
            try:
                sent = client.upload_part(
                    Bucket=bucket, Key=key, UploadId=self._id, PartNumber=number, Body=piece, ChecksumSHA256=checksum
                )
            except ClientError as error:
                if error.response["Error"]["Code"] != "NoSuchUpload":
                    raise
                self._taken_away = True
                return
        self._parts.append({"PartNumber": number, "ETag": sent["ETag"], "ChecksumSHA256": checksum})

    def _completed(self) -> bool:
        """Complete the upload; returns False if another object may be there."""
        assert self._id is not None
        with self._store.in_words(self._bucket, self._key):
            try:
                self._store.client.complete_multipart_upload(
                    Bucket=self._bucket,
                    Key=self._key,
                    UploadId=self._id,
                    MultipartUpload={"Parts": self._parts},
                    IfNoneMatch="*",
                )
            except ClientError as error:
                # Besides the condition: the upload is gone, maybe as an answer was lost, or two were completed at once.
                if status_of(error) not in {404, 409, 412}:
                    raise
                return False
        return True


@contextmanager
def writing(
    store: Store, bucket: str, key: str, content_type: str = "application/octet-stream", part_bytes: int = PART_BYTES
) -> Iterator[Upload]:
    """Context with a writable file that becomes an object, as by ``Store.put_once``, unless the block fails."""
    upload = Upload(store, bucket, key, content_type, part_bytes)
    try:
        yield upload
        upload.finish()
    finally:
        upload.abort()


def abort_uploads(store: Store, place: Location, older_than: timedelta = timedelta(0)) -> int:
    """Abort the uploads under ``place`` that are older than ``older_than``; returns their number."""
    before = datetime.now(UTC) - older_than
    # Times are by the server's clock and ages by ours: without a limit neither is compared.
    old = [each for each in uploads(store, place) if not older_than or each["Initiated"] < before]
    for each in old:
        abort_upload(store, place.bucket, each["Key"], each["UploadId"])
    return len(old)


def uploads(store: Store, place: Location) -> "list[MultipartUploadTypeDef]":
    """List the unfinished uploads under ``place``."""
    pages = store.client.get_paginator("list_multipart_uploads").paginate(Bucket=place.bucket, Prefix=place.prefix)
    with store.in_words(place.bucket, place.prefix):
        return [each for page in pages for each in page.get("Uploads", ())]


def abort_upload(store: Store, bucket: str, key: str, upload: str) -> None:
    """Abort an upload, unless it is gone or was completed."""
    with store.in_words(bucket, key):
        try:
            store.client.abort_multipart_upload(Bucket=bucket, Key=key, UploadId=upload)
        except ClientError as error:
            if status_of(error) != 404:
                raise


def honours_conditional_completion(store: Store, bucket: str, prefix: str = "") -> bool:
    """Whether completing an upload honours If-None-Match, on the object of ``Store.require_conditional_puts``."""
    place = Location(bucket, prefix.strip("/")) / PROBE
    abort_uploads(store, place, ABANDONED)
    upload = Upload(store, bucket, place.prefix, "application/octet-stream", 1)
    try:
        upload.write(b"!")
        return not upload._completed()
    finally:
        upload.abort()
