"""Which versions of a data set held pictures that were taken down."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import pyarrow.compute as pc

from diffusion.config import Config
from diffusion.data.manifest import Manifest, Part, read_manifest, read_records
from diffusion.data.removals import Removal
from diffusion.data.selection import Row
from diffusion.data.versions import Elsewhere, find_records, kept_in, nowhere


class Holders(Config):
    """Which versions held pictures that were removed, by digest."""

    held: list[str]
    unknown: list[str]
    """Those of which a table would have to be looked at that is no longer to be had."""


def holders(folder: Path, removal: Removal, versions: Iterable[Manifest], elsewhere: Elsewhere = nowhere) -> Holders:
    """Which of ``versions`` of the data set in ``folder`` kept pictures of ``removal``, in their order.

    Another version may have stored the same files in another way and know them by other keys, so the digests of the
    files are looked for as well.
    """
    keys, digests = set(removal.picture_keys), set(removal.digests)
    told: dict[str, bool | None] = dict.fromkeys(removal.tables, True)

    def is_one_of_them(row: Row) -> bool:
        return row["outcome"] == "kept" and (row["key"] in keys or row["source_sha256"] in digests)

    def kept_by(part: Part) -> bool | None:
        sha256 = part.records.sha256
        if sha256 not in told:
            table = find_records(folder, part, ("outcome", "key", "source_sha256"), elsewhere)
            told[sha256] = None if table is None else any(map(is_one_of_them, table.to_pylist()))
        return told[sha256]

    held, unknown = [], []
    for version in versions:
        answers = {kept_by(part) for part in version.parts if kept_in(part)}
        if True in answers:
            held.append(version.digest)
        elif None in answers:
            unknown.append(version.digest)
    return Holders(held=held, unknown=unknown)


def still_held(folder: Path, removals: Sequence[Removal]) -> list[Removal]:
    """Those of ``removals`` of which the current version of the data set in ``folder`` keeps images, in their order.

    Every table is read once. Raises UserError if one is missing or damaged.
    """
    if not removals:
        return []
    held: set[str] = set()
    for part in read_manifest(folder).parts:
        if kept_in(part):
            table = read_records(folder, part, ("outcome", "key", "source_sha256"))
            kept = table.filter(pc.equal(table["outcome"], "kept"))
            held.update(kept["key"].to_pylist(), kept["source_sha256"].to_pylist())
    return [each for each in removals if not held.isdisjoint([*each.picture_keys, *each.digests])]
