"""Shards of WebDataset: our own, those of the library, and other people's."""

import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
import webdataset as wds

from diffusion.common.errors import UserError
from diffusion.data.ingest.config import IngestConfig
from diffusion.data.ingest.ingest import ingest
from diffusion.data.manifest import read_manifest, read_records
from tests.builders.archives import tar_bytes
from tests.builders.reading_sources import access, payloads, png, read_all


def shards(folder: Path, samples: list[dict[str, Any]], size: int = 4) -> str:
    """Written as the library writes them; returns the pattern that its readers take."""
    folder.mkdir(exist_ok=True)
    with wds.ShardWriter(f"{folder}/set-%04d.tar", maxcount=size, verbose=0) as writer:
        for sample in samples:
            writer.write(sample)
    return f"{folder}/set-{{0000..{(len(samples) - 1) // size:04d}}}.tar"


def annotations_of(pattern: str, scratch: Path) -> list[tuple[str, str | None, str | None, object]]:
    return [(each.name, each.label, each.caption, each.payload) for each in read_all(f"wds:{pattern}", access(scratch))]


def test_shards_of_the_library_are_read_as_it_reads_them(tmp_path: Path) -> None:
    samples = [
        {"__key__": f"{n:03d}", "png": png(n), "cls": n % 3, "txt": f"number {n}", "extra.bin": b"?"} for n in range(10)
    ]
    pattern = shards(tmp_path / "set", samples)
    expected = [
        (f"set-{n // 4:04d}.tar/{sample['__key__']}.png", sample["cls"].decode(), sample["txt"].decode(), sample["png"])
        for n, sample in enumerate(wds.WebDataset(pattern, shardshuffle=False))
    ]
    assert len(expected) == 10
    for uri in (pattern, f"{tmp_path}/set", f"{tmp_path}/set/set-*.tar"):
        assert annotations_of(uri, tmp_path / "scratch") == expected


def test_own_shards_round_trip_with_labels_and_captions(images: Path, dataset: Path, tmp_path: Path) -> None:
    rows = [row for part in read_manifest(dataset).parts for row in read_records(dataset, part).to_pylist()]
    annotations = {
        name.rpartition("/")[2]: (label, caption)
        for name, label, caption, _ in annotations_of(f"{dataset}/shards", tmp_path / "s")
    }
    assert annotations == {f"{row['key']}.png": (row["label"], row["caption"]) for row in rows if row["key"]}
    again = ingest(tmp_path / "again", IngestConfig(source=f"wds:{dataset}/shards", size=8, held_out=0.33))
    assert again.content_digest == read_manifest(dataset).content_digest


def test_members_of_a_key_describe_its_images(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(
        tar_bytes(
            {
                "x/1.png": b"1",
                "x/1.json": json.dumps({"label": 3, "caption": "from json", "other": []}).encode(),
                "x/1.txt": b"from txt",
                "x/2.seg.png": b"2",
                "x/2.jpg": b"3",
                "x/2.txt": "\ufeffein Stück\n".encode(),
                "x/2.cls": b"7\n",
                "y/2.PNG": b"4",
                "y/3.json": b'{"text": "no image"}',
                "y/4.json": b"[1, 2]",
                "y/4.png": b"5",
            }
        )
    )
    assert annotations_of(f"{tmp_path}/a.tar", tmp_path / "scratch") == [
        ("a.tar/x/1.png", "3", "from json", b"1"),
        ("a.tar/x/2.seg.png", "7", "ein Stück", b"2"),
        ("a.tar/x/2.jpg", "7", "ein Stück", b"3"),
        ("a.tar/y/2.PNG", None, None, b"4"),
        ("a.tar/y/4.png", None, None, b"5"),
    ]


@pytest.mark.parametrize(
    "about", [b"{", b"\xff", b"[" * 100_000, b'{"label": ["a"]}', b'{"caption": {"a": 1}}', b"x" * 2000]
)
def test_image_with_invalid_shard_metadata_is_quarantined_alone(tmp_path: Path, about: bytes) -> None:
    (tmp_path / "a.tar").write_bytes(tar_bytes({"1.png": b"1", "1.json": about, "2.png": b"2", "2.json": b"{}"}))
    contents = payloads(f"wds:{tmp_path}/a.tar", access(tmp_path / "scratch", max_bytes=1024))
    assert str(contents["a.tar/1.png"]).startswith("what its shard says about it cannot be read")
    assert contents["a.tar/2.png"] == b"2"


def test_tar_members_that_are_not_files_are_quarantined(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name in ("1.png", "2.json"):
            link = tarfile.TarInfo(name)
            link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
            tar.addfile(link)
        tar.addfile(tarfile.TarInfo("2.png"))
    contents = payloads(f"wds:{tmp_path}/a.tar", access(tmp_path / "scratch"))
    assert contents["a.tar/1.png"] == "a link or a device inside an archive: only files are read"
    assert "2.json: a link or a device" in str(contents["a.tar/2.png"])


def test_unusable_shards_are_errors_that_name_them(tmp_path: Path) -> None:
    shards(tmp_path / "set", [{"__key__": str(n), "png": png(n)} for n in range(8)])
    second = tmp_path / "set" / "set-0001.tar"
    second.write_bytes(second.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"set-0001.tar cannot be read as a tar"):
        annotations_of(f"{tmp_path}/set", tmp_path / "scratch")
    with pytest.raises(UserError, match=r"there is no file .*set-0002.tar"):
        annotations_of(f"{tmp_path}/set/set-{{0000..0002}}.tar", tmp_path / "scratch")
    second.write_bytes(tar_bytes({f"img.{n}.png": b"" for n in range(1100)}))
    with pytest.raises(UserError, match=r"set-0001.tar has over 1000 images of key img"):
        annotations_of(f"{tmp_path}/set", tmp_path / "scratch")


def test_only_new_shards_are_read_again(tmp_path: Path) -> None:
    samples = [{"__key__": f"{n:03d}", "png": png(n), "cls": n % 2} for n in range(16)]
    config = IngestConfig(source=f"wds:{tmp_path}/set", size=8, held_out=0.33)
    shards(tmp_path / "set", samples[:12])
    assert ingest(tmp_path / "data", config).kept == 12
    (tmp_path / "more.tar").write_bytes(tar_bytes({"b.png": png(99), "c.png": png(3)}))
    (tmp_path / "more.tar").rename(tmp_path / "set" / "more.tar")
    grown = ingest(tmp_path / "data", config)
    assert (grown.read, grown.added, grown.duplicates) == (2, 1, 1)
