"""Takedown records: the selection, the removed images, and the versions of a data set that held them."""

import fnmatch
import re
from collections import Counter
from collections.abc import Collection, Container, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field, ValidationError

from diffusion.common.config import Config, is_unset
from diffusion.common.errors import UserError
from diffusion.common.files import digest_of, write_json
from diffusion.data.manifest import STORED, Manifest, Part, read_manifest, read_records
from diffusion.data.versions.versions import Elsewhere, count_stored, find_nothing, find_records

MIN_DIGITS = 8
"""Hex digits that a prefix of a key must have."""
Row = dict[str, Any]
SELECTED_BY = ("key", "source", "label", "outcome", "source_sha256")
STORED_COLUMNS = ("outcome", "key", "source_sha256")


class Selection(Config):
    """A selection of images by key, source or label."""

    # Not called keys: what has an attribute of that name is a mapping to Python, and Prefect looks into it so.
    prefixes: list[str] = Field(default_factory=list)
    """Keys, or unique prefixes of keys."""
    sources: list[str] = Field(default_factory=list)
    """Patterns of source names as in a shell: ``*`` matches anything, slashes too."""
    label: str | None = None
    """Restrict the selection to this class."""


class MatchedImages(Config):
    """Images matched by a selection. An image is matched under all its names, so its duplicates are, too."""

    image_keys: list[str]
    """Keys of the images to be removed, ``dropped_copies`` included, sorted."""
    digests: list[str]
    """SHA-256 of the files they came from, sorted."""
    images: int
    duplicates: int
    """Records of the same images under other names."""
    refused: int
    """Records of quarantined entries."""
    near_copies: list[str]
    """Keys of near-duplicates of them, which stay, sorted: those that ingests grouped with them, and the one for which
    curation dropped any of them, with others that it dropped for that one."""
    dropped_copies: list[str] | None = Field(None, exclude_if=is_unset)
    """Keys of images that go with them, sorted: curation had dropped these as their near-duplicates, and would bring
    them back without them. None if there are none."""
    parts: list[int]
    """Numbers of the parts to rewrite; empty if everything selected was removed before."""

    @property
    def name(self) -> str:
        """Return the name of this removal in all records: a digest of the removed images."""
        return digest_of([self.image_keys, self.digests])[:12]


def is_key(text: str) -> bool:
    """Return whether ``text`` has the form of a key or a key prefix."""
    return MIN_DIGITS <= len(text) <= 64 and not text.lower().strip("0123456789abcdef")


class Selector:
    """A compiled selection that is matched against rows; raises UserError if it is empty or malformed."""

    def __init__(self, selection: Selection) -> None:
        if not selection.prefixes and not selection.sources:
            raise UserError("nothing is selected: give keys, or patterns of names ('*' for all)")
        prefixes = [key.lower() for key in selection.prefixes]
        self.prefixes: dict[str, list[str]] = {}
        for key in prefixes:
            if not is_key(key):
                raise UserError(f"{key!r} is not a key: give its first {MIN_DIGITS} to 64 hex digits")
            self.prefixes.setdefault(key[:MIN_DIGITS], []).append(key)
        self.patterns = [(pattern, re.compile(fnmatch.translate(pattern))) for pattern in selection.sources]
        self.label = selection.label
        self.keys_by_term: dict[str, set[str]] = {term: set() for term in (*prefixes, *selection.sources)}
        """Keys that each prefix matched; patterns that matched have an empty one."""

    def find_candidates(self, records: pa.Table) -> pa.Table:
        """Return the rows that may match, by the beginnings of their keys and by their names."""
        prefixes = pa.array(self.prefixes, pa.string())
        is_candidate = pc.is_in(pc.utf8_slice_codeunits(records["key"], 0, MIN_DIGITS), prefixes)
        if self.patterns:
            names = records["source"].to_pylist()
            is_named = [any(pattern.match(name or "") for _, pattern in self.patterns) for name in names]
            is_candidate = pc.or_(is_candidate, pa.array(is_named, pa.bool_()))
        return records.filter(is_candidate)

    def matches(self, row: Row) -> bool:
        """Return whether ``row`` itself is selected."""
        if self.label is not None and row["label"] != self.label and row["outcome"] != "removed":
            return False
        key = row["key"] or ""
        prefix_matches = [prefix for prefix in self.prefixes.get(key[:MIN_DIGITS], ()) if key.startswith(prefix)]
        pattern_matches = [name for name, pattern in self.patterns if row["source"] and pattern.match(row["source"])]
        for term in (*prefix_matches, *pattern_matches):
            self.keys_by_term[term].add(key if term in prefix_matches else "")
        return bool(prefix_matches or pattern_matches)

    def removes(self, row: Row, keys: set[str]) -> bool:
        """Return whether ``row`` is removed along with the images of ``keys``."""
        if row["outcome"] == "removed":
            return False
        return row["key"] in keys if row["key"] else self.matches(row)

    def list_unmatched(self) -> list[str]:
        """Return keys and patterns that matched nothing; raises UserError for a prefix of more than one image."""
        for prefix, keys in self.keys_by_term.items():
            if len(keys) > 1:
                key_list = ", ".join(key[:16] for key in sorted(keys)[:5])
                raise UserError(f"{prefix} is the beginning of {len(keys)} keys ({key_list} …): give more digits")
        return [term for term, keys in self.keys_by_term.items() if not keys]


def match_images(folder: Path, manifest: Manifest, selector: Selector) -> tuple[MatchedImages, list[str], list[str]]:
    """Return the images that ``selector`` matches, all their names, and its keys and patterns that match nothing."""
    keys: set[str] = set()
    digests: dict[str, str] = {}
    for part in manifest.parts:
        for row in selector.find_candidates(read_records(folder, part, SELECTED_BY)).to_pylist():
            if selector.matches(row) and row["key"]:
                if row["outcome"] == "removed":
                    digests[row["key"]] = row["source_sha256"]
                else:
                    keys.add(row["key"])
    unmatched = selector.list_unmatched()
    copy_keys = find_dropped_copies(folder, manifest, keys) - keys
    keys |= copy_keys
    outcomes: Counter[str] = Counter()
    names, file_digests, parts = set[str](), set[str](), set[int]()
    for part, row in rows_with(folder, manifest, SELECTED_BY, keys):
        if selector.removes(row, keys):
            outcomes[row["outcome"]] += 1
            names.add(row["source"])
            file_digests.add(row["source_sha256"])
            parts.add(part.number)
    matches = MatchedImages(
        image_keys=sorted(keys if parts else digests),
        digests=sorted((file_digests if parts else {*digests.values()}) - {""}),
        images=sum(outcomes[outcome] for outcome in STORED),
        duplicates=outcomes["duplicate"],
        refused=outcomes["quarantined"],
        near_copies=_near_copies(folder, manifest, keys) if parts else [],
        dropped_copies=sorted(copy_keys) or None,
        parts=sorted(parts),
    )
    return matches, sorted(names), unmatched


def find_dropped_copies(folder: Path, manifest: Manifest, keys: Collection[str]) -> set[str]:
    """Return the keys of images that curation dropped as near-duplicates of the images of ``keys``, kept instead."""
    leaders, copies = pa.array(keys, pa.string()), set[str]()
    for part in manifest.parts:
        if part.outcomes.get("dropped"):
            rows = read_records(folder, part, ("key", "outcome", "leader"))
            is_copy = pc.and_(pc.equal(rows["outcome"], "dropped"), pc.is_in(rows["leader"], leaders, skip_nulls=True))
            copies.update(rows.filter(is_copy)["key"].to_pylist())
    return copies


def _near_copies(folder: Path, manifest: Manifest, keys: set[str]) -> list[str]:
    """Return the images in the same groups of near-duplicates as the images of ``keys``."""
    columns = ("key", "near", "outcome", "leader")
    groups = keys.union(
        *({*(row["near"] or ()), row["leader"]} for _, row in rows_with(folder, manifest, columns, keys) if row["key"])
    )
    group_keys, copies = pa.array(groups - {None}, pa.string()), set[str]()
    for part in manifest.parts:
        rows = read_records(folder, part, columns).combine_chunks()
        is_near = pc.is_in(pc.list_flatten(rows["near"]), group_keys)
        is_match = np.isin(np.arange(len(rows)), pc.list_parent_indices(rows["near"]).filter(is_near))
        is_match |= pc.or_(*(pc.is_in(rows[name], group_keys) for name in ("key", "leader"))).to_numpy()
        is_match &= pc.is_in(rows["outcome"], pa.array(STORED)).to_numpy()
        copies.update(rows["key"].filter(pa.array(is_match)).to_pylist())
    return sorted(copies - keys)


def rows_of(folder: Path, manifest: Manifest, columns: Sequence[str]) -> Iterator[tuple[Part, Row]]:
    """Yield the records of a version with their parts."""
    for part in manifest.parts:
        yield from ((part, row) for row in read_records(folder, part, columns).to_pylist())


def rows_with(
    folder: Path, manifest: Manifest, columns: Sequence[str], keys: Container[str]
) -> Iterator[tuple[Part, Row]]:
    """Yield the records of a version that have one of ``keys`` or none, with their parts."""
    for part in manifest.parts:
        records = read_records(folder, part, columns)
        is_match = pa.array([not key or key in keys for key in records["key"].to_pylist()], pa.bool_())
        yield from ((part, row) for row in records.filter(is_match).to_pylist())


def is_one_of(row: Row, keys: set[str], digests: set[str]) -> bool:
    """Return whether ``row`` is there and has one of ``keys``, or without a key one of ``digests``."""
    return row["outcome"] != "removed" and (row["key"] in keys if row["key"] else row["source_sha256"] in digests)


def no_match_error(unmatched: Sequence[str], folder: Path, manifest: Manifest) -> UserError:
    """Return the error for keys and patterns that match nothing."""
    terms = ", ".join(unmatched[:5]) + (f" and {len(unmatched) - 5} more" if len(unmatched) > 5 else "")
    counts = [sum(part.outcomes.values()) - part.outcomes.get("removed", 0) for part in manifest.parts]
    step, number, examples = max(sum(counts) // 3, 1), 0, list[str]()
    found: set[str] = set()
    for part, count in zip(manifest.parts, counts, strict=True):
        records = read_records(folder, part, ("source", "outcome"))
        names = records.filter(pc.field("outcome") != "removed")["source"].to_pylist()
        found.update(pattern for pattern in {*unmatched} - found if fnmatch.filter(names, f"*/{pattern}"))
        examples += names[-number % step :: step]
        number += count
    if suggestions := [f"*/{pattern}" for pattern in unmatched if pattern in found]:
        hint = " ".join(f"'{pattern}'" for pattern in suggestions[:5])
        return UserError(f"data set {folder.name} has no image of {terms}: did you mean {hint}?")
    return UserError(
        f"data set {folder.name} has no image of {terms}: its names are like {', '.join(map(repr, examples[:3]))}; "
        f"all are in the tables in {folder / 'records'}"
    )


class Removal(MatchedImages):
    """Record of a completed removal."""

    dataset: str
    request_digest: str = Field(pattern="^[0-9a-f]{16}$")
    """Digest of the selection and the reason, which identifies a repeated request. Part of a file's name."""
    reason: str
    parent: str | None
    """The last version that held the images; None if it is unknown."""
    version: str
    """The first version without them."""
    content_digest: str
    tables: list[str]
    """SHA-256 of the deleted tables that listed these images as kept or dropped, sorted; empty if unknown."""
    already: bool
    """Whether it had been done before."""


def parse_removal(record: bytes | str, where: str) -> Removal:
    """Parse the takedown record at ``where``; raises UserError if it is damaged or of a newer Darkroom."""
    try:
        return Removal.model_validate_json(record)
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(
            f"{where} is not a removal that this Darkroom understands ({'.'.join(map(str, first['loc']))}: "
            f"{first['msg']}): update, or if it is damaged delete it and give that takedown again"
        ) from error


def removals(work: Path, request_digest: str = "") -> list[Removal]:
    """Return the removals recorded in the work folder ``work``: all, or those whose request has this digest."""
    paths = sorted((work / "removals").glob(f"{request_digest}*.json"))
    return [Removal.model_validate_json(path.read_bytes()) for path in paths]


def write_removal(work: Path, removal: Removal) -> None:
    """Record ``removal`` on this machine."""
    write_json(work / "removals" / f"{removal.request_digest}-{removal.name}.json", removal.model_dump(mode="json"))


class AffectedVersions(Config):
    """Versions that held removed images, by digest."""

    held: list[str]
    unknown: list[str]
    """Versions that cannot be checked because a table is unavailable."""


def find_affected_versions(
    folder: Path, removal: Removal, versions: Iterable[Manifest], elsewhere: Elsewhere = find_nothing
) -> AffectedVersions:
    """Return which of ``versions`` hold images of ``removal``, by their keys or the digests of their files."""
    digests = _digests(removal)
    hits: dict[str, bool | None] = dict.fromkeys(removal.tables, True)
    held_digests, unknown_digests = [], []
    for version in versions:
        for part in version.parts:
            if count_stored(part) and part.records.sha256 not in hits:
                table = find_records(folder, part, STORED_COLUMNS, elsewhere)
                hits[part.records.sha256] = None if table is None else len(find_stored(table, digests)) > 0
        answers = {hits[part.records.sha256] for part in version.parts if count_stored(part)}
        if True in answers:
            held_digests.append(version.digest)
        elif None in answers:
            unknown_digests.append(version.digest)
    return AffectedVersions(held=held_digests, unknown=unknown_digests)


def find_held_keys(
    folder: Path, removal: Removal, version: Manifest, elsewhere: Elsewhere = find_nothing
) -> tuple[list[str], bool]:
    """Return the keys of the images of ``removal`` in a version of any data set, and whether all its tables are there.

    Another data set may store the same files in another way, under other keys. Raises UserError for a damaged table.
    """
    digests, keys, is_complete = _digests(removal), list[str](), True
    for part in filter(count_stored, version.parts):
        if (table := find_records(folder, part, STORED_COLUMNS, elsewhere)) is None:
            is_complete = False
            continue
        keys += find_stored(table, digests)["key"].to_pylist()
    return sorted(keys), is_complete


def find_stored(records: pa.Table, digests: pa.Array) -> pa.Table:
    """Return the rows of kept and dropped images whose keys, or the digests of whose files, are in ``digests``."""
    is_match = pc.or_(*(pc.is_in(records[name], digests) for name in ("key", "source_sha256")))
    return records.filter(pc.and_(is_match, pc.is_in(records["outcome"], pa.array(STORED))))


def find_pending_removals(folder: Path, removals: Sequence[Removal]) -> list[Removal]:
    """Return the ``removals`` of which the current version has images; raises UserError for a damaged table."""
    if not removals:
        return []
    digests = pa.concat_arrays([_digests(removal) for removal in removals]).unique()
    held: set[str] = set()
    for part in filter(count_stored, read_manifest(folder).parts):
        rows = find_stored(read_records(folder, part, STORED_COLUMNS), digests)
        held.update(*(rows[name].to_pylist() for name in ("key", "source_sha256")))
    return [removal for removal in removals if not held.isdisjoint([*removal.image_keys, *removal.digests])]


def _digests(removal: Removal) -> pa.Array:
    return pa.array([*removal.image_keys, *removal.digests], pa.string())
