"""A data set on this machine and on all others: brought here, brought up to date, published and announced.

Several machines may add to one data set. Before an ingest or a takedown the version here is made to go on from the
newest one (``flows.datasets.catalog``): an older version is replaced by it, and what only this machine has is added to
it. Takedown records of the catalogue are applied at the same time, so that no image comes back that another machine
took down.
"""

import asyncio
import logging
from pathlib import Path
from uuid import NAMESPACE_URL, uuid5

from filelock import FileLock
from prefect.events import Event
from prefect.events.clients import get_events_client

from diffusion.common.errors import Held, UserError
from diffusion.common.progress import Progress, silent
from diffusion.data.ingest.config import IngestConfig
from diffusion.data.ingest.merge import unite
from diffusion.data.manifest import Manifest, parse_manifest, read_manifest, version_path, versions, work_folder
from diffusion.data.versions.takedown import remove_known
from diffusion.data.versions.versions import remember
from flows.config import Params
from flows.datasets import catalog, lineage
from flows.datasets.catalog import Catalogue, Heads
from flows.datasets.checkout import CheckedOut, Place, checkout, choice, forget_choice, remove_others
from flows.datasets.dvc import is_whole
from flows.datasets.lineage import DataVersion
from flows.deployment.tasks import step
from flows.environment import data_source

CREATED = "darkroom.dataset.version.created"
logger = logging.getLogger(__name__)


@step
def sync(params: Params, version: str | None = None) -> CheckedOut | None:
    """Bring ``version`` here, or the newest if an older one or none is here; None: nothing had to be done.

    Raises UserError as ``checkout`` does.
    """
    source = data_source()
    catalogue = Catalogue.of(params.training.dataset, source)
    wanted = version or newer(params, catalogue)
    if wanted is None:
        return None
    catalogue.fetch_removals(params.dataset_folder)
    return checkout(params.dataset_folder, wanted, lambda: source)


def newer(params: Params, catalogue: Catalogue) -> str | None:
    """The newest version in the ``catalogue``; None if the one here comes from it, or was never put there."""
    newest, folder = Heads(catalogue).newest(), params.dataset_folder
    if newest is None or not (folder / "manifest.json").is_file():
        return newest
    # What was never published is only here: the next ingest adds it to the newest.
    unpublished = catalogue.written(read_manifest(folder).digest) is None
    return None if unpublished or any(version.digest == newest for version in versions(folder)) else newest


@step
def announce(params: Params, silently: bool) -> None:
    """Emit the event for the version that lies here, once it is in the catalogue; ``silently`` only notes it as told.

    A version is announced once. Killed between the event and the note of it, the same step emits the same event again,
    with the same id.
    """
    catalogue = Catalogue.of(params.training.dataset, data_source())
    version = read_manifest(params.dataset_folder)
    if catalogue.announced(version.digest):
        return
    if not silently:
        asyncio.run(_emit(created(version, catalogue)))
    catalogue.mark_announced(version.digest)


def created(version: Manifest, catalogue: Catalogue) -> Event:
    """The event of ``version``."""
    return Event(
        event=CREATED,
        id=uuid5(NAMESPACE_URL, f"{CREATED}:{catalogue.place}/{version.digest}"),
        resource={
            "prefect.resource.id": f"darkroom.dataset.{version.name}",
            "prefect.resource.name": version.name,
        },
        payload={
            "digest": version.digest,
            "content_digest": version.content_digest,
            "parent": version.parent,
            "change": version.change,
            "kept": version.kept,
        },
    )


async def _emit(event: Event) -> None:
    # Confirmed before it is noted: Prefect's own emitter sends in the background.
    async with get_events_client(checkpoint_every=1) as client:
        await client.emit(event)


def bring_up_to_date(
    folder: Path, source: str, config: IngestConfig, progress: Progress = silent, anew: bool = False
) -> None:
    """Make the data set in ``folder`` go on from its newest version in the catalogue, without images taken down since.

    ``anew``: it is about to be made anew, so nothing of the version here has to be kept. A version that a person went
    back to stays, if its newer versions were known then. Takes turns with ingests; killed and given again, it ends the
    same.

    Raises:
        Held: If the newest version is not one that the version here can be added to.
        UserError: If a file of the newest version is to be had nowhere.
    """
    work_folder(folder).mkdir(parents=True, exist_ok=True)
    with FileLock(work_folder(folder) / "lock"):
        recorded = Catalogue.of(folder.name, source)
        recorded.fetch_removals(folder)
        head = Heads(recorded).adopt()
        if head is not None and not _goes_on_from(folder, head):
            _move(folder, source, recorded, head, config, anew)
        if (folder / "manifest.json").is_file():
            for removal in remove_known(folder, progress):
                logger.warning("%s: images that were taken down (%s) are removed here, too", folder, removal.reason)


def publish(folder: Path, source: str) -> DataVersion | None:
    """Record, push and catalogue the current version of the data set in ``folder``, and make it the newest.

    Returns None if somebody was faster, or took images down meanwhile that it holds: then ``bring_up_to_date`` and
    publish again. Killed and given again, it ends the same: until the version is the newest, nobody waits for it.
    """
    recorded = Catalogue.of(folder.name, source)
    turn = FileLock(work_folder(folder) / "lock")
    with turn, catalog.pushing(folder.name, source, recorded.store):
        if recorded.held_removals(folder):
            return None
        version = lineage.record_data(folder, source)
        recorded.publish(read_manifest(folder), version.digest)
        # A takedown writes its record first and lists the versions in the catalogue then. So of a takedown that began
        # meanwhile either we see the record, or it sees this version.
        if recorded.held_removals(folder):
            return None
        current = read_manifest(folder)
        chosen = choice(folder)
        line = {each.digest for each in versions(folder)}
        if (faster := Heads(recorded).advance(current.digest, line | set(chosen.known if chosen else ()))) is not None:
            logger.info("version %s of data set %s was published meanwhile", faster[:12], folder.name)
            return None
        if chosen is not None:
            _tell_of_choice(folder.name, current, chosen.version)
        forget_choice(folder)
        return version


def _goes_on_from(folder: Path, head: str) -> bool:
    """Whether the version here comes from ``head``, or leaves it out on purpose."""
    if not (folder / "manifest.json").is_file():
        return False
    if any(version.digest == head for version in versions(folder)):
        return True
    chosen = choice(folder)
    return chosen is not None and head in chosen.known


def _move(folder: Path, source: str, recorded: Catalogue, head: str, config: IngestConfig, anew: bool) -> None:
    """Go on from ``head`` instead of what the version here comes from."""
    theirs = recorded.version(head)
    assert theirs is not None, "a head is in the catalogue"
    place = Place.of(folder, lambda: source)
    place.known = place.known | {head: theirs}
    place.catalogue()
    if not (folder / "manifest.json").is_file() or anew:
        # What is made anew needs of the version before only the tables, which tell what was taken down.
        place.make_current(theirs, with_removed=True, without_shards=anew and config.near_duplicates is None)
        return
    if (chosen := choice(folder)) is not None:
        # The same checkout again says that it is to be left out.
        remember(folder, theirs)
        raise Held(
            f"somebody was faster: version {head[:12]} of data set {folder.name} was published since "
            f"{chosen.version[:12]} was checked out: `darkroom data checkout {head[:12]} --dataset {folder.name}` to "
            f"add to it, or `darkroom data checkout {chosen.version[:12]} --dataset {folder.name}` again to leave it "
            "out"
        )
    ours = read_manifest(folder)
    base = _common(folder, place, theirs)
    if base is not None and base.digest == ours.digest:
        place.make_current(theirs, with_removed=True)
        logger.info("%s goes on from version %s, which another machine published", folder, head[:12])
        return
    place.keep_current(theirs)
    place.fetch(theirs, without_shards=False)
    found = unite(folder, config, theirs, base)
    remove_others(folder, found.version)
    logger.info(
        "%s goes on from version %s, which another machine published, and adds %s images of version %s to it",
        folder,
        head[:12],
        f"{found.added:,}",
        ours.digest[:12],
    )
    if found.lost:
        logger.warning(
            "%s further names of images are left out, as version %s gave up the images that they are copies of: "
            "ingest them again with --rebuild to have them all the same",
            f"{found.lost:,}",
            head[:12],
        )


def _common(folder: Path, place: Place, theirs: Manifest) -> Manifest | None:
    """The newest version that the one here and ``theirs`` both come from; None if there is none."""
    line = {each.digest: each for each in versions(folder)}
    child = theirs
    while (parent := child.parent) is not None and parent not in line:
        path = version_path(folder, parent)
        name = path.relative_to(folder).as_posix()
        if not is_whole(path, parent) and not place.write(theirs, name, parent):
            raise UserError(
                f"{name} of version {theirs.digest[:12]} is neither in {folder}, nor in DVC's cache, nor on its remote "
                "(any more): check out another one, or ingest again from a source that has all of it"
            )
        child = parse_manifest(path.read_bytes(), str(path))
    return None if parent is None else line[parent]


def _tell_of_choice(name: str, current: Manifest, chosen: str) -> None:
    logger.warning(
        "version %s is the newest of data set %s now and goes on from %s, which was checked out: what later versions "
        "added is not in it; `darkroom data log --dataset %s` names them, and `darkroom data checkout` brings one back",
        current.digest[:12],
        name,
        chosen[:12],
        name,
    )
