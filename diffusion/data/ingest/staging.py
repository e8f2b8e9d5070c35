"""Prepared chunks on their way into a data set: in a folder, or under staging names in object storage.

Without a shared folder workers upload their chunks, and the driver publishes shards where the others find them.
"""

import io
import json
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pydantic import TypeAdapter

from diffusion.common.errors import TransientError
from diffusion.common.files import make_folder, sha256_file, write_atomically
from diffusion.data.fan_out import FanOut
from diffusion.data.manifest import MASK, MASK_SIZE, RECORDS, FileEntry, Part
from diffusion.data.shards import BLOCK, ShardStore, Span, write_samples

PREPARED = pa.schema([*RECORDS, MASK, MASK_SIZE, *((name, pa.string()) for name in ("stamp", "bucket", "mask_source"))])
"""Columns of a prepared entry: its record, without outcomes that depend on the whole data set. ``outcome``
is ``quarantined``, ``duplicate`` (within the chunk), ``known`` (read before) or null; ``bucket`` is the shape of its
pixels as WIDTHxHEIGHT, if any; ``mask_source`` is ``Entry.mask``. Copies with equal masks share their place in the
shard; one with another mask has its own."""
SHARDS = b"shards"
"""Key in the metadata of a chunk's table: ``Digests`` and end of the shard of each bucket, as JSON."""
MAX_TABLE_BYTES = 2**27
"""Maximum size of a chunk's table in bytes; it has at most thousands of rows, and mebibytes of texts."""


class DamagedTableError(TransientError):
    """Damaged table of a prepared chunk, which a repeated ingest writes again."""


class Digests(NamedTuple):
    """What identifies a file: hex SHA-256, size, and hex MD5, which only object storage needs."""

    sha256: str
    bytes: int
    md5: str | None = None


SHARDS_OF_A_CHUNK = TypeAdapter(dict[str, tuple[Digests, int]])


class Workspace(NamedTuple):
    """Folders of a worker: one of its own, and one for what sources unpack or fetch."""

    folder: Path
    scratch: Path


class ChunkStore(Protocol):
    """Storage of prepared chunks, whose files are written once and whole. Picklable, as any worker uses it."""

    def workspace(self) -> AbstractContextManager[Workspace]:
        """Context with folders in which a worker prepares files for ``add``."""

    def has(self, name: str) -> bool:
        """Whether there is a file of this name."""

    def add(self, name: str, path: Path) -> Digests:
        """Store the file at ``path``, which may be moved."""

    def read(self, name: str) -> bytes:
        """Return the bytes of a table; raises DamagedTableError if they are more than a table has."""

    def read_span(self, name: str, offset: int, size: int) -> bytes:
        """Return ``size`` bytes of a file from ``offset`` on."""

    def delete(self, name: str) -> None:
        """Delete a file, if it is there."""

    def remove(self, chunks: Sequence[str]) -> None:
        """Remove these chunks, and none that another machine may use; their tables go first."""


@dataclass(frozen=True)
class ChunkFolder:
    """Chunks in the work folder ``work``, which all workers share."""

    work: Path

    @contextmanager
    def workspace(self) -> Iterator[Workspace]:
        """Make a folder beside the chunks; fetched files are kept until the end of the ingest."""
        make_folder(self.path(""))
        with TemporaryDirectory(dir=self.path("")) as folder:
            yield Workspace(Path(folder), self.work / "scratch")

    def has(self, name: str) -> bool:
        """Whether there is a file of this name."""
        return self.path(name).is_file()

    def add(self, name: str, path: Path) -> Digests:
        """Move the file at ``path`` here."""
        size = path.stat().st_size
        return Digests(write_atomically(self.path(name), path.replace), size)

    def read(self, name: str) -> bytes:
        """Return the bytes of a file."""
        return self.path(name).read_bytes()

    def read_span(self, name: str, offset: int, size: int) -> bytes:
        """Return ``size`` bytes of a file from ``offset`` on."""
        with self.path(name).open("rb") as file:
            file.seek(offset)
            return file.read(size)

    def delete(self, name: str) -> None:
        """Delete a file, if it is there."""
        self.path(name).unlink(missing_ok=True)

    def remove(self, chunks: Sequence[str]) -> None:
        """Remove all chunks and fetched files: the folder has one ingest at a time."""
        for name in ("chunks", "scratch"):
            shutil.rmtree(self.work / name, ignore_errors=True)

    def path(self, name: str) -> Path:
        """Return the path of a file, which may also be named by an absolute path."""
        return self.work / "chunks" / name


class RemoteChunks(ChunkStore, Protocol):
    """Chunks in object storage, with access to the place of published shards, where names are digests."""

    def fetch(self, name: str, path: Path) -> None:
        """Write a staged file to ``path``, unverified; raises TransientError if it is gone."""

    def publish(self, name: str, digests: Digests) -> None:
        """Publish a staged file without moving its bytes through this machine, and verify the copy."""

    def upload(self, path: Path) -> Digests:
        """Publish a file of this machine."""


class RemoteDataset(ShardStore, Protocol):
    """Storage of a data set whose shards do not lie on the driver's disk."""

    @property
    def chunks(self) -> RemoteChunks:
        """Return where workers leave their chunks."""

    def only(self, entry: FileEntry) -> ShardStore:
        """Return a picklable store of one published shard."""

    def keep(self, digests: dict[str, Digests]) -> None:
        """Remember, beyond a kill, where published shards lie, by their names in the data set."""


@dataclass(frozen=True)
class StagedShard:
    """A shard of images of which some may become part of the data set."""

    name: str
    """In the ``ChunkStore``; or the path of a file."""
    digests: Digests
    offsets: list[int]
    """Places of its images, ascending, in bytes."""
    end: int = 0
    """End of its last sample, in bytes; needed for shards in object storage."""


class PreparedChunk(NamedTuple):
    """The shards of a chunk by bucket, and its rows of PREPARED."""

    shards: dict[str, StagedShard]
    rows: list[dict[str, Any]]


def shard_name(chunk: str, bucket: str, sha256: str) -> str:
    """Return the name of the shard with a chunk's images of one bucket, whose bytes may differ when it is repeated."""
    return f"{chunk}-{bucket}-{sha256[:32]}.tar"


def table_name(chunk: str) -> str:
    """Return the name of a chunk's table, which is written last."""
    return f"{chunk}.parquet"


def write_table(path: Path, rows: list[dict[str, Any]], shards: dict[str, tuple[Digests, int]]) -> None:
    """Write the table of a chunk, with digests and end of its ``shards``."""
    schema = PREPARED.with_metadata({SHARDS: json.dumps(shards)})
    pq.write_table(pa.Table.from_pylist(rows, schema), path, compression="zstd")


def read_chunk(store: ChunkStore, name: str) -> PreparedChunk:
    """Read the table of a prepared chunk; raises DamagedTableError if it is damaged."""
    table, digests_by_bucket = _read_table(store, name)
    rows = table.to_pylist()
    offsets: dict[str, set[int]] = {}
    for row in rows:
        if row["offset"] is not None:
            offsets.setdefault(row["bucket"], set()).add(row["offset"])
    shards = {
        bucket: StagedShard(shard_name(name, bucket, digests.sha256), digests, sorted(offsets[bucket]), end)
        for bucket, (digests, end) in digests_by_bucket.items()
    }
    return PreparedChunk(shards, rows)


def is_prepared(store: ChunkStore, name: str) -> bool:
    """Whether the table of a chunk is there and whole, and its shards are there."""
    if not store.has(table_name(name)):
        return False
    try:
        _, digests = _read_table(store, name)
    except DamagedTableError:
        return False
    return all(store.has(shard_name(name, bucket, shard.sha256)) for bucket, (shard, _) in digests.items())


def _read_table(store: ChunkStore, name: str) -> tuple[pa.Table, dict[str, tuple[Digests, int]]]:
    """Read the table of a chunk, and the digests and end of each shard."""
    data = store.read(table_name(name))
    try:
        table = pq.read_table(io.BytesIO(data))
        shards = SHARDS_OF_A_CHUNK.validate_json((table.schema.metadata or {})[SHARDS])
        stored = table.cast(PREPARED).filter(pc.field("offset").is_valid())
        if shards.keys() != set(stored["bucket"].to_pylist()):
            raise ValueError("its shards are not those that its rows name")
    except (pa.ArrowException, OSError, KeyError, ValueError) as error:
        raise DamagedTableError(f"{table_name(name)} is damaged ({error}): give the same command again") from error
    return table, shards


@dataclass(frozen=True)
class ShardRewrite:
    """A staged shard, and the images of it that stay."""

    chunks: RemoteChunks
    shard: StagedShard
    spans: NDArray[np.int64]
    """Offset and size in bytes of each, (N, 2)."""


def rewrite_shard(task: ShardRewrite) -> Digests:
    """Publish a shard of some images of a staged one; raises TransientError if that is gone or damaged."""
    with task.chunks.workspace() as workspace:
        source, target = workspace.folder / "staged", workspace.folder / "rewritten"
        task.chunks.fetch(task.shard.name, source)
        if sha256_file(source) != task.shard.digests.sha256:
            raise TransientError(f"staged shard {task.shard.name} came damaged: give the same command again")
        write_samples(target, [(source, [{"offset": offset, "size": size} for offset, size in task.spans.tolist()])])
        return task.chunks.upload(target)


@dataclass
class ShardPublisher:
    """Publishes the shards of an ingest when all is decided, without bringing them to this machine."""

    remote: RemoteDataset
    fan_out: FanOut
    _whole: dict[int, StagedShard] = field(default_factory=dict)
    _rewrites: dict[int, ShardRewrite] = field(default_factory=dict)

    def add(self, number: int, shard: StagedShard, rows: Sequence[dict[str, Any]]) -> FileEntry:
        """Note the shard of part ``number``, which has the images of ``rows``: their offsets become those in it.

        Returns a preliminary entry, as the digest of a shard that loses images is not known yet.
        """
        following = dict(zip(shard.offsets, [*shard.offsets[1:], shard.end + BLOCK], strict=True))
        spans, position = list[Span](), BLOCK
        for row in sorted(rows, key=lambda row: row["offset"]):
            spans.append((row["offset"], row["size"]))
            length = following[row["offset"]] - row["offset"]
            row["offset"] = position
            position += length
        # Until the end of the ingest: what a shard of which all images stay needs no more would fill the memory.
        noted = replace(shard, offsets=[])
        if len(spans) == len(shard.offsets):
            self._whole[number] = noted
        else:
            self._rewrites[number] = ShardRewrite(self.remote.chunks, noted, np.array(spans, np.int64))
        return shard_entry(number, shard.digests)

    def publish(self, parts: list[Part]) -> None:
        """Publish all shards, rewriting on workers those that lose images, and enter them in ``parts``."""
        chunks, published = self.remote.chunks, dict[int, Digests]()
        rewritten = self.fan_out(rewrite_shard, self._rewrites.values())
        for number, digests in zip(self._rewrites, rewritten, strict=True):
            self._keep({number: digests})
            published[number] = digests
        whole = {number: shard.digests for number, shard in self._whole.items()}
        # Before they are there, so that a kill leaves none that nobody knows.
        self._keep(whole)
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda shard: chunks.publish(shard.name, shard.digests), self._whole.values()))
        published |= whole
        entries = {number: shard_entry(number, digests) for number, digests in published.items()}
        for place, part in enumerate(parts):
            if part.number in entries and part.shard is not None:
                parts[place] = part.model_copy(update={"shard": entries[part.number]})
        self._whole.clear()
        self._rewrites.clear()

    def _keep(self, published: dict[int, Digests]) -> None:
        self.remote.keep({shard_entry(number, digests).name: digests for number, digests in published.items()})


def shard_entry(number: int, digests: Digests) -> FileEntry:
    """Return the entry of the shard of part ``number``, whose name has a part of its digest."""
    name = f"shards/{number:05d}-{digests.sha256[:16]}.tar"
    return FileEntry(name=name, sha256=digests.sha256, bytes=digests.bytes)
