"""Zip archives of images, read by offset without holding their directory in memory (``zipfile``: 1 KB per file).

Formats by PKWARE's APPNOTE.TXT 6.3.10, sections 4.3.7 (local header), 4.3.12 (central directory), 4.3.14–16 (end of
central directory, also Zip64) and 4.5.3 (Zip64 extra field).
"""

import io
import json
import sqlite3
import stat
import struct
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TextIO, cast

from diffusion.common.errors import UserError
from diffusion.data.ingest.decode import UnusableEntryError
from diffusion.data.sources.base import MISSING, Entry, Payload, Source, too_large_error
from diffusion.data.sources.conventions import list_images, make_printable
from diffusion.data.sources.local_files import open_unchanged, stamp_of
from diffusion.data.sources.tars import LINK

LOCAL = struct.Struct("<4s22xHH")
DIRECTORY = struct.Struct("<4sBB2xHH4xLLLHHH4xLL")
END = struct.Struct("<4s8xLL2x")
END64_LOCATOR_SIZE = 20
END64 = struct.Struct("<4s36xQQ")
UNIX, ENCRYPTED, UTF8 = 3, 0x1, 0x800
FULL = 2**32 - 1
"""Marker of a number that needs 64 bits and is in the extra field."""


class ZipOffset(NamedTuple):
    """A file in a zip: offset of its local header, bytes in the zip and unpacked, and offset of the next data."""

    header: int
    method: int
    packed: int
    size: int
    crc: int
    end: int


class Zip(Source):
    """The images in a zip, as ``list_images`` finds them, named ``ARCHIVE/MEMBER``; links are quarantined."""

    scheme = "zip"
    form = "a .zip"
    suffixes = (".zip",)

    def entries(self) -> Iterator[Entry]:
        """Yield its images in its own or its metadata's order; raises UserError if it is damaged."""
        file_stamp = stamp_of(self.path)
        files = (
            (name, json.dumps(problem or [file_stamp, *place]), f"{place.size}:{place.crc:08x}")
            for name, problem, place in members(self.path)
        )
        for entry in list_images(files, str(self.path), self._table, self.read_texts, self.access):
            yield entry._replace(source=f"{self.path.name}/{entry.source}", stamp=entry.stamp or file_stamp)

    def read(self, entries: Sequence[Entry]) -> Iterator[Payload]:
        """Yield their bytes; raises UserError if the zip has changed since it was listed."""
        places = [json.loads(entry.locator) for entry in entries]
        file_stamp = next((place[0] for place in places if isinstance(place, list)), None)
        file = open_unchanged(self.path, file_stamp) if file_stamp else None
        with file or nullcontext():
            for place in places:
                if isinstance(place, str):
                    yield UnusableEntryError(place)
                else:
                    yield self._member(file, ZipOffset(*place[1:])) if file else UnusableEntryError(MISSING)

    def _member(self, file: BinaryIO, place: ZipOffset) -> Payload:
        limit = self.access.config.max_bytes
        if place.size > limit:
            return too_large_error(place.size, limit)
        try:
            with open_member(file, place) as member:
                # Without a number it would unpack up to 2 GiB at once, whatever the file declares.
                data = member.read(place.size)
            return data if len(data) == place.size else UnusableEntryError("damaged in the zip: it ends too soon")
        except (zipfile.BadZipFile, zlib.error, struct.error, EOFError) as error:
            return UnusableEntryError(f"damaged in the zip: {error or 'it ends too soon'}")

    @contextmanager
    def _table(self, locator: str, _: str) -> Iterator[TextIO]:
        place = json.loads(locator)
        try:
            if isinstance(place, str):
                raise zipfile.BadZipFile(place)
            with self.path.open("rb") as file, open_member(file, ZipOffset(*place[1:])) as member:
                yield io.TextIOWrapper(cast(BinaryIO, member), encoding="utf-8-sig", newline="")
        except (zipfile.BadZipFile, zlib.error, struct.error, EOFError) as error:
            raise UserError(f"the metadata in {self.path} cannot be read ({error}): pack it again") from error


def members(path: Path) -> Iterator[tuple[str, str | None, ZipOffset]]:
    """Yield name, the reason why it is unavailable, and place of each file in a zip, in the order of its directory.

    The directory is kept on disk, as there may be any number of files. Raises UserError if it is damaged, or if files
    share bytes: such a zip unpacks to far more than it holds (Fifield, A better zip bomb, 2019).
    """
    try:
        # SQLite's name for a private temporary file.
        with closing(sqlite3.connect("", check_same_thread=False, isolation_level=None)) as database:
            columns = "name, problem, header, method, packed, size, crc"
            database.execute("PRAGMA journal_mode = OFF")
            database.execute(f"CREATE TABLE files (number INTEGER PRIMARY KEY, {columns})")
            database.execute("BEGIN")
            with path.open("rb") as file:
                start, size, shift = _directory(file)
                rows = _members(file, start, start + size, shift)
                database.executemany(f"INSERT INTO files ({columns}) VALUES (?, ?, ?, ?, ?, ?, ?)", rows)
            query = f"SELECT number, {columns}, coalesce(lead(header) OVER (ORDER BY header), ?) AS end FROM files"
            # Local headers may be longer, which is checked when the file is read.
            overlap_query = f"SELECT header FROM ({query}) WHERE header + {LOCAL.size} + packed > end LIMIT 1"
            if overlap := database.execute(overlap_query, (start,)).fetchone():
                raise zipfile.BadZipFile(f"the file stored at byte {overlap[0]} overlaps another one or the directory")
            for _, name, problem, *place in database.execute(f"{query} ORDER BY number", (start,)):
                if not name.endswith("/"):
                    yield name, problem, ZipOffset(*place)
    except (zipfile.BadZipFile, struct.error, ValueError, OverflowError) as error:
        raise UserError(f"{path} cannot be read as a zip ({error}): it is damaged or was cut short") from error


def open_member(file: BinaryIO, place: ZipOffset) -> zipfile.ZipExtFile:
    """Open a file in the zip ``file``; size and checksum are enforced in small steps."""
    file.seek(place.header)
    signature, name, extra = LOCAL.unpack(file.read(LOCAL.size))
    if signature != b"PK\3\4":
        raise zipfile.BadZipFile("there is no file where the directory says")
    if file.seek(name + extra, 1) + place.packed > place.end:
        raise zipfile.BadZipFile("it overlaps what is stored behind it")
    info = zipfile.ZipInfo()
    info.compress_type, info.compress_size, info.file_size, info.CRC = place[1:5]
    return zipfile.ZipExtFile(file, "r", info)


def _directory(file: BinaryIO) -> tuple[int, int, int]:
    """Return offset and size of the central directory, and the shift of the offsets in it."""
    length = file.seek(0, 2)
    tail_start = file.seek(max(0, length - END.size - (2**16 - 1)))  # with the longest comment
    tail = file.read()
    position = tail.rfind(b"PK\5\6", 0, len(tail) - END.size + 4)
    if position < 0:
        raise zipfile.BadZipFile("it has no directory at its end")
    _, size, start = END.unpack_from(tail, position)
    end = tail_start + position
    if end >= END64_LOCATOR_SIZE:
        file.seek(end - END64_LOCATOR_SIZE)
        if file.read(4) == b"PK\6\7":
            # Right before its locator, as its offset there may be shifted.
            end = file.seek(max(0, end - END64_LOCATOR_SIZE - END64.size))
            signature, size, start = END64.unpack(file.read(END64.size))
            if signature != b"PK\6\6":
                raise zipfile.BadZipFile("its directory of 64 bits is not where it should be")
    # A self-extracting program before the zip shifts everything.
    shift = end - size - start
    if shift < 0:
        raise zipfile.BadZipFile("its directory is cut short")
    return start + shift, size, shift


def _members(file: BinaryIO, start: int, end: int, shift: int) -> Iterator[tuple[Any, ...]]:
    """Yield name, problem, offset, method, packed and unpacked size, and checksum of all members, folders included."""
    file.seek(start)
    # Not by its number of files, which overflows at 65,536 in older programs.
    while file.tell() < end:
        (signature, _, system, flags, method, crc, packed, size, name_size, extra_size, comment_size, mode, header) = (
            DIRECTORY.unpack(file.read(DIRECTORY.size))
        )
        if signature != b"PK\1\2":
            raise zipfile.BadZipFile("its directory is damaged")
        raw = file.read(name_size)
        name = make_printable(raw.decode("utf-8", "surrogateescape") if flags & UTF8 else raw.decode("cp437"))
        size, packed, header = _replace_markers(file.read(extra_size), [size, packed, header])
        file.seek(comment_size, 1)
        problem = None
        if flags & ENCRYPTED:
            problem = "encrypted: unpack it with its password"
        elif method not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            problem = f"compressed by method {method}, which is not read: pack it with deflate"
        elif system == UNIX and stat.S_IFMT(mode >> 16) not in (0, stat.S_IFREG, stat.S_IFDIR):
            problem = LINK
        yield name.removeprefix("./"), problem, header + shift, method, packed, size, crc


def _replace_markers(extra: bytes, numbers: list[int]) -> list[int]:
    """Replace markers in ``numbers`` (size, packed size, offset) by the 64-bit values in the ``extra`` field."""
    while len(extra) >= 4:
        kind, size = struct.unpack_from("<HH", extra)
        if kind == 1:
            values = iter(struct.unpack_from(f"<{size // 8}Q", extra, 4))
            return [next(values, number) if number == FULL else number for number in numbers]
        extra = extra[4 + size :]
    return numbers
