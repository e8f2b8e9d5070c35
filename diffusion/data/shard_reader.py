"""Shards as they are read: by offset, and none before its bytes are known to be the ones meant."""

import hashlib
import mmap
import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from io import BufferedReader
from pathlib import Path
from threading import Lock
from typing import Protocol

from diffusion.data.manifest import FileEntry, mend
from diffusion.errors import UserError

VERIFIERS = 2
"""Shards verified at the same time: SHA-256 works outside the interpreter lock."""
OPEN_SHARDS = 256
"""Shards held open: each costs a file descriptor, and systems commonly grant 1024."""

Span = tuple[int, int]
"""Offset and size in a shard, in bytes."""


class Shards(Protocol):
    """Where the shards of a data set are read from. Any thread may call."""

    def read(self, entry: FileEntry, spans: Sequence[Span]) -> Sequence[bytes | memoryview]:
        """What lies at ``spans`` of a shard; raises UserError if it is damaged or cannot be had."""

    def ahead(self, entries: Sequence[FileEntry]) -> None:
        """Make ready in the background what will be read next, soonest first, and nothing else."""

    def close(self) -> None:
        """Let go of files and threads."""


class LocalShards:
    """Shards that lie in the data set's ``folder``, mapped into memory; each is verified before its first use."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._mapped = lru_cache(maxsize=OPEN_SHARDS)(self._map)
        self._verified: dict[str, Future[None]] = {}
        self._lock = Lock()
        self._pool = ThreadPoolExecutor(VERIFIERS, thread_name_prefix="verify")

    def read(self, entry: FileEntry, spans: Sequence[Span]) -> list[memoryview]:
        """What lies at ``spans`` of a shard, without a copy; raises UserError if it is missing or damaged."""
        self._verify(entry).result()
        view = self._mapped(entry.name)
        return [view[offset : offset + size] for offset, size in spans]

    def ahead(self, entries: Sequence[FileEntry]) -> None:
        """Begin to verify ``entries``."""
        for entry in entries:
            self._verify(entry)

    def close(self) -> None:
        """Stop verifying; files close when the last picture read from them is gone."""
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
            raise UserError(f"shard {path} is {found}: {mend(self._folder)}")

    def _map(self, name: str) -> memoryview:
        with (self._folder / name).open("rb") as file:
            return mapped(file)


def damage(file: BufferedReader, entry: FileEntry) -> str | None:
    """What is wrong with an open shard, in words; None if it is whole."""
    if (size := os.fstat(file.fileno()).st_size) != entry.bytes:
        return f"{size} bytes long instead of {entry.bytes}"
    return None if hashlib.file_digest(file, "sha256").hexdigest() == entry.sha256 else "changed (its SHA-256 differs)"


def mapped(file: BufferedReader) -> memoryview:
    """The bytes of a file that never changes, read as they are looked at."""
    return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
