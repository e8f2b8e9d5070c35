"""The versions of a data set: the contents of each, and the difference of two.

A version shares unchanged parts with its parent, so that only the others are compared.
"""

import logging
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from itertools import chain, dropwhile, islice, pairwise
from pathlib import Path
from typing import Any, Generic, Literal, TypeAlias, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from diffusion.common.config import Config
from diffusion.common.errors import UserError
from diffusion.common.files import sha256_bytes, sha256_file, write_bytes
from diffusion.data.ingest.config import StorageConfig
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
ReadTable = Callable[[Part, Sequence[str]], pa.Table | None]
"""Reads some columns of a part's records; None if its table is no longer available."""
T = TypeVar("T")
Side: TypeAlias = Literal["before", "after"]
COLUMNS = ("outcome", "key", "source", "split", "label", "caption")
UNKNOWN = dict.fromkeys(COLUMNS)
SCHEMA = """
    CREATE TABLE images (version, key, source, split, label, caption, removed, UNIQUE (key, version));
"""
ONLY_IN = """
    SELECT key, source, split, label, caption FROM images i WHERE version = :this AND
        (removed OR NOT EXISTS (SELECT 1 FROM images WHERE version = :other AND key = i.key AND NOT removed))
"""
CHANGED = """
    SELECT a.key, a.source, a.split, a.label, a.caption, b.key, b.source, b.split, b.label, b.caption
    FROM images a JOIN images b USING (key) WHERE a.version = :this AND b.version = :other
        AND NOT a.removed AND NOT b.removed
        AND (a.split IS NOT b.split OR a.label IS NOT b.label OR a.caption IS NOT b.caption)
"""


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
    for path in sorted((work_folder(folder) / "versions").glob("*.json")):
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
    path = work_folder(folder) / "versions" / f"{manifest.digest}.json"
    if not path.is_file():
        write_bytes(path, manifest_bytes(manifest))


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


def standing(versions: Sequence[Manifest], read: ReadTable, limit: int | None = None) -> list[Quarantine | None]:
    """Return the quarantine of each of ``versions`` of a data set, with the first ``limit`` entries.

    Of all records of a name, the last one counts. None for a version that needs an unavailable table.
    """
    quarantines: list[Quarantine | None] = []
    for entries in _quarantined(versions, read)[0]:
        reasons = Counter(sorted(entries.values())).most_common() if entries else ()
        counts = [Reason(reason=reason, count=count) for reason, count in reasons]
        group = None if entries is None else Quarantine(**_first(entries, limit), reasons=counts)
        quarantines.append(group)
    return quarantines


def _quarantined(versions: Sequence[Manifest], read: ReadTable) -> tuple[list[dict[str, str] | None], set[str]]:
    """Return the reasons of quarantined entries by name, for each version, and the names of unavailable tables."""
    needed = [list(dropwhile(lambda part: not part.outcomes.get("quarantined"), each.parts)) for each in versions]
    parts = {part.records.name: part for each in needed for part in each}
    records: dict[str, list[tuple[str, str]]] = {}
    names: set[str] = set()
    for name, part in sorted(parts.items(), key=lambda item: item[1].number):
        if (table := read(part, ("source", "outcome", "reason"))) is not None:
            outcomes = zip(*(table[column].to_pylist() for column in table.column_names), strict=True)
            rows = [(source, reason if outcome == "quarantined" else "") for source, outcome, reason in outcomes]
            names.update(source for source, reason in rows if reason)
            records[name] = [row for row in rows if row[0] in names]
    found: list[dict[str, str] | None] = []
    for each in needed:
        here = [records.get(part.records.name) for part in each]
        last = dict(chain.from_iterable(rows or () for rows in here))
        found.append(None if None in here else {name: last[name] for name in sorted(last) if last[name]})
    return found, parts.keys() - records.keys()


def _first(entries: dict[str, str], limit: int | None) -> dict[str, Any]:
    """Count ``entries``, and list the first ones."""
    samples = [QuarantineEntry(source=source, reason=reason) for source, reason in islice(entries.items(), limit)]
    return {"count": len(entries), "samples": samples}


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
    parents = {version.parent for version in known.values()}
    lines = [[version] for version in known.values() if version.digest not in parents]
    for line in lines:
        while (parent := known.get(line[-1].parent or "")) is not None:
            line.append(parent)
    lines.sort(key=lambda line: (current not in (version.digest for version in line), -len(line)))
    ordered = list({version.digest: version for line in lines for version in line}.values())
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
    sides: dict[Side, list[Part]] = {"before": unshared(before, after), "after": unshared(after, before)}
    rewritten = _rewritten(folder, sides["before"], sides["after"], elsewhere)
    rewritten |= _rewritten(folder, sides["after"], sides["before"], elsewhere)

    def read(part: Part, columns: Sequence[str]) -> pa.Table | None:
        return find_records(folder, rewritten.get(part.records.sha256, part), columns, elsewhere)

    with closing(sqlite3.connect("")) as database:
        unread, blind = _load_images(database, sides, rewritten, read)
        (old, new), missing = _quarantined([before, after], read)
        unread |= missing

        def only_in(this: dict[str, str] | None, other: dict[str, str] | None) -> VersionGroup[QuarantineEntry] | None:
            if unread or this is None or other is None:
                return None
            return VersionGroup(**_first({name: this[name] for name in this if name not in other}, limit))

        def group(make: Callable[..., T], query: str, this: Side, other: Side) -> VersionGroup[T]:
            values = {"this": this, "other": other, "limit": -1 if limit is None else limit}
            (count,) = database.execute(f"SELECT count(*) FROM ({query})", values).fetchone()
            rows = database.execute(f"{query} ORDER BY 1 NULLS LAST LIMIT :limit", values)
            return VersionGroup(count=count, samples=[make(*row) for row in rows if row[0] is not None])

        return Difference(
            before=before.digest,
            after=after.digest,
            same_content=before.content_digest == after.content_digest,
            kept=(before.kept, after.kept),
            added=None if "before" in blind else group(_sample, ONLY_IN, "after", "before"),
            removed=None if "after" in blind else group(_sample, ONLY_IN, "before", "after"),
            changed=None if blind else group(_changed, CHANGED, "before", "after"),
            quarantined=only_in(new, old),
            cleared=only_in(old, new),
            storage=_differing(before.storage.model_dump(), after.storage.model_dump()),
            classes=_differing(before.class_histogram, after.class_histogram, 0),
            unread=sorted(unread),
        )


def _rewritten(folder: Path, parts: list[Part], others: list[Part], elsewhere: Elsewhere) -> dict[str, Part]:
    """Return what a takedown made of those ``parts`` whose tables it deleted, by their tables' digests."""
    numbered = {part.number: part for part in others}
    return {
        part.records.sha256: numbered[part.number]
        for part in parts
        if part.number in numbered
        and numbered[part.number].outcomes.get("removed", 0) > part.outcomes.get("removed", 0)
        and find_records(folder, part, ("outcome",), elsewhere) is None
    }


def _differing(before: dict[str, Any], after: dict[str, Any], absent: Any = None) -> dict[str, tuple[Any, Any]]:
    pairs = {name: (before.get(name, absent), after.get(name, absent)) for name in sorted({*before, *after})}
    return {name: (old, new) for name, (old, new) in pairs.items() if old != new}


def _load_images(
    database: sqlite3.Connection, sides: dict[Side, list[Part]], rewritten: dict[str, Part], read: ReadTable
) -> tuple[set[str], set[Side]]:
    """Load the images of the parts of both versions; of parts that a takedown rewrote, only the removed ones.

    Returns the names of unavailable tables, and the versions that need them.
    """
    database.executescript(SCHEMA)
    unread: set[str] = set()
    blind: set[Side] = set()
    numbers = {part.number for part in rewritten.values()}
    for side, parts in sides.items():
        for part in parts:
            left = rewritten.get(part.records.sha256)
            if left is None and part.number in numbers:
                continue
            table = read(part, COLUMNS)
            if table is None:
                unread.add(part.records.name)
                blind |= {side} if left is None else {"before", "after"}
                continue
            if left is None:
                images = [row for row in table.to_pylist() if row["outcome"] == "kept"]
            elif part.outcomes.get("removed"):  # it is unknown which of them were removed before
                images = [{"key": None}] * (kept_in(part) - kept_in(left))
            else:
                keys = {row["key"] for row in table.to_pylist() if row["outcome"] == "removed"}
                images = [{"key": key} for key in keys if key]
            database.executemany(
                "INSERT OR IGNORE INTO images VALUES (:version, :key, :source, :split, :label, :caption, :removed)",
                ({**UNKNOWN, **image, "version": side, "removed": left is not None} for image in images),
            )
    return unread, blind


def _sample(key: str, source: str | None, split: str | None, label: str | None, caption: str | None) -> Sample:
    return Sample(key=key, source=source, split=split, label=label, caption=caption)


def _changed(*row: Any) -> Changed:
    return Changed(before=_sample(*row[:5]), after=_sample(*row[5:]))
