"""Quarantined entries of a data set version: of all records of a name, the last one counts."""

import sqlite3
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from typing import Any

import pyarrow as pa

from diffusion.common.config import Config
from diffusion.data.manifest import Manifest, Part


class QuarantineEntry(Config):
    """An entry in quarantine."""

    source: str
    reason: str


class Reason(Config):
    """A reason of quarantine and the number of its entries."""

    reason: str
    count: int


class Quarantine(Config):
    """Quarantined entries of a version."""

    count: int
    samples: list[QuarantineEntry]
    """The first entries by name."""
    reasons: list[Reason]
    """Reasons, the most frequent first."""


ReadTable = Callable[[Part, Sequence[str]], pa.Table | None]
"""Reads some columns of a part's records; None if its table is no longer available."""

COLUMNS = ("source", "outcome", "reason")
SCHEMA = """
    CREATE TABLE refused (source TEXT PRIMARY KEY) WITHOUT ROWID;
    CREATE TABLE outcomes (part TEXT, place INTEGER, source TEXT, outcome TEXT, reason TEXT);
    CREATE INDEX by_part ON outcomes (part);
    CREATE TABLE ranks (part TEXT PRIMARY KEY, rank INTEGER) WITHOUT ROWID;
"""
# Of several columns beside max(), SQLite returns those of the row with the maximum: the last record of a name.
STANDING = """
    SELECT source, reason FROM (
        SELECT source, outcome, reason, max(rank * 4294967296 + place)
        FROM ranks CROSS JOIN outcomes ON outcomes.part = ranks.part GROUP BY source
    ) WHERE outcome = 'quarantined'
"""


def standing(versions: Sequence[Manifest], read: ReadTable, limit: int | None = None) -> list[Quarantine | None]:
    """Return the quarantine of each of ``versions`` of a data set, with the first ``limit`` entries.

    None for a version that needs an unavailable table.
    """
    with closing(sqlite3.connect("")) as database:
        database.executescript(SCHEMA)
        return list(_Told(database, read).of(versions, -1 if limit is None else limit))


class _Told:
    """Records of the names that were ever quarantined."""

    def __init__(self, database: sqlite3.Connection, read: ReadTable) -> None:
        self.database = database
        self.read = read
        self.unread: set[str] = set()
        """SHA-256 of unavailable tables."""

    def of(self, versions: Sequence[Manifest], limit: int) -> Iterator[Quarantine | None]:
        for part in _needed(versions, only_refusing=True):
            names = ((row["source"],) for row in self._rows(part) if row["outcome"] == "quarantined")
            self.database.executemany("INSERT OR IGNORE INTO refused VALUES (?)", names)
        for part in _needed(versions, only_refusing=False):
            self.database.executemany(
                "INSERT INTO outcomes SELECT :part, :place, :source, :outcome, :reason "
                "WHERE EXISTS (SELECT 1 FROM refused WHERE source = :source)",
                (row | {"part": part.records.sha256, "place": n} for n, row in enumerate(self._rows(part))),
            )
        for version in versions:
            known = not any(part.records.sha256 in self.unread for part in _needed([version], only_refusing=False))
            yield self._standing(version, limit) if known else None

    def _rows(self, part: Part) -> list[dict[str, Any]]:
        table = self.read(part, COLUMNS)
        if table is None:
            self.unread.add(part.records.sha256)
            return []
        return table.to_pylist()  # type: ignore[no-any-return]

    def _standing(self, version: Manifest, limit: int) -> Quarantine:
        self.database.execute("DELETE FROM ranks")
        ranks = ((part.records.sha256, rank) for rank, part in enumerate(version.parts))
        self.database.executemany("INSERT OR IGNORE INTO ranks VALUES (?, ?)", ranks)
        reasons: Counter[str] = Counter(
            dict(self.database.execute(f"SELECT reason, count(*) FROM ({STANDING}) GROUP BY reason ORDER BY reason"))
        )
        samples = self.database.execute(f"{STANDING} ORDER BY source LIMIT ?", (limit,))
        return Quarantine(
            count=reasons.total(),
            samples=[QuarantineEntry(source=source, reason=reason) for source, reason in samples],
            reasons=[Reason(reason=reason, count=count) for reason, count in reasons.most_common()],
        )


def _needed(versions: Sequence[Manifest], only_refusing: bool) -> list[Part]:
    """Return the parts with quarantined entries, or also later parts, whose records may supersede them."""
    found: dict[str, Part] = {}
    for version in versions:
        refused = False
        for part in version.parts:
            refusing = bool(part.outcomes.get("quarantined"))
            refused |= refusing
            if refusing or (refused and not only_refusing):
                found[part.records.sha256] = part
    return list(found.values())
