"""Union: what one line of versions of a data set added, added to another line as well.

Two machines that ingest into one data set from the same version make two lines. The union goes on from theirs and
judges each image of ours as an ingest would: what is there already is a copy, and what was taken down stays out.
"""

from contextlib import closing
from itertools import takewhile
from pathlib import Path

from diffusion.config import Config
from diffusion.data.config import IngestConfig
from diffusion.data.index import Index
from diffusion.data.ingest import work_folder
from diffusion.data.manifest import Manifest, manifest_bytes, read_manifest, version_path, versions
from diffusion.data.merge import Merge
from diffusion.data.versions import remember
from diffusion.errors import Held
from diffusion.files import write_bytes


class Union(Config):
    """A version with what two lines have."""

    version: Manifest
    added: int
    """Images that the other line lacked."""
    lost: int
    """Records of copies whose image the other line gave up, which are in neither."""


def unite(folder: Path, config: IngestConfig, theirs: Manifest, base: Manifest | None) -> Union:
    """Make a version that goes on from ``theirs`` and has what the current version in ``folder`` added to ``base``.

    ``base`` is the newest version that both come from; None if there is none. All files of ``theirs``, and the
    manifests that it comes from, lie in ``folder``. The caller holds the data set's lock. Killed and given again, it
    ends the same: the manifest is written last.

    Raises:
        Held: If the two store images in different ways, or ours began the data set anew.
    """
    ours = read_manifest(folder)
    require_compatible(folder, ours, theirs, base)
    shared = {part.records.sha256 for part in (*theirs.parts, *(base.parts if base else ()))}
    config = config.model_copy(update=dict(theirs.storage))
    with (
        closing(Index(work_folder(folder) / "index.sqlite", folder, theirs, config.near_duplicates)) as index,
        index.transaction(),
    ):
        merge = Merge(folder, config, index, "", list(theirs.parts))
        lost = sum(merge.adopt(part) for part in ours.parts if part.records.sha256 not in shared)
        after = theirs
        if merge.parts != theirs.parts:
            after = Manifest(
                name=folder.name,
                parent=theirs.digest,
                change=f"union with {ours.digest[:12]}",
                content_digest="",
                storage=theirs.storage,
                licence=theirs.licence or ours.licence,
                parts=merge.parts,
            )
            after = after.model_copy(update={"content_digest": index.content_digest(after)})
            write_bytes(version_path(folder, theirs.digest), manifest_bytes(theirs))
        remember(folder, ours)
        write_bytes(folder / "manifest.json", manifest_bytes(after))
        index.stands_for(after)
    return Union(version=after, added=merge.news["kept"], lost=lost)


def require_compatible(folder: Path, ours: Manifest, theirs: Manifest, base: Manifest | None) -> None:
    """Raise Held unless what ``ours`` added to ``base`` can be added to ``theirs``, and that is what was asked for."""
    line = takewhile(lambda version: base is None or version.digest != base.digest, versions(folder))
    faster = f"somebody was faster: the newest version of data set {folder.name} is {theirs.digest[:12]} by now, and"
    go_on = f"`darkroom data checkout {theirs.digest[:12]} --dataset {folder.name}`, then ingest again"
    if any(version.change == "rebuild" for version in line):
        raise Held(
            f"{faster} {ours.digest[:12]} here began it anew: give the command with --rebuild again to begin anew all "
            f"the same, or to add to theirs {go_on}"
        )
    mine, other = ours.storage.model_dump(), theirs.storage.model_dump()
    if different := [name for name in mine if mine[name] != other[name]]:
        name = different[0]
        raise Held(
            f"{faster} stores images with ingest.{name}={other[name]}, while {ours.digest[:12]} here has {mine[name]}: "
            f"give another --dataset, or to add to theirs {go_on} with that"
        )
