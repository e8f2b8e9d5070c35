"""Large objects on a real S3 server: whole, once, or not at all, and nothing left of what was given up."""

import base64
import hashlib
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest

from diffusion.common.errors import DarkroomError, Held
from flows.storage.multipart import ABANDONED, abort_uploads, honours_conditional_completion, writing
from flows.storage.s3 import Location, Store, client
from tests.builders.s3_proxy import ignoring_conditional_completion, proxied
from tests.builders.uploads import begun, orphan

PART = 5 * 2**20
"""The least that S3 takes."""
DATA = b"".join(hashlib.sha256(number.to_bytes(4)).digest() for number in range(200_000))
"""6.4 MB: two parts."""
OTHER = DATA[:-1] + b"!"


def write(store: Store, bucket: str, data: bytes, key: str = "a/big") -> None:
    with writing(store, bucket, key, "application/x-tar", PART) as file:
        for start in range(0, len(data), 2**20):
            file.write(data[start : start + 2**20])


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


def test_small_multipart_upload_is_a_plain_object(store: Store, bucket: str) -> None:
    for data in (b"", b"few bytes"):
        write(store, bucket, data, f"small/{len(data)}")
        assert store.get(bucket, f"small/{len(data)}") == data
        assert "-" not in store.client.head_object(Bucket=bucket, Key=f"small/{len(data)}")["ETag"]


def test_failed_multipart_upload_leaves_nothing(store: Store, bucket: str) -> None:
    def fail() -> None:
        with writing(store, bucket, "a/big", part_bytes=PART) as file:
            file.write(DATA)
            assert begun(store, bucket) == ["a/big"]
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert begun(store, bucket) == []
    assert not store.exists(bucket, "a/big")


def test_concurrent_multipart_writers_of_equal_bytes_all_succeed(store: Store, bucket: str) -> None:
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
def test_aborted_upload_succeeds_if_the_object_exists(store: Store, bucket: str, when: str) -> None:
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


def test_aborted_upload_without_an_object_is_an_error(store: Store, bucket: str) -> None:
    def overtaken() -> None:
        with writing(store, bucket, "a/big", part_bytes=PART) as file:
            file.write(DATA)
            abort_uploads(store, Location(bucket, "a/"))

    with pytest.raises(DarkroomError, match=r"somebody aborted the upload of .*a/big, and nothing lies there"):
        overtaken()


def test_abandoned_uploads_are_aborted_by_prefix_and_age(store: Store, bucket: str) -> None:
    for key in ("a/1", "a/2", "b/1"):
        orphan(store, bucket, key)
    assert abort_uploads(store, Location(bucket, "a/"), ABANDONED) == 0
    assert abort_uploads(store, Location(bucket, "a/"), timedelta(microseconds=1)) == 2
    assert begun(store, bucket) == ["b/1"]


def test_a_server_that_honours_the_condition_on_completion_passes_and_keeps_nothing(store: Store, bucket: str) -> None:
    store.require_conditional_puts(bucket, "samples")
    for _ in range(2):
        assert honours_conditional_completion(store, bucket, "samples")
    assert begun(store, bucket) == []
    assert len(list(store.list_keys(bucket))) == 1


@pytest.fixture
def careless(s3_environment: dict[str, str]) -> Iterator[Store]:
    """A store on a server that completes uploads in parts whatever the condition, as Ceph's gateway does."""
    with proxied(s3_environment, ignoring_conditional_completion) as url:
        yield Store(client(attempts=1, variables=s3_environment | {"AWS_ENDPOINT_URL_S3": url}))


def test_a_server_that_ignores_the_condition_on_completion_is_known(careless: Store, bucket: str) -> None:
    careless.require_conditional_puts(bucket, "samples")
    assert not honours_conditional_completion(careless, bucket, "samples")
    careless.require_conditional_puts(bucket, "samples")
    assert begun(careless, bucket) == []


def test_a_server_that_ignores_it_overwrites_nothing_all_the_same(careless: Store, bucket: str) -> None:
    write(careless, bucket, DATA)
    write(careless, bucket, DATA)
    with pytest.raises(Held):
        write(careless, bucket, OTHER)
    assert careless.get(bucket, "a/big") == DATA
    # Whoever has given up has left a sum, by which others are held.
    careless.put_once(bucket, "b/big.sha256", f"{'0' * 64}  big\n".encode())
    with pytest.raises(Held):
        write(careless, bucket, DATA, "b/big")
    assert not careless.exists(bucket, "b/big")


@pytest.mark.parametrize("late", ["the small one", "the large one"])
def test_conflicting_plain_and_multipart_writers_do_not_both_succeed(
    careless: Store, bucket: str, late: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    small, original = b"few bytes", Store.put_once

    def put_once(self: Store, bucket: str, key: str, *rest: Any, **named: Any) -> Any:
        """The other one begins and ends just before this one's write."""
        if late == "the small one" and key == "a/big":
            monkeypatch.setattr(Store, "put_once", original)
            write(self, bucket, DATA)
        elif late == "the large one" and key == "a/big.sha256":
            monkeypatch.setattr(Store, "put_once", original)
            write(self, bucket, small)
        return original(self, bucket, key, *rest, **named)

    monkeypatch.setattr(Store, "put_once", put_once)
    with pytest.raises(Held):
        write(careless, bucket, small if late == "the small one" else DATA)
    assert careless.get(bucket, "a/big") == (DATA if late == "the small one" else small)
