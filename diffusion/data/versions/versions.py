"""The versions of a data set: the contents of each, and the difference of two.

A version shares unchanged parts with its parent, so that only the others are compared.
"""

import logging
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from itertools import chain, pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Any, Generic, Literal, TypeAlias, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from diffusion.common.config import Config
from diffusion.common.errors import UserError
from diffusion.common.files import sha256_bytes, sha256_file, write_bytes
from diffusion.data.ingest.config import StorageConfig
from diffusion.data.ingest.quarantine import QuarantineEntry, Reason, standing
from diffusion.data.manifest import (
    FileEntry,
    Manifest,
    Outcome,
    Part,
    Split,
    manifest_bytes,
    parse_manifest,
    read_manifest,
    read_records,
    versions,
    work_folder,
)

logger = logging.getLogger(__name__)

SHORTEST = 4
"""Hex digits that a prefix of a digest must have."""
LISTED = 10
"""Maximum number of versions listed in an error."""
LEADING = 5
"""Number of quarantine reasons shown."""

Elsewhere = Callable[[FileEntry], Path | None]
"""Finds a file that is no longer in the data set's folder, because only older versions name it."""
T = TypeVar("T")
Side: TypeAlias = Literal["before", "after"]
SCHEMA = """
    CREATE TABLE rows (version, place INTEGER, source, outcome, reason, key, split, label, caption);
    CREATE TABLE taken (version, key, UNIQUE (version, key));
    CREATE INDEX by_key ON rows (key, version);
    CREATE INDEX by_source ON rows (source, version);
"""
COLUMNS = ("source", "outcome", "reason", "key", "split", "label", "caption")
NOTHING: Mapping[str, str] = MappingProxyType({})
PLACES = 2**32
"""Upper bound on the rows of a part."""
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
# Of several columns beside max(), SQLite returns those of the row with the maximum: the last record of a name.
LAST_WORD = """
    SELECT source, outcome, reason, max(place) FROM rows WHERE version IN ('{}', 'shared') AND source != ''
    GROUP BY source
"""
REFUSED_ONLY_IN = """
    SELECT this.source, this.reason FROM ({this}) this LEFT JOIN ({other}) other USING (source)
    WHERE this.outcome = 'quarantined' AND other.outcome IS NOT 'quarantined'
"""


class Step(Config):
    """A version and its changes from its parent."""

    digest: str
    content_digest: str
    change: str
    added: int
    """Number of images that its parent lacks; all of them after a rebuild."""
    removed: int
    """Number of its parent's images that it lacks."""
    kept: int


class HistoryEntry(Step):
    """A version in the history of its data set, on any line."""

    parent: str | None
    current: bool
    """Whether it is the current version."""
    quarantined: int | None
    """Number of quarantined entries; None if a required table is unavailable."""


class Contents(Config):
    """Contents of a version."""

    dataset: str
    digest: str
    content_digest: str
    layout_digest: str
    parent: str | None
    change: str
    storage: StorageConfig
    channels: int
    kept: int
    splits: dict[Split, int]
    outcomes: dict[Outcome, int]
    """Outcomes of all entries ever read."""
    classes: dict[str, int]
    shards: int
    shard_bytes: int
    quarantined_count: int | None
    """Number of quarantined entries by the last record of each name; None if a required table is unavailable."""
    quarantined: list[QuarantineEntry] | None
    """The first quarantined entries, by name."""
    reasons: list[Reason] | None
    """The most frequent reasons."""


def nowhere(entry: FileEntry) -> None:
    """Find no files outside the data set's folder."""


def find_records(
    folder: Path, part: Part, columns: Sequence[str] | None = None, elsewhere: Elsewhere = nowhere
) -> pa.Table | None:
    """Read the records of a part of any version, all columns or some.

    None if its table is neither in ``folder`` nor ``elsewhere``. Raises UserError if it is damaged.
    """
    entry = part.records
    if (folder / entry.name).is_file():
        return read_records(folder, part, columns)
    path = elsewhere(entry)
    if path is None or sha256_file(path) != entry.sha256:
        return None
    return pq.read_table(path, columns=None if columns is None else list(columns))


def known_versions(folder: Path) -> dict[str, Manifest]:
    """Return all versions whose manifest this machine has, by digest.

    The current version of the data set in ``folder`` and its line come first, newest first, then those of other lines,
    kept by ``remember``. Raises UserError if a manifest of its line is missing or damaged; others are logged.
    """
    found = {manifest.digest: manifest for manifest in versions(folder)}
    for path in sorted(_remembered(folder).glob("*.json")):
        if path.stem not in found:
            data = path.read_bytes()
            try:
                if sha256_bytes(data) != path.stem:
                    raise UserError(f"{path} is damaged: delete it")
                found[path.stem] = parse_manifest(data, str(path))
            except UserError as error:
                logger.warning("%s", error)
    return found


def remember(folder: Path, manifest: Manifest) -> None:
    """Record a version on this machine, whichever becomes the current one in ``folder``."""
    path = _remembered(folder) / f"{manifest.digest}.json"
    if not path.is_file():
        write_bytes(path, manifest_bytes(manifest))


def _remembered(folder: Path) -> Path:
    return work_folder(folder) / "versions"


def resolve(folder: Path, prefix: str | None) -> Manifest:
    """Return the version whose digest or content digest begins with ``prefix``; None: the current one.

    Raises UserError, listing the versions, if it matches none of them, or several of different content.
    """
    if prefix is None:
        return read_manifest(folder)
    found = known_versions(folder)
    return found[choose(prefix, {digest: each.content_digest for digest, each in found.items()}, folder.name)]


def choose(prefix: str, candidates: dict[str, str], name: str) -> str:
    """Return the one of ``candidates``, versions of data set ``name`` with their content digests, for ``prefix``.

    Raises UserError as ``resolve`` does.
    """
    digits = prefix.lower()
    if len(digits) < SHORTEST or digits.strip("0123456789abcdef"):
        raise UserError(f"{prefix!r} names no version: give the first {SHORTEST} or more hex digits of its digest")
    fitting = [digest for digest in candidates if digest.startswith(digits)]
    if not fitting:
        # Versions of equal content differ in history alone: the first is returned.
        by_content = {content: digest for digest, content in reversed(candidates.items())}
        fitting = [digest for content, digest in by_content.items() if content.startswith(digits)]
    if len(fitting) == 1:
        return fitting[0]
    if not candidates:
        raise UserError(f"there is no version of a data set {name}: run `darkroom ingest SOURCE --dataset {name}`")
    shown = [f"{each[:12]} (content {candidates[each][:12]})" for each in (fitting or candidates)]
    listed = ", ".join(shown[:LISTED]) + (f" and {len(shown) - LISTED} more" if len(shown) > LISTED else "")
    if fitting:
        raise UserError(f"{prefix} fits {len(fitting)} versions of data set {name}: give more digits of {listed}")
    raise UserError(f"{prefix} is no version of data set {name}: there is {listed}")


def log(folder: Path) -> Iterator[Step]:
    """Yield the current version of the data set in ``folder`` and its ancestors, newest first."""
    line: Iterator[Manifest | None] = chain(versions(folder), (None,))
    return (_step(version, parent) for version, parent in pairwise(line) if version is not None)


def history(folder: Path, elsewhere: Elsewhere = nowhere) -> list[HistoryEntry]:
    """Return all known versions of the data set in ``folder``, line by line, each before its parent.

    The line of the current version comes first, and whole; the others end where they branch off.
    """
    known = known_versions(folder)
    current = next(iter(known))
    ordered = _in_lines(known, current)
    quarantines = standing(ordered, lambda part, columns: find_records(folder, part, columns, elsewhere), limit=0)
    return [
        HistoryEntry(
            **dict(_step(version, known.get(version.parent or ""))),
            parent=version.parent,
            current=version.digest == current,
            quarantined=quarantine and quarantine.count,
        )
        for version, quarantine in zip(ordered, quarantines, strict=True)
    ]


def _in_lines(known: dict[str, Manifest], current: str) -> list[Manifest]:
    """Order versions by lines that end where they branch off another: the one through ``current`` first, in full."""
    parents = {version.parent for version in known.values()}
    lines = [_line(known, version) for version in known.values() if version.digest not in parents]
    lines.sort(key=lambda line: (current not in (version.digest for version in line), -len(line)))
    return list({version.digest: version for line in lines for version in line}.values())


def _line(known: dict[str, Manifest], version: Manifest) -> list[Manifest]:
    """Return ``version`` and its ``known`` ancestors."""
    line = [version]
    while (parent := known.get(line[-1].parent or "")) is not None:
        line.append(parent)
    return line


def show(folder: Path, version: Manifest, elsewhere: Elsewhere = nowhere, limit: int | None = None) -> Contents:
    """Return the contents of ``version`` of the data set in ``folder``, with ``limit`` quarantined entries."""
    outcomes: Counter[Outcome] = Counter()
    for part in version.parts:
        outcomes.update(part.outcomes)
    (quarantine,) = standing([version], lambda part, columns: find_records(folder, part, columns, elsewhere), limit)
    return Contents(
        dataset=version.name,
        digest=version.digest,
        content_digest=version.content_digest,
        layout_digest=version.layout_digest,
        parent=version.parent,
        change=version.change,
        storage=version.storage,
        channels=version.channels,
        kept=version.kept,
        splits=version.counts,
        outcomes=dict(sorted(outcomes.items())),
        classes=version.class_histogram,
        shards=len(version.shards),
        shard_bytes=sum(shard.bytes for shard in version.shards),
        quarantined_count=quarantine and quarantine.count,
        quarantined=quarantine and quarantine.samples,
        reasons=quarantine and quarantine.reasons[:LEADING],
    )


def unshared(version: Manifest, other: Manifest) -> list[Part]:
    """Return the parts of ``version`` that are not in ``other``."""
    theirs = {part.records.sha256 for part in other.parts}
    return [part for part in version.parts if part.records.sha256 not in theirs]


def kept_in(part: Part) -> int:
    """Return the number of images of a part."""
    return sum(part.splits.values())


def _step(version: Manifest, parent: Manifest | None) -> Step:
    """Count the images added and removed by ``version`` since ``parent``."""
    if parent is None:
        added, removed = version.kept, 0
    elif version.change == "rebuild":
        added, removed = version.kept, parent.kept
    else:
        before = {part.number: kept_in(part) for part in unshared(parent, version)}
        after = {part.number: kept_in(part) for part in unshared(version, parent)}
        grown = [after.get(number, 0) - before.get(number, 0) for number in {*before, *after}]
        added, removed = sum(n for n in grown if n > 0), -sum(n for n in grown if n < 0)
    return Step(
        digest=version.digest,
        content_digest=version.content_digest,
        change=version.change,
        added=added,
        removed=removed,
        kept=version.kept,
    )


class Sample(Config):
    """An image as recorded in a version; of one that was taken down little more than its key is known."""

    key: str
    source: str | None = None
    split: str | None = None
    label: str | None = None
    caption: str | None = None


class Changed(Config):
    """An image whose records in two versions differ."""

    before: Sample
    after: Sample


class VersionGroup(Config, Generic[T]):
    """Samples that only one version has, or that differ."""

    count: int
    samples: list[T]
    """The first of them, by key or name."""


class Difference(Config):
    """Difference from version ``before`` to version ``after``; None for unknown values."""

    before: str
    after: str
    same_content: bool
    kept: tuple[int, int]
    added: VersionGroup[Sample] | None
    removed: VersionGroup[Sample] | None
    changed: VersionGroup[Changed] | None
    quarantined: VersionGroup[QuarantineEntry] | None
    """Newly quarantined entries."""
    cleared: VersionGroup[QuarantineEntry] | None
    """Entries no longer quarantined."""
    storage: dict[str, tuple[Any, Any]]
    """Storage settings that differ, before and after."""
    classes: dict[str, tuple[int, int]]
    """Number of images of classes that differ, before and after."""
    unread: list[str]
    """Required tables that are unavailable."""


def diff(
    folder: Path, before: Manifest, after: Manifest, limit: int | None = None, elsewhere: Elsewhere = nowhere
) -> Difference:
    """Compare two versions of the data set in ``folder``, with the first ``limit`` samples of each kind.

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


class _Comparison:
    """Records that two versions do not share, side by side in ``database``."""

    def __init__(self, database: sqlite3.Connection, folder: Path, elsewhere: Elsewhere, limit: int | None) -> None:
        self.database = database
        self.folder = folder
        self.elsewhere = elsewhere
        self.limit = -1 if limit is None else limit
        self.unread: set[str] = set()
        self.blind: set[Side] = set()
        """Versions with unavailable tables."""
        self.remembers = True
        """Whether earlier quarantined entries are known."""
        self.taken: dict[Side, int] = {"before": 0, "after": 0}
        """Number of images taken down since, with their table; those with known keys are in the database."""

    def load(self, before: Manifest, after: Manifest) -> None:
        """Read the required records of two versions."""
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

    def only_in(self, this: Side, other: Side) -> VersionGroup[Sample] | None:
        """Return the images that ``this`` version has and the ``other`` lacks."""
        if other in self.blind:
            return None
        sides = {"this": this, "other": other}
        query = f"{ONLY_IN} UNION ALL SELECT key, NULL, NULL, NULL, NULL FROM taken WHERE version = :this"
        rows = self._first(query, "key", sides)
        return VersionGroup(
            count=self._count(ONLY_IN, sides) + self.taken[this], samples=[_sample(row) for row in rows]
        )

    def changed(self) -> VersionGroup[Changed] | None:
        """Return the images of both versions whose records differ."""
        if self.blind:
            return None
        samples = [Changed(before=_sample(row[:5]), after=_sample(row[5:])) for row in self._first(CHANGED, "1")]
        return VersionGroup(count=self._count(CHANGED), samples=samples)

    def refused_only_in(self, this: Side, other: Side) -> VersionGroup[QuarantineEntry] | None:
        """Return the entries quarantined in ``this`` version and not in the ``other``."""
        if self.blind or not self.remembers:
            return None
        query = REFUSED_ONLY_IN.format(this=LAST_WORD.format(this), other=LAST_WORD.format(other))
        samples = [QuarantineEntry(source=source, reason=reason) for source, reason in self._first(query, "1")]
        return VersionGroup(count=self._count(query), samples=samples)

    def _count(self, query: str, values: Mapping[str, str] = NOTHING) -> int:
        (count,) = self.database.execute(f"SELECT count(*) FROM ({query})", dict(values)).fetchone()
        return int(count)

    def _first(self, query: str, order: str, values: Mapping[str, str] = NOTHING) -> Iterable[tuple[Any, ...]]:
        return self.database.execute(f"{query} ORDER BY {order} LIMIT :limit", {**values, "limit": self.limit})

    def _rows(self, part: Part) -> Iterator[dict[str, Any]] | None:
        table = find_records(self.folder, part, COLUMNS, self.elsewhere)
        return None if table is None else iter(table.to_pylist())

    def _insert(self, version: Side | Literal["shared"], part: Part) -> bool:
        """Insert the rows of a part, of a shared one only names that the others mention.

        Returns False if its table is unavailable.
        """
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
        """Insert earlier records of the same names, if any of them was quarantined."""
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
        """Return the parts of ``side`` whose table was deleted because the other version's takedown rewrote it.

        The keys of removed images are known if none had been taken down from the part before.
        """
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
