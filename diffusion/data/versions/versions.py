"""The versions of a data set: the contents of each, and the difference of two, of which shared parts are left out."""

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import reduce
from itertools import chain, dropwhile, islice, pairwise
from operator import itemgetter
from pathlib import Path
from typing import Any, Generic, TypeVar

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import Field

from diffusion.common.config import Config, is_unset
from diffusion.common.errors import UserError
from diffusion.common.files import sha256_bytes, sha256_file, write_bytes
from diffusion.data.ingest.config import StorageConfig
from diffusion.data.manifest import (
    RECORDS,
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

Elsewhere = Callable[[FileEntry], Path | None]
"""Finds a file that is no longer in the data set's folder, because only older versions name it."""
ReadTable = Callable[[Part, Sequence[str]], pa.Table | None]
"""Reads some columns of a part's records; None if its table is no longer available."""
T = TypeVar("T")
COLUMNS = ("outcome", "key", "source", "split", "label", "caption", "reason")


class QuarantineEntry(Config):
    """An entry in quarantine."""

    source: str
    reason: str


class Reason(Config):
    """A reason of quarantine, or a rule of curation, and the number of its entries."""

    reason: str
    count: int


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
    local: bool
    """Whether this machine knows it; otherwise it is in the bucket alone."""
    dropped: int
    """Number of images that curation left out."""
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
    buckets: dict[str, int] | None = Field(None, exclude_if=is_unset)
    """Number of images of each shape, as WIDTHxHEIGHT; None: all are square."""
    near_duplicate_bits: int | None = Field(None, exclude_if=is_unset)
    """Number of bits that ``ingest.near_duplicates: auto`` stands for; None: it was not calibrated."""
    splits: dict[Split, int]
    outcomes: dict[Outcome, int]
    """Outcomes of all entries ever read."""
    classes: dict[str, int]
    shards: int
    shard_bytes: int
    sources: list[str]
    """Sources with versions of which it has images, as hf://datasets/OWNER/NAME@COMMIT."""
    captioners: dict[str, int]
    """Number of images by the captioner that captioned them."""
    quarantined_count: int | None
    """Number of quarantined entries by the last record of each name; None if a required table is unavailable."""
    quarantined: list[QuarantineEntry] | None
    """The first quarantined entries, by name."""
    reasons: list[Reason] | None
    """The most frequent reasons."""
    dropped_count: int
    """Number of images that curation left out."""
    dropped: list[QuarantineEntry] | None
    """The first of them, by name; None if a required table is unavailable."""
    rules: list[Reason] | None
    """The rules that left them out, the most frequent first."""


def find_nothing(entry: FileEntry) -> None:
    """Find no files outside the data set's folder."""


def find_records(
    folder: Path, part: Part, columns: Sequence[str] | None = None, elsewhere: Elsewhere = find_nothing
) -> pa.Table | None:
    """Read the records of a part of any version; None if its table is neither in ``folder`` nor ``elsewhere``."""
    entry = part.records
    if (folder / entry.name).is_file():
        return read_records(folder, part, columns)
    path = elsewhere(entry)
    if path is None or sha256_file(path) != entry.sha256:
        return None
    return pq.read_table(path, columns=None if columns is None else list(columns))


def known_versions(folder: Path) -> dict[str, Manifest]:
    """Return all versions whose manifest this machine has, by digest.

    The current version and its line come first, newest first, then other lines, kept by ``remember``. Raises UserError
    if a manifest of its line is missing or damaged; others are logged.
    """
    manifests = {manifest.digest: manifest for manifest in versions(folder)}
    for path in sorted((work_folder(folder) / "versions").glob("*.json")):
        if path.stem not in manifests:
            data = path.read_bytes()
            try:
                if sha256_bytes(data) != path.stem:
                    raise UserError(f"{path} is damaged: delete it")
                manifests[path.stem] = parse_manifest(data, str(path))
            except UserError as error:
                logger.warning("%s", error)
    return manifests


def remember(folder: Path, manifest: Manifest) -> None:
    """Record a version on this machine, whichever becomes the current one in ``folder``."""
    path = work_folder(folder) / "versions" / f"{manifest.digest}.json"
    if not path.is_file():
        write_bytes(path, manifest_bytes(manifest))


def resolve(folder: Path, prefix: str | None) -> Manifest:
    """Return the version for ``prefix``, None: the current one; raises UserError if it fits none or several."""
    if prefix is None:
        return read_manifest(folder)
    manifests = known_versions(folder)
    candidates = {digest: manifest.content_digest for digest, manifest in manifests.items()}
    return manifests[choose_version(prefix, candidates, folder.name)]


def choose_version(prefix: str, candidates: dict[str, str], name: str) -> str:
    """Return the one of ``candidates``, with their content digests, whose digest or content begins with ``prefix``."""
    digits = prefix.lower()
    if len(digits) < SHORTEST or digits.strip("0123456789abcdef"):
        raise UserError(f"{prefix!r} names no version: give the first {SHORTEST} or more hex digits of its digest")
    matches = [digest for digest in candidates if digest.startswith(digits)]
    if not matches:
        # Versions of equal content differ in history alone: the first is returned.
        by_content = {content: digest for digest, content in reversed(candidates.items())}
        matches = [digest for content, digest in by_content.items() if content.startswith(digits)]
    if len(matches) == 1:
        return matches[0]
    if not candidates:
        raise UserError(f"there is no version of a data set {name}: run `darkroom ingest SOURCE --dataset {name}`")
    descriptions = [f"{digest[:12]} (content {candidates[digest][:12]})" for digest in (matches or candidates)]
    listing = ", ".join(descriptions[:10]) + (f" and {len(descriptions) - 10} more" if len(descriptions) > 10 else "")
    if matches:
        raise UserError(f"{prefix} fits {len(matches)} versions of data set {name}: give more digits of {listing}")
    raise UserError(f"{prefix} is no version of data set {name}: there is {listing}")


def list_quarantine_reasons(versions: Sequence[Manifest], read: ReadTable) -> list[dict[str, str] | None]:
    """Return the reasons of the quarantined entries of each of ``versions`` of a data set, by name, sorted.

    Of all records of a name, the last one counts. None for a version that needs an unavailable table.
    """
    tails = [list(dropwhile(lambda part: not part.outcomes.get("quarantined"), version.parts)) for version in versions]
    parts = {part.records.name: part for tail in tails for part in tail}
    records: dict[str, list[tuple[str, str]]] = {}
    names: set[str] = set()
    for name, part in sorted(parts.items(), key=lambda item: item[1].number):
        if (table := read(part, ("source", "outcome", "reason"))) is not None:
            outcomes = zip(*(table[column].to_pylist() for column in table.column_names), strict=True)
            rows = [(source, reason if outcome == "quarantined" else "") for source, outcome, reason in outcomes]
            names.update(source for source, reason in rows if reason)
            records[name] = [row for row in rows if row[0] in names]
    reasons: list[dict[str, str] | None] = []
    for tail in tails:
        tables = [records.get(part.records.name) for part in tail]
        by_name = dict(chain.from_iterable(rows or () for rows in tables))
        reasons.append(None if None in tables else {name: by_name[name] for name in sorted(by_name) if by_name[name]})
    return reasons


def _first(entries: dict[str, str], limit: int | None) -> list[QuarantineEntry]:
    return [QuarantineEntry(source=source, reason=reason) for source, reason in islice(entries.items(), limit)]


def log(folder: Path) -> Iterator[Step]:
    """Yield the current version of the data set in ``folder`` and its ancestors, newest first."""
    line: Iterator[Manifest | None] = chain(versions(folder), (None,))
    return (_step(version, parent) for version, parent in pairwise(line) if version is not None)


def history(
    folder: Path, elsewhere: Elsewhere = find_nothing, published: Mapping[str, Manifest] | None = None
) -> list[HistoryEntry]:
    """Return all known and ``published`` versions, line by line, each before its parent; the current line comes first.

    Raises UserError if there is none.
    """
    known = {} if published and not (folder / "manifest.json").is_file() else known_versions(folder)
    manifests = {**known, **(published or {})}
    current = next(iter(known), None)
    parents = {version.parent for version in manifests.values()}
    lines = [[version] for version in manifests.values() if version.digest not in parents]
    for line in lines:
        while (parent := manifests.get(line[-1].parent or "")) is not None:
            line.append(parent)
    lines.sort(key=lambda line: (all(version.digest != current for version in line), -len(line)))
    ordered_versions = list({version.digest: version for line in lines for version in line}.values())
    quarantines = list_quarantine_reasons(
        ordered_versions, lambda part, columns: find_records(folder, part, columns, elsewhere)
    )
    return [
        HistoryEntry(
            **dict(_step(version, manifests.get(version.parent or ""))),
            parent=version.parent,
            current=version.digest == current,
            local=version.digest in known,
            dropped=version.dropped,
            quarantined=None if quarantine is None else len(quarantine),
        )
        for version, quarantine in zip(ordered_versions, quarantines, strict=True)
    ]


def show(folder: Path, version: Manifest, elsewhere: Elsewhere = find_nothing, limit: int | None = None) -> Contents:
    """Return the contents of ``version`` of the data set in ``folder``, with ``limit`` quarantined entries."""
    outcomes: Counter[Outcome] = Counter()
    for part in version.parts:
        outcomes.update(part.outcomes)
    (quarantine,) = list_quarantine_reasons(
        [version], lambda part, columns: find_records(folder, part, columns, elsewhere)
    )
    reasons = None if quarantine is None else Counter(sorted(quarantine.values())).most_common(5)
    curated_parts = [part for part in version.parts if part.outcomes.get("dropped")]
    rows, drops = list[dict[str, str]](), None
    for part in curated_parts:
        if (table := find_records(folder, part, ("source", "outcome", "reason"), elsewhere)) is None:
            break
        rows += table.filter(pc.field("outcome") == "dropped").to_pylist()
    else:
        drops = {row["source"]: row["reason"] for row in sorted(rows, key=itemgetter("source"))}
    rules = None if drops is None else Counter(reason.partition(" = ")[0] for reason in sorted(drops.values()))
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
        buckets=version.buckets,
        near_duplicate_bits=version.near_duplicate_bits,
        splits=version.counts,
        outcomes=dict(sorted(outcomes.items())),
        classes=version.class_histogram,
        shards=len(version.shards),
        shard_bytes=sum(shard.bytes for shard in version.shards),
        sources=version.sources,
        captioners=version.captioners,
        quarantined_count=None if quarantine is None else len(quarantine),
        quarantined=None if quarantine is None else _first(quarantine, limit),
        reasons=reasons and [Reason(reason=reason, count=count) for reason, count in reasons],
        dropped_count=version.dropped,
        dropped=None if drops is None else _first(drops, limit),
        rules=None if rules is None else [Reason(reason=rule, count=count) for rule, count in rules.most_common()],
    )


def find_unshared_parts(version: Manifest, other: Manifest) -> list[Part]:
    """Return the parts of ``version`` that are not in ``other``."""
    other_digests = {part.records.sha256 for part in other.parts}
    return [part for part in version.parts if part.records.sha256 not in other_digests]


def count_kept(part: Part) -> int:
    """Return the number of images of a part."""
    return sum(part.splits.values())


def count_stored(part: Part) -> int:
    """Return the number of images in the shard of a part: those kept, and those dropped by curation."""
    return part.outcomes.get("kept", 0) + part.outcomes.get("dropped", 0)


def _step(version: Manifest, parent: Manifest | None) -> Step:
    """Count the images added and removed by ``version`` since ``parent``."""
    if parent is None:
        added_count, removed_count = version.kept, 0
    elif version.change == "rebuild":
        added_count, removed_count = version.kept, parent.kept
    elif version.change == "compact":
        added_count, removed_count = 0, 0
    else:
        old_counts = {part.number: count_kept(part) for part in find_unshared_parts(parent, version)}
        new_counts = {part.number: count_kept(part) for part in find_unshared_parts(version, parent)}
        changes = [new_counts.get(number, 0) - old_counts.get(number, 0) for number in {*old_counts, *new_counts}]
        added_count, removed_count = sum(n for n in changes if n > 0), -sum(n for n in changes if n < 0)
    return Step(
        digest=version.digest,
        content_digest=version.content_digest,
        change=version.change,
        added=added_count,
        removed=removed_count,
        kept=version.kept,
    )


class Sample(Config):
    """An image as recorded in a version; of one that was taken down little more than its key is known."""

    key: str
    source: str | None = None
    split: str | None = None
    label: str | None = None
    caption: str | None = None
    reason: str | None = None
    """The rule of curation that dropped it."""


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
        if table is None and not part.outcomes.get("dropped") and (curated_part := _curated_part(part, before, after)):
            table = find_records(folder, curated_part, columns, elsewhere)
            table = None if table is None else _undo_drops(table)
        if table is None:
            unread_tables.add(part.records.name)
        return table

    old_images, new_images = _images(old_parts, remains, read), _images(new_parts, remains, read)
    old_drops, new_drops = (_images(parts, {}, read, "dropped") for parts in (old_parts, new_parts))
    old_reasons, new_reasons = list_quarantine_reasons([before, after], read)

    def samples(images: pa.Table) -> list[Sample]:
        rows = images.sort_by("key").slice(0, limit).to_pylist()
        return [Sample(**row) for row in rows if row["key"] is not None]

    def only_in(table: pa.Table | None, other: pa.Table | None) -> VersionGroup[Sample] | None:
        if table is None or other is None:
            return None
        images = table.filter(pc.invert(pc.is_in(table["key"], other["key"], skip_nulls=True)))
        return VersionGroup(count=len(images), samples=samples(images))

    def find_changes() -> VersionGroup[SampleChange] | None:
        if old_images is None or new_images is None:
            return None
        # Keys are unique, so equal rows are of the same image.
        old_rows = old_images.filter(pc.is_in(old_images["key"], new_images["key"], skip_nulls=True)).sort_by("key")
        new_rows = new_images.filter(pc.is_in(new_images["key"], old_images["key"], skip_nulls=True)).sort_by("key")
        columns = (
            (pc.fill_null(old_rows[name], ""), pc.fill_null(new_rows[name], ""))
            for name in ("split", "label", "caption")
        )
        mask = reduce(pc.or_, (pc.not_equal(*pair) for pair in columns))
        pairs = zip(samples(old_rows.filter(mask)), samples(new_rows.filter(mask)), strict=True)
        return VersionGroup(
            count=pc.sum(mask).as_py() or 0, samples=[SampleChange(before=b, after=a) for b, a in pairs]
        )

    def entries_only_in(
        reasons: dict[str, str] | None, other: dict[str, str] | None
    ) -> VersionGroup[QuarantineEntry] | None:
        if unread_tables or reasons is None or other is None:
            return None
        entries = {name: reasons[name] for name in reasons if name not in other}
        return VersionGroup(count=len(entries), samples=_first(entries, limit))

    return Difference(
        before=before.digest,
        after=after.digest,
        same_content=before.content_digest == after.content_digest,
        kept=(before.kept, after.kept),
        added=only_in(new_images, old_images),
        removed=only_in(old_images, new_images),
        dropped=only_in(new_drops, old_drops),
        restored=only_in(old_drops, new_drops),
        changed=find_changes(),
        quarantined=entries_only_in(new_reasons, old_reasons),
        cleared=entries_only_in(old_reasons, new_reasons),
        storage=_differences(before.storage.model_dump(), after.storage.model_dump()),
        classes=_differences(before.class_histogram, after.class_histogram, 0),
        unread=sorted(unread_tables),
    )


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
    """Return the part that curation made of ``part``, in whose table nothing is gone, if one of ``versions`` has it."""
    others = (other for version in versions for other in version.parts if other.number == part.number)
    return next((other for other in others if other.outcomes.get("dropped") and other.shard == part.shard), None)


def _undo_drops(table: pa.Table) -> pa.Table:
    """Return the records as they were before curation dropped any."""
    outcome = pc.if_else(pc.equal(table["outcome"], "dropped"), "kept", table["outcome"])
    return table.set_column(table.column_names.index("outcome"), "outcome", outcome)


def _images(parts: list[Part], remains: dict[str, Part], read: ReadTable, outcome: Outcome = "kept") -> pa.Table | None:
    """Return the images of ``parts``, with those that a takedown removed from them; None if a table is unavailable.

    ``remains`` are the parts that takedowns rewrote, by the digest of the table before.
    """
    tables = [pa.schema([RECORDS.field(name) for name in COLUMNS[1:]]).empty_table()]
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
