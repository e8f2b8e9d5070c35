"""Shards on DVC's remote: read one by one, and published there from the chunks that an ingest's workers stage.

Chunks lie under ``s3://BUCKET/staging/NAME/``. A shard of which all images are new is copied by the server to
its place on the remote, which is named by its MD5.
"""

import hashlib
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from threading import Lock

from diffusion.common.errors import TransientError, UserError
from diffusion.common.files import sha256_file, temporary_folder
from diffusion.data.ingest.staging import MAX_TABLE_BYTES, DamagedTableError, Digests, Workspace, table_name
from diffusion.data.manifest import FileEntry, read_manifest
from flows.datasets.dvc import Cache, Listing, Remote, StoredFiles, data_version
from flows.datasets.published import read_published, write_published
from flows.storage.s3 import Location, Store
from flows.storage.s3_errors import LargeObjectError, MissingObjectError

STAGING = "staging"
"""Prefix of staged chunks, by data set."""


@dataclass(frozen=True)
class StagedChunks:
    """``diffusion.data.ingest.staging.RemoteChunks`` at ``place``, which become shards on the DVC remote ``source``.

    Every process uses the S3 server and the keys that its environment names.
    """

    place: Location
    source: str

    @contextmanager
    def workspace(self) -> Iterator[Workspace]:
        """Make a folder of this worker alone: what sources fetch is fetched again for each chunk."""
        with temporary_folder() as folder:
            (folder / "scratch").mkdir()
            yield Workspace(folder, folder / "scratch")

    def has(self, name: str) -> bool:
        """Whether there is a file of this name."""
        return self._store.exists(self.place.bucket, self.place.key(name))

    def add(self, name: str, path: Path) -> Digests:
        """Upload the file at ``path``; another worker may have done so before."""
        with path.open("rb") as file:
            self._store.put_once(self.place.bucket, self.place.key(name), file)
        return _digests_of(path)

    def read(self, name: str) -> bytes:
        """Return the bytes of a table."""
        try:
            with self._explain_missing():
                return self._store.get(self.place.bucket, self.place.key(name), MAX_TABLE_BYTES)
        except LargeObjectError as error:
            raise DamagedTableError(str(error)) from error

    def read_span(self, name: str, offset: int, size: int) -> bytes:
        """Return ``size`` bytes of a file from ``offset`` on."""
        with self._explain_missing():
            return self._store.get_span(self.place.bucket, self.place.key(name), offset, size)

    def fetch(self, name: str, path: Path) -> None:
        """Write a staged file to ``path``."""
        with self._explain_missing():
            self._store.fetch(self.place.bucket, self.place.key(name), path)

    def publish(self, name: str, digests: Digests) -> None:
        """Copy a staged file to its place on the remote."""
        assert digests.md5 is not None
        target = Remote(Location.parse(self.source), self._store).key(digests.md5)
        with self._explain_missing():
            self._store.copy_once(
                self.place.bucket, self.place.key(name), target, sha256=digests.sha256, md5=digests.md5
            )

    def upload(self, path: Path) -> Digests:
        """Upload the file at ``path`` to its place on the remote."""
        digests = _digests_of(path)
        remote = Remote(Location.parse(self.source), self._store)
        with path.open("rb") as file:
            self._store.put_once(remote.place.bucket, remote.key(digests.md5 or ""), file)
        return digests

    def delete(self, name: str) -> None:
        """Delete a file, if it is there."""
        self._store.delete_many(self.place.bucket, [self.place.key(name)])

    def remove(self, chunks: Sequence[str]) -> None:
        """Delete these chunks; what ingests left that never ended is deleted by gc."""
        self._store.delete_many(self.place.bucket, (self.place.key(table_name(chunk)) for chunk in chunks))
        names, prefix = set(chunks), self.place.key("")
        keys = self._store.list_keys(self.place.bucket, prefix)
        self._store.delete_many(
            self.place.bucket, (key for key in keys if key.removeprefix(prefix).partition("-")[0] in names)
        )

    @property
    def _store(self) -> Store:
        return Store()

    @contextmanager
    def _explain_missing(self) -> Iterator[None]:
        try:
            yield
        except MissingObjectError as error:
            raise TransientError(
                f"a chunk of this ingest is not in {self.place} any more, as another ingest or gc removed it: give the "
                "same command again"
            ) from error


def _digests_of(path: Path) -> Digests:
    with path.open("rb") as file:
        md5 = hashlib.file_digest(file, "md5").hexdigest()
    return Digests(sha256_file(path), path.stat().st_size, md5)


@dataclass(frozen=True)
class RemoteShard:
    """``diffusion.data.shards.ShardStore`` of a shard with one of the names ``md5s`` on the DVC remote ``source``."""

    source: str
    md5s: tuple[str, ...]
    place: str
    """What the shard is, for errors."""

    def fetch(self, entry: FileEntry, path: Path) -> None:
        """Fetch the shard to ``path``, overwriting it; raises UserError if the remote does not have it."""
        remote = Remote.from_url(self.source)
        for md5 in self.md5s:
            with suppress(MissingObjectError):
                remote.fetch(md5, path)
                return
        raise UserError(
            f"{self.place} is not on {self.source}: run `darkroom ingest` where the data set is whole, which pushes it"
        )


class RemoteShards:
    """``diffusion.data.ingest.staging.RemoteDataset`` of the data set in ``folder``, on the DVC remote ``source``."""

    def __init__(self, folder: Path, source: str) -> None:
        self.folder, self.source, self._lock = folder, source, Lock()

    def fetch(self, entry: FileEntry, path: Path) -> None:
        """Write a shard to ``path``, overwriting it; raises UserError if it is neither here nor on the remote."""
        if (local := self.folder / entry.name).is_file():
            shutil.copyfile(local, path)
        else:
            self.only(entry).fetch(entry, path)

    def only(self, entry: FileEntry) -> RemoteShard:
        """Return a store of this shard that can be sent to any machine."""
        with self._lock:
            md5s = list(self._places.get(entry.name, ()))
            if (path := self.folder / entry.name).is_file() and self._stored.isdisjoint(md5s):
                # Rewritten here and not recorded yet, or recorded by a process that was killed before it pushed.
                md5s = [self.chunks.upload(path).md5 or ""]
                self._stored.update(md5s)
            if not md5s:
                md5s = [listing[entry.name] for listing in self._listings if entry.name in listing]
        return RemoteShard(self.source, tuple(md5s), f"shard {entry.name} of data set {self.folder.name}")

    @property
    def chunks(self) -> StagedChunks:
        """Return where workers leave their chunks."""
        return StagedChunks(Location(Location.parse(self.source).bucket) / STAGING / self.folder.name, self.source)

    def keep(self, digests: dict[str, Digests]) -> None:
        """Remember the MD5s of published shards until DVC has recorded the data set."""
        md5s = {name: each.md5 or "" for name, each in digests.items()}
        write_published(self.folder, read_published(self.folder) | md5s)
        with self._lock:
            self.__dict__.pop("_places", None)

    @cached_property
    def _places(self) -> dict[str, list[str]]:
        """MD5s that this machine knows, by name: of all recorded versions, and of a version that is not recorded."""
        cache = Cache.from_working_folder()
        places = {name: list(md5s) for name, md5s in cache.places.items()} if cache else {}
        return places | {name: [md5] for name, md5 in read_published(self.folder).items()}

    @cached_property
    def _stored(self) -> set[str]:
        """MD5s of all files on the remote."""
        return Remote.from_url(self.source).names()

    @cached_property
    def _listings(self) -> list[Listing]:
        digest, record = read_manifest(self.folder).digest, data_version(self.folder)
        files = StoredFiles(self.folder.name, self.source, record.digest if record else None)
        if listings := list(files.listings(digest).values()):
            return listings
        raise UserError(
            f"version {digest[:12]} of data set {self.folder.name} was never pushed to {self.source}, or is not there "
            "any more: run `darkroom ingest`, or check out another one with `darkroom data checkout`"
        )
