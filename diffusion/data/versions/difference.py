"""The difference of two versions of a data set, of which only parts that they do not share are read."""

from collections.abc import Callable, Sequence
from itertools import compress
from pathlib import Path
from tempfile import gettempdir
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from diffusion.common.config import Config, is_unset
from diffusion.data.manifest import Manifest, Outcome, Part, read_table
from diffusion.data.tables import insert_records, open_database
from diffusion.data.versions.versions import (
    Elsewhere,
    QuarantineEntry,
    count_kept,
    find_nothing,
    find_table,
    find_unshared_parts,
    first_entries,
    list_quarantine_reasons,
)

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection

T = TypeVar("T")
Side = Literal["before", "after"]
FindTable = Callable[[Part], tuple[Path, bool] | None]
"""Finds the records of a part, and whether they are those after a curation that the part was before."""
_FIELDS = ("key", "source", "split", "label", "caption", "reason", "mask")
"""Fields of Sample."""
_RECORDED = f"SELECT outcome, {', '.join(_FIELDS)} FROM records WHERE outcome IN ('kept', 'dropped')"
_UNCURATED = """
SELECT 'kept', key, source, split, if(labelled_by IS NULL, label, given_label), caption, reason, mask
FROM records
WHERE outcome IN ('kept', 'dropped')
"""


class Sample(Config):
    """An image as recorded in a version; of one that was taken down little more than its key is known."""

    key: str
    source: str | None = None
    split: str | None = None
    label: str | None = None
    caption: str | None = None
    reason: str | None = None
    """The rule of curation that dropped it."""
    mask: str | None = Field(None, exclude_if=is_unset)
    """SHA-256 of its mask."""


class SampleChange(Config):
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
    changed: VersionGroup[SampleChange] | None
    dropped: VersionGroup[Sample] | None
    """Images newly dropped by curation; those that the old version kept are among ``removed``, too."""
    restored: VersionGroup[Sample] | None
    """Images that are no longer dropped; those that the new version keeps are among ``added``, too."""
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
    folder: Path, before: Manifest, after: Manifest, limit: int | None = None, elsewhere: Elsewhere = find_nothing
) -> Difference:
    """Compare two versions, with ``limit`` samples of each kind; raises UserError if a table is damaged."""
    old_parts, new_parts = find_unshared_parts(before, after), find_unshared_parts(after, before)
    remains = _remains(folder, old_parts, new_parts, elsewhere) | _remains(folder, new_parts, old_parts, elsewhere)
    unread_tables: set[str] = set()

    def find(part: Part) -> tuple[Path, bool] | None:
        if path := find_table(folder, remains.get(part.records.sha256, part), elsewhere):
            return path, False
        if (curated_part := _curated_part(part, before, after)) and (
            path := find_table(folder, curated_part, elsewhere)
        ):
            return path, True
        unread_tables.add(part.records.name)
        return None

    def read(part: Part, columns: Sequence[str]) -> pa.Table | None:
        # Curation does not change quarantined entries.
        return (found := find(part)) and read_table(found[0], columns)

    with open_database(Path(gettempdir())) as database:
        has_all = [
            _load(database, "before", old_parts, remains, find),
            _load(database, "after", new_parts, remains, find),
        ]
        has_images, has_drops = (all(states) for states in zip(*has_all, strict=True))
        added, removed = _only_in(database, "after", "kept", limit), _only_in(database, "before", "kept", limit)
        dropped, restored = (
            _only_in(database, "after", "dropped", limit),
            _only_in(database, "before", "dropped", limit),
        )
        changed = _find_changes(database, limit)
    old_reasons, new_reasons = list_quarantine_reasons([before, after], read)
    if unread_tables:
        old_reasons = new_reasons = None
    return Difference(
        before=before.digest,
        after=after.digest,
        same_content=before.content_digest == after.content_digest,
        kept=(before.kept, after.kept),
        added=added if has_images else None,
        removed=removed if has_images else None,
        dropped=dropped if has_drops else None,
        restored=restored if has_drops else None,
        changed=changed if has_images else None,
        quarantined=_entries_only_in(new_reasons, old_reasons, limit),
        cleared=_entries_only_in(old_reasons, new_reasons, limit),
        storage=_differences(before.storage.model_dump(), after.storage.model_dump()),
        classes=_differences(before.class_histogram, after.class_histogram, 0),
        unread=sorted(unread_tables),
    )


def _load(
    database: "DuckDBPyConnection", side: Side, parts: list[Part], remains: dict[str, Part], find: FindTable
) -> tuple[bool, bool]:
    """Load the images of ``parts``, and those that a takedown removed; returns whether all kept and all dropped are.

    ``remains`` are the parts that takedowns rewrote, by the digest of the table before.
    """
    database.execute(f"CREATE TABLE {side} (outcome VARCHAR, {', '.join(f'{name} VARCHAR' for name in _FIELDS)})")
    tables = [(part, find(part)) for part in parts]
    for is_curated, query in ((False, _RECORDED), (True, _UNCURATED)):
        paths = (found[0] for _, found in tables if found is not None and found[1] == is_curated)
        insert_records(database, side, paths, query)
    removed_keys, unknown_count = set[str](), 0
    for part, found in tables:
        if found is None or (rest := remains.get(part.records.sha256)) is None:
            continue
        if part.outcomes.get("removed"):  # it is unknown which of them were removed before
            unknown_count += count_kept(part) - count_kept(rest)
        else:
            rows = read_table(found[0], ("outcome", "key")).filter(pc.field("outcome") == "removed")
            removed_keys.update(rows["key"].to_pylist())
    keys = [*(removed_keys - {""}), *[None] * unknown_count]
    database.execute(
        f"INSERT INTO {side} (outcome, key) SELECT 'kept', key FROM (SELECT unnest(?::VARCHAR[]) AS key) AS removed "
        f"WHERE NOT EXISTS (SELECT 1 FROM {side} AS image WHERE image.key = removed.key AND outcome = 'kept')",
        [keys],
    )
    missing = [part for part, found in tables if found is None]
    return not missing, not any(part.outcomes.get("dropped") for part in missing)


def _only_in(database: "DuckDBPyConnection", side: Side, outcome: Outcome, limit: int | None) -> VersionGroup[Sample]:
    other = "after" if side == "before" else "before"
    images = (
        f"FROM {side} AS image WHERE outcome = '{outcome}' AND NOT EXISTS "
        f"(SELECT 1 FROM {other} AS other WHERE other.key = image.key AND other.outcome = '{outcome}')"
    )
    count, rows = _count_and_first(database, _FIELDS, images, limit)
    return VersionGroup(count=count, samples=[_sample(row) for row in rows if row[0] is not None])


def _find_changes(database: "DuckDBPyConnection", limit: int | None) -> VersionGroup[SampleChange]:
    differences = " OR ".join(
        f"coalesce(before.{name}, '') <> coalesce(after.{name}, '')" for name in ("split", "label", "caption", "mask")
    )
    images = (
        "FROM before JOIN after USING (key) "
        f"WHERE before.outcome = 'kept' AND after.outcome = 'kept' AND ({differences})"
    )
    fields = [f"{side}.{name}" for side in ("before", "after") for name in _FIELDS]
    count, rows = _count_and_first(database, fields, images, limit)
    pairs = ((row[: len(_FIELDS)], row[len(_FIELDS) :]) for row in rows)
    return VersionGroup(
        count=count, samples=[SampleChange(before=_sample(old), after=_sample(new)) for old, new in pairs]
    )


def _count_and_first(
    database: "DuckDBPyConnection", fields: Sequence[str], images: str, limit: int | None
) -> tuple[int, list[tuple[str | None, ...]]]:
    """Return the number of ``images``, a query from FROM on, and ``fields`` of the first ``limit``, by key."""
    (count,) = database.execute(f"SELECT count(*) {images}").fetchone() or (0,)
    query = f"SELECT {', '.join(fields)} {images} ORDER BY {fields[0]}, {fields[1]} LIMIT ?"
    return count, database.execute(query, [limit]).fetchall()


def _sample(row: tuple[str | None, ...]) -> Sample:
    return Sample.model_validate(dict(zip(_FIELDS, row, strict=True)))


def _entries_only_in(
    reasons: dict[str, str] | None, other: dict[str, str] | None, limit: int | None
) -> VersionGroup[QuarantineEntry] | None:
    if reasons is None or other is None:
        return None
    entries = {name: reasons[name] for name in reasons if name not in other}
    return VersionGroup(count=len(entries), samples=first_entries(entries, limit))


def _remains(folder: Path, parts: list[Part], others: list[Part], elsewhere: Elsewhere) -> dict[str, Part]:
    """Return what a takedown made of those ``parts`` whose tables it deleted, by their tables' digests."""
    parts_by_number = {part.number: part for part in others}
    return {
        part.records.sha256: parts_by_number[part.number]
        for part in parts
        if part.number in parts_by_number
        and parts_by_number[part.number].outcomes.get("removed", 0) > part.outcomes.get("removed", 0)
        and find_table(folder, part, elsewhere) is None
    }


def _curated_part(part: Part, *versions: Manifest) -> Part | None:
    """Return what curation made of ``part``, which it had left as it was, if one of ``versions`` has it.

    In its table nothing is gone.
    """
    if part.outcomes.get("dropped") or part.relabelled:
        return None
    others = [other for version in versions for other in version.parts if other.number == part.number]
    is_curated = (other.shard == part.shard and (other.outcomes.get("dropped") or other.relabelled) for other in others)
    return next(compress(others, is_curated), None)


def _differences(before: dict[str, Any], after: dict[str, Any], absent: Any = None) -> dict[str, tuple[Any, Any]]:
    pairs = {name: (before.get(name, absent), after.get(name, absent)) for name in sorted({*before, *after})}
    return {name: (old, new) for name, (old, new) in pairs.items() if old != new}
