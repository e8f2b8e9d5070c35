"""The ledger on S3: who is champion of a registered model, by whose decision, and on what evidence.

``s3://BUCKET/ledger/NAME/00000001.json`` and so on are written once, each with the SHA-256 of the one before it. MLflow
has no compare-and-swap, and its aliases are a write each; to create entry N + 1 with If-None-Match is one write, which
one of several succeeds with. That is the commit. The aliases follow it (``flows.aliases``).
"""

import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from pydantic import ValidationError

from diffusion.errors import Held, UserError
from flows.environment import settings
from flows.history import Entry, History, Titles
from flows.s3 import Location, Store

NAME = re.compile(r"\d{8}\.json")
READERS = 16
"""Entries fetched at the same time."""


@dataclass(frozen=True)
class Ledger:
    """That of one registered model."""

    model: str
    place: Location
    store: Store

    @classmethod
    def of(cls, model: str) -> "Ledger":
        """That of ``model``, in the bucket of the environment."""
        return cls(model, Location(settings().bucket) / "ledger" / model, Store())

    def head(self) -> Entry | None:
        """The newest entry, at the price of two requests: the chain behind it is not looked at. None: there is none."""
        names = self._names()
        return self._parsed(names[-1], self._get(names[-1])) if names else None

    def read(self) -> History:
        """All entries, each verified; raises UserError that names the first one that does not follow."""
        names = self._names()
        with ThreadPoolExecutor(READERS) as pool:
            files = list(pool.map(self._get, names))
        entries = [self._parsed(name, data) for name, data in zip(names, files, strict=True)]
        return self._verified(entries)

    def append(self, decide: Callable[[History], Entry | None]) -> History:
        """Commit the entry that ``decide`` makes of the history, or nothing if it makes none.

        If somebody else was faster, ``decide`` is asked again with what they wrote; it raises Held if that changes what
        it stood on.
        """
        self.store.require_conditional_puts(self.place.bucket, "ledger")
        while (entry := decide(history := self.read())) is not None:
            try:
                name = name_of(entry.number)
                self.store.put_once(
                    self.place.bucket, self.place.key(name), entry.data, content_type="application/json"
                )
                return History(self.model, (*history.entries, entry))
            except Held:
                if len(self._names()) < entry.number:
                    raise
        return history

    def _names(self) -> list[str]:
        prefix = self.place.key("")
        keys = self.store.list_keys(self.place.bucket, prefix)
        return sorted(name for key in keys if NAME.fullmatch(name := key.removeprefix(prefix)))

    def _get(self, name: str) -> bytes:
        return self.store.get(self.place.bucket, self.place.key(name))

    def _parsed(self, name: str, data: bytes) -> Entry:
        try:
            entry = Entry.model_validate_json(data)
        except ValidationError as error:
            raise self._broken(name, f"is no entry ({error.errors()[0]['msg']})") from error
        if (entry.data, name_of(entry.number), entry.model) != (data, name, self.model):
            raise self._broken(name, "is not as it was written, or not where it was")
        return entry

    def _verified(self, entries: Sequence[Entry]) -> History:
        before, titles = None, Titles()
        for number, entry in enumerate(entries, 1):
            name = name_of(entry.number)
            if entry.number != number:
                raise self._broken(name_of(number), f"is missing, and {name} is there")
            if entry.parent != (before.digest if before else None):
                raise self._broken(name, "does not stand on the entry before it: one of the two was altered")
            champion = titles.standing.champion
            titles = self._after(titles, entry)
            if (entry.from_version, entry.standing) != (champion, titles.standing):
                raise self._broken(name, "names other versions than those that follow from what it says")
            before = entry
        return History(self.model, tuple(entries))

    def _after(self, titles: Titles, entry: Entry) -> Titles:
        try:
            return titles.after(entry.what, entry.version, entry.challenger)
        except UserError as error:
            raise self._broken(name_of(entry.number), f"cannot be: {error}") from error

    def _broken(self, name: str, words: str) -> UserError:
        return UserError(
            f"the ledger of {self.model} is broken: s3://{self.place.bucket}/{self.place.key(name)} {words}; put back "
            "what was there (the bucket's versions or backup), which the tags darkroom.ledger.* in MLflow summarize"
        )


def name_of(number: int) -> str:
    """The file of an entry."""
    return f"{number:08d}.json"
