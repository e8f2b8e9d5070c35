"""Shards that an ingest published on DVC's remote, and that no recorded version has yet; beyond a kill."""

from collections.abc import Iterable
from pathlib import Path

from pydantic import TypeAdapter

from diffusion.common.files import write_json
from diffusion.data.manifest import read_manifest, work_folder

Names = dict[str, str]
"""MD5 of each shard by its name in the data set."""


def published_path(folder: Path) -> Path:
    """Path of the names of published shards of the data set in ``folder``."""
    return work_folder(folder) / "published.json"


def read_published(folder: Path) -> Names:
    """Read the file at ``published_path``; empty without one."""
    path = published_path(folder)
    return TypeAdapter(Names).validate_json(path.read_bytes()) if path.is_file() else {}


def write_published(folder: Path, published: Names) -> None:
    """Write the file at ``published_path``, or delete it."""
    if published:
        write_json(published_path(folder), published)
    else:
        published_path(folder).unlink(missing_ok=True)


def find_strays(folder: Path, listings: Iterable[tuple[str, Names]]) -> Names:
    """Find shards that ingests of the data set in ``folder`` published, and neither a version nor the manifest has.

    Shards in ``listings`` are forgotten. Strays stay, as another machine may be about to publish the same bytes: only a
    purge deletes them.
    """
    published = read_published(folder)
    md5s = set(published.values())
    for _, listing in listings if published else ():
        md5s.difference_update(listing.values())
    published = {name: md5 for name, md5 in published.items() if md5 in md5s}
    write_published(folder, published)
    manifest = read_manifest(folder) if (folder / "manifest.json").is_file() else None
    needed_names = {entry.name for entry in manifest.shards} if manifest else set[str]()
    return {name: md5 for name, md5 in published.items() if name not in needed_names}
