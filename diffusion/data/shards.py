"""WebDataset tars: written so that equal samples give equal bytes, copied without being unpacked, read by offset."""

import errno
import hashlib
import logging
import mmap
import os
import tarfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from io import BufferedReader
from pathlib import Path
from threading import Lock
from typing import Any, BinaryIO, NamedTuple, Protocol

import numpy as np
from filelock import FileLock, Timeout

from diffusion.common.errors import UserError
from diffusion.common.files import canonical_json, sha256_file, temporary_folder
from diffusion.data.manifest import FileEntry, Manifest, find_intact, repair_hint
from diffusion.data.png import decode_many

logger = logging.getLogger(__name__)

BLOCK = tarfile.BLOCKSIZE
MAX_WAIT = 300.0
"""Seconds to wait for other processes to free room in the cache."""
NEW_MASK = "new_mask"
"""Key of a row with the PNG of a mask that is not in its shard yet; empty: it has none any more."""
Span = tuple[int, int]
"""Offset and size in a shard, in bytes."""


class TarWriter:
    """Writes samples, ``<key>.png``, ``<key>.mask.png`` if there is one, and ``<key>.json``, as one USTAR archive."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.position = file, 0

    def add(self, key: str, png: bytes, metadata: dict[str, Any], mask: bytes = b"") -> int:
        """Append a sample, with ``metadata`` as its JSON and the PNG ``mask``; returns the offset of its PNG."""
        offset = self.position + BLOCK
        self._member(f"{key}.png", png)
        if mask:
            self._member(f"{key}.mask.png", mask)
        self._member(f"{key}.json", canonical_json(metadata).encode())
        return offset

    def copy(self, source: BinaryIO, offset: int, size: int, mask: bytes | None = None) -> int:
        """Append the sample of ``source`` whose PNG of ``size`` bytes is at ``offset``; returns its new offset.

        ``mask`` replaces its mask: empty, it has none; None: it keeps its own.
        """
        new_offset, is_last = self.position + BLOCK, False
        source.seek(offset - BLOCK)
        self._write(source.read(BLOCK + _padded_size(size)))
        while not is_last:
            header = source.read(BLOCK)
            info = tarfile.TarInfo.frombuf(header, "utf-8", "strict")
            data, is_last = source.read(_padded_size(info.size)), info.name.endswith(".json")
            if is_last and mask:
                self._member(f"{info.name.removesuffix('.json')}.mask.png", mask)
            if is_last or mask is None:
                self._write(header + data)
        return new_offset

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


def write_samples(path: Path, shards: Sequence[tuple[Path, list[dict[str, Any]]]]) -> None:
    """Write a shard to ``path`` of samples of other ``shards``, each with the rows to copy; updates their offsets.

    A row's NEW_MASK replaces its mask.
    """
    with path.open("wb") as file:
        writer = TarWriter(file)
        for source, rows in shards:
            with source.open("rb") as shard:
                for row in sorted(rows, key=lambda row: row["offset"]):
                    row["offset"] = writer.copy(shard, row["offset"], row["size"], row.pop(NEW_MASK, None))
        writer.close()


def _padded_size(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def mask_offset(offset: Any, size: Any) -> Any:
    """Return the offset of the mask of an image whose PNG of ``size`` bytes is at ``offset``; also of arrays."""
    return offset + -(-size // BLOCK) * BLOCK + BLOCK


class StoredImages(NamedTuple):
    """PNGs of N images of one shape."""

    folder: Path
    """Folder of their data set."""
    pngs: Sequence[bytes | memoryview]
    shape: tuple[int, int, int]
    """(C, H, W)."""

    def decode(self) -> np.ndarray:
        """Decode them to (N, C, H, W) uint8, channels last in memory; UserError for one of another shape."""
        try:
            return decode_many(self.pngs, self.shape)
        except ValueError as error:
            raise UserError(
                f"an image in {self.folder} is not what its record says ({error}): {repair_hint(self.folder)}"
            ) from error


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
                problem = describe_damage(file, entry)
        except FileNotFoundError:
            problem = "missing"
        if problem:
            raise UserError(f"shard {path} is {problem}: {repair_hint(self._folder)}")

    def _map(self, name: str) -> memoryview:
        with (self._folder / name).open("rb") as file:
            return map_file(file)


def describe_damage(file: BufferedReader, entry: FileEntry) -> str | None:
    """Describe the damage of an open shard; None if it is intact."""
    if (size := os.fstat(file.fileno()).st_size) != entry.bytes:
        return f"{size} bytes long instead of {entry.bytes}"
    return None if hashlib.file_digest(file, "sha256").hexdigest() == entry.sha256 else "changed (its SHA-256 differs)"


def map_file(file: BufferedReader) -> memoryview:
    """Map the bytes of an immutable file into memory."""
    return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


class ShardStore(Protocol):
    """Remote storage of a data set's shards."""

    def fetch(self, entry: FileEntry, path: Path) -> None:
        """Write the shard to ``path``, unverified, from any thread; raises UserError if it is unavailable."""


@contextmanager
def shard_file(folder: Path, entry: FileEntry, store: ShardStore | None) -> Iterator[Path]:
    """Context with the path of an intact shard: the file in ``folder``, or one fetched from ``store`` for this context.

    Raises UserError if it is missing or damaged.
    """
    if store is None or (folder / entry.name).is_file():
        yield find_intact(folder, entry)
        return
    with temporary_folder() as temporary:
        path = temporary / "shard.tar"
        store.fetch(entry, path)
        if sha256_file(path) != entry.sha256:
            raise UserError(f"shard {entry.name} as it comes from the remote is changed (its SHA-256 differs)")
        yield path


class ShardCache:
    """LRU cache of shards in ``folder``, into which ``store`` fetches them; together they take at most ``max_bytes``.

    A shard is named by its SHA-256, appears atomically, and is verified before its first use. Processes may share a
    folder: each uses what the others have fetched, and a shard evicted while it is read stays readable.
    """

    def __init__(self, folder: Path, store: ShardStore, max_bytes: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._store, self._max_bytes = folder, store, max_bytes
        self._lock = Lock()
        self._wanted: list[str] = []
        self._coming: dict[str, Future[None]] = {}
        self._verified: set[str] = set()
        self._pool = ThreadPoolExecutor(2, thread_name_prefix="fetch")

    def read(self, entry: FileEntry, spans: Sequence[Span]) -> list[bytes]:
        """Read ``spans`` of a shard, fetched if needed; raises UserError if it is unavailable, damaged or too large."""
        with self._lock:
            future = self._coming.pop(entry.sha256, None)
        # A background fetch that has not started is cancelled.
        if future is not None and not future.cancel():
            future.result()
        with self._open(entry) as file, map_file(file) as view:
            return [bytes(view[offset : offset + size]) for offset, size in spans]

    def prefetch(self, entries: Sequence[FileEntry]) -> None:
        """Fetch ``entries`` in the background, soonest needed first, and cancel earlier requests."""
        with self._lock:
            self._wanted = [entry.sha256 for entry in entries]
            self._coming = {sha256: future for sha256, future in self._coming.items() if not future.done()}
            for entry in entries:
                if entry.sha256 not in self._coming:
                    self._coming[entry.sha256] = self._pool.submit(self._fetch_requested, entry)

    def close(self) -> None:
        """Stop fetching; fetched shards stay."""
        self._pool.shutdown(cancel_futures=True)

    def _fetch_requested(self, entry: FileEntry) -> None:
        is_needed = entry.sha256 in self._wanted and not self._path(entry.sha256).is_file()
        # Without room the reader fetches it and may evict shards needed later.
        if is_needed and (file := self._fetch(entry, force=False)):
            file.close()

    def _open(self, entry: FileEntry) -> BufferedReader:
        """Open a shard, verified, for reading: from here on its name may vanish."""
        deadline = time.monotonic() + MAX_WAIT
        while True:
            if file := self._open_present(entry) or self._fetch(entry, force=True):
                return file
            if time.monotonic() > deadline:
                raise UserError(
                    f"no room for shard {entry.name} in {self._folder}, which other processes use as well: "
                    "raise training.stream_bytes, or wait for them"
                )
            time.sleep(0.05)

    def _open_present(self, entry: FileEntry) -> BufferedReader | None:
        path = self._path(entry.sha256)
        try:
            file = path.open("rb")
        except FileNotFoundError:
            return None
        # The kernel's own time is its last tick's, which many reads share.
        os.utime(file.fileno(), ns=(time.time_ns(),) * 2)
        if entry.sha256 not in self._verified:
            if problem := describe_damage(file, entry):
                logger.warning("shard %s in the cache, %s, is %s: fetching it again", entry.name, path, problem)
                file.close()
                with self._file_lock():
                    path.unlink(missing_ok=True)
                return None
            self._verified.add(entry.sha256)
        return file

    def _fetch(self, entry: FileEntry, force: bool) -> BufferedReader | None:
        """Fetch a shard; None if another process just did, or there is no room for it."""
        path, partial = self._path(entry.sha256), self._folder / f"{entry.sha256}.{entry.bytes}.partial"
        with self._file_lock(entry.sha256):
            # Left by a process that was killed, it would count as space that another one is about to fill.
            partial.unlink(missing_ok=True)
            if path.is_file() or not self._make_room(partial, entry, force):
                return None
            try:
                for _ in range(2):
                    self._store.fetch(entry, partial)
                    file = partial.open("rb")
                    if not (problem := describe_damage(file, entry)):
                        self._verified.add(entry.sha256)
                        with self._file_lock():
                            partial.replace(path)
                        return file
                    file.close()
                    logger.warning("shard %s as it comes from the remote is %s", entry.name, problem)
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
                raise UserError(
                    f"no space left for shard {entry.name} in {partial.parent}: "
                    "free some, or lower training.stream_bytes"
                ) from error
            finally:
                partial.unlink(missing_ok=True)
        raise UserError(
            f"shard {entry.name} as it comes from the remote is {problem}, also when fetched again: "
            "push the data set once more with `dvc push`, or ingest it again from its source"
        )

    def _path(self, sha256: str) -> Path:
        return self._folder / f"{sha256}.tar"

    def _make_room(self, partial: Path, entry: FileEntry, force: bool) -> bool:
        """Evict the least recently used shards, with ``force`` also those to be prefetched; False if not enough."""
        if entry.bytes > self._max_bytes:
            raise UserError(
                f"shard {entry.name} has {entry.bytes} bytes and the cache holds {self._max_bytes}: "
                "raise training.stream_bytes"
            )
        with self._file_lock():
            # Once it is locked, as other shards may be wanted than when the wait began.
            digests = self._wanted
            stats = {path.stem: path.stat() for path in self._folder.glob("*.tar")}
            used_bytes = sum(stat.st_size for stat in stats.values()) + sum(self._reserved_sizes()) + entry.bytes
            victims = sorted(stats.keys() - digests, key=lambda sha256: stats[sha256].st_mtime_ns)
            victims += [sha256 for sha256 in reversed(digests) if force and sha256 in stats]
            for sha256 in victims:
                if used_bytes <= self._max_bytes:
                    break
                self._path(sha256).unlink()
                used_bytes -= stats[sha256].st_size
            if used_bytes > self._max_bytes:
                return False
            partial.touch()
            return True

    def _reserved_sizes(self) -> Iterator[int]:
        """Yield the sizes of shards being fetched; files of killed processes are deleted."""
        for partial in self._folder.glob("*.partial"):
            sha256, size, _ = partial.name.split(".")
            try:
                with self._file_lock(sha256, timeout=0):
                    partial.unlink(missing_ok=True)
            except Timeout:
                yield int(size)

    def _file_lock(self, sha256: str = "", timeout: float = -1) -> FileLock:
        # The empty lock file is never deleted: deleting it while others wait would admit two of them.
        return FileLock(self._folder / (f".{sha256}.lock" if sha256 else ".lock"), timeout=timeout)


def missing_shards(folder: Path, manifest: Manifest) -> list[FileEntry]:
    """Return the shards of ``manifest`` that are not in ``folder``."""
    return [entry for entry in manifest.shards if not (folder / entry.name).is_file()]


@contextmanager
def open_missing_shards(folder: Path, manifest: Manifest, store: ShardStore | None) -> Iterator[ShardCache | None]:
    """Context with a temporary cache of shards in ``store``; None without one, or if all shards are in ``folder``."""
    if store is None or not missing_shards(folder, manifest):
        yield None
        return
    with temporary_folder() as temporary:
        yield ShardCache(temporary, store, max_bytes=4 * max(entry.bytes for entry in manifest.shards))
