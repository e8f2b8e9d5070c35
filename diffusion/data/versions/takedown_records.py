"""Takedown records: the selection, the removed images, and the versions of a data set that held them."""

import fnmatch
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

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
    copies = find_dropped_copies(folder, manifest)
    for _, row in rows_of(folder, manifest, SELECTED_BY):
        if selector.matches(row) and row["key"]:
            if row["outcome"] == "removed":
                digests[row["key"]] = row["source_sha256"]
            else:
                keys.add(row["key"])
    unmatched = selector.list_unmatched()
    copy_keys = sorted({copy for key in keys for copy in copies.get(key, ())} - keys)
    keys.update(copy_keys)
    rows = [(part, row) for part, row in rows_of(folder, manifest, SELECTED_BY) if selector.removes(row, keys)]
    outcomes = Counter(row["outcome"] for _, row in rows)
    matches = MatchedImages(
        image_keys=sorted(keys if rows else digests),
        digests=sorted({row["source_sha256"] for _, row in rows} - {""} if rows else {*digests.values()} - {""}),
        images=sum(outcomes[outcome] for outcome in STORED),
        duplicates=outcomes["duplicate"],
        refused=outcomes["quarantined"],
        near_copies=_near_copies(folder, manifest, keys) if rows else [],
        dropped_copies=copy_keys or None,
        parts=sorted({part.number for part, _ in rows}),
    )
    return matches, sorted({row["source"] for _, row in rows}), unmatched


def find_dropped_copies(folder: Path, manifest: Manifest) -> dict[str, list[str]]:
    """Return the keys of the images that curation dropped as near-duplicates, by the key of the image kept instead."""
    copies: dict[str, list[str]] = {}
    for part in manifest.parts:
        if part.outcomes.get("dropped"):
            for row in read_records(folder, part, ("key", "outcome", "leader")).to_pylist():
                if row["outcome"] == "dropped" and row["leader"]:
                    copies.setdefault(row["leader"], []).append(row["key"])
    return copies


def _near_copies(folder: Path, manifest: Manifest, keys: set[str]) -> list[str]:
    """Return the images in the same groups of near-duplicates as the images of ``keys``."""
    groups, columns = set(keys), ("key", "near", "outcome", "leader")
    for _, row in rows_of(folder, manifest, columns):
        if row["key"] in keys:
            groups |= _near_keys(row)
    return sorted(
        row["key"]
        for _, row in rows_of(folder, manifest, columns)
        if row["outcome"] in STORED and row["key"] not in keys and groups & {row["key"], *_near_keys(row)}
    )


def _near_keys(row: Row) -> set[str]:
    """Return the keys of the images of which the image in ``row`` is a near-duplicate."""
    return {*(row["near"] or ()), row["leader"]} - {None}


def rows_of(folder: Path, manifest: Manifest, columns: Sequence[str]) -> Iterator[tuple[Part, Row]]:
    """Yield the records of a version with their parts."""
    for part in manifest.parts:
        yield from ((part, row) for row in read_records(folder, part, columns).to_pylist())


def is_one_of(row: Row, keys: set[str], digests: set[str]) -> bool:
    """Return whether ``row`` is there and has one of ``keys``, or without a key one of ``digests``."""
    return row["outcome"] != "removed" and (row["key"] in keys if row["key"] else row["source_sha256"] in digests)


def no_match_error(unmatched: Sequence[str], folder: Path, manifest: Manifest) -> UserError:
    """Return the error for keys and patterns that match nothing."""
    terms = ", ".join(unmatched[:5]) + (f" and {len(unmatched) - 5} more" if len(unmatched) > 5 else "")
    names = [
        row["source"] for _, row in rows_of(folder, manifest, ("source", "outcome")) if row["outcome"] != "removed"
    ]
    suggestions = [f"*/{pattern}" for pattern in unmatched if fnmatch.filter(names, f"*/{pattern}")]
    if suggestions:
        hint = " ".join(f"'{pattern}'" for pattern in suggestions[:5])
        return UserError(f"data set {folder.name} has no image of {terms}: did you mean {hint}?")
    examples = ", ".join(f"{name!r}" for name in names[:: max(len(names) // 3, 1)][:3])
    return UserError(
        f"data set {folder.name} has no image of {terms}: its names are like {examples}; all are in the tables in "
        f"{folder / 'records'}"
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
    digests = {*removal.image_keys, *removal.digests}
    hits: dict[str, bool | None] = dict.fromkeys(removal.tables, True)
    held_digests, unknown_digests = [], []
    for version in versions:
        for part in version.parts:
            if count_stored(part) and part.records.sha256 not in hits:
                table = find_records(folder, part, ("outcome", "key", "source_sha256"), elsewhere)
                hits[part.records.sha256] = None if table is None else not digests.isdisjoint(_stored_digests(table))
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
    digests, keys, is_complete = pa.array([*removal.image_keys, *removal.digests], pa.string()), list[str](), True
    for part in filter(count_stored, version.parts):
        if (table := find_records(folder, part, ("outcome", "key", "source_sha256"), elsewhere)) is None:
            is_complete = False
            continue
        is_match = pc.or_(*(pc.is_in(table[name], digests) for name in ("key", "source_sha256")))
        keys += table.filter(pc.and_(is_match, pc.is_in(table["outcome"], pa.array(STORED))))["key"].to_pylist()
    return sorted(keys), is_complete


def _stored_digests(records: pa.Table) -> set[str]:
    """Return the keys of kept and dropped images and the digests of their files."""
    rows = records.filter(pc.field("outcome").isin(STORED))
    return {*rows["key"].to_pylist(), *rows["source_sha256"].to_pylist()}


def find_pending_removals(folder: Path, removals: Sequence[Removal]) -> list[Removal]:
    """Return the ``removals`` of which the current version has images; raises UserError for a damaged table."""
    if not removals:
        return []
    digests: set[str] = set()
    for part in read_manifest(folder).parts:
        if count_stored(part):
            digests |= _stored_digests(read_records(folder, part, ("outcome", "key", "source_sha256")))
    return [removal for removal in removals if not digests.isdisjoint([*removal.image_keys, *removal.digests])]
