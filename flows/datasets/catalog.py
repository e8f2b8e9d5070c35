"""The catalog on S3: manifest and DVC pointer of every data set version, by the manifest's digest.

``s3://BUCKET/datasets/NAME/<digest>/`` holds ``manifest.json`` and ``pointer.dvc``, each written once, and the
version's page ``report.html`` and mark ``announced``; its files lie on DVC's remote. Takedown records lie under
``datasets/NAME/removals/``.

``datasets/NAME/heads/00000001.json`` and so on name the newest version. A version is first put into the catalog and
then becomes the head, so a process that is killed in between blocks no other machine.
"""

import logging
import re
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path, PurePosixPath
from threading import Event, Thread
from typing import Literal
from uuid import uuid4

import yaml
from pydantic import Field, TypeAdapter, ValidationError

from diffusion.common.config import Config
from diffusion.common.errors import ConflictError, DarkroomError, UserError
from diffusion.common.files import canonical_json, sha256_bytes
from diffusion.common.parsing import parse_yaml
from diffusion.data.manifest import Manifest, Sha256, manifest_bytes, parse_manifest, work_folder
from diffusion.data.versions.takedown_records import (
    Removal,
    find_pending_removals,
    parse_removal,
    removals,
    write_removal,
)
from flows.storage.numbered_objects import NumberedObjects, first_free, object_name
from flows.storage.s3 import Location, Store
from flows.storage.s3_errors import MissingObjectError
from flows.storage.tags import DvcDigest

logger = logging.getLogger(__name__)

RETIRED, PUSHING = "retired", "pushing"
"""Prefixes of the manifests of retired versions, and of the marks of processes that push to the remote."""
RENEWAL = 600.0
"""Seconds after which the mark of a push is renewed."""
VERSION, RETIRED_VERSION = re.compile(r"([0-9a-f]{64})/manifest\.json"), re.compile(r"([0-9a-f]{64})\.json")
PUBLISHED = re.compile(r"datasets/([^/]+)/" + VERSION.pattern)
POINTER = TypeAdapter(DvcDigest)
MAX_MANIFEST_BYTES = 2**30  # maximum size of a manifest in bytes: enough for a million parts


@dataclass(frozen=True)
class CatalogListing:
    """Versions in a listing, with errors for those whose manifests cannot be read."""

    versions: dict[str, Manifest]
    damaged: dict[str, str]
    """Errors for unreadable manifests, with the fix, by the digest in the name."""


@dataclass(frozen=True)
class Catalog:
    """Catalog of the versions of one data set."""

    place: Location
    store: Store

    @classmethod
    def of(cls, name: str, source: str, store: Store | None = None) -> "Catalog":
        """Catalog of data set ``name`` in the bucket of the DVC remote with the URL ``source``."""
        return cls(Location(Location.parse(source).bucket) / "datasets" / name, store or Store())

    @classmethod
    def names(cls, source: str, store: Store | None = None) -> list[str]:
        """Names of all data sets in the bucket of the DVC remote with the URL ``source``, sorted."""
        keys = (store or Store()).list_keys(Location.parse(source).bucket, "datasets/")
        return sorted({match[1] for match in map(PUBLISHED.fullmatch, keys) if match})

    @property
    def name(self) -> str:
        """Name of the data set."""
        return self.place.prefix.rpartition("/")[2]

    def publish(self, manifest: Manifest, dvc_digest: str) -> None:
        """Put a version into the catalog if it is not in it."""
        pointer = {"outs": [{"md5": dvc_digest, "hash": "md5", "path": manifest.name}]}
        try:
            self._put(f"{manifest.digest}/pointer.dvc", yaml.safe_dump(pointer, sort_keys=False).encode())
        except ConflictError:
            # A foreign file lay in the folder, then or now. The existing pointer leads to the version as well.
            self.pointer(manifest.digest)
        self._put(f"{manifest.digest}/manifest.json", manifest_bytes(manifest))

    def publish_page(self, digest: str, page: bytes) -> str:
        """Put the HTML page of a version beside it if there is none; returns its place."""
        name = f"{digest}/report.html"
        # A page rendered by other code shows the same version.
        with suppress(ConflictError):
            self._put(name, page, "text/html; charset=utf-8")
        return str(self.place / name)

    def delete_pages(self, digests: Iterable[str]) -> None:
        """Delete the pages of versions, if they exist."""
        self.store.delete_many(self.place.bucket, (self.place.key(f"{digest}/report.html") for digest in digests))

    def versions(self, retired: bool = False) -> dict[str, Manifest]:
        """Readable versions of ``read`` by digest; damaged manifests are logged."""
        listing = self.read(retired)
        for message in listing.damaged.values():
            logger.warning("%s", message)
        return listing.versions

    def read(self, retired: bool = False) -> CatalogListing:
        """List all versions, or those that ``darkroom gc`` retired and whose files are still on the remote."""
        place, pattern = self.place, VERSION
        if retired:
            place, pattern = Location(self.place.bucket, f"{RETIRED}/{self.name}"), RETIRED_VERSION
        listing, prefix = CatalogListing({}, {}), place.key("")
        for key in self.store.list_keys(place.bucket, prefix):
            if (match := pattern.fullmatch(key.removeprefix(prefix))) is None:
                continue
            try:
                data = self.store.get(place.bucket, key, MAX_MANIFEST_BYTES)
                listing.versions[match[1]] = _parse_manifest(data, match[1], f"s3://{place.bucket}/{key}")
            except MissingObjectError:  # deleted by gc since it was listed
                continue
            except UserError as error:
                listing.damaged[match[1]] = str(error)
        return listing

    def version(self, digest: str) -> Manifest | None:
        """Version of this digest; None if it is not in the catalog. Raises UserError if it is damaged."""
        name = f"{digest}/manifest.json"
        data = self._get(name, MAX_MANIFEST_BYTES)
        return None if data is None else _parse_manifest(data, digest, f"{self.place}/{name}")

    def list_publication_times(self) -> dict[str, datetime]:
        """Time of publication of each version, by digest; takes one listing."""
        prefix = self.place.key("")
        objects = self.store.list_objects(self.place.bucket, prefix)
        matches = ((VERSION.fullmatch(entry.key.removeprefix(prefix)), entry.written) for entry in objects)
        return {match[1]: time for match, time in matches if match}

    def is_announced(self, digest: str) -> bool:
        """Whether the event of this version was emitted."""
        return self.store.exists(self.place.bucket, self.place.key(f"{digest}/announced"))

    def mark_announced(self, digest: str) -> None:
        """Record that the event of this version was emitted."""
        self._put(f"{digest}/announced", b"")

    def pointer(self, digest: str) -> str | None:
        """DVC's digest of a version; None if it is not in the catalog. Raises UserError if it is damaged."""
        name = f"{digest}/pointer.dvc"
        if (data := self._get(name)) is None:
            return None
        try:
            return POINTER.validate_python(parse_yaml(data.decode())["outs"][0]["md5"])
        except (LookupError, TypeError, ValueError) as error:
            raise UserError(
                f"{self.place}/{name} is not a DVC pointer: delete it, and ingest the data set again"
            ) from error

    def publish_removal(self, removal: Removal) -> None:
        """Publish a takedown record for other machines."""
        removal = removal.model_copy(update={"already": False})
        # The same images may have been taken down before, for another reason or from another version.
        with suppress(ConflictError):
            self._put(f"removals/{removal.name}.json", canonical_json(removal.model_dump(mode="json")).encode())

    def fetch_removals(self, folder: Path) -> None:
        """Copy all takedown records of the data set in ``folder`` to this machine."""
        work = work_folder(folder)
        for removal in self.removals(names={removal.name for removal in removals(work)}):
            write_removal(work, removal)

    def find_held_removals(self, folder: Path) -> list[Removal]:
        """Takedown records of images that the current version in ``folder`` still holds."""
        self.fetch_removals(folder)
        return (
            find_pending_removals(folder, removals(work_folder(folder))) if (folder / "manifest.json").is_file() else []
        )

    def removals(self, names: Collection[str] = ()) -> Iterator[Removal]:
        """Yield the published takedown records of the data set, except for those called one of ``names``."""
        for key in self.store.list_keys(self.place.bucket, self.place.key("removals/")):
            if PurePosixPath(key).stem in names:
                continue
            yield parse_removal(self.store.get(self.place.bucket, key), f"s3://{self.place.bucket}/{key}")

    def withdraw(self, digest: str) -> None:
        """Remove a version from the catalog; its files stay on the remote."""
        # The manifest goes first: without it there is no version.
        self.store.delete_many(self.place.bucket, [self.place.key(f"{digest}/manifest.json")])
        keys = list(self.store.list_keys(self.place.bucket, self.place.key(f"{digest}/")))
        self.store.delete_many(self.place.bucket, keys)

    def find_publication_time(self, digest: str) -> datetime | None:
        """Time when a version was put into the catalog; None if it is not in it."""
        entry = self.store.stat(self.place.bucket, self.place.key(f"{digest}/manifest.json"))
        return entry and entry.written

    def _get(self, name: str, max_bytes: int | None = None) -> bytes | None:
        try:
            return self.store.get(self.place.bucket, self.place.key(name), max_bytes)
        except MissingObjectError:
            return None

    def _put(self, name: str, data: bytes, content_type: str = "application/octet-stream") -> None:
        self.store.put_once(self.place.bucket, self.place.key(name), data, content_type=content_type)


def _parse_manifest(data: bytes, digest: str, place: str) -> Manifest:
    if sha256_bytes(data) != digest:
        raise UserError(
            f"{place} is damaged (its SHA-256 differs): delete it; an ingest where the version is current writes it "
            "again"
        )
    return parse_manifest(data, place)


@contextmanager
def mark_push(name: str, source: str, store: Store | None = None, renewal: float = RENEWAL) -> Iterator[None]:
    """Context of a push to ``source``; until it ends, or for the grace period if it is killed, gc deletes no file.

    The mark is renewed every ``renewal`` seconds, as a push may take longer than the grace period.
    """
    place, store, ended = Location(Location.parse(source).bucket) / PUSHING, store or Store(), Event()

    def write() -> str:
        store.put_once(place.bucket, key := place.key(f"{name}/{uuid4().hex}"), b"")
        return key

    marks = [write()]

    def renew() -> None:
        while not ended.wait(renewal):
            try:
                marks.append(write())
                store.delete_many(place.bucket, marks[:-1])
                del marks[:-1]
            except DarkroomError as error:  # the push itself goes on as long as it can
                logger.warning("the mark of a push to %s was not renewed: %s", source, error)

    thread = Thread(target=renew, daemon=True)
    thread.start()
    try:
        yield
    except BaseException:
        ended.set()
        thread.join()
        # What ended the push may prevent this as well, and matters more: the mark expires.
        with suppress(DarkroomError):
            store.delete_many(place.bucket, marks)
        raise
    ended.set()
    thread.join()
    store.delete_many(place.bucket, marks)


class Head(Config):
    """Entry in the chain of newest versions."""

    format_version: Literal[1] = 1
    number: int = Field(ge=1)
    version: Sha256
    before: Sha256 | None


@dataclass(frozen=True)
class Heads:
    """Chain of newest versions of one data set."""

    catalog: Catalog

    def newest(self) -> str | None:
        """Digest of the version that the next ingest adds to; None if the catalog has no version.

        Heads that were deleted from the catalog are skipped. Without a head the version written last counts, of those
        that are not another version's parent.
        """
        for version in self.latest():
            if self.catalog.find_publication_time(version) is not None:
                return version
            logger.warning(
                f"version {version[:12]} of data set {self.catalog.name} was its newest, and is not in the "
                "catalog any more: the one before it is"
            )
        publications = self.catalog.list_publication_times()
        if len(publications) > 1:
            parents = {manifest.parent for manifest in self.catalog.versions().values()}
            publications = {digest: time for digest, time in publications.items() if digest not in parents}
        return max(publications, key=lambda digest: (publications[digest], digest), default=None)

    def latest(self) -> Iterator[str]:
        """Yield the digests of all heads, the newest first, whether they are in the catalog or not."""
        for number in range(self._count(), 0, -1):
            if (head := self._read(number)) is not None:
                yield head.version

    def advance(self, version: str, onto: Collection[str]) -> str | None:
        """Make ``version`` the head instead of one of ``onto``; None, or the head that another process published."""
        self._objects.require_conditional_puts()
        while True:
            number = self._count()
            if (head := self.newest() if number else None) == version:
                return None
            if head is not None and head not in onto:
                return head
            entry = Head(number=number + 1, version=version, before=head)
            try:
                self._objects.put(entry.number, canonical_json(entry.model_dump(mode="json")).encode())
            except ConflictError:
                if self._count() < entry.number:
                    raise

    @property
    def _objects(self) -> NumberedObjects:
        return NumberedObjects(self.catalog.place / "heads", self.catalog.store)

    def _count(self) -> int:
        return first_free(self._objects.numbers()) - 1

    def _read(self, number: int) -> Head | None:
        """Read an entry; None if it is malformed, and is ignored like any foreign object."""
        try:
            head = Head.model_validate_json(self._objects.get(number) or b"")
        except ValidationError:
            logger.warning(
                "%s is not a head of a data set, and is passed over", self._objects.place / object_name(number)
            )
            return None
        return head if head.number == number else None
