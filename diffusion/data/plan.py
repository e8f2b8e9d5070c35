"""The plan of an ingest: which entries of a source have to be read. It lies on disk, however long it is."""

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from diffusion.data.sources.base import Entry, Source
from diffusion.files import digest_of
from diffusion.progress import Progress

SCHEMA = """
    CREATE TABLE listing
        (number INTEGER PRIMARY KEY, source TEXT UNIQUE, locator, stamp, label, caption, problem, told);
    CREATE TABLE plan (number INTEGER PRIMARY KEY, source, locator, stamp, label, caption, problem, known);
"""
STAMPED = """
    SELECT 1 FROM stored.seen s
    WHERE s.origin = :origin AND s.source = l.source AND s.stamp = l.stamp AND s.stamp != '' AND s.told = l.told
        AND (EXISTS (SELECT 1 FROM stored.records r WHERE r.source = s.source AND r.sha256 = s.sha256)
            OR EXISTS (SELECT 1 FROM stored.removed d WHERE d.digest = s.sha256))
"""
"""Seen before with the same face, and what it was then is on record: the index may stand for another version."""
REFUSED = "SELECT 1 FROM stored.records r WHERE r.source = l.source AND r.outcome = 'quarantined'"
KNOWN = "SELECT group_concat(hex(r.sha256)) FROM stored.records r WHERE r.source = l.source"
CORRECTED = "SELECT 1 FROM stored.seen s WHERE s.origin = :origin AND s.source = l.source AND s.told != l.told"
"""Conditioning of otherwise than before: then it is judged again, though its bytes be the same."""
LISTED_AT_ONCE = 10_000


@dataclass(frozen=True)
class Planned:
    """An entry to be read."""

    entry: Entry
    known: frozenset[str]
    """SHA-256 of what came under its name before: if it is one of these, nothing is new."""


def make_plan(
    path: Path, source: Source, origin: str, index: Path, requeue: bool, anew: bool, progress: Progress
) -> tuple[int, int]:
    """Write the plan to ``path``; returns how many entries ``source`` lists, and how many of them must be read.

    Left out is what lies in the index database at ``index`` with an unchanged stamp under the same ``origin``, but
    not what was refused if ``requeue``; nothing is left out if the data set begins ``anew``.
    """
    path.unlink(missing_ok=True)
    with closing(sqlite3.connect(path, isolation_level=None)) as database:
        # Nobody needs half a plan: after a crash it is made anew.
        database.executescript(f"PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF; {SCHEMA}")
        database.execute("ATTACH ? AS stored", (str(index),))
        database.execute("BEGIN")
        database.executemany(
            "INSERT OR REPLACE INTO listing (source, locator, stamp, label, caption, problem, told) "
            "VALUES (?, ?, ?, ?, ?, ?, ?)",
            (
                (e.source, e.locator, e.stamp, e.label, e.caption, e.problem, told_of(e.label, e.caption))
                for e in _told(source.entries(), progress)
            ),
        )
        known, wanted = KNOWN, f"NOT EXISTS ({STAMPED})"
        if requeue:
            known, wanted = f"{KNOWN} AND r.outcome != 'quarantined'", f"{wanted} OR EXISTS ({REFUSED})"
        if anew:
            known, wanted = "NULL", "TRUE"
        order = "l.number" if source.in_order else "l.source"
        database.execute(
            f"""INSERT INTO plan (source, locator, stamp, label, caption, problem, known)
                SELECT l.source, l.locator, l.stamp, l.label, l.caption, l.problem,
                    CASE WHEN EXISTS ({CORRECTED}) THEN NULL ELSE ({known}) END FROM listing l
                WHERE {wanted} ORDER BY {order}""",
            {"origin": origin},
        )
        (listed,) = database.execute("SELECT count(*) FROM listing").fetchone()
        (planned,) = database.execute("SELECT count(*) FROM plan").fetchone()
        database.execute("COMMIT")
        return listed, planned


def read_plan(path: Path, first: int, last: int) -> list[Planned]:
    """Rows ``first`` … ``last`` of the plan, counted from 1."""
    with closing(sqlite3.connect(path)) as database:
        rows = database.execute(
            "SELECT source, locator, stamp, label, caption, problem, known FROM plan "
            "WHERE number BETWEEN ? AND ? ORDER BY number",
            (first, last),
        )
        return [Planned(Entry(*row[:6]), frozenset((row[6] or "").lower().split(",")) - {""}) for row in rows]


def text_lengths(path: Path) -> Iterator[tuple[int, int]]:
    """Number and characters of text of each row of the plan."""
    with closing(sqlite3.connect(path)) as database:
        yield from database.execute(
            "SELECT number, length(source) + ifnull(length(label), 0) + ifnull(length(caption), 0) FROM plan "
            "ORDER BY number"
        )


def told_of(label: str | None, caption: str | None) -> str:
    """What a source says about a picture, in as many letters as it takes to see that it says something else."""
    return digest_of([label, caption])[:16]


def origin_of(uri: str) -> str:
    """What tells a source from others that use the same names: its URI, with local paths made absolute."""
    return uri if ":" in uri else str(Path(uri).resolve())


def _told(entries: Iterator[Entry], progress: Progress) -> Iterator[Entry]:
    for number, entry in enumerate(entries, start=1):
        if number % LISTED_AT_ONCE == 0:
            progress("pictures listed", number, None)
        yield entry
