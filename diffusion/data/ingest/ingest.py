"""Ingest: lists a source, plans what is new, prepares it chunk by chunk on any worker and merges the chunks in order.

The manifest is written last; until then the previous version is complete, and nothing refers to added files.
"""

import logging
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

import pyarrow.compute as pc
from filelock import FileLock
from pydantic import Field

from diffusion.common.config import Config, is_unset
from diffusion.common.errors import UserError
from diffusion.common.files import make_folder, remove_partials
from diffusion.common.progress import Progress, ignore_progress
from diffusion.common.shapes import shape_name
from diffusion.data.fan_out import FanOut, make_fan_out
from diffusion.data.ingest.buckets import choose_shapes
from diffusion.data.ingest.calibration import Calibration, calibrate_ingest
from diffusion.data.ingest.captions import CaptionCounts, add_captions
from diffusion.data.ingest.chunks import chunks_of, make_plan, prepare_chunk
from diffusion.data.ingest.config import IngestConfig
from diffusion.data.ingest.index import Index, explain_database_errors
from diffusion.data.ingest.merge import Merge, write_part
from diffusion.data.ingest.staging import ChunkFolder, RemoteDataset, ShardPublisher
from diffusion.data.manifest import (
    Manifest,
    Part,
    measures_folder,
    read_manifest,
    read_records,
    require_whole,
    work_folder,
    write_manifest,
)
from diffusion.data.shards import ShardStore
from diffusion.data.sources import open_source, reader_of
from diffusion.data.sources.base import Access, ObjectStore
from diffusion.data.sources.caption_files import CaptionTally
from diffusion.data.sources.survey import Survey, survey

logger = logging.getLogger(__name__)

Rebuild = Literal["never", "if_different", "always"]
"""When to rebuild the data set from this source alone; ``if_different``: if images are to be stored in another way."""


class QuarantinedError(UserError):
    """Too many entries are quarantined, or all."""


class QuarantineExample(Config):
    """A quarantined entry."""

    source: str
    reason: str
    sha256: str


class IngestResult(Config):
    """The data set after an ingest: the output of ``darkroom ingest --json``."""

    dataset: str
    folder: Path
    content_digest: str
    digest: str
    """Name of the version: the digest of its manifest."""
    changed: bool
    """Whether this ingest created a new version."""
    source: str | None
    """The source with the commit that was read, as hf://datasets/OWNER/NAME@COMMIT, or the scheme and version of the
    package that read it, as SCHEME: PACKAGE VERSION; None: it has no versions."""
    listed: int
    read: int
    """Number of entries of the source, and of those that had to be read."""
    added: int
    removed: int
    """Number of images read but omitted because they were taken down before."""
    relabelled: int
    """Number of images read that the set already has with another label, caption or mask, which stays."""
    masks: int | None = Field(None, exclude_if=is_unset)
    """Number of kept images with a mask; None if none has one."""
    remasked: int | None = Field(None, exclude_if=is_unset)
    """Number of images of earlier ingests that got another mask; None if there are none."""
    mask_problems: dict[str, str] | None = Field(None, exclude_if=is_unset)
    """Why the new mask of an image cannot be used, which keeps its old one, by its name; the first thousand."""
    passed_over: dict[str, int]
    """Number of ignored files without an image's extension, by extension."""
    captions_found: CaptionTally
    """Captions of the source by where they stand, and what beside its images was not understood."""
    kept: int
    duplicates: int
    """Number of names in the data set's records whose pixels were already there."""
    quarantined: list[QuarantineExample]
    """Quarantined entries in the data set's records; the first thousand."""
    quarantined_count: int
    near_duplicates: Calibration | None = Field(None, exclude_if=is_unset)
    """How ``ingest.near_duplicates: auto`` was calibrated; None if it was not, by this ingest."""
    captions: CaptionCounts | None = Field(None, exclude_if=is_unset)
    """What the captioner answered; None if none is configured."""
    dropped: int | None = Field(None, exclude_if=is_unset)
    """Number of images that the rules of curation left out; None without rules."""


def require_same_storage(before: Manifest, config: IngestConfig, rebuild: Rebuild) -> bool:
    """Whether the data set is rebuilt; raises UserError if it stores images in another way and must not be."""
    difference = before.find_storage_difference(config.storage())
    if difference and rebuild == "never":
        name, recorded, configured = difference
        raise UserError(
            f"data set {before.name} was made with ingest.{name}={recorded} and this is {configured}: "
            "give another --dataset, or build it again from this source alone with `darkroom ingest --rebuild`"
        )
    return rebuild == "always" or bool(difference)


def complete_buckets(config: IngestConfig, before: Manifest | None, look: Callable[[], Survey]) -> IngestConfig:
    """Complete a configuration that leaves its buckets open by the buckets of ``before``, or by the data."""
    if config.fit != "bucket" or config.buckets is not None:
        return config
    shapes = before.shapes if before is not None else choose_shapes(look().sizes, config.size)
    return config.model_copy(update={"buckets": tuple(map(shape_name, shapes))})


def origin_of(config: IngestConfig) -> str:
    """Identity of the source, under which the stamps of its entries are known; another revision is the same source."""
    if config.source.startswith("hf:"):
        return re.sub(r"@[^?]*", "", config.source)
    # Another version of a package may read other images from the same bytes.
    reader = reader_of(config.source)
    place = config.source if ":" in config.source else str(Path(config.source).resolve())
    return place if reader is None else f"{place} {reader}"


def ingest(
    folder: Path,
    config: IngestConfig,
    progress: Progress = ignore_progress,
    *,
    requeue: bool = False,
    rebuild: Rebuild = "never",
    objects: ObjectStore | None = None,
    fan_out: FanOut | None = None,
    captions_later: bool = False,
    remote: RemoteDataset | None = None,
) -> IngestResult:
    """Add what is new in ``config.source`` to the data set in ``folder`` (its name is the data set's).

    Equal images, configuration and history give equal bytes. ``requeue`` reads quarantined entries again,
    ``captions_later`` leaves the captioner to ``caption``. A killed run is repeated, and reuses finished chunks.
    With ``remote`` workers leave their chunks there, and no shard comes to ``folder``, where none is needed.

    Raises UserError if the source cannot be understood, no image can be used, more than ``config.max_quarantined``
    of those read are quarantined, or the data set stores its images in another way and ``rebuild`` is ``never``.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is not a folder, and a data set is one: move it away, or give another --dataset")
    fan_out, work = fan_out or make_fan_out(config), work_folder(folder)
    make_folder(work)
    with FileLock(work / "lock"), explain_database_errors(work):
        before = read_manifest(folder) if (folder / "manifest.json").is_file() else None
        rebuilding = before is None or require_same_storage(before, config, rebuild)
        current, recorded_bits, parts = None if rebuilding else before, None, list[Part]()
        if current is not None:
            require_whole(folder, current, without_shards=remote is not None)
            recorded_bits, parts = current.near_duplicate_bits, [*current.parts]
        needs_calibration = config.near_duplicates == "auto" and recorded_bits is None
        bits = None if needs_calibration else config.near_duplicate_bits(recorded_bits)
        with closing(Index(work / "index.sqlite", folder, before, bits, remote)) as index:
            access = Access(config, work / "scratch", objects, listings=work / "listings")
            access.scratch.mkdir(exist_ok=True)
            config = complete_buckets(config, current, lambda: survey(config, access.scratch, objects))
            source, plan, origin = open_source(config.source, access), work / "plan.sqlite", origin_of(config)
            listed_count, planned_count = make_plan(plan, source, origin, index.path, requeue, rebuilding, progress)
            if not listed_count:
                raise _no_images_error(config.source, access.passed_over.total())
            calibration = None
            if needs_calibration:
                calibration = calibrate_ingest(folder, current, plan, planned_count, source, config, progress, remote)
                recorded_bits, bits = calibration.recorded, calibration.bits
                index.update(folder, current, bits)
            config = config.model_copy(update={"near_duplicates": bits})
            merging = config.model_copy(update={"captioner": None}) if captions_later else config
            merge = Merge(folder, merging, index, origin, parts, access.about.get("source") or reader_of(config.source))
            if remote is not None:
                merge.chunks, merge.publisher = remote.chunks, ShardPublisher(remote, fan_out)
            chunks = fan_out(prepare_chunk, chunks_of(plan, config, objects, planned_count, merge.chunk_store))
            facts = _facts(config, before, rebuilding, access.about.get("licence"), recorded_bits)
            with _removing_work(merge):
                after, captions = _merge(merge, before, facts, chunks, planned_count, rebuilding, progress)
            return _make_result(merge, before, after, access, listed_count, calibration, captions)


def caption(
    folder: Path, config: IngestConfig, progress: Progress = ignore_progress, store: ShardStore | None = None
) -> tuple[Manifest, CaptionCounts]:
    """Caption the kept images of the data set in ``folder``, which makes a version if there are new captions.

    An ingest does so by itself; this is for images that rules of curation left. ``store`` has the shards that are not
    in ``folder``. Raises UserError as ``add_captions``.
    """
    assert config.captioner is not None
    work = work_folder(folder)
    with FileLock(work / "lock"), explain_database_errors(work):
        before = read_manifest(folder)
        bits = config.near_duplicate_bits(before.near_duplicate_bits)
        with closing(Index(work / "index.sqlite", folder, before, bits, store)) as index, index.transaction():
            merge = Merge(folder, config, index, "", list(before.parts))
            counts = add_captions(merge, config.captioner, progress)
            after = before
            if merge.parts != list(before.parts):
                after = before.make_child("captions", merge.parts)
                after = after.model_copy(update={"content_digest": index.content_digest(after)})
                write_manifest(folder, after)
            index.set_version(after)
        remove_strays(folder)
    return after, counts


def _no_images_error(source: str, other_files: int) -> UserError:
    others = f" ({other_files} other files)" if other_files else ""
    return UserError(f"no images in {source}{others}: give a source of JPEG, PNG, WebP, GIF, BMP or TIFF images")


def _make_result(
    merge: Merge,
    before: Manifest | None,
    after: Manifest,
    access: Access,
    listed_count: int,
    calibration: Calibration | None,
    captions: CaptionCounts | None,
) -> IngestResult:
    index = merge.index
    if access.captions.warning:
        logger.warning("%s", access.captions.warning)
    return IngestResult(
        dataset=merge.folder.name,
        folder=merge.folder,
        content_digest=after.content_digest,
        digest=after.digest,
        changed=after != before,
        source=merge.source,
        listed=listed_count,
        read=merge.read,
        added=merge.new_outcomes["kept"],
        removed=merge.new_outcomes["removed"],
        relabelled=merge.relabelled,
        masks=after.masks or None,
        remasked=merge.remasked or None,
        mask_problems=merge.mask_problems or None,
        passed_over=dict(access.passed_over.most_common()),
        captions_found=access.captions,
        kept=after.kept,
        duplicates=index.count("duplicate"),
        quarantined=[QuarantineExample(**row) for row in index.list_quarantined(1000)],
        quarantined_count=index.count("quarantined"),
        near_duplicates=calibration,
        captions=captions,
    )


def encodings_folder(folder: Path) -> Path:
    """Return the cache folder of the encoded captions and images of the data set in ``folder``."""
    return work_folder(folder) / "encodings"


def forget_encodings(folder: Path) -> None:
    """Delete the encoded captions and images of the data set in ``folder``."""
    with suppress(FileNotFoundError):  # never read, or gone meanwhile
        shutil.rmtree(encodings_folder(folder))


def _facts(
    config: IngestConfig, before: Manifest | None, rebuilding: bool, licence: str | None, bits: int | None
) -> dict[str, Any]:
    """Fields of the manifest that follow neither from the images nor from how they are stored."""
    lists = before.lists if before is not None else None  # which outlive a rebuild
    before = None if rebuilding else before
    facts = {"near_duplicate_bits": bits, "lists": lists}
    return {"licence": _licence(config, before, licence), **facts}


def _licence(config: IngestConfig, before: Manifest | None, source_licence: str | None) -> str | None:
    """Return the licence of the data set: the configured one, or else its own, or else the source's."""
    licence = config.licence or (before.licence if before is not None else None)
    if licence is not None and source_licence is not None and source_licence.lower() != licence.lower():
        name = "ingest.licence" if config.licence else "the licence of the data set"
        logger.warning("the card of %s says licence %s; %s, %s, stays", config.source, source_licence, name, licence)
    return licence or source_licence


def _merge(
    merge: Merge,
    before: Manifest | None,
    facts: dict[str, Any],
    chunks: Iterator[str],
    planned_count: int,
    rebuilding: bool,
    progress: Progress,
) -> tuple[Manifest, CaptionCounts | None]:
    """Merge all chunks, caption them, and make the result the current version if it has anything new.

    ``facts`` are fields of its manifest.
    """
    folder, config, index = merge.folder, merge.config, merge.index
    with index.transaction():
        if rebuilding:
            index.clear()
            # Images taken down from the previous version are still rejected.
            old_parts = [part for part in (before.parts if before else ()) if "removed" in part.outcomes]
            tables = (read_records(folder, part).filter(pc.field("outcome") == "removed") for part in old_parts)
            if removed_rows := [row for table in tables for row in table.to_pylist()]:
                for row in removed_rows:
                    index.record(row)
                merge.parts.append(write_part(folder, 0, None, removed_rows, config.size))
        progress("images ingested", 0, planned_count)
        for chunk in chunks:
            merge.add(chunk)
            quarantined_count = merge.reasons.total()
            note = f"{quarantined_count:,} quarantined" if quarantined_count else ""
            progress("images ingested", merge.read, planned_count, note)
        _require_usable(merge)
        merge.publish_shards()
        merge.replace_masks()
        captions = None if config.captioner is None else add_captions(merge, config.captioner, progress)
        after = Manifest(
            name=folder.name,
            parent=before.digest if before else None,
            change="rebuild" if before and rebuilding else "ingest",
            content_digest="",
            storage=config.storage(),
            parts=merge.parts,
            **facts,
        )
        fields = {"parts", "storage", *facts}
        if before is not None and before.model_dump(include=fields) == after.model_dump(include=fields):
            after = before
        else:
            after = after.model_copy(update={"content_digest": index.content_digest(after)})
            write_manifest(folder, after)
        index.set_version(after)
    return after, captions


def _require_usable(merge: Merge) -> None:
    """Raise QuarantinedError if no image can be used, or too many of those read are quarantined."""
    config = merge.config
    quarantined_count, top_reasons = merge.reasons.total(), merge.reasons.most_common(3)
    reasons = "; ".join(f"{count} × {reason}" for reason, count in top_reasons)
    if not any(part.splits for part in merge.parts):
        raise QuarantinedError(
            f"no usable image in {config.source}: all {quarantined_count} were quarantined ({reasons})"
        )
    if quarantined_count > config.max_quarantined * merge.new_outcomes.total():
        raise QuarantinedError(
            f"{quarantined_count} of {merge.new_outcomes.total()} images in {config.source} were quarantined, more "
            f"than the share of {config.max_quarantined:g} that ingest.max_quarantined allows ({reasons}): fix "
            "them, or allow more"
        )


def remove_strays(folder: Path) -> None:
    """Delete files that the manifest does not name: leftovers of killed or failed runs, and rewritten shards.

    So are the measures of shards that it does not name.
    """
    files = read_manifest(folder).files if (folder / "manifest.json").is_file() else []
    names, digests = {entry.name for entry in files}, {entry.sha256[:32] for entry in files}
    for path in measures_folder(folder).glob("*"):
        if path.name[:32] not in digests:
            path.unlink()
    for kind in ("shards", "records"):
        for path in (folder / kind).glob("*"):
            if path.relative_to(folder).as_posix() not in names:
                path.unlink()
    remove_partials(folder)
    if not names:
        for path in (folder / "shards", folder / "records", folder):
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()


@contextmanager
def _removing_work(merge: Merge) -> Iterator[None]:
    """Context of the merge of an ingest; removes what no repeated ingest would use."""
    try:
        yield
    except QuarantinedError:
        # The cause of the quarantine may be fixed, so the entries must be read again.
        _remove_work(merge)
        raise
    finally:
        remove_strays(merge.folder)
    _remove_work(merge)


def _remove_work(merge: Merge) -> None:
    work = work_folder(merge.folder)
    for store in (ChunkFolder(work), merge.chunk_store):
        store.remove(merge.names)
    (work / "plan.sqlite").unlink(missing_ok=True)
