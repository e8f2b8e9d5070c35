"""What must stay: what registered versions, the ledgers and kept prints lead to."""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from mlflow.client import MlflowClient

from flows.derived import pages
from flows.ledger import Ledger, Newest
from flows.ledger_record import verified
from flows.prints import Batch
from flows.registry import WEIGHTS
from flows.s3 import Location, Store

CONTENT = "darkroom.content_digest"
LEDGER = re.compile(r"ledger/([A-Za-z0-9][A-Za-z0-9_.-]*)/[0-9]{8}\.json")


@dataclass(frozen=True)
class Live:
    """Runs by id and contents of data sets by digest, each with what leads to it; and weights that are in use."""

    runs: dict[str, str]
    contents: dict[str, str]
    weights: frozenset[str]
    """SHA-256 of those of registered versions."""
    unclear: str | None
    """Why nobody can tell what else is needed, so that no run and no version of a data set may go; None if all can."""


def find_live(
    client: MlflowClient, store: Store, bucket: str, kept: Iterable[Batch], unread: Mapping[tuple[str, int], str]
) -> Live:
    """What all registered versions, the ledgers in ``bucket`` and the ``kept`` batches lead to.

    ``unread``: for batches that stay and cannot be read, the model versions that they lie under, and why.
    Every registered version counts, whatever its aliases: each has been judged, or is about to be. Raises UserError if
    a ledger is broken.
    """
    runs: dict[str, str] = {}
    contents: dict[str, str] = {}
    weights: set[str] = set()
    registered: set[tuple[str, int]] = set()
    for version in pages(client.search_model_versions):
        where = f"models:/{version.name}/{version.version}"
        registered.add((version.name, int(version.version)))
        weights.add(version.tags.get(WEIGHTS, ""))
        runs.setdefault(version.run_id or "", f"made {where}")
        contents.setdefault(version.tags.get(CONTENT, ""), f"{where} learned from it")
    for model, number, digest in _named_by_ledgers(client, store, bucket):
        if digest not in weights:
            # Somebody deleted the version; what the ledger says of it stands on the run all the same.
            runs |= dict.fromkeys(_logged_by(client, digest), f"the ledger names models:/{model}/{number}")
    for batch in kept:
        where = f"prints of models:/{batch.model}/{batch.version}"
        runs.setdefault(batch.run_id, f"made what drew {where}")
        contents.setdefault(batch.content_digest, f"{where} lead to it")
    # What a registered version leads to is known, whatever lies in its batches.
    unclear = next((words for version, words in unread.items() if version not in registered), None)
    return Live(runs, contents, frozenset(weights), unclear)


def _named_by_ledgers(client: MlflowClient, store: Store, bucket: str) -> Iterator[tuple[str, int, str]]:
    """Of every version that a ledger names: its model, its number and the SHA-256 of its weights."""
    keys = store.list_keys(bucket, "ledger/")
    # Also those of which nothing is left but what MLflow has on record.
    models = {
        model.name
        for model in pages(client.search_registered_models)
        if (newest := Newest.of(model.name, model.tags)) and newest.place == f"s3://{bucket}/ledger/{model.name}"
    }
    for model in sorted(models | {found[1] for key in keys if (found := LEDGER.fullmatch(key))}):
        for entry in verified(client, Ledger(model, Location(bucket) / "ledger" / model, store)).entries:
            yield model, entry.version, entry.weights_sha256


def _logged_by(client: MlflowClient, digest: str) -> set[str]:
    """The runs that logged a model with these weights."""
    experiments = [each.experiment_id for each in pages(client.search_experiments)]
    found = client.search_logged_models(experiments, f"tags.`{WEIGHTS}` = '{digest}'") if experiments else []
    return {model.source_run_id for model in found if model.source_run_id}
