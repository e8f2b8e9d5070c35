"""Folders, what their files are called, and how sources are named."""

import os
import shutil
from pathlib import Path

import pytest

from diffusion.common.errors import UserError
from diffusion.data.ingest.config import IngestConfig
from diffusion.data.ingest.ingest import ingest
from diffusion.data.sources import open_source
from diffusion.data.sources.survey import survey
from tests.builders.ingested import records
from tests.builders.reading_sources import access, payloads, png, read_all, write_files


def by_name(root: Path | str, scratch: Path, **fields: object) -> dict[str, tuple[str | None, str | None, object]]:
    return {each.name: (each.label, each.caption, each.payload) for each in read_all(root, access(scratch, **fields))}


def test_a_folder_of_folders_is_a_set_of_classes(tmp_path: Path) -> None:
    root = write_files(
        tmp_path / "set", {"cat/a.png": b"1", "cat/b.JPEG": b"2", "dog/x/a.webp": b"3", "dog/c.tiff": b""}
    )
    assert by_name(root, tmp_path / "scratch") == {
        "cat/a.png": ("cat", None, b"1"),
        "cat/b.JPEG": ("cat", None, b"2"),
        "dog/x/a.webp": ("x", None, b"3"),
        "dog/c.tiff": ("dog", None, b""),
    }


@pytest.mark.parametrize("files", [["a.png", "cat/b.png", "dog/c.png"], ["cat/a.png", "cat/b.png"], ["a.png", "b.png"]])
def test_images_in_the_root_or_one_folder_have_no_class(tmp_path: Path, files: list[str]) -> None:
    root = write_files(tmp_path / "set", dict.fromkeys(files, b"1"))
    assert by_name(root, tmp_path / "scratch") == dict.fromkeys(files, (None, None, b"1"))


def test_hidden_and_non_image_files_are_skipped(tmp_path: Path) -> None:
    names = ["a.png", ".b.png", ".git/c.png", "notes.txt", "x/.d/e.png", "png", "x/more.TXT"]
    root = write_files(tmp_path / "set", dict.fromkeys(names, b"1"))
    assert list(by_name(root, tmp_path / "scratch")) == ["a.png"]
    source_access = access(tmp_path / "scratch")
    assert len(list(open_source(str(root), source_access).entries())) == 1
    assert source_access.passed_over == {".txt": 2, "": 1}


def test_images_in_unsupported_formats_are_not_skipped_silently(tmp_path: Path) -> None:
    root = write_files(tmp_path / "set", dict.fromkeys(["a.png", "b.HEIC", "c/d.avif"], b"1"))
    assert sorted(by_name(root, tmp_path / "scratch")) == ["a.png", "b.HEIC", "c/d.avif"]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("metadata.csv", 'file_name,label,text\ncat/a.png,tabby,"a cat, lying"\nb.png,,\nno.png,x,\n'),
        ("metadata.csv", '\ufefffile_name,caption,label\ncat/a.png,"a cat, lying",tabby\nb.png,,\nno.png,,x\n'),
        (
            "metadata.jsonl",
            '{"file_name": "cat/a.png", "label": "tabby", "text": "a cat, lying"}\n\n'
            '{"file_name": "./b.png"}\n{"file_name": "no.png", "label": "x", "text": null}\n',
        ),
    ],
)
def test_metadata_names_the_images_their_labels_and_captions(tmp_path: Path, name: str, text: str) -> None:
    root = write_files(tmp_path / "set", {"cat/a.png": b"1", "b.png": b"2", "dog/c.png": b"3", name: text.encode()})
    assert by_name(root, tmp_path / "scratch") == {
        "cat/a.png": ("tabby", "a cat, lying", b"1"),
        "b.png": (None, None, b"2"),
        "no.png": ("x", None, "named in the listing but missing"),
    }


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("metadata.csv", "name,label\na.png,x\n", "record 1 has no file_name"),
        ("metadata.csv", "file_name,label\na.png,x,y\n", "record 1 has more fields than the header"),
        ("metadata.jsonl", '{"file_name": "a.png"}\n[1]\n', "is not a JSON object"),
        ("metadata.jsonl", '{"file_name": "a.png"', "cannot be read"),
        ("metadata.jsonl", '{"file_name": "a.png", "label": ["x"]}', "give one text"),
        ("metadata.jsonl", '{"file_name": "../a.png"}', "leads out of"),
        ("metadata.jsonl", '{"file_name": "/etc/a.png"}', "leads out of"),
        ("metadata.jsonl", '{"file_name": "a\\u0000.png"}', "control characters"),
        ("metadata.jsonl", "[" * 100_000, "cannot be read"),
        ("metadata.jsonl", '{"file_name": "' + "a" * 2**20, "longer than"),
        ("metadata.csv", "file_name" + "a" * 2**20, "longer than"),
        ("metadata.csv", b"file_name\n\xff\xfe.png\n", "cannot be read"),
    ],
)
def test_invalid_metadata_is_an_error_of_one_line(tmp_path: Path, name: str, text: str | bytes, message: str) -> None:
    root = write_files(tmp_path / "set", {"a.png": b"1", name: text if isinstance(text, bytes) else text.encode()})
    with pytest.raises(UserError, match=message) as error:
        by_name(root, tmp_path / "scratch")
    assert "\n" not in str(error.value)
    assert str(root / name) in str(error.value)


def test_metadata_of_each_split_is_relative_to_its_folder(tmp_path: Path) -> None:
    files = {
        "train/a.png": b"1",
        "train/metadata.jsonl": b'{"file_name": "a.png", "label": "cat", "text": "a cat"}',
        "test/x/a.png": b"2",
        "test/metadata.csv": b"file_name,label\nx/a.png,dog\nb.png,\n",
        "notes.txt": b"",
    }
    found = by_name(write_files(tmp_path / "set", files), tmp_path / "scratch")
    missing = found.pop("test/b.png")[2]
    assert "missing" in str(missing)
    assert found == {"train/a.png": ("cat", "a cat", b"1"), "test/x/a.png": ("dog", None, b"2")}
    # With images elsewhere it describes no splits: folders are classes.
    write_files(tmp_path / "set", {"more/c.png": b"3"})
    assert by_name(tmp_path / "set", tmp_path / "other")["more/c.png"] == ("more", None, b"3")
    both = write_files(tmp_path / "both", files | {"train/metadata.csv": b"file_name\n"})
    with pytest.raises(UserError, match="train has both"):
        by_name(both, tmp_path / "scratch")


def test_two_metadata_files_are_an_error(tmp_path: Path) -> None:
    root = write_files(tmp_path / "set", {"metadata.csv": b"file_name\n", "metadata.jsonl": b""})
    with pytest.raises(UserError, match=r"metadata.csv and metadata.jsonl: keep one"):
        by_name(root, tmp_path / "scratch")


def test_links_are_followed_once_and_never_round_in_circles(tmp_path: Path) -> None:
    write_files(tmp_path / "real", {"cat/a.png": b"1", ".more/b.png": b"2"})
    (root := tmp_path / "set").symlink_to("real")
    (root / "dog").symlink_to(".more")
    (root / "cat" / "up").symlink_to(root)
    (root / "same").symlink_to(root / "cat")
    (root / ".more" / "round").symlink_to(root / ".more")
    (root / "cat" / "self").symlink_to("self")
    (root / "cat" / "gone.png").symlink_to("nowhere.png")
    assert payloads(root, access(tmp_path / "scratch")) == {
        "cat/a.png": b"1",
        "cat/gone.png": "named in the listing but missing",
        "dog/b.png": b"2",
    }


@pytest.mark.parametrize(
    ("name", "data", "quarantined"),
    [
        ("4.png", png(4), ["4.png"]),
        ("more/5.png", png(5), ["more/5.png"]),
        ("0.txt", b"hunter2", ["0.png"]),
        ("0.caption", b"hunter2", ["0.png"]),
        ("0.json", b'{"caption": "hunter2"}', []),
        ("0.mask.png", png(4), ["0.png"]),
        ("captions.csv", b"file_name,caption\n0.png,hunter2\n", None),
        ("metadata.csv", b"file_name,text\n0.png,hunter2\n", None),
        ("metadata.jsonl", b'{"file_name": "0.png", "text": "hunter2"}', None),
        ("list.csv", b"file_name,text\n0.png,hunter2\n", []),
    ],
)
def test_links_out_of_the_folder_are_never_read(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], name: str, data: bytes, quarantined: list[str] | None
) -> None:
    root = write_files(tmp_path / "set", {f"{number}.png": png(number) for number in range(4)})
    target = write_files(tmp_path / "elsewhere", {name: data}) / Path(name).parts[0]
    (link := root / target.name).symlink_to(target)
    config = IngestConfig(source=str(root), size=8, masks="files" if "mask" in name else None)
    if quarantined is None:
        for read in (lambda: ingest(tmp_path / "data", config), lambda: survey(config, tmp_path)):
            with pytest.raises(UserError, match=rf"{name} cannot be read: it is a link out of the folder"):
                read()
        return
    result = ingest(tmp_path / "data", config)
    assert [example.source for example in result.quarantined] == quarantined
    assert all("a link out of the folder: put a copy" in example.reason for example in result.quarantined)
    found = survey(config, tmp_path)
    assert found.captions_table is None
    assert "hunter2" not in f"{records(tmp_path / 'data')} {found} {result} {capfd.readouterr()}"
    # A copy of the same size and time is read.
    link.unlink()
    (shutil.copytree if target.is_dir() else shutil.copy2)(target, link)
    assert not ingest(tmp_path / "data", config).quarantined


def test_unreadable_or_too_large_files_are_quarantined(tmp_path: Path) -> None:
    root = write_files(tmp_path / "set", {"a.png": b"x" * 1024, "b.png": b"x" * 1025})
    os.mkfifo(root / "pipe.png")
    assert payloads(root, access(tmp_path / "scratch", max_bytes=1024)) == {
        "a.png": b"x" * 1024,
        "b.png": "1025 bytes are over the limit of 1024",
        "pipe.png": "not a plain file",
    }


def test_names_of_any_bytes_can_be_written_down(tmp_path: Path) -> None:
    root = tmp_path / "set"
    root.mkdir()
    (root / os.fsdecode(b"caf\xe9\n.png")).write_bytes(b"1")
    (root / "für 東京.png").write_bytes(b"2")
    assert payloads(root, access(tmp_path / "scratch")) == {"caf\\xe9\\x0a.png": b"1", "für 東京.png": b"2"}


def test_file_deleted_after_listing_is_quarantined_alone(tmp_path: Path) -> None:
    root = write_files(tmp_path / "set", {"a.png": b"1", "b.png": b"2"})
    source_access = access(tmp_path / "scratch")
    entries = sorted(open_source(str(root), source_access).entries(), key=lambda entry: entry.source)
    (root / "a.png").unlink()
    first, second = open_source(str(root), source_access).read(entries)
    assert str(first) == "named in the listing but missing"
    assert second == b"2"


def test_a_file_url_is_a_path(tmp_path: Path) -> None:
    root = write_files(tmp_path / "my set #1", {"a.png": b"1"})
    assert payloads(root.as_uri(), access(tmp_path / "scratch")) == {"a.png": b"1"}
    with pytest.raises(UserError, match="is not a file of this machine"):
        open_source("file://elsewhere/set", access(tmp_path / "scratch"))
    with pytest.raises(UserError, match="%3F"):
        open_source(f"{root.as_uri()}?split=train", access(tmp_path / "scratch"))


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("nowhere", "nowhere does not exist"),
        ("nowhere.tar", "nowhere.tar does not exist"),
        ("nowhere.zip", "nowhere.zip does not exist"),
        ("image.png", "is one image|does not exist"),
        ("https://example.org/set", "an address on the web"),
        ("hf://user/set", "hf://datasets/OWNER/NAME"),
        ("wds:nowhere-{000..003}.tar", "there is no file nowhere-000.tar"),
        ("wds:nowhere-{000..", "unbalanced braces"),
        ("parquet:nowhere*.parquet", "there is no file"),
        ("parquet:image.png?colour=red", "has no option colour"),
        ("parquet:image.png?image=a&image=b", "write each once"),
        ("s3://bucket/prefix", "needs an S3 client"),
        ("wds:s3://bucket/a.tar", "needs an S3 client"),
    ],
)
def test_invalid_sources_are_errors_of_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uri: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("image.png").write_bytes(png(1))
    with pytest.raises(UserError, match=message) as error:
        read_all(uri, access(tmp_path / "scratch"))
    assert "\n" not in str(error.value)


def test_an_empty_source_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    with pytest.raises(UserError, match="no images in"):
        ingest(tmp_path / "data", IngestConfig(source=str(tmp_path / "set"), size=8))
