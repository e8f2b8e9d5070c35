"""Data sets of the Hugging Face Hub, asked by the real client of a stub that also misbehaves."""

import io
import json
import logging
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tenacity import wait_fixed

from diffusion.common.errors import DarkroomError, TransientError, UserError
from diffusion.data.ingest.config import IngestConfig
from diffusion.data.ingest.ingest import ingest
from diffusion.data.ingest.preview import preview
from diffusion.data.manifest import read_manifest, read_records
from diffusion.data.sources import open_source
from tests.builders.reading_sources import access, payloads, png, read_all
from tests.hub import TOKEN, Hub, hub_server

CARD = b"---\nlicense: cc-by-4.0\n---\n# Blobs\n"


def parquet(numbers: range, text: str = "text", image: str = "image") -> bytes:
    """A file as Hugging Face's ``datasets`` pushes it: classes, captions, an image column."""
    features = {
        image: {"_type": "Image"},
        "label": {"_type": "ClassLabel", "names": ["even", "odd"]},
        text: {"dtype": "string", "_type": "Value"},
    }
    columns = {
        image: [{"bytes": png(number), "path": f"{number}.png"} for number in numbers],
        "label": [number % 2 for number in numbers],
        text: [f"blob {number}" for number in numbers],
    }
    table = pa.table(columns).replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, buffer := io.BytesIO())
    return buffer.getvalue()


def shard(members: dict[str, bytes]) -> bytes:
    with tarfile.open(fileobj=(buffer := io.BytesIO()), mode="w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def config(source: str, **fields: object) -> IngestConfig:
    return IngestConfig.model_validate({"source": source, "size": 8} | fields)


def test_parquet_files_of_a_split_with_classes_and_captions(hub: Hub, tmp_path: Path) -> None:
    hub.dataset(
        "me/blobs",
        {
            "README.md": CARD,
            "data/train-00000-of-00002.parquet": parquet(range(3)),
            "data/train-00001-of-00002.parquet": parquet(range(3, 5)),
            "data/test-00000-of-00001.parquet": parquet(range(5, 7)),
            "assets/plot.png": png(99),
        },
    )
    items = read_all("hf://datasets/me/blobs", access(tmp_path / "scratch"))
    assert [(each.name, each.label, each.caption) for each in items] == [
        ("me/blobs/data/train-00000-of-00002.parquet/0", "even", "blob 0"),
        ("me/blobs/data/train-00000-of-00002.parquet/1", "odd", "blob 1"),
        ("me/blobs/data/train-00000-of-00002.parquet/2", "even", "blob 2"),
        ("me/blobs/data/train-00001-of-00002.parquet/0", "odd", "blob 3"),
        ("me/blobs/data/train-00001-of-00002.parquet/1", "even", "blob 4"),
    ]
    assert [each.payload for each in items] == [png(number) for number in range(5)]
    assert len(read_all("hf://datasets/me/blobs?split=test", access(tmp_path / "scratch"))) == 2
    assert len(read_all("hf://datasets/me/blobs?split=all", access(tmp_path / "scratch"))) == 7


def test_columns_are_named_by_options(hub: Hub, tmp_path: Path) -> None:
    hub.dataset("me/blobs", {"train.parquet": parquet(range(2), text="prompt", image="photo")})
    source_access = access(tmp_path / "scratch")
    assert [each.caption for each in read_all("hf://datasets/me/blobs", source_access)] == [None, None]
    uri = "hf://datasets/me/blobs?image=photo&caption=prompt&label=prompt"
    assert [(each.label, each.caption) for each in read_all(uri, source_access)] == [("blob 0",) * 2, ("blob 1",) * 2]
    with pytest.raises(UserError, match=r"no column nope.*photo.*prompt") as error:
        read_all("hf://datasets/me/blobs?caption=nope", source_access)
    assert str(tmp_path) not in str(error.value)


def test_the_card_names_configurations_and_their_files(hub: Hub, tmp_path: Path) -> None:
    card = b"""---
configs:
- config_name: small
  data_files:
  - {split: train, path: "s/*.parquet"}
  - {split: extra, path: ["x/**/e-{0,1}.parquet"]}
- config_name: large
  default: true
  data_files: l/part?.parquet
---
"""
    hub.dataset(
        "me/blobs",
        {
            "README.md": card,
            "s/a.parquet": parquet(range(1)),
            "s/deeper/b.parquet": parquet(range(1, 2)),
            "x/y/e-0.parquet": parquet(range(2, 3)),
            "x/e-1.parquet": parquet(range(3, 4)),
            "l/part1.parquet": parquet(range(4, 6)),
        },
    )
    source_access = access(tmp_path / "scratch")

    def captions(options: str) -> list[str | None]:
        return [each.caption for each in read_all(f"hf://datasets/me/blobs{options}", source_access)]

    assert captions("") == ["blob 4", "blob 5"]
    assert captions("?config=small") == ["blob 0"]
    assert captions("?config=small&split=extra") == ["blob 3", "blob 2"]
    with pytest.raises(UserError, match=r"small, large"):
        captions("?config=medium")
    with pytest.raises(UserError, match=r"no split test: there is train, extra"):
        captions("?config=small&split=test")


def test_a_card_cannot_keep_its_reader_busy(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffusion.data.sources.local_files.MAX_NAMES", 100)

    def card(pattern: str) -> bytes:
        return f"---\nconfigs: [{{config_name: a, data_files: '{pattern}'}}]\n---\n".encode()

    source_access = access(tmp_path / "scratch")
    # Matched with backtracking, it takes years; and these braces stand for 2^40 names.
    hub.dataset("me/stars", {"README.md": card("**a" * 20 + "*.parquet"), "a" * 40 + ".parquet": parquet(range(1))})
    assert len(list(open_source("hf://datasets/me/stars", source_access).entries())) == 1
    hub.dataset("me/stars", {"README.md": card("**a" * 20), "a" * 60 + ".parquet": parquet(range(1))})
    with pytest.raises(UserError, match="no images"):
        list(open_source("hf://datasets/me/stars", source_access).entries())
    hub.dataset("me/braces", {"README.md": card("{a,b}" * 40), "a.parquet": b""})
    with pytest.raises(UserError, match="names"):
        list(open_source("hf://datasets/me/braces", source_access).entries())


def test_image_folders_with_classes_and_with_metadata(hub: Hub, tmp_path: Path) -> None:
    source_access = access(tmp_path / "scratch", max_bytes=1024)
    files = {f"train/{name}/{number}.png": png(number) for number, name in enumerate(("cat", "dog", "cat"))}
    hub.dataset("me/pets", files | {"test/cat/9.png": png(9), "train/cat/large.png": bytes(2000)})
    items = {each.name: (each.label, each.payload) for each in read_all("hf://datasets/me/pets", source_access)}
    assert items.pop("me/pets/train/cat/large.png")[1] == "2000 bytes are over the limit of 1024"
    assert items == {
        "me/pets/train/cat/0.png": ("cat", png(0)),
        "me/pets/train/dog/1.png": ("dog", png(1)),
        "me/pets/train/cat/2.png": ("cat", png(2)),
    }
    table = b"file_name,text\nimages/0.png,a red blob\nimages/gone.png,nothing\n"
    hub.dataset("me/captioned", {"metadata.csv": table, "images/0.png": png(0), "images/1.png": png(1)})
    items = {each.name: (each.caption, each.payload) for each in read_all("hf://datasets/me/captioned", source_access)}
    assert items == {
        "me/captioned/images/0.png": ("a red blob", png(0)),
        "me/captioned/images/gone.png": ("nothing", "named in the listing but missing"),
    }


def test_webdataset_shards(hub: Hub, tmp_path: Path) -> None:
    tar = shard({"a.png": png(0), "a.txt": b"first", "b.png": png(1), "b.json": b'{"label": "odd"}'})
    hub.dataset("me/shards", {"0000.tar": tar, "0001.tar": shard({"c.png": png(2)})})
    items = read_all("hf://datasets/me/shards", access(tmp_path / "scratch"))
    assert [(each.name, each.label, each.caption, each.payload) for each in items] == [
        ("me/shards/0000.tar/a.png", None, "first", png(0)),
        ("me/shards/0000.tar/b.png", "odd", None, png(1)),
        ("me/shards/0001.tar/c.png", None, None, png(2)),
    ]


def test_ingests_record_commit_and_licence(hub: Hub, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    files = {"README.md": CARD, "a.parquet": parquet(range(30))}
    repo = hub.dataset("me/blobs", files)
    first = repo.refs["main"]
    folder = tmp_path / "data" / "blobs"
    result = ingest(folder, config("hf://datasets/me/blobs@main"))
    manifest = read_manifest(folder)
    assert (result.kept, manifest.licence) == (30, "cc-by-4.0")
    assert result.source == f"hf://datasets/me/blobs@{first}"
    assert manifest.sources == [result.source]

    second = repo.commit(files | {"b.parquet": parquet(range(30, 40))})
    hub.requests.clear()
    result = ingest(folder, config("hf://datasets/me/blobs@main"))
    assert (result.listed, result.read, result.added) == (40, 10, 10)
    assert hub.paths("parquet") == [f"/datasets/me/blobs/resolve/{second}/b.parquet"]
    assert read_manifest(folder).sources == [f"hf://datasets/me/blobs@{commit}" for commit in (first, second)]

    # Pinned to a commit it is the same source: nothing is new, and nothing fetched.
    hub.requests.clear()
    result = ingest(folder, config(f"hf://datasets/me/blobs@{first}"))
    assert (result.read, result.changed, hub.paths("parquet")) == (0, False, [])
    assert preview(folder, config("hf://datasets/me/blobs")).new == 0
    assert caplog.records == []


def test_a_licence_that_contradicts_the_card_stays_and_is_said(
    hub: Hub, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    hub.dataset("me/blobs", {"README.md": CARD, "a.parquet": parquet(range(30))})
    folder = tmp_path / "data" / "blobs"
    with caplog.at_level(logging.WARNING):
        ingest(folder, config("hf://datasets/me/blobs", licence="MIT"))
    assert read_manifest(folder).licence == "MIT"
    [record] = caplog.records
    assert "cc-by-4.0" in record.getMessage()
    assert "MIT" in record.getMessage()


@pytest.mark.parametrize(
    ("card", "licence"),
    [
        (b"no front matter", None),
        (b"---\nlicense: unknown\n---\n", None),
        (b"---\nlicense: [mit, cc0-1.0]\n---\n", "mit, cc0-1.0"),
        (b"---\nlicense: other\nlicense_name: my-terms\n---\n", "my-terms"),
        (b"---\n[unbalanced\n---\n", None),
    ],
)
def test_licences_of_cards(hub: Hub, tmp_path: Path, card: bytes, licence: str | None) -> None:
    hub.dataset("me/blobs", {"README.md": card, "a.parquet": parquet(range(1))})
    source_access = access(tmp_path / "scratch")
    list(open_source("hf://datasets/me/blobs", source_access).entries())
    assert source_access.about.get("licence") == licence


def test_dropped_connections_and_busy_servers_are_retried(hub: Hub, tmp_path: Path) -> None:
    hub.dataset("me/blobs", {"a.parquet": parquet(range(80))})
    hub.statuses, hub.drop_after = [503, 429], 5000
    assert len(read_all("hf://datasets/me/blobs", access(tmp_path / "scratch"))) == 80
    ranges = [headers["Range"] for _, path, headers in hub.requests if "resolve" in path and "Range" in headers]
    assert ranges[:2] == ["bytes=5000-", "bytes=10000-"]


def test_incomplete_answers_of_the_hub_end_in_bounded_time(hub: Hub, tmp_path: Path) -> None:
    hub.dataset("me/blobs", {"a.parquet": parquet(range(2))})
    hub.drop_after = 0
    with pytest.raises(TransientError, match=r"a\.parquet of hf://datasets/me/blobs@"):
        read_all("hf://datasets/me/blobs", access(tmp_path / "scratch"))
    assert len(hub.paths("resolve")) == 5


@pytest.mark.parametrize("lie", [{"other_bytes": True}, {"added_size": 5}, {"added_size": -5}, {"endless": True}])
def test_other_bytes_than_listed_are_never_read(hub: Hub, tmp_path: Path, lie: dict[str, object]) -> None:
    hub.dataset("me/blobs", {"a.parquet": parquet(range(2))})
    hub.dataset("me/images", {"a.png": png(1), "b.png": png(2)})
    vars(hub).update(lie)
    for name in ("blobs", "images"):
        with pytest.raises(DarkroomError, match=f"me/{name}@"):
            read_all(f"hf://datasets/me/{name}", access(tmp_path / "scratch"))
    assert not list((tmp_path / "scratch").glob("hub-*"))


def test_another_commit_than_the_pinned_one_is_not_read(hub: Hub, tmp_path: Path) -> None:
    repo = hub.dataset("me/blobs", {"a.parquet": parquet(range(2))})
    hub.other_commit = True
    with pytest.raises(DarkroomError, match="f" * 40):
        read_all(f"hf://datasets/me/blobs@{repo.refs['main']}", access(tmp_path / "scratch"))


def test_a_token_opens_private_sets_and_is_seen_nowhere(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    hub.dataset("me/private", {"a.parquet": parquet(range(30))}, private=True)
    hub.dataset("me/gated", {"a.parquet": parquet(range(30))}, gated=True)
    folder = tmp_path / "data" / "blobs"
    for name in ("private", "gated"):
        with pytest.raises(UserError, match="HF_TOKEN"):
            ingest(folder, config(f"hf://datasets/me/{name}"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with hub_server() as other, caplog.at_level(logging.DEBUG):
        # A host that large files are redirected to gets no token.
        other.repos, hub.elsewhere = hub.repos, other.address
        assert ingest(folder, config("hf://datasets/me/private")).kept == 30
        assert other.requests
        assert all("Authorization" not in headers for _, _, headers in other.requests)
    assert TOKEN not in caplog.text
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert files
    assert not [path for path in files if TOKEN.encode() in path.read_bytes()]
    records = [read_records(folder, part).to_pylist() for part in read_manifest(folder).parts]
    assert TOKEN not in repr(records)


def test_no_link_to_another_page_gets_the_token(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    files = {f"{number}.png": png(number) for number in range(20)}
    hub.dataset("me/blobs", files)
    with hub_server() as other:
        other.dataset("me/blobs", files)
        other.pages_at, hub.pages_at = hub.address, other.address
        assert len(payloads("hf://datasets/me/blobs", access(tmp_path / "scratch"))) == 20
        assert [path for path in other.paths("tree") if "cursor" in path]
        assert all("Authorization" not in headers for _, _, headers in other.requests)
    own = [headers.get("Authorization") for _, path, headers in hub.requests if "resolve" in path or "tree" in path]
    assert set(own) == {f"Bearer {TOKEN}"}


def misbehave(hub: Hub, **fields: object) -> None:
    hub.dataset("me/blobs", {"a.parquet": parquet(range(80))})
    vars(hub).update(fields)


@pytest.mark.parametrize("fields", [{"drip": 0.05}, {"pause": 0.05, "piece": 1}], ids=["headers", "file"])
def test_slow_bytes_of_the_hub_end_in_bounded_time(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fields: dict[str, object]
) -> None:
    monkeypatch.setattr("diffusion.common.hub.SECONDS", 0.2)
    misbehave(hub, **fields)
    start = time.monotonic()
    with pytest.raises(TransientError):
        read_all("hf://datasets/me/blobs", access(tmp_path / "scratch"))
    assert time.monotonic() - start < 10
    assert len(hub.requests) < 10


def test_a_byte_for_each_attempt_is_not_progress(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffusion.common.http_client.PAUSE", wait_fixed(0.01))
    misbehave(hub, drop_after=1)
    with pytest.raises(TransientError):
        read_all("hf://datasets/me/blobs", access(tmp_path / "scratch"))
    assert len(hub.paths("resolve")) == 5


def test_a_listing_without_end_is_an_error(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffusion.common.hub.MAX_LISTING_SECONDS", 0.5)
    misbehave(hub, empty_pages=True)
    with pytest.raises(DarkroomError, match="HF_ENDPOINT"):
        read_all("hf://datasets/me/blobs", access(tmp_path / "scratch"))


def test_a_hub_cannot_ask_for_a_pause_without_end(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library would sleep as long as the answer says."""
    monkeypatch.setattr("diffusion.common.http_client.MAX_PAUSE", 0.0)
    misbehave(hub, statuses=[429], retry_after="999999999")
    assert len(read_all("hf://datasets/me/blobs", access(tmp_path / "scratch"))) == 80


def test_a_login_on_this_machine_is_not_used(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "token").write_text(TOKEN)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "token"))
    hub.dataset("me/private", {"a.parquet": parquet(range(2))}, private=True)
    with pytest.raises(UserError, match="HF_TOKEN"):
        read_all("hf://datasets/me/private", access(tmp_path / "scratch"))


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        ("hf://me/blobs", "hf://datasets/OWNER/NAME"),
        ("hf://datasets/blobs", "hf://datasets/OWNER/NAME"),
        ("hf://datasets/me/nope", "OWNER/NAME"),
        ("hf://datasets/me/blobs@v2", "no revision v2: there is main"),
        ("hf://datasets/me/blobs?split=nope", "no split nope: there is train, test"),
        ("hf://datasets/me/blobs?config=nope", "no configuration nope"),
        ("hf://datasets/me/blobs?colour=red", "no option colour"),
        ("hf://datasets/me/text", r"no images.*\.txt"),
        ("hf://datasets/me/split", "a, b"),
        ("hf://datasets/me/images?caption=text", "no Parquet"),
    ],
)
def test_mistakes_are_one_line_with_what_there_is(hub: Hub, tmp_path: Path, uri: str, words: str) -> None:
    hub.dataset("me/blobs", {"train.parquet": parquet(range(1)), "test.parquet": parquet(range(1, 2))})
    hub.dataset("me/text", {"train.txt": b"words"})
    hub.dataset("me/images", {"a.png": png(1)})
    two = {f"{name}-00000-of-00001.parquet": parquet(range(1)) for name in ("a", "b")}
    hub.dataset("me/split", two)
    with pytest.raises(UserError, match=words) as error:
        read_all(uri, access(tmp_path / "scratch"))
    assert "\n" not in str(error.value)


def test_paths_that_lead_out_are_rejected(hub: Hub, tmp_path: Path) -> None:
    hub.dataset("me/blobs", {"../evil.parquet": parquet(range(1))})
    with pytest.raises(DarkroomError, match="evil"):
        payloads("hf://datasets/me/blobs", access(tmp_path / "scratch"))


def test_each_file_is_fetched_once_for_all_workers(hub: Hub, tmp_path: Path) -> None:
    hub.dataset("me/blobs", {"a.parquet": parquet(range(300)), "b.parquet": parquet(range(300, 600))})
    assert ingest(tmp_path / "data" / "blobs", config("hf://datasets/me/blobs", workers=4)).kept == 600
    assert len(hub.paths("resolve")) == 2


@pytest.mark.slow
def test_a_killed_ingest_goes_on_with_what_it_fetched(hub: Hub, tmp_path: Path) -> None:
    hub.dataset("me/blobs", {"a.parquet": parquet(range(600)), "b.parquet": parquet(range(600, 1200))})
    ingest(tmp_path / "whole" / "blobs", config("hf://datasets/me/blobs"))
    script = (
        "import sys; from pathlib import Path; from diffusion.data.ingest.config import IngestConfig; "
        "from diffusion.data.ingest.ingest import ingest; "
        "ingest(Path(sys.argv[1]), IngestConfig(source='hf://datasets/me/blobs', size=8))"
    )
    hub.pause, hub.piece = 0.05, 2**14
    folder = tmp_path / "data" / "blobs"
    child = subprocess.Popen([sys.executable, "-c", script, str(folder)])
    partials: list[Path] = []
    while not any(path.stat().st_size > 2**15 for path in partials):
        assert child.poll() is None
        time.sleep(0.01)
        partials = list((tmp_path / "data").rglob(".hub-*.partial"))
    child.kill()
    child.wait()
    hub.pause = 0.0
    hub.requests.clear()
    ingest(folder, config("hf://datasets/me/blobs"))
    assert [headers for _, path, headers in hub.requests if "parquet" in path and "Range" in headers]
    assert (folder / "manifest.json").read_bytes() == (tmp_path / "whole" / "blobs" / "manifest.json").read_bytes()
