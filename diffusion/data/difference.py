"""What changed between two versions of a data set, picture by picture."""

import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, TypeAlias

from diffusion.config import Config
from diffusion.data.manifest import Manifest, Part
from diffusion.data.refusals import Refusal
from diffusion.data.versions import Elsewhere, find_records, kept_in, nowhere, unshared

Side: TypeAlias = Literal["before", "after"]


class Sample(Config):
    """A picture as a version knows it; of one that was taken down little more than its key is known."""

    key: str
    source: str | None = None
    split: str | None = None
    label: str | None = None
    caption: str | None = None


class Changed(Config):
    """A picture of which two versions tell different things."""

    before: Sample
    after: Sample


class Samples(Config):
    """Pictures that one version has and the other lacks."""

    count: int
    samples: list[Sample]
    """The first of them, by key."""


class Changes(Config):
    """Pictures with another label, caption or split."""

    count: int
    samples: list[Changed]
    """The first of them, by key."""


class Refusals(Config):
    """Entries that one version holds in quarantine and the other does not."""

    count: int
    samples: list[Refusal]
    """The first of them, by name."""


class Difference(Config):
    """What changed from version ``before`` to version ``after``; None stands for what cannot be told."""

    before: str
    after: str
    same_content: bool
    kept: tuple[int, int]
    added: Samples | None
    removed: Samples | None
    changed: Changes | None
    quarantined: Refusals | None
    """In quarantine since."""
    cleared: Refusals | None
    """In quarantine no longer."""
    storage: dict[str, tuple[Any, Any]]
    """Settings that differ, each before and after."""
    classes: dict[str, tuple[int, int]]
    """Classes of another size, each before and after."""
    unread: list[str]
    """Tables that would be needed and are no longer here."""


def diff(
    folder: Path, before: Manifest, after: Manifest, limit: int | None = None, elsewhere: Elsewhere = nowhere
) -> Difference:
    """What changed between two versions of the data set in ``folder``, with the first ``limit`` samples of each kind.

    Only parts that they do not share are compared, in a database on disk. Raises UserError if a table is damaged.
    """
    with closing(sqlite3.connect("")) as database:
        compared = _Comparison(database, folder, elsewhere, limit)
        compared.load(before, after)
        return Difference(
            before=before.digest,
            after=after.digest,
            same_content=before.content_digest == after.content_digest,
            kept=(before.kept, after.kept),
            added=compared.only_in("after", "before"),
            removed=compared.only_in("before", "after"),
            changed=compared.changed(),
            quarantined=compared.refused_only_in("after", "before"),
            cleared=compared.refused_only_in("before", "after"),
            storage=_differing(before.storage.model_dump(), after.storage.model_dump()),
            classes=_differing(before.class_histogram, after.class_histogram, 0),
            unread=sorted(compared.unread),
        )


def _differing(before: dict[str, Any], after: dict[str, Any], absent: Any = None) -> dict[str, tuple[Any, Any]]:
    pairs = {name: (before.get(name, absent), after.get(name, absent)) for name in sorted({*before, *after})}
    return {name: (old, new) for name, (old, new) in pairs.items() if old != new}


SCHEMA = """
    CREATE TABLE rows (version, place INTEGER, source, outcome, reason, key, split, label, caption);
    CREATE TABLE taken (version, key, UNIQUE (version, key));
    CREATE INDEX by_key ON rows (key, version);
    CREATE INDEX by_source ON rows (source, version);
"""
COLUMNS = ("source", "outcome", "reason", "key", "split", "label", "caption")
NOTHING: Mapping[str, str] = MappingProxyType({})
PLACES = 2**32
"""More rows than a part can have."""
ONLY_IN = """
    SELECT key, source, split, label, caption FROM rows r WHERE version = :this AND outcome = 'kept' AND NOT EXISTS
        (SELECT 1 FROM rows WHERE version = :other AND outcome = 'kept' AND key = r.key)
"""
CHANGED = """
    SELECT a.key, a.source, a.split, a.label, a.caption, b.key, b.source, b.split, b.label, b.caption
    FROM rows a JOIN rows b USING (key)
    WHERE a.version = 'before' AND b.version = 'after' AND a.outcome = 'kept' AND b.outcome = 'kept'
        AND (a.split IS NOT b.split OR a.label IS NOT b.label OR a.caption IS NOT b.caption)
"""
# Of several columns beside max(), SQLite gives those of the row that has the maximum: the last word on a name.
LAST_WORD = """
    SELECT source, outcome, reason, max(place) FROM rows WHERE version IN ('{}', 'shared') AND source != ''
    GROUP BY source
"""
REFUSED_ONLY_IN = """
    SELECT this.source, this.reason FROM ({this}) this LEFT JOIN ({other}) other USING (source)
    WHERE this.outcome = 'quarantined' AND other.outcome IS NOT 'quarantined'
"""


class _Comparison:
    """The records that two versions do not share, side by side in ``database``."""

    def __init__(self, database: sqlite3.Connection, folder: Path, elsewhere: Elsewhere, limit: int | None) -> None:
        self.database = database
        self.folder = folder
        self.elsewhere = elsewhere
        self.limit = -1 if limit is None else limit
        self.unread: set[str] = set()
        self.blind: set[Side] = set()
        """Versions that are not known in full."""
        self.remembers = True
        """Whether it is known what was refused before both versions."""
        self.taken: dict[Side, int] = {"before": 0, "after": 0}
        """Pictures that were taken down since, with their table; the keys that can be told are in the database."""

    def load(self, before: Manifest, after: Manifest) -> None:
        """Read what is needed of two versions."""
        self.database.executescript(SCHEMA)
        sides: dict[Side, list[Part]] = {"before": unshared(before, after), "after": unshared(after, before)}
        rewritten = self._taken_down("before", sides) | self._taken_down("after", sides)
        for side, parts in sides.items():
            for part in parts:
                if part.number not in rewritten and not self._insert(side, part):
                    self.unread.add(part.records.name)
                    self.blind.add(side)
        own = {part.records.sha256 for part in sides["after"]}
        self._load_shared([part for part in after.parts if part.records.sha256 not in own])

    def only_in(self, this: Side, other: Side) -> Samples | None:
        """Pictures that ``this`` version has and the ``other`` lacks."""
        if other in self.blind:
            return None
        sides = {"this": this, "other": other}
        query = f"{ONLY_IN} UNION ALL SELECT key, NULL, NULL, NULL, NULL FROM taken WHERE version = :this"
        rows = self._first(query, "key", sides)
        return Samples(count=self._count(ONLY_IN, sides) + self.taken[this], samples=[_sample(row) for row in rows])

    def changed(self) -> Changes | None:
        """Pictures of both versions of which they tell different things."""
        if self.blind:
            return None
        samples = [Changed(before=_sample(row[:5]), after=_sample(row[5:])) for row in self._first(CHANGED, "1")]
        return Changes(count=self._count(CHANGED), samples=samples)

    def refused_only_in(self, this: Side, other: Side) -> Refusals | None:
        """Entries that ``this`` version holds in quarantine and the ``other`` does not."""
        if self.blind or not self.remembers:
            return None
        query = REFUSED_ONLY_IN.format(this=LAST_WORD.format(this), other=LAST_WORD.format(other))
        samples = [Refusal(source=source, reason=reason) for source, reason in self._first(query, "1")]
        return Refusals(count=self._count(query), samples=samples)

    def _count(self, query: str, values: Mapping[str, str] = NOTHING) -> int:
        (count,) = self.database.execute(f"SELECT count(*) FROM ({query})", dict(values)).fetchone()
        return int(count)

    def _first(self, query: str, order: str, values: Mapping[str, str] = NOTHING) -> Iterable[tuple[Any, ...]]:
        return self.database.execute(f"{query} ORDER BY {order} LIMIT :limit", {**values, "limit": self.limit})

    def _rows(self, part: Part) -> Iterator[dict[str, Any]] | None:
        table = find_records(self.folder, part, COLUMNS, self.elsewhere)
        return None if table is None else iter(table.to_pylist())

    def _insert(self, version: Side | Literal["shared"], part: Part) -> bool:
        """Take in the rows of a part, of a shared one only those whose names the others mention; False if its table
        is not here."""
        rows = self._rows(part)
        if rows is None:
            return False
        mentioned = " WHERE EXISTS (SELECT 1 FROM rows WHERE source = :source)" if version == "shared" else ""
        values = ", ".join(f":{name}" for name in COLUMNS)
        self.database.executemany(
            f"INSERT INTO rows SELECT :version, :place, {values}{mentioned}",
            (row | {"version": version, "place": part.number * PLACES + number} for number, row in enumerate(rows)),
        )
        return True

    def _load_shared(self, parts: list[Part]) -> None:
        """What was told of the same names before, if any of them was refused then."""
        refused_before = False
        for part in parts:
            if part.outcomes.get("quarantined"):
                rows = self._rows(part)
                if rows is None:
                    self.unread.add(part.records.name)
                    self.remembers = False
                    return
                refused_before |= any(row["outcome"] == "quarantined" and self._mentions(row["source"]) for row in rows)
        if refused_before:
            self.remembers = all(self._insert("shared", part) for part in parts)

    def _mentions(self, source: str) -> bool:
        found = self.database.execute("SELECT 1 FROM rows WHERE source = ? AND version != 'shared'", (source,))
        return found.fetchone() is not None

    def _taken_down(self, side: Side, sides: dict[Side, list[Part]]) -> set[int]:
        """The parts of version ``side`` whose table is gone because the other version has it without what was taken
        down from it; what was can be told by its key if nothing had been taken down from the part before."""
        rewritten = set()
        others = {part.number: part for part in sides["after" if side == "before" else "before"]}
        for part in sides[side]:
            other = others.get(part.number)
            removed = part.outcomes.get("removed", 0)
            if other is None or other.outcomes.get("removed", 0) <= removed or self._rows(part) is not None:
                continue
            rows = self._rows(other)
            if rows is None:
                continue
            rewritten.add(part.number)
            self.taken[side] += kept_in(part) - kept_in(other)
            if not removed:
                keys = ((side, row["key"]) for row in rows if row["outcome"] == "removed" and row["key"])
                self.database.executemany("INSERT OR IGNORE INTO taken VALUES (?, ?)", keys)
        return rewritten


def _sample(row: tuple[Any, ...]) -> Sample:
    key, source, split, label, caption = row
    return Sample(key=key, source=source, split=split, label=label, caption=caption)
