"""Images on S3 as the source of an ingest, also when the connection to them drops."""

import json
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from math import inf
from pathlib import Path

import pytest

from diffusion.common.errors import DarkroomError, UserError
from diffusion.data.ingest.config import IngestConfig
from diffusion.data.ingest.ingest import IngestResult, ingest
from diffusion.data.sources import open_source
from flows.storage.s3 import Object, S3Objects, Store
from tests.builders import ROOT
from tests.builders.archives import tar_bytes
from tests.builders.ingested import files_of
from tests.builders.reading_sources import access, png, read_all
from tests.builders.s3_clients import stock
from tests.builders.s3_proxy import CUT, Request, proxied


def put(store: Store, bucket: str, files: Mapping[str, bytes]) -> None:
    store.put_many(bucket, [Object(name, data) for name, data in files.items()])


def overwrite(variables: dict[str, str], bucket: str, name: str, data: bytes) -> None:
    stock(variables).put_object(Bucket=bucket, Key=name, Body=data)


def make(folder: Path, uri: str, **fields: object) -> IngestResult:
    config = IngestConfig.model_validate({"source": uri, "size": 8, "held_out": 0.33} | fields)
    return ingest(folder, config, objects=S3Objects())


def test_a_prefix_is_a_folder(store: Store, bucket: str, tmp_path: Path) -> None:
    files = {
        "in/cat/a.png": b"1",
        "in/dog/ü b.jpg": b"22",
        "in/dog/.hidden.png": b"",
        "in/notes.txt": b"",
        "inn/c.png": b"",
    }
    put(store, bucket, files)
    source_access = access(tmp_path / "scratch", S3Objects())
    expected = [("cat/a.png", "cat", b"1"), ("dog/ü b.jpg", "dog", b"22")]
    for uri in (f"s3://{bucket}/in", f"s3://{bucket}/in/"):
        assert [(each.name, each.label, each.payload) for each in read_all(uri, source_access)] == expected
    assert len(read_all(f"s3://{bucket}", source_access)) == 3
    put(store, bucket, {"in/metadata.csv": b"file_name,label,text\ndog/\xc3\xbc b.jpg,x,y\ngone.png,,\n"})
    items = read_all(f"s3://{bucket}/in", source_access)
    assert [(each.name, each.label, each.caption, each.payload) for each in items] == [
        ("dog/ü b.jpg", "x", "y", b"22"),
        ("gone.png", None, None, "named in the listing but missing"),
    ]
    put(store, bucket, {"in/metadata.jsonl": b""})
    with pytest.raises(UserError, match="keep one of them"):
        read_all(f"s3://{bucket}/in", source_access)


def test_vanished_or_too_large_s3_objects_are_quarantined(store: Store, bucket: str, tmp_path: Path) -> None:
    put(store, bucket, {"a.png": b"x" * 1025, "b.png": b"x" * 1024, "c.png": b"1"})
    source_access = access(tmp_path / "scratch", S3Objects(), max_bytes=1024)
    entries = list(open_source(f"s3://{bucket}", source_access).entries())
    store.delete_many(bucket, ["c.png"])
    large, fits, gone = open_source(f"s3://{bucket}", source_access).read(entries)
    assert (str(large), fits) == ("1025 bytes are over the limit of 1024", b"x" * 1024)
    assert str(gone) == "named in the listing but missing"


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("s3://{}/a.tar", "is one file: write wds:s3://"),
        ("s3://no-such-bucket/x", "there is no bucket no-such-bucket"),
        ("s3://NO/x", "is not a bucket name"),
        ("wds:s3://{}/a.tar", "there is no object s3://.*/a.tar"),
        ("wds:s3://{}/**/a.tar", "has no meaning here"),
        ("wds:s3://{}/{{0..", "unbalanced braces"),
    ],
)
def test_missing_s3_source_is_a_one_line_error(bucket: str, tmp_path: Path, place: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        read_all(place.format(bucket), access(tmp_path / "scratch", S3Objects()))
    assert "\n" not in str(error.value)


def test_an_empty_prefix_is_an_error(bucket: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no images in s3://"):
        make(tmp_path / "set", f"s3://{bucket}/none")


def test_only_new_or_changed_s3_objects_are_fetched(
    store: Store, bucket: str, tmp_path: Path, s3_environment: dict[str, str]
) -> None:
    images = {f"in/{number % 2}/{number:02d}.png": png(number) for number in range(24)}
    put(store, bucket, images)
    uri, folder = f"s3://{bucket}/in", tmp_path / "set"
    first = make(folder, uri)
    assert (first.kept, first.read) == (24, 24)
    local = tmp_path / "local"
    for name, data in images.items():
        (local / name).parent.mkdir(parents=True, exist_ok=True)
        (local / name).write_bytes(data)
    assert make(tmp_path / "other", str(local / "in")).content_digest == first.content_digest
    again = make(folder, uri)
    assert (again.read, again.changed) == (0, False)
    overwrite(s3_environment, bucket, "in/0/04.png", png(99))
    put(store, bucket, {"in/1/new.png": png(98)})
    grown = make(folder, uri)
    assert (grown.read, grown.added, grown.kept) == (2, 2, 26)


def test_shards_on_s3_are_read_by_pattern_and_fetched_once(
    store: Store, bucket: str, tmp_path: Path, s3_environment: dict[str, str]
) -> None:
    shards = {
        f"a/set-{shard}.tar": tar_bytes(
            {
                f"{shard}{n}.{kind}": data
                for n in range(6)
                for kind, data in (("png", png(10 * shard + n)), ("cls", b"7"))
            }
        )
        for shard in range(3)
    }
    put(store, bucket, {**shards, "a/deep/set-0.tar": b"", "a/set-9.txt": b""})
    source_access = access(tmp_path / "scratch", S3Objects())
    expected = [(f"set-{s}.tar/{s}{n}.png", "7", png(10 * s + n)) for s in range(3) for n in range(6)]
    for pattern in ("set-*.tar", "set-{0..2}.tar", "set-[0-2].tar", "{set-0,set-1,set-2}.tar"):
        items = [
            (each.name, each.label, each.payload) for each in read_all(f"wds:s3://{bucket}/a/{pattern}", source_access)
        ]
        assert items == expected
    assert len(list((tmp_path / "scratch").glob("fetched-*.tar"))) == 3
    uri = f"wds:s3://{bucket}/a/set-*.tar"
    assert make(tmp_path / "set", uri).kept == 18
    assert make(tmp_path / "set", uri).read == 0
    overwrite(s3_environment, bucket, "a/set-2.tar", tar_bytes({"20.png": png(20), "99.png": png(99)}))
    changed_items = make(tmp_path / "set", uri)
    assert (changed_items.read, changed_items.added) == (2, 1)
    entries = list(open_source(uri, source_access).entries())
    overwrite(s3_environment, bucket, "a/set-0.tar", tar_bytes({"00.png": png(1)}))
    with pytest.raises(UserError, match=r"set-0.tar has changed since it was listed"):
        list(open_source(uri, access(tmp_path / "another worker's", S3Objects())).read(entries))


def test_s3_adapter_can_be_pickled(store: Store, bucket: str, tmp_path: Path) -> None:
    put(store, bucket, {"in/a.png": b"1", "in/odd/b c.png": b"22"})
    objects = S3Objects()
    assert [each.size for each in objects.find(f"s3://{bucket}/in/")] == [1, 2]
    objects = pickle.loads(pickle.dumps(objects))  # noqa: S301 (it is the test's own)
    assert {objects.read(each.uri) for each in objects.find(f"s3://{bucket}/in/")} == {b"1", b"22"}
    objects.download(f"s3://{bucket}/in/a.png", tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes() == b"1"
    with pytest.raises(FileNotFoundError):
        objects.read(f"s3://{bucket}/in/c.png")
    with pytest.raises(FileNotFoundError):
        objects.download(f"s3://{bucket}/in/c.png", tmp_path / "c.png")
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


@pytest.mark.slow
def test_processes_fetch_what_threads_do(store: Store, bucket: str, tmp_path: Path) -> None:
    put(store, bucket, {f"{number:02d}.png": png(number) for number in range(12)})
    threads = make(tmp_path / "a" / "set", f"s3://{bucket}")
    # A process of its own, as the helpers of this one may know another environment.
    script = (
        "import sys; from pathlib import Path; from diffusion.data.ingest.config import IngestConfig; "
        "from diffusion.data.ingest.ingest import ingest; from flows.storage.s3 import S3Objects\n"
        "if __name__ == '__main__': print(ingest(Path(sys.argv[1]), IngestConfig(source=sys.argv[2], size=8, "
        "held_out=0.33, runner='processes'), objects=S3Objects()).model_dump_json())"
    )
    (tmp_path / "script.py").write_text(script)
    command = [sys.executable, str(tmp_path / "script.py"), str(tmp_path / "b" / "set"), f"s3://{bucket}"]
    variables = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.run(command, check=True, capture_output=True, text=True, env=variables)
    assert json.loads(process.stdout)["digest"] == threads.digest


@dataclass
class Cuts:
    """Which answers of the server are cut in the middle of their bodies, and how many more of them."""

    chosen: Callable[[Request], bool] = lambda request: True
    left: float = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __call__(self, request: Request) -> str | None:
        with self.lock:
            if self.left == 0 or not self.chosen(request):
                return None
            self.left -= 1
            return CUT


@pytest.fixture
def cuts(bucket: str, s3_environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Cuts]:
    """Of a proxy before the server."""
    with proxied(s3_environment, cuts := Cuts()) as url:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", url)
        yield cuts


def of_images(request: Request) -> bool:
    return request.key.endswith(".png")


def of_shards(request: Request) -> bool:
    return request.key.endswith(".tar")


def of_listings(request: Request) -> bool:
    return "list-type" in request.query


def test_a_connection_that_drops_for_a_while_changes_nothing(
    store: Store, bucket: str, cuts: Cuts, tmp_path: Path
) -> None:
    put(store, bucket, {f"in/{number % 2}/{number:02d}.png": png(number) for number in range(24)})
    put(store, bucket, {"shards/a.tar": tar_bytes({f"{number}.png": png(number) for number in range(12)})})
    for kind, uri, chosen, count in (
        ("images", f"s3://{bucket}/in", of_images, 5),
        ("shards", f"wds:s3://{bucket}/shards/a.tar", of_shards, 5),
        ("listings", f"s3://{bucket}/in", of_listings, 2),
    ):
        make(tmp_path / kind / "undisturbed" / "set", uri)
        cuts.chosen, cuts.left = chosen, count
        make(tmp_path / kind / "disturbed" / "set", uri)
        assert cuts.left == 0
        assert files_of(tmp_path / kind / "disturbed" / "set") == files_of(tmp_path / kind / "undisturbed" / "set")


@pytest.mark.slow
def test_after_a_lost_connection_the_same_command_ends_right(
    store: Store, bucket: str, cuts: Cuts, tmp_path: Path
) -> None:
    put(store, bucket, {f"in/{number % 2}/{number:02d}.png": png(number) for number in range(24)})
    put(store, bucket, {"shards/a.tar": tar_bytes({f"{number}.png": png(number) for number in range(12)})})
    for uri, chosen in ((f"s3://{bucket}/in", of_images), (f"wds:s3://{bucket}/shards/a.tar", of_shards)):
        kind = uri[:3]
        make(tmp_path / kind / "undisturbed" / "set", uri)
        folder = tmp_path / kind / "disturbed" / "set"
        cuts.chosen, cuts.left = chosen, inf
        with pytest.raises(
            DarkroomError, match=r"s3://.*breaks off or is damaged: .* give the same command again"
        ) as error:
            make(folder, uri)
        assert "\n" not in str(error.value)
        assert files_of(folder) == {}
        assert not list((folder.parent / ".set" / "scratch").glob(".*.partial"))
        cuts.left = 0
        make(folder, uri)
        assert files_of(folder) == files_of(tmp_path / kind / "undisturbed" / "set")


def test_lost_connections_leave_the_version_whole(store: Store, bucket: str, cuts: Cuts, tmp_path: Path) -> None:
    put(store, bucket, {f"{number:02d}.png": png(number) for number in range(12)})
    make(tmp_path / "set", f"s3://{bucket}")
    before = files_of(tmp_path / "set")
    put(store, bucket, {"more.png": png(99)})
    cuts.chosen, cuts.left = of_images, inf
    with pytest.raises(DarkroomError):
        make(tmp_path / "set", f"s3://{bucket}")
    assert files_of(tmp_path / "set") == before
    cuts.left = 0
    assert make(tmp_path / "set", f"s3://{bucket}").added == 1
