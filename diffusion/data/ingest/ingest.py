"""Ingest: lists a source, plans what is new, prepares it chunk by chunk on any worker and merges the chunks in order.

The manifest is written last; until then the previous version is complete, and nothing refers to added files.
"""

import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import pyarrow.compute as pc
from filelock import FileLock

from diffusion.common.config import Config
from diffusion.common.errors import DarkroomError, UserError
from diffusion.common.files import is_full_disk, make_folder, remove_partials
from diffusion.common.progress import Progress, silent
from diffusion.data.ingest.chunks import chunks_of, make_plan, prepare_chunk
from diffusion.data.ingest.config import IngestConfig
from diffusion.data.ingest.index import Index
from diffusion.data.ingest.merge import Merge, write_part
from diffusion.data.manifest import Manifest, read_manifest, read_records, require_whole, work_folder, write_manifest
from diffusion.data.prefetch import FanOut, local_fan_out
from diffusion.data.sources import open_source
from diffusion.data.sources.base import Access, ObjectStore
from diffusion.data.sources.survey import Survey, survey

Rebuild = Literal["never", "if_different", "always"]
"""When to rebuild the data set from this source alone; ``if_different``: if images are to be stored in another way."""


class Quarantined(Config):
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
    listed: int
    read: int
    """Number of entries of the source, and of those that had to be read."""
    added: int
    removed: int
    """Number of images read but omitted because they were taken down before."""
    relabelled: int
    """Number of images read that the set already has with another label or caption, which stays."""
    passed_over: dict[str, int]
    """Number of ignored files without an image's extension, by extension."""
    kept: int
    duplicates: int
    """Number of names in the data set's records whose pixels were already there."""
    quarantined: list[Quarantined]
    """Quarantined entries in the data set's records; the first thousand."""
    quarantined_count: int


class IngestPreview(Config):
    """What an ingest would do."""

    dataset: str
    kept: int | None
    """Images in the data set; None if there is none yet."""
    new: int
    """Entries of the source that would be read: those not read before, or changed since."""
    size: int
    survey: Survey

    def lines(self) -> list[str]:
        """Describe the source, and what of it is new."""
        already = "a new data set" if self.kept is None else f"data set {self.dataset}, which has {self.kept:,} images"
        small = ["small      images below ingest.size are quarantined: lower it, or set ingest.enlarge=true"]
        return [
            *self.survey.lines(),
            *(small if self.survey.too_small(self.size) else []),
            f"would read {self.new:,} of them into {already}, at {self.size}×{self.size} pixels",
        ]


def preview(
    folder: Path,
    config: IngestConfig,
    *,
    requeue: bool = False,
    rebuild: Rebuild = "never",
    objects: ObjectStore | None = None,
) -> IngestPreview:
    """Look at ``config.source`` and count what ``ingest`` would read of it; changes nothing. Raises as it does."""
    before = read_manifest(folder) if (folder / "manifest.json").is_file() else None
    rebuilding = before is None or _require_same_storage(folder, before, config, rebuild)
    with TemporaryDirectory() as temporary:
        scratch = Path(temporary)
        for path in work_folder(folder).glob("index.sqlite*"):
            shutil.copyfile(path, scratch / path.name)
        found = survey(config, scratch, objects)
        with closing(Index(scratch / "index.sqlite", folder, before, config.near_duplicates)) as index:
            source = open_source(config.source, Access(config, scratch, objects))
            plan = scratch / "plan.sqlite"
            _, new = make_plan(plan, source, _origin(config), index.path, requeue, rebuilding, silent)
    kept = None if before is None or rebuilding else before.kept
    return IngestPreview(dataset=folder.name, kept=kept, new=new, size=config.size, survey=found)


def _require_same_storage(folder: Path, before: Manifest, config: IngestConfig, rebuild: Rebuild) -> bool:
    """Whether the data set is rebuilt; raises UserError if it stores images in another way and must not be."""
    different = before.stored_otherwise(config.storage())
    if different and rebuild == "never":
        name, theirs, ours = different
        raise UserError(
            f"data set {folder.name} was made with ingest.{name}={theirs} and this is {ours}: "
            "give another --dataset, or --rebuild to build it again from this source alone"
        )
    return rebuild == "always" or bool(different)


def _origin(config: IngestConfig) -> str:
    """Identity of the source, under which the stamps of its entries are known."""
    return config.source if ":" in config.source else str(Path(config.source).resolve())


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

    Equal images, configuration and history give equal bytes. ``requeue`` reads quarantined entries again. A killed run
    is simply repeated and reuses finished chunks. Concurrent ingests into one folder wait for one another.

    Raises UserError if the source cannot be understood, no image can be used, more than ``config.max_quarantined``
    of those read are quarantined, or the data set stores its images in another way and ``rebuild`` is ``never``.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is no folder, and a data set is one: move it away, or give another --dataset")
    fan_out = fan_out or local_fan_out(config)
    work = work_folder(folder)
    make_folder(work)
    with FileLock(work / "lock"), _full_disk_in_words(work):
        before = read_manifest(folder) if (folder / "manifest.json").is_file() else None
        rebuilding = before is None or _require_same_storage(folder, before, config, rebuild)
        if before is not None and not rebuilding:
            require_whole(folder, before)
        with closing(Index(work / "index.sqlite", folder, before, config.near_duplicates)) as index:
            access = Access(config, work / "scratch", objects)
            access.scratch.mkdir(exist_ok=True)
            source = open_source(config.source, access)
            origin = _origin(config)
            plan = work / "plan.sqlite"
            listed, planned = make_plan(plan, source, origin, index.path, requeue, rebuilding, progress)
            passed_over = access.passed_over
            if not listed:
                others = f" ({passed_over.total()} other files)" if passed_over else ""
                raise UserError(
                    f"no images in {config.source}{others}: give a source of JPEG, PNG, WebP, GIF, BMP or TIFF images"
                )
            merge = Merge(folder, config, index, origin, [] if before is None or rebuilding else list(before.parts))
            prepared = fan_out(prepare_chunk, chunks_of(work, config, objects, planned))
            try:
                after = _merge(merge, before, prepared, planned, rebuilding, progress)
            except UserError:
                # The cause of the quarantine may be fixed, so the entries must be read again.
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
                added=merge.new_outcomes["kept"],
                removed=merge.new_outcomes["removed"],
                relabelled=merge.relabelled,
                passed_over=dict(passed_over.most_common()),
                kept=after.kept,
                duplicates=index.count("duplicate"),
                quarantined=[Quarantined(**each) for each in index.quarantined(1000)],
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
            "which builds it again"
        ) from error


def captions_folder(folder: Path) -> Path:
    """Return the cache folder of the caption embeddings of the data set in ``folder``."""
    return work_folder(folder) / "captions"


def forget_captions(folder: Path) -> None:
    """Delete the cached caption embeddings of the data set in ``folder``."""
    with suppress(FileNotFoundError):  # never read, or gone meanwhile
        shutil.rmtree(captions_folder(folder))


def _merge(
    merge: Merge, before: Manifest | None, prepared: Iterator[Path], planned: int, rebuilding: bool, progress: Progress
) -> Manifest:
    """Merge all chunks, and make the result the current version if it has anything new."""
    folder, config, index = merge.folder, merge.config, merge.index
    with index.transaction():
        if rebuilding:
            index.clear()
            # Images taken down from the previous version are still rejected.
            old = [part for part in (before.parts if before else ()) if "removed" in part.outcomes]
            tables = (read_records(folder, part).filter(pc.field("outcome") == "removed") for part in old)
            if removed := [row for table in tables for row in table.to_pylist()]:
                for row in removed:
                    index.record(row)
                merge.parts.append(write_part(folder, 0, None, removed, config.size))
        progress("images ingested", 0, planned)
        for chunk in prepared:
            merge.add(chunk)
            refused = merge.reasons.total()
            progress("images ingested", merge.read, planned, f"{refused:,} refused" if refused else "")
        refused, leading = merge.reasons.total(), merge.reasons.most_common(3)
        reasons = "; ".join(f"{count} × {reason}" for reason, count in leading)
        if not any(part.splits for part in merge.parts):
            raise UserError(f"no usable image in {config.source}: all {refused} were refused ({reasons})")
        if refused > config.max_quarantined * merge.new_outcomes.total():
            raise UserError(
                f"{refused} of {merge.new_outcomes.total()} images in {config.source} were quarantined, more than the "
                f"share of {config.max_quarantined:g} that ingest.max_quarantined allows ({reasons}): fix them, "
                "or allow more"
            )
        after = Manifest(
            name=folder.name,
            parent=before.digest if before else None,
            change="rebuild" if before and rebuilding else "ingest",
            content_digest="",
            storage=config.storage(),
            licence=config.licence or (None if rebuilding or before is None else before.licence),
            parts=merge.parts,
        )
        same = {"parts", "storage", "licence"}
        if before is not None and before.model_dump(include=same) == after.model_dump(include=same):
            after = before
        else:
            after = after.model_copy(update={"content_digest": index.content_digest(after)})
            write_manifest(folder, after)
        index.set_version(after)
    return after


def remove_strays(folder: Path) -> None:
    """Delete files that the manifest does not name: leftovers of killed or failed runs, and rewritten shards."""
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
