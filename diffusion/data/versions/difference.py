"""The difference of two versions of a data set, of which only parts that they do not share are read."""

from collections.abc import Sequence
from functools import reduce
from itertools import compress
from pathlib import Path
from typing import Any, Generic, TypeVar

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from diffusion.common.config import Config, is_unset
from diffusion.data.manifest import GIVEN_LABEL, LABELLED_BY, MASK, RECORDS, Manifest, Outcome, Part
from diffusion.data.versions.versions import (
    Elsewhere,
    QuarantineEntry,
    ReadTable,
    count_kept,
    find_nothing,
    find_records,
    find_unshared_parts,
    first_entries,
    list_quarantine_reasons,
)

T = TypeVar("T")
COLUMNS = ("outcome", "key", "source", "split", "label", "caption", "reason", MASK.name)


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

    def read(part: Part, columns: Sequence[str]) -> pa.Table | None:
        table = find_records(folder, remains.get(part.records.sha256, part), columns, elsewhere)
        if table is None and (curated_part := _curated_part(part, before, after)):
            table = find_records(folder, curated_part, (*columns, LABELLED_BY.name, GIVEN_LABEL.name), elsewhere)
            table = None if table is None else _undo_curation(table).select(columns)
        if table is None:
            unread_tables.add(part.records.name)
        return table

    old_images, new_images = _images(old_parts, remains, read), _images(new_parts, remains, read)
    old_drops, new_drops = (_images(parts, {}, read, "dropped") for parts in (old_parts, new_parts))
    old_reasons, new_reasons = list_quarantine_reasons([before, after], read)
    if unread_tables:
        old_reasons = new_reasons = None
    return Difference(
        before=before.digest,
        after=after.digest,
        same_content=before.content_digest == after.content_digest,
        kept=(before.kept, after.kept),
        added=_only_in(new_images, old_images, limit),
        removed=_only_in(old_images, new_images, limit),
        dropped=_only_in(new_drops, old_drops, limit),
        restored=_only_in(old_drops, new_drops, limit),
        changed=_find_changes(old_images, new_images, limit),
        quarantined=_entries_only_in(new_reasons, old_reasons, limit),
        cleared=_entries_only_in(old_reasons, new_reasons, limit),
        storage=_differences(before.storage.model_dump(), after.storage.model_dump()),
        classes=_differences(before.class_histogram, after.class_histogram, 0),
        unread=sorted(unread_tables),
    )


def _samples(images: pa.Table, limit: int | None) -> list[Sample]:
    rows = images.sort_by("key").slice(0, limit).to_pylist()
    return [Sample(**row) for row in rows if row["key"] is not None]


def _only_in(table: pa.Table | None, other: pa.Table | None, limit: int | None) -> VersionGroup[Sample] | None:
    if table is None or other is None:
        return None
    images = table.filter(pc.invert(pc.is_in(table["key"], other["key"], skip_nulls=True)))
    return VersionGroup(count=len(images), samples=_samples(images, limit))


def _find_changes(old: pa.Table | None, new: pa.Table | None, limit: int | None) -> VersionGroup[SampleChange] | None:
    if old is None or new is None:
        return None
    # Keys are unique, so equal rows are of the same image.
    before = old.filter(pc.is_in(old["key"], new["key"], skip_nulls=True)).sort_by("key")
    after = new.filter(pc.is_in(new["key"], old["key"], skip_nulls=True)).sort_by("key")
    columns = (
        (pc.fill_null(rows[name], "") for rows in (before, after)) for name in ("split", "label", "caption", MASK.name)
    )
    mask = reduce(pc.or_, (pc.not_equal(*pair) for pair in columns))
    pairs = zip(_samples(before.filter(mask), limit), _samples(after.filter(mask), limit), strict=True)
    samples = [SampleChange(before=one, after=other) for one, other in pairs]
    return VersionGroup(count=pc.sum(mask).as_py() or 0, samples=samples)


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
        and find_records(folder, part, ("outcome",), elsewhere) is None
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


def _undo_curation(table: pa.Table) -> pa.Table:
    """Return the records as they were before curation dropped or relabelled any."""
    outcome = pc.if_else(pc.equal(table["outcome"], "dropped"), "kept", table["outcome"])
    table = table.set_column(table.column_names.index("outcome"), "outcome", outcome)
    if "label" not in table.column_names:
        return table
    label = pc.if_else(pc.is_valid(table[LABELLED_BY.name]), table[GIVEN_LABEL.name], table["label"])
    return table.set_column(table.column_names.index("label"), "label", label)


def _images(parts: list[Part], remains: dict[str, Part], read: ReadTable, outcome: Outcome = "kept") -> pa.Table | None:
    """Return the images of ``parts``, with those that a takedown removed from them; None if a table is unavailable.

    ``remains`` are the parts that takedowns rewrote, by the digest of the table before.
    """
    tables = [pa.schema([*[RECORDS.field(name) for name in COLUMNS[1:-1]], MASK]).empty_table()]
    removed_keys: set[str] = set()
    unknown_count = 0
    # Most parts have no dropped images.
    outcome_parts = [part for part in parts if outcome == "kept" or part.outcomes.get(outcome)]
    for part, table in [(part, read(part, COLUMNS)) for part in outcome_parts]:
        if table is None:
            return None
        tables.append(table.filter(pc.field("outcome") == outcome).drop_columns("outcome"))
        if (rest := remains.get(part.records.sha256)) is None:
            continue
        if part.outcomes.get("removed"):  # it is unknown which of them were removed before
            unknown_count += count_kept(part) - count_kept(rest)
        else:
            removed_keys.update(table.filter(pc.field("outcome") == "removed")["key"].to_pylist())
    if remains:
        for image_table in tables:
            removed_keys.difference_update(image_table["key"].to_pylist())
        tables.append(pa.table({"key": pa.array([*(removed_keys - {""}), *[None] * unknown_count], pa.string())}))
    return pa.concat_tables(tables, promote_options="default")


def _differences(before: dict[str, Any], after: dict[str, Any], absent: Any = None) -> dict[str, tuple[Any, Any]]:
    pairs = {name: (before.get(name, absent), after.get(name, absent)) for name in sorted({*before, *after})}
    return {name: (old, new) for name, (old, new) in pairs.items() if old != new}
