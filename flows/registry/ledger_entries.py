"""What happened to the title of champion of a registered model: entries, each standing on the one before it.

Verdicts that leave the champion where it is are entries as well: they say who the challenger is, and why it is no more
than that.
"""

import getpass
import os
import socket
from collections.abc import Iterable
from dataclasses import dataclass
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
    """What the gate said of a version, and on what that rests."""

    verdict: GateWord
    reason: str
    """In words and figures."""
    figures: dict[str, FiniteFloat] = Field(default_factory=dict)
    """Of the version, by name."""
    eval_key: str | None = None
    """Digest of the conditions of the evaluation; None: none was needed."""
    gate: dict[str, JsonValue] = Field(default_factory=dict)
    """The gate's configuration."""


class Approval(Config):
    """What a person answered who was asked before the commit."""

    approved: bool
    by: str | None
    """Who, as typed; None: nobody answered in time."""
    note: str = ""


class Standing(Config):
    """Who is what: version numbers, which are MLflow's aliases."""

    champion: Number | None = None
    previous: Number | None = None
    """Who a rollback would make champion again."""
    challenger: Number | None = None
    """Who was held last, and has not become champion since."""


class Entry(Config):
    """A line of the ledger."""

    format_version: Literal[1] = 1
    model: str
    number: Number
    what: What
    """``adopt``: the champion was there before the ledger."""
    by_hand: bool
    """Whether a person decided, and not the gate."""
    who: str
    """USER@MACHINE that wrote it."""
    when: AwareDatetime
    """In UTC, to the second."""
    version: Number
    """Whom it is about."""
    weights_sha256: str
    """Of that version."""
    from_version: Number | None
    """The champion before it."""
    to_version: Number | None
    """The champion after it."""
    previous: Number | None
    challenger: Number | None
    reason: str | None
    """What the person said who decided; None: nothing, or the gate decided."""
    evidence: Evidence | None
    """Of the gate's newest verdict on the version, which a person may have overridden; None: it was never judged."""
    approval: Approval | None
    parent: str | None
    """SHA-256 of the entry before it; None for the first."""

    @property
    def data(self) -> bytes:
        """The bytes of the entry."""
        return canonical_json(self.model_dump(mode="json")).encode()

    @property
    def digest(self) -> str:
        """Hex SHA-256 of its bytes."""
        return sha256_bytes(self.data)

    @property
    def standing(self) -> Standing:
        """Who is what after it."""
        return Standing(champion=self.to_version, previous=self.previous, challenger=self.challenger)

    @property
    def moves(self) -> bool:
        """Whether there is another champion after it."""
        return self.from_version != self.to_version

    @property
    def why(self) -> str:
        """The reason, in words: a person's before the gate's, and whom it overrides."""
        gate = self.evidence and f"{self.evidence.verdict}: {self.evidence.reason}"
        if self.what == "adopt":
            return "it was champion before there was a ledger"
        if self.by_hand:
            said = self.reason or "no reason given"
            overrides = self.what == "promote" and (self.evidence is None or self.evidence.verdict != "promote")
            return f"by hand, {said}" + (f" (overrides the gate: {gate or 'never judged'})" if overrides else "")
        words = self.evidence.reason if self.evidence else ""
        if self.approval is None:
            return words
        answer = "approved" if self.approval.approved else "not approved"
        said = f"{answer} by {self.approval.by}" if self.approval.by else "nobody answered who was asked to approve it"
        return f"{said}{self.approval.note and f' ({self.approval.note})'}: {words}"

    def says_the_same(self, other: "Entry") -> bool:
        """Whether both leave the same champion for the same reasons, so that one of them is enough."""
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
    """Who was champion and who challenges it, as far as that decides what comes next.

    Champions are a stack: a promotion puts one on top and a rollback takes it off, so that rolling back twice goes back
    twice.
    """

    champions: tuple[int, ...] = ()
    """The one that is now is the last."""
    challenger: int | None = None

    @property
    def standing(self) -> Standing:
        """Who is what."""
        previous, champion = (None, None, *self.champions)[-2:]
        return Standing(champion=champion, previous=previous, challenger=self.challenger)

    def after(self, what: What, version: int, challenger: int | None = None) -> "Titles":
        """After ``what`` happened to ``version``; ``challenger`` is the one that an ``adopt`` found beside it.

        Raises UserError for what cannot happen: a second beginning, or a rollback to another than the one before.
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
        # Who is champion, or rejected, challenges nobody.
        return Titles(champions, None if held == version else held)


def titles_after(entries: Iterable[Entry]) -> Titles:
    """Who is what after ``entries``."""
    titles = Titles()
    for entry in entries:
        titles = titles.after(entry.what, entry.version, entry.challenger)
    return titles


@dataclass(frozen=True)
class ForeignObject:
    """Object below a ledger's prefix that is no entry of its chain: anybody with a key that may write can leave one."""

    name: str
    """Its key below the prefix of the ledger."""
    reason: str
    """Why it is no entry."""

    def __str__(self) -> str:
        return f"{self.name!a} {self.reason}"


@dataclass(frozen=True)
class History:
    """All entries of a model's ledger, in order."""

    model: str
    entries: tuple[Entry, ...] = ()
    foreign: tuple[ForeignObject, ...] = ()
    """What else lies there: it decides nothing and stops nothing."""
    taken: frozenset[int] = frozenset()
    """Numbers of foreign objects that are named like entries."""

    @property
    def head(self) -> Entry | None:
        """The newest entry."""
        return self.entries[-1] if self.entries else None

    @property
    def next_number(self) -> int:
        """The number of the entry that would come next: the lowest one above the newest entry's that is free."""
        number = self.head.number + 1 if self.head else 1
        while number in self.taken:
            number += 1
        return number

    @property
    def standing(self) -> Standing:
        """Who is what now."""
        return self.head.standing if self.head else Standing()

    def faster(self) -> str:
        """Who made the newest change of champion, in words for who was slower."""
        newest = next((entry for entry in reversed(self.entries) if entry.moves), None)
        return f"somebody was faster: {newest}" if newest else "the ledger was emptied meanwhile"

    def require_same(self, version: int, weights_sha256: str) -> None:
        """Raise UserError if the ledger knows another model as ``version``: the registry was made anew."""
        entry = self.about(version)
        if entry is not None and entry.weights_sha256 != weights_sha256:
            raise UserError(
                f"the ledger knows other weights as version {version} of {self.model} than the registry, which was "
                "made anew: give registry.model another name"
            )

    def about(self, version: int) -> Entry | None:
        """The newest entry about ``version``."""
        return next((entry for entry in reversed(self.entries) if entry.version == version), None)

    def withheld(self, version: int) -> Entry | None:
        """The entry by which a person took the title from ``version``, or refused it, if nothing came after that."""
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
    ) -> Entry:
        """The entry that would come next, written by this process now; ``challenger`` is one from before the ledger."""
        before, after = self.standing, titles_after(self.entries).after(what, version, challenger).standing
        return Entry(
            model=self.model,
            number=self.next_number,
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
    """Who this process works for, USER@MACHINE."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user that has a number and no name
        user = f"uid {os.getuid()}"
    return f"{user}@{socket.gethostname()}"
