"""The ledger on S3: champions of a registered model, with the decision and the evidence for each.

``s3://BUCKET/ledger/NAME/00000001.json`` and so on are written once, each with the SHA-256 of the one before it. MLflow
has no compare-and-swap; creating entry N + 1 with If-None-Match is a single write that only one of several writers
succeeds with. That is the commit. The aliases follow it (``flows.registry.aliases``).

MLflow keeps a record of the entries (``flows.registry.aliases``). All entries up to the newest recorded one must exist,
byte for byte: the chain is followed back from it. Newer objects that continue the chain are entries whose writer may
have been stopped before it updated MLflow. All other objects are foreign: they are reported and skipped, and the next
entry takes the next free number.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import MappingProxyType

from diffusion.common.errors import Held, UserError
from diffusion.common.files import sha256_bytes
from flows.environment import settings
from flows.registry.ledger_entries import History, LedgerEntry, Titles, titles_after
from flows.storage.numbered_objects import NumberedObjects, object_name
from flows.storage.s3 import ListedObject, Location, Store

READERS = 16
"""Entries fetched at the same time."""
LARGEST = 2**16
"""Maximum size of an entry in bytes: larger objects are not entries and are not fetched."""

Known = Mapping[int, str]
"""SHA-256 by number of the entries that MLflow has recorded."""
NOTHING: Known = MappingProxyType({})

NEWEST = "darkroom.ledger.newest"
"""Tag of a registered model in MLflow: number and SHA-256 of the newest entry, and where its ledger lies."""
NEWEST_TEXT = re.compile(r"([0-9]{8}) sha256 ([0-9a-f]{64}) in (s3://\S+)")


@dataclass(frozen=True)
class Newest:
    """Newest entry that MLflow has recorded."""

    number: int
    sha256: str
    place: str
    """Place of its ledger, s3://BUCKET/ledger/NAME."""

    @classmethod
    def of(cls, model: str, tags: Mapping[str, str]) -> "Newest | None":
        """Parse the ``tags`` of a registered model; None without such a tag; raises UserError if it is malformed."""
        if (text := tags.get(NEWEST)) is None:
            return None
        if (found := NEWEST_TEXT.fullmatch(text)) is None or not int(found[1]):
            raise UserError(f"the tag {NEWEST} of {model} in MLflow was altered: see docs/runbook/ledger-broken.md")
        return cls(int(found[1]), found[2], found[3])

    def __str__(self) -> str:
        return f"{self.number:08d} sha256 {self.sha256} in {self.place}"


@dataclass(frozen=True)
class Ledger(NumberedObjects):
    """Ledger of one registered model."""

    @property
    def model(self) -> str:
        """Name of the registered model."""
        return self.place.prefix.rpartition("/")[2]

    @classmethod
    def of(cls, model: str) -> "Ledger":
        """Ledger of ``model`` in the bucket of the environment."""
        return cls(Location(settings().bucket) / "ledger" / model, Store())

    def head(self, known: Known = NOTHING) -> LedgerEntry | None:
        """Newest entry, or None. Takes two requests if MLflow has recorded it and no object has a higher number.

        Raises UserError as ``read`` does, but does not verify older entries if the newest one is recorded.
        """
        listed, newest = self.listed(), max(known, default=0)
        if known and max(map(self.number, listed), default=0) == newest:
            found = self.get(newest)
            if found is not None and sha256_bytes(found) == known[newest]:
                return self._recorded(newest, found)
        return self.read(known, listed).head

    def read(self, known: Known = NOTHING, listed: Sequence[ListedObject] | None = None) -> History:
        """Read and verify all entries; raises UserError that names a recorded entry that is missing or altered.

        Args:
            known: MLflow's record, read before the objects were ``listed``.
            listed: Objects of the ledger; None to list them now.
        """
        listed = self.listed() if listed is None else listed
        objects = self._objects(listed)
        entries = self._verified(objects, known)
        reasons = dict(self._extend(entries, objects, sorted(filter(None, map(self.number, listed)))))
        foreign = {
            each.key.removeprefix(self.place.key("")): reasons.get(number, "is not named like an entry")
            for each in listed
            if not (number := self.number(each)) or number in reasons
        }
        return History(self.model, tuple(entries), foreign, frozenset(reasons))

    def append(
        self,
        decide: Callable[[History], LedgerEntry | None],
        known: Callable[[], Known] = lambda: NOTHING,
    ) -> History:
        """Commit the entry that ``decide`` returns for the history, or nothing if it returns None.

        If another process was faster, ``decide`` is called again with the new history; it raises Held if its decision
        no longer holds. ``known`` reads MLflow's record each time before the ledger is read. Raises UserError, and
        writes nothing, if the ledger differs from that record.
        """
        self.require_conditional_puts()
        while (entry := decide(history := self.read(known()))) is not None:
            if len(entry.data) > LARGEST:
                raise UserError(f"an entry of the ledger has at most {LARGEST} bytes: give a shorter --reason")
            try:
                self.put(entry.number, entry.data)
            except Held:
                if entry.number not in self.numbers():
                    raise
                continue
            # A writer above the next free number may have taken the place of this entry.
            history = self.read(known())
            if entry not in history.entries:
                raise Held(history.faster())
            return history
        return history

    def restore(self, copies: Mapping[int, bytes], known: Known) -> list[int]:
        """Write missing entries from ``copies``, by number; returns their numbers.

        Raises UserError, and writes nothing, unless all recorded entries exist here or among the copies.
        """
        listed = self.listed()
        here = set(map(self.number, listed))
        lost = {number: data for number, data in copies.items() if number not in here}
        entries = self._verified(self._objects(listed) | lost, known)
        missing = [entry for entry in entries if entry.number in lost]
        for entry in missing:
            self.put(entry.number, entry.data)
        return [entry.number for entry in missing]

    def _objects(self, listed: Sequence[ListedObject]) -> dict[int, bytes]:
        """Bytes of the objects that are named like entries, by number."""
        small = sorted({self.number(each) for each in listed if each.size <= LARGEST} - {0})
        with ThreadPoolExecutor(READERS) as pool:
            found = zip(small, pool.map(self.get, small), strict=True)
            return {number: data for number, data in found if data is not None}

    def _verified(self, objects: Mapping[int, bytes], known: Known) -> list[LedgerEntry]:
        """Entries up to the newest recorded one, followed back from it by their parents' digests."""
        if not known:
            return []
        digests = {number: sha256_bytes(data) for number, data in objects.items()}
        numbers = {digest: number for number, digest in digests.items()}
        number, digest = max(known), known[max(known)]
        entries: list[LedgerEntry] = []
        while True:
            name = object_name(number)
            if number not in objects:
                raise self._broken(name, f"is missing (sha256 {digest})")
            if digests[number] != digest:
                raise self._broken(name, f"was altered (it had sha256 {digest})")
            entries.append(entry := self._recorded(number, objects[number]))
            if entry.parent is None:
                break
            below = numbers.get(entry.parent, number)
            if below >= number:
                gone = next((each for each in known if known[each] == entry.parent), max(number - 1, 1))
                raise self._broken(object_name(gone), f"is missing or was altered, and {name} stands on it")
            number, digest = below, entry.parent
        entries.reverse()
        here = {entry.number: entry.digest for entry in entries}
        for number in sorted(known):
            if here.get(number) != known[number]:
                raise self._broken(object_name(number), f"is not what it was (sha256 {known[number]})")
        before, titles = None, Titles()
        for entry in entries:
            after = _follow(entry, before, titles)
            if isinstance(after, str):
                raise self._broken(object_name(entry.number), after)
            before, titles = entry, after
        return entries

    def _extend(
        self, entries: list[LedgerEntry], objects: Mapping[int, bytes], numbers: Sequence[int]
    ) -> Iterator[tuple[int, str]]:
        """Add the objects that continue the chain to ``entries``; yields other numbers with the reason for each."""
        here, titles = {entry.number for entry in entries}, titles_after(entries)
        for number in numbers:
            if number in here:
                continue
            before = entries[-1] if entries else None
            if number not in objects:
                yield number, f"is larger than {LARGEST} bytes, or was deleted just now"
            elif before is not None and number < before.number:
                yield number, "is no entry that another one stands on"
            elif (entry := self._entry(number, objects[number])) is None:
                yield number, "is no entry of this ledger"
            elif isinstance(after := _follow(entry, before, titles), str):
                yield number, after
            else:
                entries.append(entry)
                titles = after

    def _recorded(self, number: int, data: bytes) -> LedgerEntry:
        if (entry := self._entry(number, data)) is None:
            raise self._broken(object_name(number), "is no entry of this ledger")
        return entry

    def _entry(self, number: int, data: bytes) -> LedgerEntry | None:
        """Entry in ``data``; None unless these are its canonical bytes under the right name."""
        try:
            entry = LedgerEntry.model_validate_json(data)
            return entry if (entry.data, entry.number, entry.model) == (data, number, self.model) else None
        except ValueError:
            return None

    def _broken(self, name: str, words: str) -> UserError:
        place = f"s3://{self.place.bucket}/{self.place.key(name)}"
        return UserError(
            f"the ledger of {self.model} is broken: {place} {words}, says MLflow's record of it; "
            "docs/runbook/ledger-broken.md says what to do (`darkroom model history --restore` writes back what is "
            "missing)"
        )


def _follow(entry: LedgerEntry, before: LedgerEntry | None, titles: Titles) -> Titles | str:
    """State after ``entry``, or the reason why it cannot follow ``before`` with the state ``titles``."""
    if entry.parent != (before.digest if before else None):
        return "does not stand on the entry before it"
    try:
        after = titles.after(entry.what, entry.version, entry.challenger)
    except UserError as error:
        return f"cannot be: {error}"
    if (entry.from_version, entry.standing) != (titles.standing.champion, after.standing):
        return "names other versions than those that follow from what it says"
    return after
