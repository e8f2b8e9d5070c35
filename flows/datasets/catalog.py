"""The catalogue on S3: of every version of a data set its manifest and its DVC pointer, by the manifest's digest.

``s3://BUCKET/datasets/NAME/<digest>/manifest.json`` and ``pointer.dvc`` beside it are written once, as are the page on
the version, ``report.html``, and ``announced``, when others were told of it; its files lie on DVC's remote. What was
taken down is told under ``datasets/NAME/removals/``.

``datasets/NAME/heads/00000001.json`` and so on (``flows.storage.numbered_objects``) say which version is the newest,
for all machines that add to the data set. A version is put into the catalogue first and becomes the head then. So a
process that is killed in between leaves nothing that another machine would wait for, and the same command again goes
on.
"""

import logging
import re
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path, PurePosixPath
from typing import Literal
from uuid import uuid4

import yaml
from pydantic import Field, TypeAdapter, ValidationError

from diffusion.common.config import Config
from diffusion.common.errors import Held, UserError
from diffusion.common.files import canonical_json, sha256_bytes
from diffusion.data.manifest import Manifest, Sha256, manifest_bytes, parse_manifest, work_folder
from diffusion.data.versions.takedown_records import Removal, removals, still_held, write_removal
from flows.storage.numbered_objects import NumberedObjects, first_free, object_name
from flows.storage.s3 import Location, Store
from flows.storage.s3_errors import Missing
from flows.storage.tags import DvcDigest

logger = logging.getLogger(__name__)

RETIRED = "retired"
"""Where manifests of versions wait that are out of the catalogue: see ``flows.retention.dataset_items``."""
PUSHING = "pushing"
"""Where those who push to the remote say so."""
VERSION, RETIRED_VERSION = re.compile(r"([0-9a-f]{64})/manifest\.json"), re.compile(r"([0-9a-f]{64})\.json")
POINTER = TypeAdapter(DvcDigest)
LARGEST_MANIFEST = 2**30
"""Bytes that a manifest may have: a million parts."""


@dataclass(frozen=True)
class CatalogListing:
    """Versions whose manifests can be read, and what became of the others: none stands in the way of another."""

    versions: dict[str, Manifest]
    """By digest."""
    damaged: dict[str, str]
    """By the digest in its name, where a manifest lies that cannot be read, and how to mend that."""

    def log_damaged(self) -> dict[str, Manifest]:
        """The versions, once the log says what cannot be read."""
        for words in self.damaged.values():
            logger.warning("%s", words)
        return self.versions


@dataclass(frozen=True)
class Catalogue:
    """All versions of a data set that were ever recorded."""

    place: Location
    store: Store

    @classmethod
    def of(cls, name: str, source: str, store: Store | None = None) -> "Catalogue":
        """That of data set ``name``, in the bucket of the DVC remote with the URL ``source``."""
        return cls(Location(Location.parse(source).bucket) / "datasets" / name, store or Store())

    @property
    def name(self) -> str:
        """The data set's."""
        return self.place.prefix.rpartition("/")[2]

    def publish(self, manifest: Manifest, dvc_digest: str) -> str:
        """Put a version into the catalogue, unless it is there; returns where it lies."""
        place = self.place / manifest.digest
        pointer = {"outs": [{"md5": dvc_digest, "hash": "md5", "path": manifest.name}]}
        try:
            self._put(f"{manifest.digest}/pointer.dvc", yaml.safe_dump(pointer, sort_keys=False).encode())
        except Held:
            # Something foreign lay in the folder, then or now. The pointer that is there leads to the version as well.
            self.pointer(manifest.digest)
        self._put(f"{manifest.digest}/manifest.json", manifest_bytes(manifest))
        return str(place)

    def publish_page(self, digest: str, page: bytes) -> str:
        """Put the HTML page on a version beside it, unless one is there; returns where it lies."""
        name = f"{digest}/report.html"
        # One that was drawn by other code shows the same version.
        with suppress(Held):
            self._put(name, page, "text/html; charset=utf-8")
        return str(self.place / name)

    def delete_pages(self, digests: Iterable[str]) -> None:
        """Delete the pages on versions; those that are not there are as good as deleted."""
        self.store.delete_many(self.place.bucket, (self.place.key(f"{digest}/report.html") for digest in digests))

    def versions(self) -> dict[str, Manifest]:
        """All versions by digest; the log names those whose manifests are damaged."""
        return self.read().log_damaged()

    def read(self) -> CatalogListing:
        """All versions, those that can be read and those that cannot."""
        return self._readable(self.place, VERSION)

    def version(self, digest: str) -> Manifest | None:
        """The version of this digest; None if it is not in the catalogue. Raises UserError if it is damaged."""
        key = self.place.key(f"{digest}/manifest.json")
        try:
            data = self.store.get(self.place.bucket, key, LARGEST_MANIFEST)
        except Missing:
            return None
        return self._parsed(data, digest, f"s3://{self.place.bucket}/{key}")

    def published(self) -> dict[str, datetime]:
        """When each version was put here, by digest, at the price of a listing."""
        prefix = self.place.key("")
        objects = self.store.list_objects(self.place.bucket, prefix)
        named = ((VERSION.fullmatch(found.key.removeprefix(prefix)), found.written) for found in objects)
        return {match[1]: written for match, written in named if match}

    def announced(self, digest: str) -> bool:
        """Whether it was told that this version is there."""
        return self.store.exists(self.place.bucket, self.place.key(f"{digest}/announced"))

    def mark_announced(self, digest: str) -> None:
        """Keep in mind that it was told that this version is there."""
        self._put(f"{digest}/announced", b"")

    def pointer(self, digest: str) -> str | None:
        """DVC's digest of a version; None if it is not in the catalogue. Raises UserError if it is damaged."""
        key = self.place.key(f"{digest}/pointer.dvc")
        try:
            data = self.store.get(self.place.bucket, key)
        except Missing:
            return None
        try:
            return POINTER.validate_python(yaml.safe_load(data)["outs"][0]["md5"])
        except (yaml.YAMLError, LookupError, TypeError, ValueError) as error:
            raise UserError(
                f"s3://{self.place.bucket}/{key} is no DVC pointer: delete it, and ingest the data set again"
            ) from error

    def publish_removal(self, removal: Removal) -> None:
        """Let other machines know what was taken down."""
        removal = removal.model_copy(update={"already": False})
        # The same images may have been taken down before, for another reason or from another version.
        with suppress(Held):
            self._put(f"removals/{removal.name}.json", canonical_json(removal.model_dump(mode="json")).encode())

    def fetch_removals(self, folder: Path) -> None:
        """Let this machine, which has the data set in ``folder``, know of everything that was taken down from it."""
        work = work_folder(folder)
        known = {removal.name for removal in removals(work)}
        for key in self.store.list_keys(self.place.bucket, self.place.key("removals/")):
            if PurePosixPath(key).stem not in known:
                write_removal(work, self._removal(key))

    def held_removals(self, folder: Path) -> list[Removal]:
        """The takedown records, of whatever machine, of images that the current version in ``folder`` still holds."""
        self.fetch_removals(folder)
        return still_held(folder, removals(work_folder(folder))) if (folder / "manifest.json").is_file() else []

    def removals(self) -> Iterator[Removal]:
        """Everything that was taken down from the data set."""
        for key in self.store.list_keys(self.place.bucket, self.place.key("removals/")):
            yield self._removal(key)

    def retired(self) -> dict[str, Manifest]:
        """Versions that ``darkroom gc`` took out of the catalogue, and whose files are on the remote yet, by digest."""
        return self.read_retired().log_damaged()

    def read_retired(self) -> CatalogListing:
        """The same, those that can be read and those that cannot."""
        return self._readable(Location(self.place.bucket, f"{RETIRED}/{self.name}"), RETIRED_VERSION)

    def withdraw(self, digest: str) -> None:
        """Take a version out of the catalogue; its files stay on the remote, and nothing leads to them any more."""
        # Without its manifest it is no version, whatever lies beside.
        self.store.delete_many(self.place.bucket, [self.place.key(f"{digest}/manifest.json")])
        beside = list(self.store.list_keys(self.place.bucket, self.place.key(f"{digest}/")))
        self.store.delete_many(self.place.bucket, beside)

    def written(self, digest: str) -> datetime | None:
        """When a version was put into the catalogue; None if it never was."""
        found = self.store.stat(self.place.bucket, self.place.key(f"{digest}/manifest.json"))
        return found and found.written

    def _readable(self, place: Location, pattern: re.Pattern[str]) -> CatalogListing:
        """The manifests under ``place`` whose names, by ``pattern``, hold their digests."""
        found, prefix = CatalogListing({}, {}), place.key("")
        for key in self.store.list_keys(place.bucket, prefix):
            if (named := pattern.fullmatch(key.removeprefix(prefix))) is None:
                continue
            where = f"s3://{place.bucket}/{key}"
            try:
                data = self.store.get(place.bucket, key, LARGEST_MANIFEST)
                found.versions[named[1]] = self._parsed(data, named[1], where)
            except Missing:  # gc took it away since it was listed
                continue
            except UserError as error:
                found.damaged[named[1]] = str(error)
        return found

    def _parsed(self, data: bytes, digest: str, where: str) -> Manifest:
        if sha256_bytes(data) != digest:
            raise UserError(
                f"{where} is damaged (its SHA-256 differs): delete it; an ingest where the version is current writes "
                "it anew"
            )
        return parse_manifest(data, where)

    def _removal(self, key: str) -> Removal:
        try:
            return Removal.model_validate_json(self.store.get(self.place.bucket, key))
        except ValidationError as error:
            first = error.errors()[0]
            raise UserError(
                f"s3://{self.place.bucket}/{key} is no removal that this Darkroom understands "
                f"({'.'.join(map(str, first['loc']))}: {first['msg']}): update, or if it is damaged delete it and give "
                "that takedown again"
            ) from error

    def _put(self, name: str, data: bytes, content_type: str = "application/octet-stream") -> None:
        self.store.put_once(self.place.bucket, self.place.key(name), data, content_type=content_type)


@contextmanager
def pushing(name: str, source: str, store: Store | None = None) -> Iterator[None]:
    """Inside, files of the data set ``name`` are pushed to ``source`` and its version published.

    DVC passes over what lies there already, so meanwhile ``darkroom gc`` takes nothing away. Whoever is killed inside
    holds it up no longer than ``retention.grace_hours``.
    """
    place, store = Location(Location.parse(source).bucket) / PUSHING, store or Store()
    mark = place.key(f"{name}/{uuid4().hex}")
    store.put_once(place.bucket, mark, b"")
    yield
    store.delete_many(place.bucket, [mark])


class Head(Config):
    """An entry of the chain."""

    format_version: Literal[1] = 1
    number: int = Field(ge=1)
    version: Sha256
    """The newest version from here on."""
    before: Sha256 | None
    """The head before it; None: there was none."""


@dataclass(frozen=True)
class Heads:
    """The chain of one data set."""

    catalogue: Catalogue

    def newest(self) -> str | None:
        """Digest of the version that the next ingest adds to; None if the catalogue has no version.

        A head that somebody deleted from the catalogue counts no more. A catalogue from before there were heads goes by
        the time of writing.
        """
        number = self._count()
        for each in range(number, 0, -1):
            if (head := self._read(each)) is None:
                continue
            if self.catalogue.written(head.version) is not None:
                return head.version
            logger.warning(
                "version %s of data set %s was its newest, and is not in the catalogue any more: the one before it is",
                head.version[:12],
                self.catalogue.name,
            )
        return self._last_written()

    def adopt(self) -> str | None:
        """``newest``, which becomes the first entry where there are versions and no chain yet."""
        newest = self.newest()
        if newest is not None and not self._count():
            return self.advance(newest, ()) or newest
        return newest

    def advance(self, version: str, onto: Collection[str]) -> str | None:
        """Make ``version``, which is in the catalogue, the head instead of one of ``onto``.

        Returns the head that is in the way: somebody was faster. None: ``version`` is the head now.
        """
        self._objects.require_conditional_puts()
        while True:
            number = self._count()
            head = self.newest() if number else None
            if head == version:
                return None
            if head is not None and head not in onto:
                return head
            entry = Head(number=number + 1, version=version, before=head)
            try:
                self._objects.put(entry.number, canonical_json(entry.model_dump(mode="json")).encode())
            except Held:
                if self._count() < entry.number:
                    raise

    @property
    def _objects(self) -> NumberedObjects:
        return NumberedObjects(self.catalogue.place / "heads", self.catalogue.store)

    def _count(self) -> int:
        """How many entries there are, of numbers without a gap."""
        return first_free(self._objects.numbers()) - 1

    def _read(self, number: int) -> Head | None:
        """An entry; None if it is none that this Darkroom understands, which then counts no more than a junk object."""
        try:
            found = Head.model_validate_json(self._objects.get(number) or b"")
        except ValidationError:
            place = self._objects.place / object_name(number)
            logger.warning("%s is no head of a data set, and is passed over", place)
            return None
        return found if found.number == number else None

    def _last_written(self) -> str | None:
        """The version written last, of those that no other one was made from."""
        published = self.catalogue.published()
        if len(published) > 1:
            parents = {each.parent for each in self.catalogue.versions().values()}
            published = {digest: written for digest, written in published.items() if digest not in parents}
        return max(published, key=lambda digest: (published[digest], digest), default=None)
