"""Takedown: parts are rewritten without the images; rows of their digests stay, by which later ingests reject them."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from filelock import FileLock

from diffusion.common.errors import UserError
from diffusion.common.files import digest_of
from diffusion.common.progress import Progress, ignore_progress
from diffusion.data.ingest.captions import forget_captions
from diffusion.data.ingest.ingest import forget_encodings, remove_strays
from diffusion.data.ingest.merge import copy_samples, redact_row, rewrite_part
from diffusion.data.manifest import (
    STORED,
    Manifest,
    find_intact,
    read_manifest,
    read_records,
    require_whole,
    versions,
    work_folder,
    write_manifest,
)
from diffusion.data.tables import content_digest
from diffusion.data.versions.image_lists import forget_images
from diffusion.data.versions.takedown_records import (
    SELECTED_BY,
    MatchedImages,
    Removal,
    Row,
    Selection,
    Selector,
    find_dropped_copies,
    find_held_keys,
    find_pending_removals,
    is_one_of,
    match_images,
    no_match_error,
    removals,
    rows_with,
    write_removal,
)
from diffusion.data.versions.versions import count_stored


def choose_images(folder: Path, selection: Selection) -> tuple[MatchedImages, list[str]]:
    """Find the images that ``selection`` matches, and their names; raises UserError if some of it fits none."""
    manifest = read_manifest(folder)
    matches, names, unmatched = match_images(folder, manifest, Selector(selection))
    if unmatched:
        raise no_match_error(unmatched, folder, manifest)
    return matches, names


def require_removable(folder: Path, selection: Selection, reason: str) -> None:
    """Raise UserError as ``remove`` would for the current version in ``folder``; changes nothing."""
    _require_reason(reason)
    manifest, selector = read_manifest(folder), Selector(selection)
    matches, _, unmatched = match_images(folder, manifest, selector)
    if unmatched and _find_earlier(folder, digest_of([selection.model_dump(), reason])[:16]) is None:
        raise no_match_error(unmatched, folder, manifest)
    keys = set(matches.image_keys)
    _find_taken(folder, manifest, keys, lambda row: selector.removes(row, keys))


def _require_reason(reason: str) -> None:
    if not reason.strip() or len(reason) > 500 or not reason.isprintable():
        raise UserError("a removal needs a reason: one line of at most 500 characters")


def remove(folder: Path, selection: Selection, reason: str, progress: Progress = ignore_progress) -> Removal:
    """Make a version of the data set in ``folder`` without the images that ``selection`` matches.

    It has the content digest of a set that never held them. Parts that held none are shared; the files of the others
    are deleted last, with the encoded captions. Locks out ingests. Repeated after a kill it gives the same result;
    once done, it only reports that.

    Raises UserError as ``choose_images`` does, if no image would be left, or if a required file is damaged.
    """
    _require_reason(reason)
    selector = Selector(selection)
    with FileLock(work_folder(folder) / "lock"):
        before = read_manifest(folder)
        matches, _, unmatched = match_images(folder, before, selector)
        request_digest = digest_of([selection.model_dump(), reason])[:16]
        earlier_removal = _find_earlier(folder, request_digest)
        if unmatched and earlier_removal is None:
            raise no_match_error(unmatched, folder, before)
        after, keys = before, set(matches.image_keys)
        if matches.parts:
            after = _write_without(folder, before, keys, lambda row: selector.removes(row, keys), reason, progress)
        parts = zip(before.parts, after.parts, strict=True)
        # Without a record, what is gone was removed elsewhere, and is known as far as the rows left describe it.
        fields = {
            "dataset": folder.name,
            "request_digest": request_digest,
            "reason": reason,
            "images": len(keys),
            "parent": before.digest if matches.parts else None,
            "version": after.digest,
            "content_digest": after.content_digest,
            "tables": sorted(old.records.sha256 for old, new in parts if count_stored(new) < count_stored(old)),
            "already": not matches.parts,
        }
        removal = Removal.model_validate(matches.model_dump() | fields)
        if matches.parts:
            write_removal(work_folder(folder), removal)
            write_manifest(folder, after)
        forget_encodings(folder)
        forget_captions(folder, removal.image_keys)
        remove_strays(folder)
        return removal if matches.parts else earlier_removal or removal


def _find_earlier(folder: Path, request_digest: str) -> Removal | None:
    """Return the newest removal of this request in the history of the folder, or one that left nothing here."""
    line = [version.digest for version in versions(folder)]
    records = removals(work_folder(folder), request_digest)
    candidates = [record for record in records if record.version in line or not find_pending_removals(folder, [record])]
    removal = min(candidates, key=lambda record: [*line, record.version].index(record.version), default=None)
    return removal and removal.model_copy(update={"already": True})


def remove_known(folder: Path, progress: Progress = ignore_progress) -> list[Removal]:
    """Make a version of the data set in ``folder`` without images that takedown records on this machine name.

    Each record of which the current version holds images makes a version of its own, as its takedown would have here.
    Cached captions of all these images, and files that the current version does not name, are deleted in any case.
    The caller holds the data set's lock. Returns the applied records; raises UserError as ``remove`` does.
    """
    applied_removals, records = [], removals(work_folder(folder))
    if records:
        # A kill, or a version that another machine made without the images, may have left the caption of any of them.
        forget_captions(folder, {key for removal in records for key in removal.image_keys})
        remove_strays(folder)
    for removal in find_pending_removals(folder, records):
        before = read_manifest(folder)
        # If the storage configuration has changed since, images have other keys, which duplicates share.
        keys, digests = {*removal.image_keys, *find_held_keys(folder, removal, before)[0]}, set(removal.digests)
        keys |= find_dropped_copies(folder, before, keys)
        is_taken = partial(is_one_of, keys=keys, digests=digests)
        if (after := _write_without(folder, before, keys, is_taken, removal.reason, progress)) is not before:
            # Before the manifest, by which they would be found again after a kill.
            forget_captions(folder, keys)
            forget_encodings(folder)
            write_manifest(folder, after)
            remove_strays(folder)
            applied_removals.append(removal)
    return applied_removals


def _find_taken(folder: Path, before: Manifest, keys: set[str], is_taken: Callable[[Row], bool]) -> set[int]:
    """Find the numbers of the parts with rows, of ``keys`` or without any, for which ``is_taken``.

    Raises UserError if no image would be left.
    """
    numbers, kept_count = set[int](), 0
    for part, row in rows_with(folder, before, SELECTED_BY, keys):
        if is_taken(row):
            numbers.add(part.number)
            kept_count += row["outcome"] == "kept"
    if numbers and kept_count == before.kept:
        raise UserError(
            f"this would remove all {before.kept} images of data set {folder.name}: "
            f"to be rid of the data set, delete {folder}"
        )
    return numbers


def _write_without(
    folder: Path,
    before: Manifest,
    keys: set[str],
    is_taken: Callable[[Row], bool],
    reason: str,
    progress: Progress,
) -> Manifest:
    """Write the version without the rows that ``_find_taken`` finds; returns ``before`` if there are none."""
    if not (numbers := _find_taken(folder, before, keys, is_taken)):
        return before
    require_whole(folder, before)
    parts, taken_keys, digests = list(before.parts), set[str](), set[str]()
    for place, part in enumerate(before.parts):
        if part.number not in numbers:
            continue
        records = read_records(folder, part).to_pylist()
        taken_keys |= {row["key"] for row in records if is_taken(row)}
        digests |= {row["source_sha256"] for row in records if is_taken(row)} - {""}
        rows = [redact_row(row, reason) if is_taken(row) else row for row in records]
        stored_rows = [row for row in rows if row["outcome"] in STORED]
        shard = part.shard
        if shard is not None and len(stored_rows) < count_stored(part):
            shards = [(find_intact(folder, shard), stored_rows)] if stored_rows else []
            shard = copy_samples(folder, part.number, shards)
        parts[place] = rewrite_part(folder, part, rows, before.size, shard)
        progress("parts rewritten", place + 1, len(parts))
    after = before.make_child(f"removal: {reason}", parts, content_digest(folder, parts, before.storage))
    lists = forget_images(folder, before.lists, lambda key, digest: key in taken_keys or digest in digests)
    return after.model_copy(update={"lists": lists})
