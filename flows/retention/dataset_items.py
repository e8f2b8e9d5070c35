"""Garbage collection of old data set versions: first from the catalog, after the grace period from DVC's remote.

``s3://BUCKET/retired/NAME/<digest>.json`` keeps the manifest of a retired version until its files are deleted, so that
the next gc can finish a killed one. Files are shared: those that another version needs stay.
"""

import logging
import re
from collections.abc import Collection, Mapping
from contextlib import ExitStack, suppress
from datetime import UTC, datetime
from hashlib import md5

from filelock import FileLock

from diffusion.common.config import dataset_folder, plain_name
from diffusion.common.errors import UserError
from diffusion.data.manifest import Manifest, manifest_bytes, read_manifest, work_folder
from flows.config import RetentionConfig
from flows.datasets.catalog import PUBLISHED, PUSHING, RETIRED, Catalog, CatalogListing, Heads
from flows.datasets.dvc import Remote
from flows.datasets.purge import unreferenced_objects
from flows.datasets.remote_shards import STAGING
from flows.retention.sweeps import Action, Sweep, SweepItem, format_age, is_older
from flows.storage.s3 import ListedObject, Location, Store

logger = logging.getLogger(__name__)

STAGED = re.compile(rf"{STAGING}/([^/]+)/[^/]+")
MARK = re.compile(RETIRED + r"/([^/]+)/([0-9a-f]{64})\.json")


class DataSets:
    """Data sets in the catalog of the DVC remote ``source``."""

    def __init__(
        self,
        store: Store,
        source: str,
        contents: Mapping[str, str],
        unclear: str | None,
        policy: RetentionConfig,
        now: datetime,
    ) -> None:
        self.store, self.source, self.bucket = store, source, Location.parse(source).bucket
        self.contents, self.policy, self.now = contents, policy, now
        self.unclear = unclear
        """Reason why references to versions may be unknown; None if all are known."""
        self.written = self._list_times("datasets/", PUBLISHED)
        self.retired = self._list_times(f"{RETIRED}/", MARK)
        self.names = sorted({name for name, _ in (*self.written, *self.retired)})

    def sweep(self) -> Sweep:
        """Sweep of versions in the catalog and of retired ones."""
        listings = {name: self._catalog(name).read() for name in self.names}
        actions = {name: self._actions(name, entries) for name, entries in listings.items()}
        items = []
        for name, entries in actions.items():
            for digest, (action, reason) in entries.items():
                version = listings[name].versions.get(digest)
                size = None if version is None else sum(shard.bytes for shard in version.shards)
                items.append(
                    SweepItem(kind="data versions", name=f"{name} {digest[:12]}", bytes=size, action=action, why=reason)
                )

        staged_items, keys = self._list_staged()
        items += staged_items

        def act() -> None:
            self.store.delete_many(self.bucket, keys)
            for name, entries in actions.items():
                versions = listings[name].versions
                for digest, (action, _) in entries.items():
                    if action == "set aside" and digest in versions:
                        self._retire(versions[digest])
                retained_digests = {digest for digest, (action, _) in entries.items() if action == "keep"}
                retired_versions = self._catalog(name).read(retired=True).versions
                self._bring_back(
                    [
                        retired_versions[digest]
                        for digest in retained_digests
                        if digest in retired_versions.keys() - versions.keys()
                    ]
                )
                self._purge(name, retained_digests)

        return Sweep(items, act)

    def _list_staged(self) -> tuple[list[SweepItem], list[str]]:
        """Chunks of unfinished ingests by data set, and the keys of those to which nothing was added for long."""
        items, keys, days = list[SweepItem](), list[str](), self.policy.unfinished_days
        objects: dict[str, list[ListedObject]] = {}
        for entry in self.store.list_objects(self.bucket, f"{STAGING}/"):
            if match := STAGED.fullmatch(entry.key):
                objects.setdefault(match[1], []).append(entry)
        for name, entries in objects.items():
            newest = max(entry.written for entry in entries)
            action: tuple[Action, str] = ("keep", f"unfinished, within {days:g} days")
            if is_older(newest, days, self.now):
                action = "delete", f"{format_age(newest, self.now)}, without an end"
                # Tables first, as they say that the shards are there.
                keys += sorted((entry.key for entry in entries), key=lambda key: not key.endswith(".parquet"))
            size = sum(entry.size for entry in entries)
            items.append(SweepItem(kind="unfinished ingests", name=name, bytes=size, action=action[0], why=action[1]))
        return items, keys

    def _actions(self, name: str, listing: CatalogListing) -> dict[str, tuple[Action, str]]:
        versions, policy, retired_listing = listing.versions, self.policy, self._catalog(name).read(retired=True)
        (current, doubt), heads = self._read_current(name), Heads(self._catalog(name))
        doubt, head = self.unclear or doubt, heads.newest()
        # Heads come in their order, which a restored bucket keeps, before versions that never were one, by the time of
        # writing. It has a resolution of a second: of two versions of one second the current one is the newer.
        by_age = sorted(versions, key=lambda digest: (self.written[name, digest], digest == current), reverse=True)
        order = dict.fromkeys([*(digest for digest in heads.latest() if digest in versions), *by_age])
        recent_digests = list(order)[: policy.data_versions]
        actions: dict[str, tuple[Action, str]] = {}
        for digest, version in versions.items():
            time = self.written[name, digest]
            if reason := self.contents.get(version.content_digest):
                actions[digest] = "keep", reason
            elif digest == current:
                actions[digest] = "keep", f"current in {dataset_folder(name)}"
            elif digest == head:
                actions[digest] = "keep", "the next ingest goes on from it"
            elif digest in recent_digests:
                actions[digest] = "keep", f"among the newest {policy.data_versions}"
            elif not is_older(time, policy.data_days, self.now):
                actions[digest] = "keep", f"recorded within {policy.data_days:g} days"
            elif doubt is not None:
                actions[digest] = "keep", doubt
            else:
                actions[digest] = "set aside", f"{format_age(time, self.now)}, and no run that stays learned from it"
        # An unreadable manifest may need files that would be deleted otherwise.
        problems = listing.damaged | retired_listing.damaged
        doubt = doubt or next(iter(problems.values()), None)
        for digest in sorted(retired_listing.versions.keys() - versions.keys()):
            actions[digest] = self._decide_set_aside(retired_listing.versions[digest], digest == current, doubt)
        return actions | {digest: ("keep", problem) for digest, problem in problems.items()}

    def _read_current(self, name: str) -> tuple[str | None, str | None]:
        """Digest of the version in the data set's folder, or None; and the reason if it cannot be read."""
        folder = dataset_folder(name)
        try:
            return read_manifest(folder).digest if (folder / "manifest.json").is_file() else None, None
        except UserError as error:
            return None, str(error)

    def _decide_set_aside(self, version: Manifest, current: bool, doubt: str | None) -> tuple[Action, str]:
        # Another gc may have retired it since they were listed.
        mark_time = self.retired.get((version.name, version.digest), self.now)
        # A machine that still had its files may have trained on it meanwhile.
        if reason := self.contents.get(version.content_digest):
            return "keep", f"{reason}: brought back"
        if current:
            return "keep", f"current in {dataset_folder(version.name)}: brought back"
        if (is_over := self.now - mark_time >= self.policy.grace) and doubt is not None:
            return "set aside", doubt
        return "delete" if is_over else "set aside", f"since {mark_time:%Y-%m-%d %H:%M} UTC"

    def _retire(self, version: Manifest) -> None:
        key = f"{RETIRED}/{version.name}/{version.digest}.json"
        # The time of an older mark would end the grace period at once.
        self.store.delete_many(self.bucket, [key])
        self.store.put_once(self.bucket, key, manifest_bytes(version), content_type="application/json")
        self._catalog(version.name).withdraw(version.digest)

    def _bring_back(self, versions: Collection[Manifest]) -> None:
        """Put versions into the catalog again; versions that were never pushed wait until they are."""
        if not versions:
            return
        try:
            pointers = {
                listing.get("manifest.json", ""): name for name, listing in Remote.from_url(self.source).listings()
            }
        except UserError as error:
            logger.warning("versions set aside that are needed again wait: %s", error)
            return
        for version in versions:
            if pointer := pointers.get(md5(manifest_bytes(version), usedforsecurity=False).hexdigest()):
                self._catalog(version.name).publish(version, pointer)
                self.store.delete_many(self.bucket, [f"{RETIRED}/{version.name}/{version.digest}.json"])

    def _purge(self, name: str, retained_digests: Collection[str]) -> None:
        """Delete files of versions outside ``retained_digests`` whose grace period is over, unless a process pushes."""
        folder = dataset_folder(name)
        with ExitStack() as stack:
            if folder.is_dir():
                stack.enter_context(FileLock(work_folder(folder) / "lock"))
            if self._has_recent_push() or self.unclear is not None or self._read_current(name)[1] is not None:
                return
            retired_listing, catalog_listing = self._catalog(name).read(retired=True), self._catalog(name).read()
            if retired_listing.damaged or catalog_listing.damaged:
                return
            retired_versions, versions = retired_listing.versions, catalog_listing.versions
            marks = {digest: time for (_, digest), time in self._list_times(f"{RETIRED}/{name}/", MARK).items()}
            grace = self.policy.grace
            targets = {
                digest: retired_versions[digest]
                for digest, time in marks.items()
                if digest in retired_versions and digest not in versions and digest not in retained_digests
                # A mark that was written since the items were listed begins its own grace period.
                if not grace or (self.retired.get((name, digest)) == time and self.now - time >= grace)
            }
            for digest in targets:
                # The gc that retired it may have been killed halfway.
                self._catalog(name).withdraw(digest)
            if targets:
                try:
                    objects = unreferenced_objects(targets.values(), versions.values(), self.source)
                except UserError as error:
                    logger.warning("no file of data set %s is deleted: %s", name, error)
                    return
                if not objects.delete(still=lambda: not self._has_recent_push()):
                    return
            mark_digests = [digest for digest in marks if digest in targets or digest in versions]
            self.store.delete_many(self.bucket, (f"{RETIRED}/{name}/{digest}.json" for digest in mark_digests))

    def _has_recent_push(self) -> bool:
        """Whether a process announced a push within the grace period: DVC skips files that it finds on the remote."""
        objects = self.store.list_objects(self.bucket, f"{PUSHING}/")
        return any(datetime.now(UTC) - entry.written < self.policy.grace for entry in objects)

    def _list_times(self, prefix: str, pattern: re.Pattern[str]) -> dict[tuple[str, str], datetime]:
        times = {}
        for entry in self.store.list_objects(self.bucket, prefix):
            if match := pattern.fullmatch(entry.key):
                with suppress(ValueError):  # objects under other names are not versions
                    times[plain_name(match[1]), match[2]] = entry.written
        return times

    def _catalog(self, name: str) -> Catalog:
        return Catalog.of(name, self.source, self.store)
