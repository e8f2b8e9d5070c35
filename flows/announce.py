"""The event that a version of a data set is there, for whatever Prefect starts on it."""

import asyncio
from uuid import NAMESPACE_URL, uuid5

from prefect.events import Event
from prefect.events.clients import get_events_client

from diffusion.data.manifest import Manifest, read_manifest
from flows.catalogue import Catalogue
from flows.environment import data_source
from flows.params import Params
from flows.steps import step

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
