"""Merging of data sets by their parts: no image is read, and parts without duplicates are taken as they are."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
from filelock import FileLock
from pydantic import Field

from diffusion.common.config import Config, is_unset
from diffusion.common.errors import UserError
from diffusion.common.escaping import pluralize
from diffusion.common.progress import Progress, ignore_progress
from diffusion.data.fan_out import make_fan_out
from diffusion.data.ingest.config import IngestConfig
from diffusion.data.ingest.ingest import remove_strays
from diffusion.data.ingest.key_resolution import resolve
from diffusion.data.ingest.merge import copy_samples, link_file, write_part
from diffusion.data.manifest import (
    MASK,
    MASK_SIZE,
    STORED,
    FileEntry,
    ImageList,
    Manifest,
    Part,
    find_intact,
    read_manifest,
    read_records,
    require_whole,
    work_folder,
    write_manifest,
)
from diffusion.data.tables import scratch_folder
from diffusion.data.versions.image_lists import read_lists
from diffusion.data.versions.takedown_records import removals
from diffusion.data.versions.versions import count_stored


class MergeResult(Config):
    """A data set after others were merged into it."""

    dataset: str
    changed: bool
    digest: str
    content_digest: str
    added: int
    """Number of images that it lacked."""
    duplicates: int
    """Number of images of the others that it had, or that came twice."""
    kept: int
    dropped: int | None = Field(None, exclude_if=is_unset)
    """Number of images that the rules of curation left out; None without rules."""

    def lines(self) -> list[str]:
        """Describe the result."""
        drop_note = "" if self.dropped is None else f", {self.dropped:,} dropped by rules"
        return [
            f"{self.dataset}: {pluralize(self.kept, 'image')}, {self.added:,} new, "
            f"{pluralize(self.duplicates, 'duplicate')} left out{drop_note}; version {self.digest[:12]}",
            f"content {self.content_digest}",
        ]


@dataclass(frozen=True)
class _Task:
    """A part of the data set in ``source`` that becomes part ``number`` of that in ``folder``."""

    folder: Path
    source: Path
    part: Part
    number: int
    size: int
    duplicates: np.ndarray
    dataset: str | None
    """Data set that its images came from; None: the one in ``folder``."""


def merge_datasets(
    folder: Path,
    others: Sequence[Path],
    config: IngestConfig,
    progress: Progress = ignore_progress,
) -> MergeResult:
    """Make a version of the data set in ``folder`` with the images of ``others``, which must be stored alike.

    Of equal images the first stays, in the order of the data sets; the result has the content digest of ingests of all
    their sources in this order. Duplicates are found by a database that spills, and each part is the work of one
    worker: memory does not grow with the data sets. Locks out ingests; repeated after a kill it gives the same bytes,
    and once it is done no version.

    Raises UserError if the data sets differ in storage or licence, near-duplicates are grouped, an image of one was
    taken down from another, or a file is damaged.
    """
    fan_out = make_fan_out(config)
    if config.near_duplicates is not None:
        raise UserError(
            "near-duplicates are not looked for between data sets: leave ingest.near_duplicates out, or ingest the "
            "sources into one data set"
        )
    folders = list(dict.fromkeys((folder, *others)))
    before, *rest = (read_manifest(path) for path in folders)
    with ExitStack() as stack:
        for path in sorted(folders):
            stack.enter_context(FileLock(work_folder(path) / "lock"))
        before, *rest = (read_manifest(path) for path in folders)
        for path, manifest in zip(folders, (before, *rest), strict=True):
            _require_alike(before, manifest)
            require_whole(path, manifest)
        parts = _list_parts(folders, (before, *rest))
        scratch = stack.enter_context(scratch_folder(work_folder(folder) / "ranges"))
        removed_digests = frozenset(_removed_digests(folders, parts))
        digest, duplicates = resolve(parts, before.storage, scratch, removed_digests)
        tasks = list(_tasks(folder, before, parts, duplicates))
        new_parts = []
        for done, part in enumerate(fan_out(_take, tasks), 1):
            new_parts.append(part)
            progress("parts merged", done, len(tasks))
        after, lists = before, _join_lists(folders, (before, *rest))
        if new_parts != before.parts or lists != before.lists:
            names = ", ".join(f"{manifest.name} {manifest.digest[:12]}" for manifest in rest)
            after = before.make_child(f"merge of {names}", new_parts, digest)
            after = after.model_copy(update={"lists": lists})
            write_manifest(folder, after)
        remove_strays(folder)
        return MergeResult(
            dataset=folder.name,
            changed=after is not before,
            digest=after.digest,
            content_digest=after.content_digest,
            added=after.kept - before.kept,
            duplicates=len(duplicates),
            kept=after.kept,
        )


def _join_lists(folders: Sequence[Path], manifests: Sequence[Manifest]) -> list[ImageList] | None:
    """Write the lists of all data sets into the first; raises UserError if two have different lists of one name."""
    lists: dict[str, ImageList] = {}
    for folder, manifest in zip(folders, manifests, strict=True):
        for each in read_lists(folder, manifest):
            about, known = each.about, lists.setdefault(each.about.name, each.about)
            each.write(folders[0])
            if (known.kind, known.table) != (about.kind, about.table):
                raise UserError(
                    f"data set {manifest.name} has another list {about.name}: withdraw it with `darkroom data curate "
                    f"--withdraw {about.name} --dataset {manifest.name}`, and record it there with another --name"
                )
    return list(lists.values()) or None


def _list_parts(folders: Sequence[Path], manifests: Sequence[Manifest]) -> list[tuple[Path, Part]]:
    """Return the parts of the first data set, and the others' parts that it lacks and that hold anything, once."""
    parts = [(folders[0], part) for part in manifests[0].parts]
    table_digests = {part.records.sha256 for _, part in parts}
    for folder, manifest in zip(folders[1:], manifests[1:], strict=True):
        for part in manifest.parts:
            if part.records.sha256 not in table_digests and (count_stored(part) or "removed" in part.outcomes):
                table_digests.add(part.records.sha256)
                parts.append((folder, part))
    return parts


def _require_alike(first: Manifest, other: Manifest) -> None:
    if difference := other.find_storage_difference(first.storage):
        name, other_value, first_value = difference
        raise UserError(
            f"data set {other.name} was made with ingest.{name}={other_value} and {first.name} with {first_value}: "
            f"ingest its source again, into {first.name}"
        )
    if other.licence != first.licence:
        raise UserError(
            f"data set {other.name} has licence {other.licence} and {first.name} has {first.licence}: set "
            "ingest.licence to one that covers both, and ingest either again"
        )


def _removed_digests(folders: Sequence[Path], parts: Sequence[tuple[Path, Part]]) -> Iterator[str]:
    """Yield keys and digests of files of images that were taken down."""
    for folder in folders:
        for removal in removals(work_folder(folder)):
            yield from (*removal.image_keys, *removal.digests)
    for folder, part in parts:
        if "removed" in part.outcomes:
            table = read_records(folder, part, ("outcome", "key", "source_sha256")).filter(
                pc.field("outcome") == "removed"
            )
            yield from filter(None, (*table["key"].to_pylist(), *table["source_sha256"].to_pylist()))


def _tasks(
    folder: Path, before: Manifest, parts: Sequence[tuple[Path, Part]], duplicates: np.ndarray
) -> Iterator[_Task]:
    """Yield the parts of the merged data set; those that add nothing to it are left out."""
    number = 0
    edges = np.searchsorted(duplicates["part"], np.arange(len(parts) + 1))
    for index, (source, part) in enumerate(parts):
        part_duplicates = duplicates[edges[index] : edges[index + 1]]
        if index < len(before.parts):
            number = part.number
        elif len(part_duplicates) == count_stored(part) and "removed" not in part.outcomes:
            continue
        else:
            number += 1
        dataset = part.dataset if source == folder else part.dataset or source.name
        dataset = None if dataset == folder.name else dataset
        yield _Task(folder, source, part, number, before.size, part_duplicates, dataset)


def _take(task: _Task) -> Part:
    """Take over a part as it is, or without its duplicates."""
    folder, part = task.folder, task.part
    if not len(task.duplicates):
        if task.source == folder:
            return part
        shard = part.shard and _link(task, part.shard)
        fields = {"number": task.number, "records": _link(task, part.records), "shard": shard, "dataset": task.dataset}
        return part.model_copy(update=fields)
    rows = read_records(task.source, part).to_pylist()
    for row, is_relabelled in task.duplicates[["row", "relabelled"]].tolist():
        reason = "came again with another label or caption" if is_relabelled else None
        rows[row] |= {"outcome": "duplicate", "reason": reason, "leader": None}
        rows[row] |= dict.fromkeys(("split", "offset", "size", MASK.name, MASK_SIZE.name))
    stored_rows = [row for row in rows if row["outcome"] in STORED]
    shards = [(find_intact(task.source, part.shard), stored_rows)] if part.shard is not None and stored_rows else []
    new_shard = copy_samples(folder, task.number, shards)
    return write_part(folder, task.number, new_shard, rows, task.size, part.source, part.shape, task.dataset)


def _link(task: _Task, entry: FileEntry) -> FileEntry:
    """Give a file of the other data set a name in this one, without a copy where the file system has links."""
    source = task.source / entry.name
    staging_path = task.folder / Path(entry.name).parent / f".{task.number:05d}{source.suffix}"
    return link_file(task.folder, source, staging_path, entry.sha256)
