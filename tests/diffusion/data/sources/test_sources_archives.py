"""Tars and zips: what the standard library finds in them, and what somebody may have put there on purpose."""

import bz2
import gzip
import io
import lzma
import stat
import struct
import tarfile
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusion.common.errors import UserError
from diffusion.data.ingest.config import IngestConfig
from diffusion.data.ingest.ingest import ingest
from diffusion.data.sources import local_files, open_source
from diffusion.data.sources.conventions import is_image
from tests.builders.archives import Files, add, files, peak, tar_bytes
from tests.builders.reading_sources import access, payloads, png, read_all

LINK = "a link or a device inside an archive: only files are read"


def zip_bytes(files: Files, method: int = zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return buffer.getvalue()


MAKERS: dict[str, Callable[[Files], bytes]] = {
    "set.tar": tar_bytes,
    "set.TAR": tar_bytes,
    "set.tar.gz": lambda files: gzip.compress(tar_bytes(files)),
    "set.tgz": lambda files: gzip.compress(tar_bytes(files)),
    "set.tar.bz2": lambda files: bz2.compress(tar_bytes(files)),
    "set.tar.xz": lambda files: lzma.compress(tar_bytes(files)),
    "set.zip": zip_bytes,
    "stored.zip": lambda files: zip_bytes(files, zipfile.ZIP_STORED),
    # A program that unpacks what follows it.
    "program.zip": lambda files: b"#!/bin/sh\n" * 50 + zip_bytes(files),
}
each_kind = pytest.mark.parametrize("name", MAKERS)


@each_kind
def test_an_archive_is_a_folder_in_its_own_order(tmp_path: Path, name: str) -> None:
    files = {"./dog/b.png": b"3" * 5000, "cat/a.PNG": b"1", "cat/.hidden.png": b"", "notes.txt": b"", "cat/ü.jpg": b"2"}
    (tmp_path / name).write_bytes(MAKERS[name](files))
    source_access = access(tmp_path / "scratch")
    items = read_all(tmp_path / name, source_access)
    assert source_access.passed_over == {".txt": 1}
    assert [(each.name, each.label, each.payload) for each in items] == [
        (f"{name}/dog/b.png", "dog", b"3" * 5000),
        (f"{name}/cat/a.PNG", "cat", b"1"),
        (f"{name}/cat/ü.jpg", "cat", b"2"),
    ]


@each_kind
def test_metadata_in_an_archive_names_its_images(tmp_path: Path, name: str) -> None:
    metadata = b'{"file_name": "b.png", "label": "x", "text": "B"}\n{"file_name": "c.png"}\n'
    (tmp_path / name).write_bytes(MAKERS[name]({"a.png": b"1", "b.png": b"2", "metadata.jsonl": metadata}))
    items = read_all(tmp_path / name, access(tmp_path / "scratch"))
    assert [(each.name, each.label, each.caption, each.payload) for each in items] == [
        (f"{name}/b.png", "x", "B", b"2"),
        (f"{name}/c.png", None, None, "named in the listing but missing"),
    ]
    (tmp_path / name).write_bytes(MAKERS[name]({"metadata.csv": b"", "metadata.jsonl": metadata}))
    with pytest.raises(UserError, match="keep one of them"):
        read_all(tmp_path / name, access(tmp_path / "scratch"))


@each_kind
def test_invalid_archives_are_errors_of_one_line(tmp_path: Path, name: str) -> None:
    whole = MAKERS[name]({f"{number}.png": bytes(range(256)) * 8 for number in range(20)})
    for damaged_bytes in (whole[: len(whole) * 2 // 3], b"", b"no archive" * 1000, whole[: len(whole) // 2] + b"glued"):
        (tmp_path / name).write_bytes(damaged_bytes)
        with pytest.raises(UserError, match=f"{name} cannot be (read|unpacked)") as error:
            read_all(tmp_path / name, access(tmp_path / "scratch"))
        assert "\n" not in str(error.value)
    assert not list((tmp_path / "scratch").glob(".*.partial"))


@pytest.mark.parametrize("write_archive", [gzip.compress, bz2.compress, lzma.compress])
def test_archive_that_would_fill_the_disk_fails_and_leaves_nothing(
    tmp_path: Path, write_archive: Callable[[bytes], bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    bomb = tmp_path / {"gzip": "set.tar.gz", "bz2": "set.tar.bz2", "lzma": "set.tar.xz"}[write_archive.__module__]
    bomb.write_bytes(write_archive(bytes(2**24)))
    scratch, most = tmp_path / "scratch", []

    def small_disk(folder: Path) -> SimpleNamespace:
        most.append(sum(path.stat().st_size for path in folder.iterdir()))
        return SimpleNamespace(total=100 * 2**20, free=10 * 2**20 - most[-1])

    # A disk with ten megabytes left cannot be had here.
    monkeypatch.setattr(local_files.shutil, "disk_usage", small_disk)
    with pytest.raises(UserError, match="5242880 are to stay free: make room there"):
        read_all(bomb, access(scratch))
    assert max(most) <= 5 * 2**20
    assert [path.suffix for path in scratch.iterdir()] == [".lock"]
    bomb.write_bytes(write_archive(tar_bytes({"a.png": b"1"})))
    assert [each.payload for each in read_all(bomb, access(scratch))] == [b"1"]


def test_tars_that_were_glued_together_are_an_error(tmp_path: Path) -> None:
    (tmp_path / "set.tar").write_bytes(tar_bytes({"a.png": b"1"}) + tar_bytes({"b.png": b"2"}))
    with pytest.raises(UserError, match="more follows after its end"):
        read_all(tmp_path / "set.tar", access(tmp_path / "scratch"))


@pytest.mark.parametrize("name", ["set.tar", "set.zip", "set.tar.gz"])
def test_archives_changed_after_the_listing_are_errors(tmp_path: Path, name: str) -> None:
    path, source_access = tmp_path / name, access(tmp_path / "scratch")
    path.write_bytes(MAKERS[name]({"a.png": b"1"}))
    entries = list(open_source(str(path), source_access).entries())
    path.write_bytes(MAKERS[name]({"b.png": b"22", "a.png": b"3"}))
    if name == "set.tar.gz":  # what was unpacked for the listing still stands
        assert list(open_source(str(path), source_access).read(entries)) == [b"1"]
        source_access = access(tmp_path / "another worker's")
    with pytest.raises(UserError, match="has changed since it was listed: run the ingest again"):
        list(open_source(str(path), source_access).read(entries))


# One that looks like the end of a zip is too much for zipfile.
comments = st.binary(max_size=99).filter(lambda comment: b"PK\5\6" not in comment)


def listed(name: str, data: bytes, **fields: object) -> dict[str, object]:
    """What we find in an archive, by the names in it."""
    with TemporaryDirectory() as folder:
        path = Path(folder, name)
        path.write_bytes(data)
        return {
            key.removeprefix(f"{name}/"): each for key, each in payloads(path, access(path.parent, **fields)).items()
        }


@given(files, st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT]))
def test_a_tar_holds_what_tarfile_finds_in_it(files: Files, format_: int) -> None:
    data = tar_bytes(files, format_)
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        members = {info.name: tar.extractfile(info) for info in tar}
    expected = {name.removeprefix("./"): file.read() for name, file in members.items() if file and is_image(name)}
    assert listed("set.tar", data) == expected


@given(files, st.sampled_from([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED]), comments, st.booleans())
def test_a_zip_holds_what_zipfile_finds_in_it(files: Files, method: int, before: bytes, wide: bool) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, data in files.items():
            with archive.open(name, "w", force_zip64=wide) as file:
                file.write(data)
        archive.comment = before
    with zipfile.ZipFile(buffer) as archive:
        expected = {name.removeprefix("./"): archive.read(name) for name in archive.namelist() if is_image(name)}
    assert listed("set.zip", before + buffer.getvalue()) == expected


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(["set.tar", "set.zip", "set.tar.gz", "set.tar.bz2", "set.tar.xz"]), st.data())
def test_damage_anywhere_is_an_error_or_a_reason(name: str, data: st.DataObject) -> None:
    whole = bytearray(MAKERS[name]({f"dir/{number}.png": bytes([number]) * 700 for number in range(4)}))
    for _ in range(data.draw(st.integers(1, 8))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    with suppress(UserError):
        listed(name, bytes(whole), max_bytes=1024)


def test_archive_names_cannot_escape_the_folder(tmp_path: Path) -> None:
    evil = {"../../up.png": b"1", "/etc/root.png": b"2", "a/../b.png": b"3", "c\nd.png": b"4", "x" * 300 + ".png": b"5"}
    for name in ("set.tar", "set.zip"):
        folder = tmp_path / name / "deep" / "down"
        folder.mkdir(parents=True)
        (folder / name).write_bytes(MAKERS[name](evil))
        # zipfile itself keeps such names.
        assert payloads(folder / name, access(folder / "scratch")) == {
            f"{name}/{inside.replace(chr(10), '_x0a').replace('_x', chr(92) + 'x')}": data
            for inside, data in evil.items()
        }
        assert not list((tmp_path / name).rglob("*.png"))


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_in_a_tar_are_quarantined(tmp_path: Path, kind: bytes) -> None:
    with tarfile.open(tmp_path / "set.tar", "w") as tar:
        add(tar, "a.png", b"1")
        add(tar, "b.png", kind=kind, link="a.png" if kind == tarfile.LNKTYPE else "/etc/passwd")
    contents = payloads(tmp_path / "set.tar", access(tmp_path / "scratch"))
    assert contents == {"set.tar/a.png": b"1", "set.tar/b.png": LINK}


def test_links_in_a_zip_are_quarantined(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        link = zipfile.ZipInfo("b.png")
        link.create_system, link.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
        archive.writestr(link, "/etc/passwd")
        archive.writestr("a.png", b"1")
    contents = payloads(tmp_path / "set.zip", access(tmp_path / "scratch"))
    assert contents == {"set.zip/a.png": b"1", "set.zip/b.png": LINK}


def test_unsupported_zip_members_are_quarantined_with_a_remedy(tmp_path: Path) -> None:
    data = bytearray(zip_bytes({"a.png": b"1"}))
    data[data.index(b"PK\1\2") + 8] |= 1  # the flag of encryption
    (tmp_path / "locked.zip").write_bytes(data)
    (tmp_path / "odd.zip").write_bytes(zip_bytes({"a.png": b"1"}, zipfile.ZIP_LZMA))
    source_access = access(tmp_path / "scratch")
    assert "with its password" in str(payloads(tmp_path / "locked.zip", source_access)["locked.zip/a.png"])
    assert "pack it with deflate" in str(payloads(tmp_path / "odd.zip", source_access)["odd.zip/a.png"])


def test_archive_bombs_are_quarantined_before_unpacking(tmp_path: Path) -> None:
    big = bytes(50_000_000)
    honest, lying = zip_bytes({"a.png": big}), bytearray(zip_bytes({"a.png": big}))
    entry = lying.index(b"PK\1\2")
    lying[entry + 24 : entry + 28] = (1000).to_bytes(4, "little")  # its size, unpacked
    (tmp_path / "honest.zip").write_bytes(honest)
    (tmp_path / "lying.zip").write_bytes(lying)
    (tmp_path / "set.tar.xz").write_bytes(lzma.compress(tar_bytes({"a.png": big}), preset=0))
    source_access, reasons = access(tmp_path / "scratch", max_bytes=2**20), {}
    sources = [tmp_path / name for name in ("honest.zip", "lying.zip", "set.tar.xz")]
    assert peak(lambda: [reasons.update(payloads(source, source_access)) for source in sources]) < 10_000_000
    assert reasons["honest.zip/a.png"] == reasons["set.tar.xz/a.png"] == "50000000 bytes are over the limit of 1048576"
    assert str(reasons["lying.zip/a.png"]).startswith("damaged in the zip")


def test_lying_headers_are_not_read_into_memory(tmp_path: Path) -> None:
    info = tarfile.TarInfo("PaxHeaders")
    info.type, info.size = tarfile.XHDTYPE, 200_000_000
    with (tmp_path / "set.tar").open("wb") as file:
        file.write(info.tobuf(tarfile.USTAR_FORMAT))
        file.truncate(200_010_240)
    source_access = access(tmp_path / "scratch")

    def read() -> None:
        with pytest.raises(UserError, match="a header of 2000"):
            read_all(tmp_path / "set.tar", source_access)

    assert peak(read) < 5_000_000


def test_headers_that_follow_each_other_without_end_are_an_error(tmp_path: Path) -> None:
    info = tarfile.TarInfo("././@LongLink")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, 5
    (tmp_path / "set.tar").write_bytes((info.tobuf(tarfile.GNU_FORMAT) + b"a.png".ljust(512, b"\0")) * 5000)
    with pytest.raises(UserError, match=r"set.tar cannot be read as a tar"):
        read_all(tmp_path / "set.tar", access(tmp_path / "scratch"))


def overlapping(kind: str) -> bytes:
    """A zip of two files that share bytes: all of them, or one lies inside the other (Fifield's ways to make bombs)."""
    inner = zip_bytes({"b.png": b"2" * 100}, zipfile.ZIP_STORED)
    local = inner[: inner.index(b"PK\1\2")]
    whole = bytearray(zip_bytes({"a.png": b"1" * 50 + local, "b.png": b"2" * 100}, zipfile.ZIP_STORED))
    first = whole.index(b"PK\1\2")
    second = whole.index(b"PK\1\2", first + 1)
    at = {"the same bytes": 0, "one inside another": whole.index(local)}.get(kind, -1)
    if kind == "an extra field over the next header":
        # The data of a.png begin behind the header of b.png, and are its data.
        whole = bytearray(zip_bytes({"a.png": b"2" * 100, "b.png": b"2" * 100}, zipfile.ZIP_STORED))
        first = whole.index(b"PK\1\2")
        whole[28:30] = (135).to_bytes(2, "little")
        return bytes(whole)
    whole[second + 42 : second + 46] = at.to_bytes(4, "little")
    return bytes(whole)


@pytest.mark.parametrize("kind", ["the same bytes", "one inside another"])
def test_a_zip_whose_files_share_bytes_is_refused(tmp_path: Path, kind: str) -> None:
    (tmp_path / "set.zip").write_bytes(overlapping(kind))
    with pytest.raises(UserError, match="overlaps another one"):
        read_all(tmp_path / "set.zip", access(tmp_path / "scratch"))


def test_overlapping_files_in_a_zip_are_rejected(tmp_path: Path) -> None:
    (tmp_path / "set.zip").write_bytes(overlapping("an extra field over the next header"))
    contents = payloads(tmp_path / "set.zip", access(tmp_path / "scratch"))
    assert contents == {
        "set.zip/a.png": "damaged in the zip: it overlaps what is stored behind it",
        "set.zip/b.png": b"2" * 100,
    }


def test_zips_that_contain_their_directory_are_rejected(tmp_path: Path) -> None:
    whole = bytearray(zip_bytes({"a.png": b"1"}, zipfile.ZIP_STORED))
    entry = whole.index(b"PK\1\2")
    whole[entry + 20 : entry + 28] = (50).to_bytes(4, "little") * 2
    (tmp_path / "set.zip").write_bytes(whole)
    with pytest.raises(UserError, match="overlaps another one or the directory"):
        read_all(tmp_path / "set.zip", access(tmp_path / "scratch"))


def test_zips_with_reordered_directory_and_descriptors_are_read(tmp_path: Path) -> None:
    class Unseekable(io.RawIOBase):
        """Sizes come behind the data when zipfile cannot go back."""

        def __init__(self) -> None:
            self.data = bytearray()

        def writable(self) -> bool:
            return True

        def write(self, data: object, /) -> int:
            self.data += bytes(data)  # type: ignore[call-overload]
            return len(bytes(data))  # type: ignore[call-overload]

    stream = Unseekable()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        for number in range(5):
            archive.writestr(f"{number}.png", bytes([number]) * 99)
        archive.filelist.reverse()
    assert b"PK\7\10" in stream.data.replace(b"PK\x07\x08", b"PK\7\10")
    (tmp_path / "set.zip").write_bytes(b"#!/bin/sh\n" * 20 + stream.data)
    contents = payloads(tmp_path / "set.zip", access(tmp_path / "scratch"))
    assert contents == {f"set.zip/{number}.png": bytes([number]) * 99 for number in reversed(range(5))}


def test_a_zip_of_64_bits_behind_a_program_is_read(tmp_path: Path) -> None:
    plain = zip_bytes({"a.png": b"1", "b.png": b"2"}, zipfile.ZIP_STORED)
    start, end = plain.index(b"PK\1\2"), plain.index(b"PK\5\6")
    wide = struct.pack("<4sQHHLLQQQQ", b"PK\6\6", 44, 45, 45, 0, 0, 2, 2, end - start, start)
    locator = struct.pack("<4sLQL", b"PK\6\7", 0, end, 1)
    last = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 2**16 - 1, 2**16 - 1, 2**32 - 1, 2**32 - 1, 0)
    for program in (b"", b"#!/bin/sh\n" * 50):
        (tmp_path / "set.zip").write_bytes(program + plain[:end] + wide + locator + last)
        contents = payloads(tmp_path / "set.zip", access(tmp_path / "scratch"))
        assert contents == {"set.zip/a.png": b"1", "set.zip/b.png": b"2"}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["set.tar", "set.zip"])
def test_memory_does_not_grow_with_the_archive(tmp_path: Path, name: str) -> None:
    def listing(count: int) -> int:
        (tmp_path / name).write_bytes(MAKERS[name]({f"{number % 9}/{number:06d}.png": b"" for number in range(count)}))
        source = open_source(str(tmp_path / name), access(tmp_path / "scratch"))
        item_count = 0

        def read() -> None:
            nonlocal item_count
            item_count = sum(1 for _ in source.entries())

        used = peak(read)
        assert item_count == count
        return used

    listing(10)  # what is imported at the first use
    assert listing(20_000) < 1.2 * listing(2_000) + 500_000  # a list of the files would take megabytes


def test_zips_of_over_65536_files_are_read_whole(tmp_path: Path) -> None:
    wide = zip_bytes(dict.fromkeys((f"{number:05d}.png" for number in range(66_000)), b""), zipfile.ZIP_STORED)
    assert b"PK\6\6" in wide
    old = bytearray(wide.replace(b"PK\6\6", b"PK..").replace(b"PK\6\7", b"PK.."))
    at = old.rindex(b"PK\5\6")  # a program that knows nothing of 64 bits counts up to 65,535 and starts again
    directory = old.index(b"PK\1\2")
    end = old.index(b"PK..", directory)
    old[at + 8 : at + 12] = (66_000 % 2**16).to_bytes(2, "little") * 2
    old[at + 12 : at + 20] = (end - directory).to_bytes(4, "little") + directory.to_bytes(4, "little")
    old[end:at] = b""
    for data in (wide, bytes(old)):
        (tmp_path / "set.zip").write_bytes(data)
        source = open_source(str(tmp_path / "set.zip"), access(tmp_path / "scratch"))
        assert sum(1 for _ in source.entries()) == 66_000


@each_kind
def test_grown_archive_adds_only_new_images(tmp_path: Path, name: str) -> None:
    config = IngestConfig(source=str(tmp_path / name), size=8, held_out=0.33)
    images = {f"{number % 2}/{number}.png": png(number) for number in range(12)}
    (tmp_path / name).write_bytes(MAKERS[name](images))
    assert ingest(tmp_path / "data", config).kept == 12
    assert (again := ingest(tmp_path / "data", config)).read == 0
    assert not again.changed
    (tmp_path / name).write_bytes(MAKERS[name](images | {"0/new.png": png(99), "0/3.png": png(98)}))
    grown = ingest(tmp_path / "data", config)
    assert (grown.added, grown.kept) == (2, 14)
    # A zip has a checksum of each file; a tar has none, so that all of it is looked at.
    assert grown.read == (2 if name.endswith(".zip") else 14)
    assert ingest(tmp_path / "data", config).read == 0


def test_folders_and_archives_make_the_same_data_set(tmp_path: Path) -> None:
    # The image that lies in two classes has that of its first name.
    files = {f"{number % 2}/{number:02d}.png": png(number) for number in range(12)} | {"1/00.png": png(0)}
    shuffled = dict(reversed(files.items()))
    for name, data in files.items():
        (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "set" / name).write_bytes(data)
    (tmp_path / "set.tar").write_bytes(tar_bytes(shuffled))
    (tmp_path / "set.zip").write_bytes(zip_bytes(shuffled))
    result = {
        name: ingest(tmp_path / "data" / name, IngestConfig(source=str(tmp_path / name), size=8, held_out=0.33))
        for name in ("set", "set.tar", "set.zip")
    }
    assert len({each.content_digest for each in result.values()}) == 1
    assert {each.relabelled for each in result.values()} == {1}
