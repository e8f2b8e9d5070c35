"""Compaction: runs of small parts, left by many small ingests, become parts of the size that one ingest makes."""

from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from filelock import FileLock

from diffusion.common.config import Config
from diffusion.common.escaping import pluralize
from diffusion.common.progress import Progress, ignore_progress
from diffusion.data.fan_out import make_fan_out
from diffusion.data.ingest.chunks import TEXT_OF_A_CHUNK, chunk_size
from diffusion.data.ingest.config import IngestConfig
from diffusion.data.ingest.ingest import remove_strays
from diffusion.data.ingest.merge import copy_samples, rewrite_part
from diffusion.data.manifest import (
    STORED,
    Part,
    find_intact,
    read_manifest,
    read_records,
    require_whole,
    work_folder,
    write_manifest,
)


@dataclass(frozen=True)
class AdjacentParts:
    """Consecutive parts of the data set in ``folder`` that become one; ``size`` is the size of its images in pixels."""

    folder: Path
    size: int
    parts: list[Part]


class CompactionResult(Config):
    """A data set after its compaction."""

    dataset: str
    changed: bool
    """Whether there were small parts to join."""
    digest: str
    content_digest: str
    shards: tuple[int, int]
    """Number of shards before and after."""

    def lines(self) -> list[str]:
        """Describe the result."""
        old, new = self.shards
        words = f"{old:,} shards are {new:,} now" if self.changed else f"{pluralize(new, 'shard')}, none too small"
        return [f"{self.dataset}: {words}; version {self.digest[:12]}", f"content {self.content_digest}"]


def compact(folder: Path, config: IngestConfig, progress: Progress = ignore_progress) -> CompactionResult:
    """Make a version of the data set in ``folder`` of the same content, without runs of small parts.

    A part is small if it is less than half as large as parts of a fresh ingest with ``config.shard_bytes``. Only small
    parts next to one another are rewritten, of one source, shape and merged data set each. Locks out ingests; repeated
    after a kill it gives the same bytes, and repeated when it is done no version.

    Raises UserError if a required file is missing or damaged.
    """
    fan_out = make_fan_out(config)
    read_manifest(folder)  # before the lock makes a folder
    with FileLock(work_folder(folder) / "lock"):
        before = read_manifest(folder)
        require_whole(folder, before)
        parts = before.parts
        # Shards shrink by their ends when joined, so that another neighbour may fit.
        while groups := _groups(parts, config):
            parts_by_number = {part.number: part for part in parts}
            joined_parts = fan_out(_join, (AdjacentParts(folder, before.size, group) for group in groups))
            for done, (group, part) in enumerate(zip(groups, joined_parts, strict=True), 1):
                for member in group:
                    del parts_by_number[member.number]
                parts_by_number[part.number] = part
                progress("parts written", done, len(groups))
            parts = [parts_by_number[number] for number in sorted(parts_by_number)]
        after = before
        if parts != before.parts:
            after = before.make_child("compact", parts)
            write_manifest(folder, after)
        remove_strays(folder)
        return CompactionResult(
            dataset=folder.name,
            changed=after is not before,
            digest=after.digest,
            content_digest=after.content_digest,
            shards=(len(before.shards), len(after.shards)),
        )


def _groups(parts: list[Part], config: IngestConfig) -> list[list[Part]]:
    """Return the runs of two and more small parts that become one part each."""
    rows = chunk_size(sum(sum(part.outcomes.values()) for part in parts), config)

    def fill(part: Part) -> float:
        """Return the size of a part as a share of a full one's."""
        size = part.shard.bytes / config.shard_bytes if part.shard is not None else 0.0
        return max(size, sum(part.outcomes.values()) / rows, part.records.bytes / TEXT_OF_A_CHUNK)

    def kind(part: Part) -> tuple[object, ...]:
        return fill(part) < 0.5, part.source, part.shape, part.dataset

    groups: list[list[Part]] = []
    for (is_small, *_), run in groupby(parts, key=kind):
        room = 0.0
        for part in run if is_small else ():
            if fill(part) > room:
                groups.append([])
                room = 1.0
            groups[-1].append(part)
            room -= fill(part)
    return [group for group in groups if len(group) > 1]


def _join(neighbours: AdjacentParts) -> Part:
    folder, first = neighbours.folder, neighbours.parts[0]
    records, shards = [], []
    for part in neighbours.parts:
        rows = read_records(folder, part).to_pylist()
        records += rows
        if part.shard is not None:
            shards.append((find_intact(folder, part.shard), [row for row in rows if row["outcome"] in STORED]))
    return rewrite_part(folder, first, records, neighbours.size, copy_samples(folder, first.number, shards))
