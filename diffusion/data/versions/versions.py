"""The versions of a data set: what each of them holds, and what changed between two.

A version shares with its parent every part that it did not change, so that only the others are ever compared.
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
"""Versions named in an error."""
LEADING = 5
"""Reasons shown of those for which images were refused."""

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


class Step(Config):
    """A version, and what it changed."""

    digest: str
    content_digest: str
    change: str
    added: int
    """Images that its parent lacks; a rebuild makes all of them anew."""
    removed: int
    """Images of its parent that it lacks."""
    kept: int


class HistoryEntry(Step):
    """A version beside others of its data set, which need not be of its line."""

    parent: str | None
    current: bool
    """Whether it is the one in the data set's folder."""
    quarantined: int | None
    """Entries that stand refused in it; None if a table that is needed is no longer here."""


class Contents(Config):
    """What is in a version."""

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
    """Of all entries that were ever read."""
    classes: dict[str, int]
    shards: int
    shard_bytes: int
    quarantined_count: int | None
    """Entries that stand refused: the last that was told of their name; None if a table that is needed is no longer
    here."""
    quarantined: list[QuarantineEntry] | None
    """The first of them, by name."""
    reasons: list[Reason] | None
    """The leading reasons."""


def nowhere(entry: FileEntry) -> None:
    """Where files of older versions lie if nothing but the data set's folder is kept."""


def find_records(
    folder: Path, part: Part, columns: Sequence[str] | None = None, elsewhere: Elsewhere = nowhere
) -> pa.Table | None:
    """The records of a part of any version, all columns or some; None if its table lies neither in ``folder`` nor
    ``elsewhere``. Raises UserError if it is damaged."""
    entry = part.records
    if (folder / entry.name).is_file():
        return read_records(folder, part, columns)
    path = elsewhere(entry)
    if path is None or sha256_file(path) != entry.sha256:
        return None
    return pq.read_table(path, columns=None if columns is None else list(columns))


def known_versions(folder: Path) -> dict[str, Manifest]:
    """All versions of which this machine has the manifest, by digest: the current one of the data set in ``folder`` and
    its line, newest first, then those of other lines, which ``remember`` kept.

    Raises UserError if a manifest of its line is missing or damaged; the log names others that are.
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
    """Keep a version known on this machine, whatever becomes the current one in ``folder``."""
    path = _remembered(folder) / f"{manifest.digest}.json"
    if not path.is_file():
        write_bytes(path, manifest_bytes(manifest))


def _remembered(folder: Path) -> Path:
    return work_folder(folder) / "versions"


def resolve(folder: Path, prefix: str | None) -> Manifest:
    """The version whose digest or content digest begins with ``prefix``; None: the current one.

    Raises UserError, naming the versions there are, if it fits none of them, or several of different content.
    """
    if prefix is None:
        return read_manifest(folder)
    found = known_versions(folder)
    return found[choose(prefix, {digest: each.content_digest for digest, each in found.items()}, folder.name)]


def choose(prefix: str, candidates: dict[str, str], name: str) -> str:
    """The one of ``candidates``, versions of data set ``name`` with their content digests, that ``prefix`` names.

    Raises UserError as ``resolve`` does.
    """
    asked = prefix.lower()
    if len(asked) < SHORTEST or asked.strip("0123456789abcdef"):
        raise UserError(f"{prefix!r} names no version: give the first {SHORTEST} or more hex digits of its digest")
    fitting = [digest for digest in candidates if digest.startswith(asked)]
    if not fitting:
        # Versions of equal content differ in history alone: the first stands for them.
        by_content = {content: digest for digest, content in reversed(candidates.items())}
        fitting = [digest for content, digest in by_content.items() if content.startswith(asked)]
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
    """The current version of the data set in ``folder`` and all it was made from, newest first."""
    line: Iterator[Manifest | None] = chain(versions(folder), (None,))
    return (_step(version, parent) for version, parent in pairwise(line) if version is not None)


def history(folder: Path, elsewhere: Elsewhere = nowhere) -> list[HistoryEntry]:
    """All known versions of the data set in ``folder``, line by line, each before the one it was made from.

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
    """All versions, in lines that end where they branch off another: the one through ``current`` first, and whole."""
    parents = {version.parent for version in known.values()}
    lines = [_line(known, version) for version in known.values() if version.digest not in parents]
    lines.sort(key=lambda line: (current not in (version.digest for version in line), -len(line)))
    return list({version.digest: version for line in lines for version in line}.values())


def _line(known: dict[str, Manifest], version: Manifest) -> list[Manifest]:
    """``version`` and what it was made from, as far as that is ``known``."""
    line = [version]
    while (parent := known.get(line[-1].parent or "")) is not None:
        line.append(parent)
    return line


def show(folder: Path, version: Manifest, elsewhere: Elsewhere = nowhere, limit: int | None = None) -> Contents:
    """What is in ``version`` of the data set in ``folder``, with the first ``limit`` that stand refused."""
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
    """The parts of ``version`` that ``other`` has not."""
    theirs = {part.records.sha256 for part in other.parts}
    return [part for part in version.parts if part.records.sha256 not in theirs]


def kept_in(part: Part) -> int:
    """Images of a part."""
    return sum(part.splits.values())


def _step(version: Manifest, parent: Manifest | None) -> Step:
    """``version``, and how many images came and went since ``parent``."""
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
    """An image as a version knows it; of one that was taken down little more than its key is known."""

    key: str
    source: str | None = None
    split: str | None = None
    label: str | None = None
    caption: str | None = None


class Changed(Config):
    """An image of which two versions tell different things."""

    before: Sample
    after: Sample


class Group(Config, Generic[T]):
    """What one version has and the other lacks, or has otherwise."""

    count: int
    samples: list[T]
    """The first of them, by key or name."""


class Difference(Config):
    """What changed from version ``before`` to version ``after``; None stands for what cannot be told."""

    before: str
    after: str
    same_content: bool
    kept: tuple[int, int]
    added: Group[Sample] | None
    removed: Group[Sample] | None
    changed: Group[Changed] | None
    quarantined: Group[QuarantineEntry] | None
    """In quarantine since."""
    cleared: Group[QuarantineEntry] | None
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
        """Images that were taken down since, with their table; the keys that can be told are in the database."""

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

    def only_in(self, this: Side, other: Side) -> Group[Sample] | None:
        """Images that ``this`` version has and the ``other`` lacks."""
        if other in self.blind:
            return None
        sides = {"this": this, "other": other}
        query = f"{ONLY_IN} UNION ALL SELECT key, NULL, NULL, NULL, NULL FROM taken WHERE version = :this"
        rows = self._first(query, "key", sides)
        return Group(count=self._count(ONLY_IN, sides) + self.taken[this], samples=[_sample(row) for row in rows])

    def changed(self) -> Group[Changed] | None:
        """Images of both versions of which they tell different things."""
        if self.blind:
            return None
        samples = [Changed(before=_sample(row[:5]), after=_sample(row[5:])) for row in self._first(CHANGED, "1")]
        return Group(count=self._count(CHANGED), samples=samples)

    def refused_only_in(self, this: Side, other: Side) -> Group[QuarantineEntry] | None:
        """Entries that ``this`` version holds in quarantine and the ``other`` does not."""
        if self.blind or not self.remembers:
            return None
        query = REFUSED_ONLY_IN.format(this=LAST_WORD.format(this), other=LAST_WORD.format(other))
        samples = [QuarantineEntry(source=source, reason=reason) for source, reason in self._first(query, "1")]
        return Group(count=self._count(query), samples=samples)

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
