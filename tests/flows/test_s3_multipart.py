"""Large objects on a real S3 server: whole, once, or not at all, and nothing left of what was given up."""

import base64
import hashlib
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from http.server import BaseHTTPRequestHandler

import pytest

from diffusion.errors import DarkroomError, Held, UserError
from flows.s3 import Location, Store, client
from flows.s3_multipart import ABANDONED, abort_uploads, require_conditional_completion, writing
from tests.flows.http_server import serving

PART = 5 * 2**20
"""The least that S3 takes."""
DATA = b"".join(hashlib.sha256(number.to_bytes(4)).digest() for number in range(200_000))
"""6.4 MB: two parts."""
OTHER = DATA[:-1] + b"!"


def write(store: Store, bucket: str, data: bytes, key: str = "a/big") -> None:
    with writing(store, bucket, key, "application/x-tar", PART) as file:
        for start in range(0, len(data), 2**20):
            file.write(data[start : start + 2**20])


def begun(store: Store, bucket: str, prefix: str = "") -> list[str]:
    """Keys of the uploads that are under way."""
    found = store.client.list_multipart_uploads(Bucket=bucket, Prefix=prefix)
    return sorted(each["Key"] for each in found.get("Uploads", ()))


def orphan(store: Store, bucket: str, key: str) -> None:
    """What a killed process leaves."""
    upload = store.client.create_multipart_upload(Bucket=bucket, Key=key)["UploadId"]
    store.client.upload_part(Bucket=bucket, Key=key, UploadId=upload, PartNumber=1, Body=b"part")


def test_a_large_object_appears_whole_in_checked_parts_and_only_once(store: Store, bucket: str) -> None:
    write(store, bucket, DATA)
    head = store.client.head_object(Bucket=bucket, Key="a/big", ChecksumMode="ENABLED")
    assert (head["ContentLength"], head["ContentType"]) == (len(DATA), "application/x-tar")
    # S3's sum of the parts' sums, and how many there are.
    parts = [hashlib.sha256(piece).digest() for piece in (DATA[:PART], DATA[PART:])]
    assert head["ETag"].strip('"').endswith("-2")
    assert base64.b64decode(head["ChecksumSHA256"].split("-")[0]) == hashlib.sha256(b"".join(parts)).digest()
    assert store.get(bucket, "a/big") == DATA
    write(store, bucket, DATA)
    with pytest.raises(Held, match=f"s3://{bucket}/a/big is taken by other bytes"):
        write(store, bucket, OTHER)
    assert store.sha256(bucket, "a/big") == hashlib.sha256(DATA).hexdigest()
    assert begun(store, bucket) == []


def test_what_fits_in_a_part_is_an_ordinary_object(store: Store, bucket: str) -> None:
    for data in (b"", b"few bytes"):
        write(store, bucket, data, f"small/{len(data)}")
        assert store.get(bucket, f"small/{len(data)}") == data
        assert "-" not in store.client.head_object(Bucket=bucket, Key=f"small/{len(data)}")["ETag"]


def test_of_what_fails_in_the_middle_nothing_is_left(store: Store, bucket: str) -> None:
    def fail() -> None:
        with writing(store, bucket, "a/big", part_bytes=PART) as file:
            file.write(DATA)
            assert begun(store, bucket) == ["a/big"]
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert begun(store, bucket) == []
    assert not store.exists(bucket, "a/big")


def test_of_writers_at_once_all_end_well_with_the_same_bytes_and_with_others_one_alone(
    store: Store, bucket: str
) -> None:
    ready = threading.Barrier(2)

    def attempt(key: str, data: bytes) -> str:
        try:
            with writing(store, bucket, key, part_bytes=len(data)) as file:
                file.write(data)
                ready.wait()
        except Held:
            return "held"
        return "done"

    with ThreadPoolExecutor(2) as pool:
        # Servers that look first and write then let both through about every other time.
        for number in range(20):
            key, one, other = f"other/{number}", b"one", b"two"
            ends = list(pool.map(attempt, [f"same/{number}"] * 2, [one] * 2))
            assert ends == ["done", "done"]
            ends = list(pool.map(attempt, [key] * 2, [one, other]))
            assert sorted(ends) == ["done", "held"]
            kept = one if ends[0] == "done" else other
            assert store.get(bucket, key) == kept
            assert store.get(bucket, f"{key}.sha256").decode() == f"{hashlib.sha256(kept).hexdigest()}  {number}\n"
    assert begun(store, bucket) == []


@pytest.mark.parametrize("when", ["in the middle", "at the end"])
def test_whose_upload_is_aborted_as_the_object_is_there_ends_well(store: Store, bucket: str, when: str) -> None:
    def overtaken() -> None:
        write(store, bucket, DATA)
        assert abort_uploads(store, Location(bucket, "a/")) == 1

    with writing(store, bucket, "a/big", "application/x-tar", PART) as file:
        file.write(DATA[:PART])
        if when == "in the middle":
            overtaken()
        file.write(DATA[PART:])
        if when == "at the end":
            overtaken()
    assert store.get(bucket, "a/big") == DATA
    assert begun(store, bucket) == []


def test_whose_upload_is_aborted_with_nothing_there_is_told(store: Store, bucket: str) -> None:
    def overtaken() -> None:
        with writing(store, bucket, "a/big", part_bytes=PART) as file:
            file.write(DATA)
            abort_uploads(store, Location(bucket, "a/"))

    with pytest.raises(DarkroomError, match=r"somebody aborted the upload of .*a/big, and nothing lies there"):
        overtaken()


def test_what_killed_processes_left_is_aborted_where_asked_and_if_old_enough(store: Store, bucket: str) -> None:
    for key in ("a/1", "a/2", "b/1"):
        orphan(store, bucket, key)
    assert abort_uploads(store, Location(bucket, "a/"), ABANDONED) == 0
    assert abort_uploads(store, Location(bucket, "a/"), timedelta(microseconds=1)) == 2
    assert begun(store, bucket) == ["b/1"]


def test_a_server_that_honours_the_condition_on_completion_passes_and_keeps_nothing(store: Store, bucket: str) -> None:
    store.require_conditional_puts(bucket, "prints")
    for _ in range(2):
        require_conditional_completion(store, bucket, "prints")
    assert begun(store, bucket) == []
    assert len(list(store.list_keys(bucket))) == 1


@pytest.fixture
def careless_server() -> Iterator[str]:
    """An S3 server that completes any upload whatever the condition: as much of one as the probe sees.

    None can be had as a package.
    """
    answers = {
        "GET": b"<ListMultipartUploadsResult><IsTruncated>false</IsTruncated></ListMultipartUploadsResult>",
        "POST uploads": b"<InitiateMultipartUploadResult><UploadId>1</UploadId></InitiateMultipartUploadResult>",
        "POST": b"<CompleteMultipartUploadResult><ETag>x</ETag></CompleteMultipartUploadResult>",
    }

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            name = "POST uploads" if self.command == "POST" and "uploads" in self.path else self.command
            body = answers.get(name, b"")
            self.send_response(200)
            self.send_header("ETag", '"x"')
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self) -> None:
            self.answer()

        def do_POST(self) -> None:
            self.answer()

        def do_PUT(self) -> None:
            self.answer()

        def do_DELETE(self) -> None:
            self.answer()

        def log_message(self, *_: object) -> None:
            pass

    with serving(Handler) as url:
        yield url


def test_a_server_that_ignores_the_condition_on_completion_is_refused(careless_server: str) -> None:
    keys = {"AWS_ENDPOINT_URL_S3": careless_server, "AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "s"}
    with pytest.raises(UserError, match=r"ignores the condition If-None-Match when an upload") as refusal:
        require_conditional_completion(Store(client(attempts=1, variables=keys)), "prints")
    assert "\n" not in str(refusal.value)
