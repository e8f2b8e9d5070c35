"""Takedown: images are removed permanently, and only the parts that held them are rewritten.

A removed image leaves a row with its key and the digest of its file, by which every later ingest rejects it.
"""

from collections.abc import Callable, Collection
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from filelock import FileLock

from diffusion.common.errors import UserError
from diffusion.common.files import digest_of, sha256_file
from diffusion.common.progress import Progress, silent
from diffusion.data.ingest.ingest import forget_captions, remove_strays
from diffusion.data.ingest.merge import blanked, filter_shard, write_part
from diffusion.data.manifest import (
    Manifest,
    content_digest,
    mend,
    read_manifest,
    read_records,
    require_whole,
    versions,
    work_folder,
    write_manifest,
)
from diffusion.data.versions.takedown_records import (
    Chosen,
    Removal,
    Row,
    Selection,
    Selector,
    chosen_by,
    is_one_of,
    names_of,
    nothing,
    removals,
    still_held,
    write_removal,
)
from diffusion.data.versions.versions import kept_in


def choose(folder: Path, selection: Selection) -> tuple[Chosen, list[str]]:
    """Find the images of the data set in ``folder`` that ``selection`` matches, and their names; changes nothing.

    Raises UserError if a key or pattern matches no image, or a key prefix several.
    """
    manifest = read_manifest(folder)
    chosen, unmatched = chosen_by(folder, manifest, Selector.of(selection))
    if unmatched:
        raise nothing(unmatched, folder, manifest)
    return chosen, names_of(folder, manifest, chosen)


def remove(folder: Path, selection: Selection, reason: str, progress: Progress = silent) -> Removal:
    """Make a version of the data set in ``folder`` without the images that ``selection`` matches.

    Its content digest is that of a set which never held them. Parts that held none are shared; the files of the others
    are deleted last, with the caption embeddings. Locks out ingests. Repeated after a kill it gives the same result;
    once done, it only reports that.

    Raises UserError as ``choose`` does, if no image would be left, or if a required file is damaged.
    """
    if not reason.strip() or len(reason) > 500 or not reason.isprintable():
        raise UserError("a removal needs a reason: one line of at most 500 characters")
    selector = Selector.of(selection)
    with FileLock(work_folder(folder) / "lock"):
        before = read_manifest(folder)
        chosen, unmatched = chosen_by(folder, before, selector)
        request_digest = digest_of([selection.model_dump(), reason])[:16]
        described = chosen.model_dump() | {"dataset": folder.name, "request_digest": request_digest, "reason": reason}
        earlier = _earlier(folder, request_digest)
        if unmatched and earlier is None:
            raise nothing(unmatched, folder, before)
        if not chosen.parts:
            forget_captions(folder)
            remove_strays(folder)
            # Without a record it was done elsewhere, and is known as far as the rows left describe it.
            about: dict[str, Any] = {
                "images": len(chosen.image_keys),
                "parent": None,
                "version": before.digest,
                "content_digest": before.content_digest,
                "tables": [],
                "already": True,
            }
            return earlier or Removal.model_validate(described | about)
        if chosen.images == before.kept:
            raise nothing_left(folder, before)
        require_whole(folder, before)
        keys = set(chosen.image_keys)
        after = _without(folder, before, lambda row: selector.takes(row, keys), chosen.parts, reason, progress)
        parts = zip(before.parts, after.parts, strict=True)
        about = {
            "parent": before.digest,
            "version": after.digest,
            "content_digest": after.content_digest,
            "tables": sorted(old.records.sha256 for old, new in parts if kept_in(new) < kept_in(old)),
            "already": False,
        }
        removal = Removal.model_validate(described | about)
        write_removal(work_folder(folder), removal)
        write_manifest(folder, after)
        forget_captions(folder)
        remove_strays(folder)
        return removal


def _earlier(folder: Path, request_digest: str) -> Removal | None:
    """Return the newest removal requested in the same words in the history of this folder.

    Otherwise one of whose images nothing is left here: another machine may have done it, and its line been continued.
    """
    found = {removal.version: removal for removal in removals(work_folder(folder), request_digest)}
    if not found:
        return None
    in_line = (found[version.digest] for version in versions(folder) if version.digest in found)
    beside = (removal for removal in found.values() if not still_held(folder, [removal]))
    removal = next(chain(in_line, beside), None)
    return removal and removal.model_copy(update={"already": True})


def remove_known(folder: Path, progress: Progress = silent) -> list[Removal]:
    """Make a version of the data set in ``folder`` without images that takedown records on this machine name.

    Each record of which the current version holds images makes a version of its own, equal to the one that its takedown
    would have made here. The caller holds the data set's lock, and every file of the version is there.

    Returns:
        The records that were applied; empty if the version holds none of their images.

    Raises:
        UserError: If nothing would be left, or a file that is needed is missing or damaged.
    """
    applied = []
    for removal in still_held(folder, removals(work_folder(folder))):
        before = read_manifest(folder)
        keys, digests = set(removal.image_keys), set(removal.digests)
        tables = [(part, read_records(folder, part, ("outcome", "key", "source_sha256"))) for part in before.parts]
        rows = [(part.number, row) for part, table in tables for row in table.to_pylist()]
        # If the storage configuration has changed since, images have other keys, which duplicates share.
        keys |= {row["key"] for _, row in rows if row["outcome"] == "kept" and row["source_sha256"] in digests}

        taken = partial(is_one_of, keys=keys, digests=digests)
        going = [(number, row) for number, row in rows if taken(row)]
        if sum(row["outcome"] == "kept" for _, row in going) == before.kept:
            raise nothing_left(folder, before)
        if going:
            require_whole(folder, before)
            numbers = {number for number, _ in going}
            write_manifest(folder, _without(folder, before, taken, numbers, removal.reason, progress))
            applied.append(removal)
    if applied:
        forget_captions(folder)
        remove_strays(folder)
    return applied


def nothing_left(folder: Path, manifest: Manifest) -> UserError:
    """Return the error for a takedown that would leave an empty data set."""
    return UserError(
        f"this would remove all {manifest.kept} images of data set {folder.name}: "
        f"to be rid of the data set, delete {folder}"
    )


def _without(
    folder: Path,
    before: Manifest,
    taken: Callable[[Row], bool],
    numbers: Collection[int],
    reason: str,
    progress: Progress,
) -> Manifest:
    """Write the version without the rows that are ``taken``, all in parts of these ``numbers``."""
    parts = list(before.parts)
    for done, number in enumerate(sorted(numbers), start=1):
        (place,) = (place for place, part in enumerate(parts) if part.number == number)
        part, shard = parts[place], parts[place].shard
        rows = [blanked(row, reason) if taken(row) else row for row in read_records(folder, part).to_pylist()]
        kept = [row for row in rows if row["outcome"] == "kept"]
        if shard is not None and len(kept) < part.outcomes["kept"]:
            path = folder / shard.name
            if kept and sha256_file(path) != shard.sha256:
                raise UserError(f"{path} is damaged (its SHA-256 differs): {mend(folder)}")
            shard = filter_shard(folder, number, path, kept) if kept else None
        parts[place] = write_part(folder, number, shard, rows, before.size)
        progress("parts written anew", done, len(numbers))
    return before.model_copy(
        update={
            "parent": before.digest,
            "change": f"removal: {reason}",
            "content_digest": content_digest(folder, parts, before.storage),
            "parts": parts,
        }
    )
