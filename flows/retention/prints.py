"""Old batches of prints, and uploads in parts that were never finished."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime

from flows.prints import Batch
from flows.retention.config import RetentionConfig
from flows.retention.items import Fate, Item, Sweep, age, older
from flows.s3 import Listed, Location, Store

BATCH = re.compile(r"(prints/[^/]+/\d+/[^/]+)/(.+)")
"""An object of a batch at its usual place."""
FIRST, LAST = ("_SUCCESS", "manifest.parquet"), ("requests.parquet", "batch.json")
"""What is deleted before and after everything else. Parts of the manifest go before pictures: whoever finds a part
takes it that the pictures are there. So what a kill leaves is a batch that was never finished, which sampling again
finishes, and which leads to its model as long as anything of it is there."""


@dataclass(frozen=True)
class Found:
    """A batch as it lies there."""

    place: Location
    keys: list[str]
    bytes: int
    newest: datetime
    """When its newest object was written."""

    @property
    def finished(self) -> bool:
        """Whether all of it is there."""
        return self.place.key("_SUCCESS") in self.keys

    def in_order(self) -> list[list[str]]:
        """Its keys in the order in which they may go."""

        def stage(key: str) -> int:
            name = key.removeprefix(f"{self.place.prefix}/")
            if name in FIRST:
                return FIRST.index(name)
            if name in LAST:
                return 4 + LAST.index(name)
            return 2 if name.startswith("manifest/") else 3

        return [[key for key in self.keys if stage(key) == number] for number in range(6)]


class Prints:
    """The batches in ``bucket`` at their usual place; what was printed elsewhere is its owner's business."""

    def __init__(self, store: Store, bucket: str, policy: RetentionConfig, now: datetime) -> None:
        self.store = store
        self.bucket = bucket
        self.policy = policy
        self.now = now
        self.found = list(self._batches("prints/"))
        self.fates = [self._fate(batch) for batch in self.found]

    def kept(self) -> Iterator[Batch]:
        """What was asked for in those that stay."""
        for batch, (fate, _) in zip(self.found, self.fates, strict=True):
            about = batch.place.key("batch.json")
            if fate == "stays" and about in batch.keys:
                yield Batch.model_validate_json(self.store.get(self.bucket, about))

    def sweep(self) -> Sweep:
        """Batches and uploads."""
        uploads = [(key, upload, *self._fate_of_upload(begun)) for key, upload, begun in self._uploads()]
        items = [
            Item(kind="batches of prints", name=str(batch.place), bytes=batch.bytes, fate=fate, why=why)
            for batch, (fate, why) in zip(self.found, self.fates, strict=True)
        ] + [
            Item(kind="unfinished uploads", name=f"s3://{self.bucket}/{key}", bytes=None, fate=fate, why=why)
            for key, _, fate, why in uploads
        ]

        def act() -> None:
            for batch, (fate, _) in zip(self.found, self.fates, strict=True):
                if fate == "goes":
                    self._delete(batch)
            for key, upload, fate, _ in uploads:
                if fate == "goes":
                    self.store.client.abort_multipart_upload(Bucket=self.bucket, Key=key, UploadId=upload)

        return Sweep(items, act)

    def _fate(self, batch: Found) -> tuple[Fate, str]:
        policy = self.policy
        if older(batch.newest, policy.prints_days, self.now):
            return "goes", f"{age(batch.newest, self.now)}, retention.prints_days is {policy.prints_days:g}"
        if batch.finished:
            return "stays", "finished" if policy.prints_days is None else f"within {policy.prints_days:g} days"
        if older(batch.newest, policy.unfinished_days, self.now):
            return "goes", f"unfinished, and nothing came for {age(batch.newest, self.now).removesuffix(' old')}"
        return "stays", f"unfinished, within {policy.unfinished_days:g} days"

    def _fate_of_upload(self, begun: datetime) -> tuple[Fate, str]:
        days = self.policy.unfinished_days
        if older(begun, days, self.now):
            return "goes", f"{age(begun, self.now)}, without an end"
        return "stays", f"begun within {days:g} days"

    def _delete(self, batch: Found) -> None:
        now = next(self._batches(f"{batch.place.prefix}/"), None)
        # Somebody who finishes it after all adds to it.
        if now is not None and now.newest <= batch.newest:
            for keys in now.in_order():
                self.store.delete_many(self.bucket, keys)

    def _batches(self, prefix: str) -> Iterator[Found]:
        objects: dict[str, list[Listed]] = {}
        for each in self.store.list_objects(self.bucket, prefix):
            if named := BATCH.fullmatch(each.key):
                objects.setdefault(named[1], []).append(each)
        for folder, listed in objects.items():
            newest = max(each.written for each in listed)
            size = sum(each.size for each in listed)
            yield Found(Location(self.bucket, folder), [each.key for each in listed], size, newest)

    def _uploads(self) -> Iterator[tuple[str, str, datetime]]:
        """Key, identifier and beginning of every upload in parts that has no end."""
        for page in self.store.client.get_paginator("list_multipart_uploads").paginate(Bucket=self.bucket):
            for each in page.get("Uploads", ()):
                yield each["Key"], each["UploadId"], each["Initiated"]
