"""Ledger entries: changes of a registered model's champion, each linked to the entry before it.

Verdicts that keep the champion are entries as well: they record a candidate that was held or rejected, and why.
"""

import getpass
import os
import socket
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Annotated, Literal

from pydantic import AwareDatetime, Field, FiniteFloat, JsonValue

from diffusion.common.config import Config
from diffusion.common.errors import UserError
from diffusion.common.files import canonical_json, sha256_bytes

GateWord = Literal["promote", "hold", "reject"]
What = Literal["adopt", "promote", "hold", "reject", "rollback"]
Number = Annotated[int, Field(ge=1)]


class Evidence(Config):
    """Verdict of the gate on a version, with its basis."""

    verdict: GateWord
    reason: str
    """Reason in words and figures."""
    figures: dict[str, FiniteFloat] = Field(default_factory=dict)
    """Metrics of the version by name."""
    eval_key: str | None = None
    """Digest of the evaluation's conditions; None if no evaluation was needed."""
    gate: dict[str, JsonValue] = Field(default_factory=dict)
    """Configuration of the gate."""


class Approval(Config):
    """Answer of the person who was asked for approval before the commit."""

    approved: bool
    by: str | None
    """Name as typed; None if there was no answer in time."""
    note: str = ""


class Standing(Config):
    """Version numbers behind MLflow's aliases."""

    champion: Number | None = None
    previous: Number | None = None
    """Version that a rollback would make champion again."""
    challenger: Number | None = None
    """Candidate that was held last, and has not become champion since."""


class LedgerEntry(Config):
    """Entry of the ledger."""

    format_version: Literal[1] = 1
    model: str
    number: Number
    what: What
    """Kind of change; ``adopt`` records a champion that is older than the ledger."""
    by_hand: bool
    """Whether it is a manual override and not the gate's decision."""
    who: str
    """USER@MACHINE of the writing process."""
    when: AwareDatetime
    """Time in UTC, to the second."""
    version: Number
    """Version that the entry is about."""
    weights_sha256: str
    """SHA-256 of that version's weights."""
    from_version: Number | None
    """Champion before the entry."""
    to_version: Number | None
    """Champion after the entry."""
    previous: Number | None
    challenger: Number | None
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
    def standing(self) -> Standing:
        """Alias state after the entry."""
        return Standing(champion=self.to_version, previous=self.previous, challenger=self.challenger)

    @property
    def moves(self) -> bool:
        """Whether the entry changes the champion."""
        return self.from_version != self.to_version

    @property
    def why(self) -> str:
        """Reason in words: that of the manual override, if any, and that of the gate."""
        gate = self.evidence and f"{self.evidence.verdict}: {self.evidence.reason}"
        if self.what == "adopt":
            return "it was champion before there was a ledger"
        if self.by_hand:
            said = self.reason or "no reason given"
            overrides = self.what == "promote" and (self.evidence is None or self.evidence.verdict != "promote")
            return f"by hand, {said}" + (f" (overrides the gate: {gate or 'never evaluated'})" if overrides else "")
        words = self.evidence.reason if self.evidence else ""
        if self.approval is None:
            return words
        answer = "approved" if self.approval.approved else "not approved"
        said = f"{answer} by {self.approval.by}" if self.approval.by else "no answer to the request for approval"
        return f"{said}{self.approval.note and f' ({self.approval.note})'}: {words}"

    def says_the_same(self, other: "LedgerEntry") -> bool:
        """Whether both entries keep the same champion for the same reasons, so that one is redundant."""
        fields = ("what", "by_hand", "version", "weights_sha256", "to_version", "reason", "evidence", "approval")
        same = all(getattr(self, name) == getattr(other, name) for name in fields)
        return same and not self.moves

    def __str__(self) -> str:
        if self.moves:
            move = f"{self.what} {self.from_version or 'none'} → {self.to_version}"
        else:
            move = f"{self.what} {self.version}, champion {self.to_version or 'none'}"
        return f"{move}, {self.when:%Y-%m-%d %H:%M} UTC, {self.who}: {self.why}"


@dataclass(frozen=True)
class Titles:
    """Alias state that determines which entries can follow.

    Champions are a stack: a promotion puts one on top and a rollback takes it off, so that rolling back twice goes back
    twice.
    """

    champions: tuple[int, ...] = ()
    """Stack of champions, the current one last."""
    challenger: int | None = None

    @property
    def standing(self) -> Standing:
        """Current version numbers by alias."""
        previous, champion = (None, None, *self.champions)[-2:]
        return Standing(champion=champion, previous=previous, challenger=self.challenger)

    def after(self, what: What, version: int, challenger: int | None = None) -> "Titles":
        """State after ``what`` was done to ``version``; ``challenger`` is MLflow's alias at an ``adopt``.

        Raises UserError for impossible changes: a second ``adopt``, or a rollback past the previous champion.
        """
        champions = self.champions
        if what == "adopt" and self != Titles():
            raise UserError("a ledger adopts the champion that it finds once, at its beginning")
        if what == "hold":
            return Titles(champions, version)
        if what == "rollback":
            if champions[-2:-1] != (version,):
                raise UserError(f"a rollback leads to the champion before the one that is, and that was not {version}")
            champions = champions[:-1]
        elif what in ("adopt", "promote"):
            champions = (*champions, version)
        held = challenger if what == "adopt" else self.challenger
        # A champion or a rejected version is no longer held.
        return Titles(champions, None if held == version else held)


def titles_after(entries: Iterable[LedgerEntry]) -> Titles:
    """Alias state after ``entries``."""
    titles = Titles()
    for entry in entries:
        titles = titles.after(entry.what, entry.version, entry.challenger)
    return titles


@dataclass(frozen=True)
class History:
    """Entries of a model's ledger, in order."""

    model: str
    entries: tuple[LedgerEntry, ...] = ()
    foreign: Mapping[str, str] = field(default_factory=dict)
    """Other objects below the prefix, left by other writers and ignored: the reason for each, by name."""
    taken: frozenset[int] = frozenset()
    """Numbers of foreign objects that are named like entries."""

    @property
    def head(self) -> LedgerEntry | None:
        """Newest entry; None if the ledger is empty."""
        return self.entries[-1] if self.entries else None

    @property
    def standing(self) -> Standing:
        """Alias state now."""
        return self.head.standing if self.head else Standing()

    def faster(self) -> str:
        """Describe the newest change of champion for a process that was slower."""
        newest = next((entry for entry in reversed(self.entries) if entry.moves), None)
        return f"somebody was faster: {newest}" if newest else "the ledger was emptied meanwhile"

    def require_same(self, version: int, weights_sha256: str) -> None:
        """Raise UserError if the ledger knows other weights as ``version``, as after a reset of the registry."""
        entry = self.about(version)
        if entry is not None and entry.weights_sha256 != weights_sha256:
            raise UserError(
                f"the ledger knows other weights as version {version} of {self.model} than the registry, which was "
                "reset: give registry.model another name"
            )

    def about(self, version: int) -> LedgerEntry | None:
        """Newest entry about ``version``; None if there is none."""
        return next((entry for entry in reversed(self.entries) if entry.version == version), None)

    def withheld(self, version: int) -> LedgerEntry | None:
        """Entry of the manual override that demoted or refused ``version``, unless a later one supersedes it."""
        for entry in reversed(self.entries):
            if entry.from_version == version != entry.to_version:
                return entry if entry.by_hand else None
            if entry.version == version and entry.to_version == version:
                return None
            if entry.version == version and entry.approval is not None and entry.approval.by is not None:
                return entry
        return None

    def then(
        self,
        what: What,
        version: int,
        weights_sha256: str,
        *,
        by_hand: bool = False,
        reason: str | None = None,
        evidence: Evidence | None = None,
        approval: Approval | None = None,
        challenger: int | None = None,
    ) -> LedgerEntry:
        """Next entry, written by this process now; ``challenger`` is MLflow's alias at an ``adopt``."""
        before, after = self.standing, titles_after(self.entries).after(what, version, challenger).standing
        number = self.head.number + 1 if self.head else 1
        while number in self.taken:
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
            from_version=before.champion,
            to_version=after.champion,
            previous=after.previous,
            challenger=after.challenger,
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
