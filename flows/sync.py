"""Versions of a data set between machines: the newest is brought here, and the event says that one is there."""

import asyncio
from uuid import NAMESPACE_URL, uuid5

from prefect.events import Event
from prefect.events.clients import get_events_client

from diffusion.data.manifest import Manifest, read_manifest, versions
from flows.catalogue import Catalogue, Heads
from flows.checkout import CheckedOut, checkout
from flows.environment import data_source
from flows.params import Params
from flows.steps import step


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
    catalogue.learn_removals(params.dataset_folder)
    return checkout(params.dataset_folder, wanted, lambda: source)


def newer(params: Params, catalogue: Catalogue) -> str | None:
    """The newest version in the ``catalogue``; None if the one here comes from it, or was never put there."""
    newest, folder = Heads(catalogue).newest(), params.dataset_folder
    if newest is None or not (folder / "manifest.json").is_file():
        return newest
    # What was never published is only here: the next ingest adds it to the newest.
    unpublished = catalogue.written(read_manifest(folder).digest) is None
    return None if unpublished or any(version.digest == newest for version in versions(folder)) else newest


CREATED = "darkroom.dataset.version.created"


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
    catalogue.note_announced(version.digest)


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
