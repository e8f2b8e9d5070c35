"""The difference of two versions of a data set, of which only parts that they do not share are read."""

from collections import defaultdict
from collections.abc import Sequence
from itertools import compress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from diffusion.common.config import Config, is_unset
from diffusion.common.files import temporary_folder
from diffusion.data.manifest import GIVEN_LABEL, LABELLED_BY, MASK, Manifest, Part, read_table
from diffusion.data.tables import insert_records, open_database
from diffusion.data.versions.versions import (
    Elsewhere,
    QuarantineEntry,
    ReadTable,
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
Place = tuple[bytes | None, int | None, int | None]
"""Key of an image, the number of its part among those compared, and its row there; a key alone is of a removed one."""
_FIELDS = ("key", "source", "split", "label", "caption", "reason", MASK.name)
"""Fields of Sample."""
_CONTENT = (
    "md5_number(to_json([coalesce(split, ''), coalesce({label}, ''), coalesce(caption, ''), coalesce(mask, '')]))"
)
_IMAGES = f"""
SELECT
    unhex(key) AS key,
    outcome = 'kept' OR is_curated AS kept,
    {_CONTENT.format(label="if(is_curated AND labelled_by IS NOT NULL, given_label, label)")} AS content,
    part,
    "row"
FROM (SELECT *, part IN (SELECT part FROM curated) AS is_curated FROM records)
WHERE outcome IN ('kept', 'dropped')
"""
_REMOVED = f"""
INSERT INTO {{side}}
SELECT unhex(removed), true, {_CONTENT.format(label="label")}, NULL, NULL
FROM (SELECT unnest(?::VARCHAR[]) AS removed, '' AS split, '' AS label, '' AS caption, '' AS mask)
WHERE removed IS NULL OR unhex(removed) NOT IN (SELECT key FROM {{side}} WHERE kept AND key IS NOT NULL)
"""
_DIFFERING = """
CREATE TABLE differing AS
SELECT
    coalesce(before.key, after.key) AS key,
    before.kept AS was_kept, before.part AS old_part, before."row" AS old_row,
    after.kept AS is_kept, after.part AS new_part, after."row" AS new_row
FROM before FULL JOIN after ON before.key = after.key
WHERE before.kept IS DISTINCT FROM after.kept OR before.content <> after.content
"""
"""Images that the versions do not have alike; ``was_kept`` and ``is_kept`` are null for images that one has not."""


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
        curated_part = _curated_part(part, before, after)
        if curated_part and (path := find_table(folder, curated_part, elsewhere)):
            return path, True
        unread_tables.add(part.records.name)
        return None

    def read(part: Part, columns: Sequence[str]) -> pa.Table | None:
        if (found := find(part)) is None:
            return None
        path, is_curated = found
        if not is_curated or "label" not in columns:
            return read_table(path, columns)
        table = read_table(path, (*columns, LABELLED_BY.name, GIVEN_LABEL.name))
        label = pc.if_else(pc.is_valid(table[LABELLED_BY.name]), table[GIVEN_LABEL.name], table["label"])
        return table.set_column(table.column_names.index("label"), "label", label).select(columns)

    with temporary_folder() as scratch, open_database(scratch) as database:
        loaded_parts = [
            _load(database, side, [(part, found) for part in parts if (found := find(part))], remains)
            for side, parts in (("before", old_parts), ("after", new_parts))
        ]
        groups, changed = _compare(database, loaded_parts, read, limit)
    unread_parts = [part for part in (*old_parts, *new_parts) if part.records.name in unread_tables]
    has_images, has_drops = not unread_parts, not any(part.outcomes.get("dropped") for part in unread_parts)
    old_reasons, new_reasons = list_quarantine_reasons([before, after], read)
    if unread_tables:
        old_reasons = new_reasons = None
    return Difference(
        before=before.digest,
        after=after.digest,
        same_content=before.content_digest == after.content_digest,
        kept=(before.kept, after.kept),
        added=groups["added"] if has_images else None,
        removed=groups["removed"] if has_images else None,
        dropped=groups["dropped"] if has_drops else None,
        restored=groups["restored"] if has_drops else None,
        changed=changed if has_images else None,
        quarantined=_entries_only_in(new_reasons, old_reasons, limit),
        cleared=_entries_only_in(old_reasons, new_reasons, limit),
        storage=_differences(before.storage.model_dump(), after.storage.model_dump()),
        classes=_differences(before.class_histogram, after.class_histogram, 0),
        unread=sorted(unread_tables),
    )


def _load(
    database: "DuckDBPyConnection", side: str, tables: list[tuple[Part, tuple[Path, bool]]], remains: dict[str, Part]
) -> list[Part]:
    """Load the images of parts, and those that a takedown removed; returns the parts.

    Each has the path of its records, and whether they are those after a curation that the part was before. ``remains``
    are the parts that takedowns rewrote, by the digest of the table before.
    """
    database.execute(f'CREATE TABLE {side} (key BLOB, kept BOOLEAN, content UHUGEINT, part INTEGER, "row" INTEGER)')
    curated = [number for number, (_, (_, is_curated)) in enumerate(tables) if is_curated]
    database.execute("CREATE OR REPLACE TABLE curated AS SELECT unnest(?::INTEGER[]) AS part", [curated])
    insert_records(database, side, (path for _, (path, _) in tables), _IMAGES)
    removed_keys, unknown_count = set[str](), 0
    for part, (path, _) in tables:
        if (rest := remains.get(part.records.sha256)) is None:
            continue
        if part.outcomes.get("removed"):  # it is unknown which of them were removed before
            unknown_count += count_kept(part) - count_kept(rest)
        else:
            rows = read_table(path, ("outcome", "key")).filter(pc.field("outcome") == "removed")
            removed_keys.update(rows["key"].to_pylist())
    keys = [*(removed_keys - {""}), *[None] * unknown_count]
    database.execute(_REMOVED.format(side=side), [keys])
    return [part for part, _ in tables]


def _compare(
    database: "DuckDBPyConnection", loaded_parts: list[list[Part]], read: ReadTable, limit: int | None
) -> tuple[dict[str, VersionGroup[Sample]], VersionGroup[SampleChange]]:
    """Compare the images of the parts loaded for each side; returns ``added`` to ``restored``, and ``changed``."""
    database.execute(_DIFFERING)
    old, new = zip(("old_part, old_row", "new_part, new_row"), loaded_parts, strict=True)
    conditions = {
        "added": ("is_kept AND was_kept IS NOT true", *new),
        "removed": ("was_kept AND is_kept IS NOT true", *old),
        "dropped": ("NOT is_kept AND was_kept IS NOT false", *new),
        "restored": ("NOT was_kept AND is_kept IS NOT false", *old),
    }
    groups: dict[str, VersionGroup[Sample]] = {}
    for name, (condition, place, parts) in conditions.items():
        count, places = _find_first(database, condition, place, limit)
        samples = [sample for sample in _read_samples(places, parts, read) if sample.key]
        groups[name] = VersionGroup(count=count, samples=samples)
    pairs = []
    for place, parts in (old, new):
        count, places = _find_first(database, "was_kept AND is_kept", place, limit)
        pairs.append(_read_samples(places, parts, read))
    changes = [SampleChange(before=one, after=other) for one, other in zip(*pairs, strict=True)]
    return groups, VersionGroup(count=count, samples=changes)


def _find_first(
    database: "DuckDBPyConnection", condition: str, place: str, limit: int | None
) -> tuple[int, list[Place]]:
    """Return the number of differing images for which ``condition``, and the places of the first of them by key."""
    ((count,),) = database.execute(f"SELECT count(*) FROM differing WHERE {condition}").fetchall()
    query = f"SELECT key, {place} FROM differing WHERE {condition} ORDER BY ALL LIMIT ?"
    return count, database.execute(query, [limit]).fetchall()


def _read_samples(places: Sequence[Place], parts: Sequence[Part], read: ReadTable) -> list[Sample]:
    """Read the samples at ``places``, in their order."""
    samples = [Sample(key=key.hex() if key else "") for key, _, _ in places]
    by_part = defaultdict[int, list[tuple[int, int]]](list)
    for place, (_, part, row) in enumerate(places):
        if part is not None and row is not None:
            by_part[part].append((row, place))
    for part, rows in by_part.items():
        if (table := read(parts[part], _FIELDS)) is not None:
            for (_, place), fields in zip(rows, table.take([row for row, _ in rows]).to_pylist(), strict=True):
                samples[place] = Sample.model_validate(fields)
    return samples


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
