"""Ingest: images from anywhere in, new parts of a data set out.

List the source, plan what is new, prepare it chunk by chunk wherever there is room, merge the chunks in order. The
manifest is written last; until then the version before is whole, and nothing names what was added.
"""

import shutil
import sqlite3
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Literal

from filelock import FileLock

from diffusion.common.config import Config
from diffusion.common.errors import DarkroomError, UserError
from diffusion.common.files import is_full_disk, make_folder, remove_partials
from diffusion.common.progress import Progress, silent
from diffusion.data.ingest.chunks import PreparedChunk, chunks_of, make_plan, origin_of, prepare_chunk
from diffusion.data.ingest.config import IngestConfig
from diffusion.data.ingest.index import Index
from diffusion.data.ingest.merge import Merge, write_part
from diffusion.data.manifest import (
    Manifest,
    read_manifest,
    read_records,
    require_whole,
    work_folder,
    write_manifest,
)
from diffusion.data.prefetch import FanOut, local_fan_out
from diffusion.data.sources import open_source
from diffusion.data.sources.base import Access, ObjectStore

QUARANTINED_SHOWN = 1000

Rebuild = Literal["never", "if_different", "always"]
"""Whether to begin anew from this source alone; ``if_different``: if images are to be stored in another way."""


class Quarantined(Config):
    """A refused image."""

    source: str
    reason: str
    sha256: str


class IngestResult(Config):
    """The data set after an ingest, as ``darkroom ingest --json`` prints it."""

    dataset: str
    folder: Path
    content_digest: str
    digest: str
    """Name of the version: the digest of its manifest."""
    changed: bool
    """Whether this ingest made a new version."""
    listed: int
    """Entries of the source."""
    read: int
    """Of these, the ones that had to be read."""
    added: int
    """Images that this ingest added."""
    removed: int
    """Images that were read and left out, because they were taken down before."""
    relabelled: int
    """Images that were read and are there already, with another label or caption: the first one stays."""
    passed_over: dict[str, int]
    """How many files of the source were not looked at, as they are not named like images, by how they end."""
    kept: int
    """Images of the data set."""
    duplicates: int
    """Names in the data set's records whose pixels were there already."""
    quarantined: list[Quarantined]
    """What stands refused in the data set's records; the first thousand."""
    quarantined_count: int


def ingest(
    folder: Path,
    config: IngestConfig,
    progress: Progress = silent,
    *,
    requeue: bool = False,
    rebuild: Rebuild = "never",
    objects: ObjectStore | None = None,
    fan_out: FanOut | None = None,
) -> IngestResult:
    """Add what is new in ``config.source`` to the data set in ``folder`` (its name is the data set's).

    Equal images, configuration and history give equal bytes. ``requeue`` reads again what was refused before. The
    version before stays whole until the new one is; a run that was killed is simply run again, and takes up the
    chunks that were finished. Two ingests into one folder take turns.

    Raises UserError if the source cannot be understood, no image can be used, more than ``config.max_quarantined``
    of those read are refused, or the data set stores its images in another way and ``rebuild`` is ``never``.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is no folder, and a data set is one: move it away, or give another --dataset")
    fan_out = fan_out or local_fan_out(config)
    work = work_folder(folder)
    make_folder(work)
    with FileLock(work / "lock"), _full_disk_in_words(work):
        before = read_manifest(folder) if (folder / "manifest.json").is_file() else None
        anew = _anew(before, config, rebuild, folder)
        if before is not None and not anew:
            require_whole(folder, before)
        with closing(Index(work / "index.sqlite", folder, before, config.near_duplicates)) as index:
            passed_over: Counter[str] = Counter()
            listed, planned = _plan(work, index, config, objects, requeue, anew, passed_over, progress)
            chunks = chunks_of(work, config, objects, planned)
            prepared = fan_out(prepare_chunk, chunks)
            try:
                after, merge = _merge(folder, config, before, index, prepared, planned, anew, progress)
            except UserError:
                # What the images were refused for may be mended: then they must be read again.
                _remove_work(work)
                raise
            finally:
                remove_strays(folder)
            _remove_work(work)
            return IngestResult(
                dataset=folder.name,
                folder=folder,
                content_digest=after.content_digest,
                digest=after.digest,
                changed=after != before,
                listed=listed,
                read=merge.read,
                added=merge.news["kept"],
                removed=merge.news["removed"],
                relabelled=merge.relabelled,
                passed_over=dict(passed_over.most_common()),
                kept=after.kept,
                duplicates=index.count("duplicate"),
                quarantined=[Quarantined(**each) for each in index.quarantined(QUARANTINED_SHOWN)],
                quarantined_count=index.count("quarantined"),
            )


@contextmanager
def _full_disk_in_words(work: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, sqlite3.OperationalError) as error:
        if not is_full_disk(error):
            raise
        raise DarkroomError(
            f"the disk that holds {work} is full: free some space and give the same command again, "
            "which goes on with what is finished"
        ) from error
    except sqlite3.DatabaseError as error:
        raise DarkroomError(
            f"{work / 'index.sqlite'} is damaged ({error}): delete it and give the same command again, "
            "which makes it anew"
        ) from error


def captions_folder(folder: Path) -> Path:
    """Where what the captions of the data set in ``folder`` mean is kept, once a training was told of them."""
    return work_folder(folder) / "captions"


def forget_captions(folder: Path) -> None:
    """Delete what is kept of the captions of the data set in ``folder``."""
    with suppress(FileNotFoundError):  # never read, or gone meanwhile
        shutil.rmtree(captions_folder(folder))


def _anew(before: Manifest | None, config: IngestConfig, rebuild: Rebuild, folder: Path) -> bool:
    """Whether the data set begins anew."""
    if before is None or rebuild == "always":
        return True
    ours, theirs = config.storage().model_dump(), before.storage.model_dump()
    different = [name for name in ours if ours[name] != theirs[name]]
    if different and rebuild == "never":
        name = different[0]
        raise UserError(
            f"data set {folder.name} was made with ingest.{name}={theirs[name]} and this is {ours[name]}: "
            "give another --dataset, or --rebuild to make it anew from this source alone"
        )
    return bool(different)


def _plan(
    work: Path,
    index: Index,
    config: IngestConfig,
    objects: ObjectStore | None,
    requeue: bool,
    anew: bool,
    passed_over: Counter[str],
    progress: Progress,
) -> tuple[int, int]:
    scratch = work / "scratch"
    scratch.mkdir(exist_ok=True)
    source = open_source(config.source, Access(config, scratch, objects, passed_over))
    listed, planned = make_plan(
        work / "plan.sqlite", source, origin_of(config.source), index.path, requeue, anew, progress
    )
    if not listed:
        others = f" ({passed_over.total()} other files)" if passed_over else ""
        raise UserError(
            f"no images in {config.source}{others}: give a source of JPEG, PNG, WebP, GIF, BMP or TIFF images"
        )
    return listed, planned


def _merge(
    folder: Path,
    config: IngestConfig,
    before: Manifest | None,
    index: Index,
    prepared: Iterator[PreparedChunk],
    planned: int,
    anew: bool,
    progress: Progress,
) -> tuple[Manifest, Merge]:
    """Merge all chunks, and make the result the data set's version if there is anything new in it."""
    with index.transaction():
        parts = [] if before is None or anew else list(before.parts)
        merge = Merge(folder, config, index, origin_of(config.source), parts)
        if anew:
            _begin(merge, before)
        progress("images ingested", 0, planned)
        for chunk in prepared:
            merge.add(chunk)
            refused = merge.reasons.total()
            progress("images ingested", merge.read, planned, f"{refused:,} refused" if refused else "")
        _check(merge, config)
        kept = before if before is not None and not anew else None
        after = Manifest(
            name=folder.name,
            parent=before.digest if before else None,
            change="rebuild" if before and anew else "ingest",
            content_digest="",
            storage=config.storage(),
            licence=config.licence or (kept and kept.licence),
            parts=merge.parts,
        )
        same = ("parts", "storage", "licence")
        if before is not None and all(getattr(before, name) == getattr(after, name) for name in same):
            after = before
        else:
            after = after.model_copy(update={"content_digest": index.content_digest(after)})
            write_manifest(folder, after)
        index.stands_for(after)
    return after, merge


def _begin(merge: Merge, before: Manifest | None) -> None:
    """A data set from nothing, which still refuses what was taken down from the one before."""
    merge.index.clear()
    removed = [
        row
        for part in (before.parts if before else ())
        if part.outcomes.get("removed")
        for row in read_records(merge.folder, part).to_pylist()
        if row["outcome"] == "removed"
    ]
    if removed:
        for row in removed:
            merge.index.record(row)
        merge.parts.append(write_part(merge.folder, 0, None, removed, merge.config.size))


def _check(merge: Merge, config: IngestConfig) -> None:
    refused = merge.reasons.total()
    leading = "; ".join(f"{count} × {reason}" for reason, count in merge.reasons.most_common(3))
    if not any(part.splits for part in merge.parts):
        raise UserError(f"no usable image in {config.source}: all {refused} were refused ({leading})")
    if refused > config.max_quarantined * merge.news.total():
        raise UserError(
            f"{refused} of {merge.news.total()} images in {config.source} were refused, more than the share of "
            f"{config.max_quarantined:g} allowed by ingest.max_quarantined ({leading}): mend them, or allow more"
        )


def remove_strays(folder: Path) -> None:
    """Take away what the data set's manifest does not name: what killed or failed runs left, and rewritten shards."""
    named = {entry.name for entry in read_manifest(folder).files} if (folder / "manifest.json").is_file() else set()
    for kind in ("shards", "records"):
        for path in (folder / kind).glob("*"):
            if path.relative_to(folder).as_posix() not in named:
                path.unlink()
    remove_partials(folder)
    if not named:
        for path in (folder / "shards", folder / "records", folder):
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()


def _remove_work(work: Path) -> None:
    for name in ("chunks", "scratch"):
        shutil.rmtree(work / name, ignore_errors=True)
    (work / "plan.sqlite").unlink(missing_ok=True)
