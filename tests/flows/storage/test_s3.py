import base64
import hashlib
import re
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffusion.common.errors import ConflictError, DarkroomError, TransientError, UserError
from flows.storage.s3 import MAX_PUT_BYTES, Location, Object, Store, client
from flows.storage.s3_errors import MissingObjectError
from tests.builders.http_server import QuietHandler, serving
from tests.builders.s3_clients import stock


@pytest.mark.parametrize(
    ("uri", "bucket", "prefix"),
    [
        ("s3://prints", "prints", ""),
        ("s3://prints/", "prints", ""),
        ("s3://prints/a/b", "prints", "a/b"),
        ("s3://prints/a b/ü/", "prints", "a b/ü"),
    ],
)
def test_an_s3_uri_names_a_bucket_and_a_prefix(uri: str, bucket: str, prefix: str) -> None:
    assert Location.parse(uri) == Location(bucket, prefix)


@pytest.mark.parametrize(
    "uri",
    [
        "", "prints", "/prints/a", "s3:/prints", "gs://prints/a", "S3://prints", "s3://", "s3:///a", "s3://ab",
        "s3://Prints", "s3://pri_nts/a", "s3://prints//a", "s3://prints/a//b", "s3://prints/../other",
        "s3://prints/./a", "s3://prints/a\nb", "s3://prints/" + "x" * 1000,
    ],
)  # fmt: skip
def test_invalid_s3_uri_is_a_one_line_error(uri: str) -> None:
    with pytest.raises(UserError) as refusal:
        Location.parse(uri)
    assert "\n" not in str(refusal.value)


part = st.text(st.characters(categories=["L", "N"]), min_size=1, max_size=8)


@given(st.lists(part, max_size=5), part)
def test_location_formats_as_the_uri_it_was_parsed_from(parts: list[str], name: str) -> None:
    uri = "/".join(["s3://prints", *parts])
    assert str(Location.parse(uri)) == uri
    assert Location.parse(uri) / name == Location.parse(f"{uri}/{name}")
    assert Location.parse(uri).key(name) == "/".join([*parts, name])


def test_object_is_written_once_and_equal_bytes_succeed(
    store: Store, bucket: str, s3_environment: dict[str, str]
) -> None:
    assert store.put_once(bucket, "a/x.png", b"image", {"seed": "7"}, "image/png") == "written"
    assert store.put_once(bucket, "a/x.png", b"image", {"seed": "8"}, "image/png") == "already there"
    there = stock(s3_environment).get_object(Bucket=bucket, Key="a/x.png")
    assert there["Body"].read() == b"image"
    assert there["ContentType"] == "image/png"
    assert there["Metadata"] == {"seed": "7", "sha256": hashlib.sha256(b"image").hexdigest()}


def test_stat_has_size_and_time_of_existing_objects(store: Store, bucket: str, s3_environment: dict[str, str]) -> None:
    store.put_once(bucket, "a", b"bytes")
    head = stock(s3_environment).head_object(Bucket=bucket, Key="a")
    stat = store.stat(bucket, "a")
    assert stat == ("a", 5, head["ETag"].strip('"'), head["LastModified"])
    assert store.stat(bucket, "b") is None


def test_different_bytes_under_an_existing_key_are_not_written(store: Store, bucket: str) -> None:
    store.put_once(bucket, "a/x.png", b"first")
    with pytest.raises(ConflictError, match=f"s3://{bucket}/a/x.png is taken by other bytes") as error:
        store.put_once(bucket, "a/x.png", b"other")
    assert error.value.exit_code == 3
    assert store.get(bucket, "a/x.png") == b"first"


def test_objects_without_checksums_are_compared_by_bytes(
    store: Store, bucket: str, s3_environment: dict[str, str]
) -> None:
    # A lie in the metadata must not matter.
    lie = {"sha256": hashlib.sha256(b"local").hexdigest()}
    stock(s3_environment).put_object(Bucket=bucket, Key="same", Body=b"local")
    stock(s3_environment).put_object(Bucket=bucket, Key="other", Body=b"foreign", Metadata=lie)
    assert store.put_once(bucket, "same", b"local") == "already there"
    with pytest.raises(ConflictError):
        store.put_once(bucket, "other", b"local")


def test_a_multipart_object_is_compared_by_its_bytes(store: Store, bucket: str, s3_environment: dict[str, str]) -> None:
    s3, data = stock(s3_environment), bytes(range(256)) * 24_000
    upload = s3.create_multipart_upload(Bucket=bucket, Key="big", ChecksumAlgorithm="SHA256")["UploadId"]
    parts = []
    for number, piece in enumerate((data[: 5 * 2**20], data[5 * 2**20 :]), start=1):
        sent = s3.upload_part(
            Bucket=bucket, Key="big", UploadId=upload, PartNumber=number, Body=piece,
            ChecksumSHA256=base64.b64encode(hashlib.sha256(piece).digest()).decode(),
        )  # fmt: skip
        parts.append({"PartNumber": number, "ETag": sent["ETag"], "ChecksumSHA256": sent["ChecksumSHA256"]})
    s3.complete_multipart_upload(Bucket=bucket, Key="big", UploadId=upload, MultipartUpload={"Parts": parts})
    assert store.put_once(bucket, "big", data) == "already there"
    with pytest.raises(ConflictError):
        store.put_once(bucket, "big", data[:-1])


def test_object_over_5_gib_is_rejected_before_sending(store: Store, bucket: str, tmp_path: Path) -> None:
    with (tmp_path / "large").open("wb+") as file:
        file.truncate(MAX_PUT_BYTES + 1)
        with pytest.raises(UserError, match=r"a/large would have 5,368,709,121 bytes.* smaller sampling_batch.chunk"):
            store.put_once(bucket, "a/large", file)
    assert not store.exists(bucket, "a/large")


def test_of_many_writers_at_once_exactly_one_wins(store: Store, bucket: str) -> None:
    writers = 4
    start = threading.Barrier(writers)

    def write(key: str, number: int) -> str:
        start.wait()
        try:
            return store.put_once(bucket, key, f"writer {number}".encode())
        except ConflictError:
            return "held"

    with ThreadPoolExecutor(writers) as pool:
        for round_ in range(3):
            outcomes = list(pool.map(lambda number, key=f"r{round_}": write(key, number), range(writers)))
            assert sorted(outcomes) == ["held"] * (writers - 1) + ["written"]
            assert store.get(bucket, f"r{round_}") == f"writer {outcomes.index('written')}".encode()


def test_many_objects_are_written_together_and_each_only_once(store: Store, bucket: str) -> None:
    objects = [Object(f"p/{n:03d}", f"object {n}".encode()) for n in range(60)]
    store.put_many(bucket, objects[::2])
    assert store.put_many(bucket, objects) == ["already there", "written"] * 30
    assert list(store.list_keys(bucket, "p/")) == [o.key for o in objects]
    assert store.put_many(bucket, []) == []


def test_conflicting_object_among_many_is_reported(store: Store, bucket: str) -> None:
    store.put_once(bucket, "p/7", b"other")
    with pytest.raises(ConflictError, match="p/7"):
        store.put_many(bucket, [Object(f"p/{n}", b"same") for n in range(20)])


def test_listings_cover_more_than_a_thousand_keys_and_folders(store: Store, bucket: str) -> None:
    keys = [f"list/{n % 7}/{n:04d}" for n in range(1100)]
    store.put_many(bucket, [Object(key, b"") for key in keys], workers=16)
    store.put_once(bucket, "listing", b"")
    assert sorted(store.list_keys(bucket, "list/")) == sorted(keys)
    assert list(store.list_keys(bucket, "none/")) == []


def test_listing_has_sizes_and_etags_of_the_bytes(store: Store, bucket: str, s3_environment: dict[str, str]) -> None:
    store.put_many(bucket, [Object("a/1", b"one"), Object("a/2", b"three"), Object("b", b"")])
    before = list(store.list_objects(bucket, "a/"))
    assert [(each.key, each.size) for each in before] == [("a/1", 3), ("a/2", 5)]
    assert before[0].etag == stock(s3_environment).head_object(Bucket=bucket, Key="a/1")["ETag"].strip('"')
    stock(s3_environment).put_object(Bucket=bucket, Key="a/1", Body=b"two")
    after = list(store.list_objects(bucket, "a/"))
    assert after[0].etag != before[0].etag
    assert after[1] == before[1]


def test_many_objects_are_deleted_and_no_others(store: Store, bucket: str) -> None:
    keys = [f"p/{n:04d} ü&" for n in range(1001)]
    store.put_many(bucket, [Object(key, b"") for key in [*keys, "pp", "q/0"]], workers=16)
    store.delete_many(bucket, (key for key in [*keys, "never/there"]))
    assert list(store.list_keys(bucket)) == ["pp", "q/0"]
    store.delete_many(bucket, [])


def test_an_object_is_downloaded_whole_or_not_at_all(
    store: Store, bucket: str, breaking_server: str, tmp_path: Path
) -> None:
    data = bytes(range(256)) * 20_000
    store.put_once(bucket, "big", data)
    for write in (store.download, store.fetch):
        (tmp_path / "big").write_bytes(b"older")
        write(bucket, "big", tmp_path / "big")
        assert (tmp_path / "big").read_bytes() == data
    assert store.download(bucket, "big", tmp_path / "deep" / "big") == hashlib.sha256(data).hexdigest()
    with pytest.raises(MissingObjectError):
        store.download(bucket, "small", tmp_path / "small")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["big", "deep"]
    keys = {"AWS_ENDPOINT_URL_S3": breaking_server, "AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "s"}
    Store(client(attempts=1, variables=keys)).download("prints", "x", tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == b"image"


def test_existing_objects_are_found_and_others_missing(store: Store, bucket: str) -> None:
    store.put_once(bucket, "empty", b"")
    assert store.exists(bucket, "empty")
    assert store.get(bucket, "empty") == b""
    assert not store.exists(bucket, "emp")
    with pytest.raises(MissingObjectError, match=f"s3://{bucket}/emp does not exist"):
        store.get(bucket, "emp")


def test_bucket_is_created_once(store: Store, bucket: str) -> None:
    store.put_once(bucket, "kept", b"")
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: store.ensure_bucket(bucket), range(4)))
        list(pool.map(lambda _: store.ensure_bucket(f"{bucket}-new"[:63]), range(4)))
    assert store.exists(bucket, "kept")


def test_server_that_honours_conditions_passes_the_probe(store: Store, bucket: str) -> None:
    for _ in range(3):
        store.require_conditional_puts(bucket, "prints")
    assert len(list(store.list_keys(bucket, "prints/"))) == 1


@pytest.fixture(params=["ignores", "does not know"])
def old_server(request: pytest.FixtureRequest) -> Iterator[tuple[str, str]]:
    """An S3 server that takes every PUT whatever its condition, or answers 501 to conditions.

    Such servers are sold, but none of them can be had as a package: this is as much of one as the probe sees.
    """

    class Handler(QuietHandler):
        protocol_version = "HTTP/1.1"

        def do_PUT(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            refuse = request.param == "does not know" and "If-None-Match" in self.headers
            body = b"<Error><Code>NotImplemented</Code></Error>" if refuse else b""
            self.answer(body, "application/xml", 501 if refuse else 200)

    with serving(Handler) as url:
        yield url, request.param


def test_a_server_without_conditions_is_rejected(old_server: tuple[str, str]) -> None:
    url, why = old_server
    keys = {"AWS_ENDPOINT_URL_S3": url, "AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "s"}
    with pytest.raises(UserError, match=f"{url} {why} the condition If-None-Match"):
        Store(client(attempts=1, variables=keys)).require_conditional_puts("prints")


@pytest.fixture
def breaking_server() -> Iterator[str]:
    """An S3 server whose connection breaks in the middle of the first body: no real one does it to order."""
    answers = iter([b"pict", b"image"])

    class Handler(QuietHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", "5")
            self.end_headers()
            self.wfile.write(next(answers))

    with serving(Handler) as url:
        yield url


def test_a_read_that_breaks_off_is_read_again(breaking_server: str) -> None:
    keys = {"AWS_ENDPOINT_URL_S3": breaking_server, "AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "s"}
    assert Store(client(attempts=1, variables=keys)).get("prints", "x") == b"image"


ANSWERS: dict[str, type[DarkroomError]] = {
    "503/SlowDown": TransientError,
    "429/TooManyRequests": TransientError,
    "500/InternalError": TransientError,
    "502/BadGateway": TransientError,
    "400/RequestTimeout": TransientError,
    "400/BadDigest": TransientError,
    "409/OperationAborted": TransientError,
    "409/BucketAlreadyExists": UserError,
    "507/InsufficientStorage": UserError,
    "403/QuotaExceeded": UserError,
    "413/EntityTooLarge": UserError,
    "405/MethodNotAllowed": UserError,
    "501/NotImplemented": UserError,
    "400/SomethingNew": DarkroomError,
    "599/SomethingElse": DarkroomError,
}


def test_each_answer_has_a_reason_and_a_remedy() -> None:
    class Handler(QuietHandler):
        def do_GET(self) -> None:
            _, _, status, code, message = self.path.split("?")[0].split("/")
            body = (
                f"<Error><Code>{code}</Code><Message>{message and 'a reason' + chr(10) + 'in lines'}</Message></Error>"
            )
            self.answer(body.encode(), "application/xml", int(status))

    with serving(Handler) as url:
        keys = {"AWS_ENDPOINT_URL_S3": url, "AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "s"}
        store = Store(client(attempts=1, variables=keys))
        for answer, kind in ANSWERS.items():
            for message in ("", "with"):
                with pytest.raises(DarkroomError) as error:
                    store.get("prints", f"{answer}/{message}")
                assert type(error.value) is kind, answer
                [line] = str(error.value).splitlines()
                before, _, fix = line.rpartition("): ")
                assert len(fix.split()) > 3, answer
                assert ("a reason in lines" in before) is bool(message)
                # The reason in words, and not the code alone.
                assert re.search(rf"{url} [a-z' ,]+ [a-z' ,]+\({answer.partition('/')[2]}", before), answer


def test_a_wrong_key_is_rejected_in_one_line(s3_environment: dict[str, str], bucket: str) -> None:
    for change in ({"AWS_SECRET_ACCESS_KEY": "wrong"}, {"AWS_ACCESS_KEY_ID": "nobody"}):
        store = Store(client(variables={**s3_environment, **change}))
        for request in (
            lambda s: s.put_once(bucket, "x", b""),
            lambda s: s.get(bucket, "x"),
            lambda s: s.exists(bucket, "x"),
            lambda s: s.ensure_bucket(bucket),
            lambda s: list(s.list_keys(bucket)),
            lambda s: s.delete_many(bucket, ["x"]),
            lambda s: s.require_conditional_puts(bucket),
        ):
            with pytest.raises(
                UserError, match=r"(denies access|rejects the credentials) .*AWS_SECRET_ACCESS_KEY"
            ) as refusal:
                request(store)
            assert "\n" not in str(refusal.value)


def test_a_bucket_that_is_not_there_is_named(store: Store) -> None:
    for request in (
        lambda: store.put_once("no-such-bucket", "x", b""),
        lambda: list(store.list_keys("no-such-bucket")),
        lambda: store.get("no-such-bucket", "x"),
    ):
        with pytest.raises(UserError, match=r"there is no bucket no-such-bucket at .*DARKROOM_BUCKET"):
            request()


def test_a_server_that_does_not_answer_is_named(s3_environment: dict[str, str]) -> None:
    away = {**s3_environment, "AWS_ENDPOINT_URL_S3": "http://127.0.0.1:9"}
    with pytest.raises(UserError, match=r"http://127.0.0.1:9 does not answer.*AWS_ENDPOINT_URL_S3"):
        Store(client(attempts=1, variables=away)).exists("prints", "x")


@pytest.mark.parametrize(
    "change", [{"AWS_ENDPOINT_URL_S3": "no url"}, {"AWS_SECRET_ACCESS_KEY": ""}, {"AWS_DEFAULT_REGION": "no region!"}]
)
def test_invalid_s3_settings_are_an_error(no_servers: None, s3_server: dict[str, str], change: dict[str, str]) -> None:
    with pytest.raises(UserError, match="AWS_"):
        client(variables={**s3_server, **change})
