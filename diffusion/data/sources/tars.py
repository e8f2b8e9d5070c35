"""Reading of tars without holding the list of members in memory."""

import io
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeAlias

from diffusion.common.errors import UserError
from diffusion.data.ingest.decode import Refused
from diffusion.data.sources.base import LONGEST, Access, Payload, shortened, too_long
from diffusion.data.sources.conventions import sane, too_large
from diffusion.data.sources.local_files import MISSING, open_unchanged, uncompressed

LONGEST_HEADER = 2**20
"""Maximum bytes of all headers of a member."""
LONGEST_GLOBAL_HEADER = 2**16
"""Maximum characters of global attributes, which are copied to every member."""


@dataclass(frozen=True, slots=True)
class TarMember:
    """A file in a tar."""

    name: str
    """Name as stored, without a leading ``./``; never used as a path."""
    offset: int
    """Offset of its bytes in the tar."""
    size: int
    problem: str | None = None
    """Reason why its bytes are unavailable, if any."""

    @property
    def place(self) -> "Place":
        """Return the place that ``read`` takes."""
        return self.problem or (self.offset, self.size)


Place: TypeAlias = str | Sequence[int]
"""Offset and size of a member, or the reason why it cannot be read."""


def members(path: Path, where: str) -> Iterator[TarMember]:
    """Yield all files in the uncompressed tar at ``path``; links and devices have a ``problem``.

    Raises UserError, naming ``where``, for a tar that is damaged, truncated, or continues after its end.
    """
    try:
        with _Headers(io.FileIO(path)) as file, tarfile.open(fileobj=file, mode="r:", encoding="utf-8") as tar:
            while (info := tar.next()) is not None:
                file.left = LONGEST_HEADER
                tar.members.clear()  # type: ignore[attr-defined] # typeshed leaves it out
                if sum(len(name) + len(value) for name, value in tar.pax_headers.items()) > LONGEST_GLOBAL_HEADER:
                    raise tarfile.ReadError("its headers for all members are too long")
                if info.size < 0:
                    raise tarfile.ReadError("a member has a negative size")
                if not info.isdir():
                    yield _member(info)
            _check_end(file, tar.offset)
    except (tarfile.TarError, ValueError, OverflowError, RecursionError) as error:
        raise UserError(f"{where} cannot be read as a tar ({error}): it is damaged or was cut short") from error


def read(path: Path, known: str, places: Iterable[Place], access: Access) -> Iterator[Payload]:
    """Yield members of the tar at ``path``, which may be compressed and had the stamp ``known`` when listed.

    Raises UserError if its stamp has changed.
    """
    with ExitStack() as stack:
        file = _opened(path, known, access)
        if file:
            stack.enter_context(file)
        for place in places:
            if isinstance(place, str):
                yield Refused(place)
            elif file is None:
                yield Refused(MISSING)
            else:
                yield read_slice(file, place, access.config.max_bytes)


def _opened(path: Path, known: str, access: Access) -> BinaryIO | None:
    try:
        plain = uncompressed(path, known, access)
    except FileNotFoundError:
        return None
    return open_unchanged(path, known) if plain == path else plain.open("rb")


def read_slice(file: BinaryIO, place: Sequence[int], limit: int) -> bytes | Refused:
    """Read the bytes at (offset, size), unless they are more than ``limit``."""
    offset, size = place
    if size > limit:
        return too_large(size, limit)
    file.seek(offset)
    data = file.read(size)
    return data if len(data) == size else Refused("cut short in the tar")


class _Headers(io.BufferedReader):
    """File object of a tar that reads headers only."""

    left = LONGEST_HEADER
    """Bytes left for the headers of the next member: long names and sparse maps may be endless."""

    def read(self, size: int | None = -1, /) -> bytes:
        """Read at most ``size`` bytes, if headers have such a size."""
        if size is None or not 0 <= size <= self.left:
            raise tarfile.ReadError(f"a header of {size} bytes")
        self.left -= size
        return super().read(size)


def _member(info: tarfile.TarInfo) -> TarMember:
    name = info.name.removeprefix("./")
    if len(name) > LONGEST["name"]:
        # WebDataset keeps all names of a key.
        return TarMember(sane(shortened(name)), info.offset_data, info.size, too_long("name"))
    return TarMember(sane(name), info.offset_data, info.size, _problem(info))


def _problem(info: tarfile.TarInfo) -> str | None:
    if info.issparse():
        return "stored as a sparse file: pack it again without --sparse"
    return None if info.isreg() else "a link or a device inside an archive: only files are read"


def _check_end(file: io.BufferedReader, offset: int) -> None:
    """Check the end of the tar, as ``tarfile`` takes any invalid header for the end."""
    file.seek(offset)
    if io.BufferedReader.read(file, tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError(f"no end and no member at byte {offset}")
    while piece := io.BufferedReader.read(file, LONGEST_HEADER):
        if piece.count(0) != len(piece):
            raise tarfile.ReadError("more follows after its end: was it glued to another tar?")
