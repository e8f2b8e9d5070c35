"""Garbage collection of old sampling batches and of unfinished multipart uploads.

A batch is first marked under ``deleted/``, and its objects are deleted when the grace period is over. The mark stays
for ``MARK_DAYS``: sampling checks it at its beginning and end, and uses a prefix without one. So even a gc or a request
that was suspended for long never deletes a batch that was sampled later.
"""

import re
from dataclasses import dataclass
from datetime import datetime, timedelta

from diffusion.common.errors import UserError
from flows.config import RetentionConfig
from flows.retention.policy import Fate, Item, Sweep, age, older
from flows.sampling.sampling_batch import DELETED, LARGEST_BATCH, RESUMED, USUAL, SamplingBatch, parse_batch
from flows.storage.multipart import abort_upload, uploads
from flows.storage.s3 import Location, Store

BATCH = re.compile(rf"({USUAL.pattern})/(.+)")
"""Object of a batch at its default place."""
RESUMPTION = re.compile(rf"{RESUMED}/({USUAL.pattern})/[^/]+")
"""Mark of a job that resumes an unfinished batch."""
MARK_DAYS = timedelta(days=30)
"""How long a mark outlives the deleted batch: longer than any suspended request or process."""
FIRST, LAST = ("_SUCCESS", "manifest.parquet"), ("requests.parquet", "batch.json")
"""Objects deleted first and last, so that after a kill the rest is no finished batch and still names its model."""


@dataclass
class StoredBatch:
    """Summary of a stored batch, without its keys, which may be millions."""

    place: Location
    newest: datetime
    """Time of its newest object or resumption."""
    bytes: int = 0
    described: bool = False
    """Whether ``batch.json`` exists."""
    finished: bool = False
    """Whether ``_SUCCESS`` exists."""
    deleted: datetime | None = None
    """Time of its deletion mark; None without one."""


def in_order(place: Location, keys: list[str]) -> list[list[str]]:
    """Group the keys of the batch at ``place`` in the order in which they may be deleted."""

    def stage(key: str) -> int:
        name = key.removeprefix(place.key(""))
        if name in FIRST:
            return FIRST.index(name)
        if name in LAST:
            return 4 + LAST.index(name)
        return 2 if name.startswith("manifest/") else 3

    return [[key for key in keys if stage(key) == number] for number in range(6)]


class SamplingBatches:
    """Batches in ``bucket`` at their default place; batches elsewhere are not collected."""

    def __init__(self, store: Store, bucket: str, policy: RetentionConfig, now: datetime) -> None:
        self.store = store
        self.bucket = bucket
        self.policy = policy
        self.now = now
        self.resumptions = list(store.list_objects(bucket, f"{RESUMED}/"))
        self.marks = {each.key: each.written for each in store.list_objects(bucket, f"{DELETED}/")}
        self.found = self._batches()
        self.fates = [self._fate(batch) for batch in self.found]

    def remaining(self) -> tuple[list[SamplingBatch], dict[tuple[str, int], str]]:
        """Requests of the batches that stay; and for unreadable ones, model and version with the reason."""
        found, unread = list[SamplingBatch](), dict[tuple[str, int], str]()
        for batch, (fate, _) in zip(self.found, self.fates, strict=True):
            if fate == "stays" and batch.described:
                try:
                    data = self.store.get(self.bucket, batch.place.key("batch.json"), LARGEST_BATCH)
                    found.append(parse_batch(data, f"{batch.place}/batch.json"))
                except UserError as error:
                    _, model, version, _ = batch.place.prefix.split("/")
                    unread[model, int(version)] = str(error)
        return found, unread

    def sweep(self) -> Sweep:
        """Sweep of batches and uploads."""
        begun = [
            (each["Key"], each["UploadId"], *self._fate_of_upload(each["Initiated"]))
            for each in uploads(self.store, Location(self.bucket))
        ]
        items = [
            Item(kind="sampling batches", name=str(batch.place), bytes=batch.bytes, fate=fate, why=why)
            for batch, (fate, why) in zip(self.found, self.fates, strict=True)
        ] + [
            Item(kind="unfinished uploads", name=f"s3://{self.bucket}/{key}", bytes=None, fate=fate, why=why)
            for key, _, fate, why in begun
        ]

        def act() -> None:
            for batch, (fate, _) in zip(self.found, self.fates, strict=True):
                if fate == "set aside":
                    self._set_aside(batch)
                if fate == "goes" or (fate == "set aside" and not self.policy.grace):
                    self._delete(batch)
            self.store.delete_many(self.bucket, self._spent())
            for key, upload, fate, _ in begun:
                if fate == "goes":
                    abort_upload(self.store, self.bucket, key, upload)

        return Sweep(items, act)

    def _fate(self, batch: StoredBatch) -> tuple[Fate, str]:
        policy = self.policy
        if batch.deleted is not None:
            over = self.now - batch.deleted >= policy.grace
            return "goes" if over else "set aside", f"since {batch.deleted:%Y-%m-%d %H:%M} UTC"
        if older(batch.newest, policy.batch_days, self.now):
            return "set aside", f"{age(batch.newest, self.now)}, retention.batch_days is {policy.batch_days:g}"
        if batch.finished:
            return "stays", "finished" if policy.batch_days is None else f"within {policy.batch_days:g} days"
        if older(batch.newest, policy.unfinished_days, self.now):
            return "set aside", f"unfinished, and nothing came for {age(batch.newest, self.now).removesuffix(' old')}"
        return "stays", f"unfinished, within {policy.unfinished_days:g} days"

    def _fate_of_upload(self, begun: datetime) -> tuple[Fate, str]:
        days = self.policy.unfinished_days
        if older(begun, days, self.now):
            return "goes", f"{age(begun, self.now)}, without an end"
        return "stays", f"begun within {days:g} days"

    def _set_aside(self, batch: StoredBatch) -> None:
        """Mark the batch as deleted unless a job has resumed it since it was listed."""
        prefixes = (batch.place.key(""), f"{RESUMED}/{batch.place.prefix}/")
        written = (each.written for prefix in prefixes for each in self.store.list_objects(self.bucket, prefix))
        if batch.deleted is None and not any(moment > batch.newest for moment in written):
            self.store.put_once(self.bucket, f"{DELETED}/{batch.place.prefix}", b"")

    def _delete(self, batch: StoredBatch) -> None:
        """Delete all current objects of the batch if it is marked."""
        if not self.store.exists(self.bucket, f"{DELETED}/{batch.place.prefix}"):
            return
        # Twice, for objects of a job that had not seen the mark; the job finds the mark before it ends.
        for _ in range(2):
            for stage in in_order(batch.place, list(self.store.list_keys(self.bucket, batch.place.key("")))):
                self.store.delete_many(self.bucket, stage)

    def _spent(self) -> list[str]:
        """Keys of expired marks and resumptions."""
        there = {f"{DELETED}/{batch.place.prefix}" for batch in self.found}
        marks = [key for key, since in self.marks.items() if key not in there and self.now - since >= MARK_DAYS]
        days = self.policy.unfinished_days
        return marks + [each.key for each in self.resumptions if older(each.written, days, self.now)]

    def _batches(self) -> list[StoredBatch]:
        found: dict[str, StoredBatch] = {}
        for each in self.store.list_objects(self.bucket, "samples/"):
            if named := BATCH.fullmatch(each.key):
                batch = found.setdefault(named[1], StoredBatch(Location(self.bucket, named[1]), each.written))
                batch.bytes += each.size
                batch.newest = max(batch.newest, each.written)
                batch.described |= named[2] == "batch.json"
                batch.finished |= named[2] == "_SUCCESS"
        for each in self.resumptions:
            if (named := RESUMPTION.fullmatch(each.key)) and named[1] in found:
                found[named[1]].newest = max(found[named[1]].newest, each.written)
        for prefix, batch in found.items():
            batch.deleted = self.marks.get(f"{DELETED}/{prefix}")
        return list(found.values())
