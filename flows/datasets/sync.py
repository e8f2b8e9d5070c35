"""Synchronization of a data set between machines: checkout of the newest version, merge, publication and events.

Before an ingest or a takedown an older local version is replaced by the newest one in the catalog, and images that only
this machine has are added to it. Takedown records are applied at the same time, so that no image comes back.
"""

import logging
import shutil
from functools import partial
from pathlib import Path
from uuid import NAMESPACE_URL, uuid5

from filelock import FileLock
from humanize import naturalsize
from prefect.events import Event

from diffusion.common.errors import ConflictError
from diffusion.common.escaping import pluralize
from diffusion.common.files import write_atomically
from diffusion.common.progress import Progress, ignore_progress
from diffusion.data.ingest.config import IngestConfig
from diffusion.data.ingest.merge import merge_versions, rewritten_parts
from diffusion.data.manifest import Manifest, parse_manifest, read_manifest, version_path, versions, work_folder
from diffusion.data.shards import missing_shards, shard_file
from diffusion.data.versions.takedown import remove_known
from diffusion.data.versions.takedown_records import find_pending_removals, removals
from diffusion.data.versions.versions import remember
from flows.config import Params
from flows.datasets import catalog, dvc
from flows.datasets.catalog import Catalog, Heads
from flows.datasets.checkout import CheckoutResult, DatasetLocation, checkout, read_pin, remove_others, unpin
from flows.datasets.dvc import DataVersion, is_whole
from flows.datasets.remote_shards import RemoteShards
from flows.deployment.tasks import emit, retryable_task
from flows.environment import data_source

CREATED = "darkroom.dataset.version.created"
logger = logging.getLogger(__name__)


@retryable_task
def sync(params: Params, version: str | None = None) -> CheckoutResult | None:
    """Check out ``version``, or the newest one if the local one is older or missing; None if nothing was done."""
    source = data_source()
    catalog = Catalog.of(params.training.dataset, source)
    if (target := version or find_newer_version(params, catalog)) is None:
        return None
    catalog.fetch_removals(params.dataset_folder)
    return checkout(params.dataset_folder, target, lambda: source)


def find_newer_version(params: Params, catalog: Catalog) -> str | None:
    """Newest version in the ``catalog``; None if the local one descends from it or was never published."""
    head, folder = Heads(catalog).newest(), params.dataset_folder
    if head is None or not (folder / "manifest.json").is_file():
        return head
    # An unpublished version exists only here: the next ingest adds it to the newest.
    unpublished = catalog.find_publication_time(read_manifest(folder).digest) is None
    return None if unpublished or any(version.digest == head for version in versions(folder)) else head


@retryable_task
def announce(params: Params, silently: bool) -> None:
    """Emit the event of the local version, once, with an ID of its own; ``silently`` only marks it as announced."""
    catalog = Catalog.of(params.training.dataset, data_source())
    version = read_manifest(params.dataset_folder)
    if catalog.is_announced(version.digest):
        return
    if not silently:
        emit(make_version_event(version, catalog))
    catalog.mark_announced(version.digest)


def make_version_event(version: Manifest, catalog: Catalog) -> Event:
    """Prefect event for the creation of ``version``."""
    return Event(
        event=CREATED,
        id=uuid5(NAMESPACE_URL, f"{CREATED}:{catalog.place}/{version.digest}"),
        resource={"prefect.resource.id": f"darkroom.dataset.{version.name}", "prefect.resource.name": version.name},
        payload={name: getattr(version, name) for name in ("digest", "content_digest", "parent", "change", "kept")},
    )


def bring_up_to_date(
    folder: Path,
    source: str,
    config: IngestConfig,
    progress: Progress = ignore_progress,
    rebuilding: bool = False,
    without_shards: bool = False,
) -> None:
    """Bring the data set in ``folder`` up to date with its newest version in the catalog and with all takedowns.

    With ``rebuilding`` the local version need not be kept, and with ``without_shards`` no shard need come here. A
    version that was checked out to build on stays if its newer versions were known then. Locks out ingests; killed and
    given again, it ends the same. Raises ConflictError if the local version cannot be added to the newest one, and
    UserError if a file of the newest cannot be found.
    """
    work_folder(folder).mkdir(parents=True, exist_ok=True)
    with FileLock(work_folder(folder) / "lock"):
        dataset_catalog = Catalog.of(folder.name, source)
        dataset_catalog.fetch_removals(folder)
        if (head := Heads(dataset_catalog).newest()) is not None and not _descends_from(folder, head):
            _move(folder, source, dataset_catalog, head, config, rebuilding, without_shards)
        if (folder / "manifest.json").is_file():
            if without_shards and find_pending_removals(folder, removals(work_folder(folder))):
                fetch_shards(folder, source)
            for removal in remove_known(folder, progress):
                logger.warning("%s: images that were taken down (%s) are removed here, too", folder, removal.reason)


def publish(folder: Path, source: str) -> DataVersion | None:
    """Record, push and catalog the current version of the data set in ``folder``, and make it the newest.

    Returns None if another machine published first or took down images that it holds: then call ``bring_up_to_date``
    and publish again. Killed and given again, it ends the same.
    """
    dataset_catalog = Catalog.of(folder.name, source)
    with FileLock(work_folder(folder) / "lock"), catalog.mark_push(folder.name, source, dataset_catalog.store):
        if dataset_catalog.find_held_removals(folder):
            return None
        version = dvc.record_data(folder, source)
        dataset_catalog.publish(read_manifest(folder), version.digest)
        # A takedown writes its record first and then lists the versions in the catalog. So either we see the record
        # of a concurrent takedown, or it sees this version.
        if dataset_catalog.find_held_removals(folder):
            return None
        current = read_manifest(folder)
        pin = read_pin(folder)
        line = {ancestor.digest for ancestor in versions(folder)}
        if (faster := Heads(dataset_catalog).advance(current.digest, line | set(pin.known if pin else ()))) is not None:
            logger.info("version %s of data set %s was published meanwhile", faster[:12], folder.name)
            return None
        if pin is not None:
            logger.warning(
                f"version {current.digest[:12]} is the newest of data set {folder.name} now and goes on from "
                f"{pin.version[:12]}, which was checked out: what later versions added is not in it; "
                f"`darkroom data log --dataset {folder.name}` names them, and `darkroom data checkout` brings one back"
            )
        unpin(folder)
        return version


def _descends_from(folder: Path, head: str) -> bool:
    """Whether the local version descends from ``head``, or leaves it out on purpose."""
    if not (folder / "manifest.json").is_file():
        return False
    pin = read_pin(folder)
    return any(version.digest == head for version in versions(folder)) or (pin is not None and head in pin.known)


def fetch_shards(folder: Path, source: str) -> None:
    """Fetch the shards of the current version that are on the remote alone; the caller holds the lock."""
    shards = RemoteShards(folder, source)
    if entries := missing_shards(folder, read_manifest(folder)):
        size = naturalsize(sum(entry.bytes for entry in entries))
        logger.info("%s: fetching %s (%s) from %s", folder, pluralize(len(entries), "shard"), size, source)
    for entry in entries:
        with shard_file(folder, entry, shards) as file:
            write_atomically(folder / entry.name, partial(shutil.copyfile, file))


def _move(
    folder: Path,
    source: str,
    dataset_catalog: Catalog,
    head: str,
    config: IngestConfig,
    rebuilding: bool,
    without_shards: bool,
) -> None:
    remote = dataset_catalog.version(head)
    assert remote is not None, "a head is in the catalog"
    place = DatasetLocation(folder, lambda: source)
    place.known = place.known | {head: remote}
    place.catalog()
    if not (folder / "manifest.json").is_file() or rebuilding:
        # A rebuild needs only the tables of the version before, which name the images that were taken down.
        place.make_current(
            remote, with_removed=True, without_shards=without_shards or (rebuilding and config.near_duplicates is None)
        )
        return
    if (pin := read_pin(folder)) is not None:
        # The same checkout again would leave it out on purpose.
        remember(folder, remote)
        raise ConflictError(
            f"another process was first: version {head[:12]} of data set {folder.name} was published since "
            f"{pin.version[:12]} was checked out: `darkroom data checkout {head[:12]} --dataset {folder.name}` to "
            f"add to it, or `darkroom data checkout {pin.version[:12]} --dataset {folder.name}` again to leave it "
            "out"
        )
    local = read_manifest(folder)
    if (base := _find_common_ancestor(folder, place, remote)) is not None and base.digest == local.digest:
        place.make_current(remote, with_removed=True, without_shards=without_shards)
        logger.info("%s goes on from version %s, which another machine published", folder, head[:12])
        return
    if without_shards:
        fetch_shards(folder, source)
    place.keep_current(remote)
    place.fetch(remote, without_shards=False)
    if base is not None:
        for entry in (part.records for part in rewritten_parts(local, base)):
            if not is_whole(folder / entry.name, entry.sha256):
                place.write(base, entry.name, entry.sha256)
    merge = merge_versions(folder, config, remote, base)
    remove_others(folder, merge.version)
    logger.info(
        f"{folder} goes on from version {head[:12]}, which another machine published, and adds {merge.added:,} images "
        f"of version {local.digest[:12]} to it"
    )
    if merge.lost:
        logger.warning(
            f"{merge.lost:,} further names of images are left out, as version {head[:12]} gave up the images that they "
            "are copies of: ingest them again with --rebuild to have them all the same"
        )


def _find_common_ancestor(folder: Path, place: DatasetLocation, remote: Manifest) -> Manifest | None:
    """Newest common ancestor of the local version and ``remote``; None if there is none."""
    line = {ancestor.digest: ancestor for ancestor in versions(folder)}
    child = remote
    while (parent := child.parent) is not None and parent not in line:
        path = version_path(folder, parent)
        if not is_whole(path, parent):
            place.write(remote, path.relative_to(folder).as_posix(), parent)
        child = parse_manifest(path.read_bytes(), str(path))
    return None if parent is None else line[parent]
