"""The versions of a data set: which there are, and what each holds."""

import logging
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain, dropwhile, islice, pairwise
from operator import itemgetter
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from diffusion.common.config import Config, is_unset
from diffusion.common.errors import UserError
from diffusion.common.files import sha256_bytes, sha256_file, write_bytes
from diffusion.data.ingest.config import StorageConfig
from diffusion.data.manifest import (
    FileEntry,
    ImageList,
    Manifest,
    Outcome,
    Part,
    Split,
    find_intact_records,
    manifest_bytes,
    parse_manifest,
    read_manifest,
    read_table,
    versions,
    work_folder,
)

logger = logging.getLogger(__name__)

MIN_DIGITS = 4
"""Hex digits that a prefix of a digest must have."""

Elsewhere = Callable[[FileEntry], Path | None]
"""Finds a file that is no longer in the data set's folder, because only older versions name it."""
ReadTable = Callable[[Part, Sequence[str]], pa.Table | None]
"""Reads some columns of a part's records; None if its table is no longer available."""


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
    masks: int | None = Field(None, exclude_if=is_unset)
    """Number of images with a mask; None: none has one."""
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
    """The rules and lists that left them out, the most frequent first."""
    lists: list[ImageList] | None = Field(None, exclude_if=is_unset)
    """Lists of images that curation applies; None: there are none."""
    relabelled: int | None = Field(None, exclude_if=is_unset)
    """Kept and dropped images whose label is a list's; None if there are none."""


def rule_of(reason: str) -> str:
    """Return the rule or the list, as ``list NAME``, that dropped an image for ``reason``."""
    return re.split(" = |: ", reason, maxsplit=1)[0]


def find_nothing(entry: FileEntry) -> None:
    """Find no files outside the data set's folder."""


def find_records(
    folder: Path, part: Part, columns: Sequence[str] | None = None, elsewhere: Elsewhere = find_nothing
) -> pa.Table | None:
    """Read the records of a part of any version; None if its table is neither in ``folder`` nor ``elsewhere``."""
    path = find_table(folder, part, elsewhere)
    return None if path is None else read_table(path, columns)


def find_table(folder: Path, part: Part, elsewhere: Elsewhere = find_nothing) -> Path | None:
    """Return the path of the intact records that ``find_records`` reads; raises UserError if ``folder``'s are not."""
    entry = part.records
    if (folder / entry.name).is_file():
        return find_intact_records(folder, part)
    path = elsewhere(entry)
    return None if path is None or sha256_file(path) != entry.sha256 else path


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
    if len(digits) < MIN_DIGITS or digits.strip("0123456789abcdef"):
        raise UserError(f"{prefix!r} names no version: give the first {MIN_DIGITS} or more hex digits of its digest")
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
    raise UserError(f"{prefix} is not a version of data set {name}: there is {listing}")


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


def first_entries(entries: dict[str, str], limit: int | None) -> list[QuarantineEntry]:
    """Return ``limit`` of ``entries``, the reasons by name; None: all."""
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
    rules = None if drops is None else Counter(map(rule_of, sorted(drops.values())))
    as_recorded = {name: getattr(version, name) for name in Contents.model_fields if hasattr(version, name)}
    return Contents.model_validate(
        as_recorded
        | {
            "dataset": version.name,
            "splits": version.counts,
            "outcomes": dict(sorted(outcomes.items())),
            "classes": version.class_histogram,
            "shards": len(version.shards),
            "shard_bytes": sum(shard.bytes for shard in version.shards),
            "masks": version.masks or None,
            "quarantined_count": None if quarantine is None else len(quarantine),
            "quarantined": None if quarantine is None else first_entries(quarantine, limit),
            "reasons": None if reasons is None else [Reason(reason=reason, count=n) for reason, n in reasons],
            "dropped_count": version.dropped,
            "dropped": None if drops is None else first_entries(drops, limit),
            "rules": None if rules is None else [Reason(reason=rule, count=n) for rule, n in rules.most_common()],
            "relabelled": sum(part.relabelled or 0 for part in version.parts) or None,
        }
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
    else:
        old_counts = {part.number: count_kept(part) for part in find_unshared_parts(parent, version)}
        new_counts = {part.number: count_kept(part) for part in find_unshared_parts(version, parent)}
        changes = [new_counts.get(number, 0) - old_counts.get(number, 0) for number in {*old_counts, *new_counts}]
        added_count, removed_count = sum(n for n in changes if n > 0), -sum(n for n in changes if n < 0)
    fields = {name: getattr(version, name) for name in ("digest", "content_digest", "change", "kept")}
    return Step(**fields, added=added_count, removed=removed_count)
