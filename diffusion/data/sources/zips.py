"""Zip archives of images: listed by ``zipfile``, read by offset, so that their directory is read once."""

import io
import json
import stat
import struct
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple, TextIO, cast

from diffusion.common.errors import UserError
from diffusion.data.ingest.decode import Refused
from diffusion.data.sources.base import MISSING, Access, Entry, Payload, too_large
from diffusion.data.sources.conventions import list_images, printable
from diffusion.data.sources.local_files import as_lines, open_unchanged, stamp_of
from diffusion.data.sources.tars import LINK

LOCAL = struct.Struct("<4s22xHH")
"""Local header (PKWARE's APPNOTE.TXT 6.3.10, section 4.3.7)."""
UNIX = 3
ENCRYPTED = 0x1
LARGEST_DIRECTORY = 2**26
"""Bytes of a directory, about a hundred for each file: ``zipfile`` takes up to ten times as many to read it."""


class ZipOffset(NamedTuple):
    """Position and sizes of a file in a zip."""

    header: int
    """Offset of its local header."""
    method: int
    packed: int
    """Bytes in the zip."""
    size: int
    """Bytes unpacked."""
    crc: int
    end: int
    """Offset of the next data in the zip."""


@dataclass(frozen=True)
class Zip:
    """The images in a zip, as ``list_images`` finds them, named ``ARCHIVE/MEMBER``; links are quarantined.

    Members are stored or deflated. A member has changed if its checksum has.
    """

    path: Path
    access: Access
    in_order = False

    def entries(self) -> Iterator[Entry]:
        """Yield its images in its own order or that of its metadata; raises UserError if it is damaged."""
        known = stamp_of(self.path)
        files = (
            (name, json.dumps(problem or [known, *place]), f"{place.size}:{place.crc:08x}")
            for name, problem, place in members(self.path)
        )
        for entry in list_images(files, str(self.path), self._table, self.access.passed_over):
            yield entry._replace(source=f"{self.path.name}/{entry.source}", stamp=entry.stamp or known)

    def read(self, entries: Sequence[Entry]) -> Iterator[Payload]:
        """Yield their bytes; raises UserError if the zip has changed since it was listed."""
        places = [json.loads(entry.locator) for entry in entries]
        known = next((place[0] for place in places if isinstance(place, list)), None)
        file = open_unchanged(self.path, known) if known else None
        with file or nullcontext():
            for place in places:
                if isinstance(place, str):
                    yield Refused(place)
                else:
                    yield self._member(file, ZipOffset(*place[1:])) if file else Refused(MISSING)

    def _member(self, file: BinaryIO, place: ZipOffset) -> Payload:
        limit = self.access.config.max_bytes
        if place.size > limit:
            return too_large(place.size, limit)
        try:
            with open_member(file, place) as member:
                # Without a number it would unpack up to 2 GiB at once, whatever the file declares.
                data = member.read(place.size)
            return data if len(data) == place.size else Refused("damaged in the zip: it ends too soon")
        except (zipfile.BadZipFile, zlib.error, struct.error, EOFError) as error:
            return Refused(f"damaged in the zip: {error or 'it ends too soon'}")

    @contextmanager
    def _table(self, locator: str, _: str) -> Iterator[TextIO]:
        place = json.loads(locator)
        try:
            if isinstance(place, str):
                raise zipfile.BadZipFile(place)
            with self.path.open("rb") as file, open_member(file, ZipOffset(*place[1:])) as member:
                yield as_lines(cast(BinaryIO, member))
        except (zipfile.BadZipFile, zlib.error, struct.error, EOFError) as error:
            raise UserError(f"the metadata in {self.path} cannot be read ({error}): pack it again") from error


def members(path: Path) -> Iterator[tuple[str, str | None, ZipOffset]]:
    """Yield name, the reason why it is unavailable, and place of each file in a zip, in the order of its directory.

    Raises UserError if it is damaged, has too many files, or if files share bytes: such a zip unpacks to far more than
    it holds (Fifield, A better zip bomb, 2019), and programs interpret it differently.
    """
    try:
        with _Directory(io.FileIO(path)) as file, zipfile.ZipFile(file) as archive:
            infos, end = archive.infolist(), archive.start_dir
        ends: dict[int, int] = {}
        for info in sorted(infos, key=lambda info: info.header_offset, reverse=True):
            # Local headers may be longer, which is checked when the file is read.
            if info.header_offset < 0 or info.header_offset + LOCAL.size + info.compress_size > end:
                raise zipfile.BadZipFile(
                    f"the file stored at byte {info.header_offset} overlaps another one or the directory"
                )
            ends[info.header_offset] = end
            end = info.header_offset
        for info in infos:
            if not info.filename.endswith("/"):
                sizes = (info.compress_type, info.compress_size, info.file_size, info.CRC)
                yield (
                    printable(info.filename).removeprefix("./"),
                    _problem(info),
                    ZipOffset(info.header_offset, *sizes, ends[info.header_offset]),
                )
    except (zipfile.BadZipFile, struct.error, ValueError, OverflowError, NotImplementedError) as error:
        raise UserError(f"{path} cannot be read as a zip ({error}): it is damaged or was cut short") from error


class _Directory(io.BufferedReader):
    """File object of a zip with a directory that fits into memory, of which ``zipfile`` takes a few times its size."""

    def read(self, size: int | None = -1, /) -> bytes:
        """Read at most LARGEST_DIRECTORY bytes at a time."""
        if size is not None and size > LARGEST_DIRECTORY:
            raise UserError(
                f"{self.name} has a directory of {size} bytes, over the limit of {LARGEST_DIRECTORY}: unpack it, and "
                "give the folder"
            )
        return super().read(size)


def _problem(info: zipfile.ZipInfo) -> str | None:
    if info.flag_bits & ENCRYPTED:
        return "encrypted: unpack it with its password"
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        return f"compressed by method {info.compress_type}, which is not read: pack it with deflate"
    if info.create_system == UNIX and stat.S_IFMT(info.external_attr >> 16) not in (0, stat.S_IFREG, stat.S_IFDIR):
        return LINK
    return None


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
