"""Merge: prepared chunks become parts of the data set in order, each checked against all before it."""

import os
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from diffusion.common.config import Config
from diffusion.common.errors import ConflictError
from diffusion.common.files import make_folder, sync_file, sync_folder, write_atomically, write_bytes
from diffusion.common.shapes import Shape, parse_shape
from diffusion.data.ingest.config import IngestConfig
from diffusion.data.ingest.decode import MASK_PROBLEM
from diffusion.data.ingest.index import Index, explain_database_errors
from diffusion.data.ingest.staging import (
    ChunkFolder,
    ChunkStore,
    Digests,
    ShardPublisher,
    StagedShard,
    read_chunk,
)
from diffusion.data.manifest import (
    CAPTIONER,
    LABELLED_BY,
    MASK,
    MASK_SIZE,
    OPTIONAL,
    RECORDS,
    STORED,
    FileEntry,
    Manifest,
    Part,
    Totals,
    manifest_bytes,
    read_manifest,
    read_records,
    sample_digest,
    version_path,
    versions,
    work_folder,
)
from diffusion.data.shards import NEW_MASK, mask_offset, shard_file, write_samples
from diffusion.data.versions.image_lists import forget_images, unite_lists
from diffusion.data.versions.versions import remember


def split_of(key: str, held_out: float) -> str:
    """Return the split of an image: a function of its content alone, so it never changes."""
    return "held_out" if int(key[:16], 16) < held_out * 2**64 else "train"


@dataclass
class Merge:
    """Merges chunks into the data set in ``folder``; ``index`` must describe ``parts`` and is inside a transaction."""

    folder: Path
    config: IngestConfig
    index: Index
    origin: str
    parts: list[Part]
    source: str | None = None
    """Versioned source of the new images."""
    chunks: ChunkStore | None = None
    """Where prepared chunks are; None: in the work folder."""
    publisher: ShardPublisher | None = None
    """Publishes the shards; None: they become files of ``folder``."""
    names: list[str] = field(default_factory=list)
    """Names of the chunks that were added."""
    read: int = 0
    """Entries read so far, with any outcome."""
    reasons: Counter[str] = field(default_factory=Counter)
    """Reasons of quarantined entries, without those quarantined for the same reason before."""
    new_outcomes: Counter[str] = field(default_factory=Counter)
    """Outcomes of the new entries; ``known``: of entries that were read for their mask alone."""
    relabelled: int = 0
    """Number of duplicates among them with another label, caption or mask."""
    remasked: int = 0
    """Number of images of earlier ingests that got another mask."""
    mask_problems: dict[str, str] = field(default_factory=dict)
    """Why the new mask of an image cannot be used, which keeps its old one, by its name; the first thousand."""

    def add(self, name: str) -> None:
        """Determine the outcome of each image of the prepared chunk ``name``; new ones become a part per bucket."""
        self.names.append(name)
        shards, rows = read_chunk(self.chunk_store, name)
        places = {bucket: place for place, bucket in enumerate(shards)}
        # In the order of the parts, by which an index that is built again groups near-duplicates.
        rows.sort(key=lambda row: places.get(row["bucket"], 0))
        records = []
        self._look_up([row for row in rows if row["outcome"] != "known"])
        for row in rows:
            # Its duplicates, with any bytes, may come before it.
            if row["key"] is not None and self.index.is_removed(row["source_sha256"]):
                self.index.refuse(row["key"])
        for row in rows:
            self.index.stamp(self.origin, row)
            shard = shards[row["bucket"]].name if row["offset"] is not None else None
            if row["outcome"] != "known" and self._classify(row, shard):
                self.index.record(row)
                records.append(row)
        self.index.flush()
        self.read += len(rows)
        buckets = list(dict.fromkeys(row["bucket"] for row in records if row["outcome"] == "kept"))
        for bucket in buckets:
            # Records without an image of their own come first, unless they are duplicates of an image in this chunk.
            members = [row for row in records if (row["bucket"] if row["bucket"] in buckets else buckets[0]) == bucket]
            shape = parse_shape(bucket) if self.config.buckets else None
            self._append(members, shards[bucket], self.source, shape)
        if not buckets:
            self._append(records, None, self.source)

    def adopt(self, local: Manifest, base: Manifest | None) -> int:
        """Add what another version has and neither this one nor ``base``; returns how many duplicates of lost images.

        A mask that is neither this version's nor the base's replaces this one's.
        """
        base_masks = {
            row["key"]: row.get(MASK.name)
            for part in (rewritten_parts(local, base) if base else ())
            for row in read_records(self.folder, part).to_pylist()
            if row["outcome"] in STORED
        }
        shared_digests = {part.records.sha256 for part in (*self.parts, *(base.parts if base else ()))}
        local_parts = [part for part in local.parts if part.records.sha256 not in shared_digests]
        lost_count = sum(self._adopt_part(part, base_masks) for part in local_parts)
        self.replace_masks()
        return lost_count

    def _adopt_part(self, part: Part, base_masks: Mapping[str, str | None]) -> int:
        rows = read_records(self.folder, part).to_pylist()
        stored_rows = [row for row in rows if row["outcome"] in STORED]
        self.index.add_hashes(self.folder, part, rows)
        self._look_up(rows)
        records, lost_count = [], 0
        for row in stored_rows:
            mask = row.get(MASK.name)
            sample = self.index.sample(row["key"])
            own_mask = None if sample is None else sample.mask
            if mask not in (base_masks.get(row["key"], mask), own_mask) and part.shard is not None:
                self.index.add_new_mask(row, str((self.folder / part.shard.name).resolve()))
        for row in rows:
            if row["outcome"] == "removed":
                is_recorded = not self._is_known_as_removed(row)
            elif self.index.has_image(row["source"], row["source_sha256"]):
                is_recorded = False
            elif row["outcome"] == "duplicate" and self.index.sample(row["key"]) is None:
                # Its pixels are in a part that this version no longer has.
                is_removed = self.index.is_removed(row["key"], row["source_sha256"])
                is_recorded, lost_count = is_removed and self._classify(row), lost_count + (not is_removed)
            else:
                is_recorded = self._classify(row)
            if is_recorded:
                self.index.record(row)
                records.append(row)
        self.index.flush()
        shard = None
        if part.shard is not None:
            offsets = [row["offset"] for row in stored_rows]
            digests = Digests(part.shard.sha256, part.shard.bytes)
            shard = StagedShard(str((self.folder / part.shard.name).resolve()), digests, offsets)
        self._append(records, shard, part.source, part.shape)
        return lost_count

    def _look_up(self, rows: Sequence[dict[str, Any]]) -> None:
        """Look up in the index, at once, what decides the outcomes of ``rows``."""
        self.index.look_up(rows)
        new_rows = [row for row in rows if row["phash"] is not None and self.index.sample(row["key"]) is None]
        self.index.expect_hashes([row["phash"] for row in new_rows])

    def _classify(self, row: dict[str, Any], shard: str | None = None) -> bool:
        """Determine the outcome of an image, which ``shard`` holds if it is prepared; returns whether to record it."""
        if self.index.is_removed(row["key"], row["source_sha256"]):
            self.new_outcomes["removed"] += 1
            is_known = self._is_known_as_removed(row)
            # Its other files are rejected by their own digests, which are independent of how images are stored.
            row |= redact_row(row, "came again after it was taken down")
            return not is_known
        if row["key"] is not None:
            self._classify_image(row, shard)
            if row["outcome"] == "duplicate" and row["reason"] is None and self._is_read_for_mask(row):
                self.new_outcomes["known"] += 1
                return False
        if row["outcome"] == "quarantined":
            if row["reason"].startswith(MASK_PROBLEM) and self._is_read_for_mask(row):
                if len(self.mask_problems) < 1000:
                    self.mask_problems[row["source"]] = row["reason"]
                # Read, and named, again until it is mended.
                self.index.stamp(self.origin, row | {"stamp": ""})
                self.new_outcomes["known"] += 1
                return False
            if self.index.find_outcome(row["source"], row["source_sha256"]) == ("quarantined", row["reason"]):
                return False
            # Some contain sizes and server messages, and may be as many as the images.
            is_known = len(self.reasons) < 10_000 or row["reason"] in self.reasons
            self.reasons[row["reason"] if is_known else "other reasons"] += 1
        self.new_outcomes[row["outcome"]] += 1
        return True

    def _is_read_for_mask(self, row: dict[str, Any]) -> bool:
        """Whether an image is recorded already, so that only its mask, or the setting for masks, may be new."""
        if not row.get("mask_source") and not self.index.has_masks:
            return False
        return self.index.has_image(row["source"], row["source_sha256"])

    def _is_known_as_removed(self, row: dict[str, Any]) -> bool:
        return all(self.index.is_removed(digest) for digest in (row["key"], row["source_sha256"]) if digest)

    def _classify_image(self, row: dict[str, Any], shard: str | None) -> None:
        sample = self.index.sample(row["key"])
        if sample is not None:
            mask = sample.mask
            new_digest = sample_digest(row["key"], sample.split, row["label"], row["caption"], mask)
            is_same = new_digest in (sample.digest, sample.digest_as_given)
            reason = None if is_same else "came again with another label or caption"
            if self.config.masks is not None and row.get(MASK.name) != mask:
                if shard is not None and row.get("mask_source") is not None:
                    self.index.add_new_mask(row, shard)
                elif not self._is_read_for_mask(row):  # a mask that vanished stays
                    is_same, reason = False, "came again with another mask"
            if row["outcome"] == "duplicate":
                # The place of its first copy in the chunk.
                row |= {"offset": None, "size": None}
            row |= {"outcome": "duplicate", "reason": reason, "leader": None, MASK.name: None, MASK_SIZE.name: None}
            self.relabelled += not is_same
            return
        # Of another version's images those that its rules dropped stay so, until rules are applied here.
        outcome = "dropped" if row["outcome"] == "dropped" else "kept"
        row |= {"outcome": outcome, "split": split_of(row["key"], self.config.held_out), "near": None}
        if self.index.near is not None and (groups := self.index.groups_near(row["phash"])):
            if len({split for _, split in groups}) > 1:
                row |= {"outcome": "quarantined", "reason": "a near-copy of images in both splits", "split": None}
            else:
                (root, split), *_ = groups
                row |= {"split": split, "near": [root.hex()]}

    def publish_shards(self) -> None:
        """Publish the shards of the chunks that were added, if they do not lie in the data set's folder."""
        if self.publisher is not None:
            self.publisher.publish(self.parts)

    def replace_masks(self) -> None:
        """Replace the masks of images that came again under their own name with another one, in shards and records."""
        for place, part in enumerate(self.parts):
            if part.shard is None or not self.index.has_new_masks:
                continue
            rows, changed = read_records(self.folder, part).to_pylist(), 0
            stored_rows = [row for row in rows if row["outcome"] in STORED]
            for row in stored_rows:
                if (new_mask := self.index.take_new_mask(row["key"], row["source"])) is None:
                    continue
                mask, (shard, offset, size, mask_size) = new_mask
                png = self.chunk_store.read_span(shard, mask_offset(offset, size), mask_size) if mask_size else b""
                row |= {MASK.name: mask, MASK_SIZE.name: mask_size, NEW_MASK: png}
                self.index.describe(row)
                changed += 1
            if changed:
                with shard_file(self.folder, part.shard, self.index.store) as file:
                    new_shard = copy_samples(self.folder, part.number, [(file, stored_rows)])
                self.parts[place] = rewrite_part(self.folder, part, rows, self.config.size, new_shard)
            self.remasked += changed
        # The masks of copies under other names.
        self.relabelled += self.index.forget_new_masks()

    @property
    def chunk_store(self) -> ChunkStore:
        """Where prepared chunks are."""
        return self.chunks or ChunkFolder(work_folder(self.folder))

    def _append(
        self,
        records: list[dict[str, Any]],
        staged: StagedShard | None,
        source: str | None,
        shape: Shape | None = None,
    ) -> None:
        """Append a part of ``records``, whose shard is ``staged``, or a part of it."""
        if not records:
            return
        number, shard = self.parts[-1].number + 1 if self.parts else 0, None
        stored_rows = [row for row in records if row["outcome"] in STORED]
        if staged is not None and stored_rows:
            if self.publisher is not None:
                shard = self.publisher.add(number, staged, stored_rows)
            else:
                file = ChunkFolder(work_folder(self.folder)).path(staged.name)
                if len(stored_rows) == len(staged.offsets):
                    staging_path = self.folder / "shards" / f".{number:05d}.tar"
                    shard = link_file(self.folder, file, staging_path, staged.digests.sha256)
                else:
                    shard = copy_samples(self.folder, number, [(file, stored_rows)])
        self.parts.append(write_part(self.folder, number, shard, records, self.config.size, source, shape))


def link_file(folder: Path, source: Path, staging_path: Path, digest: str) -> FileEntry:
    """Make ``source`` a file of the data set in ``folder``, without a copy where the file system has links."""
    make_folder(staging_path.parent)
    staging_path.unlink(missing_ok=True)
    try:
        os.link(source, staging_path)
    except OSError:
        shutil.copyfile(source, staging_path)
    sync_file(staging_path)
    return _rename(folder, staging_path, digest)


def copy_samples(folder: Path, number: int, shards: Sequence[tuple[Path, list[dict[str, Any]]]]) -> FileEntry | None:
    """Write shard ``number`` as ``write_samples`` does; None without ``shards``."""
    if not shards:
        return None
    staging_path = folder / "shards" / f".{number:05d}.tar"
    digest = write_atomically(staging_path, lambda partial: write_samples(partial, shards))
    return _rename(folder, staging_path, digest)


def write_part(
    folder: Path,
    number: int,
    shard: FileEntry | None,
    records: list[dict[str, Any]],
    size: int,
    source: str | None = None,
    shape: Shape | None = None,
) -> Part:
    """Write part ``number``: a table of rows of RECORDS, and a shard of images of ``shape``; None: ``size`` squared."""
    height, width = shape or (size, size)
    staging_path = folder / "records" / f".{number:05d}.parquet"
    optional_fields = [field for field in OPTIONAL if any(row.get(field.name) for row in records)]
    table = pa.Table.from_pylist(records, pa.schema([*RECORDS, *optional_fields]))
    digest = write_atomically(staging_path, lambda partial: pq.write_table(table, partial, compression="zstd"))
    kept_rows = [row for row in records if row["outcome"] == "kept"]
    train = [row for row in kept_rows if row["split"] == "train"]
    # A grey image counts for all three channels.
    sums = {
        name: np.array([row[name] * (3 // len(row[name])) for row in train], np.int64).reshape(-1, 3).sum(0).tolist()
        for name in ("total", "squares")
    }
    return Part(
        number=number,
        records=_rename(folder, staging_path, digest),
        shard=shard,
        outcomes=_counts(records, "outcome"),
        splits=_counts(kept_rows, "split"),
        classes=_counts(kept_rows, "label"),
        modes=_counts(kept_rows, "mode"),
        totals=Totals(pixels=len(train) * height * width, **sums),
        source=source,
        shape=shape if shard is not None else None,
        captioners=_counts(kept_rows, CAPTIONER.name) or None,
        masks=sum(row.get(MASK.name) is not None for row in kept_rows) or None,
        relabelled=sum(bool(row.get(LABELLED_BY.name)) for row in records if row["outcome"] in STORED) or None,
    )


def rewrite_part(folder: Path, part: Part, records: list[dict[str, Any]], size: int, shard: FileEntry | None) -> Part:
    """Write ``part`` with other ``records`` and another ``shard``."""
    return write_part(folder, part.number, shard, records, size, part.source, part.shape)


def redact_row(row: dict[str, Any], reason: str) -> dict[str, Any]:
    """Reduce the row of an image that was taken down to the digests by which it is rejected."""
    digests = {name: row[name] or "" for name in ("key", "source_sha256")}
    names = (*RECORDS.names, *(field.name for field in OPTIONAL))
    return dict.fromkeys(names) | digests | {"outcome": "removed", "reason": reason, "source": ""}


def _counts(rows: list[dict[str, Any]], column: str) -> dict[str, int]:
    return dict(sorted(Counter(row[column] for row in rows if row.get(column) is not None).items()))


def _rename(folder: Path, staging_path: Path, digest: str) -> FileEntry:
    """Rename a finished file of the data set to its final name, which contains its digest."""
    path = staging_path.with_name(f"{staging_path.stem[1:]}-{digest[:16]}{staging_path.suffix}")
    staging_path.replace(path)
    # Two names of one file are not merged by a rename.
    staging_path.unlink(missing_ok=True)
    sync_folder(path.parent)
    return FileEntry(name=path.relative_to(folder).as_posix(), sha256=digest, bytes=path.stat().st_size)


class Union(Config):
    """Union of two lines of versions."""

    version: Manifest
    added: int
    """Number of images that the other line lacked."""
    lost: int
    """Number of records of duplicates whose image the other line removed, which are in neither."""


def rewritten_parts(local: Manifest, base: Manifest) -> list[Part]:
    """Return the parts of ``base`` that ``local`` replaced, whose records say which masks are new; none without any."""
    if not (local.masks or base.masks):
        return []
    digests = {part.records.sha256 for part in local.parts}
    return [part for part in base.parts if part.shard is not None and part.records.sha256 not in digests]


def merge_versions(folder: Path, config: IngestConfig, remote: Manifest, base: Manifest | None) -> Union:
    """Make a version based on ``remote`` with the additions of the current version in ``folder`` to ``base``.

    Two machines that ingest into ``base``, the newest common ancestor if there is one, create two lines of versions.
    All files of ``remote``, the manifests of its ancestors and the records of ``rewritten_parts`` lie in ``folder``.
    The caller holds the data set's lock. A mask that is new here replaces the one of ``remote``.

    Repeated after a kill it gives the same result: the manifest is written last.

    Raises ConflictError if the two store images in different ways, or the local one is a rebuild.
    """
    local = read_manifest(folder)
    line = takewhile(lambda version: base is None or version.digest != base.digest, versions(folder))
    conflict = (
        f"another process was first: the newest version of data set {folder.name} is {remote.digest[:12]} by now, and"
    )
    advice = f"`darkroom data checkout {remote.digest[:12]} --dataset {folder.name}`, then ingest again"
    if any(version.change == "rebuild" for version in line):
        raise ConflictError(
            f"{conflict} {local.digest[:12]} here is a rebuild: give the command with --rebuild again to publish it "
            f"all the same, or to add to it {advice}"
        )
    if difference := remote.find_storage_difference(local.storage):
        name, remote_value, local_value = difference
        raise ConflictError(
            f"{conflict} stores images with ingest.{name}={remote_value}, while {local.digest[:12]} here has "
            f"{local_value}: give another --dataset, or to add to it {advice} with that"
        )
    recorded_bits = local.near_duplicate_bits if remote.near_duplicate_bits is None else remote.near_duplicate_bits
    bits = config.near_duplicate_bits(recorded_bits)
    config = config.model_copy(update=dict(remote.storage) | {"near_duplicates": bits})
    work = work_folder(folder)
    with (
        explain_database_errors(work),
        closing(Index(work / "index.sqlite", folder, remote, bits)) as index,
        index.transaction(),
    ):
        merge = Merge(folder, config, index, "", list(remote.parts))
        lost_count = merge.adopt(local, base)
        united_lists = unite_lists(folder.name, remote.lists, local.lists, base.lists if base else None)
        after, lists = remote, forget_images(folder, united_lists, index.is_removed)
        if merge.parts != remote.parts or lists != remote.lists:
            after = Manifest(
                name=folder.name,
                parent=remote.digest,
                change=f"union with {local.digest[:12]}",
                content_digest="",
                storage=remote.storage,
                licence=remote.licence or local.licence,
                near_duplicate_bits=recorded_bits,
                lists=lists,
                parts=merge.parts,
            )
            after = after.model_copy(update={"content_digest": index.content_digest(after)})
            write_bytes(version_path(folder, remote.digest), manifest_bytes(remote))
        remember(folder, local)
        write_bytes(folder / "manifest.json", manifest_bytes(after))
        index.set_version(after)
    return Union(version=after, added=merge.new_outcomes["kept"], lost=lost_count)
