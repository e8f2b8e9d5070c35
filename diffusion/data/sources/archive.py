"""Tar (compressed or not) and zip archives of images, read in place by offset."""

import json
import struct
import tarfile
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import BinaryIO, cast

from diffusion.common.errors import UserError
from diffusion.data.ingest.decode import Refused
from diffusion.data.sources import tars, zips
from diffusion.data.sources.base import Access, Entry, Payload
from diffusion.data.sources.conventions import METADATA_FILES, described, records, too_large
from diffusion.data.sources.listing import Listing, listing
from diffusion.data.sources.local_files import MISSING, as_lines, open_unchanged, refusal, stamp_of, uncompressed


@dataclass(frozen=True)
class Archive(ABC):
    """The images in an archive, named ``ARCHIVE/MEMBER``.

    ``metadata.csv`` or ``metadata.jsonl`` at its root, folders and hidden files are treated as in a folder.
    Links are quarantined.
    """

    path: Path
    access: Access
    # Sorted by name, so that the same images in a folder, a tar and a zip give the same data set.
    in_order = False

    def entries(self) -> Iterator[Entry]:
        """Yield its images in its own order or that of its metadata; raises UserError if it is damaged."""
        metadata: dict[str, str] = {}
        known = stamp_of(self.path)
        with listing() as found:
            for name, locator, stamp in self._files(known):
                found.add(name, locator, stamp)
                if name in METADATA_FILES:
                    metadata[name] = locator
            if len(metadata) > 1:
                raise UserError(f"{self.path} has both {' and '.join(METADATA_FILES)}: keep one of them")
            images = self._described(found, *metadata.popitem()) if metadata else found.images(self.access.passed_over)
            for entry in images:
                yield replace(entry, source=f"{self.path.name}/{entry.source}", stamp=entry.stamp or known)

    def _described(self, found: Listing, name: str, locator: str) -> Iterator[Entry]:
        where = f"{self.path}/{name}"
        if isinstance(problem := json.loads(locator), str):
            raise UserError(f"{where} cannot be read ({problem}): mend it or take it away")
        with self._opened(locator) as file:
            yield from found.described(described(records(as_lines(file), name, where), where))

    @abstractmethod
    def read(self, entries: Sequence[Entry]) -> Iterator[Payload]:
        """Yield their bytes; raises UserError if the archive has changed since it was listed."""

    @abstractmethod
    def _files(self, known: str) -> Iterator[tuple[str, str, str]]:
        """Yield name, locator and stamp of every file in it; ``known`` is the stamp of the archive."""

    @abstractmethod
    def _opened(self, locator: str) -> AbstractContextManager[BinaryIO]:
        """Open a file in it for reading."""


class Tar(Archive):
    """A tar; a compressed one is unpacked once into the scratch folder.

    If it has changed, all members are read again.
    """

    def read(self, entries: Sequence[Entry]) -> Iterator[Payload]:
        """Yield their bytes; raises UserError if the tar has changed since it was listed."""
        for known, group in groupby(entries, key=lambda entry: entry.stamp):
            yield from tars.read(self.path, known, (json.loads(entry.locator) for entry in group), self.access)

    def _files(self, known: str) -> Iterator[tuple[str, str, str]]:
        for member in tars.members(uncompressed(self.path, known, self.access), str(self.path)):
            yield member.name, json.dumps(member.place), known

    @contextmanager
    def _opened(self, locator: str) -> Iterator[BinaryIO]:
        path = uncompressed(self.path, stamp_of(self.path), self.access)
        with tarfile.open(path, "r:") as tar:
            info = tarfile.TarInfo()
            info.offset_data, info.size = json.loads(locator)
            file = tar.extractfile(info)
            if file is None:
                raise AssertionError("a plain member can be opened")
            yield cast(BinaryIO, file)


class Zip(Archive):
    """A zip, stored or deflated; a member has changed if its checksum has."""

    def read(self, entries: Sequence[Entry]) -> Iterator[Payload]:
        """Yield their bytes; raises UserError if the zip has changed since it was listed."""
        places = [json.loads(entry.locator) for entry in entries]
        known = next((place[0] for place in places if isinstance(place, list)), None)
        with ExitStack() as stack:
            file = known and open_unchanged(self.path, known)
            if file:
                stack.enter_context(file)
            for place in places:
                if isinstance(place, str):
                    yield Refused(place)
                else:
                    yield self._member(file, zips.ZipOffset(*place[1:])) if file else Refused(MISSING)

    def _member(self, file: BinaryIO, place: zips.ZipOffset) -> Payload:
        limit = self.access.config.max_bytes
        return too_large(place.size, limit) if place.size > limit else zips.read_member(file, place)

    def _files(self, known: str) -> Iterator[tuple[str, str, str]]:
        for member in zips.members(self.path):
            locator = refusal(member.problem) if member.problem else json.dumps([known, *member.place])
            yield member.name, locator, f"{member.place.size}:{member.place.crc:08x}"

    @contextmanager
    def _opened(self, locator: str) -> Iterator[BinaryIO]:
        _, *place = json.loads(locator)
        try:
            with self.path.open("rb") as file, zips.open_member(file, zips.ZipOffset(*place)) as member:
                yield cast(BinaryIO, member)
        except (zipfile.BadZipFile, zlib.error, struct.error, EOFError) as error:
            raise UserError(f"the metadata in {self.path} cannot be read ({error}): pack it again") from error
