"""The aliases of a registered model in MLflow follow its ledger, and are mended by whoever comes by."""

from collections.abc import Mapping

from mlflow.client import MlflowClient
from mlflow.entities.model_registry import ModelVersion

from diffusion.errors import UserError
from flows.history import Entry, History, Standing
from flows.ledger import Ledger
from flows.ledger_record import (
    COPY,
    Record,
    append,
    copies,
    known_newest,
    registered_model,
    remember,
)
from flows.tags import parse_tags

CHAMPION, CHALLENGER, PREVIOUS = "champion", "challenger", "previous"
ALIASES = (CHAMPION, PREVIOUS, CHALLENGER)
"""In the order in which they are written."""


def project(client: MlflowClient, ledger: Ledger) -> History:
    """Make tags and aliases in MLflow say what the ledger says; writes only what differs, and returns the ledger.

    Raises UserError, and writes nothing, if the ledger is not what MLflow has on record.
    """
    while True:
        # First, so that no copy is there of an entry that came after the ledger was read.
        record = Record.of(client, ledger.model)
        history = ledger.read(record.known)
        if history.head is None:
            return history
        _copy(client, history, record.versions)
        _point(client, history, record.versions)
        remember(client, ledger, history)
        # Somebody may have added an entry and been done with its aliases before we wrote ours.
        newest = ledger.head({history.head.number: history.head.digest})
        if newest is None or newest.number <= history.head.number:
            return history


def named(client: MlflowClient, model: str, alias: str) -> int | None:
    """The number of the version that has one of ALIASES, by the ledger; None if none has.

    Costs one request to MLflow and two to S3 while they agree, and mends MLflow if they do not. A registry from before
    the ledger goes by its aliases. Raises UserError if the ledger has lost what MLflow has on record.
    """
    registered = registered_model(client, model)
    on_record = known_newest(model, registered.tags) if registered else {}
    there = _ours(registered.aliases) if registered else {}
    ledger = Ledger.of(model)
    head = ledger.head(on_record)
    if head is not None and (there != wanted(head.standing) or head.number not in on_record):
        head = project(client, ledger).head
    return wanted(head.standing).get(alias) if head is not None else there.get(alias)


def wanted(standing: Standing) -> dict[str, int]:
    """Version numbers by alias."""
    found = {CHAMPION: standing.champion, PREVIOUS: standing.previous, CHALLENGER: standing.challenger}
    return {alias: number for alias, number in found.items() if number is not None}


def aliases_of(client: MlflowClient, model: str) -> dict[str, int]:
    """Those of ALIASES that MLflow has for ``model``; empty if it has no such model."""
    registered = registered_model(client, model)
    return _ours(registered.aliases) if registered else {}


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

    return append(client, ledger, adopt)


def _copy(client: MlflowClient, history: History, versions: Mapping[int, ModelVersion]) -> None:
    """Tag the versions that each entry is about, or whose title it took, with what it says."""
    right = copies(history)
    for number, version in versions.items():
        for tag, text in version.tags.items():
            if tag.startswith(COPY) and right.get(number, {}).get(tag) != text:
                raise UserError(
                    f"the ledger of {history.model} has lost or changed an entry that models:/{history.model}/"
                    f"{number} has a copy of ({tag}: {text}): put it back, or delete that tag"
                )
    for number in sorted(versions.keys() & right.keys()):
        for tag, text in right[number].items():
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


def _ours(aliases: Mapping[str, str]) -> dict[str, int]:
    return {alias: int(number) for alias, number in aliases.items() if alias in ALIASES}
