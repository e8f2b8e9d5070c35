"""Captions beside images, in each convention that other tools write, and what may lie there instead."""

import io
import json
import tarfile
import time
import zipfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffusion.common.errors import UserError
from diffusion.data.ingest.config import IngestConfig
from diffusion.data.ingest.ingest import ingest
from diffusion.data.manifest import read_manifest, read_records
from diffusion.data.sources import open_source
from diffusion.data.sources.base import Access, ObjectStore
from diffusion.data.sources.caption_files import (
    CAPTION_FILES,
    MAX_TEXT_BYTES,
    ForeignFileError,
    TextFile,
    decode_text,
    join_captions,
    to_caption,
)
from tests.builders.reading_sources import Objects, access, png, read_all, write_files

CONVENTIONS: dict[str, tuple[dict[str, bytes], str]] = {
    # Files beside a.png and b/c.jpg, whose captions are "a red cat" and "dog, 犬", and where they stand.
    "txt": ({"a.txt": b"a red cat\n", "b/c.txt": "dog, 犬".encode()}, "NAME.txt"),
    "UTF-16": ({"a.TXT": "a red cat".encode("utf-16"), "b/c.txt": "\ufeffdog, 犬\r\n".encode()}, "NAME.txt"),
    "caption": ({"a.caption": b"a red cat", "b/c.caption": "dog, 犬".encode()}, "NAME.caption"),
    "ai-toolkit": ({"a.json": b'{"caption": "a red cat"}', "b/c.json": '{"caption": "dog, 犬"}'.encode()}, "NAME.json"),
    "sd-scripts": (
        {"a.json": b'{"caption": "a", "tags": "red cat"}', "b/c.json": '{"tags": ["dog", "犬"]}'.encode()},
        "NAME.json",
    ),
    "table": ({"captions.csv": 'file_name,caption\na.png,a red cat\nb/c.jpg,"dog, 犬"\n'.encode()}, "captions.csv"),
    "other columns": (
        {"captions.csv": '\ufeffIndex,Image,Prompt\n1,./a.png,a red cat\n2,b\\c.jpg,"dog, 犬"\n'.encode()},
        "captions.csv",
    ),
    "metadata": (
        {
            "metadata.jsonl": '{"file_name": "a.png", "text": "a red cat"}\n'
            '{"file_name": "b/c.jpg", "caption": ["dog, 犬"]}\n'.encode()
        },
        "metadata.jsonl",
    ),
}
IMAGES = {"a.png": b"1", "b/c.jpg": b"2"}


def pack(kind: str, root: Path, files: dict[str, bytes]) -> tuple[str, ObjectStore | None]:
    """Write ``files`` as a source of ``kind``; returns its URI and its object store."""
    if kind == "folder":
        return str(write_files(root / "set", files)), None
    if kind == "s3":
        return "s3://bucket/set", Objects({f"s3://bucket/set/{name}": data for name, data in files.items()})
    path = root / f"set.{kind}"
    if kind == "zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, data in files.items():
                archive.writestr(name, data)
    else:
        with tarfile.open(path, "w" if kind == "tar" else "w:gz") as tar:
            for name, data in files.items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return str(path), None


each_kind = pytest.mark.parametrize("kind", ["folder", "zip", "tar", "tar.gz", "s3"])


def listed(files: dict[str, bytes], tmp_path: Path, **fields: object) -> tuple[dict[str, str | None], Access]:
    """Captions, or reasons why there are none, of a folder with ``files``; and what its listing found."""
    source_access = access(tmp_path / "scratch", **fields)
    source = open_source(str(write_files(tmp_path / "set", files)), source_access)
    entries = list(source.entries())
    return {entry.source: entry.problem or entry.caption for entry in entries}, source_access


@each_kind
@pytest.mark.parametrize("name", CONVENTIONS)
def test_each_convention_is_read_from_each_kind_of_source(tmp_path: Path, name: str, kind: str) -> None:
    beside, place = CONVENTIONS[name]
    uri, objects = pack(kind, tmp_path, IMAGES | beside)
    source_access = access(tmp_path / "scratch", objects)
    seen = {each.name.removeprefix(f"set.{kind}/"): each for each in read_all(uri, source_access)}
    first = "a, red cat" if name == "sd-scripts" else "a red cat"
    assert {key: (each.caption, each.payload) for key, each in seen.items()} == {
        "a.png": (first, b"1"),
        "b/c.jpg": ("dog, 犬", b"2"),
    }
    assert source_access.captions.places == {place: 2}
    assert not source_access.passed_over
    assert not source_access.captions.ignored


@pytest.mark.parametrize(
    ("captions", "expected"),
    [(None, "from txt"), ("caption", "from caption"), ("json", "from json"), ("csv", "from csv"), ("none", None)],
)
def test_the_setting_chooses_among_several_conventions(tmp_path: Path, captions: str | None, expected: str) -> None:
    files = {
        "a.png": b"1",
        "a.txt": b"from txt",
        "a.caption": b"from caption",
        "a.json": b'{"caption": "from json"}',
        "captions.csv": b"file_name,caption\na.png,from csv\n",
    }
    found, source_access = listed(files, tmp_path, captions=captions)
    assert found == {"a.png": expected}
    # What is not used is named.
    unused = sum(source_access.passed_over.values()) + sum(source_access.captions.ignored.values())
    assert unused >= (2 if captions is None else 3)


def test_several_lines_and_lists_are_several_captions(tmp_path: Path) -> None:
    found, _ = listed(
        {
            **{f"{name}.png": b"1" for name in "abcd"},
            "a.txt": b"one\r\n\n  two  words \n",
            "b.json": b'{"captions": ["one", "two\\nlines"], "tags": "x, y"}',
            "c.json": b'["one", "two"]',
            "d.json": b'{"caption": "first\\nsecond"}',
        },
        tmp_path,
    )
    assert found == {
        "a.png": "one\ntwo words",
        "b.png": "one, x, y\ntwo lines, x, y",
        "c.png": "one\ntwo",
        "d.png": "first second",
    }


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"\xff\xfe\xfd", "not text in UTF-8"),
        (b"caf\xe9", "not text in UTF-8"),
        (b"\x89PNG\r\n\x1a\n\0\0", "not text in UTF-8"),
        (b"a\0b", "control characters"),
        (b"x" * 10 * 2**20, f"over the limit of {MAX_TEXT_BYTES}"),
    ],
)
def test_images_with_unreadable_captions_are_quarantined_until_mended(tmp_path: Path, data: bytes, reason: str) -> None:
    folder, config = tmp_path / "data" / "set", IngestConfig(source=str(tmp_path / "set"), size=8)
    write_files(tmp_path / "set", {f"{number}.png": png(number) for number in range(4)} | {"0.txt": data})
    result = ingest(folder, config)
    [example] = result.quarantined
    assert example.source == "0.png"
    assert reason in example.reason
    assert "\n" not in example.reason
    (tmp_path / "set" / "0.txt").write_text("mended")
    assert (ingest(folder, config).kept, captions_of(folder)["0.png"]) == (4, "mended")


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"{" * 100_000, "no caption in it"),
        (b"[" * 100_000, "no caption in it"),
        (b'{"shapes": [], "imageData": "aGk="}', "no caption in it"),
        (b'{"caption": {"deep": {}}}', "no caption in it"),
        (b"not json", "no caption in it"),
        (b"\xff\xff", "no caption in it"),
        (b'{"caption": "' + b"x" * MAX_TEXT_BYTES + b'"}', "over the limit"),
    ],
)
def test_json_of_other_tools_is_named_and_the_image_kept(tmp_path: Path, data: bytes, what: str) -> None:
    found, source_access = listed({"a.png": b"1", "a.json": data}, tmp_path)
    assert found == {"a.png": None}
    [(kind, count)] = source_access.captions.ignored.items()
    assert (count, what in kind, source_access.captions.examples[kind]) == (1, True, "a.json")


def test_boxes_of_a_detector_are_not_a_caption(tmp_path: Path) -> None:
    files = {"a.png": b"1", "a.txt": b"0 0.5 0.5 0.25 0.125\n1 0.1 0.1 2e-2 .5\n", "b.png": b"2", "b.txt": b"12 dogs"}
    found, source_access = listed(files, tmp_path)
    assert found == {"a.png": None, "b.png": "12 dogs"}
    assert source_access.captions.ignored == {"NAME.txt of another kind: numbers alone": 1}


def test_whatever_is_not_used_is_counted(tmp_path: Path) -> None:
    found, source_access = listed(
        {
            "a.png": b"1",
            "a.txt": b"a",
            "a.caption": b"other",
            "b.png": b"2",
            "b.txt": b"  \n",
            "readme.txt": b"hello",
            "notes.md": b"",
            "captions.csv": b"file_name,caption\nc.png,gone\n,nothing\n",
        },
        tmp_path,
    )
    assert found == {"a.png": "a", "b.png": None}
    assert source_access.passed_over == {".txt": 1, ".md": 1}
    assert source_access.captions.ignored == {
        "NAME.caption beside another file with the caption": 1,
        "NAME.txt that is empty": 1,
        "row of captions.csv without an image": 2,
    }


def test_metadata_names_what_it_leaves_out(tmp_path: Path) -> None:
    files = {"a.png": b"1", "b.png": b"2", "b.txt": b"b", "metadata.csv": b"file_name,text\na.png,a\n"}
    found, source_access = listed(files, tmp_path)
    assert found == {"a.png": "a"}
    assert source_access.captions.ignored == {"image that metadata.csv does not name": 1}
    assert source_access.passed_over == {".txt": 1}


@pytest.mark.parametrize("data", [b"\xff\xd8binary", b"file_name,caption\n" + b"x" * 2**20, b'file_name,caption\n"a,b'])
def test_a_broken_table_is_an_error_of_one_line(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(UserError, match=r"captions\.csv") as error:
        listed({"a.png": b"1", "captions.csv": data + b"\n" + b"x," * 2**20}, tmp_path)
    assert "\n" not in str(error.value)
    assert listed({}, tmp_path, captions="txt")[0] == {"a.png": None}


def captions_of(folder: Path) -> dict[str, str | None]:
    parts = read_manifest(folder).parts
    rows = [row for part in parts for row in read_records(folder, part).to_pylist()]
    return {row["source"].rpartition("/")[2]: row["caption"] for row in rows if row["outcome"] == "kept"}


@each_kind
def test_ingest_counts_captions_and_warns_of_missing_ones(
    tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    files = {f"{number}.png": png(number) for number in range(6)}
    files |= {f"{number}.txt": f"blob {number}".encode() for number in range(5)}
    uri, objects = pack(kind, tmp_path, files)
    folder = tmp_path / "data" / "set"
    result = ingest(folder, IngestConfig(source=uri, size=8), objects=objects)
    assert captions_of(folder) == {f"{n}.png": f"blob {n}" if n < 5 else None for n in range(6)}
    assert result.captions_found.describe() == "5 of 6 images, from NAME.txt; first: blob 0"
    assert "1 of 6 images has no caption" in caplog.text
    # Nothing new: nothing is read again.
    assert ingest(folder, IngestConfig(source=uri, size=8), objects=objects).read == 0


def test_captions_count_for_the_content_and_a_source_without_any_keeps_its_bytes(tmp_path: Path) -> None:
    images = {f"{number}.png": png(number) for number in range(4)}
    plain = ingest(tmp_path / "a" / "set", IngestConfig(source=str(write_files(tmp_path / "1", images)), size=8))
    captioned = images | {"0.txt": b"a caption"}
    second = ingest(tmp_path / "b" / "set", IngestConfig(source=str(write_files(tmp_path / "2", captioned)), size=8))
    none = IngestConfig(source=str(tmp_path / "2"), size=8, captions="none")
    third = ingest(tmp_path / "c" / "set", none)
    assert plain.digest == third.digest
    assert plain.content_digest != second.content_digest


@given(st.binary(max_size=200))
def test_any_bytes_are_a_caption_or_one_reason(data: bytes) -> None:
    for kind in CAPTION_FILES:
        try:
            caption = kind.read(data).caption or ""
        except ValueError as error:
            caption = str(error)
            assert len(caption.splitlines()) == 1
        # It can be written down, and its lines are captions.
        assert all(line.strip() for line in caption.encode().decode().splitlines())


@given(st.lists(st.text(st.characters(exclude_categories=["Cs", "Cc"]))))
def test_a_list_of_captions_survives_its_file(texts: list[str]) -> None:
    lines = [line for text in texts if (line := " ".join(text.split()))]
    data = json.dumps({"captions": texts}).encode()
    if lines:
        assert CAPTION_FILES[2].read(data).caption == "\n".join(lines)
    assert join_captions(texts) == to_caption(texts) == ("\n".join(lines) or None)


@given(st.text(st.characters(exclude_categories=["Cs", "Cc"])), st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]))
def test_text_is_decoded_as_it_was_encoded(text: str, encoding: str) -> None:
    assert decode_text(text.encode(encoding)) == text.removeprefix("\ufeff" if encoding == "utf-8" else "")


def test_boxes_of_a_detector_are_told_in_linear_time() -> None:
    with pytest.raises(ForeignFileError):
        TextFile().parse(b"0 0.5 0.5 0.25 0.25\n1 0.1 0.2 0.3 0.4\n")
    start = time.process_time()
    TextFile().parse(b"1 1 1 1 " + b"," * 200_000 + b"x y")
    assert time.process_time() - start < 1
