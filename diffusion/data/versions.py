"""The versions of a data set: what each of them holds, and what changed between two.

A version shares with its parent every part that it did not change, so that only the others are ever compared.
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from diffusion.config import Config
from diffusion.data.config import StorageConfig
from diffusion.data.ingest import work_folder
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
)
from diffusion.data.refusals import Quarantine, Reason, Refusal, standing
from diffusion.errors import UserError
from diffusion.files import sha256_bytes, sha256_file, write_bytes

logger = logging.getLogger(__name__)

SHORTEST = 4
"""Hex digits that a prefix of a digest must have."""
LISTED = 10
"""Versions named in an error."""
LEADING = 5
"""Reasons shown of those for which pictures were refused."""

Elsewhere = Callable[[FileEntry], Path | None]
"""Finds a file that is no longer in the data set's folder, because only older versions name it."""


class Step(Config):
    """A version, and what it changed."""

    digest: str
    content_digest: str
    change: str
    added: int
    """Pictures that its parent lacks; a rebuild makes all of them anew."""
    removed: int
    """Pictures of its parent that it lacks."""
    kept: int


class LogEntry(Step):
    """A version in the line of its data set."""

    quarantined: int
    """Entries refused when they were read, even if a later ingest could use them."""


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
    quarantined: list[Refusal] | None
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


def log(folder: Path) -> Iterator[LogEntry]:
    """The current version of the data set in ``folder`` and all it was made from, newest first."""
    line = versions(folder)
    version = next(line)
    for parent in chain(line, (None,)):
        added, removed = _moved(parent, version)
        yield LogEntry(
            digest=version.digest,
            content_digest=version.content_digest,
            change=version.change,
            added=added,
            removed=removed,
            kept=version.kept,
            quarantined=sum(part.outcomes.get("quarantined", 0) for part in version.parts),
        )
        if parent is not None:
            version = parent


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
            digest=version.digest,
            content_digest=version.content_digest,
            change=version.change,
            **dict(zip(("added", "removed"), _moved(known.get(version.parent or ""), version), strict=True)),
            kept=version.kept,
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
    quarantine = _quarantine(folder, version, elsewhere, limit)
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
    """Pictures of a part."""
    return sum(part.splits.values())


def _moved(parent: Manifest | None, version: Manifest) -> tuple[int, int]:
    """How many pictures came and went."""
    if parent is None:
        return version.kept, 0
    if version.change == "rebuild":
        return version.kept, parent.kept
    before = {part.number: kept_in(part) for part in unshared(parent, version)}
    after = {part.number: kept_in(part) for part in unshared(version, parent)}
    grown = [after.get(number, 0) - before.get(number, 0) for number in {*before, *after}]
    return sum(n for n in grown if n > 0), -sum(n for n in grown if n < 0)


def _quarantine(folder: Path, version: Manifest, elsewhere: Elsewhere, limit: int | None) -> Quarantine | None:
    (quarantine,) = standing([version], lambda part, columns: find_records(folder, part, columns, elsewhere), limit)
    return quarantine
