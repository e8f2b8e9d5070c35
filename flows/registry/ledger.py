"""The ledger on S3: champions of a registered model, with the decision and the evidence for each.

Verdicts that keep the champion are entries as well: they record a candidate that was held or rejected, and why.

``s3://BUCKET/ledger/NAME/00000001.json`` and so on are written once, each with the SHA-256 of the one before it. MLflow
has no compare-and-swap; creating entry N + 1 with If-None-Match is a single write that only one of several writers
succeeds with. That is the commit. The aliases follow it (``flows.registry.aliases``).

MLflow keeps a record of the entries (``flows.registry.aliases``). All entries up to the newest recorded one must exist,
byte for byte: the chain is followed back from it. Newer objects that continue the chain are entries whose writer may
have been stopped before it updated MLflow. All other objects are foreign: they are reported and skipped, and the next
entry takes the next free number.

``signatures/KEY_ID/00000003.sig`` below the entries is a signature of entry 3, if a key is configured;
``flows.provenance.verify`` checks it.
"""

import getpass
import os
import re
import socket
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from types import MappingProxyType
from typing import Annotated, Literal

from pydantic import AwareDatetime, Field, FiniteFloat, JsonValue

from diffusion.common.config import Config
from diffusion.common.errors import ConflictError, UserError
from diffusion.common.files import canonical_json, sha256_bytes
from flows.environment import settings
from flows.signing.keys import SigningKey
from flows.storage.numbered_objects import NumberedObjects, object_name
from flows.storage.s3 import ListedObject, Location, Store

MAX_ENTRY_BYTES = 2**16  # maximum size of an entry in bytes: larger objects are not entries and are not fetched
SIGNATURES = "signatures"  # folder of the signatures below the entries

Known = Mapping[int, str]
"""SHA-256 by number of the entries that MLflow has recorded."""
NOTHING: Known = MappingProxyType({})

NEWEST = "darkroom.ledger.newest"
"""Tag of a registered model in MLflow: number and SHA-256 of the newest entry, and where its ledger lies."""
NEWEST_TEXT = re.compile(r"([0-9]{8}) sha256 ([0-9a-f]{64}) in (s3://\S+)")
GateWord = Literal["promote", "hold", "reject"]
LedgerEvent = Literal["promote", "hold", "reject", "rollback"]
Number = Annotated[int, Field(ge=1)]


class Evidence(Config):
    """Verdict of the gate on a version, with its basis."""

    verdict: GateWord
    reason: str
    figures: dict[str, FiniteFloat] = Field(default_factory=dict)
    eval_key: str | None = None
    gate: dict[str, JsonValue] = Field(default_factory=dict)


class Approval(Config):
    """Answer of the person who was asked for approval before the commit."""

    approved: bool
    by: str | None
    """Name as typed; None if there was no answer in time."""
    note: str = ""


class AliasNumbers(Config):
    """Version numbers behind MLflow's aliases."""

    champion: Number | None = None
    previous: Number | None = None
    """Version that a rollback would make champion again."""
    candidate: Number | None = None
    """Candidate that was held last, and has not become champion since."""


class LedgerEntry(Config):
    """Entry of the ledger."""

    format_version: Literal[2] = 2
    model: str
    number: Number
    what: LedgerEvent
    by_hand: bool
    """Whether it is a manual override and not the gate's decision."""
    who: str
    when: AwareDatetime
    version: Number
    weights_sha256: str
    from_version: Number | None
    to_version: Number | None
    """Champion after the entry; ``from_version`` before it."""
    previous: Number | None
    candidate: Number | None
    reason: str | None
    """Reason given for a manual override; None if none was given or the gate decided."""
    evidence: Evidence | None
    """Newest verdict of the gate on the version, possibly overridden; None if it was never evaluated."""
    approval: Approval | None
    parent: str | None
    """SHA-256 of the previous entry; None for the first."""

    @property
    def data(self) -> bytes:
        """Canonical bytes of the entry."""
        return canonical_json(self.model_dump(mode="json")).encode()

    @property
    def digest(self) -> str:
        """Hex SHA-256 of its bytes."""
        return sha256_bytes(self.data)

    @property
    def alias_numbers(self) -> AliasNumbers:
        """Alias state after the entry."""
        return AliasNumbers(champion=self.to_version, previous=self.previous, candidate=self.candidate)

    @property
    def aliases(self) -> dict[str, int]:
        """Version numbers after the entry by alias, without unset ones."""
        return self.alias_numbers.model_dump(exclude_none=True)

    @property
    def changes_champion(self) -> bool:
        """Whether the entry changes the champion."""
        return self.from_version != self.to_version

    @property
    def why(self) -> str:
        """Reason in words, of the manual override, if any, and of the gate."""
        gate = self.evidence and f"{self.evidence.verdict}: {self.evidence.reason}"
        if self.by_hand:
            statement = self.reason or "no reason given"
            overrides = self.what == "promote" and (self.evidence is None or self.evidence.verdict != "promote")
            return f"by hand, {statement}" + (
                f" (overrides the gate: {gate or 'never evaluated'})" if overrides else ""
            )
        gate_reason = self.evidence.reason if self.evidence else ""
        if self.approval is None:
            return gate_reason
        answer = "approved" if self.approval.approved else "not approved"
        statement = f"{answer} by {self.approval.by}" if self.approval.by else "no answer to the request for approval"
        return f"{statement}{self.approval.note and f' ({self.approval.note})'}: {gate_reason}"

    def repeats(self, other: "LedgerEntry") -> bool:
        """Whether both entries keep the same champion for the same reasons, so that one is redundant."""
        fields = ("what", "by_hand", "version", "weights_sha256", "to_version", "reason", "evidence", "approval")
        return not self.changes_champion and all(getattr(self, name) == getattr(other, name) for name in fields)

    def __str__(self) -> str:
        if self.changes_champion:
            move = f"{self.what} {self.from_version or 'none'} → {self.to_version}"
        else:
            move = f"{self.what} {self.version}, champion {self.to_version or 'none'}"
        return f"{move}, {self.when:%Y-%m-%d %H:%M} UTC, {self.who}: {self.why}"


@dataclass(frozen=True)
class AliasState:
    """Alias state that determines which entries can follow; rolling back twice goes back twice."""

    champions: tuple[int, ...] = ()
    """Stack of champions, on which a promotion puts one at the end and from which a rollback takes it."""
    candidate: int | None = None

    @property
    def alias_numbers(self) -> AliasNumbers:
        """Current version numbers by alias."""
        previous, champion = (None, None, *self.champions)[-2:]
        return AliasNumbers(champion=champion, previous=previous, candidate=self.candidate)

    def apply_change(self, what: LedgerEvent, version: int) -> "AliasState":
        """State after ``what`` was done to ``version``; raises UserError for a rollback past the previous champion."""
        champions = self.champions
        if what == "hold":
            return AliasState(champions, version)
        if what == "rollback":
            if champions[-2:-1] != (version,):
                raise UserError(f"a rollback leads to the champion before the one that is, and that was not {version}")
            champions = champions[:-1]
        elif what == "promote":
            champions = (*champions, version)
        # A champion or a rejected version is no longer held.
        return AliasState(champions, None if self.candidate == version else self.candidate)


@dataclass(frozen=True)
class History:
    """Entries of a model's ledger, in order."""

    model: str
    entries: tuple[LedgerEntry, ...] = ()
    foreign: Mapping[str, str] = field(default_factory=dict)
    """Other objects below the prefix, left by other writers and ignored: the reason for each, by name."""

    @property
    def head(self) -> LedgerEntry | None:
        """Newest entry; None if the ledger is empty."""
        return self.entries[-1] if self.entries else None

    @property
    def alias_numbers(self) -> AliasNumbers:
        """Alias state now."""
        return self.head.alias_numbers if self.head else AliasNumbers()

    def describe_conflict(self) -> str:
        """Describe the newest change of champion for a process that was slower."""
        change = next((entry for entry in reversed(self.entries) if entry.changes_champion), None)
        return f"another process was first: {change}" if change else "the ledger was emptied meanwhile"

    def require_same(self, version: int, weights_sha256: str) -> None:
        """Raise UserError if the ledger knows other weights as ``version``, as after a reset of the registry."""
        if (entry := self.find_newest_entry(version)) is not None and entry.weights_sha256 != weights_sha256:
            raise UserError(
                f"the ledger knows other weights as version {version} of {self.model} than the registry, which was "
                "reset: give registry.model another name"
            )

    def find_newest_entry(self, version: int) -> LedgerEntry | None:
        """Newest entry about ``version``; None if there is none."""
        return next((entry for entry in reversed(self.entries) if entry.version == version), None)

    def manual_demotion(self, version: int) -> LedgerEntry | None:
        """Entry of the manual override that demoted or rejected ``version``, unless a later one supersedes it."""
        for entry in reversed(self.entries):
            if entry.from_version == version != entry.to_version:
                return entry if entry.by_hand else None
            if entry.version == version and entry.to_version == version:
                return None
            if entry.version == version and entry.approval is not None and entry.approval.by is not None:
                return entry
        return None

    def next_entry(
        self,
        what: LedgerEvent,
        version: int,
        weights_sha256: str,
        *,
        by_hand: bool = False,
        reason: str | None = None,
        evidence: Evidence | None = None,
        approval: Approval | None = None,
    ) -> LedgerEntry:
        """Next entry, written by this process now."""
        state = AliasState()
        for entry in self.entries:
            state = state.apply_change(entry.what, entry.version)
        next_state = state.apply_change(what, version).alias_numbers
        number = self.head.number + 1 if self.head else 1
        while object_name(number) in self.foreign:
            number += 1
        return LedgerEntry(
            model=self.model,
            number=number,
            what=what,
            by_hand=by_hand,
            who=who(),
            when=datetime.now(UTC).replace(microsecond=0),
            version=version,
            weights_sha256=weights_sha256,
            from_version=self.alias_numbers.champion,
            to_version=next_state.champion,
            previous=next_state.previous,
            candidate=next_state.candidate,
            reason=reason,
            evidence=evidence,
            approval=approval,
            parent=self.head.digest if self.head else None,
        )


def who() -> str:
    """USER@MACHINE of this process."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user that has a number and no name
        user = f"uid {os.getuid()}"
    return f"{user}@{socket.gethostname()}"


@dataclass(frozen=True)
class NewestEntry:
    """Newest entry that MLflow has recorded."""

    number: int
    sha256: str
    place: str

    @classmethod
    def of(cls, model: str, tags: Mapping[str, str]) -> "NewestEntry | None":
        """Parse the ``tags`` of a registered model; None without such a tag; raises UserError if it is malformed."""
        if (text := tags.get(NEWEST)) is None:
            return None
        if (match := NEWEST_TEXT.fullmatch(text)) is None or not int(match[1]):
            raise UserError(
                f"the tag {NEWEST} of {model} in MLflow was altered: see docs/operations/runbook/ledger-broken.md"
            )
        return cls(int(match[1]), match[2], match[3])

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

    def head(self, record: Known = NOTHING) -> LedgerEntry | None:
        """Newest entry, or None, in two requests if MLflow has recorded it; otherwise verified as ``read`` does."""
        listing, number = self.list_objects(), max(record, default=0)
        if record and max(map(self.number, listing), default=0) == number:
            data = self.get(number)
            if (
                data is not None
                and sha256_bytes(data) == record[number]
                and (entry := parse_entry(self.model, number, data))
            ):
                return entry
        return self.read(record, listing).head

    def read(self, record: Known = NOTHING, listing: Sequence[ListedObject] | None = None) -> History:
        """Read all entries; raises UserError that names one of MLflow's ``record`` that is missing or altered."""
        listing = self.list_objects() if listing is None else listing
        entries, reasons = self._chain(self._objects(listing), record)
        numbers, foreign = {entry.number for entry in entries}, {}
        for item in listing:
            name = item.key.removeprefix(self.place.key(""))
            if (number := self.number(item)) not in numbers and not name.startswith(f"{SIGNATURES}/"):
                default_reason = f"is larger than {MAX_ENTRY_BYTES} bytes, or was deleted just now"
                reason = reasons.get(number, default_reason) if number else "is not named like an entry"
                foreign[name] = reason
        return History(self.model, tuple(entries), foreign)

    def append(
        self, decide: Callable[[History], LedgerEntry | None], read_record: Callable[[], Known] = lambda: NOTHING
    ) -> History:
        """Commit the entry that ``decide`` returns for the history, or nothing if it returns None.

        If another process was faster, ``decide`` is called again; it raises ConflictError if its decision no longer
        holds. ``read_record`` reads MLflow's record each time. Raises UserError, and writes nothing, if the ledger
        differs from it.
        """
        self.require_conditional_puts()
        while (entry := decide(history := self.read(read_record()))) is not None:
            if len(entry.data) > MAX_ENTRY_BYTES:
                raise UserError(f"an entry of the ledger has at most {MAX_ENTRY_BYTES} bytes: give a shorter --reason")
            try:
                self.put(entry.number, entry.data)
            except ConflictError:
                if entry.number not in self.numbers():
                    raise
                continue
            # A writer above the next free number may have taken the place of this entry.
            history = self.read(read_record())
            if entry not in history.entries:
                raise ConflictError(history.describe_conflict())
            return history
        return history

    def sign(self, entry: LedgerEntry, key: SigningKey) -> None:
        """Sign ``entry``, and so all before it, unless it is signed with this key."""
        if not self.is_signed(entry, key):
            # Signatures are random: another process's is as good.
            with suppress(ConflictError):
                name, signature = self._signature(entry, key), key.sign_bytes(entry.data)
                self.store.put_once(self.place.bucket, name, signature, content_type="application/json")

    def is_signed(self, entry: LedgerEntry, key: SigningKey) -> bool:
        """Whether there is a signature of ``entry`` with this key, verified or not."""
        return self.store.exists(self.place.bucket, self._signature(entry, key))

    def _signature(self, entry: LedgerEntry, key: SigningKey) -> str:
        return self.place.key(f"{SIGNATURES}/{key.key_id}/{entry.number:08d}.sig")

    def restore(self, copies: Mapping[int, bytes], record: Known) -> list[int]:
        """Write missing entries from ``copies``; returns their numbers. Raises UserError if another one is missing."""
        objects = self._objects(listing := self.list_objects())
        numbers = set(map(self.number, listing))
        missing_copies = {number: data for number, data in copies.items() if number not in numbers}
        missing_entries = [
            entry for entry in self._chain(objects | missing_copies, record)[0] if entry.number in missing_copies
        ]
        for entry in missing_entries:
            self.put(entry.number, entry.data)
        return [entry.number for entry in missing_entries]

    def _objects(self, listing: Sequence[ListedObject]) -> dict[int, bytes]:
        small = sorted({self.number(item) for item in listing if item.size <= MAX_ENTRY_BYTES} - {0})
        with ThreadPoolExecutor(16) as pool:
            pairs = zip(small, pool.map(self.get, small), strict=True)
            return {number: data for number, data in pairs if data is not None}

    def _chain(self, objects: Mapping[int, bytes], record: Known) -> tuple[list[LedgerEntry], dict[int, str]]:
        try:
            return follow_chain(self.model, objects, record)
        except BrokenChainError as error:
            place = f"s3://{self.place.bucket}/{self.place.key(object_name(error.number))}"
            raise UserError(
                f"the ledger of {self.model} is broken: {place} {error}, says MLflow's record of it; "
                "docs/operations/runbook/ledger-broken.md says what to do (`darkroom model history --restore` writes "
                "back what is missing)"
            ) from error


class BrokenChainError(Exception):
    """A recorded entry that is missing, altered or impossible, with what is wrong with it."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.number = number


def parse_entry(model: str, number: int, data: bytes) -> LedgerEntry | None:
    """Entry in ``data``; None unless these are its canonical bytes under the right name."""
    try:
        entry = LedgerEntry.model_validate_json(data)
        return entry if (entry.data, entry.number, entry.model) == (data, number, model) else None
    except ValueError:
        return None


def follow_chain(model: str, objects: Mapping[int, bytes], record: Known) -> tuple[list[LedgerEntry], dict[int, str]]:
    """Entries in order, and by number the reason why an object is none.

    Raises BrokenChainError for one in ``record``.
    """
    entries_by_number = {
        number: entry for number, data in objects.items() if (entry := parse_entry(model, number, data))
    }
    for number, digest in sorted(record.items(), reverse=True):
        if number not in entries_by_number or entries_by_number[number].digest != digest:
            problem = f"was altered (it had sha256 {digest})" if number in objects else f"is missing (sha256 {digest})"
            raise BrokenChainError(number, problem)
    by_digest, chain_numbers = {entry.digest: entry for entry in entries_by_number.values()}, set[int]()
    above = entries_by_number[max(record)] if record else None
    while above is not None:
        chain_numbers.add(above.number)
        if (below := by_digest.get(above.parent or "")) is None and above.parent is not None:
            problem = f"is missing or was altered, and {object_name(above.number)} stands on it"
            raise BrokenChainError(max(above.number - 1, 1), problem)
        above = below
    entries: list[LedgerEntry] = []
    reasons: dict[int, str] = {}
    state = AliasState()
    for number in sorted(objects):
        entry, parent = entries_by_number.get(number), entries[-1].digest if entries else None
        next_state, reason = state, ""
        if entry is None:
            reason = "is not an entry of this ledger"
        elif number < max(record, default=0) and number not in chain_numbers:
            reason = "is not part of the chain of entries"
        elif entry.parent != parent:
            reason = "does not stand on the entry before it"
        else:
            try:
                next_state = state.apply_change(entry.what, entry.version)
            except UserError as error:
                reason = f"cannot be: {error}"
            if not reason and (entry.from_version, entry.alias_numbers) != (
                state.alias_numbers.champion,
                next_state.alias_numbers,
            ):
                reason = "has version numbers that contradict its event"
        if entry is not None and not reason:
            entries.append(entry)
            state = next_state
        elif number in chain_numbers or number in record:
            raise BrokenChainError(number, reason)
        else:
            reasons[number] = reason
    return entries, reasons
