"""The aliases of a registered model in MLflow follow its ledger, and are mended by whoever comes by."""

from collections.abc import Mapping

import mlflow
from mlflow.client import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from diffusion.errors import UserError
from flows.history import Entry, History, Standing
from flows.ledger import Ledger
from flows.tags import parse_tags

CHAMPION, CHALLENGER, PREVIOUS = "champion", "challenger", "previous"
ALIASES = (CHAMPION, PREVIOUS, CHALLENGER)
"""In the order in which they are written."""
COPY = "darkroom.ledger."
"""Tags of versions: with an entry's number behind it, a copy of that entry for people, and its SHA-256."""


def project(client: MlflowClient, ledger: Ledger) -> History:
    """Make tags and aliases in MLflow say what the ledger says; writes only what differs, and returns the ledger.

    Raises UserError if the ledger is broken, or MLflow has copies of entries that it lacks.
    """
    while True:
        # First, so that no copy is there of an entry that came after the ledger was read.
        versions = _versions(ledger.model)
        history = ledger.read()
        if history.head is None:
            return history
        _copy(client, history, versions)
        _point(client, history, versions)
        # Somebody may have added an entry and been done with its aliases before we wrote ours.
        if (newest := ledger.head()) is None or newest.number <= history.head.number:
            return history


def named(client: MlflowClient, model: str, alias: str) -> int | None:
    """The number of the version that has one of ALIASES, by the ledger; None if none has.

    Costs two requests to S3 and one to MLflow while MLflow agrees, and mends it if it does not. A registry from before
    the ledger goes by its aliases.
    """
    ledger = Ledger.of(model)
    head, there = ledger.head(), aliases_of(client, model)
    if head is not None and there != wanted(head.standing):
        head = project(client, ledger).head
    return wanted(head.standing).get(alias) if head is not None else there.get(alias)


def wanted(standing: Standing) -> dict[str, int]:
    """Version numbers by alias."""
    found = {CHAMPION: standing.champion, PREVIOUS: standing.previous, CHALLENGER: standing.challenger}
    return {alias: number for alias, number in found.items() if number is not None}


def aliases_of(client: MlflowClient, model: str) -> dict[str, int]:
    """Those of ALIASES that MLflow has for ``model``; empty if it has no such model."""
    try:
        found = client.get_registered_model(model).aliases
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return {}
    return {alias: int(number) for alias, number in found.items() if alias in ALIASES}


def adopted(client: MlflowClient, ledger: Ledger) -> History:
    """The ledger, which begins with the champion that MLflow has if there was one before the ledger."""
    there = aliases_of(client, ledger.model)

    def adopt(history: History) -> Entry | None:
        if history.head is not None or CHAMPION not in there:
            return None
        number = there[CHAMPION]
        tags = client.get_model_version(ledger.model, str(number)).tags
        digest = parse_tags(tags, f"models:/{ledger.model}/{number}").weights_sha256 or ""
        return history.then("adopt", number, digest, challenger=there.get(CHALLENGER))

    return ledger.append(adopt)


def _copy(client: MlflowClient, history: History, versions: Mapping[int, ModelVersion]) -> None:
    """Tag the versions that each entry is about, or whose title it took, with what it says."""
    copies = {f"{COPY}{entry.number:08d}": f"{entry} (sha256 {entry.digest})" for entry in history.entries}
    for version in versions.values():
        for tag, text in version.tags.items():
            if tag.startswith(COPY) and copies.get(tag) != text:
                raise UserError(
                    f"the ledger of {history.model} has lost or changed an entry that models:/{history.model}/"
                    f"{version.version} has a copy of ({tag}: {text}): put it back, or delete that tag"
                )
    for entry, (tag, text) in zip(history.entries, copies.items(), strict=True):
        concerned = {entry.version, entry.to_version, entry.from_version} if entry.moves else {entry.version}
        for number in versions.keys() & concerned:
            if tag not in versions[number].tags:
                client.set_model_version_tag(history.model, str(number), tag, text)


def _point(client: MlflowClient, history: History, versions: Mapping[int, ModelVersion]) -> None:
    """Point the aliases at whom the ledger names, as far as they are still registered."""
    there, right = aliases_of(client, history.model), wanted(history.standing)
    for alias in ALIASES:
        number = right.get(alias)
        if number is None and alias in there:
            client.delete_registered_model_alias(history.model, alias)
        elif number is not None and number in versions and number != there.get(alias):
            client.set_registered_model_alias(history.model, alias, str(number))


def _versions(model: str) -> dict[int, ModelVersion]:
    return {int(each.version): each for each in mlflow.search_model_versions(filter_string=f"name='{model}'")}
