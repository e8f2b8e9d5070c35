"""Cache of remote shards: a folder of bounded size into which they are fetched ahead of use."""

import errno
import logging
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from threading import Lock
from typing import Protocol

from filelock import FileLock, Timeout

from diffusion.common.errors import UserError
from diffusion.data.manifest import FileEntry
from diffusion.data.shards import Span, damage, mapped

PATIENCE = 300.0
"""Seconds to wait for other processes to free room in the cache."""
PAUSE = 0.05
"""Seconds between checks for room."""

logger = logging.getLogger(__name__)


class ShardStore(Protocol):
    """Remote storage of a data set's shards."""

    def fetch(self, entry: FileEntry, path: Path) -> None:
        """Write the shard's bytes to ``path``, unverified, replacing any file there; retry transient errors.

        Called by several threads. Raises UserError if the shard does not exist or is unavailable.
        """


class ShardCache:
    """LRU cache of shards in ``folder``, into which ``store`` fetches them; together they take at most ``max_bytes``.

    A shard is named by its SHA-256, appears atomically, and is verified before its first use. Processes may share a
    folder: each uses what the others have fetched, and a shard evicted while it is read stays readable.
    """

    def __init__(self, folder: Path, store: ShardStore, max_bytes: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._store = store
        self._max_bytes = max_bytes
        self._lock = Lock()
        self._wanted: list[str] = []
        self._coming: dict[str, Future[None]] = {}
        self._verified: set[str] = set()
        self._pool = ThreadPoolExecutor(2, thread_name_prefix="fetch")

    def read(self, entry: FileEntry, spans: Sequence[Span]) -> list[bytes]:
        """Read ``spans`` of a shard, fetched first if it is not cached.

        Raises UserError if it is unavailable, arrives damaged twice, or does not fit.
        """
        with self._lock:
            future = self._coming.pop(entry.sha256, None)
        # A background fetch that has not started is cancelled.
        if future is not None and not future.cancel():
            future.result()
        with self._opened(entry) as file, mapped(file) as view:
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
        if entry.sha256 not in self._wanted or self._path(entry.sha256).is_file():
            return
        with self._fetching(entry) as partial:
            # Without room the reader fetches it and may evict shards needed later.
            if partial is not None and self._make_room(partial, entry, force=False):
                self._fetch(entry, partial).close()

    def _opened(self, entry: FileEntry) -> BufferedReader:
        """Open a shard, verified, for reading: from here on its name may vanish."""
        deadline = time.monotonic() + PATIENCE
        while True:
            if file := self._open_present(entry):
                return file
            with self._fetching(entry) as partial:
                if partial is None:
                    continue
                if self._make_room(partial, entry, force=True):
                    return self._fetch(entry, partial)
            if time.monotonic() > deadline:
                raise UserError(
                    f"no room for shard {entry.name} in {self._folder}, which other processes use as well: "
                    "raise training.stream_bytes, or wait for them"
                )
            time.sleep(PAUSE)

    def _open_present(self, entry: FileEntry) -> BufferedReader | None:
        path = self._path(entry.sha256)
        try:
            file = path.open("rb")
        except FileNotFoundError:
            return None
        os.utime(file.fileno())
        if entry.sha256 not in self._verified:
            if found := damage(file, entry):
                logger.warning("shard %s in the cache, %s, is %s: fetching it again", entry.name, path, found)
                file.close()
                with self._locked():
                    path.unlink(missing_ok=True)
                return None
            self._verified.add(entry.sha256)
        return file

    def _fetch(self, entry: FileEntry, partial: Path) -> BufferedReader:
        for _ in range(2):
            try:
                self._store.fetch(entry, partial)
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
                raise UserError(
                    f"no space left for shard {entry.name} in {partial.parent}: "
                    "free some, or lower training.stream_bytes"
                ) from error
            file = partial.open("rb")
            if not (found := damage(file, entry)):
                self._verified.add(entry.sha256)
                with self._locked():
                    partial.replace(self._path(entry.sha256))
                return file
            file.close()
            logger.warning("shard %s as it comes from the remote is %s", entry.name, found)
        raise UserError(
            f"shard {entry.name} as it comes from the remote is {found}, also when fetched again: "
            "push the data set once more with `dvc push`, or ingest it again from its source"
        )

    def _path(self, sha256: str) -> Path:
        return self._folder / f"{sha256}.tar"

    @contextmanager
    def _fetching(self, entry: FileEntry) -> Iterator[Path | None]:
        """Yield an exclusive path to write a shard to; None if another process just wrote it."""
        partial = self._folder / f"{entry.sha256}.{entry.bytes}.partial"
        with self._locked(entry.sha256):
            try:
                yield None if self._path(entry.sha256).is_file() else partial
            finally:
                partial.unlink(missing_ok=True)

    def _make_room(self, partial: Path, entry: FileEntry, force: bool) -> bool:
        """Reserve room for ``partial`` by evicting the least recently used shards; False if that is not enough.

        Those to be prefetched are evicted only with ``force``, the last one first.
        """
        if entry.bytes > self._max_bytes:
            raise UserError(
                f"shard {entry.name} has {entry.bytes} bytes and the cache holds {self._max_bytes}: "
                "raise training.stream_bytes"
            )
        keep = self._wanted
        with self._locked():
            whole = {path.stem: path.stat() for path in self._folder.glob("*.tar")}
            used = sum(stat.st_size for stat in whole.values()) + sum(self._reserved()) + entry.bytes
            spare = sorted(whole.keys() - keep, key=lambda sha256: whole[sha256].st_mtime_ns)
            spare += [sha256 for sha256 in reversed(keep) if force and sha256 in whole]
            for sha256 in spare:
                if used <= self._max_bytes:
                    break
                self._path(sha256).unlink()
                used -= whole[sha256].st_size
            if used > self._max_bytes:
                return False
            partial.touch()
            return True

    def _reserved(self) -> Iterator[int]:
        """Yield the sizes of shards being fetched; files of killed processes are deleted."""
        for partial in self._folder.glob("*.partial"):
            sha256, size, _ = partial.name.split(".")
            try:
                with self._locked(sha256, timeout=0):
                    partial.unlink(missing_ok=True)
            except Timeout:
                yield int(size)

    def _locked(self, sha256: str = "", timeout: float = -1) -> FileLock:
        """Return the lock of a shard that is fetched, or of the folder."""
        # The empty lock file is never deleted: deleting it while others wait would admit two of them.
        return FileLock(self._folder / (f".{sha256}.lock" if sha256 else ".lock"), timeout=timeout)
