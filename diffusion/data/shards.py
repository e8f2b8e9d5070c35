"""WebDataset tars: written so that equal samples give equal bytes, copied without being unpacked, read by offset.

Every shard is verified before it is read.
"""

import hashlib
import mmap
import os
import tarfile
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from io import BufferedReader
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, BinaryIO

from diffusion.common.errors import UserError
from diffusion.common.files import canonical_json
from diffusion.data.manifest import FileEntry, repair_hint

if TYPE_CHECKING:
    from _typeshed import SupportsWrite

BLOCK = tarfile.BLOCKSIZE
Span = tuple[int, int]
"""Offset and size in a shard, in bytes."""


class TarWriter:
    """Writes samples of two members each, ``<key>.png`` and ``<key>.json``, as one USTAR archive."""

    def __init__(self, file: "SupportsWrite[bytes]") -> None:
        self.file = file
        self.position = 0

    def add(self, key: str, png: bytes, about: dict[str, Any]) -> int:
        """Append a sample, with ``about`` as its JSON; returns the offset of its PNG."""
        offset = self.position + BLOCK
        self._member(f"{key}.png", png)
        self._member(f"{key}.json", canonical_json(about).encode())
        return offset

    def copy(self, source: BinaryIO, offset: int, size: int) -> int:
        """Append the sample of ``source`` whose PNG of ``size`` bytes is at ``offset``; returns its new offset."""
        start, behind = offset - BLOCK, offset + _padded(size)
        source.seek(behind)
        about = tarfile.TarInfo.frombuf(source.read(BLOCK), "utf-8", "strict")
        source.seek(start)
        new = self.position + BLOCK
        self._write(source.read(behind + BLOCK + _padded(about.size) - start))
        return new

    def close(self) -> None:
        """Write the end of the archive, padded as tar does it."""
        end = self.position + 2 * BLOCK
        self._write(bytes(-(-end // tarfile.RECORDSIZE) * tarfile.RECORDSIZE - self.position))

    def _member(self, name: str, data: bytes) -> None:
        info = tarfile.TarInfo(name)
        info.size = len(data)
        self._write(info.tobuf(tarfile.USTAR_FORMAT) + data + bytes(-len(data) % BLOCK))

    def _write(self, data: bytes) -> None:
        self.file.write(data)
        self.position += len(data)


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


class LocalShards:
    """Shards that lie in the data set's ``folder``, mapped into memory; each is verified before its first use."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        # Each takes a file descriptor, of which systems commonly grant 1024.
        self._mapped = lru_cache(maxsize=256)(self._map)
        self._verified: dict[str, Future[None]] = {}
        self._lock = Lock()
        self._pool = ThreadPoolExecutor(2, thread_name_prefix="verify")

    def read(self, entry: FileEntry, spans: Sequence[Span]) -> list[memoryview]:
        """Return ``spans`` of a shard without a copy; raises UserError if it is missing or damaged."""
        self._verify(entry).result()
        view = self._mapped(entry.name)
        return [view[offset : offset + size] for offset, size in spans]

    def prefetch(self, entries: Sequence[FileEntry]) -> None:
        """Start to verify ``entries``."""
        for entry in entries:
            self._verify(entry)

    def close(self) -> None:
        """Stop verifying; files close when the last image read from them is gone."""
        self._pool.shutdown(cancel_futures=True)
        self._mapped.cache_clear()

    def _verify(self, entry: FileEntry) -> Future[None]:
        with self._lock:
            if entry.sha256 not in self._verified:
                self._verified[entry.sha256] = self._pool.submit(self._require_whole, entry)
            return self._verified[entry.sha256]

    def _require_whole(self, entry: FileEntry) -> None:
        path = self._folder / entry.name
        try:
            with path.open("rb") as file:
                found = damage(file, entry)
        except FileNotFoundError:
            found = "missing"
        if found:
            raise UserError(f"shard {path} is {found}: {repair_hint(self._folder)}")

    def _map(self, name: str) -> memoryview:
        with (self._folder / name).open("rb") as file:
            return mapped(file)


def damage(file: BufferedReader, entry: FileEntry) -> str | None:
    """Describe the damage of an open shard; None if it is intact."""
    if (size := os.fstat(file.fileno()).st_size) != entry.bytes:
        return f"{size} bytes long instead of {entry.bytes}"
    return None if hashlib.file_digest(file, "sha256").hexdigest() == entry.sha256 else "changed (its SHA-256 differs)"


def mapped(file: BufferedReader) -> memoryview:
    """Map the bytes of an immutable file into memory."""
    return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
