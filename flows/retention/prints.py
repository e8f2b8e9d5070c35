"""Old batches of prints, and uploads in parts that were never finished."""

import re
from dataclasses import dataclass
from datetime import datetime

from diffusion.errors import UserError
from flows.prints import LARGEST_BATCH, Batch, parse_batch
from flows.retention.config import RetentionConfig
from flows.retention.items import Fate, Item, Sweep, age, older
from flows.s3 import DELETED_AT_ONCE, Location, Store
from flows.s3_multipart import abort_upload, uploads

BATCH = re.compile(r"(prints/[^/]+/[0-9]{1,10}/[^/]+)/(.+)")
"""An object of a batch at its usual place."""
FIRST, LAST = ("_SUCCESS", "manifest.parquet"), ("requests.parquet", "batch.json")
"""What is deleted before and after everything else. Parts of the manifest go before pictures: whoever finds a part
takes it that the pictures are there. So what a kill leaves is a batch that was never finished, which sampling again
finishes, and which leads to its model as long as anything of it is there."""


@dataclass
class Found:
    """A batch as it lies there, without its keys, which may be millions."""

    place: Location
    newest: datetime
    """When its newest object was written."""
    bytes: int = 0
    described: bool = False
    """Whether ``batch.json`` is there."""
    finished: bool = False
    """Whether all of it is there."""


def in_order(place: Location, keys: list[str]) -> list[list[str]]:
    """The keys of the batch at ``place`` in the order in which they may go."""

    def stage(key: str) -> int:
        name = key.removeprefix(place.key(""))
        if name in FIRST:
            return FIRST.index(name)
        if name in LAST:
            return 4 + LAST.index(name)
        return 2 if name.startswith("manifest/") else 3

    return [[key for key in keys if stage(key) == number] for number in range(6)]


class Prints:
    """The batches in ``bucket`` at their usual place; what was printed elsewhere is its owner's business."""

    def __init__(self, store: Store, bucket: str, policy: RetentionConfig, now: datetime) -> None:
        self.store = store
        self.bucket = bucket
        self.policy = policy
        self.now = now
        self.found = self._batches()
        self.fates = [self._fate(batch) for batch in self.found]

    def kept(self) -> tuple[list[Batch], dict[tuple[str, int], str]]:
        """What was asked for in those that stay; and of those that do not say so, model and version with the reason."""
        found, unread = list[Batch](), dict[tuple[str, int], str]()
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
        """Batches and uploads."""
        begun = [
            (each["Key"], each["UploadId"], *self._fate_of_upload(each["Initiated"]))
            for each in uploads(self.store, Location(self.bucket))
        ]
        items = [
            Item(kind="batches of prints", name=str(batch.place), bytes=batch.bytes, fate=fate, why=why)
            for batch, (fate, why) in zip(self.found, self.fates, strict=True)
        ] + [
            Item(kind="unfinished uploads", name=f"s3://{self.bucket}/{key}", bytes=None, fate=fate, why=why)
            for key, _, fate, why in begun
        ]

        def act() -> None:
            for batch, (fate, _) in zip(self.found, self.fates, strict=True):
                if fate == "goes":
                    self._delete(batch)
            for key, upload, fate, _ in begun:
                if fate == "goes":
                    abort_upload(self.store, self.bucket, key, upload)

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
        """Delete it as long as nobody goes on with it.

        Whoever does so writes ``batch.json`` anew before anything that lies there is taken for drawn. That is looked at
        before each request, and a request takes less time than the other needs to draw what is put first.
        """
        listed = list(self.store.list_objects(self.bucket, batch.place.key("")))
        if any(each.written > batch.newest for each in listed):
            return
        for keys in in_order(batch.place, [each.key for each in listed]):
            for first in range(0, len(keys), DELETED_AT_ONCE):
                about = self.store.stat(self.bucket, batch.place.key("batch.json"))
                if about is not None and about.written > batch.newest:
                    return
                self.store.delete_many(self.bucket, keys[first : first + DELETED_AT_ONCE])

    def _batches(self) -> list[Found]:
        found: dict[str, Found] = {}
        for each in self.store.list_objects(self.bucket, "prints/"):
            if named := BATCH.fullmatch(each.key):
                batch = found.setdefault(named[1], Found(Location(self.bucket, named[1]), each.written))
                batch.bytes += each.size
                batch.newest = max(batch.newest, each.written)
                batch.described |= named[2] == "batch.json"
                batch.finished |= named[2] == "_SUCCESS"
        return list(found.values())
