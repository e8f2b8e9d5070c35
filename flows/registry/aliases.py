"""MLflow's side of a ledger: a record of the newest entry, a copy of each entry, and the aliases.

An undetected change would have to alter both servers. The record is read before the ledger and written after it, so it
is never ahead of the ledger unless entries were removed. It may be behind if a process was stopped between the two or
MLflow was restored from a backup; the next process brings it up to date.
"""

import logging
import re
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import ParamSpec, TypeVar

import mlflow
from mlflow.client import MlflowClient
from mlflow.entities.model_registry import ModelVersion, RegisteredModel
from mlflow.exceptions import MlflowException

from diffusion.common.errors import UserError
from diffusion.common.files import sha256_bytes
from flows.environment import settings
from flows.registry.ledger import NEWEST, History, Known, Ledger, LedgerEntry, NewestEntry
from flows.signing.keys import SigningKey

logger = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")

COPY = "darkroom.ledger."
"""Prefix of version tags, followed by an entry's number: the entry in readable form, with its SHA-256; with the suffix
.json the bytes of the entry, on the version that the entry is about."""
COPY_NAME = re.compile(r"darkroom\.ledger\.([0-9]{8})(\.json)?")
COPY_END = re.compile(r"\(sha256 ([0-9a-f]{64})\)\Z")
CHAMPION = "champion"
ALIASES = (CHAMPION, "previous", "candidate")
"""Aliases, the fields of ``AliasNumbers``, in the order in which they are written."""


def none_if_missing(request: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R | None:
    """Send a request to MLflow; returns None if the requested object does not exist."""
    try:
        return request(*args, **kwargs)
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "NOT_FOUND", "INVALID_PARAMETER_VALUE"):
            raise
        return None


def list_aliases(client: MlflowClient, model: str) -> dict[str, int]:
    """MLflow's values of ALIASES for ``model``; empty if it has no such model."""
    return _aliases(none_if_missing(client.get_registered_model, model))


def _aliases(model: RegisteredModel | None) -> dict[str, int]:
    aliases = model.aliases if model else {}
    return {alias: int(number) for alias, number in aliases.items() if alias in ALIASES}


def _newest(model: RegisteredModel | None) -> Known:
    record = NewestEntry.of(model.name, model.tags) if model else None
    return {record.number: record.sha256} if record else {}


def read_record(client: MlflowClient, model: str) -> tuple[dict[int, str], dict[int, ModelVersion]]:
    """MLflow's record of the ledger of ``model``, and its versions by number; raises UserError if copies contradict."""
    digests = dict(_newest(none_if_missing(client.get_registered_model, model)))
    entries = mlflow.search_model_versions(filter_string=f"name='{model}'")
    versions = {int(version.version): version for version in entries}
    for tag, text in (item for version in entries for item in version.tags.items()):
        name = COPY_NAME.fullmatch(tag)
        digest_match = COPY_END.search(text) if name and not name[2] else None
        if not name or not (name[2] or digest_match):
            continue
        number, digest = int(name[1]), digest_match[1] if digest_match else sha256_bytes(text.encode())
        if digests.setdefault(number, digest) != digest:
            raise UserError(
                f"MLflow has two records of entry {number} of the ledger of {model} (sha256 {digests[number][:12]}… "
                f"and {digest[:12]}…): one of the tags {COPY}* was altered: see "
                "docs/operations/runbook/ledger-broken.md"
            )
    return digests, versions


def read_verified_history(client: MlflowClient, ledger: Ledger) -> History:
    """Read all entries of the ledger; raises UserError if they differ from MLflow's record."""
    return ledger.read(read_record(client, ledger.model)[0])


def append(client: MlflowClient, ledger: Ledger, decide: Callable[[History], LedgerEntry | None]) -> History:
    """Append to the ledger, with MLflow's record checked before the entry is written and updated after it.

    The entry is signed if a key is configured; raises UserError, and writes nothing, if it is unusable.
    """
    key, new_entries = signing_key(), list[LedgerEntry]()

    def note_entry(history: History) -> LedgerEntry | None:
        entry = decide(history)
        new_entries[:] = [] if entry is None else [entry]
        return entry

    history = ledger.append(note_entry, lambda: read_record(client, ledger.model)[0])
    if key is not None and new_entries:
        below = next((entry for entry in history.entries if entry.digest == new_entries[0].parent), None)
        if below is not None and not ledger.is_signed(below, key):
            logger.warning(
                "the signature of entry %d stands for an unsigned one as well: %s", new_entries[0].number, below
            )
        ledger.sign(new_entries[0], key)
    for name, reason in history.foreign.items():
        logger.warning("foreign object in %s, which decides nothing: %a %s", ledger.place, name, reason)
    remember(client, ledger, history)
    return history


def remember(client: MlflowClient, ledger: Ledger, history: History) -> None:
    """Record the newest entry in MLflow unless a newer one is recorded.

    It is signed by the process that wrote it, and by no other: whoever can write to the bucket alone could otherwise
    have an entry signed. One without a signature, of a process that was stopped or has no key, is reported.
    """
    if history.head is not None and (key := signing_key()) is not None and not ledger.is_signed(history.head, key):
        logger.warning(
            "the newest entry of the ledger of %s is not signed: %s; if that is right, sign it by `darkroom model "
            "history --sign`",
            history.model,
            history.head,
        )
    model = none_if_missing(client.get_registered_model, history.model)
    if model is None or history.head is None:
        return
    recorded = NewestEntry.of(history.model, model.tags)
    newest = NewestEntry(history.head.number, history.head.digest, str(ledger.place))
    if recorded is None or (recorded.number <= newest.number and recorded != newest):
        client.set_registered_model_tag(history.model, NEWEST, str(newest))


def signing_key() -> SigningKey | None:
    """Key of the environment; None: none is configured. Raises UserError if it is unusable, or its library missing."""
    if settings().signing_key is None:
        return None
    import_module("model_signing")
    return SigningKey.load()


def restore(client: MlflowClient, ledger: Ledger) -> list[int]:
    """Write recorded entries that are missing on S3 from MLflow's copies; returns their numbers.

    Existing objects are kept, altered or not. Raises UserError, and writes nothing, if an entry would still be missing.
    """
    digests, versions = read_record(client, ledger.model)
    tags = [tag for version in versions.values() for tag in version.tags.items()]
    data = {int(name[1]): text.encode() for tag, text in tags if (name := COPY_NAME.fullmatch(tag)) and name[2]}
    return ledger.restore(data, digests)


def project(client: MlflowClient, ledger: Ledger) -> History:
    """Bring tags and aliases in MLflow in line with the ledger, and return its history; only differences are written.

    Raises UserError, and writes nothing, if the ledger differs from MLflow's record.
    """
    while True:
        # Read first, so that it holds no copy of an entry that came after the ledger was read.
        digests, versions = read_record(client, ledger.model)
        history = ledger.read(digests)
        if history.head is None:
            return history
        _copy(client, history, versions)
        current_aliases, target_aliases = list_aliases(client, history.model), history.head.aliases
        for alias in ALIASES:
            if (number := target_aliases.get(alias)) is None and alias in current_aliases:
                client.delete_registered_model_alias(history.model, alias)
            elif number is not None and number in versions and number != current_aliases.get(alias):
                client.set_registered_model_alias(history.model, alias, str(number))
        remember(client, ledger, history)
        # Another process may have added an entry and written its aliases before this one wrote its own.
        newest_entry = ledger.head({history.head.number: history.head.digest})
        if newest_entry is None or newest_entry.number <= history.head.number:
            return history


def resolve_alias(client: MlflowClient, model: str, alias: str) -> int | None:
    """Resolve one of ALIASES to a version number by the ledger; None if the alias is unset.

    Repairs MLflow if it disagrees; without a ledger its aliases count. Raises UserError if the ledger lost an entry.
    """
    registered_model = none_if_missing(client.get_registered_model, model)
    record, aliases = _newest(registered_model), _aliases(registered_model)
    ledger = Ledger.of(model)
    if (head := ledger.head(record)) is not None and (aliases != head.aliases or head.number not in record):
        head = project(client, ledger).head
    return (head.aliases if head else aliases).get(alias)


def _copy(client: MlflowClient, history: History, versions: Mapping[int, ModelVersion]) -> None:
    """Tag the versions that each entry is about, or that it replaces, with a copy of the entry."""
    copies: dict[int, dict[str, str]] = {}
    for entry in history.entries:
        tag = f"{COPY}{entry.number:08d}"
        for version_number in (
            {entry.version, entry.to_version, entry.from_version} if entry.changes_champion else {entry.version}
        ):
            if version_number is not None:
                copies.setdefault(version_number, {})[tag] = f"{entry} (sha256 {entry.digest})"
        copies[entry.version][f"{tag}.json"] = entry.data.decode()
    for number, version in versions.items():
        for tag, text in version.tags.items():
            if tag.startswith(COPY) and copies.get(number, {}).get(tag) != text:
                raise UserError(
                    f"the ledger of {history.model} has lost or changed an entry that models:/{history.model}/"
                    f"{number} has a copy of ({tag}: {text}): put it back, or delete that tag"
                )
    for number in sorted(versions.keys() & copies.keys()):
        for tag, text in copies[number].items():
            if tag not in versions[number].tags:
                client.set_model_version_tag(history.model, str(number), tag, text)
