"""Prefect events of the ledger: promoted, held, rejected and rolled back; automations turn them into messages."""

import logging
from collections.abc import Mapping
from uuid import NAMESPACE_URL, uuid5

from mlflow.client import MlflowClient
from prefect.context import refresh_global_settings_context
from prefect.events import Event

from flows.deployment.tasks import emit
from flows.local_stack.stack import join_servers, knows_server
from flows.registry.ledger import Ledger, LedgerEntry, LedgerEvent
from flows.tracking.runs import version_page

logger = logging.getLogger(__name__)

ANNOUNCED = "darkroom.announced"
"""Tag of a registered model: number of the newest entry of its ledger whose event was emitted."""
EVENTS: Mapping[LedgerEvent, str] = {
    "promote": "darkroom.model.promoted",
    "hold": "darkroom.model.held",
    "reject": "darkroom.model.rejected",
    "rollback": "darkroom.model.rolled_back",
}


def announce(client: MlflowClient, ledger: Ledger, entry: LedgerEntry, report: str | None = None) -> None:
    """Emit the event of ``entry`` once; ``report`` is the address of the comparison.

    Where no Prefect is known nothing happens. One that does not take the event is a warning: the ledger and MLflow have
    the verdict already. Killed before the tag is written, the same event is emitted again, which Prefect ignores.
    """
    if not knows_server("prefect"):
        return
    try:
        if int(client.get_registered_model(entry.model).tags.get(ANNOUNCED, 0)) >= entry.number:
            return
        # A rollback connects to MLflow and S3 alone; Prefect reads the environment when it is imported.
        join_servers("prefect")
        refresh_global_settings_context()
        emit(make_event(ledger, entry, report))
        client.set_registered_model_tag(entry.model, ANNOUNCED, str(entry.number))
    except Exception as error:  # noqa: BLE001 (Prefect's client raises Exception itself)
        logger.warning("no message says that %s: %s", describe(entry), " ".join(str(error).split())[:300])


def make_event(ledger: Ledger, entry: LedgerEntry, report: str | None) -> Event:
    """Prefect event of an entry; ``text`` of its payload is a message for people."""
    name, page = EVENTS[entry.what], version_page(entry.model, entry.version)
    return Event(
        event=name,
        id=uuid5(NAMESPACE_URL, f"{name}:{ledger.place}/{entry.number}/{entry.digest}"),
        resource={"prefect.resource.id": f"darkroom.model.{entry.model}", "prefect.resource.name": entry.model},
        payload={
            "text": "\n".join(filter(None, [f"{describe(entry)}: {entry.why}", page, report])),
            "model": entry.model,
            "version": entry.version,
            "champion": entry.to_version,
            "reason": entry.why,
            "page": page,
            "report": report,
        },
    )


def describe(entry: LedgerEntry) -> str:
    """What the entry decided, in a few words."""
    uri, champion = f"models:/{entry.model}/{entry.version}", entry.to_version
    if entry.what == "rollback":
        return f"{uri} is champion again, after a rollback of version {entry.from_version}"
    if entry.what == "promote":
        return f"{uri} is champion" + (f" instead of version {entry.from_version}" if entry.from_version else "")
    return f"{uri} is {EVENTS[entry.what].rpartition('.')[2]}, " + (
        f"version {champion} stays champion" if champion else "and there is no champion"
    )
